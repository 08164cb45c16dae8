# SPDX-License-Identifier: Apache-2.0
"""The model of Hopper's accumulation, on sums whose bits say where terms are cut off."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from ptx_machine.accumulate import FRACTION_BITS, fused_dot_add

DTYPES = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def add(c, *products, kind="bf16"):
    """c and up to 16 products x * 1, added by one instruction."""
    a = np.zeros((1, 16))
    a[0, : len(products)] = products
    b = np.ones((1, 16))
    before = None if c is None else np.array([[c]], np.float32)
    return float(fused_dot_add(a, b, before, kind)[0, 0])


def test_terms_are_cut_off_below_the_largest():
    unit = 2.0**-25
    assert add(1, unit) == 1  # kept in the sum, cut off in its float32
    assert add(1, *[unit] * 4) == 1 + 4 * unit
    assert add(1, *[unit / 2] * 16) == 1  # each is cut off before they are added
    assert add(None, 1, *[unit / 2] * 15) == 1
    assert add(None, *[unit / 2] * 16) == 8 * unit


def test_both_cuts_are_toward_zero():
    unit = 2.0**-25
    assert add(1, -unit / 2) == 1
    assert add(1, -unit) == 1 - 2 * unit  # 1 - unit is no float32
    assert add(-1, unit) == -1 + 2 * unit
    assert add(1, *[unit] * 7) == 1 + 4 * unit


def test_the_exponent_of_a_product_is_that_of_its_factors():
    """1.5 * 1.5 = 2.25 counts as a number below 2: one more bit of the others is kept."""
    a, b = np.zeros((1, 16)), np.zeros((1, 16))
    a[0, :2], b[0, :2] = (1.5, 2.0**-25), (1.5, 1)
    c = np.array([[-2.25]], np.float32)
    assert fused_dot_add(a, b, None, "bf16") == 2.25
    assert fused_dot_add(a, b, c, "bf16") == 0  # the accumulator's exponent is 1
    a[0, 1] = 2.0**-24
    assert fused_dot_add(a, b, c, "bf16") == 2.0**-24


@pytest.mark.parametrize("kind", DTYPES)
def test_close_to_the_exact_sum(kind):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 16)).astype(DTYPES[kind]).astype(np.float64) for n in (64, 24))
    c = rng.standard_normal((64, 24)).astype(np.float32)
    got, exact = fused_dot_add(a, b, c, kind), a @ b.T + c
    magnitude = np.abs(a) @ np.abs(b).T + np.abs(c)
    assert np.all(np.abs(got - exact) <= (18 * 2.0 ** -FRACTION_BITS[kind] + 2.0**-23) * magnitude)
    assert np.mean(np.abs(got) <= np.abs(exact)) > 0.6  # toward zero more often than not


@np.errstate(invalid="ignore")
def test_values_that_are_not_finite():
    a, b = np.ones((3, 16)), np.ones((2, 16))
    a[1, 3], a[2, 5] = np.nan, np.inf
    got = fused_dot_add(a, b, np.zeros((3, 2), np.float32), "bf16")
    assert np.array_equal(got, [[16, 16], [np.nan] * 2, [np.inf] * 2], equal_nan=True)
    assert add(-np.inf, 1) == -np.inf and np.isnan(add(-np.inf, np.inf))
    assert add(None) == 0 and add(0) == 0


def by_definition(a, b, c):
    """The same model, term by term, in exact arithmetic."""

    def exponent(value):
        return max(math.frexp(value)[1] - 1, -126)

    terms = [(Fraction(x) * Fraction(y), exponent(x) + exponent(y))
             for x, y in zip(a.tolist(), b.tolist(), strict=True) if x and y]  # fmt: skip
    if c:
        terms.append((Fraction(c), exponent(c)))
    if not terms:
        return 0.0
    unit = Fraction(2) ** (max(e for _, e in terms) - FRACTION_BITS["bf16"])
    total = sum(math.trunc(t / unit) for t, _ in terms) * unit
    nearest = np.float32(float(total))  # of some 30 bits: exact in float64
    if abs(Fraction(float(nearest))) > abs(total):
        nearest = np.nextafter(nearest, np.float32(0))
    return float(nearest)


@pytest.mark.parametrize(("span", "scale"), [(0, 0), (6, 0), (6, -120), (20, 40), (60, 0)])
def test_the_bits_of_the_definition(span, scale):
    """Whatever the span of the exponents, and however small the values of an operand."""
    rng = np.random.default_rng(span)

    def operand(rows, scale):
        values = rng.standard_normal((rows, 16)) * 2.0 ** rng.integers(-span, span + 1, (rows, 16))
        values[rng.random(values.shape) < 0.2] = 0
        return (values * 2.0**scale).astype(ml_dtypes.bfloat16).astype(np.float64)

    a, b = operand(7, scale), operand(5, 0)
    c = (rng.standard_normal((7, 5)) * 2.0 ** (scale + rng.integers(-9, 9, (7, 5)))).astype("f4")
    expected = [[by_definition(x, y, float(z)) for y, z in zip(b, row, strict=True)]
                for x, row in zip(a, c, strict=True)]  # fmt: skip
    np.testing.assert_array_equal(fused_dot_add(a, b, c, "bf16"), expected)
