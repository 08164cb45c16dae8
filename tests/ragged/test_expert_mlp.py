# SPDX-License-Identifier: Apache-2.0
"""`expert_mlp`: from the router's choice to the weighted sum of the experts' outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ragged_cases import random_weights

import jax_nvfp4 as nvfp4
from jax_nvfp4.ops.expert_mlp.api import COUNTED_PAIRS
from jax_nvfp4.ops.expert_mlp.api import _sorted as sorted_pairs

T, TOP_K, E, K, I = 6, 2, 8, 64, 48  # noqa: E741
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((T, K)), jnp.float32)
W13 = nvfp4.gate_up(random_weights(E, I, K, 1), random_weights(E, I, K, 2))
W2 = random_weights(E, K, I, 3)
B13 = jnp.asarray(RNG.standard_normal((E, 2 * I)), jnp.float32)
B2 = jnp.asarray(RNG.standard_normal((E, K)), jnp.float32)
INDICES = jnp.asarray([[1, 4], [4, 1], [7, 7], [0, -1], [8, 3], [2**31 - 1, -(2**31)]], jnp.int32)
WEIGHTS = jnp.asarray(RNG.random((T, TOP_K)), jnp.float32)
SWIGLU = nvfp4.SwiGLU(limit=3.0)
PACKED = this_machine.arches()[min(1, len(this_machine.arches()) - 1)]
mlp = functools.partial(nvfp4.expert_mlp, activation=SWIGLU, batch_invariant=True)


def by_linear(x, indices, weights, *, hidden_scale, activation_scale):
    """Token by token, pair by pair, through `linear`; the sum in the pairs' order."""

    def of(w13, b13, w2, b2):
        how = {"batch_invariant": True, "activation_scale": activation_scale}
        hidden = nvfp4.linear(x, w13, b13, activation=SWIGLU, out_dtype=jnp.bfloat16, **how)
        how["activation_scale"] = hidden_scale
        return nvfp4.linear(hidden, w2, b2, out_dtype=jnp.float32, **how)

    every = jax.jit(lambda *a: jax.lax.map(lambda part: of(*part), a))(W13, B13, W2, B2)
    every, y = np.asarray(every), np.zeros((T, K), np.float32)
    for t in range(T):
        for j in range(TOP_K):
            if 0 <= indices[t, j] < E:
                y[t] += np.float32(weights[t, j]) * every[indices[t, j], t]
    return y


@pytest.mark.parametrize("scales", [("token", "token"), (None, 0.01), (0.002, None)])
def test_it_is_the_sum_of_its_experts(scales):
    activation_scale, hidden_scale = scales
    how = {"activation_scale": activation_scale, "hidden_scale": hidden_scale}
    expected = by_linear(X, np.asarray(INDICES), WEIGHTS, **how)
    w13, w2 = nvfp4.repack(W13, PACKED), nvfp4.repack(W2, PACKED)
    f = jax.jit(functools.partial(mlp, **how))
    y = f(X, w13, w2, INDICES, WEIGHTS, B13, B2)
    np.testing.assert_array_equal(y, expected)
    assert not y[5].any()
    # Weights of experts that are not held may be anything.
    held = (INDICES >= 0) & (INDICES < E)
    y = f(X, w13, w2, INDICES, jnp.where(held, WEIGHTS, np.nan), B13, B2)
    np.testing.assert_array_equal(y, expected)


def test_experts_of_an_offset():
    whole = jax.jit(mlp)(X, W13, W2, INDICES, WEIGHTS, B13, B2)
    part = jax.jit(lambda o, *a: mlp(*a, expert_offset=o))
    total = np.zeros((T, K), np.float32)
    for offset in (0, 4):
        own = jax.tree.map(lambda a, o=offset: a[o : o + 4], (W13, W2, B13, B2))
        total += part(jnp.int32(offset), X, own[0], own[1], INDICES, WEIGHTS, own[2], own[3])
    np.testing.assert_allclose(total, whole, rtol=1e-6, atol=1e-6)


