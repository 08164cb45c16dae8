# SPDX-License-Identifier: Apache-2.0
"""NVFP4 quantize kernels for every architecture, in CuTeDSL.

    s = e4m3(min(block_amax * (S * (1/6)), 448))
    q = e2m1(x * min(1 / (s * D), FLT_MAX))          S = 2688 / amax or 1 / g,  D = 1 / S

A thread quantizes whole blocks of 16 elements, so that nothing but the amax of a row or of the
tensor crosses threads. Three kinds of kernel share that code, one launch each:

    flat    The scale is given, for the tensor or per row. Blocks are numbered through; a thread
            takes one or two and loads them before it uses the first.
    rows    Dynamic per row. One or more warps hold a row in registers, reduce its amax and
            quantize what they hold. Of a row that is longer than the registers the last chunk
            stays in them and the others are read again, backwards, from the L1 cache mostly.
    grid    Dynamic per tensor. A co-resident grid (cooperative launch, one CTA for each
            multiprocessor at most) does the same with the whole tensor. `share_amax` says how the
            CTAs agree on the amax through uninitialized scratch memory.

Rows are read by 16-byte loads where k and the address of x allow it ("vector"), and element by
element elsewhere. Blocks that pad a row to 64 columns are loaded as zeros and quantized like any
other, which writes zeros; the scale bytes that pad the rows to a multiple of 128 are written by
spare CTAs. There are no atomics: a row's result depends on its elements and the global scale alone.
"""

import dataclasses

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_ptr

from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.config.quantize import GRID_SLOT_BYTES, MAX_CTAS, Mode, OutFormat, quantize_configs
from jax_nvfp4.kernels import quantize_ops as ops
from jax_nvfp4.kernels.variant import KernelVariant

WARP = 32
MIN_THREADS = 128  # of a CTA of a "grid" kernel
ROWS_THREADS = 256  # short rows share a CTA up to this many threads
SCALE_TILE_BYTES = 512  # block scales of 128 rows by 64 columns
E4M3_MAX = 448.0
E2M1_MAX = 6.0
GLOBAL_SCALE_LIMIT = 2.0**110

# Offsets of the messages in a CTA's slot of scratch memory; see `share_amax`.
CHALLENGE, PARTIAL, TOTAL = 0, 8, 16


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


