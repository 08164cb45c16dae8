# SPDX-License-Identifier: Apache-2.0
"""The layers of experts stand in for those of models that are written plainly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_nvfp4 as nvfp4
from jax_nvfp4 import linen
from jax_nvfp4 import nnx as nvfp4_nnx
from jax_nvfp4.params import quantize_experts

E, K, I, TOP_K = 4, 32, 48, 2  # noqa: E741
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((2, 3, K)), jnp.float32)


class PlainMoE(nnx.Module):
    """As public models write it: a router, three stacked kernels, every expert for every token."""

    def __init__(self, rngs):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.router = nnx.Linear(K, E, use_bias=False, rngs=rngs)
        self.gate = nnx.Param(init(rngs.params(), (E, K, I)))
        self.up = nnx.Param(init(rngs.params(), (E, K, I)))
        self.down = nnx.Param(init(rngs.params(), (E, I, K)))

    def route(self, x):
        weights, indices = jax.lax.top_k(jax.nn.softmax(self.router(x)), TOP_K)
        return indices, weights / weights.sum(-1, keepdims=True)

    def __call__(self, x):
        indices, weights = self.route(x)
        gates = jnp.sum(jax.nn.one_hot(indices, E) * weights[..., None], axis=-2)
        hidden = nnx.silu(jnp.einsum("...k,eki->...ei", x, self.gate[...]))
        hidden = hidden * jnp.einsum("...k,eki->...ei", x, self.up[...])
        return jnp.einsum("...ei,eik,...e->...k", hidden, self.down[...], gates)


class Nvfp4MoE(nnx.Module):
    """The same with its experts replaced."""

    def __init__(self, plain, **fields):
        self.router = plain.router
        self.experts = nvfp4_nnx.Nvfp4Experts.from_kernels(
            plain.gate[...], plain.up[...], plain.down[...], **fields
        )
        self.route = plain.route

    def __call__(self, x):
        return self.experts(x, *self.route(x))


def test_a_plain_model_with_its_experts_replaced():
    plain = PlainMoE(nnx.Rngs(0))
    model = Nvfp4MoE(plain, activation_scale=None, hidden_scale=None)
    # What is left of the difference once the plain model has the quantized values is bfloat16's.
    half = I
    w13, w2 = (model.experts.w13, model.experts.w2)
    values = [
        jax.jit(lambda w: w.dequantize())(jax.tree.map(lambda v: v[...], w, is_leaf=is_variable))
        for w in (w13, w2)
    ]
    plain.gate[...] = values[0][:, :half].swapaxes(1, 2)
    plain.up[...] = values[0][:, half:].swapaxes(1, 2)
    plain.down[...] = values[1].swapaxes(1, 2)
    expected, y = nnx.jit(lambda m, x: m(x))(plain, X), nnx.jit(lambda m, x: m(x))(model, X)
    assert (y.shape, y.dtype) == (X.shape, X.dtype)
    np.testing.assert_allclose(y, expected, rtol=0.05, atol=0.02)
    nvfp4_nnx.repack_model(model, "sm_90a")
    assert isinstance(model.experts.w13, nvfp4.RepackedWeight)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), y, rtol=1e-5, atol=1e-5)
    # No gradient goes to codes; the router has one.
    grads = nnx.grad(lambda m: m(X).sum())(model)
    assert {str(path[0]) for path, _ in nnx.to_flat_state(grads)} == {"router"}


def is_variable(node):
    return isinstance(node, nnx.Variable)


def test_linen_is_expert_mlp():
    layer = linen.Nvfp4Experts(E, I, use_bias=True, activation_scale="tensor")
    indices = jnp.asarray(RNG.integers(0, E, (2, 3, TOP_K)))
    weights = jnp.asarray(RNG.random((2, 3, TOP_K)), jnp.float32)
    params = jax.eval_shape(layer.init, jax.random.key(0), X, indices, weights)["params"]
    assert params["w13"].shape == (E, 2 * I, K)
    assert params["w2"].shape == (E, K, I)
    assert params["b13"].shape == (E, 2 * I)
    kernels = [RNG.standard_normal(s) for s in ((E, K, I), (E, K, I), (E, I, K))]
    made = quantize_experts(*(jnp.asarray(k, jnp.float32) for k in kernels))
    assert len(np.unique(made["w13"].global_scale)) == 2 * E  # of each gate and of each up
    biases = {name: jnp.ones(params[name].shape) for name in ("b13", "b2")}
    params = nvfp4.repack(biases | made, "sm_90a")
    y = jax.jit(layer.apply)({"params": params}, X, indices, weights)
    expected = jax.jit(
        functools.partial(
            nvfp4.expert_mlp,
            activation=nvfp4.SwiGLU(),
            activation_scale="tensor",
            hidden_scale="token",
        )
    )(
        X.reshape(6, K),
        params["w13"],
        params["w2"],
        indices.reshape(6, TOP_K),
        weights.reshape(6, TOP_K),
        params["b13"],
        params["b2"],
    )
    np.testing.assert_array_equal(y.reshape(6, K), expected)


KERNELS = [np.ones(s, np.float32) for s in ((E, K, I), (E, K, I), (E, I, K))]
REFUSED = [
    (lambda: quantize_experts(KERNELS[2], *KERNELS[1:]), "must have the shapes"),
    (
        lambda: nvfp4_nnx.Nvfp4Experts(E, K, I, activation_scale="static", rngs=nnx.Rngs(0)),
        'activation_scale must be "token", "tensor" or None',
    ),
    (
        lambda: nvfp4_nnx.Nvfp4Experts.from_kernels(*KERNELS, b2=jnp.ones((E, K))),
        "b13 and b2 must both be given",
    ),
    (
        lambda: linen.Nvfp4Experts(E, I, hidden_scale=1.0).init(
            jax.random.key(0), X, jnp.zeros((2, 3, 1), jnp.int32), jnp.ones((2, 3, 1))
        ),
        "hidden_scale must be",
    ),
]


@pytest.mark.parametrize("call,message", REFUSED)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
