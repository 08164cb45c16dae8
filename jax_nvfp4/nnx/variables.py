# SPDX-License-Identifier: Apache-2.0
"""The nnx variables of NVFP4 weights and of static activation scales."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jax_nvfp4 import params
from jax_nvfp4.products.kernel import Nvfp4Kernel, quantize_kernel
from jax_nvfp4.products.placement import shardings
from jax_nvfp4.search import Search
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


class QuantizedParam(nnx.Variable[jax.Array]):
    """A part of an NVFP4 kernel. Not an `nnx.Param`: `nnx.grad` must not differentiate codes."""


class QuantStat(nnx.Variable[jax.Array]):
    """A static activation scale, or the running amax that it follows from."""


Weight = Nvfp4Tensor | RepackedWeight

# A module holds a weight as it holds an array: as data, without `nnx.data`.
for _kind in (Nvfp4Tensor, RepackedWeight, Nvfp4Kernel):
    nnx.register_data_type(_kind)


def quantized(kernel: nnx.Variable[Any], search: Search | None = None) -> Any:
    """The weight of a kernel (..., in, out), a variable for each part.

    Parts, each with axes of its own, need variables of their own: Flax's tools for sharding know
    one specification for a variable. Axis names are those of the kernel, the last two swapped.
    """
    value = kernel.get_value()
    metadata = kernel.get_metadata()
    names = metadata.pop("out_sharding", None)
    if not isinstance(value, jax.ShapeDtypeStruct):
        weight = params.quantize_kernel(value, search)
        return variables(weight, metadata, _swapped(names, value.ndim))
    weight = jax.eval_shape(params.quantize_kernel, value)
    if isinstance(value.sharding, NamedSharding):
        place = _swapped(value.sharding, value.ndim)
        weight = jax.tree.map(lambda part: part.update(sharding=_leading(place, part)), weight)
    return variables(weight, metadata, _swapped(names, value.ndim), placed=True)


def _swapped(names: Any, ndim: int) -> Any:
    """The axis names, or the sharding, of an array whose last two axes are swapped."""
    if names is None:
        return None
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_swapped(tuple(names.spec), ndim)))
    padded = tuple(names) + (None,) * (ndim - len(names))
    return (*padded[:-2], padded[-1], padded[-2])


def _leading(names: Any, part: Any) -> Any:
    """As many of the names of the codes' axes, or of their sharding, as a part has axes."""
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_leading(tuple(names.spec), part)))
    return names[: part.ndim]


def variables(
    weight: Weight | Nvfp4Kernel,
    metadata: Mapping[str, Any],
    names: Any = None,
    *,
    placed: bool = False,
) -> Any:
    """A weight with a variable for each part.

    Args:
        weight: with arrays as parts, abstract ones too.
        metadata: of each variable, axis names aside.
        names: of the axes of the codes; the others' are the first of these.
        placed: whether the parts are where they belong, so that none is to be moved by its names.
    """

    def variable(part: Any) -> nnx.Variable[jax.Array]:
        own = dict(metadata)
        if names is not None and part.ndim:
            own["out_sharding"] = _leading(names, part)
        if not placed:
            return QuantizedParam(part, **own)
        required = nnx.Variable(0).get_metadata(exclude_required=False)
        return QuantizedParam.from_metadata(part, required | own)

    return jax.tree.map(variable, weight)


def arrays(weight: Any) -> Any:
    """The inverse of `variables`, metadata aside."""
    return jax.tree.map(
        lambda part: part.get_value() if isinstance(part, nnx.Variable) else part,
        weight,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


def quantized_kernel(
    kernel: nnx.Variable[Any],
    contracting: tuple[int, ...],
    batch: tuple[int, ...],
    search: Search | None = None,
) -> Any:
    """An Nvfp4Kernel of a kernel, concrete or abstract, with a variable for each part.

    Args:
        kernel: of any shape; its axis names are kept, those of axes that became one joined.
        contracting: as of `jax_nvfp4.quantize_kernel`.
        batch: likewise.
        search: how block scales are chosen, as of `jax_nvfp4.quantize`.
    """
    value, metadata = kernel.get_value(), kernel.get_metadata()
    names = metadata.pop("out_sharding", None)
    quantize = functools.partial(
        quantize_kernel, contracting=contracting, batch=batch, search=search
    )
    abstract = isinstance(value, jax.ShapeDtypeStruct)
    weight = jax.eval_shape(quantize, value) if abstract else quantize(value)
    if abstract and isinstance(value.sharding, NamedSharding):
        places = shardings(weight, value.sharding.mesh, value.sharding.spec)
        weight = jax.tree.map(lambda part, place: part.update(sharding=place), weight, places)
    if isinstance(names, NamedSharding):
        names = names.spec
    if names is not None:
        padded = (*names, *[None] * (value.ndim - len(names)))
        stacked, rows, columns = (
            tuple(padded[a] for a in axes)
            for axes in (weight.batch, weight.free, weight.contracting)
        )
        names = (*stacked, params.one_name(rows), params.one_name(columns))
    return variables(weight, metadata, names, placed=abstract)
