# SPDX-License-Identifier: Apache-2.0
"""The 128x4 swizzle: the order in which Blackwell's tensor cores read block scales.

Scales of 128 rows by 4 columns (64 elements along K) form a tile of 512 contiguous bytes; tiles
follow one another along K, then along the rows. Row n and column k of a matrix with `c` columns
lie at

    ((n // 128) * ceil(c / 4) + k // 4) * 512 + (n % 32) * 16 + ((n % 128) // 32) * 4 + k % 4

(cuBLAS documentation, "1D Block Scaling Factors Layout"; TransformerEngine, FlashInfer and XLA use
the same). Padded rows and columns are zeros. Both maps take JAX and NumPy arrays and return the
kind they were given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.integers import ceil_div

ROWS = 128
COLUMNS = 4


def _xp(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def swizzled_shape(rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of `rows` by `columns` scales once swizzled: row tiles, column tiles, 512."""
    return ceil_div(rows, ROWS), ceil_div(columns, COLUMNS), ROWS * COLUMNS


def swizzle(scales: jax.Array | np.ndarray) -> Any:
    """Puts scales into the 128x4 order.

    Args:
        scales: (..., rows, columns), any one-byte dtype; JAX or NumPy.

    Returns:
        (..., ceil(rows/128), ceil(columns/4), 512), zero-padded.
    """
    xp = _xp(scales)
    *lead, rows, columns = scales.shape
    row_tiles, column_tiles, size = swizzled_shape(rows, columns)
    padding = [(0, 0)] * len(lead)
    padding += [(0, row_tiles * ROWS - rows), (0, column_tiles * COLUMNS - columns)]
    tiles = xp.pad(scales, padding).reshape(*lead, row_tiles, 4, 32, column_tiles, COLUMNS)
    return xp.moveaxis(tiles, (-2, -3, -4), (-4, -3, -2)).reshape(
        *lead, row_tiles, column_tiles, size
    )


def unswizzle(swizzled: jax.Array | np.ndarray, rows: int, columns: int) -> Any:
    """The inverse of `swizzle`.

    Args:
        swizzled: (..., ceil(rows/128), ceil(columns/4), 512); JAX or NumPy.
        rows: rows to keep.
        columns: columns to keep.

    Returns:
        (..., rows, columns).
    """
    xp = _xp(swizzled)
    *lead, row_tiles, column_tiles, _ = swizzled.shape
    tiles = swizzled.reshape(*lead, row_tiles, column_tiles, 32, 4, COLUMNS)
    linear = xp.moveaxis(tiles, (-4, -3, -2), (-2, -3, -4))
    linear = linear.reshape(*lead, row_tiles * ROWS, column_tiles * COLUMNS)
    return linear[..., :rows, :columns]
