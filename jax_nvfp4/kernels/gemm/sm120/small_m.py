# SPDX-License-Identifier: Apache-2.0
"""sm_120 NVFP4 GEMM for few rows: reads the weight at the memory's rate, operands swapped.

The weight is the MMA's A operand (16 rows at a time) and x its B operand (8 rows at a time), so
that 1 to 16 or 64 rows of x waste little. A CTA computes 64 rows of the weight against `tile_m`
rows of x with four consumer warps, each 16 rows of the weight over all of K: nothing is summed
across warps. A producer warp keeps nearly all of the shared memory full of stages of 256 elements
of K in flight, across the boundaries of the CTA's tiles.

The 64 weight rows of tile 2*b + h are 128*b + 32*j + 16*h + i, j = 0..3, i = 0..15: in the 128x4
order the scales of these rows are 256 contiguous bytes of each 512, so that only scales that are
used are read. Warp j takes rows 32*j.
"""

import cutlass
from cuda.bindings import driver as cuda
from cutlass import Float32, Int32, Int64, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.persistent import Load, Persistent, scales_load, scales_tma
from jax_nvfp4.kernels.ptx import fma_to, shared_address

_CONSUMERS = 4  # warps
ROW_BYTES = 128  # of packed codes in a stage: 256 elements


WEIGHT = Load((16, 4, ROW_BYTES), (ROW_BYTES, 16 * ROW_BYTES, 1), cutlass.Uint8, ROW_BYTES)
WEIGHT_SCALES = scales_load(64, 4)


def weight_tma(w, row_tiles, row_bytes):
    """TMA of 16 rows out of each of 4 groups of 32."""
    stride = (row_bytes, Int64(row_bytes) * 32, 1)
    return WEIGHT.tma(w, (32, row_tiles * 4, row_bytes), stride)


