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

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from numpy import float32 as f32
from numpy import int32 as i32
from numpy import uint32 as u32

from jax_nvfp4.config.quantize import BLOCK as BLOCK

E2M1_MAX = 6.0
E4M3_MAX = 448.0
FLT_MAX = 3.4028234663852886e38
GLOBAL_SCALE_MIN = 2.0**-110
GLOBAL_SCALE_MAX = 2.0**110

_E4M3_NAN = 0x7F
_INF_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_TWICE_E2M1 = 0xC8643210  # twice the magnitude of each code, 4 bits each
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
    bits = lax.select(condition, lax.full_like(bits, _NAN_BITS), bits)
    return lax.bitcast_convert_type(bits, jnp.float32)


def divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """The correctly rounded quotient of positive float32 numbers, on every backend.

    Args:
        a: float32, positive and normal.
        b: float32, positive and normal, broadcast against `a`.

    Returns:
        float32 a / b rounded to nearest even, where that is normal; unspecified elsewhere. Not
        fenced: `computed_once`, or a select, has to stand between it and another product or
        quotient.
    """
    a, b = jnp.broadcast_arrays(a, b)
    return lax.platform_dependent(a, b, cpu=_divide_floats, default=_divide_integers)


def _divide_floats(a: jax.Array, b: jax.Array) -> jax.Array:
    """`divide` where XLA's division of floats is correctly rounded: a fraction of the operations.

    The magnitude changes nothing but hides a quotient in `b`, with which XLA would merge this one.
    """
    return lax.div(a, lax.abs(b))


def _divide_integers(a: jax.Array, b: jax.Array) -> jax.Array:
    """`divide` where XLA's division of floats may be approximate.

    Its quotient is only a first guess: the integer quotient of the significands to 25 bits is
    settled by its remainder, which 32-bit arithmetic holds exactly since it is small. A quotient
    of two 24-bit significands is never a tie at 25 bits.
    """
    a_bits = lax.bitcast_convert_type(a, jnp.int32)
    b_bits = lax.bitcast_convert_type(b, jnp.int32)
    a_sig = lax.bitwise_or(lax.bitwise_and(a_bits, i32(0x7FFFFF)), i32(0x800000))
    b_sig = lax.bitwise_or(lax.bitwise_and(b_bits, i32(0x7FFFFF)), i32(0x800000))
    b_float = b_sig.astype(jnp.float32)
    below_one = lax.lt(a_sig, b_sig).astype(jnp.int32)

    # 2**24 or 2**25 times the quotient. The remainder wraps; the true one is small.
    up = lax.shift_left(lax.add(below_one, i32(127 + 24)), i32(23))
    guess = lax.div(a_sig.astype(jnp.float32), b_float)
    guess = lax.mul(guess, lax.bitcast_convert_type(up, jnp.float32))
    quotient = guess.astype(jnp.int32)
    shifted = lax.shift_left(a_sig, lax.add(below_one, i32(24)))
    remainder = lax.sub(shifted, lax.mul(quotient, b_sig))
    step = lax.floor(lax.div(remainder.astype(jnp.float32), b_float)).astype(jnp.int32)
    quotient = lax.add(quotient, step)
    remainder = lax.sub(remainder, lax.mul(step, b_sig))
    quotient = lax.add(quotient, lax.ge(remainder, b_sig).astype(jnp.int32))
    quotient = lax.sub(quotient, lax.lt(remainder, i32(0)).astype(jnp.int32))

    significand = lax.shift_right_arithmetic(lax.add(quotient, i32(1)), i32(1))
    a_exponent = lax.shift_right_arithmetic(a_bits, i32(23))
    b_exponent = lax.add(lax.shift_right_arithmetic(b_bits, i32(23)), below_one)
    exponent = lax.add(lax.sub(a_exponent, b_exponent), i32(127))
    bits = lax.add(lax.shift_left(exponent, i32(23)), lax.sub(significand, i32(0x800000)))
    return lax.bitcast_convert_type(bits, jnp.float32)


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
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    nan = lax.full_like(bits, _NAN_BITS)
    return _fenced_bits(lax.select(lax.ne(x, x), nan, bits))


def _fenced_bits(bits: jax.Array) -> jax.Array:
    """The float32 of uint32 bits, fenced; 0 for a NaN whose bits are all ones."""
    return lax.bitcast_convert_type(lax.rem(bits, u32(0xFFFFFFFF)), jnp.float32)


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
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    bits = lax.bitwise_and(bits, i32(0x7FFFFFFF))
    return lax.select(lax.lt(bits, i32(_SMALLEST_BITS)), lax.full_like(bits, 0), bits)


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
    finite = lax.select(lax.lt(bits, i32(_INF_BITS)), bits, lax.full_like(bits, 0))
    # As floats, whose maximum XLA's CPU backend takes from a library.
    return jnp.max(lax.bitcast_convert_type(finite, jnp.float32), axis=axis, initial=0)


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
    one, is_zero = lax.full_like(largest, 1), lax.eq(largest, f32(0))
    safe = lax.select(is_zero, one, largest)
    encode = divide(lax.full_like(largest, block_scale_max * E2M1_MAX), safe)
    encode = computed_once(lax.select(is_zero, one, encode))
    return encode, computed_once(divide(one, encode))


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


