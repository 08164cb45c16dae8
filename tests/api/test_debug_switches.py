# SPDX-License-Identifier: Apache-2.0
"""JAX's switches that look for mistakes find none in ours: no false alarm, the same bits."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental import checkify

import jax_nvfp4 as nvfp4

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 64)), jnp.float32)
X = X.at[0, 0].set(0)  # a row of zeros divides by nothing
BIAS = jnp.ones(96)
T = nvfp4.quantize(np.random.default_rng(1).standard_normal((96, 64)).astype(np.float32))
TOKEN = nvfp4.quantize(T.dequantize(), scaling="token")
WEIGHTS = {"canonical": T, "token": TOKEN, "repacked": nvfp4.repack(T, "sm_90a")}
SCALE = jnp.float32(0.1)
STACK = jax.vmap(nvfp4.quantize)(jnp.stack([T.dequantize()] * 2))


def gradient(x, weight):
    def loss(x, bias):
        return nvfp4.linear(x, weight, bias).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=(0, 1))(x, BIAS)


def linen_layer(x):
    layer = nvfp4.Nvfp4Dense(96, activation_scale="static")
    _, quant = layer.apply({"params": {"kernel": T, "bias": BIAS}}, x, mutable=["quant"])
    return layer.apply({"params": {"kernel": T, "bias": BIAS}, **quant}, x)


def nnx_layer(x):
    layer = nvfp4.nnx.Nvfp4Linear(64, 96, activation_scale="static", rngs=nnx.Rngs(0))
    layer.calibrating = True
    layer(x)
    layer.calibrating = False
    return layer(x), layer.input_scale[...]


CALLS = {
    "quantize": lambda x: [nvfp4.quantize(x), nvfp4.quantize(x, scaling="token")],
    "quantize by a search": lambda x: [
        nvfp4.quantize(x, search="4over6"),
        nvfp4.quantize(x, search="sweep", scaling="token", importance=jnp.ones(64)),
    ],
    "quantize by a given scale": lambda x: [
        nvfp4.quantize(x, global_scale=SCALE),
        nvfp4.quantize(x, global_scale=jnp.full((2, 3), 0.1, jnp.float32)),
    ],
    "global_scale": lambda x: [nvfp4.global_scale(x), nvfp4.global_scale(x, "token")],
    "dequantize": lambda x: [
        form.dequantize() for form in (*WEIGHTS.values(), STACK, nvfp4.quantize(x))
    ],
    "repack": lambda x: [nvfp4.repack(w, "sm_100f").canonical() for w in (T, STACK)],
    "linear": lambda x: [
        nvfp4.linear(x, weight, BIAS, activation_scale=scale)
        for weight, scale in zip(WEIGHTS.values(), (SCALE, "token", "tensor"), strict=True)
    ],
    "weight-only": lambda x: nvfp4.linear(x, TOKEN, BIAS, activation_scale=None),
    "linear in 16 bits": lambda x: nvfp4.linear(x.astype(jnp.bfloat16), T, BIAS),
    "batch_invariant": lambda x: nvfp4.linear(x, T, BIAS, batch_invariant=True),
    "gradient": lambda x: gradient(x, TOKEN),
    "vmap": lambda x: [
        jax.vmap(nvfp4.quantize)(x),
        jax.vmap(lambda x, w: nvfp4.linear(x, w, BIAS))(x, STACK),
    ],
    "linen": linen_layer,
    "nnx": nnx_layer,
}
EXECUTED = ("quantize", "global_scale", "dequantize", "repack", "gradient", "nnx")


@pytest.mark.parametrize("name", CALLS)
def test_implicit_promotion(name):
    """Tracing and lowering, by each platform's rules, is where these look."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        jax.jit(CALLS[name]).trace(X).lower(lowering_platforms=("cpu", "cuda"))


@pytest.mark.parametrize("name", ["gradient", "vmap", "nnx", "linen"])
def test_no_tracer_leaks(name):
    with jax.checking_leaks():
        jax.jit(CALLS[name]).trace(X)


