# SPDX-License-Identifier: Apache-2.0
"""What configurations, headers and markers say of a checkpoint: followed, or refused by name."""

import json

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import assert_same_bits
from safetensors.numpy import save_file

from jax_nvfp4 import Nvfp4Tensor, quantize
from jax_nvfp4.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from jax_nvfp4.layout import swizzle

E4M3 = ml_dtypes.float8_e4m3fn
LAYER = "model.diffusion_model.blocks.0.attn.q"


@pytest.fixture(scope="module")
def weight():
    return quantize(np.random.default_rng(0).standard_normal((40, 48), np.float32))


@pytest.fixture(scope="module")
def square():
    """A weight whose swizzled scales have the shape of linear ones."""
    return quantize(np.random.default_rng(1).standard_normal((128, 64), np.float32))


def modelopt(name, q):
    return {
        f"{name}.weight": np.asarray(q.data),
        f"{name}.weight_scale": np.asarray(q.block_scale),
        f"{name}.weight_scale_2": np.asarray(q.global_scale),
    }


def compressed(name, q):
    return {
        f"{name}.weight_packed": np.asarray(q.data),
        f"{name}.weight_scale": np.asarray(q.block_scale),
        f"{name}.weight_global_scale": np.asarray(1 / q.global_scale).reshape(1),
    }


def swizzled(q):
    scales = np.asarray(q.block_scale)
    rows, columns, _ = swizzle.swizzled_shape(*scales.shape)
    return np.ascontiguousarray(swizzle.swizzle(scales)).reshape(rows * 128, columns * 4)


def high_first(q):
    data = np.asarray(q.data)
    return (data << 4) | (data >> 4)


def comfy(name, q):
    parts = modelopt(name, q)
    return parts | {f"{name}.weight": high_first(q), f"{name}.weight_scale": swizzled(q)}


def marker(**content):
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


def folder(path, tensors, config=None, hf=None, metadata=None):
    save_file(tensors, path / "model.safetensors", metadata=metadata)
    for name, content in (("config.json", config), ("hf_quant_config.json", hf)):
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


def refuse(path, *parts):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path)
    for part in parts:
        assert part in str(caught.value), caught.value


# --- the order of bytes ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["weight", "square"])
@pytest.mark.parametrize("how", ["marker", "header", "header without prefix"])
def test_comfyui_files_load_to_their_values(shape, how, tmp_path, request):
    q = request.getfixturevalue(shape)
    tensors, metadata = comfy(LAYER, q), None
    if how == "marker":
        tensors[f"{LAYER}.comfy_quant"] = marker(format="nvfp4", full_precision_matrix_mult=False)
    else:
        name = LAYER if how == "header" else LAYER.removeprefix("model.diffusion_model.")
        layers = {name: {"format": "nvfp4"}}
        metadata = {"_quantization_metadata": json.dumps({"layers": layers})}
    loaded = load_checkpoint(folder(tmp_path, tensors, metadata=metadata))
    assert list(loaded) == [f"{LAYER}.weight"]  # the marker says nothing of what is returned
    assert_same_bits(loaded[f"{LAYER}.weight"], q)
    save_checkpoint(tmp_path / "saved", loaded)
    assert_same_bits(load_checkpoint(tmp_path / "saved")[f"{LAYER}.weight"], q)


