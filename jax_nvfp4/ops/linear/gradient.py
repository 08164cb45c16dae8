# SPDX-License-Identifier: Apache-2.0
"""The straight-through gradient of the linear operation: that of `x @ dequantize(weight).T`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad

from jax_nvfp4 import numerics
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.linear.reference import canonical
from jax_nvfp4.ops.linear.spec import LinearSpec


def straight_through(v: jax.Array, weight: tuple[Any, ...], **params: Any) -> jax.Array:
    """Binds `ste_p`: v (..., K) @ dequantize(w).T or, transposed, v (..., N) @ dequantize(w)."""
    (result,) = primitive.bind(ste_p, v, *weight, **params)
    return result


def _ste_abstract(
    v: Any, *weight: Any, transposed: bool, dtype: str, spec: LinearSpec
) -> list[Any]:
    columns = spec.k if transposed else spec.n
    return [primitive.out_aval((*v.shape[:-1], columns), dtype, v)]


def _ste_impl(
    v: jax.Array, *weight: jax.Array, transposed: bool, dtype: str, spec: LinearSpec
) -> list[jax.Array]:
    """v (..., K) @ dequantize(w).T or, transposed, v (..., N) @ dequantize(w), as `dtype`."""
    data, block_scale, w_scale = canonical((weight[0], weight[1], weight[2]), spec)
    w = numerics.dequantize(data, block_scale, w_scale if w_scale.ndim == 0 else w_scale[:, None])
    w = w[:, : spec.k]
    contract = (((v.ndim - 1,), (0 if transposed else 1,)), ((), ()))
    product = lax.dot_general(v.astype(jnp.float32), w, contract, precision=lax.Precision.HIGHEST)
    return [product.astype(dtype)]


def _ste_batch(args: tuple[Any, ...], dims: tuple[int | None, ...], **params: Any) -> Any:
    results = jax.vmap(functools.partial(_ste_impl, **params), in_axes=dims)(*args)
    return results, [0] * len(results)


def _ste_jvp(primals: Any, tangents: Any, **params: Any) -> tuple[Any, Any]:
    v, *weight = primals
    results = ste_p.bind(v, *weight, **params)
    if isinstance(tangents[0], ad.Zero):
        return results, [primitive.zero_tangent(r) for r in results]
    return results, ste_p.bind(tangents[0], *weight, **params)


def _ste_transpose(
    cotangents: Any, v: Any, *weight: Any, transposed: bool, dtype: str, spec: LinearSpec
) -> list[Any]:
    del dtype
    (ct,) = cotangents
    none_for_weight = [None] * len(weight)
    if isinstance(ct, ad.Zero):
        return [ad.Zero(v.aval), *none_for_weight]
    dv = straight_through(ct, weight, transposed=not transposed, dtype=v.aval.dtype.name, spec=spec)
    return [dv, *none_for_weight]


ste_p = primitive.define(
    "nvfp4_linear_ste", abstract=_ste_abstract, reference=_ste_impl, batch=_ste_batch
)
ad.primitive_jvps[ste_p] = _ste_jvp
ad.primitive_transposes[ste_p] = _ste_transpose
