# SPDX-License-Identifier: Apache-2.0
"""The public `expert_mlp`: the experts of a mixture, from the router's choice to its weighted sum.

Pairs of a token and one of its experts are sorted by expert, go through two ragged products, and
return to their tokens' order by a permutation: nothing is added in an order that may vary.
"""

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_nvfp4.activations import Activation, fenced
from jax_nvfp4.ops import checks
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.ragged_linear.api import ragged_linear
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

Weight = Nvfp4Tensor | RepackedWeight


class _Same:
    """The default of `hidden_scale`: None is a scaling, and means something else."""

    def __repr__(self) -> str:
        return "<as activation_scale>"


SAME: Final = _Same()

COUNTED_PAIRS = 1024
"""Pairs of a token and an expert up to which each is compared with each, to sort them.

That is a handful of small kernels, where a sort and its searches are some twenty: at one token they
would take longer than the products.
"""


def expert_mlp(
    x: ArrayLike,
    w13: Weight,
    w2: Weight,
    expert_indices: ArrayLike,
    expert_weights: ArrayLike,
    b13: ArrayLike | None = None,
    b2: ArrayLike | None = None,
    *,
    activation: Activation | None,
    activation_scale: ActivationScale = "token",
    hidden_scale: Any = SAME,
    expert_offset: ArrayLike | None = None,
    out_dtype: DTypeLike | None = None,
    batch_invariant: bool = False,
) -> jax.Array:
    """The MLP of a mixture of experts: `sum_j weights[:, j] * mlp_of[indices[:, j]](x)`.

    Choosing the experts, by top-k or otherwise, and normalizing their weights are the router's. The
    sum is float32, over a token's experts in the order in which they are given; an expert that is
    chosen twice counts twice. The gradient is straight-through as that of `ragged_linear`, and that
    of the sum for `expert_weights`.

    Args:
        x: (T, K), tokens; bfloat16, float16 or float32.
        w13: (E, 2I, K), made by `gate_up`, for a gated activation; (E, I, K) for another.
        w2: (E, K', I), the down projection; K' is K in most models.
        expert_indices: integers (T, top_k). An index that is not that of an expert held here, such
            as -1, contributes nothing, whatever its weight.
        expert_weights: (T, top_k), bfloat16, float16 or float32.
        b13: (E, 2I) or (E, I).
        b2: (E, K').
        activation: as of `linear`; None only of plain weights.
        activation_scale: how x is quantized, as of `ragged_linear`: a static scale is () or (E,).
        hidden_scale: likewise, how the rows between the products are, rounded to x's dtype before
            (bfloat16 if that is float32). As activation_scale by default; where that is a number,
            it must be given.
        expert_offset: integer (), traced or not: w13 and w2 are those of experts `expert_offset` to
            `expert_offset + E`. The sum over devices of what each makes of its experts is the
            whole; with "tensor" scaling, up to what is then one scale for each device.
        out_dtype: bfloat16, float16 or float32; x's dtype if None.
        batch_invariant: as of `linear`.

    Returns:
        (T, K') of `out_dtype`.

    Raises:
        TypeError: an argument has a type or dtype that is not taken.
        ValueError: shapes do not go together, an argument has an unknown value, or there is no
            hidden_scale where there must be.
    """
    x = checks.as_float_array("x", x, min_ndim=1)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (T, K); got {x.shape}")
    dtype = x.dtype if out_dtype is None else checks.float_dtype("out_dtype", out_dtype)
    experts = _check_weights(w13, w2, gated=w13.gated if isinstance(w13, Weight) else False)
    if hidden_scale is SAME:
        if activation_scale is not None and not isinstance(activation_scale, str):
            raise ValueError(
                "hidden_scale must be given where activation_scale is a number, which is of x and "
                "not of the hidden rows"
            )
        hidden_scale = activation_scale
    indices, weights = _check_choice(expert_indices, expert_weights, x.shape[0])

    held = indices if expert_offset is None else indices - _offset(expert_offset)
    is_held = (held >= 0) & (held < experts)
    group = jnp.where(is_held, held, experts).reshape(-1)  # those of no expert here come last
    order, place, sizes = _sorted(group, experts)

    hidden_dtype = jnp.dtype(jnp.bfloat16) if x.dtype == jnp.float32 else x.dtype
    hidden = ragged_linear(
        _permuted(_repeated(x, indices.shape[1]), order),
        w13,
        sizes,
        b13,
        activation=activation,
        activation_scale=activation_scale,
        out_dtype=hidden_dtype,
        batch_invariant=batch_invariant,
    )
    rows = ragged_linear(
        hidden,
        w2,
        sizes,
        b2,
        activation_scale=hidden_scale,
        out_dtype=jnp.float32,
        batch_invariant=batch_invariant,
    )
    rows = _permuted(rows, place)
    rows = rows.reshape(*indices.shape, w2.shape[1])
    return _combined(rows, jnp.where(is_held, weights, 0)).astype(dtype)


