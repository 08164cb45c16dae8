# SPDX-License-Identifier: Apache-2.0
"""How much of a long test runs: a sample in CI, all of it in `.ci/nightly`.

Kernels share their sources, and all parts of the package the numerics, so that a sample that
differs from kernel to kernel, or from one argument to the next, sees nearly what all would see. The
mark `sampled(every)` (see conftest.py) does it for parameters, of which `every` should have no
divisor in common with the number: each value then meets several of the others.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SWEEP = os.environ.get("JAX_NVFP4_SWEEP", "0") != "0"
"""Whether everything runs: `JAX_NVFP4_SWEEP=1 pytest`."""


def sample(items: Sequence[T], every: int, turn: int) -> list[T]:
    """Each `every`-th item, starting with the one whose `turn` it is; in a sweep all of them."""
    return list(items) if SWEEP else list(items[turn % every :: every])
