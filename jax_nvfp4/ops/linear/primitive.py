# SPDX-License-Identifier: Apache-2.0
"""The linear primitive: quantize the rows of x as asked, multiply by an NVFP4 weight, add a bias.

One primitive holds the activation quantization and the GEMM, so that a batch axis joins the rows of
both. Its derivative is straight-through: that of `x @ dequantize(weight).T + bias`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_nvfp4 import numerics
from jax_nvfp4.activations import activate
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.linear import sharding
from jax_nvfp4.ops.linear.cuda import cuda
from jax_nvfp4.ops.linear.gradient import straight_through
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import LinearSpec, Operands, of_matrix
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.sharding import partition


def linear(operands: Operands, spec: LinearSpec) -> jax.Array:
    """Computes `y = activation(alpha * (x_q @ w_q.T) + bias)`.

    The axes of x stay apart, for each may be divided over devices.

    Returns:
        (..., *spec.columns) of `spec.out_dtype`.
    """
    (y,) = primitive.bind(linear_p, *operands.flat(), spec=spec)
    return y


def _abstract(*operands: Any, spec: LinearSpec) -> list[Any]:
    shape = (*operands[0].shape[:-1], *spec.columns)
    return [primitive.out_aval(shape, spec.out_dtype, operands[0])]


def _batch(
    flat: tuple[Any, ...], flat_dims: tuple[int | None, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    operands, dims = spec.operands(flat), spec.operands(flat_dims)
    if any(d is not None for d in (dims.data, dims.block_scale, dims.w_scale, dims.bias)):
        return primitive.batch_by_loop(linear_p, flat, flat_dims, {"spec": spec})

    if spec.scaling == Scaling.NONE:
        return [linear(operands._replace(x=primitive.to_front(operands.x, dims.x)), spec)], [0]
    x, scale_or_amax, scaling = scale.with_batch(
        (operands.x, operands.scale_or_amax), (dims.x, dims.scale_or_amax), spec.scaling
    )
    operands = operands._replace(x=x, scale_or_amax=scale_or_amax)
    return [linear(operands, dataclasses.replace(spec, scaling=scaling))], [0]


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    if spec.activation is not None:
        return _through_activation(primals, tangents, spec)
    (y,) = linear_p.bind(*primals, spec=spec)
    weight, dots = spec.operands(primals).weight, spec.operands(tangents)
    terms = []
    if not isinstance(dots.x, ad.Zero):
        y_dot = straight_through(dots.x, weight, transposed=False, dtype="float32", spec=spec)
        terms.append(y_dot.reshape(y.shape))
    if dots.bias is not None and not isinstance(dots.bias, ad.Zero):
        terms.append(numerics.with_ndim(dots.bias.astype(jnp.float32), y.ndim))
    if not terms:
        return [y], [primitive.zero_tangent(y)]
    tangent = jnp.broadcast_to(functools.reduce(jnp.add, terms), y.shape)
    return [y], [tangent.astype(y.dtype)]


def _through_activation(primals: Any, tangents: Any, spec: LinearSpec) -> tuple[Any, Any]:
    """Differentiates the activation at the float32 sums, which become a result of their own."""
    activation = spec.activation
    assert activation is not None
    product = dataclasses.replace(spec, activation=None, out_dtype="float32")
    (z,), (z_dot,) = _jvp(primals, tangents, spec=product)

    def finish(z: jax.Array) -> jax.Array:
        return activate(activation, z).astype(spec.out_dtype)

    if isinstance(z_dot, ad.Zero):
        y = finish(z)
        return [y], [primitive.zero_tangent(y)]
    y, y_dot = jax.jvp(finish, (z,), (z_dot,))
    return [y], [y_dot]


linear_p = primitive.define(
    "nvfp4_linear",
    abstract=_abstract,
    reference=of_matrix(reference),
    batch=_batch,
    cuda=of_matrix(cuda),
    partitioning=partition.Partitioning(sharding.factors, sharding.part),
)
ad.primitive_jvps[linear_p] = _jvp
