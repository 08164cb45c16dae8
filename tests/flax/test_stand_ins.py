# SPDX-License-Identifier: Apache-2.0
"""Our layers in the places of Flax's: dtypes, call signature, abstract and stacked models."""

import functools
import gc
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx, serialization, traverse_util
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4
from jax_nvfp4 import params
from jax_nvfp4.nnx import Nvfp4Linear, QuantizedParam, QuantStat, quantize_model, repack_model
from jax_nvfp4.products.kernel import Nvfp4Kernel

X = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)
KEY = jax.random.key(0)
DTYPES = [  # of the kernel, the bias and x, whatever param_dtype says
    (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
    (jnp.bfloat16, jnp.float32, jnp.bfloat16),
    (jnp.float16, jnp.float16, jnp.float16),
    (jnp.float32, jnp.float32, jnp.bfloat16),
    (jnp.bfloat16, jnp.bfloat16, jnp.int32),
]


@pytest.mark.parametrize("kernel,bias,x", DTYPES)
def test_dtype_of_params_as_they_are(kernel, bias, x):
    inputs = X.astype(x)
    layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    layer.kernel.set_value(layer.kernel[...].astype(kernel))
    layer.bias.set_value(layer.bias[...].astype(bias))
    ours = Nvfp4Linear.from_linear(layer, activation_scale=None)
    assert ours(inputs).dtype == layer(inputs).dtype
    dense_params = {"kernel": layer.kernel[...], "bias": layer.bias[...]}
    want = nn.Dense(16).apply({"params": dense_params}, inputs)
    quantized = nvfp4.quantize_params({"params": dense_params})
    dense = nvfp4.Nvfp4Dense(16, activation_scale=None)
    assert dense.apply(quantized, inputs).dtype == want.dtype
    assert dense.apply(nvfp4.repack(quantized), inputs).dtype == want.dtype


def test_weakly_typed_inputs_take_the_dtype_of_the_params():
    x = jnp.full((2, 32), 1.0)
    assert x.weak_type
    params = {"params": {"kernel": jnp.ones((32, 16), jnp.bfloat16)}}
    want = nn.Dense(16, use_bias=False).apply(params, x)
    got = nvfp4.Nvfp4Dense(16, use_bias=False).apply(nvfp4.quantize_params(params), x)
    assert got.dtype == want.dtype == jnp.bfloat16


def test_out_sharding_does_what_linear_does():
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    layer = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    ours = Nvfp4Linear.from_linear(layer)
    with pytest.raises(ValueError, match="mesh context"):
        ours(X, out_sharding=P("x", None))
    np.testing.assert_array_equal(ours(X, out_sharding=None), ours(X))
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    expected = ours(X)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("x", None)))
        for wanted in (P("x", "y"), P(None, "y"), NamedSharding(mesh, P("y", "x"))):
            want, got = (call(x, out_sharding=wanted) for call in (layer, ours))
            assert jax.typeof(got).sharding.spec == jax.typeof(want).sharding.spec
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    auto = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(auto):
        for call in (layer, ours):
            with pytest.raises(ValueError, match="cannot contain axis names"):
                call(X, out_sharding=P("x", "y"))


# ---- Abstract models ----------------------------------------------------------------------------


def make(metadata=None):
    metadata = {} if metadata is None else {"out_sharding": metadata}
    linear = functools.partial(nnx.Linear, kernel_metadata=metadata, rngs=nnx.Rngs(0))
    return nnx.Sequential(linear(32, 48), nnx.gelu, linear(48, 16))


def test_abstract_model_takes_the_weights_of_a_checkpoint():
    model, concrete = nnx.eval_shape(make), make()
    weights = [nvfp4.quantize(concrete.layers[i].kernel[...].T) for i in (0, 2)]
    expected = make()
    quantize_model(expected, activation_scale="static")
    quantize_model(model, activation_scale="static")
    for got, want in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
    for i, weight in zip((0, 2), weights, strict=True):
        model.layers[i].kernel = weight
        model.layers[i].bias.set_value(concrete.layers[i].bias[...])
        assert isinstance(model.layers[i].kernel.data, QuantizedParam)
    np.testing.assert_array_equal(model(X), expected(X))
    for i, weight in zip((0, 2), weights, strict=True):
        model.layers[i].kernel = nvfp4.repack(weight, "sm_100f")
    repack_model(expected, "sm_100f")
    assert nnx.graphdef(model) == nnx.graphdef(expected)


