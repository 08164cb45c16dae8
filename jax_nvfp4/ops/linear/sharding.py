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
from jax_nvfp4.ops.linear.reference import finish
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.sharding import partition
from jax_nvfp4.ops.sharding.typed import Placement, entries


@dataclasses.dataclass(frozen=True)
class Rows:
    """The factors that the rows of a weight, and what goes with them, are made of.

    Attributes:
        of_data: of the rows of the codes.
        of_scales: of the first axis of the block scales.
        of_global_scale: of a global scale for each row.
        of_bias: of the axes of the bias.
        of_result: of the last axes of the result.
        sizes: of each factor.
        divisible: "n", if the rows may be divided.
    """

    of_data: Any
    of_scales: Any
    of_global_scale: Any
    of_bias: tuple[Any, ...]
    of_result: tuple[Any, ...]
    sizes: dict[str, int]
    divisible: tuple[str, ...]


def rows_of(spec: LinearSpec, data: Any, block_scale: Any) -> Rows:
    """How the rows of a weight may be divided.

    Args:
        spec: of the call.
        data: aval of one matrix of codes as it is stored.
        block_scale: likewise, of its block scales.
    """
    of_weight = order(spec.arch or REFERENCE)
    columns = spec.n // 2 if spec.gated else spec.n
    stored: tuple[Any, Any, Any]
    column: Any = "n"
    if of_weight.canonical and not (spec.gated and spec.arch is None):
        sizes = {"n": columns, "pair": 2}
        stored = (("n", "pair") if spec.gated else "n",) * 3
    elif not of_weight.canonical and of_weight.whole_tiles(spec.n):
        tiles = spec.n // of_weight.row_tile
        sizes = {
            "n": tiles,
            "rows_of_tile": of_weight.row_tile,
            "columns_of_tile": columns // max(tiles, 1),
        }
        rows = ("n", "rows_of_tile")
        stored = (rows, "n" if of_weight.scale_tiled else rows, rows)
        column = ("n", "columns_of_tile") if spec.gated else rows
    else:  # the last tile holds rows that the result does not have; or gates are far from their ups
        sizes = {"n": columns, "stored_n": data.shape[0], "scale_n": block_scale.shape[0]}
        stored = ("stored_n", "scale_n", "stored_n" if spec.gated else "n")
    of_bias: tuple[Any, ...] = ("halves", column) if spec.gated else (column,)
    return Rows(
        *stored,
        of_bias=of_bias,
        of_result=of_bias if spec.activation is None else (column,),
        sizes=sizes | {"halves": 2},
        divisible=() if "stored_n" in sizes else ("n",),
    )


@dataclasses.dataclass(frozen=True)
class Columns:
    """The factors of K in x and in a weight as it is stored, and their sizes."""

    of_x: Any
    of_data: Any
    of_block_scale: tuple[str, ...]
    sizes: dict[str, int]
    divisible: tuple[str, ...]


def columns_of(spec: LinearSpec, data: Any, block_scale: Any) -> Columns:
    """How K may be divided: into parts of whole blocks, where the order keeps columns in place.

    Args:
        spec: of the call.
        data: aval of one matrix of codes as it is stored.
        block_scale: likewise, of its block scales.
    """
    in_order = order(spec.arch or REFERENCE).canonical
    whole = in_order and spec.k % numerics.BLOCK == 0 and not spec.batch_invariant
    of_scales = ("blocks",) if whole else ()
    rest = {
        f"scale_k{i}": block_scale.shape[i] for i in range(1 + len(of_scales), block_scale.ndim)
    }
    if whole:
        sizes = {"blocks": spec.k // numerics.BLOCK, "elements": numerics.BLOCK, "codes": 8}
        of_x: Any = ("blocks", "elements")
        of_data: Any = ("blocks", "codes")
    else:
        sizes = {"k": spec.k, "packed_k": data.shape[1]}
        of_x, of_data = "k", "packed_k"
    return Columns(of_x, of_data, (*of_scales, *rest), sizes | rest, of_scales)


def factors(*flat: Any, spec: LinearSpec) -> partition.Factors:
    """Rows of x and of the weight may be divided; K where each device's part is whole blocks.

    The order of a repacked weight mixes the rows of a tile and the columns: it is divided by whole
    tiles along the rows, and not along K. A canonical gated weight is not divided along its rows,
    for a part would hold gates without their ups. Sums over devices would come in an order that may
    depend on the number of rows, and are not for `batch_invariant`.
    """
    x, data, block_scale, w_scale, bias, scale_or_amax = spec.operands(flat)
    of_x = partition.leading(x)
    rows, columns = rows_of(spec, data, block_scale), columns_of(spec, data, block_scale)
    return partition.Factors(
        operands=(
            (*of_x, columns.of_x),
            (rows.of_data, columns.of_data),
            (rows.of_scales, *columns.of_block_scale),
            (rows.of_global_scale,) if w_scale.ndim else (),
            *([rows.of_bias] if bias is not None else []),
            *([tuple(of_x) if scale_or_amax.ndim else ()] if scale_or_amax is not None else []),
        ),
        results=((*of_x, *rows.of_result),),
        sizes=dict(zip(of_x, x.shape, strict=False)) | rows.sizes | columns.sizes,
        divisible=(*of_x, *rows.divisible, *columns.divisible),
    )


def part(
    bind: Callable[..., Any],
    flat: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    spec: LinearSpec,
) -> list[jax.Array]:
    """A device's part of y. Partial sums along K are float32; all else comes after their sum."""
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
    part = dataclasses.replace(part, has_bias=False, activation=None, out_dtype="float32")
    (partial,) = bind(*operands._replace(bias=None).flat(), spec=part)
    y = lax.psum(partial, over_k)
    return [finish(y, operands.bias, spec)]


def placement(x: jax.Array, data: jax.Array, spec: LinearSpec) -> Placement:
    """Places y with the rows of x and those of the weight.

    Args:
        x: (..., K).
        data: of the weight, canonical or repacked.
        spec: of the call.
    """
    columns = spec.columns
    # Of gates and ups side by side, a part would hold the ones without the others.
    count = columns[0] if len(columns) == 1 else 1
    return (((*entries(x)[:-1], entries(data)[0]), (*x.shape[:-1], count)),)
