# SPDX-License-Identifier: Apache-2.0
"""The tests of the API once more, through the kernels: same cases, on the GPU.

On a machine whose default device is the GPU the tests they come from run there as well; here they
are collected under `tests/gpu`, so that this folder by itself is the whole of what a GPU must pass.
"""

import jax
import pytest

if jax.default_backend() != "gpu":
    pytest.skip("the default device is no GPU", allow_module_level=True)

import test_linear
import test_linen
import test_nnx
import test_numerics
import test_transformations
import this_machine

for module in (test_linear, test_linen, test_nnx, test_numerics, test_transformations):
    globals().update(this_machine.tests_of(module))
