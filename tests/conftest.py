# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests; they must be in the environment before JAX is imported."""

import collections
import contextlib
import ctypes
import gc
import os
import pathlib
import sys
from typing import Any

import pytest

os.environ.setdefault("JAX_PLATFORMS", "")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    # The sharding tests need a mesh; on a CPU it is made of virtual devices.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
# The PTX machine multiplies many small matrices: threads of BLAS would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

_FORGET_BYTES = 1 << 30
_kept_bytes = 0


def _resident_bytes() -> int:
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def _free() -> None:
    """Frees what JAX has compiled, and gives the memory back: malloc (glibc's) would keep it."""
    sys.modules["jax"].clear_caches()
    gc.collect()
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def _forget_programs():
    """JAX keeps every program that it compiles: a few gigabytes, if no test let go of them."""
    global _kept_bytes
    yield
    if "jax" in sys.modules and _resident_bytes() > _kept_bytes + _FORGET_BYTES:
        _free()
        _kept_bytes = _resident_bytes()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a test that is marked `sampled` some runs are left out; see `support/sweep.py`."""
    from sweep import SWEEP

    seen: collections.Counter[tuple[pathlib.Path, str]] = collections.Counter()
    kept, left_out = [], []
    for item in items:
        mark = item.get_closest_marker("sampled")
        turn = 0
        if mark is not None:
            test = item.path, getattr(item, "originalname", item.name)
            turn = seen[test] % mark.args[0]
            seen[test] += 1
        (left_out if turn and not SWEEP else kept).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Each worker gets a stretch of neighboring tests, and takes from others when it is through.

    Tests of one module share what they compile and decode; the long ones do not end up last.
    """
    if config.getoption("dist") != "load":  # what -n alone means
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)
