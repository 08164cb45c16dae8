# SPDX-License-Identifier: Apache-2.0
"""`bench --experts`: the products of a mixture of experts, beside a dense one of the same bytes.

Weights are random, and so is the router's choice: other experts in each call, so that weights come
from memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_nvfp4
from jax_nvfp4.bench.measurements import NotCredibleError, check_result, check_time, plan_product
from jax_nvfp4.bench.report import BYTES_PER_WEIGHT, ratio, us
from jax_nvfp4.bench.timing import Ceilings, Compiler, Loop, Plan, on_gpu, plan

_FUSION = {"xla_gpu_experimentaluse_ragged_dot_fusion": True}
_CHECKED_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a layer of experts.

    Attributes:
        hidden: of the residual stream, K of the first product.
        inner: an expert's own width.
        experts: how many.
        top_k: experts of a token.
        gated: SwiGLU, of twice as many rows; else relu2.
    """

    hidden: int
    inner: int
    experts: int
    top_k: int
    gated: bool = True

    @property
    def rows(self) -> int:
        """Rows of an expert's first weight."""
        return self.inner * (2 if self.gated else 1)


PRESETS = {
    "qwen3-30b": Sizes(2048, 768, 128, 8),
    "qwen3-235b": Sizes(4096, 1536, 128, 8),
    "gpt-oss-120b": Sizes(2880, 2880, 128, 4),
    "nemotron-3": Sizes(2688, 1856, 128, 6, gated=False),
    "tiny": Sizes(64, 32, 8, 2),
}


@dataclasses.dataclass(frozen=True)
class ExpertsRow:
    """One layer with one number of tokens, bfloat16. Seconds a call; None: not measured.

    Attributes:
        model: name of the sizes.
        tokens: how many.
        equal: whether experts had as many rows each.
        touched: experts that a call chose, in the mean.
        up: the first product, W4A16, without its activation.
        gated: the same with it.
        down: the second product, W4A16.
        mlp: `expert_mlp` with all that belongs to it, W4A16.
        mlp_w4a4: the same, W4A4.
        dense: `linear` with one weight of the bytes, and of the operations, of `up`.
        ragged_dot: XLA's default of `up` with bfloat16 weights.
        fusion: the same in XLA's own fusion by Triton, on a GPU.
    """

    model: str
    tokens: int
    equal: bool
    touched: float
    up: float | None
    gated: float | None
    down: float | None
    mlp: float | None
    mlp_w4a4: float | None
    dense: float | None
    ragged_dot: float | None
    fusion: float | None


def choices(s: Sizes, tokens: int, calls: int, equal: bool) -> np.ndarray:
    """The experts of each token in each call, int32 (calls, tokens, top_k), without repetition.

    In turn, so that all get as many rows, for one token or if `equal`; else at random.
    """
    if equal or tokens == 1:
        chosen = np.arange(calls * tokens * s.top_k) % s.experts
        return chosen.reshape(calls, tokens, s.top_k).astype(np.int32)
    rng = np.random.default_rng(tokens)
    picked = [
        np.argpartition(rng.random((tokens, s.experts), np.float32), s.top_k - 1)[:, : s.top_k]
        for _ in range(calls)
    ]
    return np.stack(picked).astype(np.int32)


