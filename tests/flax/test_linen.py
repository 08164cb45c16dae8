# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Dense and quantize_params."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import this_machine
from flax import linen as nn
from flax import nnx, serialization
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

X = jnp.asarray(np.random.default_rng(0).standard_normal((6, 40)), jnp.float32)
KEY = jax.random.key(0)
ACTIVATIONS = ("token", "tensor", "static", None)


class Mlp(nn.Module):
    """Two dense layers; `dense` makes them."""

    dense: type[nn.Module] = nn.Dense
    fields: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = self.dense(64, name="up", **dict(self.fields))(x)
        return self.dense(24, use_bias=False, name="down", **dict(self.fields))(nn.relu(x))


def relative_error(y, reference):
    return float(jnp.linalg.norm(y - reference) / jnp.linalg.norm(reference))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_init_gives_a_usable_layer(activation):
    layer = nvfp4.Nvfp4Dense(32, activation_scale=activation)
    variables = layer.init(KEY, X)
    kernel = variables["params"]["kernel"]
    assert isinstance(kernel, nvfp4.Nvfp4Tensor) and kernel.shape == (32, 40)
    assert variables["params"]["bias"].shape == (32,)
    dense = nn.Dense(32)
    expected = dense.apply(dense.init(KEY, X), X)  # the same initial kernel before quantization
    y = layer.apply(variables, X)
    assert y.shape == (6, 32) and relative_error(y, expected) < 0.2
    np.testing.assert_allclose(jax.jit(layer.apply)(variables, X), y, rtol=1e-5, atol=1e-5)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("repacked", [None, *this_machine.arches()])
def test_quantize_params_of_a_dense_model(activation, repacked):
    params = Mlp().init(KEY, X)
    expected = Mlp().apply(params, X)
    quantized = nvfp4.quantize_params(params)
    assert quantized["params"]["up"]["kernel"].shape == (64, 40)
    bits = nvfp4.quantize(params["params"]["up"]["kernel"].T)
    np.testing.assert_array_equal(quantized["params"]["up"]["kernel"].data, bits.data)
    model = Mlp(nvfp4.Nvfp4Dense, (("activation_scale", activation),))
    if repacked:
        quantized = nvfp4.repack(quantized, repacked)
    if activation == "static":
        _, calibrated = model.apply(quantized, X, mutable=["quant"])
        quantized = {**quantized, **calibrated}
    assert relative_error(model.apply(quantized, X), expected) < 0.25


def test_calibration_keeps_the_running_amax():
    layer = nvfp4.Nvfp4Dense(8, activation_scale="static")
    variables = layer.init(KEY, X)
    assert variables["quant"]["input_scale"] == 1 and not variables["quant"]["input_amax"]
    scales = []
    for batch in (X, X * 3, X * 2):
        _, quant = layer.apply(variables, batch, mutable=["quant"])
        variables = {**variables, **quant}
        scales.append(float(variables["quant"]["input_scale"]))
    assert scales[0] == float(nvfp4.global_scale(X))
    assert scales[1] == scales[2] == float(nvfp4.global_scale(X * 3))
    y = layer.apply(variables, X)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    np.testing.assert_array_equal(
        y, nvfp4.linear(X, kernel, bias, activation_scale=jnp.float32(scales[2]))
    )
    np.testing.assert_array_equal(variables["quant"]["input_amax"], jnp.abs(X * 3).max())


def test_calibration_takes_the_maximum_of_what_is_quantized():
    """Inputs are rounded to the dtype first; 1.999 becomes 2."""
    x = jnp.full((2, 40), 1.999)
    layer = nvfp4.Nvfp4Dense(8, dtype=jnp.bfloat16, activation_scale="static")
    _, variables = layer.apply(layer.init(KEY, x), x, mutable=["quant"])
    assert variables["quant"]["input_amax"] == 2
    linear = nvfp4.nnx.Nvfp4Linear(
        40, 8, dtype=jnp.bfloat16, activation_scale="static", rngs=nnx.Rngs(0)
    )
    linear.calibrating = True
    linear(x)
    assert linear.input_amax[...] == 2


