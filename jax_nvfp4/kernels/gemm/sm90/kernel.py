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

Gated configs are for weights whose rows are interleaved, two gates and their two ups in turn: a
thread's rows r and r + 8 of the MMA are then a gate and its up, so that the activation needs no
exchange, and half as much is stored.

Grouped configs have a weight for each group of rows, and group sizes that only the device knows
(`groups.py`). Nothing else differs: x is the N side of the MMA and its tensor map reads from any
row, so that groups need no padding; a tile's rows beyond its group are computed and not stored.

The order in which one output is summed is fixed by K, the split and `k_groups`: columns in rising
order within a group, then groups, then CTAs. With `k_groups` of 1 it is the same in every config.
"""

import dataclasses

import cutlass
import cutlass.utils
from cutlass import (
    BFloat16,
    Float16,
    Float32,
    Int32,
    Int64,
    Uint32,
    const_expr,
    cute,
)
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup

from jax_nvfp4.config import GemmConfig, configs
from jax_nvfp4.kernels.gemm.arguments import HostCall
from jax_nvfp4.kernels.gemm.host import example_args, host_function
from jax_nvfp4.kernels.gemm.ring import advance
from jax_nvfp4.kernels.gemm.sm90 import groups
from jax_nvfp4.kernels.gemm.sm90 import ptx as ops
from jax_nvfp4.kernels.gemm.sm90.arguments import (
    Call,
    Exchange,
    Lane,
    OutputTile,
    Place,
    QueuedRing,
    Tile,
    TileQueue,
    Weight,
    Work,
)
from jax_nvfp4.kernels.gemm.sm90.epilogue import BLOCK_N, WARPGROUP, Epilogue
from jax_nvfp4.kernels.ptx import load_shared_x4
from jax_nvfp4.kernels.variant import KernelVariant
from jax_nvfp4.layout import sm90 as layout

TILE_K = layout.TILE_K
CODE_BYTES = BLOCK_N * TILE_K // 2
HALF_BYTES = CODE_BYTES // 2
SCALE_BYTES = BLOCK_N * TILE_K // layout.BLOCK
STEPS = TILE_K // 16
# Rows of x that neighboring CTAs work through before they go on along N: what a wave of CTAs
# reads at a time then fits the L2 cache.
RASTER_TILES = 8
# Registers of a producer's and of a consumer's thread once the warpgroup of producers has handed
# over, by CTAs of a multiprocessor and warpgroups of consumers in one.
REGISTERS = {(1, 2): (40, 232), (1, 3): (40, 152), (2, 2): (24, 104), (1, 4): (24, 112)}
# The same where the producer also finds groups, if that takes more.
GROUPED_REGISTERS = {(2, 2): (32, 104)}
# Shared memory of a CTA when a multiprocessor holds so many.
SMEM_BYTES = {1: 227 * 1024, 2: 113 * 1024, 3: 75 * 1024, 4: 56 * 1024}
# Shared memory that a CTA asks for so that no other fits beside it on its multiprocessor.
SOLE_CTA_BYTES = 116 * 1024
# Stages that are used where several CTAs share each multiprocessor: with more in flight a load
# waits behind so many others that CTAs drift apart.
SHARED_SM_STAGES = 4
# Stages whose part of the weight is asked for before the kernel before has ended. Each takes time
# to issue: with 4 the call is slower, with all of a ring by 0.7 us.
STAGES_AHEAD = 2


class GemmSm90(Epilogue):
    """One config of the kernel.

    Attributes:
        config: the config.
    """

    def __init__(self, config: GemmConfig):
        super().__init__(config)
        self.config = config
        self.dtype = {"bfloat16": BFloat16, "float16": Float16}[config.x_dtype]
        self.tile_m, self.tile_n, self.stages = config.tile_m, config.tile_n, config.stages
        self.warpgroups = config.warpgroups
        # Blocks of 64 rows of the weight in a tile and in one copy.
        self.tile_blocks = config.tile_n // BLOCK_N
        self.copy_blocks = 2 if self.tile_blocks % 2 == 0 else 1
        # Steps of 16 columns between waits: two where that is work enough to hide a decode.
        self.group_steps = 2 if self.tile_m >= 128 else 4
        # Large tiles need more registers than an even share: the producer, a warpgroup then, hands
        # over most of its own.
        self.moves_registers = self.blocks * self.tile_m >= 64
        registers = REGISTERS | (GROUPED_REGISTERS if config.grouped else {})
        self.registers = registers.get((config.ctas_per_sm, config.warpgroups))
        self.producers = WARPGROUP if self.moves_registers else 32
        self.threads = self.consumers + self.producers
        self.dynamic_stages = (
            config.ctas_per_sm > 1 and config.k_groups == 1 and config.stages > SHARED_SM_STAGES
        )
        self.x_bytes = self.tile_m * TILE_K * 2
        self.stage_bytes = self.x_bytes + self.tile_blocks * (CODE_BYTES + SCALE_BYTES)
        self.smem_bytes = 1024 + self.stages * (self.stage_bytes + 16) + 16
        if config.grouped:
            self.smem_bytes += groups.QUEUE_BYTES
        # Whether there is room for other CTAs' sums beside the ring.
        exchange = max(self._exchange_bytes(split) for split in range(1, config.split_k + 1))
        self.separate_exchange = self.smem_bytes + exchange <= SMEM_BYTES[config.ctas_per_sm]
        if self.separate_exchange:
            self.smem_bytes += exchange
        self._check()

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
            exchange = 0 if self.separate_exchange else self._exchange_bytes(split)
            if self._groups_bytes() + exchange > self.stages * self.stage_bytes:
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
    def launch(self, host: HostCall):
        """Encodes the tensor map of x and launches the kernel.

        `k` is a multiple of 64; sfx and scratch are not used. `split_k` is at most the config's.
        """
        problem, num_sms = host.problem, host.num_sms
        # A tensor map has no empty axes. No copy is made where k is 0.
        columns = cute.assume(cutlass.max(problem.k, 64), divby=64)
        x_tensor = cute.make_tensor(
            host.operands.x,
            cute.make_layout((cutlass.max(problem.m, 1), columns), stride=(columns, 1)),
        )
        tma_atom, tma_tensor = cpasync.make_tiled_tma_atom(
            cpasync.CopyBulkTensorTileG2SOp(),
            x_tensor,
            cute.slice_(self._x_layout(), (None, None, 0)),
            (self.tile_m, TILE_K),
        )
        tiles = self._most_m_tiles(problem.m, host.groups.size_count) * self._n_tiles(problem.n)
        call = Call(
            Weight(host.operands.w, host.operands.sfw),
            host.output,
            problem,
            host.groups if const_expr(self.config.grouped) else None,
            host.activation if const_expr(self.gated) else None,
        )
        for split in cutlass.range_constexpr(1, self.config.split_k + 1):
            # A launch each: a cluster's size is fixed when it is compiled.
            if host.split_k == split:
                ctas = tiles * split
                if const_expr(not self.reduces(split)):
                    ctas = cutlass.min(tiles, num_sms * self.config.ctas_per_sm)
                smem = Int32(self.smem_bytes)
                if const_expr(self.config.ctas_per_sm > 1):
                    # While the kernel before holds some multiprocessors, CTAs that start early
                    # would be placed in pairs on the others.
                    if ctas <= num_sms:
                        smem = Int32(max(self.smem_bytes, SOLE_CTA_BYTES))
                stages = Int32(self.stages)
                if const_expr(self.dynamic_stages):
                    if 2 * ctas > self.config.ctas_per_sm * num_sms:
                        stages = Int32(SHARED_SM_STAGES)
                self.kernel(tma_atom, tma_tensor, call, stages, split).launch(
                    grid=[ctas, 1, 1],
                    block=[self.threads, 1, 1],
                    cluster=[split, 1, 1],
                    smem=smem,
                    use_pdl=problem.x_scale_stride >= 0,
                    min_blocks_per_mp=self.config.ctas_per_sm,
                    preferred_smem_carveout=100,
                    stream=host.stream,
                )

    @cute.kernel
    def kernel(
        self,
        tma_atom: cute.CopyAtom,
        x_tensor: cute.Tensor,
        call: Call,
        stages: Int32,
        split: cutlass.Constexpr[int],
    ):
        """The device code; a cluster is `split` CTAs that share a tile."""
        if const_expr(not self.dynamic_stages):
            stages = self.stages
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        call = dataclasses.replace(call, work=self._work(call.problem, split))
        ring, exchange = self._shared_memory(stages, split)
        if warp == self.consumers // 32:
            cpasync.prefetch_descriptor(tma_atom)
        self._set_up_barriers(ring, exchange, split)
        x_smem = cute.make_tensor(
            cute.recast_ptr(ring.buffers, self._x_layout().inner, dtype=self.dtype),
            self._x_layout().outer,
        )
        if warp >= self.consumers // 32:
            if const_expr(self.moves_registers):
                cute.arch.setmaxregister_decrease(self.registers[0])
            if warp == self.consumers // 32:
                if const_expr(self.config.grouped):
                    self._produce_groups((tma_atom, x_tensor, x_smem), ring, call)
                else:
                    self._produce((tma_atom, x_tensor, x_smem), ring, call)
            if const_expr(split > 1):
                cute.arch.cluster_wait()
        else:
            if const_expr(self.moves_registers):
                cute.arch.setmaxregister_increase(self.registers[1])
            cute.arch.griddepcontrol_wait()
            self._consume(x_smem, ring, exchange, call)

    def _most_m_tiles(self, m, size_count):
        """Tiles along M, the most that there can be where rows are in groups."""
        if not self.config.grouped:
            return cute.ceil_div(m, self.tile_m)
        # The rows behind all groups are one more. Each group may have a tile that is not full.
        occupied = cutlass.min(m, size_count + 1)
        return occupied + (m - occupied) // self.tile_m

    def _work(self, problem, split) -> Work:
        """The CTA's share: every `step`-th tile from `first`, and a part of K."""
        block = cute.arch.block_idx()[0]
        grid = cute.arch.grid_dim()[0]
        first = block // split
        rank = block % split
        step = grid // split
        m_tiles = cute.ceil_div(problem.m, self.tile_m)
        tiles = m_tiles * self._n_tiles(problem.n)
        k_tiles = cute.ceil_div(problem.k, TILE_K)
        k_begin = k_tiles * rank // split
        k_count = k_tiles * (rank + 1) // split - k_begin
        return Work(first, step, m_tiles, tiles, k_tiles, k_begin, k_count, rank, split)

    def _shared_memory(self, stages, split) -> tuple[QueuedRing, Exchange]:
        """Divides a CTA's shared memory: buffers, other CTAs' sums, mbarriers."""
        smem = cutlass.utils.SmemAllocator()
        buffers = smem.allocate(self.stages * self.stage_bytes, byte_alignment=1024)
        received_sums = buffers
        if split > 1 and self.separate_exchange:
            received_sums = smem.allocate(self._exchange_bytes(split), byte_alignment=16)
        barriers = smem.allocate_array(cutlass.Int64, self.stages * 2 + 2)
        full, empty, ready = barriers, barriers + self.stages, barriers + self.stages * 2
        queue = None
        if self.config.grouped:
            tiles = smem.allocate_array(Int32, 4 * groups.QUEUE_SLOTS, byte_alignment=16)
            sent = smem.allocate_array(cutlass.Int64, 2 * groups.QUEUE_SLOTS)
            queue = TileQueue(tiles, sent, sent + groups.QUEUE_SLOTS)
        return QueuedRing(buffers, full, empty, stages, queue), Exchange(
            received_sums, ready, ready + 1
        )

    @cute.jit
    def _set_up_barriers(self, ring: QueuedRing, exchange: Exchange, split: cutlass.Constexpr[int]):
        """One thread initializes the mbarriers, before any other uses them."""
        if cute.arch.thread_idx()[0] == 0:
            for stage in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(ring.full + stage, 1)
                cute.arch.mbarrier_init(ring.empty + stage, self.row_groups * WARPGROUP)
            if const_expr(self.config.grouped):
                for slot in cutlass.range_constexpr(groups.QUEUE_SLOTS):
                    cute.arch.mbarrier_init(ring.queue.sent + slot, 1)
                    cute.arch.mbarrier_init(ring.queue.received + slot, self.consumers)
            if const_expr(split > 1):
                cute.arch.mbarrier_init(exchange.received, 1)
                if const_expr(not self.separate_exchange):
                    cute.arch.mbarrier_init(exchange.ready, (split - 1) * self.consumers)
            cute.arch.mbarrier_init_fence()
            if const_expr(split > 1 and not self.config.grouped):
                self._expect_sums(exchange, split)
        if const_expr(split > 1):
            # Waited for before the first access to another CTA.
            cute.arch.cluster_arrive_relaxed()
        cute.arch.sync_threads()

    def _expect_sums(self, exchange: Exchange, split):
        """Tells the mbarrier how many bytes of sums the other CTAs will send."""
        cute.arch.mbarrier_arrive_and_expect_tx(exchange.received, self._exchange_bytes(split))

    def _n_tiles(self, n):
        """Tiles along N, of the blocks of the weight's whole tiles."""
        return cute.ceil_div(self._row_tiles(n) * 2, self.tile_blocks)

    def _row_tiles(self, n):
        """The weight's tiles of 128 rows; of a gated weight half are gates, each half padded."""
        return cute.ceil_div(n // 2, BLOCK_N) if self.gated else cute.ceil_div(n, layout.TILE_N)

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

    def _code_offset(self):
        """Where codes start in the buffers; scales follow all codes."""
        return self.stages * self.x_bytes

    def _scale_offset(self):
        return self._code_offset() + self.stages * self.tile_blocks * CODE_BYTES

    @cute.jit
    def _produce(self, x_copy, ring: QueuedRing, call: Call):
        """The producer warp: fills the ring."""
        work, problem = call.work, call.problem
        x_to, x_from = self._x_partition(x_copy, None)
        # A weight that is read once should not push x out of the L2 cache.
        policy = Int64(ops.EVICT_NORMAL)
        if work.m_tiles == 1:
            policy = Int64(ops.EVICT_FIRST)
        base = ops.shared_address(ring.buffers)
        last_row = self._last_row_tile(problem)
        # A launch that is not programmatic would do so for nothing.
        if work.first < work.tiles and problem.x_scale_stride >= 0:
            self._prefetch_weight(call, last_row)
        cute.arch.griddepcontrol_wait()
        stage = Int32(0)
        phase = Int32(1)
        for index in cutlass.range(work.first, work.tiles, work.step, unroll=1):
            tile_x, tile_w = self._tile_coordinates(index, work.m_tiles, problem.n)
            tile = Tile(tile_w, m_tile=tile_x)
            copies = ((x_copy[0], x_from, x_to), base, last_row, policy)
            stage, phase = self._load_tile(tile, copies, ring, call, stage, phase)

    @cute.jit
    def _produce_groups(self, x_copy, ring: QueuedRing, call: Call):
        """The producer warp where rows are in groups: finds tiles, and fills the ring."""
        work, problem = call.work, call.problem
        base = ops.shared_address(ring.buffers)
        last_row = self._last_row_tile(problem)
        cute.arch.griddepcontrol_wait()
        scheduler = groups.make_scheduler(call, self.tile_m, self._n_tiles(problem.n))
        stage = Int32(0)
        phase = Int32(1)
        slot = Int32(0)
        slot_phase = Int32(1)
        rows = Int32(0)
        tiles = Int32(0)
        next_tile = work.first
        for chunk in cutlass.range(scheduler.chunks, unroll=1):
            part = groups.part_of(scheduler, chunk, rows, tiles)
            for index in cutlass.range(next_tile, part.tiles_end, work.step, unroll=1):
                found = groups.find(scheduler, part, index)
                tile_x, tile_w = self._tile_coordinates(found.index, found.m_tiles, problem.n)
                tile = Tile(tile_w, found.group, found.row + tile_x * self.tile_m, found.end)
                slot, slot_phase = groups.send_tile(ring.queue, tile, slot, slot_phase)
                policy = ops.select(
                    found.m_tiles == 1, Int64(ops.EVICT_FIRST), Int64(ops.EVICT_NORMAL)
                )
                x_to, x_from = self._x_partition(x_copy, tile.row)
                copies = ((x_copy[0], x_from, x_to), base, last_row, policy)
                stage, phase = self._load_tile(tile, copies, ring, call, stage, phase)
            next_tile = groups.after(next_tile, part.tiles_end, work.step)
            rows = part.rows_end
            tiles = part.tiles_end
        end = Tile(Int32(0), Int32(0), Int32(0), Int32(groups.NO_TILE))
        groups.send_tile(ring.queue, end, slot, slot_phase)

    def _x_partition(self, x_copy, first_row):
        """The ring's stages and the tiles of x, from a row on, as the copy takes them."""
        tma_atom, x_tensor, x_smem = x_copy
        if first_row is not None:
            x_tensor = cute.domain_offset((first_row, 0), x_tensor)
        x_tiles = cute.local_tile(x_tensor, (self.tile_m, TILE_K), (None, None))
        return cpasync.tma_partition(
            tma_atom,
            0,
            cute.make_layout(1),
            cute.group_modes(x_smem, 0, 2),
            cute.group_modes(x_tiles, 0, 2),
        )

    def _last_row_tile(self, problem):
        """The weight's last tile of 128 rows; the last tile along N may reach past it."""
        return self._row_tiles(problem.n) - 1

    @cute.jit
    def _load_tile(self, tile: Tile, copies, ring: QueuedRing, call: Call, stage, phase):
        """Loads all stages of a tile; returns the ring's state."""
        (tma_atom, x_from, x_to), base, last_row, policy = copies
        work, weight = call.work, call.weight
        m_tile = Int32(0) if tile.m_tile is None else tile.m_tile
        for i in cutlass.range(self._stage_count(tile, work.k_count), unroll=1):
            cute.arch.mbarrier_wait(ring.empty + stage, phase)
            k_tile = work.k_begin + i
            barrier = ops.shared_address(ring.full + stage)
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(ring.full + stage, self.stage_bytes)
                for part in cutlass.range_constexpr(self.tile_blocks // self.copy_blocks):
                    slot = stage * self.tile_blocks + part * self.copy_blocks
                    at = self._weight_at(tile, part, last_row, work.k_tiles, k_tile)
                    ops.bulk_load(
                        base + self._code_offset() + slot * CODE_BYTES,
                        ops.element_address(weight.w, at, CODE_BYTES),
                        Int32(self.copy_blocks * CODE_BYTES),
                        barrier,
                        policy,
                    )
                    ops.bulk_load(
                        base + self._scale_offset() + slot * SCALE_BYTES,
                        ops.element_address(weight.sfw, at, SCALE_BYTES),
                        Int32(self.copy_blocks * SCALE_BYTES),
                        barrier,
                        policy,
                    )
            # The copy through the tensor map elects a thread of its own.
            cute.copy(
                tma_atom,
                x_from[None, m_tile, k_tile],
                x_to[None, stage],
                tma_bar_ptr=ring.full + stage,
            )
            stage, phase = advance(ring, stage, phase)
        return stage, phase

    def _stage_count(self, tile: Tile, k_count):
        """Stages of a tile: none where its rows are in no group of the weight's."""
        return k_count if tile.group is None else ops.select(tile.group < 0, Int32(0), k_count)

    @cute.jit
    def _prefetch_weight(self, call: Call, last_row):
        """Asks for the first stages' part of the weight to come to the L2 cache."""
        weight, work = call.weight, call.work
        _, tile_w = self._tile_coordinates(work.first, work.m_tiles, call.problem.n)
        tile = Tile(tile_w)
        ahead = cutlass.min(work.k_count, min(STAGES_AHEAD, self.stages))
        for i in cutlass.range(ahead, unroll=1):
            with cute.arch.elect_one():
                for part in cutlass.range_constexpr(self.tile_blocks // self.copy_blocks):
                    at = self._weight_at(tile, part, last_row, work.k_tiles, work.k_begin + i)
                    ops.bulk_prefetch(
                        ops.element_address(weight.w, at, CODE_BYTES),
                        Int32(self.copy_blocks * CODE_BYTES),
                    )
                    ops.bulk_prefetch(
                        ops.element_address(weight.sfw, at, SCALE_BYTES),
                        Int32(self.copy_blocks * SCALE_BYTES),
                    )

    def _weight_at(self, tile: Tile, part, last_row, k_tiles, k_tile):
        """Where a copy's part of a tile of the weight is, in blocks."""
        block = tile.column * self.tile_blocks + part * self.copy_blocks
        row = Int64(cutlass.min(block // 2, last_row))
        if tile.group is not None:
            row += Int64(tile.group) * Int64(last_row + 1)
        at = row * Int64(k_tiles)
        return (at + Int64(k_tile)) * 2 + Int64(block % 2)

    @cute.jit
    def _consume(self, x_smem, ring: QueuedRing, exchange: Exchange, call: Call):
        """A consumer warpgroup: works through tiles."""
        work, problem = call.work, call.problem
        thread = cute.arch.thread_idx()[0]
        group = cute.arch.make_warp_uniform(thread // WARPGROUP)
        thread = thread % WARPGROUP
        tiled_mma = self._tiled_mma()
        x_fragments = tiled_mma.make_fragment_B(tiled_mma.get_slice(thread).partition_B(x_smem))
        sums = cute.make_rmem_tensor(
            tiled_mma.partition_shape_C((64 * self.blocks, self.tile_m)), Float32
        )
        tiled_mma.set(warpgroup.Field.ACCUMULATE, True)
        exponent = ops.scale_exponent(problem.n)
        k_group, row_group = group // self.row_groups, group % self.row_groups
        k_count = (work.k_count - k_group + self.k_groups - 1) // self.k_groups
        lane = Lane(thread, k_group, row_group, k_count, exponent)
        mma = (tiled_mma, sums, x_fragments)
        shared = (ring, exchange)
        stage = lane.k_group
        phase = Int32(0)
        if const_expr(self.config.grouped):
            slot = Int32(0)
            slot_phase = Int32(0)
            column, of_group, row, end = groups.receive_tile(ring.queue, slot, slot_phase)
            if const_expr(work.split > 1):
                # A cluster has one tile, or none: then no sums come, and nobody else waits.
                if end == groups.NO_TILE:
                    cute.arch.cluster_wait()
                elif cute.arch.thread_idx()[0] == 0:
                    self._expect_sums(exchange, work.split)
            while end != groups.NO_TILE:
                tile = Tile(column, of_group, row, end)
                stage, phase = self._consume_tile(tile, mma, shared, lane, call, stage, phase)
                slot ^= 1
                if slot == 0:
                    slot_phase ^= 1
                column, of_group, row, end = groups.receive_tile(ring.queue, slot, slot_phase)
        else:
            for index in cutlass.range(work.first, work.tiles, work.step, unroll=1):
                tile_x, tile_w = self._tile_coordinates(index, work.m_tiles, problem.n)
                tile = Tile(tile_w, m_tile=tile_x)
                stage, phase = self._consume_tile(tile, mma, shared, lane, call, stage, phase)

    @cute.jit
    def _consume_tile(self, tile: Tile, mma, shared, lane: Lane, call: Call, stage, phase):
        """Decodes, multiplies, and stores or leaves a tile's sums; returns the ring's state."""
        ring, exchange = shared
        work, sums = call.work, mma[1]
        split = work.split
        flat = cute.make_tensor(sums.iterator, cute.make_layout(cute.size(sums)))
        # A thread's share of the tile. What scales it is loaded before the multiplication if there
        # are registers to hold it; else after it, if possible before the sums of others come.
        octets = self._cta_octets(split)
        early = self.blocks == 1 and (self.reduces(split) or self.tile_m <= 64)
        rows_early = self.blocks == 1 and octets <= (4 if self.reduces(split) else 8)
        first_block = tile.column * self.tile_blocks + lane.row_group * self.blocks
        rows = self._rows(tile, lane, work, call.problem.m)
        place = Place(rows, first_block, lane.thread, tile.group)
        if const_expr(early):
            constants = self._constants(call, place)
        if const_expr(rows_early):
            row_scales = [self._row_scales(call, place, j) for j in range(octets)]
        sums.fill(0.0)
        stage, phase = self._multiply(
            mma, ring, lane, self._stage_count(tile, lane.k_count), stage, phase
        )
        if const_expr(not early):
            constants = self._constants(call, place)
        share = flat
        if const_expr(self.reduces(split)):
            if const_expr(not rows_early):
                row_scales = [self._row_scales(call, place, j) for j in range(octets)]
            # The only tile of this cluster.
            share = self._reduce(flat, ring, exchange, lane, work.rank, split)
        elif const_expr(not rows_early):
            row_scales = None
        self._store(share, OutputTile(place, octets, row_scales, *constants), call)
        return stage, phase

    @cute.jit
    def _multiply(self, mma, ring: QueuedRing, lane: Lane, k_count, stage, phase):
        """Adds a tile's products to the sums; returns the ring's state."""
        tiled_mma, sums, x_fragments = mma
        thread = lane.thread
        shape = tiled_mma.partition_shape_A((64 * self.blocks, 16 * self.group_steps))
        fragments = [cute.make_rmem_tensor(shape, self.dtype) for _ in range(2)]
        registers = []
        for fragment in fragments:
            words = cute.recast_tensor(fragment, Uint32)
            registers.append(cute.make_tensor(words.iterator, cute.make_layout(cute.size(words))))
        base = ops.shared_address(ring.buffers)
        lane_row = (thread // 32) * 8 + (thread % 32) // 4
        # Every lane arrives that has read: one for its warp, after a barrier of the warp, takes as
        # long. Nothing is there to release in the first round. 1 is written so that no compiler
        # knows it: it would peel that round, and compute the ring's addresses for each lane.
        releases, one = Int32(0), Int32(thread - stage < WARPGROUP)
        first = lane.row_group * self.blocks
        code_at = base + self._code_offset() + first * CODE_BYTES + thread * 16
        scale_at = base + self._scale_offset() + first * SCALE_BYTES + lane_row * 16
        last = stage
        for _ in cutlass.range(k_count, unroll=1):
            cute.arch.mbarrier_wait(ring.full + stage, phase)
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
                    ops.arrive_if(releases, ops.shared_address(ring.empty + last))
                    releases = one
                self._decode_group(registers[part % 2], part, codes, scales, lane.exponent)
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
            if stage >= ring.stages:
                stage = lane.k_group
                phase ^= 1
        warpgroup.wait_group(0)
        cute.arch.sync_warp()
        ops.arrive_if(releases, ops.shared_address(ring.empty + last))
        return stage, phase

    def _decode_group(self, registers, part, codes, scales, exponent):
        """Decodes the weights of group `part` of a stage's steps into a set of A registers."""
        bf16 = self.dtype is BFloat16
        for pair in range(self.group_steps // 2):
            p = part * (self.group_steps // 2) + pair
            word = 2 * p % 4
            for b in range(self.blocks):
                decoded = ops.decode_pair(
                    codes[b][word], codes[b][word + 1], scales[b][p], exponent, bf16
                )
                for step in range(2):
                    for r in range(4):
                        at = r + 4 * (b + self.blocks * (2 * pair + step))
                        registers[at] = decoded[step][r]


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
            host=host_function(gemm.launch),
            args=example_args(gemm.dtype, scale_alignment=16),
        )
        for config, gemm in ((config, GemmSm90(config)) for config in configs(arch))
    ]
