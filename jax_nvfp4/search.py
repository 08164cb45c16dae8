# SPDX-License-Identifier: Apache-2.0
"""The definition of block scales that are chosen by the error they leave, bit for bit.

`jax_nvfp4.numerics` gives each block the scale that maps its amax to 6. Another scale often leaves
a smaller error, since the codes near 6 lie far apart: 4 and 6. A search tries several block scales
and keeps the best one; the format, its readers and its kernels stay the same.

Dynamic scaling under a search takes `S = 1536 / amax`, 1536 = 256 * 6, so that there is room above
the scale of the block with the amax: 256 becomes up to 448. Where a global scale g is given,
`S = 1 / g` as ever. With `t = block_amax * (S * (1/6))`, each block has these candidates:

- "4over6" (Cook et al., "Four Over Six", arXiv 2512.02010): e4m3(min(t, 448)), which maps the amax
  to 6, and e4m3(min(1.5 * t, 448)), which maps it to 4.
- "sweep" ("ScaleSweep", arXiv 2606.07618; NVIDIA ModelOpt's FP8 scale sweep): the e4m3 numbers from
  2 below to 6 above e4m3(min(t, 448)), in steps of one code, among 0 .. 448. The window holds both
  candidates of "4over6" and scales that cut off the amax.

The error of a block scale s is

    y = |x| * S                          (0 below 2**-40, at most 2**15)
    e = bf16(y - q * s)                  (q: the magnitude of the code that s gives to x)
    E = sum of w * e * e                 (w: the importance, 1 if not given)

in float32, round to nearest even. The sum goes by halves: elements 0..7 plus elements 8..15, then
the 4 first sums plus the 4 last, then 2, then 1. The least E wins; among equals the scale that
maps the amax to 6 does, then the smallest one.

The importance of a block's elements counts relative to their largest: w is the importance divided
by the power of two at or below the largest one, rounded to bf16; below 2**-30 of that power it is
0. A block whose importance is all 0 keeps the first candidate. Importance that is negative, NaN or
Inf makes the scale of its block NaN, as a bad element does.

These bits do not hang on a backend: `q * s` has 6 significant bits and `w * e * e` 24, so that both
products are exact, whether or not a compiler contracts them with the sum that follows into an fma.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4 import numerics

Search = Literal["4over6", "sweep"]
SEARCHES: tuple[Search, ...] = ("4over6", "sweep")

AMAX_SCALE = 256.0
"""The block scale that the tensor's amax maps to 6 under a search: 6 codes below 448."""

SWEEP_STEPS = (0, -2, -1, 1, 2, 3, 4, 5, 6)
"""Candidates of a sweep in codes from the scale that maps the amax to 6, in the order in which
equals win."""

_LARGEST_SCALE = 0x7E  # 448
_NAN_SCALE = 0x7F
_Y_MIN, _Y_MAX = 2.0**-40, 2.0**15
_IMPORTANCE_BITS = 30  # binades below the largest importance of a block that still count


def dynamic_scales(largest: jax.Array, search: Search | None) -> tuple[jax.Array, jax.Array]:
    """Encode scale and global scale of data with this amax, under a search or none.

    Args:
        largest: float32, from `numerics.amax`.
        search: which search.

    Returns:
        (S, D), float32 of the shape of `largest`.
    """
    return numerics.dynamic_scales(largest, numerics.E4M3_MAX if search is None else AMAX_SCALE)


def quantize(
    x: jax.Array,
    encode: jax.Array,
    decode: jax.Array,
    search: Search,
    importance: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Quantizes with given global scales, choosing each block scale by its error.

    Args:
        x: (..., K) of any floating dtype, any K.
        encode: S, float32, broadcast against the leading axes `x.shape[:-1]`.
        decode: D, likewise.
        search: which candidates.
        importance: float32 (K,), how much the squared error of each column counts.

    Returns:
        (data, block_scale), as of `numerics.quantize`.
    """
    blocks = numerics.as_blocks(x)
    weights = None if importance is None else block_weights(importance)
    choices = candidates(numerics.scaled_amax(blocks, encode), search)
    encode = numerics.with_ndim(encode, blocks.ndim - 2)
    y = numerics.magnitude(blocks) * encode[..., None, None]
    y = numerics.computed_once(jnp.where(y < _Y_MIN, 0, jnp.minimum(y, _Y_MAX)))

    def better(best: tuple[jax.Array, jax.Array], bits: jax.Array) -> tuple[Any, None]:
        q = numerics.e2m1_decode(numerics.block_codes(blocks, bits, decode))
        e = lax.reduce_precision(y - q * numerics.e4m3_decode(bits)[..., None], 8, 7)
        squares = e * e if weights is None else numerics.with_ndim(weights, e.ndim) * (e * e)
        error = _sum_by_halves(squares)
        wins = error < best[1]
        return (jnp.where(wins, bits, best[0]), jnp.where(wins, error, best[1])), None

    start = choices[0], jnp.full_like(y[..., 0], numerics.FLT_MAX)
    (bits, _), _ = lax.scan(better, start, choices)
    if weights is not None:
        bad = numerics.with_ndim(jnp.isnan(weights).any(-1), bits.ndim)
        bits = jnp.where(bad, jnp.uint8(_NAN_SCALE), bits)
    return numerics.encode_blocks(blocks, bits, decode)


def candidates(scaled: jax.Array, search: Search) -> jax.Array:
    """The block scales to choose from, in the order in which equals win.

    Args:
        scaled: float32 (..., blocks), from `numerics.scaled_amax`.
        search: which search.

    Returns:
        uint8 (candidates, ..., blocks), bits of float8_e4m3fn; the first maps the
        amax to 6, and all are NaN where that is.
    """
    scaled = numerics.computed_once(scaled)
    first = numerics.block_scale_bits(scaled)
    if search == "4over6":
        return jnp.stack([first, numerics.block_scale_bits(1.5 * scaled)])
    steps = jnp.asarray(SWEEP_STEPS, jnp.int32).reshape(-1, *[1] * first.ndim)
    first = first[None]
    others = jnp.clip(first.astype(jnp.int32) + steps, 0, _LARGEST_SCALE).astype(jnp.uint8)
    return jnp.where(first == _NAN_SCALE, first, others)


def block_weights(importance: jax.Array) -> jax.Array:
    """The importance of the elements of each block relative to the largest of them.

    Args:
        importance: float32 (K,).

    Returns:
        float32 (ceil(K/16), 16) of 8 significant bits, in [0, 2]; NaN for importance that is
        negative, NaN or Inf.
    """
    blocks = numerics.as_blocks(importance)
    bits = lax.bitcast_convert_type(blocks, jnp.int32)
    exponent = bits >> 23
    down = jnp.max(exponent, axis=-1, keepdims=True) - 127
    counts = (exponent > 0) & (exponent - down >= 127 - _IMPORTANCE_BITS)
    relative = lax.bitcast_convert_type(jnp.where(counts, bits - (down << 23), 0), jnp.float32)
    valid = ((bits >= 0) & (exponent < 255)) | (bits << 1 == 0)
    return numerics.nan_where(~valid, lax.reduce_precision(relative, 8, 7))


def _sum_by_halves(terms: jax.Array) -> jax.Array:
    """The sum along the last axis, whose length is a power of two."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        terms = terms[..., :half] + terms[..., half:]
    return terms[..., 0]
