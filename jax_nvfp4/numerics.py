# SPDX-License-Identifier: Apache-2.0
"""The definition of NVFP4 quantization, bit for bit, in jax.numpy.

A tensor is stored as e2m1 codes, an e4m3 scale for each block of 16 elements along the last axis,
and a float32 global scale that multiplies on dequantization. With `S` the encode scale (the inverse
of the global scale `D`), in float32 and round to nearest even:

    S = 2688 / amax           (1 where amax is 0; 2688 = 448 * 6; amax over the finite elements)
    D = 1 / S
    s = e4m3(min(block_amax * (S * (1/6)), 448))
    q = e2m1(x * min(1 / (s * D), FLT_MAX))

which is the order of operations of TransformerEngine's NVFP4 quantizer, so that the codes and
scales agree with it byte for byte. A block that holds a NaN or an Inf gets the scale NaN (0x7F),
and with it the code 7 everywhere, which is what the formula gives and what Blackwell's conversion
instruction stores for a NaN. Elements with |x| < 2**-100 count as zeros of their sign, so that no
step depends on how a backend treats float32 subnormals.

The block scales of `jax_nvfp4.search`, which are chosen by the error they leave, replace `s` in the
last line and nothing else.

Every operation here gives the same bits on every XLA backend: products are single float32
multiplications that feed no addition (nothing to contract into an fma), and quotients go through
`divide`, since XLA may lower a float division to an approximate one or rewrite `1 / (a / b)`.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jax_nvfp4.config.quantize import BLOCK as BLOCK

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLT_MAX = 3.4028234663852886e38
GLOBAL_SCALE_MIN = 2.0**-110
GLOBAL_SCALE_MAX = 2.0**110

_E4M3_NAN = 0x7F
_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_SMALLEST_BITS = (127 - 100) << 23  # the bits of 2**-100


def with_ndim(a: jax.Array, ndim: int) -> jax.Array:
    """Adds leading axes of length 1, as broadcasting would, but where the reader sees it.

    `jax_numpy_rank_promotion="raise"` refuses to do so silently.
    """
    return lax.expand_dims(a, range(ndim - a.ndim))


def nan_where(condition: jax.Array, value: jax.Array) -> jax.Array:
    """The canonical NaN where a condition holds, `value` elsewhere.

    Chosen between integers: a constant NaN in the program is what `jax_debug_nans` looks for.

    Args:
        condition: bool, of the shape of `value`.
        value: float32.
    """
    bits = lax.bitcast_convert_type(value, jnp.int32)
    return lax.bitcast_convert_type(jnp.where(condition, _NAN_BITS, bits), jnp.float32)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """The correctly rounded quotient of positive float32 numbers, on every backend.

    The hardware's quotient, exact or not, is only a first guess: the integer quotient of the
    significands to 25 bits is settled by its remainder, which 32-bit arithmetic holds exactly
    since it is small. A quotient of two 24-bit significands is never a tie at 25 bits.

    Args:
        a: float32, positive and normal.
        b: float32, positive and normal, broadcast against `a`.

    Returns:
        float32 a / b rounded to nearest even, where that is normal; unspecified elsewhere.
    """
    a, b = jnp.broadcast_arrays(a, b)
    a_bits = lax.bitcast_convert_type(a, jnp.int32)
    b_bits = lax.bitcast_convert_type(b, jnp.int32)
    a_sig = (a_bits & 0x7FFFFF) | 0x800000
    b_sig = (b_bits & 0x7FFFFF) | 0x800000
    b_float = b_sig.astype(jnp.float32)
    below_one = (a_sig < b_sig).astype(jnp.int32)

    scale = jnp.where(below_one == 1, jnp.float32(2.0**25), jnp.float32(2.0**24))
    quotient = (a_sig.astype(jnp.float32) / b_float * scale).astype(jnp.int32)
    remainder = (a_sig << (24 + below_one)) - quotient * b_sig  # wraps; the true one is small
    step = jnp.floor(remainder.astype(jnp.float32) / b_float).astype(jnp.int32)
    quotient, remainder = quotient + step, remainder - step * b_sig
    quotient = quotient + jnp.where(remainder < 0, -1, jnp.where(remainder >= b_sig, 1, 0))

    significand = (quotient + 1) >> 1
    exponent = (a_bits >> 23) - (b_bits >> 23) - below_one + 127
    bits = (exponent << 23) + (significand - 0x800000)
    # XLA recomputes cheap operations in each loop that uses them, for a block scale 16 times.
    return computed_once(lax.bitcast_convert_type(bits, jnp.float32))


def computed_once(x: jax.Array) -> jax.Array:
    """Fences x: it is computed once, and is a float32 before anything is done with it.

    Keeps compilers from contracting a product and a later sum into an fma in one place and not in
    another, and from recomputing x for each use. An optimization barrier would say so, but XLA's
    CPU backend drops it before it fuses; a remainder that changes nothing stays, and is never
    duplicated.

    Args:
        x: float32.

    Returns:
        x, its NaNs made canonical.
    """
    bits = lax.bitcast_convert_type(nan_where(jnp.isnan(x), x), jnp.uint32)
    return lax.bitcast_convert_type(lax.rem(bits, jnp.full_like(bits, 0xFFFFFFFF)), jnp.float32)


def add_rounding_once(a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The sum of float32 numbers, rounded once to a dtype.

    A float32 sum that is then rounded to 16 bits is rounded twice, and wrong where the first
    rounding lands on a tie of the second. Rounded to odd instead, it keeps on which side of the tie
    the exact sum lies (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved
    algorithms using rounding to odd", 2008); the error of the sum is Knuth's TwoSum.

    Args:
        a: float32.
        b: float32, broadcast against `a`.
        dtype: float32, bfloat16 or float16.

    Returns:
        a + b of that dtype.
    """
    total = a + b
    if jnp.dtype(dtype) == jnp.float32:
        return total
    b_part = total - a
    error = (a - (total - b_part)) + (b - b_part)
    bits = lax.bitcast_convert_type(total, jnp.int32)
    outward = jnp.where((error > 0) == (total > 0), 1, -1)
    inexact = (jnp.abs(error) > 0) & jnp.isfinite(error) & ((bits & 1) == 0)
    odd = lax.bitcast_convert_type(jnp.where(inexact, bits + outward, bits), jnp.float32)
    return odd.astype(dtype)


