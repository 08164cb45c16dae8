# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: what the weights of a function are multiplied with, from data."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_nvfp4.calibration import Calibration, InputStatistics
from jax_nvfp4.conversion import view as views
from jax_nvfp4.conversion.analysis import Layout, layout
from jax_nvfp4.conversion.convert import abstract, analyze, path_of
from jax_nvfp4.conversion.interpret import Interpreter
from jax_nvfp4.conversion.program import Traced
from jax_nvfp4.conversion.rules import Product, batch_first
from jax_nvfp4.conversion.view import Leaf, View


class _Totals:
    """The sums over all rows that a weight (batch..., N, K) was multiplied with."""

    def __init__(self, name: str, layout: Layout) -> None:
        self.name = name
        self.batch = tuple(atom.size for atom in layout.batch)
        matrices = int(np.prod(self.batch, dtype=np.int64))
        self.squares = np.zeros((matrices, layout.k), np.float64)
        self.amax = np.zeros(matrices, np.float32)
        self.rows = np.zeros(matrices, np.int64)

    def add(self, ids: np.ndarray, squares: np.ndarray, amax: np.ndarray, rows: np.ndarray) -> None:
        """Adds what some matrices, by their numbers, were multiplied with."""
        flat = ids.reshape(-1)
        squares = np.broadcast_to(squares, (*ids.shape, squares.shape[-1]))
        np.add.at(self.squares, flat, squares.reshape(flat.size, -1))
        np.maximum.at(self.amax, flat, np.broadcast_to(amax, ids.shape).reshape(-1))
        np.add.at(self.rows, flat, np.broadcast_to(rows, ids.shape).reshape(-1))

    def statistics(self) -> InputStatistics | None:
        """What was seen, None if nothing was.

        Raises:
            ValueError: an input was NaN or infinite.
        """
        if not self.rows.any():
            return None
        if not (np.isfinite(self.squares).all() and np.isfinite(self.amax).all()):
            raise ValueError(f"an input of {self.name} is NaN or infinite in these batches")
        mean = self.squares / np.maximum(self.rows, 1)[:, None]
        return InputStatistics(
            mean.astype(np.float32).reshape(*self.batch, -1), self.amax.reshape(self.batch)
        )


class _Observer(Interpreter):
    """Runs the dense program and reports the other operand of each product with a weight.

    The value of a view is an array of the numbers of its matrices, so that slices and scans take
    those of the matrices that they take.
    """

    def __init__(self, sums: dict[int, _Totals]) -> None:
        super().__init__()
        self._sums = sums

    def product(
        self, eqn: Any, operands: list[Any], view: View, product: Product
    ) -> list[jax.Array]:
        """The dense product; the sums of x go to the host."""
        assert view.leaf.key is not None
        sums = _sums_of_groups if product.groups else _sums
        jax.debug.callback(functools.partial(self._add, view.leaf.key), *sums(self, view, product))
        return self.bind(eqn, self.values(operands))

    def _add(self, key: int, *sums: Any) -> None:
        self._sums[key].add(*map(np.asarray, sums))

    def value(self, view: View) -> jax.Array:
        """The array that the program has here."""
        assert view.dense is not None
        return view.dense

    def dense(self, view: View, why: str) -> jax.Array:
        """The same."""
        return self.value(view)


def _rows(view: View, product: Product, shared: Sequence[Any]) -> jax.Array:
    """x as float32, its axes the shared atoms..., all rows, K in the order of the weight."""
    columns = view.leaf.contracting
    others = [a for a in product.of_x if a not in (*shared, *columns)]
    x = product.x.astype(jnp.float32)
    x = x.transpose([product.of_x.index(a) for a in (*shared, *others, *columns)])
    sizes = [atom.size for atom in shared]
    return x.reshape(*sizes, math.prod(x.shape[len(shared) : len(shared) + len(others)]), -1)


