# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of the quantize kernels: one block of 16 elements in the registers of one thread.

Each rounding step is one PTX instruction with its rounding mode spelled out, so that neither LLVM
nor ptxas may contract, reassociate or approximate it: the result has the bits of
`jax_nvfp4.numerics` on every input.

A block arrives as "words": the raw 32-bit registers that were loaded, 8 for a 16-bit dtype (two
elements each, the even one in the low half) and 16 for float32.
"""

import struct

from cutlass import Boolean, Float32, Int32, Int64
from cutlass.cutlass_dsl import dsl_user_op

from jax_nvfp4.kernels.ptx import asm, permute

INF_BITS = 0x7F800000
SMALLEST_BITS = (127 - 100) << 23  # the bits of 2**-100: a smaller magnitude counts as zero
FLT_MAX = 3.4028234663852886e38
NAN_CODES = 0x77777777
NAN_SCALE = 0x7F
NAN_VALUES = 0x7FC07FC0  # two bfloat16 NaNs


# Loads and stores


@dsl_user_op
def load_16_bytes(address, active, *, loc=None, ip=None):
    """Four 32-bit words of read-only memory at a 16-byte aligned address; zeros if not active."""
    return asm(
        [Int32] * 4,
        [Int64(address), Boolean(active)],
        "mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@$5 ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=&r,=&r,=&r,=&r,l,b",
        True,
        loc,
        ip,
    )


@dsl_user_op
def load_16_bytes_always(address, *, loc=None, ip=None):
    """Four 32-bit words of read-only memory at a 16-byte aligned address."""
    text = "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];"
    return asm([Int32] * 4, [Int64(address)], text, "=r,=r,=r,=r,l", True, loc, ip)


@dsl_user_op
def load_element(address, active, size, *, loc=None, ip=None):
    """One element of `size` = 2 or 4 bytes, zero-extended; zero if not active."""
    return asm(
        [Int32],
        [Int64(address), Boolean(active)],
        f"mov.b32 $0, 0; @$2 ld.global.nc.{'u16' if size == 2 else 'b32'} $0, [$1];",
        "=&r,l,b",
        True,
        loc,
        ip,
    )


@dsl_user_op
def load_f32(address, *, loc=None, ip=None):
    """A float32 of read-only memory."""
    return asm([Float32], [Int64(address)], "ld.global.nc.f32 $0, [$1];", "=f,l", True, loc, ip)


@dsl_user_op
def store_f32(address, value, *, loc=None, ip=None):
    """Stores a float32."""
    asm([], [Int64(address), Float32(value)], "st.global.f32 [$0], $1;", "l,f", True, loc, ip)


@dsl_user_op
def store_byte(address, value, *, loc=None, ip=None):
    """Stores the low byte of a 32-bit value."""
    asm([], [Int64(address), Int32(value)], "st.global.u8 [$0], $1;", "l,r", True, loc, ip)


@dsl_user_op
def store_word(address, value, *, loc=None, ip=None):
    """Stores 4 bytes."""
    asm([], [Int64(address), Int32(value)], "st.global.b32 [$0], $1;", "l,r", True, loc, ip)


@dsl_user_op
def store_8_bytes(address, a, b, *, loc=None, ip=None):
    """Stores two words at an 8-byte aligned address."""
    operands = [Int64(address), Int32(a), Int32(b)]
    asm([], operands, "st.global.v2.b32 [$0], {$1, $2};", "l,r,r", True, loc, ip)


@dsl_user_op
def store_byte_if(address, value, active, *, loc=None, ip=None):
    """`store_byte` if active."""
    operands = [Int64(address), Int32(value), Boolean(active)]
    asm([], operands, "@$2 st.global.u8 [$0], $1;", "l,r,b", True, loc, ip)


@dsl_user_op
def store_8_bytes_if(address, a, b, active, *, loc=None, ip=None):
    """`store_8_bytes` if active."""
    operands = [Int64(address), Int32(a), Int32(b), Boolean(active)]
    asm([], operands, "@$3 st.global.v2.b32 [$0], {$1, $2};", "l,r,r,b", True, loc, ip)


@dsl_user_op
def store_16_bytes(address, a, b, c, d, *, loc=None, ip=None):
    """Stores four words at a 16-byte aligned address."""
    operands = [Int64(address), *map(Int32, (a, b, c, d))]
    text = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
    asm([], operands, text, "l,r,r,r,r", True, loc, ip)


@dsl_user_op
def load_message(address, *, loc=None, ip=None):
    """Both words of an 8-byte message that another CTA may be writing, read as one."""
    text = "{ .reg .b64 v; ld.relaxed.gpu.global.b64 v, [$2]; mov.b64 {$0, $1}, v; }"
    return asm([Int32] * 2, [Int64(address)], text, "=r,=r,l,~{memory}", True, loc, ip)


@dsl_user_op
def store_message(address, low, high, *, loc=None, ip=None):
    """Stores an 8-byte message for other CTAs to read, as one."""
    operands = [Int64(address), Int32(low), Int32(high)]
    text = "{ .reg .b64 v; mov.b64 v, {$1, $2}; st.relaxed.gpu.global.b64 [$0], v; }"
    asm([], operands, text, "l,r,r,~{memory}", True, loc, ip)


@dsl_user_op
def store_to_cta(address, rank, value, *, loc=None, ip=None):
    """Stores a word at a shared-memory address of this CTA, but in the CTA of that cluster rank."""
    text = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.b32 [a], $2; }"
    operands = [Int32(address), Int32(rank), Int32(value)]
    asm([], operands, text, "r,r,r,~{memory}", True, loc, ip)


# Float arithmetic, one rounding each


@dsl_user_op
def mul(a, b, *, loc=None, ip=None):
    """The product a * b, round to nearest even."""
    operands = [Float32(a), Float32(b)]
    return asm([Float32], operands, "mul.rn.f32 $0, $1, $2;", "=f,f,f", False, loc, ip)


@dsl_user_op
def mul_abs(a, b, *, loc=None, ip=None):
    """|a| * b, round to nearest even."""
    text = "{ .reg .f32 m; abs.f32 m, $1; mul.rn.f32 $0, m, $2; }"
    return asm([Float32], [Float32(a), Float32(b)], text, "=f,f,f", False, loc, ip)


@dsl_user_op
def fma_constants(a, b, c, *, loc=None, ip=None):
    """The sum a * b + c with one rounding, for Python floats b and c that float32 holds."""
    text = f"fma.rn.f32 $0, $1, {_literal(b)}, {_literal(c)};"
    return asm([Float32], [Float32(a)], text, "=f,f", False, loc, ip)


@dsl_user_op
def minimum(a, b, *, loc=None, ip=None):
    """The smaller of two numbers that are not NaN."""
    operands = [Float32(a), Float32(b)]
    return asm([Float32], operands, "min.f32 $0, $1, $2;", "=f,f,f", False, loc, ip)


@dsl_user_op
def maximum(a, b, *, loc=None, ip=None):
    """The larger of two numbers that are not NaN."""
    operands = [Float32(a), Float32(b)]
    return asm([Float32], operands, "max.f32 $0, $1, $2;", "=f,f,f", False, loc, ip)


@dsl_user_op
def divide(a, b, *, loc=None, ip=None):
    """The correctly rounded quotient."""
    operands = [Float32(a), Float32(b)]
    return asm([Float32], operands, "div.rn.f32 $0, $1, $2;", "=f,f,f", False, loc, ip)


@dsl_user_op
def reciprocal(a, *, loc=None, ip=None):
    """The correctly rounded reciprocal."""
    return asm([Float32], [Float32(a)], "rcp.rn.f32 $0, $1;", "=f,f", False, loc, ip)


def _int32(value: int) -> Int32:
    """An Int32 constant from its unsigned bits."""
    return Int32(value - (1 << 32) if value >> 31 else value)


def _literal(value: float) -> str:
    """A float32 constant in PTX."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


