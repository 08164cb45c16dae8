# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels: `python -m jax_nvfp4.kernels.build`, or `python <path of this folder>`.

Run by path, it imports this subpackage without running the `__init__` of `jax_nvfp4`, so that the
build needs CuTeDSL and JAX, and none of the package's other dependencies.
"""

import pathlib
import sys
import types

if not __package__:
    _here = pathlib.Path(__file__).resolve().parent
    # The folder itself must not be on the path: its modules would shadow others by name.
    sys.path[0] = str(_here.parent.parent)
    _package = types.ModuleType("jax_nvfp4")
    _package.__path__ = [str(_here.parent)]
    sys.modules["jax_nvfp4"] = _package

from jax_nvfp4.kernels.build import main

sys.exit(main())