def test_where_sees_paths():
    seen = []
    tree = {"a": [{"kernel": jnp.ones((16, 8))}], "b": jnp.ones(3)}
    nvfp4.quantize_params(tree, where=lambda path, leaf: not seen.append(path) and leaf.ndim == 2)
    assert seen == [("a", "0", "kernel"), ("b",)]


def test_calibration_under_jit():
    layer = nvfp4.Nvfp4Dense(8, activation_scale="static")
    variables = layer.init(KEY, X)
    step = jax.jit(lambda v, x: layer.apply(v, x, mutable=["quant"])[1])
    for i in (1, 2):
        variables = {**variables, **step(variables, X * i)}
    assert variables["quant"]["input_scale"] == nvfp4.global_scale(X * 2)


def test_a_static_scale_from_elsewhere():
    """A checkpoint has a scale and no amax."""
    layer = nvfp4.Nvfp4Dense(8, activation_scale="static")
    params = nvfp4.Nvfp4Dense(8).init(KEY, X)["params"]
    y = layer.apply({"params": params, "quant": {"input_scale": jnp.float32(0.002)}}, X)
    expected = nvfp4.linear(X, params["kernel"], params["bias"], activation_scale=0.002)
    np.testing.assert_array_equal(y, expected)


def test_a_calibration_under_the_former_names_loads_and_goes_on():
    layer = nvfp4.Nvfp4Dense(8, activation_scale="static")
    params = layer.init(KEY, X)["params"]
    amax = 2 * float(jnp.abs(X).max())
    saved = {"activation_scale": jnp.float32(amax / 2688), "activation_amax": jnp.float32(amax)}
    y = layer.apply({"params": params, "quant": saved}, X)
    expected = nvfp4.linear(
        X, params["kernel"], params["bias"], activation_scale=saved["activation_scale"]
    )
    np.testing.assert_array_equal(y, expected)
    _, variables = layer.apply({"params": params, "quant": saved}, 3 * X, mutable=["quant"])
    assert variables["quant"]["input_amax"] == 3 * jnp.abs(X).max()
    assert variables["quant"]["input_scale"] == nvfp4.global_scale(3 * X)
    _, variables = layer.apply({"params": params, "quant": saved}, X, mutable=["quant"])
    assert variables["quant"]["input_amax"] == amax


def test_every_field_of_dense_is_there_in_its_order():
    ours, theirs = (
        [f.name for f in dataclasses.fields(layer)] for layer in (nvfp4.Nvfp4Dense, nn.Dense)
    )
    assert [name for name in ours if name in theirs] == theirs


@pytest.mark.parametrize("arch", [None, "sm_90a"])
def test_flax_serialization(arch):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    variables = nvfp4.Nvfp4Dense(8, kernel_init=init).init(KEY, X)
    if arch:
        variables = nvfp4.repack(nn.unbox(variables), arch)
    blob = serialization.to_bytes(variables)
    for target in (jax.tree.map(jnp.zeros_like, variables), jax.eval_shape(lambda: variables)):
        restored = serialization.from_bytes(target, blob)
        assert jax.tree.structure(restored) == jax.tree.structure(variables)
        for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(variables), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(
                np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8)
            )
    kernel = nn.unbox(variables)["params"]["kernel"]
    with pytest.raises(ValueError, match="block_scale"):
        serialization.from_state_dict(kernel, {"data": kernel.data})


