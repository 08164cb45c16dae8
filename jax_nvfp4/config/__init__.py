# SPDX-License-Identifier: Apache-2.0
"""Architectures, GEMM problems and kernel configs: the data that build, run time and tests share.

A problem says what is asked (`GemmProblem`); a config says how one compiled kernel does it
(`GemmConfig`). They are separate frozen types. Each architecture's module (`sm90`, `sm100`,
`sm120`) lists its configs and a selection table, `RULES`, whose rows each carry their reason.
This package imports nothing but the standard library and itself.
"""

from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.gemm.select import configs, scratch_bytes, select, serves
from jax_nvfp4.config.gemm.types import (
    ARCHES,
    REFERENCE,
    GemmConfig,
    GemmProblem,
    QuantizeConfig,
    Rule,
    arch_of_compute_capability,
    most_specific_arch,
    runnable_arches,
)

__all__ = [
    "ARCHES",
    "REFERENCE",
    "GemmConfig",
    "GemmProblem",
    "OutFormat",
    "QuantizeConfig",
    "Rule",
    "Scaling",
    "arch_of_compute_capability",
    "configs",
    "most_specific_arch",
    "runnable_arches",
    "scratch_bytes",
    "select",
    "serves",
]
