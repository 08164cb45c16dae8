# SPDX-License-Identifier: Apache-2.0
"""Checkpoints written by the real producers load to the values that the producers compute."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import COMPRESSED, DATA, MODELOPT, assert_same_bits, raw_tensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jax_nvfp4 import Nvfp4Tensor, linear
from jax_nvfp4.checkpoint import iter_checkpoint, load_checkpoint

EVERY = (*MODELOPT, "modelopt_mixed_precision", *COMPRESSED)


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name / "expected.npz") as arrays:
        return dict(arrays)


def weights() -> list[tuple[str, str]]:
    return [(name, key) for name in EVERY for key in expected(name)]


@pytest.mark.parametrize(("name", "key"), [w for w in weights() if w[0].startswith("modelopt")])
def test_modelopt_dequantizes_exactly(name, key):
    weight = load_checkpoint(DATA / name, where=key.__eq__)[key]
    values = weight.dequantize(jnp.float32)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(values, expected(name)[key])


@pytest.mark.parametrize(
    ("name", "key"), [w for w in weights() if w[0] in COMPRESSED and ":" not in w[1]]
)
def test_compressed_tensors_dequantizes_exactly_in_its_own_dtype(name, key):
    weight = load_checkpoint(DATA / name, where=key.__eq__)[key]
    values = np.asarray(weight.dequantize(jnp.bfloat16))
    np.testing.assert_array_equal(values.astype(np.float32), expected(name)[key])


@pytest.mark.parametrize(
    ("name", "key"), [w for w in weights() if w[0] in COMPRESSED and ":" in w[1]]
)
def test_compressed_tensors_dequantizes_to_the_last_bits_in_float32(name, key):
    key, _ = key.split(":")
    weight = load_checkpoint(DATA / name, where=key.__eq__)[key]
    theirs = expected(name)[f"{key}:float32"]
    np.testing.assert_array_max_ulp(np.asarray(weight.dequantize(jnp.float32)), theirs, maxulp=2)


def test_reciprocal_scale_costs_at_most_two_units_in_the_last_place():
    """Over every significand of the global scale, the block scale and the code.

    Powers of two change nothing, so these are all cases: 2**23 x 8 x 2.
    """
    stored = (np.arange(2**23, 2**24, dtype=np.int32) * np.float32(2**-23)).astype(np.float32)
    multiplier = np.float32(1) / stored
    worst = 0
    for scale in np.arange(8, 16, dtype=np.float32):
        quotient, product = scale / stored, scale * multiplier
        for code in np.float32([1, 1.5]):
            theirs, ours = code * quotient, code * product
            worst = max(worst, np.abs(theirs.view(np.int32) - ours.view(np.int32)).max())
    assert worst == 2


@pytest.mark.parametrize("name", EVERY)
def test_keys_are_the_same_in_all_formats(name):
    tensors = load_checkpoint(DATA / name)
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [
        f"mlp.{p}_proj" for p in ("gate", "up", "down")
    ]
    quantized = linears[4:] if "mixed" in name else linears
    prefix = "model.layers.0."
    for layer in quantized:
        weight = tensors[f"{prefix}{layer}.weight"]
        assert isinstance(weight, Nvfp4Tensor)
        assert weight.global_scale.shape == ()
        scale = tensors.get(f"{prefix}{layer}.input_scale")
        if "a16" in name:
            assert scale is None
        else:
            assert (scale.dtype, scale.shape) == (jnp.float32, ())
    suffixes = {key.rpartition(".")[2] for key in tensors if "self_attn" not in key}
    extra = {"pre_quant_scale"} if "awq" in name or "svd" in name else set()
    extra |= {"_svdquant_lora_a", "_svdquant_lora_b"} if "svd" in name else set()
    assert suffixes - {"input_scale"} == {"weight"} | extra
    assert tensors["model.embed_tokens.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", EVERY)
def test_unquantized_tensors_pass_through(name):
    raw, tensors = raw_tensors(DATA / name), load_checkpoint(DATA / name)
    passed = [key for key in tensors if key.endswith(("norm.weight", "bias", "tokens.weight"))]
    assert len(passed) == 7
    for key in passed:
        assert isinstance(tensors[key], jax.Array)
        assert_same_bits(tensors[key], raw[key])


def test_input_scale_multiplies_whatever_the_direction_in_the_file():
    key = "model.layers.0.mlp.down_proj"
    raw = raw_tensors(DATA / "compressed_tensors_nvfp4")
    theirs = load_checkpoint(DATA / "compressed_tensors_nvfp4")
    assert theirs[f"{key}.input_scale"] == np.float32(1) / raw[f"{key}.input_global_scale"][0]
    assert theirs[f"{key}.weight"].global_scale == 1 / raw[f"{key}.weight_global_scale"][0]
    raw = raw_tensors(DATA / "modelopt_nvfp4")
    ours = load_checkpoint(DATA / "modelopt_nvfp4")
    assert ours[f"{key}.input_scale"] == raw[f"{key}.input_scale"]
    # The same model: ModelOpt stores amax / 2688 where compressed-tensors stores 2688 / amax.
    np.testing.assert_allclose(
        theirs[f"{key}.weight"].global_scale, ours[f"{key}.weight"].global_scale, rtol=1e-6
    )


def test_awq_scales_the_activations_of_the_layers_that_nothing_absorbed():
    tensors = load_checkpoint(DATA / "modelopt_nvfp4_awq")
    scales = {key: value for key, value in tensors.items() if key.endswith("pre_quant_scale")}
    prefix = "model.layers.0."
    assert set(scales) == {
        f"{prefix}self_attn.o_proj.pre_quant_scale",
        f"{prefix}mlp.down_proj.pre_quant_scale",
    }
    for key, value in scales.items():
        assert value.shape == (tensors[key.replace("pre_quant_scale", "weight")].shape[-1],)
        assert value.dtype == jnp.bfloat16


def test_mixed_precision_keeps_8_bit_layers_as_stored():
    tensors = load_checkpoint(DATA / "modelopt_mixed_precision")
    raw = raw_tensors(DATA / "modelopt_mixed_precision")
    for part in ("weight", "weight_scale", "input_scale"):
        key = f"model.layers.0.self_attn.q_proj.{part}"
        assert_same_bits(tensors[key], raw[key])
    assert tensors["model.layers.0.self_attn.q_proj.weight"].dtype == jnp.float8_e4m3fn
    assert isinstance(tensors["model.layers.0.mlp.up_proj.weight"], Nvfp4Tensor)


def test_experts_of_modelopts_gpt_oss():
    """Stored [G, K/2, N] with gate and up in turn; they load as [G, N, K], gate first."""
    raw = raw_tensors(DATA / "modelopt_stacked_experts")
    tensors = load_checkpoint(DATA / "modelopt_stacked_experts")
    prefix = "model.layers.0.mlp.experts."
    for name, order in (("gate_up_proj", np.r_[0:32:2, 1:32:2]), ("down_proj", np.r_[0:16])):
        stored = prefix + name
        weight = tensors[f"{stored}.weight"]
        assert weight.shape == (2, len(order), 16)
        for g in range(2):
            np.testing.assert_array_equal(weight.data[g], raw[stored][g].T[order])
            scale = raw[f"{stored}_weight_scale"][g].T[order]
            assert_same_bits(weight.block_scale[g], np.ascontiguousarray(scale))
        assert_same_bits(weight.global_scale, np.repeat(raw[f"{stored}_weight_scale_2"], 2))
        assert_same_bits(tensors[f"{stored}.bias"], raw[f"{stored}_bias"][:, order])
        assert_same_bits(tensors[f"{stored}.input_scale"], raw[f"{stored}_input_scale"])
    assert not [key for key in tensors if key.startswith(prefix) and "_proj_" in key]


def test_linear_runs_on_a_loaded_layer():
    tensors = load_checkpoint(DATA / "modelopt_nvfp4")
    layer = "model.layers.0.self_attn.q_proj"
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.input_scale"]
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 32)), jnp.bfloat16)
    y = linear(x, weight, tensors[f"{layer}.bias"], activation_scale=scale, out_dtype=jnp.float32)
    exact = x.astype(jnp.float32) @ weight.dequantize().T + tensors[f"{layer}.bias"]
    assert np.linalg.norm(y - exact) < 0.2 * np.linalg.norm(exact)


def test_a_checkpoint_without_configuration_is_told_by_its_names(tmp_path):
    for name in ("modelopt_nvfp4", "compressed_tensors_nvfp4"):
        bare = tmp_path / f"{name}.safetensors"
        bare.write_bytes((DATA / name / "model.safetensors").read_bytes())
        with_config = load_checkpoint(DATA / name)
        without = load_checkpoint(bare)
        assert set(with_config) == set(without)
        for key, value in with_config.items():
            assert_same_bits(value, without[key])


def test_modelopt_configuration_in_config_json_alone(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_bytes((DATA / "modelopt_mixed_precision" / name).read_bytes())
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_algo"] == "MIXED_PRECISION"
    assert len(load_checkpoint(folder)) == len(load_checkpoint(DATA / "modelopt_mixed_precision"))


def test_iter_is_lazy_and_in_stored_order(monkeypatch):
    from jax_nvfp4.checkpoint import formats, load

    reads = []
    for module in (formats, load):
        read = module.read
        monkeypatch.setattr(module, "read", lambda e, read=read: reads.append(e.name) or read(e))
    pairs = iter_checkpoint(DATA / "modelopt_nvfp4")
    assert reads == []
    first, _ = next(pairs)
    assert reads
    assert all(name.startswith(first) for name in reads)
    keys = [first, *(key for key, _ in pairs)]
    assert keys == list(load_checkpoint(DATA / "modelopt_nvfp4"))


def test_where_selects_what_is_read():
    keys = set(
        load_checkpoint(DATA / "modelopt_nvfp4", where=lambda key: key.endswith("input_scale"))
    )
    assert len(keys) == 7
    assert all(key.endswith("input_scale") for key in keys)


def test_placement():
    device = jax.devices()[0]
    mesh = Mesh(np.array([device]), ("x",))
    spec = PartitionSpec("x", None)

    def place(key: str, shape: tuple[int, ...]):
        if key.endswith("up_proj.weight"):
            assert shape == (48, 32)
            return NamedSharding(mesh, spec)
        return device

    tensors = load_checkpoint(DATA / "modelopt_nvfp4", placement=place)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.data.sharding == weight.block_scale.sharding == NamedSharding(mesh, spec)
    assert weight.global_scale.sharding == NamedSharding(mesh, PartitionSpec())
    assert tensors["model.norm.weight"].sharding == SingleDeviceSharding(device)
    same = load_checkpoint(DATA / "modelopt_nvfp4", placement=device)
    for key, value in tensors.items():
        assert_same_bits(value, same[key])


def test_dtypes_of_the_fixtures_cover_what_producers_write():
    """The fixtures hold bf16, float8 and float32 tensors: nothing above passes for want of data."""
    stored = {t.dtype for name in EVERY for t in raw_tensors(DATA / name).values()}
    assert {np.dtype(d) for d in (np.uint8, np.float32, ml_dtypes.bfloat16)} < stored
    assert np.dtype(ml_dtypes.float8_e4m3fn) in stored
