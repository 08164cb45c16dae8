# SPDX-License-Identifier: Apache-2.0
"""Unmodified linen models on NVFP4 kernels, and the axes that `quantize_params` is told.

The kernels hold values that NVFP4 has exactly, and inputs are bfloat16: the results are those of
the dense kernels to the rounding of bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_nvfp4 as nvfp4
from jax_nvfp4.linen import intercept

X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 32)), jnp.bfloat16)
KEY = jax.random.key(0)


class Block(nn.Module):
    """Layers of each kind, none of them named."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, dtype=x.dtype)(nn.LayerNorm(dtype=x.dtype)(x))
        y = nn.DenseGeneral((4, 8), dtype=x.dtype)(x)
        y = nn.gelu(nn.Einsum((4, 8, 6), "...nh,nhd->...d", dtype=x.dtype)(y))
        return x + nn.Dense(32, dtype=x.dtype)(y), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block, prevent_cse=False)
        scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan()(x, None)


def exact(path, leaf):
    """A kernel of values that NVFP4 holds: those of one sign have one magnitude."""
    return jnp.sign(leaf) * 0.125 if path[-1].key == "kernel" else leaf


def axes(path, leaf):
    """The axes that the layers contract, after those of stacked layers."""
    if path[-1] != "kernel":
        return False
    stacked = 1 if "ScanCheckpointBlock_0" in path else 0
    several = path[-2] in ("out", "Einsum_0")
    contracted = tuple(range(stacked, stacked + 1 + several))
    return (contracted, tuple(range(stacked)))


def assert_close(y, expected):
    assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
    y, expected = (np.asarray(a, np.float64) for a in (y, expected))
    assert np.linalg.norm(y - expected) < 1e-2 * np.linalg.norm(expected)


def exact_params(model):
    params = jax.jit(model.init)(KEY, X)
    return jax.tree_util.tree_map_with_path(exact, params)


@pytest.mark.parametrize("model", [Block(), Scanned()], ids=["block", "scanned"])
def test_unmodified_models(model):
    params = exact_params(model)
    quantized = nvfp4.quantize_params(params, axes)
    kernels = [k for k in jax.tree.leaves(quantized, is_leaf=is_kernel) if is_kernel(k)]
    assert len(kernels) == 7

    def apply(params, x):
        with intercept(None):
            return model.apply(params, x)[0]

    expected = jax.jit(lambda p, x: model.apply(p, x)[0])(params, X)
    assert_close(jax.jit(apply)(nvfp4.repack(quantized), X), expected)
    if isinstance(model, Block):
        mixed = nvfp4.quantize_params(params, lambda p, a: "Dense_0" in p and axes(p, a))
        assert_close(jax.jit(apply)(mixed, X), expected)
        np.testing.assert_array_equal(jax.jit(apply)(params, X), expected)


def is_kernel(node):
    return isinstance(node, nvfp4.Nvfp4Kernel)


def test_dense_kernels_of_two_axes_serve_each_layer():
    """What `quantize_params` makes by default, (out, in), of Dense and of the general layers."""
    layers = (nn.Dense(8), nn.DenseGeneral(8), nn.Einsum((32, 8), "btd,df->btf"))
    for layer in layers:
        layer = layer.clone(bias_init=nn.initializers.ones)
        params = exact_params(layer)
        quantized = nvfp4.quantize_params(params)
        assert quantized["params"]["kernel"].shape == (8, 32)
        with intercept(activation_scale="token"):
            y = layer.apply(quantized, X)
            fresh = layer.init(KEY, X)
        assert isinstance(fresh["params"]["kernel"], jax.Array)
        # The bias joins before the one rounding, as in `linear`.
        kernel, bias = quantized["params"]["kernel"], params["params"]["bias"]
        assert_same = functools.partial(np.testing.assert_allclose, rtol=1e-6)
        assert_same(y, nvfp4.linear(X, kernel, bias, out_dtype=jnp.float32))


def test_tied_heads_stay_dense():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, x):
            embed = nn.Embed(16, 32, name="embed")
            table = embed.variables["params"]["embedding"] if not self.is_initializing() else None
            x = nn.Dense(32, dtype=x.dtype)(x)
            embed(jnp.zeros((), int))
            if table is None:
                return x
            head = nn.Dense(16, use_bias=False, dtype=x.dtype, parent=None)
            return head.apply({"params": {"kernel": table.T}}, x)

    params = exact_params(Tied())
    expected = Tied().apply(params, X)
    with intercept(None):
        assert_close(Tied().apply(nvfp4.quantize_params(params), X), expected)


