# SPDX-License-Identifier: Apache-2.0
"""How the quantize operation is divided over the devices of a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.sharding import partition
from jax_nvfp4.ops.sharding.typed import Placement, entries


def factors(x: Any, scale_or_amax: Any | None = None, *, scaling: Scaling) -> partition.Factors:
    """Divides rows, and columns where shards hold whole blocks."""
    rows, k = partition.leading(x), x.shape[-1]
    blocks = ceil_div(k, numerics.BLOCK)
    operands = () if scale_or_amax is None else (scale_or_amax,)
    per_row = scale_or_amax.shape if scale_or_amax is not None else scaling == Scaling.TOKEN
    of_scale = rows if per_row else ()
    sizes = {**dict(zip(rows, x.shape, strict=False)), "blocks": blocks, "codes": 8}
    columns: Any = "k"
    if k % numerics.BLOCK == 0:
        columns, sizes["elements"] = ("blocks", "elements"), numerics.BLOCK
    else:
        sizes["k"] = k
    return partition.Factors(
        operands=((*rows, columns), *(of_scale for _ in operands)),
        results=((*rows, ("blocks", "codes")), (*rows, "blocks"), of_scale),
        sizes=sizes,
        divisible=(*rows, "blocks") if k % numerics.BLOCK == 0 else rows,
    )


def part(
    bind: Callable[..., Any],
    operands: tuple[jax.Array, ...],
    *,
    axes: partition.Axes,
    parts: Mapping[str, int],
    scaling: Scaling,
) -> list[jax.Array]:
    """Quantizes a device's part of x."""
    del parts
    x, scale_or_amax = operands if len(operands) == 2 else (operands[0], None)
    scale_or_amax, scaling = scale.of_part(x, scale_or_amax, scaling, axes)
    return bind(*((x,) if scale_or_amax is None else (x, scale_or_amax)), scaling=scaling)


def placement(x: jax.Array, global_scale: jax.Array | None, per_row: bool) -> Placement:
    """Places the parts of a quantized x: with x, if whole blocks are.

    Args:
        x: (..., K).
        global_scale: the one that is given, if any.
        per_row: there is one global scale for each row.
    """
    wished, (*rows, k) = entries(x), x.shape
    counts = (*rows, k // numerics.BLOCK if k % numerics.BLOCK == 0 else 1)
    if global_scale is not None:
        of_scale: Any = (entries(global_scale), global_scale.shape)
    else:
        of_scale = (wished[:-1], tuple(rows)) if per_row else ((), ())
    return (wished, counts), (wished, counts), of_scale
