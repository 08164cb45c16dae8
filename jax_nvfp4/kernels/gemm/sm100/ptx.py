# SPDX-License-Identifier: Apache-2.0
"""The sm_100f GEMM's sizes, and instructions that CuTeDSL has no name for."""

import dataclasses

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import T, dsl_user_op

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.kernels.gemm.sm100.arguments import Grid
from jax_nvfp4.kernels.ptx import fence_release_shared, wait_cluster

EPILOGUE_WARPS = 4
MMA_WARP = 4
LOAD_WARP = 5
THREADS = 192

ROWS = 128  # rows of A in one CTA's tile, and rows of a scale tile
STAGE_BYTES_K = 128  # bytes of a row in one stage: 256 e2m1 values
K_BLOCKS = 4  # MMAs (of 64 along K) and scale tiles in one stage
CHUNK = 32  # accumulator columns that the epilogue handles at a time
ANSWERS = 4  # tiles that the load warp may be ahead of the epilogue
RASTER = 8  # N-side tiles that are walked before the next M-side tile
CLUSTER = nvvm.MemScopeKind.CLUSTER
OVERLAP_COLUMNS = 208  # distance of the two accumulators of a 256-column tile


@dsl_user_op
def tcgen05_fence_before(*, loc=None, ip=None):
    """Orders this thread's tensor-memory accesses before the synchronization that follows."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.BEFORE_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def tcgen05_fence_after(*, loc=None, ip=None):
    """Orders this thread's tensor-memory accesses after the synchronization that precedes."""
    nvvm.tcgen05_fence(nvvm.Tcgen05FenceKind.AFTER_THREAD_SYNC, loc=loc, ip=ip)


