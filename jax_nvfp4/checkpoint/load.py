# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoints, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from jax_nvfp4.checkpoint import (
    compressed_tensors,
    descriptions,
    experts,
    float8,
    layouts,
    modelopt,
    mxfp4,
)
from jax_nvfp4.checkpoint.descriptions import Description
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.experts import Output
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
_MXFP4 = dataclasses.replace(UNQUANTIZED, name="MXFP4")


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
    stack_experts: bool = False,
    dequantize_fp8: DTypeLike | None = None,
) -> Checkpoint:
    """Loads a checkpoint.

    Both formats, NVIDIA ModelOpt's and compressed-tensors' `nvfp4-pack-quantized`, give the same
    keys for a quantized linear layer X:

    - `X.weight`: an `Nvfp4Tensor` of shape (N, K), or (..., N, K) where the file has more axes;
    - `X.input_scale`, where the file has one: a float32 scalar, the global scale of the
      activations, which multiplies on dequantization whatever the direction in the file;
    - `X.pre_quant_scale`, where the file has one: [K], to multiply the activations by first.

    Experts that a model keeps in one parameter P come as a layer X = P, (G, N, K), whichever way
    they are stored: transposed as in Llama-4 and gpt-oss, with the rows of gate and up in turn as
    in gpt-oss (gate comes first here), or in MXFP4, which becomes NVFP4 exactly. `X.bias` is their
    bias in the same order.

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
        stack_experts: return experts that are stored one by one, `P.experts.0.up_proj.weight` and
            so on, as one `P.experts.up_proj.weight` (G, N, K), with global scales (G,), as
            `ragged_linear` takes it; so all that they have, input scales (G,) included. `where`
            and `placement` are asked for the key of the stack.
        dequantize_fp8: return the weights of 8-bit float layers in this dtype, without their
            scales; by default they come as they are stored.

    Returns:
        The tensors by key, in the order in which they are stored; a dict.

    Raises:
        CheckpointError: the checkpoint is damaged, inconsistent or of an unsupported kind; a scale
            is NaN, infinite, negative or (global scales) zero. The message names the tensor.
        FileNotFoundError: the path, or a shard that the index names, does not exist.
    """
    pairs = iter_checkpoint(
        path,
        where=where,
        placement=placement,
        stack_experts=stack_experts,
        dequantize_fp8=dequantize_fp8,
    )
    return Checkpoint(pairs, pairs.kv_cache_quant_algo)


