# SPDX-License-Identifier: Apache-2.0
"""NVFP4 quantize kernels for every architecture, in CuTeDSL.

    s = e4m3(min(block_amax * (S * (1/6)), 448))
    q = e2m1(x * min(1 / (s * D), FLT_MAX))          S = 2688 / amax or 1 / g,  D = 1 / S

A thread quantizes whole blocks of 16 elements, so that nothing but the amax of a row or of the
tensor crosses threads (`quantize_block.py`). Three kinds of kernel share that, one launch each:

    flat    The scale or the amax is given, for the tensor or per row. Blocks are numbered through;
            a thread takes one or two and loads them before it uses the first.
    rows    Dynamic per row. One or more warps hold a row in registers, reduce its amax and
            quantize what they hold. Of a row that is longer than the registers the last chunk
            stays in them and the others are read again, backwards, from the L1 cache mostly.
            Where rows are few, several CTAs share one: each reads all of it, so that it knows the
            amax without the others, and quantizes a part.
    grid    Dynamic per tensor. A co-resident grid (cooperative launch, one CTA for each
            multiprocessor at most) does the same with the whole tensor; `share_in_grid` says how
            the CTAs agree on the amax through uninitialized scratch memory. A small tensor is left
            to one cluster, which agrees through its shared memory. In 16 bits and without padding
            x is one run of blocks ("whole"), which takes the second pass, all issue slots, fewer
            instructions.

Rows are read by 16-byte loads where k and the address of x allow it ("vector"), and element by
element elsewhere. Blocks that pad a row to 64 columns are loaded as zeros and quantized like any
other, which writes zeros; the scale bytes that pad the rows to a multiple of 128 are written by
spare CTAs. There are no atomics: a row's result depends on its elements and the global scale alone.

Each kernel begins by letting a programmatic launch behind it start (`launch_dependents`). It is no
such launch itself, so that by then all that came before it is complete: what it leads starts early
beside this kernel alone, and waits for its end (`griddepcontrol.wait`) before it reads.
"""

import dataclasses

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint8, const_expr, range_constexpr
from cutlass.cute.runtime import make_ptr

from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import (
    GRID_MESSAGE_BYTES,
    MAX_CTAS,
    quantize_configs,
)
from jax_nvfp4.kernels.quantize import ptx as ops
from jax_nvfp4.kernels.quantize.block import (
    BlockQuantizer,
    Call,
    Place,
    Scales,
    dynamic_scales,
    given_scales,
    place_of,
)
from jax_nvfp4.kernels.variant import KernelVariant

