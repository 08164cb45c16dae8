# SPDX-License-Identifier: Apache-2.0
"""`linear` against the float64 oracle, and every way of calling it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
import this_machine

import jax_nvfp4 as nvfp4

ACTIVATIONS = ("token", "tensor", 0.0021, None)
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def dequantized(tensor):
    codes = oracle.unpack(np.asarray(tensor.data))
    bits = np.asarray(tensor.block_scale).view(np.uint8)
    return oracle.dequantize(codes, bits, np.asarray(tensor.global_scale), tensor.k)


def activation_values(x, activation):
    """The float64 values of x that the contract multiplies."""
    if activation is None:
        return (x if x.dtype != np.float32 else x.astype(ml_dtypes.bfloat16)).astype(np.float64)
    if isinstance(activation, str):
        codes, bits, g = oracle.quantize(x, scaling=activation)
    else:
        codes, bits, g = oracle.quantize(x, global_scale=activation)
    return oracle.dequantize(codes, bits, g, x.shape[-1])


def check(x, weight, bias, activation, out_dtype=None, zero_mean=True, repack=False, **how):
    """Calls `linear` and holds the result to the oracle; returns it.

    `weight` is canonical; `repack` says whether `linear` gets it so.
    """
    given = nvfp4.repack(weight) if repack else weight
    y = nvfp4.linear(x, given, bias, activation_scale=activation, out_dtype=out_dtype, **how)
    assert y.dtype == (out_dtype or x.dtype)
    k = x.shape[-1]
    values = activation_values(np.asarray(x).reshape(math.prod(x.shape[:-1]), k), activation)
    exact, magnitude = oracle.linear(values, dequantized(weight), bias)
    assert y.shape == (*x.shape[:-1], weight.shape[0])
    flat = np.asarray(y).reshape(exact.shape)
    oracle.assert_linear_close(flat, exact, magnitude, k, zero_mean)
    return y


def problem(m, n, k, dtype=np.float32, seed=0, bias=True, scaling="tensor"):
    """x, a canonical weight and a bias.

    The oracle quantizes the weight, as `quantize` would, which compiles a program for each shape.
    """
    rng = np.random.default_rng((seed, m, n, k))
    x = rng.standard_normal((m, k)).astype(dtype)
    kernel = rng.standard_normal((n, k)).astype(np.float32) * np.float32(0.05)
    codes, bits, g = oracle.quantize(kernel, scaling)
    parts = oracle.pack(codes), bits.view(ml_dtypes.float8_e4m3fn), g
    w = nvfp4.Nvfp4Tensor(*map(jnp.asarray, parts), k=k)
    b = rng.standard_normal(n).astype(dtype) * dtype(0.1) if bias else None
    return x, w, b


@pytest.mark.sampled(5)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dtypes(activation, dtype, out_dtype):
    x, w, b = problem(33, 70, 144, dtype)
    check(x, w, b, activation, out_dtype, repack=True)


SHAPES = [
    *itertools.product((0, 1, 17), (1, 130), (1, 31, 64, 200)),
    (5, 1, 1),
    (129, 257, 96),
    (3, 0, 32),
    (3, 8, 0),
    (0, 0, 0),
]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("m,n,k", SHAPES)
def test_any_shape(m, n, k):
    x, w, b = problem(m, n, k)
    for activation in ("token", None):
        check(x, w, b, activation, repack=True)


@pytest.mark.parametrize("seed", range(4))
def test_random_shapes(seed):
    rng = np.random.default_rng(seed)
    for _ in range(8):
        m, n, k = (int(v) for v in rng.integers(1, (80, 400, 700)))
        activation = ACTIVATIONS[rng.integers(4)]
        dtype, out_dtype = DTYPES[rng.integers(3)], DTYPES[rng.integers(3)]
        scaling = ("tensor", "token")[rng.integers(2)]
        x, w, b = problem(m, n, k, dtype, seed, bool(rng.integers(2)), scaling)
        check(x, w, b, activation, out_dtype, repack=True)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (1, 1, 4), (2, 0, 3)])
@pytest.mark.parametrize("activation", ["token", None])
def test_leading_axes(lead, activation):
    _, w, b = problem(1, 24, 40)
    x = np.random.default_rng(5).standard_normal((*lead, 40)).astype(np.float32)
    check(x, w, b, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_data_of_one_sign(activation):
    rng = np.random.default_rng(6)
    x = rng.uniform(0.5, 1, (9, 512)).astype(np.float32)
    w = nvfp4.quantize(rng.uniform(0.5, 1, (33, 512)).astype(np.float32))
    check(x, w, None, activation, zero_mean=False)


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("activation", ["token", None])
def test_a_bias_that_outweighs_the_product_is_rounded_once(out_dtype, activation):
    """Biases on the ties of 16-bit dtypes: the product, however small, decides which way."""
    rng = np.random.default_rng(7)
    x, w, _ = problem(64, 256, 64)
    x *= np.logspace(-12, -2, 64, dtype=np.float32)[:, None]
    bias = rng.uniform(1, 2, 256).astype(np.float32)
    for dtype in (ml_dtypes.bfloat16, np.float16):
        step = oracle.ulp(1.5, dtype)
        bias[rng.random(256) < 0.4] = np.float32(1 + step * (rng.integers(0, 100) + 0.5))
    check(x, w, bias, activation, out_dtype)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("arch", [None, *this_machine.arches()])
def test_canonical_and_repacked_weights_give_the_same_bits(activation, arch):
    x, w, b = problem(5, 130, 100)
    y = nvfp4.linear(x, w, b, activation_scale=activation)
    z = nvfp4.linear(x, nvfp4.repack(w, arch), b, activation_scale=activation)
    np.testing.assert_array_equal(y, z)


def ms_of_batches(most):
    """Sizes of a batch: every one where a kernel chooses by it.

    Off the GPU, where each row is a product of its own and each size only another program to
    compile, those around which choices change.
    """
    if jax.default_backend() != "cpu":
        return range(1, most + 1)
    return [1, 2, *(m + d for m in (8, 16, 64, 128, 256) for d in (-1, 0, 1)), most]


@pytest.mark.parametrize("activation", ["token", 0.0021, None])
def test_batch_invariant(activation):
    x, w, b = problem(300, 48, 320)
    whole = np.asarray(check(x, w, b, activation, repack=True, batch_invariant=True))
    w = nvfp4.repack(w)
    few = (1, 3, 16, 65, 128, 299)
    many = (1, 2, 3, 7, 8, 16, 17, 64, 100, 127, 128, 129, 255, 299)
    for m in few if jax.default_backend() == "cpu" else many:
        rows = np.random.default_rng(m).permutation(300)[:m]
        part = nvfp4.linear(x[rows], w, b, activation_scale=activation, batch_invariant=True)
        np.testing.assert_array_equal(part, whole[rows])


def test_batch_invariant_for_every_m():
    x, w, _ = problem(300, 16, 160, bias=False)
    w = nvfp4.repack(w)
    linear = functools.partial(nvfp4.linear, activation_scale=None, batch_invariant=True)
    whole = np.asarray(linear(x, w))
    for m in ms_of_batches(300):
        np.testing.assert_array_equal(linear(x[-m:], w), whole[-m:])


def test_the_same_call_gives_the_same_bits():
    x, w, b = problem(37, 130, 500, ml_dtypes.bfloat16)
    first = nvfp4.linear(x, w, b)
    for _ in range(5):
        np.testing.assert_array_equal(nvfp4.linear(x, w, b), first)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("activation", ["token", "tensor", 0.0021, None])
def test_a_bad_row_stays_alone(value, activation):
    x, w, b = problem(6, 40, 96)
    x[2, 50] = value
    x[0, 0] = np.abs(x[np.isfinite(x)]).max()
    reference = x.copy()
    reference[2] = 0
    clean = np.asarray(nvfp4.linear(reference, w, b, activation_scale=activation))
    y = np.asarray(nvfp4.linear(x, w, b, activation_scale=activation))
    assert not np.isfinite(y[2]).any()
    rows = [0, 1, 3, 4, 5]
    np.testing.assert_array_equal(y[rows], clean[rows])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_bad_static_scale_gives_nan(scale):
    x, w, b = problem(3, 8, 32)
    assert np.isnan(nvfp4.linear(x, w, b, activation_scale=scale)).all()


def test_a_static_scale_may_be_traced():
    x, w, b = problem(3, 8, 32)
    function = jax.jit(lambda s: nvfp4.linear(x, w, b, activation_scale=s))
    with jax.enable_x64(True):  # a Python float is float64 there, and float32 to us
        assert function(0.002).dtype == np.float32
        function.clear_cache()
    for scale in (0.002, 0.004):
        eager = nvfp4.linear(x, w, b, activation_scale=scale)
        np.testing.assert_array_equal(function(jnp.float32(scale)), eager)
    assert function._cache_size() == 1


def test_static_scale_of_the_data_equals_dynamic_up_to_rounding():
    x, w, b = problem(8, 16, 64)
    g = nvfp4.global_scale(x)
    check(x, w, b, float(g))


def test_weights_with_a_scale_for_each_row():
    x, w, b = problem(8, 70, 64, scaling="token")
    assert w.global_scale.shape == (70,)
    for activation in ACTIVATIONS:
        check(x, w, b, activation, repack=True)


# ---- What is refused ----------------------------------------------------------------------------

X = np.ones((2, 32), np.float32)
W = nvfp4.quantize(np.ones((8, 32), np.float32))

REFUSED = [
    (lambda: nvfp4.linear(X.astype(np.int32), W), TypeError, "x must be bfloat16.*got int32"),
    (lambda: nvfp4.linear(np.float32(1), W), ValueError, "x must have at least 1 axis"),
    (lambda: nvfp4.linear(None, W), TypeError, "x must be .*got NoneType"),
    (lambda: nvfp4.linear(W, W), TypeError, "x must be .*got Nvfp4Tensor"),
    (lambda: nvfp4.linear(X, W, W), TypeError, "bias must be .*got Nvfp4Tensor"),
    (lambda: nvfp4.linear(X, W, out_dtype="f33"), TypeError, "out_dtype must be .*f33"),
    (lambda: nvfp4.linear(X, W, activation_scale=b"token"), TypeError, "_scale .*got bytes"),
    (lambda: nvfp4.linear(X, W, activation_scale=[0.1]), ValueError, r"got shape \(1,\)"),
    (
        lambda: nvfp4.linear(X, np.ones((8, 32))),
        TypeError,
        "weight must be an Nvfp4Tensor.*ndarray",
    ),
    (lambda: nvfp4.linear(X[:, :16], W), ValueError, r"K = 16 .*\(8, 32\) has K = 32"),
    (lambda: nvfp4.linear(X, W, np.ones(7, np.float32)), ValueError, r"bias .*\(8,\).*got \(7,\)"),
    (lambda: nvfp4.linear(X, W, np.ones(8, np.int8)), TypeError, "bias must be .*got int8"),
    (lambda: nvfp4.linear(X, W, out_dtype=np.int32), TypeError, "out_dtype must be .*got int32"),
    (lambda: nvfp4.linear(X, W, activation_scale="row"), ValueError, "activation_scale .*'row'"),
    (
        lambda: nvfp4.linear(X, W, activation_scale=np.ones(2, np.float32)),
        ValueError,
        r"scalar; got shape \(2,\)",
    ),
    (
        lambda: nvfp4.linear(X, W, activation_scale=jnp.int32(1)),
        TypeError,
        "must be float32; got int32",
    ),
    (lambda: nvfp4.linear(X, W, activation_scale=True), TypeError, "must be float32; got bool"),
    (
        lambda: nvfp4.linear(X, nvfp4.quantize(np.ones((2, 8, 32), np.float32))),
        ValueError,
        r"must have shape \(N, K\); got \(2, 8, 32\)",
    ),
    (lambda: nvfp4.quantize(np.float32(3)), ValueError, "at least 1 axis"),
    (lambda: nvfp4.quantize(X.astype(np.complex64)), TypeError, "got complex64"),
    (lambda: nvfp4.quantize(X, scaling="row"), ValueError, "scaling must be .*'row'"),
    (lambda: nvfp4.quantize(X, scaling=np.ones(3)), ValueError, "scaling must be .*array"),
    (lambda: nvfp4.quantize(W), TypeError, "x must be .*got Nvfp4Tensor"),
    (
        lambda: nvfp4.quantize(X, global_scale=np.ones(3, np.float32)),
        ValueError,
        r"rows of x, \(2,\); got shape \(3,\)",
    ),
    (
        lambda: nvfp4.quantize(X, global_scale=np.int32(1)),
        TypeError,
        "global_scale must be float32; got int32",
    ),
    (lambda: nvfp4.global_scale(X, "row"), ValueError, "scaling must be"),
    (lambda: nvfp4.repack(W, "sm_80"), ValueError, "arch must be one of .*'sm_80'"),
    (lambda: nvfp4.repack(X), TypeError, "no Nvfp4Tensor to repack in a ndarray"),
    (lambda: nvfp4.repack(nvfp4.quantize(X[0])), ValueError, r"shape \(..., N, K\); got \(32,\)"),
]


@pytest.mark.parametrize("call,error,message", REFUSED)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
    with pytest.raises(error, match=message):
        jax.jit(call)()
