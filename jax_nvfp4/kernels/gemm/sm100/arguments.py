# SPDX-License-Identifier: Apache-2.0
"""What the functions of the sm_100 GEMM hand to one another, by what it is about.

They hold what no loop of the kernel changes. Sizes and indices are Int32. A is the operand of the
MMA's M side, B that of its N side.
"""

import dataclasses
from typing import Any

from cutlass import Boolean, Float32, Int16, Int32, cute

from jax_nvfp4.kernels.gemm.arguments import Activation, Output, Problem


@dataclasses.dataclass(frozen=True)
class Tma:
    """Copies of boxes through a tensor map.

    Attributes:
        atom: the copy of a box.
        tensor: the coordinates in global memory.
    """

    atom: cute.CopyAtom
    tensor: cute.Tensor


@dataclasses.dataclass(frozen=True)
class Maps:
    """The tensor maps of a call.

    Attributes:
        a: loads A.
        b: loads B.
        sfa: loads A's block scales.
        sfb: loads B's.
        y: stores the result, in 16-bit words.
    """

    a: Tma
    b: Tma
    sfa: Tma
    sfb: Tma
    y: Tma


@dataclasses.dataclass(frozen=True)
class TiledProblem(Problem):
    """The integers of a call, but that `k` counts tiles of 64 columns."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """How a call is divided, and stored.

    Attributes:
        use_tma: whether y is stored by TMA.
        split: CTAs that divide K.
        tiles_a: tiles of clusters along A's rows.
        tiles_b: along B's.
        steal: whether clusters take over the tiles of others.
    """

    use_tma: Int32
    split: Int32
    tiles_a: Int32
    tiles_b: Int32
    steal: Int32


@dataclasses.dataclass(frozen=True)
class Call:
    """What the epilogue has to know of a call.

    Attributes:
        output: what makes the result of the sums.
        problem: the sizes.
        store: of y, by TMA.
        use_tma: whether it is.
        activation: of a gated product; else None.
    """

    output: Output
    problem: TiledProblem
    store: Tma
    use_tma: Int32
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class Cta:
    """A CTA's place in its cluster, and its part of K.

    Where the cluster splits K, CTA `rank` has part `rank` of it; else `rank` is its place in the
    cluster's tile, A's side first.

    Attributes:
        rank: the CTA's number.
        split: CTAs that divide K.
        k_begin: the first stage along K.
        k_end: where stages end.
        mmas: MMAs of a tile where they have 96 of K.
    """

    rank: Int32
    split: Int32
    k_begin: Int32
    k_end: Int32
    mmas: Int32


@dataclasses.dataclass(frozen=True)
class Handover:
    """Accumulators in tensor memory, which the MMA warp hands to the epilogue and gets back.

    Attributes:
        tmem: where tensor memory starts.
        full: mbarriers: the MMAs of a tile are done.
        empty: mbarriers: the epilogue has read them.
    """

    tmem: cute.Pointer
    full: cute.Pointer
    empty: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How CTAs that divide K hand partial sums to one another.

    Attributes:
        full: mbarriers: all parts have come.
        empty: mbarriers: they are read.
    """

    full: cute.Pointer
    empty: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Load:
    """The loads of an operand.

    Attributes:
        atom: the copy of a box.
        source: the boxes in global memory.
        target: where they go, by slice of a stage and stage.
        mask: the CTAs of the cluster that get each box.
    """

    atom: cute.CopyAtom
    source: cute.Tensor
    target: cute.Tensor
    mask: Int16


@dataclasses.dataclass(frozen=True)
class Loads:
    """Of all operands."""

    a: Load
    b: Load
    sfa: Load
    sfb: Load


@dataclasses.dataclass(frozen=True)
class Slices:
    """Which slice of a stage a CTA loads, of what its cluster shares.

    Attributes:
        rank_a: its place along A's rows.
        rank_b: its place along B's.
        peer: its place in its pair.
        of_b: its slice of B.
    """

    rank_a: Int32
    rank_b: Int32
    peer: Int32
    of_b: Int32


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Which boxes a CTA loads for a tile.

    Attributes:
        row_a: of A, along its rows.
        row_b: of B.
        block_a: row block of A's scales.
        block_b: of B's.
        sfa_k: the first along K of A's scales, in boxes.
        sfb_k: of B's.
        sfb_step: boxes of B's scales in a stage; known at compile time.
    """

    row_a: Int32
    row_b: Int32
    block_a: Int32
    block_b: Int32
    sfa_k: Int32
    sfb_k: Int32
    sfb_step: int


@dataclasses.dataclass(frozen=True)
class OperandsK64:
    """What MMAs of 64 along K work on.

    Attributes:
        mma: the MMA.
        layout: of its accumulators.
        tmem: where tensor memory starts.
        a: A in shared memory.
        b: B.
        sfa: A's scales in tensor memory.
        sfb: B's.
        copies: of the scales of A and of B to there: (copy, source, target).
    """

    mma: cute.TiledMma
    layout: Any
    tmem: cute.Pointer
    a: Any
    b: Any
    sfa: cute.Tensor
    sfb: cute.Tensor
    copies: tuple


@dataclasses.dataclass(frozen=True)
class Feature:
    """The output feature of a thread, where the weight is A.

    Attributes:
        index: its number.
        scale: its global scale.
        bias: its bias.
    """

    index: Int32
    scale: Float32
    bias: Float32


@dataclasses.dataclass(frozen=True)
class GatedFeature:
    """The same where lanes l and l ^ 8 have a gate and its up.

    Attributes:
        index: the number of the output feature that is theirs.
        is_up: the thread has the up.
        gate_scale: the gate's global scale.
        gate_bias: its bias.
        up_scale: up's global scale.
        up_bias: its bias.
    """

    index: Int32
    is_up: Boolean
    gate_scale: Float32
    gate_bias: Float32
    up_scale: Float32
    up_bias: Float32


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile that the epilogue stores, where x is A.

    Attributes:
        row: of y, the first.
        warp: the thread's, which has 32 rows.
        column: of the accumulators, the first.
        vectors: where the scales of the columns are in shared memory.
        buffer: the number of the accumulator in tensor memory.
        barrier: the number of the barriers that it is handed over by.
        leader: the CTA whose MMA warp that is for.
        row_scale: the scale of the thread's row.
    """

    row: Int32
    warp: Int32
    column: Int32
    vectors: Int32
    buffer: Int32
    barrier: Int32
    leader: Int32
    row_scale: Float32


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Tokens that the epilogue handles at a time, where the weight is A.

    Attributes:
        number: of the chunk, over all tiles.
        token: the first one.
        vectors: where their scales are in shared memory.
    """

    number: Int32
    token: Int32
    vectors: Int32
