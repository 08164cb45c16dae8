# SPDX-License-Identifier: Apache-2.0
"""The Flax linen layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import meta
from flax.typing import Dtype, Initializer

from jax_nvfp4 import _layer, numerics, params
from jax_nvfp4._intercept import intercept as intercept
from jax_nvfp4.activations import Activation, GeGLU, SwiGLU
from jax_nvfp4.ops.checks import DynamicScaling
from jax_nvfp4.ops.linear.api import linear

COLLECTION = "quant"
"""The collection of the static scales."""

_FORMER_NAMES = {"input_scale": "activation_scale", "input_amax": "activation_amax"}
"""What the variables of a calibration were called before; saved ones are read all the same."""


def _quantized(kernel_init: Initializer) -> Any:
    """An initializer of the NVFP4 kernel: quantizes what a Dense layer would start from."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> Any:
        kernel = kernel_init(key, shape, dtype)
        if isinstance(kernel, meta.AxisMetadata):
            return params.box_like(kernel, params.quantize_kernel(meta.unbox(kernel)))
        return params.quantize_kernel(kernel)

    return init


class Nvfp4Dense(nn.Module):
    """A drop-in for `flax.linen.Dense` with an NVFP4 kernel.

    The params have Dense's names: `kernel`, an Nvfp4Tensor or RepackedWeight of logical shape
    (features, inputs), and `bias`. `jax_nvfp4.quantize_params` makes them from a Dense model's.

    With `activation_scale="static"` the layer reads the variable `input_scale` (float32, ()) of the
    collection `quant`: from a calibration, or put there by the user, such as a checkpoint's input
    scale. Applied with `mutable=["quant"]` it calibrates instead: it keeps the running amax of its
    inputs in the variable `input_amax` and the scale that follows from it in `input_scale`. Before
    any calibration the scale is 1, which suits inputs up to 2688.

    Attributes:
        features: output features.
        use_bias: whether to add a bias.
        dtype: of the computation and the output; None: what the inputs and the params, as they are,
            promote to (the kernel's `dtype` is that which it was quantized from).
        param_dtype: of the bias, and of the kernel before it is quantized at init.
        precision: no effect: products are exact and sums float32. Here so that Dense's fields are.
        kernel_init: initializer of the (inputs, features) kernel that init quantizes.
        bias_init: initializer of the bias.
        promote_dtype: must be None; so must the next two.
        dot_general: as above.
        dot_general_cls: as above.
        activation_scale: how inputs are quantized: "token", "tensor", "static" or None
            (weight-only), as in `jax_nvfp4.linear`.
        batch_invariant: as in `jax_nvfp4.linear`.
    """

    features: int
    use_bias: bool = True
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: Any = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    promote_dtype: Any = None
    dot_general: Any = None
    dot_general_cls: Any = None
    activation_scale: _layer.LayerActivationScale = "token"
    batch_invariant: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Applies the layer along the last axis.

        Args:
            inputs: (..., K).

        Returns:
            (..., features).

        Raises:
            TypeError: the kernel is not an NVFP4 weight, or a dtype is not one we compute in.
            ValueError: the kernel has another shape, a field an unknown value, or there is no
                static scale.
        """
        _layer.check_fields(
            "Nvfp4Dense",
            self.activation_scale,
            self.param_dtype,
            promote_dtype=self.promote_dtype,
            dot_general=self.dot_general,
            dot_general_cls=self.dot_general_cls,
        )
        inputs = jnp.asarray(inputs)
        if not inputs.ndim:
            raise ValueError("the inputs of Nvfp4Dense must have at least 1 axis; got a scalar")
        k = inputs.shape[-1]
        if self.has_variable("params", "kernel"):
            # Not through `param`, which would refuse a RepackedWeight for its parts' shapes.
            kernel = meta.unbox(self.get_variable("params", "kernel"))
        else:
            kernel = self.param(
                "kernel", _quantized(self.kernel_init), (k, self.features), self.param_dtype
            )
        kernel = _layer.as_weight("Nvfp4Dense", kernel, self.features, k)
        bias = None
        if self.use_bias:
            bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype)
        inputs, compute = _layer.cast_inputs("Nvfp4Dense", inputs, self.dtype, kernel.dtype, bias)
        scale: Any = self.activation_scale
        return linear(
            inputs,
            kernel,
            bias,
            activation_scale=self._static_scale(inputs) if scale == "static" else scale,
            out_dtype=compute,
            batch_invariant=self.batch_invariant,
        )

    def _static_scale(self, inputs: jax.Array) -> jax.Array:
        """The calibrated scale; first takes the inputs in where the collection is mutable."""
        if not (self.is_initializing() or self.is_mutable_collection(COLLECTION)):
            saved = self._saved("input_scale")
            if saved is None:
                raise ValueError(
                    f"Nvfp4Dense {'/'.join(self.path)!r} has no static scale: calibrate, by "
                    f"applying the model to inputs with mutable=[{COLLECTION!r}], or put "
                    f"input_scale into its variables of the collection {COLLECTION!r}"
                )
            return saved
        amax = self._statistic("input_amax", 0.0)
        scale = self._statistic("input_scale", 1.0)
        if not self.is_initializing():
            amax.value = jnp.maximum(amax.value, numerics.amax(inputs))
            scale.value = numerics.dynamic_scales(amax.value)[1]
        return scale.value

    def _saved(self, name: str) -> jax.Array | None:
        """A variable of a calibration, under its name or its former one."""
        for known in (name, _FORMER_NAMES[name]):
            if self.has_variable(COLLECTION, known):
                return self.get_variable(COLLECTION, known)
        return None

    def _statistic(self, name: str, start: float) -> nn.Variable:
        """The variable of a calibration; one that is new starts from what was saved, if any."""
        saved = self._saved(name)
        value = jnp.float32(start) if saved is None else saved
        return self.variable(COLLECTION, name, lambda: value)


class Nvfp4Experts(nn.Module):
    """The experts of a mixture, with NVFP4 kernels: what comes after the router.

    The params are `w13` and `w2`, NVFP4 weights as `jax_nvfp4.expert_mlp` takes them, and `b13` and
    `b2`. `jax_nvfp4.params.quantize_experts` makes the weights from the kernels of a model's own
    experts.

    Attributes:
        num_experts: E.
        hidden_features: I, of the rows between the products.
        activation: SwiGLU(...) or GeGLU() for experts with a gate; else "relu2", "silu" or
            "gelu_tanh".
        use_bias: whether to add biases.
        dtype: of the computation and the output; None: what inputs and `param_dtype` promote to.
        param_dtype: of the biases, and of the kernels before they are quantized at init.
        kernel_init: initializer of the kernels (E, K, I) and (E, I, K) that init quantizes.
        bias_init: initializer of the biases.
        activation_scale: "token", "tensor" or None, as in `jax_nvfp4.expert_mlp`.
        hidden_scale: likewise.
        batch_invariant: as in `jax_nvfp4.linear`.
    """

    num_experts: int
    hidden_features: int
    activation: Activation = _layer.SWIGLU
    use_bias: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    kernel_init: Initializer = _layer.expert_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    activation_scale: DynamicScaling | None = "token"
    hidden_scale: DynamicScaling | None = "token"
    batch_invariant: bool = False

    @nn.compact
    def __call__(
        self, inputs: jax.Array, expert_indices: jax.Array, expert_weights: jax.Array
    ) -> jax.Array:
        """Applies to each token the experts that the router chose, and sums with its weights.

        Args:
            inputs: (..., K).
            expert_indices: integers (..., top_k).
            expert_weights: (..., top_k).

        Returns:
            (..., K).

        Raises:
            TypeError: a dtype is not one we compute in.
            ValueError: shapes do not go together, or a field has an unknown value.
        """
        _layer.check_experts(
            "Nvfp4Experts", self.activation_scale, self.hidden_scale, self.param_dtype
        )
        inputs = jnp.asarray(inputs)
        k, experts, hidden = inputs.shape[-1], self.num_experts, self.hidden_features
        is_gated = isinstance(self.activation, SwiGLU | GeGLU)

        def init(key: jax.Array) -> dict[str, Any]:
            wide, narrow = (experts, k, hidden), (experts, hidden, k)
            keys = jax.random.split(key, 3)

            def make(key: jax.Array, shape: tuple[int, ...]) -> Any:
                return self.kernel_init(key, shape, self.param_dtype)

            gate = make(keys[0], wide) if is_gated else None
            return params.quantize_experts(gate, make(keys[1], wide), make(keys[2], narrow))

        if self.has_variable("params", "w13"):
            # Not through `param`, which would refuse a RepackedWeight for its parts' shapes.
            weights = {name: meta.unbox(self.get_variable("params", name)) for name in _EXPERTS}
        else:
            made = init(self.make_rng("params"))
            weights = {name: self.param(name, lambda _, n=name: made[n]) for name in _EXPERTS}
        b13 = b2 = None
        if self.use_bias:
            rows = 2 * hidden if is_gated else hidden
            b13 = self.param("b13", self.bias_init, (experts, rows), self.param_dtype)
            b2 = self.param("b2", self.bias_init, (experts, k), self.param_dtype)
        return _layer.apply_experts(
            self,
            inputs,
            expert_indices,
            expert_weights,
            (weights["w13"], weights["w2"]),
            (b13, b2),
        )


_EXPERTS = ("w13", "w2")