def test_plain_experts_and_dtypes():
    w1 = random_weights(E, I, K, 1)
    x, weights = X.astype(jnp.bfloat16), WEIGHTS.astype(jnp.bfloat16)
    f = jax.jit(functools.partial(nvfp4.expert_mlp, activation="relu2"))
    y = f(x, w1, W2, INDICES, weights)
    assert (y.shape, y.dtype) == ((T, K), jnp.bfloat16)
    wide = f(x.astype(jnp.float32), w1, W2, INDICES, weights.astype(jnp.float32))
    assert wide.dtype == jnp.float32  # and the hidden rows are bfloat16 all the same
    np.testing.assert_array_equal(y, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("tokens,top_k", [(0, 2), (3, 0)])
def test_no_tokens_and_no_experts(tokens, top_k):
    choice = jnp.zeros((tokens, top_k))
    y = mlp(X[:tokens], W13, W2, choice.astype(jnp.int32), choice)
    np.testing.assert_array_equal(y, np.zeros((tokens, K)))


def test_gradient():
    """Of the weights of the router exactly, of x and the biases through the activation."""
    indices = jnp.clip(INDICES, 0, E - 1)
    dense_weights = jax.jit(lambda *ws: [w.dequantize() for w in ws])(W13, W2)
    how = {"activation_scale": None, "batch_invariant": False}

    def dense(x, weights, b13, b2, d13, d2):
        y = 0
        for j in range(TOP_K):
            z = jnp.einsum("tk,tnk->tn", x, d13[indices[:, j]]) + b13[indices[:, j]]
            g, u = jnp.minimum(z[:, :I], 3.0), jnp.clip(z[:, I:], -3.0, 3.0)
            h = g * jax.nn.sigmoid(g) * u
            z = jnp.einsum("tn,tkn->tk", h, d2[indices[:, j]]) + b2[indices[:, j]]
            y = y + weights[:, j, None] * z
        return y

    def of(f):  # what is an argument is no constant for XLA to fold
        return jax.jit(jax.grad(lambda *a: (f(*a) * X).sum(), (0, 1, 2, 3)))

    x = X.astype(jnp.bfloat16).astype(jnp.float32)
    ours = lambda x, w, b13, b2, w13, w2: mlp(x, w13, w2, indices, w, b13, b2, **how)  # noqa: E731
    found = of(ours)(x, WEIGHTS, B13, B2, W13, W2)
    wanted = of(dense)(x, WEIGHTS, B13, B2, *dense_weights)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("sizes", this_machine.mesh_sizes()[:1] or (None,), ids=str)
def test_experts_are_divided_over_devices(sizes):
    mesh = this_machine.mesh(sizes)
    expected = jax.jit(mlp)(X, W13, W2, INDICES, WEIGHTS, B13, B2)
    placed = jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, P(("x", "y")))), (W13, W2, B13, B2)
    )
    program = (
        jax.jit(lambda a, b, c, d: mlp(X, a, b, INDICES, WEIGHTS, c, d)).lower(*placed).compile()
    )
    np.testing.assert_array_equal(program(*placed), expected)
    assert "all-gather" not in program.as_text()


def call(**changed):
    args = {"x": X, "w13": W13, "w2": W2, "expert_indices": INDICES, "expert_weights": WEIGHTS}
    return lambda: mlp(**(args | changed))


REFUSED = [
    (call(x=X[0]), ValueError, r"x must have shape \(T, K\); got \(64,\)"),
    (call(w13=X), TypeError, "w13 must be an Nvfp4Tensor"),
    (call(w2=W13), ValueError, r"w2 must have shape \(8, K, 48\).*got \(8, 96, 64\)"),
    (call(expert_indices=INDICES[:3]), ValueError, r"\(T, top_k\) with T = 6; got \(3, 2\)"),
    (call(expert_indices=WEIGHTS), TypeError, "expert_indices must be integers; got float32"),
    (call(expert_weights=WEIGHTS[:, :1]), ValueError, r"shape of expert_indices, \(6, 2\)"),
    (call(activation="relu2"), ValueError, "for plain weights"),
    (call(activation_scale=0.1), ValueError, "hidden_scale must be given"),
    (call(expert_offset=[1, 2]), ValueError, "expert_offset must have shape"),
    (call(b2=B13), ValueError, r"bias must have shape \(8, 64\)"),
]


@pytest.mark.parametrize("call,error,message", REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("pairs", "groups"), [(0, 3), (1, 1), (40, 512), (1024, 8), (1025, 8)])
def test_pairs_are_sorted_stably(pairs, groups):
    assert (pairs <= COUNTED_PAIRS) == (pairs < 1025)
    group = np.random.default_rng(pairs).integers(0, groups + 1, pairs).astype(np.int32)
    with jax.numpy_rank_promotion("raise"):
        found = jax.jit(sorted_pairs, static_argnums=1)(group, groups)
    order = np.argsort(group, kind="stable")
    expected = order, np.argsort(order), np.bincount(group, minlength=groups + 1)[:groups]
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == jnp.int32
        np.testing.assert_array_equal(got, want)
