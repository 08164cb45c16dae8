# SPDX-License-Identifier: Apache-2.0
"""Checks of what the user gave; the errors name the argument, what was expected and what it is."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.tensor import FLOAT_NAMES, FLOATS

DynamicScaling = Literal["tensor", "token"]
ActivationScale = DynamicScaling | ArrayLike | None

DYNAMIC = {"tensor": Scaling.TENSOR, "token": Scaling.TOKEN}
"""The names that users give to the scalings that follow from the data."""


def as_array(name: str, value: Any, expected: str) -> jax.Array:
    """Converts to an array; the error names the argument."""
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be {expected}; got {type(value).__name__}: {error}") from None


def as_float_array(name: str, value: ArrayLike, min_ndim: int) -> jax.Array:
    """Converts to an array of a dtype that we compute in, with at least `min_ndim` axes."""
    value = as_array(name, value, FLOAT_NAMES)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; got {value.dtype.name}")
    if value.ndim < min_ndim:
        axes = "axis" if min_ndim == 1 else "axes"
        raise ValueError(f"{name} must have at least {min_ndim} {axes}; got shape {value.shape}")
    return value


def as_integers(name: str, value: ArrayLike) -> jax.Array:
    """Converts integers to int32; those beyond its range become its ends."""
    array = as_array(name, value, "integers")
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers; got {array.dtype.name}")
    own, wanted = jnp.iinfo(array.dtype), jnp.iinfo(jnp.int32)
    low = wanted.min if own.min < wanted.min else None
    high = wanted.max if own.max > wanted.max else None
    return (array if low is high is None else jnp.clip(array, low, high)).astype(jnp.int32)


def as_scale(name: str, value: ArrayLike) -> jax.Array:
    """Accepts float32 arrays, Python numbers and weakly typed floats."""
    if isinstance(value, bool):
        raise TypeError(f"{name} must be float32; got bool")
    if isinstance(value, float | int):
        return jnp.asarray(float(value), jnp.float32)
    array = as_array(name, value, "float32")
    from_python = array.weak_type and jnp.issubdtype(array.dtype, jnp.floating)
    if array.dtype != jnp.float32 and not from_python:
        raise TypeError(f"{name} must be float32; got {array.dtype.name}")
    return array.astype(jnp.float32)


def float_dtype(name: str, value: DTypeLike) -> jnp.dtype:
    """A dtype that we compute in."""
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; {error}") from None
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be {FLOAT_NAMES}; got {dtype.name}")
    return dtype


def dynamic_scaling(name: str, value: str) -> Scaling:
    """The scaling that a user names."""
    if not isinstance(value, str) or value not in DYNAMIC:
        raise ValueError(f'{name} must be "tensor" or "token"; got {value!r}')
    return DYNAMIC[value]
