# SPDX-License-Identifier: Apache-2.0
"""The sm_100f GEMM's epilogue warps: accumulators from tensor memory, scales and bias, y."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint16, Uint32
from cutlass.cute.nvgpu import cpasync

from jax_nvfp4.kernels.gemm.sm100.arguments import (
    Call,
    Chunk,
    Cta,
    Exchange,
    Feature,
    Handover,
    Tile,
)
from jax_nvfp4.kernels.gemm.sm100.ptx import (
    CHUNK,
    CLUSTER,
    ROWS,
    Shape,
    Tiles,
    arrive_relaxed,
    coordinates,
    first_tile,
    load_accumulators,
    next_tile,
    store_remote,
    tcgen05_fence_after,
    tcgen05_fence_before,
)
from jax_nvfp4.kernels.ptx import fma_to, wait_cluster

KINDS = (Float32, BFloat16, Float16)  # by out_dtype and bias_dtype


class Epilogue:
    """What both epilogues need: accumulators, scales, bias, and the hand-over to the MMA warp."""

    def __init__(self, shape: Shape):
        self.shape = shape

    def accumulators(self, tmem, column, count):
        """`count` accumulators of this thread's row, from tensor-memory column `column` on."""
        # A warp reads the 32 lanes of its place in the CTA; lanes are address bits 16 and up.
        lanes = cute.arch.thread_idx()[0] // 32 * 32 << 16
        return load_accumulators(tmem.toint() + lanes + column, count)

    @cute.jit
    def read_scale(self, scale: cute.Pointer, stride: Int32, index: Int32, limit: Int32):
        """The global scale of row `index`: one for all rows, one for each, or none (1.0)."""
        value = Float32(1.0)
        if stride >= 0 and index < limit:
            value = cute.make_tensor(scale + Int64(index * stride), cute.make_layout(1))[0]
        return value

    @cute.jit
    def read_bias(self, bias: cute.Pointer, dtype: Int32, index: Int32, limit: Int32):
        """The bias of output feature `index`; -0.0, which adds nothing to any value, if none."""
        value = Float32(-0.0)
        if index < limit:
            for code, kind in enumerate(KINDS):
                if dtype == code:
                    typed = cute.recast_ptr(bias, dtype=kind)
                    value = cute.make_tensor(typed + Int64(index), cute.make_layout(1))[0].to(
                        Float32
                    )
        return value

    def write_column(self, storage, index, value):
        """Puts the scale or the bias of a column of the tile into shared memory."""
        cute.make_tensor(storage.columns.data_ptr() + index, cute.make_layout(1))[0] = value

    def _column_values(self, storage, offset):
        """The scales or biases of CHUNK columns, in registers."""
        registers = cute.make_rmem_tensor((CHUNK,), Float32)
        source = storage.columns.data_ptr() + cute.assume(offset, divby=4)
        cute.autovec_copy(cute.make_tensor(source, cute.make_layout(CHUNK)), registers)
        return registers

    @cute.jit
    def release(self, barrier, leader):
        """Tells the MMA warp of CTA `leader` that this warp has read its accumulators."""
        tcgen05_fence_before()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            if cutlass.const_expr(self.shape.pair):
                arrive_relaxed(barrier, leader)
            else:
                cute.arch.mbarrier_arrive(barrier)


