# SPDX-License-Identifier: Apache-2.0
"""The linear operation by kernels, where the GPU has any for the call."""

import jax
import jax.numpy as jnp

from jax_nvfp4 import custom_calls, numerics
from jax_nvfp4.config import GemmProblem, select, serves
from jax_nvfp4.config.enums import OutFormat, Scaling
from jax_nvfp4.config.quantize import select_quantize
from jax_nvfp4.layout.weights import K_MULTIPLE, pack_weight
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear.reference import reference
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.quantize import cuda as quantize_cuda

ONE_CALL_ELEMENTS = 1 << 19
"""Elements of x up to which one custom call quantizes and multiplies.

One call saves about 0.7 us, since its second kernel starts while the first runs. Two can save the
first: XLA merges equal calls, so that layers that share x, as those of q, k and v do, quantize it
once. Up to here a quantization takes 2.5 us or less, and for the layers of a transformer, seven
with four different x, one call is worth more than or about as much as two. The result is the same
bit for bit.
"""


def _operand_dtype(x: jax.Array, spec: LinearSpec, arch: str) -> str:
    """The element type of x that the GEMM of `arch` takes."""
    if spec.scaling == Scaling.NONE:
        return "float16" if x.dtype == jnp.float16 else "bfloat16"
    return "bfloat16" if arch == "sm_90a" else "e2m1"


def _operand(
    x: jax.Array, scale_or_amax: jax.Array | None, spec: LinearSpec, arch: str
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """x as the GEMM of `arch` takes it: values or codes, block scales, global scale."""
    x_dtype = _operand_dtype(x, spec, arch)
    if spec.scaling == Scaling.NONE:
        return numerics.pad_last(x.astype(x_dtype), K_MULTIPLE), None, None
    out_format = OutFormat.for_gemm(x_dtype)
    x, scales, x_scale = quantize_cuda.kernel(
        x, scale_or_amax, scaling=spec.scaling, arch=arch, out_format=out_format
    )
    return x, scales if x_dtype == "e2m1" else None, x_scale


def _problem(x: jax.Array, x_dtype: str, spec: LinearSpec, arch: str) -> GemmProblem:
    padded_k = -(-spec.k // K_MULTIPLE) * K_MULTIPLE
    return GemmProblem(x.shape[0], spec.n, padded_k, arch, x_dtype, spec.batch_invariant)


def _weight_only_by_xla(x: jax.Array, spec: LinearSpec, arch: str) -> bool:
    """Whether 16-bit x goes through XLA's dot of the dequantized weight.

    Blackwell's tensor cores multiply 4-bit by 4-bit operands; its kernels for 16-bit x, where there
    are any, are for few rows.
    """
    if spec.scaling != Scaling.NONE or arch == "sm_90a":
        return False
    return not serves(_problem(x, _operand_dtype(x, spec, arch), spec, arch), device.num_sms(arch))


def cuda(*flat: jax.Array, spec: LinearSpec) -> list[jax.Array]:
    """Calls the kernels that serve a matrix x; where there are none, the reference."""
    x, data, block_scale, w_scale, bias, scale_or_amax = spec.operands(flat)
    arch = device.kernel_arch(spec.arch)
    if arch is None or 0 in (*x.shape, spec.n) or _weight_only_by_xla(x, spec, arch):
        return reference(*flat, spec=spec)
    if spec.arch is None:
        data, block_scale = pack_weight(arch, data, block_scale)
    sms = device.num_sms(arch)
    out_dtype = jnp.dtype(spec.out_dtype)
    x_dtype = _operand_dtype(x, spec, arch)
    config, split_k = select(_problem(x, x_dtype, spec, arch), sms)
    if spec.scaling != Scaling.NONE and x.size <= ONE_CALL_ELEMENTS:
        scaling = quantize_cuda.kernel_scaling(x.shape, scale_or_amax, spec.scaling)
        y = custom_calls.linear_call(
            x,
            scale_or_amax,
            data,
            block_scale,
            w_scale,
            bias,
            quantize_config=select_quantize(arch, x.dtype.name, scaling),
            scaling=scaling,
            gemm_config=config,
            split_k=split_k,
            n=spec.n,
            out_dtype=out_dtype,
            num_sms=sms,
        )
        return [y]
    x, scales, x_scale = _operand(x, scale_or_amax, spec, arch)
    y = custom_calls.gemm_call(
        x,
        scales,
        data,
        block_scale,
        x_scale,
        w_scale,
        bias,
        config=config,
        split_k=split_k,
        n=spec.n,
        out_dtype=out_dtype,
        num_sms=sms,
    )
    return [y]
