# SPDX-License-Identifier: Apache-2.0
"""Where the parts of NVFP4 weights lie on a mesh, given where the dense weights would."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_nvfp4 import numerics
from jax_nvfp4.layout.orders import order
from jax_nvfp4.products.contraction import Weight
from jax_nvfp4.products.kernel import Nvfp4Kernel, as_kernel
from jax_nvfp4.products.leaf import ConvertedLeaf
from jax_nvfp4.tensor import Nvfp4Tensor, RepackedWeight

_Entry = tuple[str, ...]


def shardings(params: Any, mesh: Mesh | AbstractMesh, specs: Any) -> Any:
    """The shardings of params with NVFP4 weights, from those of the dense params.

    They are for `jax.device_put`, `jax.jit` and `jax_nvfp4.load_params`; values do not depend on
    them. A part of a weight is divided as its array would be, as far as the part can be: rows
    anywhere, columns between blocks of 16, a repacked weight between tiles of rows and not along
    its columns. Mesh axes that cannot divide a part are left out for it. Where several axes of an
    array became the rows (or the columns), all that divides them divides the rows, in their order.

    Args:
        params: a tree of arrays, Nvfp4Tensors, RepackedWeights and Nvfp4Kernels, concrete or
            abstract (`jax.eval_shape`, `jax.ShapeDtypeStruct`).
        mesh: the devices.
        specs: a `PartitionSpec` for each array and for each NVFP4 weight of params, or a tree
            prefix of that; None is `PartitionSpec()`. The axes of a weight are those of its
            `shape`: of an Nvfp4Kernel those of the dense array, of an Nvfp4Tensor or a
            RepackedWeight (..., N, K), of a weight that `convert(fuse=True)` joined (rows, K).
            What goes with a kernel, a static scale or a dense copy, lies with it.

    Returns:
        A tree like params with a `NamedSharding` for each array and each part.

    Raises:
        TypeError: a leaf of `specs` is none of these.
        ValueError: a spec has more entries than its array has axes, or names an axis that the mesh
            does not have.
    """

    def below(path: Any, spec: Any, subtree: Any) -> Any:
        name = jax.tree_util.keystr(path)
        if spec is None:
            spec = PartitionSpec()
        if not isinstance(spec, PartitionSpec):
            raise TypeError(f"specs{name} must be a PartitionSpec; got {type(spec).__name__}")
        place = functools.partial(_of_leaf, name, mesh, spec)
        return jax.tree.map(place, subtree, is_leaf=_is_weight)

    def is_spec(node: Any) -> bool:
        return node is None or isinstance(node, PartitionSpec)

    return jax.tree_util.tree_map_with_path(below, specs, params, is_leaf=is_spec)


def _is_weight(node: Any) -> bool:
    return isinstance(node, Nvfp4Tensor | RepackedWeight | Nvfp4Kernel | ConvertedLeaf)


def _of_leaf(name: str, mesh: Mesh | AbstractMesh, spec: PartitionSpec, leaf: Any) -> Any:
    """The sharding of an array, or a weight with the shardings of its parts."""
    if isinstance(leaf, ConvertedLeaf):
        place = functools.partial(_of_leaf, name, mesh, spec)
        kernel = place(leaf.kernel)
        dense = None if leaf.dense is None else place(leaf.dense)
        scale = None if leaf.input_scale is None else _of_scale(leaf.kernel, mesh, spec)
        return ConvertedLeaf(kernel, dense, scale)
    if len(spec) > len(leaf.shape):
        raise ValueError(
            f"the spec {spec} of params{name} has {len(spec)} entries for the {len(leaf.shape)} "
            f"axes of shape {leaf.shape}"
        )
    if not _is_weight(leaf):
        return NamedSharding(mesh, spec)
    entries = [_names(entry) for entry in spec] + [()] * (len(leaf.shape) - len(spec))
    unknown = {axis for entry in entries for axis in entry} - set(mesh.axis_names)
    if unknown:
        raise ValueError(
            f"the spec {spec} of params{name} names {sorted(unknown)}; the mesh has the axes "
            f"{mesh.axis_names}"
        )
    kernel = as_kernel(leaf)
    assert kernel is not None
    of_weight = _of_parts(kernel.weight, mesh, *_of_matrix(kernel, entries))
    return Nvfp4Kernel(of_weight, kernel.axes) if isinstance(leaf, Nvfp4Kernel) else of_weight


def _of_scale(kernel: Nvfp4Kernel, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Any:
    """The sharding of the static scale of each matrix of a kernel."""
    entries = [*spec, *[None] * kernel.ndim]
    of_batch = (_cut(_names(entries[i]), kernel.shape[i], mesh) or None for i in kernel.batch)
    return NamedSharding(mesh, PartitionSpec(*of_batch))


def _names(entry: Any) -> _Entry:
    """The mesh axes of an entry of a spec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _of_matrix(
    kernel: Nvfp4Kernel, entries: Sequence[_Entry]
) -> tuple[list[_Entry], _Entry, _Entry]:
    """What divides the batch axes, the rows and the columns of a kernel's weight."""
    rows, columns = (
        tuple(axis for place in places for axis in entries[place])
        for places in (kernel.free, kernel.contracting)
    )
    return [entries[place] for place in kernel.batch], rows, columns


def _of_parts(
    weight: Weight, mesh: Mesh | AbstractMesh, lead: list[_Entry], rows: _Entry, columns: _Entry
) -> Any:
    """A weight with the shardings of its parts.

    Args:
        weight: (batch..., N, K).
        mesh: the devices.
        lead: what divides each batch axis.
        rows: what divides N.
        columns: what divides K.
    """
    *sizes, n, k = weight.shape
    row_parts, column_parts = _divisible(weight, n, k)
    lead = [_cut(entry, size, mesh) for entry, size in zip(lead, sizes, strict=True)]
    whole = [*lead, _cut(rows, row_parts, mesh), _cut(columns, column_parts, mesh)]

    def placed(part: Any, entries: Sequence[_Entry]) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*(e or None for e in entries[: part.ndim])))

    # A global scale has some of the leading axes and perhaps the rows.
    parts = [
        placed(weight.data, whole),
        placed(weight.block_scale, whole),
        placed(weight.global_scale, whole[:-1]),
    ]
    return jax.tree.unflatten(jax.tree.structure(weight), parts)


def _divisible(weight: Weight, n: int, k: int) -> tuple[int, int]:
    """The greatest numbers of parts that the rows and the columns of a weight come in."""
    blocks = k // numerics.BLOCK if k % numerics.BLOCK == 0 else 1
    if isinstance(weight, Nvfp4Tensor):
        return 1 if weight.gated else n, blocks
    in_order = order(weight.arch)
    if in_order.canonical:
        return 1 if weight.gated else n, blocks
    rows = in_order.gated.rows(n) if weight.gated else n
    whole = rows == n and in_order.whole_tiles(n)
    return n // in_order.row_tile if whole else 1, 1


def _cut(entry: _Entry, count: int, mesh: Mesh | AbstractMesh) -> _Entry:
    """The first mesh axes of an entry that together divide `count`."""
    kept: list[str] = []
    for axis in entry:
        if count % math.prod(mesh.shape[a] for a in (*kept, axis)):
            break
        kept.append(axis)
    return tuple(kept)
