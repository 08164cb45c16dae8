# SPDX-License-Identifier: Apache-2.0
"""Flax kernels to NVFP4 weights, their partitioning metadata kept.

Flax keeps a Dense kernel as (in, out), blocks run along K, so the NVFP4 weight is its transpose,
(N, K) = (out, in), and the axis names of its metadata are swapped with it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import serialization
from flax.core import meta

from jax_nvfp4.ops.quantize import api
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Path = tuple[str, ...]


def is_kernel(path: Path, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a Dense layer: named "kernel", with two axes."""
    return path[-1] == "kernel" and jnp.ndim(leaf) == 2


def quantize_kernel(kernel: jax.Array) -> Nvfp4Tensor:
    """Quantizes a kernel (..., in, out), each matrix with a global scale of its own.

    Args:
        kernel: bfloat16, float16 or float32; axes before the last two are stacked layers.

    Returns:
        An Nvfp4Tensor (..., out, in).
    """

    def quantize(matrix: jax.Array) -> Nvfp4Tensor:
        return api.quantize(matrix.T)

    for _ in range(jnp.ndim(kernel) - 2):
        quantize = jax.vmap(quantize)
    return quantize(kernel)


def box_like(box: meta.AxisMetadata[Any], weight: Nvfp4Tensor) -> Nvfp4Tensor:
    """Puts each part of a weight into a box with the axis names of its kernel's box.

    Args:
        box: the kernel's `flax.linen.Partitioned`, or a subclass.
        weight: what the kernel in the box became.

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
    *stacked, k_name, n_name = box.names
    names = {"data": (*stacked, n_name, k_name), "global_scale": tuple(stacked)}
    names["block_scale"] = names["data"]

    def put(path: Any, leaf: Any) -> Any:
        return box.replace(value=leaf, names=names[path[-1].name])

    return jax.tree_util.tree_map_with_path(put, weight)


def _key_name(key: Any) -> Any:
    """The key of a dict, the name of an attribute or the index of an item."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return getattr(key, attribute)
    return key


def quantize_params(params: Any, where: Callable[[Path, Any], bool] = is_kernel) -> Any:
    """Turns the kernels of a Dense model's params into NVFP4 weights for `Nvfp4Dense`.

    Args:
        params: a params tree of `flax.linen` modules, boxed with partitioning metadata or not.
        where: given the path of a leaf as strings and the (unboxed) leaf, whether to quantize it.
            By default each leaf named "kernel" with two axes. A chosen leaf with more axes is a
            stack of kernels (of `nn.scan`), quantized one by one.

    Returns:
        The tree with each chosen kernel (..., in, out) replaced by an Nvfp4Tensor (..., out, in).

    Raises:
        ValueError: a chosen leaf has fewer than two axes, or no leaf was chosen.
        TypeError: a chosen leaf has a dtype that `quantize` does not take.
    """
    quantized = 0

    def is_leaf(node: Any) -> bool:
        return isinstance(node, meta.AxisMetadata | Nvfp4Tensor | RepackedWeight)

    def one(path: Any, leaf: Any) -> Any:
        nonlocal quantized
        names = tuple(str(_key_name(key)) for key in path)
        if isinstance(leaf, Nvfp4Tensor | RepackedWeight):
            return leaf
        boxed = isinstance(leaf, meta.AxisMetadata)
        kernel = leaf.value if boxed else leaf
        if not where(names, kernel):
            return leaf
        if jnp.ndim(kernel) < 2:
            raise ValueError(
                f"{'/'.join(names)} of shape {jnp.shape(kernel)} has no axes (in, out) to quantize"
            )
        quantized += 1
        weight = quantize_kernel(kernel)
        return box_like(leaf, weight) if boxed else weight

    result = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)
    if not quantized:
        raise ValueError("no leaf of the params was chosen to be quantized")
    return result


def _named_parts(weight: Nvfp4Tensor | RepackedWeight) -> dict[str, Any]:
    return {key.name: part for key, part in weight.tree_flatten_with_keys()[0]}


def _to_state(weight: Nvfp4Tensor | RepackedWeight) -> Any:
    """The parts by name, for `flax.serialization`."""
    return serialization.to_state_dict(_named_parts(weight))


def _from_state(weight: Any, state: dict[str, Any]) -> Any:
    """A weight like `weight`, with the parts of a state dict."""
    parts = serialization.from_state_dict(_named_parts(weight), state, "an NVFP4 weight")
    return jax.tree.unflatten(
        jax.tree.structure(weight, is_leaf=lambda node: node is not weight), list(parts.values())
    )


for _weight_type in (Nvfp4Tensor, RepackedWeight, Nvfp4Kernel):
    serialization.register_serialization_state(_weight_type, _to_state, _from_state)