def test_a_subclass_with_its_own_call_keeps_it():
    class Twice(nn.Dense):
        @nn.compact
        def __call__(self, inputs):
            return 2 * super().__call__(inputs)

    params = exact_params(Twice(8))
    with intercept(None):
        y = Twice(8).apply(nvfp4.quantize_params(params), X)
    assert_close(y, Twice(8).apply(params, X))


def test_batch_axes_of_dense_general():
    layer = nn.DenseGeneral(8, batch_dims=(0,), dtype=jnp.bfloat16)
    params = exact_params(layer)
    quantized = nvfp4.quantize_params(params, lambda p, a: a.ndim == 3 and ((1,), (0,)))
    assert quantized["params"]["kernel"].shape == (2, 32, 8)
    with intercept(None):
        assert_close(layer.apply(quantized, X), layer.apply(params, X))


def test_nvfp4_dense_takes_stacks_of_named_axes():
    params = exact_params(nn.Dense(8))
    quantized = nvfp4.quantize_params(params, lambda p, a: p[-1] == "kernel" and (0,))
    y = nvfp4.Nvfp4Dense(8).apply(quantized, X)
    expected = nvfp4.Nvfp4Dense(8).apply(nvfp4.quantize_params(params), X)
    np.testing.assert_array_equal(y, expected)


PARAMS = {"params": {"kernel": jnp.ones((32, 8)), "bias": jnp.ones(8)}}
DEFAULT = jax.eval_shape(nvfp4.quantize_params, PARAMS)


def apply_abstract(layer, params):
    with intercept():
        return jax.eval_shape(layer.apply, params, X)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: nvfp4.quantize_params({"k": jnp.ones((2, 3, 4))}, lambda *_: True), ValueError,
         r"k of shape \(2, 3, 4\) is no Dense kernel .*must return the axes to contract"),
        (lambda: nvfp4.quantize_params(PARAMS, lambda *_: 1), TypeError, "got 1 for params/bias"),
        (lambda: nvfp4.quantize_params(PARAMS, lambda *_: [0]), TypeError, "two tuples"),
        (lambda: nvfp4.quantize_params(PARAMS, lambda p, a: a.ndim == 2 and (2,)), ValueError,
         r"params/kernel of shape \(32, 8\): contracting must be different axes"),
        (lambda: apply_abstract(nn.Dense(9), DEFAULT), ValueError, r"features \(9,\); got \(8,\)"),
        (lambda: apply_abstract(nn.Dense(8, promote_dtype=lambda *a, dtype: a), DEFAULT),
         ValueError, "promote_dtype of its own"),
        (lambda: apply_abstract(nn.Dense(8, dot_general=jax.lax.dot_general), DEFAULT),
         ValueError, "dot_general of its own"),
        (lambda: apply_abstract(nn.Einsum((32, 8), "btf,df->btd", use_bias=False), DEFAULT),
         ValueError, "must have one size"),
    ],
)  # fmt: skip
def test_bad_use_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_params_with_a_search():
    kernel = jnp.asarray(np.random.default_rng(3).standard_normal((2, 64, 16)), jnp.float32)
    params = {"Dense_0": {"kernel": kernel[0]}, "layers": {"kernel": kernel}}
    axes = {"Dense_0": True, "layers": ((1,), (0,))}
    found = nvfp4.quantize_params(params, lambda path, _: axes[path[0]], search="4over6")
    each = [nvfp4.quantize(matrix.T, search="4over6") for matrix in kernel]
    plain = nvfp4.quantize(kernel[0].T)
    assert (np.asarray(each[0].block_scale) != np.asarray(plain.block_scale)).any()
    stacked = found["layers"]["kernel"].weight
    for part in ("data", "block_scale", "global_scale"):
        got = getattr(found["Dense_0"]["kernel"], part)
        np.testing.assert_array_equal(got, getattr(each[0], part))
        wanted = jnp.stack([getattr(tensor, part) for tensor in each])
        np.testing.assert_array_equal(getattr(stacked, part), wanted)
    with pytest.raises(ValueError, match="search must be None"):
        nvfp4.quantize_params(params, lambda path, _: axes[path[0]], search="best")
