# SPDX-License-Identifier: Apache-2.0
"""Statistics of what the weights of a model are multiplied with, and their file.

They serve a search for block scales (`importance` is the mean square of each input channel) and
static activation scales (from the largest input). The file is an `.npz` with two arrays for each
weight, `NAME:mean_square` and `NAME:amax`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SEPARATOR = ":"


@dataclasses.dataclass(frozen=True)
class InputStatistics:
    """What one weight, or a stack of them, was multiplied with.

    Attributes:
        mean_square: float32 (..., K), the mean of x^2 over all rows, for each input channel.
        amax: float32 (...), the largest |x|.
    """

    mean_square: np.ndarray
    amax: np.ndarray

    def __post_init__(self) -> None:
        if self.mean_square.shape[:-1] != self.amax.shape:
            raise ValueError(
                f"mean_square must have the axes of amax, {self.amax.shape}, and one for the input "
                f"channels; got {self.mean_square.shape}"
            )


@dataclasses.dataclass(frozen=True)
class Calibration(Mapping[str, InputStatistics]):
    """The statistics by the names of the weights.

    Attributes:
        weights: of each weight.
    """

    weights: Mapping[str, InputStatistics]

    def __getitem__(self, name: str) -> InputStatistics:
        return self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def renamed(self, name_of: Callable[[str], str | None]) -> Calibration:
        """The same under other names, as those of a checkpoint's tensors.

        Args:
            name_of: the new name of a weight, None to leave it out.
        """
        pairs = ((name_of(name), statistics) for name, statistics in self.weights.items())
        return Calibration({name: statistics for name, statistics in pairs if name is not None})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file; its name ends in `.npz`.

        Raises:
            ValueError: it does not.
        """
        if Path(path).suffix != ".npz":
            raise ValueError(f"the file of a calibration must be named *.npz; got {path}")
        arrays: dict[str, Any] = {}
        for name, statistics in self.weights.items():
            arrays[f"{name}{SEPARATOR}mean_square"] = statistics.mean_square
            arrays[f"{name}{SEPARATOR}amax"] = statistics.amax
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Reads the file.

        Raises:
            FileNotFoundError: it does not exist.
            ValueError: it is not one that `save` wrote, or holds a value that is NaN, infinite or
                negative.
        """
        weights: dict[str, dict[str, np.ndarray]] = {}
        try:
            with np.load(path, allow_pickle=False) as file:
                for key in file.files:
                    name, _, field = key.rpartition(SEPARATOR)
                    weights.setdefault(name, {})[field] = file[key].astype(np.float32)
            statistics = {name: InputStatistics(**fields) for name, fields in weights.items()}
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{path}: not a calibration file: {error}") from error
        for name, of_weight in statistics.items():
            for array in (of_weight.mean_square, of_weight.amax):
                if not (np.isfinite(array) & (array >= 0)).all():
                    raise ValueError(f"{path}: the statistics of {name} are NaN, Inf or negative")
        return cls(statistics)