class PairEpilogue(Epilogue):
    """Where x is A: a thread has a row of y, whose columns follow each other in its registers."""

    @cute.jit
    def run(self, call: Call, storage, handover: Handover, rank, tiles: Tiles):
        """Runs the epilogue warps over the CTA's tiles."""
        s = self.shape
        output, problem = call.output, call.problem
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)
        leader = rank // 2 * 2
        buffers = storage.staging.data_ptr() + cute.assume(warp * 8192, divby=8192)
        used = Int32(0)  # staging buffers used so far
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            tile_a, tile_b = coordinates(tiles, index)
            row0 = (tile_a * s.cluster_a + rank % s.cluster_a) * ROWS
            col0 = (tile_b * s.cluster_b + rank // s.cluster_a) * s.columns
            vectors = count % 2 * (2 * s.columns)
            for i in cutlass.range_constexpr(s.columns // 128):
                col = thread + i * 128
                self.write_constants(storage, vectors + col, col0 + col, call)
            row_scale = self.read_scale(
                output.x_scale, problem.x_scale_stride, row0 + thread, problem.m
            )
            cute.arch.barrier(barrier_id=1, number_of_threads=128)

            buffer = count % 2
            barrier = count % s.acc_barriers
            cute.arch.mbarrier_wait(handover.full + barrier, count // s.acc_barriers % 2)
            tcgen05_fence_after()
            tile = Tile(row0, warp, col0, vectors, buffer, barrier, leader, row_scale)
            used = self.store_tile(call, storage, handover, tile, buffers, used)
            index = next_tile(tiles, count)
            count += 1
        cute.arch.cp_async_bulk_wait_group(0)

    @cute.jit
    def write_constants(self, storage, place, col, call: Call):
        """Puts the scale and the bias of column `col` of y where the tile's threads find them."""
        output, problem = call.output, call.problem
        scale = self.read_scale(output.w_scale, problem.w_scale_stride, col, problem.n)
        self.write_column(storage, place, scale)
        bias = self.read_bias(output.bias, problem.bias_dtype, col, problem.n)
        self.write_column(storage, place + self.shape.columns, bias)

    @cute.jit
    def store_tile(self, call: Call, storage, handover: Handover, tile: Tile, buffers, used):
        """Scales and stores the warp's rows of a tile; returns the staging buffers used so far."""
        s = self.shape
        groups = s.columns // 64
        for i in cutlass.range(groups, unroll=1):
            group = self.group_of(i, tile)
            halves = self.load_group(i, group, handover, tile)
            for half in cutlass.range_constexpr(2):
                col = tile.vectors + group * 64 + half * CHUNK
                self.finish(
                    halves[half], tile.row_scale, self._column_values(storage, col),
                    self._column_values(storage, col + s.columns), call.problem.out_dtype,
                )  # fmt: skip
            used = self.store_group(
                halves, buffers, used, call, tile.row + tile.warp * 32, tile.column + group * 64
            )
        return used

    @cute.jit
    def group_of(self, i, tile: Tile):
        """The i-th group of 64 columns to read."""
        group = i
        if cutlass.const_expr(self.shape.overlapped):
            # The columns that the next tile overwrites first: the last ones of the first
            # accumulator, the first ones of the second.
            group = i if tile.buffer == 1 else self.shape.columns // 64 - 1 - i
        return group

    @cute.jit
    def load_group(self, i, group, handover: Handover, tile: Tile):
        """A thread's 64 accumulators of a group, the i-th to be read, in two halves."""
        s = self.shape
        column = tile.buffer * s.acc_stride + group * 64
        acc = self.accumulators(handover.tmem, column, 2 * CHUNK)
        halves = [
            cute.make_tensor(acc.iterator + half * CHUNK, cute.make_layout(CHUNK))
            for half in range(2)
        ]
        if i == (0 if s.overlapped else s.columns // 64 - 1):
            self.release(handover.empty + tile.barrier, tile.leader)
        return halves

    def finish(self, acc, row_scale, col_scale, col_bias, out_dtype):
        """Sets acc to (row_scale * col_scale) * acc + col_bias, to be stored as `out_dtype`."""
        for j in range(CHUNK):
            acc[j] = fma_to(row_scale * col_scale[j], acc[j], col_bias[j], out_dtype)

    @cute.jit
    def store_group(self, halves, buffers, used, call: Call, row, col):
        """Stores 32 rows by 64 columns through shared memory, in boxes of 32 rows of 128 bytes."""
        n, out_dtype = call.problem.n, call.problem.out_dtype
        if out_dtype == 0:
            for half in cutlass.range_constexpr(2):
                buffer = self.staging_buffer(buffers, used)
                values = cute.recast_tensor(halves[half], Uint32)
                self.stage_words(buffer, values, 0)
                self.store_box(buffer, call, 2 * n, row, 2 * (col + half * CHUNK))
                used += 1
        else:
            buffer = self.staging_buffer(buffers, used)
            for half in cutlass.range_constexpr(2):
                words = cute.make_rmem_tensor((CHUNK // 2,), Uint32)
                for code, kind in ((1, BFloat16), (2, Float16)):
                    if out_dtype == code:
                        rounded = cute.make_rmem_tensor((CHUNK,), kind)
                        rounded.store(halves[half].load().to(kind))
                        cute.autovec_copy(cute.recast_tensor(rounded, Uint32), words)
                self.stage_words(buffer, words, half * 4)
            self.store_box(buffer, call, n, row, col)
            used += 1
        return used

    @cute.jit
    def staging_buffer(self, buffers, used):
        """The next of the warp's two staging buffers, once TMA has read what it held before."""
        cute.arch.cp_async_bulk_wait_group(1, read=True)
        cute.arch.sync_warp()
        return buffers + cute.assume(used % 2 * 4096, divby=4096)

    def stage_words(self, buffer, words, first):
        """Writes a thread's words from 16-byte chunk `first` on of its row, in TMA's swizzle."""
        lane = cute.arch.lane_idx()
        for i in range(cute.size(words) // 4):
            offset = lane * 128 + ((first + i) ^ (lane % 8)) * 16
            pointer = cute.recast_ptr(buffer + cute.assume(offset, divby=16), dtype=Uint32)
            source = cute.make_tensor(words.iterator + 4 * i, cute.make_layout(4))
            cute.autovec_copy(source, cute.make_tensor(pointer, cute.make_layout(4)))

    @cute.jit
    def store_box(self, buffer, call: Call, width, row, col):
        """Stores a staged box at (row, col), in 16-bit words of y's rows of `width` words.

        By TMA where rows of y are 16-byte aligned, else word by word. Both clip at y's edges.
        """
        if call.use_tma != 0:
            cute.arch.fence_view_async_shared()
            cute.arch.sync_warp()
            layout = cute.make_layout((32, 64), stride=(64, 1))
            words = cute.make_tensor(
                cute.recast_ptr(buffer.align(1024), cute.make_swizzle(3, 4, 3), dtype=Uint16),
                layout,
            )
            source, boxes = cpasync.tma_partition(
                call.store.atom,
                0,
                cute.make_layout(1),
                cute.group_modes(words, 0, 2),
                cute.group_modes(cute.local_tile(call.store.tensor, (32, 64), (None, None)), 0, 2),
            )
            # Unlike loads, stores and prefetches are issued by each thread that reaches them.
            with cute.arch.elect_one():
                cute.copy(call.store.atom, source, boxes[None, row // 32, col // 64])
        else:
            cute.arch.sync_warp()
            lane = cute.arch.lane_idx()
            out = cute.recast_ptr(call.output.y, dtype=Uint16)
            for r in cutlass.range(cutlass.min(call.problem.m - row, 32), unroll=1):
                for part in cutlass.range_constexpr(2):
                    c = lane + 32 * part
                    if col + c < width:
                        offset = r * 128 + ((c // 8) ^ (r % 8)) * 16 + c % 8 * 2
                        word = cute.make_tensor(
                            cute.recast_ptr(buffer + cute.assume(offset, divby=2), dtype=Uint16),
                            cute.make_layout(1),
                        )
                        at = Int64(row + r) * width + (col + c)
                        cute.make_tensor(out + at, cute.make_layout(1))[0] = word[0]
        cute.arch.cp_async_bulk_commit_group()


class SwapEpilogue(Epilogue):
    """Where the weight is A: a thread has a column of y, tokens follow each other in registers."""

    def __init__(self, shape: Shape, red_buffers: int):
        super().__init__(shape)
        self.red_buffers = red_buffers

    @cute.jit
    def run(
        self, call: Call, storage, handover: Handover, exchange: Exchange, cta: Cta, tiles: Tiles
    ):
        """Runs the epilogue warps over the CTA's tiles."""
        s = self.shape
        output, problem = call.output, call.problem
        has_k = cta.k_end > cta.k_begin
        thread = cute.arch.thread_idx()[0]
        chunks = s.columns // CHUNK
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            tile_a, tile_b = coordinates(tiles, index)
            row = tile_a * ROWS + thread
            token0 = tile_b * s.columns
            vectors = count % 2 * s.columns
            if thread < s.columns:
                token_scale = self.read_scale(
                    output.x_scale, problem.x_scale_stride, token0 + thread, problem.m
                )
                self.write_column(storage, vectors + thread, token_scale)
            feature = self.feature(row, call)
            cute.arch.barrier(barrier_id=1, number_of_threads=128)

            buffer = count % 2
            cute.arch.mbarrier_wait(handover.full + buffer, count // 2 % 2)
            tcgen05_fence_after()
            for i in cutlass.range(chunks, unroll=1):
                acc = cute.make_rmem_tensor((CHUNK,), Float32)
                acc.fill(0.0)
                if has_k:  # else this CTA's share of K is empty, and nothing was accumulated
                    column = buffer * s.acc_stride + i * CHUNK
                    acc.store(self.accumulators(handover.tmem, column, CHUNK).load())
                if i == chunks - 1:
                    self.release(handover.empty + buffer, 0)
                token = token0 + i * CHUNK
                scales = self._column_values(storage, vectors + i * CHUNK)
                if cta.split == 1:
                    self.store_features(acc, scales, feature, call, token)
                else:
                    chunk = Chunk(count * chunks + i, token, vectors + i * CHUNK)
                    self.store_reduced(acc, storage, exchange, chunk, feature, call, cta)
            index = next_tile(tiles, count)
            count += 1

    def feature(self, row, call: Call):
        """What a thread has to know of its row of the weight."""
        output, problem = call.output, call.problem
        return Feature(
            row,
            self.read_scale(output.w_scale, problem.w_scale_stride, row, problem.n),
            self.read_bias(output.bias, problem.bias_dtype, row, problem.n),
        )

    @cute.jit
    def store_features(self, acc, scales, feature: Feature, call: Call, token):
        """Stores CHUNK tokens of one output feature; a warp writes 32 features of a token."""
        n, out_dtype = call.problem.n, call.problem.out_dtype
        tokens = call.problem.m - token
        if feature.index >= n:
            tokens = Int32(0)
        for code, kind in enumerate(KINDS):
            if out_dtype == code:
                out = cute.recast_ptr(call.output.y, dtype=kind) + (
                    Int64(token) * n + feature.index
                )
                for j in cutlass.range_constexpr(CHUNK):
                    value = fma_to(feature.scale * scales[j], acc[j], feature.bias, code)
                    if j < tokens:
                        cell = cute.make_tensor(out + Int64(j) * n, cute.make_layout(1))
                        cell[0] = value.to(kind)

    @cute.jit
    def store_reduced(
        self,
        acc,
        storage,
        exchange: Exchange,
        chunk: Chunk,
        feature: Feature,
        call: Call,
        cta: Cta,
    ):
        """Adds the partial sums of a cluster that splits K and stores this CTA's share of tokens.

        Each CTA owns CHUNK / split tokens of the chunk. Every CTA writes its partial sums of them
        into the owner's shared memory, one slot for each source; the owner adds the slots in the
        order of K, whatever the order of their arrival.
        """
        rank, split = cta.rank, cta.split
        thread = cute.arch.thread_idx()[0]
        lane = cute.arch.lane_idx()
        # One lane signals each CTA. The others' ranks are valid too: the compiler maps the address
        # before it branches.
        peer = cutlass.min(lane, split - 1)
        buffer = chunk.number % self.red_buffers
        phase = chunk.number // self.red_buffers % 2
        own = CHUNK // split
        slots = storage.reduce.data_ptr() + buffer * (CHUNK * ROWS)
        wait_cluster(exchange.empty + buffer, phase ^ 1)
        for j in cutlass.range_constexpr(CHUNK):
            owner = j // own
            slot = slots + ((rank * own + j % own) * ROWS + thread)
            store_remote(slot, owner, acc[j])
        cute.arch.sync_warp()
        if lane < split:
            cute.arch.mbarrier_arrive(exchange.full + buffer, peer, scope=CLUSTER)
        wait_cluster(exchange.full + buffer, phase)
        for j in cutlass.range(own, unroll=1):
            total = Float32(0.0)
            for source in cutlass.range(split, unroll=1):
                cell = cute.make_tensor(
                    slots + ((source * own + j) * ROWS + thread), cute.make_layout(1)
                )
                total = total + cell[0]
            column = rank * own + j
            scale = cute.make_tensor(
                storage.columns.data_ptr() + (chunk.vectors + column), cute.make_layout(1)
            )[0]
            self.store_sum(total, (scale, chunk.token, column), feature, call)
        cute.arch.sync_warp()
        if lane < split:
            cute.arch.mbarrier_arrive(exchange.empty + buffer, peer, scope=CLUSTER)

    @cute.jit
    def store_sum(self, total, of, feature: Feature, call: Call):
        """Stores one token's output, from the sum of all parts of K.

        Args:
            total: the sum.
            of: the token's scale, the chunk's first token, and which of the chunk's it is.
            feature: the thread's.
            call: says where to.
        """
        m, n, out_dtype = call.problem.m, call.problem.n, call.problem.out_dtype
        scale, first, token = of
        value = fma_to(feature.scale * scale, total, feature.bias, out_dtype)
        if first + token < m and feature.index < n:
            at = Int64(first + token) * n + feature.index
            for code, kind in enumerate(KINDS):
                if out_dtype == code:
                    out = cute.recast_ptr(call.output.y, dtype=kind) + at
                    cute.make_tensor(out, cute.make_layout(1))[0] = value.to(kind)
