# SPDX-License-Identifier: Apache-2.0
"""Layers that mixed checkpoints keep in 8-bit floats: what their scales mean.

    algorithm                   scale of a weight (..., N, K)
    FP8                         (), (1,) or (...)
    FP8_PER_CHANNEL_PER_TOKEN   (..., N) or (..., N, 1)
    FP8_PB_WO                   (..., N/128, K/128) or (N/128, 1, K/128, 1)
    MXFP8                       (..., N, K/32), powers of two

All of them multiply, `weight_scale_inv` as DeepSeek names it included. The names of the algorithms
are ModelOpt's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np

from jax_nvfp4.integers import ceil_div

FP8, PER_CHANNEL, PER_BLOCK, MXFP8 = "FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "MXFP8"
SCALES = ("weight_scale", "weight_scale_inv")
MX_BLOCK = 32
_TILE = 128
_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_WIDE = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))


class Stored(Protocol):
    """A stored tensor, as far as its description goes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def scale_of(parts: Mapping[str, Stored]) -> str | None:
    """The suffix of the scale of a layer whose weight has 8 bits; None where it is no such."""
    weight = parts.get("weight")
    if weight is None or weight.dtype.itemsize != 1:
        return None
    return next((suffix for suffix in SCALES if suffix in parts), None)


def algorithm(weight: Stored, scale: Stored) -> str | None:
    """Names the algorithm of an 8-bit layer.

    Args:
        weight: its weight (..., N, K).
        scale: its scale.

    Returns:
        The algorithm, or None where dtype and shape are those of none.
    """
    if weight.dtype != _E4M3 or len(weight.shape) < 2:
        return None
    *lead, n, k = weight.shape
    stacked = tuple(lead)
    if scale.dtype in (np.uint8, _E8M0):
        return MXFP8 if scale.shape == (*stacked, n, ceil_div(k, MX_BLOCK)) else None
    if scale.dtype not in _WIDE:
        return None
    if math.prod(scale.shape) == 1 or scale.shape in (stacked, (*stacked, 1), (*stacked, 1, 1)):
        return FP8
    if scale.shape in ((*stacked, n), (*stacked, n, 1)):
        return PER_CHANNEL
    tiles = (ceil_div(n, _TILE), ceil_div(k, _TILE))
    if scale.shape in ((*stacked, *tiles), (tiles[0], 1, tiles[1], 1)):
        return PER_BLOCK
    return None


def dequantize(
    weight: np.ndarray, scale: np.ndarray, name: str, dtype: np.dtype[Any]
) -> np.ndarray:
    """The values of an 8-bit weight.

    Args:
        weight: (..., N, K).
        scale: of a shape that `algorithm` knows.
        name: the algorithm.
        dtype: of the result.

    Returns:
        weight * scale, in float32, rounded to the dtype.
    """
    *lead, n, k = weight.shape
    matrices = weight.reshape(-1, n, k)
    if name == MXFP8:
        scale = np.ldexp(np.float32(1), scale.view(np.uint8).astype(np.int32) - 127)
    tiles = {FP8: (n, k), PER_CHANNEL: (1, k), PER_BLOCK: (_TILE, _TILE), MXFP8: (1, MX_BLOCK)}
    tall, wide = (max(size, 1) for size in tiles[name])
    rows, columns = ceil_div(n, tall), ceil_div(k, wide)
    # One scale of a stack of experts may be for all of them.
    scales = scale.astype(np.float32).reshape(-1, max(rows, 1), max(columns, 1))
    scales = np.broadcast_to(scales, (len(matrices), *scales.shape[1:]))
    out = np.empty(matrices.shape, dtype)
    for i, matrix in enumerate(matrices):
        for start in range(0, n, _TILE):  # few rows at a time are in float32
            some = np.arange(start, min(start + _TILE, n))
            factors = np.repeat(scales[i][some // tall], wide, axis=-1)[:, :k]
            out[i, some] = (matrix[some].astype(np.float32) * factors).astype(dtype)
    return out.reshape(*lead, n, k)
