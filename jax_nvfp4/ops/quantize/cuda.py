# SPDX-License-Identifier: Apache-2.0
"""The quantize operation by a kernel."""

import math

import jax

from jax_nvfp4 import custom_calls
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import SHARED_ROW, select_quantize
from jax_nvfp4.ops import device
from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.quantize.reference import reference


def kernel_scaling(
    shape: tuple[int, ...], scale_or_amax: jax.Array | None, scaling: Scaling
) -> Scaling:
    """The scaling that a kernel is asked for, of a matrix of a shape."""
    m, k = shape
    if scale_or_amax is not None and scale_or_amax.ndim:
        return {Scaling.STATIC: Scaling.STATIC_ROWS, Scaling.AMAX: Scaling.AMAX_ROWS}[scaling]
    if scaling == Scaling.TENSOR and m == 1 and k <= SHARED_ROW and k % 8 == 0:
        return Scaling.TOKEN  # the same for one row, and faster
    return scaling


def kernel(
    x: jax.Array,
    scale_or_amax: jax.Array | None = None,
    *,
    scaling: Scaling,
    arch: str,
    out_format: OutFormat,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes a matrix by a kernel of `arch`. Results as of `custom_calls.quantize_call`."""
    of_kernel = kernel_scaling(x.shape, scale_or_amax, scaling)
    data, block_scale, global_scale = custom_calls.quantize_call(
        x,
        scale_or_amax,
        config=select_quantize(arch, x.dtype.name, of_kernel),
        scaling=of_kernel,
        out_format=out_format,
        num_sms=device.num_sms(arch),
    )
    if scaling == Scaling.TENSOR:
        global_scale = global_scale.reshape(())
    return data, block_scale, global_scale


def cuda(
    x: jax.Array, scale_or_amax: jax.Array | None = None, *, scaling: Scaling
) -> list[jax.Array]:
    """Quantizes by a kernel of this GPU; without one, by the reference."""
    arch = device.kernel_arch(None)
    if arch is None or x.size == 0:
        return reference(x, scale_or_amax, scaling=scaling)
    *rows, k = x.shape
    results = kernel(
        x.reshape(math.prod(rows), k),
        scale.flat(scale_or_amax),
        scaling=scaling,
        arch=arch,
        out_format=OutFormat.LINEAR,
    )
    return [r.reshape(*rows, *r.shape[1:]) if r.ndim else r for r in results]
