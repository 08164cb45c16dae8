# SPDX-License-Identifier: Apache-2.0
"""Inputs for quantization: every corner of the formats. Used by CPU, PTX machine and GPU tests."""

import ml_dtypes
import numpy as np

F32 = np.float32
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def _all_codes(rng):
    """Each e2m1 value in blocks scaled by each e4m3 scale, with a tensor amax of 448 * 6."""
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F32)
    block = np.concatenate([values, -values])
    scales = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
    return np.stack([rng.permutation(block) * s for s in scales])


def _ties(rng):
    """Every midpoint between neighboring codes, and its neighbors in float32, in scaled blocks."""
    midpoints = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], F32)
    near = [np.nextafter(midpoints, F32(9)), midpoints, np.nextafter(midpoints, F32(0))]
    flat = np.concatenate(near)
    rows = []
    for exponent in range(-8, 9):
        signs = rng.choice(np.array([-1, 1], F32), (3, 16))
        picks = rng.choice(flat, (3, 16))
        picks[:, 0] = 6
        rows.append((signs * picks * F32(2.0**exponent)).reshape(-1))
    return np.stack(rows)


def _scale_ties(rng):
    """Block amaxes at the midpoints of neighboring e4m3 scales, subnormal ones included."""
    scales = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    middle = ((scales[1:] + scales[:-1]) / 2 * 6).astype(F32)
    x = rng.uniform(-0.5, 0.5, (len(middle), 16)).astype(F32) * middle[:, None]
    x[:, 3] = middle
    x[0, 5] = 2688
    return x


def _grid(rng):
    """Small integers: ties wherever the scales are powers of two."""
    return rng.integers(-12, 13, (32, 96)).astype(F32) * F32(0.25)


def _rows_of_all_sizes(rng):
    rows = np.logspace(-30, 30, 61).astype(F32)
    return rng.standard_normal((61, 64)).astype(F32) * rows[:, None]


def _outlier(rng):
    x = rng.standard_normal((16, 128)).astype(F32)
    x[7, 77] = 3e38
    return x


def _tiny(rng):
    """Float32 subnormals, magnitudes around 2**-100, and zeros of both signs."""
    x = rng.standard_normal((32, 64)).astype(F32) * F32(2.0**-98)
    x[:8] *= F32(2.0**-40)
    x[8:16] = np.copysign(F32(2.0**-100), x[8:16])
    x[16:20] = np.copysign(np.nextafter(F32(2.0**-100), F32(0)), x[16:20])
    x[20, ::2] = -0.0
    x[20, 1::2] = 0.0
    return x


def _bad_element(value):
    def make(rng):
        x = rng.standard_normal((16, 80)).astype(F32)
        x[5, 37] = value
        x[9, :16] = value
        x[11] = value
        return x

    return make


CASES = {
    "normal": lambda rng: rng.standard_normal((64, 160)).astype(F32),
    "all_codes": _all_codes,
    "ties": _ties,
    "scale_ties": _scale_ties,
    "grid": _grid,
    "rows_of_all_sizes": _rows_of_all_sizes,
    "zeros": lambda rng: np.zeros((8, 64), F32),
    "negative_zeros": lambda rng: np.full((8, 64), -0.0, F32),
    "zero_rows": lambda rng: rng.standard_normal((8, 64)).astype(F32) * np.eye(8, 1, dtype=F32),
    "outlier": _outlier,
    "tiny": _tiny,
    "nan": _bad_element(np.nan),
    "inf": _bad_element(np.inf),
    "negative_inf": _bad_element(-np.inf),
    "all_nan": lambda rng: np.full((4, 32), np.nan, F32),
    "constant": lambda rng: np.full((5, 48), 3.14159, F32),
    "uniform_bits": lambda rng: rng.integers(0, 2**32, (64, 64), dtype=np.uint32).view(F32),
    "largest": lambda rng: np.full((3, 32), np.finfo(F32).max, F32),
}
for _k in (1, 2, 7, 15, 16, 17, 31, 33, 100, 127, 129):
    CASES[f"k{_k}"] = lambda rng, k=_k: rng.standard_normal((5, k)).astype(F32)
CASES["no_rows"] = lambda rng: np.zeros((0, 64), F32)
CASES["no_columns"] = lambda rng: np.zeros((3, 0), F32)

GLOBAL_SCALES = (1.0, 1 / 2688, 0.37, 2.0**-110, 2.0**110, 3e-12, 5e9)
BAD_GLOBAL_SCALES = (0.0, -1.0, np.nan, np.inf, -np.inf, 2.0**-111, 2.0**111, 1e-45)


def make(case, dtype):
    """The input of a case in a dtype name of DTYPES; overflow to Inf is part of the game."""
    with np.errstate(all="ignore"):
        return CASES[case](np.random.default_rng(len(case))).astype(DTYPES[dtype])
