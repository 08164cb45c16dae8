# SPDX-License-Identifier: Apache-2.0
"""sm_120 NVFP4 GEMM for many rows: 128x128 tiles, two groups of warps that take turns.

A CTA has one producer warp, which loads stages of 128 elements of K by TMA, and two groups of four
consumer warps. The CTA's tiles alternate between the groups: while one multiplies, the other
writes its finished tile out, so that the tensor cores never wait for an epilogue.

Shared memory is a ring of stages. All k-tiles of the CTA's tiles form one sequence, stage g %
stages holds its element g, and each barrier's phase follows from g // stages:
    full[s]   the producer's expected bytes have landed
    empty[s]  the four warps that read stage s are done with it
    turn[w]   group w may start on its next tile: the other group has waited for all its stages

`turn` is more than pacing. A wait on a phase's parity is only meaningful one phase ahead; group w
starts to wait for element g once each element before g is known to have landed, hence element
g - stages of the same barrier too.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Int64, const_expr, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.kernels.gemm.arguments import Operands
from jax_nvfp4.kernels.gemm.gate import gated
from jax_nvfp4.kernels.gemm.interleaved import packed_rows
from jax_nvfp4.kernels.gemm.ring import Ring
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.arguments import Item, Place, Result, Scales, Work
from jax_nvfp4.kernels.gemm.sm120.gated import Pair, row_scale
from jax_nvfp4.kernels.gemm.sm120.persistent import Load, Persistent, scales_load, scales_tma
from jax_nvfp4.kernels.ptx import fma_to, select, shared_address

_GROUP = 128  # threads of a group
_RASTER = 16  # row tiles that are swept together along n, so that both operands stay in L2


class Pingpong(Persistent):
    """The kernel of a pingpong config; see the module."""

    threads = 3 * _GROUP  # two consumer groups, one with the producer warp

    def __init__(self, config: GemmConfig) -> None:
        if (config.tile_m, config.tile_n, config.tile_k) != (128, 128, 128):
            raise ValueError(f"{config.name}: the warps' layout is for 128x128x128 tiles")
        super().__init__(config, more_barriers=2)
        self.data_bytes, self.scale_bytes = self.loads[0].bytes, self.loads[2].bytes

    def stage_loads(self) -> tuple[Load, ...]:
        """What one stage holds: x, w, scales of x, scales of w."""
        rows = Load((128, 64), (64, 1), cutlass.Uint8, 64)
        return rows, rows, scales_load(128, 2), scales_load(128, 2)

    def coordinates(self, row, column, k_tile):
        """Which tile of each of `loads` a stage takes."""
        return (row, k_tile), (column, k_tile), (0, k_tile, row), (0, k_tile, column)

    def maps(self, operands: Operands, m, n, k_blocks):
        """(copy atom, coordinate tensor) for each of `loads`."""
        row_tiles_m = cutlass.max(cute.ceil_div(m, 128), 1)
        row_tiles_n = cutlass.max(cute.ceil_div(n, 128), 1)
        row_bytes = cute.assume(k_blocks * 32, divby=32)
        rows, _, row_scales, _ = self.loads
        return (
            rows.tma(operands.x, (cutlass.max(m, 1), row_bytes), (row_bytes, 1)),
            rows.tma(operands.w, (row_tiles_n * 128, row_bytes), (row_bytes, 1)),
            scales_tma(row_scales, operands.sfx, row_tiles_m, k_blocks),
            scales_tma(row_scales, operands.sfw, row_tiles_n, k_blocks),
        )

    def tiles(self, m, n):
        """Tiles along the rows of x and of the weight."""
        return cute.ceil_div(m, 128), cute.ceil_div(n, 128)

    @cute.kernel
    def kernel(
        self, atoms, tensors, scales: Scales, result: Result, k_tiles: Int32, split_k: Int32
    ):
        """One CTA: grid-stride over (split, tile) items; see the module."""
        ring = self.prologue(4, 4)
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 32)
        work = self.work(result, k_tiles, split_k)
        if warp >= 8:
            cute.arch.setmaxregister_decrease(40)
            if warp == 8:
                self.produce(atoms, tensors, ring, work)
        else:
            cute.arch.setmaxregister_increase(232)
            self.consume(ring, work, scales, result)

    @cute.jit
    def item(self, index: Int32, work: Work):
        """Item `index` of the grid."""
        per_split = work.rows * work.columns
        split = index // per_split
        tile = index - split * per_split
        sweep = tile // (_RASTER * work.columns)
        first = sweep * _RASTER
        rows = cutlass.min(work.rows - first, _RASTER)
        tile = tile - first * work.columns
        begin = split * work.k_tiles // work.split_k
        end = (split + 1) * work.k_tiles // work.split_k
        return Item(first + tile % rows, tile // rows, split, begin, end - begin)

    def addresses(self, base, warp, lane):
        """The lane's shared-memory addresses in stage 0, for each of `loads`.

        A row's 16-byte chunk c is at c ^ (row // 2 % 4): TMA's 64-byte swizzle.
        """
        q, t = lane // 4, lane % 4
        # The warp's 64x64 part of the tile.
        warp_m, warp_n = warp % 2, warp // 2
        swizzle = lane // 2 % 4
        a_address = base + (64 * warp_m + lane % 16) * 64 + ((lane // 16) ^ swizzle) * 16
        base += self.stages * self.data_bytes
        b_row = 64 * warp_n + lane % 8 + lane // 16 * 8
        b_address = base + b_row * 64 + ((lane // 8 % 2) ^ swizzle) * 16
        base += self.stages * self.data_bytes
        sfa_address = base + (8 * t + q) * 16 + 8 * warp_m
        base += self.stages * self.scale_bytes
        sfb_address = base + (8 * t + q) * 16 + 8 * warp_n
        return a_address, b_address, sfa_address, sfb_address

    @cute.jit
    def consume(self, ring: Ring, work: Work, scales: Scales, result: Result):
        """A consumer warp: every other item, from its own place in the sequence of stages."""
        thread = cute.arch.thread_idx()[0]
        group = cute.arch.make_warp_uniform(thread // _GROUP)
        warp = cute.arch.make_warp_uniform(thread % _GROUP // 32)
        lane = thread % 32
        q, t = lane // 4, lane % 4
        warp_m, warp_n = warp % 2, warp // 2
        addresses = self.addresses(shared_address(ring.buffers), warp, lane)

        # An MMA's four registers side by side: the compiler keeps neighbors in register pairs.
        layout = cute.make_layout((4, 8, 4), stride=(32, 4, 1))
        accumulators = cute.make_rmem_tensor(layout, Float32)
        # Two of each operand: one is multiplied while the other is loaded. a: a row block of
        # 16; b and the scales: 64 of K, half a stage.
        fragments = [
            [cute.make_rmem_tensor(shape, Int32) for _ in range(2)]
            for shape in ((4,), (8, 2), (2,), (2,))
        ]

        before = Int32(0)  # k-tiles of the CTA's items before this group's current one
        turn_parity = group ^ 1  # group 0 does not wait for its first turn
        grid = cute.arch.grid_dim()[0]
        total = work.items
        index = cute.arch.block_idx()[0]
        if group == 1:
            before += self.item(index, work).k_count
            index += grid
        turns = ring.empty + self.stages
        my_turn = turns + group
        next_turn = turns + (group ^ 1)
        while index < total:
            item = self.item(index, work)
            count = item.k_count
            accumulators.fill(0.0)
            stage = before % self.stages
            parity = before // self.stages % 2
            cute.arch.mbarrier_wait(my_turn, turn_parity)
            turn_parity = turn_parity ^ 1
            if count > 0:
                cute.arch.mbarrier_wait(ring.full + stage, parity)
                self.load_a(fragments, addresses, stage, 0)
                for i in cutlass.range_constexpr(4):
                    self.load_b(fragments, addresses, stage, 0, i)
                for i in cutlass.range(count, unroll=1):
                    # The last time round the loads ahead have nothing to load; they read this
                    # stage again, which is still the warp's, and nobody uses what they read.
                    following = stage
                    if i + 1 < count:
                        following = stage + 1
                        if following == self.stages:
                            following = Int32(0)
                            parity = parity ^ 1
                    ready = cute.arch.mbarrier_test_wait(ring.full + following, parity)
                    self.multiply_half(accumulators, fragments, addresses, (stage, 0), (stage, 1))
                    if not ready:
                        cute.arch.mbarrier_wait(ring.full + following, parity)
                    if i + 1 == count and lane == 0:
                        # The other group starts under the last MMAs of this one.
                        cute.arch.mbarrier_arrive(next_turn)
                    self.multiply_half(
                        accumulators, fragments, addresses, (stage, 1), (following, 0)
                    )
                    cute.arch.sync_warp()
                    if lane == 0:
                        cute.arch.mbarrier_arrive(ring.empty + stage)
                    stage = following
            elif lane == 0:
                cute.arch.mbarrier_arrive(next_turn)
            before += count
            if index + grid < total:
                before += self.item(index + grid, work).k_count
            index += 2 * grid
            place = Place(
                item.row * 128 + 64 * warp_m + q,
                item.column * 128 + 64 * warp_n + 2 * t,
                item.split,
                work.split_k > 1,
                t,
            )
            if const_expr(self.gated):
                self.store_gated(accumulators, place, scales, result)
            else:
                self.store(accumulators, place, scales, result)

    def load_a(self, fragments, addresses, stage, step):
        """Loads row block `step % 4` of half `step // 4` of a stage, for that step."""
        half, block = divmod(step, 4)
        # Chunks 0, 1 and 2, 3 of a row are the halves; the swizzle is an xor, so 2 is bit 5.
        address = (addresses[0] + stage * self.data_bytes) ^ (32 * half)
        for i, register in enumerate(ops.ldmatrix_x4(address + block * 16 * 64)):
            fragments[0][block % 2][i] = register

    def load_b(self, fragments, addresses, stage, half, quarter):
        """Loads a quarter of the columns' operands of half a stage; with the first, the scales."""
        b, sfa, sfb = (buffers[half] for buffers in fragments[1:])
        if quarter == 0:
            offset = stage * self.scale_bytes + 512 * half
            for scales, address in ((sfa, addresses[2]), (sfb, addresses[3])):
                for i, register in enumerate(ops.load_shared_x2(address + offset)):
                    scales[i] = register
        address = (addresses[1] + stage * self.data_bytes) ^ (32 * half)
        for i, register in enumerate(ops.ldmatrix_x4(address + quarter * 16 * 64)):
            b[2 * quarter + i // 2, i % 2] = register

    def multiply_half(self, accumulators, fragments, addresses, now, then):
        """Multiplies 64 of K, 32 MMAs, and loads what the next 64 need meanwhile.

        Args:
            accumulators: Float32 (4, 8, 4).
            fragments: see `consume`; the operands of `now` but for row blocks 1..3 are loaded.
            addresses: the lane's shared-memory addresses in stage 0.
            now: (stage, half) to multiply.
            then: (stage, half) to load.
        """
        stage, half = now
        b, sfa, sfb = (buffers[half] for buffers in fragments[1:])
        for block in range(4):
            if block < 3:
                self.load_a(fragments, addresses, stage, 4 * half + block + 1)
            else:
                self.load_a(fragments, addresses, then[0], 4 * then[1])
            self.load_b(fragments, addresses, *then, block)
            a = fragments[0][block % 2]
            for j in range(8):
                d = ops.mma_nvfp4(
                    [accumulators[block, j, e] for e in range(4)],
                    [a[e] for e in range(4)],
                    [b[j, e] for e in range(2)],
                    sfa[block // 2],
                    sfb[j // 4],
                    block % 2,
                    j % 4,
                )
                for e in range(4):
                    accumulators[block, j, e] = d[e]

    @cute.jit
    def store(self, accumulators, place: Place, scales: Scales, result: Result):
        """The epilogue of a warp's 64x64 part.

        Args:
            accumulators: Float32 (4, 8, 4).
            place: which these are.
            scales: what is applied to them.
            result: where they go.
        """
        m, n, out_dtype = result.m, result.n, result.out_dtype
        # Out of range rows and columns read the last one's scale and are not stored.
        w_values = cute.make_rmem_tensor((8, 2), Float32)
        b_values = cute.make_rmem_tensor((8, 2), Float32)
        w_values.fill(1.0)
        b_values.fill(0.0)
        if not place.partial:
            for j in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    column = cutlass.min(place.column + 8 * j + e, n - 1)
                    w_values[j, e] = ops.load_global(scales.w, column * scales.w_stride)
            self.load_bias(
                b_values, scales, lambda j, e: cutlass.min(place.column + 8 * j + e, n - 1)
            )
        # Parts are stored to the end of their padded rows, which `Reduce` reads whole.
        ld = n
        address = result.y.toint()
        if place.partial:
            ld = cute.round_up(n, 4)
            address = result.scratch.toint() + Int64(place.split) * m * ld * 4
        for i in cutlass.range_constexpr(8):
            row = place.row + 8 * i
            alpha = Float32(1.0)
            if not place.partial and scales.x_stride >= 0:
                alpha = ops.load_global(scales.x, cutlass.min(row, m - 1) * scales.x_stride)
            for j in cutlass.range_constexpr(8):
                for e in cutlass.range_constexpr(2):
                    d = accumulators[i // 2, j, 2 * (i % 2) + e]
                    accumulators[i // 2, j, 2 * (i % 2) + e] = fma_to(
                        alpha * w_values[j, e], d, b_values[j, e], out_dtype
                    )
        if out_dtype == 0 or place.partial:
            self.store_f32(accumulators, place, address, m, ld, 8)
        else:
            self.store_16(accumulators, place, address, m, n, out_dtype == 1, 8)

    @cute.jit
    def store_gated(self, accumulators, place: Place, scales: Scales, result: Result):
        """The same for a gated weight: blocks 2*j and 2*j + 1 of 8 columns are gates and their ups.

        Once the gates and ups are one, a warp has 64x32 columns of y, in blocks j.
        """
        m, n, out_dtype = result.m, result.n, result.out_dtype
        if place.partial:
            ld = packed_rows(n)
            address = result.scratch.toint() + Int64(place.split) * m * ld * 4
            self.store_f32(accumulators, place, address, m, ld, 8)
        else:
            half = n // 2
            first = (place.column + 2 * place.quad_lane) // 2
            outputs = Place(place.row, first, place.split, place.partial, place.quad_lane)
            w_values, b_values = self.gated_constants(scales, first, n)
            for i in cutlass.range_constexpr(8):
                x_value = row_scale(scales, cutlass.min(place.row + 8 * i, m - 1))
                for j in cutlass.range_constexpr(4):
                    for e in cutlass.range_constexpr(2):
                        halves = [
                            (
                                x_value * w_values[2 * j + up, e],
                                accumulators[i // 2, 2 * j + up, 2 * (i % 2) + e],
                                b_values[2 * j + up, e],
                            )
                            for up in range(2)
                        ]
                        value = gated(*halves, scales.activation)
                        accumulators[i // 2, j, 2 * (i % 2) + e] = value
            address = result.y.toint()
            if out_dtype == 0:
                self.store_f32(accumulators, outputs, address, m, half, 4)
            else:
                self.store_16(accumulators, outputs, address, m, half, out_dtype == 1, 4)

    @cute.jit
    def gated_constants(self, scales: Scales, first: Int32, n: Int32):
        """Scales and biases of the lane's gates (rows 2*j) and ups (2*j + 1): (8, 2) both.

        Columns that are padding get the last one's, and are not stored.
        """
        half = n // 2
        w_values = cute.make_rmem_tensor((8, 2), Float32)
        b_values = cute.make_rmem_tensor((8, 2), Float32)
        b_values.fill(0.0)
        for j in cutlass.range_constexpr(4):
            for e in cutlass.range_constexpr(2):
                pair = Pair(cutlass.min(first + 8 * j + e, half - 1), n)
                for up in cutlass.range_constexpr(2):
                    row = pair.packed[up]
                    w_values[2 * j + up, e] = ops.load_global(scales.w, row * scales.w_stride)
        self.load_bias(
            b_values,
            scales,
            lambda block, e: cutlass.min(first + 8 * (block // 2) + e, half - 1) + block % 2 * half,
        )
        return w_values, b_values

    @cute.jit
    def load_bias(self, values, scales: Scales, column_of: cutlass.Constexpr):
        """Fills `values` (8, 2) with the bias of columns, by (block, e), unless there is none."""
        for code, dtype in ((0, Float32), (1, cutlass.BFloat16), (2, cutlass.Float16)):
            if scales.bias_dtype == code:
                typed = cute.recast_ptr(scales.bias, dtype=dtype)
                for j in cutlass.range_constexpr(8):
                    for e in cutlass.range_constexpr(2):
                        values[j, e] = Float32(ops.load_global(typed, column_of(j, e)))

    @cute.jit
    def store_f32(
        self, accumulators, place: Place, address: Int64, m, n, blocks: cutlass.Constexpr[int]
    ):
        """Stores Float32 rows of length `n`: a quad's 32 bytes, one sector, at a time."""
        first_column = place.column
        paired = n % 2 == 0
        for i in cutlass.range_constexpr(8):
            row = place.row + 8 * i
            if row < m:
                start = address + (Int64(row) * n + first_column) * 4
                for j in cutlass.range_constexpr(blocks):
                    pair = [accumulators[i // 2, j, 2 * (i % 2) + e] for e in range(2)]
                    column = first_column + 8 * j
                    if column < n:
                        if paired:
                            ops.store_global(start + 32 * j, pair, Float32)
                        else:
                            ops.store_global(start + 32 * j, pair[:1], Float32)
                            if column + 1 < n:
                                ops.store_global(start + 32 * j + 4, pair[1:], Float32)

    @cute.jit
    def store_16(
        self,
        accumulators,
        place: Place,
        address: Int64,
        m: Int32,
        n: Int32,
        bf16: Boolean,
        blocks: cutlass.Constexpr[int],
    ):
        """Stores bf16 or f16 rows: a quad 64 contiguous bytes of a row where rows are aligned."""
        first_column, t = place.column, place.quad_lane
        for i in cutlass.range_constexpr(8):
            row = place.row + 8 * i
            words = []
            for j in cutlass.range_constexpr(blocks):
                pair = [accumulators[i // 2, j, 2 * (i % 2) + e] for e in range(2)]
                words.append(select(bf16, ops.pack_bf16x2(*pair), ops.pack_f16x2(*pair)))
            start = address + (Int64(row) * n + first_column) * 2
            if n % 8 == 0:
                # Lane t gets the 8 columns of block 4*g + t, 16 bytes of its row.
                for g in cutlass.range_constexpr(blocks // 4):
                    chunk = ops.transpose_quad(words[4 * g : 4 * g + 4], t)
                    column = first_column - 2 * t + 32 * g + 8 * t
                    if row < m and column < n:
                        ops.store_global(start + 64 * g + 12 * t, chunk, Int32)
            elif row < m:
                for j in cutlass.range_constexpr(blocks):
                    for e in cutlass.range_constexpr(2):
                        if first_column + 8 * j + e < n:
                            half = cutlass.Int16(words[j] >> (16 * e))
                            ops.store_global(start + 16 * j + 2 * e, [half], cutlass.Int16)
