# SPDX-License-Identifier: Apache-2.0
"""`bench --model`: the steps of a whole decoder with random weights, in bf16 and in NVFP4.

The model is a plain Flax nnx Llama, with its layers one after another, that is put into NVFP4 by
`convert`. Text is generated in one `lax.scan` on the device, with a donated cache; the prompt is
read in one call.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

import jax_nvfp4

_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder.

    Attributes:
        layers: how many.
        width: of the residual stream.
        heads: of queries.
        kv_heads: of keys and values.
        hidden: width of the feed-forward layer.
        vocab: tokens.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocab: int

    @property
    def head_width(self) -> int:
        """Of a query, key or value."""
        return self.width // self.heads

    @property
    def problem(self) -> str | None:
        """What is wrong with the sizes, if anything."""
        if min(dataclasses.astuple(self)) < 1:
            return "each size must be at least 1"
        if self.width % self.heads or self.head_width % 2 or self.heads % self.kv_heads:
            return (
                "the width must be an even multiple of heads, and heads a multiple of kv_heads; "
                f"got {self}"
            )
        return None


PRESETS = {
    "llama-8b": Sizes(32, 4096, 32, 8, 14336, 128256),
    "tiny": Sizes(2, 256, 4, 2, 512, 1024),
}


# ---- The model ----------------------------------------------------------------------------------


def _rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotary embedding of x (B, T, heads, width), in halves."""
    half = x.shape[-1] // 2
    angles = (positions[:, None] * 500000.0 ** -(jnp.arange(half) / half))[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Block(nnx.Module):
    """A decoder layer, its q k v and its gate and up joined to one product each if `fused`."""

    def __init__(self, s: Sizes, fused: bool, rngs: nnx.Rngs) -> None:
        linear = functools.partial(
            nnx.Linear, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=rngs
        )
        norm = functools.partial(nnx.RMSNorm, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        self.qkv_widths = [h * s.head_width for h in (s.heads, s.kv_heads, s.kv_heads)]
        self.head_width, self.hidden, self.fused = s.head_width, s.hidden, fused
        self.attention_norm, self.mlp_norm = norm(s.width, rngs=rngs), norm(s.width, rngs=rngs)
        if fused:
            self.qkv = linear(s.width, sum(self.qkv_widths))
            self.gate_up = linear(s.width, 2 * s.hidden)
        else:
            self.query, self.key, self.value = (linear(s.width, n) for n in self.qkv_widths)
            self.gate, self.up = linear(s.width, s.hidden), linear(s.width, s.hidden)
        self.out, self.down = linear(s.width, s.width), linear(s.hidden, s.width)

    def _qkv(self, x: jax.Array) -> list[jax.Array]:
        if self.fused:
            q, k, _ = self.qkv_widths
            parts = jnp.split(self.qkv(x), [q, q + k], axis=-1)
        else:
            parts = [self.query(x), self.key(x), self.value(x)]
        return [part.reshape(*x.shape[:-1], -1, self.head_width) for part in parts]

    def _gate_up(self, x: jax.Array) -> Sequence[jax.Array]:
        if self.fused:
            return jnp.split(self.gate_up(x), 2, axis=-1)
        return self.gate(x), self.up(x)

    def __call__(self, x: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Maps x (B, T, width) at positions start.. to the next, and writes to the cache."""
        positions = start + jnp.arange(x.shape[1])
        query, key, value = self._qkv(self.attention_norm(x))
        key = _rotate(key, positions)
        keys = lax.dynamic_update_slice_in_dim(cache[0], key, start, axis=1)
        values = lax.dynamic_update_slice_in_dim(cache[1], value, start, axis=1)
        seen = jnp.arange(keys.shape[1]) <= positions[:, None]
        attended = jax.nn.dot_product_attention(
            _rotate(query, positions), keys, values, mask=seen[None, None]
        )
        x += self.out(attended.reshape(x.shape))
        gate, up = self._gate_up(self.mlp_norm(x))
        return x + self.down(nnx.silu(gate) * up), (keys, values)


class Decoder(nnx.Module):
    """Embedding, blocks, norm and head."""

    def __init__(self, s: Sizes, fused: bool, rngs: nnx.Rngs) -> None:
        dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": rngs}
        self.embed = nnx.Embed(s.vocab, s.width, **dtypes)
        self.blocks = nnx.List([Block(s, fused, rngs) for _ in range(s.layers)])
        self.norm = nnx.RMSNorm(s.width, **dtypes)
        self.head = nnx.Linear(s.width, s.vocab, use_bias=False, **dtypes)

    def __call__(self, tokens: jax.Array, cache: Any, start: jax.Array) -> tuple[jax.Array, Any]:
        """Maps tokens (B, T) to the logits (B, vocab) of the last one, and the next cache."""
        x, written = self.embed(tokens), []
        for block, part in zip(self.blocks, cache, strict=True):
            x, part = block(x, part, start)
            written.append(part)
        return self.head(self.norm(x[:, -1])), written


def make(s: Sizes, fused: bool) -> tuple[Callable[..., Any], Any]:
    """A decoder as a function, and its random params."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(s, fused, nnx.Rngs(0))))
    leaves, tree = jax.tree.flatten(shapes)

    @functools.partial(jax.jit, static_argnums=1)
    def random(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.ones(shape, jnp.bfloat16)
        return jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[0] ** -0.5)

    keys = jax.random.split(jax.random.key(0), len(leaves))
    params = [random(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]

    def apply(params: Any, tokens: jax.Array, cache: Any, start: jax.Array) -> Any:
        params = jax.tree.map(lambda array: array, params)  # variables of this trace: in a loop
        return nnx.merge(graph, params)(tokens, cache, start)

    return apply, jax.tree.unflatten(tree, params)


def empty_cache(s: Sizes, batch: int, length: int) -> Any:
    """Keys and values of each layer, (batch, length, kv_heads, head_width)."""
    shape = (batch, length, s.kv_heads, s.head_width)
    return [
        (jnp.zeros(shape, jnp.bfloat16), jnp.zeros(shape, jnp.bfloat16)) for _ in range(s.layers)
    ]


# ---- Measuring ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """One way to run the model in one of its uses.

    Attributes:
        name: "bf16", "W4A16" or "W4A4".
        fused: whether q k v, and gate and up, are one product each.
        batch: sequences.
        prompt: tokens that a call reads; 0: the row is of generated tokens.
        seconds: of a generated token for the whole batch, or of a call that reads the prompts.
        weight_bytes: of all params.
        program_bytes: arguments, results and temporary memory of the program.
    """

    name: str
    fused: bool
    batch: int
    prompt: int
    seconds: float
    weight_bytes: int
    program_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Of the whole batch, generated or read."""
        return self.batch * max(self.prompt, 1) / self.seconds


def _program_bytes(program: Any) -> int:
    memory = program.memory_analysis()
    used = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return used + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def _timed(program: Any, params: Any, make_cache: Callable[[], Any], *args: Any) -> float:
    """Seconds of a call that takes over its cache: the median, after one that does not count."""
    seconds = []
    for _ in range(1 + _RUNS):
        cache = jax.block_until_ready(make_cache())
        started = time.perf_counter()
        jax.block_until_ready(program(params, cache, *args))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _generate(apply: Callable[..., Any], steps: int) -> Callable[..., Any]:
    """Generates `steps` tokens from a cache that is half full."""

    def program(params: Any, cache: Any, tokens: jax.Array, start: jax.Array) -> Any:
        def step(state: Any, _: Any) -> tuple[Any, None]:
            tokens, cache, position = state
            logits, cache = apply(params, tokens, cache, position)
            return (jnp.argmax(logits, axis=-1)[:, None], cache, position + 1), None

        return lax.scan(step, (tokens, cache, start), length=steps)[0]

    return program


def _read(apply: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, cache, tokens, start: apply(params, tokens, cache, start)


@dataclasses.dataclass(frozen=True)
class Uses:
    """What the model is timed at.

    Attributes:
        batches: sequences generated at once.
        cache: positions of the cache while generating.
        steps: tokens that one call generates.
        prompt: tokens of the prompt that is read.
    """

    batches: Sequence[int]
    cache: int
    steps: int
    prompt: int


def _rows(
    name: str, fused: bool, apply: Callable[..., Any], params: Any, s: Sizes, uses: Uses
) -> Iterator[ModelRow]:
    """Compiles and times each use."""
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    plans = [(_generate(apply, uses.steps), b, 1, uses.cache, uses.steps) for b in uses.batches]
    plans.append((_read(apply), 1, uses.prompt, uses.prompt, 1))
    for function, batch, length, positions, steps in plans:
        make_cache = functools.partial(empty_cache, s, batch, positions)
        start = jnp.int32(positions // 2 if steps > 1 else 0)
        tokens = jnp.zeros((batch, length), jnp.int32)
        lowered = jax.jit(function, donate_argnums=1).lower(params, make_cache(), tokens, start)
        program = lowered.compile()
        seconds = _timed(program, params, make_cache, tokens, start) / steps
        prompt = length if length > 1 else 0
        used = _program_bytes(program)
        yield ModelRow(name, fused, batch, prompt, seconds, weight_bytes, used)


def measure(s: Sizes, uses: Uses, say: Callable[[str], None]) -> Iterator[ModelRow]:
    """Measures bf16, W4A16 and W4A4, not fused and fused; one set of dense weights at a time.

    Args:
        s: the sizes.
        uses: what to time.
        say: told what comes next.

    Yields:
        A row for each.
    """
    example = jnp.zeros((1, 1), jnp.int32), empty_cache(s, 1, 16), jnp.int32(0)
    for fused in (False, True):
        how = "fused" if fused else "not fused"
        say(f"bf16, {how}")
        apply, params = make(s, fused)
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
        yield from _rows("bf16", fused, apply, params, s, uses)
        say(f"convert, {how}")
        convert = functools.partial(jax_nvfp4.convert, apply, where=_every_kernel)
        run, params, _ = convert(params, *example, activation_scale=None, donate=True)
        say(f"W4A16, {how}")
        yield from _rows("W4A16", fused, run, params, s, uses)
        run, _, _ = convert(shapes, *example, activation_scale="token")  # of the same weights
        say(f"W4A4, {how}")
        yield from _rows("W4A4", fused, run, params, s, uses)
        del params


def _every_kernel(path: tuple[str, ...], use: Any) -> bool:
    """The head too: it is read for each token."""
    return path[-1] == "kernel"


# ---- The table ----------------------------------------------------------------------------------

HEAD = (
    f"{'':>6} {'fused':>6} {'batch':>6} {'prompt':>7} | {'ms':>9} {'tokens/s':>9} {'speedup':>8} | "
    f"{'weights':>9} {'program':>9}"
)
NOTE = """\
ms: of a token generated for the whole batch, or of reading one prompt. speedup: over bf16 that is
fused alike. program: arguments, results and temporary memory, the cache included."""


def line(row: ModelRow, rows: Sequence[ModelRow]) -> str:
    """A line of the table, beside the bf16 row among `rows` that it is to be held against."""
    key = (row.fused, row.batch, row.prompt)
    dense = [r for r in rows if r.name == "bf16" and (r.fused, r.batch, r.prompt) == key]
    speedup = f"{dense[0].seconds / row.seconds:.2f}x" if dense else "-"
    return (
        f"{row.name:>6} {'yes' if row.fused else 'no':>6} {row.batch:>6} {row.prompt or '-':>7} | "
        f"{row.seconds * 1e3:>9.3f} {row.tokens_per_second:>9.0f} {speedup:>8} | "
        f"{row.weight_bytes / 1e9:>6.3g} GB {row.program_bytes / 1e9:>6.3g} GB"
    )
