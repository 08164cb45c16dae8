# SPDX-License-Identifier: Apache-2.0
"""The function that `convert` returns: the traced program with NVFP4 products in it."""

import dataclasses
import functools
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jax_nvfp4.conversion import control as control  # registers its rules
from jax_nvfp4.conversion import view as views
from jax_nvfp4.conversion.analysis import Layout
from jax_nvfp4.conversion.interpret import Interpreter
from jax_nvfp4.conversion.rules import Product, batch_first
from jax_nvfp4.conversion.view import NotAView, View, ViewAxis
from jax_nvfp4.ops.checks import ActivationScale
from jax_nvfp4.ops.ragged_linear.api import ragged_linear
from jax_nvfp4.products.axes import KernelAxes
from jax_nvfp4.products.contraction import How, Labels, contract
from jax_nvfp4.products.kernel import Nvfp4Kernel
from jax_nvfp4.products.leaf import ConvertedLeaf, JoinedLeaf, is_converted

PROGRAMS_KEPT = 64


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What was decided of a leaf.

    Attributes:
        name: its path, joined by dots.
        path: its path.
        leaf: the dense leaf's shape and dtype; any other value for one that is no array.
        layout: how it is quantized, None where it is left alone.
        why: what became of it.
        keeps_dense: a copy of the dense leaf stays beside the kernel.
        joined: the numbers of the leaves that share one weight with this one, the holder first;
            none if it has one of its own.
        first_row: of this leaf in that weight.
        all_rows: of that weight; of this leaf where none share it.
    """

    name: str
    path: tuple[str, ...]
    leaf: Any
    layout: Layout | None
    why: str
    keeps_dense: bool = False
    joined: tuple[int, ...] = ()
    first_row: int = 0
    all_rows: int = 0

    @property
    def is_array(self) -> bool:
        """Whether the program takes it as an argument."""
        return isinstance(self.leaf, jax.ShapeDtypeStruct)


class Traced:
    """A function of params and arguments as a program, traced once for like arguments."""

    def __init__(self, fn: Callable[..., Any], tree: Any, leaves: Sequence[Any]) -> None:
        def flat(arrays: list[Any], *args: Any) -> Any:
            left = iter(arrays)
            whole = [next(left) if isinstance(v, jax.ShapeDtypeStruct) else v for v in leaves]
            return fn(tree.unflatten(whole), *args)

        self._arrays = [v for v in leaves if isinstance(v, jax.ShapeDtypeStruct)]
        self._trace = jax.make_jaxpr(flat, return_shape=True)

    def __call__(self, args: Sequence[Any]) -> tuple[Any, Any]:
        """The program, and the tree of its results."""
        closed, shapes = self._trace(self._arrays, *args)
        return closed, jax.tree.structure(shapes)


class Runner(Interpreter):
    """Runs a program with NVFP4 products."""

    def __init__(self, activation_scale: ActivationScale, batch_invariant: bool) -> None:
        super().__init__()
        given = not (activation_scale is None or isinstance(activation_scale, str))
        # An array is an argument of a product, whose `how` has to be hashable.
        self._scale = activation_scale if given else None
        self._how = How(None if given else activation_scale, batch_invariant)
        self._shared = threading.local()
        self._how_of: dict[Any, How] = {}

    def _how_to(self, dtype: Any) -> How:
        """How a product with results of a dtype is taken."""
        if dtype not in self._how_of:
            self._how_of[dtype] = dataclasses.replace(self._how, out_dtype=dtype)
        return self._how_of[dtype]

    def forget(self) -> None:
        """Drops the products that several leaves share."""
        self._shared.__dict__.clear()

    def product(
        self, eqn: Any, operands: list[Any], view: View, product: Product
    ) -> list[jax.Array]:
        """The product with the NVFP4 weight."""
        leaf = view.leaf
        if set(product.contracting) != set(leaf.contracting):
            raise NotAView("a product over other axes")
        if product.groups:
            return [self._ragged(view, product)]
        weight, input_scale = view.value
        scale = self._scale if input_scale is None else jnp.max(input_scale)
        how = self._how_to(product.dtype)
        if leaf.part is not None:
            return [self._joined(view, product, weight, scale, how)]
        of_kernel = (*view.batch, *leaf.free, *leaf.contracting)
        labels = (product.of_x, of_kernel, product.of_result)
        axes = _kernel_axes(view)
        result = nvfp4_product(product.x, weight, scale, labels=labels, axes=axes, how=how)
        return [result if result.shape == product.shape else result.reshape(product.shape)]

    def _joined(self, view: View, product: Product, weight: Any, scale: Any, how: How) -> jax.Array:
        """The leaf's part of the product of a weight that several leaves share."""
        assert view.leaf.part is not None
        if view.batch:
            raise NotAView("a product with several joined weights")
        (number, start), free = view.leaf.part, view.leaf.free
        others = tuple(label for label in product.of_result if label not in free)
        source, y = getattr(self._shared, str(number), (None, product.x))
        if source is not product.source:
            columns = view.leaf.contracting
            axes = KernelAxes(
                sizes=(weight.shape[-2], *(atom.size for atom in columns)),
                free=(0,),
                contracting=tuple(range(1, len(columns) + 1)),
            )
            labels = (product.of_x, ("rows", *columns), (*others, "rows"))
            y = nvfp4_product(product.x, weight, scale, labels=labels, axes=axes, how=how)
            setattr(self._shared, str(number), (product.source, y))
        mine = y[..., start : start + views.size(free)]
        mine = mine.reshape(*mine.shape[:-1], *(atom.size for atom in free))
        found = (*others, *free)
        return mine.transpose([found.index(a) for a in product.of_result]).reshape(product.shape)

    def _ragged(self, view: View, product: Product) -> jax.Array:
        """The product of rows sorted by group."""
        (weight, input_scale), others = batch_first(self, view, product.groups)
        if others:
            raise NotAView("a ragged product of several weights")
        leaf = view.leaf
        scale = self._scale if input_scale is None else input_scale
        order = [product.of_x.index(atom) for atom in ("rows", *leaf.contracting)]
        x = product.x.transpose(order)
        y = ragged_linear(
            x.reshape(x.shape[0], -1),
            weight,
            product.group_sizes,
            activation_scale=self._how.activation_scale if scale is None else scale,
            out_dtype=product.dtype,
            batch_invariant=self._how.batch_invariant,
        )
        y = y.reshape(x.shape[0], *(atom.size for atom in leaf.free))
        found = ("rows", *leaf.free)
        return y.transpose([found.index(a) for a in product.of_result]).reshape(product.shape)

    def value(self, view: View) -> jax.Array:
        """The values of the weight, or the dense leaf where there is one."""
        if view.dense is not None:
            return view.dense
        weight, _ = view.value
        atoms = (*view.batch, *view.leaf.free, *view.leaf.contracting)
        values = weight.dequantize(view.dtype)
        start = view.leaf.part[1] if view.leaf.part else 0
        values = values[..., start : start + views.size(view.leaf.free), :]
        values = values.reshape([atom.size for atom in atoms])
        order = [atoms.index(atom) for axis in view.axes for atom in axis]
        return values.transpose(order).reshape(view.shape)

    def dense(self, view: View, why: str) -> jax.Array:
        """The same; says that a leaf is not used as it was when the function was converted."""
        if view.dense is None:
            warnings.warn(
                f"{view.leaf.name} is in NVFP4 and is dequantized for {why}, which the example "
                f"arguments of convert did not lead to",
                stacklevel=2,
            )
        return self.value(view)


