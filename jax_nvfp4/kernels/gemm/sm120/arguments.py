# SPDX-License-Identifier: Apache-2.0
"""What the functions of the sm_120 GEMMs hand to one another, by what it is about.

They hold what no loop of a kernel changes. Sizes and indices are Int32.
"""

import dataclasses

from cutlass import Boolean, Int32, cute

from jax_nvfp4.kernels.gemm.arguments import Activation, HostCall


@dataclasses.dataclass(frozen=True)
class Scales:
    """What is applied to the sums; strides and dtypes as in `gemm.arguments.Problem`.

    Attributes:
        x: Float32, scales of the rows of x.
        x_stride: theirs.
        w: Float32, scales of the rows of the weight.
        w_stride: theirs.
        bias: of the rows of the weight.
        bias_dtype: its dtype's code.
        activation: of a gated product, after the others; else None. The scales are then in the
            order of the weight's rows as they are packed, and the bias is in that of [gate; up].
    """

    x: cute.Pointer
    x_stride: Int32
    w: cute.Pointer
    w_stride: Int32
    bias: cute.Pointer
    bias_dtype: Int32
    activation: Activation | None


@dataclasses.dataclass(frozen=True)
class Result:
    """Where results go.

    Attributes:
        y: the result.
        scratch: Float32, parts of it where K is split.
        m: rows.
        n: rows of the weight: the columns of y, or twice as many where the product is gated.
        out_dtype: code of y's dtype.
    """

    y: cute.Pointer
    scratch: cute.Pointer
    m: Int32
    n: Int32
    out_dtype: Int32


@dataclasses.dataclass(frozen=True)
class Work:
    """The items of a call: tiles of y, each as often as K is split.

    Attributes:
        rows: tiles along the rows of x.
        columns: tiles along the rows of the weight.
        k_tiles: along K.
        split_k: ways to split these.
    """

    rows: Int32
    columns: Int32
    k_tiles: Int32
    split_k: Int32

    @property
    def items(self) -> Int32:
        """How many there are."""
        return self.rows * self.columns * self.split_k


@dataclasses.dataclass(frozen=True)
class Item:
    """What a CTA works on at a time.

    Attributes:
        row: the tile's number along the rows of x.
        column: along the rows of the weight.
        split: the number of its part of K.
        k_begin: the part's first tile along K.
        k_count: how many it has.
    """

    row: Int32
    column: Int32
    split: Int32
    k_begin: Int32
    k_count: Int32


@dataclasses.dataclass(frozen=True)
class Place:
    """Which sums of a call a lane has.

    Attributes:
        row: the first row of y.
        column: the first column, or row of a gated weight as it is packed.
        split: the part of K.
        partial: whether there are other parts, so that these sums go to scratch.
        quad_lane: the lane's place in its quad, where the epilogue needs it.
    """

    row: Int32
    column: Int32
    split: Int32
    partial: Boolean
    quad_lane: Int32 | None = None


def scales_of(call: HostCall, gated: bool) -> Scales:
    """Of a call: what is applied to its sums."""
    output, problem = call.output, call.problem
    return Scales(
        output.x_scale,
        problem.x_scale_stride,
        output.w_scale,
        problem.w_scale_stride,
        output.bias,
        problem.bias_dtype,
        call.activation if gated else None,
    )


def result_of(call: HostCall) -> Result:
    """Of a call: where its results go."""
    problem = call.problem
    return Result(call.output.y, call.scratch, problem.m, problem.n, problem.out_dtype)
