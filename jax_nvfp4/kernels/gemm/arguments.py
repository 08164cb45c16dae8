# SPDX-License-Identifier: Apache-2.0
"""What a GEMM is given, by what it is about: the host function's parameters in all rooms.

They hold what no loop of a kernel changes. Sizes and indices are Int32.
"""

import dataclasses

from cuda.bindings import driver as cuda
from cutlass import Float32, Int32, cute


@dataclasses.dataclass(frozen=True)
class Operands:
    """Where the operands of the product are.

    Attributes:
        x: activations.
        sfx: their block scales, where they have any.
        w: the repacked weight's codes.
        sfw: its block scales.
    """

    x: cute.Pointer
    sfx: cute.Pointer
    w: cute.Pointer
    sfw: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Output:
    """What makes the result of the sums.

    Attributes:
        x_scale: Float32, scales of the rows of x.
        w_scale: Float32, scales of the rows of the weight.
        bias: of the rows of the weight.
        y: the result.
    """

    x_scale: cute.Pointer
    w_scale: cute.Pointer
    bias: cute.Pointer
    y: cute.Pointer


@dataclasses.dataclass(frozen=True)
class Problem:
    """The integers of a call.

    Attributes:
        m: rows of x.
        n: rows of the weight.
        k: columns, a multiple of 64.
        x_scale_stride: 1 for a scale of each row of x, 0 for one of all, -1 for none.
        w_scale_stride: 1 for a scale of each row of the weight, 0 for one of all.
        bias_dtype: code of the bias's dtype, -1 for no bias.
        out_dtype: code of y's dtype.
    """

    m: Int32
    n: Int32
    k: Int32
    x_scale_stride: Int32
    w_scale_stride: Int32
    bias_dtype: Int32
    out_dtype: Int32


@dataclasses.dataclass(frozen=True)
class Groups:
    """How the rows of x are divided over groups, each with a weight of its own.

    Attributes:
        sizes: Int32, the rows of each group; negative ones count as 0.
        offset: Int32, the number of the group that the first weight is of.
        size_count: how many sizes there are.
        count: how many weights there are.
        w_scale_stride: from the scales of one weight to those of the next.
    """

    sizes: cute.Pointer
    offset: cute.Pointer
    size_count: Int32
    count: Int32
    w_scale_stride: Int32


@dataclasses.dataclass(frozen=True)
class Activation:
    """Of a gated product: gate * sigmoid(gate * (alpha + cubic * gate^2)) * (up + beta).

    Attributes:
        limit: clamps the gate from above, and up from both sides, before.
        alpha: of the sigmoid's argument.
        cubic: likewise.
        beta: added to up.
    """

    limit: Float32
    alpha: Float32
    cubic: Float32
    beta: Float32


@dataclasses.dataclass(frozen=True)
class HostCall:
    """A call of the host function.

    Attributes:
        operands: of the product.
        output: what makes the result of the sums.
        scratch: memory for what one launch leaves to the next.
        problem: the sizes.
        groups: of the rows; of a kernel without groups nothing is in them.
        activation: likewise of a gated product.
        split_k: ways to split K.
        num_sms: multiprocessors to use.
        stream: where to launch.
    """

    operands: Operands
    output: Output
    scratch: cute.Pointer
    problem: Problem
    groups: Groups
    activation: Activation
    split_k: Int32
    num_sms: Int32
    stream: cuda.CUstream
