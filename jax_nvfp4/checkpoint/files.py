# SPDX-License-Identifier: Apache-2.0
"""Safetensors files and folders: what is in them, one tensor at a time, and atomic writes.

The `safetensors` library opens, checks and writes the files. Its NumPy interface cannot return the
8-bit float dtypes, and it copies out of a memory map that counts as the process's memory; so the
bytes of a tensor are read here, straight into the buffer that becomes the array.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jax_nvfp4.checkpoint.errors import CheckpointError

INDEX_SUFFIX = ".safetensors.index.json"
UNFINISHED = ".quantize"
"""The folder that holds the records of an unfinished run of `quantize`, in its destination."""

_SHARD_NAME = re.compile(r"-\d+-of-(\d+)\.safetensors$")

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "U16": np.uint16,
        "I16": np.int16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "U32": np.uint32,
        "I32": np.int32,
        "F32": np.float32,
        "U64": np.uint64,
        "I64": np.int64,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}

_DEEPEST = 100  # levels of JSON; no configuration has as many

# XLA's CPU client takes a host buffer as its own, without a copy, at this alignment.
_ALIGNMENT = 64


@dataclasses.dataclass(frozen=True)
class Entry:
    """One stored tensor: its name, what it is and where it lies.

    Attributes:
        name: the name in the file.
        dtype: the NumPy (or ml_dtypes) dtype.
        shape: the stored shape.
        file: the file.
        offset: of the first byte, from the start of the file.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def part(self, index: int, axes: int = 1) -> Entry:
        """One element along the first axes.

        Args:
            index: which, in the order in which they are stored.
            axes: how many axes are counted through.

        Returns:
            The part as a tensor of its own, with the name of the whole.
        """
        part = dataclasses.replace(self, shape=self.shape[axes:])
        return dataclasses.replace(part, offset=self.offset + index * part.nbytes)

    def __str__(self) -> str:
        return f"{self.dtype.name}[{', '.join(map(str, self.shape))}]"


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """A new array that is not filled, aligned so that a CPU device can take it as it is."""
    size = math.prod(shape) * dtype.itemsize
    storage = np.empty(size + _ALIGNMENT, np.uint8)
    start = -storage.ctypes.data % _ALIGNMENT
    return storage[start : start + size].view(dtype).reshape(shape)


def read(entry: Entry) -> np.ndarray:
    """Reads one tensor.

    Args:
        entry: where it lies.

    Returns:
        A new array, aligned so that a CPU device can take the buffer as it is.

    Raises:
        CheckpointError: the file ends before the tensor does.
    """
    buffer = empty((entry.nbytes,), np.dtype(np.uint8))
    with open(entry.file, "rb", buffering=0) as f:
        f.seek(entry.offset)
        view = memoryview(buffer.data)
        filled = 0
        while filled < entry.nbytes:  # one call reads at most 2 GiB
            count = f.readinto(view[filled:])
            if not count:
                raise CheckpointError(
                    f"{entry.file}: truncated in tensor {entry.name!r}: "
                    f"{filled} of its {entry.nbytes} bytes are there"
                )
            filled += count
    return buffer.view(entry.dtype).reshape(entry.shape)


@dataclasses.dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        entries: every tensor, in the order in which they are stored.
        metadata: strings by name, which some producers describe the tensors in.
    """

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Reads the header of one safetensors file.

    Raises:
        CheckpointError: it is not a whole safetensors file, or holds a dtype without a NumPy one.
        FileNotFoundError: it does not exist.
    """
    try:
        with safe_open(path, framework="np") as f:
            slices = [(name, f.get_slice(name)) for name in f.offset_keys()]
            described = [(name, s.get_dtype(), tuple(s.get_shape())) for name, s in slices]
            metadata = f.metadata() or {}
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError) as error:
        raise CheckpointError(_why_not_whole(path) or f"{path}: {error}") from error

    with open(path, "rb") as f:
        offset = 8 + int.from_bytes(f.read(8), "little")
    entries = {}
    for name, dtype, shape in described:
        if dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name!r} has the unsupported dtype {dtype}")
        entries[name] = Entry(name, DTYPES[dtype], shape, path, offset)
        offset += entries[name].nbytes  # the library has checked that there are no holes
    return Header(entries, metadata)


