# SPDX-License-Identifier: Apache-2.0
"""Divisions of sizes that round up."""


def ceil_div(a: int, b: int) -> int:
    """The quotient of `a` and a positive `b`, rounded up."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """The smallest multiple of a positive `b` that is not below `a`."""
    return ceil_div(a, b) * b
