# SPDX-License-Identifier: Apache-2.0
"""Device-side times of many calls in one program, with a cold cache."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# On a GPU: one CUDA graph for the program however short it is, its nodes one after another.
_GRAPH_OPTIONS: dict[str, Any] = {
    "xla_gpu_graph_min_graph_size": 1,
    "xla_gpu_command_buffer_scheduling_mode": "SERIALIZE",
}
_BATCHES = 7
_MIN_BATCH_SECONDS = 0.015


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over batches of runs, and the fastest batch."""

    median: float
    best: float


def on_gpu() -> bool:
    """Whether the default device is a GPU."""
    return jax.local_devices()[0].platform == "gpu"


def compile_program(function: Callable[..., Any], *args: Any, graph: bool = True) -> Any:
    """Compiles a function for its arguments.

    Args:
        function: to be traced.
        args: its arguments.
        graph: capture it into a CUDA graph; otherwise every kernel is launched by itself.

    Returns:
        The compiled program, which takes `args`.
    """
    lowered = jax.jit(function).lower(*args)
    if not on_gpu():
        return lowered.compile()
    return lowered.compile(
        compiler_options=_GRAPH_OPTIONS if graph else {"xla_gpu_enable_command_buffer": ""}
    )


def measure(program: Callable[..., Any], args: Sequence[Any], calls: int) -> Timing:
    """Times a compiled program.

    Runs are enqueued one behind another and waited for once a batch, so that the time is the
    device's and not the host's.

    Args:
        program: what to run.
        args: its arguments.
        calls: how many calls a run consists of.
    """
    for _ in range(2):
        jax.block_until_ready(program(*args))
    started = time.perf_counter()
    jax.block_until_ready(program(*args))
    once = time.perf_counter() - started
    runs = max(2, int(_MIN_BATCH_SECONDS / max(once, 1e-7)) + 1)
    seconds = []
    for _ in range(_BATCHES):
        started = time.perf_counter()
        for _ in range(runs):
            result = program(*args)
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / (runs * calls))
    return Timing(median=statistics.median(seconds), best=min(seconds))


def in_turn(function: Callable[[Any, Any], Any], xs: Sequence[Any], ws: Sequence[Any]) -> jax.Array:
    """Calls `function(x, w)` once for each x, the ws in turn: none is met again while cached.

    Each turn of all the ws waits for the one before. XLA would join products that share a weight
    and depend on nothing of each other into one, which reads the weight once for all of them.

    Args:
        function: returns an array, or a tree of them.
        xs: inputs, each different: the compiler merges equal calls.
        ws: weights, together larger than the cache; where there is one, nothing is shared and
            the calls make one turn.

    Returns:
        A scalar that depends on every result, so that none is dropped.
    """
    turn = len(xs) if len(ws) == 1 else len(ws)
    results: list[Any] = []
    for start in range(0, len(xs), turn):
        xs, results = lax.optimization_barrier((list(xs), results))
        calls = zip(xs[start : start + turn], itertools.cycle(ws), strict=False)
        results += [function(x, w) for x, w in calls]
    # The barrier keeps the compiler from computing only the elements that are looked at.
    results = lax.optimization_barrier(results)
    firsts = [leaf.ravel()[0].astype(jnp.float32) for leaf in jax.tree.leaves(results)]
    return functools.reduce(jnp.add, firsts)


def read_ceiling(size: int) -> float:
    """Bytes a second that a reduction over `size` bytes reads: the best of a few shapes."""
    elements = size // 4
    best = 0.0
    for rows in (1 << 9, 1 << 10, 1 << 12, 1 << 14, 1 << 16, 1 << 18):
        array = jnp.ones((rows, max(1, elements // rows)), jnp.int32)
        program = compile_program(lambda a: jnp.sum(a, axis=1), array)
        best = max(best, array.nbytes / measure(program, (array,), 1).best)
    return best


def copy_ceiling(size: int) -> float:
    """Bytes a second, read and written, of adding 1 to an array of `size` bytes."""
    array = jnp.ones((size // 4,), jnp.int32)
    program = compile_program(lambda a: a + 1, array)
    return 2 * array.nbytes / measure(program, (array,), 1).best
