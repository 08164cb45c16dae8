# SPDX-License-Identifier: Apache-2.0
"""What the Hopper GEMM is made of: decoding weights, bulk copies, the epilogue's transposes."""

from cutlass import Float32, Int32, Int64, Uint32, cute
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from jax_nvfp4.kernels.ptx import asm
from jax_nvfp4.layout import sm90 as layout

# The sign bits, and the magnitudes where float16 needs them: three bits above bfloat16's place.
_SIGNS = layout.REGISTER_MASK & 0x80008000
_F16_MAGNITUDES = (layout.REGISTER_MASK & ~_SIGNS) << 3
# Scale codes at bits 11 to 4 of each half, the exponent raised to bfloat16's: the value is the
# scale times 2^119, or 2^97 for code 0, which the subtraction of 2^97 turns into 0. It changes no
# other value: 2^97 is below a quarter unit in the last place of 2^110, the smallest of them.
_BF16_SCALE_MASK = 0x0FF00FF0
_BF16_SCALE_EXPONENT = 0x70007000
_BF16_MINUS_2_97 = 0xF000F000
_F16_SCALE_MASK = 0x7F807F80

EVICT_FIRST = 0x12F0000000000000
EVICT_NORMAL = 0x1000000000000000
"""L2 cache policies, as `createpolicy.fractional` would make them for all of the data."""

ACCUMULATOR_SCALE = 128.0
"""What restores the accumulator: decoded weights are 2^-7 times their value."""


@dsl_user_op
def _funnel_rotate(word, count, *, loc=None, ip=None):
    return asm([Uint32], [word], f"shf.l.wrap.b32 $0, $1, $1, {count};", "=r,r", False, loc, ip)


@dsl_user_op
def _merge(even, odd, *, loc=None, ip=None):
    """The bits of MERGE_MASK from `even`, the others from `odd`."""
    # LOP3's table for (a & c) | (b & ~c).
    return asm(
        [Uint32],
        [even, odd],
        f"lop3.b32 $0, $1, $2, {layout.MERGE_MASK:#x}, 0xE4;",
        "=r,r,r",
        False,
        loc,
        ip,
    )


@dsl_user_op
def _mask_or(word, exponent, *, loc=None, ip=None):
    """(word & _BF16_SCALE_MASK) | exponent."""
    text = f"lop3.b32 $0, $1, {_BF16_SCALE_MASK:#x}, $2, 0xEA;"
    return asm([Uint32], [word, exponent], text, "=r,r,r", False, loc, ip)


@dsl_user_op
def _duplicate(pair, half, *, loc=None, ip=None):
    """A register with the low (0) or high (1) half of `pair` in both halves.

    Written as moves of halves, which the assembler folds into the multiplication.
    """
    name = "lh"[half]
    text = f"{{ .reg .b16 l, h; mov.b32 {{l, h}}, $1; mov.b32 $0, {{{name}, {name}}}; }}"
    return asm([Uint32], [pair], text, "=r,r", False, loc, ip)


@dsl_user_op
def _multiply(a, b, dtype, *, loc=None, ip=None):
    """Product of two pairs; `dtype` is "bf16x2" or "f16x2". Subnormal operands count.

    Has side effects as far as the compiler knows, so that it stays before the `wgmma.fence` that
    follows it: an A register written behind the fence makes the assembler serialize the MMAs.
    """
    return asm([Uint32], [a, b], f"mul.rn.{dtype} $0, $1, $2;", "=r,r,r", True, loc, ip)


@dsl_user_op
def _add_bf16x2(a, b, *, loc=None, ip=None):
    return asm([Uint32], [a, b], "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", False, loc, ip)


def _rotate(word, count, last_plain=6):
    """Rotates to the left; by a plain shift, which IMAD can do, where no used bit goes around."""
    if count == 0:
        return word
    return word << Uint32(count) if count <= last_plain else _funnel_rotate(word, count)


def _elements(word, count, bf16):
    """The two elements whose codes a rotation by `count` brings to REGISTER_MASK's bits."""
    if bf16:
        return _rotate(word, count) & Uint32(layout.REGISTER_MASK)
    signs = _rotate(word, count) & Uint32(_SIGNS)
    return signs | (_rotate(word, count + 3, last_plain=9) & Uint32(_F16_MAGNITUDES))


def _scale_pairs(word, bf16, exponent):
    """The scales of a pair of steps: for each, a register with row r's low and row r + 8's high."""
    if bf16:
        return tuple(
            _add_bf16x2(
                _mask_or(w, exponent),
                Uint32(_BF16_MINUS_2_97),
            )
            for w in (word, _funnel_rotate(word, 24))
        )
    return tuple(_funnel_rotate(word, c) & Uint32(_F16_SCALE_MASK) for c in (3, 27))


def scale_exponent(nonnegative):
    """What `decode_pair` takes as `exponent`: a constant, kept in a register.

    LOP3 has room for one immediate operand; as a second one this would cost an instruction. An
    Int32 that is not negative, which the compiler cannot know, hides that it is a constant.
    """
    return Uint32(nonnegative >> 31) | Uint32(_BF16_SCALE_EXPONENT)


