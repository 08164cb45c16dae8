# SPDX-License-Identifier: Apache-2.0
"""Files that have ModelOpt's names and another order of the bytes.

ModelOpt stores block scales row by row and element 0 of a byte in its low nibble. Two other orders
are in wide use:

- ComfyUI's files (FLUX.2's as well) hold block scales in the 128x4 order of tensor cores and
  element 0 in the high nibble. They mark each layer by a tensor `X.comfy_quant`, JSON in bytes, or
  list their layers in `_quantization_metadata` of the header.
- The configurations that SGLang's converters write for diffusion models say so in
  `weight_scale_layout` and `swap_weight_nibbles`.

What else may speak of an order and is not known here is refused by its name.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_nvfp4.checkpoint.descriptions import Description
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder, parse_json, read

MARKER = "comfy_quant"
"""The suffix of the tensor by which ComfyUI marks a quantized layer."""

_HEADER = "_quantization_metadata"
_LARGEST_MARKER = 65536
_SUSPECT = re.compile(
    "swizzl|layout|nibble|interleav|shuffl|rotat|rot$|hadamard|transform(?!er)|transpos|permut"
)
_SUSPECT_IN_HEADER = re.compile("swizzl|nibble|scale_layout")  # it holds much else
_NO_CHANGE = (None, False, 0, "", "none", "false", "linear", "row_major", "row-major")
# Fused projections under the names of the FLUX models' authors, whose files are in ComfyUI's order.
_AUTHORS_NAMES = re.compile(
    r"(^|\.)(double_blocks\.\d+\.(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12])$"
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order of a layer's bytes.

    Attributes:
        swizzled: block scales are in the 128x4 order, padded to whole tiles.
        high_first: element 0 of a byte is its high nibble.
    """

    swizzled: bool = False
    high_first: bool = False


LINEAR = Layout()
_COMFY = Layout(swizzled=True, high_first=True)


def find(folder: Folder, description: Description | None) -> Callable[[str], Layout]:
    """Finds the order of each layer's bytes.

    Args:
        folder: the checkpoint.
        description: how it is quantized.

    Returns:
        A function from a quantized layer to its order, which raises a CheckpointError for a layer
        whose order cannot be told or is not known.

    Raises:
        CheckpointError: the description names an order that is not known, or a marker is damaged.
    """
    default = _described(description)
    for shard, metadata in folder.metadata.items():
        _refuse_unknown(f"{shard}: the header", metadata, known=(), suspect=_SUSPECT_IN_HEADER)
    marked = _markers(folder)
    listed, ambiguous = _listed(folder, description)

    def layout(layer: str) -> Layout:
        where = f"{folder.path}: layer {layer!r}"
        if layer in marked:
            return _of_comfy(where, marked[layer])
        if layer in listed:
            if layer in ambiguous:
                raise CheckpointError(
                    f"{where}: the header describes it twice, as ModelOpt's and as ComfyUI's; "
                    "in which order its bytes are cannot be told"
                )
            return _of_comfy(where, listed[layer])
        if (marked or listed) and description is None:
            raise CheckpointError(
                f"{where} is not among the layers that the file lists for ComfyUI; in which order "
                "its bytes are cannot be told"
            )
        if description is None and _AUTHORS_NAMES.search(layer):
            raise CheckpointError(
                f"{where}: files with these names are written in ComfyUI's order and in "
                "ModelOpt's; this one does not say in which (no comfy_quant, no configuration)"
            )
        return default

    return layout


def consumed(name: str, quantized: set[str]) -> bool:
    """Whether a tensor only marks the order of a quantized layer, which loading undoes."""
    return name.endswith(f".{MARKER}") and name.removesuffix(f".{MARKER}") in quantized


def parse_marker(name: str, value: np.ndarray) -> dict[str, Any]:
    """Parses a tensor `X.comfy_quant`.

    Raises:
        CheckpointError: it is not JSON in bytes.
    """
    if value.dtype != np.uint8 or value.nbytes > _LARGEST_MARKER:
        raise CheckpointError(
            f"tensor {name!r} is {value.dtype.name}{list(value.shape)}, expected JSON as uint8"
        )
    return parse_json(f"tensor {name!r}", value.tobytes())


