# SPDX-License-Identifier: Apache-2.0
"""NVFP4 quantization and linear layers for JAX.

A weight is quantized and repacked once, at load, and multiplied from then on:

>>> import jax_nvfp4 as nvfp4
>>> w = nvfp4.repack(nvfp4.quantize(kernel))  # (N, K)
>>> y = nvfp4.linear(x, w, bias)  # (..., K) -> (..., N)
"""

from jax_nvfp4.functional import global_scale, linear, quantize, repack
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

__version__ = "0.1.0"

__all__ = ["Nvfp4Tensor", "RepackedWeight", "global_scale", "linear", "quantize", "repack"]
