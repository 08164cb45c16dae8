# SPDX-License-Identifier: Apache-2.0
"""The swizzle and the weight orders: index maps that lose nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jax_nvfp4 as nvfp4
from jax_nvfp4.config import ARCHES
from jax_nvfp4.config.enums import WEIGHT_TILES
from jax_nvfp4.layout import swizzle
from jax_nvfp4.layout.orders import order

SIZES = st.integers(1, 300)


def bytes_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@given(rows=SIZES, columns=st.integers(1, 40), data=st.data())
@settings(max_examples=60, deadline=None)
def test_swizzle_puts_each_scale_where_the_formula_says(rows, columns, data):
    scales = bytes_of((rows, columns)) | 1
    flat = swizzle.swizzle(scales).reshape(-1)
    tiles = -(-columns // 4)
    n, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    offset = ((n // 128) * tiles + k // 4) * 512 + (n % 32) * 16 + ((n % 128) // 32) * 4 + k % 4
    np.testing.assert_array_equal(flat[offset], scales)
    padding = np.ones(flat.size, bool)
    padding[offset] = False
    assert not flat[padding].any()
    assert flat.size == -(-rows // 128) * 128 * tiles * 4


@given(rows=st.integers(0, 300), columns=st.integers(0, 20), lead=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_swizzle_round_trip_in_numpy(rows, columns, lead):
    scales = bytes_of((lead, rows, columns))
    np.testing.assert_array_equal(swizzle.unswizzle(swizzle.swizzle(scales), rows, columns), scales)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (3, 40, 7), (2, 2, 130, 9)])
def test_jax_and_numpy_give_the_same(shape):
    scales = bytes_of(shape)
    in_jax = jax.jit(swizzle.swizzle)(scales)
    in_numpy = swizzle.swizzle(scales)
    assert isinstance(in_numpy, np.ndarray)
    np.testing.assert_array_equal(in_jax, in_numpy)
    np.testing.assert_array_equal(swizzle.unswizzle(in_jax, *shape[-2:]), scales)


@pytest.mark.parametrize("arch", ["reference", "sm_90a", "sm_100f", "sm_103a", "sm_120f"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 16), (128, 64), (130, 100), (257, 208), (3, 40, 48)])
def test_packed_weights_come_back_bit_for_bit(arch, shape):
    *lead, n, k = shape
    blocks = -(-k // 16)
    data = bytes_of((*lead, n, blocks * 8))
    scales = bytes_of((*lead, n, blocks), 1) & 0x7F
    codes, bits = order(arch).pack(jnp.asarray(data), jnp.asarray(scales))
    expected = tuple((*lead, *shape) for shape in order(arch).shapes(n, k))
    assert (codes.shape, bits.shape) == expected
    back, back_scales = order(arch).unpack(codes, bits, n, k)
    np.testing.assert_array_equal(back, data)
    np.testing.assert_array_equal(np.asarray(back_scales).view(np.uint8), scales)
    assert codes.ndim == 2 + len(lead)
    if not lead:
        on_host = order(arch).pack(data, scales)
        assert all(isinstance(part, np.ndarray) for part in on_host)
        np.testing.assert_array_equal(on_host[0], codes)
        np.testing.assert_array_equal(on_host[1], bits)


@pytest.mark.parametrize("arch", ARCHES)
def test_the_tiles_that_the_handlers_count_with_are_the_order_s(arch):
    (rows, columns), of_arch = WEIGHT_TILES[arch], order(arch)
    assert rows == of_arch.row_tile and columns % of_arch.k_multiple == 0
    for n, k in ((1, 1), (128, 64), (129, 65), (300, 200)):
        padded = -(-n // rows) * rows * -(-k // columns) * columns
        codes, scales = map(math.prod, of_arch.shapes(n, k))
        assert (codes, scales) == (padded // 2, padded // 16)


@pytest.mark.parametrize("arch", ["sm_100f", "sm_103a", "sm_120f"])
def test_blackwell_weights_are_padded_with_zeros(arch):
    t = nvfp4.quantize(np.random.default_rng(0).standard_normal((130, 80)).astype(np.float32))
    w = nvfp4.repack(t, arch)
    assert w.data.shape == (256, 64) and w.block_scale.shape == (2, 2, 512)
    assert not np.asarray(w.data)[130:].any() and not np.asarray(w.data)[:, 40:].any()
    np.testing.assert_array_equal(np.asarray(w.data)[:130, :40], t.data)
    scales = np.asarray(t.block_scale).view(np.uint8)
    np.testing.assert_array_equal(w.block_scale, swizzle.swizzle(scales))


@pytest.mark.parametrize("arch", ["reference", "sm_90a", "sm_100f"])
@pytest.mark.parametrize("scaling", ["tensor", "token"])
def test_repack_and_canonical(arch, scaling):
    x = np.random.default_rng(1).standard_normal((2, 70, 90)).astype(np.float32)
    t = jax.vmap(lambda x: nvfp4.quantize(x, scaling=scaling))(x)
    w = nvfp4.repack(t, arch)
    assert (w.shape, w.arch) == ((2, 70, 90), arch)
    back = w.canonical()
    for name in ("data", "block_scale", "global_scale"):
        a, b = (np.asarray(getattr(v, name)) for v in (t, back))
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))
    np.testing.assert_array_equal(w.dequantize(), t.dequantize())


def test_repack_of_a_tree():
    t = nvfp4.quantize(np.ones((8, 32), np.float32))
    tree = {"a": {"kernel": t, "bias": jnp.ones(8)}, "b": [t, 3]}
    out = nvfp4.repack(tree, "sm_100f")
    assert isinstance(out["a"]["kernel"], nvfp4.RepackedWeight)
    assert isinstance(out["b"][0], nvfp4.RepackedWeight)
    assert out["b"][1] == 3 and out["a"]["bias"].shape == (8,)


def test_repack_for_another_arch():
    t = nvfp4.quantize(np.random.default_rng(3).standard_normal((130, 90)).astype(np.float32))
    hopper = nvfp4.repack(t, "sm_90a")
    assert nvfp4.repack(hopper, "sm_90a") is hopper
    again = nvfp4.repack({"a": hopper, "b": t}, "sm_100f")
    for part, other in zip(*(jax.tree.leaves(again[name]) for name in "ab"), strict=True):
        np.testing.assert_array_equal(part, other)
    assert jax.tree.structure(again["a"]) == jax.tree.structure(again["b"])


def test_every_packed_byte_is_decided():
    """Codes of a weight that the oracle quantized are in the packed weight, and nothing else is."""
    x = np.random.default_rng(2).standard_normal((64, 64)).astype(np.float32)
    codes, bits, _ = oracle.quantize(x)
    t = nvfp4.quantize(x)
    for arch in ("sm_90a", "sm_100f"):
        w = nvfp4.repack(t, arch)
        ones = np.unpackbits(np.asarray(w.data)).sum()
        assert ones == np.unpackbits(oracle.pack(codes)).sum()
    assert np.sort(np.asarray(nvfp4.repack(t, "sm_100f").block_scale).ravel())[-256:].tolist() == (
        np.sort(bits.ravel()).tolist()
    )
