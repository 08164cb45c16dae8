# SPDX-License-Identifier: Apache-2.0
"""What the machine that runs the tests has."""

import jax
import jax.export

from jax_nvfp4.ops.backend import local_arch


def arches() -> tuple[str, ...]:
    """Architectures whose repacked weights run here: a CPU runs every order, a GPU its own.

    Of a GPU, not "reference": that asks for the pure-JAX path, which sums in another order.
    """
    if jax.default_backend() == "cpu":
        return ("reference", "sm_90a", "sm_100f", "sm_120f")
    return (local_arch(),)


def export_checks() -> list[jax.export.DisabledSafetyCheck]:
    """What `jax.export` must be told on a GPU: JAX vouches for no custom call but its own."""
    calls = ("jax_nvfp4_quantize", "jax_nvfp4_gemm")
    return [jax.export.DisabledSafetyCheck.custom_call(name) for name in calls]
