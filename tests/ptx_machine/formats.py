# SPDX-License-Identifier: Apache-2.0
"""Number formats of PTX: rounding to and decoding of small floats, vectorized.

Values travel as float64, which holds every 8-, 16- and 32-bit format exactly, so each conversion
rounds once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class FloatFormat:
    """A binary float format.

    Attributes:
        name: PTX name.
        bits: width of the code.
        exponent_bits: width of the exponent field.
        mantissa_bits: width of the mantissa field.
        bias: exponent bias.
        max_finite: largest finite magnitude.
        has_inf: whether the format has infinities.
        nan_code: code of the canonical NaN, or -1 where the format has none.
        signed: whether there is a sign bit.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    bias: int
    max_finite: float
    has_inf: bool
    nan_code: int
    signed: bool = True


E4M3 = FloatFormat("e4m3", 8, 4, 3, 7, 448.0, False, 0x7F)
E5M2 = FloatFormat("e5m2", 8, 5, 2, 15, 57344.0, True, 0x7F)
E3M2 = FloatFormat("e3m2", 6, 3, 2, 3, 28.0, False, -1)
E2M3 = FloatFormat("e2m3", 6, 2, 3, 1, 7.5, False, -1)
E2M1 = FloatFormat("e2m1", 4, 2, 1, 1, 6.0, False, -1)
F16 = FloatFormat("f16", 16, 5, 10, 15, 65504.0, True, 0x7FFF)
BF16 = FloatFormat("bf16", 16, 8, 7, 127, float.fromhex("0x1.fep127"), True, 0x7FFF)
TF32 = FloatFormat("tf32", 32, 8, 10, 127, float.fromhex("0x1.ffcp127"), True, 0x7FFFFFFF)
F32 = FloatFormat("f32", 32, 8, 23, 127, float.fromhex("0x1.fffffep127"), True, 0x7FFFFFFF)
FORMATS = {f.name: f for f in (E4M3, E5M2, E3M2, E2M3, E2M1, F16, BF16, TF32, F32)}


def round_integral(q: np.ndarray, mode: str) -> np.ndarray:
    """Rounds to integral values in PTX mode rn/rni, rz/rzi, rm/rmi, rp/rpi or rna."""
    mode = mode.rstrip("i") if mode != "rni" else "rn"
    if mode == "rn":
        return np.rint(q)
    if mode == "rz":
        return np.trunc(q)
    if mode == "rm":
        return np.floor(q)
    if mode == "rp":
        return np.ceil(q)
    if mode == "rna":
        return np.copysign(np.floor(np.abs(q) + 0.5), q)
    raise ValueError(f"rounding mode {mode}")


def round_to(
    x: np.ndarray, fmt: FloatFormat, mode: str = "rn", saturate: bool = False
) -> np.ndarray:
    """Rounds float64 values to a format; the result is float64, NaN and Inf kept as such.

    Args:
        x: values, float64, any shape.
        fmt: the target format.
        mode: rn (ties to even), rz, rm, rp or rna (ties away).
        saturate: clamp to the largest finite value where the result would overflow.
    """
    x = np.asarray(x, np.float64)
    _, exponent = np.frexp(x)
    exponent = np.maximum(exponent - 1, 1 - fmt.bias)
    quantum = np.ldexp(1.0, exponent - fmt.mantissa_bits)
    y = round_integral(x / quantum, mode) * quantum
    y = np.copysign(y, x)
    over = np.abs(y) > fmt.max_finite
    if over.any():
        limit = np.copysign(fmt.max_finite, x)
        if saturate or not fmt.has_inf:
            y = np.where(over, limit, y)
        else:
            away = np.copysign(np.inf, x)
            if mode == "rz":
                away = np.where(np.isinf(x), away, limit)
            elif mode == "rm":
                away = np.where((x > 0) & ~np.isinf(x), limit, away)
            elif mode == "rp":
                away = np.where((x < 0) & ~np.isinf(x), limit, away)
            y = np.where(over, away, y)
    return np.where(np.isnan(x), x, y)


