# SPDX-License-Identifier: Apache-2.0
"""The quantize operation in pure JAX."""

from typing import Literal

import jax

from jax_nvfp4 import numerics

Mode = Literal["tensor", "token", "static", "amax"]
"""Where the global scale comes from: the amax of all of x, the amax of each row, a given global
scale, or a given amax (of data of which x is a part)."""


def scales(x: jax.Array, *given: jax.Array, mode: Mode) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Encode scale S, decode scale D, and the global scale to report, for each mode."""
    if mode == "static":
        return *numerics.static_scales(given[0]), given[0]
    axis = -1 if mode == "token" else None
    largest = given[0] if mode == "amax" else numerics.amax(x, axis=axis)
    encode, decode = numerics.dynamic_scales(largest)
    return encode, decode, decode


def reference(x: jax.Array, *given: jax.Array, mode: Mode) -> list[jax.Array]:
    """Quantizes the rows of x by `numerics`."""
    encode, decode, global_scale = scales(x, *given, mode=mode)
    return [*numerics.quantize(x, encode, decode), global_scale]