def test_abstract_model_is_repacked_and_sharded():
    mesh = jax.make_mesh((1, 1), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        before = nnx.as_abstract(nnx.eval_shape(lambda: make(("x", "y"))))
        quantize_model(before)
        after = nnx.eval_shape(lambda: make(("x", "y")))
        quantize_model(after)
        after = nnx.as_abstract(after)
    for model in (before, after):
        kernel = model.layers[0].kernel
        assert kernel.data.sharding.spec == kernel.block_scale.sharding.spec == P("y", "x")
        assert kernel.global_scale.sharding.spec == P()
    repack_model(after, "sm_90a")
    kernel = after.layers[0].kernel
    assert kernel.arch == "sm_90a" and kernel.shape == (48, 32)


def test_abstract_params():
    model = nn.Dense(16)
    abstract = jax.eval_shape(model.init, KEY, X)
    expected = nvfp4.repack(nvfp4.quantize_params(model.init(KEY, X)), "sm_100f")
    got = nvfp4.repack(nvfp4.quantize_params(abstract), "sm_100f")
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    axes = nvfp4.quantize_params(abstract, lambda path, leaf: path[-1] == "kernel" and (0,))
    assert axes["params"]["kernel"].shape == (32, 16)
    with pytest.raises(TypeError, match="int32"):
        nvfp4.quantize_params({"kernel": jax.ShapeDtypeStruct((16, 16), jnp.int32)})


# ---- Stacked layers -----------------------------------------------------------------------------


class Block(nnx.Module):
    def __init__(self, rngs, dense=nnx.Linear):
        self.up = dense(32, 32, rngs=rngs)

    def __call__(self, x):
        return x + nnx.gelu(self.up(x))


def stack(dense=nnx.Linear):
    keys = jax.random.split(KEY, 3)
    return nnx.vmap(lambda key: Block(nnx.Rngs(params=key), dense))(keys)


def scan(axes):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)


def test_stacked_layers_have_everything_one_a_layer():
    axes = nnx.StateAxes({(nnx.Param, QuantizedParam, QuantStat): 0, ...: None})
    dense = stack()
    model = stack()
    quantize_model(model, activation_scale="static")
    up = model.up
    assert up.kernel.shape == (3, 32, 32) and up.kernel.global_scale.shape == (3,)
    assert up.input_scale[...].shape == up.input_amax[...].shape == (3,)
    repack_model(model, "sm_90a")
    model.set_attributes(calibrating=True)
    scan(axes)(X, model)
    model.set_attributes(calibrating=False)
    y = scan(axes)(X, model)

    x = X
    for i in range(3):
        assert up.input_scale[i] == nvfp4.global_scale(x)
        weight = nvfp4.quantize(dense.up.kernel[i].T)
        scale = up.input_scale[i]
        x = x + nnx.gelu(nvfp4.linear(x, weight, dense.up.bias[i], activation_scale=scale))
    np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)


def test_stacked_from_the_start():
    model = stack(functools.partial(Nvfp4Linear, activation_scale="static"))
    assert model.up.input_scale[...].shape == (3,)
    assert scan(0)(X, model).shape == X.shape


def test_what_a_stack_needs_is_said():
    model = stack()
    quantize_model(model)
    with pytest.raises(ValueError, match=r"a stack.*\(3, 32, 32\).*map all of it.*QuantizedParam"):
        scan(nnx.StateAxes({nnx.Param: 0, ...: None}))(X, model)
    odd = nnx.Linear(32, 16, rngs=nnx.Rngs(0))
    odd.kernel.set_value(jnp.ones((32, 16, 3)))
    with pytest.raises(ValueError, match=r"in_features, out_features\) = \(..., 32, 16\)"):
        Nvfp4Linear.from_linear(odd)


def test_axis_names_of_stacked_kernels():
    mesh = jax.make_mesh((1, 1, 1), ("l", "x", "y"), axis_types=(AxisType.Auto,) * 3)
    metadata = {"out_sharding": ("x", "y")}

    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "l"})
    def create(key):
        return nnx.Linear(32, 16, kernel_metadata=metadata, rngs=nnx.Rngs(params=key))

    with jax.set_mesh(mesh):
        ours = Nvfp4Linear.from_linear(create(jax.random.split(KEY, 3)))
        spec = nnx.get_partition_spec(nnx.state(ours))["kernel"]
    assert spec.data.get_value() == spec.block_scale.get_value() == P("l", "y", "x")
    assert spec.global_scale.get_value() == P("l")


# ---- Memory -------------------------------------------------------------------------------------


def test_layers_are_swapped_one_by_one(monkeypatch):
    """Never more than the model and one layer: old kernels are freed as new ones are made."""
    layers = [nnx.Linear(64, 64, use_bias=False, rngs=nnx.Rngs(i)) for i in range(8)]
    model = nnx.Sequential(*layers)
    of_layer = layers[0].kernel[...].nbytes
    del layers
    quantize, live = params.quantize_kernel, []

    def counted(kernel, search):
        weight = quantize(kernel, search)
        gc.collect()
        live.append(sum(array.nbytes for array in jax.live_arrays()))
        return weight

    monkeypatch.setattr(params, "quantize_kernel", counted)
    before = sum(array.nbytes for array in jax.live_arrays())
    quantize_model(model)
    assert len(live) == 8 and max(live) - before < of_layer
    assert live[-1] - before < -4 * of_layer


