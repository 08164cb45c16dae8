# SPDX-License-Identifier: Apache-2.0
"""The sm_100f GEMM's epilogues for gated weights, of which each gate and its up have one output.

A gated weight is packed in runs of 8 gates and their 8 ups. Where x is A, a thread has both of each
pair among the columns of its row. Where the weight is A, lanes l and l ^ 8 have a gate and its up:
they exchange half of their sums, so that each makes the outputs of half of the tokens.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Boolean, Float16, Float32, Int32, Int64, Uint32

from jax_nvfp4.config.gemm.blackwell import GATED_RUN
from jax_nvfp4.kernels.gemm.gate import gated
from jax_nvfp4.kernels.gemm.interleaved import gate_of, output_of, packed_rows
from jax_nvfp4.kernels.gemm.sm100.arguments import Call, GatedFeature, Handover, Tile
from jax_nvfp4.kernels.gemm.sm100.epilogue import KINDS, Epilogue, PairEpilogue, SwapEpilogue
from jax_nvfp4.kernels.gemm.sm100.ptx import CHUNK
from jax_nvfp4.kernels.ptx import select


def _constants(epilogue: Epilogue, row, call: Call):
    """The scale and the bias of a row of the packed weight; of padding nothing is read."""
    output, problem = call.output, call.problem
    half = problem.n // 2
    column = output_of(row)
    used = column < half
    none = Int32(0)
    logical = column + row % (2 * GATED_RUN) // GATED_RUN * half
    rows = select(used, packed_rows(problem.n), none)
    return (
        epilogue.read_scale(output.w_scale, problem.w_scale_stride, row, rows),
        epilogue.read_bias(output.bias, problem.bias_dtype, logical, select(used, problem.n, none)),
    )


class GatedPairEpilogue(PairEpilogue):
    """Where x is A: 64 accumulators of a row make 32 outputs."""

    @cute.jit
    def write_constants(self, storage, place, col, call: Call):
        """Puts the scale and the bias of a row of the packed weight into shared memory."""
        scale, bias = _constants(self, col, call)
        self.write_column(storage, place, scale)
        self.write_column(storage, place + self.shape.columns, bias)

    @cute.jit
    def store_tile(self, call: Call, storage, handover: Handover, tile: Tile, buffers, used):
        """Scales and stores the warp's rows of a tile; returns the staging buffers used so far.

        The outputs of a group fill a box of 128 bytes in float32, those of two groups in 16 bits.
        """
        half, out_dtype = call.problem.n // 2, call.problem.out_dtype
        row = tile.row + tile.warp * 32
        for i in cutlass.range(self.shape.columns // 128, unroll=1):
            for j in cutlass.range_constexpr(2):
                group = self.group_of(2 * i + j, tile)
                outputs = self.outputs(2 * i + j, group, call, storage, handover, tile)
                if out_dtype == 0:
                    buffer = self.staging_buffer(buffers, used)
                    self.stage_words(buffer, cute.recast_tensor(outputs, Uint32), 0)
                    col = tile.column + group * 64
                    self.store_box(buffer, call, 2 * half, row, col)
                    used += 1
                else:
                    if cutlass.const_expr(j == 0):
                        self.staging_buffer(buffers, used)
                    buffer = self.current_buffer(buffers, used)
                    self.stage_words(buffer, self.rounded(outputs, out_dtype), group % 2 * 4)
                    if cutlass.const_expr(j == 1):
                        col = tile.column // 2 + group // 2 * 64
                        self.store_box(buffer, call, half, row, col)
                        used += 1
        return used

    def current_buffer(self, buffers, used):
        """The staging buffer that `staging_buffer` made free."""
        return buffers + cute.assume(used % 2 * 4096, divby=4096)

    def outputs(self, i, group, call: Call, storage, handover: Handover, tile: Tile):
        """The 32 outputs, Float32, of a thread's row and a group, the i-th to be read."""
        halves = self.load_group(i, group, handover, tile)
        outputs = cute.make_rmem_tensor((CHUNK,), Float32)
        for part in range(2):
            col = tile.vectors + group * 64 + part * CHUNK
            scales = self._column_values(storage, col)
            biases = self._column_values(storage, col + self.shape.columns)
            for j in range(CHUNK // 2):
                gate = gate_of(j)
                pair = [
                    (tile.row_scale * scales[c], halves[part][c], biases[c])
                    for c in (gate, gate + GATED_RUN)
                ]
                outputs[part * (CHUNK // 2) + j] = gated(*pair, call.activation)
        return outputs

    @cute.jit
    def rounded(self, outputs, out_dtype):
        """32 outputs rounded to 16 bits, in words."""
        words = cute.make_rmem_tensor((CHUNK // 2,), Uint32)
        for code, kind in ((1, BFloat16), (2, Float16)):
            if out_dtype == code:
                values = cute.make_rmem_tensor((CHUNK,), kind)
                values.store(outputs.load().to(kind))
                cute.autovec_copy(cute.recast_tensor(values, Uint32), words)
        return words


class GatedSwapEpilogue(SwapEpilogue):
    """Where the weight is A: a thread has a gate or an up, its lane ^ 8 the other."""

    def feature(self, row, call: Call):
        """What a thread has to know of its row of the packed weight and of its partner's."""
        scale, bias = _constants(self, row, call)
        is_up = row % (2 * GATED_RUN) >= GATED_RUN
        gate_scale, up_scale = self.exchanged(is_up, scale, scale)
        gate_bias, up_bias = self.exchanged(is_up, bias, bias)
        return GatedFeature(output_of(row), is_up, gate_scale, gate_bias, up_scale, up_bias)

    def exchanged(self, is_up: Boolean, low, high):
        """Of a gate's and its up's pairs (low, high): the two lows for it, the two highs for up.

        Args:
            is_up: the thread has up's.
            low: a Float32.
            high: another, or the same.

        Returns:
            (the gate's, up's).
        """
        got = cute.arch.shuffle_sync_bfly(select(is_up, low, high), GATED_RUN)
        return select(is_up, got, low), select(is_up, high, got)

    def activated(self, sums, token_scale, feature: GatedFeature, call: Call):
        """The Float32 output of a gate's and its up's sums of a token."""
        gate, up = sums
        return gated(
            (feature.gate_scale * token_scale, gate, feature.gate_bias),
            (feature.up_scale * token_scale, up, feature.up_bias),
            call.activation,
        )

    @cute.jit
    def store_features(self, acc, scales, feature: GatedFeature, call: Call, token):
        """Stores CHUNK tokens of one output feature: half of them by the thread with the gate."""
        half, out_dtype = call.problem.n // 2, call.problem.out_dtype
        count = CHUNK // 2
        first = token
        if feature.is_up:
            first += count
        tokens = call.problem.m - first
        if feature.index >= half:
            tokens = Int32(0)
        values = cute.make_rmem_tensor((count,), Float32)
        for j in cutlass.range_constexpr(count):
            sums = self.exchanged(feature.is_up, acc[j], acc[j + count])
            token_scale = select(feature.is_up, scales[j + count], scales[j])
            values[j] = self.activated(sums, token_scale, feature, call)
        for code, kind in enumerate(KINDS):
            if out_dtype == code:
                out = cute.recast_ptr(call.output.y, dtype=kind) + (
                    Int64(first) * half + feature.index
                )
                for j in cutlass.range_constexpr(count):
                    if j < tokens:
                        cell = cute.make_tensor(out + Int64(j) * half, cute.make_layout(1))
                        cell[0] = values[j].to(kind)

    @cute.jit
    def store_sum(self, total, of, feature: GatedFeature, call: Call):
        """Stores one token's output, from the sums of all parts of K, by the gate's thread."""
        scale, first, token = of
        m, half, out_dtype = call.problem.m, call.problem.n // 2, call.problem.out_dtype
        sums = self.exchanged(feature.is_up, total, total)
        value = self.activated(sums, scale, feature, call)
        column = select(feature.is_up, half, feature.index)
        if first + token < m and column < half:
            at = Int64(first + token) * half + feature.index
            for code, kind in enumerate(KINDS):
                if out_dtype == code:
                    out = cute.recast_ptr(call.output.y, dtype=kind) + at
                    cute.make_tensor(out, cute.make_layout(1))[0] = value.to(kind)
