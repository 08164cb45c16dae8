# SPDX-License-Identifier: Apache-2.0
"""Weights that `concatenate` and `gate_up` joined are saved as the parts they came from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jax_nvfp4.checkpoint.formats import split_name
from jax_nvfp4.ops.concatenate import split_rows
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

PART_NAMES: Mapping[str, Sequence[str]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    "w13": ("w1", "w3"),
}
"""What the parts of a joined layer are called, by its own name: the field's usual names."""

_OF_EACH_PART = ("input_scale", "pre_quant_scale")


def split(
    tensors: Mapping[str, Any] | Iterable[tuple[str, Any]],
    part_names: Mapping[str, Sequence[str]] | None,
) -> Iterator[tuple[str, Any]]:
    """Takes joined layers apart.

    Args:
        tensors: by key, or pairs, in which a joined weight comes before what else its layer has.
        part_names: the names of the parts, by the path of the layer or its last component;
            `PART_NAMES` where it says nothing.

    Returns:
        Pairs of key and tensor, with `P.q_proj.weight` and so on in place of `P.qkv_proj.weight`;
        likewise the bias, by rows. Scales of the activations are those of each part.

    Raises:
        ValueError: the parts have no names, or a tensor of a joined layer cannot be taken apart.
    """
    names_by_layer = {**PART_NAMES, **(part_names or {})}
    pairs: Iterable[tuple[str, Any]] = tensors.items() if isinstance(tensors, Mapping) else tensors
    if isinstance(tensors, Mapping):
        pairs = sorted(pairs, key=lambda pair: not _is_joined(pair[1]))
    joined: dict[str, tuple[list[str], tuple[int, ...]]] = {}
    others: dict[str, str] = {}
    for key, value in pairs:
        layer, suffix = split_name(key) if isinstance(key, str) else ("", "")
        if _is_joined(value):
            if layer in others:
                raise ValueError(
                    f"tensor {others[layer]!r} comes before {key!r}, which is saved as its parts"
                )
            joined[layer] = _paths(key, layer, len(value.parts), names_by_layer), value.parts
            parts: Sequence[Any] = split_rows(value)
        elif layer not in joined:
            others.setdefault(layer, key)
            yield key, value
            continue
        else:
            parts = _parts_of_other(key, suffix, value, joined[layer][1])
        for path, part in zip(joined[layer][0], parts, strict=True):
            yield f"{path}.{suffix}", part


def _is_joined(value: Any) -> bool:
    return isinstance(value, Nvfp4Tensor | RepackedWeight) and bool(value.parts)


def _paths(key: str, layer: str, count: int, names: Mapping[str, Sequence[str]]) -> list[str]:
    """The paths of the parts of a layer."""
    parent, _, own = layer.rpartition(".")
    found = names.get(layer, names.get(own))
    if found is None or isinstance(found, str) or len(found) != count:
        raise ValueError(
            f"tensor {key!r} was joined of {count} parts, which are saved apart; give their names "
            f"as part_names={{{own!r}: (...)}}" + (f", not {found!r}" if found else "")
        )
    return [f"{parent}.{name}" if parent else name for name in found]


def _parts_of_other(key: str, suffix: str, value: Any, rows: tuple[int, ...]) -> Sequence[Any]:
    """The parts of another tensor of a joined layer."""
    if suffix in _OF_EACH_PART:
        return [value] * len(rows)
    array = np.asarray(value)
    if suffix == "bias" and array.ndim and array.shape[-1] == sum(rows):
        return np.split(array, np.cumsum(rows)[:-1], axis=-1)
    raise ValueError(
        f"tensor {key!r} belongs to a layer of parts of {list(rows)} rows, which are saved apart, "
        f"and {array.dtype.name}{list(array.shape)} cannot be taken apart with them"
    )
