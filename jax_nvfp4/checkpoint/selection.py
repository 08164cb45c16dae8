# SPDX-License-Identifier: Apache-2.0
"""Which tensors of an unquantized checkpoint to quantize, and why others are left alone."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax_nvfp4.checkpoint import descriptions
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder
from jax_nvfp4.checkpoint.formats import split_name
from jax_nvfp4.numerics import BLOCK
from jax_nvfp4.tensor import FLOATS

DEFAULT_SKIP = ("*embed*", "*wte.*", "*wpe.*", "*norm*", "*lm_head*", "*router*")
"""Embeddings, norms, output heads and routers by the names that say so; `Roles` tells the rest."""

# Their linear layers hold (K, N) under the name `weight`, where all others hold (N, K).
_TRANSPOSED_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_TRANSPOSED_ARCHITECTURES = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer", "Clvp")

_EMBEDDING = re.compile(r"(^|_)emb(d|s|ds)?(_|$)|^wte$|^wpe$|embed|relative_(attention|position)_b")
_HEAD = re.compile(
    r"^head$|^(lm|mlm|codec|medusa|out|output|pred|prediction|value|v|reward|classification|qa|text"
    r"|audio|speech|shared|score)_heads?$|^(unembed|classifier|pre_classifier|qa_outputs|lm_proj)$"
)
# Names that projections have too: those inside of the numbered layers are taken for projections.
_HEAD_OUTSIDE = re.compile(
    r"^(output|output_layer|heads?|score|cls|logits|to_logits|proj_out|ff_out|predictions"
    r"|seq_relationship|generator)$|_heads?$"
)
_NORM = re.compile(r"norm|(^|_)ln(_|\d|$)")
_ROUTER = re.compile(r"router|routing|^gating|^moe_gate$|expert_gate$|^gate_network$|^wg$")
_VOCABULARY = re.compile(r"tok(?!en_type)|word|vocab|wte$|^shared$")


class Patterns:
    """Globs, or regular expressions after `re:`, of tensors or of modules that hold them.

    A pattern matches a tensor where it matches its name, that of its module, or that of a module
    further up; a regular expression from the start of the name. Case does not count.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Compiles the patterns.

        Raises:
            CheckpointError: one is not a valid regular expression.
        """
        self._compiled = {pattern: _compile(pattern) for pattern in patterns}
        self._unmatched = dict.fromkeys(patterns)

    def match(self, name: str) -> str | None:
        """The first pattern that matches a tensor."""
        paths = list(_paths(name))
        found = None
        for pattern, compiled in self._compiled.items():
            if any(compiled.match(path) or pattern == path for path in paths):
                self._unmatched.pop(pattern, None)
                found = found or pattern
        return found

    @property
    def unmatched(self) -> list[str]:
        """The patterns that have matched no tensor so far."""
        return list(self._unmatched)


def _compile(pattern: str) -> re.Pattern[str]:
    source = pattern[3:] if pattern.startswith("re:") else fnmatch.translate(pattern)
    try:
        return re.compile(source, re.IGNORECASE)
    except re.error as error:
        raise CheckpointError(
            f"pattern {pattern!r} is not a regular expression: {error}"
        ) from error


def _paths(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


class Roles:
    """What tensors are for, by their names, the model's configuration and each other."""

    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
        self._entries = entries
        self._vocabularies = set(_numbers(config, "vocab_size"))
        self._lookups: set[int] = set()  # rows of embeddings that are so by their names
        self._experts: dict[str, int] = {}
        for name, entry in entries.items():
            layer, suffix = split_name(name)
            parts = name.split(".")
            matrix = suffix == "weight" and len(entry.shape) == 2
            if matrix and not _is_inside(parts) and _VOCABULARY.search(layer.lower()):
                self._lookups.add(entry.shape[0])
            for i, part in enumerate(parts[:-1]):
                if part.endswith("experts") and "shared" not in part:
                    index = parts[i + 1]
                    count = int(index) + 1 if index.isdigit() else (*entry.shape, 0)[0]
                    parent = ".".join(parts[:i])
                    self._experts[parent] = max(self._experts.get(parent, 0), count)

    def role(self, name: str) -> str | None:
        """What a matrix is for, if it is one that quantization harms.

        Args:
            name: of a tensor `X.weight` with two axes.

        Returns:
            "an embedding", "an output head", "a router", "a norm" or None.
        """
        layer = split_name(name)[0]
        parts = [part.lower() for part in layer.split(".")]
        outside = not _is_inside(parts)
        if any(_EMBEDDING.search(part) for part in parts) or (outside and parts[-1] == "shared"):
            return "an embedding"
        if self._is_router(name, parts):
            return "a router"
        if any(_HEAD.search(part) for part in parts):
            return "an output head"
        if outside and any(_HEAD_OUTSIDE.search(part) for part in parts):
            return "an output head"
        if any(_NORM.search(part) for part in parts):
            return "a norm"
        rows = self._entries[name].shape[0]
        # Vocabularies are often padded to a multiple of some power of two.
        padded = any(size <= rows < size + min(size, 256) for size in self._vocabularies)
        if outside and (padded or rows in self._lookups):
            return "an embedding or an output head"
        return None

    def _is_router(self, name: str, parts: list[str]) -> bool:
        if any(_ROUTER.search(part) for part in parts):
            return True
        shape = self._entries[name].shape
        parent, _, own = split_name(name)[0].rpartition(".")
        if self._experts.get(parent) == shape[0] and own != "experts":
            return True
        if parts[-1] == "gate":
            # A gated layer may call its projections gate, up and down.
            up = self._entries.get(f"{parent}.up.weight" if parent else "up.weight")
            return up is None or up.shape != shape
        return len(parts) > 1 and parts[-2] == "gate"


