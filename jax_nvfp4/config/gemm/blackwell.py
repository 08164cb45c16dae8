# SPDX-License-Identifier: Apache-2.0
"""What the GEMM configs of all Blackwell architectures have in common: gated weights."""

import dataclasses

from jax_nvfp4.config.gemm.types import GemmConfig

GATED_RUN, GATED_HALF_TILE = 8, 64
"""A gated weight is packed in runs of so many gates and ups, each half padded to half of a tile."""


def gated(config: GemmConfig) -> GemmConfig:
    """The twin of a config that makes one output of a gate and its up."""
    prefix = f"gemm_{config.arch.replace('_', '')}_"
    name = f"{prefix}gated_{config.name.removeprefix(prefix)}"
    return dataclasses.replace(config, name=name, epilogue="gated")