@dsl_user_op
def bits(value, *, loc=None, ip=None):
    """The bits of a float32."""
    return Float32(value).bitcast(Int32, loc=loc, ip=ip)


@dsl_user_op
def from_bits(value, *, loc=None, ip=None):
    """The float32 of given bits."""
    return Int32(value).bitcast(Float32, loc=loc, ip=ip)


# Integer helpers


@dsl_user_op
def max_int(a, b, *, loc=None, ip=None):
    """The larger of two int32."""
    operands = [Int32(a), Int32(b)]
    return asm([Int32], operands, "max.s32 $0, $1, $2;", "=r,r,r", False, loc, ip)


@dsl_user_op
def min3_int(a, b, c, *, loc=None, ip=None):
    """The smallest of three float32, by their bits: all must be positive."""
    operands = [bits(v) for v in (a, b, c)]
    text = "min.s32 $0, $1, $2; min.s32 $0, $0, $3;"
    return asm([Int32], operands, text, "=&r,r,r,r", False, loc, ip)


@dsl_user_op
def multiply_add(a, b, c, *, loc=None, ip=None):
    """The sum a * b + c modulo 2**32 for a Python int b."""
    operands = [Int32(a), Int32(c)]
    return asm([Int32], operands, f"mad.lo.u32 $0, $1, {b}, $2;", "=r,r,r", False, loc, ip)