# ---- Saved models -------------------------------------------------------------------------------


def by_pure_dict(source, template, _):
    state = nnx.state(template)
    nnx.replace_by_pure_dict(state, nnx.to_pure_dict(nnx.state(source)))
    return state


def by_orbax(source, template, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "m", nnx.to_pure_dict(nnx.state(source)))
        checkpointer.wait_until_finished()
        state = nnx.state(template)
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        nnx.replace_by_pure_dict(state, checkpointer.restore(path / "m", shapes))
    return state


def by_pickle(source, *_):
    return pickle.loads(pickle.dumps(nnx.state(source)))


@pytest.mark.parametrize("way", [by_pure_dict, by_orbax, by_pickle])
def test_state_of_another_arch_is_refused_or_right(tmp_path, way):
    """N and K at which the codes of all orders have one shape."""

    def model(arch, seed):
        layer = Nvfp4Linear(256, 256, use_bias=False, rngs=nnx.Rngs(seed), activation_scale=None)
        holder = nnx.Sequential(layer)
        repack_model(holder, arch)
        return holder

    x = jnp.ones((2, 256))
    source, template = model("sm_90a", 0), model("reference", 1)
    try:
        nnx.update(template, way(source, template, tmp_path))
        y = template(x)
    except (TypeError, ValueError):
        return
    np.testing.assert_array_equal(y, source(x))


def test_what_save_pretrained_does():
    """transformers' Flax models: size and dtype of each leaf of the flat params, then to_bytes."""
    params = nvfp4.quantize_params(nn.Dense(16).init(KEY, X))["params"]
    flat = traverse_util.flatten_dict(params, sep="/")
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in flat.values()) == 4 * (32 * 16 + 16)
    blob = serialization.to_bytes(traverse_util.unflatten_dict(flat, sep="/"))
    restored = serialization.from_bytes(params, blob)
    np.testing.assert_array_equal(restored["kernel"].dequantize(), params["kernel"].dequantize())


class Holder(nnx.Module):
    """A user's own module, which holds a weight as it would hold an array."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, x):
        if isinstance(self.weight, Nvfp4Kernel):
            return x @ self.weight
        return nvfp4.linear(x, self.weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda w: nvfp4.quantize(w.T),
        lambda w: nvfp4.repack(nvfp4.quantize(w.T)),
        nvfp4.quantize_kernel,
    ],
    ids=["canonical", "repacked", "kernel"],
)
def test_a_module_holds_a_weight_as_it_holds_an_array(make):
    weight = make(jax.random.normal(KEY, (32, 16)))
    holder = Holder(weight)
    leaves = jax.tree.leaves(nnx.state(holder))
    assert len(leaves) == len(jax.tree.leaves(weight))
    y = holder(X)
    np.testing.assert_array_equal(nnx.jit(lambda module, x: module(x))(holder, X), y)
    assert f"nbytes={sum(part.nbytes for part in jax.tree.leaves(weight))})" in repr(holder)
    again = nnx.merge(*nnx.split(holder))
    np.testing.assert_array_equal(again(X), y)


def _general(rngs):
    model = nnx.Sequential(nnx.LinearGeneral(32, (4, 4), rngs=rngs))
    quantize_model(model)
    return model.layers[0]


@pytest.mark.parametrize(
    "make", [lambda rngs: Nvfp4Linear(32, 16, rngs=rngs), _general], ids=["linear", "general"]
)
def test_a_kernel_is_shared_as_a_param_is(make):
    first, second = make(nnx.Rngs(0)), make(nnx.Rngs(1))
    alone = len(jax.tree.leaves(nnx.state(nnx.Sequential(first, second))))
    parts = len(jax.tree.leaves(first.kernel, is_leaf=lambda node: isinstance(node, nnx.Variable)))
    second.kernel = first.kernel
    assert len(jax.tree.leaves(nnx.state(nnx.Sequential(first, second)))) == alone - parts
    np.testing.assert_array_equal(second(X), first(X))


def test_an_attribute_is_a_layer_s_kernel():
    layer = Nvfp4Linear(32, 16, rngs=nnx.Rngs(0))

    class Tied(nnx.Module):
        def __init__(self):
            self.layer = layer
            self.shared = layer.kernel

    model = nnx.merge(*nnx.split(Tied()))
    assert model.shared.data is model.layer.kernel.data
    assert len(jax.tree.leaves(nnx.state(model))) == len(jax.tree.leaves(nnx.state(layer)))


def test_abstract_with_variables_that_jax_knows():
    with nnx.var_defaults(hijax=True):
        layer = nnx.eval_shape(
            lambda: Nvfp4Linear(32, 16, rngs=nnx.Rngs(0)), graph=True, graph_updates=True
        )
    assert isinstance(layer.kernel.data.get_value(), jax.ShapeDtypeStruct)
    assert layer.kernel.data.get_value().shape == (16, 16)
