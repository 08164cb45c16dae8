# SPDX-License-Identifier: Apache-2.0
"""The definition against the oracle, bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import quantize_cases as cases

import jax_nvfp4 as nvfp4
from jax_nvfp4 import numerics


def assert_same_bits(tensor, x, **how):
    codes, bits, global_scale = oracle.quantize(x, **how)
    np.testing.assert_array_equal(np.asarray(tensor.block_scale).view(np.uint8), bits)
    np.testing.assert_array_equal(np.asarray(tensor.data), oracle.pack(codes))
    np.testing.assert_array_equal(
        np.asarray(tensor.global_scale).view(np.uint32), np.asarray(global_scale).view(np.uint32)
    )


@functools.cache
def jitted(scaling):
    return jax.jit(functools.partial(nvfp4.quantize, scaling=scaling))


@jax.jit
def jitted_static(x, g):
    return nvfp4.quantize(x, global_scale=g)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.CASES)
@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_dynamic(case, dtype, scaling):
    """In a program; a third of them, every case and every dtype, also by a call of its own."""
    x = cases.make(case, dtype)
    assert_same_bits(jitted(scaling)(x), x, scaling=scaling)
    if list(cases.CASES).index(case) % 3 == list(cases.DTYPES).index(dtype):
        assert_same_bits(nvfp4.quantize(x, scaling=scaling), x, scaling=scaling)


def op_by_op(x, mode, g=None):
    """The definition, each operation compiled by itself."""
    x = jnp.asarray(x)
    if mode == "static":
        encode, decode = numerics.static_scales(jnp.float32(g))
        reported = jnp.float32(g)
    else:
        encode, decode = numerics.dynamic_scales(
            numerics.amax(x, axis=-1 if mode == "token" else None)
        )
        reported = decode
    return nvfp4.Nvfp4Tensor(*numerics.quantize(x, encode, decode), reported, k=x.shape[-1])


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "case", ["normal", "ties", "scale_ties", "tiny", "nan", "rows_of_all_sizes"]
)
def test_op_by_op(case):
    x = cases.make(case, "float32")
    for mode in ("tensor", "token"):
        assert_same_bits(op_by_op(x, mode), x, scaling=mode)
    assert_same_bits(op_by_op(x, "static", 0.37), x, global_scale=0.37)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("case", cases.CASES)
def test_static(case, dtype):
    x = cases.make(case, dtype)
    for g in (*cases.GLOBAL_SCALES, *cases.BAD_GLOBAL_SCALES):
        assert_same_bits(jitted_static(x, jnp.float32(g)), x, global_scale=g)


def test_static_per_row():
    x = cases.make("normal", "float32")
    g = np.random.default_rng(0).uniform(1e-5, 1, x.shape[0]).astype(np.float32)
    g[3], g[4] = np.nan, 0
    assert_same_bits(nvfp4.quantize(x, global_scale=g), x, global_scale=g)


@pytest.mark.parametrize("g", cases.BAD_GLOBAL_SCALES)
def test_a_bad_global_scale_makes_the_result_nan(g):
    t = nvfp4.quantize(np.ones((2, 40), np.float32), global_scale=g)
    assert np.isnan(t.dequantize()).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_element_touches_its_block_alone(value):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    clean = nvfp4.quantize(x).dequantize()
    x[2, 20] = value
    x[0, 0] = 9.0  # keeps the amax whatever is in the bad block
    clean = nvfp4.quantize(np.where(np.isfinite(x), x, 0)).dequantize()
    y = np.array(nvfp4.quantize(x).dequantize())
    assert np.isnan(y[2, 16:32]).all()
    y[2, 16:32] = clean[2, 16:32]
    np.testing.assert_array_equal(y, clean)


@pytest.mark.parametrize("divide", [numerics.divide, numerics._divide_integers])
def test_divide_is_correctly_rounded(divide):
    """As the platform of the test does it, and as the others do."""
    rng = np.random.default_rng(1)
    a, b = np.exp2(rng.uniform(-60, 60, (2, 400_000))).astype(np.float32)
    a[:1000] = b[:1000]
    a[1000:2000] = np.nextafter(b[1000:2000], np.float32(0))
    a[2000:3000] = np.nextafter(b[2000:3000], np.float32(np.inf))
    np.testing.assert_array_equal(divide(jnp.asarray(a), jnp.asarray(b)), a / b)
    np.testing.assert_array_equal(jax.jit(divide)(a, b), a / b)


def test_a_quotient_of_quotients_is_rounded_twice():
    """XLA would make one division of two."""
    rng = np.random.default_rng(4)
    a, b, c = np.exp2(rng.uniform(-20, 20, (3, 100_000))).astype(np.float32)
    scale = np.float32(1 / 3)
    found = jax.jit(lambda a, b, c: numerics.divide(a, numerics.divide(b, c)))(a, b, c)
    np.testing.assert_array_equal(found, a / (b / c))
    np.testing.assert_array_equal(
        jax.jit(lambda a: numerics.dynamic_scales(a)[1] * scale)(a),
        np.float32(1) / (np.float32(2688) / a) * scale,
    )


@pytest.mark.sampled(5)
@pytest.mark.parametrize("scaling", ["token", "tensor"])
@pytest.mark.parametrize("case", cases.CASES)
def test_values_without_codes(case, scaling):
    """Bit for bit those of the codes."""
    x = cases.make(case, "float32")

    @jax.jit
    def both(x):
        largest = numerics.amax(x, axis=-1 if scaling == "token" else None)
        encode, decode = numerics.dynamic_scales(largest)
        values = numerics.quantized_values(x, encode, decode)
        return values, numerics.block_values(*numerics.quantize(x, encode, decode))

    direct, by_codes = both(x)
    np.testing.assert_array_equal(
        np.asarray(direct).view(np.uint32), np.asarray(by_codes).view(np.uint32)
    )


def test_e4m3_round_trip_and_values():
    bits = np.arange(256, dtype=np.uint8)
    values = np.asarray(numerics.e4m3_decode(jnp.asarray(bits)))
    np.testing.assert_array_equal(values, oracle.E4M3_VALUES.astype(np.float32))
    np.testing.assert_array_equal(
        np.signbit(values[np.isfinite(values)]), (bits >= 128)[np.isfinite(values)]
    )
    np.testing.assert_array_equal(numerics.e4m3_encode(jnp.asarray(values[:0x80])), bits[:0x80])


def test_e4m3_rounding():
    rng = np.random.default_rng(2)
    table = oracle.E4M3_VALUES[:0x7F].astype(np.float32)
    middle = (table[1:] + table[:-1]) / 2
    x = np.concatenate(
        [
            middle,
            np.nextafter(middle, np.float32(0)),
            np.nextafter(middle, np.float32(500)),
            rng.uniform(0, 448, 10_000),
            np.exp2(rng.uniform(-30, 8, 10_000)),
        ]
    ).astype(np.float32)
    np.testing.assert_array_equal(numerics.e4m3_encode(jnp.asarray(x)), oracle.e4m3(x))


def test_e2m1_all_codes_and_rounding():
    codes = np.arange(16, dtype=np.uint8)
    values = np.asarray(numerics.e2m1_decode(jnp.asarray(codes)))
    np.testing.assert_array_equal(values[:8], oracle.E2M1_VALUES)
    np.testing.assert_array_equal(values[8:], -oracle.E2M1_VALUES)
    assert np.signbit(values[8])
    x = np.concatenate(
        [np.linspace(0, 8, 40_001), [np.inf, np.nan, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]]
    )
    x = x.astype(np.float32)
    np.testing.assert_array_equal(numerics.e2m1_encode(jnp.asarray(x)), oracle.e2m1(x))


def test_pack_and_unpack():
    codes = np.random.default_rng(3).integers(0, 16, (3, 64)).astype(np.uint8)
    np.testing.assert_array_equal(numerics.pack(jnp.asarray(codes)), oracle.pack(codes))
    np.testing.assert_array_equal(numerics.unpack(numerics.pack(jnp.asarray(codes))), codes)


@pytest.mark.parametrize("case", ["normal", "tiny", "nan", "outlier", "k17"])
def test_dequantize(case):
    x = cases.make(case, "float32")
    t = nvfp4.quantize(x, scaling="token")
    codes, bits, g = oracle.quantize(x, scaling="token")
    # The scales first, as the checkpoints' producers do.
    scales = np.repeat(oracle.E4M3_VALUES[bits].astype(np.float32) * g[:, None], 16, axis=-1)
    ones = np.full_like(bits, 0x38)
    values = (oracle.block_values(codes, ones).astype(np.float32) * scales)[:, : x.shape[-1]]
    np.testing.assert_array_equal(t.dequantize(), values)
    narrow = np.asarray(t.dequantize(jnp.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(narrow, values.astype(jnp.bfloat16).astype(np.float32))


def test_quantizing_what_is_representable_is_exact():
    x = cases.make("all_codes", "float32")
    np.testing.assert_array_equal(nvfp4.quantize(x).dequantize(), x)


@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_global_scale_is_what_quantize_uses(scaling):
    x = cases.make("normal", "bfloat16").reshape(4, 16, 160)
    np.testing.assert_array_equal(
        nvfp4.global_scale(x, scaling), nvfp4.quantize(x, scaling=scaling).global_scale
    )
