# SPDX-License-Identifier: Apache-2.0
"""The swap of a model's layers for those with NVFP4 kernels."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jax_nvfp4.nnx.linear import Nvfp4Linear
from jax_nvfp4.nnx.variables import arrays, variables
from jax_nvfp4.ops.repack import repack


def _every_linear(path: tuple[Any, ...], layer: nnx.Linear) -> bool:
    return True


def quantize_model(
    model: nnx.Module,
    where: Callable[[tuple[Any, ...], nnx.Linear], bool] = _every_linear,
    **fields: Any,
) -> None:
    """Swaps the `nnx.Linear` layers of a model for Nvfp4Linear, in place.

    Args:
        model: changed in place. A layer that is shared stays shared. Subclasses of `nnx.Linear`,
            whose call may be another, stay.
        where: given a layer's path and the layer, whether to swap it; every Linear by default.
        **fields: activation_scale and batch_invariant of the new layers.

    Raises:
        ValueError: no layer was chosen, the model is itself a Linear, or a layer lies where it
            cannot be swapped.
    """
    if isinstance(model, nnx.Linear):
        raise ValueError("the model is itself a Linear; use Nvfp4Linear.from_linear")
    chosen = {
        id(node): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and type(node) is nnx.Linear and where(path, node)
    }
    if not chosen:
        raise ValueError("no nnx.Linear layer of the model was chosen to be quantized")
    _replace(model, {key: Nvfp4Linear.from_linear(node, **fields) for key, node in chosen.items()})
    for path, node in nnx.iter_graph(model):
        if id(node) in chosen:
            raise ValueError(
                f"the layer {'.'.join(map(str, path))} could not be swapped: layers may be "
                f"attributes of modules or items of lists, dicts and tuples"
            )


def repack_model(model: nnx.Module, arch: str | None = None) -> None:
    """Repacks the kernels of a model's Nvfp4Linear layers, in place.

    Arrays stay divided as they are; the axis names of their metadata, which are those of canonical
    weights, are dropped.

    Args:
        model: changed in place.
        arch: as in `jax_nvfp4.repack`.

    Raises:
        ValueError: there is no Nvfp4Linear, or the arch is unknown.
    """
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, Nvfp4Linear)]
    if not layers:
        raise ValueError("no Nvfp4Linear layer in the model to repack; see quantize_model")
    for layer in layers:
        layer.kernel = nnx.data(variables(repack(arrays(layer.kernel), arch), {}))


def _replace(root: Any, swapped: dict[int, Nvfp4Linear]) -> None:
    """Puts the new layers wherever the old ones are attributes or items, at any depth."""

    def new(child: Any) -> Any:
        if isinstance(child, tuple):
            items = [new(item) for item in child]
            if all(a is b for a, b in zip(items, child, strict=True)):
                return child
            return type(child)(*items) if hasattr(child, "_fields") else type(child)(items)
        return swapped.get(id(child), child)

    for _, node in list(nnx.iter_graph(root)):
        if isinstance(node, list):
            items: Any = enumerate(node)
        elif isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, nnx.Pytree):
            items = list(vars(node).items())
        else:
            continue
        for key, child in items:
            replacement = new(child)
            if replacement is child:
                continue
            if isinstance(node, nnx.Pytree):
                setattr(node, key, nnx.data(replacement))
            else:
                node[key] = replacement
