# SPDX-License-Identifier: Apache-2.0
"""A tiny mixture of experts as users write it in nnx, converted, and divided over two devices."""

import jax
import jax.numpy as jnp
import llama
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4
from jax_nvfp4.conversion.convert import path_of

EXPERTS, TOP_K, INNER = 6, 2, 48
IDS = jnp.asarray(np.random.default_rng(0).integers(0, llama.VOCAB, (2, 5)), jnp.int32)


class Experts(nnx.Module):
    """Qwen3-MoE's block: a router, and rows sorted by expert through ragged products."""

    def __init__(self, rngs):
        def weights(*shape):
            return nnx.Param(rngs.normal(shape, llama.DTYPE) * shape[1] ** -0.5)

        self.router = nnx.Linear(llama.D, EXPERTS, use_bias=False, rngs=rngs)
        self.gate, self.up = (weights(EXPERTS, llama.D, INNER) for _ in range(2))
        self.down = weights(EXPERTS, INNER, llama.D)

    def __call__(self, x):
        rows = x.reshape(-1, llama.D)
        chance, chosen = lax.top_k(jax.nn.softmax(self.router(rows.astype(jnp.float32))), TOP_K)
        chance /= chance.sum(-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        sizes = jnp.bincount(chosen.reshape(-1), length=EXPERTS)
        each = jnp.repeat(rows, TOP_K, axis=0)[order]
        hidden = jax.nn.silu(lax.ragged_dot(each, self.gate[...], sizes))
        hidden *= lax.ragged_dot(each, self.up[...], sizes)
        out = lax.ragged_dot(hidden, self.down[...], sizes)[jnp.argsort(order)]
        out = out.reshape(-1, TOP_K, llama.D) * chance[..., None].astype(x.dtype)
        return out.sum(1).reshape(x.shape)


class Block(llama.NnxBlock):
    def __init__(self, rngs):
        super().__init__(rngs)
        del self.gate, self.up, self.down
        self.experts = Experts(rngs)

    def __call__(self, x):
        h = llama.norm(x, self.norm1[...])
        x = x + self.o(llama.attention(self.q(h), self.k(h), self.v(h)))
        return x + self.experts(llama.norm(x, self.norm2[...]))


class Model(llama.NnxLlama):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(llama.LAYERS)])


def representable(path, leaf):
    """Random values that NVFP4 has, each block of the contracted axis with its largest one."""
    which = next((name for name in path_of(path) if name in AXIS), None)
    if which is None:
        return leaf
    rng = np.random.default_rng(len(jax.tree_util.keystr(path)))
    values = rng.choice([0.5, 1, 1.5, 2, 3, 4, 6], leaf.shape) * rng.choice([-1, 1], leaf.shape)
    np.moveaxis(values, AXIS[which], 0)[::16] = 6
    return jnp.asarray(values * 2.0**-5, leaf.dtype)


AXIS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 1, "up": 1, "down": 1}


def converted(**options):
    graph, params = nnx.split(Model(nnx.Rngs(0)))
    params = jax.tree_util.tree_map_with_path(representable, params)

    def apply(params, ids):
        return nnx.merge(graph, params)(ids)

    return apply, params, *nvfp4.convert(apply, params, IDS, **options)


def test_all_experts_are_reached_and_the_router_is_not():
    apply, params, run, quantized, report = converted(activation_scale=None)
    became = {
        leaf.path[-2] if leaf.path[-1] == "kernel" else leaf.path[-1]: leaf.quantized
        for leaf in report.leaves
    }
    assert all(became[name] for name in AXIS)
    assert not became["router"] and not became["lm_head"]
    llama.assert_equal_to_rounding(jax.jit(run)(quantized, IDS), jax.jit(apply)(params, IDS))


@pytest.mark.parametrize("scale", [None, "token"])
def test_experts_on_two_devices_equal_one_device(scale):
    if jax.device_count() < 2:
        pytest.skip("needs several devices")
    _, params, run, quantized, _ = converted(activation_scale=scale, batch_invariant=True)
    expected = jax.jit(run)(quantized, IDS)
    mesh = jax.sharding.Mesh(jax.devices()[:2], "x")

    def spec(path, leaf):
        of_experts = "experts" in jax.tree_util.keystr(path) and leaf.ndim == 3
        return P("x") if of_experts else P()

    specs = jax.tree_util.tree_map_with_path(spec, jax.tree.map(jnp.asarray, params))
    places = nvfp4.shardings(quantized, mesh, specs)
    divided = jax.device_put(quantized, places)
    found = jax.jit(run)(divided, jax.device_put(IDS, jax.NamedSharding(mesh, P())))
    assert found.sharding.device_set == set(mesh.devices.flat)
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
