# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints, one tensor at a time."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jax_nvfp4.checkpoint import compressed_tensors, descriptions, layouts, modelopt
from jax_nvfp4.checkpoint.descriptions import Description
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder, open_folder, read
from jax_nvfp4.checkpoint.formats import Format, Linear, by_layer, group
from jax_nvfp4.tensor import Nvfp4Tensor

Placement: TypeAlias = jax.Device | Sharding | None
"""Where an array goes: a device, a sharding, or the default device."""

UNQUANTIZED = Format(
    name="unquantized",
    data="",
    block_scale="",
    global_scale="",
    input_scale="",
    reciprocal=False,
    is_quantized=lambda parts: False,
)


class Checkpoint(dict[str, "jax.Array | Nvfp4Tensor"]):
    """The tensors of a checkpoint, and what its configuration says that they do not.

    Attributes:
        kv_cache_quant_algo: how the KV cache is quantized ("FP8", ...), or None.
    """

    def __init__(
        self,
        tensors: Iterable[tuple[str, jax.Array | Nvfp4Tensor]],
        kv_cache_quant_algo: str | None,
    ) -> None:
        super().__init__(tensors)
        self.kv_cache_quant_algo = kv_cache_quant_algo


class Pairs(Iterator[tuple[str, "jax.Array | Nvfp4Tensor"]]):
    """The pairs of key and tensor of a checkpoint, each read when it is asked for.

    Attributes:
        kv_cache_quant_algo: how the KV cache is quantized ("FP8", ...), or None.
    """

    def __init__(
        self,
        pairs: Iterator[tuple[str, jax.Array | Nvfp4Tensor]],
        kv_cache_quant_algo: str | None,
    ) -> None:
        self._pairs = pairs
        self.kv_cache_quant_algo = kv_cache_quant_algo

    def __next__(self) -> tuple[str, jax.Array | Nvfp4Tensor]:
        return next(self._pairs)


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    where: Callable[[str], bool] | None = None,
    placement: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
) -> Checkpoint:
    """Loads a checkpoint.

    Both formats, NVIDIA ModelOpt's and compressed-tensors' `nvfp4-pack-quantized`, give the same
    keys for a quantized linear layer X:

    - `X.weight`: an `Nvfp4Tensor` of shape (N, K), or (..., N, K) where the file has more axes;
    - `X.input_scale`, where the file has one: a float32 scalar, the global scale of the
      activations, which multiplies on dequantization whatever the direction in the file;
    - `X.pre_quant_scale`, where the file has one: [K], to multiply the activations by first.

    Every other tensor, 8-bit layers of a mixed checkpoint included, keeps its name and dtype, 64
    bits too whether `jax_enable_x64` is set or not. A checkpoint that is not quantized loads as it
    is. Beyond what is returned, the peak of host memory is below twice the largest tensor.

    Args:
        path: a folder (one safetensors file, or shards and their index, with `config.json` or
            `hf_quant_config.json`), or one safetensors file.
        where: keeps only the keys for which it returns True; the others are not read.
        placement: a device or a sharding, or a function from key and logical shape to one. The
            sharding of a quantized weight is that of its logical axes: codes and block scales
            follow it, so each shard of K must hold whole blocks of 16.

    Returns:
        The tensors by key, in the order in which they are stored; a dict.

    Raises:
        CheckpointError: the checkpoint is damaged, inconsistent or of an unsupported kind; a scale
            is NaN, infinite, negative or (global scales) zero. The message names the tensor.
        FileNotFoundError: the path, or a shard that the index names, does not exist.
    """
    pairs = iter_checkpoint(path, where=where, placement=placement)
    return Checkpoint(pairs, pairs.kv_cache_quant_algo)


def iter_checkpoint(
    path: str | os.PathLike[str],
    *,
    where: Callable[[str], bool] | None = None,
    placement: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
) -> Pairs:
    """The lazy form of `load_checkpoint`: reads each tensor when it is asked for.

    The list of tensors and the configuration are read and checked at once, each tensor when its
    turn comes. Arguments and errors are those of `load_checkpoint`.

    Returns:
        An iterator of (key, tensor) in the order in which they are stored.
    """
    folder = open_folder(path)
    fmt = detect(folder)
    wanted = where or (lambda key: True)
    return Pairs(_tensors(folder, fmt, wanted, placement), kv_cache_of(folder))


def kv_cache_of(folder: Folder) -> str | None:
    """How the configuration says that the KV cache is quantized, None where it says nothing."""
    description = descriptions.find(folder)
    for found in (modelopt.describe(folder, description), description):
        if found is not None and (algorithm := modelopt.kv_cache_algorithm(found.content)):
            return algorithm
    return None


