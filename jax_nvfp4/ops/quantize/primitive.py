# SPDX-License-Identifier: Apache-2.0
"""The quantize primitive: rows of 16-element blocks, with one of four sources of global scale."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from jax_nvfp4 import numerics
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.quantize import scale, sharding
from jax_nvfp4.ops.quantize.cuda import cuda
from jax_nvfp4.ops.quantize.reference import Mode, reference
from jax_nvfp4.ops.sharding import partition


def quantize(
    x: jax.Array, given: jax.Array | None = None, *, mode: Mode
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the rows of an array.

    Args:
        x: (..., K), f32, bf16 or f16. Its axes stay apart, for each may be divided over devices.
        given: float32 () or (...), the global scale ("static") or the amax ("amax").
        mode: the source of the global scale.

    Returns:
        data uint8 (..., ceil(K/16)*8), block_scale float8_e4m3fn (..., ceil(K/16)), and
        global_scale float32, () or (...).
    """
    operands = (x,) if given is None else (x, given)
    data, block_scale, global_scale = primitive.bind(quantize_p, *operands, mode=mode)
    return data, block_scale, global_scale


def _abstract(x: Any, *given: Any, mode: Mode) -> list[Any]:
    *rows, k = x.shape
    blocks = -(-k // numerics.BLOCK)
    scale_shape = given[0].shape if given else (rows if mode == "token" else ())
    return [
        primitive.out_aval((*rows, blocks * 8), jnp.uint8, x),
        primitive.out_aval((*rows, blocks), jnp.float8_e4m3fn, x),
        primitive.out_aval(scale_shape, jnp.float32, x),
    ]


def _batch(args: tuple[Any, ...], dims: tuple[int | None, ...], *, mode: Mode) -> tuple[Any, Any]:
    x, given, row_mode = scale.with_batch(args, dims, mode)
    data, block_scale, row_scale = quantize_p.bind(x, *given, mode=row_mode)
    if mode == "static":
        global_scale, dim = args[1], dims[1]
    elif mode == "amax":
        global_scale, dim = numerics.dynamic_scales(args[1])[1], dims[1]
    elif mode == "token":
        global_scale, dim = row_scale, 0
    else:
        global_scale, dim = numerics.dynamic_scales(scale.amax_of_each(x))[1], 0
    return [data, block_scale, global_scale], [0, 0, dim]


def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...], *, mode: Mode) -> tuple[Any, Any]:
    del tangents  # piecewise constant
    results = quantize_p.bind(*primals, mode=mode)
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
