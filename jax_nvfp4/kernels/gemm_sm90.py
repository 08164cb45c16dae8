# SPDX-License-Identifier: Apache-2.0
"""The Hopper GEMM: 4-bit weights decoded in registers into the A operand of `wgmma`.

    y (m, n) = x_scale * w_scale * (x @ W^T) + bias

The weight is the M side of the MMA, the rows of x its N side (8 to 256 of them). A CTA has one
producer warp and `warpgroups` warpgroups of consumers around a ring of `stages` buffers in shared
memory. The producer copies 128 columns at a time: codes and scales as they lie in memory (the
order of `layout.sm90`), x through a tensor map that zero-fills what is out of bounds. A consumer
reads codes in the order of its registers, decodes a group of `wgmma` steps while the tensor cores
work on the group before, and has two sets of A registers so that neither waits for the other.

K may be split over the CTAs of a cluster, and over groups of a CTA's warpgroups (`k_groups`), which
take its stages in turns. Then each group adds up some rows of x: the others hand it their sums of
these through shared memory. Of these rows in turn each CTA adds up some, and gets the others' sums
by asynchronous stores that an mbarrier counts. They go to a place of their own or, where there is
no room for one, to its ring, once its threads have told the others that they are done with it. (A
barrier of the cluster would say so too, and would wait for a fence at the scope of the GPU.) No
atomics, no scratch memory, no state from one launch to the next: what a launch computes depends on
its arguments alone.
An x with scales comes from the quantize kernel that was launched just before. The launch is then a
programmatic one, so that CTAs set up their barriers while that kernel runs. Until it has ended
(`griddepcontrol.wait`) they read nothing and only ask for some of the weight to come to the L2
cache, which is right whatever was launched before.

The order in which one output is summed is fixed by K, the split and `k_groups`: columns in rising
order within a group, then groups, then CTAs. With `k_groups` of 1 it is the same in every config.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.utils
from cutlass import (
    BFloat16,
    Float16,
    Float32,
    Int32,
    Int64,
    Uint8,
    Uint32,
    const_expr,
    cute,
)
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.cute.runtime import make_ptr

from jax_nvfp4.config import GemmConfig, configs
from jax_nvfp4.kernels import gemm_sm90_ops as ops
from jax_nvfp4.kernels.inline_ptx import fma_to, load_shared_x4
from jax_nvfp4.kernels.variant import KernelVariant
from jax_nvfp4.layout import sm90 as layout

WARPGROUP = 128
TILE_K = layout.TILE_K
# A block is what a `wgmma` takes of a tile of the weight: half of its 128 rows.
BLOCK_N = 64
CODE_BYTES = BLOCK_N * TILE_K // 2
HALF_BYTES = CODE_BYTES // 2
SCALE_BYTES = BLOCK_N * TILE_K // layout.BLOCK
STEPS = TILE_K // 16
# Rows of x that neighboring CTAs work through before they go on along N: what a wave of CTAs
# reads at a time then fits the L2 cache.
RASTER_TILES = 8
# How an output is stored, by the code of its dtype.
FORMS = ("f32", "bf16x2", "f16x2")
# Registers of a producer's and of a consumer's thread once the warpgroup of producers has handed
# over, by CTAs of a multiprocessor and warpgroups of consumers in one.
REGISTERS = {(1, 2): (40, 232), (1, 3): (40, 152), (2, 2): (24, 104), (1, 4): (24, 112)}
# Shared memory of a CTA when a multiprocessor holds so many.
SMEM_BYTES = {1: 227 * 1024, 2: 113 * 1024, 3: 75 * 1024, 4: 56 * 1024}
# What a CTA asks for that is to be alone on a multiprocessor.
ALONE_BYTES = 116 * 1024
# Stages that are used where CTAs that could do with more crowd on the multiprocessors: with more in
# flight a load waits behind so many others that CTAs drift apart.
CROWDED_STAGES = 4
# Stages whose part of the weight is asked for before the kernel before has ended. Each takes time
# to issue: with 4 the call is slower, with all of a ring by 0.7 us.
STAGES_AHEAD = 2


class GemmSm90:
    """One config of the kernel.

    Attributes:
        config: the config.
    """

    def __init__(self, config: GemmConfig):
        self.config = config
        self.dtype = {"bfloat16": BFloat16, "float16": Float16}[config.x_dtype]
        self.tile_m, self.tile_n, self.stages = config.tile_m, config.tile_n, config.stages
        self.warpgroups = config.warpgroups
        self.k_groups = config.k_groups
        self.row_groups = config.warpgroups // config.k_groups
        # Blocks of 64 rows of the weight in a tile, in one copy, and those a warpgroup works on.
        self.tile_blocks = config.tile_n // BLOCK_N
        self.copy_blocks = 2 if self.tile_blocks % 2 == 0 else 1
        self.blocks = self.tile_blocks // self.row_groups
        # Steps of 16 columns between waits: two where that is work enough to hide a decode.
        self.group_steps = 2 if self.tile_m >= 128 else 4
        # Large tiles need more registers than an even share: the producer, a warpgroup then, hands
        # over most of its own.
        self.moves_registers = self.blocks * self.tile_m >= 64
        self.registers = REGISTERS.get((config.ctas_per_sm, config.warpgroups))
        self.producers = WARPGROUP if self.moves_registers else 32
        self.consumers = config.warpgroups * WARPGROUP
        self.threads = self.consumers + self.producers
        self.may_crowd = (
            config.ctas_per_sm > 1 and config.k_groups == 1 and config.stages > CROWDED_STAGES
        )
        self.x_bytes = self.tile_m * TILE_K * 2
        self.stage_bytes = self.x_bytes + self.tile_blocks * (CODE_BYTES + SCALE_BYTES)
        self.smem_bytes = 1024 + self.stages * (self.stage_bytes + 16) + 16
        # Rows of x are divided by eights, as the accumulators are: those of a tile, and those whose
        # sums one of the groups adds up.
        self.eights = self.tile_m // 8
        self.group_eights = -(-self.eights // self.k_groups)
        # Whether there is room for other CTAs' sums beside the ring.
        inbox = max(self._inbox_bytes(split) for split in range(1, config.split_k + 1))
        self.apart = self.smem_bytes + inbox <= SMEM_BYTES[config.ctas_per_sm]
        if self.apart:
            self.smem_bytes += inbox
        self._check()

    def reduces(self, split: int) -> bool:
        """Whether a tile's sums meet in shared memory before they are stored."""
        return split * self.k_groups > 1

    def _cta_eights(self, split: int) -> int:
        """How many of a group's eights one CTA of a cluster adds up, at most."""
        return -(-self.group_eights // split)

    def _groups_bytes(self) -> int:
        """Shared memory for the sums that groups hand to one another."""
        return (self.k_groups - 1) * self.group_eights * self.blocks * self.consumers * 16

    def _inbox_bytes(self, split: int) -> int:
        """Shared memory for the sums that a CTA gets from the others of its cluster."""
        return (split - 1) * self._cta_eights(split) * self.blocks * self.consumers * 16

    def _check(self) -> None:
        c = self.config
        if c.tile_k != TILE_K or c.tile_n % BLOCK_N or c.tile_m % 8:
            raise ValueError(f"{c.name}: tiles of {c.tile_m} x {c.tile_n} x {c.tile_k}")
        if c.warpgroups % c.k_groups or self.tile_blocks % self.row_groups:
            raise ValueError(f"{c.name}: {c.warpgroups} warpgroups in {c.k_groups} groups")
        if self.moves_registers and self.registers is None:
            raise ValueError(f"{c.name}: no division of the registers")
        # A group releases a stage while it works on its next one.
        if c.stages % c.k_groups or c.stages < 2 * c.k_groups:
            raise ValueError(f"{c.name}: {c.stages} stages for {c.k_groups} groups")
        if self.smem_bytes > SMEM_BYTES[c.ctas_per_sm]:
            raise ValueError(f"{c.name}: {self.smem_bytes} bytes of shared memory")
        for split in range(1, c.split_k + 1):
            inbox = 0 if self.apart else self._inbox_bytes(split)
            if self._groups_bytes() + inbox > self.stages * self.stage_bytes:
                raise ValueError(f"{c.name}: a tile's sums do not fit the shared memory")

    def _tiled_mma(self):
        op = warpgroup.MmaF16BF16Op(
            self.dtype,
            Float32,
            (64, self.tile_m, 16),
            warpgroup.OperandSource.RMEM,
            OperandMajorMode.K,
            OperandMajorMode.K,
        )
        return cute.make_tiled_mma(cute.make_mma_atom(op), (1, 1, 1))

    def _x_layout(self):
        return cutlass.utils.hopper_helpers.make_smem_layout_b(
            cutlass.utils.LayoutEnum.ROW_MAJOR,
            (64, self.tile_m, TILE_K),
            self.dtype,
            self.stages,
        )

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        sfx: cute.Pointer,
        w: cute.Pointer,
        sfw: cute.Pointer,
        x_scale: cute.Pointer,
        w_scale: cute.Pointer,
        bias: cute.Pointer,
        y: cute.Pointer,
        scratch: cute.Pointer,
        m: Int32,
        n: Int32,
        k: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        split_k: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        """Encodes the tensor map of x and launches the kernel. See the package's GEMM signature.

        `k` is a multiple of 64; sfx and scratch are not used. `split_k` is at most the config's.
        """
        # A tensor map has no empty axes. No copy is made where k is 0.
        columns = cute.assume(cutlass.max(k, 64), divby=64)
        x_tensor = cute.make_tensor(
            x, cute.make_layout((cutlass.max(m, 1), columns), stride=(columns, 1))
        )
        tma_atom, tma_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            x_tensor,
            cute.slice_(self._x_layout(), (None, None, 0)),
            (self.tile_m, TILE_K),
        )
        tiles = cute.ceil_div(m, self.tile_m) * self._n_tiles(n)
        arguments = (
            tma_atom,
            tma_tensor,
            w,
            sfw,
            x_scale,
            w_scale,
            bias,
            y,
            m,
            n,
            k,
            x_scale_stride,
            w_scale_stride,
            bias_dtype,
            out_dtype,
        )
        if m > 0 and n > 0:
            for split in cutlass.range_constexpr(1, self.config.split_k + 1):
                # A launch each: a cluster's size is fixed when it is compiled.
                if split_k == split:
                    ctas = tiles * split
                    if const_expr(not self.reduces(split)):
                        ctas = cutlass.min(tiles, num_sms * self.config.ctas_per_sm)
                    smem = Int32(self.smem_bytes)
                    if const_expr(self.config.ctas_per_sm > 1):
                        # While the kernel before holds some multiprocessors, CTAs that start early
                        # would be placed in pairs on the others.
                        if ctas <= num_sms:
                            smem = Int32(max(self.smem_bytes, ALONE_BYTES))
                    stages = Int32(self.stages)
                    if const_expr(self.may_crowd):
                        if 2 * ctas > self.config.ctas_per_sm * num_sms:
                            stages = Int32(CROWDED_STAGES)
                    self.kernel(*arguments, stages, split).launch(
                        grid=[ctas, 1, 1],
                        block=[self.threads, 1, 1],
                        cluster=[split, 1, 1],
                        smem=smem,
                        use_pdl=x_scale_stride >= 0,
                        min_blocks_per_mp=self.config.ctas_per_sm,
                        preferred_smem_carveout=100,
                        stream=stream,
                    )

    @cute.kernel
    def kernel(
        self,
        tma_atom: cute.CopyAtom,
        x_tensor: cute.Tensor,
        w: cute.Pointer,
        sfw: cute.Pointer,
        x_scale: cute.Pointer,
        w_scale: cute.Pointer,
        bias: cute.Pointer,
        y: cute.Pointer,
        m: Int32,
        n: Int32,
        k: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        stages: Int32,
        split: cutlass.Constexpr[int],
    ):
        """The device code; a cluster is `split` CTAs that share a tile."""
        if const_expr(not self.may_crowd):
            stages = self.stages
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        block = cute.arch.block_idx()[0]
        grid = cute.arch.grid_dim()[0]
        first_tile = block // split
        rank = block % split
        tile_step = grid // split
        m_tiles = cute.ceil_div(m, self.tile_m)
        tiles = m_tiles * self._n_tiles(n)
        k_tiles = cute.ceil_div(k, TILE_K)
        k_begin = k_tiles * rank // split
        k_count = k_tiles * (rank + 1) // split - k_begin

        smem = cutlass.utils.SmemAllocator()
        buffers = smem.allocate(self.stages * self.stage_bytes, byte_alignment=1024)
        inbox = buffers
        if const_expr(self.apart and split > 1):
            inbox = smem.allocate(self._inbox_bytes(split), byte_alignment=16)
        barriers = smem.allocate_array(cutlass.Int64, self.stages * 2 + 2)
        full, empty, ready = barriers, barriers + self.stages, barriers + self.stages * 2
        received = ready + 1
        if warp == self.consumers // 32:
            cpasync.prefetch_descriptor(tma_atom)
        if thread == 0:
            for stage in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(full + stage, 1)
                cute.arch.mbarrier_init(empty + stage, self.row_groups * WARPGROUP)
            if const_expr(split > 1):
                cute.arch.mbarrier_init(received, 1)
                if const_expr(not self.apart):
                    cute.arch.mbarrier_init(ready, (split - 1) * self.consumers)
            cute.arch.mbarrier_init_fence()
            if const_expr(split > 1):
                cute.arch.mbarrier_arrive_and_expect_tx(received, self._inbox_bytes(split))
        if const_expr(split > 1):
            # Waited for before the first access to another CTA.
            cute.arch.cluster_arrive_relaxed()
        cute.arch.sync_threads()

        x_smem = cute.make_tensor(
            cute.recast_ptr(buffers, self._x_layout().inner, dtype=self.dtype),
            self._x_layout().outer,
        )
        if warp >= self.consumers // 32:
            if const_expr(self.moves_registers):
                cute.arch.setmaxregister_decrease(self.registers[0])
            if warp == self.consumers // 32:
                self._produce(
                    tma_atom, x_tensor, x_smem, w, sfw, buffers, full, empty,
                    m_tiles, tiles, n, k_tiles, k_begin, k_count, first_tile, tile_step, stages,
                    x_scale_stride,
                )  # fmt: skip
            if const_expr(split > 1):
                cute.arch.cluster_wait()
        else:
            if const_expr(self.moves_registers):
                cute.arch.setmaxregister_increase(self.registers[1])
            cute.arch.griddepcontrol_wait()
            self._consume(
                x_smem, buffers, inbox, full, empty, ready, received, x_scale, w_scale, bias, y,
                m_tiles, tiles, m, n, k_count, first_tile, tile_step, rank,
                x_scale_stride, w_scale_stride, bias_dtype, out_dtype, stages, split,
            )  # fmt: skip

    def _n_tiles(self, n):
        """Tiles along N, of the blocks of the weight's whole tiles."""
        return cute.ceil_div(cute.ceil_div(n, layout.TILE_N) * 2, self.tile_blocks)

    @cute.jit
    def _tile_coordinates(self, tile, m_tiles, n):
        """(tile along M, tile along N) of a tile's number, in the raster's order."""
        tile_x = Int32(0)
        tile_w = tile
        if m_tiles > 1:
            per_group = RASTER_TILES * self._n_tiles(n)
            group = tile // per_group
            inside = tile % per_group
            rows = cutlass.min(m_tiles - group * RASTER_TILES, RASTER_TILES)
            tile_x = group * RASTER_TILES + inside % rows
            tile_w = inside // rows
        return tile_x, tile_w

    def _flat(self, j, b, half, e, eights):
        """Where a thread's sum for block b, row g + 8*half and row 8*j + 2*t + e of x is.

        Of its sums for so many eights of rows of x.
        """
        return e + 2 * half + 4 * (j + eights * b)

    def _code_offset(self):
        """Where codes start in the buffers; scales follow all codes."""
        return self.stages * self.x_bytes

    def _scale_offset(self):
        return self._code_offset() + self.stages * self.tile_blocks * CODE_BYTES

    @cute.jit
    def _produce(
        self, tma_atom, x_tensor, x_smem, w, sfw, buffers, full, empty,
        m_tiles, tiles, n, k_tiles, k_begin, k_count, first_tile, tile_step, stages,
        x_scale_stride,
    ):  # fmt: skip
        """The producer warp: fills the ring."""
        x_tiles = cute.local_tile(x_tensor, (self.tile_m, TILE_K), (None, None))
        x_to, x_from = cpasync.tma_partition(
            tma_atom,
            0,
            cute.make_layout(1),
            cute.group_modes(x_smem, 0, 2),
            cute.group_modes(x_tiles, 0, 2),
        )
        # A weight that is read once should not push x out of the L2 cache.
        policy = Int64(ops.EVICT_NORMAL)
        if m_tiles == 1:
            policy = Int64(ops.EVICT_FIRST)
        base = ops.shared_address(buffers)
        # The last tile along N may reach past the weight's tiles of 128 rows.
        last_row = cute.ceil_div(n, layout.TILE_N) - 1
        # A launch that is not programmatic would do so for nothing.
        if first_tile < tiles and x_scale_stride >= 0:
            _, tile_w = self._tile_coordinates(first_tile, m_tiles, n)
            ahead = cutlass.min(k_count, min(STAGES_AHEAD, self.stages))
            for i in cutlass.range(ahead, unroll=1):
                with cute.arch.elect_one():
                    for part in cutlass.range_constexpr(self.tile_blocks // self.copy_blocks):
                        at = self._weight_at(tile_w, part, last_row, k_tiles, k_begin + i)
                        ops.bulk_prefetch(
                            ops.element_address(w, at, CODE_BYTES),
                            Int32(self.copy_blocks * CODE_BYTES),
                        )
                        ops.bulk_prefetch(
                            ops.element_address(sfw, at, SCALE_BYTES),
                            Int32(self.copy_blocks * SCALE_BYTES),
                        )
        cute.arch.griddepcontrol_wait()
        stage = Int32(0)
        phase = Int32(1)
        for tile in cutlass.range(first_tile, tiles, tile_step, unroll=1):
            tile_x, tile_w = self._tile_coordinates(tile, m_tiles, n)
            for i in cutlass.range(k_count, unroll=1):
                cute.arch.mbarrier_wait(empty + stage, phase)
                k_tile = k_begin + i
                barrier = ops.shared_address(full + stage)
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, self.stage_bytes)
                    for part in cutlass.range_constexpr(self.tile_blocks // self.copy_blocks):
                        slot = stage * self.tile_blocks + part * self.copy_blocks
                        at = self._weight_at(tile_w, part, last_row, k_tiles, k_tile)
                        ops.bulk_load(
                            base + self._code_offset() + slot * CODE_BYTES,
                            ops.element_address(w, at, CODE_BYTES),
                            Int32(self.copy_blocks * CODE_BYTES),
                            barrier,
                            policy,
                        )
                        ops.bulk_load(
                            base + self._scale_offset() + slot * SCALE_BYTES,
                            ops.element_address(sfw, at, SCALE_BYTES),
                            Int32(self.copy_blocks * SCALE_BYTES),
                            barrier,
                            policy,
                        )
                # The copy through the tensor map elects a thread of its own.
                cute.copy(
                    tma_atom,
                    x_from[None, tile_x, k_tile],
                    x_to[None, stage],
                    tma_bar_ptr=full + stage,
                )
                stage += 1
                if stage == stages:
                    stage = Int32(0)
                    phase ^= 1

    def _weight_at(self, tile_w, part, last_row, k_tiles, k_tile):
        """Where a copy's part of a tile of the weight is, in blocks."""
        block = tile_w * self.tile_blocks + part * self.copy_blocks
        at = Int64(cutlass.min(block // 2, last_row)) * Int64(k_tiles)
        return (at + Int64(k_tile)) * 2 + Int64(block % 2)

    @cute.jit
    def _consume(
        self, x_smem, buffers, inbox, full, empty, ready, received, x_scale, w_scale, bias, y,
        m_tiles, tiles, m, n, k_count, first_tile, tile_step, rank,
        x_scale_stride, w_scale_stride, bias_dtype, out_dtype, stages,
        split: cutlass.Constexpr[int],
    ):  # fmt: skip
        """A consumer warpgroup: decodes, multiplies, and stores or leaves the sums."""
        thread = cute.arch.thread_idx()[0]
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        thread = thread % WARPGROUP
        tiled_mma = self._tiled_mma()
        x_fragments = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(x_smem))
        sums = cute.make_rmem_tensor(
            tiled_mma.partition_shape_C((64 * self.blocks, self.tile_m)), Float32
        )
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        exponent = ops.scale_exponent(n)
        k_group, row_group = group // self.row_groups, group % self.row_groups
        k_count = (k_count - k_group + self.k_groups - 1) // self.k_groups
        stage = k_group
        phase = Int32(0)
        flat = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        # A thread's share of the tile. What scales it is loaded before the multiplication if there
        # are registers to hold it; else after it, if possible before the sums of others come.
        eights = self._cta_eights(split)
        early = self.blocks == 1 and (self.reduces(split) or self.tile_m <= 64)
        rows_early = self.blocks == 1 and eights <= (4 if self.reduces(split) else 8)
        for tile in cutlass.range(first_tile, tiles, tile_step, unroll=1):
            tile_x, tile_w = self._tile_coordinates(tile, m_tiles, n)
            first_block = tile_w * self.tile_blocks + row_group * self.blocks
            first, end = self._rows(tile_x, k_group, rank, m, split)
            columns = (first_block, n, thread, w_scale_stride)
            rows = (x_scale, w_scale, x_scale_stride, first, m, thread)
            if const_expr(early):
                constants = self._constants(w_scale, bias, columns, bias_dtype)
            if const_expr(rows_early):
                row_scales = [self._row_scales(rows, j) for j in range(eights)]
            sums.fill(0.0)
            stage, phase = self._multiply(
                tiled_mma, sums, x_fragments, buffers, full, empty, thread, row_group,
                k_count, stages, stage, phase, k_group, exponent,
            )  # fmt: skip
            if const_expr(not early):
                constants = self._constants(w_scale, bias, columns, bias_dtype)
            share = flat
            if const_expr(self.reduces(split)):
                if const_expr(not rows_early):
                    row_scales = [self._row_scales(rows, j) for j in range(eights)]
                # The only tile of this cluster.
                share = self._reduce(
                    flat, buffers, inbox, ready, received, thread, row_group, k_group, rank, split
                )
            elif const_expr(not rows_early):
                row_scales = None
            self._store(
                share, rows, row_scales, constants, y, first, end, first_block, n, thread,
                out_dtype, eights,
            )  # fmt: skip

    def _rows(self, tile_x, k_group, rank, m, split):
        """The rows of y that a thread stores: the first, and where they end.

        The next eights of a tile's rows go to the next group, of a group's to the next CTA.
        """
        first = k_group * self.group_eights + rank * self._cta_eights(split)
        end = cutlass.min(first + self._cta_eights(split), (k_group + 1) * self.group_eights)
        tile_row = tile_x * self.tile_m
        return tile_row + first * 8, cutlass.min(tile_row + cutlass.min(end * 8, self.tile_m), m)

    @cute.jit
    def _multiply(
        self, tiled_mma, sums, x_fragments, buffers, full, empty, thread, row_group,
        k_count, stages, stage, phase, k_group, exponent,
    ):  # fmt: skip
        """Adds a tile's products to `sums`; returns the ring's state."""
        bf16 = self.dtype is BFloat16
        shape = tiled_mma.partition_shape_A((64 * self.blocks, 16 * self.group_steps))
        fragments = [cute.make_rmem_tensor(shape, self.dtype) for _ in range(2)]
        registers = []
        for fragment in fragments:
            words = cute.recast_tensor(fragment, Uint32)
            registers.append(cute.make_tensor(words.iterator, cute.make_layout(cute.size(words))))
        base = ops.shared_address(buffers)
        lane_row = (thread // 32) * 8 + (thread % 32) // 4
        # Every lane arrives that has read: one for its warp, after a barrier of the warp, takes as
        # long. Nothing is there to release in the first round. 1 is written so that no compiler
        # knows it: it would peel that round, and compute the ring's addresses for each lane.
        releases, one = Int32(0), Int32(thread - stage < WARPGROUP)
        first = row_group * self.blocks
        code_at = base + self._code_offset() + first * CODE_BYTES + thread * 16
        scale_at = base + self._scale_offset() + first * SCALE_BYTES + lane_row * 16
        last = stage
        for _ in cutlass.range(k_count, unroll=1):
            cute.arch.mbarrier_wait(full + stage, phase)
            slot = stage * self.tile_blocks
            scales = [
                load_shared_x4(scale_at + (slot + b) * SCALE_BYTES) for b in range(self.blocks)
            ]
            for part in cutlass.range_constexpr(STEPS // self.group_steps):
                if const_expr(part * self.group_steps % 4 == 0):
                    # Half of the codes at a time: the assembler would else decode all at once, and
                    # leave nothing to do while the last groups multiply.
                    at = code_at + slot * CODE_BYTES + part * self.group_steps // 4 * HALF_BYTES
                    codes = [load_shared_x4(at + b * CODE_BYTES) for b in range(self.blocks)]
                # The group before the last is done: it was the reader of this set of registers.
                warpgroup.wait_group(1)
                if const_expr(part == 1):
                    # So is all of the stage before this one.
                    cute.arch.sync_warp()
                    ops.arrive_if(releases, ops.shared_address(empty + last))
                    releases = one
                for pair in cutlass.range_constexpr(self.group_steps // 2):
                    p = part * (self.group_steps // 2) + pair
                    word = 2 * p % 4
                    for b in cutlass.range_constexpr(self.blocks):
                        decoded = ops.decode_pair(
                            codes[b][word], codes[b][word + 1], scales[b][p], exponent, bf16
                        )
                        for step in cutlass.range_constexpr(2):
                            for r in cutlass.range_constexpr(4):
                                registers[part % 2][
                                    r + 4 * (b + self.blocks * (2 * pair + step))
                                ] = decoded[step][r]
                warpgroup.fence()
                for step in cutlass.range_constexpr(self.group_steps):
                    cute.gemm(
                        tiled_mma,
                        sums,
                        fragments[part % 2][None, None, step],
                        x_fragments[None, None, part * self.group_steps + step, stage],
                        sums,
                    )
                warpgroup.commit_group()
            last = stage
            stage += self.k_groups
            if stage >= stages:
                stage = k_group
                phase ^= 1
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        ops.arrive_if(releases, ops.shared_address(empty + last))
        return stage, phase

    def _x_scale(self, x_scale, w_scale, stride, row, m):
        """The scale of a row of x; rows past the last get the last's."""
        index = cutlass.min(row, m - 1) * stride
        return ops.load_float_or_one(x_scale, w_scale, stride >= 0, index)

    @cute.jit
    def _bias(self, bias, dtype, index):
        """An element of the bias, 0 where there is none."""
        value = Float32(0.0)
        if dtype == 0:
            value = ops.load_element(bias, Float32, index)
        elif dtype == 1:
            value = ops.load_element(bias, BFloat16, index)
        elif dtype == 2:
            value = ops.load_element(bias, Float16, index)
        return value

    def _store_as(self, y, dtype, index, value):
        """Rounds a Float32 to "f32", "bf16x2" or "f16x2" (its element type) and stores it."""
        if dtype == "f32":
            ops.store_word(ops.element_address(y, index, 4), ops.bits(value))
        else:
            ops.store_half(ops.element_address(y, index, 2), ops.round_pair(value, value, dtype))

    @cute.jit
    def _store_element(self, y, out_dtype, index, value):
        """Rounds a Float32 to the output's type and stores it."""
        if out_dtype == 0:
            self._store_as(y, "f32", index, value)
        elif out_dtype == 1:
            self._store_as(y, "bf16x2", index, value)
        else:
            self._store_as(y, "f16x2", index, value)

    def _warp_column(self, first_block, thread):
        """The first of the columns of y that a warp stores."""
        tile = (first_block // 2) * layout.TILE_N
        return tile + (thread // 32) * 32 + (first_block % 2) * 4

    def _row_scales(self, rows, j):
        """The scales of the two rows of eight `j` that a thread's sums are of."""
        x_scale, w_scale, stride, first, m, thread = rows
        row = first + 8 * j + thread % 4 * 2
        return [self._x_scale(x_scale, w_scale, stride, row + e, m) for e in range(2)]

    @cute.jit
    def _constants(self, w_scale, bias, columns, bias_dtype):
        """The scales and the biases of the rows of the weight that a thread sums."""
        first_block, n, thread, w_scale_stride = columns
        lane = thread % 32
        g = lane // 4
        warp_n = self._warp_column(first_block, thread)
        scales = []
        biases = []
        for b in cutlass.range_constexpr(self.blocks):
            for half in cutlass.range_constexpr(2):
                at = warp_n + (g // 2) * 8 + b * 4 + half * 2 + g % 2
                at = cutlass.min(at, n - 1)
                scales.append(ops.load_element(w_scale, Float32, at * w_scale_stride))
                biases.append(self._bias(bias, bias_dtype, at))
        return scales, biases

    @cute.jit
    def _store(
        self, sums, rows, row_scales, constants, y, first, end, first_block, n, thread,
        out_dtype, eights: cutlass.Constexpr[int],
    ):  # fmt: skip
        """Scales so many eights of a tile's rows and stores them up to row `end`, from registers.

        A lane 4*g + t holds rows g of 8 of the weight for rows 2*t and 2*t + 1 of 8 of x. Once
        transposed it holds row g of x and, the order of the weight's rows being what it is, eight
        (or four, where the warpgroup has one block) neighboring elements from 8*t.
        """
        lane = thread % 32
        g, t = lane // 4, lane % 4
        warp_n = self._warp_column(first_block, thread)
        scales, biases = constants
        column = warp_n + t * 8
        place = (first, end, column, n)
        # A branch for each way of storing, and no branch within: code that is run once, and is
        # long, should at least be contiguous.
        if n % (4 * self.blocks) != 0:
            self._store_tile(
                sums, rows, row_scales, scales, biases, y, place, g, out_dtype, eights, "any"
            )
        elif out_dtype == 0:
            self._store_tile(
                sums, rows, row_scales, scales, biases, y, place, g, out_dtype, eights, "f32"
            )
        elif out_dtype == 1:
            self._store_tile(
                sums, rows, row_scales, scales, biases, y, place, g, out_dtype, eights, "bf16x2"
            )
        else:
            self._store_tile(
                sums, rows, row_scales, scales, biases, y, place, g, out_dtype, eights, "f16x2"
            )

    @cute.jit
    def _store_tile(
        self, sums, rows, row_scales, scales, biases, y, place, g, out_dtype,
        eights: cutlass.Constexpr[int], form: cutlass.Constexpr[str],
    ):  # fmt: skip
        """Stores rows in one form: "f32", "bf16x2", "f16x2", or "any", element by element."""
        first, end, column, n = place
        for j in cutlass.range_constexpr(eights):
            pairs = []
            row_scale = self._row_scales(rows, j) if row_scales is None else row_scales[j]
            for b in cutlass.range_constexpr(self.blocks):
                for half in cutlass.range_constexpr(2):
                    c = 2 * b + half
                    pairs.append(
                        [
                            fma_to(
                                row_scale[e] * scales[c],
                                sums[self._flat(j, b, half, e, eights)]
                                * Float32(ops.ACCUMULATOR_SCALE),
                                biases[c],
                                out_dtype if form == "any" else FORMS.index(form),
                            )
                            for e in range(2)
                        ]
                    )
            words = self._transposed(pairs, form)
            row = first + 8 * j + g
            at = Int64(row) * Int64(n) + Int64(column)
            if const_expr(form == "any"):
                if row < end:
                    for i in cutlass.range_constexpr(len(words)):
                        if column + i < n:
                            self._store_element(y, out_dtype, at + i, ops.float_of(words[i]))
            else:
                address = ops.element_address(y, at, 4 if form == "f32" else 2)
                if row < end and column < n:
                    if const_expr(len(words) == 2):
                        ops.store_x2(address, words)
                    else:
                        for i in cutlass.range_constexpr(0, len(words), 4):
                            ops.store_x4(address + 4 * i, words[i : i + 4])

    def _transposed(self, pairs, form):
        """Neighboring elements of a row of y, packed into words, from pairs of a column's.

        Float32 goes as two matrices of 16-bit elements, the upper and the lower halves.
        """
        if form in ("bf16x2", "f16x2"):
            return [ops.transpose(ops.round_pair(low, high, form)) for low, high in pairs]
        words = []
        for low, high in pairs:
            a, b = ops.bits(low), ops.bits(high)
            upper = ops.transpose(ops.permute(a, b, 0x7632))
            lower = ops.transpose(ops.permute(a, b, 0x5410))
            words += [ops.permute(lower, upper, 0x5410), ops.permute(lower, upper, 0x7632)]
        return words

    @cute.jit
    def _reduce(
        self, sums, buffers, inbox, ready, received, thread, row_group, k_group, rank,
        split: cutlass.Constexpr[int],
    ):  # fmt: skip
        """Adds up the sums of groups, then of CTAs; returns those of the thread's share."""
        if const_expr(split > 1):
            # All CTAs have set up their mbarriers.
            cute.arch.cluster_wait()
        if const_expr(split > 1 and not self.apart):
            # This thread is done with its CTA's ring: sums may come.
            for to in cutlass.range_constexpr(split):
                barrier = ops.map_shared(ops.shared_address(ready), Int32(to))
                ops.arrive_remote_if(Int32(rank != to), barrier)
        base = ops.shared_address(buffers)
        count = self.eights
        if const_expr(self.k_groups > 1):
            count = self.group_eights
            group_threads = self.row_groups * WARPGROUP
            place = base + (row_group * WARPGROUP + thread) * 16
            step = count * self.blocks * group_threads * 16
            # All groups are done with the ring.
            cute.arch.barrier(barrier_id=1, number_of_threads=self.consumers)
            for to in cutlass.range_constexpr(self.k_groups):
                at = place + (to * (self.k_groups - 1) + k_group - Int32(k_group > to)) * step
                part = self._part(sums, self.eights, to, count)
                if k_group != to:
                    for i in cutlass.range_constexpr(len(part) // 4):
                        ops.store_vector(at + i * (group_threads * 16), part[4 * i : 4 * i + 4])
            cute.arch.barrier(barrier_id=1, number_of_threads=self.consumers)
            sums = self._in_order(
                self._own_part(sums, self.eights, k_group, self.k_groups, count),
                k_group,
                self.k_groups,
                place + k_group * ((self.k_groups - 1) * step),
                step,
                group_threads * 16,
            )
        if const_expr(split > 1):
            eights, count = count, self._cta_eights(split)
            place = ops.shared_address(inbox)
            if const_expr(not self.apart):
                place += self._groups_bytes()
            place += (k_group * self.row_groups + row_group) * (WARPGROUP * 16) + thread * 16
            step = count * self.blocks * self.consumers * 16
            if const_expr(not self.apart):
                # All threads of the others are done with their rings.
                cute.arch.mbarrier_wait(ready, 0)
            for to in cutlass.range_constexpr(split):
                inbox_there = ops.map_shared(place + (rank - Int32(rank > to)) * step, Int32(to))
                received_there = ops.map_shared(ops.shared_address(received), Int32(to))
                part = self._part(sums, eights, to, count)
                if rank != to:
                    for i in cutlass.range_constexpr(len(part) // 4):
                        ops.send_vector(
                            inbox_there + i * (self.consumers * 16),
                            part[4 * i : 4 * i + 4],
                            received_there,
                        )
            own = self._own_part(sums, eights, rank, split, count)
            cute.arch.mbarrier_wait(received, 0)
            sums = self._in_order(own, rank, split, place, step, self.consumers * 16)
        return sums

    def _part(self, sums, eights, index, count):
        """Part `index` of sums for so many eights, `count` eights long: a list in `_flat`'s order.

        Where the last parts are shorter, or empty, their ends repeat the last eight.
        """
        return [
            sums[self._flat(min(index * count + j, eights - 1), b, half, e, eights)]
            for b in range(self.blocks)
            for j in range(count)
            for half in range(2)
            for e in range(2)
        ]

    def _own_part(self, sums, eights, index, parts, count):
        """The same where `index` is known at run time only: one of `parts`."""
        own = self._part(sums, eights, 0, count)
        for other in range(1, parts):
            part = self._part(sums, eights, other, count)
            own = [ops.select(index == other, *pair) for pair in zip(part, own, strict=True)]
        return own

    def _in_order(self, own, index, parts, place, step, stride):
        """Adds up the sums of `parts` agents in their order; those of agent `index` are `own`."""
        if parts == 2:  # The order makes no difference.
            return self._added(own, self._loaded(place, len(own), stride))
        total = None
        for source in range(parts):
            # The agent itself has no place; for it another's sums are loaded, and not used.
            other = cutlass.min(source - Int32(index < source), parts - 2)
            part = self._loaded(place + other * step, len(own), stride)
            part = [ops.select(index == source, *pair) for pair in zip(own, part, strict=True)]
            total = self._added(total, part) if source else part
        return total

    def _added(self, a, b):
        return [x + y for x, y in zip(a, b, strict=True)]

    def _loaded(self, at, count, stride):
        """So many sums, in vectors of four that are `stride` apart."""
        return [v for i in range(count // 4) for v in ops.load_vector(at + i * stride)]


def _arguments(config: GemmConfig) -> tuple:
    """Arguments to compile with: aligned addresses that nothing reads, and integers."""
    dtype = {"bfloat16": BFloat16, "float16": Float16}[config.x_dtype]

    def pointer(element):
        return make_ptr(element, 1024, cute.AddressSpace.gmem, assumed_align=16)

    types = (dtype, Uint8, Uint8, Uint8, Float32, Float32, Uint8, Uint8, Uint8)
    integers = (1, 1, 64, 0, 0, -1, 1, 1, 132)
    return (*map(pointer, types), *map(Int32, integers), cuda.CUstream(0))


def variants(arch: str) -> list[KernelVariant]:
    """The kernels of `arch`, one for each config; none but for sm_90a."""
    if arch != "sm_90a":
        return []
    return [
        KernelVariant(
            name=config.name,
            op="gemm",
            arch=arch,
            config=config,
            host=GemmSm90(config).__call__,
            args=_arguments(config),
        )
        for config in configs(arch)
    ]
