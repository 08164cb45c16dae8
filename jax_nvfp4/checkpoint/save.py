# SPDX-License-Identifier: Apache-2.0
"""Writing checkpoints in NVIDIA ModelOpt's format."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from jax_nvfp4._version import __version__
from jax_nvfp4.checkpoint import descriptions, fused, modelopt
from jax_nvfp4.checkpoint.contents import Contents, Tensor, check_weight
from jax_nvfp4.checkpoint.files import (
    INDEX_SUFFIX,
    commit,
    read_json,
    temporary_name,
    write_index,
    write_json,
    write_safetensors,
)
from jax_nvfp4.checkpoint.float8 import Stored
from jax_nvfp4.checkpoint.modelopt_config import describe
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


def save_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
    kv_cache_quant_algo: str | None = None,
    part_names: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Saves a checkpoint as NVIDIA ModelOpt does; `load_checkpoint` gives the same bits back.

    The folder gets `model.safetensors`, or shards and their index, and `hf_quant_config.json`. The
    files take their names when all of them are written, the index and the configuration last: an
    interrupted save leaves nothing that loads, or the checkpoint that was there. The tensors of a
    layer tell its algorithm: `NVFP4_AWQ` with a pre_quant_scale, else `NVFP4` with an input scale
    and `W4A16_NVFP4` without one; where layers differ, the checkpoint is `MIXED_PRECISION`.

    Args:
        path: the folder; made where it does not exist.
        tensors: what `load_checkpoint` returns, or pairs, which are consumed one at a time and held
            for one shard. Quantized weights, of keys `X.weight`, have K a multiple of 16 and one
            global scale for each matrix. `X.input_scale` is a float32 scalar, of stacked weights
            also one for each. Weights that `concatenate` or `gate_up` joined are saved as their
            parts, in pairs before what else their layer has.
        config: the model's Hugging Face configuration, that of a `config.json` in the folder by
            default; where there is one, `config.json` is written with its `quantization_config`,
            in place of any that was there, at any depth.
        shard_bytes: tensors are written to a new shard where one would grow beyond this.
        overwrite: replace a checkpoint that is there, from which `tensors` may be read lazily. Its
            files are removed when those that take their place are written.
        kv_cache_quant_algo: how the KV cache is quantized, such as "FP8"; by default as in the
            checkpoint that `tensors` were loaded from, or as `config` says, or "FP8" where there
            are scales of it (`X.k_scale`, `X.v_scale`).
        part_names: what the parts of joined weights are called, by the path of the layer or its
            last component, such as `{"qkv_proj": ("q_proj", "k_proj", "v_proj")}`; this and the
            other usual ones (`gate_up_proj`, `w13`, ...) are known.

    Raises:
        ValueError: a tensor cannot be stored in this format, or `load_checkpoint` would refuse it;
            the message names it. Nothing is written then. Or the path is that of a file.
        TypeError: a key is not a string, or a part of a quantized weight has been cast.
        FileExistsError: the folder holds safetensors files, and `overwrite` is False.
        OSError: the folder cannot be written.
    """
    folder = _folder(path)
    there = _there(folder)
    if there and not overwrite:
        raise FileExistsError(
            f"{folder} holds a checkpoint ({there[0].name}); overwrite=True replaces it"
        )
    if config is None and (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
    kv_cache = (
        kv_cache_quant_algo
        or getattr(tensors, "kv_cache_quant_algo", None)
        or modelopt.kv_cache_algorithm(_description(config))
    )
    if isinstance(tensors, Mapping):
        declared = Contents(folder)
        for key, value in fused.split(tensors, part_names):
            declared.add(key, value)
        declared.check(kv_cache)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    contents = Contents(folder)
    try:
        with _Shards(folder, shard_bytes) as shards:
            for key, value in fused.split(tensors, part_names):
                contents.add(key, value)
                for name, array in _stored_arrays(key, value).items():
                    shards.add(name, array)
            contents.check(kv_cache)
        write_configs(folder, config, contents.stored, kv_cache)
    except BaseException:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def _folder(path: str | os.PathLike[str]) -> Path:
    """The folder to save in, which must not be or look like a file."""
    folder = Path(path)
    if folder.name.endswith((".safetensors", INDEX_SUFFIX)):
        raise ValueError(f"{folder}: the path of a folder is expected, not that of a file in it")
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder}: not a folder")
    return folder


