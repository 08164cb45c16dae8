# SPDX-License-Identifier: Apache-2.0
"""Gated products in the epilogues of sm_120: what a gate and its up make of each other."""

from cutlass import Float32, Int32, cute

from jax_nvfp4.config.gemm.blackwell import GATED_RUN
from jax_nvfp4.kernels.gemm.gate import gated
from jax_nvfp4.kernels.gemm.interleaved import gate_of
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.arguments import Scales


class Pair:
    """A gate and its up.

    Args:
        output: the column of y that is theirs.
        n: rows of the weight.

    Attributes:
        packed: their rows of the weight as it is packed.
        logical: in the order [gate; up].
    """

    def __init__(self, output, n):
        gate = gate_of(output)
        self.packed = (gate, gate + GATED_RUN)
        self.logical = (output, output + n // 2)

    def constants(self, scales: Scales):
        """The scales and the biases of the two."""
        return (
            [ops.load_global(scales.w, row * scales.w_stride) for row in self.packed],
            [ops.load_bias(scales.bias, scales.bias_dtype, row) for row in self.logical],
        )


def activated(sums, x_value, constants, scales: Scales):
    """The Float32 output of a gate's and its up's sums, of a row of x whose scale is `x_value`."""
    halves = [
        (x_value * w_value, total, bias)
        for w_value, total, bias in zip(constants[0], sums, constants[1], strict=True)
    ]
    return gated(*halves, scales.activation)


@cute.jit
def row_scale(scales: Scales, row: Int32) -> Float32:
    """The scale of a row of x, 1 where there is none."""
    value = Float32(1.0)
    if scales.x_stride >= 0:
        value = ops.load_global(scales.x, row * scales.x_stride)
    return value
