# SPDX-License-Identifier: Apache-2.0
"""The architectures: their names, and which GPU is of which."""

REFERENCE = "reference"
"""The arch of the pure-JAX path."""

ARCHES = ("sm_90a", "sm_100f", "sm_103a", "sm_120f")
"""Architectures that kernels can be compiled for, each a full compile target."""


PROVEN = ("sm_90a",)
"""Architectures whose kernels have run on hardware; others' are tried on a device before use."""


def arch_of_compute_capability(major: int, minor: int) -> str:
    """The kernel arch that serves a GPU of this compute capability.

    Families, not exact versions: 10.0 and 10.3 run the `sm_100f` kernels, 12.0 and 12.1 the
    `sm_120f` kernels (PTX ISA, family-specific targets). It names the order of a weight, too.

    Args:
        major: compute capability, major number.
        minor: compute capability, minor number.

    Returns:
        A name of `ARCHES`, or `"reference"` where no kernels exist for the GPU.
    """
    if (major, minor) == (9, 0):
        return "sm_90a"
    if major == 10 and minor in (0, 3):
        return "sm_100f"
    if major == 12:
        return "sm_120f"
    return REFERENCE


def most_specific_arch(major: int, minor: int) -> str:
    """The arch of a GPU of this compute capability, with more kernels than its family's, if any."""
    return "sm_103a" if (major, minor) == (10, 3) else arch_of_compute_capability(major, minor)


def runnable_arches(arch: str) -> tuple[str, ...]:
    """Architectures whose kernels a GPU of `arch` runs: its own and, last, its family's."""
    return ("sm_103a", "sm_100f") if arch == "sm_103a" else (arch,)
