# SPDX-License-Identifier: Apache-2.0
"""Primitives that hold programs. Each is built anew by JAX's own function, with views inside."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad
from jax.sharding import PartitionSpec

from jax_nvfp4.conversion.rules import batch_first, rule
from jax_nvfp4.conversion.view import NotAView, View, ViewAxis

if TYPE_CHECKING:
    from jax_nvfp4.conversion.interpret import Interpreter


def _is_view(value: Any) -> bool:
    return isinstance(value, View)


def _arrays(interpreter: "Interpreter", values: list[Any], why: str) -> list[Any]:
    return interpreter.all_dense(values, why)


@rule("jit", "pjit")
def _jit(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    closed = params["jaxpr"]
    places = (*params["in_shardings"], *params["out_shardings"])
    if any(isinstance(place, jax.sharding.Sharding) for place in places):
        return _with_places(interpreter, eqn, operands)
    donated = tuple(
        i
        for i, (given, operand) in enumerate(zip(params["donated_invars"], operands, strict=True))
        if given and not _is_view(operand)
    )

    def make() -> Any:
        def inner(*operands: Any) -> list[Any]:
            return interpreter.held(closed, operands)

        inner.__name__ = inner.__qualname__ = params["name"]
        return jax.jit(
            inner,
            donate_argnums=donated,
            keep_unused=params["keep_unused"],
            inline=params["inline"],
            compiler_options=dict(params["compiler_options_kvs"]) or None,
        )

    # The key holds the program, so that its id stays its own.
    return interpreter.once((_Same(closed), donated, params["name"]), make)(*operands)


class _Same:
    """Compares an object by what it is, not by what it holds."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.held is other.held

    def __hash__(self) -> int:
        return id(self.held)


