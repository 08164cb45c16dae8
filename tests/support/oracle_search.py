# SPDX-License-Identifier: Apache-2.0
"""An independent NumPy oracle of the scale searches: tries all candidates of each block at once.

Built on the oracle of the format, whose rounding is a search in tables. Errors are float32 as NumPy
adds and multiplies it, their rounding to 8 bits that of ml_dtypes.
"""

import ml_dtypes
import numpy as np
import oracle

F32 = np.float32


def scales(x, scaling="tensor", global_scale=None):
    """(S, D, reported global scale); there is room above the scale of the amax."""
    if global_scale is not None:
        return oracle.scales(x, scaling, global_scale)
    largest = oracle.amax(x, axis=-1 if scaling == "token" else None)
    s = np.where(largest == 0, F32(1), F32(1536) / np.where(largest == 0, F32(1), largest))
    d = F32(1) / s.astype(F32)
    return s.astype(F32), d, d


def _candidates(scaled, search):
    """Scale bits (candidates, ...), in the order in which equals win, of scaled block amaxes."""
    first = oracle.e4m3(np.where(scaled > 448, F32(448), scaled))
    if search == "4over6":
        larger = F32(1.5) * scaled
        return np.stack([first, oracle.e4m3(np.where(larger > 448, F32(448), larger))])
    steps = sorted(range(-2, 7), key=lambda step: (step != 0, step))
    tried = [np.clip(first.astype(int) + step, 0, 126) for step in steps]
    return np.where(first == 0x7F, 0x7F, tried).astype(np.uint8)


def _weights(importance, k):
    """(K/16, 16) weights of 8 bits, the largest of a block in [1, 2); NaN where it is not valid."""
    w = np.ones(k, F32) if importance is None else np.asarray(importance).astype(F32)
    w = np.pad(w, (0, -k % 16)).reshape(-1, 16)
    valid = np.isfinite(w) & (w >= 0)
    w = np.where(valid & (w >= 2.0**-126), w, 0).astype(np.float64)
    if importance is None:
        return np.ones_like(w, F32)
    exponent = np.frexp(w)[1] - 1
    top = np.max(np.where(w > 0, exponent, -1000), axis=1, initial=-1000)[:, None]
    relative = np.where((w > 0) & (exponent >= top - 30), w * np.exp2(-np.maximum(top, -126.0)), 0)
    return np.where(valid, relative.astype(F32).astype(ml_dtypes.bfloat16).astype(F32), F32("nan"))


def _halves(terms):
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]


def quantize(x, search, scaling="tensor", global_scale=None, importance=None):
    """Codes (..., Kp), scale bits (..., Kp/16) and global scale; Kp is K padded to 16."""
    x = np.asarray(x)
    k = x.shape[-1]
    s, d, reported = scales(x, scaling, global_scale)
    x = np.pad(x.astype(F32), [(0, 0)] * (x.ndim - 1) + [(0, -k % 16)])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 16, 16)
    blocks = np.where(np.abs(blocks) < oracle.SMALLEST, np.copysign(F32(0), blocks), blocks)
    weights = _weights(importance, k)
    with np.errstate(all="ignore"):
        bad = ~np.isfinite(blocks).all(axis=-1)
        amax = np.max(np.abs(blocks), axis=-1, initial=0)
        scaled = np.where(bad, F32("nan"), amax * (s * F32(1 / 6))[..., None])
        tried = _candidates(scaled, search)
        y = np.abs(blocks) * s[..., None, None]
        y = np.where(y < 2.0**-40, F32(0), np.minimum(y, F32(2.0**15)))
        values = oracle.E4M3_VALUES[tried].astype(F32)
        inverse = np.minimum(F32(1) / (values * d[..., None]), np.finfo(F32).max)
        codes = oracle.e2m1(blocks * inverse[..., None])
        wrong = y - oracle.E2M1_VALUES[codes & 7].astype(F32) * values[..., None]
        wrong = wrong.astype(ml_dtypes.bfloat16).astype(F32)
        error = _halves(weights * (wrong * wrong))
        # argmin takes the first of equals, and the first NaN: then all candidates are one.
        best = np.argmin(error, axis=0)[None]
    bits = np.take_along_axis(tried, best, 0)[0]
    codes = np.take_along_axis(codes, best[..., None], 0)[0]
    spoiled = np.broadcast_to(np.isnan(weights).any(axis=1), bits.shape)
    bits = np.where(spoiled, 0x7F, bits)
    codes = np.where(spoiled[..., None], 7, codes)
    return codes.reshape(x.shape), bits, reported