@dsl_user_op
def load_accumulators(address, count, *, loc=None, ip=None):
    """This thread's `count` columns of its lane of tensor memory, from `address` on, as fp32.

    The load and its wait are one block of assembly: left to itself, the compiler packs the
    registers in pairs between the two, when the load has not yet written them.
    """
    registers = ", ".join(f"${i}" for i in range(count))
    loaded = llvm.inline_asm(
        llvm.StructType.get_literal([T.f32()] * count),
        [Int32(address).ir_value(loc=loc, ip=ip)],
        f"tcgen05.ld.sync.aligned.32x32b.x{count}.b32 {{{registers}}}, [${count}]; "
        "tcgen05.wait::ld.sync.aligned;",
        "=f," * count + "r,~{memory}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    values = cute.make_rmem_tensor((count,), Float32)
    for i in range(count):
        values[i] = Float32(llvm.extractvalue(T.f32(), loaded, [i], loc=loc, ip=ip))
    return values


@dsl_user_op
def arrive_relaxed(barrier, rank, *, loc=None, ip=None):
    """Arrives at the barrier of CTA `rank` of the cluster, without ordering memory.

    An arrival that releases to the cluster is a barrier of the whole GPU in machine code (some 700
    cycles). Tensor memory needs none: `tcgen05_fence_before` orders its accesses before the arrival
    (PTX ISA, "Tensorcore 5th Generation: Memory Consistency Model").
    """
    llvm.inline_asm(
        None,
        [barrier.to_llvm_ptr(loc=loc, ip=ip), Int32(rank).ir_value(loc=loc, ip=ip)],
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; "
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [a]; }",
        "r,r,~{memory}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def store_remote(pointer, rank, value, *, loc=None, ip=None):
    """Stores a float where `pointer` points, in the shared memory of CTA `rank` of the cluster."""
    llvm.inline_asm(
        None,
        [
            pointer.to_llvm_ptr(loc=loc, ip=ip),
            Int32(rank).ir_value(loc=loc, ip=ip),
            Float32(value).ir_value(loc=loc, ip=ip),
        ],
        "{ .reg .b32 a; mapa.shared::cluster.u32 a, $0, $1; st.shared::cluster.f32 [a], $2; }",
        "r,r,f,~{memory}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@cute.jit
def commit(barrier, mask, pair: cutlass.Constexpr):
    """Signals `barrier` (of each CTA in `mask`) when the MMAs issued so far are done."""
    with cute.arch.elect_one():
        if cutlass.const_expr(pair):
            tcgen05.commit(barrier, mask, tcgen05.CtaGroup.TWO)
        else:
            tcgen05.commit(barrier, None, tcgen05.CtaGroup.ONE)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes that follow from a config, all in the MMA's terms.

    Attributes:
        pair: two CTAs share an MMA.
        columns: N of the MMA: rows of B in a tile.
        cluster_a: CTAs of a cluster along A's rows.
        cluster_b: CTAs of a cluster along B's rows.
    """

    pair: bool
    columns: int
    cluster_a: int
    cluster_b: int

    @property
    def ctas(self) -> int:
        """CTAs that share one MMA."""
        return 2 if self.pair else 1

    @property
    def b_rows(self) -> int:
        """Rows of B in one CTA's shared memory."""
        return self.columns // self.ctas

    @property
    def b_blocks(self) -> int:
        """Row blocks of 128 whose scales a tile of B needs."""
        return max(self.columns // ROWS, 1)

    @property
    def a_slices(self) -> int:
        """CTAs that each load a slice of A's tile and multicast it."""
        return self.cluster_b

    @property
    def b_slices(self) -> int:
        """CTAs that each load a slice of B's tile and multicast it."""
        return self.cluster_a // self.ctas

    @property
    def sfb_slices(self) -> int:
        """CTAs that each load a slice of B's scales: in a pair both CTAs need all of them."""
        return self.cluster_a

    @property
    def stage_bytes(self) -> int:
        """Bytes that one stage of one CTA receives."""
        rows = ROWS + self.b_rows
        return rows * STAGE_BYTES_K + (1 + self.b_blocks) * K_BLOCKS * 512

    @property
    def overlapped(self) -> bool:
        """Two accumulators and the scales exceed 512 columns: the accumulators overlap."""
        return self.columns == 256

    @property
    def acc_stride(self) -> int:
        """Tensor-memory columns between the two accumulators."""
        return OVERLAP_COLUMNS if self.overlapped else self.columns

    @property
    def acc_barriers(self) -> int:
        """Accumulators that may be handed over independently."""
        return 1 if self.overlapped else 2

    @property
    def sfa_column(self) -> int:
        """First tensor-memory column of A's scales."""
        return self.acc_stride + self.columns

    @property
    def sfb_column(self) -> int:
        """First tensor-memory column of B's scales."""
        return self.sfa_column + 4 * K_BLOCKS

    @property
    def tmem_columns(self) -> int:
        """Tensor-memory columns to allocate: a power of two."""
        used = self.sfb_column + 4 * K_BLOCKS * self.b_blocks
        return 1 << (used - 1).bit_length()


def shape_of(config: GemmConfig) -> Shape:
    """The sizes of a config in the MMA's terms."""
    if config.swap_ab:
        return Shape(False, config.tile_m, 1, 1)
    return Shape(True, config.tile_n, config.cluster_m, config.cluster_n)


def ranks(shape: Shape, rank):
    """A CTA's place in its cluster, along A's rows and along B's."""
    along_a = rank % shape.cluster_a if shape.cluster_a > 1 else Int32(0)
    along_b = rank // shape.cluster_a if shape.cluster_b > 1 else Int32(0)
    return along_a, along_b


def reduce_buffers(config: GemmConfig) -> int:
    """Buffers for partial sums: two let the exchange of one chunk overlap that of the next."""
    if config.split_k == 1:
        return 0
    return 2 if config.tile_m > CHUNK else 1


class Tiles:
    """The tiles that a cluster works on: its own, then those of clusters it keeps from starting.

    The grid has a cluster for each tile. A running cluster asks the hardware to cancel one that has
    not started (clusterlaunchcontrol) and takes over its tile, one query ahead of its work. The
    first warp to need a tile, the load warp of CTA 0, asks; the answer lands in all CTAs. So the
    walk needs no count of the clusters that fit the chip at once, and no counter in memory.
    """

    def __init__(self, shape: Shape, barriers, answers, grid: Grid):
        self.shape = shape
        self.full = barriers
        self.empty = barriers + ANSWERS
        self.answers = answers
        self.tiles_a = grid.tiles_a
        self.tiles_b = grid.tiles_b
        self.count = grid.tiles_a * grid.tiles_b
        self.steal = grid.steal


def answer_pointer(tiles: Tiles, slot):
    """Where the answer of 16 bytes in `slot` is."""
    return tiles.answers + cute.assume(4 * slot, divby=4)


def first_tile():
    """The tile of this cluster's own place in the grid."""
    return cute.arch.block_idx()[0] // cute.arch.cluster_size()


@cute.jit
def coordinates(tiles: Tiles, index):
    """Coordinates of the cluster's tile `index`: RASTER tiles of B, then the next of A.

    Clusters that run at the same time so share rows of both operands in L2.
    """
    band = index // (RASTER * tiles.tiles_a)
    rest = index - band * (RASTER * tiles.tiles_a)
    width = cutlass.min(tiles.tiles_b - band * RASTER, RASTER)
    row = rest // width
    return row, band * RASTER + rest - row * width


@cute.jit
def init_answer_barriers(tiles: Tiles):
    """Sets up the barriers: by one thread of each CTA."""
    size = cute.arch.cluster_size()
    # The load and epilogue warps of each CTA read an answer, and the MMA warp of each pair.
    readers = size * (1 + EPILOGUE_WARPS) + size // tiles.shape.ctas
    for i in cutlass.range_constexpr(ANSWERS):
        cute.arch.mbarrier_init(tiles.full + i, 1)
        cute.arch.mbarrier_init(tiles.empty + i, readers)


@cute.jit
def ask_for_tile(tiles: Tiles, count, rank):
    """Asks for the tile after the cluster's `count`-th; by the load warp of each CTA."""
    if tiles.steal != 0:
        slot = count % ANSWERS
        if rank == 0:
            wait_cluster(tiles.empty + slot, (count // ANSWERS + 1) % 2)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(tiles.full + slot, 16)
        if rank == 0:
            with cute.arch.elect_one():
                cute.arch.issue_clc_query(tiles.full + slot, answer_pointer(tiles, slot))


@cute.jit
def next_tile(tiles: Tiles, count):
    """The tile after the cluster's `count`-th; `tiles.count` if there is none."""
    index = tiles.count
    if tiles.steal != 0:
        slot = count % ANSWERS
        cute.arch.mbarrier_wait(tiles.full + slot, count // ANSWERS % 2)
        block, _, _, canceled = cute.arch.clc_response(answer_pointer(tiles, slot))
        if canceled != 0:
            index = block // cute.arch.cluster_size()
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            fence_release_shared()
            arrive_relaxed(tiles.empty + slot, 0)
    return index
