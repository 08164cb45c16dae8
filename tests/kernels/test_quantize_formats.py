# SPDX-License-Identifier: Apache-2.0
"""Each quantize kernel in each shape of its threads: the shapes and formats that share no code.

An object holds a kernel for few rows, for long ones, for rows that vectors cannot load, and for
each format. All of them meet rows of several warps, and padding in a tile of scales that has rows.
"""

import mutation
import numpy as np
import pytest

from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.quantize import QUANTIZE_CONFIGS

tests = mutation.module_of("test_quantize_kernels")
# The PTX of sm_120f's is sm_100f's: see test_quantize_corners.
CONFIGS = [c for c in QUANTIZE_CONFIGS if c.arch != "sm_120f"]
# (m, k, multiprocessors)
SHAPES = {
    "flat": ((67, 64, 132), (70, 17, 132)),
    "rows": ((66, 528, 132), (66, 1048, 4), (66, 1033, 132), (67, 64, 2), (67, 17, 132)),
    "grid": ((67, 64, 3), (70, 17, 3), (67, 144, 132), (66, 1033, 2)),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("out_format", [OutFormat.OPERAND, OutFormat.VALUES])
@pytest.mark.parametrize("config", CONFIGS, ids=[c.name for c in CONFIGS])
def test_each_shape_of_threads(config, out_format):
    rng = np.random.default_rng(6)
    for seed, (m, k, sms) in enumerate(SHAPES[config.kind]):
        x = rng.standard_normal((m, k)).astype(config.x_dtype)
        x[m - 1, k // 2] = 11  # the largest, in the last warp of its row or near it
        x[3, k - 1] = -13
        for scaling in tests.SCALINGS[config.kind]:
            g = tests.given_scales(rng, x, scaling, bad=False)
            tests.check(config, x, scaling, out_format, g, seed=seed, sms=sms)
