# SPDX-License-Identifier: Apache-2.0
"""The loader's peak of memory, measured as the kernel counts it, in a process of its own."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4 import quantize
from jax_nvfp4.checkpoint import save_checkpoint

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /proc/self/status"
)

MIB = 2**20
LARGEST = 32 * MIB

# The peak is reset after a warm-up, so that it counts what loading adds to the process.
SCRIPT = """
import json, sys
import jax
from jax_nvfp4.checkpoint import iter_checkpoint

def resident(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

keep, small, large = sys.argv[1] == "keep", sys.argv[2], sys.argv[3]
warm = dict(iter_checkpoint(small, stack_experts=True))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")
before = resident("VmRSS")
kept, returned = {}, 0
for key, value in iter_checkpoint(large, stack_experts=True):
    jax.block_until_ready(value)
    if keep:
        kept[key] = value
        returned += value.nbytes
    del value
print(json.dumps({"extra": resident("VmHWM") - before - returned, "returned": returned}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A small checkpoint and a large one of the same kinds; its largest tensor has 32 MiB."""
    folder = tmp_path_factory.mktemp("memory")
    for name, rows in (("small", 16), ("large", LARGEST // 4096)):
        rng = np.random.default_rng(0)
        tensors = {}
        for i in range(3):
            plain = rng.integers(0, 1000, (rows, 2048)).astype(ml_dtypes.bfloat16)
            tensors[f"embed.{i}.weight"] = plain
            # 32 MiB of codes: four times the elements, in NVFP4
            wide = quantize(np.repeat(plain, 4, axis=1))
            tensors[f"layer.{i}.weight"] = wide
        tensors["f8"] = plain.view(ml_dtypes.float8_e4m3fn)
        save_checkpoint(folder / name, tensors, shard_bytes=3 * LARGEST)
        stack = {f"experts.{i}.up.weight": wide for i in range(4)}
        save_checkpoint(folder / f"{name} stack", stack, shard_bytes=3 * LARGEST)
    return folder


def measure(mode, small, large):
    command = [sys.executable, "-c", SCRIPT, mode, small, large]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(result.stdout)


@pytest.mark.parametrize("mode", ["keep", "drop"])
def test_peak_beyond_what_is_returned_is_below_twice_the_largest_tensor(mode, checkpoints):
    measured = measure(mode, checkpoints / "small", checkpoints / "large")
    if mode == "keep":
        assert measured["returned"] > 6 * LARGEST  # the test measures what it means to
    assert measured["extra"] < 2 * LARGEST, measured
    print(f"{mode}: {measured['extra'] / MIB:.1f} MiB beyond what is returned")


def test_peak_beyond_a_stack_of_experts_is_below_two_experts(checkpoints):
    measured = measure("keep", checkpoints / "small stack", checkpoints / "large stack")
    assert measured["returned"] > 4 * LARGEST
    assert measured["extra"] < 2 * LARGEST, measured
