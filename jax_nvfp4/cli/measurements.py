# SPDX-License-Identifier: Apache-2.0
"""What `bench` measures: linear, the quantizer, one call, a stack of layers."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jax_nvfp4
from jax_nvfp4.cli import timing
from jax_nvfp4.config import REFERENCE, GemmProblem, select, serves
from jax_nvfp4.ops.backend import local_arch, num_sms

BYTES_PER_WEIGHT = 0.5625  # four bits, and one eight-bit scale for sixteen weights
CHAIN = 100
"""Calls in the chain that the cost of one is measured with."""


class WrongResultError(Exception):
    """A kernel's result is not the product it was to compute."""


@dataclasses.dataclass(frozen=True)
class LinearRow:
    """One shape and number of rows. Times are seconds a call; None: not measured.

    Attributes:
        n: rows of the weight.
        k: its columns.
        m: rows of x.
        w4a16: with 16-bit activations.
        w4a4: with activations quantized per token.
        invariant: as `w4a16`, or `w4a4` where there is none, with `batch_invariant=True`.
        bf16: XLA's dot of bf16 operands.
    """

    n: int
    k: int
    m: int
    w4a16: float | None
    w4a4: float | None
    invariant: float | None
    bf16: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weight, codes and scales."""
        return self.n * self.k * BYTES_PER_WEIGHT

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: the weight once, x and y."""
        return self.weight_bytes + 2 * self.m * (self.n + self.k)

    @property
    def flops(self) -> float:
        """Multiplications and additions of a call."""
        return 2.0 * self.m * self.n * self.k

    @property
    def best(self) -> float:
        """The faster of the two ways to treat activations."""
        return min(t for t in (self.w4a16, self.w4a4) if t is not None)


@dataclasses.dataclass(frozen=True)
class QuantizeRow:
    """One shape of the quantizer's input, bf16. Times are seconds a call."""

    m: int
    k: int
    static: float
    token: float
    tensor: float

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: x, the codes and the scales."""
        return self.m * self.k * (2 + BYTES_PER_WEIGHT)


# ---- Linear -------------------------------------------------------------------------------------


def _problem(m: int, n: int, k: int, arch: str, x_dtype: str, invariant: bool) -> GemmProblem:
    return GemmProblem(m, n, -(-k // 64) * 64, arch, x_dtype, invariant)


def _weight_only(m: int, n: int, k: int, invariant: bool = False) -> bool:
    """Whether 16-bit activations are served, by a kernel or, without any kernels, as all else."""
    arch = local_arch()
    if arch == REFERENCE:
        return True
    return serves(_problem(m, n, k, arch, "bfloat16", invariant), num_sms(arch))


def _activation(m: int, n: int, k: int, invariant: bool = False) -> Any:
    """How to treat activations such that `linear` is one GEMM, where it can be."""
    return None if _weight_only(m, n, k, invariant) else "token"


def _same_kernel(m: int, n: int, k: int) -> bool:
    """Whether `batch_invariant=True` would run the very same kernel, split alike."""
    arch = local_arch()
    if arch == REFERENCE or _weight_only(m, n, k) != _weight_only(m, n, k, invariant=True):
        return False
    x_dtype = "bfloat16" if _weight_only(m, n, k) else "e2m1"
    chosen = [
        select(_problem(m, n, k, arch, x_dtype, invariant), num_sms(arch))
        for invariant in (False, True)
    ]
    return chosen[0] == chosen[1]


def _weights(n: int, k: int, count: int) -> tuple[list[jax.Array], list[Any]]:
    """Random weights in bf16, and the same ones quantized and repacked."""

    @jax.jit
    def make(key: jax.Array) -> tuple[jax.Array, Any]:
        w = jax.random.normal(key, (n, k), jnp.bfloat16)
        return w, jax_nvfp4.repack(jax_nvfp4.quantize(w))

    pairs = [make(key) for key in jax.random.split(jax.random.key(n + k), count)]
    return [w for w, _ in pairs], [packed for _, packed in pairs]


def measure_linear(n: int, k: int, rows: Sequence[int], rotate: int) -> Iterator[LinearRow]:
    """Times one weight shape for each number of rows."""
    count = min(64, max(3, math.ceil(rotate / (n * k * BYTES_PER_WEIGHT))))
    plain, packed = _weights(n, k, count)
    first = packed[0].dequantize(jnp.bfloat16)
    for m in rows:
        # A program is bound by its launch unless its calls take far longer than the host needs to
        # hand over its arguments: the weights take several turns.
        turns = max(1, min(8, 256 // count, 4096 // m))
        keys = jax.random.split(jax.random.key(m), turns * count)
        xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]

        def seconds(
            function: Callable[[Any, Any], Any], ws: list[Any], xs: list[Any] = xs
        ) -> float:
            program = timing.compile_program(functools.partial(timing.in_turn, function), xs, ws)
            return timing.measure(program, (xs, ws), len(xs)).median

        def linear(activation: Any, **options: Any) -> Callable[[Any, Any], Any]:
            return lambda x, w: jax_nvfp4.linear(x, w, activation_scale=activation, **options)

        weight_only = _weight_only(m, n, k)
        main = linear(_activation(m, n, k))
        _check_result(jax.jit(main)(xs[0], packed[0]), xs[0], first, weight_only)
        w4a16 = seconds(linear(None), packed) if weight_only else None
        w4a4 = seconds(linear("token"), packed)
        default = w4a16 if w4a16 is not None else w4a4
        invariant = default
        if not _same_kernel(m, n, k):
            activation = _activation(m, n, k, invariant=True)
            invariant = seconds(linear(activation, batch_invariant=True), packed)
        bf16 = seconds(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), plain)
        yield LinearRow(n, k, m, w4a16, w4a4, invariant, bf16)


def _check_result(y: jax.Array, x: jax.Array, w: jax.Array, weight_only: bool) -> None:
    """A fast wrong answer is no figure: holds y against XLA's product of the same numbers."""
    expected = jnp.matmul(x, w.T, preferred_element_type=jnp.float32)
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    # Rounding of w to bf16 and of y; quantized activations differ by some 10%.
    limit = 0.01 if weight_only else 0.2
    if not float(error) < limit:
        raise WrongResultError(
            f"linear is wrong for x {x.shape} and weight {w.shape}: relative error {error}"
        )


