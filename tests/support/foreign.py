# SPDX-License-Identifier: Apache-2.0
"""Operands, compilation and oracle for kernels that were not written here."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {"Float32": np.float32, "BFloat16": ml_dtypes.bfloat16}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E2M1 = np.concatenate([E2M1, -E2M1])


def compiled(folder: Path, arch: str, program: Path, *arguments: str) -> str:
    """Runs a program that compiles one kernel of the CuTe DSL for an arch; returns the PTX."""
    environment = os.environ | {
        "CUTE_DSL_ARCH": arch, "CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(folder),
        "CUTE_DSL_DISABLE_FILE_CACHING": "1",
    }  # fmt: skip
    command = [sys.executable, str(program), str(folder), *arguments]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (ptx,) = folder.glob("*.ptx")
    return ptx.read_text()


def block_scaled(
    rng: np.random.Generator, rows: int, k: int, block: int = 16
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Data, swizzled scales and float64 values of a random operand.

    NVFP4 where 16 elements share a scale, MXFP8 (e4m3 with e8m0 scales) where 32 do. What pads the
    scales of the last rows is NaN.
    """
    if block == 16:
        codes = rng.integers(0, 16, (rows, k)).astype(np.uint8)
        data, values = codes[:, 0::2] | codes[:, 1::2] << 4, E2M1[codes]
        scales = rng.uniform(0.1, 4, (rows, -(-k // block))).astype(ml_dtypes.float8_e4m3fn)
        nan = 0x7F
    else:
        data = rng.standard_normal((rows, k)).astype(ml_dtypes.float8_e4m3fn)
        values = data.astype(np.float64)
        bits = rng.integers(122, 132, (rows, -(-k // block))).astype(np.uint8)
        scales = bits.view(ml_dtypes.float8_e8m0fnu)
        nan = 0xFF
    columns = -(-scales.shape[1] // 4)
    swizzled = np.zeros((-(-rows // 128), columns, 32, 4, 4), np.uint8)
    r, c = np.indices((-(-rows // 128) * 128, columns * 4))
    padded = np.where(r < rows, 0, nan).astype(np.uint8)
    padded[:rows, : scales.shape[1]] = scales.view(np.uint8)
    swizzled[r // 128, c // 4, r % 32, r % 128 // 32, c % 4] = padded
    values = values * np.repeat(scales.astype(np.float64), block, axis=1)[:, :k]
    return np.ascontiguousarray(data), swizzled, values


def check_product(y: np.ndarray, factors: Sequence[np.ndarray]) -> None:
    """Holds y to the product of two float64 matrices, rows times rows."""
    x, w = factors
    expected, magnitude = x @ w.T, np.abs(x) @ np.abs(w).T
    relative = 2.0**-8 if y.dtype == ml_dtypes.bfloat16 else 0.0
    error = np.abs(y.astype(np.float64) - expected)
    np.testing.assert_array_less(error, relative * np.abs(expected) + 2.0**-18 * magnitude + 1e-30)
