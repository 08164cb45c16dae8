# SPDX-License-Identifier: Apache-2.0
"""The operations as JAX primitives: shapes, reference, kernels, batching and derivatives of each.

The functions here take flat operands that the functional layer has already checked.
"""

from jax_nvfp4.ops.linear import LinearSpec, linear
from jax_nvfp4.ops.quantize import Mode, quantize

__all__ = ["LinearSpec", "Mode", "linear", "quantize"]