class QuantizeKernel:
    """Kernels and host function of one config.

    Attributes:
        dtype: element type of x.
        item: bytes of an element.
        block_words: 32-bit registers that hold a block.
        units: blocks that a thread holds.
        threads: threads of a CTA, at most.
        hardware: Blackwell's conversion to e2m1 exists.
    """

    def __init__(self, config: QuantizeConfig, min_ctas: int = 0):
        self.min_ctas = min_ctas
        self.kind = config.kind
        self.dtype = config.x_dtype
        self.item = 4 if config.x_dtype == "float32" else 2
        self.block_words = ops.BLOCK * self.item // 4
        self.units = config.elements_per_thread // ops.BLOCK
        self.threads = config.threads
        self.hardware = not config.arch.startswith("sm_90")

    # One block

    @cute.jit
    def load(self, call: Call, place: Place):
        """The words of a block; zeros past the end of its row and where it is not active."""
        column = place.block * ops.BLOCK
        address = call.x + (Int64(place.row) * call.k + column) * self.item
        words = []
        if const_expr(call.vector):
            step = 16 // self.item
            for i in range_constexpr(ops.BLOCK // step):
                inside = place.active & (column + i * step < call.k)
                words.extend(ops.load_16_bytes(address + 16 * i, inside))
        else:
            elements = []
            for i in range_constexpr(ops.BLOCK):
                inside = place.active & (column + i < call.k)
                elements.append(ops.load_element(address + self.item * i, inside, self.item))
            if const_expr(self.item == 4):
                words = elements
            else:
                words = [elements[i] | (elements[i + 1] << 16) for i in range(0, ops.BLOCK, 2)]
        return words

    @cute.jit
    def finite_amax(self, words):
        """The float32 bits of the largest finite magnitude of a block; 0 below 2**-100."""
        largest = ops.amax_bits(words, self.dtype)
        if largest >= ops.INF_BITS:
            largest = Int32(0)
            for value in ops.to_f32(words, self.dtype):
                magnitude = ops.bits(value) & Int32(0x7FFFFFFF)
                magnitude = ops.select(magnitude < ops.INF_BITS, magnitude, Int32(0))
                largest = ops.max_int(largest, magnitude)
        return ops.select(largest >= ops.SMALLEST_BITS, largest, Int32(0))

    @cute.jit
    def quantize(self, words, scales: Scales):
        """Quantizes a block.

        Returns:
            (low codes, high codes, scale byte, scale value, whether an element is not finite). The
            first four are arbitrary where the last or an unusable global scale says so.
        """
        largest = ops.amax_bits(words, self.dtype)
        infinite = largest >= ops.INF_BITS
        largest = ops.select(largest >= ops.SMALLEST_BITS, largest, Int32(0))
        zero = largest == 0
        scaled = ops.mul(ops.from_bits(largest), scales.sixth)
        byte, scale = ops.e4m3_round_trip(ops.minimum(scaled, Float32(E4M3_MAX)))
        step = ops.mul(scale, scales.decode)
        inverse = ops.minimum(ops.reciprocal(step), Float32(ops.FLT_MAX))
        # All elements of a zero block are zeros, some perhaps by being tiny: 0 keeps their signs.
        inverse = ops.select_f32(zero, Float32(0.0), inverse)

        values = cute.make_rmem_tensor((ops.BLOCK,), Float32)
        for i, value in enumerate(ops.to_f32(words, self.dtype)):
            values[i] = value
        # A tiny element must give a zero. It may give more only where 2**-100 * inverse can reach
        # 1/4, which is rare: float32 products of tiny elements are below that elsewhere.
        tiny_matters = inverse > Float32(2.0**97)
        if const_expr(self.hardware):
            if tiny_matters:
                for i in range_constexpr(ops.BLOCK):
                    word = ops.bits(values[i])
                    tiny = (word & Int32(0x7FFFFFFF)) < ops.SMALLEST_BITS
                    values[i] = ops.from_bits(ops.select(tiny, word & Int32(-(1 << 31)), word))
        else:
            # e2m1_magnitudes takes values below 7. Rounding a normal scale to e4m3 moves it by
            # 1/16 at most, and 6 * (1 + 1/16) < 7; 448 for up to 512 is as good. Other blocks
            # have their elements cut to what gives about 6.5, which rounds to 6 like all above.
            unusual = (scaled < Float32(2.0**-6)) | (scaled > Float32(512.0)) | tiny_matters
            if unusual & ~zero:
                limit = ops.maximum(ops.mul(step, Float32(6.5)), Float32(1.625 * 2.0**-126))
                for i in range_constexpr(ops.BLOCK):
                    magnitude = ops.from_bits(ops.bits(values[i]) & Int32(0x7FFFFFFF))
                    tiny = magnitude < Float32(2.0**-100)
                    cut = ops.minimum(magnitude, limit)
                    values[i] = ops.select_f32(tiny, Float32(0.0), cut)
        codes = []
        for half in range_constexpr(2):
            if const_expr(self.hardware):
                scaled8 = [ops.mul(values[8 * half + i], inverse) for i in range(8)]
                codes.append(ops.e2m1_codes_hardware(scaled8))
            else:
                scaled8 = [ops.mul_abs(values[8 * half + i], inverse) for i in range(8)]
                first = half * (self.block_words // 2)
                signs = ops.sign_nibbles(words[first : first + self.block_words // 2], self.dtype)
                codes.append(ops.e2m1_magnitudes(scaled8, signs))
        return codes[0], codes[1], byte, scale, infinite

    @cute.jit
    def store(self, call: Call, place: Place, codes, byte: Int32, scale: Float32, bad: Boolean):
        """Writes a block's outputs, NaN if bad."""
        if const_expr(call.values):
            words = ops.block_values(codes[0], scale) + ops.block_values(codes[1], scale)
            words = [ops.select(bad, Int32(ops.NAN_VALUES), word) for word in words]
            address = call.data + Int64(place.unit) * (2 * ops.BLOCK)
            ops.store_16_bytes(address, *words[:4])
            ops.store_16_bytes(address + 16, *words[4:])
        else:
            words = [ops.select(bad, Int32(ops.NAN_CODES), word) for word in codes]
            ops.store_8_bytes(call.data + Int64(place.unit) * (ops.BLOCK // 2), *words)
            offset = Int64(place.unit)
            if call.swizzled:
                tile = (place.row >> 7) * (call.blocks >> 2) + (place.block >> 2)
                inner = (place.row & 31) * 16 + ((place.row >> 5) & 3) * 4 + (place.block & 3)
                offset = Int64(tile) * SCALE_TILE_BYTES + inner
            byte = ops.select(bad, Int32(ops.NAN_SCALE), byte)
            ops.store_byte(call.block_scale + offset, byte)

    @cute.jit
    def quantize_and_store(self, call: Call, place: Place, words, scales: Scales):
        """Quantizes and writes a block that is active."""
        low, high, byte, scale, infinite = self.quantize(words, scales)
        # Blocks of padding hold zeros, whatever the global scale.
        bad = (infinite | ~scales.valid) & (place.block < call.real_blocks)
        self.store(call, place, (low, high), byte, scale, bad)

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

    # Amax over threads

    @cute.jit
    def warps_max(self, value: Int32, warps: Int32, first_warp: Int32, shared: cute.Pointer):
        """The maximum over `warps` warps from `first_warp` on; all of the CTA's threads call it."""
        shared = cute.make_tensor(shared, cute.make_layout(WARP))
        lane = cute.arch.lane_idx()
        thread = cute.arch.thread_idx()
        warp = (thread[0] + thread[1] * cute.arch.block_dim()[0]) >> 5
        value = cute.arch.warp_redux_sync(value, "max")
        if lane == 0:
            shared[warp] = value
        cute.arch.sync_threads()
        value = Int32(0)
        if lane < warps:
            value = shared[first_warp + lane]
        return cute.arch.warp_redux_sync(value, "max")

    # Kernels

    @cute.kernel
    def flat_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        divisor: cute.FastDivmodDivisorV2,
        per_row: Boolean,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """The global scale is given; CTAs past the last block write the scales' padding."""
        call, g_in, g_out, _ = unpack(pointers, sizes, vector, values)
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        units = call.m * call.blocks
        first = cta * (self.threads * self.units)
        if first < units:
            places = [
                place_of(first + i * self.threads + thread, divisor, units)
                for i in range(self.units)
            ]
            words = [self.load(call, place) for place in places]
            g = ops.load_f32(g_in)
            scales = given_scales(g)
            if (first + thread == 0) & ~per_row:
                ops.store_f32(g_out, g)
            for i in range_constexpr(self.units):
                place = places[i]
                if place.active:
                    sixth, decode, valid = scales.sixth, scales.decode, scales.valid
                    if per_row:
                        offset = Int64(place.row) * 4
                        own_g = ops.load_f32(g_in + offset)
                        own = given_scales(own_g)
                        sixth, decode, valid = own.sixth, own.decode, own.valid
                        if place.block == 0:
                            ops.store_f32(g_out + offset, own_g)
                    own_scales = Scales(sixth, decode, valid)
                    self.quantize_and_store(call, place, words[i], own_scales)
        else:
            per_cta = self.threads * self.units
            spare = cta - (units + per_cta - 1) // per_cta
            self.pad_scales(call, spare * self.threads + thread)

    @cute.kernel
    def rows_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        row_ctas: Int32,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Dynamic per row. CTAs are (threads of a row) x (rows of the CTA).

        CTAs from `row_ctas` on write the scales' padding.
        """
        call, _, g_out, _ = unpack(pointers, sizes, vector, values)
        thread, group, _ = cute.arch.thread_idx()
        row_threads, rows, _ = cute.arch.block_dim()
        cta, _, _ = cute.arch.block_idx()
        shared = cutlass.utils.SmemAllocator().allocate_array(Int32, WARP)
        if cta < row_ctas:
            row = cta * rows + group
            chunk = row_threads * self.units
            chunks = (call.blocks + chunk - 1) // chunk
            held = cute.make_rmem_tensor((self.units * self.block_words,), Int32)
            amax = Int32(0)
            for c in cutlass.range(chunks, unroll=1):
                for i in range_constexpr(self.units):
                    place = self.place_in_row(call, row, c, i, row_threads, thread)
                    words = self.load(call, place)
                    for j in range_constexpr(self.block_words):
                        held[i * self.block_words + j] = words[j]
                for i in range_constexpr(self.units):
                    amax = ops.max_int(amax, self.finite_amax(self.held_words(held, i)))
            warps = row_threads >> 5
            amax = self.warps_max(amax, warps, group * warps, shared)
            scales = dynamic_scales(amax)
            if (thread == 0) & (row < call.m):
                ops.store_f32(g_out + Int64(row) * 4, scales.decode)
            for c in cutlass.range(chunks, unroll=1):
                for i in range_constexpr(self.units):
                    last = chunks - 1 - c
                    place = self.place_in_row(call, row, last, i, row_threads, thread)
                    if place.active:
                        self.quantize_and_store(call, place, self.held_words(held, i), scales)
                if c < chunks - 1:
                    for i in range_constexpr(self.units):
                        place = self.place_in_row(call, row, chunks - 2 - c, i, row_threads, thread)
                        words = self.load(call, place)
                        for j in range_constexpr(self.block_words):
                            held[i * self.block_words + j] = words[j]
        else:
            threads = row_threads * rows
            self.pad_scales(call, (cta - row_ctas) * threads + group * row_threads + thread)

    def place_in_row(self, call: Call, row, chunk, i: int, row_threads, thread) -> Place:
        """The place of a thread's i-th block of a chunk of a row."""
        block = (chunk * self.units + i) * row_threads + thread
        active = (row < call.m) & (block < call.blocks)
        return Place(row * call.blocks + block, row, block, active)

    def held_words(self, held, i: int):
        """The words of the i-th block that a thread holds."""
        return [held[i * self.block_words + j] for j in range(self.block_words)]

    @cute.kernel
    def grid_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        divisor: cute.FastDivmodDivisorV2,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Dynamic per tensor. All CTAs are resident; chunk c belongs to CTA c % ctas."""
        call, _, g_out, scratch = unpack(pointers, sizes, vector, values)
        thread, _, _ = cute.arch.thread_idx()
        threads, _, _ = cute.arch.block_dim()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        allocator = cutlass.utils.SmemAllocator()
        shared = allocator.allocate_array(Int32, 2 * WARP)
        tags = allocator.allocate_array(Int32, MAX_CTAS)
        tag = self.open_exchange(scratch, tags)

        units = call.m * call.blocks
        chunk = threads * self.units
        chunks = ((units + chunk - 1) // chunk - cta + ctas - 1) // ctas
        held = cute.make_rmem_tensor((self.units * self.block_words,), Int32)
        amax = Int32(0)
        for c in cutlass.range(chunks, unroll=1):
            first = (c * ctas + cta) * chunk + thread
            for i in range_constexpr(self.units):
                words = self.load(call, place_of(first + i * threads, divisor, units))
                for j in range_constexpr(self.block_words):
                    held[i * self.block_words + j] = words[j]
            for i in range_constexpr(self.units):
                amax = ops.max_int(amax, self.finite_amax(self.held_words(held, i)))
        amax = self.warps_max(amax, threads >> 5, Int32(0), shared)
        amax = self.share_amax(amax, scratch, tag, tags, shared + WARP)
        scales = dynamic_scales(amax)
        if (thread == 0) & (cta == 0):
            ops.store_f32(g_out, scales.decode)
        for c in cutlass.range(chunks, unroll=1):
            first = ((chunks - 1 - c) * ctas + cta) * chunk + thread
            for i in range_constexpr(self.units):
                place = place_of(first + i * threads, divisor, units)
                if place.active:
                    self.quantize_and_store(call, place, self.held_words(held, i), scales)
            if c < chunks - 1:
                first = ((chunks - 2 - c) * ctas + cta) * chunk + thread
                for i in range_constexpr(self.units):
                    words = self.load(call, place_of(first + i * threads, divisor, units))
                    for j in range_constexpr(self.block_words):
                        held[i * self.block_words + j] = words[j]
        if call.swizzled & ((call.m & 127) != 0):
            for item in range(cta * threads + thread, (call.blocks >> 2) * 32, ctas * threads):
                self.pad_scales(call, item)

    # Amax over the grid

    @cute.jit
    def open_exchange(self, scratch: Int64, tags: cute.Pointer):
        """First half of `share_amax`, before the data is read."""
        tags = cute.make_tensor(tags, cute.make_layout(MAX_CTAS))
        thread, _, _ = cute.arch.thread_idx()
        threads, _, _ = cute.arch.block_dim()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        tag = Int32(0)
        if cta == 0:
            for other in range(thread, ctas, threads):
                if other > 0:
                    slot = scratch + Int64(other) * GRID_SLOT_BYTES
                    _, stale = ops.load_message(slot + CHALLENGE)
                    _, echo = ops.load_message(slot + PARTIAL)
                    challenge = unused_tag(stale & 0xFF, echo & 0xFF)
                    tags[other] = challenge
                    ops.store_message(slot + CHALLENGE, Int32(0), challenge)
        elif thread == 0:
            _, stale = ops.load_message(scratch + Int64(cta) * GRID_SLOT_BYTES + TOTAL)
            tag = (stale & 0xFF) ^ 1
        return tag

    @cute.jit
    def share_amax(
        self, amax: Int32, scratch: Int64, tag: Int32, tags: cute.Pointer, shared: cute.Pointer
    ):
        """The maximum of all CTAs' amax, through scratch memory that starts with any contents.

        CTA 0 leads. Each other CTA has a slot of three messages of 8 bytes, a value and a tag,
        each written by one side only and read and written as a whole:

            CHALLENGE   by the leader: tag c
            PARTIAL     by the CTA: its amax, an echo of the challenge it read, its own tag d
            TOTAL       by the leader: the amax of all, tag d

        Why no stale contents are taken for a message of this launch. PARTIAL's echo is at any time
        the stale one (r), the stale challenge (s, if the CTA reads it before the leader writes)
        or c, in this order and never back. The leader reads s, which it alone writes, and then
        PARTIAL, which shows r or s; it picks c other than s and other than what it saw. An echo of
        c thus proves that the CTA read c, which the leader wrote in this launch; the amax and d
        come in the same 8 bytes. The leader writes TOTAL only then, so that the CTA, which picked
        d other than TOTAL's stale tag at its start, sees d there only with the amax.
        Nothing is left to reset: any contents do for the next launch, and launches that overlap
        on other streams have other scratch memory. All CTAs are resident (cooperative launch), so
        that each wait ends. The maximum does not depend on the order of arrival.
        """
        tags = cute.make_tensor(tags, cute.make_layout(MAX_CTAS))
        total = cute.make_tensor(shared, cute.make_layout(WARP))
        thread, _, _ = cute.arch.thread_idx()
        threads, _, _ = cute.arch.block_dim()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        if ctas > 1:
            if cta == 0:
                for other in range(thread, ctas, threads):
                    if other > 0:
                        slot = scratch + Int64(other) * GRID_SLOT_BYTES
                        value, answer = ops.load_message(slot + PARTIAL)
                        while (answer & 0xFF) != tags[other]:
                            value, answer = ops.load_message(slot + PARTIAL)
                        tags[other] = (answer >> 8) & 0xFF
                        amax = ops.max_int(amax, value)
                amax = self.warps_max(amax, threads >> 5, Int32(0), shared)
                for other in range(thread, ctas, threads):
                    if other > 0:
                        slot = scratch + Int64(other) * GRID_SLOT_BYTES
                        ops.store_message(slot + TOTAL, amax, tags[other])
            else:
                if thread == 0:
                    slot = scratch + Int64(cta) * GRID_SLOT_BYTES
                    echoed = Int32(-1)
                    value, answer = ops.load_message(slot + TOTAL)
                    while (answer & 0xFF) != tag:
                        _, challenge = ops.load_message(slot + CHALLENGE)
                        challenge = challenge & 0xFF
                        if challenge != echoed:
                            ops.store_message(slot + PARTIAL, amax, challenge | (tag << 8))
                            echoed = challenge
                        value, answer = ops.load_message(slot + TOTAL)
                    total[0] = value
                cute.arch.sync_threads()
                amax = total[0]
        return amax

    # Host

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        g_in: cute.Pointer,
        data: cute.Pointer,
        block_scale: cute.Pointer,
        g_out: cute.Pointer,
        scratch: cute.Pointer,
        m: Int32,
        k: Int32,
        x_dtype: Int32,
        mode: Int32,
        out_format: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        """The host function: m >= 0, k >= 1, and m * ceil(k / 64) * 4 < 2**31 - 2**16."""
        real_blocks = (k + 15) >> 4
        blocks = real_blocks
        if out_format != OutFormat.LINEAR:
            blocks = ((k + 63) >> 6) * 4
        pointers = (x, g_in, data, block_scale, g_out, scratch)
        sizes = (m, k, blocks, real_blocks, out_format == OutFormat.OPERAND)
        pad_items = Int32(0)
        if (out_format == OutFormat.OPERAND) & ((m & 127) != 0):
            pad_items = (blocks >> 2) * 32
        vector = ((k * self.item) % 16 == 0) & (x.toint() % 16 == 0)
        if vector:
            if out_format == OutFormat.VALUES:
                self.launch(pointers, sizes, pad_items, mode, num_sms, stream, True, True)
            else:
                self.launch(pointers, sizes, pad_items, mode, num_sms, stream, True, False)
        else:
            if out_format == OutFormat.VALUES:
                self.launch(pointers, sizes, pad_items, mode, num_sms, stream, False, True)
            else:
                self.launch(pointers, sizes, pad_items, mode, num_sms, stream, False, False)

    @cute.jit
    def launch(
        self,
        pointers,
        sizes,
        pad_items: Int32,
        mode: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Launches the kernel of this config's kind."""
        m, _, blocks, _, _ = sizes
        units = m * blocks
        limits = {
            "max_number_threads": [self.threads, 1, 1],
            "min_blocks_per_mp": self.min_ctas,
            "preferred_smem_carveout": 0,
            "stream": stream,
        }
        if const_expr(self.kind == "flat"):
            divisor = cute.FastDivmodDivisorV2(blocks)
            ctas = ceil_div(units, self.threads * self.units) + ceil_div(pad_items, self.threads)
            self.flat_kernel(
                pointers, sizes, divisor, mode == Mode.ROWS_GIVEN, vector, values
            ).launch(grid=[cutlass.max(ctas, 1), 1, 1], block=[self.threads, 1, 1], **limits)
        elif const_expr(self.kind == "rows"):
            row_threads = ceil_div(ceil_div(blocks, self.units), WARP) * WARP
            row_threads = cutlass.min(row_threads, self.threads)
            rows = cutlass.max(ROWS_THREADS // row_threads, 1)
            row_ctas = ceil_div(m, rows)
            ctas = row_ctas + ceil_div(pad_items, row_threads * rows)
            self.rows_kernel(pointers, sizes, row_ctas, vector, values).launch(
                grid=[cutlass.max(ctas, 1), 1, 1], block=[row_threads, rows, 1], **limits
            )
        else:
            divisor = cute.FastDivmodDivisorV2(blocks)
            sms = cutlass.min(num_sms, MAX_CTAS)
            each = ceil_div(ceil_div(units, sms * self.units), WARP) * WARP
            threads = cutlass.min(cutlass.max(each, MIN_THREADS), self.threads)
            ctas = cutlass.min(ceil_div(units, threads * self.units), sms)
            self.grid_kernel(pointers, sizes, divisor, vector, values).launch(
                grid=[cutlass.max(ctas, 1), 1, 1],
                block=[threads, 1, 1],
                cooperative=True,
                **limits,
            )


def ceil_div(a, b):
    """The quotient of two positive integers, rounded up."""
    return (a + b - 1) // b


def unpack(pointers, sizes, vector: bool, values: bool):
    """A kernel's arguments: (Call, address of g_in, of g_out, of scratch)."""
    x, g_in, data, block_scale, g_out, scratch = (pointer.toint() for pointer in pointers)
    m, k, blocks, real_blocks, swizzled = sizes
    call = Call(x, data, block_scale, m, k, blocks, real_blocks, swizzled, vector, values)
    return call, g_in, g_out, scratch


def place_of(unit: Int32, divisor: cute.FastDivmodDivisorV2, units: Int32) -> Place:
    """The place of a block by its number in the tensor."""
    row, block = divmod(unit, divisor)
    return Place(unit, row, block, unit < units)


def unused_tag(a: Int32, b: Int32) -> Int32:
    """A tag of 1, 2 and 3 that is neither a nor b."""
    tag = ops.select((a == 1) | (b == 1), Int32(2), Int32(1))
    return ops.select((a == tag) | (b == tag), Int32(3), tag)


def variants(arch: str) -> list[KernelVariant]:
    """The quantize kernels of an architecture."""

    def pointer(align: int) -> cute.Pointer:
        return make_ptr(Uint8, 1024, cute.AddressSpace.gmem, assumed_align=align)

    found = []
    for config in quantize_configs(arch):
        pointers = (pointer(2), *(pointer(16) for _ in range(5)))
        sizes = (Int32(4), Int32(64), Int32(0), Int32(0), Int32(0), Int32(132))
        arguments = (*pointers, *sizes, cuda.CUstream(0))
        kernel = QuantizeKernel(config)
        found.append(KernelVariant(config.name, "quantize", arch, config, kernel, arguments))
    return found
