# SPDX-License-Identifier: Apache-2.0
"""What the persistent sm_120 GEMMs share: a stage described as data, and the warp that loads it."""

import dataclasses
import math

import cutlass
from cutlass import Int32, Int64, const_expr, cute
from cutlass.cute.nvgpu import cpasync

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.config.gemm.sm120 import SHARED_BYTES
from jax_nvfp4.kernels.gemm.arguments import HostCall
from jax_nvfp4.kernels.gemm.interleaved import packed_rows
from jax_nvfp4.kernels.gemm.ring import Ring, advance
from jax_nvfp4.kernels.gemm.sm120.arguments import Result, Work, result_of, scales_of


@dataclasses.dataclass(frozen=True)
class Load:
    """One TMA load of a stage, as it lies in shared memory.

    Attributes:
        shape: extents of the tile.
        strides: their strides, in elements.
        dtype: the element type.
        swizzle_bytes: TMA's swizzle, 64 or 128: in rows of so many bytes the 16-byte chunks are
            permuted by bits of the row. 0: none.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: type
    swizzle_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of a stage."""
        return math.prod(self.shape) * self.dtype.width // 8

    @property
    def swizzle(self):
        """The swizzle, or None."""
        bits = {0: 0, 64: 2, 128: 3}[self.swizzle_bytes]
        return cute.make_swizzle(bits, 4, 3) if bits else None

    def tma(self, pointer, shape, stride):
        """A TMA load of tiles of a global tensor, out of bounds zero.

        Returns:
            (copy atom, coordinate tensor).
        """
        tensor = cute.make_tensor(
            cute.recast_ptr(pointer, dtype=self.dtype), cute.make_layout(shape, stride=stride)
        )
        layout = cute.make_layout(self.shape, stride=self.strides)
        if self.swizzle_bytes:
            layout = cute.make_composed_layout(self.swizzle, 0, layout)
        op = cpasync.CopyBulkTensorTileG2SOp()
        return cpasync.make_tiled_tma_atom(op, tensor, layout, self.shape)

    def shared(self, pointer, stages):
        """The tensor of all stages, the last mode, at a byte pointer."""
        layout = cute.make_layout(
            (*self.shape, stages), stride=(*self.strides, self.bytes * 8 // self.dtype.width)
        )
        return cute.make_tensor(cute.recast_ptr(pointer, self.swizzle, dtype=self.dtype), layout)


def scales_load(words, k_tiles) -> Load:
    """The first `words` words of `k_tiles` 512-byte scale tiles of one row tile."""
    return Load((words, k_tiles, 1), (1, words, 0), Int32)


def scales_tma(load, pointer, row_tiles, k_tiles):
    """TMA of 128x4-swizzled scales.

    Three modes (words of a tile, tiles along K, tiles along the rows), so that a box that runs
    over the end of K gets zeros and not the next row tile.
    """
    return load.tma(pointer, (128, k_tiles, row_tiles), (1, 128, Int64(k_tiles) * 128))


class Persistent:
    """A GEMM whose CTAs go round over items (tile, part of K), one warp loading ahead.

    A subclass says how many `threads` a CTA has, what a stage holds (`stage_loads`, `maps`,
    `coordinates`), what the items are (`tiles`, `item`) and what the warps do (`kernel`).
    """

    def __init__(self, config: GemmConfig, more_barriers: int = 0) -> None:
        self.stages = config.stages
        self.tile_k = config.tile_k
        self.ctas_per_sm = config.ctas_per_sm
        self.gated = config.epilogue == "gated"
        self.loads = self.stage_loads()
        self.stage_bytes = sum(load.bytes for load in self.loads)
        self.barriers = 2 * self.stages + more_barriers
        self.shared_bytes = self.stages * self.stage_bytes + 8 * self.barriers
        if self.shared_bytes > SHARED_BYTES:
            raise ValueError(f"{config.name}: {self.shared_bytes} bytes of shared memory")

    @cute.jit
    def launch(self, call: HostCall):
        """Encodes the tensor maps and launches."""
        problem = call.problem
        # A tensor map has no empty mode. Of an empty problem no tile is ever loaded.
        k_blocks = cutlass.max(cute.ceil_div(problem.k, 64), 1)
        n = self.packed_rows(problem.n)
        maps = self.maps(call.operands, problem.m, n, k_blocks)
        rows, columns = self.tiles(problem.m, n)
        k_tiles = cute.ceil_div(problem.k, self.tile_k)
        items = rows * columns * call.split_k
        self.kernel(
            tuple(atom for atom, _ in maps),
            tuple(tensor for _, tensor in maps),
            scales_of(call, self.gated),
            result_of(call),
            k_tiles,
            call.split_k,
        ).launch(
            grid=(cutlass.max(cutlass.min(items, call.num_sms * self.ctas_per_sm), 1), 1, 1),
            block=(self.threads, 1, 1),
            min_blocks_per_mp=1,  # setmaxnreg needs to know the registers at entry
            stream=call.stream,
        )

    def packed_rows(self, n):
        """The rows of the weight as it is packed."""
        return packed_rows(n) if const_expr(self.gated) else n

    def work(self, result: Result, k_tiles, split_k) -> Work:
        """The items of a call."""
        return Work(*self.tiles(result.m, self.packed_rows(result.n)), k_tiles, split_k)

    @cute.jit
    def prologue(self, consumers: cutlass.Constexpr, turns: cutlass.Constexpr):
        """Allocates shared memory and initializes the barriers; ends with all threads in step.

        Args:
            consumers: warps that give a stage back.
            turns: warps that arrive at each of the barriers after those of the stages.

        Returns:
            The ring; the other barriers follow the empty ones of the stages.
        """
        smem = cutlass.utils.SmemAllocator()
        shared = smem.allocate(self.stages * self.stage_bytes, 1024)
        barriers = smem.allocate_array(Int64, self.barriers)
        ring = Ring(shared, barriers, barriers + self.stages, self.stages)
        if cute.arch.thread_idx()[0] == 0:
            for s in cutlass.range_constexpr(self.stages):
                cute.arch.mbarrier_init(ring.full + s, 1)
                cute.arch.mbarrier_init(ring.empty + s, consumers)
            for s in cutlass.range_constexpr(2 * self.stages, self.barriers):
                cute.arch.mbarrier_init(barriers + s, turns)
            cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        return ring

    @cute.jit
    def produce(self, atoms, tensors, ring: Ring, work: Work):
        """The producer warp: loads the stages of all items in order."""
        pieces = []
        offset = 0
        for load, atom, tensor in zip(self.loads, atoms, tensors, strict=True):
            modes = len(load.shape)
            pieces.append(
                cpasync.tma_partition(
                    atom,
                    0,
                    cute.make_layout(1),
                    cute.group_modes(load.shared(ring.buffers + offset, self.stages), 0, modes),
                    cute.group_modes(
                        cute.local_tile(tensor, load.shape, (None,) * modes), 0, modes
                    ),
                )
            )
            offset += self.stages * load.bytes

        stage = Int32(0)
        parity = Int32(1)  # of the phase of `empty` before the one to come: all stages are free
        index = cute.arch.block_idx()[0]
        total = work.items
        while index < total:
            item = self.item(index, work)
            for i in cutlass.range(item.k_count, unroll=1):
                cute.arch.mbarrier_wait(ring.empty + stage, parity)
                full = ring.full + stage
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, self.stage_bytes)
                where = self.coordinates(item.row, item.column, item.k_begin + i)
                self.copy(atoms, pieces, where, stage, full)
                stage, parity = advance(ring, stage, parity)
            index += cute.arch.grid_dim()[0]

    def copy(self, atoms, pieces, coordinates, stage, full):
        """Issues the loads of one stage."""
        for atom, (target, source), coordinate in zip(atoms, pieces, coordinates, strict=True):
            cute.copy(atom, source[None, *coordinate], target[None, stage], tma_bar_ptr=full)
