# SPDX-License-Identifier: Apache-2.0
"""Each construct that `convert` follows a weight through gives what the dense program gives.

The weights are exactly representable and the activations stay at 16 bits, so the two programs
differ in the order of their sums alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

import jax_nvfp4 as nvfp4
from jax_nvfp4.products.kernel import Nvfp4Kernel

D = 32


def exact(*shape, seed=0, dtype=jnp.bfloat16):
    """Values that NVFP4 holds as they are: the global scale of +-2688 is a power of two."""
    rng = np.random.default_rng(seed)
    values = rng.choice([-2688.0, -1344.0, 1344.0, 2688.0], shape) * 2.0**-14
    return jnp.asarray(values, dtype)


X = jnp.asarray(np.random.default_rng(7).standard_normal((4, D)), jnp.bfloat16)


def weights(**shapes):
    return {name: exact(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}


def check(fn, params, *args, left=(), where=lambda path, use: True, **options):
    """Converts, and compares values, shapes, dtypes; returns the converted params."""
    expected = jax.jit(fn)(params, *args)
    run, converted, report = nvfp4.convert(
        fn, params, *args, where=where, activation_scale=None, **options
    )
    found = jax.jit(run)(converted, *args)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.abs(a - b).max() <= 2**-7 * np.abs(b).max()
    names = {leaf.name for leaf in report.left}
    assert names == set(left), str(report)
    return converted


def test_every_construct_that_rearranges():
    def fn(p, x):
        y = x @ p["plain"]
        y = y @ p["transposed"].T
        y = jnp.einsum("td,dhk->thk", y, p["heads"])
        y = jnp.einsum("thk,hkd->td", y, p["out"])
        y = y @ p["cut"].reshape(D, 2, D // 2).reshape(D, D)
        y = y @ p["joined"].reshape(D, D)
        y = y @ jnp.squeeze(p["ones"], 1)
        y = p["left"] @ y.T
        return y.T @ p["cast"].astype(jnp.float32).astype(x.dtype)

    square = (D, D)
    check(
        fn,
        weights(
            plain=square,
            transposed=square,
            heads=(D, 2, D // 2),
            out=(2, D // 2, D),
            cut=square,
            joined=(2, D // 2, D),
            ones=(D, 1, D),
            left=square,
            cast=square,
        ),
        X,
    )


def test_indices_slices_and_splits_of_stacked_weights():
    def fn(p, x, i):
        y = x @ p["stack"][0] + x @ p["stack"][i] + x @ p["stack"][-1]
        y = y + x @ lax.dynamic_index_in_dim(p["stack"], i, keepdims=False)
        q, k, v = jnp.split(p["fused"], 3, axis=-1)
        y = y + (x @ q) * (x @ k) + x @ v
        half = p["stack"][1:3]
        return y + x @ half[0] + jnp.einsum("td,ldf->ltf", x, half).sum(0)

    converted = check(fn, weights(stack=(4, D, D), fused=(D, 3 * D)), X, jnp.int32(2))
    assert converted["stack"].shape == (4, D, D)
    assert converted["fused"].shape == (D, 3, D)


def test_q_k_v_split_after_one_product():
    def fn(p, x):
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        return q * k + v

    check(fn, weights(qkv=(D, 3 * D)), X)


def test_scan_over_stacked_layers_remat_and_jit():
    @jax.checkpoint
    def layer(x, w):
        return jax.nn.silu(x @ w["up"]) @ w["down"] * w["scale"]

    @jax.jit
    def inner(p, x):
        x, sums = lax.scan(lambda x, w: (layer(x, w), x.sum()), x, p["blocks"])
        return x @ p["head"], sums

    def fn(p, x):
        return inner(p, x)

    params = weights(head=(D, D))
    params["blocks"] = weights(up=(3, D, D), down=(3, D, D), scale=(3, D))
    converted = check(fn, params, X, left={"blocks.scale"})
    assert isinstance(converted["blocks"]["up"], Nvfp4Kernel)


def test_while_loop_and_cond():
    def fn(p, x, n):
        def body(state):
            i, x, w = state
            x = lax.cond(i % 2 == 0, lambda x: x @ w, lambda x: x @ p["odd"], x)
            return i + 1, jnp.tanh(x), w

        _, x, _ = lax.while_loop(lambda s: s[0] < n, body, (0, x, p["even"]))
        x, _ = lax.scan(
            lambda c, _: ((jnp.tanh(c[0] @ c[1]), c[1]), None), (x, p["even"]), length=2
        )
        return x[0]

    check(fn, weights(even=(D, D), odd=(D, D)), X, 3)


def test_loops_under_vmap_end_at_their_own_steps():
    def fn(p, xs, ns):
        def one(x, n):
            def step(state):
                return (state[0] + 1, jnp.tanh(state[1] @ p["w"]))

            return lax.while_loop(lambda state: state[0] < n, step, (0, x))[1]

        return jax.vmap(one)(xs, ns)

    check(fn, weights(w=(D, D)), X, jnp.asarray([3, 0, 1, 2]))


def test_vmap_of_the_program_and_batched_weights():
    def fn(p, xs):
        one = jax.vmap(lambda x: x @ p["shared"])(xs)
        each = jax.vmap(lambda x, w: x @ w)(one, p["each"])
        every = jnp.einsum("etd,edf->etf", each, p["experts"])
        return jnp.einsum("etd,edf->tf", every, p["experts"])

    xs = jnp.stack([X, X * 2, X - 1])
    params = weights(shared=(D, D), each=(3, D, D), experts=(3, D, D))
    check(fn, params, xs, left={"experts"})


def test_custom_derivatives_keep_their_rules():
    @jax.custom_jvp
    def act(x, w):
        return jnp.tanh(x @ w)

    @act.defjvp
    def _(primals, tangents):
        (x, w), (dx, _) = primals, tangents
        return act(x, w), 3 * (dx @ w)

    @jax.custom_vjp
    def gate(x, w):
        return jnp.sin(x @ w)

    gate.defvjp(lambda x, w: (gate(x, w), w), lambda w, dy: (5 * (dy @ w.T), jnp.zeros_like(w)))

    def fn(p, x):
        return gate(act(x, p["a"]), p["b"])

    params = weights(a=(D, D), b=(D, D))
    converted = check(fn, params, X)
    run, _, _ = nvfp4.convert(fn, params, X, activation_scale=None)
    found = jax.grad(lambda x: run(converted, x).astype(jnp.float32).sum())(X)
    expected = jax.grad(lambda x: fn(params, x).astype(jnp.float32).sum())(X)
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert np.abs(found - expected).max() <= 2**-6 * np.abs(expected).max()


def test_effects_happen_once_and_in_order():
    seen = []

    def fn(p, x):
        jax.debug.callback(lambda _: seen.append("a"), x[0, 0], ordered=True)
        x = x @ p["w"]
        jax.debug.callback(lambda _: seen.append("b"), x[0, 0], ordered=True)
        return x

    run, params, _ = nvfp4.convert(fn, weights(w=(D, D)), X)
    jax.effects_barrier()
    assert not seen
    jax.jit(run)(params, X)
    jax.effects_barrier()
    assert seen == ["a", "b"]


def test_ragged_products_of_sorted_rows():
    def fn(p, x, sizes):
        y = jnp.tanh(lax.ragged_dot(x, p["up"], sizes))
        y, _ = lax.scan(lambda y, w: (lax.ragged_dot(y, w, sizes), None), y, p["layers"])
        return y

    params = weights(up=(3, D, D), layers=(2, 3, D, D))
    sizes = jnp.asarray([2, 0, 1], jnp.int32)
    check(fn, params, X, sizes)
    seen = nvfp4.calibrate(fn, params, [(X, sizes)])
    rows = np.asarray(X, np.float64)
    expected = [(rows[:2] ** 2).mean(0), np.zeros(D), (rows[2:3] ** 2).mean(0)]
    np.testing.assert_allclose(seen["up"].mean_square, expected, rtol=1e-5)
    np.testing.assert_allclose(seen["up"].amax, [abs(rows[:2]).max(), 0, abs(rows[2]).max()])
    assert seen["layers"].mean_square.shape == (2, 3, D)


def test_jit_keeps_donation_and_shardings():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))

    @functools.partial(jax.jit, in_shardings=(rows, rows), out_shardings=rows)
    def inner(x, w):
        return x @ w

    def step(p, cache):
        return inner(cache, lax.with_sharding_constraint(p["w"], rows)) + cache

    params = weights(w=(D, D))
    check(step, params, X)
    run, converted, _ = nvfp4.convert(jax.jit(step, donate_argnums=1), params, X)
    for function in (run, jax.jit(run, donate_argnums=1)):
        cache = X + 0
        function(converted, cache)
        assert cache.is_deleted()


def test_a_converted_function_under_vmap_and_grad():
    def fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"]).astype(jnp.float32)

    params = {"w": exact(D, D), "b": jnp.ones(D, jnp.bfloat16)}
    run, converted, _ = nvfp4.convert(fn, params, X[0], activation_scale=None)
    np.testing.assert_allclose(
        jax.vmap(run, (None, 0))(converted, X), fn(params, X), rtol=0.02, atol=0.02
    )

    def loss(function, params, b, x):
        return function({**params, "b": b}, x).sum()

    found, expected = (
        jax.grad(functools.partial(loss, *pair), argnums=(0, 1))(params["b"], X[0])
        for pair in ((run, converted), (fn, params))
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=0.05, atol=0.05
        )


def test_an_nnx_module_is_params():
    def linear(seed):
        options = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
        layer = nnx.Linear(D, D, rngs=nnx.Rngs(seed), **options)
        layer.kernel[...] = exact(D, D, seed=seed)
        return layer

    model = nnx.Sequential(linear(0), jnp.tanh, linear(1))
    converted = check(lambda m, x: m(x), model, X, left={"layers.0.bias", "layers.2.bias"})
    assert isinstance(converted, nnx.Sequential)
