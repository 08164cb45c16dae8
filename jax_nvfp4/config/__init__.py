# SPDX-License-Identifier: Apache-2.0
"""Architectures, GEMM problems and kernel configs: the data that build, run time and tests share.

A problem says what is asked (`GemmProblem`); a config says how one compiled kernel does it
(`GemmConfig`, `QuantizeConfig`). They are separate frozen types. In `gemm/` each architecture's
module (`sm90`, `sm100`, `sm120`) lists its configs and a selection table, `RULES`, whose rows each
carry their reason. A name that says nothing else is about GEMMs.
This package imports nothing but the standard library, `integers` and itself.
"""

from jax_nvfp4.config.arches import (
    ARCHES,
    PROVEN,
    REFERENCE,
    arch_of_compute_capability,
    most_specific_arch,
    runnable_arches,
)
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.gemm.select import configs, scratch_bytes, select, serves
from jax_nvfp4.config.gemm.types import Gate, GemmConfig, GemmProblem, Rule
from jax_nvfp4.config.limits import Limits
from jax_nvfp4.config.quantize import (
    QuantizeConfig,
    quantize_configs,
    quantize_scratch_bytes,
    select_quantize,
)

__all__ = [
    "ARCHES",
    "PROVEN",
    "REFERENCE",
    "Gate",
    "GemmConfig",
    "GemmProblem",
    "Limits",
    "OutFormat",
    "QuantizeConfig",
    "Rule",
    "Scaling",
    "arch_of_compute_capability",
    "configs",
    "most_specific_arch",
    "quantize_configs",
    "quantize_scratch_bytes",
    "runnable_arches",
    "scratch_bytes",
    "select",
    "select_quantize",
    "serves",
]
