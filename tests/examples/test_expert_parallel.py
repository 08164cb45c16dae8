# SPDX-License-Identifier: Apache-2.0
"""The expert-parallel example gives on a mesh what one device gives."""

import importlib.util
from pathlib import Path

import jax
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "expert_parallel.py"


@pytest.mark.skipif(jax.device_count() < 2, reason="needs several devices")
def test_each_way_is_one_devices():
    spec = importlib.util.spec_from_file_location("expert_parallel", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.EXPERTS % jax.device_count()  # experts that the mesh does not divide
    by_jit, *exchanged = example.run().values()
    assert by_jit == 0.0
    assert len(exchanged) == 2
    assert max(exchanged) < 2**-7  # a rounding of the result to bfloat16, twice
    ratio = example.bytes_of_a_row("bfloat16") / example.bytes_of_a_row("codes")
    assert ratio > 3.4