def _magnitude_bits(x: jax.Array) -> jax.Array:
    """The bits of |x| as int32, which order as the magnitudes do; 0 below 2**-100."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & 0x7FFFFFFF
    return jnp.where(bits < _SMALLEST_BITS, 0, bits)


def magnitude(x: jax.Array) -> jax.Array:
    """The magnitudes that are quantized: |x| as float32, 0 below 2**-100.

    Args:
        x: any floating dtype.

    Returns:
        float32 of the shape of x.
    """
    return lax.bitcast_convert_type(_magnitude_bits(x), jnp.float32)


def amax(x: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """The largest magnitude among the finite elements.

    Args:
        x: any floating dtype.
        axis: axes to reduce over; all of them by default.

    Returns:
        float32; 0 where there is no finite element of at least 2**-100.
    """
    bits = _magnitude_bits(x)
    finite = jnp.where(bits < _INF_BITS, bits, 0)
    return lax.bitcast_convert_type(jnp.max(finite, axis=axis, initial=0), jnp.float32)


def dynamic_scales(
    largest: jax.Array, block_scale_max: float = E4M3_MAX
) -> tuple[jax.Array, jax.Array]:
    """Encode scale and global scale of data with this amax.

    Args:
        largest: float32, from `amax`.
        block_scale_max: the block scale that a block with this amax gets.

    Returns:
        (S, D), float32 of the shape of `largest`.
    """
    one = jnp.ones_like(largest)
    safe = jnp.where(largest == 0, one, largest)
    encode = jnp.where(largest == 0, one, divide(jnp.float32(block_scale_max * E2M1_MAX), safe))
    return encode, divide(one, encode)


def static_scales(global_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encode scale and global scale where the global scale is given.

    Args:
        global_scale: float32.

    Returns:
        (S, D), float32; both NaN where the given scale is not in [2**-110, 2**110].
    """
    one = jnp.ones_like(global_scale)
    valid = (global_scale >= GLOBAL_SCALE_MIN) & (global_scale <= GLOBAL_SCALE_MAX)
    safe = jnp.where(valid, global_scale, one)
    return nan_where(~valid, divide(one, safe)), nan_where(~valid, safe)


