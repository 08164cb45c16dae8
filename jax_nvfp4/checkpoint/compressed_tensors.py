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

from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder, section
from jax_nvfp4.checkpoint.formats import Format, has_suffix
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


def match(folder: Folder, config: Mapping[str, Any]) -> Format | None:
    """Recognizes the format.

    Args:
        folder: the checkpoint.
        config: `quantization_config` of its `config.json`, {} where there is none.

    Returns:
        The format, or None where the checkpoint is not compressed-tensors'.

    Raises:
        CheckpointError: it is, but with something that is not supported.
    """
    if not config:
        return FORMAT if has_suffix(folder.entries, FORMAT.data) else None
    if config.get("quant_method") != "compressed-tensors":
        return None
    where = f"{folder.path / 'config.json'}: compressed-tensors"
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
    formats = {group.get("format") or config.get("format") for group in groups.values()}
    formats = formats or {config.get("format")}
    for fmt in sorted(formats - {_PACKED, *_PASS_THROUGH}, key=str):
        raise CheckpointError(f"{where} format {fmt!r} is not supported; supported is {_PACKED!r}")
    if _PACKED not in formats:
        raise CheckpointError(f"{where} has no layer in the format {_PACKED!r}")
    for name, group in groups.items():
        if (group.get("format") or config.get("format")) == _PACKED:
            _check_weights(f"{where} {name}", section(f"{where} {name}", group, "weights"))
    return FORMAT


def _check_weights(where: str, weights: Mapping[str, Any]) -> None:
    expected = {"num_bits": 4, "type": "float", "group_size": BLOCK, "symmetric": True}
    for field, value in expected.items():
        if weights.get(field, value) != value:
            raise CheckpointError(
                f"{where}: weights.{field} is {weights[field]!r}, expected {value!r}"
            )
