# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Linear, in place of `flax.nnx.Linear`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jax_nvfp4 import _layer, numerics
from jax_nvfp4.nnx.variables import QuantStat, arrays, quantized, variables
from jax_nvfp4.ops.linear.api import linear
from jax_nvfp4.search import Search
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


class Nvfp4Linear(nnx.Module):
    """A drop-in for `flax.nnx.Linear` with an NVFP4 kernel.

    `kernel` is an Nvfp4Tensor or RepackedWeight of logical shape (out_features, in_features) with a
    QuantizedParam for each part; `bias` is an `nnx.Param`. `quantize_model` swaps the Linear layers
    of a model for this one, `repack_model` repacks their kernels.

    A weight that is assigned to `kernel`, such as one of a checkpoint, becomes variables likewise,
    with the metadata of those before it. The layer, or a whole model, may be abstract
    (`nnx.eval_shape`): then nothing is computed before that.

    Layers may be stacked, by `nnx.vmap`, and applied by `nnx.scan`: everything has the same leading
    axis then. State axes must map it all: `nnx.StateAxes({(nnx.Param, QuantizedParam, QuantStat):
    0, ...: None})`.

    With `activation_scale="static"` the layer reads its QuantStat `input_scale`; while
    `calibrating` is True it keeps the running amax of its inputs in `input_amax` and the scale that
    follows from it in `input_scale`. Switch it for a whole model with
    `model.set_attributes(calibrating=True)`. Before any calibration the scale is 1, which suits
    inputs up to 2688.

    Args:
        in_features: input features, K.
        out_features: output features, N.
        use_bias: whether to add a bias.
        dtype: of the computation and the output; None: what the inputs and the params, as they are,
            promote to (the kernel's `dtype` is that which it was quantized from).
        param_dtype: of the bias, and of the kernel before it is quantized.
        precision: no effect: products are exact and sums float32.
        kernel_init: initializer of the (in_features, out_features) kernel that is then quantized.
        bias_init: initializer of the bias.
        dot_general: must be None; so must promote_dtype.
        promote_dtype: as above.
        preferred_element_type: dtype of the output; that of the computation if None.
        activation_scale: "token", "tensor", "static" or None, as in `jax_nvfp4.linear`.
        batch_invariant: as in `jax_nvfp4.linear`.
        search: how the kernel's block scales are chosen, as in `jax_nvfp4.quantize`.
        rngs: streams for the initializers.
        kernel_metadata: metadata of the kernel's variable, axis names in the order (in, out).
        bias_metadata: metadata of the bias's variable.

    Raises:
        ValueError: a field has a value that the layer cannot honor.
        TypeError: a param_dtype that cannot be quantized.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = nnx.nn.linear.default_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        dot_general: Any = None,
        promote_dtype: Any = None,
        preferred_element_type: Dtype | None = None,
        activation_scale: _layer.LayerActivationScale = "token",
        batch_invariant: bool = False,
        search: Search | None = None,
        rngs: nnx.Rngs,
        kernel_metadata: Mapping[str, Any] = MappingProxyType({}),
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        _layer.check_fields(
            "Nvfp4Linear",
            activation_scale,
            param_dtype,
            dot_general=dot_general,
            promote_dtype=promote_dtype,
        )
        # As a Param, an initializer's metadata (of nnx.with_partitioning) joins the rest.
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        if not isinstance(kernel, nnx.Variable):
            kernel = nnx.Param(kernel, **kernel_metadata)
        *stacked, _, _ = kernel.get_value().shape
        self.kernel: Any = nnx.data(quantized(kernel, search))
        self.bias: Any = nnx.data(None)
        if use_bias:
            bias = bias_init(rngs.params(), (out_features,), param_dtype)
            self.bias = nnx.Param(bias, **bias_metadata)
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.preferred_element_type = preferred_element_type
        self.activation_scale = activation_scale
        self.batch_invariant = batch_invariant
        self.calibrating = False
        self.input_amax: Any = nnx.data(None)
        self.input_scale: Any = nnx.data(None)
        if activation_scale == "static":
            self.input_amax = QuantStat(jnp.zeros(stacked, jnp.float32))
            self.input_scale = QuantStat(jnp.ones(stacked, jnp.float32))

    def __setattr__(self, name: str, value: Any) -> None:
        is_weight = isinstance(value, Nvfp4Tensor | RepackedWeight)
        # One of variables is another layer's, and shared, as a Param would be.
        if name == "kernel" and is_weight and not isinstance(value.data, nnx.Variable):
            old = self.kernel.data
            metadata = old.get_metadata() if isinstance(old, nnx.Variable) else {}
            names = metadata.pop("out_sharding", None)
            if isinstance(value, RepackedWeight):
                names = None  # those of canonical weights say nothing of its axes
            value = nnx.data(variables(arrays(value), metadata, names, placed=True))
        super().__setattr__(name, value)

    @classmethod
    def from_linear(cls, linear: nnx.Linear, **fields: Any) -> "Nvfp4Linear":
        """Quantizes the kernel of an `nnx.Linear`.

        Args:
            linear: the layer, abstract or stacked too; its bias variable is shared, not copied.
            **fields: activation_scale, batch_invariant and search of the new layer.

        Returns:
            The new layer.

        Raises:
            ValueError: the layer has a dot_general or promote_dtype of its own, or its kernel has
                other axes than (..., in_features, out_features).
        """
        if linear.kernel.shape[-2:] != (linear.in_features, linear.out_features):
            raise ValueError(
                f"the kernel of a Linear, stacked or not, must have shape (..., in_features, "
                f"out_features) = (..., {linear.in_features}, {linear.out_features}); got "
                f"{linear.kernel.shape}"
            )
        own_product = linear.dot_general is not jax.lax.dot_general
        own_promotion = linear.promote_dtype is not nnx.nn.dtypes.promote_dtype
        layer = cls(
            linear.in_features,
            linear.out_features,
            use_bias=False,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
            kernel_init=lambda *_: linear.kernel,
            dot_general=linear.dot_general if own_product else None,
            promote_dtype=linear.promote_dtype if own_promotion else None,
            preferred_element_type=linear.preferred_element_type,
            rngs=nnx.Rngs(0),
            **fields,
        )
        if linear.bias is not None:
            layer.bias, layer.use_bias = linear.bias, True
        return layer

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Applies the layer along the last axis.

        Args:
            inputs: (..., in_features).
            out_sharding: of the result, on a mesh with explicit axes: a PartitionSpec or a
                NamedSharding. None: with the rows of the inputs and those of the weight.

        Returns:
            (..., out_features).

        Raises:
            TypeError: the kernel is not an NVFP4 weight, or a dtype is not one we compute in.
            ValueError: shapes do not go together.
        """
        inputs = jnp.asarray(inputs)
        kernel = arrays(self.kernel)
        bias = None if self.bias is None else self.bias[...]
        statistics = () if self.input_scale is None else (self.input_amax, self.input_scale)
        if getattr(kernel, "ndim", 2) > 2 or any(s[...].ndim for s in statistics):
            raise ValueError(
                f"this Nvfp4Linear is a stack, with a kernel of shape {kernel.shape}: apply it by "
                f"nnx.scan or nnx.vmap, and map all of it: in nnx.StateAxes, QuantizedParam and "
                f"QuantStat as well as nnx.Param"
            )
        kernel = _layer.as_weight("Nvfp4Linear", kernel, self.out_features, self.in_features)
        inputs, compute = _layer.cast_inputs("Nvfp4Linear", inputs, self.dtype, kernel.dtype, bias)
        scale: Any = self.activation_scale
        if scale == "static":
            if self.calibrating:
                amax = jnp.maximum(self.input_amax[...], numerics.amax(inputs))
                self.input_amax[...] = amax
                self.input_scale[...] = numerics.dynamic_scales(amax)[1]
            scale = self.input_scale[...]
        y = linear(
            inputs,
            kernel,
            bias,
            activation_scale=scale,
            out_dtype=self.preferred_element_type or compute,
            batch_invariant=self.batch_invariant,
        )
        return y if out_sharding is None else jax.sharding.reshard(y, out_sharding)
