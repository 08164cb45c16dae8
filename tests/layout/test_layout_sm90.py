# SPDX-License-Identifier: Apache-2.0
"""The Hopper weight order: exact inverse, and the decode that the kernel performs on it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4.layout import sm90

SHAPES = [(128, 8), (256, 24), (1, 1), (127, 7), (129, 9), (300, 33), (128, 96)]


def _weight(n, blocks, seed=0, scales=0x80):
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (n, blocks * 8), np.uint8)
    return data, rng.integers(0, scales, (n, blocks), np.uint8)


def _values(data, scale_bits):
    """e2m1 * block_scale in float64, NaN where the scale is."""
    codes = np.stack([data & 15, data >> 4], axis=-1).reshape(data.shape[0], -1)
    magnitude = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7]
    elements = np.where(codes & 8, -magnitude, magnitude)
    scales = scale_bits.view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    return elements * np.repeat(scales, 16, axis=1)


def _rotate(word, count):
    return np.uint32((int(word) << count | int(word) >> (32 - count)) & 0xFFFFFFFF)


def _decode_fragment(packed, scales, n, k, dtype):
    """The two elements of each register as the kernel makes them, by scalar code.

    Written from the layout's description, not from its maps. Element (n, k), k even, and its right
    neighbor.
    """
    k_padded = packed.shape[1] * 2
    tile = (n // 128) * (k_padded // 128) + k // 128
    warp, r2, block, half, r1 = n % 128 // 32, n % 32 // 8, n % 8 // 4, n % 4 // 2, n % 2
    row = 2 * r2 + r1
    step = k % 64 // 16
    lane = row * 4 + k % 8 // 2
    register = half + 2 * (k % 16 // 8)
    at = tile * 8192 + block * 4096 + (k % 128 // 64) * 2048 + (warp * 32 + lane) * 16
    words = packed.reshape(-1)[at : at + 16].view("<u4")
    even, odd = words[step // 2 * 2], words[step // 2 * 2 + 1]
    if register < 3:
        rotation = ((0, 4, 10), (2, 6, 12))[step % 2][register]
        bits = _rotate((even, odd)[step % 2], rotation)
    else:
        bits = _rotate(even & 0x06030603 | odd & 0xF9FCF9FC, (8, 14)[step % 2])
    bits &= np.uint32(0x81C081C0)
    scale_step = k % 128 // 16
    at = tile * 1024 + block * 512 + warp * 128 + row * 16 + scale_step // 2 * 4
    scale_word = _rotate(scales.reshape(-1)[at : at + 4].view("<u4")[0], 32 - 8 * (scale_step % 2))
    code = int(scale_word >> (16 * half + 4)) & 0xFF
    if dtype == ml_dtypes.bfloat16:
        scale = np.uint16(0x7000 | code << 4).view(dtype) - dtype(2.0**97)
        elements = np.array([bits & 0xFFFF, bits >> 16], np.uint16).view(dtype)
    else:
        scale = np.uint16(code << 7).view(dtype)
        moved = (bits & 0x80008000) | ((bits & 0x01C001C0) << 3)
        elements = np.array([moved & 0xFFFF, moved >> 16], np.uint16).view(dtype)
    return elements.astype(np.float64), np.float64(scale), elements * scale


@pytest.mark.parametrize(("n", "blocks"), SHAPES)
@pytest.mark.parametrize("kind", ["numpy", "jax", "jit"])
def test_inverse_is_exact(n, blocks, kind):
    data, scale_bits = _weight(n, blocks, seed=n)
    pack, unpack, convert = sm90.pack, sm90.unpack, np.asarray
    if kind != "numpy":
        convert = jnp.asarray
    if kind == "jit":
        pack, unpack = jax.jit(pack), jax.jit(unpack, static_argnums=(2, 3))
    packed, scales = pack(convert(data), convert(scale_bits))
    assert isinstance(packed, np.ndarray) == (kind == "numpy")
    assert packed.dtype == scales.dtype == np.uint8
    assert (packed.shape, scales.shape) == sm90.packed_shapes(n, blocks)
    back, back_scales = unpack(packed, scales, n, blocks)
    np.testing.assert_array_equal(np.asarray(back), data)
    np.testing.assert_array_equal(np.asarray(back_scales), scale_bits)


def test_jax_and_numpy_agree():
    data, scale_bits = _weight(200, 20)
    ours = sm90.pack(data, scale_bits)
    theirs = sm90.pack(jnp.asarray(data), jnp.asarray(scale_bits))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, np.asarray(b))


def test_every_bit_has_its_place():
    """Two weights that differ in one bit differ, packed, in one bit."""
    data, scale_bits = _weight(128, 8)
    reference = sm90.pack(data, scale_bits)[0]
    rng = np.random.default_rng(1)
    for _ in range(200):
        changed = data.copy()
        changed[rng.integers(128), rng.integers(64)] ^= np.uint8(1 << rng.integers(8))
        difference = sm90.pack(changed, scale_bits)[0] ^ reference
        assert np.unpackbits(difference).sum() == 1


def test_all_scale_bytes_round_trip():
    codes = np.arange(128, dtype=np.uint8)
    np.testing.assert_array_equal(sm90.decode_scales(sm90.encode_scales(codes)), codes)
    assert len(np.unique(sm90.encode_scales(codes))) == 128


def test_negative_scales_keep_the_values():
    data, scale_bits = _weight(128, 8, scales=0x100)
    back, back_scales = sm90.unpack(*sm90.pack(data, scale_bits), 128, 8)
    assert (back_scales < 0x80).all()
    np.testing.assert_array_equal(_values(back, back_scales), _values(data, scale_bits))


def test_padding_is_zero():
    data, scale_bits = _weight(130, 10)
    data[:], scale_bits[:] = 0xFF, 0x7E
    packed, scales = sm90.pack(data, scale_bits)
    codes, bits = sm90.unpack(packed, scales, 256, 16)
    assert not codes[130:].any() and not codes[:, 80:].any()
    assert not bits[130:].any() and not bits[:, 10:].any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_kernel_decode_is_exact(dtype):
    """Each code with each scale, NaN included, decodes to its value times 2^-7 without rounding."""
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (256, 192), np.uint8)
    scale_bits = rng.permuted(np.tile(np.arange(128, dtype=np.uint8), 48)).reshape(256, 24)
    packed, scales = sm90.pack(data, scale_bits)
    expected = _values(data, scale_bits)
    seen = set()
    with np.errstate(invalid="ignore"):
        for n, k in zip(rng.integers(0, 256, 6000), rng.integers(0, 192, 6000) * 2, strict=True):
            elements, scale, product = _decode_fragment(packed, scales, n, k, dtype)
            np.testing.assert_array_equal(elements * scale * 128, expected[n, k : k + 2])
            np.testing.assert_array_equal(product.astype(np.float64) * 128, expected[n, k : k + 2])
            seen.add(scale_bits[n, k // 16])
    assert len(seen) == 128
