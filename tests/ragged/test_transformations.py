# SPDX-License-Identifier: Apache-2.0
"""`ragged_linear` under JAX's transformations, and divided over a mesh."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from ragged_cases import random_weights

import jax_nvfp4 as nvfp4

M, G, N, K = 23, 4, 64, 64
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal((G, N)), jnp.float32)
SIZES = jnp.asarray([6, 0, 9, 4], jnp.int32)
ARCHES = this_machine.arches()
PACKED = ARCHES[min(1, len(ARCHES) - 1)]
W = random_weights(G, N, K)
GATED = nvfp4.gate_up(random_weights(G, N // 2, K, seed=2), random_weights(G, N // 2, K, seed=3))
INVARIANT = functools.partial(nvfp4.ragged_linear, batch_invariant=True)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def one_hot(sizes):
    """(M, G), which group each row has."""
    ends = np.cumsum(sizes)
    row = np.arange(M)[:, None]
    return ((row >= ends - sizes) & (row < ends)).astype(np.float32)


@pytest.mark.parametrize(
    ("activation", "offset"), [(None, None), (nvfp4.SwiGLU(limit=2.0, beta=0.5), 1)]
)
def test_gradient_is_straight_through(activation, offset):
    w = W if activation is None else GATED
    dense, packed = jax.jit(lambda w: (w.dequantize(), nvfp4.repack(w, PACKED)))(w)
    columns = N if activation is None else N // 2
    ct = jnp.asarray(RNG.standard_normal((M, columns)), jnp.float32)
    mine = one_hot(np.asarray(SIZES))
    if offset is not None:  # the weights are of groups 1 to 4 of four: the last has no rows
        mine = np.concatenate([mine[:, 1:], np.zeros((M, 1), np.float32)], axis=1)

    def sums(x, b, w):
        return nvfp4.ragged_linear(x, w, SIZES, b, group_offset=offset)

    def loss(x, b, w):
        y = nvfp4.ragged_linear(x, w, SIZES, b, group_offset=offset, activation=activation)
        return (y * ct).sum()

    def expected(x, b, off, dense):
        z = jnp.einsum("mk,gnk,mg->mn", x, dense, mine) + mine @ b + off
        if activation is not None:
            g, u = jnp.minimum(z[:, :columns], 2.0), jnp.clip(z[:, columns:], -2.0, 2.0)
            z = g * jax.nn.sigmoid(g) * (u + 0.5)
        return (z * ct).sum()

    exact = np.einsum("mk,gnk,mg->mn", X, dense, mine) + mine @ BIAS
    off = jax.jit(sums)(X, BIAS, packed) - exact
    found = jax.jit(jax.value_and_grad(loss, (0, 1)))(X, BIAS, packed)
    wanted = jax.jit(jax.value_and_grad(expected, (0, 1)))(X, BIAS, off, dense)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), found, wanted)
    dx, db = found[1]
    assert not dx[19:].any()  # of rows beyond the sum
    assert not db[0 if offset else 1].any()  # of a group without rows


def test_weights_sizes_and_scales_are_not_differentiated():
    def loss(w, scale, sizes):
        return nvfp4.ragged_linear(X, w, sizes, activation_scale=scale).sum()

    scale = jnp.full(G, 0.002)
    grads = jax.grad(loss, (0, 1, 2), allow_int=True)(W, scale, SIZES)
    for leaf in jax.tree.leaves(grads):
        assert leaf.dtype == jax.dtypes.float0 or not np.asarray(leaf, np.float32).any()


def test_remat_and_second_derivative():
    def loss(x, b, w):
        return jnp.tanh(nvfp4.ragged_linear(x, w, SIZES, b)).sum()

    grad = jax.jit(jax.grad(loss, (0, 1)))
    again = jax.jit(jax.grad(jax.checkpoint(loss), (0, 1)))
    assert_same(again(X, BIAS, W), grad(X, BIAS, W))
    first = jax.grad(lambda x, w: nvfp4.ragged_linear(x, w, SIZES).sum())
    assert not jax.jit(jax.grad(lambda x, w: first(x, w).sum()))(X, W).any()


def test_vmap():
    xs = jnp.stack([X, X[::-1]])
    sizes = jnp.stack([SIZES, jnp.asarray([0, 20, 1, 9])])
    ws = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a), jnp.asarray(a)[::-1]]), W)
    f = jax.jit(INVARIANT)
    w = [jax.tree.map(lambda a, i=i: a[i], ws) for i in range(2)]
    for dims, args in (
        ((0, None, None, None), (xs, W, SIZES, BIAS)),
        ((None, None, 0, None), (X, W, sizes, BIAS)),
        ((0, 0, 0, None), (xs, ws, sizes, BIAS)),
    ):
        y = jax.jit(jax.vmap(INVARIANT, dims))(*args)
        one = [
            f(
                *(
                    (w[i] if a is ws else a[i]) if d == 0 else a
                    for a, d in zip(args, dims, strict=True)
                )
            )
            for i in range(2)
        ]
        assert_same(y, jnp.stack(one))
    grad = jax.grad(lambda x, s: nvfp4.ragged_linear(x, W, s).sum())
    mapped = jax.jit(jax.vmap(grad, (None, 0)))(X, sizes)
    assert_same(mapped, jnp.stack([jax.jit(grad)(X, s) for s in sizes]))


def test_scan_over_layers():
    layers = jax.tree.map(lambda a: jnp.stack([jnp.asarray(a), jnp.asarray(a)[::-1]]), W)
    layers = nvfp4.repack(layers, PACKED)
    assert layers.shape == (2, G, N, K)

    def body(x, w):
        return INVARIANT(x, w, SIZES, BIAS), None

    y, _ = jax.jit(lambda x: jax.lax.scan(body, x, layers))(X)
    x = X
    for i in range(2):
        x = jax.jit(INVARIANT)(x, jax.tree.map(lambda a, i=i: a[i], layers), SIZES, BIAS)
    assert_same(y, x)


def test_export():
    w = nvfp4.repack(GATED, PACKED)
    f = jax.jit(functools.partial(INVARIANT, activation=nvfp4.SwiGLU()))
    checks = this_machine.export_checks() if jax.default_backend() != "cpu" else []
    exported = jax.export.export(f, disabled_checks=checks)(X, w, SIZES, BIAS)
    again = jax.export.deserialize(exported.serialize())
    assert_same(again.call(X, w, SIZES, BIAS), f(X, w, SIZES, BIAS))


# ---- Sharding -----------------------------------------------------------------------------------

# Groups and rows of which each is divided by both axes of the meshes here.
MANY, WIDE = 8, 512
MANY_SIZES = jnp.asarray([4, 0, 5, 1, 0, 7, 2, 1], jnp.int32)


@pytest.fixture(params=this_machine.mesh_sizes() or (None,), ids=str)
def mesh(request):
    return this_machine.mesh(request.param)


def put(mesh, tree, spec):
    """Each part divided along the leading axes that it has."""
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, P(*tuple(spec)[: a.ndim]))), tree
    )


def compiled(f, *args):
    program = jax.jit(f).lower(*args).compile()
    return program(*args), program.as_text()


@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_groups_are_divided_and_summed(mesh, scale):
    w = nvfp4.repack(random_weights(MANY, N, K), PACKED)
    bias = jnp.resize(BIAS, (MANY, N))
    f = functools.partial(INVARIANT, activation="gelu_tanh", activation_scale=scale)
    expected = jax.jit(f)(X, w, MANY_SIZES, bias)
    spec = P(("x", "y"))
    y, text = compiled(f, X, put(mesh, w, spec), MANY_SIZES, put(mesh, bias, spec))
    assert_same(y, expected)
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_groups_and_rows_are_divided(mesh):
    w = nvfp4.repack(
        nvfp4.gate_up(random_weights(MANY, WIDE // 2, K), random_weights(MANY, WIDE // 2, K, 2)),
        PACKED,
    )
    f = functools.partial(INVARIANT, activation=nvfp4.SwiGLU())
    expected = jax.jit(f)(X, w, MANY_SIZES)
    y, text = compiled(f, X, put(mesh, w, P("x", "y")), MANY_SIZES)
    assert_same(y, expected)
    assert "all-gather" not in text
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "y")), 2)


@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_columns_are_summed_before_bias_and_activation(mesh, scale):
    f = functools.partial(nvfp4.ragged_linear, activation="silu", activation_scale=scale)
    expected = jax.jit(f)(X, W, SIZES, BIAS)
    y, text = compiled(f, put(mesh, X, P(None, "y")), put(mesh, W, P(None, None, "y")), SIZES, BIAS)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    assert not y[19:].any()
    assert "all-reduce" in text


def test_local_rows_in_shard_map(mesh):
    """Each device has rows and sizes of its own, and all weights."""
    parts = mesh.shape["y"]
    xs = jnp.tile(X, (parts, 1)) * jnp.arange(1, parts * M + 1)[:, None]
    sizes = jnp.stack([jnp.roll(SIZES, i) for i in range(parts)])
    local = jax.shard_map(
        lambda x, s: INVARIANT(x, W, s[0], BIAS),
        mesh=mesh,
        in_specs=(P("y"), P("y")),
        out_specs=P("y"),
    )
    f = jax.jit(INVARIANT)
    one = [f(xs[i * M : (i + 1) * M], W, sizes[i], BIAS) for i in range(parts)]
    assert_same(jax.jit(local)(xs, sizes), jnp.concatenate(one))
    loss = lambda x: local(x, sizes).sum()  # noqa: E731
    one = [
        jax.jit(jax.grad(lambda x, s: INVARIANT(x, W, s, BIAS).sum()))(
            xs[i * M : (i + 1) * M], sizes[i]
        )
        for i in range(parts)
    ]
    assert_same(jax.jit(jax.grad(loss))(xs), jnp.concatenate(one))


def test_groups_of_a_device_in_shard_map(mesh):
    """group_offset and psum, by hand, where the mesh does not divide the number of groups."""
    parts = mesh.shape["y"]
    groups = parts * 2 - 1
    w = random_weights(groups, N, K)
    sizes = jnp.resize(SIZES, groups)
    padded = jax.tree.map(lambda a: jnp.pad(a, [(0, 1)] + [(0, 0)] * (a.ndim - 1)), w)

    def own(x, w, sizes):
        offset = jax.lax.axis_index("y") * 2
        return jax.lax.psum(INVARIANT(x, w, sizes, group_offset=offset), "y")

    f = jax.shard_map(own, mesh=mesh, in_specs=(P(), P("y"), P()), out_specs=P())
    assert_same(jax.jit(f)(X, padded, sizes), jax.jit(INVARIANT)(X, w, sizes))


@pytest.mark.parametrize("sizes", this_machine.mesh_sizes()[:1] or (None,), ids=str)
def test_explicit_mesh(sizes):
    mesh = this_machine.mesh(sizes, AxisType.Explicit)
    w = random_weights(MANY, WIDE, K)
    expected = jax.jit(INVARIANT)(X, nvfp4.repack(w, PACKED), MANY_SIZES)
    with jax.set_mesh(mesh):
        placed = put(mesh, w, P("x", "y"))
        packed = nvfp4.repack(placed, PACKED)
        y = jax.jit(INVARIANT)(X, packed, MANY_SIZES)
        assert jax.typeof(y).sharding.spec == P(None, "y")
        assert_same(y, expected)
