# SPDX-License-Identifier: Apache-2.0
"""The ragged linear primitive: quantize the rows of x, multiply those of each group by its weight.

Its derivative is straight-through, as that of the linear primitive.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_nvfp4.activations import activate
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.ragged_linear import sharding
from jax_nvfp4.ops.ragged_linear.cuda import cuda
from jax_nvfp4.ops.ragged_linear.gradient import bias_rows, straight_through
from jax_nvfp4.ops.ragged_linear.reference import reference
from jax_nvfp4.ops.ragged_linear.spec import Operands, RaggedSpec
from jax_nvfp4.ops.sharding import partition


def ragged_linear(operands: Operands, spec: RaggedSpec) -> jax.Array:
    """Binds the primitive.

    Args:
        operands: as of `Operands`.
        spec: the rest.

    Returns:
        (M, *spec.each.columns) of `spec.each.out_dtype`.
    """
    (y,) = primitive.bind(ragged_linear_p, *operands.flat(), spec=spec)
    return y


def _abstract(*operands: Any, spec: RaggedSpec) -> list[Any]:
    shape = (operands[0].shape[0], *spec.each.columns)
    return [primitive.out_aval(shape, spec.each.out_dtype, operands[0])]


def _batch(operands: Any, dims: Any, *, spec: RaggedSpec) -> tuple[Any, Any]:
    """By a loop: rows of a batch that are sorted one by one are not sorted together."""
    return primitive.batch_by_loop(ragged_linear_p, operands, dims, {"spec": spec})


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, spec: RaggedSpec
) -> tuple[Any, Any]:
    if spec.each.activation is not None:
        return _through_activation(primals, tangents, spec)
    (y,) = ragged_linear_p.bind(*primals, spec=spec)
    of, dots = spec.operands(primals), spec.operands(tangents)
    terms = []
    if not isinstance(dots.x, ad.Zero):
        y_dot = straight_through(
            dots.x,
            of.weight,
            of.sizes,
            of.offset,
            transposed=False,
            dtype="float32",
            spec=spec,
        )
        terms.append(y_dot.reshape(y.shape))
    if dots.bias is not None and not isinstance(dots.bias, ad.Zero):
        of_groups = dots.bias.astype(jnp.float32).reshape(spec.groups, -1)
        m = y.shape[0]
        rows = bias_rows(of_groups, of.sizes, of.offset, groups=spec.groups, m=m)
        terms.append(rows.reshape(y.shape))
    if not terms:
        return [y], [primitive.zero_tangent(y)]
    return [y], [functools.reduce(jnp.add, terms).astype(y.dtype)]


def _through_activation(primals: Any, tangents: Any, spec: RaggedSpec) -> tuple[Any, Any]:
    """Differentiates the activation at the float32 sums. Of zero, each activation is zero."""
    activation, out_dtype = spec.each.activation, spec.each.out_dtype
    assert activation is not None
    product = dataclasses.replace(spec.each, activation=None, out_dtype="float32")
    (z,), (z_dot,) = _jvp(primals, tangents, spec=dataclasses.replace(spec, each=product))

    def finish(z: jax.Array) -> jax.Array:
        return activate(activation, z).astype(out_dtype)

    if isinstance(z_dot, ad.Zero):
        y = finish(z)
        return [y], [primitive.zero_tangent(y)]
    y, y_dot = jax.jvp(finish, (z,), (z_dot,))
    return [y], [y_dot]


ragged_linear_p = primitive.define(
    "nvfp4_ragged_linear",
    abstract=_abstract,
    reference=reference,
    batch=_batch,
    cuda=cuda,
    partitioning=partition.Partitioning(sharding.factors, sharding.part),
)
ad.primitive_jvps[ragged_linear_p] = _jvp
