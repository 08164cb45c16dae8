# SPDX-License-Identifier: Apache-2.0
"""The Hopper GEMM's epilogue: adds up the sums of groups and CTAs, scales and stores them.

Which of a thread's sums is what, `wgmma` says: a lane 4*g + t has rows g and g + 8 of 16 rows of
the weight for rows 2*t and 2*t + 1 of eight rows of x, an octet. Rows of x are divided by octets
over groups, then over CTAs.
"""

import cutlass
from cutlass import BFloat16, Float16, Float32, Int32, Int64, const_expr, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.kernels.gemm.gate import gated
from jax_nvfp4.kernels.gemm.ring import Ring
from jax_nvfp4.kernels.gemm.sm90 import ptx as ops
from jax_nvfp4.kernels.gemm.sm90.arguments import (
    Call,
    Exchange,
    Lane,
    OutputTile,
    Place,
    Rows,
    Tile,
    Work,
)
from jax_nvfp4.kernels.ptx import fence_release_shared, fma_to, wait_cluster
from jax_nvfp4.layout import sm90 as layout

WARPGROUP = 128
# A block is what a `wgmma` takes of a tile of the weight: half of its 128 rows.
BLOCK_N = 64
# How an output is stored, by the code of its dtype.
FORMS = ("f32", "bf16x2", "f16x2")


