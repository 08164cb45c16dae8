# SPDX-License-Identifier: Apache-2.0
"""The measurements of `bench`: linear, the quantizer, one call, a stack of layers.

Each is a class whose instances have their programs compiled when they are made, and measure when
they are asked to.
"""

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
import numpy as np

import jax_nvfp4
from jax_nvfp4.bench.report import BYTES_PER_WEIGHT, LinearRow, QuantizeRow
from jax_nvfp4.bench.timing import Ceilings, Compiler, Loop, Plan, measure, on_gpu, plan
from jax_nvfp4.config import REFERENCE, Scaling
from jax_nvfp4.ops.device import limits, local_arch
from jax_nvfp4.ops.linear.plan import LinearPlan
from jax_nvfp4.ops.linear.plan import plan as plan_linear
from jax_nvfp4.ops.linear.spec import LinearSpec

CHAIN = 100
"""Calls in the chain that the cost of one is measured with."""
_CHECKED_ROWS = 16


class NotCredibleError(Exception):
    """A result is wrong, or a time is shorter than the device allows."""


def _plan(m: int, n: int, k: int, scaling: Scaling, invariant: bool = False) -> LinearPlan:
    """The plan of `linear` of bfloat16 on this machine."""
    arch = local_arch()
    spec = LinearSpec(arch, n, k, scaling, False, "bfloat16", invariant)
    return plan_linear(spec, m, "bfloat16", arch=arch, limits=limits(arch))


def _scaling(m: int, n: int, k: int, invariant: bool = False) -> Scaling:
    """How to treat activations such that `linear` is one GEMM, where it can be."""
    by_kernel = _plan(m, n, k, Scaling.NONE, invariant).gemm is not None
    return Scaling.NONE if by_kernel or local_arch() == REFERENCE else Scaling.TOKEN


def _activation(m: int, n: int, k: int, invariant: bool = False) -> Any:
    """The same as an argument of `linear`."""
    return {Scaling.NONE: None, Scaling.TOKEN: "token"}[_scaling(m, n, k, invariant)]


def _same_kernel(m: int, n: int, k: int) -> bool:
    """Tells whether `batch_invariant=True` would run the very same kernel, split alike."""
    plans = [_plan(m, n, k, _scaling(m, n, k, invariant), invariant) for invariant in (False, True)]
    kernels = [(plan.gemm, plan.split_k, plan.quantize) for plan in plans]
    return plans[0].gemm is not None and kernels[0] == kernels[1]


def _linear(activation: Any, **options: Any) -> Callable[[Any, Any], jax.Array]:
    return lambda x, w: jax_nvfp4.linear(x, w, activation_scale=activation, **options)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _make_weight(key: jax.Array, shape: tuple[int, int]) -> tuple[jax.Array, Any]:
    """A random weight in bf16, of variance 1/K, and the same one quantized and repacked."""
    w = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[1] ** -0.5)
    return w, jax_nvfp4.repack(jax_nvfp4.quantize(w))


def _inputs(compiler: Compiler, count: int, m: int, k: int) -> Callable[[], list[jax.Array]]:
    """Has a program compiled that makes one x; the result makes `count` of them."""
    make = compiler.add(lambda key: jax.random.normal(key, (m, k), jnp.bfloat16), _KEY)
    return lambda: [make.result()(_key(i)) for i in range(count)]


_KEY = jax.ShapeDtypeStruct((2,), jnp.uint32)


def _key(seed: int) -> jax.Array:
    return jnp.asarray([0, seed], jnp.uint32)


# ---- Linear -------------------------------------------------------------------------------------


def _expected(x: jax.Array, packed: Any) -> jax.Array:
    """The product of x with a dequantized weight, in float32."""
    return jnp.matmul(x, packed.dequantize(jnp.bfloat16).T, preferred_element_type=jnp.float32)


def _picked(m: int) -> np.ndarray:
    """The rows that are checked: the first and the last ones."""
    half = _CHECKED_ROWS // 2
    return np.unique(np.r_[: min(m, half), max(m - half, 0) : m])