def _sums(
    observer: Interpreter, view: View, product: Product
) -> tuple[jax.Array, jax.Array, jax.Array, int]:
    """The numbers of the matrices, and for each the sums of x^2, the largest |x|, and the rows."""
    shared = [atom for atom in view.batch if atom in product.of_x]
    x = _rows(view, product, shared)
    x = x.reshape(*(a.size if a in shared else 1 for a in view.batch), *x.shape[len(shared) :])
    amax = jnp.max(jnp.abs(x), (-2, -1), initial=0.0)
    return view.value, jnp.sum(x * x, -2), amax, x.shape[-2]


def _sums_of_groups(
    observer: Interpreter, view: View, product: Product
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The same of a ragged product, whose groups have rows of their own."""
    ids, _ = batch_first(observer, view, product.groups)
    x, count = _rows(view, product, ()), views.size(product.groups)
    sizes = jnp.maximum(product.group_sizes, 0)
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(x.shape[0]), side="right")
    add = functools.partial(jax.ops.segment_sum, segment_ids=group, num_segments=count)
    largest = jax.ops.segment_max(jnp.max(jnp.abs(x), -1), group, count)
    return ids, add(x * x), jnp.maximum(largest, 0), add(jnp.ones(x.shape[0], jnp.int32))


def calibrate(fn: Callable[..., Any], params: Any, batches: Iterable[Any]) -> Calibration:
    """Collects what the weights of a function are multiplied with.

    It follows the weights as `convert` does, and runs the dense function on each batch.

    Args:
        fn: `fn(params, *args)`, as of `convert`.
        params: its dense params.
        batches: of each batch the tuple of `args`, or the one argument.

    Returns:
        The statistics of each weight by its path, joined by dots; stacked weights have one entry
        each. `save` writes them for `python -m jax_nvfp4 quantize --calibration`.

    Raises:
        ValueError: there is no batch, no weight, or an input is NaN or infinite.
    """
    keyed, tree = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in keyed]
    names = [".".join(path_of(path)) for path, _ in keyed]
    shapes = [abstract(leaf) for leaf in leaves]
    arrays = [a for a, s in zip(leaves, shapes, strict=True) if isinstance(s, jax.ShapeDtypeStruct)]
    traced = Traced(fn, tree, shapes)
    layouts: dict[int, Layout] | None = None
    sums: dict[int, _Totals] = {}

    @jax.jit
    def run(arrays: list[Any], *args: Any) -> list[Any]:
        assert layouts is not None
        closed, _ = traced(args)
        observer, operands = _Observer(sums), []
        numbers = [i for i, s in enumerate(shapes) if isinstance(s, jax.ShapeDtypeStruct)]
        for number, array in zip(numbers, arrays, strict=True):
            found = layouts.get(number)
            operands.append(array if found is None else _view(number, names, found, array))
        results = observer.run(closed.jaxpr, closed.consts, [*operands, *jax.tree.leaves(args)])
        return observer.values(results)

    for batch in batches:
        args = batch if isinstance(batch, tuple) else (batch,)
        if layouts is None:
            layouts = _layouts(analyze(traced, shapes, args), shapes)
            sums.update({i: _Totals(names[i], found) for i, found in layouts.items()})
        jax.block_until_ready(run(arrays, *args))
        jax.effects_barrier()
    if layouts is None:
        raise ValueError("batches must hold at least one batch; got none")
    if not layouts:
        raise ValueError("no leaf of the params is a weight: none meets products alone")
    found = {names[i]: of_leaf.statistics() for i, of_leaf in sums.items()}
    return Calibration({name: seen for name, seen in found.items() if seen is not None})


def _layouts(records: Any, shapes: list[Any]) -> dict[int, Layout]:
    """How each leaf that meets products would be quantized."""
    result = {}
    for i, record in records.items():
        found = layout(shapes[i].shape, record) if record.products else ""
        if isinstance(found, Layout):
            result[i] = found
    return result


def _view(number: int, names: list[str], found: Layout, array: jax.Array) -> View:
    """A leaf as the observer first sees it."""
    sizes = tuple(atom.size for atom in found.batch)
    ids = jnp.arange(int(np.prod(sizes, dtype=np.int64)), dtype=jnp.int32).reshape(sizes)
    leaf = dataclasses.replace(found.leaf(names[number]), key=number)
    assert isinstance(leaf, Leaf)
    return View(ids, array, leaf, found.axes, found.batch, array.dtype)
