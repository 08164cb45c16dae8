# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 info`: what a bug report should say."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from typing import TYPE_CHECKING, Any

from jax_nvfp4.cli import COMMANDS

if TYPE_CHECKING:
    import jax

_BESIDES = ("flax", "numpy", "ml_dtypes", "safetensors")
# Variables that change how programs are compiled or where they run.
_SETTINGS = ("CUDA_VISIBLE_DEVICES", "JAX_", "NVIDIA_TF32_OVERRIDE", "XLA_")


def add_parser(commands: Any) -> None:
    """Adds the arguments of the command: none."""
    commands.add_parser("info", help=COMMANDS["info"], description=COMMANDS["info"])


def run(args: argparse.Namespace) -> int:
    """Prints what is installed and what serves each device, then tests it.

    Returns:
        The exit code: 0, or 1 where a check of the self-test fails.
    """
    import jax
    import jaxlib

    import jax_nvfp4
    from jax_nvfp4 import custom_calls
    from jax_nvfp4.cli import selftest
    from jax_nvfp4.config import ARCHES
    from jax_nvfp4.ops.device import local_arch

    print(
        f"jax_nvfp4 {jax_nvfp4.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}, "
        f"Python {platform.python_version()}"
    )
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in _BESIDES))
    print(platform.platform())
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SETTINGS):
            print(f"{name}={value}")
    runtime = " ".join(jax.local_devices()[0].client.platform_version.split())
    print(f"\ndevices, runtime {runtime}")
    for device in jax.local_devices():
        print(
            f"  {device.id:<3} {device.platform:<5} {device.device_kind:<30} {_served_by(device)}"
        )

    print("\nkernels built in")
    for arch in custom_calls.arches():
        print(f"  {arch:<8} {len(custom_calls.kernels(arch))}")
    if not custom_calls.arches():
        print(f"  none: {custom_calls.reason(ARCHES[0])}")

    print(f"\nself-test on {jax.local_devices()[0].device_kind}, arch {local_arch()}")
    passed = True
    for check in selftest.checks():
        passed &= check.passed
        print(f"  {'ok  ' if check.passed else 'FAIL'} {check.name:<45} {check.detail}")
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1


def _served_by(device: jax.Device) -> str:
    """The arch whose kernels serve a device, and whether they are there."""
    from jax_nvfp4 import custom_calls
    from jax_nvfp4.config import REFERENCE, arch_of_compute_capability

    capability = getattr(device, "compute_capability", None)
    arch = REFERENCE
    if device.platform == "gpu" and capability and capability.replace(".", "").isdigit():
        major, _, minor = capability.partition(".")
        arch = arch_of_compute_capability(int(major), int(minor or 0))
    if arch == REFERENCE:
        return "arch reference (pure JAX)"
    return f"arch {arch}" + ("" if custom_calls.available(arch) else ", not built in: pure JAX")
