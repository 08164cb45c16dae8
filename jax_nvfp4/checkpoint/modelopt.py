# SPDX-License-Identifier: Apache-2.0
"""NVIDIA ModelOpt's format: `hf_quant_config.json`, and the same in `config.json`.

The algorithm of a checkpoint (`quant_algo`) is one of

    NVFP4              weights and activations, `input_scale` calibrated
    W4A16_NVFP4        weights only
    NVFP4_AWQ          with a `pre_quant_scale` that multiplies the activations first
    NVFP4_SVD          likewise, and a low-rank product to add (`svdquant_lora_a` and `_b`)
    MIXED_PRECISION    an algorithm for each layer, in `quantized_layers`

Layers that MIXED_PRECISION keeps in 8 bits pass through as they are stored, scales included, as all
other tensors do. Layers packed in 4 bits by another algorithm than the ones above are refused:
their tensors look like NVFP4's and mean something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jax_nvfp4.checkpoint.descriptions import Description
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder, section
from jax_nvfp4.checkpoint.formats import E4M3, Format
from jax_nvfp4.numerics import BLOCK

CONFIG_FILE = "hf_quant_config.json"

_LAYER_ALGORITHMS = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ", "NVFP4_SVD")
_MIXED = "MIXED_PRECISION"
_ALGORITHMS = (*_LAYER_ALGORITHMS, _MIXED)


def _is_quantized(parts: Mapping[str, Entry]) -> bool:
    """Tells NVFP4 layers from 8-bit and unquantized ones, even with a part missing or damaged."""
    weight, block_scale = parts.get("weight"), parts.get("weight_scale")
    if "weight_scale_2" in parts:
        return True
    if weight is None:
        return block_scale is not None
    if weight.dtype == np.uint8:
        return True
    return block_scale is not None and block_scale.dtype == E4M3 and weight.dtype.itemsize > 1


FORMAT = Format(
    name="ModelOpt",
    data="weight",
    block_scale="weight_scale",
    global_scale="weight_scale_2",
    input_scale="input_scale",
    reciprocal=False,
    is_quantized=_is_quantized,
)


def claims(parts: Mapping[str, Entry]) -> bool:
    """Whether the tensors of a layer have names that no other format gives them."""
    if "weight_scale_2" in parts:
        return True
    weight, scale = parts.get("weight"), parts.get("weight_scale")
    if weight is None or scale is None or weight.dtype != np.uint8 or len(weight.shape) < 2:
        return False
    blocks = (*weight.shape[:-1], weight.shape[-1] * 2 // BLOCK)
    return _has_block_scale(parts) or (scale.dtype.itemsize == 1 and scale.shape == blocks)


def lost_its_weight(parts: Mapping[str, Entry]) -> bool:
    """Whether of a layer little more is there than block scales, as NVFP4 has them."""
    return "weight" not in parts and _has_block_scale(parts)


def _has_block_scale(parts: Mapping[str, Entry]) -> bool:
    block_scale = parts.get("weight_scale")
    return block_scale is not None and block_scale.dtype == E4M3 and len(block_scale.shape) >= 2


def describe(folder: Folder, description: Description | None) -> Description | None:
    """The description in ModelOpt's own file, or else in the configuration if it is ModelOpt's.

    Raises:
        CheckpointError: the two are there and name different algorithms or methods.
    """
    path = folder.path / CONFIG_FILE
    content = folder.json(CONFIG_FILE)
    flat = content if "quant_algo" in content else {}
    own = Description(str(path), section(path, content, "quantization") or flat)
    if description is None:
        return own if own.content else None
    method, content = description.content.get("quant_method"), dict(description.content)
    inner = section(description.where, content, "quantization")
    if method == "modelopt" or (method is None and ("quant_algo" in content or inner)):
        theirs = Description(description.where, inner or content)
        named = [d.content.get("quant_algo") for d in (own, theirs)]
        if own.content and named[0] in _ALGORITHMS and named[0] != named[1]:
            raise CheckpointError(
                f"{path} names quant_algo {named[0]!r}, {theirs.where} {named[1]!r}"
            )
        return own if own.content else theirs
    if own.content:
        raise CheckpointError(f"{path} is there, and {description.where} is {method!r}")
    return None


def match(folder: Folder, description: Description | None) -> Format | None:
    """Recognizes the format.

    Args:
        folder: the checkpoint.
        description: from `describe`.

    Returns:
        The format with the layers' algorithms, or None where the checkpoint is not ModelOpt's or
        has nothing quantized but its KV cache.

    Raises:
        CheckpointError: it is, but with an algorithm that is not supported.
    """
    if description is None:
        return None
    source, details = description.where, description.content
    algorithm = details.get("quant_algo")
    if algorithm is None and kv_cache_algorithm(details) is not None:
        return None
    if algorithm not in _ALGORITHMS:
        raise CheckpointError(
            f"{source}: quant_algo {algorithm!r} is not supported; "
            f"supported are {', '.join(_ALGORITHMS)}"
        )
    if details.get("group_size") not in (None, BLOCK):
        raise CheckpointError(
            f"{source}: group_size {details['group_size']!r} is not supported; "
            f"NVFP4 has blocks of {BLOCK}"
        )
    layers = section(source, details, "quantized_layers") if algorithm == _MIXED else {}
    by_layer = {name: section(source, layers, name) for name in layers}
    return dataclasses.replace(FORMAT, refuse=_refusal(folder, by_layer))


def undescribed(folder: Folder) -> Format:
    """The format of a checkpoint that only its names tell."""
    return dataclasses.replace(FORMAT, refuse=_refusal(folder, {}))


def kv_cache_algorithm(details: Mapping[str, Any]) -> str | None:
    """The algorithm of the KV cache that a description names, None where it names none."""
    algorithm = details.get("kv_cache_quant_algo")
    if isinstance(algorithm, str):
        return algorithm
    scheme = details.get("kv_cache_scheme")
    if not isinstance(scheme, Mapping) or not scheme:
        return None
    kinds = {"8 float": "FP8", "4 float": "NVFP4", "8 int": "INT8"}
    return kinds.get(f"{scheme.get('num_bits')} {scheme.get('type', 'float')}")


def _refusal(folder: Folder, layers: Mapping[str, Mapping[str, Any]]) -> Callable[[str], None]:
    """What to refuse of a checkpoint whose layers have these algorithms."""

    def refuse(name: str) -> None:
        algorithm = layers.get(name, {}).get("quant_algo", "NVFP4")
        if algorithm not in _LAYER_ALGORITHMS:
            raise CheckpointError(
                f"{folder.path}: layer {name!r} is packed with quant_algo {algorithm!r}, which is "
                f"not supported; supported are {', '.join(_LAYER_ALGORITHMS)} and 8-bit floats"
            )

    return refuse
