# SPDX-License-Identifier: Apache-2.0
"""The order in which each architecture's GEMM reads a weight, and the way back.

`order(arch)` is all that others know of an order. Pure index maps with zero padding: no arithmetic,
so the way back returns the same bits. Leading axes (stacked layers) pass through. Single weights
may be NumPy arrays: packed on the host, nothing is compiled.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nvfp4.config import ARCHES, REFERENCE
from jax_nvfp4.config.gemm.blackwell import GATED_HALF_TILE, GATED_RUN
from jax_nvfp4.config.quantize import BLOCK
from jax_nvfp4.integers import ceil_div, round_up
from jax_nvfp4.layout import sm90, swizzle
from jax_nvfp4.layout.gated import Interleaving

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
"""Those of the codes and of the scales."""


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of a weight for an architecture.

    Attributes:
        x_dtype: element type of a quantized x that the GEMM multiplies the weight by.
        row_tile: rows that lie together: a weight is divided, and padded, by whole tiles.
        k_multiple: what the columns are padded to a multiple of.
        scale_tiled: the first axis of the scales counts tiles of rows, not rows.
        marks: axes of length 1 at the end of the scales. They make the shapes of each order its
            own, so that a weight saved in one order is never taken for a weight in another, however
            it was saved. Interleaved rows have `_GATED_MARKS` more.
        gated: how the rows of a gate and an up projection are interleaved.
        matrix_shapes: (rows, blocks) to the shapes once packed, marks aside.
        pack_matrix: codes (..., rows, bytes) and bits of scales (..., rows, blocks), packed.
        unpack_matrix: the inverse, `(codes, scale_bits, n=rows, blocks=blocks)`.
    """

    x_dtype: str
    row_tile: int
    k_multiple: int
    scale_tiled: bool
    marks: int
    gated: Interleaving
    matrix_shapes: Callable[[int, int], Shapes]
    pack_matrix: Callable[..., Any]
    unpack_matrix: Callable[..., Any]

    @property
    def canonical(self) -> bool:
        """Rows and columns are where they are on disk; both may be divided anywhere."""
        return self.row_tile == 1

    def padded_k(self, k: int) -> int:
        """The columns of x and of the weight as the GEMM counts them."""
        return round_up(k, self.k_multiple)

    def whole_tiles(self, n: int) -> bool:
        """No row is padding: then the rows of the data are the rows of the weight."""
        return n % self.row_tile == 0

    def shapes(self, n: int, k: int, *, gated: bool = False) -> Shapes:
        """The shapes that `pack` gives to the codes and the scales of a weight (n, k)."""
        rows = self.gated.rows(n) if gated else n
        codes, scales = self.matrix_shapes(rows, ceil_div(k, BLOCK))
        return codes, (*scales, *self._marks(gated))

    def _marks(self, gated: bool) -> tuple[int, ...]:
        return (1,) * (self.marks + (_GATED_MARKS if gated else 0))

    def pack(
        self, data: jax.Array, block_scale: jax.Array, *, gated: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Puts a weight into this order.

        Args:
            data: uint8 (..., N, blocks*8).
            block_scale: float8_e4m3fn (..., N, blocks).
            gated: whether the rows are those of a gate and an up projection, to be interleaved.

        Returns:
            (data, block_scale), uint8 both.
        """
        if isinstance(block_scale, np.ndarray):
            scale_bits: Any = block_scale.view(np.uint8)
        else:
            scale_bits = lax.bitcast_convert_type(block_scale, jnp.uint8)
        if gated:
            data, scale_bits = (self.gated.interleave(part, -2) for part in (data, scale_bits))
        data, scale_bits = self.pack_matrix(data, scale_bits)
        return data, scale_bits.reshape(*scale_bits.shape, *self._marks(gated))

    def unpack(
        self, data: jax.Array, scale_bits: jax.Array, n: int, k: int, *, gated: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """The inverse of `pack`, bit for bit.

        Args:
            data: as `pack` returned it.
            scale_bits: likewise.
            n: logical rows.
            k: logical columns.
            gated: as for `pack`.

        Returns:
            (data, block_scale): uint8 (..., n, ceil(k/16)*8), float8_e4m3fn (..., n, ceil(k/16)).
        """
        rows = self.gated.rows(n) if gated else n
        unmarked = scale_bits.ndim - len(self._marks(gated))
        scale_bits = scale_bits.reshape(scale_bits.shape[:unmarked])
        data, scale_bits = self.unpack_matrix(data, scale_bits, n=rows, blocks=ceil_div(k, BLOCK))
        if gated:
            data, scale_bits = (self.gated.deinterleave(p, -2, n) for p in (data, scale_bits))
        return data, lax.bitcast_convert_type(scale_bits, jnp.float8_e4m3fn)


def order(arch: str) -> Order:
    """The order of a weight for an architecture.

    Args:
        arch: a name of `config.ARCHES`, or "reference" (which keeps the canonical order).

    Raises:
        ValueError: the arch is unknown.
    """
    if arch not in _ORDERS:
        raise ValueError(f"arch must be one of {', '.join(_ORDERS)}; got {arch!r}")
    return _ORDERS[arch]


def _over_leading_axes(function: Any, data: jax.Array, scale_bits: jax.Array, **sizes: int) -> Any:
    """Applies a function of matrices over any leading axes they share."""
    function = functools.partial(function, **sizes)
    lead = data.shape[:-2]
    if not lead:
        return function(data, scale_bits)
    flat = [m.reshape(math.prod(lead), *m.shape[len(lead) :]) for m in (data, scale_bits)]
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), jax.vmap(function)(*flat))


def _pack_swizzled(data: jax.Array, scale_bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    *_, n, packed = data.shape
    padding = [(0, 0)] * (data.ndim - 2)
    padding += [(0, -n % swizzle.ROWS), (0, -packed % (_SCALE_TILE // 2))]
    xp: Any = np if isinstance(data, np.ndarray) else jnp
    return xp.pad(data, padding), swizzle.swizzle(scale_bits)


def _unpack_swizzled(
    data: jax.Array, scale_bits: jax.Array, n: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
    return data[..., :n, : blocks * 8], swizzle.unswizzle(scale_bits, n, blocks)


def _swizzled_shapes(n: int, blocks: int) -> Shapes:
    rows, columns = ceil_div(n, swizzle.ROWS), ceil_div(blocks * BLOCK, _SCALE_TILE)
    return (rows * swizzle.ROWS, columns * _SCALE_TILE // 2), swizzle.swizzled_shape(n, blocks)


_SCALE_TILE = swizzle.COLUMNS * BLOCK
"""Columns that a tile of scales spans."""

_GATED_MARKS = 2

_REFERENCE = Order(
    x_dtype="bfloat16",
    row_tile=1,
    k_multiple=BLOCK,
    scale_tiled=False,
    marks=1,
    # No order of its own is needed: pairs let any number of devices divide a weight.
    gated=Interleaving(run=1, half_tile=1),
    matrix_shapes=lambda n, blocks: ((n, blocks * 8), (n, blocks)),
    pack_matrix=lambda data, scale_bits: (data, scale_bits),
    unpack_matrix=lambda data, scale_bits, n, blocks: (data, scale_bits),
)

_HOPPER = Order(
    x_dtype="bfloat16",
    row_tile=sm90.TILE_N,
    k_multiple=_SCALE_TILE,
    scale_tiled=False,
    marks=2,
    # Rows r, r + 1 of the gates and of the ups come to rows of the tile that one thread holds.
    gated=Interleaving(run=2, half_tile=sm90.TILE_N // 2),
    matrix_shapes=sm90.packed_shapes,
    pack_matrix=functools.partial(_over_leading_axes, sm90.pack),
    unpack_matrix=functools.partial(_over_leading_axes, sm90.unpack),
)

_BLACKWELL = Order(
    x_dtype="e2m1",
    row_tile=swizzle.ROWS,
    k_multiple=_SCALE_TILE,
    scale_tiled=True,
    marks=0,  # its scales end in tiles of 512
    gated=Interleaving(run=GATED_RUN, half_tile=GATED_HALF_TILE),
    matrix_shapes=_swizzled_shapes,
    pack_matrix=_pack_swizzled,
    unpack_matrix=_unpack_swizzled,
)

_ORDERS = {arch: _HOPPER if arch.startswith("sm_90") else _BLACKWELL for arch in ARCHES}
_ORDERS |= {REFERENCE: _REFERENCE}
