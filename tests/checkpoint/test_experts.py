# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of mixtures of experts: stacks, transposed stacks, MXFP4 and FP8."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import assert_same_bits
from safetensors.numpy import save_file

from jax_nvfp4 import Nvfp4Tensor, quantize
from jax_nvfp4.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

E4M3, E8M0, BF16 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16
P = "model.layers.0.mlp.experts"
G, N, K = 12, 16, 64


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.fixture(scope="module")
def experts():
    """Experts whose global scales differ by up to ten times."""
    values = normal(G, N, K) * np.linspace(1, 10, G, dtype=np.float32)[:, None, None]
    return jax.jit(jax.vmap(quantize))(values)


def expert(t, g):
    return jax.tree.map(lambda part: np.asarray(part[g]), t)


def write(folder, tensors, config=None, hf=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    for name, content in (("config.json", config), ("hf_quant_config.json", hf)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


def modelopt(name, q, **more):
    parts = {"weight": q.data, "weight_scale": q.block_scale, "weight_scale_2": q.global_scale}
    return {f"{name}.{part}": np.asarray(value) for part, value in (parts | more).items()}


def compressed(name, q, **more):
    parts = {"weight_packed": q.data, "weight_scale": q.block_scale}
    parts["weight_global_scale"] = (1 / q.global_scale).reshape(1)
    if "input_scale" in more:
        parts["input_global_scale"] = (1 / more.pop("input_scale")).reshape(1)
    return {f"{name}.{part}": np.asarray(value) for part, value in (parts | more).items()}


def one_by_one(experts, make=modelopt, bias=True):
    tensors = {"model.norm.weight": normal(8)}
    for g in range(G):
        more = {"input_scale": np.array(2.0**-g, np.float32)}
        tensors |= make(f"{P}.{g}.up_proj", expert(experts, g), **more)
        if bias:
            tensors[f"{P}.{g}.up_proj.bias"] = np.full(N, g, np.float32)
    return tensors


# --- one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [modelopt, compressed])
def test_experts_stack(make, experts, tmp_path):
    path = write(tmp_path / "m", one_by_one(experts, make))
    loaded = load_checkpoint(path, stack_experts=True)
    keys = {f"{P}.up_proj.{part}" for part in ("weight", "input_scale", "bias")}
    assert set(loaded) == keys | {"model.norm.weight"}
    assert loaded[f"{P}.up_proj.weight"].shape == (G, N, K)
    # Twelve experts: their order is that of their numbers, not that of their names.
    single = load_checkpoint(path)
    for g in range(G):
        stacked = expert(loaded[f"{P}.up_proj.weight"], g)
        assert_same_bits(stacked, single[f"{P}.{g}.up_proj.weight"])
        scale = loaded[f"{P}.up_proj.input_scale"][g]
        assert_same_bits(scale, single[f"{P}.{g}.up_proj.input_scale"])
        assert loaded[f"{P}.up_proj.bias"][g, 0] == g
    save_checkpoint(tmp_path / "again", loaded)
    for key, value in load_checkpoint(tmp_path / "again").items():
        assert_same_bits(value, loaded[key])


def test_unquantized_experts_stack(tmp_path):
    tensors = {f"{P}.{g}.w1.weight": normal(N, K, seed=g).astype(BF16) for g in range(G)}
    loaded = load_checkpoint(write(tmp_path, tensors), stack_experts=True)
    assert list(loaded) == [f"{P}.w1.weight"]
    expected = np.stack([tensors[f"{P}.{g}.w1.weight"] for g in range(G)])
    assert_same_bits(loaded[f"{P}.w1.weight"], expected)


def test_stacks_are_read_when_their_turn_comes_and_where_they_are_wanted(experts, tmp_path):
    tensors = one_by_one(experts)
    del tensors[f"{P}.3.up_proj.input_scale"]
    path = write(tmp_path, tensors)
    wanted = load_checkpoint(path, stack_experts=True, where=lambda k: k.endswith("proj.weight"))
    assert list(wanted) == [f"{P}.up_proj.weight"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop(f"{P}.3.up_proj.input_scale"), "'[^']*.3.up_proj.input_scale' is missing"),
        (
            lambda t: [t.pop(n) for n in list(t) if f"{P}.11.up_proj.b" in n],
            "'[^']*.11.up_proj.bias' is missing, one of 12",
        ),
        (
            lambda t: t.update({f"{P}.5.up_proj.bias": np.zeros(N + 1, np.float32)}),
            r"5.up_proj.bias' is float32\[17\], and .*0.up_proj.bias' is float32\[16\]",
        ),
        (
            lambda t: (
                [t.pop(n) for n in list(t) if f"{P}.4.up_proj.w" in n],
                t.update({f"{P}.4.up_proj.weight": np.zeros((N, K), np.float32)}),
            ),
            "4.up_proj.weight' is not and .*0.up_proj.weight' is NVFP4",
        ),
    ],
)
def test_experts_that_do_not_stack(change, expected, experts, tmp_path):
    tensors = one_by_one(experts)
    change(tensors)
    path = write(tmp_path, tensors)
    load_checkpoint(path)
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(path, stack_experts=True)


