# SPDX-License-Identifier: Apache-2.0
"""Meshes with explicit axes, where the sharding of an array is part of its type.

The operations work on such arrays as on those of a mesh with automatic axes: inside, the compiler
divides the work; outside, the results have the types that follow from the operands.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

Entry = str | tuple[str, ...] | None
"""The mesh axes that divide an axis of an array: an element of a PartitionSpec."""


def entries(array: jax.Array) -> tuple[Entry, ...]:
    """The entry of each axis of an array, as its type says; None on automatic axes."""
    spec = jax.typeof(array).sharding.spec.partitions
    return (*spec, *[None] * (array.ndim - len(spec)))


def _explicit_mesh(operands: Iterable[Any]) -> tuple[AbstractMesh, tuple[str, ...]] | None:
    """The mesh in the types of some arrays and its explicit axes, if it has any."""
    for array in operands:
        mesh = jax.typeof(array).sharding.mesh
        axes = tuple(
            name
            for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
            if kind == AxisType.Explicit
        )
        if axes:
            return mesh, axes
    return None


def call(
    function: Callable[..., Any], operands: tuple[Any, ...], placement: Callable[..., Any]
) -> Any:
    """Calls a function of arrays with the compiler in charge of shardings inside of it.

    Args:
        function: of the operands; gives a tuple of arrays.
        operands: pytrees of arrays.
        placement: function of nothing that gives, for each result, the entries of its sharding
            and the number of parts that each of its axes may be divided into; asked only where a
            type of the operands has a mesh with explicit axes. An entry is cut to what divides that
            number, and to mesh axes that no axis before it takes.

    Returns:
        The results of the function.
    """
    found = _explicit_mesh(jax.tree.leaves(operands))
    if found is None:
        return function(*operands)
    mesh, axes = found

    def sharding(wished: tuple[Entry, ...], counts: tuple[int, ...]) -> NamedSharding:
        taken: set[str] = set()
        return NamedSharding(
            mesh,
            PartitionSpec(*(_cut(e, n, mesh, taken) for e, n in zip(wished, counts, strict=True))),
        )

    placed = tuple(sharding(*result) for result in placement())
    return jax.sharding.auto_axes(function, axes=axes, out_sharding=placed)(*operands)


def _cut(entry: Entry, count: int, mesh: AbstractMesh, taken: set[str]) -> tuple[str, ...] | None:
    """The mesh axes of an entry that divide `count` and are not taken; they are, then."""
    kept: list[str] = []
    for axis in entry if isinstance(entry, tuple) else (entry,):
        if axis is None or axis in taken:
            continue
        if not count or count % math.prod(mesh.shape[a] for a in (*kept, axis)):
            break
        kept.append(axis)
        taken.add(axis)
    return tuple(kept) or None


Placement = tuple[tuple[tuple[Entry, ...], tuple[int, ...]], ...]
"""Entries and greatest numbers of parts, of each result."""
