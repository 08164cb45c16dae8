# SPDX-License-Identifier: Apache-2.0
"""`linear` through the GPU's kernels: thousands of shapes, poison, long graphs, threads."""

import functools
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops import device

if jax.default_backend() != "gpu":
    pytest.skip("the default device is no GPU", allow_module_level=True)

from test_linear import activation_values, dequantized

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)
ACTIVATIONS = ("token", "tensor", 0.0021, None)


def test_kernels_serve_this_gpu():
    assert device.local_arch() != "reference"
    w = nvfp4.repack(nvfp4.quantize(jnp.ones((128, 128))))
    for call, scaling in (("jax_nvfp4_linear", "token"), ("jax_nvfp4_gemm", None)):
        linear = functools.partial(nvfp4.linear, activation_scale=scaling)
        text = jax.jit(linear).lower(jnp.ones((4, 128)), w).compile().as_text()
        assert call in text


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
    arch = device.local_arch()
    data, scales = order(arch).pack(oracle.pack(codes), bits)
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


@pytest.mark.parametrize("m", [1, 16, 48, 64, 128, 300])
@pytest.mark.parametrize("activation", ["token", 0.0021, None])
def test_canonical_and_repacked_weights_give_the_same_bits(m, activation):
    rng = np.random.default_rng(m)
    x = rng.standard_normal((m, 2048)).astype(ml_dtypes.bfloat16)
    w = nvfp4.quantize(rng.standard_normal((1000, 2048)).astype(np.float32))
    expected = np.asarray(nvfp4.linear(x, nvfp4.repack(w), activation_scale=activation))
    np.testing.assert_array_equal(
        np.asarray(nvfp4.linear(x, w, activation_scale=activation)), expected
    )


@pytest.mark.parametrize("m", [1, 16, 40, 64, 200, 600])
def test_float16_activations_keep_their_precision(m):
    """Each element of x is 1 and a half unit of bf16: rounded to bf16, all of them would be 1."""
    rng = np.random.default_rng(m)
    x = (rng.choice([-1, 1], (m, 512)) * (1 + 2.0**-10)).astype(np.float16)
    w = nvfp4.quantize(rng.standard_normal((256, 512)).astype(np.float32))
    y = nvfp4.linear(x, nvfp4.repack(w), activation_scale=None, out_dtype=np.float32)
    exact, magnitude = oracle.linear(x.astype(np.float64), dequantized(w))
    oracle.assert_linear_close(np.asarray(y), exact, magnitude, 512)
    rounded, _ = oracle.linear(np.sign(x).astype(np.float64), dequantized(w))
    assert np.abs(y - exact).max() < 0.05 * np.abs(y - rounded).max()


