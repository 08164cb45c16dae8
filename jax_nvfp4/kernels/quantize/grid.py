# SPDX-License-Identifier: Apache-2.0
"""The "grid" quantize kernels: dynamic per tensor, by one cluster or by a co-resident grid."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr, range_constexpr

from jax_nvfp4.config.quantize import GRID_MESSAGE_BYTES, MAX_CTAS
from jax_nvfp4.kernels.quantize import ptx as ops
from jax_nvfp4.kernels.quantize.base import WARP, QuantizeKernel, Request, ceil_div, unpack
from jax_nvfp4.kernels.quantize.block import dynamic_scales, place_of

MIN_THREADS = 128  # of a CTA that exchanges messages
CLUSTER = 8  # CTAs of a launch for a small tensor: the largest portable cluster
CLUSTER_THREADS = (64, 256)  # of its CTAs, at least and at most


class GridKernel(QuantizeKernel):
    """All CTAs are resident and agree on the amax."""

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

    @cute.jit
    def launch(self, request: Request, vector: cutlass.Constexpr, values: cutlass.Constexpr):
        """Launches the kernel, as one cluster or as a cooperative grid."""
        blocks = request.blocks
        units = request.m * blocks
        divisor = cute.FastDivmodDivisorV2(blocks)
        if const_expr(not vector):
            self.launch_grid(request, divisor, vector, values, None)
        elif self.fits_cluster(units, request.num_sms):
            threads = self.grid_threads(units, CLUSTER, CLUSTER_THREADS[0])
            chunks = ceil_div(units, threads * self.units)
            self.grid_kernel(
                request.pointers,
                request.sizes,
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
                stream=request.stream,
                **self.limits(),
            )
        else:
            self.launch_grid(request, divisor, vector, values, None)

    def fits_cluster(self, units, num_sms):
        """Whether a "grid" kernel takes a tensor by one cluster.

        A device, or a part of one, may be too small for a cluster.
        """
        return (units <= CLUSTER * CLUSTER_THREADS[1] * self.units) & (num_sms >= CLUSTER)

    @cute.jit
    def launch_whole(self, request: Request, out_format: cutlass.Constexpr):
        """Launches the kernel for rows of whole blocks without padding."""
        divisor = small_divisor(request.blocks)
        self.launch_grid(request, divisor, True, False, out_format)

    @cute.jit
    def launch_grid(
        self,
        request: Request,
        divisor,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
        whole: cutlass.Constexpr,
    ):
        """Launches CTAs that exchange their amax through scratch memory."""
        units = request.m * request.blocks
        most = cutlass.min(request.num_sms * self.min_ctas, MAX_CTAS)
        threads = self.grid_threads(units, most, MIN_THREADS)
        # A CTA has a thread for each other CTA.
        chunks = ceil_div(units, threads * self.units)
        ctas = cutlass.max(cutlass.min(chunks, cutlass.min(most, threads)), 1)
        pointers, sizes = request.pointers, request.sizes
        self.grid_kernel(
            pointers, sizes, divisor, chunks // ctas, chunks % ctas, False, vector, values, whole
        ).launch(
            grid=[ctas, 1, 1],
            block=[threads, 1, 1],
            cooperative=True,
            stream=request.stream,
            **self.limits(),
        )

    def grid_threads(self, units, ctas, least: int):
        """Threads of a CTA, enough to hold the tensor if that is possible."""
        threads = ceil_div(ceil_div(units, ctas * self.units), WARP) * WARP
        return cutlass.min(cutlass.max(threads, least), self.threads)


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


def message_address(scratch: Int64, to: Int32, sender: Int32, ctas: Int32) -> Int64:
    """Address of the message from one CTA of a grid to another."""
    return scratch + (to * ctas + sender) * GRID_MESSAGE_BYTES
