# SPDX-License-Identifier: Apache-2.0
"""The order of the rows of a gated weight once it is repacked.

A gated weight has the rows [gate; up]. Its kernels make an output of a gate and of the up that
belongs to it, so that both must meet in the registers of one thread. Rows are therefore interleaved
before they are put into an architecture's order: a run of gates and the same run of ups in turn.
Each half is padded to half a tile of rows. A tile then holds gates and their ups, and whole tiles
can be divided over devices.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_nvfp4.integers import round_up


@dataclasses.dataclass(frozen=True)
class Interleaving:
    """How gates and ups take turns.

    Attributes:
        run: gates that stand together, before as many ups.
        half_tile: gates in a tile of rows; each half of the weight is padded to a multiple of it.
    """

    run: int
    half_tile: int

    def rows(self, n: int) -> int:
        """The rows of a gated weight of n rows once both halves are padded."""
        return 2 * round_up(n // 2, self.half_tile)

    def interleave(self, rows: Any, axis: int) -> Any:
        """Puts rows [gate; up] into runs, each half padded with zeros.

        Args:
            rows: an array with the n rows of the weight along `axis`; NumPy's stays NumPy's.
            axis: negative.

        Returns:
            The array with `self.rows(n)` along `axis`.
        """
        xp: Any = np if isinstance(rows, np.ndarray) else jnp
        n, packed = rows.shape[axis], self.rows(rows.shape[axis])
        lead, rest = rows.shape[: rows.ndim + axis], rows.shape[rows.ndim + axis + 1 :]
        at = len(lead)
        halves = rows.reshape(*lead, 2, n // 2, *rest)
        padding = [(0, 0)] * halves.ndim
        padding[at + 1] = (0, (packed - n) // 2)
        halves = xp.pad(halves, padding)
        runs = halves.reshape(*lead, 2, packed // 2 // self.run, self.run, *rest)
        return xp.swapaxes(runs, at, at + 1).reshape(*lead, packed, *rest)

    def deinterleave(self, rows: Any, axis: int, n: int) -> Any:
        """The inverse of `interleave`; `n` rows are kept."""
        xp: Any = np if isinstance(rows, np.ndarray) else jnp
        packed = rows.shape[axis]
        lead, rest = rows.shape[: rows.ndim + axis], rows.shape[rows.ndim + axis + 1 :]
        at = len(lead)
        runs = rows.reshape(*lead, packed // 2 // self.run, 2, self.run, *rest)
        halves = xp.swapaxes(runs, at, at + 1).reshape(*lead, 2, packed // 2, *rest)
        kept = halves[(*[slice(None)] * (at + 1), slice(0, n // 2))]
        return kept.reshape(*lead, n, *rest)
