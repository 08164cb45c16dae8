# SPDX-License-Identifier: Apache-2.0
"""The activation functions that a product may end with.

An activation is a small static value: one of the names in `PLAIN`, applied to each output, or a
gated one, a value of a class here, which makes one output of a gate and of an up projection. All of
them compute in float32. NaN passes through their minima and maxima.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jax_nvfp4 import numerics

Plain = Literal["relu2", "silu", "gelu_tanh"]
PLAIN: tuple[str, ...] = get_args(Plain)
"""Names of the activations of plain weights."""


@dataclasses.dataclass(frozen=True)
class SwiGLU:
    """The gated activation `g * sigmoid(alpha * g) * (u + beta)`.

    `g = min(gate, limit)` and `u = clip(up, -limit, limit)`, where there is a limit. Of public
    models, most have the defaults; gpt-oss has alpha 1.702, beta 1 and limit 7, DeepSeek-V4 limit
    10.

    Attributes:
        limit: positive, or None: no limit.
        alpha: factor of the gate within the sigmoid.
        beta: what is added to the up projection.

    Raises:
        TypeError: a field is not a number; they are static, not traced.
        ValueError: a field is not finite, or limit is not positive.
    """

    limit: float | None = None
    alpha: float = 1.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.name == "limit":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(
                    f"SwiGLU.{field.name} must be a Python number; got {type(value).__name__}"
                )
            if not math.isfinite(value) or (field.name == "limit" and value <= 0):
                wanted = "positive and finite" if field.name == "limit" else "finite"
                raise ValueError(f"SwiGLU.{field.name} must be {wanted}; got {value}")
            object.__setattr__(self, field.name, float(value))


@dataclasses.dataclass(frozen=True)
class GeGLU:
    """The gated activation `gelu(gate) * up`, with the tanh form of gelu."""


Gated = SwiGLU | GeGLU
Activation = Plain | Gated


def check(activation: Any, *, gated: bool) -> None:
    """Refuses what is no activation, or none for a weight.

    Args:
        activation: what the user gave.
        gated: whether the weight is gated.

    Raises:
        ValueError: an unknown name, or a weight of the other kind.
        TypeError: a value of another type.
    """
    names = ", ".join(f'"{name}"' for name in PLAIN)
    expected = f"activation must be SwiGLU(...), GeGLU(), {names} or None"
    if isinstance(activation, str):
        if activation not in PLAIN:
            raise ValueError(f"{expected}; got {activation!r}")
    elif activation is not None and not isinstance(activation, Gated):
        raise TypeError(f"{expected}; got {activation!r}")
    if isinstance(activation, Gated) and not gated:
        raise ValueError(
            f"activation={activation} takes a gated weight, made by gate_up(gate, up); got a plain "
            f"one (its rows would be taken for gates and ups that they are not)"
        )
    if isinstance(activation, str) and gated:
        raise ValueError(
            f'activation="{activation}" is for plain weights; of a gated one, SwiGLU(...) or '
            f"GeGLU() make one output of each gate and its up"
        )


@jax.custom_jvp
def fenced(x: jax.Array) -> jax.Array:
    """Computes x once, before it is added to anything (`numerics.computed_once`)."""
    return numerics.computed_once(x)


fenced.defjvps(lambda tangent, _, __: tangent)


def _gelu(x: jax.Array) -> jax.Array:
    """The tanh form of gelu (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)."""
    inner = x + fenced(jnp.float32(0.044715) * (x * x * x))
    return x * (0.5 + fenced(0.5 * jnp.tanh(jnp.float32(math.sqrt(2 / math.pi)) * inner)))


def activate(activation: Activation, z: jax.Array) -> jax.Array:
    """Applies an activation to the sums of a product.

    Args:
        activation: one of `PLAIN`, or a gated one.
        z: float32; of any shape or, for a gated activation, (..., 2, I): the gate, then up.

    Returns:
        float32, of z's shape or (..., I).
    """
    if isinstance(activation, str):
        return _plain(activation, fenced(z))
    return _gated(activation, fenced(z[..., 0, :]), fenced(z[..., 1, :]))


def _plain(activation: str, z: jax.Array) -> jax.Array:
    if activation == "relu2":
        return jnp.square(jnp.maximum(z, 0))
    if activation == "silu":
        return z * jax.nn.sigmoid(z)
    return _gelu(z)


def _gated(activation: Gated, gate: jax.Array, up: jax.Array) -> jax.Array:
    if isinstance(activation, GeGLU):
        return _gelu(gate) * up
    if activation.limit is not None:
        gate = jnp.minimum(gate, activation.limit)
        up = jnp.clip(up, -activation.limit, activation.limit)
    gated = gate * jax.nn.sigmoid(jnp.float32(activation.alpha) * gate)
    return gated * (up + jnp.float32(activation.beta))