# ---- Quantizer ----------------------------------------------------------------------------------


def measure_quantize(m: int, k: int, rotate: int) -> QuantizeRow:
    """Times the quantizer for one shape, with each source of the global scale."""
    count = min(48, max(2, math.ceil(rotate / (m * k * 2))))
    keys = jax.random.split(jax.random.key(0), count)
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]
    scale = jnp.float32(0.002)

    def seconds(function: Callable[[Any, Any], Any]) -> float:
        call = functools.partial(timing.in_turn, function)
        program = timing.compile_program(call, xs, [scale])
        return timing.measure(program, (xs, [scale]), len(xs)).median

    return QuantizeRow(
        m,
        k,
        static=seconds(lambda x, g: jax_nvfp4.quantize(x, global_scale=g)),
        token=seconds(lambda x, _: jax_nvfp4.quantize(x, scaling="token")),
        tensor=seconds(lambda x, _: jax_nvfp4.quantize(x)),
    )


# ---- One call -----------------------------------------------------------------------------------


def measure_call() -> dict[str, float]:
    """Seconds of a call that has next to nothing to do, in a chain and by itself."""
    size = 128
    activation = _activation(1, size, size)
    w = jax_nvfp4.repack(jax_nvfp4.quantize(jax.random.normal(jax.random.key(0), (size, size))))
    x = jnp.ones((1, size), jnp.bfloat16)

    def chain(x: jax.Array, w: Any) -> jax.Array:
        for _ in range(CHAIN):
            # Each result is the next one's input.
            x = jax_nvfp4.linear(x, w, activation_scale=activation)
        return x

    def once(x: jax.Array, w: Any) -> jax.Array:
        return jax_nvfp4.linear(x, w, activation_scale=activation)

    def plain(x: jax.Array, w: Any) -> jax.Array:
        return x + w.global_scale.astype(x.dtype)

    figures = {}
    ways = {f"in a chain of {CHAIN}": True, f"in a chain of {CHAIN}, without a CUDA graph": False}
    for name, graph in ways.items():
        program = timing.compile_program(chain, x, w, graph=graph)
        figures[name] = timing.measure(program, (x, w), CHAIN).median
    for name, function in (
        ("a jit of one call, waited for", once),
        ("a jit of one addition, waited for", plain),
    ):
        program = timing.compile_program(function, x, w)
        figures[name] = _waited_for(program, (x, w))
    return figures


def _waited_for(program: Callable[..., Any], args: Sequence[Any], runs: int = 200) -> float:
    """Seconds from a call to its result, the host waiting each time."""
    jax.block_until_ready(program(*args))
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ---- A stack of layers --------------------------------------------------------------------------


def measure_stack(layers: int, width: int, qkv: int, feed_forward: int) -> dict[str, Any]:
    """Seconds of one token through a stack of decoder layers without attention's own products.

    Each layer: RMS norm, q k v, output projection, residual; RMS norm, gate and up, SiLU, down,
    residual. Attention over one token is its value, so `width` of the q k v columns are passed on.
    """
    shapes = ((qkv, width), (width, width), (2 * feed_forward, width), (width, feed_forward))

    @jax.jit
    def make(key: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        keys = jax.random.split(key, len(shapes))
        plain = [
            jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[1] ** -0.5)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        return plain, [jax_nvfp4.repack(jax_nvfp4.quantize(w)) for w in plain]

    made = [make(key) for key in jax.random.split(jax.random.key(7), layers)]
    plain, packed = [p for p, _ in made], [p for _, p in made]

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale).astype(x.dtype)

    def forward(linear: Callable[[Any, Any], jax.Array], x: jax.Array, stack: Any) -> jax.Array:
        for w_qkv, w_out, w_up, w_down in stack:
            x = x + linear(linear(norm(x), w_qkv)[:, -width:], w_out)
            gate, up = jnp.split(linear(norm(x), w_up), 2, axis=-1)
            x = x + linear(jax.nn.silu(gate) * up, w_down)
        return x

    def nvfp4(activation: Any) -> Callable[[Any, Any], jax.Array]:
        return lambda x, w: jax_nvfp4.linear(x, w, activation_scale=activation)

    x = jax.random.normal(jax.random.key(1), (1, width), jnp.bfloat16)
    ways: dict[str, tuple[Callable[[Any, Any], jax.Array], Any]] = {
        "bf16": (lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), plain),
        "W4A4": (nvfp4("token"), packed),
    }
    if all(_weight_only(1, n, k) for n, k in shapes):
        ways["W4A16"] = (nvfp4(None), packed)
    weights = sum(n * k for n, k in shapes) * layers
    figures: dict[str, Any] = {
        "layers": layers,
        "bytes": {"bf16": 2.0 * weights, "nvfp4": BYTES_PER_WEIGHT * weights},
        "seconds": {},
    }
    for name, (function, stack) in ways.items():
        program = timing.compile_program(functools.partial(forward, function), x, stack)
        figures["seconds"][name] = timing.measure(program, (x, stack), 1).median
    return figures
