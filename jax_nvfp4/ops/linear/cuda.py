# SPDX-License-Identifier: Apache-2.0
"""The linear operation by kernels, where the GPU has any for the call: carries out its plan."""

import jax
import jax.numpy as jnp

from jax_nvfp4 import custom_calls, numerics
from jax_nvfp4.activations import activate
from jax_nvfp4.config import REFERENCE, Scaling
from jax_nvfp4.layout.orders import Order, order
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear.plan import LinearPlan, plan
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import Groups, LinearSpec, Operands
from jax_nvfp4.ops.linear.trial import usable
from jax_nvfp4.ops.quantize import cuda as quantize_cuda


def cuda(*flat: jax.Array, spec: LinearSpec) -> list[jax.Array]:
    """Calls the kernels that serve a matrix x; where there are none, the reference."""
    operands = spec.operands(flat)
    x, scale_or_amax = operands.x, operands.scale_or_amax
    arch = device.kernel_arch(spec.arch) or REFERENCE
    per_row = scale_or_amax is not None and bool(scale_or_amax.ndim)

    def decide() -> LinearPlan:
        limits = device.limits(arch)
        return plan(spec, x.shape[0], x.dtype.name, arch=arch, limits=limits, per_row=per_row)

    chosen = usable(decide, multiply, per_row=per_row)
    if chosen.gemm is None:
        return reference(*flat, spec=spec)
    return [multiply(operands, chosen, Groups(None, None))]


def multiply(operands: Operands, chosen: LinearPlan, groups: Groups) -> jax.Array:
    """Carries out a plan that has a kernel: (M, *spec.columns)."""
    of = order(chosen.arch)
    operands = _in_order(operands, chosen, of)
    y = (_one_call if chosen.one_call else _gemm_call)(operands, chosen, groups)
    return _after(y, chosen, of)


def _in_order(operands: Operands, chosen: LinearPlan, to: Order) -> Operands:
    """The weight, and what goes with each of its rows, in the order of the kernel."""
    spec = chosen.spec
    if spec.arch is None:
        data, block_scale = to.pack(operands.data, operands.block_scale, gated=spec.gated)
        operands = operands._replace(data=data, block_scale=block_scale)
        if spec.gated and operands.w_scale.ndim == data.ndim - 1:  # one for each row
            operands = operands._replace(w_scale=to.gated.interleave(operands.w_scale, -1))
    if spec.gated and operands.bias is not None:
        bias = operands.bias.reshape(*operands.bias.shape[:-2], spec.n)
        if chosen.gate is None:
            bias = to.gated.interleave(bias, -1)
        operands = operands._replace(bias=bias)
    return operands


def _after(y: jax.Array, chosen: LinearPlan, of: Order) -> jax.Array:
    """Puts the columns of the kernel's result in the order [gate; up], and activates them."""
    spec = chosen.spec
    if spec.gated and chosen.gate is None:
        y = of.gated.deinterleave(y, -1, spec.n).reshape(y.shape[0], 2, spec.n // 2)
    if spec.activation is not None and chosen.gate is None:
        y = activate(spec.activation, y).astype(spec.out_dtype)
    return y


def _one_call(operands: Operands, chosen: LinearPlan, groups: Groups) -> jax.Array:
    """Quantizes and multiplies by one custom call."""
    assert chosen.gemm is not None and chosen.quantize is not None
    return custom_calls.linear_call(
        operands.x,
        operands.scale_or_amax,
        operands.data,
        operands.block_scale,
        operands.w_scale,
        operands.bias,
        quantize_config=chosen.quantize.config,
        scaling=chosen.quantize.scaling,
        gemm_config=chosen.gemm,
        split_k=chosen.split_k,
        n=chosen.gemm_n,
        out_dtype=jnp.dtype(chosen.gemm_out_dtype),
        num_sms=chosen.num_sms,
        gate=chosen.gate,
        groups=groups.operands,
    )


def _gemm_call(operands: Operands, chosen: LinearPlan, groups: Groups) -> jax.Array:
    """Multiplies by a custom call, after another one that quantizes x where that is asked."""
    assert chosen.gemm is not None
    x, scales, x_scale = _x_of_gemm(operands, chosen)
    return custom_calls.gemm_call(
        x,
        scales,
        operands.data,
        operands.block_scale,
        x_scale,
        operands.w_scale,
        operands.bias,
        config=chosen.gemm,
        split_k=chosen.split_k,
        n=chosen.gemm_n,
        out_dtype=jnp.dtype(chosen.gemm_out_dtype),
        num_sms=chosen.num_sms,
        gate=chosen.gate,
        groups=groups.operands,
    )


def _x_of_gemm(
    operands: Operands, chosen: LinearPlan
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """x as the GEMM takes it: values or codes, block scales, global scale."""
    x = operands.x
    if chosen.quantize is None:
        k_multiple = order(chosen.arch).k_multiple
        return numerics.pad_last(x.astype(chosen.gemm_x_dtype), k_multiple), None, None
    x, scales, x_scale = quantize_cuda.call(x, operands.scale_or_amax, chosen.quantize)
    if chosen.spec.scaling == Scaling.TENSOR:
        x_scale = x_scale.reshape(())
    return x, scales if chosen.gemm_x_dtype == "e2m1" else None, x_scale
