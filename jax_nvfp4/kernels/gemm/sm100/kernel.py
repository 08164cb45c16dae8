# SPDX-License-Identifier: Apache-2.0
"""NVFP4 x NVFP4 GEMM for Blackwell data-center GPUs (sm_100f, sm_103a), written in CuTeDSL.

`y (m, n) = round_once(x_scale * w_scale * acc + bias)` where `acc` is the block-scaled product of
two e2m1 operands, both K-major, with e4m3 block scales in the 128x4 order.

One persistent kernel, specialized by warp:

    warps 0-3   epilogue: accumulators from tensor memory, scales and bias, y to global memory
    warp 4      MMA: block scales from shared to tensor memory, tcgen05.mma
    warp 5      loads: TMA of both operands and both scale operands into a ring of stages, and the
                queries for the next tile (`ptx.Tiles`)

In the MMA's terms A is the operand of its M side (128 rows for each CTA) and B that of its N side.
"2cta" configs run tcgen05.mma on two CTAs (256 rows of A, which is x) and store y by TMA. "swap"
configs make the weight A and the tokens a narrow B, so that few tokens waste no tensor-core rows;
a cluster of CTAs may then split K, the partial sums meeting in distributed shared memory in a
fixed order. An MMA multiplies 64 elements along K or, in sm_103a's configs, 96
(`k96`).

Scale tiles hold 128 rows by 64 elements of K in 512 contiguous bytes, and the tiles of one row
block follow each other along K. The tensor maps of the scales therefore have three dimensions
(bytes of a tile, tile along K, row block): a box that runs past the end of K is filled with zeros
and never reads the next row block's scales.
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils
from cutlass import Float4E2M1FN, Float8E4M3FN, Float32, Int32, Int64, Uint8, Uint16
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, tcgen05
from cutlass.utils import blackwell_helpers, blockscaled_layout

from jax_nvfp4.config import GemmConfig, configs
from jax_nvfp4.kernels.gemm.arguments import HostCall
from jax_nvfp4.kernels.gemm.host import example_args, host_function
from jax_nvfp4.kernels.gemm.sm100.epilogue import PairEpilogue, SwapEpilogue
from jax_nvfp4.kernels.gemm.sm100.k96 import MultiplyK96, counts
from jax_nvfp4.kernels.gemm.sm100.ptx import (
    ANSWERS,
    CHUNK,
    EPILOGUE_WARPS,
    K_BLOCKS,
    LOAD_WARP,
    MMA_WARP,
    ROWS,
    STAGE_BYTES_K,
    THREADS,
    Tiles,
    ask_for_tile,
    commit,
    coordinates,
    first_tile,
    init_answer_barriers,
    next_tile,
    reduce_buffers,
    shape_of,
    tcgen05_fence_after,
    tcgen05_fence_before,
    wait_cluster,
)
from jax_nvfp4.kernels.variant import KernelVariant, Launch


class GemmSm100:
    """The kernel of one config. An instance is a compile-time constant of its own kernel."""

    def __init__(self, config: GemmConfig):
        self.config = config
        self.shape = shape_of(config)
        self.stages = config.stages
        self.swap = config.swap_ab
        self.k96 = config.arch == "sm_103a"
        self.cta_group = tcgen05.CtaGroup.TWO if self.shape.pair else tcgen05.CtaGroup.ONE
        self.mma_tile = (ROWS * self.shape.ctas, self.shape.columns, 256)
        self.red_buffers = reduce_buffers(config)
        self.shared_bytes = self._storage().size_in_bytes()

    # ------------------------------------------------------------------------------- host

    def _tma_load(self, tensor, box, swizzled, multicast):
        """A TMA atom that loads boxes of `tensor` into shared memory laid out as the box is."""
        op_type = (
            cpasync.CopyBulkTensorTileG2SMulticastOp
            if multicast
            else cpasync.CopyBulkTensorTileG2SOp
        )
        layout = cute.make_ordered_layout(box, order=(1, 0) if swizzled else (0, 1, 2))
        if swizzled:
            layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, layout)
        return cpasync.make_tiled_tma_atom(op_type(self.cta_group), tensor, layout, box)

    def _tma_data(self, pointer, rows, row_bytes, box_rows, multicast):
        """TMA of a packed operand: (rows, bytes), boxes of one stage's 128 bytes along K."""
        layout = cute.make_layout((rows, row_bytes), stride=(row_bytes, 1))
        return self._tma_load(
            cute.make_tensor(pointer, layout), (box_rows, STAGE_BYTES_K), True, multicast
        )

    def _tma_scales(self, pointer, rows, k_tiles, box_tiles, multicast):
        """TMA of swizzled scales: (512 bytes as 256 words, tiles along K, row blocks)."""
        blocks = cute.ceil_div(rows, ROWS)
        layout = cute.make_layout((256, k_tiles, blocks), stride=(1, 256, 256 * k_tiles))
        words = cute.make_tensor(cute.recast_ptr(pointer, dtype=Uint16), layout)
        return self._tma_load(words, (256, box_tiles, 1), False, multicast)

    @cute.jit
    def launch(self, call: HostCall):
        """Encodes the tensor maps and launches the kernel; arguments as of `gemm.host`."""
        problem, split_k = call.problem, call.split_k
        m, n = problem.m, problem.n
        x, sfx, w, sfw = (getattr(call.operands, name) for name in ("x", "sfx", "w", "sfw"))
        s = self.shape
        k_tiles = cute.ceil_div(problem.k, 64)
        row_bytes = cute.assume(k_tiles * 32, divby=32)
        a, sfa, rows_a = (w, sfw, n) if cutlass.const_expr(self.swap) else (x, sfx, m)
        b, sfb, rows_b = (x, sfx, m) if cutlass.const_expr(self.swap) else (w, sfw, n)
        load_a = self._tma_data(a, rows_a, row_bytes, ROWS // s.a_slices, s.a_slices > 1)
        load_b = self._tma_data(b, rows_b, row_bytes, s.b_rows // s.b_slices, s.b_slices > 1)
        load_sfa = self._tma_scales(sfa, rows_a, k_tiles, K_BLOCKS // s.a_slices, s.a_slices > 1)
        load_sfb = self._tma_scales(
            sfb, rows_b, k_tiles, s.b_blocks * K_BLOCKS // s.sfb_slices, s.sfb_slices > 1
        )

        # y as 16-bit words, so that one tensor map serves every output type. The row length is
        # rounded up to what a tensor map can hold; where that changes it, TMA is not used.
        words = n * (2 if problem.out_dtype == 0 else 1)
        words_tma = cute.assume(cute.ceil_div(words, 8) * 8, divby=8)
        use_tma = Int32(words_tma == words)
        y_words = cute.make_tensor(
            cute.recast_ptr(call.output.y, dtype=Uint16),
            cute.make_layout((m, words_tma), stride=(words_tma, 1)),
        )
        store_layout = cute.make_composed_layout(
            cute.make_swizzle(3, 4, 3), 0, cute.make_ordered_layout((32, 64), order=(1, 0))
        )
        store_y = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), y_words, store_layout, (32, 64)
        )

        mma = blackwell_helpers.make_blockscaled_trivial_tiled_mma(
            Float4E2M1FN,
            Float4E2M1FN,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float8E4M3FN,
            16,
            self.cta_group,
            self.mma_tile[:2],
        )
        tiles_a = cute.ceil_div(rows_a, ROWS * s.cluster_a)
        tiles_b = cute.ceil_div(rows_b, s.columns * s.cluster_b)
        split = split_k if cutlass.const_expr(self.config.split_k > 1) else 1
        cluster = s.cluster_a * s.cluster_b * split
        # With a place for each cluster at once, nothing is to be taken over; and a cluster that
        # starts early must not take the tile of one that is about to start.
        steal = Int32(tiles_a * tiles_b > call.num_sms // cluster)
        self.kernel(
            mma,
            *load_a,
            *load_b,
            *load_sfa,
            *load_sfb,
            *store_y,
            call.output.x_scale,
            call.output.w_scale,
            call.output.bias,
            call.output.y,
            m,
            n,
            k_tiles,
            problem.x_scale_stride,
            problem.w_scale_stride,
            problem.bias_dtype,
            problem.out_dtype,
            use_tma,
            Int32(split),
            tiles_a,
            tiles_b,
            steal,
        ).launch(
            grid=(tiles_a * tiles_b * cluster, 1, 1),
            block=(THREADS, 1, 1),
            cluster=(cluster, 1, 1),
            stream=call.stream,
            use_pdl=True,
            min_blocks_per_mp=1,
        )

    # ----------------------------------------------------------------------------- kernel

    def _storage(self):
        """Shared memory of a CTA."""
        s = self.shape
        stages = self.stages
        barrier_count = 2 * (stages + s.acc_barriers + self.red_buffers + ANSWERS)
        vectors = 2 if self.swap else 4
        staging_bytes = 1 if self.swap else EPILOGUE_WARPS * 2 * 4096
        reduce_floats = max(self.red_buffers * CHUNK * ROWS, 1)

        @cute.struct
        class Storage:
            barriers: cute.struct.MemRange[Int64, barrier_count]
            answers: cute.struct.Align[cute.struct.MemRange[Int32, 4 * ANSWERS], 16]
            tmem: Int32
            # Scale and, where x is A, bias of each column of the tile, twice: the next tile's are
            # written while slower warps still read this one's.
            columns: cute.struct.Align[cute.struct.MemRange[Float32, vectors * s.columns], 16]
            reduce: cute.struct.Align[cute.struct.MemRange[Float32, reduce_floats], 16]
            sfa: cute.struct.Align[cute.struct.MemRange[Uint16, stages * K_BLOCKS * 256], 1024]
            sfb: cute.struct.Align[
                cute.struct.MemRange[Uint16, stages * s.b_blocks * K_BLOCKS * 256], 1024
            ]
            a: cute.struct.Align[cute.struct.MemRange[Uint8, stages * ROWS * STAGE_BYTES_K], 1024]
            b: cute.struct.Align[
                cute.struct.MemRange[Uint8, stages * s.b_rows * STAGE_BYTES_K], 1024
            ]
            staging: cute.struct.Align[cute.struct.MemRange[Uint8, staging_bytes], 1024]

        return Storage

    @cute.kernel
    def kernel(
        self,
        mma: cute.TiledMma,
        tma_a: cute.CopyAtom,
        gmem_a: cute.Tensor,
        tma_b: cute.CopyAtom,
        gmem_b: cute.Tensor,
        tma_sfa: cute.CopyAtom,
        gmem_sfa: cute.Tensor,
        tma_sfb: cute.CopyAtom,
        gmem_sfb: cute.Tensor,
        tma_y: cute.CopyAtom,
        gmem_y: cute.Tensor,
        x_scale: cute.Pointer,
        w_scale: cute.Pointer,
        bias: cute.Pointer,
        y: cute.Pointer,
        m: Int32,
        n: Int32,
        k_tiles: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        use_tma: Int32,
        split: Int32,
        tiles_a: Int32,
        tiles_b: Int32,
        steal: Int32,
    ):
        """The kernel: sets up barriers and tensor memory, then runs each warp's role."""
        s = self.shape
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        # The grid is a row of clusters. ptxas takes a block index as uniform, and the hardware's
        # rank in the cluster as one that may differ between threads: with it, ptxas would put a
        # loop over elected threads around each tcgen05 and TMA instruction.
        ctas = split if cutlass.const_expr(self.config.split_k > 1) else s.cluster_a * s.cluster_b
        rank = cute.arch.block_idx()[0] % ctas
        storage = cutlass.utils.SmemAllocator().allocate(self._storage())
        barriers = storage.barriers.data_ptr()
        full = barriers
        empty = full + self.stages
        acc_full = empty + self.stages
        acc_empty = acc_full + s.acc_barriers
        red_full = acc_empty + s.acc_barriers
        red_empty = red_full + self.red_buffers
        tiles = Tiles(
            s, red_empty + self.red_buffers, storage.answers.data_ptr(), tiles_a, tiles_b, steal
        )

        if warp == LOAD_WARP:
            for tma in (tma_a, tma_b, tma_sfa, tma_sfb):
                cpasync.prefetch_descriptor(tma)
            if cutlass.const_expr(not self.swap):
                cpasync.prefetch_descriptor(tma_y)
        if warp == MMA_WARP:
            with cute.arch.elect_one():
                # A stage is free once each MMA that reads what this CTA loads is done: the MMAs
                # of its row of the cluster and those of its column.
                readers = s.cluster_b + s.cluster_a // s.ctas - 1
                for i in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + i, 1)
                    cute.arch.mbarrier_init(empty + i, readers)
                for i in cutlass.range_constexpr(s.acc_barriers):
                    cute.arch.mbarrier_init(acc_full + i, 1)
                    cute.arch.mbarrier_init(acc_empty + i, EPILOGUE_WARPS * s.ctas)
                for i in cutlass.range_constexpr(self.red_buffers):
                    cute.arch.mbarrier_init(red_full + i, EPILOGUE_WARPS * split)
                    cute.arch.mbarrier_init(red_empty + i, EPILOGUE_WARPS * split)
                init_answer_barriers(tiles)
            cute.arch.mbarrier_init_fence()
        if warp == 0:
            cute.arch.alloc_tmem(s.tmem_columns, storage.tmem.ptr, is_two_cta=s.pair)
            cute.arch.relinquish_tmem_alloc_permit(is_two_cta=s.pair)
        # Barriers are visible to the cluster by the fence above, and the address of tensor memory
        # to the CTA by the barrier below, so that the cluster's need not release (on sm_100 that is
        # a barrier of the whole GPU).
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        cute.arch.barrier()
        tmem = cute.arch.retrieve_tmem_ptr(Float32, 16, storage.tmem.ptr)

        # Where the cluster splits K, CTA `rank` has slice `rank` of it; else `rank` is its place in
        # the cluster's tile, A's side first.
        stage_tiles = cute.ceil_div(k_tiles, K_BLOCKS)
        mmas = Int32(0)
        if cutlass.const_expr(self.k96):
            mmas, stage_tiles = counts(k_tiles)
        k_begin = Int32(0)
        k_end = stage_tiles
        if cutlass.const_expr(self.config.split_k > 1):
            k_begin = rank * stage_tiles // split
            k_end = (rank + 1) * stage_tiles // split

        if warp == LOAD_WARP:
            self.load(
                (tma_a, tma_b, tma_sfa, tma_sfb),
                (gmem_a, gmem_b, gmem_sfa, gmem_sfb),
                storage, full, empty, rank, k_begin, k_end, tiles,
            )  # fmt: skip
        if warp == MMA_WARP:
            cute.arch.griddepcontrol_wait()
            if rank % s.ctas == 0:
                self.multiply(
                    mma, tmem, storage, (full, empty, acc_full, acc_empty),
                    rank, k_end - k_begin, mmas, tiles,
                )  # fmt: skip
        if warp < EPILOGUE_WARPS:
            cute.arch.griddepcontrol_wait()
            if cutlass.const_expr(self.swap):
                SwapEpilogue(s, self.red_buffers).run(
                    (x_scale, w_scale, bias, y),
                    (m, n, x_scale_stride, w_scale_stride, bias_dtype, out_dtype),
                    storage, tmem, (acc_full, acc_empty, red_full, red_empty),
                    rank, split, k_end > k_begin, tiles,
                )  # fmt: skip
            else:
                PairEpilogue(s).run(
                    (x_scale, w_scale, bias, y),
                    (m, n, x_scale_stride, w_scale_stride, bias_dtype, out_dtype),
                    tma_y, gmem_y, use_tma,
                    storage, tmem, (acc_full, acc_empty), rank, tiles,
                )  # fmt: skip

        # No CTA may leave while another can still write to its shared memory or signal its
        # barriers, and a pair frees its tensor memory together, when each warp has read its part.
        tcgen05_fence_before()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        tcgen05_fence_after()
        if warp == 0:
            cute.arch.dealloc_tmem(tmem, s.tmem_columns, is_two_cta=s.pair)

    # ------------------------------------------------------------------------------ loads

    def _partition(self, tma, gmem, box, smem):
        """Source boxes and destination slices of one TMA atom."""
        boxes = cute.local_tile(gmem, box, (None,) * len(box))
        rank = len(box)
        return cpasync.tma_partition(
            tma,
            0,
            cute.make_layout(1),
            cute.group_modes(smem, 0, rank),
            cute.group_modes(boxes, 0, rank),
        )

    @cute.jit
    def load(self, tmas, gmem, storage, full, empty, rank, k_begin, k_end, tiles):
        """The load warp: fills stages of both operands and their scales, tile after tile."""
        s = self.shape
        rank_a = rank % s.cluster_a if cutlass.const_expr(s.cluster_a > 1) else Int32(0)
        rank_b = rank // s.cluster_a if cutlass.const_expr(s.cluster_b > 1) else Int32(0)
        peer = rank_a % s.ctas
        slice_b = rank_a // s.ctas
        rows_a = ROWS // s.a_slices
        rows_b = s.b_rows // s.b_slices
        k_a = K_BLOCKS // s.a_slices
        k_b = s.b_blocks * K_BLOCKS // s.sfb_slices
        swizzle = cute.make_swizzle(3, 4, 3)

        a_layout = cute.make_layout(
            (rows_a, STAGE_BYTES_K, s.a_slices, self.stages),
            stride=(STAGE_BYTES_K, 1, rows_a * STAGE_BYTES_K, ROWS * STAGE_BYTES_K),
        )
        b_layout = cute.make_layout(
            (rows_b, STAGE_BYTES_K, s.b_slices, self.stages),
            stride=(STAGE_BYTES_K, 1, rows_b * STAGE_BYTES_K, s.b_rows * STAGE_BYTES_K),
        )
        sfa_layout = cute.make_ordered_layout(
            (256, k_a, 1, s.a_slices, self.stages), order=(0, 1, 2, 3, 4)
        )
        sfb_layout = cute.make_ordered_layout(
            (256, k_b, 1, s.sfb_slices, self.stages), order=(0, 1, 2, 3, 4)
        )
        tma_a, tma_b, tma_sfa, tma_sfb = tmas
        to_a, from_a = self._partition(
            tma_a, gmem[0], (rows_a, STAGE_BYTES_K), storage.a.get_tensor(a_layout, swizzle=swizzle)
        )
        to_b, from_b = self._partition(
            tma_b, gmem[1], (rows_b, STAGE_BYTES_K), storage.b.get_tensor(b_layout, swizzle=swizzle)
        )
        to_sfa, from_sfa = self._partition(
            tma_sfa, gmem[2], (256, k_a, 1), storage.sfa.get_tensor(sfa_layout)
        )
        to_sfb, from_sfb = self._partition(
            tma_sfb, gmem[3], (256, k_b, 1), storage.sfb.get_tensor(sfb_layout)
        )

        # Which CTAs of the cluster need the same rows of A, of B, and the same scales of B.
        mask_a = Int32(0)
        for i in cutlass.range_constexpr(s.cluster_b):
            mask_a |= 1 << (rank_a + i * s.cluster_a)
        mask_b = Int32(0)
        for i in cutlass.range_constexpr(s.b_slices):
            mask_b |= 1 << (i * s.ctas + peer + rank_b * s.cluster_a)
        mask_sfb = ((1 << s.cluster_a) - 1) << (rank_b * s.cluster_a)
        mask_a, mask_b, mask_sfb = (cutlass.Int16(v) for v in (mask_a, mask_b, mask_sfb))

        waited = Int32(0)
        stage = Int32(0)
        phase = Int32(1)
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            tile_a, tile_b = coordinates(tiles, index)
            row_a = (tile_a * s.cluster_a + rank_a) * s.a_slices + rank_b
            block_a = tile_a * s.cluster_a + rank_a
            first_b = tile_b * s.cluster_b + rank_b  # the MMA's tile of B
            row_b = (first_b * s.ctas + peer) * s.b_slices + slice_b
            sfb_tile = rank_a * k_b
            block_b = first_b * s.columns // ROWS + sfb_tile // K_BLOCKS
            # In units of boxes along K.
            sfa_k = rank_b
            sfb_k = sfb_tile % K_BLOCKS // k_b if cutlass.const_expr(k_b < K_BLOCKS) else Int32(0)
            sfb_step = max(K_BLOCKS // k_b, 1)

            if waited == 0:
                # The weight is in place whatever the previous kernel still does, as far as L2 is
                # concerned: L2 is coherent, so that an early prefetch can only be useless.
                self.prefetch_weight(
                    tmas,
                    (from_a[None, row_a, None], from_b[None, row_b, None]),
                    (from_sfa[None, 0, None, block_a], from_sfb[None, 0, None, block_b]),
                    (sfa_k, sfb_k, sfb_step), k_begin, k_end,
                )  # fmt: skip
                cute.arch.griddepcontrol_wait()
                waited = Int32(1)
            ask_for_tile(tiles, count, rank)

            for k in cutlass.range(k_begin, k_end, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                if peer == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(
                            full + stage, s.ctas * s.stage_bytes
                        )
                bar = full + stage
                cute.copy(
                    tma_a, from_a[None, row_a, k], to_a[None, rank_b, stage],
                    tma_bar_ptr=bar, mcast_mask=mask_a,
                )  # fmt: skip
                cute.copy(
                    tma_b, from_b[None, row_b, k], to_b[None, slice_b, stage],
                    tma_bar_ptr=bar, mcast_mask=mask_b,
                )  # fmt: skip
                cute.copy(
                    tma_sfa, from_sfa[None, 0, k * s.a_slices + sfa_k, block_a],
                    to_sfa[None, rank_b, stage], tma_bar_ptr=bar, mcast_mask=mask_a,
                )  # fmt: skip
                cute.copy(
                    tma_sfb, from_sfb[None, 0, k * sfb_step + sfb_k, block_b],
                    to_sfb[None, rank_a, stage], tma_bar_ptr=bar, mcast_mask=mask_sfb,
                )  # fmt: skip
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
            index = next_tile(tiles, count)
            count += 1

        # The next kernel may start its own prologue: it waits for this one's end before it reads.
        cute.arch.griddepcontrol_launch_dependents()
        # Each MMA that reads this CTA's loads signals its barriers: they must outlive that.
        for _ in cutlass.range(self.stages, unroll=1):
            cute.arch.mbarrier_wait(empty + stage, phase)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase = phase ^ 1

    @cute.jit
    def prefetch_weight(self, tmas, data, scales, offsets, k_begin, k_end):
        """Prefetches the weight of the first stages of the first tile into L2."""
        s = self.shape
        tma_a, tma_b, tma_sfa, tma_sfb = tmas
        sfa_k, sfb_k, sfb_step = offsets
        last = cutlass.min(k_end, k_begin + self.stages)
        for k in cutlass.range(k_begin, last, unroll=1):
            with cute.arch.elect_one():
                if cutlass.const_expr(self.swap):
                    cute.prefetch(tma_a, data[0][None, k])
                    cute.prefetch(tma_sfa, scales[0][None, k * s.a_slices + sfa_k])
                else:
                    cute.prefetch(tma_b, data[1][None, k])
                    cute.prefetch(tma_sfb, scales[1][None, k * sfb_step + sfb_k])

    # -------------------------------------------------------------------------------- MMA

    def _scale_copy(self, smem, tmem_tensor):
        """The copy of one stage's scales from shared to tensor memory."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.cta_group), Float8E4M3FN)
        compact = cute.filter_zeros(tmem_tensor)
        copy = tcgen05.make_s2t_copy(atom, compact)
        thread = copy.get_slice(0)
        source = tcgen05.get_s2t_smem_desc_tensor(copy, thread.partition_S(cute.filter_zeros(smem)))
        return copy, source, thread.partition_D(compact)

    def _operands_k64(self, mma, tmem, storage):
        """What `multiply_k64` works on: operands, scales, their copies to tensor memory."""
        s = self.shape
        smem_a = blackwell_helpers.make_smem_layout_a(mma, self.mma_tile, Float4E2M1FN, self.stages)
        smem_b = blackwell_helpers.make_smem_layout_b(mma, self.mma_tile, Float4E2M1FN, self.stages)
        a_ptr = cute.recast_ptr(storage.a.data_ptr(), smem_a.inner, dtype=Float4E2M1FN)
        b_ptr = cute.recast_ptr(storage.b.data_ptr(), smem_b.inner, dtype=Float4E2M1FN)
        frag_a = mma.make_fragment_A(cute.make_tensor(a_ptr, smem_a.outer))
        frag_b = mma.make_fragment_B(cute.make_tensor(b_ptr, smem_b.outer))

        smem_sfa = blockscaled_layout.make_smem_layout_sfa(mma, self.mma_tile, 16, self.stages)
        smem_sfb = blockscaled_layout.make_smem_layout_sfb(mma, self.mma_tile, 16, self.stages)
        one_stage = (None, None, None, 0)
        tmem_sfa = blockscaled_layout.make_tmem_layout_sfa(
            mma, self.mma_tile, 16, cute.slice_(smem_sfa, one_stage)
        )
        tmem_sfb = blockscaled_layout.make_tmem_layout_sfb(
            mma, self.mma_tile, 16, cute.slice_(smem_sfb, one_stage)
        )
        sfa = cute.make_tensor(cute.recast_ptr(tmem + s.sfa_column, dtype=Float8E4M3FN), tmem_sfa)
        sfb = cute.make_tensor(cute.recast_ptr(tmem + s.sfb_column, dtype=Float8E4M3FN), tmem_sfb)
        sfa_ptr = cute.recast_ptr(storage.sfa.data_ptr(), dtype=Float8E4M3FN)
        sfb_ptr = cute.recast_ptr(storage.sfb.data_ptr(), dtype=Float8E4M3FN)
        copies = (
            self._scale_copy(cute.make_tensor(sfa_ptr, smem_sfa), sfa),
            self._scale_copy(cute.make_tensor(sfb_ptr, smem_sfb), sfb),
        )
        layout = mma.make_fragment_C(mma.partition_shape_C(self.mma_tile[:2])).layout
        return mma, layout, (frag_a, frag_b), sfa, sfb, copies

    @cute.jit
    def multiply_k64(self, operands, tmem, acc, full, empty, free_mask, steps, tile_b, ring):
        """Multiplies one tile into tensor memory from `acc` on, a stage at each of `steps`.

        Returns:
            The ring's stage and phase at which the next tile starts.
        """
        s = self.shape
        mma, layout, (frag_a, frag_b), sfa, sfb, copies = operands
        (copy_sfa, from_sfa, to_sfa), (copy_sfb, from_sfb, to_sfb) = copies
        stage, phase = ring
        acc = cute.make_tensor(acc, layout)
        sfb_mma = sfb
        if cutlass.const_expr(s.columns < ROWS):
            # Several tiles share a row block of scales: rows 32 j.. are in column j.
            column = tile_b % (ROWS // s.columns) * (s.columns // 32)
            sfb_mma = cute.make_tensor(
                cute.recast_ptr(tmem + (s.sfb_column + column), dtype=Float8E4M3FN), sfb.layout
            )
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            stage_coord = (None, None, None, None, stage)
            cute.copy(copy_sfa, from_sfa[stage_coord], to_sfa)
            cute.copy(copy_sfb, from_sfb[stage_coord], to_sfb)
            for j in cutlass.range_constexpr(K_BLOCKS):
                mma.set(tcgen05.Field.SFA, sfa[None, None, j].iterator)
                mma.set(tcgen05.Field.SFB, sfb_mma[None, None, j].iterator)
                cute.gemm(mma, acc, frag_a[None, None, j, stage], frag_b[None, None, j, stage], acc)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            commit(empty + stage, free_mask, s.pair)
            stage += 1
            if stage == self.stages:
                stage = Int32(0)
                phase = phase ^ 1
        return stage, phase

    @cute.jit
    def multiply(self, mma, tmem, storage, barriers, rank, steps, mmas, tiles):
        """The MMA warp (of the pair's first CTA): one accumulator tile after the other.

        `steps` are the stages of a tile, `mmas` its MMAs where they have 96 of K.
        """
        s = self.shape
        full, empty, acc_full, acc_empty = barriers
        if cutlass.const_expr(not self.k96):
            operands = self._operands_k64(mma, tmem, storage)

        # Who loads into the stages that this MMA frees: its row and its column of the cluster.
        free_mask = Int32(0)
        rank_a = rank % s.cluster_a if cutlass.const_expr(s.cluster_a > 1) else Int32(0)
        rank_b = rank // s.cluster_a if cutlass.const_expr(s.cluster_b > 1) else Int32(0)
        for i in cutlass.range_constexpr(s.cluster_b):
            for j in cutlass.range_constexpr(s.ctas):
                free_mask |= 1 << (rank_a + j + i * s.cluster_a)
        free_mask |= ((1 << s.cluster_a) - 1) << (rank_b * s.cluster_a)
        free_mask = cutlass.Int16(free_mask)
        pair_mask = cutlass.Int16(3 << rank)

        stage = Int32(0)
        phase = Int32(0)
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            barrier = count % s.acc_barriers
            wait_cluster(acc_empty + barrier, (count // s.acc_barriers + 1) % 2)
            tcgen05_fence_after()
            acc = tmem + count % 2 * s.acc_stride
            if cutlass.const_expr(self.k96):
                MultiplyK96(s, self.stages).run(
                    tmem, acc, storage, full, empty, free_mask, mmas, count * steps
                )
            else:
                _, tile_b = coordinates(tiles, index)
                stage, phase = self.multiply_k64(
                    operands, tmem, acc, full, empty, free_mask, steps, tile_b, (stage, phase)
                )
            commit(acc_full + barrier, pair_mask, s.pair)
            index = next_tile(tiles, count)
            count += 1


def variants(arch: str) -> list[KernelVariant]:
    """The GEMM kernels of this room to compile for `arch`.

    Args:
        arch: a name of `jax_nvfp4.config.ARCHES`.

    Returns:
        One variant for each config of `arch`; none if `arch` is not of this family.
    """
    if arch not in ("sm_100f", "sm_103a"):
        return []
    found = []
    for config in configs(arch):
        if config.kind not in ("swap", "2cta"):  # another room's, as `gemm.weight_only` says
            continue
        gemm = GemmSm100(config)
        launch = Launch(
            threads=THREADS,
            dynamic_shared_bytes=gemm.shared_bytes,
            tmem_columns=gemm.shape.tmem_columns,
            cluster_ctas=gemm.shape.cluster_a * gemm.shape.cluster_b * config.split_k,
        )
        host = host_function(gemm.launch)
        found.append(KernelVariant(config.name, "gemm", arch, config, host, example_args(), launch))
    return found