def _is_inside(parts: Sequence[str]) -> bool:
    """Whether a name is that of something inside of numbered layers."""
    return any(part.isdigit() for part in parts)


def _numbers(config: Mapping[str, Any], suffix: str) -> Iterator[int]:
    """The numbers under names that end so, at any depth."""
    for name, value in descriptions.fields(config):
        if name.endswith(suffix) and "type" not in name and isinstance(value, int) and value > 1:
            yield value


def why_left_alone(entry: Entry, entries: Mapping[str, Entry]) -> str | None:
    """Why a tensor is not a matrix that can be quantized, or None where it is one."""
    if split_name(entry.name)[1] != "weight":
        return "not a weight"
    if entry.dtype not in FLOATS:
        return f"dtype {entry.dtype.name}"
    if len(entry.shape) != 2:
        return f"{len(entry.shape)}-D"
    if 0 in entry.shape:
        return "empty"
    if entry.shape[1] % BLOCK:
        return f"K = {entry.shape[1]} is not a multiple of {BLOCK}"
    if any(f"{entry.name}{suffix}" in entries for suffix in ("_scale", "_scale_2", "_scale_inv")):
        return "has a scale already"
    return None


class ExpertStacks:
    """Experts in one parameter of three axes: which of the axes is contracted.

    Models store them as (G, N, K) or as (G, K, N). The size of the model tells which: the layer
    that enters the experts contracts it, the one that leaves them yields it.
    """

    def __init__(self, entries: Mapping[str, Entry], config: Mapping[str, Any]) -> None:
        self._entries = entries
        sizes = (set(_numbers(config, name)) for name in ("hidden_size", "d_model", "n_embd"))
        self._sizes = set().union(*sizes)
        self._by_parent: dict[str, bool] = {}
        for name, entry in entries.items():
            if self.has(entry) and (transposed := self._by_size(entry)) is not None:
                self._by_parent[_parent(name)] = transposed

    def has(self, entry: Entry) -> bool:
        """Whether a tensor is such a parameter."""
        layer = entry.name.removesuffix(".weight")
        parts = layer.split(".")
        inside = any(part.endswith(("experts", "moe")) for part in parts[:-1])
        side = _ENTERS.search(parts[-1]) or _LEAVES.search(parts[-1])
        return len(entry.shape) == 3 and entry.dtype in FLOATS and inside and bool(side)

    def is_transposed(self, entry: Entry) -> bool | None:
        """Whether it is stored (G, K, N); None where that cannot be told."""
        found = self._by_size(entry)
        return self._by_parent.get(_parent(entry.name)) if found is None else found

    def _by_size(self, entry: Entry) -> bool | None:
        _, first, second = entry.shape
        enters = _ENTERS.search(_own(entry.name)) is not None
        size, other = (second, first) if enters else (first, second)
        if (size in self._sizes) == (other in self._sizes):
            return None
        return other in self._sizes

    def why_left_alone(self, entry: Entry) -> str | None:
        """Why such a parameter cannot be quantized, or None where it can."""
        if 0 in entry.shape:
            return "empty"
        transposed = self.is_transposed(entry)
        if transposed is None:
            return "experts of which the sizes do not tell the contracted axis"
        k = entry.shape[1 if transposed else 2]
        if k % BLOCK:
            return f"K = {k} is not a multiple of {BLOCK}"
        layer = entry.name.removesuffix(".weight")
        if any(f"{layer}{suffix}" in self._entries for suffix in ("_scale", "_weight_scale")):
            return "has a scale already"
        return None


_ENTERS = re.compile(r"gate|up|^w1$|^w3$|^w13|^fc1|^input_linear$|^in_proj")
_LEAVES = re.compile(r"down|^w2|^fc2|^output_linear$|^out_proj")


def _parent(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[0]


def _own(name: str) -> str:
    return name.removesuffix(".weight").rpartition(".")[2]


def refuse_transposed(folder: Folder, config: Mapping[str, Any]) -> None:
    """Refuses models whose linear layers are stored (K, N), also inside of a composite model.

    Raises:
        CheckpointError: the model is one of these.
    """
    for where, model in _models(config):
        raise CheckpointError(
            f"{folder.path}: {where} is of type {model!r}; such models store their linear layers "
            "transposed, (K, N), which is not supported"
        )
    for name, entry in folder.entries.items():
        bias = folder.entries.get(f"{split_name(name)[0]}.bias")
        if split_name(name)[1] != "weight" or len(entry.shape) != 2 or bias is None:
            continue
        rows, columns = entry.shape
        if bias.shape == (columns,) and rows != columns:
            raise CheckpointError(
                f"{folder.path}: tensor {name!r} is {entry} with a bias of {columns}; layers that "
                "are stored transposed, (K, N), are not supported"
            )


def _models(config: Mapping[str, Any], where: str = "the model") -> Iterator[tuple[str, str]]:
    """The models of a configuration, at any depth, whose layers are stored transposed."""
    model = config.get("model_type")
    if model in _TRANSPOSED_MODELS:
        yield where, model
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else ():
        if isinstance(name, str) and name.startswith(_TRANSPOSED_ARCHITECTURES):
            yield where, name
    for name, value in config.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _models(inner, f"its {name!r}")
