# SPDX-License-Identifier: Apache-2.0
"""Registration, output types and batching by a loop: the primitives share them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from jax_nvfp4.ops.sharding.partition import (
    Partitioning,
    context_to_partition,
    outside_meshes,
    partitioned,
)


def define(
    name: str,
    *,
    abstract: Callable[..., Any],
    reference: Callable[..., Any],
    batch: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
    partitioning: Partitioning | None = None,
) -> Primitive:
    """Makes a primitive with several results.

    Args:
        name: of the primitive.
        abstract: avals and params to the avals of the results.
        reference: the pure-JAX implementation; lowered on every platform but those below.
        batch: the batching rule.
        cuda: the implementation to lower on NVIDIA GPUs.
        partitioning: how to divide it over devices; None: as XLA does with the implementation.

    Returns:
        The primitive; eager calls run it compiled.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, _lowering(primitive, reference, partitioning))
    if cuda is not None:
        mlir.register_lowering(primitive, _lowering(primitive, cuda, partitioning), platform="cuda")

    @functools.cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    def run(*args: Any, **params: Any) -> Any:
        # Below a primitive it has no meaning to disable jit, or to search for the operation that
        # made a NaN: both would come back here.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            results = compiled(tuple(sorted(params.items())))(*args)
        _raise_if_special(name, results)
        return results

    primitive.def_impl(run)
    return primitive


def _raise_if_special(name: str, results: Sequence[jax.Array]) -> None:
    """Raises for what `jax_debug_nans` and `jax_debug_infs` look for, as JAX does."""
    for kind, is_special in (("nan", jnp.isnan), ("inf", jnp.isinf)):
        if getattr(jax.config, f"jax_debug_{kind}s") and any(
            jnp.issubdtype(r.dtype, jnp.inexact) and bool(is_special(r).any()) for r in results
        ):
            raise FloatingPointError(f"invalid value ({kind}) encountered in {name}")


def _lowering(
    primitive: Primitive, function: Callable[..., Any], partitioning: Partitioning | None
) -> Callable[..., Any]:
    """The lowering of a primitive to an implementation, divided over the devices if asked."""
    whole = mlir.lower_fun(function, multiple_results=True)
    one_device = mlir.lower_fun(outside_meshes(function), multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        axis_context = context.module_context.axis_context
        if isinstance(axis_context, mlir.ShardingContext) and axis_context.num_devices == 1:
            return one_device(context, *operands, **params)
        if partitioning is None:
            return whole(context, *operands, **params)
        dividing = context_to_partition(context)
        if dividing is None:
            return whole(context, *operands, **params)
        devices = dividing.module_context.axis_context.device_assignment

        def divided(*operands: Any) -> Any:
            return partitioned(primitive.bind, partitioning, devices, operands, params)

        return mlir.lower_fun(divided, multiple_results=True)(dividing, *operands)

    return lower


def _varying(operand: Any) -> frozenset[Any]:
    """The manual mesh axes of `shard_map` that an operand varies over."""
    return operand.mat.varying


def varies(array: jax.Array) -> bool:
    """Whether an array varies over manual mesh axes of `shard_map`."""
    return bool(_varying(jax.typeof(array)))


def bind(primitive: Primitive, *operands: Any, **params: Any) -> list[jax.Array]:
    """Binds a primitive with all operands varying over the same manual axes of `shard_map`."""
    axes = [_varying(jax.typeof(x)) for x in operands]
    everywhere = frozenset().union(*axes)
    if everywhere:
        operands = tuple(
            lax.pcast(x, tuple(everywhere - own), to="varying") if everywhere - own else x
            for x, own in zip(operands, axes, strict=True)
        )
    return primitive.bind(*operands, **params)


def varying_as(value: jax.Array, like: jax.Array) -> jax.Array:
    """A value that varies over the manual axes of `shard_map` that another varies over."""
    axes = _varying(jax.typeof(like)) - _varying(jax.typeof(value))
    return lax.pcast(value, tuple(axes), to="varying") if axes else value


def out_aval(shape: Sequence[int], dtype: Any, like: Any) -> core.ShapedArray:
    """The type of a result that varies over the manual axes that the operand `like` varies over."""
    if not _varying(like):
        return core.ShapedArray(tuple(shape), jnp.dtype(dtype))
    return like.update(
        shape=tuple(shape),
        dtype=jnp.dtype(dtype),
        weak_type=False,
        sharding=NamedSharding(like.sharding.mesh, PartitionSpec(*[None] * len(shape))),
    )


def zero_tangent(value: jax.Array) -> ad.Zero:
    """The zero tangent of a result (of dtype float0 for integers)."""
    return ad.Zero(jax.typeof(value).to_tangent_aval())


def batch_size(args: Sequence[Any], dims: Sequence[int | None]) -> int:
    """The length of the batch axis that the mapped operands share."""
    return next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)


def to_front(array: jax.Array, dim: int | None) -> jax.Array:
    """Moves the batch axis first; an operand that is not mapped stays as it is."""
    return array if dim is None else jnp.moveaxis(array, dim, 0)


def batch_by_loop(
    primitive: Primitive, args: Sequence[Any], dims: Sequence[int | None], params: dict[str, Any]
) -> tuple[Any, Any]:
    """Batches by running the primitive once per element of the batch axis, one after another."""
    mapped = [to_front(a, d) for a, d in zip(args, dims, strict=True) if d is not None]

    def one(slices: list[jax.Array]) -> Any:
        remaining = iter(slices)
        operands = [a if d is None else next(remaining) for a, d in zip(args, dims, strict=True)]
        return primitive.bind(*operands, **params)

    results = jax.lax.map(one, mapped)
    return results, [0] * len(results)
