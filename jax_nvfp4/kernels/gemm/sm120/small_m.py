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

Of a gated weight 8 gates and their 8 ups follow one another, so that rows q and q + 8 of the MMA,
which one lane holds, are a gate and its up.
"""

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.kernels.gemm.arguments import Operands
from jax_nvfp4.kernels.gemm.interleaved import output_of, packed_rows
from jax_nvfp4.kernels.gemm.ring import Ring, advance
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.arguments import Item, Place, Result, Scales, Work
from jax_nvfp4.kernels.gemm.sm120.gated import Pair, activated, row_scale
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

    def maps(self, operands: Operands, m, n, k_blocks):
        """(copy atom, coordinate tensor) for each of `loads`."""
        row_bytes = cute.assume(k_blocks * 32, divby=32)
        row_tiles_m = cutlass.max(cute.ceil_div(m, 128), 1)
        row_tiles_n = cutlass.max(cute.ceil_div(n, 128), 1)
        rows, _, row_scales, w_scales = self.loads
        return (
            rows.tma(operands.x, (cutlass.max(m, 1), row_bytes), (row_bytes, 1)),
            weight_tma(operands.w, row_tiles_n, row_bytes),
            scales_tma(row_scales, operands.sfx, row_tiles_m, k_blocks),
            scales_tma(w_scales, operands.sfw, row_tiles_n, k_blocks),
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

    def tiles(self, m, n):
        """Tiles along the rows of x and of the weight."""
        return cute.ceil_div(m, self.tile_m), 2 * cute.ceil_div(n, 128)

    @cute.kernel
    def kernel(
        self, atoms, tensors, scales: Scales, result: Result, k_tiles: Int32, split_k: Int32
    ):
        """One CTA: grid-stride over (split, tile) items; see the module."""
        ring = self.prologue(_CONSUMERS, 0)
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 32)
        work = self.work(result, k_tiles, split_k)
        if warp == _CONSUMERS:
            self.produce(atoms, tensors, ring, work)
        else:
            self.consume(ring, work, scales, result)

    @cute.jit
    def item(self, index: Int32, work: Work):
        """Item `index` of the grid.

        Row tiles run fastest: the CTAs that share a weight tile read it together, once from
        memory.
        """
        rest = index // work.rows
        split = rest // work.columns
        begin = split * work.k_tiles // work.split_k
        end = (split + 1) * work.k_tiles // work.split_k
        row, column = index - rest * work.rows, rest - split * work.columns
        return Item(row, column, split, begin, end - begin)

    @cute.jit
    def consume(self, ring: Ring, work: Work, scales: Scales, result: Result):
        """A consumer warp: 16 rows of the weight, all rows of x of the tile."""
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)
        lane = thread % 32
        bases = [shared_address(ring.buffers)]
        for load in self.loads:
            bases.append(bases[-1] + self.stages * load.bytes)
        stage_0 = self.addresses(bases, warp, lane)
        layout = cute.make_layout((self.blocks, 4), stride=(4, 1))
        accumulators = cute.make_rmem_tensor(layout, Float32)
        stage = Int32(0)
        parity = Int32(0)
        grid = cute.arch.grid_dim()[0]
        total = work.items
        index = cute.arch.block_idx()[0]
        while index < total:
            item = self.item(index, work)
            accumulators.fill(0.0)
            addresses = self.item_addresses(stage_0, item.row)
            rows = result.m - item.row * self.tile_m
            for _ in cutlass.range(item.k_count, unroll=1):
                cute.arch.mbarrier_wait(ring.full + stage, parity)
                fragments = self.load(self.stage_addresses(addresses, stage))
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(ring.empty + stage)
                self.multiply(accumulators, fragments, rows)
                stage, parity = advance(ring, stage, parity)
            self.finish(accumulators)
            column = item.column // 2 * 128 + 32 * warp + item.column % 2 * 16 + lane // 4
            row = item.row * self.tile_m + lane % 4 * 2
            place = Place(row, column, item.split, work.split_k > 1)
            if const_expr(self.gated):
                self.store_gated(accumulators, place, scales, result)
            else:
                self.store(accumulators, place, scales, result)
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
    def store(self, accumulators, place: Place, scales: Scales, result: Result):
        """The epilogue: y is small here, so each element is stored by itself.

        Args:
            accumulators: Float32 (blocks, 4).
            place: which these are.
            scales: what is applied to them.
            result: where they go.
        """
        m, n, out_dtype = result.m, result.n, result.out_dtype
        # Parts are stored to the end of their padded rows, which `Reduce` reads whole.
        columns = n
        if place.partial:
            columns = cute.round_up(n, 4)
        for half in cutlass.range_constexpr(2):
            column = place.column + 8 * half
            if column < columns:
                w_value = Float32(1.0)
                added = Float32(0.0)
                if not place.partial:
                    w_value = ops.load_global(scales.w, column * scales.w_stride)
                    added = ops.load_bias(scales.bias, scales.bias_dtype, column)
                for j in cutlass.range_constexpr(self.blocks):
                    for e in cutlass.range_constexpr(2):
                        row = place.row + 8 * j + e
                        value = accumulators[j, 2 * half + e]
                        if row < m:
                            if place.partial:
                                element = (Int64(place.split) * m + row) * columns + column
                                ops.store_output(
                                    result.scratch.toint() + element * 4, value, Int32(0)
                                )
                            else:
                                alpha = w_value
                                if scales.x_stride >= 0:
                                    x_value = ops.load_global(scales.x, row * scales.x_stride)
                                    alpha = x_value * w_value
                                width = Int64(4)
                                if out_dtype != 0:
                                    width = Int64(2)
                                address = result.y.toint() + (Int64(row) * n + column) * width
                                value = fma_to(alpha, value, added, out_dtype)
                                ops.store_output(address, value, out_dtype)

    @cute.jit
    def store_gated(self, accumulators, place: Place, scales: Scales, result: Result):
        """The epilogue of a gated weight; the arguments are those of `store`."""
        n, out_dtype = result.n, result.out_dtype
        output = output_of(place.column)
        if place.partial:
            ld = packed_rows(n)
            start = result.scratch.toint() + (Int64(place.split) * result.m * ld + place.column) * 4
            for j in cutlass.range_constexpr(self.blocks):
                for e in cutlass.range_constexpr(2):
                    row = place.row + 8 * j + e
                    if row < result.m:
                        for half in cutlass.range_constexpr(2):
                            address = start + (Int64(row) * ld + 8 * half) * 4
                            ops.store_global(address, [accumulators[j, 2 * half + e]], Float32)
        elif output < n // 2:
            constants = Pair(output, n).constants(scales)
            width = Int64(4)
            if out_dtype != 0:
                width = Int64(2)
            for j in cutlass.range_constexpr(self.blocks):
                for e in cutlass.range_constexpr(2):
                    row = place.row + 8 * j + e
                    if row < result.m:
                        sums = [accumulators[j, 2 * half + e] for half in range(2)]
                        value = activated(sums, row_scale(scales, row), constants, scales)
                        address = result.y.toint()
                        address += (Int64(row) * (n // 2) + output) * width
                        ops.store_output(address, value, out_dtype)
