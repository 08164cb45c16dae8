# SPDX-License-Identifier: Apache-2.0
"""sm_120 GEMM of 16-bit x by an NVFP4 weight (W4A16), for few rows.

The small-M kernel with another inner loop: x comes as bf16 or f16; a warp expands its 16 rows of
codes, times their block scales, to the operands of the 16-bit MMA. A code times a scale is exact in
either type, so that the result is that of the dequantized weight.

The MMA's K index within a row's 64 elements is free as long as both operands agree. `ldmatrix`
gives lane t of a quad the codes 8*t..8*t+7 of 32, all of one block; with the pairs (c, c + 4) that
come out of the expansion, MMA h of the two for these 32 takes

    slots 2*t, 2*t+1      elements 8*t + 2*h,     8*t + 2*h + 4
    slots 2*t+8, 2*t+9    elements 8*t + 2*h + 1, 8*t + 2*h + 5

and x's lane reads its elements 8*t..8*t+7 at once.
"""

import cutlass
from cutlass import Boolean, Float32, Int32, Uint16, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.kernels.gemm.arguments import Operands
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.persistent import Load, scales_tma
from jax_nvfp4.kernels.gemm.sm120.small_m import (
    ROW_BYTES,
    WEIGHT,
    WEIGHT_SCALES,
    SmallM,
    weight_tma,
)
from jax_nvfp4.kernels.ptx import load_shared_x4, permute

_KINDS = {"bfloat16": "bf16", "float16": "f16"}


class WeightOnly(SmallM):
    """The kernel of a weight-only config; see the module."""

    def __init__(self, config: GemmConfig) -> None:
        if config.tile_m != 16:
            raise ValueError(f"{config.name}: the warps' layout is for 16 rows of x")
        self.kind = _KINDS[config.x_dtype]
        super().__init__(config)

    def stage_loads(self) -> tuple[Load, ...]:
        """What one stage holds: x, 64 elements of its rows after another, w, scales of w."""
        rows = Load((16, 64, 4), (64, 1, 16 * 64), Uint16, ROW_BYTES)
        return rows, WEIGHT, WEIGHT_SCALES

    def maps(self, operands: Operands, m, n, k_blocks):
        """(copy atom, coordinate tensor) for each of `loads`."""
        row_tiles = cutlass.max(cute.ceil_div(n, 128), 1)
        rows, _, w_scales = self.loads
        shape = (cutlass.max(m, 1), 64, k_blocks)
        stride = (cute.assume(k_blocks * 64, divby=64), 1, 64)
        return (
            rows.tma(operands.x, shape, stride),
            weight_tma(operands.w, row_tiles, cute.assume(k_blocks * 32, divby=32)),
            scales_tma(w_scales, operands.sfw, row_tiles, k_blocks),
        )

    def coordinates(self, row, column, k_tile):
        """Which tile of each of `loads` a stage takes."""
        return (
            (row, 0, k_tile),
            (column % 2, column // 2, k_tile),
            (column % 2, k_tile, column // 2),
        )

    def addresses(self, bases, warp, lane):
        """The lane's shared-memory addresses in stage 0, for each of `loads`."""
        q, t = lane // 4, lane % 4
        w_row = 16 * warp + lane % 16
        return (
            bases[0] + q * ROW_BYTES + (t ^ q) * 16,
            bases[1] + w_row * ROW_BYTES + ((lane // 16) ^ (lane % 8)) * 16,
            bases[2] + q * 16 + 4 * warp,
        )

    def item_addresses(self, addresses, row):
        """The addresses for row tile `row`: the same for all."""
        return addresses

    def load(self, addresses):
        """Loads a warp's operands of a stage, lists of one entry for each 64 of K.

        Returns:
            (codes, 4 registers: rows q, q + 8 of elements 0..31, then of 32..63;
            scales, 2 registers: rows q, q + 8;
            x, by row block and 32 elements, 4 registers).
        """
        x_address, w_address, sfw_address = addresses
        codes, scales, x = [], [], []
        for i in range(4):
            codes.append(ops.ldmatrix_x4(w_address ^ (32 * i)))
            scales.append([ops.load_shared(sfw_address + 256 * i + 128 * r) for r in range(2)])
            blocks = []
            for j in range(2):
                address = x_address + i * 16 * ROW_BYTES + j * 8 * ROW_BYTES
                blocks.append([load_shared_x4(address ^ (64 * g)) for g in range(2)])
            x.append(blocks)
        return codes, scales, x

    def multiply(self, accumulators, fragments, rows):
        """Adds the product of a stage; the second row block only if there are rows in it."""
        codes, scales, x = fragments
        # The lane's scales of elements 8*t.. and 32 + 8*t.. are bytes t // 2 and 2 + t // 2.
        t = cute.arch.lane_idx() % 4
        selector = t // 2 * 0x11 + 0x20
        for i in range(4):
            pairs = [
                ops.expand_scales(permute(word, word, selector), self.kind) for word in scales[i]
            ]
            for g in range(2):
                a = [ops.expand_pairs(codes[i][2 * g + r], pairs[r][g], self.kind) for r in (0, 1)]
                b = [self.x_pairs(x[i][j][g]) for j in range(2)]
                self.multiply_32(accumulators, a, b, rows > 8)

    def x_pairs(self, words):
        """Pairs (c, c + 4), c = 0..3, of eight elements of x."""
        low, high = Int32(0x5410), Int32(0x7632)
        return [permute(words[h], words[h + 2], half) for h in range(2) for half in (low, high)]

    @cute.jit
    def multiply_32(self, accumulators, a, b, both: Boolean):
        """Adds the product of 32 of K, two MMAs for each row block."""
        for h in cutlass.range_constexpr(2):
            self.multiply_16(accumulators, a, b[0], 0, h)
        if both:
            for h in cutlass.range_constexpr(2):
                self.multiply_16(accumulators, a, b[1], 1, h)

    def multiply_16(self, accumulators, a, b, block, h):
        """One MMA: the rows' pairs 2*h and 2*h + 1."""
        low, high = 2 * h, 2 * h + 1
        d = ops.mma_16bit(
            [accumulators[block, e] for e in range(4)],
            [a[0][low], a[1][low], a[0][high], a[1][high]],
            [b[low], b[high]],
            self.kind,
        )
        for e in range(4):
            accumulators[block, e] = d[e]

    def finish(self, accumulators):
        """Takes out the power of two that `expand_pairs` left in the products."""
        for j in range(self.blocks):
            for e in range(4):
                accumulators[j, e] = accumulators[j, e] * Float32(ops.UNSCALE[self.kind])