@pytest.mark.parametrize("where", ["top", "text_config", "header", "hf_quant_config"])
@pytest.mark.parametrize(
    ("keys", "scales_swizzled", "nibbles_swapped"),
    [
        ({"weight_scale_layout": "swizzled", "swap_weight_nibbles": True}, True, True),
        ({"checkpoint_weight_scale_layout": "swizzled"}, True, False),
        ({"swap_weight_nibbles": True, "weight_scale_layout": "LINEAR"}, False, True),
        ({"swap_weight_nibbles": False, "weight_scale_layout": "linear"}, False, False),
    ],
)
def test_order_that_a_configuration_names(
    where, keys, scales_swizzled, nibbles_swapped, square, tmp_path
):
    tensors = modelopt("a", square)
    if scales_swizzled:
        tensors["a.weight_scale"] = swizzled(square)
    if nibbles_swapped:
        tensors["a.weight"] = high_first(square)
    content = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16} | keys
    inner = {"quantization_config": content}
    more = {
        "top": {"config": inner},
        "text_config": {"config": {"text_config": inner}},
        "header": {"metadata": {"quantization_config": json.dumps(content)}},
        "hf_quant_config": {"hf": {"quantization": content}},
    }[where]
    assert_same_bits(load_checkpoint(folder(tmp_path, tensors, **more))["a.weight"], square)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"weight_scale_layout": "tiled"}, "weight_scale_layout is 'tiled'"),
        ({"swap_weight_nibbles": "yes"}, "swap_weight_nibbles must be a boolean"),
        ({"weight_nibble_order": "high_first"}, "weight_nibble_order = 'high_first'"),
        ({"is_swizzled_scales": True}, "is_swizzled_scales = True"),
        ({"rotation": {"type": "hadamard"}}, "rotation = "),
    ],
)
def test_order_that_is_not_known(keys, expected, square, tmp_path):
    content = {"quant_method": "modelopt", "quant_algo": "NVFP4"} | keys
    config = {"quantization_config": content}
    refuse(folder(tmp_path, modelopt("a", square), config), "quantization_config", expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"format": "nvfp4", "convrot": True}, "convrot = True"),
        ({"format": "nvfp4", "params": {"convrot": True}}, "convrot = True"),
        ({"format": "convrot_w4a4"}, "'convrot_w4a4'"),
        ([1], "expected a JSON object"),
    ],
)
def test_markers_that_mean_something_else(content, expected, square, tmp_path):
    tensors = comfy(LAYER, square)
    blob = np.frombuffer(json.dumps(content).encode(), np.uint8)
    path = folder(tmp_path, tensors | {f"{LAYER}.comfy_quant": blob})
    refuse(path, LAYER, expected)


def test_order_that_cannot_be_told(square, weight, tmp_path):
    """One layer is marked and another is not; two producers' words; the authors' bare names."""
    for i, (tensors, more, expected) in enumerate(
        [
            (
                comfy("a", square)
                | {"a.comfy_quant": marker(format="nvfp4")}
                | modelopt("b", square),
                {},
                "layer 'b' is not among",
            ),
            (
                modelopt("a", square),
                {
                    "metadata": {
                        "_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}',
                        "quantization_config": '{"quant_algo": "NVFP4"}',
                    }
                },
                "layer 'a': the header describes it twice",
            ),
            (
                modelopt("double_blocks.0.img_attn.qkv", square),
                {},
                "this one does not say in which",
            ),
        ]
    ):
        (tmp_path / str(i)).mkdir()
        refuse(folder(tmp_path / str(i), tensors, **more), expected)
    more["metadata"] = {
        "_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}',
        "quantization_config": '{"quant_algo": "NVFP4"}',
    }
    (tmp_path / "linear").mkdir()  # no whole tiles: row by row for certain
    path = folder(tmp_path / "linear", modelopt("a", weight), **more)
    assert_same_bits(load_checkpoint(path)["a.weight"], weight)


def test_markers_are_not_saved_with_weights_in_another_order(weight, tmp_path):
    tensors = {"a.weight": weight, "a.comfy_quant": marker(format="nvfp4")}
    with pytest.raises(ValueError, match=r"'a\.comfy_quant' marks a layer"):
        save_checkpoint(tmp_path / "out", tensors)
    assert not (tmp_path / "out").exists()


# --- descriptions ----------------------------------------------------------------------------

ARGS = {"num_bits": 4, "type": "float", "group_size": 16, "strategy": "tensor_group"}


def description(**more):
    groups = {"g": {"targets": ["Linear"], "weights": ARGS}}
    content = {"quant_method": "compressed-tensors", "config_groups": groups}
    return content | {"format": "nvfp4-pack-quantized"} | more


def test_a_weight_that_was_left_beside_its_quantized_form(weight, tmp_path):
    tensors = compressed("a", weight) | {"a.weight": np.ones((40, 48), np.float32)}
    refuse(folder(tmp_path, tensors), "tensor 'a.weight' is there twice")


def test_block_scales_as_plain_bytes_are_no_plain_tensors(weight, tmp_path):
    tensors = modelopt("a", weight)
    tensors["a.weight_scale"] = tensors["a.weight_scale"].view(np.uint8)
    del tensors["a.weight_scale_2"]
    refuse(folder(tmp_path, tensors), "'a.weight_scale_2' is missing")


def test_flat_file_of_modelopt(weight, tmp_path):
    refuse(folder(tmp_path, modelopt("a", weight), hf={"quant_algo": "W4A8"}), "'W4A8'")


