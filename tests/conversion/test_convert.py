# SPDX-License-Identifier: Apache-2.0
"""What `convert` chooses, reports, accepts and refuses; its memory; its retracing."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from llama import DTYPE, LinenLlama
from test_constructs import X, check, exact, weights

import jax_nvfp4 as nvfp4
from jax_nvfp4.conversion.analysis import Use
from jax_nvfp4.products.leaf import JoinedLeaf

D = 32
FIRST = {"w": exact(D, D)}


def product(p, x):
    return x @ p["w"]


def test_where_sees_paths_and_uses():
    seen = {}

    def where(path, use):
        seen[path] = use
        return path[-1] == "a"

    params = {"layers": [{"a": exact(D, D), "b": exact(D, 2, 16)}]}

    def fn(p, x):
        w = p["layers"][0]
        return jnp.einsum("td,dhk->thk", x @ w["a"].T.astype(x.dtype), w["b"])

    _, converted, report = nvfp4.convert(fn, params, X, where=where)
    assert set(seen) == {("layers", "0", "a"), ("layers", "0", "b")}
    use = seen["layers", "0", "a"]
    assert isinstance(use, Use)
    assert (use.shape, use.dtype, use.contracting) == ((D, D), jnp.bfloat16, (1,))
    assert {"transpose", "dot_general"} <= set(use.primitives)
    assert [leaf.why for leaf in report.left] == ["left by where"]
    assert converted["layers"][0]["b"] is params["layers"][0]["b"]
    assert report.share == 0.5
    assert "layers.0.a" in str(report) and "50.0% of the bytes" in str(report)


def test_the_default_leaves_alone_what_the_command_line_does():
    model = LinenLlama()
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    _, _, report = nvfp4.convert(model.apply, params, ids)
    why = {leaf.path[-2]: leaf.why for leaf in report.left if len(leaf.path) > 2}
    assert why["embed"] == "looked up (gather)"
    assert why["lm_head"] == "matches '*lm_head*'"

    def fn(p, x):
        y = x @ p["mlp"]["router"]["kernel"] @ p["odd"]
        return y + jnp.tanh(x @ p["mlp"]["gating_einsum"][0]) @ p["down"]

    mlp = {"router": {"kernel": exact(D, 8)}, "gating_einsum": exact(2, D, 64)}
    params = {"mlp": mlp, "odd": exact(8, 16), "down": exact(64, 16)}
    _, _, report = nvfp4.convert(fn, params, X)
    assert {leaf.name: leaf.why for leaf in report.left} == {
        "mlp.router.kernel": "matches '*router*'",
        "odd": "K = 8 is not a multiple of 16",
    }


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda p, x: x @ p["w"] + p["w"].sum(), "reduce_sum, beside products"),
        (lambda p, x: x @ p["w"] @ p["w"].T, "its products sum over different axes"),
        (lambda p, x: x @ (p["w"] @ p["w"]), "a product of two weights"),
        (lambda p, x: x + p["w"][:4], "add"),
        (lambda p, x: x @ p["w"][:, 3:20], "a slice of unequal parts"),
        (lambda p, x: x.astype(jnp.int8) @ p["w"].astype(jnp.int8), "a cast to int8"),
        (lambda p, x: (x, p["w"]), "a result of the function"),
        (lambda p, x: x, "not used"),
    ],
)
def test_what_cannot_be_followed_is_left_and_said(fn, why):
    params = {**FIRST, "other": exact(D, D, seed=1)}

    def both(p, x):
        return fn(p, x), x @ p["other"]

    _, _, report = nvfp4.convert(both, params, X)
    (left,) = report.left
    assert left.name == "w" and why in left.why


def test_tied_weights_are_left_or_copied():
    def fn(p, ids):
        x = p["table"][ids] @ p["w"]
        return x @ p["table"].T

    params = {"table": exact(48, D), "w": exact(D, D, seed=1)}
    ids = jnp.arange(5)
    check(fn, params, ids, left={"table"})
    converted = check(fn, params, ids, tied="copy")
    assert converted["table"].dense is params["table"]


def test_other_shapes_are_traced_once_each():
    traces = []

    def fn(p, x):
        traces.append(x.shape)
        return x @ p["w"]

    run, params, _ = nvfp4.convert(fn, FIRST, X)
    traces.clear()
    for rows in (4, 2, 4, 2):
        assert run(params, X[:rows]).shape == (rows, D)
    assert traces in ([(2, D)], [(4, D), (2, D)])


def test_another_use_at_run_time_is_right_and_said():
    def fn(p, x):
        return x @ p["w"] if x.shape[0] == 4 else x @ p["w"].T

    run, params, _ = nvfp4.convert(fn, FIRST, X, activation_scale=None)
    with pytest.warns(UserWarning, match="w is in NVFP4 and is dequantized for a product over oth"):
        found = run(params, X[:2])
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(X[:2] @ FIRST["w"].T, np.float32), rtol=2**-6
    )


def test_abstract_params_give_what_their_arrays_would():
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), FIRST)
    for repack in (True, False):
        _, like, _ = nvfp4.convert(product, abstract, X, repack=repack)
        _, params, _ = nvfp4.convert(product, FIRST, X, repack=repack)
        assert jax.tree.structure(like) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(params), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_products_are_those_of_linear():
    for scale in ("token", "tensor", None, 0.01):
        run, params, _ = nvfp4.convert(product, FIRST, X, activation_scale=scale)
        expected = nvfp4.linear(X, nvfp4.quantize(FIRST["w"].T), activation_scale=scale)
        np.testing.assert_array_equal(
            np.asarray(run(params, X), np.float32), np.asarray(expected, np.float32)
        )


def test_search_weighs_by_the_calibration():
    w = jnp.asarray(np.random.default_rng(5).standard_normal((D, D)), DTYPE)
    x = X * jnp.arange(D, dtype=X.dtype)
    calibration = nvfp4.calibrate(product, {"w": w}, [x])
    _, params, _ = nvfp4.convert(
        product, {"w": w}, x, search="sweep", calibration=calibration, repack=False
    )
    expected = nvfp4.quantize(w.T, search="sweep", importance=calibration["w"].mean_square)
    found = params["w"].weight
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_array_equal(found.block_scale, expected.block_scale)


def test_donated_leaves_are_freed_one_by_one():
    params = {str(i): exact(D, D, seed=i) for i in range(3)}

    def fn(p, x):
        return x @ p["0"] @ p["1"] @ p["2"]

    nvfp4.convert(fn, params, X)
    assert not any(leaf.is_deleted() for leaf in params.values())
    nvfp4.convert(fn, params, X, donate=True)
    assert all(leaf.is_deleted() for leaf in params.values())


def test_host_leaves_are_quantized_one_by_one(monkeypatch):
    module = importlib.import_module("jax_nvfp4.conversion.convert")
    leaves = {str(i): np.asarray(exact(D, 512, seed=i)) for i in range(6)}
    held, before = [], sum(array.nbytes for array in jax.live_arrays())
    make_kernel = module.make_kernel

    def spy(*args, **kwargs):
        kernel = jax.block_until_ready(make_kernel(*args, **kwargs))
        held.append(sum(array.nbytes for array in jax.live_arrays()) - before)
        return kernel

    monkeypatch.setattr(module, "make_kernel", spy)
    nvfp4.convert(lambda p, x: [x @ w for w in p.values()], leaves, X)
    one = leaves["0"].nbytes
    for i, nbytes in enumerate(held):
        assert nbytes <= (i + 1) * one * 0.3 + one, (i, held)
    assert len(held) == 6


def test_shard_map_over_matrices_and_rows():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def fn(p, x):
        def part(x, rows, experts, whole):
            y = jax.lax.all_gather(x @ rows, "x", axis=1, tiled=True)[:, :D] @ whole
            z = jnp.einsum("td,edf->etf", y, experts)
            return jax.lax.psum(z.sum(0), "x"), jnp.einsum("etd,edf->etf", z, experts)

        return jax.shard_map(
            part,
            mesh=mesh,
            in_specs=(P(), P(None, "x"), P("x"), P()),
            out_specs=(P(), P("x")),
            check_vma=False,
        )(x, p["rows"], p["experts"], p["whole"])

    params = weights(rows=(D, 128), experts=(2, D, D), whole=(D, D))
    check(fn, params, X)


@pytest.mark.parametrize("repack", [True, False])
def test_fused_products_of_one_array(repack):
    def fn(p, x):
        q = jnp.einsum("td,dhk->thk", x, p["q"]).reshape(x.shape)
        y = q * (x @ p["k"]) + p["v"].T.astype(x.dtype) @ x[0]

        def layer(y, w):
            return jax.nn.silu(y @ w["gate"]) * (y @ w["up"]) @ w["down"], None

        y, _ = jax.lax.scan(layer, y / 8, p["layers"])
        return y + x @ p["twice"] + y @ p["twice"]

    params = weights(q=(D, 2, 16), k=(D, D), v=(D, D), twice=(D, D))
    params["layers"] = weights(gate=(2, D, 48), up=(2, D, 48), down=(2, 48, D))
    converted = check(fn, params, X, fuse=True, repack=repack)
    assert converted["q"] == JoinedLeaf("k") and converted["k"].shape == (2 * D, D)
    assert converted["layers"]["up"] == JoinedLeaf("layers.gate")
    run, _, report = nvfp4.convert(fn, params, X, fuse=True, repack=repack, where=lambda *_: True)
    # v, whose x is another one, and twice, which has two, stay by themselves.
    assert [leaf.name for leaf in report.quantized if "joined with" in leaf.why] == [
        "k", "layers.gate", "layers.up", "q"
    ]  # fmt: skip
    products = str(jax.make_jaxpr(run)(converted, X)).count("name=nvfp4_product")
    assert products == 1 + 1 + 2 + 2, products


def test_what_a_call_refuses():
    run, params, _ = nvfp4.convert(product, FIRST, X)
    with pytest.raises(TypeError, match="w must be the NVFP4 kernel that convert made of it"):
        run(FIRST, X)
    with pytest.raises(ValueError, match="params must have the structure"):
        run({"v": params["w"]}, X)
    with pytest.raises(TypeError, match="w is converted already"):
        nvfp4.convert(product, params, X)
    with pytest.raises(ValueError, match='tied must be None or "copy"'):
        nvfp4.convert(product, FIRST, X, tied="both")
    with pytest.raises(ValueError, match="no leaf of the params can be converted"):
        nvfp4.convert(lambda p, x: x + p["w"].sum(), FIRST, X)
    _, other, _ = nvfp4.convert(product, {"w": exact(D, 16)}, X)
    with pytest.raises(ValueError, match=r"of w must have shape \(32, 32\); got \(16, 32\)"):
        run(other, X)


def test_static_arguments_by_partial_and_leaves_that_are_no_arrays():
    def fn(params, x, *, activation):
        return activation(x @ params["w"], params["name"])

    params = {**FIRST, "name": "label", "none": None}
    bound = functools.partial(fn, activation=lambda y, name: y * len(name))
    run, converted, _ = nvfp4.convert(bound, params, X, activation_scale=None)
    assert converted["name"] == "label"
    expected = np.asarray((X @ FIRST["w"]) * 5, np.float32)
    np.testing.assert_allclose(np.asarray(run(converted, X), np.float32), expected, rtol=2**-6)
