# SPDX-License-Identifier: Apache-2.0
"""quantize_model on LinearGeneral and Einsum, and its report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4
from jax_nvfp4.nnx import (
    Nvfp4Einsum,
    Nvfp4Linear,
    Nvfp4LinearGeneral,
    QuantizedParam,
    quantize_model,
    repack_model,
)

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 32)), jnp.bfloat16)


class Block(nnx.Module):
    """Attention's projections, an output projection by einsum, and a mixture of experts."""

    def __init__(self, rngs):
        self.qkv = nnx.LinearGeneral(32, (2, 16), rngs=rngs)
        self.out = nnx.LinearGeneral((2, 16), 32, axis=(-2, -1), rngs=rngs)
        self.up = nnx.Einsum("btd,df->btf", (32, 8), (8,), rngs=rngs)
        self.experts = nnx.Einsum("bte,ef->btf", (8, 4), rngs=rngs)
        self.router = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 16, rngs=rngs)

    def __call__(self, x):
        x = self.out(self.qkv(x))
        x = self.up(x)
        return self.head(self.norm(self.experts(x) * jax.nn.sigmoid(self.router(x))))


def exact_block():
    """A block in bfloat16 whose kernels NVFP4 holds exactly: those of one sign are equal."""
    model = Block(nnx.Rngs(0))
    for path, param in nnx.iter_graph(model):
        if isinstance(param, nnx.Param):
            value = param[...].astype(jnp.bfloat16)
            param.set_value(jnp.sign(value) * 0.125 if path[-1] == "kernel" else value)
    return model


def test_general_layers_are_swapped_and_keep_their_shapes():
    model = exact_block()
    expected = nnx.jit(lambda model, x: model(x))(model, X)
    report = quantize_model(model, activation_scale=None)
    kinds = [type(getattr(model, name)) for name in ("qkv", "out", "up", "experts", "head")]
    assert kinds == [Nvfp4LinearGeneral] * 2 + [Nvfp4Einsum] * 2 + [Nvfp4Linear]
    assert type(model.router) is nnx.Linear
    shapes = [layer.kernel.shape for layer in (model.qkv, model.out, model.up, model.head)]
    assert shapes == [(32, 2, 16), (2, 16, 32), (32, 8), (16, 4)]

    y = nnx.jit(lambda model, x: model(x))(model, X)
    assert y.dtype == expected.dtype == jnp.bfloat16
    difference = np.asarray(y, np.float64) - np.asarray(expected, np.float64)
    assert np.linalg.norm(difference) < 2e-2 * np.linalg.norm(np.asarray(expected, np.float64))
    repack_model(model, "sm_90a")
    assert model.out.kernel.weight.arch == "sm_90a" and model.out.kernel.shape == (2, 16, 32)
    again = nnx.jit(lambda model, x: model(x))(model, X)
    np.testing.assert_array_equal(again, y)

    names = {leaf.name: leaf for leaf in report.leaves}
    assert names["out.kernel"].quantized and names["out.kernel"].why == "LinearGeneral, 32 x 32"
    assert names["out.kernel"].bytes_after == 32 * 18 + 4
    assert names["router.kernel"].why.startswith("a router")
    assert names["qkv.bias"].why == "its kernel alone is quantized"
    assert names["norm.scale"].why == "LayerNorm is no Linear, LinearGeneral or Einsum"
    dense = 2 * sum(leaf.size for leaf in jax.tree.leaves(nnx.state(exact_block(), nnx.Param)))
    assert report.bytes_before == dense
    assert "router.kernel" in str(report) and len(report.quantized) == 5


def test_where_chooses_and_explains():
    model = Block(nnx.Rngs(0))
    report = quantize_model(model, where=lambda path, layer: path == ("router",))
    assert isinstance(model.router, Nvfp4Linear) and type(model.qkv) is nnx.LinearGeneral
    assert {leaf.why for leaf in report.left if leaf.name == "qkv.kernel"} == {"left by where"}


def test_batch_axes_bias_and_static_scales():
    def layer():
        return nnx.LinearGeneral(
            32,
            8,
            batch_axis={0: 2},
            bias_init=nnx.initializers.ones,
            kernel_init=lambda key, shape, dtype: jnp.sign(jax.random.normal(key, shape, dtype)),
            dtype=jnp.bfloat16,
            rngs=nnx.Rngs(0),
        )

    new = Nvfp4LinearGeneral.from_layer(layer(), activation_scale="static")
    assert new.kernel.batch == (0,) and new.kernel.shape == (2, 32, 8)
    new.calibrating = True
    new(X)
    new.calibrating = False
    amax = np.abs(np.asarray(X, np.float32)).max()
    np.testing.assert_allclose(new.input_scale[...], amax / 2688, rtol=1e-6)
    x = jnp.round(X)  # small integers, so that all is exact
    fresh = Nvfp4LinearGeneral.from_layer(layer(), activation_scale=None)
    np.testing.assert_array_equal(fresh(x), layer()(x))


