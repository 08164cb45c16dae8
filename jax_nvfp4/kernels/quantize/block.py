# SPDX-License-Identifier: Apache-2.0
"""What a thread of a quantize kernel does with a block of 16 elements: load, quantize, store."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, const_expr, range_constexpr

from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.quantize import BLOCK
from jax_nvfp4.kernels.quantize import ptx as ops

SCALE_TILE_BYTES = 512  # block scales of 128 rows by 64 columns
E4M3_MAX = 448.0
E2M1_MAX = 6.0
GLOBAL_SCALE_LIMIT = 2.0**110


@dataclasses.dataclass(frozen=True)
class Call:
    """The arguments of a kernel. Addresses are Int64, sizes Int32.

    Attributes:
        x: address of the elements.
        data: address of the codes or values.
        block_scale: address of the block scales.
        m: rows.
        k: columns.
        blocks: blocks of a row, padding included.
        real_blocks: blocks of a row that hold at least one element.
        swizzled: block scales go to the 128x4 order.
        vector: compile-time: 16-byte loads.
        values: compile-time: bfloat16 values are written.
        whole: compile-time: the format of the codes of a "grid" kernel for rows of whole blocks
            without padding, so that x is one run of blocks; else None.
    """

    x: Int64
    data: Int64
    block_scale: Int64
    m: Int32
    k: Int32
    blocks: Int32
    real_blocks: Int32
    swizzled: Boolean
    vector: bool
    values: bool
    whole: OutFormat | None = None


@dataclasses.dataclass(frozen=True)
class Scales:
    """What a block needs to know of its global scale.

    Attributes:
        sixth: S * (1/6).
        decode: D.
        valid: the global scale is usable; without it all blocks are NaN.
    """

    sixth: Float32
    decode: Float32
    valid: Boolean


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block is.

    Attributes:
        unit: number of the block in the output, row-major.
        row: its row.
        block: its number in the row.
        active: there is such a block.
    """

    unit: Int32
    row: Int32
    block: Int32
    active: Boolean


@dataclasses.dataclass(frozen=True)
class Held:
    """Blocks that a thread holds in registers.

    Attributes:
        words: the words of all blocks.
        largest: `ops.amax_bits` of each block.
    """

    words: cute.Tensor
    largest: cute.Tensor


def given_scales(g: Float32) -> Scales:
    """The scales of a given global scale."""
    valid = (g >= Float32(1 / GLOBAL_SCALE_LIMIT)) & (g <= Float32(GLOBAL_SCALE_LIMIT))
    # Blocks of padding are zeros whatever g is, so they must not meet an infinite or NaN scale.
    encode = ops.reciprocal(ops.select_f32(valid, g, Float32(1.0)))
    return Scales(ops.mul(encode, Float32(1 / 6)), ops.reciprocal(encode), valid)


def dynamic_scales(amax_bits: Int32) -> Scales:
    """The scales of data with this amax, given by its float32 bits."""
    zero = amax_bits == 0
    amax = ops.from_bits(ops.select(zero, Int32(0x3F800000), amax_bits))
    encode = ops.divide(Float32(E4M3_MAX * E2M1_MAX), amax)
    encode = ops.select_f32(zero, Float32(1.0), encode)
    return Scales(ops.mul(encode, Float32(1 / 6)), ops.reciprocal(encode), Boolean(True))


def place_of(unit: Int32, divisor: cute.FastDivmodDivisorV2, units: Int32) -> Place:
    """The place of a block by its number in the tensor."""
    row, block = divmod(unit, divisor)
    return Place(unit, row, block, unit < units)


def swizzled_address(call: Call, row: Int32, block: Int32) -> Int64:
    """Where the scale of a block goes in the 128x4 order."""
    tile = (row >> 7) * (call.blocks >> 2) + (block >> 2)
    inner = ((row << 4) & 0x1F0) | ((row >> 3) & 0xC) | (block & 3)
    return call.block_scale + Int64(tile) * SCALE_TILE_BYTES + inner