def e4m3_encode(value: jax.Array) -> jax.Array:
    """Rounds to e4m3, to nearest even.

    Args:
        value: float32 in [0, 448], or NaN.

    Returns:
        uint8 bits of float8_e4m3fn.
    """
    bits = lax.bitcast_convert_type(value, jnp.int32)
    rounded = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
    normal = rounded - ((127 - 7) << 3)
    subnormal = lax.round(value * 512.0, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32)
    code = jnp.where(value < 2.0**-6, subnormal, normal)
    return jnp.where(jnp.isnan(value), _E4M3_NAN, code).astype(jnp.uint8)


def e4m3_decode(bits: jax.Array) -> jax.Array:
    """The float32 values of e4m3 bits.

    Args:
        bits: uint8, any of the 256 patterns.

    Returns:
        float32, exact; NaN for 0x7F and 0xFF.
    """
    bits = bits.astype(jnp.int32)
    normal = lax.bitcast_convert_type(((bits & 0x7F) << 20) + ((127 - 7) << 23), jnp.float32)
    subnormal = (bits & 0x7).astype(jnp.float32) * 2.0**-9
    value = jnp.where((bits & 0x78) == 0, subnormal, normal)
    value = nan_where((bits & 0x7F) == _E4M3_NAN, value)
    return jnp.where(bits >= 0x80, -value, value)


def e2m1_encode(value: jax.Array) -> jax.Array:
    """Rounds magnitudes to e2m1, to nearest, ties to the even code, saturating at 6.

    Args:
        value: float32, not negative; Inf saturates, NaN gives 7.

    Returns:
        uint8 codes in 0..7 (no sign bit).
    """
    # Each midpoint between neighbors is passed on reaching it where the upper code is even,
    # and on exceeding it where the upper code is odd. "Not below" makes a NaN pass all of them.
    code = jnp.zeros(value.shape, jnp.uint8)
    for lower, midpoint in enumerate((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)):
        below = value < midpoint if lower % 2 else value <= midpoint
        code = code + (~below).astype(jnp.uint8)
    return code


def e2m1_decode(code: jax.Array) -> jax.Array:
    """The float32 values of e2m1 codes.

    Args:
        code: uint8 in 0..15, bit 3 the sign.

    Returns:
        float32 in {0, .5, 1, 1.5, 2, 3, 4, 6} with the sign (of zero, too).
    """
    code = code.astype(jnp.int32)
    index = code & 7
    twice = jnp.where(index < 2, index, (2 + (code & 1)) << ((index >> 1) - 1))
    value = twice.astype(jnp.float32) * 0.5
    return jnp.where(code >= 8, -value, value)


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes in pairs along the last axis, the even one in the low nibble.

    Args:
        codes: uint8 (..., K) in 0..15, K even.

    Returns:
        uint8 (..., K/2).
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(data: jax.Array) -> jax.Array:
    """The codes of packed data, the inverse of `pack`.

    Args:
        data: uint8 (..., K/2).

    Returns:
        uint8 (..., K) in 0..15.
    """
    codes = jnp.stack([data & 0xF, data >> 4], axis=-1)
    return codes.reshape(*data.shape[:-1], data.shape[-1] * 2)


def pad_last(x: jax.Array, multiple: int) -> jax.Array:
    """Zero-pads the last axis to a multiple of `multiple`."""
    padding = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]) if padding else x


