# SPDX-License-Identifier: Apache-2.0
"""`linear` through the GPU's kernels: thousands of shapes, poison, long graphs, threads."""

import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4.layout.weights import pack_weight
from jax_nvfp4.ops import backend

if jax.default_backend() != "gpu":
    pytest.skip("the default device is no GPU", allow_module_level=True)

from test_linear import activation_values, dequantized

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
ACTIVATIONS = ("token", "tensor", 0.0021, None)


def test_kernels_serve_this_gpu():
    assert backend.local_arch() != "reference"
    w = nvfp4.repack(nvfp4.quantize(jnp.ones((128, 128))))
    text = jax.jit(nvfp4.linear).lower(jnp.ones((4, 128)), w).compile().as_text()
    assert "jax_nvfp4_gemm" in text and "jax_nvfp4_quantize" in text


def poison():
    """Leaves NaN bytes in freed memory of every size: what comes next lies on it."""
    for size in (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 27):
        arrays = [jnp.full(size, 0xFF, jnp.uint8) for _ in range(8)]
        jax.block_until_ready(arrays)


def random_problem(rng, largest):
    """Operands of a call and its options; sizes are small, round and ragged ones alike."""
    sizes = []
    for top in largest:
        size = int(np.exp(rng.uniform(0, np.log(top))))
        sizes.append(-(-size // 16) * 16 if rng.integers(2) else size)
    m, n, k = sizes
    dtype, out_dtype = DTYPES[rng.integers(3)], DTYPES[rng.integers(3)]
    x = rng.standard_normal((m, k)).astype(dtype)
    kernel = rng.standard_normal((n, k)).astype(np.float32) * 0.05
    bias = rng.standard_normal(n).astype(DTYPES[rng.integers(3)]) if rng.integers(2) else None
    scaling = ("tensor", "token")[rng.integers(2)]
    options = {
        "activation_scale": ACTIVATIONS[rng.integers(4)],
        "out_dtype": out_dtype,
        "batch_invariant": bool(rng.integers(8) == 0),
    }
    return x, kernel, bias, scaling, options


def quantized_on_the_host(kernel, scaling):
    """A repacked weight and its float64 values, with nothing compiled for its shape."""
    n, k = kernel.shape
    codes, bits, g = oracle.quantize(kernel, scaling=scaling)
    arch = backend.local_arch()
    data, scales = pack_weight(arch, oracle.pack(codes), bits)
    weight = nvfp4.RepackedWeight(*map(jnp.asarray, (data, scales, g)), arch, n, k)
    return weight, oracle.dequantize(codes, bits, g, k)


@pytest.mark.parametrize("seed", range(32))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    problems = [random_problem(rng, (300, 600, 1200)) for _ in range(64)]
    weights, values = zip(
        *(quantized_on_the_host(kernel, scaling) for _, kernel, _, scaling, _ in problems),
        strict=True,
    )

    @jax.jit
    def run(inputs):
        return [
            nvfp4.linear(x, w, bias, **options)
            for (x, w, bias), (*_, options) in zip(inputs, problems, strict=True)
        ]

    inputs = [(x, w, bias) for (x, _, bias, _, _), w in zip(problems, weights, strict=True)]
    poison()
    results = run(inputs)
    again = run(inputs)
    for y, z, w, (x, _, bias, _, options) in zip(results, again, values, problems, strict=True):
        exact, magnitude = oracle.linear(activation_values(x, options["activation_scale"]), w, bias)
        oracle.assert_linear_close(np.asarray(y), exact, magnitude, x.shape[1])
        np.testing.assert_array_equal(np.asarray(y), np.asarray(z))


@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 64, 100, 128, 300, 1024])
@pytest.mark.parametrize("activation", ["token", None])
def test_wide_layers(m, activation):
    """Layers of real sizes, where every multiprocessor and every pipeline stage has work."""
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, 4096)).astype(ml_dtypes.bfloat16)
    w = nvfp4.quantize(rng.standard_normal((6144, 4096)).astype(np.float32))
    y = nvfp4.linear(x, nvfp4.repack(w), activation_scale=activation)
    rows = rng.permutation(m)[:16]
    values = activation_values(x, activation)[rows]
    exact, magnitude = oracle.linear(values, dequantized(w))
    oracle.assert_linear_close(np.asarray(y)[rows], exact, magnitude, 4096)


@pytest.mark.parametrize("activation", ["token", None])
def test_batch_invariant_for_every_m(activation):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((300, 1024)).astype(ml_dtypes.bfloat16)
    w = nvfp4.repack(nvfp4.quantize(rng.standard_normal((512, 1024)).astype(np.float32)))
    options = {"activation_scale": activation, "batch_invariant": True}
    whole = np.asarray(nvfp4.linear(x, w, **options))
    order = rng.permutation(300)

    @jax.jit
    def parts(x):
        return [nvfp4.linear(x[:m], w, **options) for m in range(1, 301)]

    for m, y in enumerate(parts(x[order]), 1):
        np.testing.assert_array_equal(np.asarray(y), whole[order[:m]])


def test_a_hundred_layers_in_one_jit():
    rng = np.random.default_rng(4)
    layers = [
        nvfp4.repack(nvfp4.quantize(rng.standard_normal((256, 256)).astype(np.float32)))
        for _ in range(100)
    ]
    x = jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16)

    def step(x, w):
        return nvfp4.linear(x, w) * jnp.bfloat16(1 / 16)

    whole = jax.jit(lambda x: [x := step(x, w) for w in layers][-1])(x)
    for w in layers:
        x = step(x, w)
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(x))


def test_two_threads_at_once():
    rng = np.random.default_rng(5)
    w = nvfp4.repack(nvfp4.quantize(rng.standard_normal((1024, 2048)).astype(np.float32)))
    inputs = [jnp.asarray(rng.standard_normal((m, 2048)), jnp.bfloat16) for m in (3, 200)]
    function = jax.jit(lambda x: nvfp4.linear(x, w))
    expected = [np.asarray(function(x)) for x in inputs]
    wrong = []

    def work(which):
        for _ in range(100):
            if not np.array_equal(np.asarray(function(inputs[which])), expected[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_quantize_on_the_gpu_and_on_the_cpu_give_the_same_bits():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((513, 1000)).astype(np.float32)
    for options in ({}, {"scaling": "token"}, {"global_scale": 0.01}):
        poison()
        there = nvfp4.quantize(x, **options)
        with jax.default_device(jax.devices("cpu")[0]):
            here = nvfp4.quantize(x, **options)
        for a, b in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
            np.testing.assert_array_equal(
                np.atleast_1d(a).view(np.uint8), np.atleast_1d(b).view(np.uint8)
            )
