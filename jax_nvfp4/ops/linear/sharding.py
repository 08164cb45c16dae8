# SPDX-License-Identifier: Apache-2.0
"""How the linear operation is divided over the devices of a mesh."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.config import REFERENCE
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops.linear.reference import with_bias
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.sharding import partition
from jax_nvfp4.ops.sharding.typed import Placement, entries


def factors(*flat: Any, spec: LinearSpec) -> partition.Factors:
    """Rows of x and of the weight may be divided; K where each device's part is whole blocks.

    The order of a repacked weight mixes the rows of a tile and the columns: it is divided by whole
    tiles along the rows, and not along K. Sums over devices would come in an order that may depend
    on the number of rows, and are not for `batch_invariant`.
    """
    x, data, block_scale, w_scale, bias, scale_or_amax = spec.operands(flat)
    of_weight = order(spec.arch or REFERENCE)
    of_x = partition.leading(x)
    sizes = dict(zip(of_x, x.shape, strict=False))
    divisible = [*of_x]
    rows: Any = "n"
    if of_weight.canonical:
        sizes["n"] = spec.n
        divisible.append("n")
        of_data, of_scales = [rows], [rows]
    elif of_weight.whole_tiles(spec.n):
        tile = of_weight.row_tile
        sizes |= {"n": spec.n // tile, "rows_of_tile": tile}
        divisible.append("n")
        rows = ("n", "rows_of_tile")
        of_data, of_scales = [rows], ["n" if of_weight.scale_tiled else rows]
    else:  # the last tile holds rows that the result does not have
        sizes |= {"n": spec.n, "padded_n": data.shape[0], "scale_n": block_scale.shape[0]}
        of_data, of_scales = ["padded_n"], ["scale_n"]

    columns: Any = "k"
    if of_weight.canonical and spec.k % numerics.BLOCK == 0 and not spec.batch_invariant:
        sizes |= {"blocks": spec.k // numerics.BLOCK, "elements": numerics.BLOCK, "codes": 8}
        divisible.append("blocks")
        columns = ("blocks", "elements")
        of_data.append(("blocks", "codes"))
        of_scales.append("blocks")
    else:
        sizes |= {"k": spec.k, "packed_k": data.shape[1]}
        of_data.append("packed_k")
    for axis in range(len(of_scales), block_scale.ndim):
        of_scales.append(f"scale_k{axis}")
        sizes[of_scales[-1]] = block_scale.shape[axis]
    return partition.Factors(
        operands=(
            (*of_x, columns),
            tuple(of_data),
            tuple(of_scales),
            (rows,) if w_scale.ndim else (),
            *([(rows,)] if bias is not None else []),
            *([tuple(of_x) if scale_or_amax.ndim else ()] if scale_or_amax is not None else []),
        ),
        results=((*of_x, rows),),
        sizes=sizes,
        divisible=tuple(divisible),
    )


def part(
    bind: Callable[..., Any],
    flat: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    spec: LinearSpec,
) -> list[jax.Array]:
    """A device's part of y. Partial sums along K are float32; the bias is added to their sum."""
    operands = spec.operands(flat)
    over_k = axes.get("blocks", ())
    scale_or_amax, scaling = scale.of_part(operands.x, operands.scale_or_amax, spec.scaling, axes)
    operands = operands._replace(scale_or_amax=scale_or_amax)
    part = dataclasses.replace(
        spec,
        n=spec.n // parts.get("n", 1),
        k=spec.k // parts.get("blocks", 1),
        scaling=scaling,
    )
    if not over_k:
        return bind(*operands.flat(), spec=part)
    part = dataclasses.replace(part, has_bias=False, out_dtype="float32")
    (partial,) = bind(*operands._replace(bias=None).flat(), spec=part)
    y = lax.psum(partial, over_k)
    return [with_bias(y, operands.bias, spec)]


def placement(x: jax.Array, data: jax.Array, n: int) -> Placement:
    """Places y with the rows of x and those of the weight.

    Args:
        x: (..., K).
        data: of the weight, canonical or repacked.
        n: logical rows of the weight.
    """
    return (((*entries(x)[:-1], entries(data)[0]), (*x.shape[:-1], n)),)
