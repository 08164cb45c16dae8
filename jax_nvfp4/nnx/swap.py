# SPDX-License-Identifier: Apache-2.0
"""The swap of a model's layers for those with NVFP4 kernels."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path as File
from typing import Any

import numpy as np
from flax import nnx

from jax_nvfp4.checkpoint.files import Entry
from jax_nvfp4.checkpoint.selection import Roles
from jax_nvfp4.conversion.report import LeafReport, Report
from jax_nvfp4.nnx.experts import Nvfp4Experts
from jax_nvfp4.nnx.general import General, Nvfp4Einsum, Nvfp4LinearGeneral
from jax_nvfp4.nnx.linear import Nvfp4Linear
from jax_nvfp4.nnx.variables import arrays, variables
from jax_nvfp4.ops.repack import repack
from jax_nvfp4.products.kernel import Nvfp4Kernel

Path = tuple[Any, ...]
Layer = nnx.Linear | nnx.LinearGeneral | nnx.Einsum

# By their own types: the call of a subclass may be another.
_SWAPS: dict[type, Callable[..., Any]] = {
    nnx.Linear: Nvfp4Linear.from_linear,
    nnx.LinearGeneral: Nvfp4LinearGeneral.from_layer,
    nnx.Einsum: Nvfp4Einsum.from_layer,
}
# The layers with NVFP4 kernels, and what those are called.
_KERNELS: tuple[tuple[type, tuple[str, ...]], ...] = (
    (Nvfp4Linear, ("kernel",)),
    (General, ("kernel",)),
    (Nvfp4Experts, ("w13", "w2")),
)
_NAMES = "Linear, LinearGeneral or Einsum"


def quantize_model(
    model: nnx.Module, where: Callable[[Path, Layer], bool] | None = None, **fields: Any
) -> Report:
    """Swaps the Linear, LinearGeneral and Einsum layers of a model, in place.

    They become Nvfp4Linear, whose kernel is (features, inputs), and Nvfp4LinearGeneral and
    Nvfp4Einsum, whose kernels keep their shape. Layers are swapped one by one, so that nothing but
    the model and one layer need be in memory.

    Args:
        model: changed in place; it may be abstract (`nnx.eval_shape`). A layer that is shared stays
            shared. Subclasses of these layers, whose call may be another, stay.
        where: given a layer's path and the layer, whether to swap it. None swaps all but routers
            of mixtures of experts, as the command line knows them, and layers that cannot be
            swapped, such as those with a product of their own.
        **fields: activation_scale, batch_invariant and search of the new layers.

    Returns:
        What became of each param of the model, and why; `print` shows a table.

    Raises:
        ValueError: no layer was chosen, the model is itself such a layer, one that was chosen by
            `where` cannot be swapped, or one lies where it cannot be replaced.
    """
    if type(model) in _SWAPS:
        raise ValueError(
            f"the model is itself a {type(model).__name__}; use {_SWAPS[type(model)].__qualname__}"
        )
    nodes = dict(nnx.iter_graph(model))
    chosen = {path: node for path, node in nodes.items() if type(node) in _SWAPS}
    params = _params(nodes, chosen)
    reasons = _left_by_default(chosen) if where is None else _left(chosen, where)
    chosen = {path: node for path, node in chosen.items() if path not in reasons}
    places = _places(model, set(map(id, chosen.values())))
    for path, node in chosen.items():
        if id(node) not in places:
            raise ValueError(
                f"the layer {_name(path)} cannot be swapped: layers may be attributes of modules "
                f"or items of lists, dicts and tuples"
            )
    swapped = {}
    del nodes
    while chosen:
        path, old = chosen.popitem()
        try:
            new, swapped[path] = _swapped(old, fields)
        except ValueError as error:
            if where is not None:
                raise ValueError(f"the layer {_name(path)}: {error}") from None
            reasons[path] = str(error)
            continue
        for holder, key in places.pop(id(old)):
            _put(holder, key, old, new)
    report = _report(params, swapped, reasons)
    if not swapped:
        raise ValueError(
            f"no nnx.Linear layer (nor a LinearGeneral or Einsum) of the model was chosen to be "
            f"quantized:\n{report}"
        )
    return report


def _left(layers: Mapping[Path, Layer], where: Callable[[Path, Layer], bool]) -> dict[Path, str]:
    """The layers that the user leaves."""
    return {path: "left by where" for path, layer in layers.items() if not where(path, layer)}


def _left_by_default(layers: Mapping[Path, Layer]) -> dict[Path, str]:
    """The routers among some layers, by the definition of the command line."""
    entries = {}
    for path, layer in layers.items():
        shape = layer.kernel.shape
        if isinstance(layer, nnx.Linear | nnx.LinearGeneral):
            outputs = 1 if isinstance(layer, nnx.Linear) else len(layer.out_features)
            n = math.prod(shape[len(shape) - outputs :])
            name = f"{_name(path)}.weight"
            entries[path] = Entry(name, np.dtype(np.float32), (n, math.prod(shape) // n), File(), 0)
    roles = Roles({entry.name: entry for entry in entries.values()}, {})
    return {
        path: "a router; where= can choose it"
        for path, entry in entries.items()
        # A router gives fewer values than it takes; the gate of a gated layer may have its name.
        if roles.role(entry.name) == "a router" and entry.shape[0] < entry.shape[1]
    }


def _params(nodes: Mapping[Path, Any], layers: Mapping[Path, Layer]) -> list[LeafReport]:
    """The params of a model as they are, and what keeps them so."""
    found = []
    for path, node in nodes.items():
        if not isinstance(node, nnx.Param):
            continue
        at = next(path[:i] for i in range(len(path) - 1, -1, -1) if _is_module(nodes, path[:i]))
        if at in layers:
            why = "its kernel alone is quantized"
        else:
            why = f"{type(nodes[at]).__name__} is no {_NAMES}"
        value = node.get_value()
        nbytes = value.size * value.dtype.itemsize
        names = tuple(map(str, path))
        found.append(LeafReport(names, value.shape, value.dtype.name, nbytes, nbytes, False, why))
    return found


def _is_module(nodes: Mapping[Path, Any], path: Path) -> bool:
    return isinstance(nodes.get(path), nnx.Module)


def _report(
    params: Iterable[LeafReport],
    swapped: Mapping[Path, tuple[int, str]],
    reasons: Mapping[Path, str],
) -> Report:
    """The params once some kernels are in NVFP4: by layer, their bytes and what they are."""
    of_kernels = {(*map(str, path), "kernel"): path for path in (*swapped, *reasons)}

    def now(param: LeafReport) -> LeafReport:
        path = of_kernels.get(param.path)
        if path is None:
            return param
        if path in reasons:
            return dataclasses.replace(param, why=reasons[path])
        nbytes, why = swapped[path]
        return dataclasses.replace(param, bytes_after=nbytes, quantized=True, why=why)

    return Report(tuple(map(now, params)))


def _swapped(old: Layer, fields: Mapping[str, Any]) -> tuple[Any, tuple[int, str]]:
    """The layer in the place of another; the bytes of its kernel and what that is."""
    new = _SWAPS[type(old)](old, **fields)
    kernel = arrays(new.kernel)
    *lead, n, k = (kernel.weight if isinstance(kernel, Nvfp4Kernel) else kernel).shape
    what = f"{math.prod(lead)} matrices of {n} x {k}" if lead else f"{n} x {k}"
    return new, (kernel.nbytes, f"{type(old).__name__}, {what}")


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def repack_model(model: nnx.Module, arch: str | None = None) -> None:
    """Repacks the NVFP4 kernels of a model's layers, in place.

    Arrays stay divided as they are; the axis names of their metadata, which are those of canonical
    weights, are dropped.

    Args:
        model: changed in place; it may be abstract.
        arch: as in `jax_nvfp4.repack`.

    Raises:
        ValueError: there is no layer with an NVFP4 kernel, or the arch is unknown.
    """
    kernels = [
        (node, name)
        for _, node in nnx.iter_graph(model)
        for kind, names in _KERNELS
        if isinstance(node, kind)
        for name in names
    ]
    if not kernels:
        raise ValueError("no Nvfp4Linear layer in the model to repack; see quantize_model")
    for layer, name in kernels:
        kernel = repack(arrays(getattr(layer, name)), arch)
        if isinstance(layer, Nvfp4Experts):  # others make variables of what they are given
            kernel = nnx.data(variables(kernel, {}, placed=True))
        setattr(layer, name, kernel)


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    """The children of a node that can be replaced, by their keys."""
    if isinstance(node, list):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else ()


def _places(root: Any, wanted: set[int]) -> dict[int, list[tuple[Any, Any]]]:
    """Where nodes are children, or in tuples that are: id of the node to (holder, key)."""
    places: dict[int, list[tuple[Any, Any]]] = {}

    def look(holder: Any, key: Any, child: Any) -> None:
        if isinstance(child, tuple):
            for item in child:
                look(holder, key, item)
        elif id(child) in wanted:
            places.setdefault(id(child), []).append((holder, key))

    for _, node in nnx.iter_graph(root):
        for key, child in _items(node):
            look(node, key, child)
    return places


def _put(holder: Any, key: Any, old: Any, new: Any) -> None:
    """Replaces a node in a child of its holder."""

    def swapped(child: Any) -> Any:
        if isinstance(child, tuple):
            items = [swapped(item) for item in child]
            return type(child)(*items) if hasattr(child, "_fields") else type(child)(items)
        return new if child is old else child

    if isinstance(holder, nnx.Pytree) and not isinstance(holder, list | dict):
        setattr(holder, key, nnx.data(swapped(vars(holder)[key])))
    else:
        holder[key] = swapped(holder[key])
