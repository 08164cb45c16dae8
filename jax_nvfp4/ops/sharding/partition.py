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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import (
    ArrayMapping,
    CompoundFactor,
    SdyShardingRule,
    custom_partitioning,
)
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

Axes = Mapping[str, tuple[str, ...]]
"""The mesh axes, major first, over which each factor is divided."""

_Spec = tuple[tuple[str, ...], ...]
"""The mesh axes, major first, over which each axis of an array is divided."""


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors that the axes of a primitive's operands and results are made of.

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

        def single(array: tuple[Any, ...]) -> tuple[Any, ...]:
            """Without the factors of size 1 in products, which Shardy refuses."""
            return tuple(f[1] if _is_product(f) and self.sizes[f[0]] == 1 else f for f in array)

        def mapping(array: tuple[Any, ...]) -> ArrayMapping:
            return ArrayMapping(*(CompoundFactor(*f) if _is_product(f) else f for f in array))

        operands, results = tuple(map(single, self.operands)), tuple(map(single, self.results))
        axes = [axis for array in (*operands, *results) for axis in array]
        # In the order in which they appear, or the rule is refused.
        names = dict.fromkeys(f for axis in axes for f in (axis if _is_product(axis) else [axis]))
        in_products: Any = {f: self.sizes[f] for f in names if f not in axes}
        return SdyShardingRule(
            tuple(map(mapping, operands)),
            tuple(map(mapping, results)),
            need_replication_factors=tuple(f for f in names if f not in self.divisible),
            **in_products,
        )

    def shardings(self, mesh: Mesh, axes: Axes, arrays: tuple[Any, ...]) -> list[NamedSharding]:
        """The shardings of `operands` or `results` where factors are divided as `axes` says."""
        return [
            NamedSharding(mesh, PartitionSpec(*(axes.get(_major(f)) or None for f in array)))
            for array in arrays
        ]

    def divide(self, mesh: Mesh, operands: Sequence[_Spec], results: Sequence[_Spec]) -> Axes:
        """Chooses how to divide the work, from what the compiler would like for each array.

        Args:
            mesh: the devices.
            operands: the mesh axes of each axis of each operand.
            results: likewise.

        Returns:
            The mesh axes for each factor; they divide the factor without a remainder.
        """
        wished_in = list(map(_by_factor, operands, self.operands))
        wished_out = list(map(_by_factor, results, self.results))
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

        # Along a factor that is summed over, first the axes that all its operands are divided by:
        # then none of them moves. Next the results, as the compiler has settled them. Last, axes
        # that only some operands are divided by: the others, if whole, are sliced in place.
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


def leading(x: Any) -> tuple[str, ...]:
    """A factor for each axis of x (..., K) but the last."""
    return tuple(f"m{i}" for i in range(x.ndim - 1))


def mesh_axes(axes: Axes, factors: Sequence[str]) -> tuple[str, ...]:
    """The mesh axes over which any of the factors is divided."""
    return tuple(a for f in factors for a in axes.get(f, ()))


def _is_product(axis: Any) -> bool:
    return not isinstance(axis, str)


def _major(axis: Any) -> str:
    return axis[0] if _is_product(axis) else axis


def _by_factor(spec: _Spec, names: tuple[Any, ...]) -> Axes:
    """The mesh axes of each factor of an array."""
    return {_major(factor): axes for factor, axes in zip(names, spec, strict=True)}


