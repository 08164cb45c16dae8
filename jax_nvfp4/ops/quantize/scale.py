# SPDX-License-Identifier: Apache-2.0
"""What becomes of a global scale when the rows of x are joined, divided over devices or batched."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics
from jax_nvfp4.ops import primitive
from jax_nvfp4.ops.quantize.reference import Mode
from jax_nvfp4.ops.sharding import partition


def flat(given: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """A given scale, if any, for the rows of x as a matrix."""
    return tuple(g.reshape(-1) if g.ndim else g for g in given)


def of_part(
    x: jax.Array, given: tuple[jax.Array, ...], mode: Mode, axes: partition.Axes
) -> tuple[tuple[jax.Array, ...], Mode]:
    """The scale with which a device quantizes its part of x to the bits of the whole.

    An amax is exchanged for per-tensor scaling of divided rows and for any dynamic scaling of
    divided columns.

    Args:
        x: the part.
        given: the scale of the whole, or of the part's rows, if any.
        mode: of the quantization of the whole.
        axes: mesh axes over which x is divided.

    Returns:
        `given` and `mode` for the part: an amax that is not that of the part alone is given.
    """
    columns = axes.get("blocks", ())
    rows = partition.mesh_axes(axes, partition.leading(x))
    shared = (*rows, *columns) if mode == "tensor" else columns if mode == "token" else ()
    if not shared:
        return given, mode
    largest = numerics.amax(x, axis=-1 if mode == "token" else None)
    return (lax.pmax(largest, shared),), "amax"


def with_batch(
    args: tuple[Any, ...], dims: tuple[int | None, ...], mode: Mode
) -> tuple[jax.Array, tuple[jax.Array, ...], Mode]:
    """Makes a batch axis the first axis of x and of its given scale.

    Args:
        args: x (..., K), and perhaps the given scale, with a batch axis where `dims` says so.
        dims: the batch axis of each, or None.
        mode: the mode of each element of the batch.

    Returns:
        x of shape (B, ..., K), the given scale of shape () or (B, ...) if any, and the mode that
        quantizes those rows to the same bits.
    """
    size = primitive.batch_size(args, dims)
    x = primitive.to_front(args[0], dims[0])
    if dims[0] is None:
        x = jnp.broadcast_to(x, (size, *x.shape))
    given = [primitive.to_front(a, d) for a, d in zip(args[1:], dims[1:], strict=True)]
    mapped = [d is not None for d in dims[1:]]
    if mode == "tensor":
        given, mapped, mode = [amax_of_each(x)], [True], "amax"
    rows = x.shape[:-1]

    def for_rows(scale: jax.Array, mapped: bool) -> jax.Array:
        if mapped and scale.ndim == 1:  # one for each element of the batch
            scale = scale.reshape(size, *[1] * (len(rows) - 1))
        return jnp.broadcast_to(scale, rows) if scale.ndim else scale

    return x, tuple(map(for_rows, given, mapped)), mode


def amax_of_each(x: jax.Array) -> jax.Array:
    """The amax of each element of a batch."""
    return numerics.amax(x, axis=tuple(range(1, x.ndim)))
