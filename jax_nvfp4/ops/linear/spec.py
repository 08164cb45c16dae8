# SPDX-License-Identifier: Apache-2.0
"""The operands of a call of `linear`, and what is static in it."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jax_nvfp4.activations import Activation
from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.ops.quantize import scale


class Operands(NamedTuple):
    """The operands of the primitive by name, or something else of each: an aval, a tangent.

    Attributes:
        x: (..., K).
        data: codes of the weight, in the order of `LinearSpec.arch`.
        block_scale: block scales of the weight, likewise.
        w_scale: global scale of the weight, () or one for each row, in the order of the codes.
        bias: (N,), of a gated weight (2, N/2), or None.
        scale_or_amax: the global scale (STATIC) or the amax (AMAX) of x, () or (...); else None.
    """

    x: Any
    data: Any
    block_scale: Any
    w_scale: Any
    bias: Any | None
    scale_or_amax: Any | None

    @property
    def weight(self) -> tuple[Any, Any, Any]:
        """The parts of the weight."""
        return self.data, self.block_scale, self.w_scale

    def flat(self) -> tuple[Any, ...]:
        """Those that are there, in order: what the primitive is bound to."""
        return tuple(operand for operand in self if operand is not None)


class Groups(NamedTuple):
    """Which rows of x are whose, where the weight has a leading axis of groups.

    Attributes:
        sizes: int32 (S,), the rows of each group; None: there are no groups.
        offset: int32 (1,), which of the sizes is that of the weight's first group.
    """

    sizes: jax.Array | None
    offset: jax.Array | None

    @property
    def operands(self) -> tuple[jax.Array, jax.Array] | None:
        """As the custom calls take them."""
        if self.sizes is None or self.offset is None:
            return None
        return self.sizes, self.offset


@dataclasses.dataclass(frozen=True)
class LinearSpec:
    """The static part of a call of `linear`.

    Attributes:
        arch: the order the weight is in; None: canonical, to be repacked in the graph as needed.
        n: logical rows of the weight.
        k: logical columns of the weight.
        scaling: how x is quantized; NONE: it is not (weight-only).
        has_bias: there is a bias operand.
        out_dtype: name of the result's dtype.
        batch_invariant: a row of the result has the same bits whatever the other rows.
        gated: the weight is a gate and an up projection.
        activation: what the sums go through; a gated one leaves n/2 columns.
    """

    arch: str | None
    n: int
    k: int
    scaling: Scaling
    has_bias: bool
    out_dtype: str
    batch_invariant: bool
    gated: bool = False
    activation: Activation | None = None

    @property
    def columns(self) -> tuple[int, ...]:
        """The axes of the result after those of the rows of x: of a gated weight, (2, n/2)."""
        if not self.gated:
            return (self.n,)
        return (self.n // 2,) if self.activation is not None else (2, self.n // 2)

    def operands(self, flat: tuple[Any, ...]) -> Operands:
        """The operands by name, of those that the primitive is bound to; undoes `flat`."""
        x, data, block_scale, w_scale, *rest = flat
        bias = rest.pop(0) if self.has_bias else None
        scale_or_amax = rest.pop(0) if self.scaling.given else None
        return Operands(x, data, block_scale, w_scale, bias, scale_or_amax)


def of_matrix(function: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """An implementation for a matrix x as one for an x with any leading axes."""

    def implementation(*flat: jax.Array, spec: LinearSpec) -> list[jax.Array]:
        operands = spec.operands(flat)
        *rows, k = operands.x.shape
        matrix = operands._replace(
            x=operands.x.reshape(math.prod(rows), k),
            scale_or_amax=scale.flat(operands.scale_or_amax),
        )
        (y,) = function(*matrix.flat(), spec=spec)
        return [y.reshape(*rows, *spec.columns)]

    return implementation
