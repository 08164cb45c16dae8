# SPDX-License-Identifier: Apache-2.0
"""Weights for the tests of ragged products."""

import numpy as np

import jax_nvfp4 as nvfp4


def random_weights(groups, rows, k, seed=1, size=1.0):
    """(groups, rows, k) of random codes and block scales, a global scale for each group.

    Values are of zero mean, their products with k elements of unit variance about `size`.
    """
    rng = np.random.default_rng(seed)
    return nvfp4.Nvfp4Tensor(
        rng.integers(0, 256, (groups, rows, -(-k // 16) * 8), np.uint8),
        rng.integers(48, 64, (groups, rows, -(-k // 16)), np.uint8),
        ((rng.random(groups) + 0.5) * size / (3 * np.sqrt(max(k, 1)))).astype(np.float32),
        k=k,
    )
