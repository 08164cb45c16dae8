# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests; they must be in the environment before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    # The sharding tests need a mesh; on a CPU it is made of virtual devices.
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8"
# The PTX machine multiplies many small matrices: threads of BLAS would only wait for each other.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
