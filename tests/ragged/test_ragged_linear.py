# SPDX-License-Identifier: Apache-2.0
"""`ragged_linear`: which rows are multiplied by what, bit for bit as `linear` does it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from ragged_cases import random_weights

import jax_nvfp4 as nvfp4

M, G, N, K = 23, 5, 40, 48
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal((G, N)), jnp.float32)
STATIC = jnp.asarray([0.001, 0.002, 0.004, 0.0015, 0.003], jnp.float32)
PACKED = this_machine.arches()[min(1, len(this_machine.arches()) - 1)]


def weights(groups=G, rows=N, seed=1):
    return random_weights(groups, rows, K, seed)


W = weights()
GATED = nvfp4.gate_up(weights(rows=N // 2, seed=2), weights(rows=N // 2, seed=3))


def group_of_rows(sizes, m=M, offset=0, groups=G):
    """The group of each row, -1 where it has none: by counting, row by row."""
    found = []
    for group, size in enumerate(sizes):
        found += [group - offset] * min(max(int(size), 0), m)
    found = np.array((found + [-1] * m)[:m])
    return np.where((found >= 0) & (found < groups), found, -1)


def of_every_group(x, w, bias, **how):
    """What `linear` makes of all rows with each weight: (G, M, columns)."""
    scale = how.pop("activation_scale", "token")
    per_group = scale if hasattr(scale, "shape") and scale.shape else None

    def one(part):
        w, bias, own = part
        used = scale if per_group is None else own
        return nvfp4.linear(x, w, bias, activation_scale=used, batch_invariant=True, **how)

    return jax.jit(lambda w, b, s: jax.lax.map(one, (w, b, s)))(
        w, bias, jnp.zeros(w.shape[0]) if per_group is None else per_group
    )


def chosen(every, groups):
    """Rows of those of each group; zeros where a row has none."""
    rows = np.asarray(every)[np.maximum(groups, 0), np.arange(len(groups))]
    return np.where(groups[:, None] < 0, np.zeros((), rows.dtype), rows)


SIZES = [
    [3, 0, 9, 4, 2],
    [0, 0, 0, 0, 23],
    [23, 0, 0, 0, 0],
    [0, 0, 0, 0, 0],
    [1, 1, 1, 1, 1],
    [4, -7, 5, -1, 3],
    [20, 2, 9, 9, 9],
    [2**31 - 1, 2**31 - 1, 1, 1, 1],
    [0, 2**31 - 1, 2**31 - 1, -(2**31), 5],
]

CASES = [
    ("canonical", W, None, "token", "float32"),
    (PACKED, W, "gelu_tanh", STATIC, "bfloat16"),
    (PACKED, GATED, nvfp4.SwiGLU(limit=2.0), None, "float32"),
    ("reference", GATED, None, jnp.float32(0.002), "float16"),
]


@pytest.mark.parametrize(("arch", "w", "activation", "scale", "out_dtype"), CASES)
def test_a_group_has_the_bits_of_linear(arch, w, activation, scale, out_dtype):
    w = w if arch == "canonical" else nvfp4.repack(w, arch)
    how = {"activation": activation, "activation_scale": scale, "out_dtype": out_dtype}
    every = of_every_group(X, w, BIAS, **how)
    f = jax.jit(functools.partial(nvfp4.ragged_linear, batch_invariant=True, **how))
    for sizes in SIZES:
        y = f(X, w, jnp.asarray(sizes, jnp.int32), BIAS)
        assert y.dtype == out_dtype
        np.testing.assert_array_equal(y, chosen(every, group_of_rows(sizes)), err_msg=str(sizes))
    assert f._cache_size() == 1  # sizes are traced


def test_groups_of_others_are_zero():
    w = nvfp4.repack(W, PACKED)
    every = of_every_group(X, w, BIAS)
    f = jax.jit(functools.partial(nvfp4.ragged_linear, batch_invariant=True))
    sizes = np.array([4, 2, 0, 3, 6, 1, 4], np.int32)
    for offset in (-9, -2, 0, 1, 2, 5, 7, 100):
        y = f(X, w, sizes, BIAS, group_offset=jnp.int32(offset))
        np.testing.assert_array_equal(
            y, chosen(every, group_of_rows(sizes, offset=offset)), err_msg=str(offset)
        )
    halves = [jax.tree.map(lambda a, s=s: a[s], w) for s in (slice(0, 3), slice(2, 5))]
    total = f(X, halves[0], sizes[:5], BIAS[:3], group_offset=jnp.int32(0)) + f(
        X, halves[1], sizes[:5], BIAS[2:], group_offset=jnp.asarray([2])
    )
    alone = f(X, halves[0], sizes[:5] * [0, 0, 1, 0, 0], BIAS[:3], group_offset=jnp.int32(0))
    assert not alone[sizes[:2].sum() :][3:].any()
    groups = group_of_rows(sizes[:5])
    twice = np.where(groups[:, None] == 2, 2, 1)
    np.testing.assert_array_equal(total, twice * chosen(every, groups))


def test_tensor_scaling_is_over_rows_that_have_a_group():
    sizes = [3, 0, 9, 4, 2]
    x = X.at[18:].set(1e6)
    y = nvfp4.ragged_linear(x, W, jnp.asarray(sizes), BIAS, activation_scale="tensor")
    scale = nvfp4.global_scale(X[:18])
    expected = nvfp4.ragged_linear(x, W, jnp.asarray(sizes), BIAS, activation_scale=scale)
    np.testing.assert_array_equal(y, expected)
    assert not y[18:].any()


@pytest.mark.parametrize("scale", ["token", "tensor", "static"])
def test_what_is_not_used_is_not_read(scale):
    """NaN in every unused row, expert, bias and scale changes no bit of the others."""
    sizes, used, rows = [3, 0, 9, 0, 2], np.array([0, 2, 4]), 14
    f = jax.jit(nvfp4.ragged_linear, static_argnames="activation_scale")
    if scale == "static":
        f = jax.jit(nvfp4.ragged_linear)

    def run(x, w, bias, static):
        how = static if scale == "static" else scale
        return f(x, w, jnp.asarray(sizes), bias, activation_scale=how)

    def spoiled(a, value):
        return jnp.full_like(a, value).at[used].set(jnp.asarray(a)[used])

    nan = jnp.float32(np.nan)
    bits = jax.lax.bitcast_convert_type(W.block_scale, jnp.uint8)
    w = nvfp4.Nvfp4Tensor(spoiled(W.data, 0x77), spoiled(bits, 0x7F), spoiled(W.global_scale, nan))
    clean = run(X, W, BIAS, STATIC)
    y = run(X.at[rows:].set(nan), w, spoiled(BIAS, nan), spoiled(STATIC, nan))
    np.testing.assert_array_equal(y, clean)
    assert np.isfinite(clean).all()
    # And a bad expert or row is seen where it is used, and nowhere else.
    bad = jax.tree.map(jnp.asarray, W)
    bad = nvfp4.Nvfp4Tensor(bad.data, bits.at[2, 7, 0].set(0x7F), bad.global_scale)
    y = run(X.at[13, 0].set(nan), bad, BIAS, STATIC)
    assert np.isnan(y[3:12, 7]).all()
    assert np.isnan(y[13]).all()
    keep = np.ones((M, N), bool)
    keep[3:12, 7], keep[13] = False, False
    if scale != "tensor":  # whose scale is of finite elements, of which there is one less
        np.testing.assert_array_equal(np.asarray(y)[keep], np.asarray(clean)[keep])


def test_it_costs_what_the_rows_cost():
    """No array of all experts' values, no product with each of them."""
    groups = 64
    w = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, weights(groups)))

    def loss(x, w, sizes):
        return nvfp4.ragged_linear(x, w, sizes).sum()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(
        jax.ShapeDtypeStruct((M, K), jnp.float32), w, jax.ShapeDtypeStruct((groups,), jnp.int32)
    )
    text = lowered.as_text()
    assert "ragged" not in text.replace("nvfp4_ragged", "").replace("ragged_linear", "")
    widest = max(
        int(np.prod([int(d) for d in shape.split("x")[:-1]]))
        for shape in re.findall(r"tensor<((?:\d+x)+)f32>", text)
        for shape in [shape + "f32"]
    )
    assert widest < groups * N * K // 4


