# SPDX-License-Identifier: Apache-2.0
"""How the primitives are divided over the devices of a mesh.

XLA cannot look into a custom call: left alone, it would gather every operand on every device and
have each do all the work. A primitive therefore says which of its axes are one and the same
(`Factors`), and what a device does with its part; `jax.experimental.custom_partitioning` tells the
compiler. It is the same on every platform, whatever implementation the part is lowered to.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = Mapping[str, tuple[str, ...]]
"""The mesh axes, major first, over which each factor is divided."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """What the axes of a primitive's operands and results are made of.

    An array is described by one name for each axis. An axis that is the product of two factors is
    described by both, the one that varies slower first: ("tiles", "rows_of_tile").

    Attributes:
        operands: of each operand.
        results: of each result.
        sizes: of each factor.
        divisible: the factors that may be divided over devices. Where the primitive is divided
            along one, all arrays with this factor are; it comes first in the axes it is part of.
    """

    operands: tuple[tuple[Any, ...], ...]
    results: tuple[tuple[Any, ...], ...]
    sizes: Mapping[str, int]
    divisible: tuple[str, ...]

    def rule(self) -> SdyShardingRule:
        """The rule by which Shardy propagates shardings through the primitive."""

        def mapping(array: tuple[Any, ...]) -> ArrayMapping:
            return ArrayMapping(*(f if isinstance(f, str) else CompoundFactor(*f) for f in array))

        axes = [axis for array in (*self.operands, *self.results) for axis in array]
        # In the order in which they appear, or the rule is refused.
        names = dict.fromkeys(
            f for axis in axes for f in ([axis] if isinstance(axis, str) else axis)
        )
        return SdyShardingRule(
            tuple(map(mapping, self.operands)),
            tuple(map(mapping, self.results)),
            need_replication_factors=tuple(f for f in names if f not in self.divisible),
            **{f: self.sizes[f] for f in names if f not in axes},
        )

    def shardings(self, mesh: Mesh, axes: Axes, arrays: tuple[Any, ...]) -> list[NamedSharding]:
        """The shardings of `operands` or `results` where factors are divided as `axes` says."""
        return [
            NamedSharding(mesh, PartitionSpec(*(axes.get(_major(f)) or None for f in array)))
            for array in arrays
        ]

    def divide(self, mesh: Mesh, operands: Sequence[Any], results: Sequence[Any]) -> Axes:
        """Chooses how to divide the work, from what the compiler would like for each array.

        Args:
            mesh: the devices.
            operands: shapes with shardings, of each operand.
            results: likewise.

        Returns:
            The mesh axes for each factor; they divide the factor without a remainder.
        """
        wished_in = [_axes_of(a, names) for a, names in zip(operands, self.operands, strict=True)]
        wished_out = [_axes_of(a, names) for a, names in zip(results, self.results, strict=True)]
        kept = {_major(f) for array in self.results for f in array}
        taken: set[str] = set()
        axes: dict[str, tuple[str, ...]] = dict.fromkeys(self.divisible, ())

        def take(factor: str, wished: Sequence[str]) -> None:
            count = math.prod(mesh.shape[a] for a in axes[factor])
            for axis in wished:
                if axis in taken:
                    continue
                if self.sizes[factor] % (count * mesh.shape[axis]):
                    return
                count *= mesh.shape[axis]
                axes[factor] += (axis,)
                taken.add(axis)

        def wishes(factor: str, wished: Sequence[Axes]) -> list[tuple[str, ...]]:
            return [w[factor] for w in wished if factor in w]

        # Along a factor that is summed over, first what all operands have in common: no operand
        # moves. Then the results, which the compiler has settled. Then what costs operands that
        # are whole on every device nothing.
        summed = [f for f in self.divisible if f not in kept]
        for factor in summed:
            first, *others = wishes(factor, wished_in)
            take(factor, [a for a in first if all(a in other for other in others)])
        for factor in self.divisible:
            if factor in kept:
                take(factor, next(filter(None, wishes(factor, wished_out)), ()))
        for factor in summed:
            for wished in wishes(factor, wished_in):
                take(factor, wished)
        return axes


def _major(factor: Any) -> str:
    return factor if isinstance(factor, str) else factor[0]


def _axes_of(array: Any, names: tuple[Any, ...]) -> Axes:
    """The mesh axes of each factor in the sharding of an array."""
    spec = () if array.sharding is None else array.sharding.spec
    found = {_major(f): () for f in names}
    for factor, entry in zip(names, spec, strict=False):
        if entry is not None:
            found[_major(factor)] = entry if isinstance(entry, tuple) else (entry,)
    return found


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """How a primitive is divided.

    Attributes:
        factors: avals of the operands and params to `Factors`.
        part: what a device does: `part(operands, axes, sizes, **params)` with its shards of the
            operands, the mesh axes of each factor, and in how many parts each factor is divided,
            gives its shards of the results. Collectives over those axes are at hand.
    """

    factors: Callable[..., Factors]
    part: Callable[..., Any]


def partitioned(
    bind: Callable[..., Any], partitioning: Partitioning, operands: Sequence[Any], params: Any
) -> Any:
    """Calls a primitive such that the compiler divides it over the mesh.

    Args:
        bind: the primitive's bind.
        partitioning: of the primitive.
        operands: of the primitive.
        params: of the primitive.

    Returns:
        Its results.
    """
    factors = partitioning.factors(*map(jax.typeof, operands), **params)

    @custom_partitioning
    def whole(*operands: Any) -> Any:
        return bind(*operands, **params)

    def partition(mesh: Mesh, in_shapes: Any, out_shapes: Any) -> Any:
        axes = factors.divide(mesh, in_shapes, out_shapes)
        parts = {f: math.prod(mesh.shape[a] for a in names) for f, names in axes.items()}
        part = functools.partial(partitioning.part, axes=axes, parts=parts, **params)
        return (
            mesh,
            lambda *shards: part(shards),
            factors.shardings(mesh, axes, factors.results),
            tuple(factors.shardings(mesh, axes, factors.operands)),
        )

    whole.def_partition(partition, sharding_rule=factors.rule())
    return whole(*operands)


def is_partitioned(context: Any, avals: Sequence[Any]) -> bool:
    """Whether to leave the division of a primitive to `partitioned`.

    Args:
        context: that of the lowering.
        avals: of the operands.

    Returns:
        False where nothing is to be divided: on one device, on a device's part (`shard_map`), of
        empty operands; and where the compiler cannot call back: for `jax.export`, whose programs
        are compiled by others, for devices that are no mesh, and for the GSPMD partitioner.
    """
    module = context.module_context
    devices = getattr(module.axis_context, "device_assignment", None)
    return (
        devices is not None
        and len(devices) > 1
        and getattr(module.axis_context, "abstract_mesh", None) is not None
        and not module.lowering_parameters.for_export
        and getattr(jax.config, "jax_use_shardy_partitioner", True)
        and all(aval.size for aval in avals)
    )
