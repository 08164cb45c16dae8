# SPDX-License-Identifier: Apache-2.0
"""Experts that are stored one by one, as one tensor of all of them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import empty

_EXPERT = re.compile(r"(?P<all>(?:.*?\.)?\w*experts)\.(?P<index>\d+)\.(?P<rest>.+)")


@dataclasses.dataclass(frozen=True)
class Output:
    """A tensor that `load_checkpoint` returns, before it is read.

    Attributes:
        key: its key.
        quantized: it is an NVFP4 weight.
        read: reads its arrays: data, block_scale and global_scale, or the tensor alone.
    """

    key: str
    quantized: bool
    read: Callable[[], tuple[np.ndarray, ...]]


def stack(outputs: Iterable[Output]) -> Iterator[Output]:
    """Puts `P.experts.0.rest`, `P.experts.1.rest`, ... together as `P.experts.rest`.

    Args:
        outputs: all tensors of a checkpoint.

    Returns:
        The tensors, each stack where its first expert lies. Its arrays have a first axis of
        experts, in the order of their numbers, and are filled one expert at a time.
    """
    outputs = list(outputs)
    stacks: dict[str, dict[int, Output]] = {}
    counts: dict[str, int] = {}
    for output in outputs:
        if match := _EXPERT.fullmatch(output.key):
            name, index = match["all"], int(match["index"])
            stacks.setdefault(f"{name}.{match['rest']}", {})[index] = output
            counts[name] = max(counts.get(name, 0), index + 1)
    done = set()
    for output in outputs:
        match = _EXPERT.fullmatch(output.key)
        if match is None:
            yield output
            continue
        key = f"{match['all']}.{match['rest']}"
        if key not in done:
            done.add(key)
            yield _stacked(key, match["all"], counts[match["all"]], stacks[key])


def _stacked(key: str, name: str, count: int, experts: dict[int, Output]) -> Output:
    first = next(iter(experts.values()))

    def read() -> tuple[np.ndarray, ...]:
        for i in range(count):
            if i not in experts:
                missing = f"{name}.{i}.{key.removeprefix(name + '.')}"
                raise CheckpointError(
                    f"tensor {missing!r} is missing, one of {count} experts to stack"
                )
            if experts[i].quantized != first.quantized:
                kinds = {True: "NVFP4", False: "not"}
                raise CheckpointError(
                    f"tensor {experts[i].key!r} is {kinds[experts[i].quantized]} and "
                    f"{first.key!r} is {kinds[first.quantized]}; such experts do not stack"
                )
        return _fill([experts[i] for i in range(count)])

    return Output(key, first.quantized, read)


def _fill(experts: list[Output]) -> tuple[np.ndarray, ...]:
    whole: list[np.ndarray] = []
    for i, expert in enumerate(experts):
        parts = expert.read()
        if not whole:
            whole = [empty((len(experts), *part.shape), part.dtype) for part in parts]
        for j, part in enumerate(parts):
            if expert.quantized and j == 2 and part.ndim != whole[j].ndim - 1:
                whole[j], part = _by_row(whole[j], part, whole[0].shape[1])
            if part.dtype != whole[j].dtype or part.shape != whole[j].shape[1:]:
                raise CheckpointError(
                    f"tensor {expert.key!r} is {part.dtype.name}{list(part.shape)}, and "
                    f"{experts[0].key!r} is {whole[j].dtype.name}{list(whole[j].shape[1:])}; such "
                    "experts do not stack"
                )
            whole[j][i] = part
    return tuple(whole)


def _by_row(whole: np.ndarray, part: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Global scales with one for each row, where some experts need them and others do not."""
    if whole.ndim == 1:
        whole = np.ascontiguousarray(np.broadcast_to(whole[:, None], (len(whole), n)))
    return whole, np.broadcast_to(part, (n,))
