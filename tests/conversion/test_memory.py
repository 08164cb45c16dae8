# SPDX-License-Identifier: Apache-2.0
"""The peak of memory of `convert`: one leaf of the host's at a time is on the device.

What the process takes as the kernel counts it is not measured: the allocators' habits change it by
more than a leaf. By hand: twelve leaves of 16.8 MB peak at 69 to 85 MB over the start, of which the
NVFP4 model is 57; at 257 MB where the copies of all are dispatched at once.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jax_nvfp4 as nvfp4
from jax_nvfp4.conversion import convert


def test_leaves_in_host_memory_are_copied_one_by_one(monkeypatch):
    """Dispatch is asynchronous: a leaf that takes a while is done before the next is touched."""
    make, ready = convert._converted, []
    results = []

    def converted(*args, **options):
        parts = [part for result in results for part in jax.tree.leaves(result)]
        ready.append(all(part.is_ready() for part in parts))
        results.append(make(*args, **options))
        return results[-1]

    monkeypatch.setattr(convert, "_converted", converted)
    params = [np.ones((2048, 2048), ml_dtypes.bfloat16) for _ in range(4)]

    def model(params, x):
        return [x @ w for w in params]

    nvfp4.convert(model, params, jax.ShapeDtypeStruct((1, 2048), jnp.bfloat16))
    assert ready == [True] * 4
