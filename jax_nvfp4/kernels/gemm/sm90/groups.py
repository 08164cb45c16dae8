# SPDX-License-Identifier: Apache-2.0
"""Which tiles a grouped call has: rows of x are in groups, each with a weight of its own.

Group sizes are known on the device alone. Each CTA's producer warp reads them, 128 at a time, and
finds by prefix sums over its lanes which tile belongs to which group; it loads the tile and tells
the consumers through a queue in shared memory. Tiles are numbered group by group. Rows behind the
last group are a group more. They, and rows of groups that no weight is of, have tiles without a
product, whose outputs are zero.
"""

import dataclasses
import itertools

import cutlass
from cutlass import Int32, Int64, cute

from jax_nvfp4.kernels.gemm.arguments import Groups
from jax_nvfp4.kernels.gemm.sm90 import ptx as ops
from jax_nvfp4.kernels.gemm.sm90.arguments import Call, Tile, TileQueue
from jax_nvfp4.kernels.ptx import load_shared_x4

QUEUE_SLOTS = 2
QUEUE_BYTES = QUEUE_SLOTS * (16 + 16)
# What a tile's `end` says where there are no more.
NO_TILE = -1
# Groups of a lane; a warp looks at 32 times as many at a time.
LANE_GROUPS = 4


@dataclasses.dataclass(frozen=True)
class Part:
    """What a lane knows of its groups in a part of all groups.

    Attributes:
        groups: their numbers among the weight's, negative for none.
        rows: where each group begins, and where the last ends.
        ends: the number of the tile behind each group's last.
        begin: the number of the first group's first tile.
        rows_end: the rows of all groups up to the part's last.
        tiles_end: their tiles.
    """

    groups: list[Int32]
    rows: list[Int32]
    ends: list[Int32]
    begin: Int32
    rows_end: Int32
    tiles_end: Int32


@dataclasses.dataclass(frozen=True)
class Found:
    """The group of a tile.

    Attributes:
        index: the tile's number in the group.
        group: the group's number among the weight's, negative for none.
        row: the first of its rows.
        end: where they end.
        m_tiles: its tiles along M.
    """

    index: Int32
    group: Int32
    row: Int32
    end: Int32
    m_tiles: Int32


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """What a warp needs to find a call's tiles. All its lanes call the functions together.

    Attributes:
        groups: of the rows.
        offset: the number of the group that the first weight is of.
        m: rows of x.
        tile_m: rows of a tile.
        n_tiles: tiles along N.
        chunks: into how many parts the groups are divided.
        lane: this lane.
    """

    groups: Groups
    offset: Int32
    m: Int32
    tile_m: int
    n_tiles: Int32
    chunks: Int32
    lane: Int32


def make_scheduler(call: Call, tile_m: int, n_tiles: Int32) -> Scheduler:
    """The scheduler of a call; reads memory."""
    groups = call.groups
    offset = ops.load_index(Int64(groups.offset.toint()))
    chunks = cute.ceil_div(groups.size_count, 32 * LANE_GROUPS)
    return Scheduler(groups, offset, call.problem.m, tile_m, n_tiles, chunks, cute.arch.lane_idx())


def part_of(s: Scheduler, chunk, rows, tiles) -> Part:
    """Part `chunk` of the groups, with so many rows and tiles in the parts before it."""
    first = chunk * (32 * LANE_GROUPS) + s.lane * LANE_GROUPS
    sizes = [_size(s, first + i) for i in range(LANE_GROUPS)]
    # The last lane of all has the rows behind the groups, too.
    last = (chunk == s.chunks - 1) & (s.lane == 31)
    sizes.append(ops.select(last, s.m, Int32(0)))
    # Sums are cut at m, which a sum of two does not take past an Int32.
    total = Int32(0)
    for size in sizes:
        total = cutlass.min(total + size, s.m)
    starts = [cutlass.min(rows + _before(s, _prefix(s, total, s.m)), s.m)]
    for size in sizes:
        starts.append(cutlass.min(starts[-1] + size, s.m))
    counts = [
        (end - start + s.tile_m - 1) // s.tile_m * s.n_tiles
        for start, end in itertools.pairwise(starts)
    ]
    begin = tiles + _before(s, _prefix(s, sum(counts[1:], counts[0]), None))
    ends = [begin + counts[0]]
    for count in counts[1:]:
        ends.append(ends[-1] + count)
    return Part(
        [*(_local(s, first + i) for i in range(LANE_GROUPS)), Int32(-1)],
        starts,
        ends,
        begin,
        cute.arch.shuffle_sync(starts[-1], 31),
        cute.arch.shuffle_sync(ends[-1], 31),
    )


