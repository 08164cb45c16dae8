# SPDX-License-Identifier: Apache-2.0
"""The first use of a kernel on a GPU: all are right on a few tiles; a fault is stepped around."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4 import custom_calls
from jax_nvfp4.config import REFERENCE, configs
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear import trial
from jax_nvfp4.ops.linear.cuda import multiply

if jax.local_devices()[0].platform != "gpu" or device.local_arch() == REFERENCE:
    pytest.skip("the default device is no GPU with kernels", allow_module_level=True)

ARCH = device.local_arch()
X = jax.random.normal(jax.random.key(0), (4, 512), jnp.bfloat16)
W = nvfp4.quantize(jax.random.normal(jax.random.key(1), (256, 512), jnp.bfloat16))


@pytest.fixture(autouse=True)
def nothing_is_known(monkeypatch):
    monkeypatch.setenv("JAX_NVFP4_CHECK", "1")
    monkeypatch.setattr(device, "_unusable", {})
    device._warn_once.cache_clear()
    trial._fault.cache_clear()
    jax.clear_caches()


@pytest.mark.parametrize("config", configs(ARCH), ids=lambda config: config.name)
def test_every_kernel_is_right(config):
    for split in sorted({1, config.split_k}):
        chosen = trial.plan_of(config, split, device.limits(ARCH))
        assert trial.fault_of(chosen, multiply, per_row=False) is None


@pytest.mark.parametrize("scale", [None, "token", "tensor", 0.01])
def test_a_call_inside_of_transformations_is_tried(scale):
    def f(x, w):
        return nvfp4.linear(x, w, activation_scale=scale)

    y = jax.jit(f)(X, W)
    assert not device._unusable
    xs = jnp.stack([X, X])
    np.testing.assert_array_equal(jax.jit(jax.vmap(f, (0, None)))(xs, W)[1], y)
    scanned = jax.jit(lambda xs: jax.lax.scan(lambda _, x: (None, f(x, W)), None, xs)[1])(xs)
    np.testing.assert_array_equal(scanned[0], y)


@pytest.mark.parametrize("fault", ["wrong", "broken"])
def test_a_faulty_kernel_is_stepped_around(monkeypatch, fault):
    first = nvfp4.explain(X, W, activation_scale=None).gemm.name
    right = jax.jit(lambda x: nvfp4.linear(x, W, activation_scale=None, out_dtype=jnp.float32))(X)
    call = custom_calls.gemm_call

    def gemm_call(*operands, config, **options):
        if config.name == first and fault == "broken":  # a launch that fails
            options["split_k"] = 1000
        y = call(*operands, config=config, **options)
        return y + (config.name == first)

    monkeypatch.setattr(custom_calls, "gemm_call", gemm_call)
    trial._fault.cache_clear()
    jax.clear_caches()
    with pytest.warns(RuntimeWarning, match=f"passes over its kernel {first}"):
        y = jax.jit(lambda x: nvfp4.linear(x, W, activation_scale=None, out_dtype=jnp.float32))(X)
    assert nvfp4.explain(X, W, activation_scale=None).gemm.name != first
    np.testing.assert_allclose(y, right, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(right))))
