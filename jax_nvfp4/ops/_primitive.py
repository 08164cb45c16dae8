# SPDX-License-Identifier: Apache-2.0
"""What the primitives share: registration, output types, and batching by a loop."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def define(
    name: str,
    *,
    abstract: Callable[..., Any],
    reference: Callable[..., Any],
    batch: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> Primitive:
    """Makes a primitive with several results.

    Args:
        name: of the primitive.
        abstract: avals and params to the avals of the results.
        reference: the pure-JAX implementation; lowered on every platform but those below.
        batch: the batching rule.
        cuda: the implementation to lower on NVIDIA GPUs.

    Returns:
        The primitive; eager calls run it compiled.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(reference, multiple_results=True))
    if cuda is not None:
        mlir.register_lowering(
            primitive, mlir.lower_fun(cuda, multiple_results=True), platform="cuda"
        )

    @functools.cache
    def compiled(params: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
        return jax.jit(functools.partial(primitive.bind, **dict(params)))

    primitive.def_impl(lambda *args, **params: compiled(tuple(sorted(params.items())))(*args))
    return primitive


def out_aval(shape: Sequence[int], dtype: Any, operands: Sequence[Any]) -> core.ShapedArray:
    """The type of a result: under `shard_map` it varies over whatever an operand varies over."""
    varying: frozenset[Any] = frozenset().union(*(getattr(a, "vma", ()) for a in operands))
    if varying:
        return core.ShapedArray(tuple(shape), jnp.dtype(dtype), vma=varying)
    return core.ShapedArray(tuple(shape), jnp.dtype(dtype))


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
