# SPDX-License-Identifier: Apache-2.0
"""Describing a checkpoint as ModelOpt does, in `hf_quant_config.json` and `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_nvfp4.checkpoint import float8
from jax_nvfp4.checkpoint.float8 import Stored
from jax_nvfp4.checkpoint.formats import by_layer, split_name
from jax_nvfp4.numerics import BLOCK

_W4A16, _NVFP4, _AWQ, _SVD = "W4A16_NVFP4", "NVFP4", "NVFP4_AWQ", "NVFP4_SVD"
_NVFP4_FAMILY = (_W4A16, _NVFP4, _AWQ, _SVD)
_MIXED = "MIXED_PRECISION"
_KV_CACHE_BITS = {
    "FP8": {"dynamic": False, "num_bits": 8, "type": "float"},
    "NVFP4": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK},
    "INT8": {"dynamic": False, "num_bits": 8, "type": "int"},
}


def describe(
    tensors: Mapping[str, Stored], version: str, kv_cache: str | None = None
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Tells the algorithm of each layer from its tensors, and writes it down as ModelOpt does.

    Args:
        tensors: every stored tensor by name.
        version: of this package, recorded as the producer.
        kv_cache: the algorithm of the KV cache; where there are scales of it, "FP8" by default.

    Returns:
        (the content of hf_quant_config.json, `quantization_config` of config.json), or None where
        neither a layer is NVFP4 nor the KV cache quantized.

    Raises:
        ValueError: beside NVFP4 layers there is one in 8 bits that ModelOpt has no name for.
    """
    if kv_cache is None and any(_is_kv_cache_scale(*item) for item in tensors.items()):
        kv_cache = "FP8"
    layers: dict[str, dict[str, Stored]] = {}
    for layer, parts in by_layer(tensors).items():
        layers.setdefault(layer.removesuffix(".weight_quantizer"), {}).update(parts)
    if not any("weight_scale_2" in parts for parts in layers.values()):
        return _kv_cache_alone(kv_cache, version) if kv_cache else None
    found = {layer: _algorithm(layer, parts) for layer, parts in sorted(layers.items())}
    algorithms = {layer: name for layer, name in found.items() if name is not None}
    if set(algorithms.values()) == {_NVFP4, _AWQ}:
        # Where a norm has absorbed its pre_quant_scale, a layer of AWQ has none.
        algorithms = dict.fromkeys(algorithms, _AWQ)
    unquantized = [
        layer
        for layer, parts in layers.items()
        if layer not in algorithms and "weight" in parts and len(parts["weight"].shape) >= 2
    ]

    producer = {"name": "jax_nvfp4", "version": version}
    details: dict[str, Any] = {"quant_algo": _MIXED, "kv_cache_quant_algo": kv_cache}
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
    if kv_cache in _KV_CACHE_BITS:
        config["kv_cache_scheme"] = _KV_CACHE_BITS[kv_cache]
    return {"producer": producer, "quantization": details}, config


def _is_kv_cache_scale(name: str, tensor: Stored) -> bool:
    return split_name(name)[1] in ("k_scale", "v_scale", "kv_scale") and len(tensor.shape) <= 1


def _kv_cache_alone(kv_cache: str, version: str) -> tuple[dict[str, Any], dict[str, Any]]:
    producer = {"name": "jax_nvfp4", "version": version}
    details = {"quant_algo": None, "kv_cache_quant_algo": kv_cache}
    config = {"quant_method": "modelopt", "producer": producer} | details
    return {"producer": producer, "quantization": details}, config


def _algorithm(layer: str, parts: Mapping[str, Stored]) -> str | None:
    """The algorithm of a layer with these tensors; None where it is not quantized."""
    if "weight_scale_2" in parts:
        if any("svdquant_lora" in suffix for suffix in parts):
            return _SVD
        if "pre_quant_scale" in parts:
            return _AWQ
        return _NVFP4 if "input_scale" in parts else _W4A16
    scale = float8.scale_of(parts)
    if scale is None:
        return None
    name = float8.algorithm(parts["weight"], parts[scale])
    if name is None:
        weight = parts["weight"]
        raise ValueError(
            f"tensor '{layer}.{scale}' is {parts[scale].dtype.name}{list(parts[scale].shape)} "
            f"beside a weight of {weight.dtype.name}{list(weight.shape)}; ModelOpt has no "
            "algorithm with such scales"
        )
    return name


def _details(algorithm: str) -> dict[str, Any]:
    """The entry of a layer in `quantized_layers`."""
    details: dict[str, Any] = {"quant_algo": algorithm}
    if algorithm in _NVFP4_FAMILY:
        details["group_size"] = BLOCK
    if algorithm == float8.MXFP8:
        details["group_size"] = float8.MX_BLOCK
    if algorithm in (_AWQ, _SVD):
        details |= {"has_zero_point": False, "pre_quant_scale": True}
    return details


def _group(algorithm: str) -> dict[str, Any]:
    """The entry of an algorithm in `config_groups`, short of its targets."""
    kind: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
    if algorithm in _NVFP4_FAMILY:
        kind |= {"num_bits": 4, "group_size": BLOCK}
    if algorithm == float8.MXFP8:
        kind["group_size"] = float8.MX_BLOCK
    if algorithm in (_W4A16, float8.PER_BLOCK):
        return {"weights": kind}
    return {"input_activations": kind, "weights": kind}
