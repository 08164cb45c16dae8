# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of sm_120 and sm_121 by an NVFP4 weight: host functions and variants to build.

y (m, n) = alpha * (x @ w.T) + bias, rounded once; alpha = x_scale * w_scale, each a scalar or one
per row. The kernels are in `gemm_sm120_pingpong`, `gemm_sm120_stream` and
`gemm_sm120_weight_only`, the choice between them in `config.sm120`, the performance model in
NOTES.md.
"""

from collections.abc import Callable
from typing import Any

import cutlass
from cuda.bindings import driver as cuda
from cutlass import Float32, Int32, cute
from cutlass.cute.runtime import make_fake_stream, make_ptr

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.config import sm120 as configs
from jax_nvfp4.kernels.gemm_sm120_pingpong import Pingpong
from jax_nvfp4.kernels.gemm_sm120_reduce import Reduce
from jax_nvfp4.kernels.gemm_sm120_stream import Stream
from jax_nvfp4.kernels.gemm_sm120_weight_only import WeightOnly
from jax_nvfp4.kernels.variant import KernelVariant

_KINDS = {"pingpong": Pingpong, "stream": Stream, "weight_only": WeightOnly}


def host_function(config: GemmConfig) -> Callable[..., None]:
    """The host function of a config: launches its kernel, and the reduction after a split."""
    gemm = _KINDS[config.kind](config)
    reduce = Reduce()

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
        m: Int32,
        n: Int32,
        k: Int32,
        x_scale_stride: Int32,
        w_scale_stride: Int32,
        bias_dtype: Int32,
        out_dtype: Int32,
        split_k: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        operands = (x, sfx, w, sfw)
        scales = (x_scale, x_scale_stride, w_scale, w_scale_stride, bias, bias_dtype)
        out = (y, scratch, m, n, out_dtype)
        gemm.launch(operands, scales, out, k, split_k, num_sms * config.ctas_per_sm, stream)
        if split_k > 1:
            reduce.launch(scales, out, split_k, stream)

    return host


def example_args() -> tuple[Any, ...]:
    """Arguments that give the host function's parameters their types."""

    def pointer(dtype: Any, alignment: int) -> Any:
        return make_ptr(dtype, 1024, cute.AddressSpace.gmem, assumed_align=alignment)

    codes = [pointer(cutlass.Uint8, 16) for _ in range(4)]
    scales = [pointer(Float32, 4) for _ in range(2)]
    rest = [pointer(cutlass.Uint8, 16) for _ in range(3)]
    return (*codes, *scales, *rest, *(Int32(1) for _ in range(9)), make_fake_stream())


def variants(arch: str) -> list[KernelVariant]:
    """The kernels to build for `arch`: one for each config of it."""
    return [
        KernelVariant(c.name, "gemm", arch, c, host_function(c), example_args())
        for c in configs.CONFIGS
        if c.arch == arch and c.kind in _KINDS
    ]
