# SPDX-License-Identifier: Apache-2.0
"""How Hopper's tensor cores add: the bits of a fused dot product, and not only its value.

The products of one instruction and the accumulator are added at once. Each is first cut off
(towards zero) at a number of bits below the largest exponent among them, where the exponent of a
product is the sum of its factors' exponents; the sum of what is left is exact, and it is cut off to
a float32.
NVIDIA does not document this. The model and its widths were found by probing, in "MMA-Sim:
Bit-Accurate Reference Model of Tensor Cores and Matrix Cores" (arXiv 2511.10909); that it gives an
H100's bits is what tests/gpu/test_calibration.py measures.
"""

from __future__ import annotations

import numpy as np

FRACTION_BITS = {"f16": 25, "bf16": 25, "tf32": 25}
"""Bits kept below the largest exponent, by the type of the factors of a Hopper wgmma."""

_SMALLEST_EXPONENT = {"f16": -14, "bf16": -126, "tf32": -126, "f32": -126}
_NOTHING = -8000  # the exponent of a zero
_SPAN = 50  # of the exponents of an operand whose products float32 holds exactly, however scaled
_GROUP = 8  # products that are added at a time; so many, cut off, fit into an int32


def _exponents(values: np.ndarray, kind: str) -> np.ndarray:
    """Exponents of values of a type: those of subnormals are the smallest normal's."""
    _, exponent = np.frexp(values)
    exponent = np.maximum(exponent - 1, _SMALLEST_EXPONENT[kind]).astype(np.int16)
    exponent[values == 0] = _NOTHING
    return exponent


def _toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 to float32, cut off."""
    nearest = values.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(over & np.isfinite(nearest), np.nextafter(nearest, np.float32(0)), nearest)


def _largest_exponents(ea: np.ndarray, eb: np.ndarray) -> np.ndarray:
    """The largest exponent (m, n) among products, of the factors' exponents (k, m) and (k, n)."""
    largest = np.full((ea.shape[1], eb.shape[1]), _NOTHING, np.int16)
    for i in range(0, len(ea), _GROUP):
        sums = ea[i : i + _GROUP, :, None] + eb[i : i + _GROUP, None, :]
        np.maximum(largest, sums.max(axis=0), out=largest)
    return largest


def _narrowed(values: np.ndarray, exponents: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Values as float32 below 2, and the exponent taken off; None if theirs span too much."""
    top = int(exponents.max())
    if top == _NOTHING:
        return values.astype(np.float32), 0
    if not ((exponents >= top - _SPAN) | (exponents == _NOTHING)).all():
        return None
    return np.ldexp(values, -top).astype(np.float32), top


def _sum_of_products(
    a: np.ndarray, b: np.ndarray, ea: np.ndarray, eb: np.ndarray, shift: np.ndarray
) -> np.ndarray:
    """`trunc(a * b * 2**shift)` summed over k, float64 (m, n); a is (k, m), b is (k, n)."""
    total = np.zeros(shift.shape)
    narrow_a, narrow_b = _narrowed(a, ea), _narrowed(b, eb)
    if narrow_a is None or narrow_b is None:
        unit = np.ldexp(1.0, shift)
        for x, y in zip(a, b, strict=True):
            total += np.trunc(x[:, None] * y * unit)
        return total
    (a, top_a), (b, top_b) = narrow_a, narrow_b
    # Where there is a product other than 0, it is at least 2^(-2 * _SPAN).
    exponent = np.clip(shift + (top_a + top_b), -126, 126)
    unit = np.ldexp(np.float32(1), exponent)
    for i in range(0, len(a), _GROUP):
        terms = a[i : i + _GROUP, :, None] * b[i : i + _GROUP, None, :]
        terms *= unit
        total += terms.astype(np.int32).sum(axis=0, dtype=np.int32)
    return total


def fused_dot_add(a: np.ndarray, b: np.ndarray, c: np.ndarray | None, kind: str) -> np.ndarray:
    """`a @ b.T + c` as one wgmma computes it.

    Args:
        a: (m, k) float64 values of a type of `FRACTION_BITS`, k that of one instruction.
        b: (n, k) likewise.
        c: (m, n) float32 values of the accumulator; None is zero.
        kind: the type of a and b.

    Returns:
        (m, n) float32.
    """
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    finite = bool(finite_a.all() and finite_b.all())
    x, y = (a, b) if finite else (np.where(finite_a, a, 0), np.where(finite_b, b, 0))
    x, y = np.ascontiguousarray(x.T), np.ascontiguousarray(y.T)
    ea, eb = _exponents(x, kind), _exponents(y, kind)
    largest = _largest_exponents(ea, eb)
    if c is not None:
        c = c.astype(np.float64)
        largest = np.maximum(largest, _exponents(c, "f32"))
    # Powers of two that float64 holds: no product is below 2^-266.
    shift = FRACTION_BITS[kind] - np.maximum(largest, -300).astype(np.int32)
    unit = np.ldexp(1.0, shift)
    total = _sum_of_products(x, y, ea, eb, shift)
    if c is not None:
        total += np.trunc(c * unit)
    result = _toward_zero(total / unit)
    if not (finite and np.isfinite(result).all()):
        plain = a @ b.T + (0 if c is None else c)
        modeled = finite_a.all(axis=1)[:, None] & finite_b.all(axis=1) & np.isfinite(total)
        result = np.where(np.isfinite(plain) & modeled, result, plain.astype(np.float32))
    return result
