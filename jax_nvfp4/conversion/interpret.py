# SPDX-License-Identifier: Apache-2.0
"""Runs a traced program on arrays and views: the loop, and what happens where no rule applies."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util

from jax_nvfp4.conversion.rules import RULES, Product
from jax_nvfp4.conversion.view import Atom, NotAView, View, ViewAxis


class Interpreter:
    """Runs programs; what becomes of products, and of views that stay none, subclasses say."""

    def __init__(self) -> None:
        self._traced: dict[Hashable, Any] = {}

    def product(
        self, eqn: Any, operands: list[Any], view: View, product: Product
    ) -> list[jax.Array]:
        """The result of a product with a view."""
        raise NotImplementedError

    def value(self, view: View) -> jax.Array:
        """The array that a view stands for."""
        raise NotImplementedError

    def dense(self, view: View, why: str) -> jax.Array:
        """The same for an operation that `why` names; a converted leaf should not meet one."""
        raise NotImplementedError

    def indexed(self, view: View, digits: ViewAxis) -> None:
        """Is told that a program takes indices of some atoms, which makes them batch axes."""

    def divided(self, view: View, atom: Atom, ways: int) -> None:
        """Is told that devices share an atom."""

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
        """Evaluates a program.

        Args:
            jaxpr: the program.
            consts: its constants.
            operands: an array or a view for each of its arguments.

        Returns:
            An array or a view for each of its results.
        """
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= dict(zip(jaxpr.invars, operands, strict=True))
        literal = core.Literal
        last = {v: eqn for eqn in jaxpr.eqns for v in eqn.invars if not isinstance(v, literal)}
        for v in jaxpr.outvars:
            if not isinstance(v, literal):
                last.pop(v, None)

        for eqn in jaxpr.eqns:
            inputs = eqn.invars
            operands = [v.val if isinstance(v, literal) else env[v] for v in inputs]
            env.update(zip(eqn.outvars, self.equation(eqn, operands), strict=True))
            for v in inputs:
                if not isinstance(v, literal) and last.get(v) is eqn:
                    env.pop(v, None)  # memory, where this runs outside of jit
        return [v.val if isinstance(v, literal) else env[v] for v in jaxpr.outvars]

    def held(self, program: Any, operands: Sequence[Any]) -> list[Any]:
        """The same for a program that an equation holds, with its constants or without any."""
        consts = getattr(program, "consts", ())
        return self.run(getattr(program, "jaxpr", program), consts, operands)

    def equation(self, eqn: Any, operands: list[Any]) -> list[Any]:
        """The results of one equation, by its rule where it has one."""
        if not any(isinstance(operand, View) for operand in operands):
            return self.bind(eqn, operands)
        name = eqn.primitive.name
        with _context(eqn):
            if name not in RULES:
                return self.bind(eqn, self.all_dense(operands, name))
            try:
                return RULES[name](self, eqn, operands)
            except NotAView as reason:
                return self.bind(eqn, self.all_dense(operands, str(reason)))

    def all_dense(self, operands: Sequence[Any], why: str) -> list[Any]:
        """The operands, each view as an array."""
        return [self.dense(o, why) if isinstance(o, View) else o for o in operands]

    def values(self, operands: Sequence[Any]) -> list[Any]:
        """The operands, each view as an array; for the rules of derivatives."""
        return [self.value(o) if isinstance(o, View) else o for o in operands]

    def bind(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """The results of an equation on arrays, as the program has it."""
        params = eqn.primitive.get_bind_params(eqn.params)
        functions, params = params if isinstance(params, tuple) else ((), params)
        with _context(eqn):
            results = eqn.primitive.bind(*functions, *operands, **params)
        return list(results) if eqn.primitive.multiple_results else [results]

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives for a key, so that what is traced for one call serves others."""
        if key not in self._traced:
            self._traced[key] = make()
        return self._traced[key]


@contextlib.contextmanager
def _context(eqn: Any) -> Iterator[None]:
    """The names, the place in the source and the settings that an equation was traced under."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with (
        source_info_util.user_context(eqn.source_info.traceback, name_stack=names),
        eqn.ctx.manager,
    ):
        yield