def test_x64():
    """Numbers of Python are float64 then; arrays of the user's stay what they are."""
    with jax.enable_x64(True):
        y = nvfp4.linear(X, T, BIAS, activation_scale=0.1)
        assert y.dtype == jnp.float32 and nvfp4.global_scale(X).dtype == jnp.float32
        assert nvfp4.quantize(X, global_scale=0.5).global_scale.dtype == jnp.float32
        with pytest.raises(TypeError, match="float64"):
            nvfp4.quantize(np.ones((2, 16)))
    expected = nvfp4.linear(X, T, BIAS, activation_scale=0.1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EXECUTED)
def test_debug_nans_and_infs(name):
    expected = CALLS[name](X)
    with jax.debug_nans(True), jax.debug_infs(True):
        for result in (CALLS[name](X), jax.jit(CALLS[name])(X)):
            for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
                assert a.dtype == b.dtype and a.shape == b.shape


def test_debug_nans_names_the_culprit():
    """JAX runs the program again, operation by operation, to find the NaN: not in ours."""

    @jax.jit
    def step(x):
        return jnp.log(nvfp4.linear(x, T).sum() * 0 - 1) + nvfp4.quantize(x).dequantize().sum()

    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="log"):
        step(X)
    bad = X.at[0, 0].set(jnp.inf)
    with jax.debug_nans(True), pytest.raises(FloatingPointError, match="in nvfp4_quantize"):
        nvfp4.quantize(bad)  # a true alarm


def test_transfer_guard():
    """Arrays on the device stay there; jax.numpy itself transfers what Python numbers it is given.

    On a CPU no transfer back would be seen.
    """
    q, w = nvfp4.quantize(X), nvfp4.repack(T, "sm_90a")
    calls = [
        lambda: nvfp4.quantize(X, global_scale=SCALE).dequantize(),
        lambda: nvfp4.global_scale(X, "token"),
        lambda: nvfp4.repack(T, "sm_90a").canonical(),
        lambda: nvfp4.linear(X, w, BIAS, activation_scale=SCALE),
        q.dequantize,
        lambda: jax.jvp(lambda x: nvfp4.linear(x, w, BIAS), (X,), (X,)),
    ]
    for call in calls:
        call()
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(call())


@pytest.mark.parametrize("name", ["quantize", "linear", "gradient", "repack"])
def test_checkify(name):
    """NaNs, divisions by zero and indices, checked in each operation."""
    error, _ = checkify.checkify(CALLS[name], errors=checkify.all_checks)(X)
    assert error.get() is None


def test_disable_jit():
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.disable_jit())
        stack.enter_context(jax.debug_nans(True))
        T.dequantize(), nvfp4.global_scale(X), nvfp4.quantize(X)


def test_repack_compiles_once_for_a_shape(caplog):
    """Operation by operation, a new shape compiled dozens of programs."""
    weights = [nvfp4.quantize(jnp.full((48, 112), value)) for value in (1.0, 2.0)]
    for arch in ("sm_90a", "sm_120f"):
        for weight, programs in zip(weights, (1, 0), strict=True):
            jax.block_until_ready(weight.data)
            caplog.clear()
            with jax.log_compiles(True):
                jax.block_until_ready(jax.tree.leaves(nvfp4.repack(weight, arch)))
            finished = [m for m in caplog.messages if "Finished XLA compilation" in m]
            assert len(finished) == programs, caplog.messages
    gated = nvfp4.gate_up(*[nvfp4.quantize(jnp.ones((48, 112)), scaling="token")] * 2)
    caplog.clear()
    with jax.log_compiles(True):
        jax.block_until_ready(jax.tree.leaves(nvfp4.repack(gated, "sm_90a")))
    finished = [m for m in caplog.messages if "Finished XLA compilation" in m]
    assert len(finished) <= 2  # the codes, and the scales of the rows
