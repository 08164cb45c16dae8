# SPDX-License-Identifier: Apache-2.0
"""Checkpoints for tests: the producers' fixtures, and copies of them with one thing changed."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jax_nvfp4 import Nvfp4Tensor
from jax_nvfp4.checkpoint.files import open_folder, read

DATA = Path(__file__).parents[1] / "data"
MODELOPT = ("modelopt_nvfp4", "modelopt_w4a16_nvfp4", "modelopt_nvfp4_awq", "modelopt_nvfp4_svd")
COMPRESSED = ("compressed_tensors_nvfp4", "compressed_tensors_nvfp4a16")

Arrays = dict[str, np.ndarray]


def raw_tensors(folder: Path) -> Arrays:
    """Every stored tensor of a checkpoint."""
    return {name: read(entry) for name, entry in open_folder(folder).entries.items()}


def changed_copy(name: str, destination: Path, change: Callable[[Arrays], None]) -> Path:
    """A copy of a fixture, in one file, after `change` had its way with the stored tensors."""
    shutil.copytree(DATA / name, destination)
    arrays = raw_tensors(DATA / name)
    for path in destination.glob("*.safetensors*"):
        path.unlink()
    change(arrays)
    save_file(arrays, destination / "model.safetensors")
    return destination


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_bits(a, b) -> None:
    """Same type, shape, dtype and bytes."""
    if isinstance(a, Nvfp4Tensor):
        assert isinstance(b, Nvfp4Tensor)
        assert a.k == b.k
        for part in ("data", "block_scale", "global_scale"):
            assert_same_bits(getattr(a, part), getattr(b, part))
        return
    a, b = np.asarray(a), np.asarray(b)
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    assert a.tobytes() == b.tobytes()


def write_model(folder: Path, shards: int = 3, size: int = 64, seed: int = 0) -> Arrays:
    """Writes an unquantized Hugging Face style checkpoint with something of everything."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)

    def normal(*shape: int, dtype=ml_dtypes.bfloat16) -> np.ndarray:
        return rng.standard_normal(shape, np.float32).astype(dtype)

    everything: Arrays = {}
    weight_map = {}
    for i in range(shards):
        dtype = (ml_dtypes.bfloat16, np.float16, np.float32)[i % 3]
        prefix = f"model.layers.{i}"
        tensors = {
            f"{prefix}.mlp.up_proj.weight": normal(size, size, dtype=dtype),
            f"{prefix}.mlp.up_proj.bias": normal(size),
            f"{prefix}.mlp.down_proj.weight": normal(size, 2 * size, dtype=dtype),
            f"{prefix}.input_layernorm.weight": normal(size),
        }
        if i == 0:
            tensors |= {
                "model.embed_tokens.weight": normal(32, size),
                "lm_head.weight": normal(32, size),
                "odd.weight": normal(4, 24),
                "conv.weight": normal(4, 3, 16),
                "position_ids": np.arange(2**40, 2**40 + 4),
            }
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        everything |= tensors
    if shards == 1:
        (folder / name).rename(folder / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": size}))
    (folder / "tokenizer.json").write_text('{"a": 1}')
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights again")
    return everything
