# SPDX-License-Identifier: Apache-2.0
"""Nvfp4Experts: the experts of a mixture."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer

from jax_nvfp4 import _layer, params
from jax_nvfp4.activations import Activation, GeGLU, SwiGLU
from jax_nvfp4.nnx.variables import arrays, variables
from jax_nvfp4.ops.checks import DynamicScaling


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
        self.w13 = nnx.data(variables(weights["w13"], {}))
        self.w2 = nnx.data(variables(weights["w2"], {}))

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
        b13, b2 = (None if b is None else b[...] for b in (self.b13, self.b2))
        return _layer.apply_experts(
            self,
            jnp.asarray(inputs),
            expert_indices,
            expert_weights,
            (arrays(self.w13), arrays(self.w2)),
            (b13, b2),
        )
