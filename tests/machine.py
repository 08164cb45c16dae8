# SPDX-License-Identifier: Apache-2.0
"""What the machine that runs the tests has."""

import jax

from jax_nvfp4.ops.backend import local_arch


def arches() -> tuple[str, ...]:
    """Architectures whose repacked weights run here: a CPU runs every order, a GPU its own."""
    if jax.default_backend() == "cpu":
        return ("reference", "sm_90a", "sm_100f", "sm_120f")
    return tuple(dict.fromkeys(("reference", local_arch())))
