# SPDX-License-Identifier: Apache-2.0
"""The format `nvfp4-pack-quantized` of compressed-tensors, described in `config.json`.

Its global scales divide: compressed-tensors dequantizes a weight to
`code * (weight_scale / weight_global_scale)` in float32, then rounds to bfloat16. An `Nvfp4Tensor`
multiplies, by the float32 reciprocal `D` of that divisor: `code * (weight_scale * D)`. A quotient
and a product with a rounded reciprocal are not always the same number: over all global scales,
block scales and codes they differ by at most 2 units in the last place of float32. As bfloat16
they are equal but where the product lies that close to a tie.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax_nvfp4.checkpoint.descriptions import Description
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, section
from jax_nvfp4.checkpoint.formats import Format
from jax_nvfp4.numerics import BLOCK

_PACKED = "nvfp4-pack-quantized"
# Of a checkpoint with several formats, layers in these pass through as they are stored.
_PASS_THROUGH = ("dense", "float-quantized", "naive-quantized")


def _is_quantized(parts: Mapping[str, Entry]) -> bool:
    if "weight_packed" in parts or "weight_global_scale" in parts:
        return True
    return "weight_scale" in parts and "weight" not in parts


FORMAT = Format(
    name="compressed-tensors",
    data="weight_packed",
    block_scale="weight_scale",
    global_scale="weight_global_scale",
    input_scale="input_global_scale",
    reciprocal=True,
    is_quantized=_is_quantized,
)


def claims(parts: Mapping[str, Entry]) -> bool:
    """Whether the tensors of a layer have names that no other format gives them."""
    return "weight_packed" in parts or "weight_global_scale" in parts


def match(description: Description | None) -> Format | None:
    """Recognizes the format by its description.

    Args:
        description: what the configuration says, None where it says nothing.

    Returns:
        The format, or None where the description is not compressed-tensors' or names only a
        quantized KV cache.

    Raises:
        CheckpointError: it is, but with something that is not supported.
    """
    if description is None or not describes(description):
        return None
    config, where = description.content, f"{description.where}: compressed-tensors"
    if config.get("quantization_status") not in (None, "compressed"):
        raise CheckpointError(
            f"{where} quantization_status {config['quantization_status']!r} is not supported; "
            "save the model compressed"
        )
    if config.get("transform_config"):
        raise CheckpointError(f"{where} transform_config (rotated weights) is not supported")
    sparsity = section(where, config, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise CheckpointError(f"{where} sparsity format {sparsity!r} is not supported")

    groups = section(where, config, "config_groups")
    groups = {name: section(where, groups, name) for name in groups}
    if not groups and config.get("kv_cache_scheme"):
        return None
    default = _format(where, config)
    formats = {name: _format(f"{where} {name}", group) or default for name, group in groups.items()}
    used = set(formats.values()) or {default}
    for fmt in sorted(used - {_PACKED, *_PASS_THROUGH}, key=str):
        raise CheckpointError(f"{where} format {fmt!r} is not supported; supported is {_PACKED!r}")
    if _PACKED not in used:
        raise CheckpointError(f"{where} has no layer in the format {_PACKED!r}")
    for name, group in groups.items():
        if formats[name] == _PACKED:
            _check_weights(f"{where} {name}", section(f"{where} {name}", group, "weights"))
    return FORMAT


def describes(description: Description) -> bool:
    """Whether a description is compressed-tensors'."""
    return description.content.get("quant_method") == "compressed-tensors"


def _format(where: str, content: Mapping[str, Any]) -> str | None:
    """The field `format`, which some converters write as a list of one."""
    value = content.get("format")
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    if not isinstance(value, str | None):
        raise CheckpointError(f"{where}: format must be a string, got {value!r:.60}")
    return value


def _check_weights(where: str, weights: Mapping[str, Any]) -> None:
    expected = {"num_bits": 4, "type": "float", "group_size": BLOCK, "symmetric": True}
    expected |= {"strategy": "tensor_group", "dynamic": False}
    for field, value in expected.items():
        if weights.get(field, value) != value:
            raise CheckpointError(
                f"{where}: weights.{field} is {weights[field]!r}, expected {value!r}"
            )