def test_dtypes_follow_dense():
    for dtype, param_dtype, x_dtype in [
        (None, jnp.float32, jnp.bfloat16),
        (None, jnp.bfloat16, jnp.bfloat16),
        (jnp.bfloat16, jnp.float32, jnp.float32),
        (jnp.float16, jnp.float32, jnp.float32),
        (None, jnp.float32, jnp.int32),
    ]:
        x = X.astype(x_dtype)
        dense = nn.Dense(16, dtype=dtype, param_dtype=param_dtype)
        layer = nvfp4.Nvfp4Dense(16, dtype=dtype, param_dtype=param_dtype)
        ours, theirs = layer.init(KEY, x), dense.init(KEY, x)
        assert ours["params"]["bias"].dtype == theirs["params"]["bias"].dtype
        assert layer.apply(ours, x).dtype == dense.apply(theirs, x).dtype


def test_batch_invariant_field():
    layer = nvfp4.Nvfp4Dense(16, batch_invariant=True)
    variables = layer.init(KEY, X)
    whole = layer.apply(variables, X)
    np.testing.assert_array_equal(layer.apply(variables, X[2:3]), whole[2:3])


def test_partitioning_metadata_is_kept():
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
    bias_init = nn.with_partitioning(nn.initializers.zeros_init(), ("mlp",))
    fields = (("kernel_init", init),)
    dense = Mlp(nn.Dense, (*fields,)).init(KEY, X)
    spec_in = nn.get_partition_spec(dense)["params"]["up"]["kernel"]
    assert spec_in == P("embed", "mlp")
    for tree in (
        Mlp(nvfp4.Nvfp4Dense, fields).init(KEY, X),
        nvfp4.quantize_params(dense),
    ):
        spec = nn.get_partition_spec(tree)["params"]["up"]["kernel"]
        assert spec.data == spec.block_scale == P("mlp", "embed")
        assert spec.global_scale == P()
        y = Mlp(nvfp4.Nvfp4Dense, fields).apply(tree, X)
        np.testing.assert_array_equal(y, Mlp(nvfp4.Nvfp4Dense).apply(nn.unbox(tree), X))
    layer = nvfp4.Nvfp4Dense(16, bias_init=bias_init)
    assert nn.get_partition_spec(layer.init(KEY, X))["params"]["bias"] == P("mlp")


def test_sharded_params_from_their_metadata():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "y"))
    model = nvfp4.Nvfp4Dense(64, kernel_init=init)
    boxed = model.init(KEY, X)
    shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), nn.get_partition_spec(boxed))
    params = jax.tree.map(jax.device_put, nn.unbox(boxed), shardings)
    assert params["params"]["kernel"].data.sharding.spec == P("y", None)
    y = jax.jit(model.apply)(params, X)
    np.testing.assert_allclose(y, model.apply(nn.unbox(boxed), X), rtol=1e-5, atol=1e-5)


class Stack(nn.Module):
    dense: type[nn.Module]

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(self.dense(40, name="layer"), x, None)[0]


def test_scan_over_stacked_layers():
    params = Stack(nn.Dense).init(KEY, X)
    assert params["params"]["layer"]["kernel"].shape == (3, 40, 40)
    quantized = nvfp4.quantize_params(
        params, where=lambda path, leaf: path[-1] == "kernel" and ((1,), (0,))
    )
    assert quantized["params"]["layer"]["kernel"].shape == (3, 40, 40)
    assert quantized["params"]["layer"]["kernel"].weight.global_scale.shape == (3,)
    y = Stack(nvfp4.Nvfp4Dense).apply(quantized, X)
    assert relative_error(y, Stack(nn.Dense).apply(params, X)) < 0.3
    again = Stack(nvfp4.Nvfp4Dense).apply(nvfp4.repack(quantized), X)
    np.testing.assert_allclose(again, y, rtol=1e-5, atol=1e-5)
    fresh = Stack(nvfp4.Nvfp4Dense).init(KEY, X)
    assert fresh["params"]["layer"]["kernel"].shape == (3, 40, 40)


