# SPDX-License-Identifier: Apache-2.0
"""Every kind of damaged or unsupported checkpoint is refused, by the name of what is wrong."""

import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from checkpoint_helpers import DATA, changed_copy, edit_json

from jax_nvfp4.checkpoint import CheckpointError, load_checkpoint

X = "model.layers.0.mlp.up_proj"
MODELOPT, COMPRESSED = "modelopt_nvfp4", "compressed_tensors_nvfp4"
GLOBAL = {MODELOPT: "weight_scale_2", COMPRESSED: "weight_global_scale"}
DATA_PART = {MODELOPT: "weight", COMPRESSED: "weight_packed"}
INPUT = {MODELOPT: "input_scale", COMPRESSED: "input_global_scale"}
BOTH = pytest.mark.parametrize("fixture", [MODELOPT, COMPRESSED])


def refuse(path, *parts: str, error: type[Exception] = CheckpointError) -> str:
    """Loads, expects an error of one line with these parts in it, and returns it."""
    with pytest.raises(error) as caught:
        load_checkpoint(path)
    message = str(caught.value)
    for part in parts:
        assert part in message, message
    return message


def with_change(fixture, tmp_path, change):
    return changed_copy(fixture, tmp_path / "model", change)


@BOTH
@pytest.mark.parametrize("part", ["data", "weight_scale", "global"])
def test_missing_partner(fixture, part, tmp_path):
    part = {"data": DATA_PART[fixture], "global": GLOBAL[fixture]}.get(part, part)
    path = with_change(fixture, tmp_path, lambda tensors: tensors.pop(f"{X}.{part}"))
    refuse(path, f"tensor '{X}.{part}' is missing")


@BOTH
@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("data", lambda t: t.astype(np.int8), "expected uint8"),
        ("data", lambda t: t.view(ml_dtypes.float8_e4m3fn), "expected uint8"),
        ("data", lambda t: t[:, :-1], "K a multiple of 16"),
        ("data", lambda t: t[:-1], "expected float8_e4m3fn[47, 2]"),
        ("data", lambda t: t.reshape(-1), "expected uint8"),
        ("weight_scale", lambda t: t.view(np.uint8), "expected float8_e4m3fn"),
        ("weight_scale", lambda t: t.astype(np.float32), "expected float8_e4m3fn"),
        ("weight_scale", lambda t: t[:-1], "expected float8_e4m3fn[48, 2]"),
        ("weight_scale", lambda t: t.T, "expected float8_e4m3fn[48, 2]"),
        ("global", lambda t: t.astype(ml_dtypes.bfloat16), "expected float32"),
        ("global", lambda t: np.repeat(t.reshape(1), 2), "expected float32"),
        ("input", lambda t: t.astype(np.float64), "expected float32"),
        ("input", lambda t: np.repeat(t.reshape(1), 2), "expected float32"),
    ],
)
def test_wrong_shape_or_dtype(fixture, part, change, expected, tmp_path):
    named = {"data": DATA_PART, "global": GLOBAL, "input": INPUT}.get(part)
    name = f"{X}.{named[fixture] if named else part}"

    def damage(tensors):
        tensors[name] = np.asarray(change(tensors[name]), order="C")

    path = with_change(fixture, tmp_path, damage)
    blamed = f"{X}.weight_scale" if expected.endswith("[47, 2]") else name
    refuse(path, f"tensor {blamed!r} is ", expected)


@BOTH
@pytest.mark.parametrize("part", ["global", "input"])
@pytest.mark.parametrize("value", [np.nan, 0.0, -0.0, -1.0, np.inf, -np.inf, 1e-40, 1e34])
def test_bad_global_scale(fixture, part, value, tmp_path):
    name = f"{X}.{ {'global': GLOBAL, 'input': INPUT}[part][fixture] }"

    def damage(tensors):
        tensors[name] = np.full_like(tensors[name], value)

    refuse(with_change(fixture, tmp_path, damage), f"tensor {name!r} is {np.float32(value)}")


@BOTH
@pytest.mark.parametrize("byte", [0x7F, 0xFF, 0x80, 0xB8])
def test_bad_block_scale(fixture, byte, tmp_path):
    name = f"{X}.weight_scale"

    def damage(tensors):
        tensors[name].view(np.uint8)[5, 1] = byte

    path = with_change(fixture, tmp_path, damage)
    refuse(path, f"tensor {name!r}", "1 NaN or negative block scales", "[5, 1]")


