# SPDX-License-Identifier: Apache-2.0
"""The Flax nnx layers, and the swap of a model's layers for them."""

from jax_nvfp4.nnx.experts import Nvfp4Experts
from jax_nvfp4.nnx.general import Nvfp4Einsum, Nvfp4LinearGeneral
from jax_nvfp4.nnx.linear import Nvfp4Linear
from jax_nvfp4.nnx.swap import quantize_model, repack_model
from jax_nvfp4.nnx.variables import QuantizedParam, QuantStat

__all__ = [
    "Nvfp4Einsum",
    "Nvfp4Experts",
    "Nvfp4Linear",
    "Nvfp4LinearGeneral",
    "QuantStat",
    "QuantizedParam",
    "quantize_model",
    "repack_model",
]