@dsl_user_op
def multiply_high(a, b, *, loc=None, ip=None):
    """The upper half of the 64-bit product of two numbers without sign."""
    operands = [Int32(a), Int32(b)]
    return asm([Int32], operands, "mul.hi.u32 $0, $1, $2;", "=r,r,r", False, loc, ip)


@dsl_user_op
def shift_right(a, b, *, loc=None, ip=None):
    """A number without sign, shifted right."""
    return asm([Int32], [Int32(a), Int32(b)], "shr.u32 $0, $1, $2;", "=r,r,r", False, loc, ip)


@dsl_user_op
def select(condition, a, b, *, loc=None, ip=None):
    """Selects a where the condition holds, else b; without a branch."""
    operands = [Int32(a), Int32(b), Boolean(condition)]
    return asm([Int32], operands, "selp.b32 $0, $1, $2, $3;", "=r,r,r,b", False, loc, ip)


@dsl_user_op
def select_f32(condition, a, b, *, loc=None, ip=None):
    """Selects a where the condition holds, else b; without a branch."""
    operands = [Float32(a), Float32(b), Boolean(condition)]
    return asm([Float32], operands, "selp.f32 $0, $1, $2, $3;", "=f,f,f,b", False, loc, ip)


@dsl_user_op
def times(condition, *, loc=None, ip=None):
    """1 where the condition holds, else 0: how often a loop runs whose body is a rare case.

    ptxas turns a short `if` into predicated instructions, which take issue slots whether or not
    they apply. It leaves a loop alone, and no compiler knows that this one runs once at most.
    """
    return asm([Int32], [Boolean(condition)], "selp.b32 $0, 1, 0, $1;", "=r,b", False, loc, ip)


@dsl_user_op
def zero_after(value, *, loc=None, ip=None):
    """0, which compilers take to depend on the value: the body of a `times` loop stays in it."""
    return asm([Int32], [Int32(value)], "and.b32 $0, $1, 0;", "=r,r", True, loc, ip)


# Blocks


@dsl_user_op
def _packed_abs_max(a, b, kind, *, loc=None, ip=None):
    """Larger magnitude of a and b (of both halves if packed), NaN first; the sign is arbitrary."""
    text = f"max.NaN.xorsign.abs.{kind} $0, $1, $2;"
    return asm([Int32], [Int32(a), Int32(b)], text, "=r,r,r", False, loc, ip)


@dsl_user_op
def _abs_max_f32(a, b, *, loc=None, ip=None):
    """Larger magnitude, NaN first; the sign is arbitrary."""
    text = "max.NaN.xorsign.abs.f32 $0, $1, $2;"
    return asm([Float32], [Float32(a), Float32(b)], text, "=f,f,f", False, loc, ip)


@dsl_user_op
def _half_to_f32(half, *, loc=None, ip=None):
    """The float32 of the float16 in the low half of a word; exact."""
    text = "{ .reg .b16 h, u; mov.b32 {h, u}, $1; cvt.f32.f16 $0, h; }"
    return asm([Float32], [Int32(half)], text, "=f,r", False, loc, ip)


@dsl_user_op
def _halves_to_f32(word, *, loc=None, ip=None):
    """The float32s of the two float16 of a word; exact."""
    text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
    return asm([Float32] * 2, [Int32(word)], text, "=&f,=&f,r", False, loc, ip)


def to_f32(words, dtype):
    """The 16 elements of a block as float32."""
    if dtype == "float32":
        return [from_bits(w) for w in words]
    if dtype == "bfloat16":
        return [from_bits(v) for w in words for v in (w << 16, w & Int32(-0x10000))]
    return [v for w in words for v in _halves_to_f32(w)]


def amax_bits(words, dtype):
    """The float32 bits of the largest magnitude, INF_BITS or more if an element is not finite."""
    if dtype == "float32":
        largest = from_bits(words[0])
        for word in words[1:]:
            largest = _abs_max_f32(largest, from_bits(word))
        return bits(largest) & Int32(0x7FFFFFFF)
    kind = "bf16x2" if dtype == "bfloat16" else "f16x2"
    packed = words[0]
    for word in words[1:]:
        packed = _packed_abs_max(packed, word, kind)
    half = max_int(packed & Int32(0x7FFF), (packed >> 16) & Int32(0x7FFF))
    if dtype == "bfloat16":
        return half << 16
    return bits(_half_to_f32(half))


