# SPDX-License-Identifier: Apache-2.0
"""Random ragged problems against a float64 oracle that is written without the package.

A sample runs by default. `JAX_NVFP4_RAGGED_PROBLEMS=2000 pytest tests/ragged/test_ragged_oracle.py`
runs that many. Problems of one shape differ in sizes, values and what is poisoned, and share a
program.
"""

import functools
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import this_machine
from ragged_cases import random_weights

import jax_nvfp4 as nvfp4

PROBLEMS = int(os.environ.get("JAX_NVFP4_RAGGED_PROBLEMS", "20"))
PACKED = this_machine.arches()[min(1, len(this_machine.arches()) - 1)]
NAN = np.float32(np.nan)

# Rows, groups, N, K, activation, scaling, out dtype, offset, arch: N and K are those of experts
# whose intermediate size is no multiple of a tile (80 to 2880), as the N of one and the K of the
# other product.
GATED = {
    "swiglu": (nvfp4.SwiGLU(), {}),
    "clamped": (
        nvfp4.SwiGLU(limit=0.5, alpha=1.702, beta=1.0),
        {"limit": 0.5, "alpha": 1.702, "beta": 1.0},
    ),
    "geglu": (nvfp4.GeGLU(), {"gelu": True}),
}
SHAPES = [
    (40, 8, 2 * 80, 32, "swiglu", "token", "bfloat16", False, PACKED),
    (33, 128, 24, 80, None, "static", "float32", False, "canonical"),
    (64, 512, 16, 352, "relu2", "groups", "float32", True, PACKED),
    (50, 8, 2 * 40, 704, "geglu", "tensor", "float32", False, PACKED),
]
MORE = [
    (17, 1, 2 * 352, 48, "clamped", None, "float16", False, "reference"),
    (29, 8, 8, 2880, None, "token", "bfloat16", True, "canonical"),
    (21, 4, 640, 64, "silu", "token", "float16", False, PACKED),
    (90, 16, 24, 768, None, None, "bfloat16", False, PACKED),
    (64, 3, 1408, 32, "gelu_tanh", "tensor", "float32", True, "reference"),
    (31, 5, 33, 1856, None, "groups", "float32", False, PACKED),
    (256, 4, 2 * 130, 100, "swiglu", "static", "bfloat16", True, PACKED),
    (8, 64, 2 * 64, 37, "clamped", "token", "float32", False, "canonical"),
]