def decode_pair(even, odd, scales, exponent, bf16):
    """Decodes the weights of two `wgmma` steps of 16 columns, exactly.

    Args:
        even: Uint32, the thread's codes of the first step in the order of `layout.sm90`.
        odd: Uint32, of the second step.
        scales: Uint32, the four scales that apply to them.
        exponent: as `scale_exponent` returned it.
        bf16: whether to bfloat16; else to float16.

    Returns:
        For each step the four registers of the A fragment, 2^-7 times the weights.
    """
    merged = _merge(even, odd)
    steps = []
    for step, (word, pair) in enumerate(
        zip((even, odd), _scale_pairs(scales, bf16, exponent), strict=True)
    ):
        registers = [_elements(word, c, bf16) for c in layout.ROTATIONS[step]]
        registers.append(_elements(merged, layout.MERGED_ROTATIONS[step], bf16))
        halves = [_duplicate(pair, half) for half in range(2)]
        name = "bf16x2" if bf16 else "f16x2"
        steps.append([_multiply(r, halves[i % 2], name) for i, r in enumerate(registers)])
    return steps


@dsl_user_op
def load_vector(address, *, loc=None, ip=None):
    """The four Float32 at a shared-memory address that is a multiple of 16."""
    text = "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];"
    return asm([Float32] * 4, [address], text, "=f,=f,=f,=f,r", True, loc, ip)


@dsl_user_op
def store_vector(address, values, *, loc=None, ip=None):
    """Stores four Float32 at a shared-memory address that is a multiple of 16."""
    text = "st.shared.v4.f32 [$0], {$1,$2,$3,$4};"
    return asm([], [address, *values], text, "r,f,f,f,f", True, loc, ip)


@dsl_user_op
def map_shared(address, rank, *, loc=None, ip=None):
    """Where a shared-memory address is in the cluster's CTA `rank`."""
    text = "mapa.shared::cluster.u32 $0, $1, $2;"
    return asm([Int32], [address, rank], text, "=r,r,r", False, loc, ip)


@dsl_user_op
def send_vector(address, values, barrier, *, loc=None, ip=None):
    """Stores four Float32 in a CTA of the cluster, whose mbarrier counts the bytes as they come.

    Args:
        address: Int32, as `map_shared` gives it; a multiple of 16.
        values: four Float32.
        barrier: Int32, as `map_shared` gives it, in the same CTA.
    """
    text = (
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
        "[$0], {$1,$2,$3,$4}, [$5];"
    )
    return asm([], [address, *values, barrier], text, "r,f,f,f,f,r", True, loc, ip)


@dsl_user_op
def bulk_load(destination, source, size, barrier, policy, *, loc=None, ip=None):
    """Copies `size` contiguous bytes to shared memory; the mbarrier counts them as they come.

    Args:
        destination: Int32 shared-memory address, a multiple of 16.
        source: Int64 global address, a multiple of 16.
        size: Int32, a multiple of 16.
        barrier: Int32 shared-memory address of the mbarrier.
        policy: Int64, an L2 cache policy.
    """
    text = (
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[$0], [$1], $2, [$3], $4;"
    )
    operands = [destination, source, size, barrier, policy]
    return asm([], operands, text, "r,l,r,r,l", True, loc, ip)


@dsl_user_op
def bulk_prefetch(source, size, *, loc=None, ip=None):
    """Asks for contiguous bytes to be brought into the L2 cache.

    Args:
        source: Int64 global address, a multiple of 16.
        size: Int32, a multiple of 16.
        loc: of the call in the source, as `dsl_user_op` gives it.
        ip: where to insert, likewise.
    """
    text = "cp.async.bulk.prefetch.L2.global [$0], $1;"
    return asm([], [source, size], text, "l,r", True, loc, ip)


@dsl_user_op
def arrive_if(condition, barrier, *, loc=None, ip=None):
    """Arrives at an mbarrier (Int32 address) where the Int32 `condition` is not 0.

    A predicate and no branch: control flow between MMAs makes the assembler serialize them.
    """
    text = (
        "{ .reg .pred p; .reg .b64 s; setp.ne.b32 p, $0, 0; "
        "@p mbarrier.arrive.shared.b64 s, [$1]; }"
    )
    return asm([], [condition, barrier], text, "r,r", True, loc, ip)


@dsl_user_op
def arrive_remote_if(condition, barrier, *, loc=None, ip=None):
    """The same at an mbarrier of the cluster, given as `map_shared` gives it.

    It orders no memory: `fence_release_shared` does, before it. An arrival that releases to the
    cluster would be a barrier of the whole GPU in machine code.
    """
    text = (
        "{ .reg .pred p; setp.ne.b32 p, $0, 0; "
        "@p mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$1]; }"
    )
    return asm([], [condition, barrier], text, "r,r", True, loc, ip)


@dsl_user_op
def transpose(matrix, *, loc=None, ip=None):
    """Transposes an 8x8 matrix of 16-bit elements that a warp holds, two of a row in each lane."""
    text = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    return asm([Uint32], [matrix], text, "=r,r", True, loc, ip)


