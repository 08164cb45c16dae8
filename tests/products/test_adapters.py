# SPDX-License-Identifier: Apache-2.0
"""Callables for the hooks of other frameworks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_nvfp4 as nvfp4
from jax_nvfp4.adapters import DotGeneral, Einsum

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.standard_normal((3, 2, 32)), jnp.float32)
W = jnp.asarray(RNG.standard_normal((3, 32, 8)), jnp.float32)
DIMS = (((2,), (1,)), ((0,), (0,)))
KERNEL = nvfp4.quantize_kernel(W, 1, 0)


def test_products_with_nvfp4_weights_are_ours_and_others_those_of_jax():
    expected = nvfp4.dot_general(X, KERNEL, DIMS)
    np.testing.assert_array_equal(DotGeneral()(X, KERNEL, DIMS, precision=None), expected)
    y = Einsum()("bmk,bkn->bmn", X, KERNEL, precision=None)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(DotGeneral()(X, W, DIMS), jax.lax.dot_general(X, W, DIMS))
    dense = Einsum()("bmk,bkn->bmn", X, W)
    np.testing.assert_array_equal(dense, jnp.einsum("bmk,bkn->bmn", X, W))
    assert jax.tree.leaves((DotGeneral(), Einsum())) == []


def test_dense_weights_of_a_side_are_quantized_in_place():
    expected = nvfp4.dot_general(X, KERNEL, DIMS)
    np.testing.assert_array_equal(DotGeneral("rhs")(X, W, DIMS), expected)
    swapped = (((1,), (2,)), ((0,), (0,)))
    y = DotGeneral("lhs")(W, X, swapped)
    np.testing.assert_array_equal(y, nvfp4.dot_general(KERNEL, X, swapped))
    np.testing.assert_array_equal(Einsum("rhs")("bmk,bkn->bmn", X, W), expected)
    weight_only = Einsum("rhs", activation_scale=None)("bmk,bkn->bmn", X, W)
    np.testing.assert_array_equal(
        weight_only, nvfp4.einsum("bmk,bkn->bmn", X, KERNEL, activation_scale=None)
    )
    with pytest.raises(ValueError, match=r"weight must be .* or None; got 'w'"):
        DotGeneral("w")(X, W, DIMS)


def test_hooks_of_flax():
    plain = nnx.LinearGeneral(32, 8, rngs=nnx.Rngs(0))
    hooked = nnx.LinearGeneral(32, 8, dot_general=DotGeneral("rhs"), rngs=nnx.Rngs(0))
    expected = nvfp4.dot_general(
        X, nvfp4.quantize_kernel(plain.kernel[...]), (((2,), (0,)), ((), ()))
    )
    np.testing.assert_array_equal(hooked(X), expected)
    einsum = nnx.Einsum("bmk,kn->bmn", (32, 8), einsum_op=Einsum("rhs"), rngs=nnx.Rngs(0))
    kernel = nvfp4.quantize_kernel(einsum.kernel[...])
    np.testing.assert_array_equal(einsum(X), nvfp4.einsum("bmk,kn->bmn", X, kernel))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Linear:
    """A stand-in for haliax's Linear: a product that is a field, and that `jnp.einsum` calls."""

    weight: jax.Array
    dot_general: object

    def __call__(self, x):
        return jnp.einsum("bmk,bkn->bmn", x, self.weight, _dot_general=self.dot_general)


def test_a_field_of_a_module_that_is_mapped_and_differentiated():
    module = dataclasses.replace(Linear(W, jax.lax.dot_general), dot_general=DotGeneral("rhs"))
    assert len(jax.tree.leaves(module)) == 1
    y = jax.jit(lambda module, x: module(x))(module, X)
    np.testing.assert_allclose(y, nvfp4.dot_general(X, KERNEL, DIMS), rtol=1e-6, atol=1e-6)
    dx = jax.grad(lambda x: module(x).sum())(X)
    np.testing.assert_allclose(
        dx, jnp.broadcast_to(KERNEL.dequantize().sum(2)[:, None], X.shape), rtol=1e-4, atol=1e-4
    )
