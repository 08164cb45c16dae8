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
    """Adds the arguments of the command."""
    parser = commands.add_parser("info", help=COMMANDS["info"], description=COMMANDS["info"])
    parser.add_argument(
        "--kernels", action="store_true", help="try each kernel of this GPU on a few tiles, too"
    )


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
    if args.kernels:
        passed &= _try_kernels(local_arch())
    print("\npassed" if passed else "\nFAILED")
    return 0 if passed else 1


def _try_kernels(arch: str) -> bool:
    """Tries each GEMM kernel, and prints what is wrong; whether all are right."""
    from jax_nvfp4.config import REFERENCE, configs, runnable_arches
    from jax_nvfp4.ops import device
    from jax_nvfp4.ops.linear import trial
    from jax_nvfp4.ops.linear.cuda import multiply

    if arch == REFERENCE:
        print("\nno kernels to try: pure JAX serves this device")
        return True
    print("\nkernels, each on a few tiles", flush=True)
    own = device.kernel_arch(None) or arch
    passed = True
    for config in (config for each in runnable_arches(own) for config in configs(each)):
        for split in sorted({1, config.split_k}):
            chosen = trial.plan_of(config, split, device.limits(own))
            fault = trial.fault_of(chosen, multiply, per_row=False)
            passed &= fault is None
            name = config.name if split == 1 else f"{config.name}, K in {split}"
            print(f"  {'ok  ' if fault is None else 'FAIL'} {name} {fault or ''}", flush=True)
    return passed


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