@dsl_user_op
def round_pair(low, high, dtype, *, loc=None, ip=None):
    """Two Float32 rounded to "bf16x2" or "f16x2", `low` in the low half."""
    text = f"cvt.rn.{dtype}.f32 $0, $1, $2;"
    return asm([Uint32], [high, low], text, "=r,f,f", False, loc, ip)


@dsl_user_op
def permute(a, b, selector, *, loc=None, ip=None):
    """Four bytes of the eight of (a, b), chosen by the nibbles of `selector` (compile-time)."""
    text = f"prmt.b32 $0, $1, $2, {selector:#x};"
    return asm([Uint32], [a, b], text, "=r,r,r", False, loc, ip)


@dsl_user_op
def bits(value, *, loc=None, ip=None):
    """The bits of a Float32."""
    return asm([Uint32], [value], "mov.b32 $0, $1;", "=r,f", False, loc, ip)


@dsl_user_op
def float_of(word, *, loc=None, ip=None):
    """The Float32 that has these bits."""
    return asm([Float32], [word], "mov.b32 $0, $1;", "=f,r", False, loc, ip)


@dsl_user_op
def store_x4(address, values, *, loc=None, ip=None):
    """Stores four Uint32 at a global address that is a multiple of 16."""
    text = "st.global.v4.b32 [$0], {$1,$2,$3,$4};"
    return asm([], [address, *values], text, "l,r,r,r,r", True, loc, ip)


@dsl_user_op
def store_x2(address, values, *, loc=None, ip=None):
    """Stores two Uint32 at a global address that is a multiple of 8."""
    text = "st.global.v2.b32 [$0], {$1,$2};"
    return asm([], [address, *values], text, "l,r,r", True, loc, ip)


@dsl_user_op
def store_word(address, value, *, loc=None, ip=None):
    """Stores a Uint32 at a global address that is a multiple of 4."""
    return asm([], [address, value], "st.global.b32 [$0], $1;", "l,r", True, loc, ip)


def store_words(address, words):
    """Stores Uint32 words at a global address that is a multiple of their bytes, or of 16."""
    if len(words) == 1:
        store_word(address, words[0])
    elif len(words) == 2:
        store_x2(address, words)
    else:
        for i in range(0, len(words), 4):
            store_x4(address + 4 * i, words[i : i + 4])


@dsl_user_op
def store_half(address, value, *, loc=None, ip=None):
    """Stores the low 16 bits of a Uint32 at a global address that is a multiple of 2."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; st.global.b16 [$0], h; }"
    return asm([], [address, value], text, "l,r", True, loc, ip)


def element_address(pointer, index, size):
    """The Int64 global address of element `index` of an array of `size`-byte elements."""
    return Int64(pointer.toint()) + Int64(index) * Int64(size)


@dsl_user_op
def _load_float(address, *, loc=None, ip=None):
    return asm([Float32], [address], "ld.global.nc.f32 $0, [$1];", "=f,l", False, loc, ip)


@dsl_user_op
def select(condition, yes, no, *, loc=None, ip=None):
    """`yes` where the Boolean `condition` holds, else `no`, without a branch."""
    values = (v.ir_value(loc=loc, ip=ip) for v in (condition, yes, no))
    return type(yes)(llvm.select(*values, loc=loc, ip=ip))


def load_float_or_one(pointer, fallback, present, index):
    """Element `index` of a global array of Float32, or 1 where the Boolean `present` is false.

    Loads without a branch, from `fallback`'s first element then, so that loads overlap.
    """
    zero = Int64(0)
    address = select(present, Int64(pointer.toint()), Int64(fallback.toint()))
    value = _load_float(address + select(present, Int64(index), zero) * 4)
    return select(present, value, Float32(1.0))


def load_element(pointer, dtype, index):
    """Element `index` of a global array of `dtype`, as Float32."""
    typed = cute.recast_ptr(pointer, dtype=dtype)
    return Float32(cute.make_tensor(typed + Int64(index), cute.make_layout(1))[0])


def shared_address(pointer):
    """The 32-bit shared-memory address of a pointer."""
    return Int32(pointer.toint())


@dsl_user_op
def load_index(address, *, loc=None, ip=None):
    """The Int32 at a global address."""
    return asm([Int32], [address], "ld.global.nc.b32 $0, [$1];", "=r,l", False, loc, ip)


@dsl_user_op
def store_shared_x4(address, words, *, loc=None, ip=None):
    """Stores four Int32 at a shared-memory address that is a multiple of 16."""
    text = "st.shared.v4.b32 [$0], {$1,$2,$3,$4};"
    return asm([], [address, *words], text, "r,r,r,r,r", True, loc, ip)


@dsl_user_op
def first_lane(members, *, loc=None, ip=None):
    """The number of the lowest bit that is set."""
    text = "{ .reg .b32 r; brev.b32 r, $1; clz.b32 $0, r; }"
    return asm([Int32], [members], text, "=r,r", False, loc, ip)
