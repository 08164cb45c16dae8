# SPDX-License-Identifier: Apache-2.0
"""What a traced value knows of the leaf of the params that it comes from.

A program may cut the axes of a weight, join them, and put them into another order, before it
multiplies. An axis of a view is therefore a tuple of atoms, each a run of the digits of one axis of
the leaf. No rule here touches the data.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


class NotAView(Exception):  # noqa: N818 - no error: the leaf stays as it is
    """The result of an operation is no view of the leaf; the message is what did it."""


@dataclasses.dataclass(frozen=True)
class Atom:
    """A digit of an index along an axis of a leaf: it counts to `size` in steps of `stride`.

    Attributes:
        axis: of the leaf.
        stride: along it.
        size: of the digit, or of the range of it that a slice took.
        is_range: whether it is such a range.
    """

    axis: int
    stride: int
    size: int
    is_range: bool = False

    def split(self, major: int, minor: int) -> tuple["Atom", "Atom"]:
        """The two digits of sizes (major, minor) that it is made of.

        Raises:
            NotAView: it is a range, which is none.
        """
        if self.is_range:
            raise NotAView("a slice, then cut")
        return (
            Atom(self.axis, self.stride * minor, major),
            Atom(self.axis, self.stride, minor),
        )

    def covers(self, other: "Atom") -> bool:
        """Whether the other digit is part of this one."""
        return (
            not self.is_range
            and self.axis == other.axis
            and self.stride <= other.stride
            and other.stride * other.size <= self.stride * self.size
        )


ViewAxis = tuple[Atom, ...]
"""The atoms that an axis of a view runs over, major first; none where its size is 1."""
ViewAxes = tuple[ViewAxis, ...]


def size(axis: ViewAxis) -> int:
    """The size of an axis of a view."""
    return math.prod(atom.size for atom in axis)


def whole(shape: Sequence[int]) -> ViewAxes:
    """The axes of a leaf as it is."""
    return tuple((Atom(i, 1, n),) if n != 1 else () for i, n in enumerate(shape))


def reshape(axes: ViewAxes, shape: Sequence[int]) -> ViewAxes:
    """The axes after a reshape.

    Raises:
        NotAView: the new axes cut across digits.
    """
    left = [atom for axis in axes for atom in axis]
    result = []
    for wanted in shape:
        axis: ViewAxis = ()
        while size(axis) < wanted:
            atom, rest = left.pop(0), wanted // size(axis)
            if atom.size > rest:
                if wanted % size(axis) or atom.size % rest:
                    raise NotAView("reshape")
                atom, minor = atom.split(rest, atom.size // rest)
                left.insert(0, minor)
            axis = (*axis, atom)
        if size(axis) != wanted:
            raise NotAView("reshape")
        result.append(axis)
    return tuple(result)


def cut(axis: ViewAxis, start: int, stop: int) -> tuple[ViewAxis, int, int, ViewAxis]:
    """What a slice of an axis takes: a range of its first digits, and all of the others.

    A slice that is one of several equal parts is one index of the first digits.

    Returns:
        The first digits, the range [start, stop) of what they count, and the digits that stay.

    Raises:
        NotAView: the slice cuts across digits.
    """
    length = stop - start
    if not length:
        raise NotAView("slice")
    if not start % length and not size(axis) % length:
        first, rest = reshape((axis,), (size(axis) // length, length))
        return first, start // length, start // length + 1, rest
    for place in range(1, len(axis) + 1):
        step = size(axis[place:])
        if not start % step and not stop % step:
            return axis[:place], start // step, stop // step, axis[place:]
    raise NotAView("slice")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of the params that a view comes from.

    Attributes:
        key: its number while the program is analyzed, None while it runs, so that like leaves
            share what is traced for one of them.
        name: for messages.
        free: the atoms that the rows of its NVFP4 weight run over, major first.
        contracting: the atoms that its columns run over.
        part: of a weight that several leaves share, its number and the leaf's first row.
    """

    key: int | None
    name: str = dataclasses.field(compare=False)
    free: ViewAxis = ()
    contracting: ViewAxis = ()
    part: tuple[int, int] | None = None


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A leaf of the params, or a part of it, with its axes rearranged; a pytree.

    Attributes:
        value: a pytree of arrays whose leading axes are the `batch` atoms, what stands for the leaf
            in products; None while the program is analyzed.
        dense: the array that the program has here, None where the leaf is held in NVFP4 alone.
        leaf: where it comes from.
        axes: the atoms of each axis of the array.
        batch: the atoms of the leading axes of `value`.
        dtype: of the array.
        trail: the primitives between the leaf and here.
    """

    value: Any
    dense: jax.Array | None
    leaf: Leaf
    axes: ViewAxes
    batch: ViewAxis
    dtype: jnp.dtype
    trail: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return tuple(map(size, self.axes))

    def rearranged(self, axes: Iterable[ViewAxis]) -> "View":
        """The same with other axes."""
        return dataclasses.replace(self, axes=tuple(axes))

    def tree_flatten(self) -> tuple[Any, Any]:
        """The arrays, and all else."""
        return (self.value, self.dense), (
            self.leaf,
            self.axes,
            self.batch,
            self.dtype,
            self.trail,
        )

    @classmethod
    def tree_unflatten(cls, static: Any, children: Any) -> "View":
        """Rebuilds a view."""
        return cls(*children, *static)
