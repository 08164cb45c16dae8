# SPDX-License-Identifier: Apache-2.0
"""Kernels on several GPUs of one process: divided over a mesh, and on each by itself."""

import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import this_machine
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

if jax.default_backend() != "gpu":
    pytest.skip("the default device is no GPU", allow_module_level=True)
if jax.device_count() < 2:
    pytest.skip("needs several GPUs", allow_module_level=True)

import test_moe
import test_sharding
from test_sharding import explicit, mesh  # noqa: F401 - its tests' fixtures

globals().update(this_machine.tests_of(test_sharding))
globals().update(this_machine.tests_of(test_moe))

COUNT = 2
M, N, K = 64, 1024, 2048
RNG = np.random.default_rng(8)
X = jnp.asarray(RNG.standard_normal((M, K)), jnp.bfloat16)
KERNEL = jnp.asarray(RNG.standard_normal((N, K)) * 0.05, jnp.float32)
BIAS = jnp.asarray(RNG.standard_normal(N), jnp.float32)
LINEAR = "jax_nvfp4_linear"


def line():
    """A mesh of two GPUs with the one axis z."""
    return jax.make_mesh(
        (COUNT,), ("z",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:COUNT]
    )


def put(tree, spec):
    def one(a):
        return jax.device_put(a, NamedSharding(line(), P(*spec[: a.ndim]) if a.ndim else P()))

    return jax.tree.map(one, tree)


def calls(text, target):
    """The results and operands of a program's custom calls, as lists of shapes."""
    found = [line for line in text.splitlines() if f'custom_call_target="{target}' in line]
    shape = r"\b(?:bf16|f16|f32|u8|f8e4m3fn)\[[\d,]*\]"
    return [re.findall(shape, call.split("metadata=")[0]) for call in found]


def target(activation):
    """The custom call of a linear layer, by its `activation_scale`."""
    return "jax_nvfp4_gemm" if activation is None else LINEAR


def gathered(text):
    """Whether a program gathers anything."""
    return "all-gather" in text


def operands(packed, x_spec, w_spec):
    w = nvfp4.quantize(KERNEL, scaling="token")
    w = nvfp4.repack(w) if packed else w
    return put(X, x_spec), put(w, w_spec), put(BIAS, w_spec[:1])


def whole(packed, **how):
    w = nvfp4.quantize(KERNEL, scaling="token")
    return nvfp4.linear(X, nvfp4.repack(w) if packed else w, BIAS, **how)


@pytest.mark.parametrize("activation", ["token", "tensor", 0.002, None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "x_spec,w_spec,y_spec,shape",
    [
        (P("z"), P(), P("z"), f"bf16[{M // COUNT},{N}]"),
        (P(), P("z"), P(None, "z"), f"bf16[{M},{N // COUNT}]"),
    ],
)
def test_each_device_calls_kernels_on_its_part(packed, activation, x_spec, w_spec, y_spec, shape):
    """Rows of x, or of the weight, divided: nothing but an amax moves, and bits stay."""
    how = {"activation_scale": activation, "batch_invariant": True}
    function = jax.jit(lambda *args: nvfp4.linear(*args, **how))
    args = operands(packed, x_spec, w_spec)
    compiled = function.lower(*args).compile()
    text = compiled.as_text()
    assert [c[0] for c in calls(text, target(activation))] == [shape]
    assert not gathered(text)
    y = compiled(*args)
    assert y.sharding.is_equivalent_to(NamedSharding(line(), y_spec), 2)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(whole(packed, **how)))


@pytest.mark.parametrize("activation", ["token", "tensor", 0.002, None])
def test_columns_are_multiplied_where_they_are_and_summed(activation):
    args = operands(False, P(None, "z"), P(None, "z"))
    how = {"activation_scale": activation, "out_dtype": jnp.float32}
    compiled = jax.jit(lambda *a: nvfp4.linear(*a, **how)).lower(*args).compile()
    text = compiled.as_text()
    (call,) = calls(text, target(activation))
    assert call[0] == f"f32[{M},{N}]"
    assert f"bf16[{M},{K // COUNT}]" in call
    assert not gathered(text) and "all-reduce" in text
    expected = whole(False, **how)
    np.testing.assert_allclose(compiled(*args), expected, rtol=1e-5, atol=1e-3)
    again = jax.jit(lambda *a: nvfp4.linear(*a, **how))(*args)
    np.testing.assert_array_equal(np.asarray(again), np.asarray(compiled(*args)))


