# SPDX-License-Identifier: Apache-2.0
"""Device-side times of calls in a compiled program, with weights that come from memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# On a GPU: one CUDA graph for the program however short it is, its nodes one after another.
_GRAPH_OPTIONS: dict[str, Any] = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
_NO_GRAPH_OPTIONS: dict[str, Any] = {"xla_gpu_enable_command_buffer": ""}
_BATCHES = 5
_MIN_BATCH_SECONDS = 0.02
_MOST_CALLS = 64
"""Calls that a program spells out; more of them are further rounds of its loop."""


def on_gpu() -> bool:
    """Tells whether the default device is a GPU."""
    return jax.local_devices()[0].platform == "gpu"


# ---- Programs -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """How often a program makes a call, and on what.

    Attributes:
        distinct: weights (or other operands that are to come from memory) that take turns.
        calls: calls that the loop's body spells out, a multiple of `distinct`.
        rounds: of the loop.
    """

    distinct: int
    calls: int
    rounds: int

    @property
    def all_calls(self) -> int:
        """Calls of a run."""
        return self.calls * self.rounds


def plan(call_bytes: float, call_seconds: float, rotate: int) -> Plan:
    """Plans a program whose operands are not met again while cached.

    On a GPU the body is one CUDA graph: it is to take far longer than the host needs to launch it,
    and a run far longer than the host needs to hand over its arguments.

    Args:
        call_bytes: bytes that a call moves.
        call_seconds: what a call takes, roughly.
        rotate: bytes to be moved before an operand is met again.
    """
    distinct = min(_MOST_CALLS, max(2, math.ceil(rotate / call_bytes)))
    if not on_gpu():
        return Plan(distinct, distinct, 1)
    turns = math.ceil(300e-6 / (distinct * call_seconds))
    calls = distinct * max(1, min(turns, _MOST_CALLS // distinct))
    return Plan(distinct, calls, max(1, math.ceil(5e-3 / (calls * call_seconds))))


def in_turn(function: Callable[[Any, Any], Any], rounds: int) -> Callable[[Any, Any, Any], Any]:
    """A program that calls `function(x, w)` for each x, over and over, one call after another.

    Args:
        function: gives an array, or a tree of them.
        rounds: how often.

    Returns:
        A function of xs, of ws that take turns if they are fewer, and of one result for each x,
        whose memory the new ones take. It gives the number of rounds and the results.
    """

    def program(xs: Sequence[Any], ws: Sequence[Any], results: Any) -> Any:
        def body(_: Any, carry: Any) -> Any:
            done, old = carry
            # Each call waits for the one before it, and the first for the round before. Otherwise
            # XLA joins products that share a weight, and moves out of the loop what is the same in
            # all rounds. Both results of a barrier are used: what is not is taken out of it.
            x, done = lax.optimization_barrier((xs[0], done))
            new = []
            for i in range(len(old)):
                y = function(x, ws[i % len(ws)])
                if i + 1 < len(old):
                    x, y = lax.optimization_barrier((xs[i + 1], y))
                new.append(y)
            return done + 1, new

        return lax.fori_loop(0, rounds, body, (jnp.int32(0), list(results)))

    return program


class Compiler:
    """Compiles programs while others are still being traced: XLA needs neither Python nor its lock.

    Programs in which XLA chooses among algorithms by timing them on the device are compiled after
    all others, one at a time, so that nothing disturbs the choice. Nothing may be measured before
    `wait`.
    """

    def __init__(self) -> None:
        cores = os.cpu_count() or 1
        self._pool = ThreadPoolExecutor(max(1, min(12, cores - 2)))
        self._futures: list[Future[Any]] = []
        self._tuned: list[tuple[Future[Any], Callable[[], Any]]] = []

    def add(
        self,
        function: Callable[..., Any],
        *args: Any,
        tuned: bool = False,
        graph: bool = True,
        donate: int | tuple[int, ...] = (),
        options: dict[str, Any] | None = None,
    ) -> Future[Any]:
        """Compiles a function.

        Args:
            function: to be traced.
            args: its arguments, or their shapes.
            tuned: whether XLA tries out algorithms for it.
            graph: capture it into a CUDA graph; otherwise every kernel is launched by itself.
            donate: numbers of the arguments whose memory the results take.
            options: of XLA's compiler on a GPU, besides its own.

        Returns:
            The compiled program to come, which takes `args`; one that is tuned comes in `wait`.
        """
        lowered = jax.jit(function, donate_argnums=donate).lower(*args)
        of_graph = _GRAPH_OPTIONS if graph else _NO_GRAPH_OPTIONS
        all_options = of_graph | (options or {}) if on_gpu() else None
        compile_it = functools.partial(lowered.compile, compiler_options=all_options)
        if tuned:
            self._tuned.append((Future(), compile_it))
            return self._tuned[-1][0]
        self._futures.append(self._pool.submit(compile_it))
        return self._futures[-1]

    def wait(self, progress: Callable[[int, int], None] = lambda ready, of: None) -> int:
        """Waits for all programs; one that does not compile says so when it is asked for.

        Args:
            progress: called with the number of programs that are ready and with that of all.

        Returns:
            How many there are.
        """
        count, of = 0, len(self._futures) + len(self._tuned)
        for count, _ in enumerate(as_completed(self._futures), 1):
            progress(count, of)
        for tuned, (future, compile_it) in enumerate(self._tuned, 1):
            try:
                future.set_result(compile_it())
            except jax.errors.JaxRuntimeError as error:
                future.set_exception(error)
            progress(count + tuned, of)
        self._futures, self._tuned = [], []
        return of

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclasses.dataclass
class Loop:
    """A program of `in_turn`, compiled for its plan.

    Attributes:
        program: to come.
        plan: of it.
        result: shapes and dtypes of what a call gives.
        results: of each call of the last run.
    """

    program: Future[Any]
    plan: Plan
    result: Any
    results: Any = None

    @classmethod
    def of(
        cls,
        compiler: Compiler,
        function: Callable[[Any, Any], Any],
        x: Any,
        w: Any,
        plan: Plan,
        *,
        single_w: bool = False,
        tuned: bool = False,
        options: dict[str, Any] | None = None,
    ) -> Loop:
        """Has a program compiled.

        Args:
            compiler: that does it.
            function: of x and w.
            x: its shape and dtype.
            w: those of a tree of arrays.
            plan: what the program is to do.
            single_w: all calls take the same w.
            tuned: whether XLA tries out algorithms for it.
            options: of XLA's compiler on a GPU.
        """
        # Traced once: the calls in the program are calls of one function.
        function = jax.jit(function)
        result = jax.eval_shape(function, x, w)
        operands = [x] * plan.calls, [w] * (1 if single_w else plan.distinct)
        program = compiler.add(
            in_turn(function, plan.rounds),
            *operands,
            [result] * plan.calls,
            tuned=tuned,
            donate=2,
            options=options,
        )
        return cls(program, plan, result)

    def seconds(self, xs: Sequence[Any], ws: Sequence[Any], *, best: bool = False) -> float:
        """Seconds of one call.

        Args:
            xs: as many as the plan has calls, or more.
            ws: likewise for its distinct operands.
            best: as of `measure`.

        Returns:
            The median over batches of runs. `results` are those of the last run.
        """
        operands = list(xs[: self.plan.calls]), list(ws[: self.plan.distinct])
        program = self.program.result()
        self.results = [
            jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.result)
            for _ in range(self.plan.calls)
        ]

        def run() -> Any:
            self.results = program(*operands, self.results)[1]
            return self.results

        return measure(run, best=best) / self.plan.all_calls


# ---- Times --------------------------------------------------------------------------------------


def measure(run: Callable[[], Any], *, best: bool = False) -> float:
    """Times a compiled program.

    Runs are enqueued one behind another and waited for once a batch, so that the time is the
    device's and not the host's.

    Args:
        run: enqueues a run and gives its results.
        best: take the fastest batch, and not the median one.

    Returns:
        Seconds of a run.
    """
    for _ in range(2):
        jax.block_until_ready(run())
    started = time.perf_counter()
    jax.block_until_ready(run())
    once = time.perf_counter() - started
    runs = max(1, math.ceil(_MIN_BATCH_SECONDS / max(once, 1e-7)))
    seconds = []
    for _ in range(_BATCHES):
        started = time.perf_counter()
        for _ in range(runs):
            result = run()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / runs)
    return min(seconds) if best else statistics.median(seconds)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The most that the device does, as measured here.

    Attributes:
        read: bytes a second that a reduction reads.
        copy: bytes a second that an elementwise operation reads and writes.
        multiply: operations a second of XLA's dot of large square bf16 matrices.
    """

    read: float
    copy: float
    multiply: float