def test_transformations_of_the_layer():
    layer = nvfp4.Nvfp4Dense(16)
    variables = layer.init(KEY, X)
    dense = variables["params"]["kernel"].dequantize()
    gradient = jax.grad(lambda x: layer.apply(variables, x).sum())(X)
    np.testing.assert_allclose(
        gradient, jnp.broadcast_to(dense.sum(0), X.shape), rtol=1e-4, atol=1e-5
    )
    params = jax.grad(lambda v: layer.apply(v, X).sum(), allow_int=True)(variables)
    np.testing.assert_allclose(params["params"]["bias"], jnp.full(16, 6.0))
    xs = jnp.stack([X, X * 2])
    y = jax.vmap(lambda x: layer.apply(variables, x))(xs)
    np.testing.assert_allclose(y[1], layer.apply(variables, X * 2), rtol=1e-5, atol=1e-5)
    remat = nn.remat(nvfp4.Nvfp4Dense)(16)
    again = jax.grad(lambda x: remat.apply(variables, x).sum())(X)
    np.testing.assert_array_equal(again, gradient)
    shapes = jax.eval_shape(layer.init, KEY, X)
    assert shapes["params"]["kernel"].shape == (16, 40)


def test_orbax_round_trip_of_a_model(tmp_path):
    model = Mlp(nvfp4.Nvfp4Dense, (("activation_scale", "static"),))
    variables = nvfp4.repack(model.init(KEY, X))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(
            tmp_path / "model", jax.tree.map(ocp.utils.to_shape_dtype_struct, variables)
        )
    np.testing.assert_array_equal(model.apply(restored, X), model.apply(variables, X))


PARAMS = nn.Dense(8).init(KEY, X)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (
            lambda: nvfp4.Nvfp4Dense(8, activation_scale="row").init(KEY, X),
            ValueError,
            "activation_scale must be .*'row'",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8, dot_general=jax.lax.dot_general).init(KEY, X),
            ValueError,
            "dot_general must be None",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8).apply(PARAMS, X),
            TypeError,
            "must be an Nvfp4Tensor or a RepackedWeight; got .*quantize_params",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(9).apply(nvfp4.quantize_params(PARAMS), X),
            ValueError,
            r"\(9, 40\); got \(8, 40\)",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8, dot_general_cls=object).init(KEY, X),
            ValueError,
            "dot_general_cls must be None",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8, dtype=jnp.int8).init(KEY, X),
            TypeError,
            "Nvfp4Dense computes in .*param_dtype float32 ask for int8",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8, param_dtype=jnp.int8).init(KEY, X),
            TypeError,
            "Nvfp4Dense.param_dtype must be .*; got int8",
        ),
        (
            lambda: nvfp4.Nvfp4Dense(8).init(KEY, jnp.float32(1)),
            ValueError,
            "at least 1 axis; got a scalar",
        ),
        (
            lambda: Mlp(nvfp4.Nvfp4Dense, (("activation_scale", "static"),)).apply(
                nvfp4.quantize_params(Mlp().init(KEY, X)), X
            ),
            ValueError,
            "Nvfp4Dense 'up' has no static scale: calibrate",
        ),
        (
            lambda: nvfp4.repack(
                nvfp4.Nvfp4Dense(
                    8, kernel_init=nn.with_partitioning(nn.initializers.ones_init(), ("a", "b"))
                ).init(KEY, X)
            ),
            TypeError,
            "got Partitioned .*must be unboxed",
        ),
        (
            lambda: nvfp4.quantize_params({"kernel": nn.Partitioned(X, names=("a",))}),
            ValueError,
            r"axis names \('a',\), and the kernel has 2 axes",
        ),
        (lambda: nvfp4.quantize_params({"bias": X}), ValueError, "no leaf .* was chosen"),
        (
            lambda: nvfp4.quantize_params(PARAMS, where=lambda *_: True),
            ValueError,
            "params/bias of shape .* is no Dense kernel",
        ),
        (
            lambda: nvfp4.quantize_params({"kernel": jnp.ones((2, 2), jnp.int32)}),
            TypeError,
            "must be bfloat16.*int32",
        ),
    ],
)
def test_bad_use_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
