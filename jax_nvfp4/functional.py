# SPDX-License-Identifier: Apache-2.0
"""The functional API: checks what the user gave, once, and calls the operations."""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4 import numerics
from jax_nvfp4.config import ARCHES, REFERENCE
from jax_nvfp4.layout.weights import pack_weight
from jax_nvfp4.ops.device import local_arch
from jax_nvfp4.ops.linear.primitive import LinearSpec
from jax_nvfp4.ops.linear.primitive import linear as linear_op
from jax_nvfp4.ops.quantize.primitive import Mode
from jax_nvfp4.ops.quantize.primitive import quantize as quantize_op
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.tensor import FLOAT_NAMES, FLOATS, Nvfp4Tensor, RepackedWeight

Scaling = Literal["tensor", "token"]
ActivationScale = Literal["tensor", "token"] | ArrayLike | None


def _as_array(name: str, value: Any, expected: str) -> jax.Array:
    """An array; says which argument is none."""
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}: {error}") from None


def _as_float_array(name: str, value: ArrayLike, min_ndim: int) -> jax.Array:
    """An array of a dtype we take; says what is wrong with any other."""
    value = _as_array(name, value, FLOAT_NAMES)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; got {value.dtype.name}")
    if value.ndim < min_ndim:
        axes = "axis" if min_ndim == 1 else "axes"
        raise ValueError(f"{name} must have at least {min_ndim} {axes}; got shape {value.shape}")
    return value


