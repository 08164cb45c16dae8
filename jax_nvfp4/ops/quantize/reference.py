# SPDX-License-Identifier: Apache-2.0
"""The quantize operation in pure JAX."""

import jax
import jax.numpy as jnp

from jax_nvfp4 import numerics
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.search import Search, dynamic_scales


def scales(
    x: jax.Array,
    scale_or_amax: jax.Array | None = None,
    *,
    scaling: Scaling,
    search: Search | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encode scale S, decode scale D, and the global scale to report, for each scaling."""
    if scale_or_amax is None:
        # By blocks: XLA's CPU backend reduces a long axis in loops of their own.
        blocks = numerics.amax(numerics.as_blocks(x), axis=-1)
        largest = jnp.max(blocks, axis=-1 if scaling == Scaling.TOKEN else None, initial=0)
    elif scaling == Scaling.STATIC:
        return *numerics.static_scales(scale_or_amax), scale_or_amax
    else:
        largest = scale_or_amax
    encode, decode = dynamic_scales(largest, search)
    return encode, decode, decode


def reference(
    x: jax.Array, scale_or_amax: jax.Array | None = None, *, scaling: Scaling
) -> list[jax.Array]:
    """Quantizes the rows of x by `numerics`."""
    encode, decode, global_scale = scales(x, scale_or_amax, scaling=scaling)
    return [*numerics.quantize(x, encode, decode), global_scale]
