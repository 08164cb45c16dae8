# SPDX-License-Identifier: Apache-2.0
"""The public `quantize` and `global_scale`: check what the user gave, once, and run it."""

import functools

import jax
from jax.typing import ArrayLike

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.checks import DynamicScaling
from jax_nvfp4.ops.quantize import primitive
from jax_nvfp4.ops.quantize.sharding import placement
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.tensor import Nvfp4Tensor


def quantize(
    x: ArrayLike,
    *,
    scaling: DynamicScaling = "tensor",
    global_scale: ArrayLike | None = None,
) -> Nvfp4Tensor:
    """Quantizes to NVFP4, in blocks of 16 along the last axis.

    The formula is that of `jax_nvfp4.numerics`, bit for bit on every backend. The result is
    piecewise constant in `x`: its derivative is zero.

    Args:
        x: (..., K) of any length K; bfloat16, float16 or float32.
        scaling: "tensor" for one global scale, "token" for one per row. Stacked matrices, to be
            scanned over, have one each: `jax.vmap(quantize)(x)`.
        global_scale: float32, a scalar or one per row (`x.shape[:-1]`), to use in place of a
            computed one; it multiplies on dequantization, and may be traced. A value that is not in
            [2**-110, 2**110] makes the result NaN.

    Returns:
        An Nvfp4Tensor of the shape of x. Blocks that hold a NaN or an Inf have the scale NaN.

    Raises:
        TypeError: x or global_scale has a dtype that is not taken.
        ValueError: x is a scalar, scaling has an unknown value, or the shape of global_scale is
            neither () nor that of the rows.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    how = checks.dynamic_scaling("scaling", scaling)
    rows, k = x.shape[:-1], x.shape[-1]
    static_scale = None
    if global_scale is not None:
        how, static_scale = Scaling.STATIC, checks.as_scale("global_scale", global_scale)
        if static_scale.shape not in ((), rows):
            raise ValueError(
                f"global_scale must be a scalar or have the rows of x, {rows}; "
                f"got shape {static_scale.shape}"
            )

    parts = typed.call(
        functools.partial(primitive.quantize, scaling=how),
        (x, static_scale),
        lambda: placement(x, static_scale, how == Scaling.TOKEN),
    )
    return Nvfp4Tensor(*parts, k=k, dtype=x.dtype)


def global_scale(x: ArrayLike, scaling: DynamicScaling = "tensor") -> jax.Array:
    """The global scale that `quantize` would use; traceable.

    Args:
        x: (..., K); bfloat16, float16 or float32.
        scaling: "tensor" or "token".

    Returns:
        float32: a scalar, or one per row `x.shape[:-1]`. It multiplies on dequantization.

    Raises:
        TypeError: x has a dtype that is not taken.
        ValueError: x is a scalar, or scaling has an unknown value.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    per_row = checks.dynamic_scaling("scaling", scaling) == Scaling.TOKEN
    largest = numerics.amax(x, axis=-1 if per_row else None)
    return numerics.dynamic_scales(largest)[1]
