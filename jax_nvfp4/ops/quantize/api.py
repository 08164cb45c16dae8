# SPDX-License-Identifier: Apache-2.0
"""The public `quantize` and `global_scale`: check what the user gave, once, and run it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.checks import DynamicScaling
from jax_nvfp4.ops.quantize import primitive
from jax_nvfp4.ops.quantize.search import quantize as quantize_with_search
from jax_nvfp4.ops.quantize.sharding import placement
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.search import SEARCHES, Search, dynamic_scales
from jax_nvfp4.tensor import Nvfp4Tensor


def _check_search(search: Search | None, importance: ArrayLike | None, k: int) -> jax.Array | None:
    """The importance as float32, once it is known to go with the search and with K."""
    if search is not None and (not isinstance(search, str) or search not in SEARCHES):
        raise ValueError(f'search must be None, "4over6" or "sweep"; got {search!r}')
    if importance is None:
        return None
    if search is None:
        raise ValueError(
            'importance weighs the errors of a search; give search="4over6" or "sweep"'
        )
    importance = checks.as_float_array("importance", importance, min_ndim=0)
    if importance.shape != (k,):
        raise ValueError(
            f"importance must have one value for each column of x, ({k},); "
            f"got shape {importance.shape}"
        )
    return importance.astype(jnp.float32)


def quantize(
    x: ArrayLike,
    *,
    scaling: DynamicScaling = "tensor",
    global_scale: ArrayLike | None = None,
    search: Search | None = None,
    importance: ArrayLike | None = None,
) -> Nvfp4Tensor:
    """Quantizes to NVFP4, in blocks of 16 along the last axis.

    The formula is that of `jax_nvfp4.numerics`, bit for bit on every backend; with a search, that
    of `jax_nvfp4.search`. The result is piecewise constant in `x`: its derivative is zero.

    Args:
        x: (..., K) of any length K; bfloat16, float16 or float32.
        scaling: "tensor" for one global scale, "token" for one per row. Stacked matrices, to be
            scanned over, have one each: `jax.vmap(quantize)(x)`.
        global_scale: float32, a scalar or one per row (`x.shape[:-1]`), to use in place of a
            computed one; it multiplies on dequantization, and may be traced. A value that is not in
            [2^-110, 2^110] makes the result NaN.
        search: how to choose block scales for a smaller error, for weights: "4over6" tries two for
            each block, "sweep" nine. None takes the scale that maps the block's amax to 6. The
            result is an ordinary NVFP4 tensor.
        importance: (K,), bfloat16, float16 or float32: how much the squared error of each column
            counts in a search. The mean square of a linear layer's inputs, for its weight. Zeros
            are allowed; a value that is negative, NaN or Inf makes the scales of its blocks NaN.

    Returns:
        An Nvfp4Tensor of the shape of x. Blocks that hold a NaN or an Inf have the scale NaN.

    Raises:
        TypeError: x, global_scale or importance has a dtype that is not taken.
        ValueError: x is a scalar, scaling or search has an unknown value, the shape of global_scale
            is neither () nor that of the rows, or importance has not one value for each column, or
            is given without a search.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    how = checks.dynamic_scaling("scaling", scaling)
    rows, k = x.shape[:-1], x.shape[-1]
    importance = _check_search(search, importance, k)
    static_scale = None
    if global_scale is not None:
        how, static_scale = Scaling.STATIC, checks.as_scale("global_scale", global_scale)
        if static_scale.shape not in ((), rows):
            raise ValueError(
                f"global_scale must be a scalar or have the rows of x, {rows}; "
                f"got shape {static_scale.shape}"
            )

    operation: Any = functools.partial(primitive.quantize, scaling=how)
    operands: tuple[Any, ...] = (x, static_scale)
    if search is not None:
        operation = functools.partial(quantize_with_search, scaling=how, search=search)
        operands = (x, static_scale, importance)
    parts = typed.call(
        operation, operands, lambda: placement(x, static_scale, how == Scaling.TOKEN)
    )
    return Nvfp4Tensor(*parts, k=k, dtype=x.dtype)


def global_scale(
    x: ArrayLike, scaling: DynamicScaling = "tensor", search: Search | None = None
) -> jax.Array:
    """The global scale that `quantize` would use; traceable.

    Args:
        x: (..., K); bfloat16, float16 or float32.
        scaling: "tensor" or "token".
        search: as in `quantize`: with one, the global scale leaves room for larger block scales.

    Returns:
        float32: a scalar, or one per row `x.shape[:-1]`. It multiplies on dequantization.

    Raises:
        TypeError: x has a dtype that is not taken.
        ValueError: x is a scalar, or scaling or search has an unknown value.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    per_row = checks.dynamic_scaling("scaling", scaling) == Scaling.TOKEN
    _check_search(search, None, x.shape[-1])
    return _global_scale(x, axis=-1 if per_row else None, search=search)


@functools.partial(jax.jit, static_argnames=("axis", "search"))
def _global_scale(x: jax.Array, axis: int | None, search: Search | None) -> jax.Array:
    return dynamic_scales(numerics.amax(x, axis=axis), search)[1]
