# SPDX-License-Identifier: Apache-2.0
"""The quantize operation by a kernel."""

import math

import jax

from jax_nvfp4 import custom_calls
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.ops import device
from jax_nvfp4.ops.quantize import scale, trial
from jax_nvfp4.ops.quantize.plan import QuantizePlan, plan
from jax_nvfp4.ops.quantize.reference import reference


def call(
    x: jax.Array, scale_or_amax: jax.Array | None, chosen: QuantizePlan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes a matrix by a kernel. Results as of `custom_calls.quantize_call`."""
    return custom_calls.quantize_call(
        x,
        scale_or_amax,
        config=chosen.config,
        scaling=chosen.scaling,
        out_format=chosen.out_format,
        num_sms=chosen.num_sms,
    )


def cuda(
    x: jax.Array, scale_or_amax: jax.Array | None = None, *, scaling: Scaling
) -> list[jax.Array]:
    """Quantizes by a kernel of this GPU; without one, by the reference."""
    arch = device.kernel_arch(None)
    if arch is None or x.size == 0:
        return reference(x, scale_or_amax, scaling=scaling)
    *rows, k = x.shape
    flat, given = x.reshape(math.prod(rows), k), scale.flat(scale_or_amax)
    chosen = plan(
        scaling,
        flat.shape,
        x.dtype.name,
        per_row=given is not None and bool(given.ndim),
        arch=arch,
        limits=device.limits(arch),
        out_format=OutFormat.LINEAR,
    )
    if not trial.usable(chosen, x.dtype.name, call):
        return reference(x, scale_or_amax, scaling=scaling)
    data, block_scale, global_scale = call(flat, given, chosen)
    if scaling == Scaling.TENSOR:
        global_scale = global_scale.reshape(())
    results = data, block_scale, global_scale
    return [r.reshape(*rows, *r.shape[1:]) if r.ndim else r for r in results]
