# SPDX-License-Identifier: Apache-2.0
"""Which leaves of the params meet products alone, and over which of their axes."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax

from jax_nvfp4.conversion import view as views
from jax_nvfp4.conversion.interpret import Interpreter
from jax_nvfp4.conversion.rules import Product
from jax_nvfp4.conversion.view import Atom, Leaf, View, ViewAxis


@dataclasses.dataclass(frozen=True)
class Use:
    """What a program does with a leaf.

    Attributes:
        shape: of the leaf.
        dtype: of the leaf.
        contracting: the axes of the leaf that its products sum over.
        primitives: what meets the leaf, on the way to its products too, by name.
    """

    shape: tuple[int, ...]
    dtype: Any
    contracting: tuple[int, ...]
    primitives: tuple[str, ...]


@dataclasses.dataclass
class Record:
    """What the analysis has seen of one leaf.

    Attributes:
        products: of each product, the atoms that it sums over, and all others that it has.
        batch: atoms that are indexed, scanned over, or batch axes of a product.
        divided: atoms that a `shard_map` divides, and in how many parts.
        primitives: what the leaf met.
        inputs: of each product, what it multiplies.
        obstacle: what needs the leaf as an array, None where nothing does.
    """

    products: list[tuple[frozenset[Atom], frozenset[Atom]]] = dataclasses.field(
        default_factory=list
    )
    batch: set[Atom] = dataclasses.field(default_factory=set)
    divided: dict[Atom, int] = dataclasses.field(default_factory=dict)
    primitives: dict[str, None] = dataclasses.field(default_factory=dict)
    inputs: list[Product] = dataclasses.field(default_factory=list)
    obstacle: str | None = None


class Analyzer(Interpreter):
    """Runs the dense program and records what it does with each leaf.

    Attributes:
        records: one for each leaf, by its key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[int | None, Record] = {}

    def _record(self, view: View) -> Record:
        record = self.records.setdefault(view.leaf.key, Record())
        record.primitives.update(dict.fromkeys(view.trail))
        return record

    def product(
        self, eqn: Any, operands: list[Any], view: View, product: Product
    ) -> list[jax.Array]:
        """Records the axes, and gives the dense result."""
        record = self._record(view)
        record.primitives[eqn.primitive.name] = None
        every = frozenset(atom for axis in view.axes for atom in axis)
        contracting = frozenset(product.contracting)
        record.products.append((contracting, every - contracting))
        record.inputs.append(product)
        record.batch.update((*product.batch, *product.groups))
        return self.bind(eqn, [o.dense if isinstance(o, View) else o for o in operands])

    def dense(self, view: View, why: str) -> jax.Array:
        """Records the obstacle, and gives the array."""
        record = self._record(view)
        record.primitives[why] = None
        looked_up = why == "gather"
        record.obstacle = record.obstacle or ("looked up (gather)" if looked_up else why)
        return self.value(view)

    def value(self, view: View) -> jax.Array:
        """The array that the program has here."""
        assert view.dense is not None
        return view.dense

    def indexed(self, view: View, digits: ViewAxis) -> None:
        """Records batch axes."""
        self._record(view).batch.update(digits)

    def divided(self, view: View, atom: Atom, ways: int) -> None:
        """Records a division over devices."""
        divided = self._record(view).divided
        divided[atom] = max(ways, divided.get(atom, 1))


@dataclasses.dataclass(frozen=True)
class Piece:
    """An axis of the array that is quantized: a leaf's, or a part of one."""

    size: int
    role: str  # "batch", "free" or "contracting"


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a leaf becomes an NVFP4 weight (batch..., N, K).

    Attributes:
        axes: the atoms of each axis of the leaf, cut as finely as any use of it asks.
        batch: those that are leading axes of the weight.
        free: those that N runs over.
        contracting: those that K runs over.
        pieces: the axes of the array that is quantized; those of the leaf where no use cuts them.
    """

    axes: views.ViewAxes
    batch: ViewAxis
    free: ViewAxis
    contracting: ViewAxis
    pieces: tuple[Piece, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the batch axes."""
        return tuple(atom.size for atom in self.batch)

    @property
    def n(self) -> int:
        """Rows of one matrix."""
        return views.size(self.free)

    @property
    def k(self) -> int:
        """Columns of one matrix."""
        return views.size(self.contracting)

    @property
    def contracting_axes(self) -> tuple[int, ...]:
        """The axes of the leaf that are summed over."""
        return tuple(sorted({atom.axis for atom in self.contracting}))

    def leaf(self, name: str) -> Leaf:
        """What a view of the leaf says of it while the program runs."""
        return Leaf(None, name, self.free, self.contracting)


def layout(shape: Sequence[int], record: Record) -> Layout | str:
    """How a leaf is to be quantized, or why it cannot be."""
    axes = _elementary(shape, record)
    if axes is None:
        return "its axes are cut in ways that do not agree"
    atoms = [atom for axis in axes for atom in axis]
    roles: dict[Atom, str] = {}
    for atom in atoms:
        summed = [any(a.covers(atom) for a in contracting) for contracting, _ in record.products]
        batch = any(a.covers(atom) for a in record.batch)
        if any(summed) and not all(summed):
            return "its products sum over different axes"
        if any(summed) and batch:
            return "its products sum over an axis that is indexed or scanned"
        roles[atom] = "contracting" if any(summed) else "batch" if batch else "free"

    def of(role: str) -> ViewAxis:
        return tuple(atom for atom in atoms if roles[atom] == role)

    result = Layout(axes, of("batch"), of("free"), of("contracting"), _pieces(shape, axes, roles))
    for atom, ways in record.divided.items():
        if atom in result.contracting:
            return "a shard_map divides the axis that is summed over"
        if atom in result.free and atom != result.free[0]:
            return "a shard_map divides rows that do not lie together"
        if atom in result.free and (result.n // ways) % 128:
            return f"a shard_map divides {result.n} rows over {ways} devices, not by tiles of 128"
    return result


def _elementary(shape: Sequence[int], record: Record) -> views.ViewAxes | None:
    """The axes of a leaf, cut wherever a use of it cuts them; None if the cuts do not agree."""
    used = {*record.batch, *record.divided}
    for product in record.products:
        used.update(*product)
    axes = []
    for number, length in enumerate(shape):
        strides = {1, length}
        for atom in used:
            if atom.axis == number and not atom.is_range:
                strides |= {atom.stride, atom.stride * atom.size}
        ordered = sorted(strides)
        steps = list(itertools.pairwise(ordered))
        if any(large % small for small, large in steps):
            return None
        axes.append(tuple(Atom(number, small, large // small) for small, large in reversed(steps)))
    return tuple(axes)


def _pieces(
    shape: Sequence[int], axes: views.ViewAxes, roles: dict[Atom, str]
) -> tuple[Piece, ...]:
    """The axes of the array that is quantized: neighbors of one role in one axis are one."""
    pieces = []
    for length, axis in zip(shape, axes, strict=True):
        own: list[Piece] = [] if axis else [Piece(length, "free")]
        for atom in axis:
            role = roles[atom]
            if own and own[-1].role == role != "batch":
                own[-1] = Piece(own[-1].size * atom.size, role)
            else:
                own.append(Piece(atom.size, role))
        pieces += own
    return tuple(pieces)
