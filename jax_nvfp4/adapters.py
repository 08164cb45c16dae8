# SPDX-License-Identifier: Apache-2.0
"""NVFP4 products for the hooks of other frameworks: callables for `dot_general=` and `einsum_op=`.

They go where a framework takes a `jax.lax.dot_general` or a `jax.numpy.einsum` of the user's own:
`nnx.LinearGeneral(dot_general=)`, `nnx.Einsum(einsum_op=)`, `nn.MultiHeadDotProductAttention
(qkv_dot_general=)`, `DotGeneralOp` of haliax, the intercept map of a qwix provider. They are static
pytrees, so that they may be fields of a module.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import opt_einsum
from jax import lax

from jax_nvfp4.products import api
from jax_nvfp4.products.kernel import as_kernel, quantize_kernel

Side = Literal["lhs", "rhs"] | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DotGeneral:
    """A `jax.lax.dot_general` that multiplies with NVFP4 weights.

    Attributes:
        weight: the side of dense weights to quantize in place, at each call: where a hook gets
            dense arrays alone, this gives the values of an NVFP4 model, without its memory. They
            are not differentiated. None: products of dense arrays stay what they are.
        activation_scale: as of `jax_nvfp4.dot_general`; a string or None.
        batch_invariant: likewise.
    """

    weight: Side = None
    activation_scale: Literal["token", "tensor"] | None = "token"
    batch_invariant: bool = False

    def __call__(
        self, lhs: Any, rhs: Any, dimension_numbers: Any, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """As `jax.lax.dot_general`, or as `jax_nvfp4.dot_general` where an operand is NVFP4."""
        (lhs_sum, rhs_sum), (lhs_batch, rhs_batch) = dimension_numbers
        lhs, rhs = _quantized(self.weight, lhs, rhs, (lhs_sum, lhs_batch), (rhs_sum, rhs_batch))
        if not _has_weight(lhs, rhs):
            return lax.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)
        kwargs |= dataclasses.asdict(self)
        del kwargs["weight"]
        return api.dot_general(lhs, rhs, dimension_numbers, *args, **kwargs)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Einsum:
    """A `jax.numpy.einsum` that multiplies with NVFP4 weights. Attributes: as of `DotGeneral`."""

    weight: Side = None
    activation_scale: Literal["token", "tensor"] | None = "token"
    batch_invariant: bool = False

    def __call__(self, subscripts: Any, *operands: Any, **kwargs: Any) -> jax.Array:
        """As `jax.numpy.einsum`, or as `jax_nvfp4.einsum` where an operand is NVFP4."""
        if len(operands) == 2 and isinstance(subscripts, str) and self.weight:
            inputs, result, _ = opt_einsum.parser.parse_einsum_input((subscripts, *operands))
            of_lhs, of_rhs = inputs.split(",")
            operands = _quantized(
                self.weight,
                *operands,
                _roles(of_lhs, of_rhs, result),
                _roles(of_rhs, of_lhs, result),
            )
        if not _has_weight(*operands):
            return jnp.einsum(subscripts, *operands, **kwargs)
        kwargs |= dataclasses.asdict(self)
        del kwargs["weight"]
        return api.einsum(subscripts, *operands, **kwargs)


def _has_weight(*operands: Any) -> bool:
    return any(as_kernel(operand) is not None for operand in operands)


def _roles(labels: str, others: str, result: str) -> tuple[list[int], list[int]]:
    """The contracted and the batch axes of an operand of an einsum."""
    shared = [(i, label) for i, label in enumerate(labels) if label in others]
    return [i for i, a in shared if a not in result], [i for i, a in shared if a in result]


def _quantized(side: Side, lhs: Any, rhs: Any, of_lhs: Any, of_rhs: Any) -> tuple[Any, Any]:
    """The operands, the dense one of a side quantized if there is no NVFP4 weight yet."""
    if side not in (None, "lhs", "rhs"):
        raise ValueError(f'weight must be "lhs", "rhs" or None; got {side!r}')
    if side is None or _has_weight(lhs, rhs):
        return lhs, rhs
    if side == "lhs":
        return quantize_kernel(lhs, *map(tuple, of_lhs)), rhs
    return lhs, quantize_kernel(rhs, *map(tuple, of_rhs))
