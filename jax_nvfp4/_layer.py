# SPDX-License-Identifier: Apache-2.0
"""What the linen and the nnx layer share: what they take, and dtypes."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

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
