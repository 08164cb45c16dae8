# SPDX-License-Identifier: Apache-2.0
"""A self-test of this installation on the default device: the quantizer's bits, linear's accuracy.

What is expected is computed with NumPy here, from the definition of the format alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_nvfp4
from jax_nvfp4 import Nvfp4Tensor

_M, _N, _K = 33, 72, 208  # multiples of nothing that kernels like, but of the block of 16
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclasses.dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        passed: whether it holds.
        detail: what was found, for a reader.
    """

    name: str
    passed: bool
    detail: str


def checks() -> Iterator[Check]:
    """Runs the checks one by one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((_M, _K)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((_N, _K)) / np.sqrt(_K), jnp.bfloat16)
    weight = jax.jit(jax_nvfp4.quantize)(w)
    yield _check_quantize(np.asarray(w, np.float32), weight)
    bias = jnp.asarray(rng.standard_normal(_N), jnp.float32)
    scalings: tuple[Literal["tensor", "token"] | None, ...] = (None, "tensor", "token")
    for scaling in scalings:
        for dtype in (jnp.float32, jnp.bfloat16):
            yield _check_linear(x, weight, bias, scaling, jnp.dtype(dtype))


def _check_quantize(w: np.ndarray, quantized: Nvfp4Tensor) -> Check:
    data, block_scale, global_scale = _quantize(w)
    wrong = {
        "codes": np.count_nonzero(np.asarray(quantized.data) != data),
        "block scales": np.count_nonzero(
            np.asarray(quantized.block_scale).view(np.uint8) != block_scale.view(np.uint8)
        ),
        "global scale": int(np.asarray(quantized.global_scale) != global_scale),
    }
    found = ", ".join(f"{count} {name}" for name, count in wrong.items() if count)
    detail = f"{found} differ" if found else f"all bits of {_N} x {_K} as defined"
    return Check("quantize", not found, detail)


def _quantize(w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """The definition, in NumPy and float32: (data, block_scale, global_scale) of (N, K)."""
    encode = np.float32(2688) / np.abs(w).max()
    decode = np.float32(1) / encode
    blocks = w.reshape(w.shape[0], -1, 16)
    amax = np.abs(blocks).max(-1)
    block_scale = np.minimum(amax * (encode * np.float32(1 / 6)), np.float32(448))
    block_scale = block_scale.astype(ml_dtypes.float8_e4m3fn)
    inverse = np.float32(1) / (block_scale.astype(np.float32) * decode)
    scaled = np.abs(blocks * inverse[..., None]).astype(np.float64)
    distance = np.abs(scaled[..., None] - _E2M1)
    # Of two codes at the same distance the even one.
    nearest = distance == distance.min(-1, keepdims=True)
    preference = np.where(np.arange(8) % 2, 1, 2)
    codes = np.argmax(nearest * preference, axis=-1) | np.signbit(blocks) << 3
    codes = codes.astype(np.uint8).reshape(w.shape)
    return codes[:, ::2] | codes[:, 1::2] << 4, block_scale, decode


def _values(t: Nvfp4Tensor) -> np.ndarray:
    """The exact values as float64."""
    data = np.asarray(t.data)
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(*data.shape[:-1], -1)
    values = np.where(codes & 8, -1.0, 1.0) * _E2M1[codes & 7]
    scale = np.asarray(t.block_scale).astype(np.float64).repeat(16, axis=-1)
    global_scale = np.asarray(t.global_scale, np.float64)
    return values * scale * (global_scale[:, None] if global_scale.ndim else global_scale)


def _check_linear(
    x: jax.Array,
    weight: Nvfp4Tensor,
    bias: jax.Array,
    scaling: Literal["tensor", "token"] | None,
    dtype: np.dtype,
) -> Check:
    """Holds a layer to float64: half a unit of the output plus 2**-18 of the sum of magnitudes."""

    @jax.jit
    def layer(x: jax.Array, w: jax_nvfp4.RepackedWeight, bias: jax.Array) -> jax.Array:
        return jax_nvfp4.linear(x, w, bias, activation_scale=scaling, out_dtype=dtype)

    y = np.asarray(layer(x, jax_nvfp4.repack(weight), bias)).astype(np.float64)
    x64 = np.asarray(x, np.float64)
    if scaling is not None:
        x64 = _values(jax.jit(jax_nvfp4.quantize, static_argnames="scaling")(x, scaling=scaling))
    w64, b64 = _values(weight), np.asarray(bias, np.float64)
    expected = x64 @ w64.T + b64
    unit = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    unit *= 2.0 ** (23 - ml_dtypes.finfo(dtype).nmant)
    allowed = unit / 2 + 2.0**-18 * (np.abs(x64) @ np.abs(w64).T + np.abs(b64))
    worst = float(np.max(np.abs(y - expected) / allowed))
    passed = worst <= 1  # False for NaN
    mode = "16-bit activations" if scaling is None else f"activations per {scaling}"
    return Check(f"linear, {mode}, {dtype.name}", passed, f"error {worst:.2f} of what is allowed")
