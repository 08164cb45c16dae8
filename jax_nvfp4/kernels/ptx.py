# SPDX-License-Identifier: Apache-2.0
"""Inline PTX with typed results: what the kernels' own instructions are made with."""

from cutlass import Float32, Int32, Uint32
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
def fma_to(a, b, c, out_dtype, *, loc=None, ip=None):
    """The Float32 a * b + c to be stored as `out_dtype`, so that it is rounded once in all.

    For a 16-bit output it is rounded to odd: of the two neighbors of an inexact sum, the one whose
    last bit is set. It has over two bits more than the output, so rounding it to nearest then
    gives what rounding the exact sum would (Boldo and Melquiond, "Emulation of FMA and correctly
    rounded sums: proved algorithms using rounding to odd", IEEE Trans. Computers 57(4), 2008).

    Args:
        a: Float32.
        b: Float32.
        c: Float32.
        out_dtype: the code of the output's dtype, known at compile time or not; 0 is float32.
        loc: of the call in the source, as `dsl_user_op` gives it.
        ip: where to insert, likewise.
    """
    text = """{
        .reg .f32 down, up;
        .reg .b32 last;
        .reg .pred is_odd, is_float;
        fma.rm.f32 down, $1, $2, $3;
        fma.rp.f32 up, $1, $2, $3;
        mov.b32 last, down;
        and.b32 last, last, 1;
        setp.ne.b32 is_odd, last, 0;
        selp.f32 up, down, up, is_odd;
        fma.rn.f32 down, $1, $2, $3;
        setp.eq.b32 is_float, $4, 0;
        selp.f32 $0, down, up, is_float;
    }"""
    operands = [*(Float32(v) for v in (a, b, c)), Int32(out_dtype)]
    return asm([Float32], operands, text, "=f,f,f,f,r", False, loc, ip)


@dsl_user_op
def load_shared_x4(address, *, loc=None, ip=None):
    """The four Uint32 at a shared-memory address that is a multiple of 16."""
    text = "ld.shared.v4.b32 {$0,$1,$2,$3}, [$4];"
    return asm([Uint32] * 4, [address], text, "=r,=r,=r,=r,r", True, loc, ip)


@dsl_user_op
def permute(a, b, selector, *, loc=None, ip=None):
    """PRMT: four bytes chosen from those of a (0-3) and b (4-7); +8 replicates the sign."""
    operands = [Int32(a), Int32(b), Int32(selector)]
    return asm([Int32], operands, "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", False, loc, ip)


@dsl_user_op
def select(condition, yes, no, *, loc=None, ip=None):
    """`yes` where the Boolean `condition` holds, else `no`, without a branch."""
    values = (v.ir_value(loc=loc, ip=ip) for v in (condition, yes, no))
    return type(yes)(llvm.select(*values, loc=loc, ip=ip))


def shared_address(pointer):
    """The 32-bit shared-memory address of a pointer."""
    return Int32(pointer.toint())


@dsl_user_op
def wait_cluster(barrier, phase, *, loc=None, ip=None):
    """Waits for a phase of an mbarrier that orders the writes of other CTAs of the cluster."""
    text = (
        "{ .reg .pred p; WAIT: "
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [$0], $1; @!p bra WAIT; }"
    )
    return asm([], [shared_address(barrier), Int32(phase)], text, "r,r,~{memory}", True, loc, ip)


@dsl_user_op
def fence_release_shared(*, loc=None, ip=None):
    """Releases to the cluster what this thread did with its own CTA's shared memory, only."""
    text = "fence.release.sync_restrict::shared::cta.cluster;"
    return asm([], [], text, "~{memory}", True, loc, ip)
