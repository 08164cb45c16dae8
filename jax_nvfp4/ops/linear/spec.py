# SPDX-License-Identifier: Apache-2.0
"""What is static in a call of `linear`, and the order of its operands."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from jax_nvfp4.ops.quantize import scale
from jax_nvfp4.ops.quantize.reference import Mode


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """What is static in a call of `linear`.

    Attributes:
        arch: the order the weight is in; None: canonical, to be repacked in the graph as needed.
        n: logical rows of the weight.
        k: logical columns of the weight.
        activation: the mode of quantization of x, or None (weight-only).
        has_bias: whether there is a bias operand.
        out_dtype: name of the result's dtype.
        batch_invariant: a row of the result has the same bits whatever the other rows.
    """

    arch: str | None
    n: int
    k: int
    activation: Mode | None
    has_bias: bool
    out_dtype: str
    batch_invariant: bool


def joined(
    x: Any, weight: tuple[Any, Any, Any], bias: Any | None, given: tuple[Any, ...]
) -> tuple[Any, ...]:
    """The operands of the primitive, in order; the inverse of `split`."""
    return (x, *weight, *(() if bias is None else (bias,)), *given)


def split(
    operands: tuple[Any, ...], spec: LinearSpec
) -> tuple[Any, tuple[Any, Any, Any], Any | None, tuple[Any, ...]]:
    """Operands of the primitive as (x, weight, bias or None, (given,) or ())."""
    x, data, block_scale, global_scale, *rest = operands
    bias = rest.pop(0) if spec.has_bias else None
    return x, (data, block_scale, global_scale), bias, tuple(rest)


def of_matrix(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """An implementation for a matrix x as one for an x with any leading axes."""

    def implementation(*operands: jax.Array, spec: LinearSpec) -> list[jax.Array]:
        x, weight, bias, given = split(operands, spec)
        *rows, k = x.shape
        matrix = x.reshape(math.prod(rows), k)
        (y,) = function(*joined(matrix, weight, bias, scale.flat(given)), spec=spec)
        return [y.reshape(*rows, spec.n)]

    return implementation