def _description(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    found = next(descriptions.nested("config", config or {}), None)
    return found.content if found else {}


def write_configs(
    folder: Path,
    config: Mapping[str, Any] | None,
    stored: Mapping[str, Stored],
    kv_cache: str | None = None,
) -> None:
    """Writes hf_quant_config.json and, where there is a model configuration, config.json.

    Args:
        folder: the checkpoint.
        config: the model configuration.
        stored: every tensor as it is stored, by name.
        kv_cache: the algorithm of the KV cache, if it is known.
    """
    described = describe(stored, __version__, kv_cache)
    content = descriptions.without(config or {})
    if described:
        write_json(folder / modelopt.CONFIG_FILE, described[0])
        content[descriptions.KEYS[0]] = described[1]
    if config is not None:
        write_json(folder / "config.json", content)


def pack_weight(key: str, weight: Nvfp4Tensor) -> dict[str, np.ndarray]:
    """The stored tensors of a quantized weight.

    Args:
        key: `X.weight`.
        weight: (..., N, K).

    Returns:
        `X.weight`, `X.weight_scale` and `X.weight_scale_2`.

    Raises:
        ValueError: ModelOpt's format cannot hold it.
    """
    check_weight(key, weight)
    block_scale = np.asarray(weight.block_scale)
    bits = block_scale.view(np.uint8)
    if bits.size and bits.max() > 0x7E:
        raise ValueError(f"tensor {key!r} has NaN or negative block scales")
    return {
        key: np.asarray(weight.data),
        f"{key}_scale": block_scale,
        f"{key}_scale_2": np.asarray(weight.global_scale),
    }


def _stored_arrays(key: str, value: Tensor) -> dict[str, np.ndarray]:
    if isinstance(value, RepackedWeight):
        value = value.canonical()
    return pack_weight(key, value) if isinstance(value, Nvfp4Tensor) else {key: np.asarray(value)}


class _Shards:
    """Writes tensors to shards under temporary names, and names them when their number is known.

    A context manager: the shards get their names where its body ends, in place of a checkpoint that
    is there, and go where it fails.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._limit = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._pending_bytes = 0
        self._total = 0
        self._names: list[list[str]] = []
        self._seen: set[str] = set()

    def add(self, name: str, array: np.ndarray) -> None:
        if name in self._seen:
            raise ValueError(f"tensor {name!r} comes twice")
        self._seen.add(name)
        if self._pending and self._pending_bytes + array.nbytes > self._limit:
            self._flush()
        self._pending[name] = array
        self._pending_bytes += array.nbytes

    def _flush(self) -> None:
        write_safetensors(self._path(len(self._names)), self._pending)
        self._names.append(list(self._pending))
        self._total += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _path(self, i: int) -> Path:
        return temporary_name(self._folder / f"shard-{i:05d}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._name_shards()
        finally:
            for i in range(len(self._names)):
                self._path(i).unlink(missing_ok=True)

    def _name_shards(self) -> None:
        if self._pending or not self._names:
            self._flush()
        # What is there goes in an order that leaves nothing that loads.
        for path in (*_there(self._folder), self._folder / modelopt.CONFIG_FILE):
            path.unlink(missing_ok=True)
        count = len(self._names)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = ["model.safetensors"]
        for i, name in enumerate(names):
            commit(self._path(i), self._folder / name)
        if count > 1:
            shards = dict(zip(names, self._names, strict=True))
            write_index(self._folder / f"model{INDEX_SUFFIX}", shards, self._total)


def _there(folder: Path) -> list[Path]:
    """The files of a checkpoint that is there, the indexes first."""
    found = [*folder.glob("*" + INDEX_SUFFIX), *folder.glob("*.safetensors")]
    return [path for path in found if path.is_file()]
