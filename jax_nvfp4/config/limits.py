# SPDX-License-Identifier: Apache-2.0
"""Limits of a device, as far as the choice of a kernel depends on them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of a device.

    Attributes:
        num_sms: its multiprocessors.
        unusable: names of kernels that do not run there, or are wrong there.
    """

    num_sms: int
    unusable: frozenset[str] = frozenset()


TYPICAL = {
    "sm_90a": Limits(num_sms=132),
    "sm_100f": Limits(num_sms=148),
    "sm_103a": Limits(num_sms=148),
    "sm_120f": Limits(num_sms=188),
}
"""Limits of a typical GPU of each architecture, for graphs that are made without one."""