def iter_checkpoint(
    path: str | os.PathLike[str],
    *,
    where: Callable[[str], bool] | None = None,
    placement: Placement | Callable[[str, tuple[int, ...]], Placement] = None,
    stack_experts: bool = False,
    dequantize_fp8: DTypeLike | None = None,
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
    outputs = _outputs(folder, fmt, None if dequantize_fp8 is None else jnp.dtype(dequantize_fp8))
    outputs = _distinct(folder, outputs)
    if stack_experts:
        outputs = experts.stack(outputs)
    return Pairs(_tensors(outputs, wanted, placement), kv_cache_of(folder))


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
    if description is not None and description.content.get("quant_method") == "mxfp4":
        _check_names(folder, _MXFP4, description)
        return dataclasses.replace(_MXFP4, interleaved=_interleaved(folder))
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
    return dataclasses.replace(fmt, layout=layout, interleaved=_interleaved(folder))


def _interleaved(folder: Folder) -> Callable[[str], bool]:
    """Whether gate and up take turns in a layer: in gpt-oss, which alone has a bias there.

    The configuration decides where it names the model.
    """
    config = folder.json("config.json")
    known = any(name == "model_type" for name, _ in descriptions.fields(config))
    is_gpt_oss = ("model_type", "gpt_oss") in descriptions.fields(config)

    def interleaved(layer: str) -> bool:
        if not layer.endswith("gate_up_proj") or (known and not is_gpt_oss):
            return False
        return is_gpt_oss or f"{layer}_bias" in folder.entries

    return interleaved


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
    if fmt is None and any(mxfp4.parts_of(parts) for parts in layers.values()):
        return _MXFP4
    return fmt


def _outputs(folder: Folder, fmt: Format, fp8: np.dtype[Any] | None) -> Iterator[Output]:
    """What a checkpoint holds, in the stored order, with a way to read each."""
    narrow = _fp8_layers(folder) if fp8 else {}
    consumed = {scale.name for _, scale in narrow.values()}
    for item in group(folder, fmt):
        if isinstance(item, Linear):
            yield from _of_layer(item)
        elif fp8 and item.name in narrow:
            read_fp8 = functools.partial(_read_fp8, folder, *narrow[item.name], fp8)
            yield Output(item.name, False, read_fp8)
        elif item.name not in consumed:
            yield Output(item.name, False, functools.partial(_read_one, item))


def _distinct(folder: Folder, outputs: Iterable[Output]) -> Iterator[Output]:
    """Refuses a key that comes twice: a weight that was left beside its quantized form."""
    seen = set()
    for output in outputs:
        if output.key in seen:
            raise CheckpointError(
                f"{folder.path}: tensor {output.key!r} is there twice, as it is and as a part of a "
                "quantized layer"
            )
        seen.add(output.key)
        yield output


def _read_one(entry: Entry) -> tuple[np.ndarray]:
    return (read(entry),)


def _of_layer(layer: Linear) -> Iterator[Output]:
    yield Output(layer.key("weight"), True, layer.read_weight)
    for stored, suffix, reader in (
        (layer.format.input_scale, "input_scale", layer.read_input_scale),
        ("pre_quant_scale", "pre_quant_scale", layer.read_pre_quant_scale),
        ("bias", "bias", layer.read_bias),
    ):
        if stored in layer.parts and (suffix != "bias" or layer.is_one_parameter):
            yield Output(layer.key(suffix), False, functools.partial(_alone, reader))


def _alone(reader: Callable[[], np.ndarray]) -> tuple[np.ndarray]:
    return (reader(),)


def _fp8_layers(folder: Folder) -> dict[str, tuple[Entry, Entry]]:
    """The weight and the scale of each 8-bit float layer, by the name of the weight."""
    found = {}
    for parts in by_layer(folder.entries).values():
        suffix = float8.scale_of(parts)
        if suffix is not None and jnp.issubdtype(parts["weight"].dtype, jnp.floating):
            found[parts["weight"].name] = (parts["weight"], parts[suffix])
    return found


def _read_fp8(
    folder: Folder, weight: Entry, scale: Entry, dtype: np.dtype[Any]
) -> tuple[np.ndarray]:
    name = float8.algorithm(weight, scale)
    layer = weight.name.removesuffix(".weight")
    if name is None or (name == float8.MXFP8 and f"{layer}.{layouts.MARKER}" in folder.entries):
        raise CheckpointError(
            f"{scale.file}: tensor {scale.name!r} is {scale}; how it scales {weight.name!r}, "
            f"{weight}, is not known"
        )
    value = read(scale)
    if name == float8.MXFP8:
        good = value.view(np.uint8) != 255
    else:
        good = np.isfinite(value.astype(np.float32)) & (value.astype(np.float32) >= 0)
    if not good.all():
        raise CheckpointError(f"{scale.file}: tensor {scale.name!r} has NaN or negative scales")
    return (float8.dequantize(read(weight), value, name, dtype),)


def _tensors(
    outputs: Iterable[Output], wanted: Callable[[str], bool], placement: Any
) -> Iterator[tuple[str, jax.Array | Nvfp4Tensor]]:
    for output in outputs:
        _release_dropped_buffers()
        if wanted(output.key):
            yield output.key, _place(output, placement)


def _place(output: Output, placement: Any) -> jax.Array | Nvfp4Tensor:
    """Reads a tensor and moves it to its place."""
    key, arrays = output.key, output.read()
    shape = arrays[0].shape
    if output.quantized:
        shape = (*shape[:-1], shape[-1] * 2)
    where = placement(key, shape) if callable(placement) else placement
    if not output.quantized:
        (array,) = arrays
        return _put(key, array, where)
    data, block_scale, global_scale = arrays
    del arrays
    return Nvfp4Tensor(
        _put(key, data, where),
        _put(key, block_scale, where),
        _put(key, global_scale, _leading_axes(where, global_scale.ndim)),
    )


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
