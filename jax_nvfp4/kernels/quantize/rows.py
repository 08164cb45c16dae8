# SPDX-License-Identifier: Apache-2.0
"""The "rows" quantize kernels: dynamic per row."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr, range_constexpr

from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.kernels.quantize import ptx as ops
from jax_nvfp4.kernels.quantize.base import (
    WARP,
    QuantizeKernel,
    Request,
    Shape,
    ceil_div,
    has_e2m1,
    unpack,
)
from jax_nvfp4.kernels.quantize.block import Call, Place, dynamic_scales

GROUP = 4 * WARP  # a warp for each scheduler of a multiprocessor: the least part of a shared row
ROWS_THREADS = 256  # short rows share a CTA up to this many threads
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


class RowsKernel(QuantizeKernel):
    """One or more warps hold a row, or a part of it at a time."""

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

    @cute.jit
    def launch(self, request: Request, vector: cutlass.Constexpr, values: cutlass.Constexpr):
        """Launches the kernel."""
        m, blocks, num_sms = request.m, request.blocks, request.num_sms
        row_threads = ceil_div(ceil_div(blocks, self.units), WARP) * WARP
        if const_expr(self.shared):
            # Chunks of the same size: each share has a part of all of them.
            row_threads = ceil_div(ceil_div(row_threads, self.parts(blocks)), WARP) * WARP
        row_threads = cutlass.min(row_threads, self.threads)
        rows = cutlass.max(ROWS_THREADS // row_threads, 1)
        row_ctas = ceil_div(m, rows)
        ctas = row_ctas + ceil_div(request.pad_items, row_threads * rows)
        chunks = ceil_div(blocks, row_threads * self.units)
        groups, shares = ceil_div(row_threads, GROUP), Int32(1)
        if const_expr(self.shared):
            shares = cutlass.min(groups, cutlass.max(num_sms // cutlass.max(row_ctas, 1), 1))
        share_threads = ceil_div(groups, shares) * GROUP
        self.rows_kernel(
            request.pointers, request.sizes, row_ctas, chunks, share_threads, vector, values
        ).launch(
            grid=[cutlass.max(ctas, 1), shares, 1],
            block=[row_threads, rows, 1],
            stream=request.stream,
            **self.limits(),
        )

    def parts(self, blocks):
        """How many times what a CTA holds the blocks of a row are."""
        return ceil_div(blocks, self.threads * self.units)


class RowsKernels(QuantizeKernel):
    """The same kernel in the shapes for usual, few and wide rows.

    Attributes:
        usual: in the config's shape.
        few: in the shape `FEW_ROWS`.
        wide: in the shape `WIDE_ROWS`.
    """

    def __init__(self, config: QuantizeConfig, shape: Shape):
        super().__init__(config, shape)
        self.usual = RowsKernel(config, shape)
        self.few = RowsKernel(config, FEW_ROWS)
        self.wide = RowsKernel(config, WIDE_ROWS[has_e2m1(config.arch)])

    @cute.jit
    def launch(self, request: Request, vector: cutlass.Constexpr, values: cutlass.Constexpr):
        """Launches the kernel in the shape for these rows."""
        # Element by element, the loads are what takes the time.
        if const_expr(not vector):
            self.usual.launch(request, vector, values)
        elif request.m * self.few.parts(request.blocks) <= request.num_sms:
            self.few.launch(request, vector, values)
        elif const_expr(self.item == 2):
            if request.blocks > ROWS_THREADS * self.units:
                self.wide.launch(request, vector, values)
            else:
                self.usual.launch(request, vector, values)
        else:
            self.usual.launch(request, vector, values)
