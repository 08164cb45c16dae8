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
_NOTHING = -(2**20)  # the exponent of a zero


def _exponents(values: np.ndarray, kind: str) -> np.ndarray:
    """Exponents of values of a type: those of subnormals are the smallest normal's."""
    _, exponent = np.frexp(values)
    return np.where(values == 0, _NOTHING, np.maximum(exponent - 1, _SMALLEST_EXPONENT[kind]))


def _toward_zero(values: np.ndarray) -> np.ndarray:
    """float64 to float32, cut off."""
    nearest = values.astype(np.float32)
    over = np.abs(nearest.astype(np.float64)) > np.abs(values)
    return np.where(over & np.isfinite(nearest), np.nextafter(nearest, np.float32(0)), nearest)


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
    ea, eb = _exponents(a, kind), _exponents(b, kind)
    largest = np.max(ea[:, None, :] + eb[None, :, :], axis=-1)
    if c is not None:
        c = c.astype(np.float64)
        largest = np.maximum(largest, _exponents(c, "f32"))
    shift = FRACTION_BITS[kind] - np.maximum(largest, -1000)
    # Powers of two that float64 holds: 2^-126 squared, and 25 bits below.
    unit = np.ldexp(1.0, shift)
    total = np.trunc((a[:, None, :] * b[None, :, :]) * unit[:, :, None]).sum(axis=-1)
    if c is not None:
        total += np.trunc(c * unit)
    result = _toward_zero(total / unit)
    if not (np.isfinite(a).all() and np.isfinite(b).all()) or not np.isfinite(result).all():
        plain = a @ b.T + (0 if c is None else c)
        result = np.where(np.isfinite(plain) & np.isfinite(total), result, plain.astype(np.float32))
    return result
