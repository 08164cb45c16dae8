# SPDX-License-Identifier: Apache-2.0
"""nnx.Nvfp4Linear and the swap of a model's layers."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import this_machine
from flax import nnx
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4
from jax_nvfp4.nnx import Nvfp4Linear, quantize_model, repack_model

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), jnp.float32)


class Model(nnx.Module):
    """Linear layers as an attribute, in a list, in a dict, in a Sequential, and shared."""

    def __init__(self, rngs):
        self.up = nnx.Linear(40, 64, rngs=rngs)
        self.layers = nnx.List(
            [nnx.Linear(64, 64, rngs=rngs), nnx.Linear(64, 40, use_bias=False, rngs=rngs)]
        )
        self.named = nnx.Dict(q=nnx.Linear(40, 40, rngs=rngs))
        self.tail = nnx.Sequential(nnx.Linear(40, 24, rngs=rngs), nnx.relu)
        self.again = self.named["q"]
        self.norm = nnx.LayerNorm(40, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.up(x))
        for layer in self.layers:
            x = layer(x)
        return self.tail(self.norm(self.again(self.named["q"](x))))


def forward_by_hand(model, x, activation):
    """The model's forward pass, its Linear layers by `linear` on their quantized kernels."""

    def linear(layer, x):
        weight = nvfp4.quantize(layer.kernel[...].T)
        bias = None if layer.bias is None else layer.bias[...]
        scale = jnp.float32(1) if activation == "static" else activation
        return nvfp4.linear(x, weight, bias, activation_scale=scale)

    x = nnx.relu(linear(model.up, x))
    for layer in model.layers:
        x = linear(layer, x)
    x = model.norm(linear(model.again, linear(model.named["q"], x)))
    return nnx.relu(linear(model.tail.layers[0], x))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("activation", ["token", "tensor", "static", None])
def test_swap(activation):
    model = Model(nnx.Rngs(0))
    expected = forward_by_hand(model, X, activation)
    bias = model.up.bias
    quantize_model(model, activation_scale=activation)
    layers = [model.up, *model.layers, model.named["q"], model.tail.layers[0]]
    assert all(isinstance(layer, Nvfp4Linear) for layer in layers)
    assert model.again is model.named["q"] and model.up.bias is bias
    assert model.layers[1].bias is None
    np.testing.assert_array_equal(model(X), expected)
    jitted = nnx.jit(lambda model, x: model(x))
    np.testing.assert_allclose(jitted(model, X), model(X), rtol=1e-4, atol=1e-4)
    before = model(X)
    repack_model(model)
    assert isinstance(model.up.kernel, nvfp4.RepackedWeight)
    np.testing.assert_array_equal(model(X), before)


def test_the_kernel_is_the_quantized_transpose():
    linear = nnx.Linear(40, 24, rngs=nnx.Rngs(1))
    layer = Nvfp4Linear.from_linear(linear, activation_scale=None)
    expected = nvfp4.quantize(linear.kernel[...].T)
    np.testing.assert_array_equal(layer.kernel.data[...], expected.data)
    y = nvfp4.linear(X, expected, linear.bias[...], activation_scale=None)
    np.testing.assert_array_equal(layer(X), y)
    fresh = Nvfp4Linear(40, 24, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(fresh.kernel.data[...], expected.data)


class Containers(nnx.Module):
    """Linear layers in the containers of Python, nested."""

    def __init__(self, rngs):
        layers = [nnx.Linear(40, 40, rngs=rngs) for _ in range(4)]
        self.held = nnx.data((layers[0], (layers[1], 3)))
        self.listed = nnx.data([{"q": (layers[2],)}, layers[3]])
        self.again = layers[0]

    def __call__(self, x):
        return self.listed[1](self.listed[0]["q"][0](self.held[1][0](self.held[0](x))))


def test_swap_in_containers():
    model = Containers(nnx.Rngs(0))
    quantize_model(model)
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, Nvfp4Linear)]
    assert len(layers) == 4 and model.again is model.held[0] and model.held[1][1] == 3
    assert not any(isinstance(node, nnx.Linear) for _, node in nnx.iter_graph(model))
    y = model(X)
    for arch in this_machine.arches():
        repack_model(model, arch)
        assert model.again.kernel.arch == arch
    np.testing.assert_array_equal(nnx.merge(*nnx.split(model))(X), y)


def test_every_argument_of_linear_is_there():
    ours, theirs = (inspect.signature(layer).parameters for layer in (Nvfp4Linear, nnx.Linear))
    assert set(theirs) <= set(ours)


