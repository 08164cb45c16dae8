# SPDX-License-Identifier: Apache-2.0
"""`load_params`: a checkpoint into the params of a model, dense or converted."""

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.checkpoint import iter_checkpoint
from jax_nvfp4.conversion.convert import path_of
from jax_nvfp4.ops.concatenate import concatenate
from jax_nvfp4.ops.quantize.api import quantize
from jax_nvfp4.ops.repack import repack
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.products.leaf import ConvertedLeaf, JoinedLeaf, is_converted
from jax_nvfp4.search import Search
from jax_nvfp4.tensor import FLOATS, Nvfp4Tensor, RepackedWeight

Name = Any  # str | Sequence[str] | tuple[str, tuple[int, ...]]
Names = Mapping[str, Name] | Callable[[tuple[str, ...]], Name | None]

_WEIGHT = ".weight"
_INPUT_SCALE = ".input_scale"
_PRE_QUANT_SCALE = ".pre_quant_scale"


def load_params(
    path: str | os.PathLike[str], *, like: Any, names: Names, search: Search | None = None
) -> Any:
    """Fills the params of a model from an NVFP4 checkpoint, or from one in 16 or 32 bits.

    Each tensor of the file is read once, and brought into the layout that its leaf needs: the codes
    and scales of an NVFP4 tensor become those of an NVFP4 kernel as they are, a 16-bit tensor is
    quantized for one, an NVFP4 tensor is dequantized for a dense leaf. So an unmodified model runs
    an NVFP4 checkpoint, and no 16-bit copy of a quantized weight is ever made: but for a leaf that
    `convert(tied="copy")` keeps as both, which takes both from the one tensor. Leaves that
    `convert(fuse=True)` joined are named one by one, as if they were not.

    A file has its matrices as (N, K), (outputs, inputs), as PyTorch does. N runs over the free axes
    of a kernel, and K over those that products sum over, each in their order: a tensor (H * D, E)
    fits a kernel (E, H, D).

    Args:
        path: as of `load_checkpoint`.
        like: params as `convert` returned them, or dense ones; abstract (`jax.eval_shape`) or not.
            A `ShapeDtypeStruct` with a sharding says where its array goes.
        names: the name of the tensor for the path of a leaf. A dict maps paths, joined by dots, to
            names; a `*` in a path stands for a part of it, and the first `*` of the name for the
            same part, and so on. A function takes the path as a tuple of strings, and None leaves
            the leaf as it is. The name is

            - a string. `{}` in it counts along the first axis of a stacked leaf, a second one along
              the second (layers, experts);
            - a list of them: the parts of a leaf that stacks them along its next axis, or that has
              their rows one after another (fused q, k, v);
            - (string, axes): the axes of the file's tensor are permuted so first, as by
              `transpose`. A dense leaf needs it where its shape does not say the order.
        search: how the block scales of 16-bit tensors are chosen, as of `jax_nvfp4.quantize`. Each
            matrix of a stack has a global scale of its own.

    Returns:
        The params.

    Raises:
        ValueError: a leaf has no name or a wrong one, or a joined leaf more than one; a path of
            `names` is that of no leaf; a shape does not fit or fits in two ways; or the checkpoint
            needs its activations scaled first (`pre_quant_scale`).
        CheckpointError: the checkpoint is damaged, or not supported.
        FileNotFoundError: there is no checkpoint.
    """
    keyed, tree = jax.tree_util.tree_flatten_with_path(like, is_leaf=is_converted)
    name_of = _name_of(names)
    if not callable(names):
        _check_paths(names, [".".join(path_of(key_path)) for key_path, _ in keyed])
    results: list[Any] = [leaf for _, leaf in keyed]
    pending: dict[str, list[_Pending]] = {}
    joined = _joined(keyed, name_of)
    for i, (key_path, leaf) in enumerate(keyed):
        leaf_path = path_of(key_path)
        name = None if isinstance(leaf, JoinedLeaf) else name_of(leaf_path)
        if others := joined.get(".".join(leaf_path)):
            name = _together(leaf_path, [name, *others])
        if name is not None:
            item = _Pending(i, leaf_path, leaf, search, *_tensors_of(leaf_path, leaf, name))
            for tensor in item.wanted:
                pending.setdefault(tensor, []).append(item)
        elif any(isinstance(part, jax.ShapeDtypeStruct) for part in jax.tree.leaves(leaf)):
            raise ValueError(f"names has no name for {'.'.join(leaf_path)}, which is abstract")

    every = frozenset(pending)

    def wanted(key: str) -> bool:
        layer = key.removesuffix(_PRE_QUANT_SCALE)
        if layer != key and layer + _WEIGHT in every:
            raise ValueError(
                f"{path}: {key} scales the inputs of a layer before they are quantized, which a "
                f"model that knows nothing of it would leave out"
            )
        return key in every

    for key, read in iter_checkpoint(path, where=wanted):
        for item in pending.pop(key):
            item.found[key] = item.prepared(key, read)
            if len(item.found) == len(item.wanted):
                results[item.number] = item.finish()
    if pending:
        missing = sorted(pending)
        more = f" and {len(missing) - 4} others" if len(missing) > 4 else ""
        raise ValueError(
            f"{path}: there is no tensor {', '.join(map(repr, missing[:4]))}{more}, the first for "
            f"{pending[missing[0]][0].name}"
        )
    return jax.tree.unflatten(tree, results)