class Experts:
    """One layer, with each number of tokens."""

    def __init__(
        self, name: str, s: Sizes, rotate: int, most: Ceilings, say: Callable[[str], None]
    ) -> None:
        """Makes the weights.

        Args:
            name: of the sizes.
            s: the sizes.
            rotate: bytes to be moved before a dense weight is met again.
            most: what the device does at most.
            say: told what of XLA's could not be measured.
        """
        self.name, self.s, self._rotate, self._most, self._say = name, s, rotate, most, say
        keys = jax.random.split(jax.random.key(0), 3)
        first = _random(keys[0], s.experts, s.inner, s.hidden)
        if s.gated:
            first = jax_nvfp4.gate_up(first, _random(keys[1], s.experts, s.inner, s.hidden))
        self._up = jax_nvfp4.repack(first)
        self._down = jax_nvfp4.repack(_random(keys[2], s.experts, s.hidden, s.inner))
        self._plain = jax.jit(lambda w: jnp.swapaxes(w.dequantize(jnp.bfloat16), -1, -2))(first)

    def measure(self, tokens: int, equal: bool) -> tuple[ExpertsRow, list[str]]:
        """Measures one number of tokens.

        Args:
            tokens: how many.
            equal: whether experts get as many rows each; else they are chosen at random.

        Returns:
            The row, and what was wrong.
        """
        s, most = self.s, self._most
        pairs = tokens * s.top_k
        rough = min(s.experts, pairs)
        size = rough * s.rows * s.hidden * BYTES_PER_WEIGHT + 2 * pairs * (s.hidden + s.rows)
        flops = 2.0 * pairs * s.rows * s.hidden
        # Experts take turns by the choice, not by copies: any number of calls will do.
        planned = plan(size, max(size / most.read, flops / most.multiply), 1)
        chosen = choices(s, tokens, planned.calls, equal)
        touched = float(np.mean([len(np.unique(c)) for c in chosen]))
        errors: list[str] = []
        with Compiler() as compiler:
            loops = self._loops(compiler, tokens, planned)
            dense = self._dense(compiler, round(touched), pairs)
            compiler.wait()
            operands = self._operands(tokens, chosen)
            seconds = {name: self._seconds(loop, operands[kind], w, errors, name)
                       for name, (loop, kind, w) in loops.items()}  # fmt: skip
            seconds.setdefault("fusion", None)
            self._check(loops, operands["up"], touched, seconds, errors)
            seconds["dense"] = dense()
        return ExpertsRow(self.name, tokens, equal, touched, **seconds), errors

    def _loops(self, compiler: Compiler, tokens: int, planned: Plan) -> dict[str, Any]:
        """By name: a loop, which operands it takes, and its weights."""
        s, pairs = self.s, tokens * self.s.top_k
        activation: Any = jax_nvfp4.SwiGLU() if s.gated else "relu2"
        of = functools.partial(Loop.of, compiler, plan=planned, single_w=True)
        ragged = functools.partial(jax_nvfp4.ragged_linear, activation_scale=None)
        sizes = jax.ShapeDtypeStruct((s.experts,), jnp.int32)
        up = jax.ShapeDtypeStruct((pairs, s.hidden), jnp.bfloat16), sizes
        down = jax.ShapeDtypeStruct((pairs, s.inner), jnp.bfloat16), sizes
        choice = (tokens, s.top_k)
        mlp = (
            jax.ShapeDtypeStruct((tokens, s.hidden), jnp.bfloat16),
            jax.ShapeDtypeStruct(choice, jnp.int32),
            jax.ShapeDtypeStruct(choice, jnp.float32),
        )

        def experts(scale: Any) -> Callable[[Any, Any], jax.Array]:
            def call(x: Any, w: Any) -> jax.Array:
                return jax_nvfp4.expert_mlp(
                    x[0], w[0], w[1], x[1], x[2], activation=activation, activation_scale=scale
                )

            return call

        def dot(x: Any, w: Any) -> jax.Array:
            return lax.ragged_dot(x[0], w, x[1])

        both = self._up, self._down
        loops = {
            "up": (of(lambda x, w: ragged(x[0], w, x[1]), up, self._up), "up", self._up),
            "gated": (
                of(lambda x, w: ragged(x[0], w, x[1], activation=activation), up, self._up),
                "up",
                self._up,
            ),
            "down": (of(lambda x, w: ragged(x[0], w, x[1]), down, self._down), "down", self._down),
            "mlp": (of(experts(None), mlp, both), "mlp", both),
            "mlp_w4a4": (of(experts("token"), mlp, both), "mlp", both),
            "ragged_dot": (of(dot, up, self._plain), "up", self._plain),
        }
        if on_gpu():
            loops["fusion"] = of(dot, up, self._plain, options=_FUSION), "up", self._plain
        return loops

    def _seconds(
        self, loop: Loop, xs: Sequence[Any], w: Any, errors: list[str], name: str
    ) -> float | None:
        """The time of a call; None where it does not run, which is an error unless it is XLA's."""
        try:
            return loop.seconds(xs, [w])
        except jax.errors.JaxRuntimeError as error:
            if name in ("ragged_dot", "fusion"):
                why = str(error).strip().splitlines()[0]
                self._say(f"{self.name}: {name} could not be measured: {why}")
            else:
                errors.append(f"{name}: {error}")
            return None

    def _operands(self, tokens: int, chosen: np.ndarray) -> dict[str, list[Any]]:
        """What each kind of loop takes in each of its calls."""
        s, pairs = self.s, tokens * self.s.top_k
        made: dict[str, list[Any]] = {"up": [], "down": [], "mlp": []}
        normal = jax.jit(
            lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1
        )
        for call, indices in enumerate(chosen):
            sizes = jnp.asarray(np.bincount(indices.reshape(-1), minlength=s.experts), jnp.int32)
            keys = jax.random.split(jax.random.key(call), 4)
            made["up"].append((normal(keys[0], (pairs, s.hidden)), sizes))
            made["down"].append((normal(keys[1], (pairs, s.inner)), sizes))
            weights = jax.random.uniform(keys[3], (tokens, s.top_k))
            made["mlp"].append((normal(keys[2], (tokens, s.hidden)), jnp.asarray(indices), weights))
        return made

    def _dense(self, compiler: Compiler, touched: int, pairs: int) -> Callable[[], float]:
        """Has `linear` compiled with one weight of as many bytes; the result measures it."""
        n, k, m = touched * self.s.rows, self.s.hidden, math.ceil(pairs / touched)
        weight_bytes = n * k * BYTES_PER_WEIGHT
        planned = plan_product((m, n, k), weight_bytes, self._rotate, self._most)
        make = jax.jit(
            lambda key: jax_nvfp4.repack(
                jax_nvfp4.quantize(jax.random.normal(key, (n, k), jnp.bfloat16))
            )
        )
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        w = jax.eval_shape(make, jax.random.key(0))
        loop = Loop.of(
            compiler,
            lambda x, w: jax_nvfp4.linear(x, w, activation_scale=None),
            x,
            w,
            planned,
        )

        def run() -> float:
            keys = jax.random.split(jax.random.key(1), planned.calls)
            xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]
            return loop.seconds(xs, [make(key) for key in keys[: planned.distinct]])

        return run

    def _check(
        self,
        loops: dict[str, Any],
        operands: Sequence[Any],
        touched: float,
        seconds: dict[str, float | None],
        errors: list[str],
    ) -> None:
        """Rejects a product that is wrong, and times below what memory allows."""
        x, sizes = operands[loops["up"][0].plan.calls - 1]
        last = loops["up"][0].results[-1]
        at = np.flatnonzero(np.asarray(sizes))[-_CHECKED_ROWS:]  # the last row of each of these
        ends = np.cumsum(np.asarray(sizes))
        expected = [x[ends[g] - 1].astype(jnp.float32) @ self._plain[g].astype(jnp.float32)
                    for g in at]  # fmt: skip
        name = f"{self.name}, {operands[0][0].shape[0]} rows"
        try:
            check_result(np.asarray(last)[ends[at] - 1], np.asarray(jnp.stack(expected)), 0.01)
            if seconds["up"] is not None:
                weights = touched * self.s.rows * self.s.hidden * BYTES_PER_WEIGHT
                check_time(seconds["up"], weights, self._most)
        except NotCredibleError as error:
            errors.append(f"{name}: {error}")
            seconds["up"] = None