def _why_not_whole(path: Path) -> str | None:
    """Says which tensor a file that the library refused is cut in, or that it is not there."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            if start == b"version ":
                return (
                    f"{path}: a pointer of Git LFS in place of the file; `git lfs pull` fetches it"
                )
            header_size = int.from_bytes(start, "little")
            header = json.loads(f.read(min(header_size, size)))
        header.pop("__metadata__", None)
        for name, info in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if 8 + header_size + info["data_offsets"][1] > size:
                return f"{path}: truncated in tensor {name!r}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        pass
    return None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: it is not valid JSON, or not an object.
    """
    return parse_json(path, path.read_bytes())


def parse_json(where: object, text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object that stands in a file or in a part of one.

    Raises:
        CheckpointError: it is not valid JSON, or not an object; the message begins with `where`.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise CheckpointError(f"{where}: not valid JSON: nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, got {type(value).__name__}")
    inner: list[Any] = [value]
    for _ in range(_DEEPEST):
        values = (v.values() if isinstance(v, dict) else v for v in inner)
        inner = [v for some in values for v in some if isinstance(v, dict | list)]
    if inner:
        raise CheckpointError(f"{where}: not valid JSON: nested too deep")
    return value


def section(where: object, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside of a JSON object; {} where there is none.

    Raises:
        CheckpointError: it is something else than an object.
    """
    value = content.get(name) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: {name} must be an object, got {value!r:.60}")
    return value


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint as it lies on disk.

    Attributes:
        path: the folder.
        shards: its safetensors files, in the order of their names.
        index: the index file of a sharded checkpoint.
        entries: every tensor, shard by shard in the stored order.
        metadata: what the header of each shard says beside its tensors.
        alone: one file was asked for; what else the folder holds is not of the checkpoint.
    """

    path: Path
    shards: tuple[Path, ...]
    index: Path | None
    entries: Mapping[str, Entry]
    metadata: Mapping[Path, Mapping[str, str]]
    alone: bool = False

    def json(self, name: str) -> dict[str, Any]:
        """Reads a JSON file of the folder; {} where there is none."""
        path = self.path / name
        return read_json(path) if path.is_file() else {}


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Opens a checkpoint: a folder, one safetensors file, or the index of a sharded one.

    A folder holds an index (`*.safetensors.index.json`) with its shards, or `model.safetensors`, or
    one safetensors file of any name. Of several checkpoints the one named `model` counts.

    Args:
        path: the folder or file.

    Returns:
        The folder with its list of tensors; no tensor is read.

    Raises:
        FileNotFoundError: the path, or a shard that the index names, does not exist.
        CheckpointError: the files are damaged or do not belong together.
    """
    path = Path(path)
    if path.is_file():
        if path.name.endswith(INDEX_SUFFIX):
            return _open_sharded(path)
        return _open_file(path, alone=True)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if (path / UNFINISHED).exists():
        raise CheckpointError(
            f"{path}: unfinished; run the `quantize` command that was writing it again"
        )
    indexes, files = _files(path, "*" + INDEX_SUFFIX), _files(path, "*.safetensors")
    if (file := _preferred(path, indexes, files)) is not None:
        return _open_sharded(file) if file in indexes else _open_file(file)
    if not files:
        raise FileNotFoundError(f"{path}: no safetensors file in this folder")
    shard = _SHARD_NAME.search(files[0].name)
    if len(files) > 1 or (shard and int(shard[1]) > 1):
        raise CheckpointError(
            f"{path}: shards ({files[0].name}) and no index ({INDEX_SUFFIX[1:]}); "
            "an unfinished or incomplete checkpoint"
        )
    return _open_file(files[0])


def _preferred(folder: Path, indexes: list[Path], files: list[Path]) -> Path | None:
    """The index or file that stands for a folder, where a name or an index decides it."""
    whole, index = folder / "model.safetensors", folder / f"model{INDEX_SUFFIX}"
    if index in indexes:
        shards = set(_weight_map(index).values())
        if whole in files and whole.name not in shards:
            raise CheckpointError(
                f"{folder}: two checkpoints, {index.name} and {whole.name}; name the file meant"
            )
        others = [other for other in indexes if other != index]
        if not any(shards & set(_weight_map(other).values()) for other in others):
            return index
    elif whole in files:
        return whole
    if len(indexes) > 1:
        names = ", ".join(path.name for path in indexes)
        raise CheckpointError(f"{folder}: more than one index: {names}; name the file meant")
    return indexes[0] if indexes else None


def _files(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_file())


def _open_file(path: Path, alone: bool = False) -> Folder:
    header = read_header(path)
    return Folder(path.parent, (path,), None, header.entries, {path: header.metadata}, alone)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard and shard.strip(".")
        for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names")
    if not weight_map:
        raise CheckpointError(f"{index}: weight_map names no tensor; an unfinished checkpoint")
    return weight_map


def _open_sharded(index: Path) -> Folder:
    path, weight_map = index.parent, _weight_map(index)
    shards = tuple(path / name for name in sorted(set(weight_map.values())))
    entries: dict[str, Entry] = {}
    metadata = {}
    for shard in shards:
        if not shard.is_file():
            wanted = next(name for name, file in weight_map.items() if file == shard.name)
            raise FileNotFoundError(
                f"{shard}: missing shard, which the index names for tensor {wanted!r}"
            )
        header = read_header(shard)
        metadata[shard] = header.metadata
        for name, entry in header.entries.items():
            # A tensor that the index leaves out counts: others read whole shards.
            if weight_map.get(name, shard.name) != shard.name:
                continue
            if name in entries:
                raise CheckpointError(
                    f"{shard}: tensor {name!r} is in {entries[name].file.name} too, "
                    "and the index names neither"
                )
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise CheckpointError(
                f"{path / file}: tensor {name!r}, which the index names, is not there"
            )
    for shard in shards:
        count = _SHARD_NAME.search(shard.name)
        if count and int(count[1]) > len(shards):
            raise CheckpointError(
                f"{index}: names {len(shards)} shards of the {int(count[1])} that {shard.name} "
                "belongs to; an unfinished or incomplete checkpoint"
            )
    return Folder(path, shards, index, entries, metadata)


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that either is whole or is not there.

    Raises:
        OSError: it cannot be written, for want of space or leave.
    """
    contiguous = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    with temporary_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # the library would let its owner alone read the file
        try:
            save_file(contiguous, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        temporary.chmod(mode)
        commit(temporary, path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file that either is whole or is not there.

    Raises:
        OSError: it cannot be written.
    """
    with temporary_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        commit(temporary, path)


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """The name to write a file under before `commit` gives it its own; gone if the body fails."""
    temporary = temporary_name(path)
    try:
        yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_index(path: Path, arrays_of_shard: Mapping[str, Iterable[str]], total: int) -> None:
    """Writes the index of a sharded checkpoint.

    Args:
        path: the index file.
        arrays_of_shard: the tensor names of each file name.
        total: bytes of all tensors.
    """
    weight_map = {name: shard for shard, names in arrays_of_shard.items() for name in names}
    weight_map = dict(sorted(weight_map.items()))
    write_json(path, {"metadata": {"total_size": total}, "weight_map": weight_map})


def temporary_name(path: Path) -> Path:
    """The name under which a file is written; no reader takes it for a part of a checkpoint."""
    return path.with_name(f".{path.name}.tmp")


def commit(temporary: Path, path: Path) -> None:
    """Gives a finished file its name, durably."""
    with open(temporary, "rb") as f:
        os.fsync(f.fileno())
    os.replace(temporary, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
