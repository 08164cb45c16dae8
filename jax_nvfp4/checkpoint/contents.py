# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint that is being written holds, checked as reading it will."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np

from jax_nvfp4.checkpoint import compressed_tensors, layouts, modelopt, mxfp4
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import DTYPES, Entry
from jax_nvfp4.checkpoint.formats import E4M3, WIDE_FLOATS, by_layer, split_name
from jax_nvfp4.checkpoint.modelopt_config import describe
from jax_nvfp4.numerics import BLOCK, GLOBAL_SCALE_MAX, GLOBAL_SCALE_MIN
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Tensor: TypeAlias = jax.Array | np.ndarray | Nvfp4Tensor | RepackedWeight


class Contents:
    """The tensors of a checkpoint in ModelOpt's format, added one by one.

    Attributes:
        stored: every tensor as it is stored, by name.
    """

    def __init__(self, folder: Path) -> None:
        self.stored: dict[str, Entry] = {}
        self._folder = folder
        self._weights: dict[str, tuple[int, ...]] = {}
        self._scales: dict[str, np.ndarray] = {}

    def add(self, key: str, value: Tensor) -> None:
        """Adds a tensor.

        Raises:
            TypeError: the key is not a string, or a part of a quantized weight has been cast.
            ValueError: the format cannot hold the tensor, or its name comes twice.
        """
        if not isinstance(key, str):
            raise TypeError(f"the key of a tensor must be a string, got {key!r}")
        if isinstance(value, Nvfp4Tensor | RepackedWeight):
            check_weight(key, value)
            *lead, n, k = value.shape
            self._declare(key, np.dtype(np.uint8), (*lead, n, k // 2))
            self._declare(f"{key}_scale", E4M3, (*lead, n, k // BLOCK))
            self._declare(f"{key}_scale_2", np.dtype(np.float32), value.global_scale.shape)
            self._weights[split_name(key)[0]] = value.shape
            return
        dtype = getattr(value, "dtype", None)
        if not isinstance(dtype, np.dtype) or dtype not in DTYPES.values():
            value = _as_array(key, value)
        self._declare(key, value.dtype, value.shape)
        suffix = split_name(key)[1]
        if suffix in ("input_scale", "pre_quant_scale"):
            self._scales[key] = np.asarray(value)
        elif suffix == layouts.MARKER:
            _check_marker(key, np.asarray(value))

    def check(self, kv_cache: str | None) -> None:
        """Holds the tensors of each layer together, when all are added.

        Args:
            kv_cache: the algorithm of the KV cache, if it is known.

        Raises:
            ValueError: a scale is not one that `load_checkpoint` takes, tensors would be read as
                a layer that they are not, or the checkpoint cannot be described.
        """
        for key, value in self._scales.items():
            layer, suffix = split_name(key)
            if layer in self._weights:
                _check_scale(key, suffix, value, self._weights[layer])
            elif suffix == "input_scale" and f"{layer}.weight" not in self.stored:
                _check_scale(key, suffix, value, (1, 1))
        for layer, parts in by_layer(self.stored).items():
            quantized = modelopt.claims(parts) or compressed_tensors.claims(parts)
            quantized = quantized or mxfp4.parts_of(parts) is not None
            if self._weights and not quantized:
                quantized = modelopt.FORMAT.is_quantized(parts)
            if layer not in self._weights and (quantized or modelopt.lost_its_weight(parts)):
                entry = parts.get("weight", next(iter(parts.values())))
                raise ValueError(
                    f"tensor {entry.name!r} would be read as a part of an NVFP4 layer; give the "
                    "layer's weight as an Nvfp4Tensor"
                )
        describe(self.stored, "", kv_cache)

    def _declare(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
        if name in self.stored:
            raise ValueError(f"tensor {name!r} comes twice")
        self.stored[name] = Entry(name, dtype, tuple(shape), self._folder, 0)


def check_weight(key: str, weight: Nvfp4Tensor | RepackedWeight) -> None:
    """Raises unless ModelOpt's format can hold a weight, as far as that shows without reading it.

    Raises:
        TypeError: a part has been cast.
        ValueError: the key, the shape or a global scale is not one the format has.
    """
    try:
        weight.check()
    except (TypeError, ValueError) as error:
        raise type(error)(f"tensor {key!r}: {error}") from error
    if split_name(key)[1] != "weight":
        raise ValueError(f"tensor {key!r}: the key of a quantized weight must end in '.weight'")
    if weight.ndim < 2 or weight.shape[-1] % BLOCK:
        raise ValueError(
            f"tensor {key!r} of shape {weight.shape}: ModelOpt stores matrices (..., N, K) with "
            f"K a multiple of {BLOCK}"
        )
    global_scale = np.asarray(weight.global_scale)
    if global_scale.shape not in ((), weight.shape[:-2]):
        raise ValueError(
            f"tensor {key!r} of shape {weight.shape}: ModelOpt stores one global scale for each "
            f"matrix, got them of shape {global_scale.shape}"
        )
    if not np.all((global_scale >= GLOBAL_SCALE_MIN) & (global_scale <= GLOBAL_SCALE_MAX)):
        raise ValueError(
            f"tensor {key!r} has global scale {global_scale}, which is not in "
            f"[{GLOBAL_SCALE_MIN:g}, {GLOBAL_SCALE_MAX:g}]"
        )


def _as_array(key: str, value: object) -> np.ndarray:
    """An array of a dtype that files hold."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tensor {key!r}: {error}") from error
    if array.dtype not in DTYPES.values():
        kind = type(value).__name__ if array.dtype == object else f"an array of {array.dtype.name}"
        raise ValueError(f"tensor {key!r} is {kind}, which safetensors files do not hold")
    return array


def _check_scale(key: str, suffix: str, value: np.ndarray, weight: tuple[int, ...]) -> None:
    *lead, _, k = weight
    got = f"{value.dtype.name}{list(value.shape)}"
    if suffix == "input_scale":
        expected = "a float32 scalar" + (f" or float32{lead}" if lead else "")
        if value.dtype != np.float32 or value.shape not in ((), (1,), tuple(lead)):
            raise ValueError(f"tensor {key!r} must be {expected}, got {got}")
        good = (value >= GLOBAL_SCALE_MIN) & (value <= GLOBAL_SCALE_MAX)
        limits = f"in [{GLOBAL_SCALE_MIN:g}, {GLOBAL_SCALE_MAX:g}]"
    else:
        if value.dtype not in WIDE_FLOATS or value.shape not in ((k,), (*lead, k)):
            raise ValueError(f"tensor {key!r} must have shape {[*lead, k]}, got {got}")
        wide = value.astype(np.float32)
        good, limits = (wide > 0) & np.isfinite(wide), "positive and finite"
    if not good.all():
        bad = value[~good].ravel()[0]
        raise ValueError(f"tensor {key!r} is {np.float32(bad)}; a scale must be {limits}")


def _check_marker(key: str, value: np.ndarray) -> None:
    """Refuses a marker that says of a layer's bytes what is not so in ModelOpt's format."""
    try:
        content = layouts.parse_marker(key, value)
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if content.get("format") in ("nvfp4", "mxfp8"):
        raise ValueError(f"tensor {key!r} marks a layer as ComfyUI orders its bytes; leave it out")
