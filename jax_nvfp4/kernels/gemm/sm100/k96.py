# SPDX-License-Identifier: Apache-2.0
"""The main loop of the pair configs with MMAs of 96 along K, which sm_103a alone has.

Three stages of 256 along K make eight MMAs:

    bytes of a row      0       48       96      144      192      240      288      336      384
    MMA                 |   0   |    1   |    2   |    3   |    4   |    5   |    6   |    7   |
    stage               |          0         |          1          |           2              |

MMAs 2 and 5 read from two stages. Descriptors are in the absolute mode of sm_103a: beside the
address of the first byte they have the address of the buffer in which a row goes on.

An MMA takes six scales of each row. A tensor-memory column holds four, so that an even MMA starts
with the first byte of a column (scale id 0) and an odd one with the third (id 2) of the next. Two
MMAs use three columns, and each three scale tiles of 64 along K take the place of the three before.

All MMAs of an accumulator have the same K: the PTX ISA orders those of one shape only ("Pipelined
tcgen05 instructions"). So K is rounded up to 96; what exceeds it is zeros, filled in by TMA.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass._mlir.dialects import llvm
from cutlass.cute.nvgpu import tcgen05
from cutlass.cutlass_dsl import dsl_user_op

from jax_nvfp4.kernels.gemm.ring import Ring, advance
from jax_nvfp4.kernels.gemm.sm100.ptx import K_BLOCKS, ROWS, STAGE_BYTES_K, Shape

STAGES = 3  # of a period
MMAS = 8  # of a period
NEEDS_STAGE = (0, 2, 5)  # MMAs that are the first to read a stage
CROSSES = (2, 5)  # MMAs that read two
# Scale tiles of 64 along K that each MMA is the first to need, and to find loaded.
TILES = {0: (0, 1, 2), 2: (3, 4, 5), 4: (6, 7), 5: (8,), 6: (9, 10, 11)}

UNIT = 16  # bytes that descriptors count by
# Upper halves of shared-memory descriptors: 8 rows are 1024 or 128 bytes apart; version 1; for
# operands also the absolute mode and the swizzle of 128 bytes.
OPERAND_HIGH = 1024 // UNIT | 1 << 14 | 1 << 20 | 2 << 29
SCALES_HIGH = 128 // UNIT | 1 << 14
SCALES_LOW = 1 << 16  # leading dimension: unused where a row is 16 bytes


@dsl_user_op
def copy_scale_tile(column, descriptor, *, loc=None, ip=None):
    """Copies a scale tile, 128 rows by 64 of K, to tensor memory from `column` on, in both CTAs."""
    llvm.inline_asm(
        None,
        [Int32(v).ir_value(loc=loc, ip=ip) for v in (column, descriptor)],
        f"{{\n.reg .b64 d;\nmov.b64 d, {{$1, {SCALES_HIGH}}};\n"
        "tcgen05.cp.cta_group::2.32x128b.warpx4 [$0], d;\n}",
        "r,r,~{memory}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


@dsl_user_op
def mma(acc, a, b, instruction, sfa, sfb, accumulate, *, loc=None, ip=None):
    """Issues an MMA of a pair: `a` and `b` are the lower halves of the operands' descriptors."""
    operands = (acc, a, b, instruction, sfa, sfb, accumulate)
    llvm.inline_asm(
        None,
        [Int32(v).ir_value(loc=loc, ip=ip) for v in operands],
        "{\n.reg .b64 a, b;\n.reg .pred p;\nsetp.ne.b32 p, $6, 0;\n"
        f"mov.b64 a, {{$1, {OPERAND_HIGH}}};\nmov.b64 b, {{$2, {OPERAND_HIGH}}};\n"
        "tcgen05.mma.cta_group::2.kind::mxf4nvf4.block_scale.block16 "
        "[$0], a, b, $3, [$4], [$5], p;\n}",
        "r,r,r,r,r,r,r,~{memory}",
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


def instruction(shape: Shape, scale_id: int) -> int:
    """The instruction descriptor: e2m1 operands, e4m3 scales from byte `scale_id` on, K = 96."""
    m, n = ROWS * shape.ctas, shape.columns
    descriptor = scale_id << 4 | 1 << 7 | 1 << 10 | n >> 3 << 17 | m >> 7 << 27 | scale_id << 29
    return (descriptor | 1 << 31) - (1 << 32)  # bit 31 is K, and the sign


def start(buffer):
    """Where a buffer of shared memory starts, as descriptors have it: 18 bits of the address."""
    return (buffer.data_ptr().toint() & 0x3FFFF) // UNIT


def counts(k_tiles):
    """(MMAs, stages) that `k_tiles` times 64 along K take."""
    mmas = cute.ceil_div(2 * k_tiles, 3)
    return mmas, cute.ceil_div(STAGES * mmas, MMAS)


class MultiplyK96:
    """The MMAs of an accumulator tile, by the MMA warp of a pair's first CTA.

    One thread issues all of them, waits and commits, in one branch: so ptxas knows that they are
    one thread's. Behind an election for each instruction it puts a loop over the elected threads.
    """

    def __init__(self, shape: Shape, tmem):
        self.shape = shape
        self.tmem = tmem
        self.a_units = ROWS * STAGE_BYTES_K // UNIT  # of a stage
        self.b_units = shape.b_rows * STAGE_BYTES_K // UNIT
        self.tile_units = ROWS * 4 // UNIT  # of a scale tile

    @cute.jit
    def run(self, ring: Ring, acc, free_mask, mmas, begin):
        """Multiplies one tile into tensor memory from `acc` on.

        `begin` is the number of stages before the tile's first.
        """
        with cute.arch.elect_one():
            stage = begin % ring.stages
            phase = begin // ring.stages % 2
            older = stage
            newest = stage
            accumulate = Int32(0)
            left = mmas
            while left > 0:
                for j in cutlass.range_constexpr(MMAS):
                    if j < left:
                        if cutlass.const_expr(j in NEEDS_STAGE):
                            cute.arch.mbarrier_wait(ring.full + stage, phase)
                            older = newest
                            newest = stage
                            stage, phase = advance(ring, stage, phase)
                        self.copy_scales(ring.buffers, j, older, newest)
                        self.multiply(acc, ring.buffers, j, older, newest, accumulate)
                        accumulate = Int32(1)
                        if cutlass.const_expr(j in CROSSES):
                            tcgen05.commit(ring.empty + older, free_mask, tcgen05.CtaGroup.TWO)
                tcgen05.commit(ring.empty + newest, free_mask, tcgen05.CtaGroup.TWO)
                left -= MMAS

    def copy_scales(self, storage, j, older, newest):
        """Copies the scale tiles that MMA `j` of a period is the first to need."""
        s = self.shape
        for tile in TILES.get(j, ()):
            stage = older if j == 2 and tile < K_BLOCKS else newest
            k_block, place = tile % K_BLOCKS, tile % 3
            at = (stage * K_BLOCKS + k_block) * self.tile_units + SCALES_LOW
            column = self.tmem.toint() + (s.sfa_column + 4 * place)
            copy_scale_tile(column, start(storage.sfa) + at)
            for block in range(s.b_blocks):
                of_stage = block * K_BLOCKS + k_block
                at = (stage * (s.b_blocks * K_BLOCKS) + of_stage) * self.tile_units + SCALES_LOW
                column = self.tmem.toint() + (s.sfb_column + 4 * (place * s.b_blocks + block))
                copy_scale_tile(column, start(storage.sfb) + at)

    def multiply(self, acc, storage, j, older, newest, accumulate):
        """Issues MMA `j` of a period."""
        s = self.shape
        first = older if j in CROSSES else newest
        offset = 3 * j % 8  # of 48 bytes in a row of 128
        place = j % 2  # of its first column of scales, of three
        a, b = start(storage.a), start(storage.b)
        # The scale id stands in the instruction descriptor and, as CUTLASS has it, in bits 30 and
        # 31 of both scale addresses: id 2 is the sign.
        scale_id = -(1 << 31) * place
        mma(
            acc.toint(),
            a + first * self.a_units + offset | (a + newest * self.a_units) << 16,
            b + first * self.b_units + offset | (b + newest * self.b_units) << 16,
            instruction(s, 2 * place),
            self.tmem.toint() + (s.sfa_column + 4 * place + scale_id),
            self.tmem.toint() + (s.sfb_column + 4 * place * s.b_blocks + scale_id),
            accumulate,
        )
