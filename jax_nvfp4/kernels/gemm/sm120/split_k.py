# SPDX-License-Identifier: Apache-2.0
"""The second launch of an sm_120 GEMM that was split along K: sums the parts, scales, stores.

The GEMM leaves float32 parts (split_k, m, ld), ld = n rounded up to 4, in scratch and this kernel
adds them in the order of the splits. Those of a gated weight have ld = its rows as it is packed;
the activation comes after the sum. Two launches in one stream need no semaphore, so scratch can
hold anything before and no sum's order depends on timing.
"""

import cutlass
from cutlass import Float32, Int32, Int64, const_expr, cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.config.gemm.blackwell import GATED_RUN
from jax_nvfp4.kernels.gemm.arguments import HostCall
from jax_nvfp4.kernels.gemm.interleaved import gate_of, packed_rows
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.arguments import Result, Scales, result_of, scales_of
from jax_nvfp4.kernels.gemm.sm120.gated import Pair, activated, row_scale
from jax_nvfp4.kernels.ptx import fma_to

_THREADS = 256


class Reduce:
    """One thread for each 4 columns of a row."""

    def __init__(self, config: GemmConfig) -> None:
        self.gated = config.epilogue == "gated"

    @cute.jit
    def launch(self, call: HostCall):
        """Launches, after the GEMM of the same call."""
        n = call.problem.n
        if const_expr(self.gated):
            n = n // 2
        groups = call.problem.m * cute.ceil_div(n, 4)
        kernel = self.gated_kernel if const_expr(self.gated) else self.kernel
        kernel(scales_of(call, self.gated), result_of(call), call.split_k).launch(
            grid=(cutlass.max(cute.ceil_div(groups, _THREADS), 1), 1, 1),
            block=(_THREADS, 1, 1),
            stream=call.stream,
        )

    @cute.kernel
    def kernel(self, scales: Scales, result: Result, split_k: Int32):
        """y = round_once(alpha * (part 0 + part 1 + ...) + bias)."""
        m, n, out_dtype = result.m, result.n, result.out_dtype
        groups = cute.ceil_div(n, 4)
        index = cute.arch.block_idx()[0] * _THREADS + cute.arch.thread_idx()[0]
        if index < m * groups:
            row = index // groups
            column = (index - row * groups) * 4
            start = result.scratch.toint() + (Int64(row) * groups * 4 + column) * 4
            total = self.added(start, Int64(m) * groups * 16, split_k, 1)
            alpha = row_scale(scales, row)
            width = Int64(4)
            if out_dtype != 0:
                width = Int64(2)
            target = result.y.toint() + (Int64(row) * n + column) * width
            for e in cutlass.range_constexpr(4):
                if column + e < n:
                    w_value = ops.load_global(scales.w, (column + e) * scales.w_stride)
                    added = ops.load_bias(scales.bias, scales.bias_dtype, column + e)
                    value = fma_to(alpha * w_value, total[0, e], added, out_dtype)
                    ops.store_output(target + e * width, value, out_dtype)

    @cute.jit
    def added(self, start: Int64, step: Int64, split_k: Int32, count: cutlass.Constexpr[int]):
        """Adds up four columns of all parts, or so many times four that are a run apart.

        Args:
            start: address of the first part's.
            step: bytes from a part to the next.
            split_k: how many parts there are.
            count: 1, or 2 for gates and their ups.

        Returns:
            The sums, Float32 (count, 4).
        """
        totals = cute.make_rmem_tensor((count, 4), Float32)
        totals.fill(0.0)
        for _ in cutlass.range(split_k, unroll=4):
            for i in cutlass.range_constexpr(count):
                part = cute.make_rmem_tensor((4,), Float32)
                source = ops.global_address(start + i * (4 * GATED_RUN), Float32, 16)
                cute.autovec_copy(cute.make_tensor(source, cute.make_layout(4)), part)
                for e in cutlass.range_constexpr(4):
                    totals[i, e] = totals[i, e] + part[e]
            start += step
        return totals

    @cute.kernel
    def gated_kernel(self, scales: Scales, result: Result, split_k: Int32):
        """The same for gated products: y has a column for each gate and up."""
        m, half, out_dtype = result.m, result.n // 2, result.out_dtype
        ld = packed_rows(result.n)
        groups = cute.ceil_div(half, 4)
        index = cute.arch.block_idx()[0] * _THREADS + cute.arch.thread_idx()[0]
        if index < m * groups:
            row = index // groups
            column = (index - row * groups) * 4
            # Of a run of 8 gates, 4; the ups to them are 8 further.
            first = gate_of(column)
            start = result.scratch.toint() + (Int64(row) * ld + first) * 4
            totals = self.added(start, Int64(m) * ld * 4, split_k, 2)
            x_value = row_scale(scales, row)
            width = Int64(4)
            if out_dtype != 0:
                width = Int64(2)
            target = result.y.toint() + (Int64(row) * half + column) * width
            for e in cutlass.range_constexpr(4):
                if column + e < half:
                    pair = Pair(column + e, result.n)
                    sums = [totals[up, e] for up in range(2)]
                    value = activated(sums, x_value, pair.constants(scales), scales)
                    ops.store_output(target + e * width, value, out_dtype)
