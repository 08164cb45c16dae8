# SPDX-License-Identifier: Apache-2.0
"""Follows a global scale when the rows of x are joined, divided over devices or batched.

`scale_or_amax` is the operand of STATIC and AMAX scaling: the global scale, or the amax of data of
which x is a part. It is None for the other scalings.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.sharding import partition


def flat(scale_or_amax: jax.Array | None) -> jax.Array | None:
    """The operand for the rows of x as a matrix."""
    return (
        scale_or_amax.reshape(-1)
        if scale_or_amax is not None and scale_or_amax.ndim
        else (scale_or_amax)
    )


def of_part(
    x: jax.Array, scale_or_amax: jax.Array | None, scaling: Scaling, axes: partition.Axes
) -> tuple[jax.Array | None, Scaling]:
    """The scale with which a device quantizes its part of x to the bits of the whole.

    An amax is exchanged for per-tensor scaling of divided rows and for any dynamic scaling of
    divided columns.

    Args:
        x: the part.
        scale_or_amax: that of the whole, or of the part's rows, if any.
        scaling: of the whole.
        axes: mesh axes over which x is divided.

    Returns:
        `scale_or_amax` and `scaling` for the part: an amax that is not that of the part alone is
        an operand.
    """
    columns = axes.get("blocks", ())
    rows = partition.mesh_axes(axes, partition.leading(x))
    if scaling == Scaling.TENSOR:
        shared, axis = (*rows, *columns), None
    elif scaling == Scaling.TOKEN:
        shared, axis = columns, -1
    else:
        shared = ()
    if not shared:
        return scale_or_amax, scaling
    return lax.pmax(numerics.amax(x, axis=axis), shared), Scaling.AMAX


def with_batch(
    operands: tuple[Any, Any | None], dims: tuple[int | None, int | None], scaling: Scaling
) -> tuple[jax.Array, jax.Array | None, Scaling]:
    """Makes a batch axis the first axis of x and of its scale or amax.

    Args:
        operands: x (..., K), and the scale or amax if any, with a batch axis where `dims` says so.
        dims: the batch axis of each, or None.
        scaling: that of each element of the batch.

    Returns:
        x of shape (B, ..., K), the scale or amax of shape () or (B, ...) if any, and the scaling
        that quantizes those rows to the same bits.
    """
    x, scale_or_amax = operands
    x_dim, dim = dims
    present = [(x, x_dim)] + ([] if scale_or_amax is None else [(scale_or_amax, dim)])
    size = primitive.batch_size(*zip(*present, strict=True))
    x = primitive.to_front(x, x_dim)
    if x_dim is None:
        x = jnp.broadcast_to(x, (size, *x.shape))
    rows = x.shape[:-1]
    if scaling == Scaling.TENSOR:
        scale_or_amax, dim, scaling = amax_of_each(x), 0, Scaling.AMAX
    if scale_or_amax is None:
        return x, None, scaling
    scale_or_amax = primitive.to_front(scale_or_amax, dim)
    if dim is not None and scale_or_amax.ndim == 1:  # one for each element of the batch
        scale_or_amax = scale_or_amax.reshape(size, *[1] * (len(rows) - 1))
    if scale_or_amax.ndim:
        scale_or_amax = jnp.broadcast_to(scale_or_amax, rows)
    return x, scale_or_amax, scaling


def amax_of_each(x: jax.Array) -> jax.Array:
    """The amax of each element of a batch."""
    return numerics.amax(x, axis=tuple(range(1, x.ndim)))
