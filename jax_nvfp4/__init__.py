# SPDX-License-Identifier: Apache-2.0
"""NVFP4 quantization and linear layers for JAX.

A weight is quantized and repacked once, at load, and multiplied from then on:

>>> import jax_nvfp4 as nvfp4
>>> w = nvfp4.repack(nvfp4.quantize(kernel))  # (N, K)
>>> y = nvfp4.linear(x, w, bias)  # (..., K) -> (..., N)
"""

import importlib
from typing import TYPE_CHECKING, Any

from jax_nvfp4._version import __version__ as __version__
from jax_nvfp4.activations import GeGLU, SwiGLU
from jax_nvfp4.ops.concatenate import concatenate, gate_up
from jax_nvfp4.ops.expert_mlp.api import expert_mlp
from jax_nvfp4.ops.linear.api import linear
from jax_nvfp4.ops.linear.explain import explain
from jax_nvfp4.ops.quantize.api import global_scale, quantize
from jax_nvfp4.ops.ragged_linear.api import ragged_linear
from jax_nvfp4.ops.repack import repack
from jax_nvfp4.params import quantize_params  # imports Flax: its serialization learns our types
from jax_nvfp4.products.api import dot_general, einsum
from jax_nvfp4.products.kernel import Nvfp4Kernel, quantize_kernel
from jax_nvfp4.products.placement import shardings
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

if TYPE_CHECKING:
    from jax_nvfp4.calibration import Calibration
    from jax_nvfp4.checkpoint import iter_checkpoint, load_checkpoint, save_checkpoint
    from jax_nvfp4.conversion.calibrate import calibrate
    from jax_nvfp4.conversion.convert import convert
    from jax_nvfp4.conversion.load import load_params
    from jax_nvfp4.linen import Nvfp4Dense, Nvfp4Experts

__all__ = [
    "Calibration",
    "GeGLU",
    "Nvfp4Dense",
    "Nvfp4Experts",
    "Nvfp4Kernel",
    "Nvfp4Tensor",
    "RepackedWeight",
    "SwiGLU",
    "calibrate",
    "concatenate",
    "convert",
    "dot_general",
    "einsum",
    "expert_mlp",
    "explain",
    "gate_up",
    "global_scale",
    "iter_checkpoint",
    "linear",
    "load_checkpoint",
    "load_params",
    "quantize",
    "quantize_kernel",
    "quantize_params",
    "ragged_linear",
    "repack",
    "save_checkpoint",
    "shardings",
]

# The layers and safetensors are imported when they are first needed.
_LAZY = {
    "Calibration": "jax_nvfp4.calibration",
    "calibrate": "jax_nvfp4.conversion.calibrate",
    "convert": "jax_nvfp4.conversion.convert",
    "load_params": "jax_nvfp4.conversion.load",
    "Nvfp4Dense": "jax_nvfp4.linen",
    "Nvfp4Experts": "jax_nvfp4.linen",
    "iter_checkpoint": "jax_nvfp4.checkpoint",
    "load_checkpoint": "jax_nvfp4.checkpoint",
    "save_checkpoint": "jax_nvfp4.checkpoint",
}
_LAZY_MODULES = ("adapters", "checkpoint", "linen", "nnx")


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"jax_nvfp4.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_LAZY_MODULES})
