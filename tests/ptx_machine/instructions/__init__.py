# SPDX-License-Identifier: Apache-2.0
"""Builders of the instructions, one module per family; importing them registers the builders."""

from . import (  # noqa: F401
    control,
    cvt,
    floating,
    integer,
    memory,
    mma,
    sync,
    tcgen05,
    tma,
    warp,
    wgmma,
)