def encode(x: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    """Codes (uint32) of float64 values that the format holds exactly.

    NaN becomes the format's NaN; where it has none, its largest finite value (as cvt does).
    """
    x = np.asarray(x, np.float64)
    nan = np.isnan(x)
    if fmt.name in ("tf32", "f32"):  # both are held in the bits of an f32
        bits = x.astype(np.float32).view(np.uint32)
        return np.where(nan, np.uint32(fmt.nan_code), bits)
    sign = np.signbit(x)
    magnitude = np.abs(np.where(nan, 0.0, x))
    inf = np.isinf(magnitude)
    magnitude = np.where(inf, 0.0, magnitude)
    _, exponent = np.frexp(magnitude)
    # A zero is a subnormal of significand 0; frexp gives it exponent 0.
    exponent = np.where(magnitude == 0, 1 - fmt.bias, np.maximum(exponent - 1, 1 - fmt.bias))
    significand = np.ldexp(magnitude, fmt.mantissa_bits - exponent).astype(np.int64)
    # A normal significand holds the implicit one, which adds the last 1 to the exponent field.
    code = ((exponent + fmt.bias - 1).astype(np.int64) << fmt.mantissa_bits) + significand
    if fmt.has_inf:
        code = np.where(inf, ((1 << fmt.exponent_bits) - 1) << fmt.mantissa_bits, code)
    code = code | (sign.astype(np.int64) << (fmt.bits - 1))
    if fmt.nan_code >= 0:
        code = np.where(nan, fmt.nan_code, code)
    else:
        code = np.where(nan, (1 << (fmt.bits - 1)) - 1, code)
    return code.astype(np.uint32)


def decode_table(fmt: FloatFormat) -> np.ndarray:
    """float64 value of every code of a format of at most 16 bits."""
    codes = np.arange(1 << fmt.bits)
    sign = np.where(codes >> (fmt.bits - 1), -1.0, 1.0)
    exponent = (codes >> fmt.mantissa_bits) & ((1 << fmt.exponent_bits) - 1)
    mantissa = codes & ((1 << fmt.mantissa_bits) - 1)
    normal = exponent > 0
    value = np.ldexp(
        mantissa + np.where(normal, 1 << fmt.mantissa_bits, 0).astype(np.float64),
        np.where(normal, exponent, 1) - fmt.bias - fmt.mantissa_bits,
    )
    value = value * sign
    top = (1 << fmt.exponent_bits) - 1
    if fmt.has_inf:
        value = np.where((exponent == top) & (mantissa == 0), sign * np.inf, value)
        value = np.where((exponent == top) & (mantissa != 0), np.nan, value)
    elif fmt.name == "e4m3":
        value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    return value


def _ue8m0_table() -> np.ndarray:
    value = np.ldexp(1.0, np.arange(256) - 127)
    value[255] = np.nan
    return value


def _ue4m3_table() -> np.ndarray:
    value = decode_table(E4M3)
    # The scale is unsigned: the top bit is not part of it.
    value[128:] = value[:128]
    return value


TABLES = {
    "e4m3": decode_table(E4M3),
    "e5m2": decode_table(E5M2),
    "e3m2": decode_table(E3M2),
    "e2m3": decode_table(E2M3),
    "e2m1": decode_table(E2M1),
    "ue8m0": _ue8m0_table(),
    "ue4m3": _ue4m3_table(),
}
# Pairs of e2m1 values by byte, low nibble first.
E2M1_PAIRS = np.stack(
    [TABLES["e2m1"][np.arange(256) & 15], TABLES["e2m1"][np.arange(256) >> 4]], axis=1
)
# The same, a pair in 16 bytes.
_E2M1_PAIRS = E2M1_PAIRS.reshape(-1).view(np.complex128)


def e2m1_pairs(codes: np.ndarray) -> np.ndarray:
    """float64 values (..., 2 * n) of bytes (..., n) with two e2m1 codes each."""
    return _E2M1_PAIRS.take(codes).view(np.float64)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """float32 values of bfloat16 codes (uint16)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """bfloat16 codes (uint16) of float32 values, to nearest; NaN becomes 0x7FFF as cvt gives."""
    bits = values.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += bits
    rounded += 0x7FFF
    codes = rounded.view(np.uint16)[..., 1::2].copy()
    codes[np.isnan(values)] = 0x7FFF
    return codes


def f32_to_f16(values: np.ndarray) -> np.ndarray:
    """float16 codes (uint16) of float32 values, to nearest; NaN becomes 0x7FFF as cvt gives."""
    codes = values.astype(np.float16).view(np.uint16)
    codes[np.isnan(values)] = 0x7FFF
    return codes


def f64_to_f32(x: np.ndarray, mode: str = "rn", saturate: bool = False) -> np.ndarray:
    """Rounds float64 to float32 in any PTX mode."""
    if saturate or mode not in ("rn", "rz", "rm", "rp"):
        return round_to(x, F32, mode, saturate).astype(np.float32)
    nearest = x.astype(np.float32)
    if mode == "rn":
        return nearest
    # Where the nearest lies on the wrong side, its neighbor on the other is meant.
    if mode == "rz":
        return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)
    if mode == "rm":
        return np.where(nearest > x, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(nearest < x, np.nextafter(nearest, np.float32(np.inf)), nearest)


def add_round_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64 a + b rounded to odd, so that a further rounding to f32 or less is exact."""
    s = a + b
    bb = s - a
    err = (a - (s - bb)) + (b - bb)
    # A sum that is not finite has an error of NaN, and stays.
    inexact = np.abs(err) > 0
    bits = s.view(np.int64)
    # Toward zero, where the error points there; then the last bit says that there was one.
    below = ((err.view(np.int64) ^ bits) < 0) & inexact
    return ((bits - below) | inexact).view(np.float64)


def float_values(bits: np.ndarray, kind: str) -> np.ndarray:
    """float64 values of codes of a PTX float type held in unsigned integers."""
    if kind == "f32":
        return bits.astype(np.uint32).view(np.float32).astype(np.float64)
    if kind == "tf32":
        kept = bits.astype(np.uint32) & np.uint32(0xFFFFE000)
        return kept.view(np.float32).astype(np.float64)
    if kind == "f64":
        return bits.view(np.float64)
    if kind == "f16":
        return bits.astype(np.uint16).view(np.float16).astype(np.float64)
    if kind == "bf16":
        return bf16_to_f32(bits.astype(np.uint16)).astype(np.float64)
    if kind in ("e3m2", "e2m3"):
        return TABLES[kind][bits & 0x3F]
    if kind == "e2m1":
        return TABLES[kind][bits & 0xF]
    return TABLES[kind][bits & 0xFF]
