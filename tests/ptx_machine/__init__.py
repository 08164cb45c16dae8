# SPDX-License-Identifier: Apache-2.0
"""An interpreter of PTX on the CPU: a test instrument, stricter than a GPU and much slower."""

from .errors import DeadlockError, PtxError, PtxRuntimeError, PtxSyntaxError
from .machine import Machine, Pointer, launch
from .memory import GlobalMemory
from .tensormap import TensorMap

__all__ = [
    "DeadlockError",
    "GlobalMemory",
    "Machine",
    "Pointer",
    "PtxError",
    "PtxRuntimeError",
    "PtxSyntaxError",
    "TensorMap",
    "launch",
]
