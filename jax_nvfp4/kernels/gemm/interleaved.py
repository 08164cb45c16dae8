# SPDX-License-Identifier: Apache-2.0
"""Where the rows of a gated weight are on Blackwell: as it is packed, and what they belong to.

It is packed in runs of gates and of their ups, each half padded to half of a tile of rows
(`layout.gated`). Its global scales are in that order; the bias and y are in the logical one.
"""

from cutlass import cute

from jax_nvfp4.config.gemm.blackwell import GATED_HALF_TILE, GATED_RUN


def packed_rows(n):
    """The rows of a gated weight of n rows as it is packed."""
    return 2 * cute.round_up(n // 2, GATED_HALF_TILE)


def output_of(row):
    """The column of y that a row of the packed weight, gate or up, has a part in."""
    return row // (2 * GATED_RUN) * GATED_RUN + row % GATED_RUN


def gate_of(output):
    """The gate's row of the packed weight; its up is GATED_RUN further."""
    return output // GATED_RUN * (2 * GATED_RUN) + output % GATED_RUN
