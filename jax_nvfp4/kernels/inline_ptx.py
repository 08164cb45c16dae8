# SPDX-License-Identifier: Apache-2.0
"""Inline PTX with typed results: what the kernels' own instructions are made with."""

from cutlass import Float32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op


def asm(results, operands, text, constraints, side_effects, loc, ip):
    """Inline PTX with any number of results.

    Args:
        results: the DSL types of its results.
        operands: its DSL values.
        text: PTX; `$0`, `$1`, ... are the results, then the operands.
        constraints: LLVM's letters for the same, in the same order.
        side_effects: keep it, and in its place, even where its results are not used.
        loc: of the call in the source, as `dsl_user_op` gives it.
        ip: where to insert, likewise.

    Returns:
        None, a value, or a tuple of values, by the number of results.
    """
    types = [r.mlir_type for r in results]
    if not types:
        whole = None
    elif len(types) == 1:
        whole = types[0]
    else:
        whole = llvm.StructType.get_literal(types)
    out = llvm.inline_asm(
        whole,
        [v.ir_value(loc=loc, ip=ip) for v in operands],
        text,
        constraints,
        has_side_effects=side_effects,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )
    if not types:
        return None
    if len(types) == 1:
        return results[0](out)
    return tuple(
        r(llvm.extractvalue(t, out, [i], loc=loc, ip=ip))
        for i, (r, t) in enumerate(zip(results, types, strict=True))
    )


@dsl_user_op
def fma(a, b, c, *, loc=None, ip=None):
    """The Float32 a * b + c, rounded once."""
    operands = [Float32(v) for v in (a, b, c)]
    return asm([Float32], operands, "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", False, loc, ip)
