# SPDX-License-Identifier: Apache-2.0
"""The order of the rows of a gated weight once it is repacked.

A gated weight has the rows [gate; up]. Its kernels make an output of a gate and of the up that
belongs to it, so that both must meet in the registers of one thread. Rows are therefore interleaved
before they are put into an architecture's order: a run of gates and the same run of ups in turn.
Each half is padded to 64 rows. A tile of 128 rows then holds 64 gates and their ups, and whole
tiles can be divided over devices.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_nvfp4.config import REFERENCE

HALF_TILE = 64
"""Gates in a tile of 128 rows."""

# Rows of a run. On Hopper rows r, r + 1 of the gates and of the ups come to rows of the tile that
# one thread holds (`layout.sm90`); on Blackwell a run of 8 does that. The reference needs no order
# of its own: pairs let any number of devices divide a weight.
_RUN = {REFERENCE: 1, "sm_90a": 2}
_BLACKWELL_RUN = 8


def run(arch: str) -> int:
    """How many gates stand together in an architecture's order, before as many ups."""
    return _RUN.get(arch, _BLACKWELL_RUN)


def packed_rows(arch: str, n: int) -> int:
    """The rows of a gated weight of n rows once both halves are padded."""
    if arch == REFERENCE:
        return n
    return -(-(n // 2) // HALF_TILE) * 2 * HALF_TILE


def interleave(arch: str, rows: Any, axis: int) -> Any:
    """Puts rows [gate; up] into runs, each half padded with zeros.

    Args:
        arch: the architecture.
        rows: an array with the n rows of the weight along `axis`; NumPy's stays NumPy's.
        axis: negative.

    Returns:
        The array with `packed_rows(arch, n)` along `axis`.
    """
    xp: Any = np if isinstance(rows, np.ndarray) else jnp
    n, length = rows.shape[axis], run(arch)
    packed = packed_rows(arch, n)
    lead, rest = rows.shape[: rows.ndim + axis], rows.shape[rows.ndim + axis + 1 :]
    at = len(lead)
    halves = rows.reshape(*lead, 2, n // 2, *rest)
    padding = [(0, 0)] * halves.ndim
    padding[at + 1] = (0, (packed - n) // 2)
    halves = xp.pad(halves, padding)
    runs = halves.reshape(*lead, 2, packed // 2 // length, length, *rest)
    return xp.swapaxes(runs, at, at + 1).reshape(*lead, packed, *rest)


def deinterleave(arch: str, rows: Any, axis: int, n: int) -> Any:
    """The inverse of `interleave`; `n` rows are kept."""
    xp: Any = np if isinstance(rows, np.ndarray) else jnp
    packed, length = rows.shape[axis], run(arch)
    lead, rest = rows.shape[: rows.ndim + axis], rows.shape[rows.ndim + axis + 1 :]
    at = len(lead)
    runs = rows.reshape(*lead, packed // 2 // length, 2, length, *rest)
    halves = xp.swapaxes(runs, at, at + 1).reshape(*lead, 2, packed // 2, *rest)
    kept = halves[(*[slice(None)] * (at + 1), slice(0, n // 2))]
    return kept.reshape(*lead, n, *rest)