@pytest.mark.parametrize("spec", [P("z"), P(None, "z")])
@pytest.mark.parametrize(
    "how", [{"scaling": "token"}, {"scaling": "tensor"}, {"global_scale": 0.01}]
)
def test_quantize(how, spec):
    compiled = jax.jit(lambda x: nvfp4.quantize(x, **how)).lower(put(X, spec)).compile()
    assert not gathered(compiled.as_text())
    parts = jax.tree.leaves(compiled(put(X, spec)))
    for got, expected in zip(parts, jax.tree.leaves(nvfp4.quantize(X, **how)), strict=True):
        got, expected = np.atleast_1d(np.asarray(got)), np.atleast_1d(np.asarray(expected))
        np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("activation", ["token", None])
def test_shard_map(activation):
    w = nvfp4.repack(nvfp4.quantize(KERNEL))
    how = {"activation_scale": activation, "batch_invariant": True}
    part = jax.shard_map(
        lambda x, w: nvfp4.linear(x, w, **how),
        mesh=line(),
        in_specs=(P("z"), P()),
        out_specs=P("z"),
    )
    args = put(X, P("z")), put(w, P())
    compiled = jax.jit(part).lower(*args).compile()
    assert [c[0] for c in calls(compiled.as_text(), target(activation))] == [
        f"bf16[{M // COUNT},{N}]"
    ]
    expected = nvfp4.linear(X, w, **how)
    np.testing.assert_array_equal(np.asarray(compiled(*args)), np.asarray(expected))


def test_two_layers_of_a_tensor_parallel_block():
    """Columns of the first layer's result are those that the second layer multiplies."""
    up = nvfp4.quantize(KERNEL)
    down = nvfp4.quantize(jnp.asarray(RNG.standard_normal((K, N)) * 0.05, jnp.float32))

    def block(x, up, down):
        hidden = nvfp4.linear(x, up, batch_invariant=True)  # the same bits, to be quantized alike
        return nvfp4.linear(jax.nn.relu(hidden), down, out_dtype=jnp.float32)

    args = put(X, P()), put(up, P("z")), put(down, P(None, "z"))
    compiled = jax.jit(block).lower(*args).compile()
    text = compiled.as_text()
    assert not gathered(text)
    assert [c[0] for c in calls(text, LINEAR)] == [f"bf16[{M},{N // COUNT}]", f"f32[{M},{K}]"]
    expected = jax.jit(block)(X, up, down)
    np.testing.assert_allclose(compiled(*args), expected, rtol=1e-4, atol=1e-3)


def test_linear_on_every_device_at_once():
    """A program for each GPU, from a thread each, many times over."""
    w = nvfp4.repack(nvfp4.quantize(KERNEL))
    expected = np.asarray(nvfp4.linear(X, w))
    function = jax.jit(nvfp4.linear)
    wrong = []

    def work(device):
        args = jax.device_put((X, w), device)
        for _ in range(50):
            y = function(*args)
            if y.devices() != {device} or not np.array_equal(np.asarray(y), expected):
                wrong.append(device)

    threads = [threading.Thread(target=work, args=(d,)) for d in jax.local_devices()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def exported(function, *args):
    made = jax.export.export(jax.jit(function), disabled_checks=this_machine.export_checks())(*args)
    call = jax.jit(jax.export.deserialize(made.serialize()).call)
    compiled = call.lower(*args).compile()
    return compiled(*args), compiled.as_text()


def test_an_exported_program_keeps_the_parts_of_a_shard_map():
    w = nvfp4.repack(nvfp4.quantize(KERNEL))
    part = jax.shard_map(nvfp4.linear, mesh=line(), in_specs=(P("z"), P()), out_specs=P("z"))
    args = put(X, P("z")), put(w, P())
    y, text = exported(part, *args)
    assert [c[0] for c in calls(text, LINEAR)] == [f"bf16[{M // COUNT},{N}]"]
    assert not gathered(text)
    np.testing.assert_array_equal(np.asarray(y), np.asarray(jax.jit(part)(*args)))


def test_an_exported_program_is_right_where_it_is_not_divided():
    """What divides a custom call is not part of an exported program: each GPU does all of it."""
    w = nvfp4.repack(nvfp4.quantize(KERNEL))
    args = put(X, P("z")), put(w, P("z"))
    y, text = exported(nvfp4.linear, *args)
    assert [c[0] for c in calls(text, LINEAR)] == [f"bf16[{M},{N}]"]
    np.testing.assert_array_equal(np.asarray(y), np.asarray(nvfp4.linear(X, w)))
