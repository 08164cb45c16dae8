# SPDX-License-Identifier: Apache-2.0
"""How the ragged linear operation is divided over the devices of a mesh.

Rows of the weights may be divided as those of one weight, K likewise, and groups: a device then
makes the rows of its groups, zeros elsewhere, and the sum over devices is the whole. Rows of x are
not divided, for the sizes are those of all rows; a device's own rows, with sizes of their own, are
for the user's `shard_map`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops.linear.reference import finish
from jax_nvfp4.ops.linear.sharding import columns_of, rows_of
from jax_nvfp4.ops.ragged_linear.reference import scale_or_amax_of
from jax_nvfp4.ops.ragged_linear.spec import RaggedSpec, ranges
from jax_nvfp4.ops.sharding import partition
from jax_nvfp4.ops.sharding.typed import Placement, entries


def factors(*flat: Any, spec: RaggedSpec) -> partition.Factors:
    """Groups, rows of the weights by whole tiles, and K where parts are whole blocks."""
    operands, each = spec.operands(flat), spec.each
    x, data, block_scale = operands.x, operands.data, operands.block_scale

    def matrix(part: Any) -> Any:
        return jax.ShapeDtypeStruct(part.shape[1:], part.dtype)

    stored = matrix(data), matrix(block_scale)
    rows, columns = rows_of(each, *stored), columns_of(each, *stored)
    given = operands.scale_or_amax
    names = operands._replace(
        x=("m", columns.of_x),
        data=("g", rows.of_data, columns.of_data),
        block_scale=("g", rows.of_scales, *columns.of_block_scale),
        w_scale=("g", rows.of_global_scale)[: operands.w_scale.ndim],
        sizes=("s",),
        offset=None if operands.offset is None else (),
        bias=None if operands.bias is None else ("g", *rows.of_bias),
        scale_or_amax=None if given is None else _of_scale(each.scaling)[: given.ndim],
    )
    return partition.Factors(
        operands=names.flat(),
        results=(("m", *rows.of_result),),
        sizes={"m": x.shape[0], "g": spec.groups, "s": operands.sizes.shape[0]}
        | rows.sizes
        | columns.sizes,
        divisible=("g", *rows.divisible, *columns.divisible),
    )


def _of_scale(scaling: Scaling) -> tuple[str, ...]:
    """The factors of a scale or an amax that has any: one for each group, or for each row."""
    return ("g",) if scaling == Scaling.STATIC else ("m",)


def part(
    bind: Callable[..., Any],
    flat: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    spec: RaggedSpec,
) -> list[jax.Array]:
    """A device's part of y: of the rows of its groups, by its rows of their weights."""
    own = spec.operands(flat)
    over_groups, over_k = axes.get("g", ()), axes.get("blocks", ())
    groups = spec.groups // parts.get("g", 1)
    each = dataclasses.replace(
        spec.each, n=spec.each.n // parts.get("n", 1), k=spec.each.k // parts.get("blocks", 1)
    )
    whole, m = each, own.x.shape[0]
    offset = jnp.zeros((), jnp.int32) if own.offset is None else own.offset
    if over_groups:
        offset = offset + lax.axis_index(over_groups).astype(jnp.int32) * groups
    has_offset = own.offset is not None or bool(over_groups)
    where = ranges(own.sizes, offset, groups, m)
    if over_k:
        if each.scaling in (Scaling.TOKEN, Scaling.TENSOR):
            if each.scaling == Scaling.TOKEN:
                amax: Any = numerics.amax(own.x, axis=-1)
            else:
                amax, _ = scale_or_amax_of(own, where, Scaling.TENSOR)
            own = own._replace(scale_or_amax=lax.pmax(amax, over_k))
            each = dataclasses.replace(each, scaling=Scaling.AMAX)
        each = dataclasses.replace(each, has_bias=False, activation=None, out_dtype="float32")
    used = own._replace(
        offset=offset if has_offset else None, bias=own.bias if each.has_bias else None
    )
    (y,) = bind(*used.flat(), spec=RaggedSpec(each, groups, has_offset))
    if over_k:
        y = lax.psum(y, over_k)
        group, has_one = where.of_rows(m)
        bias = None if own.bias is None else own.bias[group]
        mask = has_one.reshape(m, *[1] * len(whole.columns))
        y = jnp.where(mask, finish(y, bias, whole), jnp.zeros((), whole.out_dtype))
    return [lax.psum(y, over_groups) if over_groups else y]


def placement(x: jax.Array, data: jax.Array, spec: RaggedSpec) -> Placement:
    """Where y is: with the rows of x and those of the weights.

    Args:
        x: (M, K).
        data: of the weights, canonical or repacked.
        spec: of the call.
    """
    columns = spec.each.columns
    count = columns[0] if len(columns) == 1 else 1
    return (((entries(x)[0], entries(data)[1]), (x.shape[0], count)),)