def detect(folder: Folder) -> Format:
    """Tells the format from the configuration, or from the names of the tensors without one.

    Raises:
        CheckpointError: the checkpoint is quantized in a way that is not supported, or its
            configuration and the names of its tensors disagree.
    """
    description = descriptions.find(folder)
    own = modelopt.describe(folder, description)
    if description is not None and own is None and not compressed_tensors.describes(description):
        raise CheckpointError(
            f"{description.where}: quant_method {description.content.get('quant_method')!r} is not "
            "supported; supported are 'modelopt' and 'compressed-tensors'"
        )
    fmt = compressed_tensors.match(description) or modelopt.match(folder, own)
    fmt = _check_names(folder, fmt, description or own)
    if fmt is None:
        return UNQUANTIZED
    contents = [d.content for d in (description, own) if d is not None]
    merged = {key: value for content in contents for key, value in content.items()}
    where = (description or own or Description("", {})).where
    layout = layouts.find(folder, Description(where, merged) if contents else None)
    return dataclasses.replace(fmt, layout=layout)


def _check_names(
    folder: Folder, fmt: Format | None, description: Description | None
) -> Format | None:
    """Holds the description against the names; names alone tell where there is no description."""
    layers = by_layer(folder.entries)
    candidates = (
        (compressed_tensors.claims, compressed_tensors.FORMAT),
        (modelopt.claims, modelopt.undescribed(folder)),
    )
    for layer, parts in layers.items():
        for claims, other in candidates:
            if not claims(parts) or (fmt is not None and fmt.name == other.name):
                continue
            if fmt is None and description is None:
                fmt = other
                continue
            said = f"{description.where} says" if description else "other layers say"
            name = parts.get(other.data, next(iter(parts.values()))).name
            raise CheckpointError(
                f"{folder.path}: tensor {name!r} of layer {layer!r} is named as {other.name} names "
                f"it, and {said} {fmt.name if fmt else 'that no layer is NVFP4'}"
            )
    if fmt is None and any(modelopt.lost_its_weight(parts) for parts in layers.values()):
        return modelopt.undescribed(folder)
    return fmt


def _tensors(
    folder: Folder,
    fmt: Format,
    wanted: Callable[[str], bool],
    placement: Any,
) -> Iterator[tuple[str, jax.Array | Nvfp4Tensor]]:
    def target(key: str, shape: tuple[int, ...]) -> Placement:
        return placement(key, shape) if callable(placement) else placement

    for item in group(folder, fmt):
        _release_dropped_buffers()
        if isinstance(item, Entry):
            if wanted(item.name):
                fmt.refuse(item.name)
                yield item.name, _put(item.name, read(item), target(item.name, item.shape))
            continue
        yield from _linear(item, wanted, target)


def _linear(
    layer: Linear,
    wanted: Callable[[str], bool],
    target: Callable[[str, tuple[int, ...]], Placement],
) -> Iterator[tuple[str, jax.Array | Nvfp4Tensor]]:
    key = layer.key("weight")
    if wanted(key):
        data, block_scale, global_scale = layer.read_weight()
        where = target(key, (*data.shape[:-1], data.shape[-1] * 2))
        tensor = Nvfp4Tensor(
            _put(key, data, where),
            _put(key, block_scale, where),
            _put(key, global_scale, _leading_axes(where, global_scale.ndim)),
        )
        del data, block_scale
        yield key, tensor
        del tensor
    key = layer.key("input_scale")
    if layer.format.input_scale in layer.parts and wanted(key):
        yield key, _put(key, layer.read_input_scale(), target(key, ()))
    key = layer.key("pre_quant_scale")
    if "pre_quant_scale" in layer.parts and wanted(key):
        value = layer.read_pre_quant_scale()
        yield key, _put(key, value, target(key, value.shape))


def _leading_axes(placement: Placement, ndim: int) -> Placement:
    """The placement of an array that has only the first axes of a sharded one."""
    if not isinstance(placement, NamedSharding):
        return placement
    spec = PartitionSpec(*placement.spec[:ndim])
    return NamedSharding(placement.mesh, spec, memory_kind=placement.memory_kind)


def _release_dropped_buffers() -> None:
    """Frees the host buffers of arrays that the caller has dropped.

    JAX lets go of a NumPy buffer that an array took over at a later transfer, not when the array is
    gone. Without one, the last tensor would still be there while the next is read.
    """
    jax.device_put(np.zeros((), np.uint8))


def _put(key: str, value: np.ndarray, placement: Placement) -> jax.Array:
    """Moves an array to its place; a CPU device takes the buffer as it is."""
    try:
        if value.dtype.itemsize < 8:
            return jax.device_put(value, placement)
        with jax.enable_x64(True):  # the file's dtype is kept, whatever the program computes in
            return jax.device_put(value, placement)
    except ValueError as error:
        raise ValueError(f"tensor {key!r} of shape {list(value.shape)}: {error}") from error
