# SPDX-License-Identifier: Apache-2.0
"""What takes the place of `flax.nnx.LinearGeneral` and `flax.nnx.Einsum`."""

from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from jax_nvfp4 import _layer, numerics
from jax_nvfp4.nnx.variables import QuantStat, arrays, quantized_kernel, variables
from jax_nvfp4.products.api import einsum_with_bias, linear_general
from jax_nvfp4.products.contraction import How
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.search import Search


class General(nnx.Module):
    """The layer in place of a general one: its fields, its bias, and its kernel in NVFP4.

    `kernel` is an Nvfp4Kernel of the shape of the dense kernel, with a QuantizedParam for each
    part. Calibration is that of Nvfp4Linear.
    """

    _COPIED: ClassVar[tuple[str, ...]] = ()
    _OWN_PRODUCT: ClassVar[dict[str, Any]] = {}
    dtype: Any
    preferred_element_type: Any

    def __init__(
        self,
        layer: Any,
        contracting: tuple[int, ...],
        batch: tuple[int, ...],
        *,
        activation_scale: _layer.LayerActivationScale = "token",
        batch_invariant: bool = False,
        search: Search | None = None,
    ) -> None:
        own = {
            field: getattr(layer, field)
            for field, usual in self._OWN_PRODUCT.items()
            if getattr(layer, field) is not usual
        }
        _layer.check_fields(type(self).__name__, activation_scale, layer.param_dtype, **own)
        self.kernel = nnx.data(quantized_kernel(layer.kernel, contracting, batch, search))
        self.bias: Any = nnx.data(None) if layer.bias is None else layer.bias
        for field in (*self._COPIED, "dtype", "param_dtype", "precision", "preferred_element_type"):
            setattr(self, field, getattr(layer, field))
        self.activation_scale = activation_scale
        self.batch_invariant = batch_invariant
        self.calibrating = False
        static = activation_scale == "static"
        self.input_amax: Any = QuantStat(jnp.zeros((), jnp.float32)) if static else nnx.data(None)
        self.input_scale: Any = QuantStat(jnp.ones((), jnp.float32)) if static else nnx.data(None)

    def __setattr__(self, name: str, value: Any) -> None:
        is_weight = isinstance(value, Nvfp4Kernel)
        # One of variables is another layer's, and shared, as a Param would be.
        if name == "kernel" and is_weight and not isinstance(value.weight.data, nnx.Variable):
            old = self.kernel.weight.data
            metadata = old.get_metadata() if isinstance(old, nnx.Variable) else {}
            # Axis names are those of canonical weights, and the weight lies where it belongs.
            metadata.pop("out_sharding", None)
            value = nnx.data(variables(arrays(value), metadata, placed=True))
        super().__setattr__(name, value)

    def _prepared(self, inputs: Any) -> tuple[jax.Array, Any, jax.Array | None, How]:
        """The inputs as they are quantized, the kernel, the bias, and how to multiply."""
        kernel = arrays(self.kernel)
        bias = None if self.bias is None else self.bias[...]
        inputs, compute = _layer.cast_inputs(
            type(self).__name__, jnp.asarray(inputs), self.dtype, kernel.dtype, bias
        )
        scale: Any = self.activation_scale
        if scale == "static":
            if self.calibrating:
                amax = jnp.maximum(self.input_amax[...], numerics.amax(inputs))
                self.input_amax[...] = amax
                self.input_scale[...] = numerics.dynamic_scales(amax)[1]
            scale = self.input_scale[...]
        how = How(scale, self.batch_invariant, self.preferred_element_type or compute)
        return inputs, kernel, bias, how


class Nvfp4LinearGeneral(General):
    """A `flax.nnx.LinearGeneral` with an NVFP4 kernel; made by `quantize_model`."""

    axis: tuple[int, ...]
    batch_axis: Mapping[int, int]
    _COPIED = ("in_features", "out_features", "axis", "batch_axis", "use_bias")
    _OWN_PRODUCT: ClassVar[dict[str, Any]] = {
        "dot_general": None,
        "dot_general_cls": None,
        "promote_dtype": nnx.nn.dtypes.promote_dtype,
    }

    @classmethod
    def from_layer(cls, layer: nnx.LinearGeneral, **fields: Any) -> "Nvfp4LinearGeneral":
        """Quantizes the kernel of a layer.

        Args:
            layer: its bias variable is shared, not copied.
            **fields: activation_scale, batch_invariant and search of the new layer.

        Raises:
            ValueError: the layer has a product or a promotion of its own.
        """
        batch = len(layer.batch_axis)
        contracting = range(batch, batch + len(layer.in_features))
        return cls(layer, tuple(contracting), tuple(range(batch)), **fields)

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer along the axes `axis`.

        Args:
            inputs: as of `flax.nnx.LinearGeneral`.
            out_sharding: of the result, on a mesh with explicit axes.
        """
        inputs, kernel, bias, how = self._prepared(inputs)
        axis = tuple(a % inputs.ndim for a in self.axis)
        batch = tuple(a % inputs.ndim for a in self.batch_axis)
        y = linear_general(inputs, kernel, bias, axis, batch, how)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


class Nvfp4Einsum(General):
    """A `flax.nnx.Einsum` with an NVFP4 kernel; made by `quantize_model`."""

    einsum_str: str
    _COPIED = ("einsum_str", "kernel_shape", "bias_shape")
    _OWN_PRODUCT: ClassVar[dict[str, Any]] = {
        "einsum_op": jnp.einsum,
        "promote_dtype": nnx.nn.dtypes.promote_dtype,
    }

    @classmethod
    def from_layer(cls, layer: nnx.Einsum, **fields: Any) -> "Nvfp4Einsum":
        """Quantizes the kernel of a layer.

        Args:
            layer: its bias variable is shared, not copied.
            **fields: activation_scale, batch_invariant and search of the new layer.

        Raises:
            ValueError: the layer has a product or a promotion of its own, or its `einsum_str` does
                not say which axes of the kernel are contracted.
        """
        return cls(layer, *_einsum_axes(layer), **fields)

    def __call__(
        self, inputs: jax.Array, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Multiplies the inputs and the kernel.

        Args:
            inputs: as of `flax.nnx.Einsum`.
            einsum_str: must be None: the kernel was quantized for the layer's own.
            out_sharding: of the result, on a mesh with explicit axes.
        """
        if einsum_str is not None:
            raise ValueError(
                f"the kernel of Nvfp4Einsum was quantized for {self.einsum_str!r}; "
                f"got einsum_str={einsum_str!r}"
            )
        inputs, kernel, bias, how = self._prepared(inputs)
        y = einsum_with_bias(self.einsum_str, (inputs, kernel), bias, how)
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)


def _einsum_axes(layer: nnx.Einsum) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of an Einsum's kernel that are contracted, and those of stacked matrices."""
    if layer.einsum_str is None:
        raise ValueError("its einsum_str is given when it is called")
    operands, result = layer.einsum_str.split("->")
    of_inputs, of_kernel = operands.split(",")
    if "..." in of_kernel or len(set(of_kernel)) != len(layer.kernel_shape):
        raise ValueError(f"its einsum_str {layer.einsum_str!r} has no subscript for each axis")
    shared = [(i, label) for i, label in enumerate(of_kernel) if label in of_inputs]
    contracting = tuple(i for i, label in shared if label not in result)
    if not contracting:
        raise ValueError(f"its einsum_str {layer.einsum_str!r} contracts no axis")
    return contracting, tuple(i for i, label in shared if label in result)