def check_result(y: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """Rejects wrong results, however fast they came.

    Args:
        y: rows of a product.
        expected: the same rows in float32.
        limit: of the relative error.
    """
    error = np.linalg.norm(y.astype(np.float32) - expected) / np.linalg.norm(expected)
    if not error < limit:
        raise NotCredibleError(
            f"wrong result: relative error {error:.3g}, at most {limit} expected"
        )


def check_time(
    seconds: float, weight_bytes: float, most: Ceilings, flops: float | None = None
) -> None:
    """Rejects times that exceed hardware limits: calls were joined, left out or cached.

    Args:
        seconds: of a call.
        weight_bytes: bytes that a call must read from memory.
        most: what the device does at most.
        flops: operations of a call on 16-bit operands, if those they are.
    """
    # The ceilings are measured, too.
    if weight_bytes / seconds > 1.05 * most.read:
        raise NotCredibleError(
            f"{seconds * 1e6:.1f} us would be reading the weight at "
            f"{weight_bytes / seconds / 1e12:.2f} TB/s; memory gives {most.read / 1e12:.2f}"
        )
    if flops is not None and flops / seconds > 1.15 * most.multiply:
        raise NotCredibleError(
            f"{seconds * 1e6:.1f} us would be {flops / seconds / 1e12:.0f} TFLOP/s; "
            f"the largest dot reaches {most.multiply / 1e12:.0f}"
        )


@dataclasses.dataclass(frozen=True)
class _Case:
    """A number of rows: what makes the inputs, and the loops to be timed, by name."""

    m: int
    inputs: Callable[[], list[jax.Array]]
    loops: dict[str, Loop]


def plan_product(
    sizes: tuple[int, int, int], weight_bytes: float, rotate: int, most: Ceilings
) -> Plan:
    """Plans a loop of products.

    Args:
        sizes: (m, n, k).
        weight_bytes: of the weight.
        rotate: bytes to be moved before a weight is met again.
        most: what the device does at most.
    """
    m, n, k = sizes
    size = weight_bytes + 2 * m * (n + k)
    return plan(size, max(size / most.read, 2.0 * m * n * k / most.multiply), rotate)


class Linear:
    """One weight shape, with each number of rows."""

    def __init__(
        self, compiler: Compiler, n: int, k: int, rows: Sequence[int], rotate: int, most: Ceilings
    ) -> None:
        """Has the programs compiled.

        Args:
            compiler: that does it.
            n: rows of the weight.
            k: its columns.
            rows: numbers of rows of x.
            rotate: bytes to be moved before a weight is met again.
            most: what the device does at most.
        """
        self.n, self.k, self._most = n, k, most
        make = functools.partial(_make_weight, shape=(n, k))
        self._make = compiler.add(make, _KEY)
        self._shapes = jax.eval_shape(make, _KEY)
        some = jax.ShapeDtypeStruct((_CHECKED_ROWS, k), jnp.bfloat16)
        self._expected = compiler.add(_expected, some, self._shapes[1], tuned=True)
        self._cases = [self._case(compiler, m, rotate) for m in rows]

    def _case(self, compiler: Compiler, m: int, rotate: int) -> _Case:
        n, k = self.n, self.k
        functions = {"w4a4": _linear("token"), "bf16": _dot}
        if _scaling(m, n, k) == Scaling.NONE:
            functions["w4a16"] = _linear(None)
        if not _same_kernel(m, n, k):
            activation = _activation(m, n, k, invariant=True)
            functions["invariant"] = _linear(activation, batch_invariant=True)
        x = jax.ShapeDtypeStruct((m, k), jnp.bfloat16)
        loops = {}
        for name, function in functions.items():
            plain = name == "bf16"
            weight_bytes = n * k * (2 if plain else BYTES_PER_WEIGHT)
            planned = plan_product((m, n, k), weight_bytes, rotate, self._most)
            w = self._shapes[0 if plain else 1]
            loops[name] = Loop.of(compiler, function, x, w, planned, tuned=plain)
        calls = max(loop.plan.calls for loop in loops.values())
        return _Case(m, _inputs(compiler, calls, m, k), loops)

    def _weights(self) -> tuple[list[jax.Array], list[Any]]:
        """As many weights, in bf16 and packed, as the loops take."""

        def most(plain: bool) -> int:
            loops = [item for case in self._cases for item in case.loops.items()]
            return max(loop.plan.distinct for name, loop in loops if (name == "bf16") == plain)

        plain, packed = [], []
        for i in range(max(most(True), most(False))):
            w, p = self._make.result()(_key(i))
            plain += [w] if i < most(True) else []
            packed.append(p)
        return plain, packed

    def measure(self) -> Iterator[tuple[LinearRow, list[str]]]:
        """Times the calls: a row for each number of rows of x, and what is wrong with it."""
        plain, packed = self._weights()
        while self._cases:
            case = self._cases.pop(0)
            xs = case.inputs()
            rows = np.asarray(xs[0])[_picked(case.m)]
            some = np.zeros((_CHECKED_ROWS, self.k), rows.dtype)
            some[: len(rows)] = rows
            expected = np.asarray(self._expected.result()(some, packed[0]))[: len(rows)]
            figures: dict[str, float] = {}
            errors = []
            for name, loop in case.loops.items():
                try:
                    ws = plain if name == "bf16" else packed
                    figures[name] = self._figure(name, case.m, loop, xs, ws, expected)
                except (NotCredibleError, jax.errors.JaxRuntimeError) as error:
                    errors.append(f"{name}, {self.n}x{self.k}, M = {case.m}: {error}")
                loop.results = None
            row = LinearRow(
                self.n,
                self.k,
                case.m,
                figures.get("w4a16"),
                figures.get("w4a4"),
                figures.get("invariant"),
                figures.get("bf16"),
            )
            if "invariant" not in case.loops:
                row = dataclasses.replace(row, invariant=row.main)
            yield row, errors

    def _figure(
        self,
        name: str,
        m: int,
        loop: Loop,
        xs: Sequence[jax.Array],
        ws: Sequence[Any],
        expected: np.ndarray,
    ) -> float:
        """Seconds of a call of a loop, if they are credible and its results right."""
        seconds = loop.seconds(xs, ws)
        invariant_16 = (
            name == "invariant" and _scaling(m, self.n, self.k, invariant=True) == Scaling.NONE
        )
        exact = name == "w4a16" or invariant_16
        # Rounding of w to bf16 and of y; quantized activations, or plain weights, differ by 10%.
        y = np.asarray(loop.results[0])[_picked(m)]
        check_result(y, expected, 0.01 if exact else 0.2)
        per_weight = 2 if name == "bf16" else BYTES_PER_WEIGHT
        flops = 2.0 * m * self.n * self.k if exact or name == "bf16" else None
        check_time(seconds, self.n * self.k * per_weight, self._most, flops)
        return seconds


# ---- Quantizer ----------------------------------------------------------------------------------


class Quantize:
    """One shape of the quantizer's input, with each source of the global scale."""

    def __init__(self, compiler: Compiler, m: int, k: int, rotate: int, most: Ceilings) -> None:
        """Has the programs compiled.

        Args:
            compiler: that does it.
            m: rows of x.
            k: its columns.
            rotate: bytes to be moved before an x is met again, where 64 of them are as many.
            most: what the device does at most.
        """
        self.m, self.k, self._rotate, self._most = m, k, rotate, most

        def parts(**how: Any) -> Callable[[Any, Any], Any]:
            def function(x: jax.Array, scale: jax.Array) -> Any:
                t = jax_nvfp4.quantize(x, **(how or {"global_scale": scale}))
                return t.data, t.block_scale

            return function

        functions: dict[str, Callable[[Any, Any], Any]] = {
            "static": parts(),
            "token": parts(scaling="token"),
            "tensor": parts(scaling="tensor"),
            "copy": lambda x, _: -x,
        }
        x, scale = jax.ShapeDtypeStruct((m, k), jnp.bfloat16), jax.ShapeDtypeStruct((), jnp.float32)
        self._loops = {}
        for name, function in functions.items():
            size = self._bytes(name)
            planned = plan(size, size / most.copy + 2e-6, rotate)
            self._loops[name] = Loop.of(compiler, function, x, scale, planned, single_w=True)
        calls = max(loop.plan.calls for loop in self._loops.values())
        self._inputs = _inputs(compiler, calls, m, k)

    def _bytes(self, name: str) -> float:
        return self.m * self.k * (2 + (2 if name == "copy" else BYTES_PER_WEIGHT))

    def measure(self) -> tuple[QuantizeRow, list[str]]:
        """Times the calls; also says what is wrong with the times."""
        xs = self._inputs()
        scale = jnp.float32(0.002)
        figures: dict[str, float | None] = dict.fromkeys(self._loops)
        errors = []
        for name, loop in self._loops.items():
            took = loop.seconds(xs, [scale])
            loop.results = None
            moved = self._bytes(name)
            from_memory = loop.plan.distinct * moved >= self._rotate
            slack = 1.15 if on_gpu() else 10  # a CPU's caches hold what takes turns
            if from_memory and moved / took > slack * self._most.copy:
                errors.append(
                    f"quantize, {name}, {self.m}x{self.k}: {took * 1e6:.1f} us would be "
                    f"{moved / took / 1e12:.2f} TB/s; a copy reaches {self._most.copy / 1e12:.2f}"
                )
            else:
                figures[name] = took
        return QuantizeRow(self.m, self.k, **figures), errors


# ---- One call -----------------------------------------------------------------------------------


class Call:
    """A call that has next to nothing to do, in a chain and by itself."""

    _SIZE = 128

    def __init__(self, compiler: Compiler) -> None:
        """Has the programs compiled."""
        size = self._SIZE
        self._calls = CHAIN if on_gpu() else min(CHAIN, 10)  # a CPU's are compiled one by one
        self._activation = _activation(1, size, size)
        make = functools.partial(_make_weight, shape=(size, size))
        self._make = compiler.add(make, _KEY)
        w = jax.eval_shape(make, _KEY)[1]
        x = jax.ShapeDtypeStruct((1, size), jnp.bfloat16)
        one = jax.jit(self._once)

        def chain(x: jax.Array, w: Any) -> jax.Array:
            for _ in range(self._calls):
                x = one(x, w)  # each result is the next one's input
            return x

        self._chains = {
            f"in a chain of {self._calls}": compiler.add(chain, x, w),
            f"in a chain of {self._calls}, without a CUDA graph": compiler.add(
                chain, x, w, graph=False
            ),
        }

    def _once(self, x: jax.Array, w: Any) -> jax.Array:
        return jax_nvfp4.linear(x, w, activation_scale=self._activation)

    def measure(self) -> dict[str, float]:
        """Seconds of a call, by the way in which it is made."""
        _, w = self._make.result()(_key(0))
        x = jnp.ones((1, self._SIZE), jnp.bfloat16)
        figures = {
            name: measure(functools.partial(program.result(), x, w)) / self._calls
            for name, program in self._chains.items()
        }
        figures["a jit of one call, waited for"] = _waited_for(jax.jit(self._once), x, w)
        plain = jax.jit(lambda x, w: x + w.global_scale.astype(x.dtype))
        figures["a jit of one addition, waited for"] = _waited_for(plain, x, w)
        return figures


def _waited_for(function: Callable[..., Any], *args: Any, runs: int = 200) -> float:
    """Seconds from a call to its result, the host waiting each time."""
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ---- A stack of layers --------------------------------------------------------------------------


class Stack:
    """One token through a stack of decoder layers without attention's own products.

    Each layer: RMS norm, q k v, output projection, residual; RMS norm, gate and up, SiLU, down,
    residual. Attention over one token is its value, so `width` of the q k v columns are passed on.
    """

    def __init__(
        self,
        compiler: Compiler,
        layers: int,
        widths: tuple[int, int, int],
        most: Ceilings,
    ) -> None:
        """Has the programs compiled.

        Args:
            compiler: that does it.
            layers: how many.
            widths: of the model, of q, k and v together, and of the feed-forward layer.
            most: what the device does at most.
        """
        width, qkv, feed_forward = widths
        self._layers, self._width, self._most = layers, width, most
        shapes = ((qkv, width), (width, width), (2 * feed_forward, width), (width, feed_forward))
        self._weights = layers * sum(n * k for n, k in shapes)
        ways: dict[str, Callable[[Any, Any], jax.Array]] = {"bf16": _dot, "W4A4": _linear("token")}
        if all(_scaling(1, n, k) == Scaling.NONE for n, k in shapes):
            ways["W4A16"] = _linear(None)

        def make(key: jax.Array) -> tuple[list[jax.Array], list[Any]]:
            keys = jax.random.split(key, len(shapes))
            pairs = [_make_weight(key, shape) for key, shape in zip(keys, shapes, strict=True)]
            return [w for w, _ in pairs], [packed for _, packed in pairs]

        self._make = compiler.add(make, _KEY)
        layer = jax.eval_shape(make, _KEY)
        x = jax.ShapeDtypeStruct((1, width), jnp.bfloat16)
        self._programs = {}
        for name, function in ways.items():
            stack = [layer[name != "bf16"]] * layers
            tokens = self._tokens(name)
            forward = functools.partial(self._forward, jax.jit(function), tokens)
            program = compiler.add(forward, x, stack, tuned=name == "bf16")
            self._programs[name] = program, tokens

    def _bytes(self, name: str) -> float:
        return self._weights * (2.0 if name == "bf16" else BYTES_PER_WEIGHT)

    def _tokens(self, name: str) -> int:
        """Tokens of a run: a few, so that the host's part in it does not count."""
        shortest = self._bytes(name) / self._most.read
        return max(1, min(32, math.ceil(10e-3 / shortest))) if on_gpu() else 1

    def _forward(
        self, linear: Callable[[Any, Any], jax.Array], tokens: int, x: jax.Array, stack: Any
    ) -> jax.Array:
        def norm(x: jax.Array) -> jax.Array:
            wide = x.astype(jnp.float32)
            scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
            return (wide * scale).astype(x.dtype)

        def token(_: Any, x: jax.Array) -> jax.Array:
            for w_qkv, w_out, w_up, w_down in stack:
                x = x + linear(linear(norm(x), w_qkv)[:, -self._width :], w_out)
                gate, up = jnp.split(linear(norm(x), w_up), 2, axis=-1)
                x = x + linear(jax.nn.silu(gate) * up, w_down)
            return x

        return jax.lax.fori_loop(0, tokens, token, x)  # each token is made of the one before

    def measure(self) -> tuple[dict[str, Any], list[str]]:
        """Seconds of a token by the way to multiply, and what is wrong with them."""
        layers = [self._make.result()(_key(i)) for i in range(self._layers)]
        x = jnp.asarray(np.random.default_rng(0).standard_normal((1, self._width)), jnp.bfloat16)
        seconds, errors = {}, []
        for name, (program, tokens) in self._programs.items():
            stack = [layer[name != "bf16"] for layer in layers]
            took = measure(functools.partial(program.result(), x, stack)) / tokens
            try:
                check_time(took, self._bytes(name), self._most)
                seconds[name] = took
            except NotCredibleError as error:
                errors.append(f"{name}, {self._layers} layers: {error}")
        sizes = {"bf16": self._bytes("bf16"), "nvfp4": self._bytes("W4A4")}
        return {"layers": self._layers, "bytes": sizes, "seconds": seconds}, errors
