# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint says how it is quantized: `config.json`, at any depth, and file headers.

Composite models keep the description of their language model one level down
(`text_config.quantization_config`); single files carry it in the safetensors header.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Folder, parse_json

KEYS = ("quantization_config", "compression_config")
"""The names under which a model configuration holds the description; the second is older."""


@dataclasses.dataclass(frozen=True)
class Description:
    """One description.

    Attributes:
        where: the file and the path in it, for messages.
        content: the description.
    """

    where: str
    content: Mapping[str, Any]


def find(folder: Folder) -> Description | None:
    """Finds the description of a checkpoint.

    Args:
        folder: the checkpoint.

    Returns:
        The description, or None where there is none.

    Raises:
        CheckpointError: there are several that differ, or one is not an object.
    """
    path = folder.path / "config.json"
    found = list(nested(str(path), folder.json("config.json")))
    for shard, metadata in folder.metadata.items():
        if text := metadata.get("quantization_config"):
            where = f"{shard}: quantization_config in the header"
            found.append(Description(where, parse_json(where, text)))
    for other in found[1:]:
        if other.content != found[0].content:
            raise CheckpointError(f"{found[0].where} and {other.where} differ")
    return found[0] if found else None


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """A model configuration without its descriptions of a quantization, at any depth."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return without(value)
        return [clean(inner) for inner in value] if isinstance(value, list | tuple) else value

    return {name: clean(value) for name, value in config.items() if name not in KEYS}


def nested(where: str, config: Mapping[str, Any]) -> Iterator[Description]:
    """The descriptions in a model configuration, at any depth.

    Raises:
        CheckpointError: one is not an object.
    """
    for name, value in config.items():
        if name in KEYS:
            if not isinstance(value, dict | None):
                raise CheckpointError(f"{where}: {name} must be an object, got {value!r:.60}")
            if value:
                yield Description(f"{where}: {name}", value)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and name not in KEYS:
                yield from nested(f"{where}: {name}", inner)


def fields(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """All fields of a model configuration that are not objects, at any depth."""
    found = []
    for name, value in config.items():
        inner = value if isinstance(value, list) else [value]
        found += [field for one in inner if isinstance(one, dict) for field in fields(one)]
        if not isinstance(value, dict):
            found.append((name, value))
    return found
