# SPDX-License-Identifier: Apache-2.0
"""The Flax nnx layer, and the swap of a model's Linear layers."""

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.sharding import NamedSharding, PartitionSpec

from jax_nvfp4 import _layer, numerics, params
from jax_nvfp4.activations import Activation, GeGLU, SwiGLU
from jax_nvfp4.ops.checks import DynamicScaling
from jax_nvfp4.ops.linear.api import linear
from jax_nvfp4.ops.repack import repack
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


class QuantizedParam(nnx.Variable[jax.Array]):
    """A part of an NVFP4 kernel. Not an `nnx.Param`: `nnx.grad` must not differentiate codes."""


class QuantStat(nnx.Variable[jax.Array]):
    """A static activation scale, or the running amax that it follows from."""


Weight = Nvfp4Tensor | RepackedWeight


def _quantized(kernel: nnx.Variable[Any]) -> Any:
    """The weight of a kernel (..., in, out), a variable for each part.

    Parts, each with axes of its own, need variables of their own: Flax's tools for sharding know
    one specification for a variable. Axis names are those of the kernel, the last two swapped.
    """
    value = kernel.get_value()
    metadata = kernel.get_metadata()
    names = metadata.pop("out_sharding", None)
    if not isinstance(value, jax.ShapeDtypeStruct):
        return _variables(params.quantize_kernel(value), metadata, _swapped(names, value.ndim))
    weight = jax.eval_shape(params.quantize_kernel, value)
    if isinstance(value.sharding, NamedSharding):
        place = _swapped(value.sharding, value.ndim)
        weight = jax.tree.map(lambda part: part.update(sharding=_leading(place, part)), weight)
    return _variables(weight, metadata, _swapped(names, value.ndim), placed=True)


def _swapped(names: Any, ndim: int) -> Any:
    """The axis names, or the sharding, of an array whose last two axes are swapped."""
    if names is None:
        return None
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_swapped(tuple(names.spec), ndim)))
    padded = tuple(names) + (None,) * (ndim - len(names))
    return (*padded[:-2], padded[-1], padded[-2])


def _leading(names: Any, part: Any) -> Any:
    """As many of the names of the codes' axes, or of their sharding, as a part has axes."""
    if isinstance(names, NamedSharding):
        return NamedSharding(names.mesh, PartitionSpec(*_leading(tuple(names.spec), part)))
    return names[: part.ndim]


def _variables(
    weight: Weight, metadata: Mapping[str, Any], names: Any = None, *, placed: bool = False
) -> Any:
    """A weight with a variable for each part.

    Args:
        weight: with arrays as parts, abstract ones too.
        metadata: of each variable, axis names aside.
        names: of the axes of the codes; the others' are the first of these.
        placed: whether the parts are where they belong, so that none is to be moved by its names.
    """

    def variable(part: Any) -> nnx.Variable[jax.Array]:
        own = dict(metadata)
        if names is not None and part.ndim:
            own["out_sharding"] = _leading(names, part)
        if not placed:
            return QuantizedParam(part, **own)
        required = nnx.Variable(0).get_metadata(exclude_required=False)
        return QuantizedParam.from_metadata(part, required | own)

    return jax.tree.map(variable, weight)