def test_zero_block_scale_is_a_block_of_zeros(tmp_path):
    def zero(tensors):
        tensors[f"{X}.weight_scale"].view(np.uint8)[5, 1] = 0

    weight = load_checkpoint(with_change(MODELOPT, tmp_path, zero))[f"{X}.weight"]
    assert not np.any(weight.dequantize()[5, 16:])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t[:-1], "expected bfloat16[48]"),
        (lambda t: t.view(np.uint16), "expected bfloat16"),
        (lambda t: t * np.nan, "is nan at [0]"),
        (lambda t: -t, "at [0]; a scale must be positive"),
        (lambda t: t * 0, "is 0.0 at [0]"),
    ],
)
def test_bad_pre_quant_scale(change, expected, tmp_path):
    name = "model.layers.0.mlp.down_proj.pre_quant_scale"

    def damage(tensors):
        tensors[name] = change(tensors[name])

    refuse(with_change("modelopt_nvfp4_awq", tmp_path, damage), f"tensor {name!r}", expected)


@pytest.mark.parametrize("algorithm", ["FP8", "W4A8_NVFP4_FP8", "NVFP5", None])
@pytest.mark.parametrize("file", ["hf_quant_config.json", "config.json"])
def test_unknown_algorithm(algorithm, file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / MODELOPT, folder)
    if file == "config.json":
        (folder / "hf_quant_config.json").unlink()
    key = "quantization" if file == "hf_quant_config.json" else "quantization_config"
    edit_json(folder / file, lambda config: config[key].update(quant_algo=algorithm))
    refuse(folder, file, f"quant_algo {algorithm!r} is not supported")


def test_wrong_group_size(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / MODELOPT, folder)
    edit_json(folder / "hf_quant_config.json", lambda c: c["quantization"].update(group_size=32))
    refuse(folder, "group_size 32")


def test_layer_with_another_4_bit_algorithm(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / "modelopt_mixed_precision", folder)

    def relabel(config):
        config["quantization"]["quantized_layers"][X]["quant_algo"] = "W4A8_NVFP4_FP8"

    edit_json(folder / "hf_quant_config.json", relabel)
    refuse(folder, f"layer {X!r} is packed with quant_algo 'W4A8_NVFP4_FP8'")
    others = load_checkpoint(folder, where=lambda key: not key.startswith(X))
    assert "model.layers.0.mlp.gate_proj.weight" in others


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_method": "gptq"}, "quant_method 'gptq' is not supported"),
        ({"quantization_status": "frozen"}, "quantization_status 'frozen'"),
        ({"config_groups": ["Linear"]}, "config_groups must be an object, got ['Linear']"),
        ({"config_groups": {"group_0": 1}}, "group_0 must be an object, got 1"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "transform_config"),
        ({"sparsity_config": {"format": "sparse-bitmask"}}, "'sparse-bitmask'"),
    ],
)
def test_unsupported_configuration(change, expected, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / COMPRESSED, folder)
    edit_json(folder / "config.json", lambda c: c["quantization_config"].update(change))
    refuse(folder, "config.json", expected)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("format", "mxfp4-pack-quantized", "format 'mxfp4-pack-quantized' is not supported"),
        ("format", "float-quantized", "no layer in the format 'nvfp4-pack-quantized'"),
        ("weights", {"num_bits": 8}, "weights.num_bits is 8, expected 4"),
        ("weights", {"group_size": 32}, "weights.group_size is 32, expected 16"),
        ("weights", {"symmetric": False}, "weights.symmetric is False"),
    ],
)
def test_unsupported_compressed_tensors_group(field, value, expected, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / COMPRESSED, folder)

    def change(config):
        group = config["quantization_config"]["config_groups"]["group_0"]
        group[field] = value

    edit_json(folder / "config.json", change)
    refuse(folder, expected)


@pytest.mark.parametrize("file", ["config.json", "hf_quant_config.json"])
@pytest.mark.parametrize(
    "content",
    ["{", "[]", "\xff\xfe", '{"quantization_config": "x", "quantization": [1]}'],
)
def test_broken_json(file, content, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / MODELOPT, folder)
    (folder / file).write_bytes(content.encode("latin-1"))
    refuse(folder, file)


