# SPDX-License-Identifier: Apache-2.0
"""What the sm_120 GEMMs are made of: the block-scaled MMA, its operands' loads, the epilogue.

Registers are named as in the PTX ISA ("Matrix Fragments for mma.m16n8k64"): lane = 4*q + t, where
q = 0..7 is the row (of A and D) or column (of B) and t = 0..3 the place in a quad.

    A: register i holds the 8 codes of row q + 8*(i % 2) that start at k = 32*(i // 2) + 8*t
    B: register i holds the 8 codes of column q that start at k = 32*i + 8*t
    D: row q + 8*(i // 2), column 2*t + i % 2

so that one `ldmatrix` of four 8x8 b16 matrices is an A operand, or the B operands of two columns
blocks. The scales of a row's 64 elements are one 32-bit register, and the instruction takes them
from part of the lanes only, which its selectors name ("Block Scaling for mma.sync"):

    A, selector s = 0..1: row r from lane 4*(r % 8) + 2*s + r // 8
    B, selector s = 0..3: column c from lane 4*c + s

The 128x4 scale tile puts row r of 128 at 16*(r % 32) + 4*(r // 32). A lane that reads the 16 bytes
at 16*(8*t + q) therefore holds, in register j, what both selectors of A need for rows 32*j..+31,
and what all four of B need for columns 32*j..+31: a whole tile is one load without waste.
"""

import cutlass
from cutlass import Float32, Int32, Int64, cute
from cutlass.cutlass_dsl import dsl_user_op

from jax_nvfp4.kernels.ptx import asm, select


@dsl_user_op
def mma_nvfp4(d, a, b, sfa, sfb, selector_a, selector_b, *, loc=None, ip=None):
    """d + (sfa * a) (sfb * b): 16x8 over K = 64, e2m1 with a ue4m3 scale for each 16 of K.

    Args:
        d: 4 Float32.
        a: 4 Int32.
        b: 2 Int32.
        sfa: Int32, the 4 scales of a row of a.
        sfb: Int32, the 4 scales of a column of b.
        selector_a: 0 or 1, compile-time: which pair of a quad's lanes holds sfa.
        selector_b: 0..3, compile-time: which lane of a quad holds sfb.
    """
    return asm(
        [Float32] * 4,
        [*a, *b, sfa, sfb, *d],
        "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::4X"
        ".f32.e2m1.e2m1.f32.ue4m3 {$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$12,$13,$14,$15}, "
        f"{{$10}}, {{0,{selector_a}}}, {{$11}}, {{0,{selector_b}}};",
        "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f",
        True,  # has none, but is to stay in its place among the loads: registers are scarce
        loc,
        ip,
    )


@dsl_user_op
def ldmatrix_x4(address, *, loc=None, ip=None):
    """Four 8x8 b16 matrices; lane 8*i + r gives the shared-memory address of row r of matrix i."""
    return asm(
        [Int32] * 4,
        [address],
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0,$1,$2,$3}, [$4];",
        "=r,=r,=r,=r,r",
        True,
        loc,
        ip,
    )


@dsl_user_op
def load_shared(address, *, loc=None, ip=None):
    """The Int32 at a shared-memory address."""
    return asm([Int32], [address], "ld.shared.b32 $0, [$1];", "=r,r", True, loc, ip)


@dsl_user_op
def load_shared_x2(address, *, loc=None, ip=None):
    """The two Int32 at a shared-memory address that is a multiple of 8."""
    return asm([Int32] * 2, [address], "ld.shared.v2.b32 {$0,$1}, [$2];", "=r,=r,r", True, loc, ip)


@dsl_user_op
def pack_bf16x2(low, high, *, loc=None, ip=None):
    """Two Float32 rounded to bf16, `low` in the low half."""
    return asm([Int32], [high, low], "cvt.rn.bf16x2.f32 $0, $1, $2;", "=r,f,f", False, loc, ip)


@dsl_user_op
def pack_f16x2(low, high, *, loc=None, ip=None):
    """Two Float32 rounded to f16, `low` in the low half."""
    return asm([Int32], [high, low], "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", False, loc, ip)


def global_address(address, dtype, alignment):
    """A global pointer from a 64-bit address."""
    return cute.make_ptr(dtype, address, cute.AddressSpace.gmem, assumed_align=alignment)


def load_global(pointer, index):
    """The element `index` of a typed global pointer."""
    return cute.make_tensor(pointer + Int64(index), cute.make_layout(1))[0]