class BlockQuantizer:
    """What a thread does with blocks.

    Attributes:
        dtype: element type of x.
        item: bytes of an element.
        block_words: 32-bit registers that hold a block.
        units: blocks that a thread holds.
        hardware: the conversion to e2m1 exists in hardware (Blackwell).
    """

    def __init__(self, dtype: str, units: int, hardware: bool):
        self.dtype = dtype
        self.item = 4 if dtype == "float32" else 2
        self.block_words = BLOCK * self.item // 4
        self.units = units
        self.hardware = hardware

    @cute.jit
    def load(self, call: Call, place: Place):
        """The words of a block; zeros past the end of its row and where it is not active."""
        column = place.block * BLOCK
        address = call.x + (Int64(place.row) * call.k + column) * self.item
        words = []
        if const_expr(call.vector):
            step = 16 // self.item
            for i in range_constexpr(BLOCK // step):
                inside = place.active & (column + i * step < call.k)
                words.extend(ops.load_16_bytes(address + 16 * i, inside))
        else:
            elements = []
            for i in range_constexpr(BLOCK):
                inside = place.active & (column + i < call.k)
                elements.append(ops.load_element(address + self.item * i, inside, self.item))
            if const_expr(self.item == 4):
                words = elements
            else:
                words = [elements[i] | (elements[i + 1] << 16) for i in range(0, BLOCK, 2)]
        return words

    @cute.jit
    def finite_amax(self, words, largest: Int32):
        """The float32 bits of the largest finite magnitude of a block; 0 below 2**-100.

        Args:
            words: the block.
            largest: its `ops.amax_bits`.
        """
        for _ in cutlass.range(ops.times(largest >= ops.INF_BITS), unroll=1):
            largest = ops.zero_after(largest)
            for value in ops.to_f32(words, self.dtype):
                magnitude = ops.bits(value) & Int32(0x7FFFFFFF)
                magnitude = ops.select(magnitude < ops.INF_BITS, magnitude, Int32(0))
                largest = ops.max_int(largest, magnitude)
        return ops.select(largest >= ops.SMALLEST_BITS, largest, Int32(0))

    @cute.jit
    def quantize(self, words, largest: Int32, scales: Scales):
        """Quantizes a block.

        Args:
            words: the block.
            largest: its `ops.amax_bits`.
            scales: those of its row.

        Returns:
            (low codes, high codes, scale byte, scale value, whether an element is not finite). The
            first four are arbitrary where the last or an unusable global scale says so.
        """
        infinite = largest >= ops.INF_BITS
        largest = ops.select(largest >= ops.SMALLEST_BITS, largest, Int32(0))
        zero = largest == 0
        scaled = ops.mul(ops.from_bits(largest), scales.sixth)
        byte, scale = ops.e4m3_round_trip(ops.minimum(scaled, Float32(E4M3_MAX)))
        step = ops.mul(scale, scales.decode)
        inverse = ops.minimum(ops.reciprocal(step), Float32(ops.FLT_MAX))
        # All elements of a zero block are zeros, some perhaps by being tiny: 0 keeps their signs.
        inverse = ops.select_f32(zero, Float32(0.0), inverse)

        values = cute.make_rmem_tensor((BLOCK,), Float32)
        for i, value in enumerate(ops.to_f32(words, self.dtype)):
            values[i] = value
        # A tiny element must give a zero. It may give more only where 2**-100 * inverse can reach
        # 1/4, which is rare: float32 products of tiny elements are below that elsewhere.
        tiny_matters = inverse > Float32(2.0**97)
        if const_expr(self.hardware):
            for _ in cutlass.range(ops.times(tiny_matters), unroll=1):
                for i in range_constexpr(BLOCK):
                    word = ops.bits(values[i])
                    tiny = (word & Int32(0x7FFFFFFF)) < ops.SMALLEST_BITS
                    values[i] = ops.from_bits(ops.select(tiny, word & Int32(-(1 << 31)), word))
        else:
            # e2m1_magnitudes takes values below 7. Rounding a normal scale to e4m3 moves it by
            # 1/16 at most, and 6 * (1 + 1/16) < 7; 448 for up to 512 is as good. Other blocks
            # have their elements cut to what gives about 6.5, which rounds to 6 like all above.
            unusual = (scaled < Float32(2.0**-6)) | (scaled > Float32(512.0)) | tiny_matters
            for _ in cutlass.range(ops.times(unusual & ~zero), unroll=1):
                limit = ops.maximum(ops.mul(step, Float32(6.5)), Float32(1.625 * 2.0**-126))
                for i in range_constexpr(BLOCK):
                    magnitude = ops.from_bits(ops.bits(values[i]) & Int32(0x7FFFFFFF))
                    tiny = magnitude < Float32(2.0**-100)
                    cut = ops.minimum(magnitude, limit)
                    values[i] = ops.select_f32(tiny, Float32(0.0), cut)
        codes = []
        for half in range_constexpr(2):
            first = half * (self.block_words // 2)
            part = words[first : first + self.block_words // 2]
            codes.append(self.codes(part, [values[8 * half + i] for i in range(8)], inverse))
        return codes[0], codes[1], byte, scale, infinite

    def codes(self, words, values, inverse: Float32) -> Int32:
        """The codes of 8 elements.

        Args:
            words: the elements, for their signs.
            values: the same as float32; without hardware for e2m1, their magnitudes will do.
            inverse: what they are multiplied by.
        """
        if self.hardware:
            return ops.e2m1_codes_hardware([ops.mul(value, inverse) for value in values])
        scaled = [ops.mul_abs(value, inverse) for value in values]
        return ops.e2m1_magnitudes(scaled, ops.sign_nibbles(words, self.dtype))

    @cute.jit
    def store(self, call: Call, place: Place, codes, byte: Int32, scale: Float32, bad: Boolean):
        """Writes a block's outputs, NaN if bad."""
        if const_expr(call.values):
            words = ops.block_values(codes[0], scale) + ops.block_values(codes[1], scale)
            words = [ops.select(bad, Int32(ops.NAN_VALUES), word) for word in words]
            address = call.data + Int64(place.unit) * (2 * BLOCK)
            ops.store_16_bytes(address, *words[:4])
            ops.store_16_bytes(address + 16, *words[4:])
        else:
            words = [ops.select(bad, Int32(ops.NAN_CODES), word) for word in codes]
            ops.store_8_bytes(call.data + Int64(place.unit) * (BLOCK // 2), *words)
            address = call.block_scale + Int64(place.unit)
            if call.swizzled:
                address = swizzled_address(call, place.row, place.block)
            byte = ops.select(bad, Int32(ops.NAN_SCALE), byte)
            ops.store_byte(address, byte)

    @cute.jit
    def quantize_and_store(self, call: Call, place: Place, words, largest: Int32, scales: Scales):
        """Quantizes and writes a block that is active."""
        low, high, byte, scale, infinite = self.quantize(words, largest, scales)
        # Blocks of padding hold zeros, whatever the global scale.
        bad = (infinite | ~scales.valid) & (place.block < call.real_blocks)
        self.store(call, place, (low, high), byte, scale, bad)

    # A block of a `whole` x

    def load_unit(self, call: Call, unit: Int32, units: Int32, divisor):
        """The words of a block by its number; past the last, those of the last or zeros."""
        if call.whole is None:
            return self.load(call, place_of(unit, divisor, units))
        address = call.x + Int64(cutlass.min(unit, units - 1)) * (BLOCK * self.item)
        loads = range(BLOCK * self.item // 16)
        return [word for i in loads for word in ops.load_16_bytes_always(address + 16 * i)]

    @cute.jit
    def quantize_and_store_unit(
        self,
        call: Call,
        unit: Int32,
        active: Boolean,
        words,
        largest: Int32,
        scales: Scales,
        divisor,
    ):
        """Quantizes a block of a `whole` x by its number, and writes it if it is active.

        What is rare is left to `quantize`: a scale that is zero, subnormal or NaN, and tensors
        with an amax so small that tiny elements matter.
        """
        scaled = ops.mul(ops.from_bits(largest), scales.sixth)
        byte, scale = ops.e4m3_round_trip(scaled)
        inverse = ops.reciprocal(ops.mul(scale, scales.decode))
        half = self.block_words // 2
        low, high = (
            self.codes(part, ops.to_f32(part, self.dtype), inverse)
            for part in (words[:half], words[half:])
        )
        # Inf and NaN are outside of the range. Inside, `inverse` is at most 2**6 / D or 2**96.
        usual = (scaled >= Float32(2.0**-6)) & (scaled <= Float32(512.0))
        if ~(usual & (scales.decode >= Float32(2.0**-90))):
            low, high, byte, _, bad = self.quantize(words, largest, scales)
            low = ops.select(bad, Int32(ops.NAN_CODES), low)
            high = ops.select(bad, Int32(ops.NAN_CODES), high)
            byte = ops.select(bad, Int32(ops.NAN_SCALE), byte)
        ops.store_8_bytes_if(call.data + Int64(unit) * (BLOCK // 2), low, high, active)
        address = call.block_scale + Int64(unit)
        if const_expr(call.whole == OutFormat.OPERAND):
            multiplier, shift = divisor
            row = ops.shift_right(ops.multiply_high(unit, multiplier), shift)
            address = swizzled_address(call, row, unit - row * call.blocks)
        ops.store_byte_if(address, byte, active)

    # Blocks that are held in registers

    def make_held(self) -> Held:
        """Registers for the blocks of a thread."""
        words = cute.make_rmem_tensor((self.units * self.block_words,), Int32)
        return Held(words, cute.make_rmem_tensor((self.units,), Int32))

    def take(self, held: Held, i: int, words) -> None:
        """Sets the words of block i."""
        for j, word in enumerate(words):
            held.words[i * self.block_words + j] = word

    def words(self, held: Held, i: int):
        """The words of block i."""
        return [held.words[i * self.block_words + j] for j in range(self.block_words)]

    def measure(self, held: Held, i: int) -> None:
        """Sets `largest` of block i."""
        held.largest[i] = ops.amax_bits(self.words(held, i), self.dtype)

    @cute.jit
    def held_amax(self, held, amax: Int32):
        """The larger of amax and the largest finite magnitude of the blocks that are held."""
        for i in range_constexpr(self.units):
            self.measure(held, i)
            amax = ops.max_int(amax, self.finite_amax(self.words(held, i), held.largest[i]))
        return amax

    # Padding

    @cute.jit
    def pad_scales(self, call: Call, item: Int32):
        """Writes zeros to the scales of rows m.. of the last 128-row tile, 16 bytes an item.

        Item 32*t + r holds rows r, r+32, r+64 and r+96 of scale tile t, 4 bytes each.
        """
        tiles = call.blocks >> 2
        rows = call.m & 127
        if item < tiles * 32:
            tile = (call.m >> 7) * tiles + (item >> 5)
            row = item & 31
            address = call.block_scale + Int64(tile) * SCALE_TILE_BYTES + row * 16
            zero = Int32(0)
            if row >= rows:
                ops.store_16_bytes(address, zero, zero, zero, zero)
            else:
                for i in range_constexpr(1, 4):
                    if row + 32 * i >= rows:
                        ops.store_word(address + 4 * i, zero)
