# SPDX-License-Identifier: Apache-2.0
"""Runs of the sm_100f GEMM kernels on the PTX machine, held to a float64 oracle."""

import dataclasses

import ml_dtypes
import numpy as np
import oracle
from ptx_machine.host import run_object

import kernel_objects
from jax_nvfp4.config import sm100

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)  # by out_dtype and bias_dtype
NAN_SCALE = 0x7F
BY_NAME = {c.name.removeprefix("gemm_sm100f_"): c for c in sm100.W4A4}


@dataclasses.dataclass
class Operand:
    """A quantized matrix as kernels read it, and its values.

    Attributes:
        data: packed codes, (rows as stored, k_pad / 2).
        scales: swizzled block scales, flat.
        values: code * block scale, (rows, k), float64.
    """

    data: np.ndarray
    scales: np.ndarray
    values: np.ndarray


def swizzle(scales, padding=0):
    """128x4 order of (rows, columns) scale bytes; `padding` fills the rows that do not exist."""
    rows, columns = scales.shape
    tiles = -(-columns // 4)
    out = np.full((-(-rows // 128), tiles, 32, 4, 4), padding, np.uint8)
    for row in range(rows):
        out[row // 128, :, row % 32, row % 128 // 32, :] = 0
    r, c = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    out[r // 128, c // 4, r % 32, r % 128 // 32, c % 4] = scales
    return out.reshape(-1)


def operand(codes, bits, stored_rows, padding=0):
    """The operand of codes (rows, k padded to 16) and scale bits (rows, k / 16)."""
    rows, k = codes.shape
    padded = np.zeros((stored_rows, -(-k // 64) * 64), np.uint8)
    padded[:rows, :k] = codes
    values = oracle.block_values(codes, bits)
    scale_columns = np.zeros((rows, -(-k // 64) * 4), np.uint8)
    scale_columns[:, : bits.shape[1]] = bits
    return Operand(oracle.pack(padded), swizzle(scale_columns, padding), values)


def random_operand(rng, rows, k, stored_rows, padding=0):
    """All codes, and scales from 2^-4 to 2^4 with some zeros: values of zero mean."""
    k16 = -(-k // 16) * 16
    codes = rng.integers(0, 16, (rows, k16), np.uint8)
    codes[:, k:] = 0
    bits = rng.integers(0x18, 0x58, (rows, k16 // 16)).astype(np.uint8)
    bits[rng.random(bits.shape) < 0.02] = 0
    return operand(codes, bits, stored_rows, padding)


def gemm(config, x, w, m, n, k, *, x_scale=None, w_scale=1.0, bias=None, out=1, split=1, sms=2,
         resident=None, scratch=0, seed=0, ptx=None):  # fmt: skip
    """Runs a config's kernel. Scales: None, a number or a vector. Returns y (m, n).

    `resident` clusters run at the same time: by default as many as `sms` multiprocessors hold.
    `ptx` replaces the kernel's own.
    """
    dtype = DTYPES[out]
    y = np.empty((m, n), dtype)
    y.view(np.uint8)[...] = 0xAB

    def scale(value):
        if value is None:
            return np.zeros(4, np.float32), -1
        vector = np.atleast_1d(np.asarray(value, np.float32))
        return np.ascontiguousarray(vector), int(vector.size > 1)

    (xs, xs_stride), (ws, ws_stride) = scale(x_scale), scale(w_scale)
    bias_dtype = -1 if bias is None else DTYPES.index(bias.dtype.type)
    base = kernel_objects.folder() / config.name
    arrays = [x.data, x.scales, w.data, w.scales, xs, ws, np.zeros(4) if bias is None else bias, y]
    integers = [m, n, k, xs_stride, ws_stride, bias_dtype, out, split, sms]
    run_object(
        base.with_suffix(".o"),
        ptx or base.with_suffix(".ptx").read_text(),
        [*arrays, np.zeros(scratch, np.uint8) if scratch else None, *integers],
        uninitialized=[y],
        schedule_seed=seed,
        num_sms=sms,
        resident_clusters=resident or max(sms // (config.cluster_m * config.cluster_n * split), 1),
    )
    return y


def check(config, m, n, k, *, seed=0, data_seed=None, x_scale="rows", w_scale="rows", bias=1,
          padding=0, **launch):  # fmt: skip
    """One run on random operands, held to the float64 oracle. Returns y."""
    rng = np.random.default_rng([m, n, k, seed if data_seed is None else data_seed])
    x = random_operand(rng, m, k, m, padding)
    w = random_operand(rng, n, k, -(-n // 128) * 128, padding)
    scales = {None: lambda rows: None, "one": lambda rows: 0.75}
    scales["rows"] = lambda rows: rng.uniform(0.1, 0.4, rows).astype(np.float32)
    xs, ws = scales[x_scale](m), scales[w_scale](n)
    b = None if bias is None else (50 * rng.standard_normal(n)).astype(DTYPES[bias])
    y = gemm(config, x, w, m, n, k, x_scale=xs, w_scale=ws, bias=b, seed=seed, **launch)
    alpha = np.reshape(1.0 if xs is None else xs, (-1, 1)) * np.reshape(ws, (1, -1))
    exact, magnitude = oracle.linear(x.values, w.values)
    exact, magnitude = exact * alpha, magnitude * alpha
    if b is not None:
        exact = exact + b.astype(np.float64)
    oracle.assert_linear_close(y, exact, magnitude, k)
    return y