def ceilings(size: int) -> Ceilings:
    """Measures the ceilings on arrays of `size` bytes."""
    elements = size // 4
    side = 8192 if on_gpu() else 256
    with Compiler() as compiler:
        reads = []
        for rows in (1 << 9, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18):
            array = jax.ShapeDtypeStruct((rows, max(1, elements // rows)), jnp.int32)
            reads.append((array, compiler.add(lambda a: jnp.sum(a, axis=1), array)))
        line = jax.ShapeDtypeStruct((elements,), jnp.int32)
        copy = compiler.add(lambda a: a + 1, line)
        square = jax.ShapeDtypeStruct((side, side), jnp.bfloat16)
        dot = Loop.of(compiler, lambda x, w: x @ w, square, square, Plan(2, 2, 2), tuned=True)
        compiler.wait()
    fastest = 0.0
    for array, program in reads:
        ones = jnp.ones(array.shape, array.dtype)
        seconds = measure(lambda p=program, a=ones: p.result()(a), best=True)  # type: ignore[misc]
        fastest = max(fastest, ones.nbytes / seconds)
    ones = jnp.ones(line.shape, line.dtype)
    copy_seconds = measure(lambda: copy.result()(ones), best=True)
    # Random values: a product of equal ones needs less power, and runs at a higher clock.
    keys = jax.random.split(jax.random.key(0), 4)
    matrices = [jax.random.normal(key, square.shape, square.dtype) for key in keys]
    dot_seconds = dot.seconds(matrices[:2], matrices[2:], best=True)
    return Ceilings(fastest, 2 * ones.nbytes / copy_seconds, 2.0 * side**3 / dot_seconds)