def _random(key: jax.Array, experts: int, n: int, k: int) -> Any:
    """Random experts (E, N, K), quantized one by one: the peak is what they take, and one."""

    def one(key: jax.Array) -> Any:
        w = jax.random.normal(key, (n, k), jnp.bfloat16) * jnp.bfloat16(k**-0.5)
        return jax_nvfp4.quantize(w)

    return jax.jit(lambda keys: lax.map(one, keys))(jax.random.split(key, experts))


def measure(
    chosen: Sequence[tuple[str, Sizes]],
    tokens: Sequence[int],
    equal: bool,
    rotate: int,
    most: Ceilings,
    say: Callable[[str], None],
) -> Iterator[tuple[ExpertsRow, list[str]]]:
    """Measures layers one after another; one set of weights at a time.

    Args:
        chosen: names and sizes.
        tokens: numbers of them.
        equal: whether experts get as many rows each.
        rotate: bytes to be moved before a dense weight is met again.
        most: what the device does at most.
        say: told what comes next.

    Yields:
        A row, and what was wrong with it.
    """
    for name, sizes in chosen:
        started = time.perf_counter()
        experts = Experts(name, sizes, rotate, most, say)
        say(f"{name}: weights made in {time.perf_counter() - started:.0f} s")
        for count in tokens:
            yield experts.measure(count, equal)


# ---- The table ----------------------------------------------------------------------------------

HEAD = (
    f"{'':>13} {'tokens':>6} {'experts':>7} | {'up':>8} {'+act.':>6} {'down':>8} | "
    f"{'dense':>8} {'share':>6} | {'mlp':>8} {'over':>6} {'W4A4':>8} | "
    f"{'bf16':>8} {'Triton':>8} {'speedup':>7}"
)
NOTE = """\
us a call, W4A16. experts: that a call chose. up: the first product; +act.: times it with its
activation. dense: `linear` with one weight of the bytes of these experts, and its share of up. mlp:
all of `expert_mlp`, and over its two products; W4A4: the same. bf16: `lax.ragged_dot` of the first
product, by XLA's default and by its Triton fusion, and the better one over up."""


def line(row: ExpertsRow) -> str:
    """A line of the table."""
    products = None if None in (row.gated, row.down) else (row.gated or 0) + (row.down or 0)
    best = min((t for t in (row.ragged_dot, row.fusion) if t is not None), default=None)
    return (
        f"{row.model:>13} {row.tokens:>6} {row.touched:>7.1f} | {us(row.up):>8} "
        f"{ratio(row.gated, row.up):>6} {us(row.down):>8} | {us(row.dense):>8} "
        f"{ratio(row.dense, row.up):>6} | {us(row.mlp):>8} {ratio(row.mlp, products):>6} "
        f"{us(row.mlp_w4a4):>8} | {us(row.ragged_dot):>8} {us(row.fusion):>8} "
        f"{ratio(best, row.up):>7}"
    )
