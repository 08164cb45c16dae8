# SPDX-License-Identifier: Apache-2.0
"""The ring of stages in shared memory between a producer and its consumers."""

import dataclasses
from typing import Any

from cutlass import Int32, cute


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages in shared memory.

    Attributes:
        buffers: what the copies fill, operand by operand.
        full: an mbarrier for each stage: its copies have come.
        empty: an mbarrier for each stage: its consumers have read it.
        stages: how many are in use; known at compile time or not.
    """

    buffers: Any
    full: cute.Pointer
    empty: cute.Pointer
    stages: Any


@cute.jit
def advance(ring: Ring, stage, phase):
    """The stage after one, and the phase in which its barriers are then."""
    stage += 1
    if stage == ring.stages:
        stage = Int32(0)
        phase = phase ^ 1
    return stage, phase