@functools.partial(jax.jit, static_argnames=("labels", "axes", "how"))
def nvfp4_product(
    x: jax.Array,
    weight: Any,
    scale: Any,
    *,
    labels: tuple[Labels, Labels, Labels],
    axes: KernelAxes,
    how: How,
) -> jax.Array:
    """`contract`, with a static scale if there is one. Traced, and lowered, once for all alike."""
    if scale is not None:
        how = dataclasses.replace(how, activation_scale=scale)
    of_x, of_kernel, of_result = labels
    return contract(x, of_x, weight, axes, of_kernel, of_result, how)


def _kernel_axes(view: View) -> KernelAxes:
    """The axes of the NVFP4 weight of a view, an axis for each atom."""
    atoms = (*view.leaf.free, *view.leaf.contracting)
    free = len(view.leaf.free)
    return KernelAxes(
        sizes=tuple(atom.size for atom in atoms),
        free=tuple(range(free)),
        contracting=tuple(range(free, len(atoms))),
    )


def _with_batch(part: Any, batch: ViewAxis) -> Any:
    """A part with all batch axes: a global scale may have some of them, or none."""
    sizes = tuple(atom.size for atom in batch)
    if part.ndim >= len(sizes):
        return part
    part = part.reshape(part.shape + (1,) * (len(sizes) - part.ndim))
    return jnp.broadcast_to(part, sizes)


