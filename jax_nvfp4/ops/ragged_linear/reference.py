# SPDX-License-Identifier: Apache-2.0
"""The ragged linear operation in pure JAX.

A loop over the groups that have rows, and within it over tiles of their rows. It costs what the
rows cost, whatever the number of groups, and dequantizes the weight of one group at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.linear import reference as dense
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize.reference import scales
from jax_nvfp4.ops.ragged_linear.spec import Operands, RaggedSpec, Ranges, ranges


def _tile_rows(m: int, groups: int) -> int:
    """Rows of a tile: about those of a group, for what a tile has more is computed for nothing."""
    return min(128, max(8, 1 << (ceil_div(m, groups) - 1).bit_length()))


def over_tiles(
    where: Ranges,
    m: int,
    out: jax.Array,
    of_group: Callable[[jax.Array], Any],
    step: Callable[[jax.Array, Any, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Runs a function over tiles of the rows of each group, one after another.

    Args:
        where: the rows of each group.
        m: rows in all.
        out: what the loop starts from.
        of_group: what all tiles of a group need: function of the group's index.
        step: of `out`, what the group needs, the tile's first row and which of its rows are the
            group's (bool), to the new `out`. A tile may reach beyond m by less than its rows.

    Returns:
        The last `out`.
    """
    groups = where.begin.shape[0]
    tile = _tile_rows(m, groups)
    empty = where.end <= where.begin
    occupied = jnp.argsort(empty, stable=True)

    def group_of(i: jax.Array, out: jax.Array) -> jax.Array:
        group = occupied[i]
        begin, end = where.begin[group], where.end[group]
        needed = of_group(group)

        def tile_of(t: jax.Array, out: jax.Array) -> jax.Array:
            start = begin + t * tile
            return step(out, needed, start, start + lax.iota(jnp.int32, tile) < end)

        return lax.fori_loop(0, (end - begin + tile - 1) // tile, tile_of, out)

    count = jnp.sum(~empty, dtype=jnp.int32)
    return lax.fori_loop(0, count, group_of, primitive.varying_as(out, count))


def padded(x: jax.Array, groups: int) -> jax.Array:
    """x with rows behind its last that a tile may reach."""
    return jnp.pad(x, [(0, _tile_rows(x.shape[0], groups)), *[(0, 0)] * (x.ndim - 1)])


def put(out: jax.Array, rows: jax.Array, start: jax.Array, inside: jax.Array) -> jax.Array:
    """Writes those rows of a tile that are inside its group."""
    there = lax.dynamic_slice_in_dim(out, start, rows.shape[0])
    chosen = jnp.where(inside.reshape(-1, *[1] * (rows.ndim - 1)), rows, there)
    return lax.dynamic_update_slice_in_dim(out, chosen, start, 0)


def take(x: jax.Array, start: jax.Array, inside: jax.Array) -> jax.Array:
    """The rows of a tile."""
    return lax.dynamic_slice_in_dim(x, start, inside.shape[0])


def matrix_of(weight: tuple[Any, ...], group: jax.Array) -> tuple[Any, Any, Any]:
    """The parts of one group's weight."""
    data, block_scale, global_scale = (
        lax.dynamic_index_in_dim(part, group, keepdims=False) for part in weight
    )
    return data, block_scale, global_scale


def scale_or_amax_of(
    operands: Operands, where: Ranges, scaling: Scaling
) -> tuple[jax.Array | None, Scaling]:
    """What is given for the rows of x, () or (M,), and the scaling that uses it.

    The amax of all rows is that of the rows that have a group: others count for nothing. A scale
    for each group is one for each row.
    """
    x, given = operands.x, operands.scale_or_amax
    if scaling == Scaling.TENSOR:
        below = lax.iota(jnp.int32, x.shape[0]) < where.total
        return numerics.amax(jnp.where(below[:, None], x, jnp.zeros((), x.dtype))), Scaling.AMAX
    if scaling == Scaling.STATIC and given is not None and given.ndim:
        group, has_one = where.of_rows(x.shape[0])
        return jnp.where(has_one, given[group], jnp.float32(1)), scaling
    return given, scaling


def _quantized(
    operands: Operands, where: Ranges, spec: LinearSpec
) -> tuple[jax.Array, jax.Array | None, Any]:
    """x as it is multiplied (float32), its global scale ((), (M,) or None), and their dtype."""
    x = operands.x
    if spec.scaling == Scaling.NONE:
        values = jnp.dtype(jnp.float16 if x.dtype == jnp.float16 else jnp.bfloat16)
        return x.astype(values).astype(jnp.float32), None, values
    scale_or_amax, scaling = scale_or_amax_of(operands, where, spec.scaling)
    encode, decode, x_scale = scales(x, scale_or_amax, scaling=scaling)
    values = numerics.quantized_values(x, encode, decode)
    return values[:, : spec.k], x_scale, jnp.dtype(jnp.bfloat16)


def reference(*flat: jax.Array, spec: RaggedSpec) -> list[jax.Array]:
    """Computes `activation(alpha * (x_q @ w_q.T) + bias)` of each group; rows of none are zero."""
    operands = spec.operands(flat)
    each, m, biases = spec.each, operands.x.shape[0], operands.bias
    out = jnp.zeros((m, *each.columns), each.out_dtype)
    if 0 in (out.size, spec.groups):
        return [out]
    where = ranges(operands.sizes, operands.offset, spec.groups, m)
    values, x_scale, dtype = _quantized(operands, where, each)
    values = padded(values, spec.groups)
    row_scale = None if x_scale is None or not x_scale.ndim else padded(x_scale, spec.groups)

    def of_group(group: jax.Array) -> Any:
        data, block_scale, w_scale = dense.canonical(matrix_of(operands.weight, group), each)
        w = numerics.block_values(data, block_scale)[:, : each.k]
        return w, w_scale, None if biases is None else biases[group]

    def step(out: jax.Array, needed: Any, start: jax.Array, inside: jax.Array) -> jax.Array:
        w, w_scale, bias = needed
        alpha = numerics.with_ndim(w_scale, 2)
        if row_scale is not None:
            alpha = take(row_scale, start, inside)[:, None] * alpha
        elif x_scale is not None:
            alpha = x_scale * alpha
        acc = dense.accumulate(take(values, start, inside), w, dtype, each)
        return put(out, dense.finish(dense.halves(alpha * acc, each), bias, each), start, inside)

    return [over_tiles(where, m, padded(out, spec.groups), of_group, step)[:m]]
