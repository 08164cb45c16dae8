# SPDX-License-Identifier: Apache-2.0
"""NVFP4 x NVFP4 GEMM for Blackwell data-center GPUs (sm_100f, sm_103a), written in CuTeDSL.

`y (m, n) = round_once(x_scale * w_scale * acc + bias)` where `acc` is the block-scaled product of
two e2m1 operands, both K-major, with e4m3 block scales in the 128x4 order. Of a gated weight y is
(m, n / 2), each a gate times its up (`kernels.gemm.gate`).

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
from jax_nvfp4.kernels.gemm.arguments import Activation, HostCall, Operands, Output
from jax_nvfp4.kernels.gemm.host import example_args, host_function
from jax_nvfp4.kernels.gemm.interleaved import packed_rows
from jax_nvfp4.kernels.gemm.ring import Ring, advance
from jax_nvfp4.kernels.gemm.sm100.arguments import (
    Boxes,
    Call,
    Cta,
    Exchange,
    Grid,
    Handover,
    Load,
    Loads,
    Maps,
    OperandsK64,
    Slices,
    TiledProblem,
    Tma,
)
from jax_nvfp4.kernels.gemm.sm100.epilogue import PairEpilogue, SwapEpilogue
from jax_nvfp4.kernels.gemm.sm100.gated import GatedPairEpilogue, GatedSwapEpilogue
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
    ranks,
    reduce_buffers,
    shape_of,
    tcgen05_fence_after,
    tcgen05_fence_before,
)
from jax_nvfp4.kernels.ptx import wait_cluster
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
        self.gated = config.epilogue == "gated"
        if self.swap:
            swap = GatedSwapEpilogue if self.gated else SwapEpilogue
            self.epilogue = swap(self.shape, self.red_buffers)
        else:
            self.epilogue = (GatedPairEpilogue if self.gated else PairEpilogue)(self.shape)
        self.shared_bytes = self._storage().size_in_bytes()

    # ------------------------------------------------------------------------------- host

    def _tma_load(self, tensor, box, swizzled, multicast):
        """Loads of boxes of `tensor` into shared memory laid out as the box is."""
        op_type = (
            cpasync.CopyBulkTensorTileG2SMulticastOp
            if multicast
            else cpasync.CopyBulkTensorTileG2SOp
        )
        layout = cute.make_ordered_layout(box, order=(1, 0) if swizzled else (0, 1, 2))
        if swizzled:
            layout = cute.make_composed_layout(cute.make_swizzle(3, 4, 3), 0, layout)
        return Tma(*cpasync.make_tiled_tma_atom(op_type(self.cta_group), tensor, layout, box))

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

    def _load_maps(self, operands: Operands, m, n, k_tiles):
        """Tensor maps of both operands and of their scales."""
        s = self.shape
        x, w = (operands.x, operands.sfx, m), (operands.w, operands.sfw, n)
        (a, sfa, rows_a), (b, sfb, rows_b) = (w, x) if self.swap else (x, w)
        row_bytes = cute.assume(k_tiles * 32, divby=32)
        return (
            self._tma_data(a, rows_a, row_bytes, ROWS // s.a_slices, s.a_slices > 1),
            self._tma_data(b, rows_b, row_bytes, s.b_rows // s.b_slices, s.b_slices > 1),
            self._tma_scales(sfa, rows_a, k_tiles, K_BLOCKS // s.a_slices, s.a_slices > 1),
            self._tma_scales(
                sfb, rows_b, k_tiles, s.b_blocks * K_BLOCKS // s.sfb_slices, s.sfb_slices > 1
            ),
        )

    @cute.jit
    def _store_map(self, y, m, n, out_dtype):
        """The tensor map of y, and whether rows of y are such that it can be used."""
        # y as 16-bit words, so that one tensor map serves every output type. The row length is
        # rounded up to what a tensor map can hold; where that changes it, TMA is not used.
        words = n * (2 if out_dtype == 0 else 1)
        words_tma = cute.assume(cute.ceil_div(words, 8) * 8, divby=8)
        y_words = cute.make_tensor(
            cute.recast_ptr(y, dtype=Uint16),
            cute.make_layout((m, words_tma), stride=(words_tma, 1)),
        )
        layout = cute.make_composed_layout(
            cute.make_swizzle(3, 4, 3), 0, cute.make_ordered_layout((32, 64), order=(1, 0))
        )
        store = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileS2GOp(), y_words, layout, (32, 64)
        )
        return Tma(*store), Int32(words_tma == words)

    @cute.jit
    def launch(self, call: HostCall):
        """Encodes the tensor maps and launches the kernel."""
        s = self.shape
        problem = call.problem
        m, n, columns = problem.m, problem.n, problem.n
        if cutlass.const_expr(self.gated):
            n, columns = packed_rows(problem.n), problem.n // 2
        k_tiles = cute.ceil_div(problem.k, 64)
        loads = self._load_maps(call.operands, m, n, k_tiles)
        store_y, use_tma = self._store_map(call.output.y, m, columns, problem.out_dtype)
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
        rows_a, rows_b = (n, m) if cutlass.const_expr(self.swap) else (m, n)
        tiles_a = cute.ceil_div(rows_a, ROWS * s.cluster_a)
        tiles_b = cute.ceil_div(rows_b, s.columns * s.cluster_b)
        split = call.split_k if cutlass.const_expr(self.config.split_k > 1) else 1
        cluster = s.cluster_a * s.cluster_b * split
        # With a place for each cluster at once, nothing is to be taken over; and a cluster that
        # starts early must not take the tile of one that is about to start.
        steal = Int32(tiles_a * tiles_b > call.num_sms // cluster)
        tiled = TiledProblem(**(vars(problem) | {"k": k_tiles}))
        grid = Grid(use_tma, Int32(split), tiles_a, tiles_b, steal)
        activation = call.activation if cutlass.const_expr(self.gated) else None
        self.kernel(mma, Maps(*loads, store_y), call.output, tiled, grid, activation).launch(
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
        maps: Maps,
        output: Output,
        problem: TiledProblem,
        grid: Grid,
        activation: Activation | None,
    ):
        """The kernel: sets up barriers and tensor memory, then runs each warp's role."""
        s = self.shape
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        # The grid is a row of clusters. ptxas takes a block index as uniform, and the hardware's
        # rank in the cluster as one that may differ between threads: with it, ptxas would put a
        # loop over elected threads around each tcgen05 and TMA instruction.
        splits = cutlass.const_expr(self.config.split_k > 1)
        ctas = grid.split if splits else s.cluster_a * s.cluster_b
        rank = cute.arch.block_idx()[0] % ctas
        storage = cutlass.utils.SmemAllocator().allocate(self._storage())
        barriers = storage.barriers.data_ptr()
        ring = Ring(storage, barriers, barriers + self.stages, self.stages)
        acc_full = ring.empty + self.stages
        acc_empty = acc_full + s.acc_barriers
        red_full = acc_empty + s.acc_barriers
        exchange = Exchange(red_full, red_full + self.red_buffers)
        tiles = Tiles(s, exchange.empty + self.red_buffers, storage.answers.data_ptr(), grid)

        if warp == LOAD_WARP:
            for tma in (maps.a, maps.b, maps.sfa, maps.sfb):
                cpasync.prefetch_descriptor(tma.atom)
            if cutlass.const_expr(not self.swap):
                cpasync.prefetch_descriptor(maps.y.atom)
        if warp == MMA_WARP:
            self._set_up_barriers(ring, (acc_full, acc_empty), exchange, tiles, grid.split)
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
        handover = Handover(tmem, acc_full, acc_empty)
        cta = self._cta(rank, problem.k, grid.split)

        if warp == LOAD_WARP:
            self.load(maps, ring, cta, tiles)
        if warp == MMA_WARP:
            cute.arch.griddepcontrol_wait()
            if rank % s.ctas == 0:
                self.multiply(mma, ring, handover, cta, tiles)
        if warp < EPILOGUE_WARPS:
            cute.arch.griddepcontrol_wait()
            call = Call(output, problem, maps.y, grid.use_tma, activation)
            if cutlass.const_expr(self.swap):
                self.epilogue.run(call, storage, handover, exchange, cta, tiles)
            else:
                self.epilogue.run(call, storage, handover, rank, tiles)

        # No CTA may leave while another can still write to its shared memory or signal its
        # barriers, and a pair frees its tensor memory together, when each warp has read its part.
        tcgen05_fence_before()
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
        tcgen05_fence_after()
        if warp == 0:
            cute.arch.dealloc_tmem(tmem, s.tmem_columns, is_two_cta=s.pair)

    @cute.jit
    def _set_up_barriers(self, ring: Ring, acc, exchange: Exchange, tiles: Tiles, split: Int32):
        """Initializes the mbarriers, by one thread of a warp; `acc` are (full, empty)."""
        s = self.shape
        acc_full, acc_empty = acc
        with cute.arch.elect_one():
            # A stage is free once each MMA that reads what this CTA loads is done: the MMAs of its
            # row of the cluster and those of its column.
            readers = s.cluster_b + s.cluster_a // s.ctas - 1
            for i in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(ring.full + i, 1)
                cute.arch.mbarrier_init(ring.empty + i, readers)
            for i in cutlass.range_constexpr(s.acc_barriers):
                cute.arch.mbarrier_init(acc_full + i, 1)
                cute.arch.mbarrier_init(acc_empty + i, EPILOGUE_WARPS * s.ctas)
            for i in cutlass.range_constexpr(self.red_buffers):
                cute.arch.mbarrier_init(exchange.full + i, EPILOGUE_WARPS * split)
                cute.arch.mbarrier_init(exchange.empty + i, EPILOGUE_WARPS * split)
            init_answer_barriers(tiles)
        cute.arch.mbarrier_init_fence()

    def _cta(self, rank, k_tiles, split) -> Cta:
        """The CTA's part of K."""
        stage_tiles = cute.ceil_div(k_tiles, K_BLOCKS)
        mmas = Int32(0)
        if self.k96:
            mmas, stage_tiles = counts(k_tiles)
        k_begin = Int32(0)
        k_end = stage_tiles
        if self.config.split_k > 1:
            k_begin = rank * stage_tiles // split
            k_end = (rank + 1) * stage_tiles // split
        return Cta(rank, split, k_begin, k_end, mmas)

    # ------------------------------------------------------------------------------ loads

    def _partition(self, tma: Tma, box, smem):
        """Destination slices and source boxes of a tensor map."""
        boxes = cute.local_tile(tma.tensor, box, (None,) * len(box))
        rank = len(box)
        return cpasync.tma_partition(
            tma.atom,
            0,
            cute.make_layout(1),
            cute.group_modes(smem, 0, rank),
            cute.group_modes(boxes, 0, rank),
        )

    def _slices(self, rank) -> Slices:
        """What CTA `rank` loads of what its cluster shares."""
        s = self.shape
        rank_a, rank_b = ranks(s, rank)
        return Slices(rank_a, rank_b, rank_a % s.ctas, rank_a // s.ctas)

    def _loads(self, maps: Maps, storage, slices: Slices) -> Loads:
        """The loads of each operand: where from, where to, for whom."""
        s = self.shape
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
        a = storage.a.get_tensor(a_layout, swizzle=swizzle)
        b = storage.b.get_tensor(b_layout, swizzle=swizzle)
        to_a, from_a = self._partition(maps.a, (rows_a, STAGE_BYTES_K), a)
        to_b, from_b = self._partition(maps.b, (rows_b, STAGE_BYTES_K), b)
        to_sfa, from_sfa = self._partition(
            maps.sfa, (256, k_a, 1), storage.sfa.get_tensor(sfa_layout)
        )
        to_sfb, from_sfb = self._partition(
            maps.sfb, (256, k_b, 1), storage.sfb.get_tensor(sfb_layout)
        )

        # Which CTAs of the cluster need the same rows of A, of B, and the same scales of B.
        mask_a = Int32(0)
        for i in range(s.cluster_b):
            mask_a |= 1 << (slices.rank_a + i * s.cluster_a)
        mask_b = Int32(0)
        for i in range(s.b_slices):
            mask_b |= 1 << (i * s.ctas + slices.peer + slices.rank_b * s.cluster_a)
        mask_sfb = ((1 << s.cluster_a) - 1) << (slices.rank_b * s.cluster_a)
        mask_a, mask_b, mask_sfb = (cutlass.Int16(v) for v in (mask_a, mask_b, mask_sfb))
        return Loads(
            Load(maps.a.atom, from_a, to_a, mask_a),
            Load(maps.b.atom, from_b, to_b, mask_b),
            Load(maps.sfa.atom, from_sfa, to_sfa, mask_a),
            Load(maps.sfb.atom, from_sfb, to_sfb, mask_sfb),
        )

    def _boxes(self, tiles: Tiles, index, slices: Slices) -> Boxes:
        """The boxes that this CTA loads for tile `index`."""
        s = self.shape
        k_b = s.b_blocks * K_BLOCKS // s.sfb_slices
        tile_a, tile_b = coordinates(tiles, index)
        row_a = (tile_a * s.cluster_a + slices.rank_a) * s.a_slices + slices.rank_b
        block_a = tile_a * s.cluster_a + slices.rank_a
        first_b = tile_b * s.cluster_b + slices.rank_b  # the MMA's tile of B
        row_b = (first_b * s.ctas + slices.peer) * s.b_slices + slices.of_b
        sfb_tile = slices.rank_a * k_b
        block_b = first_b * s.columns // ROWS + sfb_tile // K_BLOCKS
        sfb_k = sfb_tile % K_BLOCKS // k_b if k_b < K_BLOCKS else Int32(0)
        sfb_step = max(K_BLOCKS // k_b, 1)
        return Boxes(row_a, row_b, block_a, block_b, slices.rank_b, sfb_k, sfb_step)

    @cute.jit
    def load(self, maps: Maps, ring: Ring, cta: Cta, tiles: Tiles):
        """The load warp: fills stages of both operands and their scales, tile after tile."""
        s = self.shape
        slices = self._slices(cta.rank)
        loads = self._loads(maps, ring.buffers, slices)
        waited = Int32(0)
        stage = Int32(0)
        phase = Int32(1)
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            boxes = self._boxes(tiles, index, slices)
            if waited == 0:
                # The weight is in place whatever the previous kernel still does, as far as L2 is
                # concerned: L2 is coherent, so that an early prefetch can only be useless.
                self.prefetch_weight(loads, boxes, cta)
                cute.arch.griddepcontrol_wait()
                waited = Int32(1)
            ask_for_tile(tiles, count, cta.rank)

            for k in cutlass.range(cta.k_begin, cta.k_end, unroll=1):
                cute.arch.mbarrier_wait(ring.empty + stage, phase)
                if slices.peer == 0:
                    with cute.arch.elect_one():
                        cute.arch.mbarrier_arrive_and_expect_tx(
                            ring.full + stage, s.ctas * s.stage_bytes
                        )
                self._fill(loads, boxes, slices, k, stage, ring.full + stage)
                stage, phase = advance(ring, stage, phase)
            index = next_tile(tiles, count)
            count += 1

        # The next kernel may start its own prologue: it waits for this one's end before it reads.
        cute.arch.griddepcontrol_launch_dependents()
        # Each MMA that reads this CTA's loads signals its barriers: they must outlive that.
        for _ in cutlass.range(self.stages, unroll=1):
            cute.arch.mbarrier_wait(ring.empty + stage, phase)
            stage, phase = advance(ring, stage, phase)

    def _fill(self, loads: Loads, boxes: Boxes, slices: Slices, k, stage, barrier):
        """Issues the loads of a stage, the `k`-th along K of a tile."""
        sfa_k = k * self.shape.a_slices + boxes.sfa_k
        sfb_k = k * boxes.sfb_step + boxes.sfb_k
        for load, box, part in (
            (loads.a, (None, boxes.row_a, k), slices.rank_b),
            (loads.b, (None, boxes.row_b, k), slices.of_b),
            (loads.sfa, (None, 0, sfa_k, boxes.block_a), slices.rank_b),
            (loads.sfb, (None, 0, sfb_k, boxes.block_b), slices.rank_a),
        ):
            cute.copy(
                load.atom,
                load.source[box],
                load.target[None, part, stage],
                tma_bar_ptr=barrier,
                mcast_mask=load.mask,
            )

    @cute.jit
    def prefetch_weight(self, loads: Loads, boxes: Boxes, cta: Cta):
        """Prefetches the weight of the first stages of the first tile into L2."""
        s = self.shape
        last = cutlass.min(cta.k_end, cta.k_begin + self.stages)
        for k in cutlass.range(cta.k_begin, last, unroll=1):
            with cute.arch.elect_one():
                if cutlass.const_expr(self.swap):
                    sfa_k = k * s.a_slices + boxes.sfa_k
                    cute.prefetch(loads.a.atom, loads.a.source[None, boxes.row_a, k])
                    cute.prefetch(loads.sfa.atom, loads.sfa.source[None, 0, sfa_k, boxes.block_a])
                else:
                    sfb_k = k * boxes.sfb_step + boxes.sfb_k
                    cute.prefetch(loads.b.atom, loads.b.source[None, boxes.row_b, k])
                    cute.prefetch(loads.sfb.atom, loads.sfb.source[None, 0, sfb_k, boxes.block_b])

    # -------------------------------------------------------------------------------- MMA

    def _scale_copy(self, smem, tmem_tensor):
        """The copy of one stage's scales from shared to tensor memory."""
        atom = cute.make_copy_atom(tcgen05.Cp4x32x128bOp(self.cta_group), Float8E4M3FN)
        compact = cute.filter_zeros(tmem_tensor)
        copy = tcgen05.make_s2t_copy(atom, compact)
        thread = copy.get_slice(0)
        source = tcgen05.get_s2t_smem_desc_tensor(copy, thread.partition_S(cute.filter_zeros(smem)))
        return copy, source, thread.partition_D(compact)

    def _operands_k64(self, mma, tmem, storage) -> OperandsK64:
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
        return OperandsK64(mma, layout, tmem, frag_a, frag_b, sfa, sfb, copies)

    @cute.jit
    def multiply_k64(self, operands: OperandsK64, ring: Ring, acc, free_mask, steps, tile_b, state):
        """Multiplies one tile into tensor memory from `acc` on, a stage at each of `steps`.

        Returns:
            The ring's stage and phase, `state`, at which the next tile starts.
        """
        s = self.shape
        mma, sfa, sfb = operands.mma, operands.sfa, operands.sfb
        (copy_sfa, from_sfa, to_sfa), (copy_sfb, from_sfb, to_sfb) = operands.copies
        stage, phase = state
        acc = cute.make_tensor(acc, operands.layout)
        sfb_mma = sfb
        if cutlass.const_expr(s.columns < ROWS):
            # Several tiles share a row block of scales: rows 32 j.. are in column j.
            column = tile_b % (ROWS // s.columns) * (s.columns // 32)
            at = operands.tmem + (s.sfb_column + column)
            sfb_mma = cute.make_tensor(cute.recast_ptr(at, dtype=Float8E4M3FN), sfb.layout)
        mma.set(tcgen05.Field.ACCUMULATE, False)
        for _ in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
            stage_coord = (None, None, None, None, stage)
            cute.copy(copy_sfa, from_sfa[stage_coord], to_sfa)
            cute.copy(copy_sfb, from_sfb[stage_coord], to_sfb)
            for j in cutlass.range_constexpr(K_BLOCKS):
                mma.set(tcgen05.Field.SFA, sfa[None, None, j].iterator)
                mma.set(tcgen05.Field.SFB, sfb_mma[None, None, j].iterator)
                a, b = operands.a[None, None, j, stage], operands.b[None, None, j, stage]
                cute.gemm(mma, acc, a, b, acc)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            commit(ring.empty + stage, free_mask, s.pair)
            stage, phase = advance(ring, stage, phase)
        return stage, phase

    def _free_mask(self, rank):
        """The CTAs that load into the stages that an MMA frees: its row and column of the cluster.

        `rank` is that of the pair's first CTA.
        """
        s = self.shape
        free_mask = Int32(0)
        rank_a, rank_b = ranks(s, rank)
        for i in range(s.cluster_b):
            for j in range(s.ctas):
                free_mask |= 1 << (rank_a + j + i * s.cluster_a)
        free_mask |= ((1 << s.cluster_a) - 1) << (rank_b * s.cluster_a)
        return cutlass.Int16(free_mask)

    @cute.jit
    def multiply(self, mma, ring: Ring, handover: Handover, cta: Cta, tiles: Tiles):
        """The MMA warp (of the pair's first CTA): one accumulator tile after the other."""
        s = self.shape
        tmem = handover.tmem
        steps = cta.k_end - cta.k_begin
        if cutlass.const_expr(not self.k96):
            operands = self._operands_k64(mma, tmem, ring.buffers)
        free_mask = self._free_mask(cta.rank)
        pair_mask = cutlass.Int16(3 << cta.rank)
        stage = Int32(0)
        phase = Int32(0)
        count = Int32(0)
        index = first_tile()
        while index < tiles.count:
            barrier = count % s.acc_barriers
            wait_cluster(handover.empty + barrier, (count // s.acc_barriers + 1) % 2)
            tcgen05_fence_after()
            acc = tmem + count % 2 * s.acc_stride
            if cutlass.const_expr(self.k96):
                MultiplyK96(s, tmem).run(ring, acc, free_mask, cta.mmas, count * steps)
            else:
                _, tile_b = coordinates(tiles, index)
                stage, phase = self.multiply_k64(
                    operands, ring, acc, free_mask, steps, tile_b, (stage, phase)
                )
            commit(handover.full + barrier, pair_mask, s.pair)
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
