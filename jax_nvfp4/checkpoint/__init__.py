# SPDX-License-Identifier: Apache-2.0
"""NVFP4 checkpoints: safetensors files as NVIDIA ModelOpt and compressed-tensors write them."""

from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.load import iter_checkpoint, load_checkpoint
from jax_nvfp4.checkpoint.save import save_checkpoint

__all__ = ["CheckpointError", "iter_checkpoint", "load_checkpoint", "save_checkpoint"]
