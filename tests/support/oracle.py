# SPDX-License-Identifier: Apache-2.0
"""An independent NumPy oracle of NVFP4: imports nothing of the package, and computes otherwise.

Rounding is a search in the table of representable values (decided in exact arithmetic), scales are
IEEE float32 operations of NumPy, products and sums are float64.
"""

import ml_dtypes
import numpy as np

F32 = np.float32
E4M3_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float64)
SMALLEST = 2.0**-100


def _nearest_even(value, table):
    """Index of the nearest entry of an ascending table, ties to the even index, in float64.

    Midpoints of both formats have few bits, so that float64 holds them exactly.
    """
    middle = (table[1:] + table[:-1]) / 2
    below = np.searchsorted(middle, value, side="left")  # entries whose midpoint is < value
    tie = (below < len(middle)) & (middle[np.minimum(below, len(middle) - 1)] == value)
    return np.where(tie & (below % 2 == 1), below + 1, below)


def e4m3(value):
    """Bits of float32 values in [0, 448] or NaN, rounded to nearest even."""
    value = np.asarray(value, np.float64)
    bits = _nearest_even(np.where(np.isnan(value), 0, value), E4M3_VALUES[:0x7F])
    return np.where(np.isnan(value), 0x7F, bits).astype(np.uint8)


def e2m1(value):
    """4-bit codes of float32 values, rounded to nearest even, saturating; NaN gives 7."""
    value = np.asarray(value)
    magnitude = np.abs(value.astype(np.float64))
    code = _nearest_even(np.where(np.isnan(magnitude), 6, np.minimum(magnitude, 6)), E2M1_VALUES)
    return np.where(np.isnan(value), 7, code | (np.signbit(value) << 3)).astype(np.uint8)


def amax(x, axis=None):
    """Largest finite magnitude, float32; magnitudes below 2**-100 are zeros."""
    magnitude = np.abs(np.asarray(x).astype(F32))
    keep = np.isfinite(magnitude) & (magnitude >= SMALLEST)
    return np.max(np.where(keep, magnitude, F32(0)), axis=axis, initial=0).astype(F32)


def scales(x, scaling="tensor", global_scale=None, largest=None):
    """(S, D, reported global scale) as float32 arrays, () or one per row."""
    with np.errstate(all="ignore"):
        if global_scale is not None:
            g = np.asarray(global_scale, F32)
            valid = (g >= 2.0**-110) & (g <= 2.0**110)
            return np.where(valid, F32(1) / g, F32("nan")), np.where(valid, g, F32("nan")), g
        if largest is None:
            largest = amax(x, axis=-1 if scaling == "token" else None)
        s = np.where(largest == 0, F32(1), F32(2688) / np.where(largest == 0, F32(1), largest))
        s = s.astype(F32)
        d = F32(1) / s
        return s, d, d


def quantize(x, scaling="tensor", global_scale=None):
    """Codes (..., Kp), scale bits (..., Kp/16) and global scale; Kp is K padded to 16."""
    x = np.asarray(x)
    s, d, reported = scales(x, scaling, global_scale)
    x = x.astype(F32)
    x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 16)])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    blocks = np.where(np.abs(blocks) < SMALLEST, np.copysign(F32(0), blocks), blocks)
    with np.errstate(all="ignore"):
        block_amax = np.max(np.abs(blocks), axis=-1, initial=0)
        bad = ~np.isfinite(blocks).all(axis=-1)
        scaled = block_amax * (s * F32(1 / 6))[..., None]
        scaled = np.where(bad, F32("nan"), np.where(scaled > 448, F32(448), scaled))
        bits = e4m3(scaled)
        denominator = E4M3_VALUES[bits].astype(F32) * d[..., None]
        inverse = np.minimum(F32(1) / denominator, np.finfo(F32).max)  # propagates NaN
        codes = e2m1(blocks * inverse[..., None])
    return codes.reshape(x.shape), bits, reported


def pack(codes):
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).astype(np.uint8)


def unpack(data):
    codes = np.empty((*data.shape[:-1], data.shape[-1] * 2), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = data & 15, data >> 4
    return codes


def block_values(codes, bits):
    """e2m1 * block_scale, float64, exact."""
    signed = np.where(codes >= 8, -1.0, 1.0) * E2M1_VALUES[codes & 7]
    return signed * np.repeat(E4M3_VALUES[bits], 16, axis=-1)


def dequantize(codes, bits, global_scale, k=None):
    """Values in float64, the global scale multiplied in float64."""
    g = np.asarray(global_scale, np.float64)
    values = block_values(codes, bits)[..., :k]
    return values * g.reshape(g.shape + (1,) * (values.ndim - g.ndim))


def linear(x_values, w_values, bias=None):
    """(y, sum of |x||w|), float64, for dequantized x (M, K) and w (N, K)."""
    y = x_values @ w_values.T
    if bias is not None:
        y = y + np.asarray(bias, np.float64)
    return y, np.abs(x_values) @ np.abs(w_values).T


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x, alpha=1.0):
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-alpha * x))


ACTIVATIONS = {"relu2": lambda x: np.maximum(x, 0) ** 2, "silu": silu, "gelu_tanh": gelu_tanh}


def gated(gate, up, *, limit=None, alpha=1.0, beta=0.0, gelu=False):
    """SwiGLU or, by the tanh form of gelu, GeGLU of float64 arrays; NaN passes the clamps."""
    if limit is not None:
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    return (gelu_tanh(gate) if gelu else silu(gate, alpha)) * (up + beta)


def assert_activated_close(y, function, z, spread, *, scale):
    """Holds y to half an ulp of its dtype plus what sums off by `spread` make of the activation.

    Args:
        y: the result.
        function: the activation, of float64 arrays.
        z: its exact arguments.
        spread: how far each argument may be off.
        scale: magnitude of the terms that the activation multiplies, for its float32 rounding.
    """
    exact = function(*z)
    bound = ulp(exact, y.dtype) / 2 + 2.0**-20 * scale
    for signs in np.ndindex(*(2,) * len(z)):
        moved = [a + (2 * s - 1) * b for a, b, s in zip(z, spread, signs, strict=True)]
        bound = bound + np.abs(function(*moved) - exact)
    error = np.abs(np.asarray(y).astype(np.float64) - exact)
    assert (np.isnan(exact) == np.isnan(error)).all()
    assert not (error > bound).any(), (error - bound)[error > bound].max()


def ulp(y, dtype):
    """The spacing of a dtype at float64 values, as float64."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(y), float(info.smallest_normal))))
    return np.exp2(exponent) * float(info.eps)


def assert_linear_close(y, exact, magnitude, k, zero_mean=True):
    """Holds y to half an ulp of its dtype plus the accumulation's share of sum |x||w|."""
    c = 2.0**-18 if zero_mean else max(k / 16, 1) * 2.0**-23
    bound = ulp(exact, y.dtype) / 2 + c * magnitude
    error = np.abs(np.asarray(y).astype(np.float64) - exact)
    worst = np.unravel_index(np.argmax(error - bound), error.shape) if error.size else None
    assert worst is None or error[worst] <= bound[worst], (
        f"y{worst} = {y[worst]} is {error[worst]:.3e} from {exact[worst]}, bound {bound[worst]:.3e}"
    )
