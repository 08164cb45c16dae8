# SPDX-License-Identifier: Apache-2.0
"""MXFP4 layers (OCP Microscaling Formats 1.0), which become NVFP4 without loss.

MXFP4 has the same codes, in blocks of 32 that share a power of two (e8m0). The powers of a matrix
become its global scale, `2**(largest - 8)`, and block scales `2**-9 .. 2**8`, all of which e4m3
holds; each is written twice, as NVFP4's blocks have 16 elements. A matrix whose powers span more
than 18 gets a global scale for each row; a row that does so still is refused.

    gpt-oss      `P_blocks` uint8 [..., N, K/32, 16], `P_scales` uint8 [..., N, K/32]
    DeepSeek     `X.weight` int8 [..., N, K/2], `X.scale` float8_e8m0fnu [..., N, K/32]
    ModelOpt     `X.weight` uint8 [..., N, K/2], `X.weight_scale` uint8 [..., N, K/32]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, empty, read
from jax_nvfp4.numerics import BLOCK

MX_BLOCK = 32
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))
_NAN, _BIAS = 255, 127
_SMALLEST, _LARGEST = -9, 8  # powers of two that a block scale holds
_GLOBAL = 110  # and those that a global scale holds, of either sign


def parts_of(parts: Mapping[str, Entry]) -> tuple[Entry, Entry] | None:
    """The codes and the scales of an MXFP4 layer; None where the layer is no such."""
    if "blocks" in parts and "scales" in parts:
        return parts["blocks"], parts["scales"]
    weight = parts.get("weight")
    scale = parts.get("scale", parts.get("weight_scale"))
    if weight is None or scale is None or weight.dtype not in _BYTES or len(weight.shape) < 2:
        return None
    if scale.dtype not in (np.uint8, _E8M0):
        return None
    shape = (*weight.shape[:-1], weight.shape[-1] * 2 // MX_BLOCK)
    return (weight, scale) if scale.shape == shape else None


def read_weight(
    data: Entry, scales: Entry, order_of: Callable[[int], np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a weight as NVFP4.

    Args:
        data: the codes.
        scales: the powers of two.
        order_of: from a count of rows, the order to put those of a matrix in; None to leave them.

    Returns:
        (data, block_scale, global_scale): uint8 (..., N, K/2), float8_e4m3fn (..., N, K/16), and
        float32 (...) or, where a matrix needs one for each row, (..., N).

    Raises:
        CheckpointError: the parts do not belong together, a scale is NaN, or a row has no exact
            form in NVFP4.
    """
    *lead, n, columns = scales.shape if len(scales.shape) >= 2 else (0, 0)
    k = columns * MX_BLOCK
    fits = data.shape in ((*lead, n, columns, MX_BLOCK // 2), (*lead, n, k // 2))
    if len(scales.shape) < 2 or not fits or scales.dtype.itemsize != 1:
        raise CheckpointError(
            f"{data.file}: tensor {data.name!r} is {data} and {scales.name!r} is {scales}; "
            f"expected [..., N, K/32, 16] and [..., N, K/32] of bytes"
        )
    order, count = order_of(n), math.prod(lead)
    codes = empty((count, n, k // 2), np.dtype(np.uint8))
    block_scale = empty((count, n, k // BLOCK), _E4M3)
    powers = np.zeros((count, n), np.int64)
    by_row = False
    for i in range(count):
        one = read(data.part(i, len(lead))).view(np.uint8).reshape(n, k // 2)
        exponents = read(scales.part(i, len(lead))).view(np.uint8).reshape(n, columns)
        if order is not None:
            one, exponents = one[order], exponents[order]
        codes[i] = one
        where = f"{scales.file}: tensor {scales.name!r}" + (f" at {i}" if lead else "")
        wide, powers[i], rows = _powers(where, one, exponents)
        by_row |= rows
        scale = np.ldexp(np.float32(1), wide - powers[i][:, None]).astype(_E4M3)
        block_scale[i] = np.repeat(scale, MX_BLOCK // BLOCK, axis=-1)
    global_scale = np.ldexp(np.float32(1), powers).astype(np.float32)
    return (
        codes.reshape(*lead, n, k // 2),
        block_scale.reshape(*lead, n, k // BLOCK),
        global_scale.reshape(*lead, n) if by_row else _first(global_scale).reshape(lead),
    )


def _first(global_scale: np.ndarray) -> np.ndarray:
    """The scale that all rows of each matrix have."""
    if global_scale.shape[1]:
        return global_scale[:, 0]
    return np.ones(global_scale.shape[0], np.float32)


def _powers(
    where: str, codes: np.ndarray, exponents: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Splits the powers of one matrix into those of its blocks and its rows.

    Returns:
        (blocks (N, K/32), rows (N,), whether rows differ): the power of a block is brought into
        the range of its row where all its codes are zeros, which any scale leaves so.
    """
    if (exponents == _NAN).any():
        at = [int(x) for x in np.argwhere(exponents == _NAN)[0]]
        raise CheckpointError(f"{where} holds NaN, the first at {at}")
    n, columns = exponents.shape
    live = (codes.reshape(n, columns, -1) & 0x77).any(axis=-1)
    wide = exponents.astype(np.int64) - _BIAS
    high = np.where(live, wide, -1000).max(axis=-1, initial=-1000)
    low = np.where(live, wide, 1000).min(axis=-1, initial=1000)
    rows = np.full(n, _global_power(high.max(initial=-1000)))
    by_row = bool((low < rows + _SMALLEST).any())
    if by_row:
        rows = np.array([_global_power(power) for power in high], np.int64)
    bad = (low < rows + _SMALLEST) | (high > rows + _LARGEST)
    if bad.any():
        row = int(np.argmax(bad))
        raise CheckpointError(
            f"{where} has powers of two from {low[row]} to {high[row]} in row {row}, which NVFP4 "
            f"cannot hold exactly: a row may span {_LARGEST - _SMALLEST + 1} of them"
        )
    least, most = rows[:, None] + _SMALLEST, rows[:, None] + _LARGEST
    return np.clip(wide, least, most), rows, by_row


def _global_power(largest: int) -> int:
    """The power of a global scale beside which the largest power of a block fits."""
    if largest == -1000:
        return 0
    return int(np.clip(largest - _LARGEST, -_GLOBAL, _GLOBAL))
