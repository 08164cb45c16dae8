# SPDX-License-Identifier: Apache-2.0
"""What the linen and the nnx layer share: what they take, and dtypes."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_nvfp4.activations import SwiGLU
from jax_nvfp4.ops.expert_mlp.api import expert_mlp
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.tensor import FLOAT_NAMES, FLOATS, Nvfp4Tensor, RepackedWeight

LayerActivationScale = Literal["token", "tensor", "static"] | None


def check_fields(layer: str, activation_scale: Any, param_dtype: Any, **products: Any) -> None:
    """Refuses field values that the layer could not honor.

    Args:
        layer: its name.
        activation_scale: the field.
        param_dtype: the field.
        **products: fields by which Flax's own layers let the user change the product.

    Raises:
        ValueError: an unknown activation_scale, or a product of the user's own.
        TypeError: a param_dtype that cannot be quantized.
    """
    if activation_scale not in ("token", "tensor", "static", None):
        raise ValueError(
            f'{layer}.activation_scale must be "token", "tensor", "static" or None; '
            f"got {activation_scale!r}"
        )
    for name, value in products.items():
        if value is not None:
            raise ValueError(f"{layer} has its own product: {name} must be None")
    dtype = jax.dtypes.canonicalize_dtype(param_dtype)
    if dtype not in FLOATS:
        raise TypeError(f"{layer}.param_dtype must be {FLOAT_NAMES}; got {dtype.name}")


def as_weight(layer: str, kernel: Any, features: int, k: int) -> Nvfp4Tensor | RepackedWeight:
    """The weight (features, k) of a layer's kernel; refuses one that the layer cannot use.

    Args:
        layer: its name.
        kernel: a weight (features, k), or an Nvfp4Kernel (k, features), as the dense kernel is.
        features: of the layer.
        k: its inputs.

    Raises:
        TypeError: the kernel is not an NVFP4 weight.
        ValueError: it has another shape.
    """
    if isinstance(kernel, Nvfp4Kernel) and kernel.contracting == (0,):
        kernel = kernel.weight
    if not isinstance(kernel, Nvfp4Tensor | RepackedWeight):
        raise TypeError(
            f"the kernel of {layer} must be an Nvfp4Tensor or a RepackedWeight; got "
            f"{type(kernel).__name__} (jax_nvfp4.quantize_params turns the params of a Dense model "
            f"into NVFP4)"
        )
    if kernel.shape != (features, k):
        raise ValueError(
            f"the kernel of {layer} must have shape (features, inputs) = {(features, k)}; "
            f"got {kernel.shape}"
        )
    return kernel


def cast_inputs(
    layer: str,
    inputs: jax.Array,
    dtype: DTypeLike | None,
    *of_params: Any,
) -> tuple[jax.Array, jnp.dtype]:
    """The inputs as they are quantized, and the compute dtype, by the rules of Flax's dense layers.

    The compute dtype is `dtype` or, where that is None, what the inputs and the params, as they
    are, promote to. Inputs are rounded to it unless that would widen them: they would only lose the
    fact that they are 16 bits wide.

    Args:
        layer: its name.
        inputs: of the layer.
        dtype: the field.
        *of_params: the params or their dtypes; None for one that is not there.

    Raises:
        TypeError: the compute dtype is another than bfloat16, float16 and float32.
    """
    of_params = tuple(param for param in of_params if param is not None)
    compute = jnp.dtype(jnp.result_type(inputs, *of_params) if dtype is None else dtype)
    if compute not in FLOATS:
        raise TypeError(
            f"{layer} computes in {FLOAT_NAMES}; its dtype {dtype}, inputs of "
            f"{inputs.dtype.name} and params of param_dtype {jnp.result_type(*of_params).name} ask "
            f"for {compute.name}"
        )
    narrow = inputs.dtype in (jnp.bfloat16, jnp.float16)
    if not (narrow and compute == jnp.float32):
        inputs = inputs.astype(compute)
    return inputs, compute


SWIGLU = SwiGLU()
"""The activation of most models' experts."""

expert_kernel_init = jax.nn.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", batch_axis=(0,)
)
"""Of the kernels (E, in, out) of experts: what Flax's dense layers start from, for each expert."""


def check_experts(layer: str, activation_scale: Any, hidden_scale: Any, param_dtype: Any) -> None:
    """Refuses fields of a layer of experts that it could not honor.

    Raises:
        ValueError: an unknown scaling. Static scales, one for each expert, are for `expert_mlp`.
        TypeError: a param_dtype that cannot be quantized.
    """
    for name, scale in (("activation_scale", activation_scale), ("hidden_scale", hidden_scale)):
        if scale not in ("token", "tensor", None):
            raise ValueError(f'{layer}.{name} must be "token", "tensor" or None; got {scale!r}')
    dtype = jax.dtypes.canonicalize_dtype(param_dtype)
    if dtype not in FLOATS:
        raise TypeError(f"{layer}.param_dtype must be {FLOAT_NAMES}; got {dtype.name}")


def apply_experts(
    layer: Any,
    inputs: jax.Array,
    indices: jax.Array,
    weights: jax.Array,
    kernels: tuple[Any, Any],
    biases: tuple[Any, Any],
) -> jax.Array:
    """What the layers of experts do, for inputs with any leading axes.

    Args:
        layer: with the fields that both kinds have.
        inputs: (..., K).
        indices: integers (..., top_k).
        weights: (..., top_k).
        kernels: w13 and w2.
        biases: b13 and b2, or None for each.

    Returns:
        (..., K).
    """
    of_params = (*(kernel.dtype for kernel in kernels), *biases)
    inputs, compute = cast_inputs(type(layer).__name__, inputs, layer.dtype, *of_params)
    indices, weights = jnp.asarray(indices), jnp.asarray(weights)
    *lead, k = inputs.shape
    rows = math.prod(lead)
    if indices.shape[:-1] != tuple(lead) or not indices.ndim:
        raise ValueError(
            f"expert_indices must have shape {(*lead, 'top_k')} to go with inputs of shape "
            f"{inputs.shape}; got {indices.shape}"
        )
    y = expert_mlp(
        inputs.reshape(rows, k),
        *kernels,
        indices.reshape(rows, indices.shape[-1]),
        weights.reshape(rows, weights.shape[-1]),
        *biases,
        activation=layer.activation,
        activation_scale=layer.activation_scale,
        hidden_scale=layer.hidden_scale,
        out_dtype=compute,
        batch_invariant=layer.batch_invariant,
    )
    return y.reshape(*lead, k)