def _name_of(names: Names) -> Callable[[tuple[str, ...]], Name | None]:
    """The names as a function of the path."""
    if callable(names):
        return names

    def name_of(path: tuple[str, ...]) -> Name | None:
        joined = ".".join(path)
        if joined in names:
            return names[joined]
        for pattern, name in names.items():
            if "*" in pattern and (parts := _matched(pattern, joined)):
                return _filled(name, parts.groups())
        return None

    return name_of


def _matched(pattern: str, path: str) -> re.Match[str] | None:
    return re.fullmatch(re.escape(pattern).replace(r"\*", "(.*?)"), path)


def _check_paths(names: Mapping[str, Name], paths: Sequence[str]) -> None:
    """Refuses paths that are those of no leaf: the leaf that was meant would stay as it is."""
    wrong = [
        pattern
        for pattern in names
        if pattern not in paths
        and not ("*" in pattern and any(_matched(pattern, path) for path in paths))
    ]
    if wrong:
        shown = ", ".join(map(repr, sorted(paths)[:6])) + (", ..." if len(paths) > 6 else "")
        raise ValueError(
            f"names has {', '.join(map(repr, wrong[:4]))}{', ...' if len(wrong) > 4 else ''}, "
            f"which is the path of no leaf of like; paths are {shown}"
        )


def _joined(
    keyed: Sequence[Any], name_of: Callable[[tuple[str, ...]], Name | None]
) -> dict[str, list[Name | None]]:
    """The names of the leaves whose rows are in the kernel of another, by the name of that one."""
    result: dict[str, list[Name | None]] = {}
    for key_path, leaf in keyed:
        if isinstance(leaf, JoinedLeaf):
            result.setdefault(leaf.into, []).append(name_of(path_of(key_path)))
    return result


def _together(path: tuple[str, ...], names: Sequence[Name | None]) -> Name | None:
    """The name of a kernel that several leaves share: their tensors, one after another in rows."""
    if all(name is None for name in names):
        return None
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{'.'.join(path)} shares its kernel with other leaves (fuse=True): each needs the "
            f"name of one tensor; got {names}"
        )
    return list(names)


def _filled(name: Name, parts: Sequence[str]) -> Name:
    """A name with its `*` replaced by the parts of a path, in their order."""

    def fill(name: str) -> str:
        left = iter(parts)
        return re.sub(r"\*", lambda found: next(left, found.group()), name)

    if isinstance(name, str):
        return fill(name)
    if _is_permuted(name):
        return fill(name[0]), name[1]
    return [fill(each) for each in name]


def _is_permuted(name: Any) -> bool:
    return isinstance(name, tuple) and len(name) == 2 and not isinstance(name[1], str)


def _tensors_of(
    path: tuple[str, ...], leaf: Any, name: Any
) -> tuple[list[str], tuple[int, ...], int, tuple[int, ...] | None]:
    """The tensors that a leaf is made of.

    Returns:
        The names, the leading sizes that `{}` counts along, the parts of each of these, and the
        permutation of the file's axes.
    """
    permutation = None
    if _is_permuted(name):
        name, permutation = name
    parts = [name] if isinstance(name, str) else list(name)
    joined = ".".join(path)
    counts = {part.count("{}") for part in parts}
    if len(counts) != 1:
        raise ValueError(f"the names of {joined} must have as many '{{}}' each; got {parts}")
    (count,) = counts
    lead = tuple(_stacked_shape(leaf)[:count])
    if len(lead) < count:
        raise ValueError(
            f"{joined} has {len(lead)} stacked axes for the {count} '{{}}' of {parts[0]!r}"
        )
    names = [part.format(*index) for index in np.ndindex(*lead) for part in parts]
    if len(set(names)) != len(names):
        raise ValueError(f"the names of {joined} must differ; got {names[:4]}")
    return names, lead, len(parts), permutation


def _kernel_of(leaf: Any) -> Nvfp4Kernel | None:
    kernel = leaf.kernel if isinstance(leaf, ConvertedLeaf) else leaf
    return kernel if isinstance(kernel, Nvfp4Kernel) else None


