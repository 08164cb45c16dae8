# SPDX-License-Identifier: Apache-2.0
"""Quantizing a checkpoint: a folder in bf16, f16 or f32 to a ModelOpt NVFP4 folder.

The work goes shard by shard. A shard takes its name when it is whole, and a record of it holds its
hash, so that a killed run is taken up where it was: shards that are as they were written, from the
same source with the same options, are kept, the others are made again. The index and the
configuration are written last; without them the folder is no checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4._version import __version__
from jax_nvfp4.calibration import Calibration
from jax_nvfp4.checkpoint import modelopt
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import (
    INDEX_SUFFIX,
    UNFINISHED,
    Entry,
    Folder,
    commit,
    open_folder,
    read,
    read_header,
    read_json,
    temporary_file,
    write_index,
    write_json,
    write_safetensors,
)
from jax_nvfp4.checkpoint.load import UNQUANTIZED, detect, kv_cache_of
from jax_nvfp4.checkpoint.modelopt_config import describe
from jax_nvfp4.checkpoint.save import pack_weight, write_configs
from jax_nvfp4.checkpoint.selection import (
    DEFAULT_SKIP,
    ExpertStacks,
    Patterns,
    Roles,
    refuse_transposed,
    why_left_alone,
)
from jax_nvfp4.ops.quantize.api import quantize
from jax_nvfp4.search import Search
from jax_nvfp4.tensor import Nvfp4Tensor

_OTHER_WEIGHTS = (".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".npz")


@dataclasses.dataclass(frozen=True)
class TensorReport:
    """What became of one tensor.

    Attributes:
        name: the tensor.
        shape: its logical shape.
        bytes_before: as stored in the source.
        bytes_after: as stored in the destination, scales included.
        error: of a quantized tensor, |w - dequantized| / |w| (Frobenius norms).
        reason: of a tensor left alone, why.
    """

    name: str
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    error: float | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked conversion, ready to run.

    Attributes:
        source: the checkpoint.
        config: the content of its config.json, None where it has none.
        destination: the folder to write.
        reasons: for each tensor why it is left alone, or None where it is to be quantized.
        identity: the source and the options, to recognize an unfinished run of the same.
        unmatched: patterns of the options that match no tensor.
        transposed: experts in one parameter that are stored (G, K, N).
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.
        importance: of the columns of a weight by the name of its tensor, for the search.
    """

    source: Folder
    config: dict[str, Any] | None
    destination: Path
    reasons: dict[str, str | None]
    identity: dict[str, Any]
    unmatched: tuple[str, ...]
    transposed: frozenset[str]
    search: Search | None = None
    importance: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors of the source."""
        return sum(entry.nbytes for entry in self.source.entries.values())


def plan(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    default_skip: bool = True,
    search: Search | None = None,
    calibration: str | os.PathLike[str] | None = None,
) -> Plan:
    """Decides what to quantize: matrices `X.weight`, and experts in one parameter of three axes.

    K, the contracted axis, must be a multiple of 16.

    Args:
        source: a Hugging Face style folder of safetensors files, or one such file.
        destination: a folder that is empty, does not exist or holds an unfinished run of the same.
        skip: patterns (see `Patterns`) of tensors or modules to leave alone.
        only: patterns of tensors or modules to consider, all by default.
        default_skip: leave embeddings, norms, output heads and routers alone.
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.
        calibration: the file of a `Calibration` under the names of this checkpoint's modules or
            tensors: in the search the mean square of each input weighs the error of its column.

    Returns:
        The plan.

    Raises:
        CheckpointError: the source is damaged or quantized already, its linear layers are stored
            transposed, or there is nothing in it to quantize; or the destination holds an
            unfinished run of something else; or a pattern is not valid; or the calibration does
            not fit the checkpoint, or is given without a search.
        FileExistsError: the destination holds something else, or has the name of a file.
        FileNotFoundError: the source does not exist.
    """
    folder = open_folder(source)
    destination = Path(destination)
    inside = destination.resolve().is_relative_to(folder.path.resolve())
    if inside and (not folder.alone or destination.resolve() == folder.path.resolve()):
        raise FileExistsError(f"{destination}: the destination must lie outside the source")
    if destination.name.endswith(".safetensors"):
        raise FileExistsError(f"{destination}: the destination is a folder, not a file in it")
    config = folder.json("config.json") if (folder.path / "config.json").is_file() else None
    if detect(folder) is not UNQUANTIZED:
        raise CheckpointError(f"{folder.path}: this checkpoint is quantized already")
    refuse_transposed(folder, config or {})
    identity = {
        "version": __version__,
        "skip": sorted(skip),
        "only": sorted(only),
        "default_skip": default_skip,
        "files": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in folder.shards],
        "search": search,
        "calibration": None if calibration is None else _hash(Path(calibration)),
    }
    _check_destination(destination, identity)
    reasons, unmatched = _reasons(folder, config or {}, skip, only, default_skip)
    if None not in reasons.values():
        counts = collections.Counter(reasons.values())
        found = ", ".join(f"{count} left alone: {reason}" for reason, count in counts.items())
        raise CheckpointError(f"{folder.path}: nothing to quantize ({found or 'no tensor'})")
    _check_description(folder, reasons)
    stacks = ExpertStacks(folder.entries, config or {})
    chosen = [entry for entry in folder.entries.values() if reasons[entry.name] is None]
    transposed = frozenset(e.name for e in chosen if len(e.shape) == 3 and stacks.is_transposed(e))
    importance = _importance(folder, reasons, transposed, search, calibration)
    return Plan(
        folder, config, destination, reasons, identity, unmatched, transposed, search, importance
    )


def _importance(
    folder: Folder,
    reasons: dict[str, str | None],
    transposed: frozenset[str],
    search: Search | None,
    calibration: str | os.PathLike[str] | None,
) -> dict[str, np.ndarray]:
    """The importance of the columns of each weight to be quantized that the file knows."""
    if calibration is None:
        return {}
    if search is None:
        raise CheckpointError(f"{calibration}: a calibration needs a search that it can guide")
    try:
        statistics = Calibration.load(calibration)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    importance = {}
    for name in (name for name, reason in reasons.items() if reason is None):
        of_weight = statistics.get(name, statistics.get(name.removesuffix(".weight")))
        if of_weight is None:
            continue
        *experts, n, k = folder.entries[name].shape
        expected = (*experts, n if name in transposed else k)
        if of_weight.mean_square.shape != expected:
            raise CheckpointError(
                f"{calibration}: the statistics of {name} must have shape {expected} to go with a "
                f"weight of shape {folder.entries[name].shape}; got {of_weight.mean_square.shape}"
            )
        importance[name] = of_weight.mean_square
    if not importance:
        known = ", ".join(list(statistics)[:3])
        raise CheckpointError(f"{calibration}: knows none of the weights to quantize; has {known}")
    return importance


def _check_description(folder: Folder, reasons: dict[str, str | None]) -> None:
    """Refuses a source with 8-bit layers that the result could not describe."""
    quantized = {
        f"{name}_scale_2" if name.endswith(".weight") else f"{name}_weight_scale_2": entry
        for name, entry in folder.entries.items()
        if reasons[name] is None
    }
    try:
        describe({**folder.entries, **quantized}, __version__)
    except ValueError as error:
        raise CheckpointError(f"{folder.path}: {error}") from error


def _reasons(
    folder: Folder,
    config: dict[str, Any],
    skip: Sequence[str],
    only: Sequence[str],
    default_skip: bool,
) -> tuple[dict[str, str | None], tuple[str, ...]]:
    """For each tensor why it is left alone, and the patterns that match none."""
    default = Patterns(DEFAULT_SKIP if default_skip else ())
    roles = Roles(folder.entries, config) if default_skip else None
    stacks = ExpertStacks(folder.entries, config)
    skipped, selected = Patterns(skip), Patterns(only)

    def reason(entry: Entry) -> str | None:
        matched, wanted = skipped.match(entry.name), selected.match(entry.name)
        stacked = stacks.has(entry)
        why = stacks.why_left_alone(entry) if stacked else why_left_alone(entry, folder.entries)
        if why:
            return why
        if pattern := default.match(entry.name) or matched:
            return f"matches {pattern!r}"
        if roles and not stacked and (role := roles.role(entry.name)):
            return role
        return "not selected" if only and not wanted else None

    reasons = {name: reason(entry) for name, entry in folder.entries.items()}
    return reasons, (*skipped.unmatched, *selected.unmatched)


def _check_destination(destination: Path, identity: dict[str, Any]) -> None:
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"{destination}: not a folder")
    run = destination / UNFINISHED / "run.json"
    if run.is_file():
        if read_json(run) != identity:
            raise CheckpointError(
                f"{destination}: holds an unfinished run of another source or with other options; "
                "delete the folder to start anew"
            )
    elif any(path.name != UNFINISHED for path in destination.iterdir()):
        raise FileExistsError(f"{destination}: not empty, and not an unfinished run")


def run(plan: Plan, on_tensor: Callable[[Entry], None] = lambda entry: None) -> list[TensorReport]:
    """Carries out a plan.

    Beside the output of one shard, one tensor is in memory at a time, of experts in one parameter
    one expert.

    Args:
        plan: from `plan`.
        on_tensor: called after each tensor or expert, for progress; tensors of kept shards come at
            once.

    Returns:
        A report for each tensor.

    Raises:
        CheckpointError: a tensor holds NaN or Inf, or the source is truncated.
        OSError: the destination cannot be written. What is finished stays for the next run.
    """
    records = plan.destination / UNFINISHED
    records.mkdir(parents=True, exist_ok=True)
    write_json(records / "run.json", plan.identity)
    reports: list[TensorReport] = []
    for shard in plan.source.shards:
        entries = [entry for entry in plan.source.entries.values() if entry.file == shard]
        output, record = plan.destination / shard.name, records / f"{shard.name}.json"
        done = _recorded(output, record)
        if done is None:
            done = _convert_shard(entries, plan, output, on_tensor)
            content = {"sha256": _hash(output), "tensors": [dataclasses.asdict(r) for r in done]}
            write_json(record, content)
        else:
            for entry in entries:
                on_tensor(entry)
        reports += done
    _finish(plan)
    return reports


def _recorded(output: Path, record: Path) -> list[TensorReport] | None:
    """The report of a shard that an earlier run finished, if it is still as it was written."""
    if not (record.is_file() and output.is_file()):
        return None
    content = read_json(record)
    if content.get("sha256") != _hash(output):
        return None
    return [TensorReport(**{**r, "shape": tuple(r["shape"])}) for r in content["tensors"]]


def _hash(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _convert_shard(
    entries: Sequence[Entry],
    plan: Plan,
    output: Path,
    on_tensor: Callable[[Entry], None],
) -> list[TensorReport]:
    arrays: dict[str, np.ndarray] = {}
    reports = []
    for entry in entries:
        reason, error = plan.reasons[entry.name], None
        how = plan.search, plan.importance.get(entry.name)
        if reason is None and len(entry.shape) == 3:
            transposed = entry.name in plan.transposed
            parts, error = _quantize_experts(entry, transposed, *how, on_tensor)
        else:
            if reason is None:
                parts, *squares = _quantize(entry, *how)
                error = _relative(*squares)
            else:
                parts = {entry.name: read(entry)}
            on_tensor(entry)
        after = sum(array.nbytes for array in parts.values())
        reports.append(TensorReport(entry.name, entry.shape, entry.nbytes, after, error, reason))
        arrays |= parts
    write_safetensors(output, arrays)
    return reports


def _quantize(
    entry: Entry, search: Search | None, importance: np.ndarray | None, transposed: bool = False
) -> tuple[dict[str, np.ndarray], float, float]:
    """Quantizes a matrix, (N, K), or (K, N) if it is transposed.

    Returns:
        (its stored parts, the squares of what was lost and of the weight, summed).
    """
    values = read(entry)
    weight = jax.device_put(np.ascontiguousarray(values.T) if transposed else values)
    del values
    tensor = _quantize_matrix(weight, search=search, importance=importance)
    if (np.asarray(tensor.block_scale).view(np.uint8) == 0x7F).any():
        raise CheckpointError(f"{entry.file}: tensor {entry.name!r} holds NaN or Inf")
    lost, total = (float(np.asarray(x).sum(dtype=np.float64)) for x in _squares(weight, tensor))
    key = entry.name if entry.name.endswith(".weight") else f"{entry.name}.weight"
    try:
        return pack_weight(key, tensor), lost, total
    except ValueError as problem:
        raise CheckpointError(f"{entry.file}: {problem}") from problem


def _quantize_experts(
    entry: Entry,
    transposed: bool,
    search: Search | None,
    importance: np.ndarray | None,
    on_expert: Callable[[Entry], None],
) -> tuple[dict[str, np.ndarray], float]:
    """Quantizes experts in one parameter, one by one, each with a global scale of its own.

    Returns:
        (its stored parts, the relative error): ordered as the parameter is, packed along K.
    """
    joint = "_scale" if entry.name.endswith(".weight") else "_weight_scale"
    names = (entry.name, f"{entry.name}{joint}", f"{entry.name}{joint}_2")
    whole: list[np.ndarray] = []
    lost = total = 0.0
    for i in range(entry.shape[0]):
        expert = entry.part(i)
        of_expert = None if importance is None else importance[i]
        parts, *squares = _quantize(expert, search, of_expert, transposed)
        lost, total = lost + squares[0], total + squares[1]
        arrays = [part.T if transposed else part for part in parts.values()]
        if not whole:
            whole = [np.empty((entry.shape[0], *a.shape), a.dtype) for a in arrays]
        for stack, array in zip(whole, arrays, strict=True):
            stack[i] = array
        on_expert(expert)
    return dict(zip(names, whole, strict=True)), _relative(lost, total)


def _relative(lost: float, total: float) -> float:
    """The relative error that sums of squares amount to."""
    return math.sqrt(lost / total) if total else 0.0


_quantize_matrix = jax.jit(quantize, static_argnames="search")


@jax.jit
def _squares(weight: jax.Array, tensor: Nvfp4Tensor) -> tuple[jax.Array, jax.Array]:
    """The squares of what quantization lost and of the weight, summed over each row: (N,) each."""

    def of_row(row: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        values, data, block_scale = row
        wide = values.astype(jnp.float32)
        lost = wide - Nvfp4Tensor(data, block_scale, tensor.global_scale).dequantize()
        return jnp.sum(lost * lost), jnp.sum(wide * wide)

    rows = (weight, tensor.data, tensor.block_scale)
    return jax.lax.map(of_row, rows, batch_size=256)  # few rows at a time in float32


def _finish(plan: Plan) -> None:
    """Writes what makes the folder a checkpoint: other files, the index, the configuration."""
    source, destination = plan.source, plan.destination
    for path in other_files(source).copied:
        copy = destination / path.relative_to(source.path)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with temporary_file(copy) as temporary:
            shutil.copyfile(path, temporary)
            commit(temporary, copy)

    written = {shard.name: read_header(destination / shard.name).entries for shard in source.shards}
    if source.index is not None:
        total = sum(entry.nbytes for shard in written.values() for entry in shard.values())
        write_index(destination / source.index.name, written, total)
    entries = {name: entry for shard in written.values() for name, entry in shard.items()}
    write_configs(destination, plan.config, entries, kv_cache_of(source))
    done = destination / f"{UNFINISHED}.done"
    os.replace(destination / UNFINISHED, done)  # at once: half the records would be of no use
    shutil.rmtree(done)


@dataclasses.dataclass(frozen=True)
class OtherFiles:
    """What lies beside the shards of a checkpoint.

    Attributes:
        copied: what goes to the destination as it is: the tokenizer, weights in subfolders, ...
        left_out: weights that do not: they are taken for the same weights in another format.
    """

    copied: tuple[Path, ...]
    left_out: tuple[Path, ...]


def other_files(source: Folder) -> OtherFiles:
    """Sorts the other files of a checkpoint; one file that was asked for alone has none."""
    if source.alone:
        return OtherFiles((), ())
    ours = {source.path / name for name in ("config.json", modelopt.CONFIG_FILE)}
    ours |= {*source.shards, *([source.index] if source.index else [])}
    copied: list[Path] = []
    left_out: list[Path] = []
    for path in sorted(source.path.rglob("*")):
        relative = path.relative_to(source.path)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or path in ours or not path.is_file():
            continue
        (left_out if _is_a_copy(path, source.path) else copied).append(path)
    return OtherFiles(tuple(copied), tuple(left_out))


def _is_a_copy(path: Path, root: Path) -> bool:
    """Whether a file holds weights that the shards hold too.

    In a subfolder, safetensors files are a part of the model, and PyTorch's where there are none
    and a configuration lies beside them.
    """
    safetensors = path.name.endswith((".safetensors", INDEX_SUFFIX))
    pytorch = path.name.endswith((".bin", ".pt", ".pth", ".bin.index.json"))
    if path.parent == root:
        return safetensors or pytorch or path.suffix in _OTHER_WEIGHTS
    if pytorch:
        module = (path.parent / "config.json").is_file()
        return not module or any(path.parent.glob("*.safetensors"))
    return path.suffix in _OTHER_WEIGHTS