class _Format(NamedTuple):
    """A small float format.

    Attributes:
        lowest: the exponent of its smallest normal numbers.
        digits: of its significands, after the point.
    """

    lowest: int
    digits: int


_E4M3 = _Format(lowest=-6, digits=3)
_E2M1 = _Format(lowest=0, digits=1)


def _on_grid(value: jax.Array, to: _Format) -> tuple[jax.Array, jax.Array]:
    """Rounds to the numbers of a small float format, to nearest even.

    Args:
        value: float32, not negative; a NaN stays one.
        to: the format.

    Returns:
        The value as a float32 multiple of the format's spacing there, and as uint32 the bits of the
        power of two at or below it, of the smallest normal number at least.
    """
    bits = lax.bitcast_convert_type(value, jnp.uint32)
    power = lax.max(lax.bitwise_and(bits, u32(_INF_BITS)), u32((127 + to.lowest) << 23))
    inverse = lax.sub(u32((254 + to.digits) << 23), power)
    scaled = lax.mul(value, lax.bitcast_convert_type(inverse, jnp.float32))
    return lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN), power


def _grid_code(value: jax.Array, to: _Format) -> jax.Array:
    """The bits of `_on_grid` in the small float format, int32; anything for a NaN."""
    multiple, power = _on_grid(value, to)
    above = lax.shift_right_logical(power, u32(23 - to.digits)).astype(jnp.int32)
    code = lax.add(multiple.astype(jnp.int32), above)
    return lax.sub(code, i32((127 + to.lowest) << to.digits))


def e4m3_encode(value: jax.Array) -> jax.Array:
    """Rounds to e4m3, to nearest even.

    Args:
        value: float32 in [0, 448], or NaN.

    Returns:
        uint8 bits of float8_e4m3fn.
    """
    code = _grid_code(value, _E4M3)
    code = lax.select(lax.ne(value, value), lax.full_like(code, _E4M3_NAN), code)
    return code.astype(jnp.uint8)


def e4m3_decode(bits: jax.Array) -> jax.Array:
    """The float32 values of e4m3 bits.

    Args:
        bits: uint8, any of the 256 patterns.

    Returns:
        float32, exact; NaN for 0x7F and 0xFF.
    """
    return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)


def e2m1_encode(value: jax.Array) -> jax.Array:
    """Rounds magnitudes to e2m1, to nearest, ties to the even code, saturating at 6.

    Args:
        value: float32, not negative; Inf saturates, NaN gives 7.

    Returns:
        uint8 codes in 0..7 (no sign bit).
    """
    return _grid_code(_up_to_6(value), _E2M1).astype(jnp.uint8)


def _up_to_6(value: jax.Array) -> jax.Array:
    """The smaller of a value and 6, which is also what a NaN becomes."""
    return lax.select(lax.lt(value, f32(E2M1_MAX)), value, lax.full_like(value, E2M1_MAX))


def e2m1_decode(code: jax.Array) -> jax.Array:
    """The float32 values of e2m1 codes.

    Args:
        code: uint8 in 0..15, bit 3 the sign.

    Returns:
        float32 in {0, .5, 1, 1.5, 2, 3, 4, 6} with the sign (of zero, too).
    """
    code = code.astype(jnp.uint32)
    place = lax.shift_left(lax.bitwise_and(code, u32(7)), u32(2))
    twice = lax.shift_right_logical(u32(_TWICE_E2M1), place)
    twice = lax.bitwise_and(twice, u32(15)).astype(jnp.int32).astype(jnp.float32)
    half = lax.full_like(twice, 0.5)
    return lax.mul(twice, lax.select(lax.ge(code, u32(8)), lax.neg(half), half))


def pack(codes: jax.Array) -> jax.Array:
    """Packs codes in pairs along the last axis, the even one in the low nibble.

    Args:
        codes: uint8 (..., K) in 0..15, K even.

    Returns:
        uint8 (..., K/2).
    """
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    # A reduction, for XLA's CPU backend does not vectorize the reading of every other code.
    return lax.reduce_or(lax.shift_left(pairs, _shifts(pairs)), (pairs.ndim - 1,))


