# SPDX-License-Identifier: Apache-2.0
"""The linear operation in pure JAX: dequantizes the weight and multiplies."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.activations import activate
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
        of = order(spec.arch)
        data, block_scale = of.unpack(data, block_scale, spec.n, spec.k, gated=spec.gated)
        if spec.gated and global_scale.ndim:
            global_scale = of.gated.deinterleave(global_scale, -1, spec.n)
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
    """Computes `activation(alpha * (x_q @ w_q.T) + bias)` of a matrix x, rounded once."""
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
        x = numerics.quantized_values(x, encode, decode)[:, : spec.k]
        alpha = (x_scale if x_scale.ndim == 0 else x_scale[:, None]) * numerics.with_ndim(
            w_scale, 2
        )

    y = alpha * accumulate(x, w, values, spec)
    return [finish(halves(y, spec), operands.bias, spec)]


def accumulate(x: jax.Array, w: jax.Array, values: Any, spec: LinearSpec) -> jax.Array:
    """The float32 sums of x (M, K) times w (N, K); `values` is a dtype that holds both."""
    if spec.batch_invariant:
        # Each row by itself: the order of its reduction cannot depend on the other rows.
        return lax.map(lambda row: _dot(row[None], w, values)[0], x)
    return _dot(x, w, values)


def halves(y: jax.Array, spec: LinearSpec) -> jax.Array:
    """Columns (M, N); those of a gated weight as (M, 2, N/2)."""
    return y.reshape(y.shape[0], 2, spec.n // 2) if spec.gated else y


def finish(y: jax.Array, bias: jax.Array | None, spec: LinearSpec) -> jax.Array:
    """What comes after the sums: the bias and the activation.

    Args:
        y: float32 (..., N), of a gated weight (..., 2, N/2): the product times its scales.
        bias: of y's last axes, or None.
        spec: the rest.

    Returns:
        (..., *spec.columns), rounded once to the dtype of the result.
    """
    if bias is not None:
        bias = numerics.with_ndim(bias.astype(jnp.float32), y.ndim)
    if spec.activation is not None:
        if bias is not None:
            y = numerics.computed_once(y) + bias
        return activate(spec.activation, y).astype(spec.out_dtype)
    if bias is None:
        return y.astype(spec.out_dtype)
    return numerics.add_rounding_once(numerics.computed_once(y), bias, spec.out_dtype)