def _size(s: Scheduler, group):
    """Rows of a group, 0 behind the last."""
    known = group < s.groups.size_count
    at = ops.select(known, group, Int32(0))
    size = ops.load_index(Int64(s.groups.sizes.toint()) + Int64(at) * 4)
    return ops.select(known, cutlass.min(cutlass.max(size, 0), s.m), Int32(0))


def _local(s: Scheduler, group):
    """A group's number among the weight's groups, negative for one that is not theirs."""
    local = group - s.offset
    inside = (local >= 0) & (local < s.groups.count) & (group < s.groups.size_count)
    return ops.select(inside, local, Int32(-1))


def _prefix(s: Scheduler, value, limit):
    """The sum of a value over the lanes up to one's own, cut at `limit`."""
    for distance in (1, 2, 4, 8, 16):
        other = cute.arch.shuffle_sync_up(value, distance, mask_and_clamp=0)
        other = ops.select(s.lane >= distance, other, Int32(0))
        value = value + other
        if limit is not None:
            value = cutlass.min(value, limit)
    return value


def _before(s: Scheduler, sums):
    """The sum over the lanes before one's own."""
    other = cute.arch.shuffle_sync_up(sums, 1, mask_and_clamp=0)
    return ops.select(s.lane > 0, other, Int32(0))


def find(s: Scheduler, part: Part, index) -> Found:
    """The group of a tile that is in this part."""
    # Each lane looks among its own groups. The first lane whose last tile is behind is right.
    row, end, group = part.rows[-2], part.rows[-1], part.groups[-1]
    begin = part.ends[-2]
    for i in reversed(range(LANE_GROUPS)):
        here = index < part.ends[i]
        row = ops.select(here, part.rows[i], row)
        end = ops.select(here, part.rows[i + 1], end)
        group = ops.select(here, part.groups[i], group)
        begin = ops.select(here, part.ends[i - 1] if i else part.begin, begin)
    owner = ops.first_lane(cute.arch.vote_ballot_sync(index < part.ends[-1]))
    row, end, group, begin = (
        cute.arch.shuffle_sync(value, owner) for value in (row, end, group, begin)
    )
    m_tiles = (end - row + s.tile_m - 1) // s.tile_m
    return Found(index - begin, group, row, end, m_tiles)


def after(tile, end, step):
    """The first of every `step`-th tile from `tile` on that is not before `end`."""
    return tile + cutlass.max(end - tile + step - 1, 0) // step * step


@cute.jit
def send_tile(queue: TileQueue, tile: Tile, slot, phase):
    """Puts a tile into the queue; returns the next slot and its phase."""
    cute.arch.mbarrier_wait(queue.received + slot, phase)
    with cute.arch.elect_one():
        words = [tile.column, tile.group, tile.row, tile.end]
        ops.store_shared_x4(ops.shared_address(queue.tiles) + slot * 16, words)
        cute.arch.mbarrier_arrive(queue.sent + slot)
    slot ^= 1
    if slot == 0:
        phase ^= 1
    return slot, phase


@cute.jit
def receive_tile(queue: TileQueue, slot, phase):
    """Waits for a tile in a slot; returns its column, group, first row and end."""
    cute.arch.mbarrier_wait(queue.sent + slot, phase)
    words = load_shared_x4(ops.shared_address(queue.tiles) + slot * 16)
    cute.arch.mbarrier_arrive(queue.received + slot)
    return tuple(Int32(word) for word in words)
