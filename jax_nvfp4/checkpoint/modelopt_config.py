# SPDX-License-Identifier: Apache-2.0
"""Describing a checkpoint as ModelOpt does, in `hf_quant_config.json` and `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from jax_nvfp4.checkpoint.formats import E4M3, split_name
from jax_nvfp4.numerics import BLOCK

_W4A16, _NVFP4, _AWQ, _SVD = "W4A16_NVFP4", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD"
_MIXED = "MIXED_PRECISION"


class Stored(Protocol):
    """A stored tensor, as far as its description goes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def describe(
    tensors: Mapping[str, Stored], version: str
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Tells the algorithm of each layer from its tensors, and writes it down as ModelOpt does.

    Args:
        tensors: every stored tensor by name.
        version: of this package, recorded as the producer.

    Returns:
        (the content of hf_quant_config.json, `quantization_config` of config.json), or None where
        no layer is NVFP4.
    """
    layers: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        layer, suffix = split_name(name)
        layers.setdefault(layer.removesuffix(".weight_quantizer"), {})[suffix] = tensor
    found = {layer: _algorithm(parts) for layer, parts in sorted(layers.items())}
    algorithms = {layer: name for layer, name in found.items() if name is not None}
    if set(algorithms.values()) == {_NVFP4, _AWQ}:
        # Where a norm has absorbed its pre_quant_scale, a layer of AWQ has none.
        algorithms = dict.fromkeys(algorithms, _AWQ)
    if all(name.startswith("FP8") for name in algorithms.values()):
        return None
    unquantized = [
        layer
        for layer, parts in layers.items()
        if layer not in algorithms and "weight" in parts and len(parts["weight"].shape) >= 2
    ]

    producer = {"name": "jax_nvfp4", "version": version}
    details: dict[str, Any] = {"quant_algo": _MIXED, "kv_cache_quant_algo": None}
    quantized_layers = {layer: _details(name) for layer, name in algorithms.items()}
    groups: dict[str, list[str]] = {}
    for layer, name in algorithms.items():
        groups.setdefault(name, []).append(layer)
    if len(groups) == 1:
        (only,) = groups
        details |= _details(only) | {"exclude_modules": sorted(unquantized)}
        groups[only] = ["Linear"]
    else:
        details["quantized_layers"] = quantized_layers

    config: dict[str, Any] = {
        "quant_method": "modelopt",
        "quant_algo": details["quant_algo"],
        "producer": producer,
        "ignore": sorted(unquantized),
        "config_groups": {
            f"group_{i}": _group(name) | {"targets": targets}
            for i, (name, targets) in enumerate(groups.items())
        },
    }
    if len(groups) > 1:
        config["quantized_layers"] = quantized_layers
    return {"producer": producer, "quantization": details}, config


def _algorithm(parts: Mapping[str, Stored]) -> str | None:
    """The algorithm of a layer with these tensors; None where it is not quantized."""
    if "weight_scale_2" in parts:
        if any("svdquant_lora" in suffix for suffix in parts):
            return _SVD
        if "pre_quant_scale" in parts:
            return _AWQ
        return _NVFP4 if "input_scale" in parts else _W4A16
    if "weight" in parts and "weight_scale" in parts and parts["weight"].dtype == E4M3:
        return "FP8" if parts["weight_scale"].shape == () else "FP8_PER_CHANNEL_PER_TOKEN"
    return None


def _details(algorithm: str) -> dict[str, Any]:
    """The entry of a layer in `quantized_layers`."""
    details: dict[str, Any] = {"quant_algo": algorithm}
    if not algorithm.startswith("FP8"):
        details["group_size"] = BLOCK
    if algorithm in (_AWQ, _SVD):
        details |= {"has_zero_point": False, "pre_quant_scale": True}
    return details


def _group(algorithm: str) -> dict[str, Any]:
    """The entry of an algorithm in `config_groups`, short of its targets."""
    if algorithm.startswith("FP8"):
        kind: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
        return {"input_activations": kind, "weights": kind}
    kind = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    return (
        {"weights": kind} if algorithm == _W4A16 else {"input_activations": kind, "weights": kind}
    )