def _as_scale(name: str, value: ArrayLike) -> jax.Array:
    """A float32 array; a Python number counts as one, and what JAX made of a Python float."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be float32; got bool")
    if isinstance(value, float | int):
        return jnp.asarray(float(value), jnp.float32)
    array = _as_array(name, value, "float32")
    from_python = array.weak_type and jnp.issubdtype(array.dtype, jnp.floating)
    if array.dtype != jnp.float32 and not from_python:
        raise TypeError(f"{name} must be float32; got {array.dtype.name}")
    return array.astype(jnp.float32)


def _dtype(name: str, value: DTypeLike) -> jnp.dtype:
    """A dtype that we compute in."""
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; {error}") from None
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; got {dtype.name}")
    return dtype


def _check_scaling(name: str, scaling: str) -> None:
    if not isinstance(scaling, str) or scaling not in ("tensor", "token"):
        raise ValueError(f'{name} must be "tensor" or "token"; got {scaling!r}')


def quantize(
    x: ArrayLike,
    *,
    scaling: Scaling = "tensor",
    global_scale: ArrayLike | None = None,
) -> Nvfp4Tensor:
    """Quantizes to NVFP4, in blocks of 16 along the last axis.

    The formula is that of `jax_nvfp4.numerics`, bit for bit on every backend. The result is
    piecewise constant in `x`: its derivative is zero.

    Args:
        x: (..., K) of any length K; bfloat16, float16 or float32.
        scaling: "tensor" for one global scale, "token" for one per row. Stacked matrices, to be
            scanned over, have one each: `jax.vmap(quantize)(x)`.
        global_scale: float32, a scalar or one per row (`x.shape[:-1]`), to use in place of a
            computed one; it multiplies on dequantization, and may be traced. A value that is not in
            [2**-110, 2**110] makes the result NaN.

    Returns:
        An Nvfp4Tensor of the shape of x. Blocks that hold a NaN or an Inf have the scale NaN.

    Raises:
        TypeError: x or global_scale has a dtype that is not taken.
        ValueError: x is a scalar, scaling has an unknown value, or the shape of global_scale is
            neither () nor that of the rows.
    """
    x = _as_float_array("x", x, min_ndim=1)
    _check_scaling("scaling", scaling)
    rows, k = x.shape[:-1], x.shape[-1]
    mode: Mode = scaling
    given = None
    if global_scale is not None:
        mode = "static"
        given = _as_scale("global_scale", global_scale)
        if given.shape not in ((), rows):
            raise ValueError(
                f"global_scale must be a scalar or have the rows of x, {rows}; "
                f"got shape {given.shape}"
            )

    parts = typed.call(
        functools.partial(quantize_op, mode=mode),
        (x, given),
        lambda: typed.quantized(x, given, scaling == "token"),
    )
    return Nvfp4Tensor(*parts, k=k, dtype=x.dtype)


def global_scale(x: ArrayLike, scaling: Scaling = "tensor") -> jax.Array:
    """The global scale that `quantize` would use; traceable.

    Args:
        x: (..., K); bfloat16, float16 or float32.
        scaling: "tensor" or "token".

    Returns:
        float32: a scalar, or one per row `x.shape[:-1]`. It multiplies on dequantization.

    Raises:
        TypeError: x has a dtype that is not taken.
        ValueError: x is a scalar, or scaling has an unknown value.
    """
    x = _as_float_array("x", x, min_ndim=1)
    _check_scaling("scaling", scaling)
    largest = numerics.amax(x, axis=-1 if scaling == "token" else None)
    return numerics.dynamic_scales(largest)[1]


def _is_weight(node: Any) -> bool:
    return isinstance(node, Nvfp4Tensor | RepackedWeight)


def repack(weight: Any, arch: str | None = None) -> Any:
    """Puts weights into the order that an architecture's GEMM reads. Do it once, at load.

    Args:
        weight: an Nvfp4Tensor (..., N, K), or any pytree with such tensors in it: a whole params
            tree. Weights that are repacked for another architecture are repacked for this one;
            other leaves are returned as they are.
        arch: "sm_90a", "sm_100f", "sm_103a", "sm_120f" or "reference"; that of this machine's
            default device if None.

    Returns:
        A RepackedWeight, or the tree with each NVFP4 weight replaced by one.

    Raises:
        TypeError: there is no NVFP4 weight in `weight`, or one whose parts have been cast.
        ValueError: the arch is unknown, a tensor has no rows axis, or its parts do not belong
            together.
    """
    arch = local_arch() if arch is None else arch
    if arch not in (*ARCHES, REFERENCE):
        raise ValueError(f"arch must be one of {', '.join((*ARCHES, REFERENCE))}; got {arch!r}")
    if not any(map(_is_weight, jax.tree.leaves(weight, is_leaf=_is_weight))):
        raise TypeError(f"there is no Nvfp4Tensor to repack in a {type(weight).__name__}")

    def one(node: Any) -> Any:
        if not _is_weight(node) or getattr(node, "arch", None) == arch:
            return node
        node.check()
        if node.ndim < 2:
            raise ValueError(f"a weight must have shape (..., N, K); got {node.shape}")
        if isinstance(node, RepackedWeight):
            node = node.canonical()
        n, k = node.shape[-2:]
        data, block_scale = typed.call(
            functools.partial(pack_weight, arch),
            (node.data, node.block_scale),
            lambda: typed.repacked(node.data, node.block_scale, arch),
        )
        return RepackedWeight(data, block_scale, node.global_scale, arch, n, k, node.dtype)

    return jax.tree.map(one, weight, is_leaf=_is_weight)


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
    if weight.global_scale.shape not in ((), (n,)):
        raise ValueError(
            f"the weight's global_scale must be a scalar or one per row, ({n},); "
            f"got shape {weight.global_scale.shape}"
        )
    return n, weight.arch if isinstance(weight, RepackedWeight) else None


def _activation(
    activation_scale: ActivationScale,
) -> tuple[Literal["tensor", "token", "static"] | None, jax.Array | None]:
    """The quantization mode of x, and the scale given for it."""
    if activation_scale is None:
        return None, None
    if isinstance(activation_scale, str):
        if activation_scale not in ("tensor", "token"):
            raise ValueError(
                f'activation_scale must be "token", "tensor", a float32 scalar or None; '
                f"got {activation_scale!r}"
            )
        return activation_scale, None
    given = _as_scale("activation_scale", activation_scale)
    if given.ndim:
        raise ValueError(f"activation_scale must be a scalar; got shape {given.shape}")
    return "static", given


def linear(
    x: ArrayLike,
    weight: Nvfp4Tensor | RepackedWeight,
    bias: ArrayLike | None = None,
    *,
    activation_scale: ActivationScale = "token",
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """A linear layer with an NVFP4 weight: `y = x @ weight.T + bias`.

    Products are exact, sums are float32, and the result is rounded once. The gradient is
    straight-through for x (`dx = dy @ dequantize(weight)`) and the sum for the bias; the weight and
    the scale are not differentiated.

    Args:
        x: (..., K); bfloat16, float16 or float32. Any leading axes, any sizes.
        weight: logical shape (N, K). A canonical tensor gives the same bits as a repacked one,
            but is repacked at every call.
        bias: (N,), bfloat16, float16 or float32.
        activation_scale: how x is quantized: "token" with a global scale for each row, "tensor"
            with one for all of x, a float32 scalar (traced or not) with that global scale, as
            from calibration or a checkpoint. None leaves x at 16 bits (weight-only): a float32
            x is then rounded to bfloat16.
        out_dtype: bfloat16, float16 or float32; x's dtype if None.
        batch_invariant: give a row of y the same bits whatever the number of rows and the
            other rows, at some cost in speed. "tensor" scaling still makes rows depend on one
            another through their common scale.

    Returns:
        (..., N) of `out_dtype`.

    Raises:
        TypeError: an argument has a type or dtype that is not taken.
        ValueError: shapes do not go together, or activation_scale has an unknown value.
    """
    x = _as_float_array("x", x, min_ndim=1)
    n, arch = _check_weight(weight, x.shape[-1])
    if bias is not None:
        bias = _as_float_array("bias", bias, min_ndim=0)
        if bias.shape != (n,):
            raise ValueError(
                f"bias must have shape ({n},) to go with a weight of shape {weight.shape}; "
                f"got {bias.shape}"
            )
    out_dtype = x.dtype if out_dtype is None else _dtype("out_dtype", out_dtype)
    mode, given = _activation(activation_scale)
    spec = LinearSpec(
        arch=arch,
        n=n,
        k=x.shape[-1],
        activation=mode,
        has_bias=bias is not None,
        out_dtype=out_dtype.name,
        batch_invariant=bool(batch_invariant),
    )
    leaves = (weight.data, weight.block_scale, weight.global_scale)
    (y,) = typed.call(
        lambda x, leaves, bias, given: (linear_op(x, leaves, bias, given, spec),),
        (x, leaves, bias, given),
        lambda: typed.multiplied(x, weight.data, n),
    )
    return y
