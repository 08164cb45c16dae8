# SPDX-License-Identifier: Apache-2.0
"""How much of a long test runs: a sample in CI, all of it in `.ci/nightly`.

The sample differs from kernel to kernel, so that the kernels, which share their sources, cover
together what each would cover alone.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

SWEEP = os.environ.get("JAX_NVFP4_SWEEP", "0") != "0"
"""Whether everything runs."""


def sample(items: Sequence[T], every: int, turn: int) -> list[T]:
    """Each `every`-th item, starting with the one whose `turn` it is; in a sweep all of them."""
    return list(items) if SWEEP else list(items[turn % every :: every])
