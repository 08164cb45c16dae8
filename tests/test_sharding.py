# SPDX-License-Identifier: Apache-2.0
"""The primitives divided over a mesh: the right numbers, and no device with another's work."""

import functools
import re

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

RNG = np.random.default_rng(0)
M, N, K = 16, 1024, 256
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
KERNEL = jnp.asarray(RNG.standard_normal((N, K)) * 0.1, jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(N), jnp.float32)
ACTIVATIONS = ("token", "tensor", 0.002, None)
ARCHES = ("canonical", *machine.arches())


@pytest.fixture
def mesh():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def put(mesh, tree, spec):
    return jax.tree.map(
        lambda a: jax.device_put(a, NamedSharding(mesh, spec if a.ndim else P())), tree
    )


def weight(arch, kernel=KERNEL, scaling="tensor"):
    w = nvfp4.quantize(kernel, scaling=scaling)
    return w if arch == "canonical" else nvfp4.repack(w, arch)


def assert_same(a, b):
    def same(a, b):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        bits = lambda x: np.asarray(x).view(np.uint8) if x.dtype.itemsize == 1 else np.asarray(x)  # noqa: E731
        np.testing.assert_array_equal(bits(a), bits(b))

    jax.tree.map(same, a, b)


def collectives(compiled):
    """The collectives of a compiled program, as (name, shape)."""
    pattern = (
        r"= \(?(\w+\[[\d,]*\]).* "
        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    )
    return sorted((name, shape) for shape, name in re.findall(pattern, compiled.as_text()))


def run(function, *args, out=None):
    """The result of a function, and the collectives of its program."""
    jitted = jax.jit(function) if out is None else jax.jit(function, out_shardings=out)
    compiled = jitted.lower(*args).compile()
    return compiled(*args), collectives(compiled)


# ---- quantize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("x_spec", [P("x"), P(("x", "y")), P(None, "y"), P("x", "y"), P("y", "x")])
@pytest.mark.parametrize(
    "how", [{}, {"scaling": "token"}, {"global_scale": 0.01}, {"global_scale": "rows"}]
)
def test_quantize(mesh, x_spec, how):
    if how.get("global_scale") == "rows":
        how = {"global_scale": jnp.linspace(0.001, 0.1, M)}
    f = functools.partial(nvfp4.quantize, **how)
    t, moved = run(f, put(mesh, X, x_spec))
    assert_same(t, f(X))
    assert t.data.sharding.is_equivalent_to(NamedSharding(mesh, x_spec), 2)
    assert t.block_scale.sharding.is_equivalent_to(NamedSharding(mesh, x_spec), 2)
    # An amax of the whole tensor, or of rows that are divided, is all there is to be exchanged.
    shape = None
    if not how:
        shape = "f32[]"
    elif "scaling" in how and len(x_spec) == 2:
        rows = M // (1 if x_spec[0] is None else mesh.shape[x_spec[0]])
        shape = f"f32[{rows}]"
    assert moved == ([] if shape is None else [("all-reduce", shape)])


# ---- linear -------------------------------------------------------------------------------------


def check_linear(mesh, arch, activation, x_spec, w_spec, y_spec, *, invariant, out=None):
    """y and what was exchanged, once y is known to be right and where it is expected."""
    w = weight(arch, scaling="token")
    f = functools.partial(nvfp4.linear, activation_scale=activation, batch_invariant=invariant)
    expected = f(X, w, BIAS)
    n_spec = P(*w_spec[:1])
    placed = jax.tree.map(lambda a: put(mesh, a, w_spec if a.ndim > 1 else n_spec), w)
    y, moved = run(f, put(mesh, X, x_spec), placed, put(mesh, BIAS, n_spec), out=out)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, y_spec), 2), y.sharding
    if invariant:
        assert_same(y, expected)
    else:
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    return moved


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(
    "x_spec,w_spec,y_spec",
    [
        (P("x"), P(), P("x")),
        (P(("x", "y")), P(), P(("x", "y"))),
        (P(), P("y"), P(None, "y")),
        (P(), P(("x", "y")), P(None, ("x", "y"))),
        (P("x"), P("y"), P("x", "y")),
        (P("y"), P("x"), P("y", "x")),
    ],
)
def test_rows_stay_where_they_are(mesh, arch, activation, invariant, x_spec, w_spec, y_spec):
    moved = check_linear(mesh, arch, activation, x_spec, w_spec, y_spec, invariant=invariant)
    amax = activation == "tensor" and x_spec != P()
    assert moved == ([("all-reduce", "f32[]")] if amax else [])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "x_spec,w_spec,y_spec",
    [
        (P(None, "x"), P(None, "x"), P()),
        (P(None, ("x", "y")), P(None, ("x", "y")), P()),
        (P("y", "x"), P(None, "x"), P("y")),
        (P(None, "x"), P("y", "x"), P(None, "y")),
    ],
)
def test_columns_are_summed(mesh, activation, x_spec, w_spec, y_spec):
    moved = check_linear(mesh, "canonical", activation, x_spec, w_spec, y_spec, invariant=False)
    rows = M // (mesh.shape["y"] if x_spec[0] == "y" else 1)
    columns = N // (mesh.shape["y"] if w_spec[0] == "y" else 1)
    amax = {"token": [f"f32[{rows}]"], "tensor": ["f32[]"]}.get(activation, [])
    expected = [("all-reduce", shape) for shape in (*amax, f"f32[{rows},{columns}]")]
    assert moved == sorted(expected)