@pytest.mark.parametrize(
    "m,groups,rows,k", [(0, 3, 8, 16), (4, 0, 8, 16), (4, 3, 0, 16), (4, 3, 8, 0)]
)
def test_nothing(m, groups, rows, k):
    w = nvfp4.Nvfp4Tensor(
        np.zeros((groups, rows, k // 2), np.uint8),
        np.zeros((groups, rows, k // 16), np.uint8),
        np.ones(groups, np.float32),
    )
    bias = jnp.ones((groups, rows))
    y = nvfp4.ragged_linear(jnp.ones((m, k)), w, jnp.ones(groups, jnp.int32), bias)
    expected = np.zeros((m, rows))
    expected[:groups] = 1  # a row each, of the bias alone
    np.testing.assert_array_equal(y, expected[:m])


# ---- What is refused ----------------------------------------------------------------------------

SIZES_OF_5 = jnp.zeros(5, jnp.int32)
REFUSED = [
    (lambda: nvfp4.ragged_linear(X[None], W, SIZES_OF_5), ValueError, r"\(M, K\).*\(1, 23, 48\)"),
    (lambda: nvfp4.ragged_linear(X[:, :16], W, SIZES_OF_5), ValueError, "x has K = 16"),
    (
        lambda: nvfp4.ragged_linear(X, jax.tree.map(lambda a: a[0], W), SIZES_OF_5),
        ValueError,
        r"weight must have shape \(G, N, K\); got \(40, 48\)",
    ),
    (lambda: nvfp4.ragged_linear(X, X, SIZES_OF_5), TypeError, "weight must be an Nvfp4Tensor"),
    (lambda: nvfp4.ragged_linear(X, W, [1, 2]), ValueError, r"group_sizes .*\(5,\).*got \(2,\)"),
    (lambda: nvfp4.ragged_linear(X, W, jnp.zeros(5)), TypeError, "integers; got float32"),
    (lambda: nvfp4.ragged_linear(X, W, None), TypeError, "group_sizes must be integers"),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, group_offset=[1, 2]),
        ValueError,
        r"group_offset must have shape \(\) or \(1,\); got \(2,\)",
    ),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, group_offset=1.0),
        TypeError,
        "group_offset must be integers; got float32",
    ),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, BIAS[0]),
        ValueError,
        r"bias must have shape \(5, 40\).*got \(40,\)",
    ),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, activation_scale=STATIC[:3]),
        ValueError,
        r"one for each group, \(5,\); got shape \(3,\)",
    ),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, activation_scale="row"),
        ValueError,
        r"float32 of shape \(\) or \(5,\), or None; got 'row'",
    ),
    (
        lambda: nvfp4.ragged_linear(X, W, SIZES_OF_5, activation=nvfp4.SwiGLU()),
        ValueError,
        "takes a gated weight",
    ),
]


@pytest.mark.parametrize("call,error,message", REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
