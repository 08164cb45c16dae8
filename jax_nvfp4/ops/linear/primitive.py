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

from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.linear import sharding
from jax_nvfp4.ops.linear.cuda import cuda
from jax_nvfp4.ops.linear.gradient import straight_through
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import LinearSpec, joined, of_matrix, split
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.sharding import partition


def linear(
    x: jax.Array,
    weight: tuple[jax.Array, jax.Array, jax.Array],
    bias: jax.Array | None,
    given: jax.Array | None,
    spec: LinearSpec,
) -> jax.Array:
    """`y = alpha * (x_q @ w_q.T) + bias`.

    Args:
        x: (..., K), f32, bf16 or f16. Its axes stay apart, for each may be divided over devices.
        weight: data, block_scale, global_scale (() or (N,)) in the order of `spec.arch`.
        bias: (N,) or None.
        given: the activations' global scale or amax, () or (...); None where `spec.activation`
            needs none.
        spec: the rest.

    Returns:
        (..., N) of `spec.out_dtype`.
    """
    operands = joined(x, weight, bias, () if given is None else (given,))
    (y,) = primitive.bind(linear_p, *operands, spec=spec)
    return y


def _abstract(*operands: Any, spec: LinearSpec) -> list[Any]:
    shape = (*operands[0].shape[:-1], spec.n)
    return [primitive.out_aval(shape, spec.out_dtype, operands[0])]


def _batch(
    operands: tuple[Any, ...], dims: tuple[int | None, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    _, weight_dims, bias_dim, _ = split(dims, spec)
    if any(d is not None for d in (*weight_dims, bias_dim)):
        return primitive.batch_by_loop(linear_p, operands, dims, {"spec": spec})

    x, weight, bias, given = split(operands, spec)
    x_dim, _, _, given_dims = split(dims, spec)
    mode = spec.activation
    if mode is None:
        x = primitive.to_front(x, x_dim)
    else:
        x, given, mode = scale.with_batch((x, *given), (x_dim, *given_dims), mode)
    whole = dataclasses.replace(spec, activation=mode)
    return [linear(x, weight, bias, given[0] if given else None, whole)], [0]


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, spec: LinearSpec
) -> tuple[Any, Any]:
    (y,) = linear_p.bind(*primals, spec=spec)
    _, weight, _, _ = split(primals, spec)
    x_dot, _, bias_dot, _ = split(tangents, spec)
    terms = []
    if not isinstance(x_dot, ad.Zero):
        terms.append(straight_through(x_dot, weight, transposed=False, dtype="float32", spec=spec))
    if bias_dot is not None and not isinstance(bias_dot, ad.Zero):
        terms.append(bias_dot.astype(jnp.float32))
    if not terms:
        return [y], [primitive.zero_tangent(y)]
    tangent = jnp.broadcast_to(functools.reduce(jnp.add, terms), y.shape)
    return [y], [tangent.astype(y.dtype)]


linear_p = primitive.define(
    "nvfp4_linear",
    abstract=_abstract,
    reference=of_matrix(reference),
    batch=_batch,
    cuda=of_matrix(cuda),
    partitioning=partition.Partitioning(sharding.factors, sharding.part),
)
ad.primitive_jvps[linear_p] = _jvp
