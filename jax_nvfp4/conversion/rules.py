# SPDX-License-Identifier: Apache-2.0
"""What each primitive does to a view: one rule for each that only rearranges, and the products.

A rule takes the interpreter, the equation and its operands, of which at least one is a view, and
returns the results; it raises `NotAView` where a result is none. A primitive without a rule gets
dense arrays.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_nvfp4.conversion import view as views
from jax_nvfp4.conversion.view import Atom, NotAView, View, ViewAxes, ViewAxis

if TYPE_CHECKING:
    from jax_nvfp4.conversion.interpret import Interpreter

Rule = Callable[["Interpreter", Any, list[Any]], list[Any]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of the primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _only_first(operands: Sequence[Any]) -> View:
    """The view that is the first operand; the others must be arrays."""
    first, *others = operands
    if not isinstance(first, View) or any(isinstance(other, View) for other in others):
        raise NotAView("an index")
    return first


def _result(interpreter: "Interpreter", eqn: Any, operands: list[Any], result: View) -> list[View]:
    """A view, with the dense array that goes with it where there is one."""
    name = eqn.primitive.name
    if result.dense is not None:
        (dense,) = interpreter.bind(eqn, [result.dense, *operands[1:]])
        result = dataclasses.replace(result, dense=dense)
    if name not in result.trail:
        result = dataclasses.replace(result, trail=(*result.trail, name))
    return [result]


def _rearranging(new_axes: Callable[[View, Any], ViewAxes]) -> Rule:
    """The rule of a primitive of one operand that rearranges its axes."""

    def apply(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
        view = _only_first(operands)
        return _result(interpreter, eqn, operands, view.rearranged(new_axes(view, eqn)))

    return apply


def _broadcast(view: View, eqn: Any) -> ViewAxes:
    shape, places = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    axes: list[ViewAxis] = [()] * len(shape)
    for axis, place in zip(view.axes, places, strict=True):
        axes[place] = axis
    if tuple(map(views.size, axes)) != tuple(shape):
        raise NotAView("broadcast_in_dim")
    return tuple(axes)


def _reshape(view: View, eqn: Any) -> ViewAxes:
    if eqn.params.get("dimensions") is not None:
        raise NotAView("reshape")
    return views.reshape(view.axes, eqn.params["new_sizes"])


def _squeeze(view: View, eqn: Any) -> ViewAxes:
    return tuple(a for i, a in enumerate(view.axes) if i not in eqn.params["dimensions"])


rule("transpose")(
    _rearranging(lambda view, eqn: tuple(view.axes[p] for p in eqn.params["permutation"]))
)
rule("reshape")(_rearranging(_reshape))
rule("squeeze")(_rearranging(_squeeze))
rule("broadcast_in_dim")(_rearranging(_broadcast))
# A weight stays where its user put it: what a program says of the place of a dense one is no rule
# for the parts of an NVFP4 one.
rule(
    "copy",
    "copy_p",
    "layout_constraint",
    "mesh_cast",
    "name",
    "pcast",
    "pvary",
    "reshard",
    "sharding_constraint",
)(_rearranging(lambda view, eqn: view.axes))


@rule("convert_element_type")
def _cast(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """The weight is rounded to NVFP4 whatever it is cast to; products see the dtype."""
    view, dtype = _only_first(operands), eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits < 16:
        raise NotAView(f"a cast to {jnp.dtype(dtype).name}")
    return _result(interpreter, eqn, operands, dataclasses.replace(view, dtype=jnp.dtype(dtype)))


@rule("optimization_barrier")
def _barrier(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    return list(lax.optimization_barrier(operands))


@rule("slice")
def _slice(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    view = _only_first(operands)
    if any(step != 1 for step in eqn.params["strides"] or ()):
        raise NotAView("a slice with strides")
    bounds = zip(eqn.params["start_indices"], eqn.params["limit_indices"], strict=True)
    for position, (start, stop) in enumerate(bounds):
        view = take(interpreter, view, position, start, stop)
    return _result(interpreter, eqn, operands, view)


@rule("split")
def _split(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    view, position, start, parts = _only_first(operands), eqn.params["axis"], 0, []
    dense = [None] * len(eqn.outvars) if view.dense is None else interpreter.bind(eqn, [view.dense])
    for length, array in zip(map(int, eqn.params["sizes"]), dense, strict=True):
        taken = take(interpreter, view, position, start, start + length)
        parts.append(dataclasses.replace(taken, dense=array, trail=(*taken.trail, "split")))
        start += length
    return parts


@rule("dynamic_slice")
def _dynamic_slice(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    view, starts = _only_first(operands), operands[1:]
    for position, length in enumerate(eqn.params["slice_sizes"]):
        axis = view.axes[position]
        if length == views.size(axis):
            continue
        if not _leading(view, position, length):
            raise NotAView("a dynamic_slice of rows")
        start = jnp.clip(starts[position], 0, views.size(axis) - length)
        view = index(interpreter, view, position, axis, start, length, ())
    return _result(interpreter, eqn, operands, view)


def _leading(view: View, position: int, length: int) -> bool:
    """Whether a range of an axis is one of matrices, and not of rows."""
    return length == 1 or (position == 0 and len(view.axes) > 2)


def take(interpreter: "Interpreter", view: View, position: int, start: int, stop: int) -> View:
    """A slice of one axis of a view.

    Raises:
        NotAView: it is no slice of matrices, nor one of equal parts.
    """
    axis = view.axes[position]
    if (start, stop) == (0, views.size(axis)):
        return view
    digits, first, last, rest = views.cut(axis, start, stop)
    if not _leading(view, position, last - first):
        raise NotAView("a slice of unequal parts")
    return index(interpreter, view, position, digits, first, last - first, rest)


def index(
    interpreter: "Interpreter",
    view: View,
    position: int,
    digits: ViewAxis,
    start: Any,
    length: int,
    rest: ViewAxis,
) -> View:
    """A range of what some atoms count, which are then batch axes of the leaf.

    Args:
        interpreter: is told.
        view: of which.
        position: the axis of the view that starts with the atoms.
        digits: the atoms.
        start: the first index, traced or not.
        length: of the range; the atoms are gone where it is 1.
        rest: the other atoms of the axis.

    Raises:
        NotAView: the atoms are no batch axes of a leaf that was converted.
    """
    value, batch = batch_first(interpreter, view, digits)
    left: ViewAxis = ()
    if length > 1:
        left = (Atom(digits[-1].axis, digits[-1].stride, length, is_range=True),)

    def taken(part: jax.Array) -> jax.Array:
        if left:
            return lax.dynamic_slice_in_dim(part, start, length)
        return lax.dynamic_index_in_dim(part, start, keepdims=False)

    if value is not None:
        value, batch = jax.tree.map(taken, value), (*left, *batch)
    axes = (*view.axes[:position], (*left, *rest), *view.axes[position + 1 :])
    return dataclasses.replace(view, value=value, batch=batch, axes=axes)


def batch_first(interpreter: "Interpreter", view: View, digits: ViewAxis) -> tuple[Any, ViewAxis]:
    """The value of a view with one leading axis for some atoms, and the others of its batch.

    Args:
        interpreter: is told that the atoms are batch axes.
        view: of which.
        digits: atoms of one of its axes, major first.

    Raises:
        NotAView: the atoms are no batch axes of a leaf that was converted.
    """
    interpreter.indexed(view, digits)
    if view.value is None:
        return None, ()
    if not set(digits) <= set(view.batch):
        raise NotAView("an index of rows")
    rest = [i for i, atom in enumerate(view.batch) if atom not in digits]
    order = [*(view.batch.index(atom) for atom in digits), *rest]

    def first(part: jax.Array) -> jax.Array:
        if order != sorted(order):
            part = part.transpose(*order, *range(len(order), part.ndim))
        return part.reshape(views.size(digits), *part.shape[len(digits) :])

    return jax.tree.map(first, view.value), tuple(view.batch[i] for i in rest)


@dataclasses.dataclass(frozen=True)
class Product:
    """A product of an array and a view, its axes named.

    Attributes:
        source: the array as the program has it.
        x: the array, its axes cut where those of the view are.
        of_x: a label for each axis of x: an atom, or a number.
        of_result: the labels of the result, one for each atom.
        contracting: the atoms that it sums over.
        batch: the atoms that x has too and that stay.
        shape: of the result.
        dtype: of the result.
        groups: of a ragged product, the atoms that count the groups of x's rows.
        group_sizes: of a ragged product, integers (groups,).
    """

    source: jax.Array
    x: jax.Array
    of_x: tuple[Any, ...]
    of_result: tuple[Any, ...]
    contracting: ViewAxis
    batch: ViewAxis
    shape: tuple[int, ...]
    dtype: jnp.dtype
    groups: ViewAxis = ()
    group_sizes: Any = None


COMPUTED = (jnp.bfloat16, jnp.float16, jnp.float32)


def _check_dtypes(*arrays: Any) -> None:
    for array in arrays:
        if array.dtype not in COMPUTED:
            raise NotAView(f"a product in {array.dtype.name}")


@rule("dot_general")
def _dot_general(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    side = next(i for i, operand in enumerate(operands) if isinstance(operand, View))
    view, x = operands[side], operands[1 - side]
    if isinstance(x, View):
        raise NotAView("a product of two weights")
    out = eqn.outvars[0].aval
    _check_dtypes(x, out)
    contracted, batched = eqn.params["dimension_numbers"]
    pairs = dict(zip(contracted[1 - side], contracted[side], strict=True))
    kept = dict(zip(batched[1 - side], batched[side], strict=True))
    shared = {d: view.axes[w] for d, w in (pairs | kept).items()}
    of_x = [shared.get(d, (d,)) for d in range(x.ndim)]
    sizes = [a.size if isinstance(a, Atom) else x.shape[a] for axis in of_x for a in axis]
    free_x = [(d,) for d in range(x.ndim) if d not in shared]
    taken = (*contracted[side], *batched[side])
    free_w = [axis for w, axis in enumerate(view.axes) if w not in taken]
    if not any(view.axes[w] for w in contracted[side]):
        raise NotAView("an outer product")
    if any(atom.is_range for w in contracted[side] for atom in view.axes[w]):
        raise NotAView("a sum over part of an axis")
    order = [view.axes[w] for w in batched[side]]
    order += free_w + free_x if side == 0 else free_x + free_w
    product = Product(
        source=x,
        x=x if x.shape == tuple(sizes) else x.reshape(sizes),
        of_x=tuple(a for axis in of_x for a in axis),
        of_result=tuple(a for axis in order for a in axis),
        contracting=tuple(a for w in contracted[side] for a in view.axes[w]),
        batch=tuple(a for w in batched[side] for a in view.axes[w]),
        shape=out.shape,
        dtype=out.dtype,
    )
    return interpreter.product(eqn, operands, view, product)


@rule("ragged_dot_general", "ragged_dot")
def _ragged_dot(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """Rows (M, K), sorted by group, times a weight for each group."""
    x, view, group_sizes = operands[:3]
    if not isinstance(view, View) or isinstance(x, View) or len(operands) > 3:
        raise NotAView(eqn.primitive.name)
    out, numbers = eqn.outvars[0].aval, eqn.params["ragged_dot_dimension_numbers"]
    (of_x, of_w), batched = numbers.dot_dimension_numbers
    (ragged,), groups = numbers.lhs_ragged_dimensions, tuple(numbers.rhs_group_dimensions)
    plain = x.ndim == 2 and len(of_x) == len(groups) == 1 and ragged not in of_x
    if not plain or any(map(len, batched)) or eqn.params.get("group_offset") is not None:
        raise NotAView("a ragged product of another form")
    _check_dtypes(x, out)
    contracting, counted = view.axes[of_w[0]], view.axes[groups[0]]
    rows = x if of_x[0] == 1 else x.T
    free = (a for w, axis in enumerate(view.axes) if w not in (*of_w, *groups) for a in axis)
    product = Product(
        source=x,
        x=rows.reshape(rows.shape[0], *(atom.size for atom in contracting)),
        of_x=("rows", *contracting),
        of_result=("rows", *free),
        contracting=contracting,
        batch=(),
        shape=out.shape,
        dtype=out.dtype,
        groups=counted,
        group_sizes=group_sizes,
    )
    return interpreter.product(eqn, operands, view, product)
