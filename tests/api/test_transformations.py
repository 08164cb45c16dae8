# SPDX-License-Identifier: Apache-2.0
"""`linear`, `quantize` and the layers under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

M, N, K = 12, 48, 80
ACTIVATIONS = ("token", "tensor", 0.002, None)
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
KERNEL = jnp.asarray(RNG.standard_normal((N, K)) * 0.1, jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(N), jnp.float32)
ARCHES = this_machine.arches()


def weight(arch=None):
    return nvfp4.repack(nvfp4.quantize(KERNEL), arch)


def linear(activation, **how):
    return functools.partial(nvfp4.linear, activation_scale=activation, **how)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def bits(tree):
    """A pytree with its float8 parts as bytes: NumPy cannot compare NaN in them."""
    return jax.tree.map(
        lambda a: np.asarray(a).view(np.uint8) if a.dtype.itemsize == 1 else a, tree
    )


# ---- Derivatives --------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arch", ["canonical", *ARCHES])
def test_gradient_is_straight_through(activation, arch):
    w = nvfp4.quantize(KERNEL) if arch == "canonical" else weight(arch)
    ct = jnp.asarray(RNG.standard_normal((M, N)), jnp.float32)

    def loss(x, b):
        return (linear(activation)(x, w, b) * ct).sum()

    value, (dx, db) = jax.jit(jax.value_and_grad(loss, (0, 1)))(X, BIAS)
    np.testing.assert_allclose(value, loss(X, BIAS), rtol=1e-5)
    dense = np.asarray(w.dequantize(), np.float64)
    np.testing.assert_allclose(dx, np.asarray(ct, np.float64) @ dense, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(db, np.asarray(ct, np.float64).sum(0), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_have_the_dtypes_of_their_primals(dtype):
    x, b = X.astype(dtype), BIAS.astype(jnp.float32)

    def loss(x, b):
        return nvfp4.linear(x, weight(), b, out_dtype=jnp.float32).sum()

    dx, db = jax.grad(loss, (0, 1))(x, b)
    assert (dx.dtype, db.dtype) == (dtype, jnp.float32)
    expected = np.asarray(weight().dequantize()).sum(0)
    np.testing.assert_allclose(np.asarray(dx, np.float32)[0], expected, rtol=1e-2, atol=1e-3)


def test_forward_mode_is_the_same_derivative():
    v = jnp.asarray(RNG.standard_normal(X.shape), jnp.float32)
    _, tangent = jax.jvp(lambda x: nvfp4.linear(x, weight(), BIAS), (X,), (v,))
    expected = np.asarray(v, np.float64) @ np.asarray(weight().dequantize(), np.float64).T
    np.testing.assert_allclose(tangent, expected, rtol=1e-4, atol=1e-4)
    jacobian = jax.jacfwd(lambda x: nvfp4.linear(x, weight()))(X[0])
    np.testing.assert_allclose(jacobian, weight().dequantize(), rtol=1e-6)
    jacobian = jax.jacrev(lambda x: nvfp4.linear(x, weight()))(X[0])
    np.testing.assert_allclose(jacobian, weight().dequantize(), rtol=1e-6)


def test_weights_and_scales_are_not_differentiated():
    def loss(w, scale):
        return nvfp4.linear(X, w, activation_scale=scale).sum()

    dw, dscale = jax.grad(loss, (0, 1), allow_int=True)(weight(), jnp.float32(0.002))
    assert all(
        not np.any(np.asarray(leaf).astype(np.float32))
        for leaf in jax.tree.leaves(dw)
        if leaf.dtype != jax.dtypes.float0
    )
    assert dscale == 0


def test_residuals_hold_no_dequantized_weight():
    _, vjp = jax.vjp(lambda x: nvfp4.linear(x, weight()), X)
    sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp)]
    padding = 2048  # a repacked weight's
    assert sum(sizes) <= weight().nbytes + padding


def test_second_derivative_is_zero():
    def gradient_sum(x):
        return jax.grad(lambda x: nvfp4.linear(x, weight()).sum())(x).sum()

    assert not jax.grad(gradient_sum)(X).any()


def test_quantize_has_a_zero_gradient():
    def loss(x, how):
        return nvfp4.quantize(x, **how).dequantize().sum()

    for how in ({}, {"scaling": "token"}, {"global_scale": 0.01}):
        assert not jax.grad(functools.partial(loss, how=how))(X).any()
    assert not jax.grad(lambda x: nvfp4.global_scale(x))(X).any()


def test_remat():
    def loss(x):
        return jnp.tanh(nvfp4.linear(x, weight())).sum()

    assert_same(jax.grad(jax.checkpoint(loss))(X), jax.grad(loss)(X))


# ---- vmap and scan ------------------------------------------------------------------------------


# Every activation with every arch; batch-invariant in every other of them, so that each activation
# and each arch is both.
BATCHED = [
    (activation, arch, (i + j) % 2 == 1)
    for i, activation in enumerate(ACTIVATIONS)
    for j, arch in enumerate(("canonical", *ARCHES))
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("activation", "arch", "batch_invariant"), BATCHED)
def test_vmap(activation, arch, batch_invariant):
    f = linear(activation, batch_invariant=batch_invariant)
    xs = jnp.asarray(RNG.standard_normal((3, M, K)), jnp.float32)
    ws = jax.vmap(nvfp4.quantize)(RNG.standard_normal((3, N, K)).astype(np.float32))
    w = nvfp4.quantize(KERNEL)
    if arch != "canonical":
        ws, w = nvfp4.repack(ws, arch), nvfp4.repack(w, arch)
    at = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
    for in_axes, args in (((0, None), (xs, w)), ((None, 0), (X, ws)), ((0, 0), (xs, ws))):
        y = jax.jit(jax.vmap(f, in_axes))(*args)
        one = [
            f(*(at(a, i) if d == 0 else a for a, d in zip(args, in_axes, strict=True)))
            for i in range(3)
        ]
        if batch_invariant:
            assert_same(y, jnp.stack(one))
        else:
            np.testing.assert_allclose(y, jnp.stack(one), rtol=1e-5, atol=1e-5)


def test_vmap_in_other_axes_over_scale_and_bias():
    scales = jnp.asarray([0.001, 0.002, 0.004], jnp.float32)
    f = lambda x, s: nvfp4.linear(x, weight(), BIAS, activation_scale=s, batch_invariant=True)  # noqa: E731
    assert_same(jax.vmap(f, (None, 0))(X, scales), jnp.stack([f(X, s) for s in scales]))
    xs = jnp.asarray(RNG.standard_normal((M, 3, K)), jnp.float32)
    y = jax.vmap(f, (1, 0), out_axes=1)(xs, scales)
    assert_same(y, jnp.stack([f(xs[:, i], scales[i]) for i in range(3)], axis=1))
    biases = jnp.asarray(RNG.standard_normal((2, N)), jnp.float32)
    g = lambda b: nvfp4.linear(X, weight(), b, batch_invariant=True)  # noqa: E731
    assert_same(jax.vmap(g)(biases), jnp.stack([g(b) for b in biases]))


def test_nested_vmap():
    xs = jnp.asarray(RNG.standard_normal((2, 3, M, K)), jnp.float32)
    for activation in ("token", "tensor"):
        f = linear(activation, batch_invariant=True)
        y = jax.vmap(jax.vmap(f, (0, None)), (0, None))(xs, weight())
        assert_same(y, jnp.stack([jnp.stack([f(x, weight()) for x in row]) for row in xs]))


def test_vmap_of_nothing():
    w = nvfp4.repack(nvfp4.quantize(jnp.zeros((8, 0))))
    for activation in ("token", None):
        y = jax.vmap(lambda x, a=activation: nvfp4.linear(x, w, activation_scale=a))(
            jnp.zeros((2, 3, 0))
        )
        np.testing.assert_array_equal(y, np.zeros((2, 3, 8)))


def test_vmap_of_grad_and_grad_of_vmap():
    xs = jnp.asarray(RNG.standard_normal((3, M, K)), jnp.float32)
    expected = jnp.broadcast_to(weight().dequantize().sum(0), xs.shape)
    inner = jax.vmap(jax.grad(lambda x: nvfp4.linear(x, weight()).sum()))(xs)
    outer = jax.grad(lambda xs: jax.vmap(lambda x: nvfp4.linear(x, weight()))(xs).sum())(xs)
    np.testing.assert_allclose(inner, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outer, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"scaling": "token"}, {"global_scale": 0.01}])
def test_vmap_of_quantize(how):
    xs = (
        jnp.asarray(RNG.standard_normal((3, M, K)), jnp.float32)
        * jnp.asarray([1, 9, 0.1])[:, None, None]
    )
    t = jax.vmap(lambda x: nvfp4.quantize(x, **how))(xs)
    one = [nvfp4.quantize(x, **how) for x in xs]
    assert_same(bits(t), bits(jax.tree.map(lambda *a: jnp.stack(a), *one)))


def test_vmap_of_quantize_over_the_scale():
    scales = jnp.asarray([0.01, 0.002], jnp.float32)
    t = jax.vmap(lambda s: nvfp4.quantize(X, global_scale=s))(scales)
    one = [nvfp4.quantize(X, global_scale=s) for s in scales]
    assert_same(bits(t), bits(jax.tree.map(lambda *a: jnp.stack(a), *one)))


@pytest.mark.parametrize("arch", ["canonical", *ARCHES])
def test_scan_over_stacked_layers(arch):
    ws = jax.vmap(nvfp4.quantize)(RNG.standard_normal((4, K, K)).astype(np.float32) * 0.1)
    ws = ws if arch == "canonical" else nvfp4.repack(ws, arch)

    def step(x, w):
        return jnp.tanh(nvfp4.linear(x, w)), None

    y, _ = jax.jit(lambda x: jax.lax.scan(step, x, ws))(X)
    expected = X
    for i in range(4):
        expected, _ = step(expected, jax.tree.map(lambda a, i=i: a[i], ws))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jax.lax.scan(step, x, ws)[0].sum())(X)
    assert np.isfinite(gradient).all() and gradient.any()


# ---- Everything else ----------------------------------------------------------------------------


def test_eval_shape():
    y = jax.eval_shape(nvfp4.linear, X.astype(jnp.bfloat16), weight())
    assert (y.shape, y.dtype) == ((M, N), jnp.bfloat16)
    t = jax.eval_shape(nvfp4.quantize, jax.ShapeDtypeStruct((3, 5, 20), jnp.float32))
    assert t.shape == (3, 5, 20) and t.data.shape == (3, 5, 16)
    w = jax.eval_shape(lambda k: nvfp4.repack(nvfp4.quantize(k), "sm_90a"), KERNEL)
    assert w.shape == (N, K)


def test_no_recompilation_when_only_values_change():
    f = jax.jit(lambda x, w: nvfp4.linear(x, w))
    for scale in (1, 2):
        f(X * scale, nvfp4.quantize(KERNEL * scale))
    assert f._cache_size() == 1


def test_donation():
    t = nvfp4.quantize(jnp.asarray(RNG.standard_normal((64, 64)), jnp.float32))
    same = jax.tree.map(jnp.array, t)
    moved = jax.jit(lambda t: t, donate_argnums=0)(t)
    assert t.data.is_deleted()
    assert_same(bits(moved), bits(same))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_round_trip(activation):
    f = jax.jit(linear(activation))
    exported = jax.export.export(f, disabled_checks=this_machine.export_checks())
    blob = exported(X, weight()).serialize()
    again = jax.export.deserialize(blob)
    assert_same(again.call(X, weight()), f(X, weight()))


def test_export_round_trip_of_quantize():
    f = jax.jit(lambda x: jax.tree.leaves(nvfp4.quantize(x)))
    exported = jax.export.export(f, disabled_checks=this_machine.export_checks())
    again = jax.export.deserialize(exported(X).serialize())
    assert_same(bits(again.call(X)), bits(f(X)))


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("promotion", ["standard", "strict"])
def test_x64_and_strict_promotion(x64, promotion):
    expected = nvfp4.linear(X, weight(), BIAS), nvfp4.quantize(X)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        for activation in ACTIVATIONS:
            y = linear(activation)(X, nvfp4.repack(nvfp4.quantize(KERNEL)), BIAS)
            assert y.dtype == jnp.float32
        assert_same(linear("token")(X, weight(), BIAS), expected[0])
        assert_same(bits(nvfp4.quantize(X)), bits(expected[1]))
        assert nvfp4.quantize(X).dequantize().dtype == jnp.float32
        jax.grad(lambda x, b: linear("token")(x, weight(), b).sum(), (0, 1))(X, BIAS)
        jax.vmap(lambda x: nvfp4.linear(x, weight()))(X[None])


def test_disable_jit():
    with jax.disable_jit():
        y = nvfp4.linear(X, weight(), BIAS)
    np.testing.assert_allclose(y, nvfp4.linear(X, weight(), BIAS), rtol=1e-5, atol=1e-5)


# ---- Sharding -----------------------------------------------------------------------------------


SHARDED = [
    (P("x", None), P(), P("x", None)),
    (P(("x", "y"), None), P(), P(("x", "y"), None)),
    (P(), P("y", None), P(None, "y")),
    (P("x", None), P("y", None), P("x", "y")),
    (P(None, "x"), P(None, "x"), P()),
    (P("y", "x"), P(None, "x"), P("y", None)),
]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("x_spec,w_spec,y_spec", SHARDED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@this_machine.each_mesh()
def test_sharded(sizes, x_spec, w_spec, y_spec, activation):
    devices = this_machine.mesh(sizes)
    x = jnp.asarray(RNG.standard_normal((16, 128)), jnp.float32)
    w = nvfp4.quantize(jnp.asarray(RNG.standard_normal((64, 128)), jnp.float32))
    expected = linear(activation)(x, w, jnp.ones(64))
    put = lambda a, spec: jax.device_put(a, NamedSharding(devices, spec))  # noqa: E731
    sharded = jax.tree.map(lambda a: put(a, w_spec if a.ndim else P()), w)
    f = jax.jit(linear(activation), out_shardings=NamedSharding(devices, y_spec))
    y = f(put(x, x_spec), sharded, jnp.ones(64))
    assert y.sharding.is_equivalent_to(NamedSharding(devices, y_spec), 2)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("activation", ["token", 0.002, None])
@pytest.mark.parametrize("check_vma", [True, False])
@this_machine.each_mesh()
def test_shard_map(sizes, activation, check_vma):
    devices = this_machine.mesh(sizes)
    x = jnp.asarray(RNG.standard_normal((16, 128)), jnp.float32)
    w = nvfp4.quantize(jnp.asarray(RNG.standard_normal((64, 128)), jnp.float32))
    f = linear(activation, batch_invariant=True)
    sharded = jax.shard_map(
        f,
        mesh=devices,
        in_specs=(P(("x", "y"), None), P()),
        out_specs=P(("x", "y"), None),
        check_vma=check_vma,
    )
    assert_same(jax.jit(sharded)(x, w), f(x, w))
    gradient = jax.jit(jax.grad(lambda x: sharded(x, w).sum()))(x)
    np.testing.assert_allclose(
        gradient, jnp.broadcast_to(w.dequantize().sum(0), x.shape), rtol=1e-4, atol=1e-4
    )
