# SPDX-License-Identifier: Apache-2.0
"""How the quantize operation is divided over the devices of a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from jax_nvfp4 import numerics
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.quantize.reference import Mode
from jax_nvfp4.ops.sharding import partition
from jax_nvfp4.ops.sharding.typed import Placement, entries


def factors(x: Any, *given: Any, mode: Mode) -> partition.Factors:
    """Rows may be divided, and columns where shards hold whole blocks."""
    rows, k = partition.leading(x), x.shape[-1]
    blocks = -(-k // numerics.BLOCK)
    per_row = given[0].shape if given else mode == "token"
    of_scale = rows if per_row else ()
    sizes = {**dict(zip(rows, x.shape, strict=False)), "blocks": blocks, "codes": 8}
    columns: Any = "k"
    if k % numerics.BLOCK == 0:
        columns, sizes["elements"] = ("blocks", "elements"), numerics.BLOCK
    else:
        sizes["k"] = k
    return partition.Factors(
        operands=((*rows, columns), *(of_scale for _ in given)),
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
    mode: Mode,
) -> list[jax.Array]:
    """Quantizes a device's part of x."""
    del parts
    x, *given = operands
    used, mode = scale.of_part(x, tuple(given), mode, axes)
    return bind(x, *used, mode=mode)


def placement(x: jax.Array, given: jax.Array | None, per_row: bool) -> Placement:
    """Where the parts of a quantized x are: with x, if whole blocks are.

    Args:
        x: (..., K).
        given: the global scale that is given, if any.
        per_row: whether there is one global scale for each row.
    """
    wished, (*rows, k) = entries(x), x.shape
    counts = (*rows, k // 16 if k % 16 == 0 else 1)
    if given is not None:
        of_scale: Any = (entries(given), given.shape)
    else:
        of_scale = (wished[:-1], tuple(rows)) if per_row else ((), ())
    return (wished, counts), (wished, counts), of_scale