def _dense_of(leaf: Any) -> Any:
    """The dense array of a leaf, None where it has a kernel alone."""
    if isinstance(leaf, ConvertedLeaf):
        return leaf.dense
    return None if isinstance(leaf, Nvfp4Kernel) else leaf


def _stacked_shape(leaf: Any) -> tuple[int, ...]:
    """The sizes of the axes that a leaf may be stacked along."""
    kernel = _kernel_of(leaf)
    return leaf.shape if kernel is None else kernel.weight.shape[:-2]


@dataclasses.dataclass
class _Pending:
    """A leaf whose tensors are being read.

    Attributes:
        number: of the leaf.
        path: of the leaf.
        leaf: what it is to be like.
        search: of the block scales of a tensor that is quantized.
        wanted: the tensors it is made of, in order.
        lead: the leading axes that they are stacked along.
        parts: how many there are for each index of these.
        permutation: of the axes of each tensor, before anything else.
        found: those that were read, each as it goes into the leaf's kernel, or into the dense leaf.
        copies: the same for the dense copy of a leaf that has a kernel too (tied="copy").
    """

    number: int
    path: tuple[str, ...]
    leaf: Any
    search: Search | None
    wanted: list[str]
    lead: tuple[int, ...]
    parts: int
    permutation: tuple[int, ...] | None
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    copies: dict[str, jax.Array] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.leaf, ConvertedLeaf) and self.leaf.input_scale is not None:
            self.wanted += [_input_scale(name) for name in self.wanted]

    @property
    def name(self) -> str:
        """The path, joined by dots."""
        return ".".join(self.path)

    def prepared(self, key: str, tensor: Any) -> Any:
        """One tensor as it goes into the leaf, so that no more of it is kept."""
        if key.endswith(_INPUT_SCALE) and key in self.wanted[len(self.wanted) // 2 :]:
            return jnp.asarray(tensor, jnp.float32)
        if self.permutation is not None:
            if isinstance(tensor, Nvfp4Tensor):
                raise ValueError(
                    f"{key} is in NVFP4, whose axes cannot be permuted for {self.name}"
                )
            tensor = tensor.transpose(self.permutation)
        kernel, dense = _kernel_of(self.leaf), _dense_of(self.leaf)
        if dense is not None:
            is_nvfp4 = isinstance(tensor, Nvfp4Tensor)
            copy = tensor.dequantize(dense.dtype) if is_nvfp4 else tensor.astype(dense.dtype)
            if kernel is None:
                return copy
            self.copies[key] = copy
        assert kernel is not None  # a leaf holds one of the two, or both
        if not isinstance(tensor, Nvfp4Tensor):
            if tensor.dtype not in FLOATS:
                raise ValueError(f"{key}, for {self.name}, is {tensor.dtype.name}, no weight")
            tensor = _quantized(tensor, self.search)
        if tensor.ndim < 2 or tensor.k != kernel.weight.shape[-1]:
            raise ValueError(
                f"{key} of shape {tensor.shape} does not fit {self.name}, whose NVFP4 weight has "
                f"shape {kernel.weight.shape}, (..., N, K)"
            )
        return tensor

    def finish(self) -> Any:
        """The leaf, once all of its tensors are there."""
        is_static = isinstance(self.leaf, ConvertedLeaf) and self.leaf.input_scale is not None
        half = len(self.wanted) // (2 if is_static else 1)
        names = self.wanted[:half]
        tensors = [self.found[name] for name in names]
        kernel = _kernel_of(self.leaf)
        if kernel is None:
            result = _placed(self._dense(tensors), self.leaf)
        else:
            weight = self._weight(kernel, tensors)
            if isinstance(kernel.weight, RepackedWeight):
                weight = repack(weight, kernel.weight.arch)
            result = dataclasses.replace(kernel, weight=_placed(weight, kernel.weight))
        if isinstance(self.leaf, ConvertedLeaf):
            copy = self.leaf.dense
            if copy is not None:
                copy = _placed(self._dense([self.copies[name] for name in names]), copy)
            result = ConvertedLeaf(result, copy, self._input_scale(self.wanted[half:]))
        self.found.clear()
        self.copies.clear()
        return result

    def _input_scale(self, names: Sequence[str]) -> jax.Array | None:
        """The static scale of a leaf's inputs, the largest of those of the parts of its rows."""
        like = self.leaf.input_scale
        if like is None:
            return None
        scales = jnp.stack([self.found[name].reshape(()) for name in names])
        scales = scales.reshape(*self.lead, self.parts).max(-1) if self.lead else scales.max()
        return _placed(jnp.broadcast_to(scales, like.shape), like)

    def _weight(self, kernel: Nvfp4Kernel, tensors: list[Nvfp4Tensor]) -> Nvfp4Tensor:
        """The NVFP4 weight of a kernel, of its parts."""
        *batch, n, k = kernel.weight.shape
        rest = tuple(batch[len(self.lead) :])
        if self.parts > 1 and rest[:1] != (self.parts,):
            groups = range(0, len(tensors), self.parts)
            tensors = [concatenate(tensors[i : i + self.parts]) for i in groups]
        elif self.parts > 1:
            rest = rest[1:]
        for tensor in tensors:
            if tensor.shape != (*rest, n, k):
                raise ValueError(
                    f"{self.name} needs NVFP4 tensors of shape {(*rest, n, k)} for its weight of "
                    f"shape {kernel.weight.shape}; {self.wanted[0]} and the like have "
                    f"{tensor.shape}"
                )
        if len(tensors) == 1:
            (tensor,) = tensors
            data, block_scale, scale = tensor.data, tensor.block_scale, tensor.global_scale
            parts = tensor.parts
        else:
            data, block_scale, scale = (
                jnp.stack([getattr(tensor, name) for tensor in tensors])
                for name in ("data", "block_scale", "global_scale")
            )
            parts = tensors[0].parts
        lead = tuple(batch[: len(batch) - len(rest)])
        data, block_scale, scale = (
            part.reshape(*lead, *part.shape[part.ndim - kept :])
            for part, kept in (
                (data, len(rest) + 2),
                (block_scale, len(rest) + 2),
                (scale, tensors[0].global_scale.ndim),
            )
        )
        return Nvfp4Tensor(data, block_scale, scale, k=k, parts=parts, dtype=kernel.dtype)

    def _dense(self, tensors: list[jax.Array]) -> jax.Array:
        """A dense leaf, of its parts."""
        shape = tuple(_dense_of(self.leaf).shape)
        rest = shape[len(self.lead) :]
        if self.parts > 1 and rest[:1] == (self.parts,):
            rest = rest[1:]
        elif self.parts > 1:
            groups = range(0, len(tensors), self.parts)
            tensors = [jnp.concatenate(tensors[i : i + self.parts]) for i in groups]
        fitted = [self._fitted(tensor, rest) for tensor in tensors]
        return (fitted[0] if len(fitted) == 1 else jnp.stack(fitted)).reshape(shape)

    def _fitted(self, tensor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """A tensor in the shape of a dense leaf: as it is, or its transpose, but never a guess."""
        candidates, whole = [], _dense_of(self.leaf).shape
        if _splits(tensor.shape, shape):
            candidates.append(tensor)
        if tensor.ndim == 2 and self.permutation is None and _splits(tensor.shape[::-1], shape):
            candidates.append(tensor.T)
        if not candidates:
            raise ValueError(
                f"{self.wanted[0]} of shape {tensor.shape} does not fit {self.name}, "
                f"of shape {whole}"
            )
        if len(candidates) > 1:
            raise ValueError(
                f"{self.wanted[0]} of shape {tensor.shape} fits {self.name} of shape {whole} "
                f"as it is and transposed; say which in names: "
                f"({self.wanted[0]!r}, (0, 1)) or ({self.wanted[0]!r}, (1, 0))"
            )
        return candidates[0].reshape(shape)


@functools.partial(jax.jit, static_argnums=1)
def _quantized(tensor: jax.Array, search: Search | None) -> Nvfp4Tensor:
    """A tensor (..., N, K) in NVFP4, each matrix by itself."""
    one: Callable[[jax.Array], Nvfp4Tensor] = functools.partial(quantize, search=search)
    for _ in range(tensor.ndim - 2):
        one = jax.vmap(one)
    return one(tensor)


def _input_scale(name: str) -> str:
    """The name of the scale of a weight's inputs."""
    return name.removesuffix(_WEIGHT) + _INPUT_SCALE


def _splits(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Whether a reshape to `into` only cuts or joins axes that lie together, one order of them."""
    if len(shape) == 2 and len(into) >= 2:
        return any(
            math.prod(into[:i]) == shape[0] and math.prod(into[i:]) == shape[1]
            for i in range(len(into) + 1)
        )
    return math.prod(shape) == math.prod(into) and (len(shape) == 1 or tuple(shape) == tuple(into))


def _placed(value: Any, like: Any) -> Any:
    """A value where the arrays that it is like are, or are to be."""

    def put(value: jax.Array, like: Any) -> jax.Array:
        sharding = getattr(like, "sharding", None)
        return value if sharding is None else jax.device_put(value, sharding)

    parts, of_like = jax.tree.leaves(value), jax.tree.leaves(like)
    fitting = [p if p.shape != q.shape else put(p, q) for p, q in zip(parts, of_like, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(value), fitting)