def random_sizes(rng, m, groups):
    """Sizes with empty, single and huge groups, now and then negative or beyond the rows."""
    kind = rng.integers(5)
    sizes = np.zeros(groups, np.int64)
    if kind == 0:  # all in one
        sizes[rng.integers(groups)] = m
    elif kind == 1:  # beyond m
        sizes = rng.integers(0, 2 * m // groups + 3, groups)
    elif kind == 2:  # a few rows each, some negative
        sizes = rng.integers(-2, 3, groups)
    else:  # by chance, not all rows, a few groups far more likely than others
        weight = rng.random(groups) ** 4 + 1e-9
        sizes = np.bincount(
            rng.choice(groups, rng.integers(0, m + 1), p=weight / weight.sum()), minlength=groups
        )
    return sizes.astype(np.int32)


def rows_of(sizes, m):
    """The group of each row, or -1: written as a loop over rows."""
    group, used, found = 0, 0, []
    for _ in range(m):
        while group < len(sizes) and used >= sizes[group]:
            group, used = group + 1, 0
        found.append(group if group < len(sizes) else -1)
        used += 1
    return np.array(found)


@functools.cache
def program(activation, out_dtype, scaling):
    """The operation compiled; a static scale is an argument, another scaling is static."""

    def run(x, w, sizes, bias, offset, scale):
        return nvfp4.ragged_linear(
            x,
            w,
            sizes,
            bias,
            group_offset=offset,
            activation=activation,
            activation_scale=scaling if scale is None else scale,
            out_dtype=out_dtype,
        )

    return jax.jit(run)


def weights_of(shape):
    _, groups, n, k, activation, *_, arch = shape
    if activation in GATED:
        half = n // 2
        w = nvfp4.gate_up(
            random_weights(groups, half, k, 1), random_weights(groups, half, k, 2, 10)
        )
    else:
        w = random_weights(groups, n, k, 1)
    codes = oracle.unpack(np.asarray(w.data))
    bits = np.asarray(w.block_scale).view(np.uint8)
    dense = oracle.dequantize(codes, bits, np.asarray(w.global_scale), k)
    return w, dense, arch


def poisoned(w, groups):
    """The weight with NaN in all of some groups."""
    bits = np.asarray(w.block_scale).view(np.uint8).copy()
    scale = np.asarray(w.global_scale).copy()
    bits[groups], scale[groups] = 0x7F, NAN
    return nvfp4.Nvfp4Tensor(w.data, bits, scale, k=w.k, parts=w.parts, gated=w.gated)


def check(shape, w, dense, seed):
    m, groups, n, k, activation, scaling, out_dtype, has_offset, arch = shape
    rng = np.random.default_rng(seed)
    extra = 3 if has_offset else 0
    sizes = random_sizes(rng, m, groups + extra)
    offset = int(rng.integers(-1, extra + 2)) if has_offset else 0
    global_group = rows_of(sizes, m)
    group = np.where(global_group < 0, -1, global_group - offset)
    group = np.where((group >= 0) & (group < groups), group, -1)
    unused = np.setdiff1d(np.arange(groups), group)

    x_dtype = ("float32", "bfloat16", "float16")[seed % 3]
    x = (rng.standard_normal((m, k)) * np.exp2(rng.integers(-2, 3))).astype(x_dtype)
    bias = rng.standard_normal((groups, n)).astype(np.float32)
    scale = {"static": np.float32(0.004), "groups": rng.uniform(0.002, 0.01, groups)}.get(scaling)
    scale = None if scale is None else np.asarray(scale, np.float32)

    # The oracle, row by row.
    if scaling is None:
        narrow = np.float16 if x_dtype == "float16" else ml_dtypes.bfloat16
        values = x.astype(narrow).astype(np.float64)
    else:
        used = x.copy()
        used[global_group < 0] = 0
        given = None
        if scale is not None:
            given = scale if scaling == "static" else np.where(group < 0, 1, scale[group])
            given = np.broadcast_to(given, m).astype(np.float32)
        how = scaling if scaling in ("token", "tensor") else "token"
        values = oracle.dequantize(*oracle.quantize(used, how, given), k)
    z, spread = np.zeros((m, n)), np.zeros((m, n))
    for row in np.flatnonzero(group >= 0):
        w_row = dense[group[row]]
        z[row] = w_row @ values[row] + bias[group[row]]
        spread[row] = 2.0**-18 * (np.abs(w_row) @ np.abs(values[row])) + 2.0**-22 * np.abs(z[row])

    # What is not used is poisoned.
    x[global_group < 0] = np.nan
    bias[unused] = np.nan
    if scaling == "groups":
        scale[unused] = np.nan
    w = poisoned(w, unused)
    w = w if arch == "canonical" else nvfp4.repack(w, arch)
    args = (jnp.asarray(x), w, sizes, jnp.asarray(bias))
    form = GATED[activation][0] if activation in GATED else activation
    at = jnp.int32(offset) if has_offset else None
    y = program(form, out_dtype, scaling)(*args, at, scale)
    y = np.asarray(y)
    assert not y[group < 0].any()
    mine = group >= 0
    if activation in GATED:
        parts = [a[mine].reshape(mine.sum(), 2, n // 2) for a in (z, spread)]
        arguments, spreads = ([a[:, 0], a[:, 1]] for a in parts)
        function = functools.partial(oracle.gated, **GATED[activation][1])
        magnitude = np.abs(arguments[0]) * (np.abs(arguments[1]) + 1)
    else:
        arguments, spreads = [z[mine]], [spread[mine]]
        function = oracle.ACTIVATIONS.get(activation, lambda z: z)
        magnitude = np.abs(arguments[0])
    oracle.assert_activated_close(y[mine], function, arguments, spreads, scale=magnitude)


@pytest.mark.parametrize("shape", SHAPES if PROBLEMS < 100 else SHAPES + MORE, ids=str)
def test_random_problems(shape):
    w, dense, _ = weights_of(shape)
    count = len(SHAPES) if PROBLEMS < 100 else len(SHAPES + MORE)
    for seed in range(-(-PROBLEMS // count)):
        check(shape, w, dense, seed)
