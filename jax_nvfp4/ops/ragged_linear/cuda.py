# SPDX-License-Identifier: Apache-2.0
"""The ragged linear operation by kernels, where the GPU has any: `linear`'s plan, with groups."""

import dataclasses

import jax
import jax.numpy as jnp

from jax_nvfp4.config import REFERENCE
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear import cuda as dense
from jax_nvfp4.ops.linear.plan import LinearPlan, plan
from jax_nvfp4.ops.linear.spec import Groups
from jax_nvfp4.ops.linear.spec import Operands as DenseOperands
from jax_nvfp4.ops.linear.trial import usable
from jax_nvfp4.ops.ragged_linear.reference import reference, scale_or_amax_of
from jax_nvfp4.ops.ragged_linear.spec import RaggedSpec, ranges


def cuda(*flat: jax.Array, spec: RaggedSpec) -> list[jax.Array]:
    """Calls the kernels that serve the call; where there are none, the reference."""
    operands = spec.operands(flat)
    x, sizes = operands.x, operands.sizes
    arch = device.kernel_arch(spec.each.arch) or REFERENCE
    if 0 in (*x.shape, spec.groups, spec.each.n, *sizes.shape):
        arch = REFERENCE
    given, scaling = operands.scale_or_amax, spec.each.scaling
    if arch != REFERENCE:
        where = ranges(sizes, operands.offset, spec.groups, x.shape[0])
        given, scaling = scale_or_amax_of(operands, where, scaling)
    per_row = given is not None and bool(given.ndim)

    def decide() -> LinearPlan:
        return plan(
            dataclasses.replace(spec.each, scaling=scaling),
            x.shape[0],
            x.dtype.name,
            arch=arch,
            limits=device.limits(arch),
            per_row=per_row,
            groups=sizes.shape[0],
        )

    chosen = usable(decide, dense.multiply, per_row=per_row)
    if chosen.gemm is None:
        return reference(*flat, spec=spec)
    offset = jnp.zeros((), jnp.int32) if operands.offset is None else operands.offset
    of_all = DenseOperands(x, *operands.weight, operands.bias, given)
    return [dense.multiply(of_all, chosen, Groups(sizes, offset.reshape(1)))]
