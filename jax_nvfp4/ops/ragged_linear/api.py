# SPDX-License-Identifier: Apache-2.0
"""The public `ragged_linear`: checks what the user gave, once, and runs the operation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4 import activations
from jax_nvfp4.activations import Activation
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.linear.spec import LinearSpec
from jax_nvfp4.ops.ragged_linear import primitive
from jax_nvfp4.ops.ragged_linear.sharding import placement
from jax_nvfp4.ops.ragged_linear.spec import Operands, RaggedSpec
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


def ragged_linear(
    x: ArrayLike,
    weight: Nvfp4Tensor | RepackedWeight,
    group_sizes: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    group_offset: ArrayLike | None = None,
    activation: Activation | None = None,
    activation_scale: ActivationScale = "token",
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """Multiplies rows, sorted by group, by the NVFP4 weight of their group.

    As `jax.lax.ragged_dot`, with weights (G, N, K) and the epilogue of `linear`: the first
    `group_sizes[0]` rows of y are `activation(x @ weight[0].T + bias[0])`, and so on. Rows beyond
    the sum of the sizes are zero. Empty groups cost nothing, and nothing of their weights is read.

    With `batch_invariant`, and any scaling but "tensor", the rows of a group have the bits that
    `linear` gives them with the group's weight, batch-invariant too. The gradient is
    straight-through for x, and for each group's bias the sum over its rows; weights, sizes and
    scales are not differentiated.

    Args:
        x: (M, K), sorted by group; bfloat16, float16 or float32.
        weight: (G, N, K), with global scales () or (G,), or one for each row (G, N).
        group_sizes: integers (G,), traced or not. Negative ones count as 0, and what goes beyond M
            is cut.
        bias: (G, N), bfloat16, float16 or float32; added before the activation.
        group_offset: integer () or (1,), traced or not: the weight and the bias are those of groups
            `group_offset` to `group_offset + G` of the sizes, of which there may be more or fewer.
            Rows of other groups are zero, so that the sum over devices of what each makes of its
            groups is the whole (`jax.lax.psum`).
        activation: as of `linear`.
        activation_scale: as of `linear`. "tensor" is one scale for the rows of all groups; a static
            one is a float32 scalar or one for each group of the weight, (G,).
        out_dtype: bfloat16, float16 or float32; x's dtype if None.
        batch_invariant: as of `linear`: a row of y then has the same bits whatever the other rows
            and the sizes.

    Returns:
        (M, N) of `out_dtype`; (M, N/2) with a gated activation.

    Raises:
        TypeError: an argument has a type or dtype that is not taken.
        ValueError: shapes do not go together, the weight is of another kind than the activation,
            or activation or activation_scale has an unknown value.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (M, K), rows sorted by group; got {x.shape}")
    arch, w_scale = _check_weight(weight, x.shape[1])
    groups, n, k = weight.shape
    activations.check(activation, gated=weight.gated)
    sizes = checks.as_integers("group_sizes", group_sizes)
    if sizes.ndim != 1 or (group_offset is None and sizes.shape != (groups,)):
        raise ValueError(
            f"group_sizes must have shape ({groups},), one for each group of a weight of shape "
            f"{weight.shape} (more, with group_offset); got {sizes.shape}"
        )
    offset = None
    if group_offset is not None:
        offset = checks.as_integers("group_offset", group_offset)
        if offset.shape not in ((), (1,)):
            raise ValueError(f"group_offset must have shape () or (1,); got {offset.shape}")
    if bias is not None:
        bias = checks.as_float_array("bias", bias, min_ndim=0)
        if bias.shape != (groups, n):
            raise ValueError(
                f"bias must have shape {(groups, n)} to go with a weight of shape {weight.shape}; "
                f"got {bias.shape}"
            )
    dtype = x.dtype if out_dtype is None else checks.float_dtype("out_dtype", out_dtype)
    scaling, scale = _scaling(activation_scale, groups)
    each = LinearSpec(
        arch=arch,
        n=n,
        k=k,
        scaling=scaling,
        has_bias=bias is not None,
        out_dtype=dtype.name,
        batch_invariant=bool(batch_invariant),
        gated=weight.gated,
        activation=activation,
    )
    spec = RaggedSpec(each, groups, has_offset=offset is not None)
    operands = Operands(x, weight.data, weight.block_scale, w_scale, sizes, offset, bias, scale)
    (y,) = typed.call(
        lambda operands: (_product(operands, spec),),
        (operands,),
        lambda: placement(x, weight.data, spec),
    )
    return y


def _product(operands: Operands, spec: RaggedSpec) -> jax.Array:
    """The operation on operands as the user gave them."""
    bias, offset = operands.bias, operands.offset
    if spec.each.gated and bias is not None:
        bias = bias.reshape(spec.groups, 2, spec.each.n // 2)
    if offset is not None:
        offset = offset.reshape(())
    y = primitive.ragged_linear(operands._replace(bias=bias, offset=offset), spec)
    return y.reshape(operands.x.shape[0], math.prod(spec.each.columns))


def _check_weight(weight: Nvfp4Tensor | RepackedWeight, k: int) -> tuple[str | None, jax.Array]:
    """The arch and the global scales of a weight, once it is known to go with x of length k."""
    if not isinstance(weight, Nvfp4Tensor | RepackedWeight):
        raise TypeError(
            f"weight must be an Nvfp4Tensor or a RepackedWeight; got {type(weight).__name__}"
        )
    weight.check()
    if weight.ndim != 3:
        raise ValueError(f"weight must have shape (G, N, K); got {weight.shape}")
    groups, _, weight_k = weight.shape
    if weight_k != k:
        raise ValueError(
            f"x has K = {k} along its last axis, the weight of shape {weight.shape} "
            f"has K = {weight_k}"
        )
    scale = weight.global_scale
    if not scale.ndim:
        scale = jnp.broadcast_to(scale, (groups,))
    return weight.arch if isinstance(weight, RepackedWeight) else None, scale


def _scaling(activation_scale: ActivationScale, groups: int) -> tuple[Scaling, Any]:
    """How x is quantized, and its global scale or scales where these are static."""
    if activation_scale is None:
        return Scaling.NONE, None
    if isinstance(activation_scale, str):
        if activation_scale not in checks.DYNAMIC:
            raise ValueError(
                f'activation_scale must be "token", "tensor", float32 of shape () or ({groups},), '
                f"or None; got {activation_scale!r}"
            )
        return checks.DYNAMIC[activation_scale], None
    scale = checks.as_scale("activation_scale", activation_scale)
    if scale.shape not in ((), (groups,)):
        raise ValueError(
            f"activation_scale must be a scalar or one for each group, ({groups},); "
            f"got shape {scale.shape}"
        )
    return Scaling.STATIC, scale