class SmallM(Persistent):
    """The kernel of a small_m config; see the module."""

    threads = 32 * (_CONSUMERS + 1)

    def __init__(self, config: GemmConfig) -> None:
        if config.tile_n != 64 or config.tile_k != 256 or config.tile_m not in (16, 64):
            raise ValueError(f"{config.name}: the warps' layout is for 16 or 64 x 64 x 256 tiles")
        self.tile_m = config.tile_m
        self.blocks = config.tile_m // 8  # column blocks of the MMA
        self.scale_rows = min(config.tile_m, 32)  # rows of 32 of x's scale tiles that are loaded
        super().__init__(config)

    def stage_loads(self) -> tuple[Load, ...]:
        """What one stage holds: x, w, scales of x, scales of w."""
        rows = Load((self.tile_m, ROW_BYTES), (ROW_BYTES, 1), cutlass.Uint8, ROW_BYTES)
        return rows, WEIGHT, scales_load(4 * self.scale_rows, 4), WEIGHT_SCALES

    def maps(self, operands, m, n, k_blocks):
        """(copy atom, coordinate tensor) for each of `loads`."""
        x, sfx, w, sfw = operands
        row_bytes = cute.assume(k_blocks * 32, divby=32)
        row_tiles_m = cutlass.max(cute.ceil_div(m, 128), 1)
        row_tiles_n = cutlass.max(cute.ceil_div(n, 128), 1)
        rows, _, row_scales, w_scales = self.loads
        return (
            rows.tma(x, (cutlass.max(m, 1), row_bytes), (row_bytes, 1)),
            weight_tma(w, row_tiles_n, row_bytes),
            scales_tma(row_scales, sfx, row_tiles_m, k_blocks),
            scales_tma(w_scales, sfw, row_tiles_n, k_blocks),
        )

    def coordinates(self, row, column, k_tile):
        """Which tile of each of `loads` a stage takes."""
        first = row * self.tile_m
        return (
            (row, k_tile),
            (column % 2, column // 2, k_tile),
            (first % 32 // self.scale_rows, k_tile, first // 128),
            (column % 2, k_tile, column // 2),
        )

    @cute.jit
    def launch(
        self,
        operands,
        scales,
        out,
        k: Int32,
        split_k: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        """Encodes the tensor maps and launches.

        Args:
            operands: (x, sfx, w, sfw), pointers.
            scales: (x_scale, stride, w_scale, stride, bias, bias_dtype).
            out: (y, scratch, m, n, out_dtype).
            k: the reduction length.
            split_k: ways to split it.
            num_sms: CTAs at most.
            stream: where to launch.
        """
        _, _, m, n, _ = out
        # A tensor map has no empty mode. Of an empty problem no tile is ever loaded.
        k_blocks = cutlass.max(cute.ceil_div(k, 64), 1)
        maps = self.maps(operands, m, n, k_blocks)
        total = cute.ceil_div(m, self.tile_m) * 2 * cute.ceil_div(n, 128) * split_k
        self.kernel(
            tuple(atom for atom, _ in maps),
            tuple(tensor for _, tensor in maps),
            scales,
            out,
            cute.ceil_div(k, 256),
            split_k,
        ).launch(
            grid=(cutlass.max(cutlass.min(total, num_sms), 1), 1, 1),
            block=(self.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, atoms, maps, scales, out, k_tiles: Int32, split_k: Int32):
        """One CTA: grid-stride over (split, tile) items; see the module."""
        shared, barriers = self.prologue(_CONSUMERS, 0)
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 32)
        tiles = (cute.ceil_div(out[2], self.tile_m), 2 * cute.ceil_div(out[3], 128))
        if warp == _CONSUMERS:
            self.produce(atoms, maps, shared, barriers, tiles, k_tiles, split_k)
        else:
            self.consume(shared, barriers, tiles, k_tiles, split_k, scales, out)

    @cute.jit
    def item(self, index: Int32, tiles, k_tiles: Int32, split_k: Int32):
        """Item `index` of the grid: (row tile, weight tile, split, first k-tile, k-tiles).

        Row tiles run fastest: the CTAs that share a weight tile read it together, once from
        memory.
        """
        rest = index // tiles[0]
        split = rest // tiles[1]
        begin = split * k_tiles // split_k
        end = (split + 1) * k_tiles // split_k
        return index - rest * tiles[0], rest - split * tiles[1], split, begin, end - begin

    @cute.jit
    def consume(self, shared, barriers, tiles, k_tiles: Int32, split_k: Int32, scales, out):
        """A consumer warp: 16 rows of the weight, all rows of x of the tile."""
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)
        lane = thread % 32
        bases = [shared_address(shared)]
        for load in self.loads:
            bases.append(bases[-1] + self.stages * load.bytes)
        stage_0 = self.addresses(bases, warp, lane)
        layout = cute.make_layout((self.blocks, 4), stride=(4, 1))
        accumulators = cute.make_rmem_tensor(layout, Float32)
        stage = Int32(0)
        parity = Int32(0)
        grid = cute.arch.grid_dim()[0]
        total = tiles[0] * tiles[1] * split_k
        index = cute.arch.block_idx()[0]
        while index < total:
            row, column, split, _, count = self.item(index, tiles, k_tiles, split_k)
            accumulators.fill(0.0)
            addresses = self.item_addresses(stage_0, row)
            rows = out[2] - row * self.tile_m
            for _ in cutlass.range(count, unroll=1):
                cute.arch.mbarrier_wait(barriers + stage, parity)
                fragments = self.load(self.stage_addresses(addresses, stage))
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(barriers + self.stages + stage)
                self.multiply(accumulators, fragments, rows)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
            self.finish(accumulators)
            first_n = column // 2 * 128 + 32 * warp + column % 2 * 16 + lane // 4
            self.store(
                accumulators,
                (row * self.tile_m + lane % 4 * 2, first_n),
                (split, split_k > 1),
                scales,
                out,
            )
            index += grid

    def addresses(self, bases, warp, lane):
        """The lane's shared-memory addresses in stage 0, for each of `loads`.

        A row's 16-byte chunk c is at c ^ (row % 8): TMA's 128-byte swizzle. The xor with the
        number of the 64 elements comes with the load.
        """
        q, t = lane // 4, lane % 4
        x_row = lane % 8 + lane // 16 * 8
        w_row = 16 * warp + lane % 16
        # Lanes t = 0, 1 hold the weight's scales for even 64s of K, t = 2, 3 those for odd ones:
        # selectors 0 and 1.
        sfw = bases[3] + t // 2 * 256 + (q + 8 * (t % 2)) * 16 + 4 * warp
        if self.tile_m == 16:
            # Likewise: lane t holds row block t % 2 of the t // 2-th 64 of K.
            sfx = bases[2] + t // 2 * 256 + (q + 8 * (t % 2)) * 16
        else:
            sfx = bases[2] + (8 * t + q) * 16
        return (
            bases[0] + x_row * ROW_BYTES + ((lane // 8 % 2) ^ (lane % 8)) * 16,
            bases[1] + w_row * ROW_BYTES + ((lane // 16) ^ (lane % 8)) * 16,
            sfx,
            sfw,
        )

    def item_addresses(self, addresses, row):
        """The addresses for row tile `row`: its scales are in one of 4 groups of 32 rows."""
        x, w, sfx, sfw = addresses
        return x, w, sfx + 4 * (row * self.tile_m % 128 // 32), sfw

    def stage_addresses(self, addresses, stage):
        """The addresses of stage 0 moved to `stage`."""
        pairs = zip(addresses, self.loads, strict=True)
        return [address + stage * load.bytes for address, load in pairs]

    def load(self, addresses):
        """Loads a warp's operands of a stage, 4 x 64 of K: lists of registers, one for each 64."""
        x_address, w_address, sfx_address, sfw_address = addresses
        a, b, sfx = [], [], []
        for i in range(4):
            a.append(ops.ldmatrix_x4(w_address ^ (32 * i)))
            registers = []
            for j in range(self.blocks // 2):
                address = (x_address ^ (32 * i)) + j * 16 * ROW_BYTES
                registers += ops.ldmatrix_x4(address)
            b.append(registers)
        # One load holds the weight's scales of two 64s of K.
        sfw = [ops.load_shared(sfw_address + 512 * (i // 2)) for i in (0, 2)]
        if self.tile_m == 16:
            sfx = [ops.load_shared(sfx_address + 512 * (i // 2)) for i in (0, 2)]
        else:
            sfx = [ops.load_shared_x2(sfx_address + 512 * i) for i in range(4)]
        return a, b, sfw, sfx

    def multiply(self, accumulators, fragments, _rows):
        """Adds the product of a stage, in K's order."""
        a, b, sfw, sfx = fragments
        for i in range(4):
            for j in range(self.blocks):
                if self.tile_m == 16:
                    scale, selector = sfx[i // 2], 2 * (i % 2) + j
                else:
                    scale, selector = sfx[i][j // 4], j % 4
                d = ops.mma_nvfp4(
                    [accumulators[j, e] for e in range(4)],
                    a[i],
                    b[i][2 * j : 2 * j + 2],
                    sfw[i // 2],
                    scale,
                    i % 2,
                    selector,
                )
                for e in range(4):
                    accumulators[j, e] = d[e]

    def finish(self, accumulators):
        """What is left to do to the sums: nothing."""

    @cute.jit
    def store(self, accumulators, place, split, scales, out):
        """The epilogue: y is small here, so each element is stored by itself.

        Args:
            accumulators: Float32 (blocks, 4).
            place: (first row of x of the lane, its first row of the weight).
            split: (this item's split, whether there are partial sums to leave in scratch).
            scales: (x_scale, stride, w_scale, stride, bias, bias_dtype).
            out: (y, scratch, m, n, out_dtype).
        """
        first_row, first_column = place
        which, partial = split
        x_scale, x_stride, w_scale, w_stride, bias, bias_dtype = scales
        y, scratch, m, n, out_dtype = out
        # Parts are stored to the end of their padded rows, which `Reduce` reads whole.
        columns = n
        if partial:
            columns = cute.round_up(n, 4)
        for half in cutlass.range_constexpr(2):
            column = first_column + 8 * half
            if column < columns:
                w_value = Float32(1.0)
                added = Float32(0.0)
                if not partial:
                    w_value = ops.load_global(w_scale, column * w_stride)
                    added = ops.load_bias(bias, bias_dtype, column)
                for j in cutlass.range_constexpr(self.blocks):
                    for e in cutlass.range_constexpr(2):
                        row = first_row + 8 * j + e
                        value = accumulators[j, 2 * half + e]
                        if row < m:
                            if partial:
                                element = (Int64(which) * m + row) * columns + column
                                ops.store_output(scratch.toint() + element * 4, value, Int32(0))
                            else:
                                alpha = w_value
                                if x_stride >= 0:
                                    alpha = ops.load_global(x_scale, row * x_stride) * w_value
                                width = Int64(4)
                                if out_dtype != 0:
                                    width = Int64(2)
                                address = y.toint() + (Int64(row) * n + column) * width
                                value = fma_to(alpha, value, added, out_dtype)
                                ops.store_output(address, value, out_dtype)
