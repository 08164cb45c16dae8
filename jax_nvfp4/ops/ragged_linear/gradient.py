# SPDX-License-Identifier: Apache-2.0
"""The straight-through gradient of the ragged linear operation.

Two linear maps and their transposes: rows times the dequantized weight of their group, and a row of
the bias for each row of x, whose transpose sums the rows of each group. Both cost what the rows
cost, and leave zeros in rows of no group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jax_nvfp4 import numerics
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.linear import reference as dense
from jax_nvfp4.ops.ragged_linear.reference import matrix_of, over_tiles, padded, put, take
from jax_nvfp4.ops.ragged_linear.spec import RaggedSpec, ranges


def straight_through(
    v: jax.Array,
    weight: tuple[Any, ...],
    sizes: jax.Array,
    offset: jax.Array | None,
    *,
    transposed: bool,
    dtype: str,
    spec: RaggedSpec,
) -> jax.Array:
    """The rows of v times the dequantized weights of their groups.

    Args:
        v: (M, K) or, transposed, (M, N).
        weight: data, block_scale, global_scale in the order of the spec's arch.
        sizes: int32 (S,).
        offset: int32 () or None.
        transposed: whether the weights are.
        dtype: of the result.
        spec: of the call.

    Returns:
        (M, N) or, transposed, (M, K).
    """
    where = (sizes,) if offset is None else (sizes, offset)
    operands = (v, *weight, *where)
    (result,) = primitive.bind(ste_p, *operands, transposed=transposed, dtype=dtype, spec=spec)
    return result


def _ste_abstract(
    v: Any, *others: Any, transposed: bool, dtype: str, spec: RaggedSpec
) -> list[Any]:
    columns = spec.each.k if transposed else spec.each.n
    return [primitive.out_aval((v.shape[0], columns), dtype, v)]


def _ste_impl(
    v: jax.Array,
    data: jax.Array,
    block_scale: jax.Array,
    global_scale: jax.Array,
    sizes: jax.Array,
    *offset: jax.Array,
    transposed: bool,
    dtype: str,
    spec: RaggedSpec,
) -> list[jax.Array]:
    m, each = v.shape[0], spec.each
    out = jnp.zeros((m, each.k if transposed else each.n), dtype)
    if 0 in (out.size, v.size, spec.groups):
        return [out]
    v = padded(v.astype(jnp.float32), spec.groups)

    def of_group(group: jax.Array) -> jax.Array:
        one = matrix_of((data, block_scale, global_scale), group)
        codes, scales, w_scale = dense.canonical(one, each)
        w_scale = w_scale if w_scale.ndim == 0 else w_scale[:, None]
        return numerics.dequantize(codes, scales, w_scale)[:, : each.k]

    def step(out: jax.Array, w: jax.Array, start: jax.Array, inside: jax.Array) -> jax.Array:
        contract = (((1,), (0 if transposed else 1,)), ((), ()))
        rows = take(v, start, inside)
        product = lax.dot_general(rows, w, contract, precision=lax.Precision.HIGHEST)
        return put(out, product.astype(dtype), start, inside)

    where = ranges(sizes, offset[0] if offset else None, spec.groups, m)
    return [over_tiles(where, m, padded(out, spec.groups), of_group, step)[:m]]


def _ste_transpose(
    cotangents: Any,
    v: Any,
    *others: Any,
    transposed: bool,
    dtype: str,
    spec: RaggedSpec,
) -> list[Any]:
    del dtype
    (ct,) = cotangents
    none_for_others = [None] * len(others)
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval), *none_for_others]
    kind = v.aval.dtype.name
    dv = primitive.bind(ste_p, ct, *others, transposed=not transposed, dtype=kind, spec=spec)
    return [*dv, *none_for_others]


def bias_rows(
    v: jax.Array, sizes: jax.Array, offset: jax.Array | None, *, groups: int, m: int
) -> jax.Array:
    """A row of v for each row of its group.

    Args:
        v: float32 (G, N).
        sizes: int32 (S,).
        offset: int32 () or None.
        groups: G.
        m: rows of the result.

    Returns:
        float32 (M, N).
    """
    where = (sizes,) if offset is None else (sizes, offset)
    (result,) = primitive.bind(rows_p, v, *where, transposed=False, groups=groups, m=m)
    return result


def _rows_abstract(v: Any, *where: Any, transposed: bool, groups: int, m: int) -> list[Any]:
    del where
    return [primitive.out_aval((groups if transposed else m, v.shape[1]), v.dtype, v)]


def _rows_impl(
    v: jax.Array,
    sizes: jax.Array,
    *offset: jax.Array,
    transposed: bool,
    groups: int,
    m: int,
) -> list[jax.Array]:
    """The rows, or transposed the sums of those of each group: one after another, no atomics."""
    out = jnp.zeros((groups if transposed else m, v.shape[1]), v.dtype)
    if 0 in (groups, m, v.size):
        return [out]
    where = ranges(sizes, offset[0] if offset else None, groups, m)
    if not transposed:
        group, has_one = where.of_rows(m)
        return [jnp.where(has_one[:, None], v[group], jnp.zeros((), v.dtype))]
    v = padded(v, groups)

    def step(out: jax.Array, group: jax.Array, start: jax.Array, inside: jax.Array) -> jax.Array:
        rows = jnp.where(inside[:, None], take(v, start, inside), 0)
        return out.at[group].add(rows.sum(axis=0), indices_are_sorted=True, unique_indices=True)

    return [over_tiles(where, m, out, lambda group: group, step)]


def _rows_transpose(
    cotangents: Any, v: Any, *where: Any, transposed: bool, groups: int, m: int
) -> list[Any]:
    (ct,) = cotangents
    none_for_where = [None] * len(where)
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval), *none_for_where]
    dv = primitive.bind(rows_p, ct, *where, transposed=not transposed, groups=groups, m=m)
    return [*dv, *none_for_where]


def _linear_in_first(name: str, abstract: Any, implementation: Any, transpose: Any) -> Any:
    """Makes a primitive that is linear in its first operand and constant in the others."""

    def batch(operands: Any, dims: Any, **params: Any) -> Any:
        return primitive.batch_by_loop(made, operands, dims, params)

    def jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
        results = made.bind(*primals, **params)
        if isinstance(tangents[0], ad.Zero):
            return results, [primitive.zero_tangent(r) for r in results]
        return results, made.bind(tangents[0], *primals[1:], **params)

    made = primitive.define(name, abstract=abstract, reference=implementation, batch=batch)
    ad.primitive_jvps[made] = jvp
    ad.primitive_transposes[made] = transpose
    return made


ste_p = _linear_in_first("nvfp4_ragged_linear_ste", _ste_abstract, _ste_impl, _ste_transpose)
rows_p = _linear_in_first("nvfp4_ragged_rows", _rows_abstract, _rows_impl, _rows_transpose)