def view_of(plan: LeafPlan, value: Any, dense: Any) -> View:
    """A leaf as the program first sees it."""
    assert plan.layout is not None
    layout = plan.layout
    value = jax.tree.map(lambda part: _with_batch(part, layout.batch), value)
    leaf = layout.leaf(plan.name)
    if plan.joined:
        leaf = dataclasses.replace(leaf, part=(plan.joined[0], plan.first_row))
    return View(value, dense, leaf, layout.axes, layout.batch, jnp.dtype(plan.leaf.dtype))


class Converted:
    """A function whose params hold NVFP4 kernels; made by `convert`."""

    def __init__(
        self,
        fn: Callable[..., Any],
        tree: Any,
        plans: Sequence[LeafPlan],
        activation_scale: ActivationScale,
        batch_invariant: bool,
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        self._tree = tree
        self._plans = tuple(plans)
        self._traced = Traced(fn, tree, [plan.leaf for plan in plans])
        self._how = (activation_scale, batch_invariant)
        self._runners: dict[int, tuple[Any, Runner]] = {}

    def __call__(self, params: Any, *args: Any) -> Any:
        """Runs the program on converted params.

        Args:
            params: as `convert` returned them, or like them.
            *args: of the function.

        Returns:
            What the function returns, with the same tree, shapes and dtypes.

        Raises:
            TypeError: a leaf of params is not what it was converted to.
            ValueError: params have another structure, or a kernel another shape.
        """
        operands = self._operands(params)
        closed, out_tree = self._traced(args)
        runner = self._runner(closed)
        try:
            results = runner.run(closed.jaxpr, closed.consts, [*operands, *jax.tree.leaves(args)])
            arrays = [runner.dense(r, "a result") if isinstance(r, View) else r for r in results]
        finally:
            runner.forget()
        return jax.tree.unflatten(out_tree, arrays)

    def _runner(self, closed: Any) -> Runner:
        """The runner of a program, so that a second call finds what the first one traced."""
        key = id(closed.jaxpr)
        if key not in self._runners:
            if len(self._runners) >= PROGRAMS_KEPT:
                self._runners.pop(next(iter(self._runners)))
            self._runners[key] = (closed, Runner(*self._how))
        return self._runners[key][1]

    def _operands(self, params: Any) -> list[Any]:
        """A view for each converted leaf, an array for each other."""
        leaves, tree = jax.tree.flatten(params, is_leaf=is_converted)
        if tree != self._tree:
            raise ValueError(
                f"params must have the structure of those that were converted, {self._tree}; "
                f"got {tree}"
            )
        operands = []
        for i, (plan, leaf) in enumerate(zip(self._plans, leaves, strict=True)):
            if plan.joined and plan.joined[0] != i:
                if not isinstance(leaf, JoinedLeaf):
                    raise TypeError(
                        f"{plan.name} was joined with another leaf; got {type(leaf).__name__}"
                    )
                leaf = leaves[plan.joined[0]]
            if plan.is_array:
                operands.append(_operand(plan, leaf))
        return operands


def _operand(plan: LeafPlan, leaf: Any) -> Any:
    if plan.layout is None:
        if is_converted(leaf):
            raise TypeError(f"{plan.name} was left alone; got an NVFP4 kernel of {leaf}")
        return leaf
    held = leaf if isinstance(leaf, ConvertedLeaf) else ConvertedLeaf(leaf)
    if not isinstance(held.kernel, Nvfp4Kernel):
        raise TypeError(
            f"{plan.name} must be the NVFP4 kernel that convert made of it; "
            f"got {type(leaf).__name__}"
        )
    if (held.dense is not None) != plan.keeps_dense:
        raise TypeError(f"{plan.name} must be the leaf that convert made of it; got {leaf}")
    weight, layout = held.kernel.weight, plan.layout
    expected = (*layout.sizes, plan.all_rows or layout.n, layout.k)
    if weight.shape != expected:
        raise ValueError(
            f"the NVFP4 weight of {plan.name} must have shape {expected}; got {weight.shape}"
        )
    weight.check()
    return view_of(plan, (weight, held.input_scale), held.dense)


def nbytes(leaf: Any) -> int:
    """The bytes of an array, or of what is like one."""
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize
