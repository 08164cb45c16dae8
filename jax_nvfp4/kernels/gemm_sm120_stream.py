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
from cutlass.cute.nvgpu import cpasync

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.config.sm120 import SHARED_BYTES
from jax_nvfp4.kernels import gemm_sm120_ops as ops

_CONSUMERS = 4  # warps
_ROW_BYTES = 128  # of a stage: 256 elements


class Stream:
    """The kernel of a stream config; see the module."""

    threads = 32 * (_CONSUMERS + 1)

    def __init__(self, config: GemmConfig) -> None:
        if config.tile_n != 64 or config.tile_k != 256 or config.tile_m not in (16, 64):
            raise ValueError(f"{config.name}: the warps' layout is for 16 or 64 x 64 x 256 tiles")
        self.stages = config.stages
        self.tile_m = config.tile_m
        self.blocks = config.tile_m // 8  # column blocks of the MMA
        # Of x's scale tile, rows of 32 that are loaded, and 32-bit scales used of their 16 bytes.
        self.scale_rows = min(config.tile_m, 32)
        self.w_bytes = 64 * _ROW_BYTES
        self.x_bytes = self.tile_m * _ROW_BYTES
        self.sfw_bytes = 4 * 16 * 16
        self.sfx_bytes = 4 * 16 * self.scale_rows
        self.stage_bytes = self.w_bytes + self.x_bytes + self.sfw_bytes + self.sfx_bytes
        self.shared_bytes = self.stages * (self.stage_bytes + 16)
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{config.name}: {self.shared_bytes} bytes of shared memory")

    @cute.jit
    def launch(
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
        """Encodes the tensor maps and launches; arguments as in the GEMM's host function."""
        # A tensor map has no empty mode. Of an empty problem no tile is ever loaded.
        k_blocks = cutlass.max(cute.ceil_div(k, 64), 1)
        row_tiles_n = cutlass.max(cute.ceil_div(n, 128), 1)
        row_bytes = cute.assume(k_blocks * 32, divby=32)
        tma_x = ops.tma_data(x, cutlass.max(m, 1), row_bytes, self.tile_m, _ROW_BYTES)
        tma_w = self.tma_weight(w, row_tiles_n, row_bytes)
        tma_sfx = ops.tma_scales(
            sfx, cutlass.max(cute.ceil_div(m, 128), 1), k_blocks, 4 * self.scale_rows, 4
        )
        tma_sfw = ops.tma_scales(sfw, row_tiles_n, k_blocks, 64, 4)
        total = cute.ceil_div(m, self.tile_m) * 2 * cute.ceil_div(n, 128) * split_k
        self.kernel(
            *tma_x[:2],
            *tma_w,
            *tma_sfx[:2],
            *tma_sfw[:2],
            x_scale,
            w_scale,
            bias,
            y,
            scratch,
            m,
            n,
            cute.ceil_div(k, 256),
            x_scale_stride,
            w_scale_stride,
            bias_dtype,
            out_dtype,
            split_k,
        ).launch(
            grid=(cutlass.max(cutlass.min(total, num_sms), 1), 1, 1),
            block=(self.threads, 1, 1),
            min_blocks_per_mp=1,
            stream=stream,
        )

    def tma_weight(self, w, row_tiles, row_bytes):
        """TMA of 16 rows out of each of 4 groups of 32: (copy atom, coordinate tensor)."""
        tensor = cute.make_tensor(
            w,
            cute.make_layout(
                (32, row_tiles * 4, row_bytes), stride=(row_bytes, Int64(row_bytes) * 32, 1)
            ),
        )
        layout = cute.make_layout((16, 4, _ROW_BYTES), stride=(_ROW_BYTES, 16 * _ROW_BYTES, 1))
        layout = cute.make_composed_layout(ops.swizzle_for(_ROW_BYTES), 0, layout)
        op = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, tensor, layout, (16, 4, _ROW_BYTES))

    @cute.kernel
    def kernel(
        self,
        atom_x: cute.CopyAtom,
        map_x: cute.Tensor,
        atom_w: cute.CopyAtom,
        map_w: cute.Tensor,
        atom_sfx: cute.CopyAtom,
        map_sfx: cute.Tensor,
        atom_sfw: cute.CopyAtom,
        map_sfw: cute.Tensor,
        x_scale: cute.Pointer,
        w_scale: cute.Pointer,
        bias: cute.Pointer,
        y: cute.Pointer,
        scratch: cute.Pointer,
        m: Int32,
        n: Int32,
        k_tiles: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        split_k: Int32,
    ):
        """One CTA: grid-stride over (split, tile) items; see the module."""
        smem = cutlass.utils.SmemAllocator()
        shared = smem.allocate(self.stages * self.stage_bytes, 1024)
        barriers = smem.allocate_array(cutlass.Int64, 2 * self.stages)
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)
        if thread == 0:
            for s in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(barriers + s, 1)
                cute.arch.mbarrier_init(barriers + self.stages + s, _CONSUMERS)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        tiles = (cute.ceil_div(m, self.tile_m), 2 * cute.ceil_div(n, 128))
        if warp == _CONSUMERS:
            self.produce(
                (atom_x, atom_w, atom_sfx, atom_sfw),
                (map_x, map_w, map_sfx, map_sfw),
                shared,
                barriers,
                tiles,
                k_tiles,
                split_k,
            )
        else:
            scales = (x_scale, x_scale_stride, w_scale, w_scale_stride, bias, bias_dtype)
            self.consume(
                shared, barriers, tiles, k_tiles, split_k, scales, (y, scratch, m, n, out_dtype)
            )

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
    def produce(self, atoms, maps, shared, barriers, tiles, k_tiles: Int32, split_k: Int32):
        """The producer warp: loads the stages of all items in order."""
        scale_words = 4 * self.scale_rows
        shapes = (
            (self.tile_m, _ROW_BYTES),
            (16, 4, _ROW_BYTES),
            (scale_words, 4, 1),
            (64, 4, 1),
        )
        strides = (
            (_ROW_BYTES, 1),
            (_ROW_BYTES, 16 * _ROW_BYTES, 1),
            (1, scale_words, 0),
            (1, 64, 0),
        )
        sizes = (self.x_bytes, self.w_bytes, self.sfx_bytes, self.sfw_bytes)
        pieces = []
        offset = 0
        for i in cutlass.range_constexpr(4):
            dtype, width, swizzle = Int32, 4, None
            if cutlass.const_expr(i < 2):
                dtype, width, swizzle = cutlass.Uint8, 1, ops.swizzle_for(_ROW_BYTES)
            s_tensor = cute.make_tensor(
                cute.recast_ptr(shared + offset, swizzle, dtype=dtype),
                cute.make_layout(
                    (*shapes[i], self.stages), stride=(*strides[i], sizes[i] // width)
                ),
            )
            modes = len(shapes[i])
            g_tensor = cute.local_tile(maps[i], shapes[i], (None,) * modes)
            pieces.append(
                cpasync.tma_partition(
                    atoms[i],
                    0,
                    cute.make_layout(1),
                    cute.group_modes(s_tensor, 0, modes),
                    cute.group_modes(g_tensor, 0, modes),
                )
            )
            offset += self.stages * sizes[i]

        stage = Int32(0)
        parity = Int32(1)  # of the phase of `empty` before the one to come: all stages are free
        index = cute.arch.block_idx()[0]
        total = tiles[0] * tiles[1] * split_k
        while index < total:
            row, column, _, begin, count = self.item(index, tiles, k_tiles, split_k)
            first = row * self.tile_m
            for i in cutlass.range(count, unroll=1):
                k_tile = begin + i
                cute.arch.mbarrier_wait(barriers + self.stages + stage, parity)
                full = barriers + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, self.stage_bytes)
                sources = (
                    pieces[0][1][None, row, k_tile],
                    pieces[1][1][None, column % 2, column // 2, k_tile],
                    pieces[2][1][None, first % 32 // self.scale_rows, k_tile, first // 128],
                    pieces[3][1][None, column % 2, k_tile, column // 2],
                )
                for j in cutlass.range_constexpr(4):
                    cute.copy(atoms[j], sources[j], pieces[j][0][None, stage], tma_bar_ptr=full)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
            index += cute.arch.grid_dim()[0]

    @cute.jit
    def consume(self, shared, barriers, tiles, k_tiles: Int32, split_k: Int32, scales, out):
        """A consumer warp: 16 rows of the weight, all rows of x of the tile."""
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(thread // 32)
        lane = thread % 32
        q, t = lane // 4, lane % 4
        # The lane's addresses in stage 0. A row's 16-byte chunk c is at c ^ (row % 8): TMA's
        # 128-byte swizzle. The xor with the 64 elements' number comes with the load.
        base = ops.shared_address(shared)
        x_row = lane % 8 + lane // 16 * 8
        x_address = base + x_row * _ROW_BYTES + ((lane // 8 % 2) ^ (lane % 8)) * 16
        base += self.stages * self.x_bytes
        w_row = 16 * warp + lane % 16
        w_address = base + w_row * _ROW_BYTES + ((lane // 16) ^ (lane % 8)) * 16
        base += self.stages * self.w_bytes
        sfx_address = base
        base += self.stages * self.sfx_bytes
        # Lanes t = 0, 1 hold the scales for even 64s of K, t = 2, 3 those for odd ones: selectors
        # 0 and 1.
        sfw_address = base + (t // 2) * 256 + (q + 8 * (t % 2)) * 16 + 4 * warp
        if cutlass.const_expr(self.tile_m == 16):
            # Likewise: lane t holds row block t % 2 of the t // 2-th 64 of K.
            sfx_address += (t // 2) * 256 + (q + 8 * (t % 2)) * 16
        else:
            sfx_address += (8 * t + q) * 16

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
            # Which of the four 32-row groups of a scale tile x's rows are in.
            group = row * self.tile_m % 128 // 32
            addresses = (x_address, w_address, sfx_address + 4 * group, sfw_address)
            for _ in cutlass.range(count, unroll=1):
                cute.arch.mbarrier_wait(barriers + stage, parity)
                fragments = self.load(addresses, stage)
                cute.arch.sync_warp()
                if lane == 0:
                    cute.arch.mbarrier_arrive(barriers + self.stages + stage)
                self.multiply(accumulators, fragments)
                stage += 1
                if stage == self.stages:
                    stage = Int32(0)
                    parity = parity ^ 1
            first_n = column // 2 * 128 + 32 * warp + column % 2 * 16 + q
            self.store(
                accumulators,
                (row * self.tile_m + 2 * t, first_n),
                (split, split_k > 1),
                scales,
                out,
            )
            index += grid

    def load(self, addresses, stage):
        """Loads a warp's operands of a stage, 4 x 64 of K: lists of registers, one for each 64."""
        x_address = addresses[0] + stage * self.x_bytes
        w_address = addresses[1] + stage * self.w_bytes
        sfx_address = addresses[2] + stage * self.sfx_bytes
        sfw_address = addresses[3] + stage * self.sfw_bytes
        a, b, sfx = [], [], []
        for i in range(4):
            a.append(ops.ldmatrix_x4(w_address ^ (32 * i)))
            registers = []
            for j in range(self.blocks // 2):
                address = (x_address ^ (32 * i)) + j * 16 * _ROW_BYTES
                registers += ops.ldmatrix_x4(address)
            b.append(registers)
        # One load holds the weight's scales of two 64s of K.
        sfw = [ops.load_shared(sfw_address + 512 * (i // 2)) for i in (0, 2)]
        if self.tile_m == 16:
            sfx = [ops.load_shared(sfx_address + 512 * (i // 2)) for i in (0, 2)]
        else:
            sfx = [ops.load_shared_x2(sfx_address + 512 * i) for i in range(4)]
        return a, b, sfw, sfx

    def multiply(self, accumulators, fragments):
        """Adds the product of a stage; in K's order, whatever else the warp does meanwhile."""
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
                                value = cute.math.fma(alpha, value, added)
                                ops.store_output(address, value, out_dtype)
