# SPDX-License-Identifier: Apache-2.0
"""Unmodified linen models on NVFP4 kernels: what Flax's own layers then compute."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta

from jax_nvfp4 import _layer
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.products.api import einsum_with_bias, linear_general
from jax_nvfp4.products.contraction import How
from jax_nvfp4.products.kernel import Nvfp4Kernel, as_kernel
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


@contextlib.contextmanager
def intercept(
    activation_scale: ActivationScale = "token", *, batch_invariant: bool = False
) -> Iterator[None]:
    """A context in which linen models, as they are, apply to params with NVFP4 kernels.

    A `flax.linen.Dense`, `DenseGeneral` or `Einsum` whose `kernel` is an NVFP4 weight, as
    `jax_nvfp4.quantize_params` or `quantize_kernel` makes it, multiplies with it; layers with dense
    kernels, and all other modules, stay what they are. So do layers that are initialized.

    >>> with jax_nvfp4.linen.intercept():
    ...     y = model.apply({"params": quantized}, x)

    It acts while the model is traced, in this thread: a `jax.jit` must be called for the first time
    within it, or it must stand inside of the function.

    Args:
        activation_scale: how the inputs of these layers are quantized, as of `jax_nvfp4.linear`.
        batch_invariant: as of `jax_nvfp4.linear`.

    Raises:
        ValueError: while a model is applied, a layer with an NVFP4 kernel has a product or a
            promotion of its own, or the kernel does not go with the layer.
    """

    def interceptor(next_function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer = _LAYERS.get(getattr(context.orig_method, "func", None))
        module = context.module
        kernel = _nvfp4_kernel(module) if layer is not None else None
        if layer is None or kernel is None:
            return next_function(*args, **kwargs)
        return layer(module, kernel, How(activation_scale, batch_invariant), *args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def _nvfp4_kernel(module: nn.Module) -> Nvfp4Kernel | None:
    """The kernel of a module in the shape of its dense kernel, if it is an NVFP4 weight."""
    if not module.has_variable("params", "kernel"):
        return None
    weight = meta.unbox(module.get_variable("params", "kernel"))
    if isinstance(weight, Nvfp4Tensor | RepackedWeight):  # a Dense kernel (in, out), transposed
        kernel = as_kernel(weight)
        assert kernel is not None
        return kernel.transpose(*range(kernel.ndim - 2), -1, -2)
    return weight if isinstance(weight, Nvfp4Kernel) else None


def _prepared(
    module: Any, kernel: Nvfp4Kernel, inputs: Any, how: How
) -> tuple[jax.Array, jax.Array | None, How]:
    """The inputs and the bias of a layer, and its product with the dtype of the layer's result."""
    name = f"{type(module).__name__} {'/'.join(module.path)!r}"
    if module.promote_dtype is not nn.dtypes.promote_dtype:
        raise ValueError(f"{name} has a promote_dtype of its own, and its kernel is in NVFP4")
    for field in ("dot_general", "dot_general_cls"):
        if getattr(module, field, None) is not None:
            raise ValueError(f"{name} has a {field} of its own, and its kernel is in NVFP4")
    bias = meta.unbox(module.get_variable("params", "bias")) if module.use_bias else None
    inputs, compute = _layer.cast_inputs(
        name, jnp.asarray(inputs), module.dtype, kernel.dtype, bias
    )
    preferred = getattr(module, "preferred_element_type", None)
    return inputs, bias, How(how.activation_scale, how.batch_invariant, preferred or compute)


def _check_features(module: Any, kernel: Nvfp4Kernel, expected: tuple[int, ...]) -> None:
    """Refuses a kernel whose features are not the layer's."""
    found = kernel.shape[kernel.ndim - len(expected) :]
    if found != expected:
        raise ValueError(
            f"the kernel of {type(module).__name__} {'/'.join(module.path)!r} must have the "
            f"features {expected}; got {found} (shape {kernel.shape})"
        )


def _dense(module: Any, kernel: Nvfp4Kernel, how: How, inputs: Any) -> jax.Array:
    inputs, bias, how = _prepared(module, kernel, inputs, how)
    _check_features(module, kernel, (module.features,))
    return linear_general(inputs, kernel, bias, (inputs.ndim - 1,), (), how)


def _dense_general(module: Any, kernel: Nvfp4Kernel, how: How, inputs: Any) -> jax.Array:
    inputs, bias, how = _prepared(module, kernel, inputs, how)
    features, axis, batch = map(_tuple, (module.features, module.axis, module.batch_dims))
    _check_features(module, kernel, features)
    axis, batch = (tuple(a % inputs.ndim for a in axes) for axes in (axis, batch))
    return linear_general(inputs, kernel, bias, axis, batch, how)


def _einsum(
    module: Any, kernel: Nvfp4Kernel, how: How, inputs: Any, einsum_str: str | None = None
) -> jax.Array:
    inputs, bias, how = _prepared(module, kernel, inputs, how)
    _check_features(module, kernel, tuple(module.shape))
    subscripts = nn.merge_param("einsum_str", module.einsum_str, einsum_str)
    return einsum_with_bias(subscripts, (inputs, kernel), bias, how)


def _tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


# By the functions that Flax wraps: a subclass with a call of its own is another layer, and yet
# meets the same function where it calls that of its base.
_LAYERS: dict[Any, Callable[..., jax.Array]] = {
    inspect.unwrap(nn.Dense.__call__): _dense,
    inspect.unwrap(nn.DenseGeneral.__call__): _dense_general,
    inspect.unwrap(nn.Einsum.__call__): _einsum,
}
