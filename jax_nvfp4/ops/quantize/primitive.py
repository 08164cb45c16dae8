# SPDX-License-Identifier: Apache-2.0
"""The quantize primitive: rows of 16-element blocks, with a global scale from a `Scaling`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.quantize import scale, sharding
from jax_nvfp4.ops.quantize.cuda import cuda
from jax_nvfp4.ops.quantize.reference import reference
from jax_nvfp4.ops.sharding import partition


def quantize(
    x: jax.Array, scale_or_amax: jax.Array | None = None, *, scaling: Scaling
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the rows of an array.

    Args:
        x: (..., K), f32, bf16 or f16. Its axes stay apart, for each may be divided over devices.
        scale_or_amax: float32 () or (...), the global scale (STATIC) or the amax (AMAX).
        scaling: TENSOR, TOKEN, STATIC or AMAX.

    Returns:
        data uint8 (..., ceil(K/16)*8), block_scale float8_e4m3fn (..., ceil(K/16)), and
        global_scale float32, () or (...).
    """
    operands = (x,) if scale_or_amax is None else (x, scale_or_amax)
    data, block_scale, global_scale = primitive.bind(quantize_p, *operands, scaling=scaling)
    # In `shard_map` a given scale does not vary over the mesh axes that x does: as it was given.
    if scale_or_amax is not None and scaling.scale_given and primitive.varies(x):
        global_scale = scale_or_amax
    return data, block_scale, global_scale


def _abstract(x: Any, scale_or_amax: Any | None = None, *, scaling: Scaling) -> list[Any]:
    *rows, k = x.shape
    blocks = ceil_div(k, numerics.BLOCK)
    if scale_or_amax is not None:
        scale_shape = scale_or_amax.shape
    else:
        scale_shape = rows if scaling == Scaling.TOKEN else ()
    return [
        primitive.out_aval((*rows, blocks * 8), jnp.uint8, x),
        primitive.out_aval((*rows, blocks), jnp.float8_e4m3fn, x),
        primitive.out_aval(scale_shape, jnp.float32, x),
    ]


def _batch(
    operands: tuple[Any, ...], dims: tuple[int | None, ...], *, scaling: Scaling
) -> tuple[Any, Any]:
    (x, scale_or_amax), (x_dim, dim) = (*operands, None)[:2], (*dims, None)[:2]
    x, of_rows, row_scaling = scale.with_batch((x, scale_or_amax), (x_dim, dim), scaling)
    data, block_scale, row_scale = quantize(x, of_rows, scaling=row_scaling)
    if scaling == Scaling.STATIC:
        global_scale = scale_or_amax
    elif scaling == Scaling.AMAX:
        global_scale = numerics.dynamic_scales(scale_or_amax)[1]
    elif scaling == Scaling.TOKEN:
        global_scale, dim = row_scale, 0
    else:
        global_scale, dim = numerics.dynamic_scales(scale.amax_of_each(x))[1], 0
    return [data, block_scale, global_scale], [0, 0, dim]


def _jvp(
    primals: tuple[Any, ...], tangents: tuple[Any, ...], *, scaling: Scaling
) -> tuple[Any, Any]:
    del tangents  # piecewise constant
    results = quantize_p.bind(*primals, scaling=scaling)
    return results, [primitive.zero_tangent(r) for r in results]


quantize_p = primitive.define(
    "nvfp4_quantize",
    abstract=_abstract,
    reference=reference,
    batch=_batch,
    cuda=cuda,
    partitioning=partition.Partitioning(sharding.factors, sharding.part),
)
ad.primitive_jvps[quantize_p] = _jvp
