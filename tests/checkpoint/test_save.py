# SPDX-License-Identifier: Apache-2.0
"""Saving: the same bits come back, in the files that ModelOpt would write."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import COMPRESSED, DATA, MODELOPT, assert_same_bits, raw_tensors
from safetensors import safe_open

import jax_nvfp4
from jax_nvfp4 import Nvfp4Tensor, quantize, repack
from jax_nvfp4.checkpoint import (
    CheckpointError,
    files,
    iter_checkpoint,
    load_checkpoint,
    save_checkpoint,
)

FIXTURES = (*MODELOPT, "modelopt_mixed_precision", *COMPRESSED)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def assert_round_trip(tensors, folder):
    loaded = load_checkpoint(folder)
    assert set(loaded) == set(tensors)
    for key, value in tensors.items():
        assert_same_bits(value, loaded[key])


def algorithm(folder):
    return json.loads((folder / "hf_quant_config.json").read_text())["quantization"]


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 4000, 1])
@pytest.mark.parametrize("name", FIXTURES)
def test_round_trip_of_the_producers_checkpoints(name, shard_bytes, tmp_path):
    tensors = load_checkpoint(DATA / name)
    save_checkpoint(tmp_path, tensors, shard_bytes=shard_bytes)
    assert_round_trip(tensors, tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    if shard_bytes > 10**9:
        assert shards == ["model.safetensors"]
    else:
        assert len(shards) > 2
        assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
        assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", MODELOPT)
def test_modelopt_checkpoints_are_written_as_modelopt_wrote_them(name, tmp_path):
    config = json.loads((DATA / name / "config.json").read_text())
    save_checkpoint(tmp_path, load_checkpoint(DATA / name), config=config)
    theirs, ours = raw_tensors(DATA / name), raw_tensors(tmp_path)
    assert set(theirs) == set(ours)
    for key, value in theirs.items():
        assert_same_bits(value, ours[key])
    details = json.loads((DATA / name / "hf_quant_config.json").read_text())["quantization"]
    assert algorithm(tmp_path) == details
    written = json.loads((tmp_path / "config.json").read_text())
    for content in (config, written):
        content["quantization_config"].pop("producer")
        if (
            "awq" in name or "svd" in name
        ):  # ModelOpt's groups of these vary; readers use quant_algo
            content["quantization_config"].pop("config_groups", None)
    assert written == config


def test_mixed_precision_is_written_as_modelopt_wrote_it(tmp_path):
    name = "modelopt_mixed_precision"
    save_checkpoint(tmp_path, load_checkpoint(DATA / name))
    details = json.loads((DATA / name / "hf_quant_config.json").read_text())["quantization"]
    assert algorithm(tmp_path) == details


def test_a_checkpoint_of_compressed_tensors_becomes_modelopts(tmp_path):
    save_checkpoint(tmp_path, load_checkpoint(DATA / "compressed_tensors_nvfp4"))
    names = set(raw_tensors(tmp_path))
    assert not [name for name in names if name.endswith(("packed", "global_scale"))]
    assert names == set(raw_tensors(DATA / "modelopt_nvfp4"))


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, "W4A16_NVFP4"),
        ({"a.input_scale", "b.input_scale"}, "NVFP4"),
        ({"a.input_scale"}, "MIXED_PRECISION"),
        ({"a.pre_quant_scale", "b.pre_quant_scale"}, "NVFP4_AWQ"),
        ({"a.pre_quant_scale", "a.input_scale", "b.input_scale"}, "NVFP4_AWQ"),
    ],
)
def test_algorithm_follows_from_the_tensors(extra, expected, tmp_path):
    tensors = {"a.weight": quantize(normal(8, 32)), "b.weight": quantize(normal(8, 32))}
    tensors |= {
        key: jnp.float32(0.5) if key.endswith("input_scale") else jnp.ones(32, jnp.bfloat16)
        for key in extra
    }
    save_checkpoint(tmp_path, tensors)
    details = algorithm(tmp_path)
    assert details["quant_algo"] == expected
    if expected == "MIXED_PRECISION":
        assert details["quantized_layers"]["a"]["quant_algo"] == "NVFP4"
        assert details["quantized_layers"]["b"]["quant_algo"] == "W4A16_NVFP4"
    assert_round_trip(tensors, tmp_path)


def test_every_dtype_passes_through_with_x64_off(tmp_path):
    assert not jax.config.jax_enable_x64
    rng = np.random.default_rng(0)
    names = "bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
    dtypes = [getattr(ml_dtypes, name) for name in names.split()]
    dtypes += [np.bool_, np.float16, np.float32, np.float64, np.complex64]
    dtypes += [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
    tensors = {}
    for dtype in map(np.dtype, dtypes):
        size = 6 * dtype.itemsize
        raw = rng.integers(0, 2 if dtype == np.bool_ else 256, size, np.uint8)
        tensors[dtype.name] = raw.view(dtype).reshape(2, 3)
    tensors |= {"empty": np.zeros((0, 3), np.float16), "scalar": np.float32(3)}
    tensors["strided"] = np.arange(12, dtype=np.int32).reshape(3, 4).T
    save_checkpoint(tmp_path, {key: np.asarray(value) for key, value in tensors.items()})
    loaded = load_checkpoint(tmp_path)
    for key, value in tensors.items():
        assert isinstance(loaded[key], jax.Array)
        assert_same_bits(value, loaded[key])
    assert not (tmp_path / "hf_quant_config.json").exists()  # nothing is quantized


def test_stacked_and_repacked_weights(tmp_path):
    stacked = jax.vmap(quantize)(normal(3, 8, 32))
    assert stacked.global_scale.shape == (3,)
    one = jax.vmap(quantize)(normal(1, 8, 32))
    weight = quantize(normal(8, 32))
    tensors = {"s.weight": stacked, "one.weight": one}
    save_checkpoint(tmp_path, tensors | {"r.weight": repack(weight)})
    assert_round_trip(tensors | {"r.weight": weight}, tmp_path)


def test_pairs_are_taken_one_at_a_time(tmp_path):
    alive = []

    def pairs():
        for i in range(8):
            alive.append(len(list(tmp_path.glob(".shard-*"))))
            yield f"layer.{i}.weight", quantize(normal(16, 64, seed=i))

    save_checkpoint(tmp_path, pairs(), shard_bytes=1500)
    assert alive == [0, 0, 0, 1, 1, 2, 2, 3]  # shards written when each pair is asked for
    assert len(load_checkpoint(tmp_path)) == 8


def nan_block():
    return quantize(normal(8, 32).at[3, 4].set(jnp.nan))


@pytest.mark.parametrize(
    ("key", "make", "expected"),
    [
        ("a.kernel", lambda: quantize(normal(8, 32)), "must end in '.weight'"),
        ("a.weight", lambda: quantize(normal(8, 40)), "K a multiple of 16"),
        ("a.weight", lambda: quantize(normal(32)), "matrices"),
        ("a.weight", lambda: quantize(normal(8, 32), scaling="token"), "one global scale for each"),
        ("a.weight", nan_block, "NaN or negative block scales"),
        ("a.weight", lambda: with_global_scale(0.0), "global scale 0.0"),
        ("a.weight", lambda: with_global_scale(np.nan), "global scale nan"),
        ("a.weight", lambda: with_global_scale(np.inf), "global scale inf"),
        ("a.input_scale", lambda: jnp.ones(3), "must be a float32 scalar"),
        ("a.x", lambda: None, "is NoneType, which safetensors files do not hold"),
        ("a.x", lambda: {"kernel": jnp.ones(3)}, "is dict, which"),
        ("a.x", lambda: jnp.ones(3, jnp.int4), "an array of int4"),
        ("a.x", lambda: jax.random.key(0), "PRNG"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_by_name(key, make, expected, tmp_path):
    with pytest.raises(ValueError, match=f"{key}.*{expected}"):
        fine = {"fine": jnp.ones(3), "fine too": jnp.ones(3)}
        save_checkpoint(tmp_path, fine | {key: make()}, shard_bytes=1)
    assert not list(tmp_path.iterdir())


def test_keys_that_are_no_strings_are_refused(tmp_path):
    with pytest.raises(TypeError, match="must be a string, got 3"):
        save_checkpoint(tmp_path, {3: jnp.ones(3)})


def with_global_scale(value):
    t = quantize(normal(8, 32))
    return Nvfp4Tensor(t.data, t.block_scale, jnp.float32(value))


def test_a_name_twice_is_refused(tmp_path):
    pairs = [("a.weight", quantize(normal(8, 32))), ("a.weight_scale", jnp.ones(3))]
    with pytest.raises(ValueError, match=r"a.weight_scale.*twice"):
        save_checkpoint(tmp_path, pairs)


def test_overwrite(tmp_path):
    first = {f"l{i}.weight": quantize(normal(8, 32, seed=i)) for i in range(4)}
    save_checkpoint(tmp_path, first, shard_bytes=200)
    second = {"other": jnp.arange(3)}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_checkpoint(tmp_path, second)
    assert_round_trip(first, tmp_path)
    save_checkpoint(tmp_path, second, overwrite=True)
    assert_round_trip(second, tmp_path)


def test_overwriting_what_is_read_meanwhile(tmp_path):
    """A checkpoint is edited in place, and stays where the edit fails."""
    tensors = {f"l{i}.weight": quantize(normal(8, 32, seed=i)) for i in range(4)}
    save_checkpoint(tmp_path, tensors, shard_bytes=200)

    def failing():
        yield from itertools.islice(iter_checkpoint(tmp_path), 3)
        raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        save_checkpoint(tmp_path, failing(), shard_bytes=200, overwrite=True)
    assert_round_trip(tensors, tmp_path)
    renamed = ((key.replace("l", "m"), t) for key, t in iter_checkpoint(tmp_path))
    save_checkpoint(tmp_path, renamed, shard_bytes=400, overwrite=True)
    assert_round_trip({key.replace("l", "m"): t for key, t in tensors.items()}, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_overwriting_another_producers_folder_takes_over_its_config(tmp_path):
    for path in (DATA / "compressed_tensors_nvfp4").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, tensors, overwrite=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert_round_trip(tensors, tmp_path)


def test_an_interrupted_save_leaves_nothing_that_loads(tmp_path, monkeypatch):
    """Fails at each rename in turn: until the last shard has its name, and the index is there."""
    tensors = {f"l{i}.weight": quantize(normal(8, 32, seed=i)) for i in range(3)}
    commit = files.commit
    for fatal in range(100):
        folder = tmp_path / str(fatal)
        left = iter(range(fatal))

        def fail(temporary, path, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            commit(temporary, path)

        monkeypatch.setattr(files, "commit", fail)
        monkeypatch.setattr("jax_nvfp4.checkpoint.save.commit", fail)
        try:
            save_checkpoint(folder, tensors, shard_bytes=200)
            break
        except KeyboardInterrupt:
            if (folder / "model.safetensors.index.json").exists():
                assert_round_trip(tensors, folder)  # only the configuration is missing
            else:
                with pytest.raises((FileNotFoundError, CheckpointError)):
                    load_checkpoint(folder)
    assert fatal == 3 + 3 + 2  # shards written, shards named, index and configuration
    assert_round_trip(tensors, folder)


def test_files_are_readable_and_marked(tmp_path):
    save_checkpoint(tmp_path, {"a.weight": quantize(normal(8, 32))})
    path = tmp_path / "model.safetensors"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with safe_open(path, framework="np") as f:
        assert f.metadata() == {"format": "pt"}
    producer = json.loads((tmp_path / "hf_quant_config.json").read_text())["producer"]
    assert producer == {"name": "jax_nvfp4", "version": jax_nvfp4.__version__}


# --- weights that were joined ------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("as_pairs", [False, True])
def test_joined_weights_are_saved_as_their_parts(as_pairs, packed, tmp_path):
    """Each part gets back the global scale that it had, and its rows of the bias."""
    q, k, v = (quantize(normal(rows, 32, seed=rows) * rows) for rows in (16, 8, 8))
    stacks = [jax.vmap(quantize)(normal(2, 8, 32, seed=i)) for i in (1, 2)]
    qkv, gated = jax_nvfp4.concatenate([q, k, v]), jax_nvfp4.gate_up(*stacks)
    bias, scale = np.arange(32, dtype=np.float32), jnp.float32(0.5)
    tensors = {
        "l.qkv_proj.weight": repack(qkv) if packed else qkv,
        "l.qkv_proj.bias": bias,
        "l.qkv_proj.input_scale": scale,
        "l.experts.w13.weight": repack(gated) if packed else gated,
    }
    save_checkpoint(tmp_path, iter(tensors.items()) if as_pairs else tensors)
    expected = {f"l.{n}_proj.weight": part for n, part in zip("qkv", (q, k, v), strict=True)}
    expected |= {f"l.{n}_proj.input_scale": scale for n in "qkv"}
    parts = zip("qkv", (bias[:16], bias[16:24], bias[24:]), strict=True)
    expected |= {f"l.{n}_proj.bias": part for n, part in parts}
    expected |= {"l.experts.w1.weight": stacks[0], "l.experts.w3.weight": stacks[1]}
    assert_round_trip(expected, tmp_path)


def test_parts_without_names_are_refused(tmp_path):
    weight = jax_nvfp4.concatenate([quantize(normal(8, 32))] * 2)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"'l.kv.weight' was joined of 2 parts.*part_names"):
        save_checkpoint(out, {"l.kv.weight": weight})
    with pytest.raises(ValueError, match=r"'l.qkv.weight' was joined of 2 parts.*not \('q'"):
        save_checkpoint(out, {"l.qkv.weight": weight})
    with pytest.raises(ValueError, match=r"'l.kv.bias' .* cannot be taken apart"):
        tensors = {"l.kv.weight": weight, "l.kv.bias": np.zeros(3)}
        save_checkpoint(out, tensors, part_names={"kv": ("k", "v")})
    with pytest.raises(ValueError, match=r"'l.kv.bias' comes before 'l.kv.weight'"):
        pairs = [("l.kv.bias", np.zeros(16)), ("l.kv.weight", weight)]
        save_checkpoint(out, iter(pairs), part_names={"kv": ("k", "v")})
    assert not out.exists()
    save_checkpoint(out, {"l.kv.weight": weight}, part_names={"l.kv": ("k", "v")})
    assert set(load_checkpoint(out)) == {"l.k.weight", "l.v.weight"}