# --- in one parameter ------------------------------------------------------------------------


def in_one(name, q, *, transposed, scale=None):
    turn = (
        (lambda a: np.ascontiguousarray(np.asarray(a).swapaxes(1, 2))) if transposed else np.asarray
    )
    scale = np.asarray(q.global_scale if scale is None else scale)
    parts = {"": turn(q.data), "_weight_scale": turn(q.block_scale), "_weight_scale_2": scale}
    return {name + part: value for part, value in parts.items()}


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("shape", [(G,), (G, 1), (G, 1, 1), ()])
@pytest.mark.parametrize("described", [True, False])
def test_experts_in_one_parameter(described, shape, transposed, experts, tmp_path):
    scale = np.float32(2**-10) if shape == () else np.asarray(experts.global_scale)
    scale = np.broadcast_to(scale, (G,) if shape else ()).reshape(shape).copy()
    name = f"{P}.down_proj"
    tensors = in_one(name, experts, transposed=transposed, scale=scale)
    tensors[f"{name}_input_scale"] = np.full((), 3, np.float32)
    hf = {"quantization": {"quant_algo": "NVFP4"}} if described else None
    loaded = load_checkpoint(write(tmp_path / "m", tensors, hf=hf))
    assert set(loaded) == {f"{name}.weight", f"{name}.input_scale"}
    weight = loaded[f"{name}.weight"]
    assert_same_bits(weight.data, experts.data)
    assert_same_bits(weight.block_scale, experts.block_scale)
    assert_same_bits(weight.global_scale, np.broadcast_to(scale.reshape(-1), (G,)))
    save_checkpoint(tmp_path / "again", loaded)
    assert_same_bits(load_checkpoint(tmp_path / "again")[f"{name}.weight"], weight)


@pytest.mark.parametrize("model", ["gpt_oss", "llama4", None])
def test_gate_and_up_in_turn(model, experts, tmp_path):
    name = f"{P}.gate_up_proj"
    tensors = in_one(name, experts, transposed=True)
    tensors[f"{name}_bias"] = normal(G, N)
    config = {"text_config": {"model_type": model}} if model else None
    loaded = load_checkpoint(write(tmp_path, tensors, config))
    rows = slice(None) if model == "llama4" else np.r_[0:N:2, 1:N:2]
    assert_same_bits(loaded[f"{name}.weight"].data, np.asarray(experts.data)[:, rows])
    assert_same_bits(loaded[f"{name}.bias"], tensors[f"{name}_bias"][:, rows])


@pytest.mark.parametrize("part", ["", "_weight_scale"])
def test_a_parameter_without_a_part(part, experts, tmp_path):
    tensors = in_one(f"{P}.down_proj", experts, transposed=True)
    del tensors[f"{P}.down_proj{part}"]
    with pytest.raises(CheckpointError, match=f"'{P}.down_proj{part}' is missing"):
        load_checkpoint(write(tmp_path, tensors))


# --- MXFP4 -----------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)


def values(codes, exponents):
    """(..., K/2) bytes and (..., K/32) biased exponents, as float64 by the format's definition."""
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
    magnitudes = E2M1[nibbles & 7] * np.where(nibbles & 8, -1.0, 1.0)
    scales = np.exp2(exponents.astype(np.float64) - 127)
    return magnitudes * np.repeat(scales, 32, axis=-1)