def _arrays(weight: Any) -> Any:
    """The inverse of `_variables`, metadata aside."""
    return jax.tree.map(
        lambda part: part.get_value() if isinstance(part, nnx.Variable) else part,
        weight,
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )


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
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        if not isinstance(kernel, nnx.Variable):
            kernel = nnx.Param(kernel, **kernel_metadata)
        self.kernel: Any = nnx.data(_quantized(kernel))
        *stacked, _, _ = self.kernel.shape
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
        if name == "kernel" and isinstance(value, Nvfp4Tensor | RepackedWeight):
            old, metadata = self.kernel.data, {}
            if isinstance(old, nnx.Variable) and not isinstance(value.data, nnx.Variable):
                metadata = old.get_metadata()
            names = metadata.pop("out_sharding", None)
            if isinstance(value, RepackedWeight):
                names = None  # those of canonical weights say nothing of its axes
            value = nnx.data(_variables(_arrays(value), metadata, names, placed=True))
        super().__setattr__(name, value)

    @classmethod
    def from_linear(cls, linear: nnx.Linear, **fields: Any) -> "Nvfp4Linear":
        """Quantizes the kernel of an `nnx.Linear`.

        Args:
            linear: the layer, abstract or stacked too; its bias variable is shared, not copied.
            **fields: activation_scale and batch_invariant of the new layer.

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
        kernel = _arrays(self.kernel)
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


def _every_linear(path: tuple[Any, ...], layer: nnx.Linear) -> bool:
    return True


def quantize_model(
    model: nnx.Module,
    where: Callable[[tuple[Any, ...], nnx.Linear], bool] = _every_linear,
    **fields: Any,
) -> None:
    """Swaps the `nnx.Linear` layers of a model for Nvfp4Linear, in place.

    Layers are swapped one by one, so that nothing but the model and one layer need be in memory.

    Args:
        model: changed in place; it may be abstract (`nnx.eval_shape`). A layer that is shared stays
            shared. Subclasses of `nnx.Linear`, whose call may be another, stay.
        where: given a layer's path and the layer, whether to swap it; every Linear by default.
        **fields: activation_scale and batch_invariant of the new layers.

    Raises:
        ValueError: no layer was chosen, the model is itself a Linear, or a layer lies where it
            cannot be swapped.
    """
    if isinstance(model, nnx.Linear):
        raise ValueError("the model is itself a Linear; use Nvfp4Linear.from_linear")
    chosen = {
        path: node
        for path, node in nnx.iter_graph(model)
        if type(node) is nnx.Linear and where(path, node)
    }
    if not chosen:
        raise ValueError("no nnx.Linear layer of the model was chosen to be quantized")
    places = _places(model, set(map(id, chosen.values())))
    for path, node in chosen.items():
        if id(node) not in places:
            raise ValueError(
                f"the layer {'.'.join(map(str, path))} cannot be swapped: layers may be "
                f"attributes of modules or items of lists, dicts and tuples"
            )
    while chosen:
        _, old = chosen.popitem()
        new = Nvfp4Linear.from_linear(old, **fields)
        for holder, key in places.pop(id(old)):
            _put(holder, key, old, new)


def repack_model(model: nnx.Module, arch: str | None = None) -> None:
    """Repacks the kernels of a model's Nvfp4Linear and Nvfp4Experts layers, in place.

    Arrays stay divided as they are; the axis names of their metadata, which are those of canonical
    weights, are dropped.

    Args:
        model: changed in place; it may be abstract.
        arch: as in `jax_nvfp4.repack`.

    Raises:
        ValueError: there is no such layer, or the arch is unknown.
    """
    kinds: tuple[tuple[type, tuple[str, ...]], ...] = (
        (Nvfp4Linear, ("kernel",)),
        (Nvfp4Experts, ("w13", "w2")),
    )
    kernels = [
        (node, name)
        for _, node in nnx.iter_graph(model)
        for kind, names in kinds
        if isinstance(node, kind)
        for name in names
    ]
    if not kernels:
        raise ValueError("no Nvfp4Linear layer in the model to repack; see quantize_model")
    for layer, name in kernels:
        kernel = _arrays(getattr(layer, name))
        if isinstance(kernel.data, jax.ShapeDtypeStruct):
            kernel = jax.eval_shape(functools.partial(repack, arch=arch), kernel)
        else:
            kernel = repack(kernel, arch)
        is_linear = isinstance(layer, Nvfp4Linear)  # which makes variables of what it is given
        setattr(layer, name, kernel if is_linear else nnx.data(_variables(kernel, {}, placed=True)))


def _items(node: Any) -> Iterable[tuple[Any, Any]]:
    """The children of a node that can be replaced, by their keys."""
    if isinstance(node, list):
        return list(enumerate(node))
    if isinstance(node, dict):
        return list(node.items())
    return list(vars(node).items()) if isinstance(node, nnx.Pytree) else ()


def _places(root: Any, wanted: set[int]) -> dict[int, list[tuple[Any, Any]]]:
    """Where nodes are children, or in tuples that are: id of the node to (holder, key)."""
    places: dict[int, list[tuple[Any, Any]]] = {}

    def look(holder: Any, key: Any, child: Any) -> None:
        if isinstance(child, tuple):
            for item in child:
                look(holder, key, item)
        elif id(child) in wanted:
            places.setdefault(id(child), []).append((holder, key))

    for _, node in nnx.iter_graph(root):
        for key, child in _items(node):
            look(node, key, child)
    return places


def _put(holder: Any, key: Any, old: Any, new: Any) -> None:
    """Replaces a node in a child of its holder."""

    def swapped(child: Any) -> Any:
        if isinstance(child, tuple):
            items = [swapped(item) for item in child]
            return type(child)(*items) if hasattr(child, "_fields") else type(child)(items)
        return new if child is old else child

    if isinstance(holder, nnx.Pytree) and not isinstance(holder, list | dict):
        setattr(holder, key, nnx.data(swapped(vars(holder)[key])))
    else:
        holder[key] = swapped(holder[key])


class Nvfp4Experts(nnx.Module):
    """The experts of a mixture, with NVFP4 kernels: what comes after the router.

    `w13` and `w2` are NVFP4 weights as `jax_nvfp4.expert_mlp` takes them, with a QuantizedParam for
    each part; `b13` and `b2` are `nnx.Param`s. `from_kernels` makes the layer from the kernels of a
    model's own experts, `repack_model` repacks it.

    Args:
        num_experts: E.
        in_features: K, of the tokens and of the result.
        hidden_features: I, of the rows between the products.
        activation: SwiGLU(...) or GeGLU() for experts with a gate; else "relu2", "silu" or
            "gelu_tanh".
        use_bias: whether to add biases.
        dtype: of the computation and the output; None: what inputs and `param_dtype` promote to.
        param_dtype: of the biases, and of the kernels before they are quantized.
        kernel_init: initializer of the kernels (E, K, I) and (E, I, K) that are then quantized.
        bias_init: initializer of the biases.
        activation_scale: "token", "tensor" or None, as in `jax_nvfp4.expert_mlp`.
        hidden_scale: likewise.
        batch_invariant: as in `jax_nvfp4.linear`.
        rngs: streams for the initializers.

    Raises:
        ValueError: a field has a value that the layer cannot honor.
        TypeError: a param_dtype that cannot be quantized.
    """

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        hidden_features: int,
        *,
        activation: Activation = _layer.SWIGLU,
        use_bias: bool = False,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        kernel_init: Initializer = _layer.expert_kernel_init,
        bias_init: Initializer = nnx.nn.linear.default_bias_init,
        activation_scale: DynamicScaling | None = "token",
        hidden_scale: DynamicScaling | None = "token",
        batch_invariant: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        _layer.check_experts("Nvfp4Experts", activation_scale, hidden_scale, param_dtype)
        is_gated = isinstance(activation, SwiGLU | GeGLU)
        wide, narrow = (
            (num_experts, in_features, hidden_features),
            (num_experts, hidden_features, in_features),
        )
        shapes = (wide if is_gated else None, wide, narrow)
        kernels = (s and kernel_init(rngs.params(), s, param_dtype) for s in shapes)
        self._set_kernels(*kernels)
        rows = 2 * hidden_features if is_gated else hidden_features
        self.b13: Any = nnx.data(None)
        self.b2: Any = nnx.data(None)
        if use_bias:
            self.b13 = nnx.Param(bias_init(rngs.params(), (num_experts, rows), param_dtype))
            self.b2 = nnx.Param(bias_init(rngs.params(), (num_experts, in_features), param_dtype))
        self.activation = activation
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.activation_scale = activation_scale
        self.hidden_scale = hidden_scale
        self.batch_invariant = batch_invariant

    def _set_kernels(self, *kernels: Any) -> None:
        weights = params.quantize_experts(*kernels)
        self.w13 = nnx.data(_variables(weights["w13"], {}))
        self.w2 = nnx.data(_variables(weights["w2"], {}))

    @classmethod
    def from_kernels(
        cls,
        gate: jax.Array | None,
        up: jax.Array,
        down: jax.Array,
        *,
        b13: jax.Array | None = None,
        b2: jax.Array | None = None,
        **fields: Any,
    ) -> "Nvfp4Experts":
        """Quantizes the kernels of a model's experts.

        Args:
            gate: (E, K, I), or None where the experts have no gate.
            up: (E, K, I).
            down: (E, I, K).
            b13: (E, 2I), those of the gates before those of the ups, or (E, I); with b2 or not at
                all.
            b2: (E, K).
            **fields: other arguments of the layer.

        Returns:
            The layer.

        Raises:
            ValueError: shapes do not go together, or one bias is given without the other.
        """
        if (b13 is None) != (b2 is None):
            raise ValueError("b13 and b2 must both be given, or neither")
        experts, k, hidden = up.shape
        fields = {"param_dtype": up.dtype} | fields
        kernels = iter([kernel for kernel in (gate, up, down) if kernel is not None])
        biases = iter([b13, b2])
        return cls(
            experts,
            k,
            hidden,
            use_bias=b13 is not None,
            kernel_init=lambda *_: next(kernels),
            bias_init=lambda *_: next(biases),
            rngs=nnx.Rngs(0),
            **fields,
        )

    def __call__(
        self, inputs: jax.Array, expert_indices: jax.Array, expert_weights: jax.Array
    ) -> jax.Array:
        """Applies to each token the experts that the router chose, and sums with its weights.

        Args:
            inputs: (..., in_features).
            expert_indices: integers (..., top_k).
            expert_weights: (..., top_k).

        Returns:
            (..., in_features).

        Raises:
            TypeError: a dtype is not one we compute in.
            ValueError: shapes do not go together.
        """
        biases = (None if b is None else b[...] for b in (self.b13, self.b2))
        return _layer.apply_experts(
            self,
            jnp.asarray(inputs),
            expert_indices,
            expert_weights,
            (_arrays(self.w13), _arrays(self.w2)),
            tuple(biases),
        )
