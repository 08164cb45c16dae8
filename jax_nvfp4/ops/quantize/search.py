# SPDX-License-Identifier: Apache-2.0
"""Quantization with a search of the block scales: jax.numpy on every device.

A weight is quantized once, at load, so that this has no kernel of its own; the compiler fuses the
trial of a candidate into one pass, also outside of a jit.
"""

import functools

import jax
from jax import lax

from jax_nvfp4 import search as definition
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops.quantize.reference import scales


@functools.partial(jax.jit, static_argnames=("scaling", "search"))
def quantize(
    x: jax.Array,
    static_scale: jax.Array | None,
    importance: jax.Array | None,
    *,
    scaling: Scaling,
    search: definition.Search,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes the rows of an array, each block with the candidate of the least error.

    Args:
        x: (..., K), f32, bf16 or f16.
        static_scale: float32 () or (...), the global scale of a static scaling.
        importance: float32 (K,), how much the squared error of each column counts; None: alike.
        scaling: the source of the global scale.
        search: which candidates.

    Returns:
        data, block_scale and global_scale, as of `primitive.quantize`.
    """
    # Piecewise constant.
    x, static_scale, importance = lax.stop_gradient((x, static_scale, importance))
    encode, decode, reported = scales(x, static_scale, scaling=scaling, search=search)
    return *definition.quantize(x, encode, decode, search, importance), reported
