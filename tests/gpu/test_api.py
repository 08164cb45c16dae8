# SPDX-License-Identifier: Apache-2.0
"""The tests of the API once more, through the kernels: same cases, on the GPU.

On a machine whose default device is the GPU the tests they come from run there as well; here they
are collected under `tests/gpu`, so that this folder by itself is the whole of what a GPU must pass.
"""

import jax
import pytest

if jax.default_backend() != "gpu":
    pytest.skip("the default device is no GPU", allow_module_level=True)

from test_linear import *  # noqa: F403
from test_linen import *  # noqa: F403
from test_nnx import *  # noqa: F403
from test_numerics import *  # noqa: F403
from test_transformations import *  # noqa: F403
