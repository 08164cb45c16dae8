# SPDX-License-Identifier: Apache-2.0
"""The order in which Hopper's GEMM reads a weight: the registers of `wgmma`'s A operand.

A tile is 128 rows by 128 columns of the weight: 8192 contiguous bytes of codes and 1024 of scales.
Tiles follow one another along K, then along N, so that what a CTA reads is one contiguous run.

Codes. In a tile, `[block of 64 rows][half of K][thread of a warpgroup][16 bytes]`. A thread's 16
bytes are four 32-bit words, one for each `wgmma` step of 16 columns; a word holds the eight codes
of the thread's A fragment in that step (PTX ISA, "Register Fragments for wgmma.mma_async.m64k16"):
four registers, each of two neighboring columns. The bits of a word are split so that a rotation
and a mask give a register of two bfloat16 whose sign, two lowest exponent bits and highest mantissa
bit are the code, that is, two codes times 2^-126. Three registers of each step sit in the step's
own word; what the two words of a pair of steps leave free holds the pair's fourth registers.

Rows. The fragment of a thread has rows r and r + 8 of its warp's 16, in two blocks of 64 rows.
Which rows of the weight these four are is chosen such that, once the accumulator has been
transposed, a thread holds eight neighboring outputs: row `32*warp + 8*(r//2) + 4*block + 2*half +
r%2` of the tile, half 1 being r + 8.

Scales. In a tile, `[block of 64 rows][warp][row r][16 bytes]`: the eight scales of row r and the
eight of row r + 8, one for each 16 columns. A scale is re-coded from e4m3 to five exponent and
three mantissa bits, which need no subnormals: a shift, and for bfloat16 one constant, give the
scale times 2^119 (bfloat16) or 2^7 (float16), exactly; 0 stays 0 and NaN NaN.

The format's scales are not negative. A scale byte with the sign bit set is packed as its absolute
value with the block's codes negated, which is the same numbers; all else comes back bit for bit.

All maps take JAX and NumPy arrays and return the kind they were given.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.config.quantize import BLOCK
from jax_nvfp4.integers import round_up

TILE_N = 128
TILE_K = 128

# By how much a word is rotated to the left to bring a register's bits to their places: the first,
# second and third register of the even and of the odd step of a pair.
ROTATIONS = ((0, 4, 10), (2, 6, 12))
# The same for the fourth registers of both steps, in the word merged from both words' free bits.
MERGED_ROTATIONS = (8, 14)
# Where a register's two codes are, once rotated: signs at bit 15, magnitudes at bits 8 to 6.
REGISTER_MASK = 0x81C081C0
# The bits of the merged word that the even step's word holds; the odd step's holds the rest.
MERGE_MASK = 0x06030603

# Re-coded scales: what is added to the e4m3 bits of a normal scale, and the code of NaN.
NORMAL_OFFSET = 120
NAN_CODE = 255
_E4M3_NAN = 0x7F
# e4m3 subnormals, multiples of 2^-9, as normal numbers.
_SUBNORMAL_CODES = (0, 104, 112, 116, 120, 122, 124, 126)


def _xp(array: Any) -> Any:
    return np if isinstance(array, np.ndarray) else jnp


def _rotate_left(words: Any, count: int) -> Any:
    return (words << count) | (words >> (32 - count)) if count % 32 else words


def _to_bytes(words: Any) -> Any:
    """uint32 (...) to uint8 (..., 4), little-endian."""
    if isinstance(words, np.ndarray):
        return np.ascontiguousarray(words).astype("<u4").view(np.uint8).reshape(*words.shape, 4)
    return jax.lax.bitcast_convert_type(words, jnp.uint8)


def _to_words(values: Any) -> Any:
    """uint8 (..., 4) to uint32 (...), little-endian."""
    if isinstance(values, np.ndarray):
        words = np.ascontiguousarray(values).view("<u4").astype(np.uint32)
        return words.reshape(values.shape[:-1])
    return jax.lax.bitcast_convert_type(values, jnp.uint32)


def packed_shapes(n: int, blocks: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of the packed codes and scales.

    Args:
        n: rows of the weight.
        blocks: its scales per row, ceil(k / 16).

    Returns:
        ((n_padded, k_padded / 2), (n_padded, k_padded / 16)), padded to whole tiles.
    """
    rows = round_up(n, TILE_N)
    columns = round_up(blocks * BLOCK, TILE_K)
    return (rows, columns // 2), (rows, columns // BLOCK)


def encode_scales(scale_bits: Any) -> Any:
    """e4m3 bits without sign (uint8, 0 to 0x7F) to the codes that the kernel expands."""
    xp = _xp(scale_bits)
    subnormal = xp.asarray(np.array(_SUBNORMAL_CODES, np.uint8))[xp.minimum(scale_bits, 7)]
    code = xp.where(scale_bits < 8, subnormal, scale_bits + np.uint8(NORMAL_OFFSET))
    return xp.where(scale_bits == _E4M3_NAN, np.uint8(NAN_CODE), code).astype(np.uint8)


def decode_scales(codes: Any) -> Any:
    """The inverse of `encode_scales`."""
    xp = _xp(codes)
    table = np.zeros(256, np.uint8)
    table[np.arange(8, _E4M3_NAN) + NORMAL_OFFSET] = np.arange(8, _E4M3_NAN)
    table[list(_SUBNORMAL_CODES)] = np.arange(8)
    table[NAN_CODE] = _E4M3_NAN
    return xp.asarray(table)[codes.astype(np.int32)]


def _registers(data: Any) -> Any:
    """Bytes of two neighboring codes to registers (uint32), the codes at REGISTER_MASK's bits."""
    wide = data.astype(np.uint32)
    low = ((wide & 0x8) << 12) | ((wide & 0x7) << 6)
    high = ((wide & 0x80) << 24) | ((wide & 0x70) << 18)
    return low | high


def _register_bytes(registers: Any) -> Any:
    """The inverse of `_registers`; bits outside REGISTER_MASK are ignored."""
    low = ((registers >> 12) & 0x8) | ((registers >> 6) & 0x7)
    high = ((registers >> 24) & 0x80) | ((registers >> 18) & 0x70)
    return (low | high).astype(np.uint8)


def _pack_codes(data: Any) -> Any:
    """Codes of whole tiles, uint8 (n, k/2), to the kernel's order."""
    xp = _xp(data)
    n, packed = data.shape
    #                     0  1  2  3  4  5  6            7  8   9  10  11
    #                     N  w  r2 b  h  r1 K            kh kp  ks c   t
    split = data.reshape(n // TILE_N, 4, 4, 2, 2, 2, packed * 2 // TILE_K, 2, 2, 2, 2, 4)
    # To N, K, block, half of K, warp, r (8), t (4), pair of steps, step, columns 0/8, half (r + 8).
    split = split.transpose(0, 6, 3, 7, 1, 2, 5, 11, 8, 9, 10, 4)
    registers = _registers(split.reshape(*split.shape[:10], 4))
    merged = sum(
        _rotate_left(registers[..., step, 3], 32 - MERGED_ROTATIONS[step]) for step in range(2)
    )
    words = []
    for step, free in enumerate((np.uint32(MERGE_MASK), np.uint32(~MERGE_MASK & 0xFFFFFFFF))):
        word = merged & free
        for r, count in enumerate(ROTATIONS[step]):
            word = word | _rotate_left(registers[..., step, r], 32 - count)
        words.append(word)
    return _to_bytes(xp.stack(words, axis=-1)).reshape(n, packed)


def _unpack_codes(packed: Any) -> Any:
    """The inverse of `_pack_codes`."""
    xp = _xp(packed)
    n, size = packed.shape
    words = _to_words(packed.reshape(n // TILE_N, size * 2 // TILE_K, 2, 2, 4, 4, 2, 4, 2, 2, 4))
    even, odd = words[..., 0], words[..., 1]
    merged = (even & np.uint32(MERGE_MASK)) | (odd & np.uint32(~MERGE_MASK & 0xFFFFFFFF))
    steps = [
        [_rotate_left(word, count) for count in ROTATIONS[step]]
        + [_rotate_left(merged, MERGED_ROTATIONS[step])]
        for step, word in enumerate((even, odd))
    ]
    registers = xp.stack([xp.stack(step, axis=-1) for step in steps], axis=-2)
    split = _register_bytes(registers).reshape(*registers.shape[:-1], 2, 2)
    return split.transpose(0, 4, 5, 2, 11, 6, 1, 3, 8, 9, 10, 7).reshape(n, size)


def _pack_scales(scale_bits: Any) -> Any:
    """Scales of whole tiles, uint8 (n, k/16) without sign, to the kernel's order."""
    n, blocks = scale_bits.shape
    codes = encode_scales(scale_bits)
    #                      N  w  r2 b  h  r1 K        sp sb
    split = codes.reshape(n // TILE_N, 4, 4, 2, 2, 2, blocks // 8, 4, 2)
    # To N, K, block, warp, r (8), pair of steps, half (r + 8), step: a word of four scales.
    words = _to_words(split.transpose(0, 6, 3, 1, 2, 5, 7, 4, 8).reshape(-1, 4))
    return _to_bytes(_rotate_left(words, 4)).reshape(n, blocks)


def _unpack_scales(packed: Any) -> Any:
    """The inverse of `_pack_scales`."""
    n, blocks = packed.shape
    codes = _to_bytes(_rotate_left(_to_words(packed.reshape(-1, 4)), 28))
    split = codes.reshape(n // TILE_N, blocks // 8, 2, 4, 4, 2, 4, 2, 2)
    return decode_scales(split.transpose(0, 3, 4, 2, 7, 5, 1, 6, 8).reshape(n, blocks))


def pack(data: jax.Array | np.ndarray, scale_bits: jax.Array | np.ndarray) -> tuple[Any, Any]:
    """Puts a weight into the kernel's order.

    Args:
        data: uint8 (n, blocks * 8), two codes a byte, the first in the low nibble.
        scale_bits: uint8 (n, blocks), the bits of the e4m3 scales.

    Returns:
        (data, scales), uint8 both, with the shapes of `packed_shapes`; padding is zero.
    """
    xp = _xp(data)
    n, blocks = scale_bits.shape
    (rows, packed), (_, columns) = packed_shapes(n, blocks)
    signs = (scale_bits >> 7) * np.uint8(0x88)
    data = (data.reshape(n, blocks, 8) ^ signs[..., None]).reshape(n, blocks * 8)
    data = xp.pad(data, ((0, rows - n), (0, packed - blocks * 8)))
    scale_bits = xp.pad(scale_bits & np.uint8(0x7F), ((0, rows - n), (0, columns - blocks)))
    return _pack_codes(data), _pack_scales(scale_bits)


def unpack(
    data: jax.Array | np.ndarray, scales: jax.Array | np.ndarray, n: int, blocks: int
) -> tuple[Any, Any]:
    """The inverse of `pack`.

    Args:
        data: uint8, as `pack` returned it.
        scales: uint8, as `pack` returned it.
        n: rows to keep.
        blocks: scales per row to keep.

    Returns:
        (data, scale_bits): uint8 (n, blocks * 8) and (n, blocks).
    """
    return _unpack_codes(data)[:n, : blocks * 8], _unpack_scales(scales)[:n, :blocks]
