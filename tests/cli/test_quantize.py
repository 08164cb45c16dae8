# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 quantize`: what it writes, and that a killed run can be finished."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoint_helpers import DATA, assert_same_bits, edit_json, raw_tensors, write_model
from safetensors.numpy import save_file
from test_cli import exit_code

from jax_nvfp4 import Nvfp4Tensor, quantize
from jax_nvfp4.calibration import Calibration, InputStatistics
from jax_nvfp4.checkpoint import CheckpointError, convert, load_checkpoint


@pytest.fixture
def source(tmp_path):
    write_model(tmp_path / "source")
    return tmp_path / "source"


def run(*arguments: object) -> int:
    return exit_code("quantize", *map(str, arguments))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


LINEARS = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(3) for p in ("up", "down")]


@pytest.mark.parametrize("shards", [1, 3])
def test_quantizes_linears_and_leaves_the_rest(shards, tmp_path, capsys):
    tensors = write_model(tmp_path / "source", shards=shards)
    assert run(tmp_path / "source", tmp_path / "out") == 0
    loaded = load_checkpoint(tmp_path / "out")
    assert set(loaded) == set(tensors)
    linears = LINEARS[: 2 * shards]
    for key, value in tensors.items():
        if key in linears:
            assert isinstance(loaded[key], Nvfp4Tensor)
            assert_same_bits(loaded[key], quantize(value))
        else:
            assert_same_bits(loaded[key], value)

    out = capsys.readouterr().out
    for key in linears:
        error = np.linalg.norm(tensors[key] - np.asarray(loaded[key].dequantize()))
        error /= np.linalg.norm(tensors[key].astype(np.float32))
        row = next(line for line in out.splitlines() if key.removesuffix(".weight") in line)
        assert f"{error:.4f}" in row
        assert 0.05 < error < 0.15
    assert f"{len(linears)} layers quantized" in out
    assert "1 left alone: matches '*embed*'" in out
    assert "1 left alone: matches '*lm_head*'" in out
    assert "1 left alone: K = 24 is not a multiple of 16" in out
    assert "odd.weight: K = 24 is not a multiple of 16, left alone" in out
    assert "1 left alone: 3-D" in out
    assert f"{len(tensors)} tensors" in out


def test_writes_a_modelopt_folder(source, tmp_path):
    assert run(source, tmp_path / "out") == 0
    out = tmp_path / "out"
    assert set(files(out)) == {
        *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
        "config.json",
        "hf_quant_config.json",
        "tokenizer.json",
        "1_Pooling/config.json",
    }
    details = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert details == {
        "quant_algo": "W4A16_NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["conv", "lm_head", "model.embed_tokens", "odd"],
    }
    config = json.loads((out / "config.json").read_text())
    assert config["hidden_size"] == 64
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["quantization_config"]["ignore"] == details["exclude_modules"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    raw = raw_tensors(out)
    assert set(index["weight_map"]) == set(raw)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in raw.values())
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    ("options", "quantized"),
    [
        (["--skip", "*.layers.0.*", "--skip", "*DOWN*"], LINEARS[2::2]),
        (["--only", "*layers.1*"], LINEARS[2:4]),
        (["--only", "*up_proj*", "--skip", "*layers.2.*"], LINEARS[0:3:2]),
        (["--no-default-skip", "--only", "*lm_head*"], ["lm_head.weight"]),
    ],
)
def test_globs(options, quantized, source, tmp_path):
    assert run(source, tmp_path / "out", *options) == 0
    loaded = load_checkpoint(tmp_path / "out")
    assert {key for key, t in loaded.items() if isinstance(t, Nvfp4Tensor)} == set(quantized)


