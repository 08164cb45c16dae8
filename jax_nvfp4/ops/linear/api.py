# SPDX-License-Identifier: Apache-2.0
"""The public `linear`: checks what the user gave, once, and runs the operation."""

import math

import jax
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4 import activations
from jax_nvfp4.activations import Activation
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.linear import primitive
from jax_nvfp4.ops.linear.sharding import placement
from jax_nvfp4.ops.linear.spec import LinearSpec, Operands
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


def linear(
    x: ArrayLike,
    weight: Nvfp4Tensor | RepackedWeight,
    bias: ArrayLike | None = None,
    *,
    activation: Activation | None = None,
    activation_scale: ActivationScale = "token",
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """A linear layer with an NVFP4 weight: `y = activation(x @ weight.T + bias)`.

    Products are exact, sums and the activation are float32, and the result is rounded once. The
    gradient is straight-through for x (`dx = dz @ dequantize(weight)`, with dz that of the
    activation's argument) and the sum for the bias; the weight and the scale are not
    differentiated.

    Args:
        x: (..., K); bfloat16, float16 or float32. Any leading axes, any sizes.
        weight: logical shape (N, K). A canonical tensor gives the same bits as a repacked one,
            but is repacked at every call.
        bias: (N,), bfloat16, float16 or float32; added before the activation.
        activation: for a weight made by `gate_up`, `SwiGLU(...)` or `GeGLU()`; for another "relu2",
            "silu" or "gelu_tanh".
        activation_scale: how x is quantized: "token" with a global scale for each row, "tensor"
            with one for all of x, a float32 scalar (traced or not) with that global scale, as
            from calibration or a checkpoint. None leaves x at 16 bits (weight-only): a float32
            x is then rounded to bfloat16.
        out_dtype: bfloat16, float16 or float32; x's dtype if None.
        batch_invariant: give a row of y the same bits whatever the number of rows and the
            other rows, at some cost in speed. "tensor" scaling still makes rows depend on one
            another through their common scale.

    Returns:
        (..., N) of `out_dtype`; (..., N/2) with a gated activation.

    Raises:
        TypeError: an argument has a type or dtype that is not taken.
        ValueError: shapes do not go together, the weight is of another kind than the activation,
            or activation or activation_scale has an unknown value.
    """
    return run(*checked(x, weight, bias, activation, activation_scale, out_dtype, batch_invariant))


def run(operands: Operands, spec: LinearSpec) -> jax.Array:
    """Multiplies what was `checked`, on meshes with explicit axes too."""

    def product(operands: Operands) -> tuple[jax.Array]:
        if spec.gated and operands.bias is not None:
            operands = operands._replace(bias=operands.bias.reshape(2, spec.n // 2))
        y = primitive.linear(operands, spec)
        return (y.reshape(*operands.x.shape[:-1], math.prod(spec.columns)),)

    (y,) = typed.call(product, (operands,), lambda: placement(operands.x, operands.data, spec))
    return y


def checked(
    x: ArrayLike,
    weight: Nvfp4Tensor | RepackedWeight,
    bias: ArrayLike | None,
    activation: Activation | None,
    activation_scale: ActivationScale,
    out_dtype: DTypeLike | None,
    batch_invariant: bool,
) -> tuple[Operands, LinearSpec]:
    """Checks the arguments of `linear`, raising as it says; returns what the primitive takes."""
    x = checks.as_float_array("x", x, min_ndim=1)
    n, arch = _check_weight(weight, x.shape[-1])
    activations.check(activation, gated=weight.gated)
    if bias is not None:
        bias = checks.as_float_array("bias", bias, min_ndim=0)
        if bias.shape != (n,):
            raise ValueError(
                f"bias must have shape ({n},) to go with a weight of shape {weight.shape}; "
                f"got {bias.shape}"
            )
    out_dtype = x.dtype if out_dtype is None else checks.float_dtype("out_dtype", out_dtype)
    scaling, static_scale = _scaling(activation_scale)
    spec = LinearSpec(
        arch=arch,
        n=n,
        k=x.shape[-1],
        scaling=scaling,
        has_bias=bias is not None,
        out_dtype=out_dtype.name,
        batch_invariant=bool(batch_invariant),
        gated=weight.gated,
        activation=activation,
    )
    parts = (weight.data, weight.block_scale, weight.global_scale)
    return Operands(x, *parts, bias, static_scale), spec


def _check_weight(weight: Nvfp4Tensor | RepackedWeight, k: int) -> tuple[int, str | None]:
    """The rows of a weight and its arch, once it is known to go with x of length k."""
    if not isinstance(weight, Nvfp4Tensor | RepackedWeight):
        raise TypeError(
            f"weight must be an Nvfp4Tensor or a RepackedWeight; got {type(weight).__name__}"
        )
    weight.check()
    if weight.ndim != 2:
        raise ValueError(
            f"weight must have shape (N, K); got {weight.shape} (map over stacked weights, with a "
            f"global scale for each, with jax.vmap or jax.lax.scan)"
        )
    n, weight_k = weight.shape
    if weight_k != k:
        raise ValueError(
            f"x has K = {k} along its last axis, the weight of shape {weight.shape} "
            f"has K = {weight_k}"
        )
    rows = weight.data.shape[0] if weight.gated else n
    if weight.global_scale.shape not in ((), (rows,)):
        raise ValueError(
            f"the weight's global_scale must be a scalar or one per row, ({n},); "
            f"got shape {weight.global_scale.shape}"
        )
    return n, weight.arch if isinstance(weight, RepackedWeight) else None


def _scaling(activation_scale: ActivationScale) -> tuple[Scaling, jax.Array | None]:
    """How x is quantized, and its global scale where that is static."""
    if activation_scale is None:
        return Scaling.NONE, None
    if isinstance(activation_scale, str):
        if activation_scale not in checks.DYNAMIC:
            raise ValueError(
                f'activation_scale must be "token", "tensor", a float32 scalar or None; '
                f"got {activation_scale!r}"
            )
        return checks.DYNAMIC[activation_scale], None
    global_scale = checks.as_scale("activation_scale", activation_scale)
    if global_scale.ndim:
        raise ValueError(f"activation_scale must be a scalar; got shape {global_scale.shape}")
    return Scaling.STATIC, global_scale