def _sorted(group: jax.Array, groups: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The stable order of pairs by their group.

    Args:
        group: integers (P,), 0 to groups; those of `groups` are in none.
        groups: how many.

    Returns:
        order: which pair comes at each place, int32 (P,).
        place: where each pair comes, int32 (P,): the inverse.
        sizes: of the groups, int32 (groups,).
    """
    pairs = group.shape[0]
    at = jnp.arange(pairs, dtype=jnp.int32)
    if pairs <= COUNTED_PAIRS:
        # Pairs before each pair, and pairs of each group: one comparison of keys with ranges.
        key = group * pairs + at
        start = jnp.arange(groups, dtype=jnp.int32) * pairs
        low = jnp.concatenate([start, jnp.zeros_like(key)])
        high = jnp.concatenate([start + pairs, key])
        inside = (key[None] >= low[:, None]) & (key[None] < high[:, None])
        sizes, place = jnp.split(inside.sum(axis=1, dtype=jnp.int32), [groups])
        order = jnp.where(place[None] == at[:, None], at[None], 0).sum(axis=1, dtype=jnp.int32)
        return order, place, sizes
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    place = jnp.zeros_like(at).at[order].set(at, unique_indices=True, mode="promise_in_bounds")
    starts = jnp.searchsorted(
        group[order], jnp.arange(groups + 1, dtype=jnp.int32), method="scan_unrolled"
    )
    return order, place, jnp.diff(starts).astype(jnp.int32)


def _repeated(x: jax.Array, top_k: int) -> jax.Array:
    """Each row `top_k` times, one behind another."""
    tokens, k = x.shape
    return jnp.broadcast_to(x[:, None], (tokens, top_k, k)).reshape(tokens * top_k, k)


def _permuted(rows: jax.Array, order: jax.Array) -> jax.Array:
    """Rows in an order that has each once, so that the transpose adds nothing up."""
    return rows.at[order].get(unique_indices=True, mode="promise_in_bounds")


def _combined(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """The weighted sum over the experts of each token, float32, in their order."""
    weights = weights.astype(jnp.float32)
    total = jnp.zeros((rows.shape[0], rows.shape[2]), jnp.float32)
    for j in range(rows.shape[1]):
        total = total + fenced(rows[:, j] * weights[:, j, None])
    return total


def _check_weights(w13: Any, w2: Any, *, gated: bool) -> int:
    """The number of experts, once both weights are known to go together."""
    for name, weight in (("w13", w13), ("w2", w2)):
        if not isinstance(weight, Weight):
            raise TypeError(
                f"{name} must be an Nvfp4Tensor or a RepackedWeight; got {type(weight).__name__}"
            )
        weight.check()
        if weight.ndim != 3:
            raise ValueError(f"{name} must have shape (E, N, K); got {weight.shape}")
    experts, n, _ = w13.shape
    hidden = n // 2 if gated else n
    if (w2.shape[0], w2.shape[2]) != (experts, hidden):
        raise ValueError(
            f"w2 must have shape ({experts}, K, {hidden}) to go with a "
            f"{'gated' if gated else 'plain'} w13 of shape {w13.shape}; got {w2.shape}"
        )
    return experts


def _check_choice(
    indices: ArrayLike, weights: ArrayLike, tokens: int
) -> tuple[jax.Array, jax.Array]:
    """The router's choice, once both arrays are known to go with the tokens."""
    chosen = checks.as_integers("expert_indices", indices)
    weights = checks.as_float_array("expert_weights", weights, min_ndim=0)
    if chosen.ndim != 2 or chosen.shape[0] != tokens:
        raise ValueError(
            f"expert_indices must have shape (T, top_k) with T = {tokens}; got {chosen.shape}"
        )
    if weights.shape != chosen.shape:
        raise ValueError(
            f"expert_weights must have the shape of expert_indices, {chosen.shape}; "
            f"got {weights.shape}"
        )
    return chosen, weights


def _offset(expert_offset: ArrayLike) -> jax.Array:
    offset = checks.as_integers("expert_offset", expert_offset)
    if offset.shape not in ((), (1,)):
        raise ValueError(f"expert_offset must have shape () or (1,); got {offset.shape}")
    return offset.reshape(())