def test_configurations_nested_without_end(weight, tmp_path):
    """Deep, and not too deep for the parser."""
    path = folder(tmp_path, modelopt("a", weight))
    for depth in (150, 900):
        for opening, closing in (('{"a":', "}"), ("[", "]")):
            text = opening * depth + "1" + closing * depth
            (path / "config.json").write_text(f'{{"b": {text}}}')
            refuse(path, "config.json", "nested too deep")


def test_descriptions_in_lists(weight, tmp_path):
    config = {"models": [{"quantization_config": description(transform_config={"a": 1})}]}
    refuse(folder(tmp_path, compressed("a", weight), config), "transform_config")


@pytest.mark.parametrize("wrap", ["text_config", "llm_config", "thinker_config.text_config"])
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_descriptions_of_composite_models(wrap, key, weight, tmp_path):
    config = {key: description()}
    for name in reversed(wrap.split(".")):
        config = {"model_type": "composite", name: config}
    path = folder(tmp_path, compressed("a", weight), config)
    assert isinstance(load_checkpoint(path)["a.weight"], Nvfp4Tensor)
    save_checkpoint(tmp_path / "out", load_checkpoint(path), config=config)
    written = (tmp_path / "out" / "config.json").read_text()
    assert written.count("quant_method") == 1
    assert key not in json.loads(written)[wrap.split(".")[0]]
    config["vision_config"] = {"quantization_config": {"quant_method": "gptq"}}
    refuse(folder(tmp_path, compressed("a", weight), config), "vision_config", "differ")


@pytest.mark.parametrize(
    ("tensors", "config", "hf", "expected"),
    [
        (modelopt, {"quantization_config": description()}, None, "'a.weight'"),
        (compressed, None, {"quantization": {"quant_algo": "NVFP4"}}, "'a.weight_packed'"),
        (
            modelopt,
            {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}},
            {"quantization": {"quant_algo": "NVFP4"}},
            "'NVFP4_AWQ'",
        ),
        (
            modelopt,
            {"quantization_config": {"quant_method": "gptq"}},
            {"quantization": {"quant_algo": "NVFP4"}},
            "'gptq'",
        ),
        (
            modelopt,
            None,
            {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}},
            "'a.weight'",
        ),
    ],
)
def test_configurations_and_names_that_disagree(tensors, config, hf, expected, weight, tmp_path):
    refuse(folder(tmp_path, tensors("a", weight), config, hf), expected)


@pytest.mark.parametrize("parts", [modelopt, compressed])
@pytest.mark.parametrize("lost", ["global", "global and data", "data"])
def test_parts_that_were_lost_without_a_configuration(parts, lost, weight, tmp_path):
    tensors = parts("a", weight)
    for name in list(tensors):
        is_global = name.endswith(("scale_2", "global_scale"))
        is_data = name in ("a.weight", "a.weight_packed")
        if ("global" in lost and is_global) or ("data" in lost and is_data):
            del tensors[name]
    refuse(folder(tmp_path, tensors), "tensor 'a.", "is missing")


def test_formats_as_lists(weight, tmp_path):
    for content, good in [
        (description(format=["nvfp4-pack-quantized"]), True),
        (description(format=["nvfp4-pack-quantized"] * 2), False),
        (description(format={"a": 1}), False),
    ]:
        path = folder(tmp_path, compressed("a", weight), {"quantization_config": content})
        if good:
            assert isinstance(load_checkpoint(path)["a.weight"], Nvfp4Tensor)
        else:
            refuse(path, "config.json", "format must be a string")


# --- round trips -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "hf", "expected"),
    [
        (None, {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}, "FP8"),
        (None, {"quant_algo": "NVFP4", "kv_cache_quant_algo": "NVFP4"}, "NVFP4"),
        (description(kv_cache_scheme={"num_bits": 8, "type": "float"}), None, "FP8"),
    ],
)
def test_kv_cache_is_described_as_it_was(config, hf, expected, weight, tmp_path):
    tensors = (compressed if config else modelopt)("a", weight)
    more = {"config": {"quantization_config": config} if config else None}
    more["hf"] = {"quantization": hf} if hf else None
    path = folder(tmp_path, tensors, **more)  # no scales: a producer leaves those of 1 out
    loaded = load_checkpoint(path)
    assert loaded.kv_cache_quant_algo == expected
    for i, saved in enumerate((loaded, dict(loaded))):
        options = {} if i == 0 else {"kv_cache_quant_algo": expected}
        save_checkpoint(tmp_path / str(i), saved, **options)
        assert load_checkpoint(tmp_path / str(i)).kv_cache_quant_algo == expected