def _with_places(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """A `jit` with shardings: they are constraints of its arguments and results."""
    closed = eqn.params["jaxpr"]

    def put(value: Any, place: Any) -> Any:
        if _is_view(value) or not isinstance(place, jax.sharding.Sharding):
            return value
        return lax.with_sharding_constraint(value, place)

    operands = list(map(put, operands, eqn.params["in_shardings"]))
    results = interpreter.held(closed, operands)
    return list(map(put, results, eqn.params["out_shardings"]))


@rule("closed_call", "core_call")
def _call(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    return interpreter.held(eqn.params.get("call_jaxpr", eqn.params.get("jaxpr")), operands)


@rule("checkpoint", "remat", "remat2")
def _remat(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    inner = eqn.params["jaxpr"]

    def function(*operands: Any) -> list[Any]:
        return interpreter.held(inner, operands)

    policy, prevent_cse = eqn.params["policy"], eqn.params["prevent_cse"]
    return jax.checkpoint(function, policy=policy, prevent_cse=prevent_cse)(*operands)


@rule("scan")
def _scan(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """Views among the stacked arguments are taken apart along their first axis."""
    params = eqn.params
    body, (nconsts, ncarry) = params["jaxpr"], _scan_counts(params)
    invars, outvars = body.jaxpr.invars, body.jaxpr.outvars
    fixed = {  # a view that goes round unchanged is a constant
        i
        for i in range(ncarry)
        if _is_view(operands[nconsts + i]) and outvars[i] is invars[nconsts + i]
    }
    consts, carry, stacked = (
        operands[:nconsts],
        operands[nconsts : nconsts + ncarry],
        operands[nconsts + ncarry :],
    )
    carry = [v if i in fixed else _arrays(interpreter, [v], "a scan's carry")[0]
             for i, v in enumerate(carry)]  # fmt: skip
    moving = [v for i, v in enumerate(carry) if i not in fixed]
    slices = [_Stack(interpreter, v) if _is_view(v) else None for v in stacked]

    def step(moving: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        left = iter(moving)
        now = [carry[i] if i in fixed else next(left) for i in range(ncarry)]
        taken = [x if s is None else s.matrix(x) for s, x in zip(slices, xs, strict=True)]
        results = interpreter.held(body, [*consts, *now, *taken])
        after = [v for i, v in enumerate(results[:ncarry]) if i not in fixed]
        return (
            _arrays(interpreter, after, "a scan's carry"),
            _arrays(interpreter, results[ncarry:], "a scan's result"),
        )

    moving, ys = lax.scan(
        step,
        moving,
        [v if s is None else s.arrays for s, v in zip(slices, stacked, strict=True)],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
        **({"_split_transpose": True} if params.get("_split_transpose") else {}),
    )
    left = iter(moving)
    return [carry[i] if i in fixed else next(left) for i in range(ncarry)] + list(ys)


def _scan_counts(params: Any) -> tuple[int, int]:
    """How many constants and carried values there are; newer versions of JAX keep a tree."""
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    return params["num_consts"], params["num_carry"]


class _Stack:
    """A view that a scan takes apart along its first axis.

    Attributes:
        arrays: what the scan goes over; the view's arrays with that axis first.
    """

    def __init__(self, interpreter: "Interpreter", view: View) -> None:
        value, self._batch = batch_first(interpreter, view, view.axes[0])
        self.arrays = (value, view.dense)
        self._like = view

    def matrix(self, arrays: Any) -> View:
        """The view of one step."""
        value, dense = arrays
        like = self._like
        trail = (*like.trail, "scan")
        return View(value, dense, like.leaf, like.axes[1:], self._batch, like.dtype, trail)


@rule("while")
def _while(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    params = eqn.params
    test, body = params["cond_jaxpr"], params["body_jaxpr"]
    ntest, nbody = params["cond_nconsts"], params["body_nconsts"]
    of_test, of_body = operands[:ntest], operands[ntest : ntest + nbody]
    carry = operands[ntest + nbody :]
    invars, outvars = body.jaxpr.invars[nbody:], body.jaxpr.outvars
    fixed = {i for i, v in enumerate(carry) if _is_view(v) and outvars[i] is invars[i]}

    def full(moving: list[Any]) -> list[Any]:
        left = iter(moving)
        return [v if i in fixed else next(left) for i, v in enumerate(carry)]

    def moving_of(values: list[Any]) -> list[Any]:
        moving = [v for i, v in enumerate(values) if i not in fixed]
        return _arrays(interpreter, moving, "a while loop's carry")

    def each_goes_on(moving: list[Any]) -> Any:
        (result,) = interpreter.held(test, [*of_test, *full(moving)])
        return result

    def go_on(moving: list[Any]) -> Any:
        return jnp.any(each_goes_on(moving))

    def step(moving: list[Any]) -> list[Any]:
        after = moving_of(interpreter.held(body, [*of_body, *full(moving)]))
        goes_on = each_goes_on(moving) if test.out_avals[0].shape else None
        if goes_on is None:
            return after
        # Under vmap a program may hold loops that end at different steps.
        return [
            jnp.where(goes_on.reshape(goes_on.shape + (1,) * (v.ndim - goes_on.ndim)), v, old)
            for v, old in zip(after, moving, strict=True)
        ]

    return full(lax.while_loop(go_on, step, moving_of(carry)))


@rule("cond")
def _cond(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    which, *operands = operands
    (which,) = _arrays(interpreter, [which], "a condition")

    def branch(closed: Any, *operands: Any) -> list[Any]:
        results = interpreter.held(closed, operands)
        return _arrays(interpreter, results, "a branch's result")

    branches = [functools.partial(branch, closed) for closed in eqn.params["branches"]]
    return list(lax.switch(which, branches, *operands))


@rule("custom_jvp_call")
def _custom_jvp(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own rule stays, on the values that the weights stand for."""
    closed, symbolic = eqn.params["call_jaxpr"], eqn.params["symbolic_zeros"]
    bound = eqn.primitive.get_bind_params(eqn.params)
    _, rule_of = bound["subfuns"] if isinstance(bound, dict) else bound[0]

    @jax.custom_jvp
    def function(*operands: Any) -> list[Any]:
        results = interpreter.held(closed, operands)
        return _arrays(interpreter, results, "a result of custom_jvp")

    def jvp(primals: Any, tangents: Any) -> Any:
        results = function(*primals)
        primals = interpreter.values(primals)
        tangents = [
            (SymbolicZero(jax.typeof(p).to_tangent_aval()) if symbolic else jnp.zeros_like(p))
            if _is_view(t)
            else t
            for p, t in zip(primals, tangents, strict=True)
        ]
        return results, list(rule_of.call_wrapped(*primals, *tangents))[len(results) :]

    function.defjvp(jvp, symbolic_zeros=symbolic)
    return function(*operands)


@rule("custom_vjp_call", "custom_vjp_call_jaxpr")
def _custom_vjp(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """The function's own rules stay; the backward one sees what the weights stand for."""
    params = eqn.params
    closed, nconsts, out_trees = params["call_jaxpr"], params["num_consts"], params["out_trees"]
    bound = eqn.primitive.get_bind_params(params)
    _, forward_of, backward_of = bound["subfuns"] if isinstance(bound, dict) else bound[0]

    @jax.custom_vjp
    def function(*operands: Any) -> list[Any]:
        results = interpreter.held(closed, operands)
        return _arrays(interpreter, results, "a result of custom_vjp")

    def forward(*operands: Any) -> Any:
        def flat(*primals: Any) -> Any:
            pairs = ((p, i >= nconsts) for i, p in enumerate(primals))
            return forward_of.call_wrapped(*(v for pair in pairs for v in pair))

        traced = jax.make_jaxpr(flat)(*(v.aval for v in closed.jaxpr.invars))
        results = interpreter.held(traced, operands)
        _, tree, forwarded = out_trees()
        count = tree.num_leaves - sum(source is not None for source in forwarded)
        own, results = iter(results[:count]), results[count:]
        saved = [next(own) if source is None else operands[source] for source in forwarded]
        return _arrays(interpreter, results, "a result of custom_vjp"), (saved, operands)

    def backward(saved: Any, cotangents: Any) -> tuple[Any, ...]:
        residuals, operands = saved
        residuals = interpreter.values(residuals)
        results = backward_of.call_wrapped(*residuals, *cotangents)
        if isinstance(results, tuple) and len(results) == 2 and isinstance(results[0], list):
            results, _ = results  # newer versions of JAX: and what the rule logs
        # None: no gradient, which is what an NVFP4 weight has.
        zeros = (ad.Zero, SymbolicZero)
        return tuple(
            None if _is_view(operand) or isinstance(result, zeros) else result
            for operand, result in zip(operands, results, strict=True)
        )

    function.defvjp(forward, backward)
    return function(*operands)


@rule("shard_map")
def _shard_map(interpreter: "Interpreter", eqn: Any, operands: list[Any]) -> list[Any]:
    """A device gets whole matrices, or whole rows of all of them."""
    params = eqn.params
    inner = params["jaxpr"]
    mesh = params["mesh"]
    divided = [
        _Divided(interpreter, operand, spec, mesh) if _is_view(operand) else None
        for operand, spec in zip(operands, params["in_specs"], strict=True)
    ]

    def function(*arrays: Any) -> tuple[Any, ...]:
        values = [a if d is None else d.part(a) for d, a in zip(divided, arrays, strict=True)]
        results = interpreter.held(inner, values)
        return tuple(_arrays(interpreter, results, "a result of shard_map"))

    manual = params.get("newly_manual_axes", params.get("manual_axes"))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(
            spec if d is None else d.specs
            for d, spec in zip(divided, params["in_specs"], strict=True)
        ),
        out_specs=tuple(params["out_specs"]),
        axis_names=frozenset(manual),
        check_vma=params["check_vma"],
    )
    return list(
        mapped(*(o if d is None else d.arrays for d, o in zip(divided, operands, strict=True)))
    )


class _Divided:
    """A view that a shard_map divides.

    Attributes:
        arrays: the view's arrays.
        specs: how each of them is divided.
    """

    def __init__(self, interpreter: "Interpreter", view: View, spec: Any, mesh: Any) -> None:
        local, names = {}, {}
        for axis, over in zip(view.axes, tuple(spec), strict=False):
            if over is None or over == ():
                continue
            over = over if isinstance(over, tuple) else (over,)
            ways = math.prod(mesh.shape[name] for name in over)
            if not axis or axis[0].size % ways:
                raise NotAView("a shard_map that divides an axis that was cut")
            interpreter.divided(view, axis[0], ways)
            local[axis[0]] = dataclasses.replace(axis[0], size=axis[0].size // ways)
            names[axis[0]] = over
        self.arrays = (view.value, view.dense)
        self.specs = (
            jax.tree.map(lambda part: _spec_of_part(part, view, names), view.value),
            None if view.dense is None else spec,
        )

        def of_device(axis: ViewAxis) -> ViewAxis:
            return tuple(local.get(atom, atom) for atom in axis)

        leaf = dataclasses.replace(view.leaf, free=of_device(view.leaf.free))
        axes = tuple(map(of_device, view.axes))
        self._like = dataclasses.replace(
            view, value=None, dense=None, leaf=leaf, axes=axes, batch=of_device(view.batch)
        )

    def part(self, arrays: Any) -> View:
        """The view of one device."""
        value, dense = arrays
        trail = (*self._like.trail, "shard_map")
        return dataclasses.replace(self._like, value=value, dense=dense, trail=trail)


def _spec_of_part(part: Any, view: View, names: dict[Any, Any]) -> PartitionSpec:
    """How an array with the axes (batch..., rows, ...), or only some of these, is divided."""
    rows = view.leaf.free[0] if view.leaf.free else None
    axes = (*view.batch, rows)[: part.ndim]
    return PartitionSpec(*(names.get(atom) for atom in axes))
