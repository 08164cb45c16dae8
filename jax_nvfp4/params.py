# SPDX-License-Identifier: Apache-2.0
"""Flax kernels to NVFP4 weights, their partitioning metadata kept.

Flax keeps a Dense kernel as (in, out), blocks run along K, so the NVFP4 weight is its transpose,
(N, K) = (out, in), and the axis names of its metadata are swapped with it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from flax.core import meta

from jax_nvfp4.ops.concatenate import gate_up
from jax_nvfp4.ops.quantize import api
from jax_nvfp4.products import kernel as kernels
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.search import Search
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Path = tuple[str, ...]


def is_kernel(path: Path, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a Dense layer: named "kernel", with two axes."""
    return path[-1] == "kernel" and jnp.ndim(leaf) == 2


def quantize_kernel(kernel: jax.Array, search: Search | None = None) -> Nvfp4Tensor:
    """Quantizes a kernel (..., in, out), each matrix with a global scale of its own.

    Args:
        kernel: bfloat16, float16 or float32; axes before the last two are stacked layers.
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.

    Returns:
        An Nvfp4Tensor (..., out, in).
    """

    def quantize(matrix: jax.Array) -> Nvfp4Tensor:
        return api.quantize(matrix.T, search=search)

    for _ in range(jnp.ndim(kernel) - 2):
        quantize = jax.vmap(quantize)
    return quantize(kernel)


def quantize_experts(
    gate: jax.Array | None, up: jax.Array, down: jax.Array, search: Search | None = None
) -> dict[str, Nvfp4Tensor]:
    """Quantizes the kernels of a mixture of experts, as models store them, for `expert_mlp`.

    Args:
        gate: (..., E, K, I), or None where the experts have no gate.
        up: (..., E, K, I).
        down: (..., E, I, K).
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.

    Returns:
        `w13`, gated (..., E, 2I, K) or plain (..., E, I, K), and `w2`, (..., E, K, I), each matrix
        with a global scale of its own, of the gates and of the ups too.

    Raises:
        ValueError: the shapes do not go together.
    """
    *lead, _, hidden = jnp.shape(up)
    gates = jnp.shape(up) if gate is None else jnp.shape(gate)
    if not lead or gates != jnp.shape(up) or jnp.shape(down)[:-1] != (*lead, hidden):
        raise ValueError(
            f"the kernels of experts must have the shapes (E, K, I), (E, K, I) and (E, I, K); got "
            f"gate {None if gate is None else gates}, up {jnp.shape(up)}, down {jnp.shape(down)}"
        )
    w13 = quantize_kernel(up, search)
    if gate is not None:
        w13 = gate_up(quantize_kernel(gate, search), w13)
    return {"w13": w13, "w2": quantize_kernel(down, search)}


def box_like(
    box: meta.AxisMetadata[Any], weight: Nvfp4Tensor | Nvfp4Kernel
) -> Nvfp4Tensor | Nvfp4Kernel:
    """Puts each part of a weight into a box with the axis names of its kernel's box.

    Args:
        box: the kernel's `flax.linen.Partitioned`, or a subclass.
        weight: what the kernel in the box became: an Nvfp4Tensor (..., out, in) of a kernel
            (..., in, out), or an Nvfp4Kernel.

    Returns:
        The weight with its parts boxed, so that `get_partition_spec` gives a spec for each.

    Raises:
        TypeError: another kind of metadata, without axis names.
        ValueError: it has not a name for each axis.
    """
    if not isinstance(box, meta.Partitioned):
        raise TypeError(
            f"the kernel's metadata is a {type(box).__name__}; only flax.linen.Partitioned and its "
            f"subclasses name their axes"
        )
    if len(box.names) != weight.ndim:
        raise ValueError(
            f"the kernel's metadata has the axis names {box.names}, and the kernel has "
            f"{weight.ndim} axes"
        )
    last = weight.ndim - 1
    axes: Any = (tuple(range(last - 1)), (last,), (last - 1,))
    if isinstance(weight, Nvfp4Kernel):
        axes = (weight.batch, weight.free, weight.contracting)
    stacked, rows, columns = (tuple(box.names[a] for a in places) for places in axes)
    of_data = (*stacked, one_name(rows), one_name(columns))
    parts = weight.weight if isinstance(weight, Nvfp4Kernel) else weight

    def put(path: Any, leaf: Any) -> Any:
        names = of_data[: leaf.ndim] if path[-1].name == "global_scale" else of_data
        return box.replace(value=leaf, names=names)

    boxed = jax.tree_util.tree_map_with_path(put, parts)
    return Nvfp4Kernel(boxed, weight.axes) if isinstance(weight, Nvfp4Kernel) else boxed


def one_name(names: tuple[Any, ...]) -> Any:
    """The name of an axis that several became."""
    given = [name for name in names if name is not None]
    if len(given) < 2:
        return given[0] if given else None
    return tuple(part for name in given for part in (name if isinstance(name, tuple) else (name,)))


