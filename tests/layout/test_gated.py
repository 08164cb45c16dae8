# SPDX-License-Identifier: Apache-2.0
"""The order of a gated weight's rows, and weights put together from several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_nvfp4 as nvfp4
from jax_nvfp4.config import ARCHES, REFERENCE
from jax_nvfp4.layout.orders import order
from jax_nvfp4.ops.concatenate import concatenate, gate_up, split_rows

EVERY = (*ARCHES, REFERENCE)


def weight(rows, k=48, lead=(), seed=0, scale=()):
    """Random codes and scales; `scale` is the shape of the global scale, after `lead`."""
    rng = np.random.default_rng(seed)
    return nvfp4.Nvfp4Tensor(
        rng.integers(0, 256, (*lead, rows, k // 2), np.uint8),
        rng.integers(0, 0x7F, (*lead, rows, k // 16), np.uint8),
        rng.random((*lead, *scale), np.float32),
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    bits = lambda x: np.atleast_1d(np.asarray(x)).view(np.uint8)  # noqa: E731
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), a, b)


# Written out, not computed: kernels are compiled for these orders.
ORDERS = {
    "reference": "g0 u0 g1 u1 g2 u2",
    "sm_90a": "g0 g1 u0 u1 g2 g3 u2 u3 g4 g5 u4 u5",
    "sm_100f": "g0 g1 g2 g3 g4 g5 g6 g7 u0 u1 u2 u3 u4 u5 u6 u7 g8",
    "sm_103a": "g0 g1 g2 g3 g4 g5 g6 g7 u0 u1 u2 u3 u4 u5 u6 u7 g8",
    "sm_120f": "g0 g1 g2 g3 g4 g5 g6 g7 u0 u1 u2 u3 u4 u5 u6 u7 g8",
}


@pytest.mark.parametrize("arch", EVERY)
def test_the_order_of_the_rows(arch):
    half = 80
    rows = np.array([f"{side}{i}" for side in "gu" for i in range(half)], dtype=object)
    numbers = np.arange(1, 2 * half + 1)
    packed = order(arch).gated.interleave(numbers, -1)
    names = ["pad" if i == 0 else rows[i - 1] for i in packed]
    expected = ORDERS[arch].split()
    assert names[: len(expected)] == expected
    if arch != REFERENCE:  # 64 gates and their ups in each tile of 128 rows; padding is zero
        assert len(packed) == 256
        assert sorted(names[:128]) == sorted([*rows[:64], *rows[half : half + 64]])
        assert names[128:].count("pad") == 2 * (64 - (half - 64))


@pytest.mark.parametrize("half", [1, 8, 63, 64, 80, 128])
@pytest.mark.parametrize("arch", EVERY)
def test_the_way_back(arch, half):
    rows = np.arange(3 * 2 * half * 2, dtype=np.int32).reshape(3, 2 * half, 2)
    packed = order(arch).gated.interleave(rows, -2)
    assert packed.shape == (3, order(arch).gated.rows(2 * half), 2)
    np.testing.assert_array_equal(order(arch).gated.deinterleave(packed, -2, 2 * half), rows)
    np.testing.assert_array_equal(order(arch).gated.interleave(jnp.asarray(rows), -2), packed)


def test_parts_keep_their_scales_and_come_back():
    q, k, per_row = weight(24, seed=1), weight(8, seed=2), weight(8, seed=3, scale=(8,))
    joined = concatenate([q, k, per_row])
    assert joined.shape == (40, 48)
    assert joined.parts == (24, 8, 8)
    scales = [*[q.global_scale] * 24, *[k.global_scale] * 8, *per_row.global_scale]
    np.testing.assert_array_equal(joined.global_scale, scales)
    for a, b in zip(split_rows(joined), (q, k, per_row), strict=True):
        assert_same(a, b)
    assert concatenate([concatenate([q, k]), per_row]).parts == (24, 8, 8)
    assert split_rows(q) == (q,)


def test_parts_of_stacked_weights():
    gate, up = weight(6, lead=(2, 3)), weight(6, lead=(2, 3), seed=3)
    w = gate_up(gate, up)
    assert w.shape == (2, 3, 12, 48)
    assert w.global_scale.shape == (2, 3, 12)
    for a, b in zip(split_rows(w), (gate, up), strict=True):
        assert_same(a, b)
    for scale in (jnp.float32(2), jnp.asarray([2.0, 3.0])):  # of all, or of the first axis
        part = nvfp4.Nvfp4Tensor(gate.data, gate.block_scale, scale)
        found = gate_up(part, up).global_scale[..., :6]
        expected = np.broadcast_to(np.reshape(scale, (-1, 1, 1)), (2, 3, 6))
        np.testing.assert_array_equal(found, expected)


REFUSED = [
    (lambda: concatenate([]), ValueError, "at least one weight"),
    (lambda: concatenate([np.ones((2, 16))]), TypeError, r"weights\[0\] must be .*ndarray"),
    (lambda: concatenate([weight(4), weight(4, k=32)]), ValueError, r"weights\[1\] .*\(4, 32\)"),
    (lambda: concatenate([weight(4), weight(4, lead=(2,))]), ValueError, r"got \(2, 4, 48\)"),
    (lambda: gate_up(weight(4), weight(5)), ValueError, r"\(4, 48\) and \(5, 48\)"),
    (lambda: gate_up(weight(4), None), TypeError, "up must be .*NoneType"),
    (lambda: concatenate([gate_up(weight(4), weight(4))]), ValueError, "is gated"),
    (
        lambda: jax.tree.map(
            lambda a: a[:4] if a.ndim else a, gate_up(weight(4), weight(4))
        ).check(),
        ValueError,
        r"parts \(4, 4\) must have as many rows; got the shape \(4, 48\)",
    ),
]


@pytest.mark.parametrize("call,error,message", REFUSED)
def test_what_does_not_go_together_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
