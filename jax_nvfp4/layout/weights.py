# SPDX-License-Identifier: Apache-2.0
"""The order in which each architecture's GEMM reads a weight, and the way back.

Pure index maps with zero padding: no arithmetic, so the way back returns the same bits. Leading
axes (stacked layers) pass through. Single weights may be NumPy arrays: packed on the host, nothing
is compiled.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_nvfp4.config import ARCHES, REFERENCE
from jax_nvfp4.layout import gated as gated_rows
from jax_nvfp4.layout import sm90, swizzle

# A scale tile spans 4 scales, 64 elements; rows fill the tile of 128.
K_MULTIPLE = 64


def _over_leading_axes(function: Any, matrices: tuple[jax.Array, ...]) -> Any:
    """Applies a function of matrices over any leading axes they share."""
    lead = matrices[0].shape[:-2]
    if not lead:
        return function(*matrices)
    flat = [m.reshape(math.prod(lead), *m.shape[len(lead) :]) for m in matrices]
    return jax.tree.map(lambda a: a.reshape(*lead, *a.shape[1:]), jax.vmap(function)(*flat))


def _pack_blackwell(data: jax.Array, scale_bits: jax.Array) -> tuple[jax.Array, jax.Array]:
    *_, n, packed = data.shape
    padding = [(0, 0)] * (data.ndim - 2)
    padding += [(0, -n % swizzle.ROWS), (0, -packed % (K_MULTIPLE // 2))]
    xp: Any = np if isinstance(data, np.ndarray) else jnp
    return xp.pad(data, padding), swizzle.swizzle(scale_bits)


def _unpack_blackwell(
    data: jax.Array, scale_bits: jax.Array, n: int, blocks: int
) -> tuple[jax.Array, jax.Array]:
    return data[..., :n, : blocks * 8], swizzle.unswizzle(scale_bits, n, blocks)


def _check(arch: str) -> None:
    if arch != REFERENCE and arch not in ARCHES:
        names = ", ".join((*ARCHES, REFERENCE))
        raise ValueError(f"arch must be one of {names}; got {arch!r}")


def packed_shapes(
    arch: str, n: int, k: int, *, gated: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes that `pack_weight` gives to the codes and the scales of a weight (n, k)."""
    _check(arch)
    if gated:
        n = gated_rows.packed_rows(arch, n)
    blocks = -(-k // 16)
    if arch == REFERENCE:
        return (n, blocks * 8), (n, blocks)
    if arch == "sm_90a":
        return sm90.packed_shapes(n, blocks)
    rows, columns = -(-n // swizzle.ROWS), -(-k // K_MULTIPLE)
    return (rows * swizzle.ROWS, columns * K_MULTIPLE // 2), swizzle.swizzled_shape(n, blocks)


def pack_weight(
    arch: str, data: jax.Array, block_scale: jax.Array, *, gated: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Puts a weight into the order of an architecture's GEMM.

    Args:
        arch: a name of `config.ARCHES`, or "reference" (which keeps the canonical order).
        data: uint8 (..., N, blocks*8).
        block_scale: float8_e4m3fn (..., N, blocks).
        gated: whether the rows are those of a gate and an up projection, to be interleaved.

    Returns:
        (data, block_scale), uint8 both; their shapes depend on the architecture.
    """
    _check(arch)
    if isinstance(block_scale, np.ndarray):
        scale_bits: Any = block_scale.view(np.uint8)
    else:
        scale_bits = lax.bitcast_convert_type(block_scale, jnp.uint8)
    if gated:
        data, scale_bits = (gated_rows.interleave(arch, part, -2) for part in (data, scale_bits))
    if arch == REFERENCE:
        return data, scale_bits
    if arch == "sm_90a":
        return _over_leading_axes(sm90.pack, (data, scale_bits))
    return _pack_blackwell(data, scale_bits)


def unpack_weight(
    arch: str, data: jax.Array, scale_bits: jax.Array, n: int, k: int, *, gated: bool = False
) -> tuple[jax.Array, jax.Array]:
    """The inverse of `pack_weight`, bit for bit.

    Args:
        arch: the architecture whose order the weight is in.
        data: as `pack_weight` returned it.
        scale_bits: likewise.
        n: logical rows.
        k: logical columns.
        gated: as for `pack_weight`.

    Returns:
        (data, block_scale): uint8 (..., n, ceil(k/16)*8), float8_e4m3fn (..., n, ceil(k/16)).
    """
    _check(arch)
    blocks = -(-k // 16)
    rows = gated_rows.packed_rows(arch, n) if gated else n
    if arch == "sm_90a":
        unpack = functools.partial(sm90.unpack, n=rows, blocks=blocks)
        data, scale_bits = _over_leading_axes(unpack, (data, scale_bits))
    elif arch != REFERENCE:
        data, scale_bits = _unpack_blackwell(data, scale_bits, rows, blocks)
    if gated:
        data, scale_bits = (
            gated_rows.deinterleave(arch, part, -2, n) for part in (data, scale_bits)
        )
    return data, lax.bitcast_convert_type(scale_bits, jnp.float8_e4m3fn)