@pytest.mark.parametrize("m", [1, 16, 48, 64, 130, 300])
@pytest.mark.parametrize("out_dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("activation", ["token", None])
def test_a_bias_that_outweighs_the_product_is_rounded_once(m, out_dtype, activation):
    """Biases on the ties of the dtype: the product, however small, decides which way."""
    rng = np.random.default_rng(m)
    x = (rng.standard_normal((m, 256)) * 2.0 ** -rng.uniform(5, 30, (m, 1))).astype(np.float32)
    w = nvfp4.quantize(rng.standard_normal((384, 256)).astype(np.float32) * 0.05)
    step = oracle.ulp(1.5, out_dtype)
    bias = np.float32(1 + step * (rng.integers(0, 100, 384) + 0.5))
    y = nvfp4.linear(x, nvfp4.repack(w), bias, activation_scale=activation, out_dtype=out_dtype)
    values = activation_values(x, activation)
    exact, magnitude = oracle.linear(values, dequantized(w), bias)
    oracle.assert_linear_close(np.asarray(y), exact, magnitude, 256)


@pytest.mark.parametrize("m", [1, 40, 300])
@pytest.mark.parametrize("activation", ["token", None])
def test_what_pads_a_weight_is_not_looked_at(m, activation):
    """Rows past N in the last tile hold anything, NaN scales too."""
    rng = np.random.default_rng(m)
    n, k = 200, 320
    x = rng.standard_normal((m, k)).astype(ml_dtypes.bfloat16)
    kernel = rng.standard_normal((256, k)).astype(np.float32)
    clean = nvfp4.repack(nvfp4.quantize(kernel[:n], global_scale=0.002))
    codes, bits, _ = oracle.quantize(kernel, global_scale=0.002)
    bits[n:] = 0x7F
    codes[n:] = 0x7
    arch = device.local_arch()
    parts = order(arch).pack(oracle.pack(codes), bits)
    poisoned = nvfp4.RepackedWeight(*map(jnp.asarray, parts), clean.global_scale, arch, n, k)
    assert [p.shape for p in jax.tree.leaves(poisoned)] == [p.shape for p in jax.tree.leaves(clean)]
    expected = np.asarray(nvfp4.linear(x, clean, activation_scale=activation))
    assert np.isfinite(expected.astype(np.float32)).all()
    y = nvfp4.linear(x, poisoned, activation_scale=activation)
    np.testing.assert_array_equal(np.asarray(y), expected)


@pytest.mark.parametrize("activation", ["token", "tensor", None])
def test_every_run_gives_the_same_bits(activation):
    """Shapes whose sums are divided among CTAs, which finish in any order."""
    rng = np.random.default_rng(11)
    w = nvfp4.repack(nvfp4.quantize(rng.standard_normal((512, 8192)).astype(np.float32)))
    for m in (1, 16, 64, 128, 256):
        x = jnp.asarray(rng.standard_normal((m, 8192)), jnp.bfloat16)
        function = jax.jit(lambda x, w: nvfp4.linear(x, w, activation_scale=activation))
        first = np.asarray(function(x, w))
        for _ in range(20):
            np.testing.assert_array_equal(np.asarray(function(x, w)), first)


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


def layers_of(count, activation):
    """A chain of layers, each of which waits for the one before, and its operands."""
    rng = np.random.default_rng(count)
    w = nvfp4.repack(nvfp4.quantize(rng.standard_normal((256, 256)).astype(np.float32)))

    def function(x, w):
        for _ in range(count):
            x = nvfp4.linear(x, w, activation_scale=activation) * jnp.bfloat16(1 / 16)
        return x

    return function, w, rng


@pytest.mark.parametrize("activation", ["token", None])
def test_layers_are_captured_and_inputs_can_be_rebound(activation, tmp_path):
    function, w, rng = layers_of(3, activation)
    x = jnp.ones((5, 256), jnp.bfloat16)
    options = {
        "xla_gpu_graph_min_graph_size": 1,
        "xla_dump_to": str(tmp_path),
        "xla_dump_hlo_as_text": True,
    }
    compiled = jax.jit(function).lower(x, w).compile(compiler_options=options)
    # XLA's own listing of what it runs: nested under a command buffer is what the graph holds.
    (listing,) = tmp_path.glob("*thunk_sequence_after_thunk_passes.txt")
    lines = [line for line in listing.read_text().splitlines() if "kCustomCall" in line]
    assert (len(lines), [line for line in lines if not line.startswith(" ")]) == (3, [])
    for _ in range(4):
        x = jnp.asarray(rng.standard_normal((5, 256)), jnp.bfloat16)
        expected = x
        for _ in range(3):
            expected = layers_of(1, activation)[0](expected, w)
        for _ in range(2):
            np.testing.assert_array_equal(np.asarray(compiled(x, w)), np.asarray(expected))


def test_the_host_does_not_wait_for_layers():
    """Layers are enqueued behind work that takes long: their dispatch must not take as long."""
    big = jnp.ones((8192, 8192), jnp.bfloat16)
    slow = jax.jit(lambda a: jax.lax.fori_loop(0, 300, lambda _, b: (a @ b) * 1e-4, a))
    function, w, _ = layers_of(4, "token")
    behind = jax.jit(lambda x, w, a: function(x + a[:5, :256] * 0, w))
    x = jnp.ones((5, 256), jnp.bfloat16)
    jax.block_until_ready(behind(x, w, slow(big)))
    started = time.perf_counter()
    y = behind(x, w, slow(big))
    dispatched = time.perf_counter() - started
    jax.block_until_ready(y)
    total = time.perf_counter() - started
    assert total > 0.2
    assert dispatched < 0.25 * total


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