def test_kv_cache_alone(tmp_path):
    hf = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "FP8"}}
    tensors = {
        "k_proj.weight": np.ones((4, 32), np.float32),
        "k_proj.k_scale": np.ones((), np.float32),
    }
    loaded = load_checkpoint(folder(tmp_path, tensors, hf=hf))
    save_checkpoint(tmp_path / "out", loaded)
    again = load_checkpoint(tmp_path / "out")
    assert set(again) == set(tensors)
    assert again.kv_cache_quant_algo == "FP8"


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (np.ones((), np.float32), "FP8"),
        (np.ones(1, np.float32), "FP8"),
        (np.ones(160, np.float32), "FP8_PER_CHANNEL_PER_TOKEN"),
        (np.ones((160, 1), ml_dtypes.bfloat16), "FP8_PER_CHANNEL_PER_TOKEN"),
        (np.ones((2, 3), np.float32), "FP8_PB_WO"),
        (np.ones((2, 1, 3, 1), np.float32), "FP8_PB_WO"),
        (np.full((160, 10), 127, np.uint8), "MXFP8"),
        (np.ones((160, 10), ml_dtypes.float8_e8m0fnu), "MXFP8"),
        (np.ones((2, 3), np.int32), None),
        (np.ones((3, 2), np.float32), None),
    ],
)
@pytest.mark.parametrize("suffix", ["weight_scale", "weight_scale_inv"])
def test_8_bit_layers_are_described_as_what_they_are(suffix, scale, expected, weight, tmp_path):
    f8 = np.ones((160, 320), E4M3)
    tensors = {"a.weight": weight, "b.weight": f8, f"b.{suffix}": scale}
    out = tmp_path / "out"
    if expected is None:
        with pytest.raises(ValueError, match=f"'b.{suffix}' is .* no algorithm with such scales"):
            save_checkpoint(out, tensors)
        assert not out.exists()
        return
    save_checkpoint(out, tensors | {"b.input_scale": np.ones(1, np.float32)})
    details = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert details["quantized_layers"]["b"]["quant_algo"] == expected
    assert_same_bits(load_checkpoint(out)[f"b.{suffix}"], scale)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"a.input_scale": np.float32(np.nan)}, "'a.input_scale' is nan"),
        ({"a.input_scale": np.float32(-1)}, "'a.input_scale' is -1"),
        ({"a.input_scale": np.ones(2, np.float32)}, "must be a float32 scalar"),
        ({"a.pre_quant_scale": np.zeros(48, np.float32)}, "'a.pre_quant_scale' is 0"),
        ({"a.pre_quant_scale": np.ones(47, np.float32)}, "'a.pre_quant_scale' must have shape"),
        ({"b.weight": np.ones((4, 8), np.uint8)}, "'b.weight' would be read as a part of"),
        ({"b.weight_scale_2": np.float32(1)}, "'b.weight_scale_2' would be read"),
        ({"b.weight_packed": np.ones((4, 8), np.uint8)}, "'b.weight_packed' would be read"),
    ],
)
@pytest.mark.parametrize("as_pairs", [False, True])
def test_what_load_would_refuse_is_not_saved(as_pairs, extra, expected, weight, tmp_path):
    tensors = {"a.weight": weight} | extra
    with pytest.raises(ValueError, match=expected):
        save_checkpoint(tmp_path / "out", iter(tensors.items()) if as_pairs else tensors)
    assert not (tmp_path / "out").exists()


def test_cast_weights_are_refused(weight, tmp_path):
    import jax

    for part in (0, 1, 2):
        leaves, tree = jax.tree.flatten(weight)
        leaves[part] = leaves[part].astype(ml_dtypes.bfloat16)
        with pytest.raises(TypeError, match=r"'a.weight': .* must be an array of"):
            save_checkpoint(tmp_path / "out", {"a.weight": jax.tree.unflatten(tree, leaves)})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_the_name_of_a_file_is_no_folder(name, weight, tmp_path):
    with pytest.raises(ValueError, match="the path of a folder is expected"):
        save_checkpoint(tmp_path / name, {"a.weight": weight})
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="not a folder"):
        save_checkpoint(tmp_path / "file", {"a.weight": weight})