# --- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.7, 0.999])
def test_truncated_file(fraction, tmp_path):
    source = DATA / MODELOPT / "model.safetensors"
    path = tmp_path / "model.safetensors"
    content = source.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    if fraction == 0.05:  # in the middle of the header
        refuse(path, "model.safetensors", "header")
    else:
        message = refuse(path, "model.safetensors: truncated in tensor '")
        name = re.search("tensor '(.*)'", message)[1]
        size = int.from_bytes(content[:8], "little")
        start, end = json.loads(content[8 : 8 + size])[name]["data_offsets"]
        cut = int(len(content) * fraction) - 8 - size
        assert start <= cut < end


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, b"not safetensors at all" * 10])
def test_not_a_safetensors_file(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refuse(path, "model.safetensors")


def test_malformed_header(tmp_path):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    refuse(path, "model.safetensors: ", "header")


def test_pointer_of_git_lfs(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refuse(tmp_path, "model.safetensors: a pointer of Git LFS")


def test_file_cut_after_it_was_opened(tmp_path):
    from jax_nvfp4.checkpoint import iter_checkpoint

    path = tmp_path / "model.safetensors"
    shutil.copy(DATA / MODELOPT / "model.safetensors", path)
    tensors = iter_checkpoint(path)
    with open(path, "r+b") as f:
        f.truncate(path.stat().st_size - 8)
    with pytest.raises(CheckpointError, match=r"truncated in tensor '.*bytes are there"):
        list(tensors)


@pytest.fixture
def sharded(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / "modelopt_w4a16_nvfp4", folder)
    return folder


INDEX = "model.safetensors.index.json"


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refuse(
        sharded,
        "model-00002-of-00002.safetensors: missing shard",
        "tensor 'model.layers.0.self_attn.o_proj.weight_scale'",
        error=FileNotFoundError,
    )


def test_missing_index(sharded):
    (sharded / INDEX).unlink()
    refuse(sharded, "shards (model-00001-of-00002.safetensors) and no index")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    refuse(sharded, "shards (model-00001-of-00002.safetensors) and no index")


def test_index_names_a_tensor_that_is_not_in_the_shard(sharded):
    name = "model-00001-of-00002.safetensors"
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"no.such.weight": name}))
    refuse(sharded, f"{name}: tensor 'no.such.weight', which the index names, is not there")


def test_index_names_the_wrong_shard(sharded):
    name = "model-00001-of-00002.safetensors"
    edit_json(sharded / INDEX, lambda i: i["weight_map"].update({"model.norm.weight": name}))
    refuse(sharded, f"{name}: tensor 'model.norm.weight'")


@pytest.mark.parametrize("value", [{"a": "../escape.safetensors"}, {"a": 1}, [], None])
def test_malformed_index(sharded, value):
    edit_json(sharded / INDEX, lambda i: i.update(weight_map=value))
    refuse(sharded, INDEX, "weight_map")


def test_two_indexes_of_the_same_shards(sharded):
    shutil.copy(sharded / INDEX, sharded / "other.safetensors.index.json")
    refuse(sharded, "more than one index")
    assert load_checkpoint(sharded / INDEX)  # the one that is meant may be named


def test_index_and_file_of_one_name(sharded):
    shutil.copy(DATA / MODELOPT / "model.safetensors", sharded)
    refuse(sharded, "two checkpoints, model.safetensors.index.json and model.safetensors")
    assert load_checkpoint(sharded / INDEX)


def test_index_of_some_shards_only(sharded):
    shard = "model-00001-of-00002.safetensors"
    edit_json(
        sharded / INDEX,
        lambda i: i.update(weight_map={k: v for k, v in i["weight_map"].items() if v == shard}),
    )
    refuse(sharded, INDEX, "names 1 shards of the 2")


def test_tensors_that_the_index_leaves_out_are_read(sharded):
    """Converters that add scales often leave the index as it was."""
    whole = load_checkpoint(sharded)
    edit_json(
        sharded / INDEX,
        lambda i: i.update(
            weight_map={k: v for k, v in i["weight_map"].items() if "scale" not in k}
        ),
    )
    assert list(load_checkpoint(sharded)) == list(whole)


def test_index_without_tensors(sharded):
    edit_json(sharded / INDEX, lambda i: i.update(weight_map={}))
    refuse(sharded, INDEX, "names no tensor")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "hf_quant_config.json"])
def test_json_nested_without_end(file, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(DATA / MODELOPT, folder)
    text = b"[" * 200_000
    if file == "model.safetensors":
        text = len(text).to_bytes(8, "little") + text
    (folder / file).write_bytes(text)
    refuse(folder, file)


def test_truncated_shard(sharded):
    path = sharded / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refuse(sharded, "model-00001-of-00002.safetensors: truncated in tensor '")


def test_nothing_there(tmp_path):
    refuse(tmp_path, "no safetensors file", error=FileNotFoundError)
    refuse(tmp_path / "nowhere", "no such file or folder", error=FileNotFoundError)
