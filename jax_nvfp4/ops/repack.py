# SPDX-License-Identifier: Apache-2.0
"""The public `repack`: puts weights into the order that an architecture's GEMM reads."""

import functools
from typing import Any

import jax
import numpy as np

from jax_nvfp4.config import ARCHES, REFERENCE
from jax_nvfp4.layout.orders import Order, order
from jax_nvfp4.ops.device import local_arch
from jax_nvfp4.ops.sharding import typed
from jax_nvfp4.ops.sharding.typed import Placement
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight


def repack(weight: Any, arch: str | None = None) -> Any:
    """Puts weights into the order that an architecture's GEMM reads. Do it once, at load.

    Args:
        weight: an Nvfp4Tensor (..., N, K), or any pytree with such tensors in it: a whole params
            tree. Weights that are repacked for another architecture are repacked for this one;
            other leaves are returned as they are. Abstract weights become abstract ones.
        arch: "sm_90a", "sm_100f", "sm_103a", "sm_120f" or "reference"; that of this machine's
            default device if None.

    Returns:
        A RepackedWeight, or the tree with each NVFP4 weight replaced by one.

    Raises:
        TypeError: there is no NVFP4 weight in `weight`, or one whose parts have been cast.
        ValueError: the arch is unknown, a tensor has no rows axis, or its parts do not belong
            together.
    """
    arch = local_arch() if arch is None else arch
    if arch not in (*ARCHES, REFERENCE):
        raise ValueError(f"arch must be one of {', '.join((*ARCHES, REFERENCE))}; got {arch!r}")
    if not any(map(_is_weight, jax.tree.leaves(weight, is_leaf=_is_weight))):
        raise TypeError(f"there is no Nvfp4Tensor to repack in a {type(weight).__name__}")

    def one(node: Any) -> Any:
        if not _is_weight(node) or getattr(node, "arch", None) == arch:
            return node
        if isinstance(node.data, jax.ShapeDtypeStruct):
            return jax.eval_shape(one, node)
        node.check()
        if node.ndim < 2:
            raise ValueError(f"a weight must have shape (..., N, K); got {node.shape}")
        if isinstance(node, RepackedWeight):
            node = node.canonical()
        n, k = node.shape[-2:]
        on_host = isinstance(node.data, np.ndarray) and node.ndim == 2
        pack = order(arch).pack if on_host else functools.partial(_pack, arch)
        data, block_scale = typed.call(
            functools.partial(pack, gated=node.gated),
            (node.data, node.block_scale),
            lambda: _placement(node, order(arch)),
        )
        scale = _interleaved(node, order(arch)) if node.gated else node.global_scale
        return RepackedWeight(
            data, block_scale, scale, arch, n, k, node.dtype, node.parts, node.gated
        )

    return jax.tree.map(one, weight, is_leaf=_is_weight)


@functools.partial(jax.jit, static_argnums=0, static_argnames="gated")
def _pack(
    arch: str, data: jax.Array, block_scale: jax.Array, *, gated: bool
) -> tuple[jax.Array, jax.Array]:
    """One program for a shape; operation by operation, XLA would compile dozens."""
    return order(arch).pack(data, block_scale, gated=gated)


@functools.partial(jax.jit, static_argnums=0)
def _interleave(to: Order, scale: jax.Array) -> jax.Array:
    return to.gated.interleave(scale, -1)


def _is_weight(node: Any) -> bool:
    return isinstance(node, Nvfp4Tensor | RepackedWeight)


def _row_parts(n: int, to: Order, *, gated: bool) -> int:
    """Into how many parts the rows of a repacked weight may be divided."""
    if to.canonical:
        return n // 2 if gated else n
    return n // to.row_tile if to.whole_tiles(n) else 1


def _interleaved(node: Nvfp4Tensor, to: Order) -> jax.Array:
    """The global scale of a gated weight, in the order of its rows if it has one for each."""
    scale = node.global_scale
    if scale.ndim < node.ndim - 1:
        return scale
    parts = (*scale.shape[:-1], _row_parts(scale.shape[-1], to, gated=True))
    (result,) = typed.call(
        lambda scale: (_interleave(to, scale),),
        (scale,),
        lambda: ((typed.entries(scale), parts),),
    )
    return result


def _placement(node: Nvfp4Tensor, to: Order) -> Placement:
    """Places the parts of a repacked weight: with its rows, if whole tiles of them are.

    Args:
        node: the canonical weight.
        to: the order.
    """
    data, block_scale = node.data, node.block_scale
    *lead, n, _ = data.shape
    rows = _row_parts(n, to, gated=node.gated)
    columns = block_scale.shape[-1] if to.canonical else 1

    def placed(array: jax.Array, shape: tuple[int, ...]) -> Any:
        rest = len(shape) - 2
        wished = typed.entries(array) if to.canonical else (*typed.entries(array)[:-1], None)
        return (*wished, *[None] * rest), (*lead, rows, columns, *[1] * rest)

    codes, scales = to.shapes(n, 1, gated=node.gated)
    return placed(data, codes), placed(block_scale, scales)