def test_nothing_to_quantize_is_refused_before_anything_is_copied(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--only", "nothing") == 2
    assert re.search("nothing to quantize .*: not selected", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_zero_weight(tmp_path):
    (tmp_path / "source").mkdir()
    save_file({"a.weight": np.zeros((4, 32), np.float32)}, tmp_path / "source/model.safetensors")
    assert run(tmp_path / "source", tmp_path / "out") == 0
    assert not np.any(load_checkpoint(tmp_path / "out")["a.weight"].dequantize())


# --- killed and finished ---------------------------------------------------------------------


def start(source: Path, destination: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "jax_nvfp4", "quantize", source, destination]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def test_kill_and_finish(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_model(source, shards=12, size=512)
    process = start(source, out)
    first = out / "model-00001-of-00012.safetensors"
    while not first.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err

    there = set(files(out))
    assert first.name in there
    assert not {"config.json", "hf_quant_config.json", "model.safetensors.index.json"} & there
    with pytest.raises(CheckpointError, match="unfinished"):
        load_checkpoint(out)

    finished = {
        path.name: path.stat().st_mtime_ns
        for path in out.glob("*.safetensors")
        if (out / ".quantize" / f"{path.name}.json").exists()
    }
    assert len(finished) < 12
    assert run(source, out) == 0
    assert run(source, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")
    for name, written in finished.items():
        assert (out / name).stat().st_mtime_ns == written


class Killed(BaseException):
    """Stands for the end of the process: nothing in the program catches it."""


def stop_at_write(monkeypatch, fatal: int) -> None:
    """Ends the run in place of the n-th time that a file gets its name."""
    from jax_nvfp4.checkpoint import files as module

    commit, left = module.commit, iter(range(fatal))

    def end(temporary, path):
        if next(left, None) is None:
            raise Killed
        commit(temporary, path)

    monkeypatch.setattr(module, "commit", end)
    monkeypatch.setattr(convert, "commit", end)


def test_stopped_at_any_write_it_never_looks_whole_and_can_be_finished(source, tmp_path):
    fresh = tmp_path / "fresh"
    assert run(source, fresh) == 0
    for fatal in range(100):
        out = tmp_path / str(fatal)
        with pytest.MonkeyPatch.context() as patch:
            stop_at_write(patch, fatal)
            try:
                assert run(source, out) == 0
                break
            except Killed:
                pass
        assert not (out / "config.json").exists()
        with pytest.raises((CheckpointError, FileNotFoundError)):
            load_checkpoint(out)
        assert run(source, out) == 0
        assert files(out) == files(fresh)
    # run.json; a shard and its record, three times; two other files; index; two configurations
    assert fatal == 1 + 3 * 2 + 2 + 1 + 2
    assert files(out) == files(fresh)


@pytest.fixture
def stopped(source, tmp_path, monkeypatch):
    """A run that ended when two of three shards were finished."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        stop_at_write(patch, 1 + 2 * 2)
        with pytest.raises(Killed):
            run(source, out)
    assert len(list(out.glob("*.safetensors"))) == 2
    return out


def test_a_damaged_shard_is_made_again(stopped, source, tmp_path):
    one, two = sorted(stopped.glob("*.safetensors"))
    kept, content = one.stat().st_mtime_ns, bytearray(two.read_bytes())
    content[-1] ^= 1
    two.write_bytes(content)
    assert run(source, stopped) == 0
    assert run(source, tmp_path / "fresh") == 0
    assert files(stopped) == files(tmp_path / "fresh")
    assert one.stat().st_mtime_ns == kept


def test_an_unfinished_run_of_something_else_is_refused(stopped, source, capsys):
    assert run(source, stopped, "--skip", "*up*") == 2
    assert "unfinished run" in capsys.readouterr().err
    shard = source / "model-00003-of-00003.safetensors"
    os.utime(shard, ns=(0, 0))  # the source changed
    assert run(source, stopped) == 2
    assert "unfinished run" in capsys.readouterr().err


# --- bad input -------------------------------------------------------------------------------


def refused(capsys, *arguments) -> str:
    """Runs, expects exit code 2 and one line on stderr, and returns it."""
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "error: " in line]
    assert out == ""
    assert len(lines) == 1
    assert err.rstrip().endswith(lines[0])
    assert lines[0].startswith("jax_nvfp4 quantize: error: ")
    return lines[0]


def test_source_that_does_not_exist(tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, tmp_path / "no", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_without_weights(tmp_path, capsys):
    assert "no safetensors file" in refused(capsys, tmp_path, tmp_path / "x" / "out")


def test_source_that_is_quantized_already(tmp_path, capsys):
    for name in ("modelopt_nvfp4", "compressed_tensors_nvfp4"):
        assert "quantized already" in refused(capsys, DATA / name, tmp_path / "out")


def test_source_with_transposed_layers(source, tmp_path, capsys):
    edit_json(source / "config.json", lambda config: config.update(model_type="gpt2"))
    assert "'gpt2'" in refused(capsys, source, tmp_path / "out")


def test_truncated_source(source, tmp_path, capsys):
    path = source / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated in tensor 'model.layers.1" in refused(capsys, source, tmp_path / "out")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weight_with_a_bad_value(value, source, tmp_path, capsys):
    path = source / "model-00003-of-00003.safetensors"
    tensors = raw_tensors(path)
    tensors[LINEARS[-1]][7, 9] = value
    save_file(tensors, path)
    message = refused(capsys, source, tmp_path / "out")
    assert f"{path}: tensor {LINEARS[-1]!r} holds NaN or Inf" in message
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "out")


def test_destination_that_is_in_use(source, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert "not empty" in refused(capsys, source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == [tmp_path / "out" / "thesis.tex"]


def test_destination_inside_the_source(source, capsys):
    for destination in (source, source / "out"):
        assert "must lie outside the source" in refused(capsys, source, destination)


def test_destination_that_cannot_be_written(source, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "not a folder" in refused(capsys, source, tmp_path / "file")
    assert "file" in refused(capsys, source, tmp_path / "file" / "out")


def test_finished_destination(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    before = files(tmp_path / "out")
    capsys.readouterr()
    assert "not empty" in refused(capsys, source, tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_destination_with_the_name_of_a_file(source, tmp_path, capsys):
    assert "a folder, not a file" in refused(capsys, source, tmp_path / "out.safetensors")


# --- what lies beside the shards, and what is said of it --------------------------------------


def test_one_file_takes_nothing_else_along(source, tmp_path):
    file = source / "model-00002-of-00003.safetensors"
    out = source / "out"  # beside the file: only a folder as source must not hold its destination
    assert run(file, out) == 0
    assert set(files(out)) == {file.name, "config.json", "hf_quant_config.json"}


def test_weights_in_subfolders(source, tmp_path, capsys):
    for name in ("2_Dense/model.safetensors", "3_Dense/pytorch_model.bin", "original/all.pth"):
        (source / name).parent.mkdir()
        (source / name).write_bytes(b"weights")
    (source / "3_Dense" / "config.json").write_text("{}")
    (source / "consolidated.safetensors").write_bytes(b"the same weights again")
    assert run(source, tmp_path / "out") == 0
    there, said = set(files(tmp_path / "out")), capsys.readouterr().out
    for name in ("2_Dense/model.safetensors", "3_Dense/pytorch_model.bin"):
        assert name in there
        assert f"{name}: weights of another module, copied as they are" in said
    for name in ("original/all.pth", "consolidated.safetensors", "pytorch_model.bin"):
        assert name not in there
        assert f"{name}: taken for the same weights once more, not copied" in said


def test_names_with_brackets(source, tmp_path, capsys):
    out = tmp_path / "models [/v2] [wip]"
    assert run(source, out, "--skip", "*[ab]_proj[/x]*", "--skip", "*[u]p_proj*") == 0
    said, err = capsys.readouterr()
    assert out.name in " ".join(said.split())
    assert "left alone: matches '*[u]p_proj*'" in said
    assert "note: '*[ab]_proj[/x]*' matches no tensor" in err


def test_full_disk(source, tmp_path):
    """A process whose files may not grow says so in one line; the same command then finishes."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))\n"
        "from jax_nvfp4.cli import main\n"
        "sys.exit(main(['quantize', *sys.argv[1:]]))\n"
    )
    out = tmp_path / "out"
    command = [sys.executable, "-c", script, str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr.strip().splitlines()[-1]
    assert not list(out.rglob("*.tmp"))
    assert run(source, out) == 0
    assert run(source, tmp_path / "fresh") == 0
    assert files(out) == files(tmp_path / "fresh")


def test_no_disk_error_leaves_anything_half_written(source, tmp_path, monkeypatch, capsys):
    """The n-th write fails, for each n: exit 2, no temporary file, and a rerun finishes."""
    from jax_nvfp4.checkpoint import files as module

    fresh = tmp_path / "fresh"
    assert run(source, fresh) == 0
    capsys.readouterr()
    for fatal in range(100):
        out, commit, left = tmp_path / str(fatal), module.commit, iter(range(fatal))

        def fail(temporary, path, left=left, commit=commit):
            if next(left, None) is None:
                raise OSError(28, "No space left on device", str(path))
            commit(temporary, path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "commit", fail)
            patch.setattr(convert, "commit", fail)
            if run(source, out) == 0:
                break
        assert "No space left on device" in capsys.readouterr().err.strip().splitlines()[-1]
        assert not list(out.rglob("*.tmp"))
        assert run(source, out) == 0
        assert files(out) == files(fresh)
        capsys.readouterr()
    assert fatal > 10


def test_kv_cache_alone_is_quantized_the_cache_is_kept(source, tmp_path):
    hf = {"quantization": {"quant_algo": None, "kv_cache_quant_algo": "NVFP4"}}
    (source / "hf_quant_config.json").write_text(json.dumps(hf))
    assert run(source, tmp_path / "out") == 0
    assert load_checkpoint(tmp_path / "out").kv_cache_quant_algo == "NVFP4"


# --- mixtures of experts ---------------------------------------------------------------------

G, H, I = 3, 32, 48  # noqa: E741
EXPERTS = "model.layers.0.mlp.experts"


def write_experts(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def matrices(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return values * np.arange(1, shape[0] + 1, dtype=np.float32)[:, None, None]


@pytest.mark.parametrize("model", ["gpt_oss", "llama4", "qwen3_5_moe"])
@pytest.mark.parametrize("suffix", ["", ".weight"])
def test_experts_in_one_parameter(suffix, model, tmp_path, capsys):
    """Quantized one by one as (N, K), whichever way they are stored, with a scale for each."""
    transposed = model != "qwen3_5_moe"
    gate_up, down = matrices(G, 2 * I, H), matrices(G, H, I, seed=1)
    tensors = {
        f"{EXPERTS}.gate_up_proj{suffix}": gate_up,
        f"{EXPERTS}.down_proj{suffix}": down,
        "model.layers.0.mlp.router.weight": np.ones((G, H), np.float32),
        "conv.weight": np.ones((4, 4, 32), np.float32),
    }
    if transposed:
        turned = {
            n: np.ascontiguousarray(t.swapaxes(1, 2)) for n, t in tensors.items() if "ex" in n
        }
        tensors |= turned
    config = {"text_config": {"hidden_size": H, "model_type": model}}
    write_experts(tmp_path / "source", tensors, **config)
    assert run(tmp_path / "source", tmp_path / "out") == 0
    assert "2 layers quantized" in capsys.readouterr().out
    loaded = load_checkpoint(tmp_path / "out")
    for name, values in (("gate_up_proj", gate_up), ("down_proj", down)):
        if model == "gpt_oss" and name == "gate_up_proj":
            values = np.concatenate([values[:, 0::2], values[:, 1::2]], axis=1)
        weight = loaded[f"{EXPERTS}.{name}.weight"]
        assert weight.shape == values.shape
        for g in range(G):
            one = quantize(values[g])
            assert_same_bits(np.asarray(weight.data[g]), one.data)
            assert_same_bits(np.asarray(weight.block_scale[g]), one.block_scale)
            assert weight.global_scale[g] == one.global_scale
    details = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert details["quant_algo"] == "W4A16_NVFP4"
    assert details["exclude_modules"] == ["conv", "model.layers.0.mlp.router"]


def test_experts_whose_axes_cannot_be_told_are_left_alone(tmp_path, capsys):
    """Square experts follow their siblings; without siblings nothing tells."""
    square = matrices(G, H, H)
    both = {f"{EXPERTS}.gate_up_proj": matrices(G, H, 2 * H), f"{EXPERTS}.down_proj": square}
    write_experts(tmp_path / "both", both, hidden_size=H)
    assert run(tmp_path / "both", tmp_path / "out") == 0
    weight = load_checkpoint(tmp_path / "out")[f"{EXPERTS}.down_proj.weight"]
    assert_same_bits(np.asarray(weight.data[1]), quantize(square[1].T).data)
    alone = {f"{EXPERTS}.down_proj": square, "a.weight": np.ones((4, 32), np.float32)}
    write_experts(tmp_path / "alone", alone, hidden_size=H)
    assert run(tmp_path / "alone", tmp_path / "out2") == 0
    assert "do not tell the contracted axis" in capsys.readouterr().out
    assert_same_bits(load_checkpoint(tmp_path / "out2")[f"{EXPERTS}.down_proj"], square)


def test_experts_one_by_one(tmp_path):
    tensors = {f"{EXPERTS}.{g}.up_proj.weight": matrices(1, I, H, seed=g)[0] for g in range(G)}
    tensors["model.layers.0.mlp.gate.weight"] = np.ones((G, H), np.float32)
    write_experts(tmp_path / "source", tensors, hidden_size=H)
    assert run(tmp_path / "source", tmp_path / "out") == 0
    loaded = load_checkpoint(tmp_path / "out", stack_experts=True)
    assert loaded[f"{EXPERTS}.up_proj.weight"].shape == (G, I, H)
    assert not isinstance(loaded["model.layers.0.mlp.gate.weight"], Nvfp4Tensor)


def calibration(path, **mean_squares):
    statistics = {
        name.replace("__", "."): InputStatistics(value, np.float32(1))
        for name, value in mean_squares.items()
    }
    Calibration(statistics).save(path)
    return path


def test_search_and_calibration(source, tmp_path, capsys):
    """Statistics by the name of the module; weights without any are searched all the same."""
    tensors = raw_tensors(source)
    up, down = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
    k = tensors[f"{up}.weight"].shape[1]
    importance = np.random.default_rng(0).standard_normal(k).astype(np.float32) ** 4
    file = calibration(tmp_path / "c.npz", **{up.replace(".", "__"): importance})
    options = ["--search", "sweep", "--calibration", file, "--only", f"{up}*", "--only", f"{down}*"]
    assert run(source, tmp_path / "out", *options) == 0
    assert "calibration: of 1 of 2 weights" in capsys.readouterr().err
    loaded = load_checkpoint(tmp_path / "out")
    weighted = quantize(tensors[f"{up}.weight"], search="sweep", importance=importance)
    assert_same_bits(loaded[f"{up}.weight"], weighted)
    assert_same_bits(loaded[f"{down}.weight"], quantize(tensors[f"{down}.weight"], search="sweep"))


def test_calibrations_that_do_not_fit(source, tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no zip")
    ones = np.ones(3, np.float32)
    for file, search, message in (
        (
            calibration(tmp_path / "a.npz", other=ones),
            "sweep",
            "knows none of the weights to quantize",
        ),
        (
            calibration(tmp_path / "b.npz", model__layers__0__mlp__up_proj=ones),
            "4over6",
            "the statistics of model.layers.0.mlp.up_proj.weight must have shape",
        ),
        (tmp_path / "text.npz", "sweep", "not a calibration file"),
        (tmp_path / "a.npz", "none", "needs a search"),
        (tmp_path / "absent.npz", "sweep", "absent.npz"),
    ):
        assert run(source, tmp_path / "out", "--calibration", file, "--search", search) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