def quantize(x: jax.Array, encode: jax.Array, decode: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantizes with given scales; the last block of a row is padded with zeros.

    Args:
        x: (..., K) of any floating dtype, any K.
        encode: S, float32, broadcast against the leading axes `x.shape[:-1]`.
        decode: D, likewise.

    Returns:
        (data, block_scale): uint8 (..., ceil(K/16)*8) and float8_e4m3fn (..., ceil(K/16)).
    """
    blocks = as_blocks(x)
    return encode_blocks(blocks, block_scale_bits(scaled_amax(blocks, encode)), decode)


def as_blocks(x: jax.Array) -> jax.Array:
    """The blocks of each row, the last one padded with zeros.

    Args:
        x: (..., K) of any floating dtype.

    Returns:
        float32 (..., ceil(K/16), 16).
    """
    x = pad_last(x.astype(jnp.float32), BLOCK)
    return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)


def scaled_amax(blocks: jax.Array, encode: jax.Array) -> jax.Array:
    """The amax of each block as a multiple of 6 * D, which is its block scale before rounding.

    Args:
        blocks: float32 (..., blocks, 16).
        encode: S, float32, broadcast against the rows.

    Returns:
        float32 (..., blocks), `block_amax * (S * (1/6))`; NaN where a block holds a NaN or an Inf.
    """
    largest_bits = jnp.max(_magnitude_bits(blocks), axis=-1, initial=0)
    bad = largest_bits >= _INF_BITS
    largest = lax.bitcast_convert_type(jnp.where(bad, 0, largest_bits), jnp.float32)
    encode = with_ndim(encode, blocks.ndim - 2)
    return nan_where(bad, largest * (encode * jnp.float32(1 / 6))[..., None])


def block_scale_bits(scaled: jax.Array) -> jax.Array:
    """Block scales, rounded to e4m3 and saturated at 448.

    Args:
        scaled: float32, not negative, or NaN.

    Returns:
        uint8 bits of float8_e4m3fn.
    """
    return e4m3_encode(jnp.minimum(scaled, E4M3_MAX))


def block_codes(blocks: jax.Array, scale_bits: jax.Array, decode: jax.Array) -> jax.Array:
    """The codes of the magnitudes of blocks under given block scales.

    Args:
        blocks: float32 (..., blocks, 16).
        scale_bits: uint8 (..., blocks), bits of non-negative e4m3 scales or NaN.
        decode: D, float32, broadcast against the rows.

    Returns:
        uint8 (..., blocks, 16) in 0..7; 7 under a scale or a D that is NaN.
    """
    scale = e4m3_decode(scale_bits)
    denominator = scale * with_ndim(decode, scale.ndim - 1)[..., None]
    usable = denominator > 0
    inverse = divide(jnp.float32(1), jnp.where(usable, denominator, jnp.float32(1)))
    inverse = jnp.where(usable, inverse, jnp.float32(FLT_MAX))
    inverse = nan_where(~usable & (scale != 0), inverse)
    return e2m1_encode(magnitude(blocks) * inverse[..., None])


def encode_blocks(
    blocks: jax.Array, scale_bits: jax.Array, decode: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Quantizes blocks with given block scales.

    Args:
        blocks: float32 (..., blocks, 16).
        scale_bits: uint8 (..., blocks), bits of non-negative e4m3 scales or NaN.
        decode: D, float32, broadcast against the rows.

    Returns:
        (data, block_scale): uint8 (..., blocks*8) and float8_e4m3fn (..., blocks).
    """
    decode = with_ndim(decode, scale_bits.ndim - 1)
    codes = block_codes(blocks, scale_bits, decode)
    negative = lax.bitcast_convert_type(blocks, jnp.int32) < 0
    signed = negative & ~jnp.isnan(e4m3_decode(scale_bits) * decode[..., None])[..., None]
    codes = codes | (signed.astype(jnp.uint8) << 3)
    data = pack(codes.reshape(*codes.shape[:-2], codes.shape[-2] * BLOCK))
    return data, lax.bitcast_convert_type(scale_bits, jnp.float8_e4m3fn)


def block_values(data: jax.Array, block_scale: jax.Array) -> jax.Array:
    """The elements short of their global scale, `e2m1 * block_scale`.

    At most 6 significant bits and a magnitude in [2**-10, 2688]: bfloat16 and float16 hold them
    exactly.

    Args:
        data: uint8 (..., K/2).
        block_scale: float8_e4m3fn (..., K/16).

    Returns:
        float32 (..., K), exact.
    """
    return _times_blocks(data, _block_scale_values(block_scale))


def dequantize(data: jax.Array, block_scale: jax.Array, global_scale: jax.Array) -> jax.Array:
    """The elements, `e2m1 * (block_scale * global_scale)`.

    The scales are multiplied first, as ModelOpt and compressed-tensors do: two roundings to
    float32, and the same bits as theirs.

    Args:
        data: uint8 (..., K/2).
        block_scale: float8_e4m3fn (..., K/16).
        global_scale: float32, broadcast against `block_scale`.

    Returns:
        float32 (..., K).
    """
    global_scale = with_ndim(global_scale, block_scale.ndim)
    return _times_blocks(data, _block_scale_values(block_scale) * global_scale)


def _block_scale_values(block_scale: jax.Array) -> jax.Array:
    return e4m3_decode(lax.bitcast_convert_type(block_scale, jnp.uint8))


def _times_blocks(data: jax.Array, scale: jax.Array) -> jax.Array:
    """Multiplies codes by one float32 for each block."""
    codes = unpack(data)
    blocks = codes.reshape(*codes.shape[:-1], codes.shape[-1] // BLOCK, BLOCK)
    return (e2m1_decode(blocks) * scale[..., None]).reshape(codes.shape)
