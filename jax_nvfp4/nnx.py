# SPDX-License-Identifier: Apache-2.0
"""The Flax nnx layer, and the swap of a model's Linear layers."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jax_nvfp4 import _layer, numerics, params
from jax_nvfp4.ops.linear.api import linear
from jax_nvfp4.ops.repack import repack
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


class QuantizedParam(nnx.Variable[jax.Array]):
    """A part of an NVFP4 kernel. Not an `nnx.Param`: `nnx.grad` must not differentiate codes."""


class QuantStat(nnx.Variable[jax.Array]):
    """A static activation scale, or the running amax that it follows from."""


def _variables(weight: Nvfp4Tensor | RepackedWeight, metadata: Mapping[str, Any]) -> Any:
    """A weight with a variable for each part.

    Args:
        weight: with arrays as parts.
        metadata: of a kernel variable (in, out); its axis names are transposed for the codes and
            the block scales and left out for the global scale.
    """
    names = metadata.get("out_sharding")
    rest = {name: value for name, value in metadata.items() if name != "out_sharding"}

    def variable(path: Any, part: jax.Array) -> QuantizedParam:
        if names is None or path[-1].name == "global_scale":
            return QuantizedParam(part, **rest)
        return QuantizedParam(part, out_sharding=tuple(reversed(names)), **rest)

    return jax.tree_util.tree_map_with_path(variable, weight)


def _arrays(weight: Any) -> Any:
    """The inverse of `_variables`, metadata aside."""
    return jax.tree.map(
        lambda part: part[...], weight, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )


class Nvfp4Linear(nnx.Module):
    """A drop-in for `flax.nnx.Linear` with an NVFP4 kernel.

    `kernel` is an Nvfp4Tensor or RepackedWeight of logical shape (out_features, in_features) with a
    QuantizedParam for each part; `bias` is an `nnx.Param`. `quantize_model` swaps the Linear layers
    of a model for this one, `repack_model` repacks their kernels.

    With `activation_scale="static"` the layer reads its QuantStat `input_scale`; while
    `calibrating` is True it keeps the running amax of its inputs in `input_amax` and the scale that
    follows from it in `input_scale`. Switch it for a whole model with
    `model.set_attributes(calibrating=True)`. Before any calibration the scale is 1, which suits
    inputs up to 2688.

    Args:
        in_features: input features, K.
        out_features: output features, N.
        use_bias: whether to add a bias.
        dtype: of the computation and the output; None: what inputs and `param_dtype` promote to.
        param_dtype: of the bias, and of the kernel before it is quantized.
        precision: no effect: products are exact and sums float32.
        kernel_init: initializer of the (in_features, out_features) kernel that is then quantized.
        bias_init: initializer of the bias.
        dot_general: must be None; so must promote_dtype.
        promote_dtype: as above.
        preferred_element_type: dtype of the output; that of the computation if None.
        activation_scale: "token", "tensor", "static" or None, as in `jax_nvfp4.linear`.
        batch_invariant: as in `jax_nvfp4.linear`.
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
        kernel = nnx.Param(
            kernel_init(rngs.params(), (in_features, out_features), param_dtype), **kernel_metadata
        )
        weight = params.quantize_kernel(kernel[...])
        self.kernel = nnx.data(_variables(weight, kernel.get_metadata()))
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
        static = activation_scale == "static"
        self.input_amax: Any = QuantStat(jnp.zeros((), jnp.float32)) if static else nnx.data(None)
        self.input_scale: Any = QuantStat(jnp.ones((), jnp.float32)) if static else nnx.data(None)

    @classmethod
    def from_linear(cls, linear: nnx.Linear, **fields: Any) -> "Nvfp4Linear":
        """Quantizes the kernel of an `nnx.Linear`.

        Args:
            linear: the layer; its bias variable is shared, not copied.
            **fields: activation_scale and batch_invariant of the new layer.

        Returns:
            The new layer.

        Raises:
            ValueError: the layer has a dot_general or promote_dtype of its own.
        """
        own_product = linear.dot_general is not jax.lax.dot_general
        own_promotion = linear.promote_dtype is not nnx.nn.dtypes.promote_dtype
        layer = cls(
            linear.in_features,
            linear.out_features,
            use_bias=False,
            dtype=linear.dtype,
            param_dtype=linear.param_dtype,
            precision=linear.precision,
            kernel_init=lambda *_: linear.kernel[...],
            dot_general=linear.dot_general if own_product else None,
            promote_dtype=linear.promote_dtype if own_promotion else None,
            preferred_element_type=linear.preferred_element_type,
            rngs=nnx.Rngs(0),
            kernel_metadata=linear.kernel.get_metadata(),
            **fields,
        )
        if linear.bias is not None:
            layer.bias, layer.use_bias = linear.bias, True
        return layer

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer along the last axis.

        Args:
            inputs: (..., in_features).

        Returns:
            (..., out_features).

        Raises:
            TypeError: the kernel is not an NVFP4 weight, or a dtype is not one we compute in.
            ValueError: shapes do not go together.
        """
        inputs = jnp.asarray(inputs)
        kernel = _arrays(self.kernel)
        kernel = _layer.as_weight("Nvfp4Linear", kernel, self.out_features, self.in_features)
        inputs, compute = _layer.cast_inputs("Nvfp4Linear", inputs, self.dtype, self.param_dtype)
        scale: Any = self.activation_scale
        if scale == "static":
            if self.calibrating:
                amax = jnp.maximum(self.input_amax[...], numerics.amax(inputs))
                self.input_amax[...] = amax
                self.input_scale[...] = numerics.dynamic_scales(amax)[1]
            scale = self.input_scale[...]
        return linear(
            inputs,
            kernel,
            None if self.bias is None else self.bias[...],
            activation_scale=scale,
            out_dtype=self.preferred_element_type or compute,
            batch_invariant=self.batch_invariant,
        )


def _every_linear(path: tuple[Any, ...], layer: nnx.Linear) -> bool:
    return True


def quantize_model(
    model: nnx.Module,
    where: Callable[[tuple[Any, ...], nnx.Linear], bool] = _every_linear,
    **fields: Any,
) -> None:
    """Swaps the `nnx.Linear` layers of a model for Nvfp4Linear, in place.

    Args:
        model: changed in place. A layer that is shared stays shared. Subclasses of `nnx.Linear`,
            whose call may be another, stay.
        where: given a layer's path and the layer, whether to swap it; every Linear by default.
        **fields: activation_scale and batch_invariant of the new layers.

    Raises:
        ValueError: no layer was chosen, the model is itself a Linear, or a layer lies where it
            cannot be swapped.
    """
    if isinstance(model, nnx.Linear):
        raise ValueError("the model is itself a Linear; use Nvfp4Linear.from_linear")
    chosen = {
        id(node): node
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Linear) and type(node) is nnx.Linear and where(path, node)
    }
    if not chosen:
        raise ValueError("no nnx.Linear layer of the model was chosen to be quantized")
    _replace(model, {key: Nvfp4Linear.from_linear(node, **fields) for key, node in chosen.items()})
    for path, node in nnx.iter_graph(model):
        if id(node) in chosen:
            raise ValueError(
                f"the layer {'.'.join(map(str, path))} could not be swapped: layers may be "
                f"attributes of modules or items of lists, dicts and tuples"
            )


def repack_model(model: nnx.Module, arch: str | None = None) -> None:
    """Repacks the kernels of a model's Nvfp4Linear layers, in place.

    Arrays stay divided as they are; the axis names of their metadata, which are those of canonical
    weights, are dropped.

    Args:
        model: changed in place.
        arch: as in `jax_nvfp4.repack`.

    Raises:
        ValueError: there is no Nvfp4Linear, or the arch is unknown.
    """
    layers = [node for _, node in nnx.iter_graph(model) if isinstance(node, Nvfp4Linear)]
    if not layers:
        raise ValueError("no Nvfp4Linear layer in the model to repack; see quantize_model")
    for layer in layers:
        layer.kernel = nnx.data(_variables(repack(_arrays(layer.kernel), arch), {}))


def _replace(root: Any, swapped: dict[int, Nvfp4Linear]) -> None:
    """Puts the new layers wherever the old ones are attributes or items, at any depth."""

    def new(child: Any) -> Any:
        if isinstance(child, tuple):
            items = [new(item) for item in child]
            if all(a is b for a, b in zip(items, child, strict=True)):
                return child
            return type(child)(*items) if hasattr(child, "_fields") else type(child)(items)
        return swapped.get(id(child), child)

    for _, node in list(nnx.iter_graph(root)):
        if isinstance(node, list):
            items: Any = enumerate(node)
        elif isinstance(node, dict):
            items = list(node.items())
        elif isinstance(node, nnx.Pytree):
            items = list(vars(node).items())
        else:
            continue
        for key, child in items:
            replacement = new(child)
            if replacement is child:
                continue
            if isinstance(node, nnx.Pytree):
                setattr(node, key, nnx.data(replacement))
            else:
                node[key] = replacement