@dsl_user_op
def e4m3_round_trip(value, *, loc=None, ip=None):
    """Rounds a float32 in [0, 448] to e4m3: its byte and its float32 value."""
    text = (
        "{ .reg .b16 p, u; .reg .b32 h; "
        "cvt.rn.satfinite.e4m3x2.f32 p, 0f00000000, $2; cvt.u32.u16 $0, p; "
        "cvt.rn.f16x2.e4m3x2 h, p; mov.b32 {p, u}, h; cvt.f32.f16 $1, p; }"
    )
    return asm([Int32, Float32], [Float32(value)], text, "=&r,=&f,f", False, loc, ip)


@dsl_user_op
def e2m1_codes_hardware(values, *, loc=None, ip=None):
    """Rounds 8 float32 to e2m1 with Blackwell's conversion; packed, the first in the low nibble."""
    converts = "".join(
        f"cvt.rn.satfinite.e2m1x2.f32 c{i}, ${2 * i + 2}, ${2 * i + 1}; " for i in range(4)
    )
    text = f"{{ .reg .b8 c0, c1, c2, c3; {converts}mov.b32 $0, {{c0, c1, c2, c3}}; }}"
    operands = [Float32(v) for v in values]
    return asm([Int32], operands, text, "=r" + ",f" * 8, False, loc, ip)


_MAGIC = 2.0**23  # float32 sums in [2**23, 2**24) round to integers, ties to even
_MAGIC_BITS = 0x4B000000


def e2m1_magnitudes(scaled, signs):
    """Rounds 8 float32 in [0, 7) to e2m1 by float arithmetic; packed codes.

    The codes are the integers nearest to h(y) = min(2y, y + 2, y/2 + 4), which maps the e2m1
    values to 0..7 and is linear between them, so that a tie in y is a tie in h. Each piece is
    rounded to an integer by one fma that adds 2**23 as well; rounding is monotonic, so the
    minimum may come after it. The sums' low bits are the codes.

    Args:
        scaled: 8 Float32.
        signs: Int32, from `sign_nibbles`.
    """
    packed = None
    for y in reversed(scaled):
        code = min3_int(
            fma_constants(y, 2.0, _MAGIC),
            fma_constants(y, 1.0, _MAGIC + 2),
            fma_constants(y, 0.5, _MAGIC + 4),
        )
        packed = code if packed is None else multiply_add(packed, 16, code)
    return packed + signs - _int32(sum(_MAGIC_BITS << (4 * i) for i in range(8)) & 0xFFFFFFFF)


def sign_nibbles(words, dtype):
    """The signs of 8 elements in bit 3 of their nibbles."""
    if dtype == "float32":
        pairs = [permute(words[i], words[i + 2], 0x73) for i in (0, 4, 1, 5)]
        even = permute(pairs[0], pairs[1], 0x5410)
        odd = permute(pairs[2], pairs[3], 0x5410)
    else:
        low = permute(words[0], words[1], 0x7351)  # sign bytes of elements 0, 2, 1, 3
        high = permute(words[2], words[3], 0x7351)
        even = permute(low, high, 0x5410)
        odd = permute(low, high, 0x7632)
    return ((even >> 4) & Int32(0x08080808)) | (odd & _int32(0x80808080))


# bfloat16 bits of the e2m1 values 0, .5, 1, 1.5, 2, 3, 4, 6, split into bytes.
_VALUE_HIGH = (0x3F3F3F00, 0x40404040)
_VALUE_LOW = (0xC0800000, 0xC0804000)


@dsl_user_op
def _mul_bf16x2(a, b, *, loc=None, ip=None):
    """Products of two pairs of bfloat16."""
    operands = [Int32(a), Int32(b)]
    return asm([Int32], operands, "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", False, loc, ip)


def block_values(codes, scale):
    """8 codes times their block scale as 4 words of two bfloat16; exact.

    Args:
        codes: Int32, 8 e2m1 codes.
        scale: Float32, an e4m3 value.
    """
    top = bits(scale)  # e4m3 has 4 significant bits: the upper half is its bfloat16
    pair_scale = permute(top, top, 0x3232)
    even = codes << 4  # puts the sign of an even element at the top of its byte
    values = []
    for half in range(2):
        index = (codes >> (16 * half)) & Int32(0x7777)
        high = permute(_int32(_VALUE_HIGH[0]), _int32(_VALUE_HIGH[1]), index)
        low = permute(_int32(_VALUE_LOW[0]), _int32(_VALUE_LOW[1]), index)
        for j in range(2):
            magnitude = permute(low, high, 0x5140 if j == 0 else 0x7362)
            byte = 2 * half + j
            sign = permute(even, codes, (byte + 8) * 0x10 + (byte + 12) * 0x1000)
            sign = sign & _int32(0x80008000)
            values.append(_mul_bf16x2(magnitude | sign, pair_scale))
    return values
