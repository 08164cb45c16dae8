# SPDX-License-Identifier: Apache-2.0
"""Finds the kernels that serve a device; warns where there are none."""

import concurrent.futures
import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from jax_nvfp4 import custom_calls
from jax_nvfp4.config import (
    PROVEN,
    REFERENCE,
    arch_of_compute_capability,
    most_specific_arch,
    runnable_arches,
)
from jax_nvfp4.config.limits import TYPICAL, Limits

T = TypeVar("T")


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


def gpu() -> jax.Device:
    """This machine's first NVIDIA GPU; there is one."""
    device = _cuda_device()
    assert device is not None
    return device


def host() -> jax.Device:
    """The CPU or, where JAX was told to have none (`JAX_PLATFORMS=cuda`), the GPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return gpu()


def runs_here(arch: str) -> bool:
    """Whether this machine's GPU, if there is one, runs kernels of `arch`."""
    device = _cuda_device()
    return device is not None and arch in runnable_arches(
        most_specific_arch(*_compute_capability(device))
    )


def to_be_tried(arch: str) -> bool:
    """Whether a kernel of this arch is tried before it is used: `JAX_NVFP4_CHECK` 1 all, 0 none."""
    asked = os.environ.get("JAX_NVFP4_CHECK", "")
    if asked == "0" or not runs_here(arch):
        return False
    return asked == "1" or arch not in PROVEN


def apart(function: Callable[[], T]) -> T:
    """Calls a function where nothing surrounds it, no trace and no mesh: in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def run_on_gpu(function: Callable[..., Any], *operands: Any) -> tuple[Any, str | None]:
    """What a jitted function gives on this machine's GPU, or why it does not run there."""
    try:
        with jax.default_device(gpu()):
            return jax.tree.map(np.asarray, jax.jit(function)(*operands)), None
    except jax.errors.JaxRuntimeError as error:
        return None, f"it does not run: {str(error).strip().splitlines()[0]}"


def run_on_host(function: Callable[..., Any], *operands: Any) -> Any:
    """What a jitted function gives on the host."""
    with jax.default_device(host()):
        return jax.tree.map(np.asarray, jax.jit(function)(*operands))


_unusable: dict[str, str] = {}
"""Kernels that this process passes over, and why."""


def pass_over(kernel: str, why: str) -> None:
    """Leaves a kernel out of all plans from now on, and warns."""
    _unusable[kernel] = why
    _warn_once(
        f"jax_nvfp4 passes over its kernel {kernel} on {gpu().device_kind}: {why}. "
        "Results are right, but may be slow."
    )


def limits(arch: str) -> Limits:
    """Limits to plan a call for: this machine's GPU's if it runs `arch`, or a typical GPU's."""
    typical = TYPICAL.get(arch, Limits(num_sms=1))
    if not runs_here(arch):
        return typical
    count = getattr(gpu(), "core_count", None) or typical.num_sms
    return Limits(int(count), frozenset(_unusable))