class Epilogue:
    """What a config's consumers do with their sums.

    Attributes:
        k_groups: groups of a CTA's warpgroups that K is divided over.
        row_groups: warpgroups of a group: a tile's blocks are divided over them.
        blocks: blocks of a warpgroup.
        consumers: threads that multiply.
        octets: of a tile's rows of x.
        group_octets: of the rows whose sums one of the groups adds up, at most.
        separate_exchange: other CTAs' sums have a place beside the ring.
        gated: rows of the weight come in pairs, a gate and an up row, each with one output.
    """

    def __init__(self, config: GemmConfig):
        self.k_groups = config.k_groups
        self.row_groups = config.warpgroups // config.k_groups
        self.blocks = config.tile_n // BLOCK_N // self.row_groups
        self.consumers = config.warpgroups * WARPGROUP
        self.octets = config.tile_m // 8
        self.group_octets = ceil_div(self.octets, self.k_groups)
        self.separate_exchange = False
        self.gated = config.epilogue == "gated"

    def reduces(self, split: int) -> bool:
        """Whether a tile's sums meet in shared memory before they are stored."""
        return split * self.k_groups > 1

    def _cta_octets(self, split: int) -> int:
        """How many of a group's octets one CTA of a cluster adds up, at most."""
        return ceil_div(self.group_octets, split)

    def _groups_bytes(self) -> int:
        """Shared memory for the sums that groups hand to one another."""
        return (self.k_groups - 1) * self.group_octets * self.blocks * self.consumers * 16

    def _exchange_bytes(self, split: int) -> int:
        """Shared memory for the sums that a CTA gets from the others of its cluster."""
        return (split - 1) * self._cta_octets(split) * self.blocks * self.consumers * 16

    def _flat(self, j, b, half, e, octets):
        """Where a thread's sum for block b, row g + 8*half and row 8*j + 2*t + e of x is.

        Of its sums for so many octets of rows of x.
        """
        return e + 2 * half + 4 * (j + octets * b)

    # Adding up

    @cute.jit
    def _reduce(
        self,
        sums,
        ring: Ring,
        exchange: Exchange,
        lane: Lane,
        rank,
        split: cutlass.Constexpr[int],
    ):
        """Adds up the sums of groups, then of CTAs; returns those of the thread's share."""
        if const_expr(split > 1):
            # All CTAs have set up their mbarriers.
            cute.arch.cluster_wait()
        if const_expr(split > 1 and not self.separate_exchange):
            # This thread is done with its CTA's ring: sums may come.
            fence_release_shared()
            for to in cutlass.range_constexpr(split):
                barrier = ops.map_shared(ops.shared_address(exchange.ready), Int32(to))
                ops.arrive_remote_if(Int32(rank != to), barrier)
        if const_expr(self.k_groups > 1):
            sums = self._reduce_groups(sums, ring, lane)
        if const_expr(split > 1):
            sums = self._reduce_ctas(sums, exchange, lane, rank, split)
        return sums

    @cute.jit
    def _reduce_groups(self, sums, ring: Ring, lane: Lane):
        """Adds up the sums of a CTA's groups; each group keeps those of some octets."""
        base = ops.shared_address(ring.buffers)
        count = self.group_octets
        group_threads = self.row_groups * WARPGROUP
        place = base + (lane.row_group * WARPGROUP + lane.thread) * 16
        step = count * self.blocks * group_threads * 16
        # All groups are done with the ring.
        cute.arch.barrier(barrier_id=1, number_of_threads=self.consumers)
        for to in cutlass.range_constexpr(self.k_groups):
            at = place + (to * (self.k_groups - 1) + lane.k_group - Int32(lane.k_group > to)) * step
            part = self._part(sums, self.octets, to, count)
            if lane.k_group != to:
                for i in cutlass.range_constexpr(len(part) // 4):
                    ops.store_vector(at + i * (group_threads * 16), part[4 * i : 4 * i + 4])
        cute.arch.barrier(barrier_id=1, number_of_threads=self.consumers)
        return self._in_order(
            self._own_part(sums, self.octets, lane.k_group, self.k_groups, count),
            lane.k_group,
            self.k_groups,
            place + lane.k_group * ((self.k_groups - 1) * step),
            step,
            group_threads * 16,
        )

    @cute.jit
    def _reduce_ctas(
        self, sums, exchange: Exchange, lane: Lane, rank, split: cutlass.Constexpr[int]
    ):
        """Adds up the sums of a cluster's CTAs; each CTA keeps those of some octets."""
        octets = self.group_octets if self.k_groups > 1 else self.octets
        count = self._cta_octets(split)
        place = ops.shared_address(exchange.sums)
        if const_expr(not self.separate_exchange):
            place += self._groups_bytes()
        group = lane.k_group * self.row_groups + lane.row_group
        place += group * (WARPGROUP * 16) + lane.thread * 16
        step = count * self.blocks * self.consumers * 16
        if const_expr(not self.separate_exchange):
            # All threads of the others are done with their rings.
            wait_cluster(exchange.ready, 0)
        for to in cutlass.range_constexpr(split):
            place_there = ops.map_shared(place + (rank - Int32(rank > to)) * step, Int32(to))
            received_there = ops.map_shared(ops.shared_address(exchange.received), Int32(to))
            part = self._part(sums, octets, to, count)
            if rank != to:
                for i in cutlass.range_constexpr(len(part) // 4):
                    ops.send_vector(
                        place_there + i * (self.consumers * 16),
                        part[4 * i : 4 * i + 4],
                        received_there,
                    )
        own = self._own_part(sums, octets, rank, split, count)
        cute.arch.mbarrier_wait(exchange.received, 0)
        return self._in_order(own, rank, split, place, step, self.consumers * 16)

    def _part(self, sums, octets, index, count):
        """Part `index` of sums for so many octets, `count` octets long: a list in `_flat`'s order.

        Where the last parts are shorter, or empty, their ends repeat the last eight.
        """
        return [
            sums[self._flat(min(index * count + j, octets - 1), b, half, e, octets)]
            for b in range(self.blocks)
            for j in range(count)
            for half in range(2)
            for e in range(2)
        ]

    def _own_part(self, sums, octets, index, parts, count):
        """The same where `index` is known at run time only: one of `parts`."""
        own = self._part(sums, octets, 0, count)
        for other in range(1, parts):
            part = self._part(sums, octets, other, count)
            own = [ops.select(index == other, *pair) for pair in zip(part, own, strict=True)]
        return own

    def _in_order(self, own, index, parts, place, step, stride):
        """Adds up the sums of `parts` agents in their order; those of agent `index` are `own`."""
        if parts == 2:  # The order makes no difference.
            return self._added(own, self._loaded(place, len(own), stride))
        total = None
        for source in range(parts):
            # The agent itself has no place; for it another's sums are loaded, and not used.
            other = cutlass.min(source - Int32(index < source), parts - 2)
            part = self._loaded(place + other * step, len(own), stride)
            part = [ops.select(index == source, *pair) for pair in zip(own, part, strict=True)]
            total = self._added(total, part) if source else part
        return total

    def _added(self, a, b):
        return [x + y for x, y in zip(a, b, strict=True)]

    def _loaded(self, at, count, stride):
        """So many sums, in vectors of four that are `stride` apart."""
        return [v for i in range(count // 4) for v in ops.load_vector(at + i * stride)]

    # Scaling and storing

    def _rows(self, tile: Tile, lane: Lane, work: Work, m) -> Rows:
        """The rows of y that a thread stores.

        The next octets of a tile's rows go to the next group, of a group's to the next CTA.
        """
        octets = self._cta_octets(work.split)
        first = lane.k_group * self.group_octets + work.rank * octets
        end = cutlass.min(first + octets, (lane.k_group + 1) * self.group_octets)
        row = tile.m_tile * self.tile_m if tile.row is None else tile.row
        limit = m if tile.end is None else tile.end
        return Rows(row + first * 8, cutlass.min(row + cutlass.min(end * 8, self.tile_m), limit))

    @cute.jit
    def _constants(self, call: Call, place: Place):
        """The scales and the biases of the rows of the weight that a thread sums."""
        output, problem, group = call.output, call.problem, place.group
        g = place.thread % 32 // 4
        row = self._warp_row(place.first_block, place.thread)
        last = self._last_row(problem.n)
        scales = []
        biases = []
        for b in cutlass.range_constexpr(self.blocks):
            for half in cutlass.range_constexpr(2):
                at = row + (g // 2) * 8 + b * 4 + half * 2 + g % 2
                at = cutlass.min(at, last)
                scale_at = at * problem.w_scale_stride
                if const_expr(self.gated):
                    at = self._logical_row(at, half, problem.n)
                if const_expr(group is not None):
                    used = Int64(cutlass.max(group, 0))
                    scale_at = Int64(scale_at) + used * Int64(call.groups.w_scale_stride)
                    at = Int64(at) + used * Int64(problem.n)
                scale = ops.load_element(output.w_scale, Float32, scale_at)
                bias = self._bias(output.bias, problem.bias_dtype, at)
                scales.append(self._or_zero(scale, group))
                biases.append(self._or_zero(bias, group))
        return scales, biases

    def _or_zero(self, value, group):
        """`value`, or 0 for rows that are in no group of the weight's."""
        return value if group is None else ops.select(group < 0, Float32(0.0), value)

    def _row_scales(self, call: Call, place: Place, j):
        """The scales of the two rows of octet `j` that a thread's sums are of.

        Rows past the last get the last's.
        """
        output, problem = call.output, call.problem
        stride = problem.x_scale_stride
        row = place.rows.first + 8 * j + place.thread % 4 * 2
        scales = []
        for e in range(2):
            index = cutlass.min(row + e, problem.m - 1) * stride
            scale = ops.load_float_or_one(output.x_scale, output.w_scale, stride >= 0, index)
            scales.append(self._or_zero(scale, place.group))
        return scales

    @cute.jit
    def _bias(self, bias, dtype, index):
        """An element of the bias, 0 where there is none."""
        value = Float32(0.0)
        if dtype == 0:
            value = ops.load_element(bias, Float32, index)
        elif dtype == 1:
            value = ops.load_element(bias, BFloat16, index)
        elif dtype == 2:
            value = ops.load_element(bias, Float16, index)
        return value

    def _warp_row(self, first_block, thread):
        """The first of the rows of the weight that a warp sums, as they are packed."""
        tile = (first_block // 2) * layout.TILE_N
        return tile + (thread // 32) * 32 + (first_block % 2) * 4

    def _last_row(self, n):
        """The last row of the weight as it is packed: of a gated one, with each half padded."""
        if not self.gated:
            return n - 1
        return cute.ceil_div(n // 2, BLOCK_N) * layout.TILE_N - 1

    def _logical_row(self, row, half, n):
        """Where a gated weight's row is among [gate; up]; the last's where it is padding.

        Packed, two gates and their two ups follow one another.
        """
        return cutlass.min(row // 4 * 2 + row % 2, n // 2 - 1) + half * (n // 2)

    @cute.jit
    def _store(self, sums, tile: OutputTile, call: Call):
        """Scales a thread's share of a tile and stores it from registers.

        A lane 4*g + t holds rows g of 8 of the weight for rows 2*t and 2*t + 1 of 8 of x. Once
        transposed it holds row g of x and, the order of the weight's rows being what it is, eight
        (or four, where the warpgroup has one block) neighboring elements from 8*t. Where each gate
        and up row have one output it is four (or two) from 4*t.
        """
        problem, place = call.problem, tile.place
        lane = place.thread % 32
        g, t = lane // 4, lane % 4
        warp_n = self._warp_row(place.first_block, place.thread)
        at = (g, warp_n // 2 + t * 4) if self.gated else (g, warp_n + t * 8)
        # A branch for each way of storing, and no branch within: code that is run once, and is
        # long, should at least be contiguous.
        if const_expr(self.gated):
            if problem.n // 2 % (2 * self.blocks) != 0 or problem.out_dtype == 0:
                self._store_tile(sums, tile, call, at, "any")
            else:
                self._store_tile(sums, tile, call, at, "16-bit")
        elif problem.n % (4 * self.blocks) != 0:
            self._store_tile(sums, tile, call, at, "any")
        elif problem.out_dtype == 0:
            self._store_tile(sums, tile, call, at, "f32")
        elif problem.out_dtype == 1:
            self._store_tile(sums, tile, call, at, "bf16x2")
        else:
            self._store_tile(sums, tile, call, at, "f16x2")

    @cute.jit
    def _store_tile(self, sums, tile: OutputTile, call: Call, at, form: cutlass.Constexpr[str]):
        """Stores rows in one form; the thread has a row of each octet, and columns, from `at` on.

        "f32", "bf16x2", "f16x2", "16-bit" for either of the two, or "any", element by element.
        """
        place, problem, y = tile.place, call.problem, call.output.y
        g, column = at
        n = problem.n // 2 if self.gated else problem.n
        for j in cutlass.range_constexpr(tile.octets):
            row_scale = (
                self._row_scales(call, place, j) if tile.row_scales is None else tile.row_scales[j]
            )
            if const_expr(self.gated):
                pairs = self._activated(sums, tile, j, row_scale, call.activation)
            else:
                out_dtype = FORMS.index(form) if form in FORMS else problem.out_dtype
                pairs = self._scaled(sums, tile, j, row_scale, out_dtype)
            words = self._transposed(pairs, form, problem.out_dtype)
            row = place.rows.first + 8 * j + g
            index = Int64(row) * Int64(n) + Int64(column)
            if const_expr(form == "any"):
                if row < place.rows.end:
                    for i in cutlass.range_constexpr(len(words)):
                        if column + i < n:
                            self._store_element(
                                y, problem.out_dtype, index + i, ops.float_of(words[i])
                            )
            else:
                address = ops.element_address(y, index, 4 if form == "f32" else 2)
                if row < place.rows.end and column < n:
                    ops.store_words(address, words)

    def _scaled(self, sums, tile: OutputTile, j, row_scale, out_dtype):
        """A thread's outputs of octet `j`: for each row of the weight those of two rows of x."""
        pairs = []
        for b in range(self.blocks):
            for half in range(2):
                c = 2 * b + half
                pairs.append(
                    [
                        fma_to(
                            row_scale[e] * tile.scales[c],
                            sums[self._flat(j, b, half, e, tile.octets)]
                            * Float32(ops.ACCUMULATOR_SCALE),
                            tile.biases[c],
                            out_dtype,
                        )
                        for e in range(2)
                    ]
                )
        return pairs

    def _activated(self, sums, tile: OutputTile, j, row_scale, activation):
        """The same where a gate and an up row have one output."""
        pairs = []
        for b in range(self.blocks):
            pair = []
            for e in range(2):
                halves = [
                    (
                        row_scale[e] * tile.scales[2 * b + half],
                        sums[self._flat(j, b, half, e, tile.octets)]
                        * Float32(ops.ACCUMULATOR_SCALE),
                        tile.biases[2 * b + half],
                    )
                    for half in range(2)
                ]
                pair.append(gated(*halves, activation))
            pairs.append(pair)
        return pairs

    def _transposed(self, pairs, form, out_dtype):
        """Neighboring elements of a row of y, packed into words, from pairs of a column's.

        Float32 goes as two matrices of 16-bit elements, the upper and the lower halves.
        """
        if form in ("bf16x2", "f16x2"):
            return [ops.transpose(ops.round_pair(low, high, form)) for low, high in pairs]
        if form == "16-bit":
            both = [[ops.round_pair(*p, f) for f in ("bf16x2", "f16x2")] for p in pairs]
            return [ops.transpose(ops.select(out_dtype == 1, *words)) for words in both]
        words = []
        for low, high in pairs:
            a, b = ops.bits(low), ops.bits(high)
            upper = ops.transpose(ops.permute(a, b, 0x7632))
            lower = ops.transpose(ops.permute(a, b, 0x5410))
            words += [ops.permute(lower, upper, 0x5410), ops.permute(lower, upper, 0x7632)]
        return words

    @cute.jit
    def _store_element(self, y, out_dtype, index, value):
        """Rounds a Float32 to the output's type and stores it."""
        if out_dtype == 0:
            self._store_as(y, "f32", index, value)
        elif out_dtype == 1:
            self._store_as(y, "bf16x2", index, value)
        else:
            self._store_as(y, "f16x2", index, value)

    def _store_as(self, y, dtype, index, value):
        """Rounds a Float32 to "f32", "bf16x2" or "f16x2" (its element type) and stores it."""
        if dtype == "f32":
            ops.store_word(ops.element_address(y, index, 4), ops.bits(value))
        else:
            ops.store_half(ops.element_address(y, index, 2), ops.round_pair(value, value, dtype))