WARP = 32
MIN_THREADS = 128  # of a CTA of a "grid" kernel that exchanges messages
CLUSTER = 8  # CTAs of a "grid" kernel's launch for a small tensor: the largest portable cluster
CLUSTER_THREADS = (64, 256)  # of its CTAs, at least and at most
GROUP = 4 * WARP  # a warp for each scheduler of a multiprocessor: the least part of a shared row
ROWS_THREADS = 256  # short rows share a CTA up to this many threads


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a kernel's work is spread over threads.

    Attributes:
        units: blocks that a thread holds.
        threads: threads of a CTA, at most.
        min_ctas: CTAs that a multiprocessor should have registers for.
        shared: "rows": several CTAs may share a row.
    """

    units: int
    threads: int
    min_ctas: int
    shared: bool = False


def has_e2m1(arch: str) -> bool:
    """Whether an arch converts to e2m1 in hardware."""
    return not arch.startswith("sm_90")


class QuantizeKernel(BlockQuantizer):
    """Kernels and host function of one config.

    Attributes:
        config: the config.
        few: "rows": the same kernels with the shape `FEW_ROWS`.
        wide: "rows": the same kernels with the shape `WIDE_ROWS`.
        threads: threads of a CTA, at most.
        min_ctas: CTAs that a multiprocessor should have registers for.
        shared: "rows": several CTAs may share a row.
    """

    def __init__(self, config: QuantizeConfig, shape: Shape | None = None):
        if shape is None:
            units = config.elements_per_thread // ops.BLOCK
            min_ctas = MIN_CTAS[config.kind, config.x_dtype == "float32"]
            shape = Shape(units, config.threads, min_ctas)
            if config.kind == "rows":
                self.few = QuantizeKernel(config, FEW_ROWS)
                self.wide = QuantizeKernel(config, WIDE_ROWS[has_e2m1(config.arch)])
        super().__init__(config.x_dtype, shape.units, has_e2m1(config.arch))
        self.config = config
        self.threads, self.min_ctas, self.shared = shape.threads, shape.min_ctas, shape.shared

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
        is_amax: cutlass.Constexpr,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """The global scale or amax is given; CTAs past the last block write the scales' padding."""
        cute.arch.griddepcontrol_launch_dependents()
        call, scale_or_amax, global_scale, _ = unpack(pointers, sizes, vector, values)
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
            scales, g = self.flat_scales(scale_or_amax, is_amax)
            if (first + thread == 0) & ~per_row:
                ops.store_f32(global_scale, g)
            for i in range_constexpr(self.units):
                place = places[i]
                if place.active:
                    sixth, decode, valid = scales.sixth, scales.decode, scales.valid
                    if per_row:
                        offset = Int64(place.row) * 4
                        own, own_g = self.flat_scales(scale_or_amax + offset, is_amax)
                        sixth, decode, valid = own.sixth, own.decode, own.valid
                        if place.block == 0:
                            ops.store_f32(global_scale + offset, own_g)
                    own_scales = Scales(sixth, decode, valid)
                    largest = ops.amax_bits(words[i], self.dtype)
                    self.quantize_and_store(call, place, words[i], largest, own_scales)
        else:
            per_cta = self.threads * self.units
            spare = cta - (units + per_cta - 1) // per_cta
            self.pad_scales(call, spare * self.threads + thread)

    def flat_scales(self, address: Int64, is_amax: bool):
        """(the scales by the amax or global scale at an address, the global scale to report)."""
        given = ops.load_f32(address)
        if is_amax:
            scales = dynamic_scales(ops.bits(given))
            return scales, scales.decode
        return given_scales(given), given

    @cute.kernel
    def rows_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        row_ctas: Int32,
        chunks: Int32,
        share_threads: Int32,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Dynamic per row. CTAs are (threads of a row) x (rows of the CTA).

        A row has `chunks` times what its threads hold, or less. CTAs from `row_ctas` on write the
        scales' padding. CTAs that share a row (y of the grid) all read the whole of it, so that
        each knows its amax by itself; then each quantizes what `share_threads` of its threads hold.
        """
        cute.arch.griddepcontrol_launch_dependents()
        call, _, global_scale, _ = unpack(pointers, sizes, vector, values)
        thread, group, _ = cute.arch.thread_idx()
        row_threads, rows, _ = cute.arch.block_dim()
        cta, share, _ = cute.arch.block_idx()
        shared = cutlass.utils.SmemAllocator().allocate_array(Int32, WARP)
        if cta < row_ctas:
            row = cta * rows + group
            held = self.make_held()
            amax = Int32(0)
            for c in cutlass.range(chunks, unroll=1):
                for i in range_constexpr(self.units):
                    place = self.place_in_row(call, row, c, i, row_threads, thread)
                    self.take(held, i, self.load(call, place))
                amax = self.held_amax(held, amax)
            warps = row_threads >> 5
            amax = self.warps_max(amax, warps, group * warps, shared)
            scales = dynamic_scales(amax)
            if (thread == 0) & (share == 0) & (row < call.m):
                ops.store_f32(global_scale + Int64(row) * 4, scales.decode)
            for c in cutlass.range(chunks, unroll=1):
                last = chunks - 1 - c
                for i in range_constexpr(self.units):
                    place = self.place_in_row(call, row, last, i, row_threads, thread)
                    active = place.active
                    if const_expr(self.shared):
                        first = share * share_threads
                        active = active & (thread >= first) & (thread < first + share_threads)
                    if active:
                        self.quantize_and_store(
                            call, place, self.words(held, i), held.largest[i], scales
                        )
                if last > 0:
                    for i in range_constexpr(self.units):
                        place = self.place_in_row(call, row, last - 1, i, row_threads, thread)
                        self.take(held, i, self.load(call, place))
                    for i in range_constexpr(self.units):
                        self.measure(held, i)
        elif share == 0:
            threads = row_threads * rows
            self.pad_scales(call, (cta - row_ctas) * threads + group * row_threads + thread)

    def place_in_row(self, call: Call, row, chunk, i: int, row_threads, thread) -> Place:
        """The place of a thread's i-th block of a chunk of a row."""
        block = (chunk * self.units + i) * row_threads + thread
        active = (row < call.m) & (block < call.blocks)
        return Place(row * call.blocks + block, row, block, active)

    @cute.kernel
    def grid_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        divisor,
        rounds: Int32,
        rest: Int32,
        cluster: cutlass.Constexpr,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
        whole: cutlass.Constexpr,
    ):
        """Dynamic per tensor. All CTAs are resident; chunk c belongs to CTA c % ctas.

        The grid is one cluster, or else a cooperative launch. There are `rounds` chunks for each
        CTA and one more for each of the first `rest`. The divisor is that of blocks by their
        number: from `small_divisor` where x is one run of blocks (`whole`).
        """
        cute.arch.griddepcontrol_launch_dependents()
        call, _, global_scale, scratch = unpack(pointers, sizes, vector, values, whole)
        thread, _, _ = cute.arch.thread_idx()
        threads, _, _ = cute.arch.block_dim()
        cta, _, _ = cute.arch.block_idx()
        ctas, _, _ = cute.arch.grid_dim()
        shared = cutlass.utils.SmemAllocator().allocate_array(Int32, 2 * WARP)
        if const_expr(cluster):
            cute.arch.cluster_arrive_relaxed()
            seen, own = Int32(0), Int32(0)
        else:
            seen, own = self.open_exchange(scratch, thread, cta, ctas)

        units = call.m * call.blocks
        chunk = threads * self.units
        chunks = rounds
        if cta < rest:
            chunks = rounds + 1
        held = self.make_held()
        for i in range_constexpr(self.units):
            unit = cta * chunk + i * threads + thread
            self.take(held, i, self.load_unit(call, unit, units, divisor))
        amax = Int32(0)
        for c in cutlass.range(1, chunks, unroll=1):
            first = (c * ctas + cta) * chunk + thread
            ahead = []
            for i in range_constexpr(self.units):
                ahead.append(self.load_unit(call, first + i * threads, units, divisor))
            amax = self.held_amax(held, amax)
            for i in range_constexpr(self.units):
                self.take(held, i, ahead[i])
        amax = self.held_amax(held, amax)
        amax = self.warps_max(amax, threads >> 5, Int32(0), shared)
        if const_expr(cluster):
            amax = self.share_in_cluster(amax, thread, cta, shared + WARP)
        elif ctas > 1:
            amax = self.share_in_grid(amax, scratch, seen, own, thread, cta, ctas)
            amax = self.warps_max(amax, threads >> 5, Int32(0), shared + WARP)
        scales = dynamic_scales(amax)
        if (thread == 0) & (cta == 0):
            ops.store_f32(global_scale, scales.decode)
        first = ((chunks - 1) * ctas + cta) * chunk + thread
        for left in cutlass.range(chunks - 1, -1, -1, unroll=1):
            for i in range_constexpr(self.units):
                unit = first + i * threads
                words, largest = self.words(held, i), held.largest[i]
                if const_expr(whole is None):
                    place = place_of(unit, divisor, units)
                    if place.active:
                        self.quantize_and_store(call, place, words, largest, scales)
                else:
                    active = unit < units
                    self.quantize_and_store_unit(
                        call, unit, active, words, largest, scales, divisor
                    )
            first = first - ctas * chunk
            if left > 0:
                for i in range_constexpr(self.units):
                    unit = first + i * threads
                    self.take(held, i, self.load_unit(call, unit, units, divisor))
                for i in range_constexpr(self.units):
                    self.measure(held, i)
        if call.swizzled & ((call.m & 127) != 0):
            for item in range(cta * threads + thread, (call.blocks >> 2) * 32, ctas * threads):
                self.pad_scales(call, item)

    # Amax over the grid

    @cute.jit
    def share_in_cluster(self, amax: Int32, thread: Int32, cta: Int32, shared: cute.Pointer):
        """The maximum of the amax of a cluster's CTAs, through their shared memory."""
        cute.arch.cluster_wait()  # all CTAs of the cluster have started
        if thread < CLUSTER:
            ops.store_to_cta((shared + cta).toint(), thread, amax)
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        shared = cute.make_tensor(shared, cute.make_layout(WARP))
        for i in range_constexpr(CLUSTER):
            amax = ops.max_int(amax, shared[i])
        return amax

    @cute.jit
    def open_exchange(self, scratch: Int64, thread: Int32, cta: Int32, ctas: Int32):
        """First step of `share_in_grid`: the stale tags of the messages from and to a peer."""
        seen, own = Int32(0), Int32(0)
        if (thread < ctas) & (thread != cta):
            _, tag = ops.load_message(message_address(scratch, cta, thread, ctas))
            seen = tag & 0xFF
            _, tag = ops.load_message(message_address(scratch, thread, cta, ctas))
            own = tag & 0xFF
        return seen, own

    @cute.jit
    def share_in_grid(
        self,
        amax: Int32,
        scratch: Int64,
        seen: Int32,
        own: Int32,
        thread: Int32,
        cta: Int32,
        ctas: Int32,
    ):
        """The amax of the peer CTA `thread`, through scratch memory that starts with any contents.

        Each CTA sends each other CTA one message of 8 bytes, which only the sender writes and
        which is read and written as a whole: the amax, a tag, and the tag of the opposite message
        that the sender saw at its start ("seen"). The steps of one thread for its peer:

            1. Before the data: read the tag of the peer's message (`seen`) and of its own (`own`).
            2. Send (amax, own + 1, seen).
            3. Read the peer's message until its tag is not `seen`; take its amax.
            4. If the peer saw own + 1, send (amax, own + 2, seen).

        No stale message is taken: a tag other than `seen` was written after step 1, by the peer,
        in this launch, and with its amax. Each wait ends: the peer has other tags to send than
        `seen` unless step 1 read its message of step 2 already, whose tag the peer finds, in
        step 4, in the message that step 2 sends; and of two threads at least one had its step 1
        before the other's step 2 (else each read would follow, through the other thread, on a
        write that waits for it), so that one of them gets to step 4 without the other's.
        Coherence of a single location and the dependence of what is sent on what was read are all
        that this needs of the memory model. Nothing is left to reset, so that any contents do for
        the next launch; launches that overlap, on other streams, have other scratch memory. All
        CTAs are resident (cooperative launch). A maximum does not depend on the order.
        """
        if (thread < ctas) & (thread != cta):
            inbox = message_address(scratch, cta, thread, ctas)
            outbox = message_address(scratch, thread, cta, ctas)
            tag = (own + 1) & 0xFF
            ops.store_message(outbox, amax, tag | (seen << 8))
            value, tags = ops.load_message(inbox)
            while (tags & 0xFF) == seen:
                value, tags = ops.load_message(inbox)
            if ((tags >> 8) & 0xFF) == tag:
                ops.store_message(outbox, amax, ((own + 2) & 0xFF) | (seen << 8))
            amax = ops.max_int(amax, value)
        return amax

    # Host

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        scale_or_amax: cute.Pointer,
        data: cute.Pointer,
        block_scale: cute.Pointer,
        global_scale: cute.Pointer,
        scratch: cute.Pointer,
        m: Int32,
        k: Int32,
        x_dtype: Int32,
        scaling: Int32,
        out_format: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        """The host function.

        The caller picks the config by the scaling, of which the kernel of another kind would take
        no notice. m >= 0, k >= 1, and m * ceil(k / 64) * 4 < 2**31 - 2**16.
        """
        real_blocks = (k + 15) >> 4
        blocks = real_blocks
        if out_format != OutFormat.LINEAR:
            blocks = ((k + 63) >> 6) * 4
        pointers = (x, scale_or_amax, data, block_scale, global_scale, scratch)
        sizes = (m, k, blocks, real_blocks, out_format == OutFormat.OPERAND)
        pad_items = Int32(0)
        if (out_format == OutFormat.OPERAND) & ((m & 127) != 0):
            pad_items = (blocks >> 2) * 32
        aligned = x.toint() % 16 == 0
        vector = ((k * self.item) % 16 == 0) & aligned
        if const_expr(self.config.kind == "grid" and self.item == 2):
            whole = aligned & (k == blocks * ops.BLOCK) & ~self.fits_cluster(m * blocks, num_sms)
            if whole & (out_format == OutFormat.LINEAR):
                self.launch_whole(pointers, sizes, num_sms, stream, OutFormat.LINEAR)
            elif whole & (out_format == OutFormat.OPERAND):
                self.launch_whole(pointers, sizes, num_sms, stream, OutFormat.OPERAND)
            else:
                self.launch_any(
                    pointers, sizes, pad_items, scaling, out_format, num_sms, stream, vector
                )
        else:
            self.launch_any(
                pointers, sizes, pad_items, scaling, out_format, num_sms, stream, vector
            )

    @cute.jit
    def launch_any(
        self,
        pointers,
        sizes,
        pad_items: Int32,
        scaling: Int32,
        out_format: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
        vector: Boolean,
    ):
        """Launches the kernel that is compiled for these loads and these outputs."""
        if vector:
            if out_format == OutFormat.VALUES:
                self.launch(pointers, sizes, pad_items, scaling, num_sms, stream, True, True)
            else:
                self.launch(pointers, sizes, pad_items, scaling, num_sms, stream, True, False)
        else:
            if out_format == OutFormat.VALUES:
                self.launch(pointers, sizes, pad_items, scaling, num_sms, stream, False, True)
            else:
                self.launch(pointers, sizes, pad_items, scaling, num_sms, stream, False, False)

    @cute.jit
    def launch(
        self,
        pointers,
        sizes,
        pad_items: Int32,
        scaling: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Launches the kernel of this config's kind."""
        m, _, blocks, _, _ = sizes
        units = m * blocks
        limits = self.limits() | {"stream": stream}
        if const_expr(self.config.kind == "flat"):
            divisor = cute.FastDivmodDivisorV2(blocks)
            ctas = ceil_div(units, self.threads * self.units) + ceil_div(pad_items, self.threads)
            per_row = (scaling == Scaling.STATIC_ROWS) | (scaling == Scaling.AMAX_ROWS)
            limits |= {"grid": [cutlass.max(ctas, 1), 1, 1], "block": [self.threads, 1, 1]}
            if (scaling == Scaling.AMAX) | (scaling == Scaling.AMAX_ROWS):
                kernel = self.flat_kernel(pointers, sizes, divisor, per_row, True, vector, values)
                kernel.launch(**limits)
            else:
                kernel = self.flat_kernel(pointers, sizes, divisor, per_row, False, vector, values)
                kernel.launch(**limits)
        elif const_expr(self.config.kind == "rows"):
            # Element by element, the loads are what takes the time.
            if const_expr(vector):
                if m * self.few.parts(blocks) <= num_sms:
                    self.few.launch_rows(
                        pointers, sizes, pad_items, num_sms, stream, vector, values
                    )
                elif const_expr(self.item == 2):
                    if blocks > ROWS_THREADS * self.units:
                        self.wide.launch_rows(
                            pointers, sizes, pad_items, num_sms, stream, vector, values
                        )
                    else:
                        self.launch_rows(
                            pointers, sizes, pad_items, num_sms, stream, vector, values
                        )
                else:
                    self.launch_rows(pointers, sizes, pad_items, num_sms, stream, vector, values)
            else:
                self.launch_rows(pointers, sizes, pad_items, num_sms, stream, vector, values)
        else:
            divisor = cute.FastDivmodDivisorV2(blocks)
            if const_expr(vector):
                if self.fits_cluster(units, num_sms):
                    threads = self.grid_threads(units, CLUSTER, CLUSTER_THREADS[0])
                    chunks = ceil_div(units, threads * self.units)
                    self.grid_kernel(
                        pointers,
                        sizes,
                        divisor,
                        chunks // CLUSTER,
                        chunks % CLUSTER,
                        True,
                        vector,
                        values,
                        None,
                    ).launch(
                        grid=[CLUSTER, 1, 1],
                        block=[threads, 1, 1],
                        cluster=[CLUSTER, 1, 1],
                        **limits,
                    )
                else:
                    self.launch_grid(
                        pointers, sizes, divisor, num_sms, stream, vector, values, None
                    )
            else:
                self.launch_grid(pointers, sizes, divisor, num_sms, stream, vector, values, None)

    def fits_cluster(self, units, num_sms):
        """Whether a "grid" kernel takes a tensor by one cluster.

        A device, or a part of one, may be too small for a cluster.
        """
        return (units <= CLUSTER * CLUSTER_THREADS[1] * self.units) & (num_sms >= CLUSTER)

    @cute.jit
    def launch_whole(
        self, pointers, sizes, num_sms: Int32, stream: cuda.CUstream, out_format: cutlass.Constexpr
    ):
        """Launches a "grid" kernel for rows of whole blocks without padding."""
        _, _, blocks, _, _ = sizes
        divisor = small_divisor(blocks)
        self.launch_grid(pointers, sizes, divisor, num_sms, stream, True, False, out_format)

    @cute.jit
    def launch_grid(
        self,
        pointers,
        sizes,
        divisor,
        num_sms: Int32,
        stream: cuda.CUstream,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
        whole: cutlass.Constexpr,
    ):
        """Launches a "grid" kernel whose CTAs exchange their amax through scratch memory."""
        m, _, blocks, _, _ = sizes
        units = m * blocks
        most = cutlass.min(num_sms * self.min_ctas, MAX_CTAS)
        threads = self.grid_threads(units, most, MIN_THREADS)
        # A CTA has a thread for each other CTA.
        chunks = ceil_div(units, threads * self.units)
        ctas = cutlass.max(cutlass.min(chunks, cutlass.min(most, threads)), 1)
        self.grid_kernel(
            pointers, sizes, divisor, chunks // ctas, chunks % ctas, False, vector, values, whole
        ).launch(
            grid=[ctas, 1, 1],
            block=[threads, 1, 1],
            cooperative=True,
            stream=stream,
            **self.limits(),
        )

    @cute.jit
    def launch_rows(
        self,
        pointers,
        sizes,
        pad_items: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """Launches a "rows" kernel."""
        m, _, blocks, _, _ = sizes
        row_threads = ceil_div(ceil_div(blocks, self.units), WARP) * WARP
        if const_expr(self.shared):
            # Chunks of the same size: each share has a part of all of them.
            row_threads = ceil_div(ceil_div(row_threads, self.parts(blocks)), WARP) * WARP
        row_threads = cutlass.min(row_threads, self.threads)
        rows = cutlass.max(ROWS_THREADS // row_threads, 1)
        row_ctas = ceil_div(m, rows)
        ctas = row_ctas + ceil_div(pad_items, row_threads * rows)
        chunks = ceil_div(blocks, row_threads * self.units)
        groups, shares = ceil_div(row_threads, GROUP), Int32(1)
        if const_expr(self.shared):
            shares = cutlass.min(groups, cutlass.max(num_sms // cutlass.max(row_ctas, 1), 1))
        share_threads = ceil_div(groups, shares) * GROUP
        self.rows_kernel(pointers, sizes, row_ctas, chunks, share_threads, vector, values).launch(
            grid=[cutlass.max(ctas, 1), shares, 1],
            block=[row_threads, rows, 1],
            stream=stream,
            **self.limits(),
        )

    def parts(self, blocks):
        """How many times what a CTA holds the blocks of a row are."""
        return ceil_div(blocks, self.threads * self.units)

    def limits(self) -> dict:
        """Launch arguments that bound the registers; the L1 cache takes all of its memory."""
        return {
            "max_number_threads": [self.threads, 1, 1],
            "min_blocks_per_mp": self.min_ctas,
            "preferred_smem_carveout": 0,
        }

    def grid_threads(self, units, ctas, least: int):
        """Threads of a CTA, enough to hold the tensor if that is possible."""
        threads = ceil_div(ceil_div(units, ctas * self.units), WARP) * WARP
        return cutlass.min(cutlass.max(threads, least), self.threads)


# CTAs that a multiprocessor should have registers for, by kind and whether x is float32.
MIN_CTAS = {
    ("flat", False): 6,
    ("flat", True): 4,
    ("rows", False): 2,
    ("rows", True): 2,
    ("grid", False): 1,
    ("grid", True): 1,
}
FEW_ROWS = Shape(units=1, threads=1024, min_ctas=1, shared=True)
"""For rows, or parts of 16,384 columns, no more than multiprocessors.

A thread for each block, since latency is all.
"""
WIDE_ROWS = {
    False: Shape(units=4, threads=512, min_ctas=2),
    True: Shape(units=4, threads=448, min_ctas=2),
}
"""For 16-bit rows that are too long for two blocks a thread in a small CTA.

By whether the arch converts to e2m1 in hardware: there, the 64 registers of 2 x 512 threads spill.
"""


@cute.jit
def small_divisor(divisor: Int32):
    """(multiplier, shift) such that n // divisor is n * multiplier >> 32 + shift for n < 2**31.

    With 2**(shift + 1) >= divisor > 2**shift, the multiplier is 2**(32 + shift) / divisor rounded
    up, below 2**32 (Granlund and Montgomery, "Division by Invariant Integers using
    Multiplication", 1994). For divisors of at least 2.
    """
    shift = Int32(0)
    while (Int32(2) << shift) < divisor:
        shift = shift + 1
    multiplier = ((Int64(1) << (Int64(shift) + 32)) + divisor - 1) // divisor
    return Int32(multiplier), shift


def ceil_div(a, b):
    """The quotient of two positive integers, rounded up."""
    return (a + b - 1) // b


def unpack(pointers, sizes, vector: bool, values: bool, whole: OutFormat | None = None):
    """A kernel's arguments: (Call, address of scale_or_amax, of global_scale, of scratch)."""
    x, scale_or_amax, data, block_scale, global_scale, scratch = (
        pointer.toint() for pointer in pointers
    )
    m, k, blocks, real_blocks, swizzled = sizes
    call = Call(x, data, block_scale, m, k, blocks, real_blocks, swizzled, vector, values, whole)
    return call, scale_or_amax, global_scale, scratch


def message_address(scratch: Int64, to: Int32, sender: Int32, ctas: Int32) -> Int64:
    """Address of the message from one CTA of a grid to another."""
    return scratch + (to * ctas + sender) * GRID_MESSAGE_BYTES


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