def test_gradients_and_filters():
    layer = Nvfp4Einsum.from_layer(nnx.Einsum("bd,df->bf", (32, 8), (8,), rngs=nnx.Rngs(0)))
    grads = nnx.grad(lambda layer, x: layer(x).sum(), argnums=nnx.DiffState(0, nnx.Param))(
        layer, X[0]
    )
    np.testing.assert_array_equal(jax.tree.leaves(grads)[0], jnp.full(8, 3.0))
    parts = jax.tree.leaves(nnx.state(layer, QuantizedParam))
    assert len(parts) == 3


def test_abstract_models_and_axis_names():
    def make():
        init = nnx.with_partitioning(nnx.initializers.ones, (None, "x", "y"), eager_sharding=False)
        return nnx.LinearGeneral(32, (2, 8), kernel_init=init, rngs=nnx.Rngs(0))

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([make()])

    model = nnx.eval_shape(Model)
    quantize_model(model)
    kernel = model.layers[0].kernel
    assert kernel.shape == (32, 2, 8)
    assert isinstance(kernel.weight.data.get_value(), jax.ShapeDtypeStruct)
    specs = nnx.get_partition_spec(nnx.state(model, QuantizedParam))
    assert P(("x", "y"), None) in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))
    repack_model(model, "sm_90a")
    assert model.layers[0].kernel.weight.arch == "sm_90a"
    # A weight, such as one of a checkpoint, takes the place of the abstract one.
    w = jnp.ones((32, 2, 8))
    model.layers[0].kernel = nvfp4.quantize_kernel(w)
    assert isinstance(model.layers[0].kernel.weight.data, QuantizedParam)


def without_subscripts():
    layer = nnx.Einsum("bd,df->bf", (32, 8), rngs=nnx.Rngs(0))
    layer.einsum_str = None
    return layer


@pytest.mark.parametrize(
    ("layer", "match"),
    [
        (without_subscripts, "given when it is called"),
        (lambda: nnx.Einsum("bd,bf->bdf", (2, 8), rngs=nnx.Rngs(0)), "contracts no axis"),
        (lambda: nnx.Einsum("bd,...f->b", (2, 8), rngs=nnx.Rngs(0)), "no subscript for each"),
        (lambda: nnx.Einsum("bd,df->bf", (32, 8), einsum_op=jnp.dot, rngs=nnx.Rngs(0)),
         "einsum_op must be None"),
        (lambda: nnx.LinearGeneral(32, 8, dot_general=jax.lax.dot_general, rngs=nnx.Rngs(0)),
         "dot_general must be None"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be_swapped_stay_and_say_why(layer, match):
    class Model(nnx.Module):
        def __init__(self):
            self.odd = layer()
            self.linear = nnx.Linear(32, 8, rngs=nnx.Rngs(0))

    model = nnx.eval_shape(Model)
    odd = type(model.odd)
    report = quantize_model(model)
    assert type(model.odd) is odd and isinstance(model.linear, Nvfp4Linear)
    (why,) = (leaf.why for leaf in report.left if leaf.name == "odd.kernel")
    assert match in why
    with pytest.raises(ValueError, match=f"the layer odd: .*{match}"):
        quantize_model(nnx.eval_shape(Model), where=lambda path, layer: path == ("odd",))


def test_a_model_without_such_layers_says_what_it_has():
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(16, 8, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match="Embed is no Linear, LinearGeneral or Einsum"):
        quantize_model(nnx.eval_shape(Model))
    with pytest.raises(ValueError, match=r"itself a LinearGeneral; use Nvfp4LinearGeneral\.from"):
        quantize_model(nnx.LinearGeneral(4, 4, rngs=nnx.Rngs(0)))


def test_einsum_has_one_product():
    layer = Nvfp4Einsum.from_layer(nnx.Einsum("bd,df->bf", (32, 8), rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="quantized for 'bd,df->bf'"):
        layer(X[0], "bd,df->fb")


def test_layers_with_a_search():
    rngs = nnx.Rngs(0)
    general = nnx.LinearGeneral(64, (4, 8), use_bias=False, rngs=rngs)
    einsum = nnx.Einsum("td,dnh->tnh", (64, 4, 8), rngs=rngs)
    model = nnx.List([nnx.Linear(64, 32, use_bias=False, rngs=rngs), general, einsum])
    dense = [layer.kernel[...] for layer in model]
    nvfp4.nnx.quantize_model(model, search="4over6")
    for layer, kernel in zip(model, dense, strict=True):
        expected = nvfp4.quantize(kernel.reshape(64, -1).T, search="4over6")
        plain = nvfp4.quantize(kernel.reshape(64, -1).T)
        weight = getattr(layer.kernel, "weight", layer.kernel)
        got = np.asarray(weight.block_scale[...])
        np.testing.assert_array_equal(got, expected.block_scale)
        assert (got != np.asarray(plain.block_scale)).any()
        np.testing.assert_array_equal(weight.data[...], expected.data)
