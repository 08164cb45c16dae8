# SPDX-License-Identifier: Apache-2.0
"""Finds the kernels that serve a device; warns where there are none."""

import functools
import warnings

import jax

from jax_nvfp4 import custom_calls
from jax_nvfp4.config import (
    REFERENCE,
    arch_of_compute_capability,
    most_specific_arch,
    runnable_arches,
)
from jax_nvfp4.config.limits import TYPICAL, Limits


def _cuda_device() -> jax.Device | None:
    """This machine's first NVIDIA GPU, if JAX has one."""
    try:
        return jax.devices("cuda")[0]
    except RuntimeError:
        return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _served(arch: str, gpu: str) -> bool:
    """Tells whether kernels for `arch` are built in; warns once where they are not."""
    if arch != REFERENCE and custom_calls.available(arch):
        return True
    built = ", ".join(custom_calls.arches()) or "none"
    why = custom_calls.reason(arch) if arch != REFERENCE else f"there are no kernels for {gpu}"
    _warn_once(
        f"jax_nvfp4 runs its pure-JAX path on {gpu}: {why} (kernels built in: {built}). "
        f"Results are right, but slow."
    )
    return False


def local_arch() -> str:
    """The arch of the default device: that of its kernels, or "reference" where it has none."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return REFERENCE
    if device.platform != "gpu" or "NVIDIA" not in device.device_kind.upper():
        gpu = f"{device.platform} ({device.device_kind})"
        _served(REFERENCE, gpu)
        return REFERENCE
    return _arch_of(device)


def _compute_capability(device: jax.Device) -> tuple[int, int]:
    major, _, minor = str(device.compute_capability).partition(".")
    return int(major), int(minor or 0)


def _arch_of(device: jax.Device) -> str:
    arch = arch_of_compute_capability(*_compute_capability(device))
    gpu = f"{device.device_kind} (compute capability {device.compute_capability})"
    return arch if _served(arch, gpu) else REFERENCE


def kernel_arch(asked: str | None) -> str | None:
    """The architecture whose kernels to put into a graph for an NVIDIA GPU.

    Where this machine's GPU runs the kernels of `asked` and has some of its own, it is the GPU's.

    Args:
        asked: the arch that a weight is repacked for; None: that of this machine's GPU.

    Returns:
        A name of `ARCHES` that kernels are built in for, or None: the pure-JAX path.
    """
    device = _cuda_device()
    if asked is None:
        asked = REFERENCE if device is None else _arch_of(device)
    elif asked != REFERENCE and not _served(asked, f"weights repacked for {asked}"):
        return None
    if asked == REFERENCE:
        return None
    if device is not None:
        own = most_specific_arch(*_compute_capability(device))
        if own != asked and asked in runnable_arches(own) and custom_calls.available(own):
            return own
    return asked


def limits(arch: str) -> Limits:
    """Limits to plan a call for: this machine's GPU's if it runs `arch`, or a typical GPU's."""
    device = _cuda_device()
    if device is not None and arch in runnable_arches(
        most_specific_arch(*_compute_capability(device))
    ):
        count = getattr(device, "core_count", None)
        if count:
            return Limits(num_sms=int(count))
    return TYPICAL.get(arch, Limits(num_sms=1))