def _orders(factors: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The distinct orders of some numbers."""
    if not factors:
        yield ()
    for first in sorted(set(factors)):
        rest = list(factors)
        rest.remove(first)
        yield from ((first, *order) for order in _orders(rest))


def _primes(number: int) -> list[int]:
    """The prime factors of a number."""
    for prime in range(2, math.isqrt(number) + 1):
        if number % prime == 0:
            return [prime, *_primes(number // prime)]
    return [number] if number > 1 else []


def _spec_on(sharding: Sharding | None, ndim: int, sizes: tuple[int, ...]) -> _Spec | None:
    """The axes of a mesh of these sizes over which each axis of an array is divided.

    Args:
        sharding: of the array; None: whole on every device.
        ndim: of the array.
        sizes: of the mesh; its axes are called by their numbers.

    Returns:
        Axes for each axis of the array, major first; None if the mesh does not express it.
    """
    if sharding is None or sharding.is_fully_replicated:
        return ((),) * ndim
    # Where in an array of as many elements a side as there are devices is each one's part?
    count = math.prod(sizes)
    parts = sharding.devices_indices_map((count,) * ndim)
    starts = np.array([[s.start or 0 for s in index] for index in parts.values()])
    spec = []
    for start in starts.reshape(*sizes, ndim).transpose(-1, *range(len(sizes))):
        # An axis over which the array is divided moves the start by a stride of its own.
        one = np.eye(len(sizes), dtype=int)
        strides = [int(start[tuple(step)]) for step in one]
        if (start != sum(s * i for s, i in zip(strides, np.indices(sizes), strict=True))).any():
            return None
        axes = sorted((a for a, s in enumerate(strides) if s), key=lambda a: -strides[a])
        spec.append(tuple(str(a) for a in axes))
    return tuple(spec)


def _mesh_of(devices: Sequence[jax.Device], arrays: Sequence[Any]) -> tuple[Mesh, list[_Spec]]:
    """A mesh that expresses the shardings of arrays, and what they are on it.

    The compiler speaks of devices, not of the axes of the user's mesh, and may divide by a part of
    an axis. The axes here are as small as can be: of prime sizes.

    Args:
        devices: in the program's order.
        arrays: shapes with shardings.

    Returns:
        The mesh, and for each array the mesh axes of each of its axes. An array with a sharding
        that no mesh expresses counts as whole on every device.
    """
    best: tuple[int, tuple[int, ...], list[_Spec | None]] | None = None
    for sizes in _orders(_primes(len(devices))):
        specs = [_spec_on(a.sharding, len(a.shape), sizes) for a in arrays]
        missed = sum(spec is None for spec in specs)
        if best is None or missed < best[0]:
            best = missed, sizes, specs
        if not missed:
            break
    assert best is not None
    _, sizes, specs = best
    names = tuple(map(str, range(len(sizes))))
    mesh = Mesh(np.array(devices).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))
    return mesh, [spec or ((),) * len(a.shape) for a, spec in zip(arrays, specs, strict=True)]


def outside_meshes(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function as traced without a mesh in the context.

    What the compiler asks for is the business of one device: a mesh that the user has set would put
    its shardings on whatever the function creates.
    """

    @functools.wraps(function)
    def traced(*operands: Any, **params: Any) -> Any:
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            return function(*operands, **params)

    return traced


@dataclasses.dataclass(frozen=True)
class Partitioning:
    """How a primitive is divided.

    Attributes:
        factors: avals of the operands and params to `Factors`.
        part: what a device does: `part(bind, operands, axes=, parts=, **params)` with the
            primitive's bind, its shards of the operands, the mesh axes of each factor, and in how
            many parts each factor is divided, gives its shards of the results. Collectives over
            those axes are at hand.
    """

    factors: Callable[..., Factors]
    part: Callable[..., Any]


def partitioned(
    bind: Callable[..., Any],
    partitioning: Partitioning,
    devices: tuple[jax.Device, ...],
    operands: Sequence[Any],
    params: Mapping[str, Any],
) -> Any:
    """Calls a primitive such that the compiler divides it over devices.

    Args:
        bind: the primitive's bind.
        partitioning: of the primitive.
        devices: as many as the program is for.
        operands: of the primitive.
        params: of the primitive.

    Returns:
        Its results.
    """
    factors = partitioning.factors(*map(jax.typeof, operands), **params)

    @custom_partitioning
    def whole(*operands: Any) -> Any:
        return outside_meshes(bind)(*operands, **params)

    def partition(_: Mesh, in_shapes: Any, out_shapes: Any) -> Any:
        mesh, specs = _mesh_of(devices, (*in_shapes, *out_shapes))
        axes = factors.divide(mesh, specs[: len(in_shapes)], specs[len(in_shapes) :])
        parts = {f: math.prod(mesh.shape[a] for a in names) for f, names in axes.items()}
        return (
            mesh,
            outside_meshes(
                lambda *shards: partitioning.part(bind, shards, axes=axes, parts=parts, **params)
            ),
            factors.shardings(mesh, axes, factors.results),
            tuple(factors.shardings(mesh, axes, factors.operands)),
        )

    whole.def_partition(partition, decode_shardings=False, sharding_rule=factors.rule())
    return whole(*operands)


def context_to_partition(context: Any) -> Any | None:
    """The context in which to lower a primitive by `partitioned`, if it is to be divided.

    JAX names the devices in the context only to primitives on a list of its own, and refuses to
    lower those for an abstract mesh or for several meshes. To `partitioned`, it does not matter
    which devices they are.

    Args:
        context: that of the lowering.

    Returns:
        The context with devices. None where nothing is to be divided: on one device, on a device's
        part (in `shard_map`), of empty operands; and where the compiler cannot call back: for
        `jax.export`, whose programs others compile, for devices that are not at hand, and for
        the GSPMD partitioner.
    """
    module = context.module_context
    count = getattr(module.axis_context, "num_devices", 1)
    if (
        count == 1
        or module.lowering_parameters.for_export
        or not all(aval.size for aval in context.avals_in)
        or not getattr(jax.config, "jax_use_shardy_partitioner", True)
        or module.backend is None
        or len(module.backend.devices()) < count
    ):
        return None
    devices = tuple(module.backend.devices()[:count])
    axis_context = dataclasses.replace(
        module.axis_context, device_assignment=devices, abstract_mesh=None
    )
    return context.replace(module_context=module.replace(axis_context=axis_context))
