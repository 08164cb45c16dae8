# SPDX-License-Identifier: Apache-2.0
"""The operands of a call of `ragged_linear`, what is static in it, and which rows are whose."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4.ops.linear.spec import LinearSpec


@dataclasses.dataclass(frozen=True)
class RaggedSpec:
    """What is static in a call of `ragged_linear`.

    Attributes:
        each: the product of one group's rows with its weight. Of its scalings, "tensor" is over the
            rows of all groups, and a static scale may be one for each group of the weight.
        groups: of the weight.
        has_offset: whether there is a group offset among the operands.
    """

    each: LinearSpec
    groups: int
    has_offset: bool

    def operands(self, flat: tuple[Any, ...]) -> "Operands":
        """The operands by name, of those that the primitive is bound to; undoes `flat`."""
        x, data, block_scale, w_scale, sizes, *rest = flat
        offset = rest.pop(0) if self.has_offset else None
        bias = rest.pop(0) if self.each.has_bias else None
        scale_or_amax = rest.pop(0) if self.each.scaling.given else None
        return Operands(x, data, block_scale, w_scale, sizes, offset, bias, scale_or_amax)


class Operands(NamedTuple):
    """The operands of the primitive by name, or something else of each: an aval, a tangent.

    Attributes:
        x: (M, K).
        data: codes of the weights (G, ...), in the order of an arch.
        block_scale: block scales of the weights, likewise.
        w_scale: global scales of the weights, (G,) or one for each row of the codes.
        sizes: int32 (S,).
        offset: int32 (), or None: 0.
        bias: (G, N), of gated weights (G, 2, N/2), or None.
        scale_or_amax: the global scale of x (STATIC), () or (G,), or its amax (AMAX), (), or with
            K divided that of each row (M,); else None.
    """

    x: Any
    data: Any
    block_scale: Any
    w_scale: Any
    sizes: Any
    offset: Any | None
    bias: Any | None
    scale_or_amax: Any | None

    @property
    def weight(self) -> tuple[Any, Any, Any]:
        """The parts of the weights."""
        return self.data, self.block_scale, self.w_scale

    def flat(self) -> tuple[Any, ...]:
        """Those that are there, in order: what the primitive is bound to."""
        return tuple(operand for operand in self if operand is not None)


class Ranges(NamedTuple):
    """Which rows belong to which group of the weight.

    Attributes:
        begin: int32 (G,), the first row of each group.
        end: int32 (G,), one past its last row; `begin` where it has none.
        total: int32 (), the rows of all groups, those of other weights too.
    """

    begin: jax.Array
    end: jax.Array
    total: jax.Array

    def of_rows(self, m: int) -> tuple[jax.Array, jax.Array]:
        """The group of each of m rows, and whether it has one: int32 (M,), bool (M,)."""
        row = lax.iota(jnp.int32, m)
        # Groups of the weight follow one another, so that the last to begin is the row's.
        ends = lax.cummax(self.end)
        # Unrolled: a loop would be many launches on a GPU.
        group = jnp.searchsorted(ends, row, side="right", method="scan_unrolled").astype(jnp.int32)
        group = jnp.minimum(group, self.end.shape[0] - 1)
        return group, (self.begin[group] <= row) & (row < self.end[group])


def ranges(sizes: jax.Array, offset: jax.Array | None, groups: int, m: int) -> Ranges:
    """Where the groups of a weight lie among m rows.

    Args:
        sizes: int32 (S,); negative ones count as 0, and their sum is cut at m.
        offset: int32 (), which of the sizes is that of the weight's first group; None: 0.
        groups: G, of the weight.
        m: rows.

    Returns:
        The ranges; a group of the weight that has no size has no rows.
    """
    count = sizes.shape[0]
    if count == 0:
        none = jnp.zeros(groups, jnp.int32)
        return Ranges(none, none, jnp.zeros((), jnp.int32))
    sizes = jnp.clip(sizes, 0, m)
    # Saturating sums of sizes up to m do not overflow, and are associative.
    ends = lax.associative_scan(lambda a, b: jnp.minimum(a + b, m), sizes)
    begins = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    index = lax.iota(jnp.int32, groups)
    if offset is not None:
        index = index + jnp.clip(offset, -groups, count)
    there = (index >= 0) & (index < count)
    at = jnp.clip(index, 0, count - 1)
    begin, end = jnp.where(there, begins[at], 0), jnp.where(there, ends[at], 0)
    return Ranges(begin, end, ends[-1])