def _of_comfy(where: str, content: Mapping[str, Any]) -> Layout:
    if not _is_nvfp4(content):
        raise CheckpointError(
            f"{where} is packed in ComfyUI's format {content.get('format')!r}, which is not "
            "supported; supported is 'nvfp4'"
        )
    inner = content.get("params")
    for part in (content, inner if isinstance(inner, dict) else {}):
        _refuse_unknown(where, part, known=())
    return _COMFY


def _is_nvfp4(content: Mapping[str, Any]) -> bool:
    return content.get("format") == "nvfp4"


def _markers(folder: Folder) -> dict[str, dict[str, Any]]:
    found = {}
    for name, entry in folder.entries.items():
        if name.endswith(f".{MARKER}"):
            if entry.nbytes > _LARGEST_MARKER:
                raise CheckpointError(f"{entry.file}: tensor {name!r} is {entry}, expected JSON")
            try:
                found[name.removesuffix(f".{MARKER}")] = parse_marker(name, read(entry))
            except CheckpointError as error:
                raise CheckpointError(f"{entry.file}: {error}") from error
    return found


def _listed(
    folder: Folder, description: Description | None
) -> tuple[dict[str, Mapping[str, Any]], set[str]]:
    """The layers that headers list, and those of them whose order is not certain.

    ModelOpt can write the list as well, beside its own description and whatever the order is; its
    scales are row by row for certain where their shape is not that of whole tiles.
    """
    listed: dict[str, Mapping[str, Any]] = {}
    ambiguous = set()
    for shard, metadata in folder.metadata.items():
        if not (text := metadata.get(_HEADER)):
            continue
        where = f"{shard}: {_HEADER} in the header"
        layers = parse_json(where, text).get("layers")
        if not isinstance(layers, dict):
            continue
        for name, content in layers.items():
            content = {"format": content} if isinstance(content, str) else content
            if not isinstance(content, dict):
                raise CheckpointError(f"{where}: layer {name!r} must be an object")
            layer = _with_prefix(folder.entries, name)
            if description is not None:
                scale = folder.entries.get(f"{layer}.weight_scale")
                linear = scale is not None and len(scale.shape) == 2 and _is_ragged(scale.shape)
                if linear or not _is_nvfp4(content):
                    continue
                ambiguous.add(layer)
            listed[layer] = content
    return listed, ambiguous


def _is_ragged(shape: tuple[int, ...]) -> bool:
    return bool(shape[0] % 128 or shape[1] % 4)


def _with_prefix(entries: Mapping[str, Entry], layer: str) -> str:
    """The name of a layer that a header may list without the prefix of the diffusion model."""
    prefixed = f"model.diffusion_model.{layer}"
    return prefixed if f"{prefixed}.weight" in entries else layer


def _described(description: Description | None) -> Layout:
    if description is None:
        return LINEAR
    where, content = description.where, description.content
    scales = ("weight_scale_layout", "checkpoint_weight_scale_layout")
    swizzled = [_choice(where, content, key, "linear", "swizzled") for key in scales]
    high_first = content.get("swap_weight_nibbles", False)
    if not isinstance(high_first, bool):
        raise CheckpointError(f"{where}: swap_weight_nibbles must be a boolean, got {high_first!r}")
    if content.get("checkpoint_uses_comfy_quantization"):
        return _COMFY
    known = (*scales, "swap_weight_nibbles", "checkpoint_uses_native_qkv_layout")
    _refuse_unknown(where, content, known)
    return Layout(any(swizzled), high_first)


def _choice(where: str, content: Mapping[str, Any], key: str, no: str, yes: str) -> bool:
    value = content.get(key)
    if value is None:
        return False
    if not isinstance(value, str) or value.lower() not in (no, yes):
        raise CheckpointError(f"{where}: {key} is {value!r}, expected {no!r} or {yes!r}")
    return value.lower() == yes


def _refuse_unknown(
    where: str,
    content: Mapping[str, Any],
    known: tuple[str, ...],
    suspect: re.Pattern[str] = _SUSPECT,
) -> None:
    """Refuses what may speak of an order of bytes, or of weights that were rotated."""
    for key, value in content.items():
        if key in known or not isinstance(key, str) or not suspect.search(key.lower()):
            continue
        if isinstance(value, dict | list) and not value:
            continue
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, dict | list) or value not in _NO_CHANGE:
            raise CheckpointError(f"{where}: {key} = {value!r:.60} is not supported")
