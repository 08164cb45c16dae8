# SPDX-License-Identifier: Apache-2.0
"""What the GEMM configs of all Blackwell architectures have in common: gated weights."""

import dataclasses
from collections.abc import Iterable

from jax_nvfp4.config.gemm.types import GemmConfig, Rule

GATED_RUN, GATED_HALF_TILE = 8, 64
"""A gated weight is packed in runs of so many gates and ups, each half padded to half of a tile."""


def gated_configs(configs: Iterable[GemmConfig]) -> tuple[GemmConfig, ...]:
    """The twins of configs for gated weights: for quantized and for bfloat16 x, as on Hopper."""
    return tuple(_gated(config) for config in configs if config.x_dtype != "float16")


def gated_rules(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rows of a table for gated weights.

    A gated weight is as long as a plain one of as many rows, and stores half as much. Where K is
    split its parts are those of a plain one; the activation comes after their sum.
    """
    return tuple(
        dataclasses.replace(rule, config=_gated(rule.config))
        for rule in rules
        if rule.config.x_dtype != "float16"
    )


def _gated(config: GemmConfig) -> GemmConfig:
    """The twin of a config that makes one output of a gate and its up."""
    prefix = f"gemm_{config.arch.replace('_', '')}_"
    name = f"{prefix}gated_{config.name.removeprefix(prefix)}"
    return dataclasses.replace(config, name=name, epilogue="gated")