def mx(*shape, low, high, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // 2), np.uint8)
    return codes, rng.integers(low, high + 1, (*shape[:-1], shape[-1] // 32)).astype(np.uint8)


@pytest.mark.parametrize(("low", "high"), [(110, 127), (127, 127), (17, 20), (237, 245), (30, 47)])
@pytest.mark.parametrize("names", ["deepseek", "modelopt", "gpt-oss"])
def test_mxfp4_becomes_nvfp4_exactly(names, low, high, tmp_path):
    codes, exponents = mx(2, 6, 64, low=low, high=high)
    exact, name = values(codes, exponents), f"{P}.w1.weight"
    if names == "deepseek":
        parts = {name: codes.view(np.int8), f"{P}.w1.scale": exponents.view(E8M0)}
    elif names == "modelopt":
        parts = {name: codes, f"{P}.w1.weight_scale": exponents}
    else:
        parts = {f"{P}.w1_blocks": codes.reshape(2, 6, 2, 16), f"{P}.w1_scales": exponents}
    config = {"quantization_config": {"quant_method": "mxfp4"}} if names == "gpt-oss" else None
    loaded = load_checkpoint(write(tmp_path / "m", parts, config))
    assert list(loaded) == [name]
    assert loaded[name].global_scale.shape == (2,)
    np.testing.assert_array_equal(np.float64(loaded[name].dequantize()), exact)
    save_checkpoint(tmp_path / "again", loaded)
    assert_same_bits(load_checkpoint(tmp_path / "again")[name], loaded[name])


def test_mxfp4_of_gpt_oss_has_gate_first(tmp_path):
    codes, exponents = mx(2, 8, 64, low=120, high=125)
    name = f"{P}.gate_up_proj"
    parts = {f"{name}_blocks": codes.reshape(2, 8, 2, 16), f"{name}_scales": exponents}
    parts[f"{name}_bias"] = normal(2, 8)
    loaded = load_checkpoint(write(tmp_path, parts, {"model_type": "gpt_oss"}))
    order = np.r_[0:8:2, 1:8:2]
    exact = values(codes, exponents)[:, order]
    np.testing.assert_array_equal(np.float64(loaded[f"{name}.weight"].dequantize()), exact)
    assert_same_bits(loaded[f"{name}.bias"], parts[f"{name}_bias"][:, order])


def test_mxfp4_rows_get_scales_of_their_own_where_a_matrix_needs_them(tmp_path):
    codes, exponents = mx(3, 4, 64, low=100, high=117)
    exponents[1, 2:] += 40  # 58 powers in one matrix, 18 in each row
    parts = {f"{P}.{g}.w1.weight": codes[g].view(np.int8) for g in range(3)}
    parts |= {f"{P}.{g}.w1.scale": exponents[g].view(E8M0) for g in range(3)}
    loaded = load_checkpoint(write(tmp_path, parts), stack_experts=True)[f"{P}.w1.weight"]
    assert loaded.global_scale.shape == (3, 4)
    np.testing.assert_array_equal(np.float64(loaded.dequantize()), values(codes, exponents))


def test_mxfp4_blocks_of_zeros_bind_nothing(tmp_path):
    codes, exponents = mx(4, 64, low=120, high=130)
    codes[1, :16], exponents[1, 0] = 0x80, 0  # zeros of either sign, far out of the range
    parts = {"a.weight": codes.view(np.int8), "a.scale": exponents.view(E8M0)}
    loaded = load_checkpoint(write(tmp_path, parts))["a.weight"]
    assert loaded.global_scale.shape == ()
    exact = values(codes, exponents)
    np.testing.assert_array_equal(np.float64(loaded.dequantize()), exact)
    np.testing.assert_array_equal(np.signbit(loaded.dequantize()), np.signbit(exact))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c, e: e.__setitem__((2, 1), 255), "'a.scale' holds NaN, the first at \\[2, 1\\]"),
        (lambda c, e: e.__setitem__((2, slice(None)), (100, 118)), "'a.scale' has powers .* row 2"),
        (lambda c, e: e.__setitem__((2, slice(None)), (254, 254)), "'a.scale' has powers .* row 2"),
        (lambda c, e: e.__setitem__((2, slice(None)), (1, 1)), "'a.scale' has powers .* row 2"),
    ],
)
def test_mxfp4_without_an_exact_form_is_refused(change, expected, tmp_path):
    codes, exponents = mx(4, 64, low=120, high=125)
    change(codes, exponents)
    parts = {"a.weight": codes.view(np.int8), "a.scale": exponents.view(E8M0)}
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(write(tmp_path, parts))