def store_global(address, values, dtype):
    """Stores 1, 2 or 4 registers, one vector, at a 64-bit global address."""
    pointer = global_address(address, dtype, len(values) * dtype.width // 8)
    registers = cute.make_rmem_tensor((len(values),), dtype)
    for i, value in enumerate(values):
        registers[i] = value
    cute.autovec_copy(registers, cute.make_tensor(pointer, cute.make_layout(len(values))))


@cute.jit
def load_bias(bias: cute.Pointer, bias_dtype: Int32, index: Int32) -> Float32:
    """Element `index` of a bias as Float32; 0 without a bias (dtype codes: the host function)."""
    value = Float32(0.0)
    if bias_dtype == 0:
        value = load_global(cute.recast_ptr(bias, dtype=Float32), index)
    elif bias_dtype == 1:
        value = Float32(load_global(cute.recast_ptr(bias, dtype=cutlass.BFloat16), index))
    elif bias_dtype == 2:
        value = Float32(load_global(cute.recast_ptr(bias, dtype=cutlass.Float16), index))
    return value


@cute.jit
def store_output(address: Int64, value: Float32, out_dtype: Int32):
    """Rounds one value to the output dtype (0 f32, 1 bf16, 2 f16) and stores it."""
    if out_dtype == 0:
        store_global(address, [value], Float32)
    elif out_dtype == 1:
        store_global(address, [cutlass.BFloat16(value)], cutlass.BFloat16)
    else:
        store_global(address, [cutlass.Float16(value)], cutlass.Float16)


def transpose_quad(words, t):
    """Transposes the 4x4 words of a quad: lane t gives words[0..3], gets word t of lanes 0..3."""
    for distance in (1, 2):
        upper = (t & distance) != 0
        exchanged = list(words)
        for i in range(4):
            if i & distance:
                continue
            j = i + distance
            # The lower lane keeps i and gives j, the upper one keeps j and gives i.
            given = select(upper, words[i], words[j])
            got = cute.arch.shuffle_sync_bfly(given, distance)
            exchanged[i] = select(upper, got, words[i])
            exchanged[j] = select(upper, words[j], got)
        words = exchanged
    return words


# ---- 16-bit operands: x as it is, the weight expanded in registers -------------------------------


@dsl_user_op
def mma_16bit(d, a, b, kind, *, loc=None, ip=None):
    """d + a b: 16x8 over K = 16, pairs of "bf16" or "f16", accumulated in Float32."""
    return asm(
        [Float32] * 4,
        [*a, *b, *d],
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0,$1,$2,$3}, {$4,$5,$6,$7}, {$8,$9}, {$10,$11,$12,$13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        True,
        loc,
        ip,
    )


@dsl_user_op
def multiply_pairs(a, b, kind, *, loc=None, ip=None):
    """Products of two pairs of "bf16" or "f16", subnormals kept."""
    return asm([Int32], [a, b], f"mul.rn.{kind}x2 $0, $1, $2;", "=r,r,r", False, loc, ip)


# A code's exponent and mantissa are put at the low end of the 16-bit exponent and the high end of
# the mantissa: its value times 2**-126 (bf16) or 2**-14 (f16), a zero and 0.5 included, which are
# subnormal there. The scale takes up what its range allows, and `UNSCALE` of the sum the rest.
# kind: (right shift of a code at the top of a half, mask of its three bits, 1 / scale's factor)
_EXPAND = {"bf16": (6, 0x01C001C0), "f16": (3, 0x0E000E00)}
UNSCALE = {"bf16": 2.0**8, "f16": 2.0**7}


def expand_pairs(codes, scale, kind):
    """Eight codes times their scale, as four pairs (c, c + 4), c = 0..3.

    Args:
        codes: Int32 of codes 0..7, lowest first.
        scale: a pair of the scale's 16-bit value, from `expand_scales`.
        kind: "bf16" or "f16".

    Returns:
        4 Int32, value / UNSCALE[kind], exact: a code times a scale has six significant bits.
    """
    shift, mask = _EXPAND[kind]
    pairs = []
    for c in range(4):
        top = codes << (4 * (3 - c))  # code c at the top of the low half, c + 4 of the high one
        bits = (top & Int32(-0x7FFF8000)) | ((top >> shift) & Int32(mask))
        pairs.append(multiply_pairs(bits, scale, kind))
    return pairs


@dsl_user_op
def expand_scales(two, kind, *, loc=None, ip=None):
    """Two e4m3 scales (low bytes of an Int32) as two pairs of equal 16-bit values; NaN stays NaN.

    bf16: times 2**118, f16: times 2**7, which with the codes' factor makes 1 / UNSCALE.
    """
    halves = "{.reg .b16 p, u, v; .reg .b32 h; mov.b32 {p, u}, $2; cvt.rn.f16x2.e4m3x2 h, p; "
    if kind == "f16":
        text = "mul.rn.f16x2 h, h, $3; mov.b32 {u, v}, h; mov.b32 $0, {u, u}; mov.b32 $1, {v, v};}"
        constant = Int32(0x58005800)  # 128, 128
    else:
        text = (
            ".reg .f32 f, g, c; mov.b32 {u, v}, h; cvt.f32.f16 f, u; cvt.f32.f16 g, v; "
            "mov.b32 c, $3; mul.f32 f, f, c; mul.f32 g, g, c; "
            "cvt.rn.bf16x2.f32 $0, f, f; cvt.rn.bf16x2.f32 $1, g, g;}"
        )
        constant = Int32(0x7A800000)  # 2**118
    return asm([Int32] * 2, [two, constant], halves + text, "=r,=r,r,r", False, loc, ip)
