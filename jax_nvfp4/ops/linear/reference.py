# SPDX-License-Identifier: Apache-2.0
"""The linear operation in pure JAX: dequantizes the weight and multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize.reference import scales


def canonical(
    weight: tuple[jax.Array, jax.Array, jax.Array], spec: LinearSpec
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The parts of the weight in canonical order."""
    data, block_scale, global_scale = weight
    if spec.arch is not None:
        data, block_scale = order(spec.arch).unpack(data, block_scale, spec.n, spec.k)
    return data, block_scale, global_scale


def _dot(x: jax.Array, w: jax.Array, values: Any) -> jax.Array:
    """x (M, K) times w (N, K) transposed in float32; `values` is a dtype that holds both."""
    contract_k = (((1,), (1,)), ((), ()))

    def wide(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(x, w, contract_k, precision=lax.Precision.HIGHEST)

    def narrow(x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            x.astype(values), w.astype(values), contract_k, preferred_element_type=jnp.float32
        )

    # A 16-bit dot has the same exact products. CPUs are faster, or only exact, with float32.
    return lax.platform_dependent(x, w, cpu=wide, default=narrow)


def reference(*flat: jax.Array, spec: LinearSpec) -> list[jax.Array]:
    """Computes `alpha * (x_q @ w_q.T) + bias` of a matrix x, in float32, rounded once."""
    operands = spec.operands(flat)
    x = operands.x
    data, block_scale, w_scale = canonical(operands.weight, spec)
    w = numerics.block_values(data, block_scale)[:, : spec.k]

    if spec.scaling == Scaling.NONE:
        values = jnp.dtype(jnp.float16 if x.dtype == jnp.float16 else jnp.bfloat16)
        x = x.astype(values).astype(jnp.float32)
        alpha = numerics.with_ndim(w_scale, 2)
    else:
        values = jnp.dtype(jnp.bfloat16)
        encode, decode, x_scale = scales(x, operands.scale_or_amax, scaling=spec.scaling)
        x = numerics.block_values(*numerics.quantize(x, encode, decode))[:, : spec.k]
        alpha = (x_scale if x_scale.ndim == 0 else x_scale[:, None]) * numerics.with_ndim(
            w_scale, 2
        )

    if spec.batch_invariant:
        # Each row by itself: the order of its reduction cannot depend on the other rows.
        acc = lax.map(lambda row: _dot(row[None], w, values)[0], x)
    else:
        acc = _dot(x, w, values)
    y = alpha * acc
    return [with_bias(y, operands.bias, spec)]


def with_bias(y: jax.Array, bias: jax.Array | None, spec: LinearSpec) -> jax.Array:
    """The float32 product plus the bias, rounded once to the dtype of the result."""
    if bias is None:
        return y.astype(spec.out_dtype)
    bias = numerics.with_ndim(bias.astype(jnp.float32), y.ndim)
    return numerics.add_rounding_once(numerics.computed_once(y), bias, spec.out_dtype)