def _shifts(pairs: jax.Array) -> jax.Array:
    """How far each code of the pairs (..., 2) is shifted in its byte."""
    return lax.broadcast_in_dim(np.array([0, 4], np.uint8), pairs.shape, (pairs.ndim - 1,))


def unpack(data: jax.Array) -> jax.Array:
    """The codes of packed data, the inverse of `pack`.

    Args:
        data: uint8 (..., K/2).

    Returns:
        uint8 (..., K) in 0..15.
    """
    pairs = lax.broadcast_in_dim(data, (*data.shape, 2), tuple(range(data.ndim)))
    codes = lax.shift_right_logical(pairs, _shifts(pairs))
    codes = lax.bitwise_and(codes, np.uint8(0xF))
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


def quantized_values(x: jax.Array, encode: jax.Array, decode: jax.Array) -> jax.Array:
    """`block_values(*quantize(x, encode, decode))`, without the codes.

    Args:
        x: (..., K) of any floating dtype, any K.
        encode: S, float32, broadcast against the leading axes `x.shape[:-1]`.
        decode: D, likewise.

    Returns:
        float32 (..., ceil(K/16)*16).
    """
    blocks = as_blocks(x)
    scale = e4m3_decode(block_scale_bits(scaled_amax(blocks, encode)))
    multiple, power = _on_grid(_up_to_6(_scaled(blocks, scale, decode)), _E2M1)
    spacing = lax.sub(power, u32(_E2M1.digits << 23))
    spacing = lax.bitwise_or(spacing, _sign_bits(blocks))
    values = lax.mul(multiple, lax.bitcast_convert_type(spacing, jnp.float32)) * scale[..., None]
    return values.reshape(*x.shape[:-1], blocks.shape[-2] * BLOCK)


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
    largest = lax.bitcast_convert_type(largest_bits, jnp.float32)
    encode = with_ndim(encode, blocks.ndim - 2)
    scaled = largest * (encode * jnp.float32(1 / 6))[..., None]
    return nan_where(largest_bits >= _INF_BITS, scaled)


def block_scale_bits(scaled: jax.Array) -> jax.Array:
    """Block scales, rounded to e4m3 and saturated at 448.

    Args:
        scaled: float32, not negative, or NaN.

    Returns:
        uint8 bits of float8_e4m3fn.
    """
    bits = e4m3_encode(lax.min(scaled, f32(E4M3_MAX)))
    return lax.rem(bits, np.uint8(0xFF))  # computed once, see `computed_once`


def block_codes(blocks: jax.Array, scale_bits: jax.Array, decode: jax.Array) -> jax.Array:
    """The codes of the magnitudes of blocks under given block scales.

    Args:
        blocks: float32 (..., blocks, 16).
        scale_bits: uint8 (..., blocks), bits of non-negative e4m3 scales or NaN.
        decode: D, float32, broadcast against the rows.

    Returns:
        uint8 (..., blocks, 16) in 0..7; 7 under a scale or a D that is NaN.
    """
    return e2m1_encode(_scaled(blocks, e4m3_decode(scale_bits), decode))


def _scaled(blocks: jax.Array, scale: jax.Array, decode: jax.Array) -> jax.Array:
    """The magnitudes of blocks in units of their scales and D, which e2m1 rounds.

    Args:
        blocks: float32 (..., blocks, 16).
        scale: float32 (..., blocks), the values of the block scales.
        decode: D, float32, broadcast against the rows.

    Returns:
        float32 of the shape of `blocks`; NaN under a scale or a D that is NaN.
    """
    denominator = scale * with_ndim(decode, scale.ndim - 1)[..., None]
    one, usable = lax.full_like(denominator, 1), lax.gt(denominator, f32(0))
    inverse = divide(one, lax.select(usable, denominator, one))
    inverse = lax.select(usable, inverse, lax.full_like(inverse, FLT_MAX))
    nan = lax.bitwise_and(lax.bitwise_not(usable), lax.ne(scale, f32(0)))
    # XLA recomputes cheap operations in each loop that uses them, for a block scale 16 times.
    return magnitude(blocks) * computed_once(nan_where(nan, inverse))[..., None]


def _sign_bits(x: jax.Array) -> jax.Array:
    """The sign bit of float32 numbers in its place, uint32."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return lax.bitwise_and(bits, u32(0x80000000))


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
    scaled = _scaled(blocks, e4m3_decode(scale_bits), decode)
    sign = _sign_bits(blocks)
    sign = lax.shift_right_logical(sign, u32(28)).astype(jnp.uint8)
    sign = lax.select(lax.eq(scaled, scaled), sign, lax.full_like(sign, 0))  # a NaN's code is 7
    codes = lax.bitwise_or(e2m1_encode(scaled), sign)
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