def _key_name(key: Any) -> Any:
    """The key of a dict, the name of an attribute or the index of an item."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def quantize_params(
    params: Any,
    where: Callable[[Path, Any], Any] = is_kernel,
    *,
    search: Search | None = None,
) -> Any:
    """Turns kernels of a model's params into NVFP4 weights.

    For `Nvfp4Dense` in place of `flax.linen.Dense`, or for the model as it is, within
    `jax_nvfp4.linen.intercept`.

    Args:
        params: a params tree, boxed with partitioning metadata or not; abstract leaves
            (`jax.eval_shape`) become abstract weights.
        where: given the path of a leaf as strings and the (unboxed) leaf, what to do with it. By
            default each leaf named "kernel" with two axes is a Dense kernel.

            False: it stays.
            True: it is the kernel (in, out) of a Dense layer.
            A tuple of axes: products contract these, as (0, 1) of (heads, dim, out).
            Two tuples, (contracted, batch): the latter are axes of stacked kernels, as ((1,), (0,))
            of the kernels (layers, in, out) of `nn.scan`.
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.

    Returns:
        The tree with each Dense kernel (in, out) replaced by an Nvfp4Tensor (out, in), and each
        leaf whose axes were named by an Nvfp4Kernel of its own shape.

    Raises:
        ValueError: a leaf that was called a Dense kernel has not two axes, axes that were named do
            not exist, or no leaf was chosen.
        TypeError: a chosen leaf has a dtype that `quantize` does not take, or `where` returned
            something else.
    """
    quantized = 0

    def is_leaf(node: Any) -> bool:
        return isinstance(node, meta.AxisMetadata | Nvfp4Tensor | RepackedWeight | Nvfp4Kernel)

    def one(path: Any, leaf: Any) -> Any:
        nonlocal quantized
        names = tuple(str(_key_name(key)) for key in path)
        if isinstance(leaf, Nvfp4Tensor | RepackedWeight | Nvfp4Kernel):
            return leaf
        boxed = isinstance(leaf, meta.AxisMetadata)
        kernel = leaf.value if boxed else leaf
        weight = _as_chosen("/".join(names), kernel, where(names, kernel), search)
        if weight is None:
            return leaf
        quantized += 1
        return box_like(leaf, weight) if boxed else weight

    result = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)
    if not quantized:
        raise ValueError("no leaf of the params was chosen to be quantized")
    return result


def _as_chosen(
    name: str, kernel: Any, choice: Any, search: Search | None
) -> Nvfp4Tensor | Nvfp4Kernel | None:
    """A leaf as `where` of `quantize_params` wants it; None: it stays."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda kernel: _as_chosen(name, kernel, choice, search), kernel)
    if isinstance(choice, bool | np.bool_):
        if not choice:
            return None
        if jnp.ndim(kernel) != 2:
            raise ValueError(
                f"{name} of shape {jnp.shape(kernel)} is no Dense kernel with the axes (in, out): "
                f"where must return the axes to contract, or (contracted, batch)"
            )
        return quantize_kernel(kernel, search)
    pair = isinstance(choice, tuple) and [isinstance(axes, tuple) for axes in choice] == [True] * 2
    contracted, batch = choice if pair else (choice, ())
    if not all(
        isinstance(axes, tuple) and all(type(axis) is int for axis in axes)
        for axes in (contracted, batch)
    ):
        raise TypeError(
            f"where must return False, True, a tuple of contracted axes, or two tuples "
            f"(contracted, batch); got {choice!r} for {name}"
        )
    try:
        return kernels.quantize_kernel(kernel, contracted, batch, search=search)
    except ValueError as error:
        raise ValueError(f"{name} of shape {jnp.shape(kernel)}: {error}") from None


def _named_parts(weight: Nvfp4Tensor | RepackedWeight) -> dict[str, Any]:
    return {key.name: part for key, part in weight.tree_flatten_with_keys()[0]}


def _to_state(weight: Nvfp4Tensor | RepackedWeight) -> Any:
    """The parts by name, for `flax.serialization`."""
    return serialization.to_state_dict(_named_parts(weight))


def _from_state(weight: Any, state: dict[str, Any]) -> Any:
    """A weight like `weight`, with the parts of a state dict."""
    parts = serialization.from_state_dict(_named_parts(weight), state, "an NVFP4 weight")
    restored = jax.tree.unflatten(
        jax.tree.structure(weight, is_leaf=lambda node: node is not weight), list(parts.values())
    )
    if not any(isinstance(part, meta.AxisMetadata) for part in parts.values()):
        restored.check()
    return restored


for _weight_type in (Nvfp4Tensor, RepackedWeight, Nvfp4Kernel):
    serialization.register_serialization_state(_weight_type, _to_state, _from_state)