def test_where_chooses():
    model = Model(nnx.Rngs(0))
    quantize_model(model, where=lambda path, layer: path[0] == "layers")
    assert isinstance(model.up, nnx.Linear) and isinstance(model.layers[0], Nvfp4Linear)


def test_calibration():
    model = Model(nnx.Rngs(0))
    quantize_model(model, activation_scale="static")
    model.set_attributes(calibrating=True)
    model(X)
    nnx.jit(lambda model, x: model(x))(model, X * 3)
    model.set_attributes(calibrating=False)
    assert model.up.input_scale[...] == nvfp4.global_scale(X * 3)
    model(X * 9)
    assert model.up.input_scale[...] == nvfp4.global_scale(X * 3)


def test_gradient_skips_the_codes():
    model = Model(nnx.Rngs(0))
    quantize_model(model)
    grads = nnx.grad(lambda model, x: model(x).sum())(model, X)
    assert "kernel" not in grads["up"] and grads["up"]["bias"].shape == (64,)


def test_split_merge_and_orbax(tmp_path):
    model = Model(nnx.Rngs(0))
    quantize_model(model, activation_scale="static")
    repack_model(model, this_machine.arches()[-1])
    graph, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), model(X))
    pure = nnx.to_pure_dict(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", pure)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "model", jax.tree.map(ocp.utils.to_shape_dtype_struct, pure)
        )
    nnx.replace_by_pure_dict(state, restored)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), model(X))


def test_partitioning_metadata_is_kept():
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        metadata = {"out_sharding": ("x", "y")}
        linear = nnx.Linear(40, 24, rngs=nnx.Rngs(0), kernel_metadata=metadata)
        for layer in (
            Nvfp4Linear.from_linear(linear),
            Nvfp4Linear(40, 24, rngs=nnx.Rngs(0), kernel_metadata=metadata),
        ):
            assert layer.kernel.data.get_metadata()["out_sharding"] == ("y", "x")
            assert layer.kernel.block_scale.get_metadata()["out_sharding"] == ("y", "x")
            assert "out_sharding" not in layer.kernel.global_scale.get_metadata()
            assert layer.kernel.data[...].sharding.spec == P("y", "x")
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
        layer = Nvfp4Linear(40, 24, kernel_init=init, rngs=nnx.Rngs(0))
        assert layer.kernel.data.get_metadata()["out_sharding"] == ("y", "x")


def test_transformations():
    layer = Nvfp4Linear(40, 16, rngs=nnx.Rngs(0))
    xs = jnp.stack([X, 2 * X])
    y = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(layer, xs)
    np.testing.assert_allclose(y[1], layer(2 * X), rtol=1e-5, atol=1e-5)
    dx = jax.grad(lambda x: layer(x).sum())(X)
    dense = nvfp4.Nvfp4Tensor(
        *(getattr(layer.kernel, n)[...] for n in ("data", "block_scale", "global_scale")), k=40
    )
    np.testing.assert_allclose(
        dx, jnp.broadcast_to(dense.dequantize().sum(0), X.shape), rtol=1e-4, atol=1e-5
    )
    shapes = nnx.eval_shape(lambda: Nvfp4Linear(40, 16, rngs=nnx.Rngs(0)))
    assert shapes.kernel.data.shape == (16, 24)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: Nvfp4Linear(4, 4, activation_scale="row", rngs=nnx.Rngs(0)),
            ValueError,
            "activation_scale must be",
        ),
        (
            lambda: Nvfp4Linear(4, 4, dot_general=jnp.dot, rngs=nnx.Rngs(0)),
            ValueError,
            "dot_general must be None",
        ),
        (
            lambda: quantize_model(nnx.LayerNorm(4, rngs=nnx.Rngs(0))),
            ValueError,
            "no nnx.Linear layer",
        ),
        (lambda: quantize_model(nnx.Linear(4, 4, rngs=nnx.Rngs(0))), ValueError, "itself a Linear"),
        (lambda: repack_model(Model(nnx.Rngs(0))), ValueError, "no Nvfp4Linear layer"),
        (
            lambda: Nvfp4Linear.from_linear(
                nnx.Linear(4, 4, promote_dtype=lambda *a, **k: a, rngs=nnx.Rngs(0))
            ),
            ValueError,
            "promote_dtype must be None",
        ),
        (lambda: Nvfp4Linear(16, 4, rngs=nnx.Rngs(0))(X), ValueError, "K = 40"),
    ],
)
def test_bad_use_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
