# SPDX-License-Identifier: Apache-2.0
"""The quantize operation by a kernel."""

import math

import jax

from jax_nvfp4 import custom_calls
from jax_nvfp4.config.quantize import SHARED_ROW, OutFormat, select_quantize
from jax_nvfp4.config.quantize import Mode as KernelMode
from jax_nvfp4.ops import device
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.quantize.reference import Mode, reference

# By whether there is a scale or an amax for each row.
_KERNEL_MODES = {
    "tensor": (KernelMode.TENSOR, KernelMode.TENSOR),
    "token": (KernelMode.TOKEN, KernelMode.TOKEN),
    "static": (KernelMode.SCALAR_GIVEN, KernelMode.ROWS_GIVEN),
    "amax": (KernelMode.SCALAR_AMAX, KernelMode.ROWS_AMAX),
}


def kernel_mode(x: jax.Array, given: tuple[jax.Array, ...], mode: Mode) -> KernelMode:
    """The kernels' mode for a mode of the primitive."""
    m, k = x.shape
    found = _KERNEL_MODES[mode][bool(given and given[0].ndim)]
    if found == KernelMode.TENSOR and m == 1 and k <= SHARED_ROW and k % 8 == 0:
        return KernelMode.TOKEN  # the same for one row, and faster
    return found


def kernel(
    x: jax.Array, *given: jax.Array, mode: Mode, arch: str, out_format: OutFormat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes a matrix by a kernel of `arch`. Results as of `custom_calls.quantize_call`."""
    of_kernel = kernel_mode(x, given, mode)
    data, block_scale, global_scale = custom_calls.quantize_call(
        x,
        given[0] if given else None,
        config=select_quantize(arch, x.dtype.name, of_kernel),
        mode=of_kernel,
        out_format=out_format,
        num_sms=device.num_sms(arch),
    )
    return data, block_scale, global_scale.reshape(()) if mode == "tensor" else global_scale


def cuda(x: jax.Array, *given: jax.Array, mode: Mode) -> list[jax.Array]:
    """Quantizes by a kernel of this GPU; without one, by the reference."""
    arch = device.kernel_arch(None)
    if arch is None or x.size == 0:
        return reference(x, *given, mode=mode)
    *rows, k = x.shape
    results = kernel(
        x.reshape(math.prod(rows), k),
        *scale.flat(given),
        mode=mode,
        arch=arch,
        out_format=OutFormat.LINEAR,
    )
    return [r.reshape(*rows, *r.shape[1:]) if r.ndim else r for r in results]
