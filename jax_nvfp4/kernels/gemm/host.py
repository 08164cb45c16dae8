# SPDX-License-Identifier: Apache-2.0
"""The host function of a Blackwell GEMM: the package's GEMM signature, written once."""

from collections.abc import Callable
from typing import Any

from cuda.bindings import driver as cuda
from cutlass import Float32, Int32, Uint8, cute
from cutlass.cute.runtime import make_ptr

SCALARS = 12
"""32-bit integers of the signature: m, n, k, two strides, two dtypes, split_k, num_sms, and three
of groups."""


def host_function(launch: Callable[..., None]) -> Callable[..., None]:
    """A host function that launches by `launch`, and launches nothing where y is empty.

    Args:
        launch: `launch(operands, scales, out, k, split_k, num_sms, stream)`, where operands are the
            pointers (x, sfx, w, sfw), scales (x_scale, its stride, w_scale, its stride, bias,
            bias_dtype) and out (y, scratch, m, n, out_dtype). m and n are positive.
    """

    @cute.jit
    def host(
        x: cute.Pointer,
        sfx: cute.Pointer,
        w: cute.Pointer,
        sfw: cute.Pointer,
        x_scale: cute.Pointer,
        w_scale: cute.Pointer,
        bias: cute.Pointer,
        y: cute.Pointer,
        scratch: cute.Pointer,
        group_sizes: cute.Pointer,
        group_offset: cute.Pointer,
        m: Int32,
        n: Int32,
        k: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        split_k: Int32,
        num_sms: Int32,
        size_count: Int32,
        group_count: Int32,
        w_scale_group_stride: Int32,
        limit: Float32,
        alpha: Float32,
        cubic: Float32,
        beta: Float32,
        stream: cuda.CUstream,
    ):
        scales = (x_scale, x_scale_stride, w_scale, w_scale_stride, bias, bias_dtype)
        out = (y, scratch, m, n, out_dtype)
        if m > 0 and n > 0:
            launch((x, sfx, w, sfw), scales, out, k, split_k, num_sms, stream)

    return host


def example_args() -> tuple[Any, ...]:
    """Arguments that give the host function's parameters their types."""

    def pointer(dtype: Any, alignment: int) -> Any:
        return make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=alignment)

    operands = [pointer(Uint8, 16) for _ in range(4)]
    scales = [pointer(Float32, 4) for _ in range(2)]
    rest = [pointer(Uint8, 16) for _ in range(3)] + [pointer(Int32, 4) for _ in range(2)]
    integers = [Int32(1) for _ in range(SCALARS)]
    floats = [Float32(1.0) for _ in range(4)]
    return (*operands, *scales, *rest, *integers, *floats, cuda.CUstream(0))
