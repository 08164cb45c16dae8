# SPDX-License-Identifier: Apache-2.0
"""The primitives divided over a mesh: the right numbers, and no device with another's work."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

RNG = np.random.default_rng(0)
M, N, K = 16, 1024, 256
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.float32)
KERNEL = jnp.asarray(RNG.standard_normal((N, K)) * 0.1, jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(N), jnp.float32)
ACTIVATIONS = ("token", "tensor", 0.002, None)
ARCHES = ("canonical", *this_machine.arches())
PACKED = tuple(arch for arch in this_machine.arches() if arch != "reference")
"""Orders that mix the rows of a tile and the columns."""


@pytest.fixture(params=this_machine.mesh_sizes() or (None,), ids=str)
def mesh(request):
    return this_machine.mesh(request.param)


def parts(mesh, *entries):
    """In how many parts a mesh divides what entries of a PartitionSpec stand for."""
    names = [name for entry in entries if entry for name in np.atleast_1d(entry)]
    return math.prod(mesh.shape[name] for name in names)


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
    """The collectives of a compiled program, as (name, shape of a result)."""
    pattern = (
        r"= (\S+|\(.*?\)) "
        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(-start)?\("
    )
    found = []
    for shape, name, start in re.findall(pattern, compiled.as_text()):
        shapes = re.findall(r"\w+\[[\d,]*\]", shape)
        if start and name != "all-reduce":  # operands and results
            shapes = shapes[len(shapes) // 2 :]
        found += [(name, shape) for shape in shapes]
    return sorted(found)


def amounts(moved):
    """What `collectives` found as (name, dtype, elements).

    XLA may put the parts it gathers one behind another along some other axis, and transpose later.
    """
    parts = [(name, *shape.rstrip("]").split("[")) for name, shape in moved]
    return [(name, dtype, math.prod(map(int, sizes.split(",")))) for name, dtype, sizes in parts]


def run(function, *args, out=None):
    """The result of a function, and the collectives of its program."""
    jitted = jax.jit(function) if out is None else jax.jit(function, out_shardings=out)
    compiled = jitted.lower(*args).compile()
    return compiled(*args), collectives(compiled)


# ---- quantize -----------------------------------------------------------------------------------


@pytest.mark.sampled(3)
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
    if not how and parts(mesh, *x_spec) > 1:
        shape = "f32[]"
    elif "scaling" in how and parts(mesh, *x_spec[1:]) > 1:
        shape = f"f32[{M // parts(mesh, x_spec[0])}]"
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


ROWS = [
    (P("x"), P(), P("x")),
    (P(("x", "y")), P(), P(("x", "y"))),
    (P(), P("y"), P(None, "y")),
    (P(), P(("x", "y")), P(None, ("x", "y"))),
    (P("x"), P("y"), P("x", "y")),
    (P("y"), P("x"), P("y", "x")),
]


def check_rows(mesh, arch, activation, specs, invariant):
    moved = check_linear(mesh, arch, activation, *specs, invariant=invariant)
    amax = activation == "tensor" and parts(mesh, *specs[0]) > 1
    assert moved == ([("all-reduce", "f32[]")] if amax else [])


@pytest.mark.sampled(7)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("specs", ROWS)
def test_rows_stay_where_they_are(mesh, arch, specs):
    check_rows(mesh, arch, "token", specs, invariant=False)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("specs", ROWS[1::3])
@pytest.mark.parametrize("arch", ["canonical", ARCHES[-1]])
def test_rows_have_the_same_bits(mesh, arch, activation, specs):
    check_rows(mesh, arch, activation, specs, invariant=True)


@pytest.mark.sampled(3)
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
    rows, columns = M // parts(mesh, x_spec[0]), N // parts(mesh, w_spec[0])
    expected = []
    if parts(mesh, x_spec[1]) > 1:
        expected = [f"f32[{rows},{columns}]", *([f"f32[{rows}]"] if activation == "token" else [])]
    if activation == "tensor" and parts(mesh, *x_spec) > 1:
        expected.append("f32[]")
    assert moved == sorted(("all-reduce", shape) for shape in expected)


def test_columns_are_gathered_where_the_order_of_the_sum_is_promised(mesh):
    both = ("x", "y")
    moved = check_linear(
        mesh, "canonical", "token", P(None, both), P(None, both), P(), invariant=True
    )
    assert {name for name, _ in moved} == {"all-gather"}


@pytest.mark.parametrize("arch", PACKED)
def test_columns_of_repacked_weights_are_gathered(mesh, arch):
    moved = check_linear(mesh, arch, "token", P(None, "x"), P("y"), P(None, "y"), invariant=False)
    assert amounts(moved) == ([("all-gather", "f32", M * K)] if parts(mesh, "x") > 1 else [])


def test_a_row_parallel_layer_keeps_its_weight_when_its_output_is_divided_by_rows(mesh):
    moved = check_linear(
        mesh,
        "canonical",
        0.002,
        P(None, "y"),
        P(None, "y"),
        P("y"),
        invariant=False,
        out=NamedSharding(mesh, P("y")),
    )
    assert "all-gather" not in {name for name, _ in moved}


@pytest.mark.parametrize("w_spec", [P("x"), P(None, "x")])
def test_a_weight_divided_like_the_batch_is_gathered(mesh, w_spec):
    moved = check_linear(
        mesh, "canonical", "token", P("x"), w_spec, P("x"), invariant=False,
        out=NamedSharding(mesh, P("x")),
    )  # fmt: skip
    assert (("all-gather", f"u8[{N},{K // 2}]") in moved) == (parts(mesh, "x") > 1)
    assert not any(shape.startswith("f32[16,") for _, shape in moved)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("n,k", [(200, 256), (384, 240), (64, 250)])
def test_shapes_that_do_not_divide(mesh, arch, n, k):
    w = weight(arch, KERNEL[:n, :k], scaling="token")
    x, bias = X[:12, :k], BIAS[:n]
    expected = nvfp4.linear(x, w, bias)
    placed = jax.tree.map(lambda a: put(mesh, a, P() if a.shape[0] % 4 else P("y")), w)
    for spec in (P("x"), P("y"), P(None, "x")):
        y, _ = run(nvfp4.linear, put(mesh, x, spec), placed, bias)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)


# ---- Meshes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:11],
        lambda x: x.reshape(4, 4, K)[:2].reshape(8, K),
        lambda x: jnp.swapaxes(x.reshape(4, 4, K), 0, 1).reshape(M, K),
        lambda x: x.reshape(4, 4, K)[:, 0],
        lambda x: x.reshape(4, 4 * K),
    ],
)
@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_parts_that_are_none_of_an_axis(mesh, function, scaling):
    line = jax.sharding.Mesh(mesh.devices.reshape(-1), ("z",))
    f = lambda x: nvfp4.quantize(function(x), scaling=scaling)  # noqa: E731
    t, _ = run(f, put(line, X, P("z")))
    assert_same(t, f(X))


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2), (6, 1)])
def test_meshes_of_other_sizes(sizes):
    if jax.device_count() < 6:
        pytest.skip("needs 6 devices")
    devices = this_machine.mesh(sizes)
    w = weight("canonical", KERNEL[:960])
    x = X[:12]
    f = functools.partial(nvfp4.linear, batch_invariant=True)
    for x_spec, w_spec in ((P("x"), P("y")), (P("y"), P("x")), (P(("y", "x")), P())):
        y, moved = run(f, put(devices, x, x_spec), put(devices, w, w_spec))
        assert_same(y, f(x, w))
        assert moved == []


def test_several_meshes_in_a_program(mesh):
    line = jax.sharding.Mesh(mesh.devices.reshape(-1), ("z",))
    w = weight("canonical")
    y, _ = run(nvfp4.linear, put(mesh, X, P("x")), put(line, w, P(None, "z")))
    np.testing.assert_allclose(y, nvfp4.linear(X, w), rtol=1e-5, atol=1e-4)


def test_abstract_mesh(mesh):
    mesh = jax.sharding.AbstractMesh(mesh.devices.shape, ("x", "y"))
    x = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh, P("x")))
    w = weight("canonical")
    platform = "cuda" if jax.default_backend() == "gpu" else jax.default_backend()
    lowered = jax.jit(lambda x: nvfp4.linear(x, w)).trace(x).lower(lowering_platforms=(platform,))
    assert lowered.out_info.shape == (M, N)


def test_a_scale_that_devices_agreed_on_varies_over_none(mesh):
    """What comes out varies over the mesh axes of what it depends on, and over no other."""
    whole = nvfp4.quantize(KERNEL)

    def part(rows, row_scales):
        agreed = jax.lax.pmax(nvfp4.global_scale(rows), ("x", "y"))
        stacked = jax.vmap(lambda r: nvfp4.quantize(r, global_scale=agreed))(rows[None])
        given = [nvfp4.quantize(rows, global_scale=scale) for scale in (agreed, row_scales)]
        return *(jax.tree.leaves(t) for t in given), stacked.global_scale[0]

    rows, everywhere = P(("x", "y")), P()
    out_specs = ([rows, rows, everywhere], [rows, rows, rows], everywhere)
    row_scales = jnp.full(N, whole.global_scale)
    function = jax.shard_map(part, mesh=mesh, in_specs=(rows, rows), out_specs=out_specs)
    scalar, by_row, stacked = jax.jit(function)(KERNEL, row_scales)
    assert_same(scalar, jax.tree.leaves(whole))
    assert_same(by_row[:2], jax.tree.leaves(whole)[:2])
    assert stacked == whole.global_scale


def test_who_divides(mesh):
    def calls(function, *args):
        return jax.jit(function).lower(*args).as_text().count("@CustomSPMDPartitioning")

    w = weight("canonical")
    x = put(mesh, X, P("x"))
    assert calls(nvfp4.linear, x, put(mesh, w, P("y"))) == 1
    assert calls(nvfp4.quantize, x) == 1
    assert calls(nvfp4.linear, X, w) == 0
    assert calls(nvfp4.linear, x[:0], put(mesh, w, P("y"))) == 0
    part = jax.shard_map(nvfp4.linear, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"))
    assert calls(part, x, w) == 0
    with jax.set_mesh(mesh):
        assert calls(nvfp4.quantize, x) == 1


def test_export_for_several_devices(mesh):
    w = put(mesh, weight("canonical"), P("y"))
    x = put(mesh, X, P("x"))
    exported = jax.export.export(
        jax.jit(nvfp4.linear), disabled_checks=this_machine.export_checks()
    )(x, w)
    y = jax.jit(jax.export.deserialize(exported.serialize()).call)(x, w)
    np.testing.assert_allclose(y, nvfp4.linear(X, weight("canonical")), rtol=1e-5, atol=1e-4)


def test_partly_manual(mesh):
    w = weight("canonical")
    f = jax.shard_map(
        nvfp4.linear, mesh=mesh, in_specs=(P("x"), P()), out_specs=P("x"), axis_names={"x"}
    )
    y, _ = run(f, put(mesh, X, P("x")), put(mesh, w, P("y")))
    np.testing.assert_allclose(y, nvfp4.linear(X, w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "n,k,arch", [(128, 64, PACKED[0]), (200, 16, "canonical"), (1, 1, PACKED[-1])]
)
def test_a_single_tile_or_block(mesh, arch, n, k):
    x, w = X[:, :k], weight(arch, kernel=KERNEL[:n, :k])
    y = jax.jit(nvfp4.linear)(put(mesh, x, P("x")), put(mesh, w, P()))
    np.testing.assert_allclose(y, nvfp4.linear(x, w), rtol=1e-5, atol=1e-5)
    assert_same(jax.jit(nvfp4.quantize)(put(mesh, x, P("x"))), nvfp4.quantize(x))


# ---- Parts of weights in shard_map ---------------------------------------------------------------


def part_specs(tree, spec):
    """A spec for each part of a weight; that of a scalar is P()."""
    return jax.tree.map(lambda a: P(*spec[: a.ndim]), tree)


@pytest.mark.parametrize("arch", ARCHES)
def test_shard_map_over_the_rows_of_a_weight(mesh, arch):
    w = weight(arch, scaling="token")
    rows = P("y") if mesh.shape["y"] > 1 else P("x")

    def part(x, w, b):
        assert w.shape == (N // parts(mesh, *rows), K)
        np.testing.assert_equal(jax.eval_shape(lambda w: w.dequantize(), w).shape, w.shape)
        return nvfp4.linear(x, w, b), w

    specs = part_specs(w, rows)
    f = jax.shard_map(
        part, mesh=mesh, in_specs=(P(), specs, rows), out_specs=(P(None, *rows), specs)
    )
    y, same = jax.jit(f)(X, w, BIAS)
    np.testing.assert_allclose(y, nvfp4.linear(X, w, BIAS), rtol=1e-5, atol=1e-4)
    assert_same(same, w)


@pytest.mark.parametrize("repacked,activation", [(False, 0.002), (True, None)])
def test_shard_map_of_two_layers_of_which_one_is_divided_along_k(mesh, repacked, activation):
    """Tensor parallelism by hand: the rows of one weight, the columns of the next."""
    up, down = weight("canonical"), weight("canonical", kernel=KERNEL.T)
    name = "y" if mesh.shape["y"] > 1 else "x"

    def part(x, up, down):
        assert (up.shape, down.shape) == ((N // mesh.shape[name], K), (K, N // mesh.shape[name]))
        if repacked:
            up, down = (nvfp4.repack(w, this_machine.arches()[-1]) for w in (up, down))
        hidden = nvfp4.linear(x, up, activation_scale=activation)
        return jax.lax.psum(nvfp4.linear(hidden, down, activation_scale=activation), name)

    specs = P(), part_specs(up, P(name)), part_specs(down, P(None, name))
    y = jax.jit(jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=P()))(X, up, down)
    hidden = nvfp4.linear(X, up, activation_scale=activation)
    expected = nvfp4.linear(hidden, down, activation_scale=activation)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("arch", PACKED)
def test_shard_map_refuses_parts_that_the_order_does_not_have(mesh, arch):
    name = "y" if mesh.shape["y"] > 1 else "x"
    whole = weight(arch), P(None, name)
    odd = weight(arch, kernel=KERNEL[:200]), P(name)
    for w, spec in (whole, odd):
        f = jax.shard_map(
            lambda w: w.dequantize(), mesh=mesh, in_specs=(part_specs(w, spec),), out_specs=spec
        )
        with pytest.raises(ValueError, match=r"may be divided by whole tiles of 128|evenly"):
            f(w)


# ---- Transformations ----------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["canonical", *PACKED])
def test_gradient(mesh, arch):
    def loss(x, w, b):
        return (nvfp4.linear(x, w, b) ** 2).sum()

    w = weight(arch)
    args = put(mesh, X, P("x")), put(mesh, w, P("y")), put(mesh, BIAS, P("y"))
    (dx, db), moved = run(jax.grad(loss, (0, 2)), *args)
    expected = jax.grad(loss, (0, 2))(X, w, BIAS)
    np.testing.assert_allclose(dx, expected[0], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(db, expected[1], rtol=1e-3, atol=1e-2)
    rows, columns = mesh.shape["x"], mesh.shape["y"]
    expected = [f"f32[{N // columns}]"] * (rows > 1) + [f"f32[{M // rows},{K}]"] * (columns > 1)
    assert moved == sorted(("all-reduce", shape) for shape in expected)


def test_vmap_and_leading_axes(mesh):
    x = X.reshape(4, 4, K)
    w = weight("canonical")
    for f in (nvfp4.linear, jax.vmap(nvfp4.linear, (0, None))):
        y, moved = run(f, put(mesh, x, P("x")), put(mesh, w, P("y")))
        np.testing.assert_allclose(y, nvfp4.linear(x, w), rtol=1e-5, atol=1e-4)
        assert y.sharding.is_equivalent_to(NamedSharding(mesh, P("x", None, "y")), 3)
        assert moved == []


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("axes", ["x", ("x", "y")])
def test_a_leading_axis_behind_a_whole_one_is_divided(mesh, activation, axes):
    x, w, spec = X.reshape(2, 8, K), weight(ARCHES[-1]), P(None, axes)
    f = functools.partial(nvfp4.linear, activation_scale=activation)
    y, moved = run(f, put(mesh, x, spec), w)
    np.testing.assert_allclose(y, f(x, w), rtol=1e-5, atol=1e-4)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    amax = activation == "tensor" and parts(mesh, axes) > 1
    assert moved == ([("all-reduce", "f32[]")] if amax else [])

    dx, moved = run(jax.grad(lambda x: f(x, w).sum()), put(mesh, x, spec))
    np.testing.assert_allclose(dx, jax.grad(lambda x: f(x, w).sum())(x), rtol=1e-5, atol=1e-4)
    assert moved == []


@pytest.mark.parametrize("how", [{}, {"scaling": "token"}, {"global_scale": 0.01}])
def test_a_leading_axis_behind_a_whole_one_is_divided_when_it_is_quantized(mesh, how):
    x, spec = X.reshape(2, 8, K), P(None, "x")
    f = functools.partial(nvfp4.quantize, **how)
    t, moved = run(f, put(mesh, x, spec))
    assert_same(t, f(x))
    assert t.data.sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    assert moved == ([("all-reduce", "f32[]")] if not how and parts(mesh, "x") > 1 else [])


def test_scan_over_layers(mesh):
    ws = jax.vmap(nvfp4.quantize)(KERNEL.reshape(4, K, K))
    f = lambda x, ws: jax.lax.scan(lambda x, w: (nvfp4.linear(x, w), None), x, ws)[0]  # noqa: E731
    placed = jax.tree.map(lambda a: put(mesh, a, P(None, "y") if a.ndim == 3 else P()), ws)
    y, moved = run(f, put(mesh, X, P("x")), placed)
    np.testing.assert_allclose(y, f(X, ws), rtol=1e-4, atol=1e-3)
    between_layers = {("all-gather", "f32", M // mesh.shape["x"] * K)}
    assert set(amounts(moved)) == (between_layers if mesh.shape["y"] > 1 else set())


@pytest.mark.parametrize("arch", ARCHES[1:])
def test_repack(mesh, arch):
    w = put(mesh, weight("canonical"), P("y"))
    repacked, moved = run(lambda w: nvfp4.repack(w, arch), w)
    assert moved == []
    eager = nvfp4.repack(w, arch)
    for one in (repacked, eager):
        assert_same(one, weight(arch))
        for part in (one.data, one.block_scale):
            assert part.sharding.is_equivalent_to(NamedSharding(mesh, P("y")), part.ndim)


# ---- Meshes with explicit axes ------------------------------------------------------------------


@pytest.fixture
def explicit(mesh):
    return this_machine.mesh(mesh.devices.shape, AxisType.Explicit)


def specs(tree):
    return [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(tree)]


def everyhow(mesh, function, *args):
    """The results eagerly and under jit, without the mesh in the context and with it."""
    yield function(*args)
    yield jax.jit(function)(*args)
    with jax.set_mesh(mesh):
        yield function(*args)
        yield jax.jit(function)(*args)


@pytest.mark.parametrize(
    "how,scale_spec",
    [
        ({}, P()),
        ({"scaling": "token"}, P("x", None)),
        ({"global_scale": 0.01}, P()),
    ],
)
def test_explicit_quantize(explicit, how, scale_spec):
    x = X.reshape(4, 4, K)
    f = functools.partial(nvfp4.quantize, **how)
    for spec in (P("x", None, None), P("x", None, "y")):
        for t in everyhow(explicit, f, put(explicit, x, spec)):
            assert_same(t, f(x))
            assert specs(t) == [spec, spec, scale_spec]


def test_explicit_quantize_where_blocks_do_not_divide(explicit):
    x = X[:, :240]
    columns = "y" if explicit.shape["y"] == 1 else None  # 15 blocks
    for t in everyhow(explicit, nvfp4.quantize, put(explicit, x, P("x", "y"))):
        assert_same(t, nvfp4.quantize(x))
        assert specs(t) == [P("x", columns), P("x", columns), P()]


@pytest.mark.parametrize("arch", ARCHES)
def test_explicit_linear(explicit, arch):
    w = weight("canonical")
    x = X.reshape(4, 4, K)
    expected = nvfp4.linear(x, w, BIAS)
    for x_spec, w_spec, y_spec in (
        (P("x"), P("y"), P("x", None, "y")),
        (P("x"), P("x"), P("x", None, None)),
        (P(), P(("x", "y")), P(None, None, ("x", "y"))),
        (P("x", None, "y"), P(), P("x", None, None)),
    ):
        placed = put(explicit, w, w_spec)
        if arch != "canonical":
            placed = nvfp4.repack(placed, arch)
            assert specs(placed)[0][0] == (w_spec[0] if len(w_spec) else None)
            assert_same(placed, weight(arch))
        y = jax.jit(nvfp4.linear)(put(explicit, x, x_spec), placed, BIAS)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
        assert specs(y) == [y_spec]


def test_explicit_linear_however_it_is_called(explicit):
    w = weight("canonical")
    args = put(explicit, X, P("x")), put(explicit, w, P("y"))
    for y in everyhow(explicit, nvfp4.linear, *args):
        np.testing.assert_allclose(y, nvfp4.linear(X, w), rtol=1e-5, atol=1e-4)
        assert specs(y) == [P("x", "y")]
    loss = lambda x, w: (nvfp4.linear(x, w) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(*args)
    np.testing.assert_allclose(gradient, jax.grad(loss)(X, w), rtol=1e-3, atol=1e-2)
    assert specs(gradient) == [P("x", None)]
    f = jax.vmap(nvfp4.linear, (0, None))
    x = X.reshape(4, 4, K)
    for y in everyhow(explicit, f, put(explicit, x, P("x")), args[1]):
        np.testing.assert_allclose(y, f(x, w), rtol=1e-5, atol=1e-4)
        assert specs(y) == [P("x", None, "y")]
