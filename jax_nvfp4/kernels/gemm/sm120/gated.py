# SPDX-License-Identifier: Apache-2.0
"""Gated products in the epilogues of sm_120: where a gate and its up are, and what they make.

A gated weight is packed in runs of 8 gates and their 8 ups, each half padded to half of a tile of
128 rows (`layout.gated`). Its scales are in that order, its bias and y in the logical one.
"""

from cutlass import Float32, Int32, cute

from jax_nvfp4.config.gemm.sm120 import GATED_HALF_TILE, GATED_RUN
from jax_nvfp4.kernels.gemm.gate import gated
from jax_nvfp4.kernels.gemm.sm120 import ptx as ops
from jax_nvfp4.kernels.gemm.sm120.arguments import Scales


def packed_rows(n):
    """The rows of a gated weight of n rows as it is packed."""
    return 2 * cute.round_up(n // 2, GATED_HALF_TILE)


def output_of(gate):
    """The column of y that a gate's row of the packed weight has a part in."""
    return gate // (2 * GATED_RUN) * GATED_RUN + gate % GATED_RUN


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
        gate = output // GATED_RUN * (2 * GATED_RUN) + output % GATED_RUN
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
