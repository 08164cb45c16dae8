# SPDX-License-Identifier: Apache-2.0
"""The GEMMs of few rows of 16-bit x, for every Blackwell GPU: sm_120's kernel is on all of them."""

from jax_nvfp4.config import configs
from jax_nvfp4.kernels.gemm.sm120.kernel import variant
from jax_nvfp4.kernels.variant import KernelVariant


def variants(arch: str) -> list[KernelVariant]:
    """The kernels to build for `arch`; none for Hopper, whose other kernels take 16-bit x."""
    return [variant(config) for config in configs(arch) if config.kind == "weight_only"]
