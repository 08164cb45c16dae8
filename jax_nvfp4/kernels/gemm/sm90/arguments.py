# SPDX-License-Identifier: Apache-2.0
"""What the functions of the Hopper GEMM hand to one another, by what it is about.

They hold what no loop of a kernel changes. Sizes and indices are Int32.
"""

import dataclasses

from cutlass import Float32, Int32, Uint32, cute

from jax_nvfp4.kernels.gemm.arguments import Activation, Groups, Output, Problem
from jax_nvfp4.kernels.gemm.ring import Ring


@dataclasses.dataclass(frozen=True)
class Weight:
    """Where the repacked weight is.

    Attributes:
        w: its codes.
        sfw: its scales.
    """

    w: cute.Pointer
    sfw: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Work:
    """What a CTA has to do.

    Attributes:
        first: its first tile.
        step: from one of its tiles to the next.
        m_tiles: tiles along M.
        tiles: of the call.
        k_tiles: tiles along K.
        k_begin: the first of them that is this CTA's.
        k_count: how many are.
        rank: of the CTA in its cluster.
        split: CTAs of a cluster, which divide K; known at compile time.
    """

    first: Int32
    step: Int32
    m_tiles: Int32
    tiles: Int32
    k_tiles: Int32
    k_begin: Int32
    k_count: Int32
    rank: Int32
    split: int


@dataclasses.dataclass(frozen=True)
class Call:
    """All of a call that is the same for each of its tiles.

    Attributes:
        weight: where it is; x comes through a tensor map.
        output: what makes the result of the sums.
        problem: the sizes.
        groups: of the rows, or None.
        activation: or None.
        work: what the CTA has to do; the host does not know it.
    """

    weight: Weight
    output: Output
    problem: Problem
    groups: Groups | None
    activation: Activation | None
    work: Work | None = None


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of y.

    Attributes:
        column: its number along N.
        group: of a grouped call: the group whose rows these are, negative for none of the weight's.
        row: of a grouped call: the first row.
        end: of a grouped call: where the group's rows end.
        m_tile: of another call: its number along M.
    """

    column: Int32
    group: Int32 | None = None
    row: Int32 | None = None
    end: Int32 | None = None
    m_tile: Int32 | None = None


@dataclasses.dataclass(frozen=True)
class TileQueue:
    """How the producer of a grouped call tells the consumers which tiles there are.

    Attributes:
        tiles: slots in shared memory, four Int32 each.
        sent: an mbarrier for each slot: there is a tile in it.
        received: an mbarrier for each slot: the consumers have read it.
    """

    tiles: cute.Pointer
    sent: cute.Pointer
    received: cute.Pointer


@dataclasses.dataclass(frozen=True)
class QueuedRing(Ring):
    """The stages: x of all, then codes, then scales; and the tiles that they are of.

    Attributes:
        queue: of a grouped call, or None.
    """

    queue: TileQueue | None


@dataclasses.dataclass(frozen=True)
class Exchange:
    """How CTAs of a cluster hand sums to one another.

    Attributes:
        sums: where those of the others come to, or the ring where there is no room beside it.
        ready: mbarrier: the others are done with their rings, which sums may overwrite.
        received: mbarrier: the others' sums have come.
    """

    sums: cute.Pointer
    ready: cute.Pointer
    received: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Lane:
    """Which consumer a thread is.

    Attributes:
        thread: of its warpgroup.
        k_group: its warpgroup's group, which has a part of the CTA's stages.
        row_group: the warpgroup's number in the group, which has a part of the tile's rows.
        k_count: stages of a tile that are its group's.
        exponent: what `decode_pair` takes as such.
    """

    thread: Int32
    k_group: Int32
    row_group: Int32
    k_count: Int32
    exponent: Uint32


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of y that a thread stores.

    Attributes:
        first: the first.
        end: where they end.
    """

    first: Int32
    end: Int32


@dataclasses.dataclass(frozen=True)
class Place:
    """Which outputs of a tile are a thread's.

    Attributes:
        rows: of x.
        first_block: the first of its blocks of 64 rows of the weight.
        thread: of its warpgroup.
        group: as a tile's.
    """

    rows: Rows
    first_block: Int32
    thread: Int32
    group: Int32 | None


@dataclasses.dataclass(frozen=True)
class OutputTile:
    """A thread's share of a tile of y, and what scales it.

    Attributes:
        place: which outputs these are.
        octets: eights of rows of x that it has sums for.
        row_scales: the two scales of each octet, or None: to be loaded when they are needed.
        scales: of its rows of the weight.
        biases: likewise.
    """

    place: Place
    octets: int
    row_scales: list[list[Float32]] | None
    scales: list[Float32]
    biases: list[Float32]