# --- FP8 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
    ("suffix", "scale"),
    [
        ("weight_scale", np.full((), 0.75, np.float32)),
        ("weight_scale", np.full(1, 0.75, np.float32)),
        ("weight_scale", np.abs(normal(160, 1))),
        ("weight_scale", np.abs(normal(160))),
        ("weight_scale_inv", np.abs(normal(2, 3))),
        ("weight_scale", np.abs(normal(2, 1, 3, 1))),
        ("weight_scale", np.random.default_rng(0).integers(100, 140, (160, 9)).astype(np.uint8)),
    ],
)
def test_8_bit_layers_dequantize_on_request(suffix, scale, dtype, experts, tmp_path):
    f8 = normal(160, 288).astype(E4M3)
    tensors = {"b.weight": f8, f"b.{suffix}": scale, "b.input_scale": np.ones(1, np.float32)}
    path = write(tmp_path, tensors | modelopt("a", expert(experts, 0)))
    stored = load_checkpoint(path)
    assert_same_bits(stored["b.weight"], f8)
    assert_same_bits(stored[f"b.{suffix}"], scale)
    loaded = load_checkpoint(path, dequantize_fp8=dtype)
    assert f"b.{suffix}" not in loaded
    assert isinstance(loaded["a.weight"], Nvfp4Tensor)
    wide = np.exp2(scale.astype(np.float32) - 127) if scale.dtype == np.uint8 else scale
    wide = wide.reshape(2, 3) if wide.ndim == 4 else wide
    wide = wide[:, None] if wide.shape == (160,) else wide
    if wide.shape == (2, 3):
        wide = np.repeat(np.repeat(wide, 128, 0), 128, 1)[:160, :288]
    if wide.shape == (160, 9):
        wide = np.repeat(wide, 32, 1)
    assert_same_bits(loaded["b.weight"], (f8.astype(np.float32) * wide).astype(dtype))


def test_8_bit_layers_whose_scale_is_not_known(tmp_path):
    tensors = {"b.weight": np.ones((4, 32), E4M3), "b.weight_scale": np.ones((3, 2), np.float32)}
    path = write(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=r"'b.weight_scale' is float32\[3, 2\]"):
        load_checkpoint(path, dequantize_fp8=jnp.bfloat16)
    tensors["b.weight_scale"] = np.array(np.nan, np.float32)
    with pytest.raises(CheckpointError, match=r"'b.weight_scale' has NaN"):
        load_checkpoint(write(tmp_path, tensors), dequantize_fp8=jnp.bfloat16)


def test_a_stack_is_what_ragged_linear_takes(experts, tmp_path):
    """One call loads the weights; gate and up keep scales of their own when they are joined."""
    from jax_nvfp4 import gate_up, ragged_linear

    tensors = one_by_one(experts, bias=False)
    tensors |= {
        name.replace("up_proj", "gate_proj"): np.asarray(3 * value, value.dtype)
        if "scale_2" in name
        else value
        for name, value in tensors.items()
    }
    loaded = load_checkpoint(write(tmp_path, tensors), stack_experts=True)
    gate, up = (loaded[f"{P}.{name}_proj.weight"] for name in ("gate", "up"))
    x = jnp.asarray(normal(5, K), jnp.bfloat16)
    sizes = jnp.zeros(G, jnp.int32).at[jnp.array([1, 11])].set(jnp.array([2, 3]))
    weight = gate_up(gate, up)
    y = ragged_linear(x, weight, sizes, activation_scale=None, out_dtype=jnp.float32)
    for rows, g in ((slice(0, 2), 1), (slice(2, 5), 11)):
        dense = np.concatenate([gate.dequantize()[g], up.dequantize()[g]]).astype(np.float64)
        exact = np.float64(x[rows]) @ dense.T
        bound = 2**-18 * (np.abs(np.float64(x[rows])) @ np.abs(dense).T)
        assert np.all(np.abs(y[rows] - exact) <= bound + np.spacing(np.float32(np.abs(exact))))
