# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of sm_120 and sm_121 by an NVFP4 weight: what is built of them.

y (m, n) = alpha * (x @ w.T) + bias, rounded once; alpha = x_scale * w_scale, each a scalar or one
per row. Of a gated weight (m, n / 2), each a gate times its up (`kernels.gemm.gate`). The kernels
are in `pingpong`, `small_m` and `weight_only`, the choice between them in `config.gemm.sm120`, the
performance model in NOTES.md.
"""

from cutlass import cute

from jax_nvfp4.config import GemmConfig
from jax_nvfp4.config.gemm.sm120 import CONFIGS
from jax_nvfp4.kernels.gemm.arguments import HostCall
from jax_nvfp4.kernels.gemm.host import example_args, host_function
from jax_nvfp4.kernels.gemm.sm120.pingpong import Pingpong
from jax_nvfp4.kernels.gemm.sm120.small_m import SmallM
from jax_nvfp4.kernels.gemm.sm120.split_k import Reduce
from jax_nvfp4.kernels.gemm.sm120.weight_only import WeightOnly
from jax_nvfp4.kernels.variant import KernelVariant, Launch

_KINDS = {"pingpong": Pingpong, "small_m": SmallM, "weight_only": WeightOnly}


def variant(config: GemmConfig) -> KernelVariant:
    """The kernel of a config: its launch, and the reduction's after a split."""
    gemm = _KINDS[config.kind](config)
    reduce = Reduce(config)

    @cute.jit
    def launch(call: HostCall):
        gemm.launch(call)
        if call.split_k > 1:
            reduce.launch(call)

    return KernelVariant(
        config.name,
        "gemm",
        config.arch,
        config,
        host_function(launch),
        example_args(),
        Launch(gemm.threads, gemm.shared_bytes),
    )


def variants(arch: str) -> list[KernelVariant]:
    """The kernels to build for `arch`: one for each config of it, but for 16-bit x."""
    return [variant(c) for c in CONFIGS if c.arch == arch and c.kind != "weight_only"]
