# SPDX-License-Identifier: Apache-2.0
"""Which leaves become NVFP4 kernels: those that can, less those that the user leaves alone.

The default leaves alone what the command line leaves alone, by one definition: a leaf counts as the
tensor of a checkpoint that would hold its matrix.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path as File
from typing import Any

import jax
import numpy as np

from jax_nvfp4.checkpoint.files import Entry
from jax_nvfp4.checkpoint.selection import DEFAULT_SKIP, Patterns, Roles
from jax_nvfp4.conversion.analysis import Layout, Record, Use, layout
from jax_nvfp4.conversion.program import LeafPlan
from jax_nvfp4.numerics import BLOCK
from jax_nvfp4.tensor import FLOATS

Path = tuple[str, ...]
Where = Callable[[Path, Use], bool]

LOOKED_UP = "gather"
_OWN_NAMES = ("kernel", "weight", "w", "embedding")


def decide(
    paths: Sequence[Path],
    leaves: Sequence[Any],
    records: Mapping[int | None, Record],
    where: Where | None,
    tied: str | None,
) -> list[LeafPlan]:
    """What becomes of each leaf.

    Args:
        paths: of the leaves.
        leaves: their shapes and dtypes; what is no array as it is.
        records: what the program does with each, by its number.
        where: of the user.
        tied: "copy" or None.
    """
    found = [_layout(leaf, records.get(i), tied) for i, leaf in enumerate(leaves)]
    default = None
    if where is None:
        default = _Default(paths, leaves, records, found)
    plans = []
    for i, (path, leaf, of_leaf) in enumerate(zip(paths, leaves, found, strict=True)):
        left = functools.partial(LeafPlan, ".".join(path), path, leaf, None)
        if isinstance(of_leaf, str):
            plans.append(left(of_leaf))
            continue
        record = records[i]
        use = Use(leaf.shape, leaf.dtype, of_leaf.contracting_axes, tuple(record.primitives))
        if default is not None:
            reason = default.reason(path, of_leaf)
        else:
            assert where is not None
            reason = None if where(path, use) else "left by where"
        if reason is not None:
            plans.append(left(reason))
            continue
        what = f"{of_leaf.n} x {of_leaf.k}"
        if of_leaf.batch:
            what = f"{math.prod(of_leaf.sizes)} matrices of {what}"
        if record.obstacle is not None:
            what += f", and a dense copy: {record.obstacle}"
        keeps_dense = record.obstacle is not None
        plans.append(LeafPlan(".".join(path), path, leaf, of_leaf, what, keeps_dense))
    return plans


def _layout(leaf: Any, record: Record | None, tied: str | None) -> Layout | str:
    """How a leaf can be quantized, or why it cannot be."""
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return "not an array"
    if leaf.dtype not in FLOATS:
        return f"dtype {leaf.dtype.name}"
    if len(leaf.shape) < 2:
        return "1 axis" if leaf.shape else "a scalar"
    if record is None:
        return "not used"
    if not record.products:
        return record.obstacle or "meets no product"
    if record.obstacle is not None and tied is None:
        return f"{record.obstacle}, beside products"
    return layout(leaf.shape, record)


class _Default:
    """The leaves that are left alone without a `where`."""

    def __init__(
        self,
        paths: Sequence[Path],
        leaves: Sequence[Any],
        records: Mapping[int | None, Record],
        found: Sequence[Layout | str],
    ) -> None:
        self._patterns = Patterns(DEFAULT_SKIP)
        entries = {}
        for path, of_leaf in zip(paths, found, strict=True):
            if isinstance(of_leaf, Layout):
                entry = _entry(path, of_leaf)
                entries[entry.name] = entry
        tables = [
            leaf.shape[0]
            for i, leaf in enumerate(leaves)
            if i in records and LOOKED_UP in records[i].primitives
        ]
        config = {"vocab_size": max(tables)} if tables else {}
        self._roles = Roles(entries, config)

    def reason(self, path: Path, of_leaf: Layout) -> str | None:
        """Why a leaf is left alone, or None."""
        if pattern := self._patterns.match(".".join(path)):
            return f"matches {pattern!r}"
        role = self._roles.role(_entry(path, of_leaf).name)
        # A router gives fewer values than it takes; the gate of a gated layer (`gating_einsum`) may
        # have the name of one.
        if role and not (role == "a router" and of_leaf.n >= of_leaf.k):
            return role
        if of_leaf.k % BLOCK:
            return f"K = {of_leaf.k} is not a multiple of {BLOCK}"
        return None


def _entry(path: Path, of_leaf: Layout) -> Entry:
    """The tensor that a checkpoint would have for the matrix of a leaf.

    A stack of matrices is that of layers, which a checkpoint numbers.
    """
    parts = path[:-1] if path[-1] in _OWN_NAMES and len(path) > 1 else path
    number = ("0",) if of_leaf.batch and not any(part.isdigit() for part in parts) else ()
    name = ".".join((*number, *parts, "weight"))
    return Entry(name, np.dtype(np.float32), (of_leaf.n, of_leaf.k), File(), 0)


def join(plans: Sequence[LeafPlan], records: Mapping[int | None, Record]) -> list[LeafPlan]:
    """Lets leaves that multiply one and the same array share a weight, one after the other in rows.

    Such are the projections to q, k and v, and those of a gate and up. A leaf may be stacked and
    scanned over, but not indexed: the others could be at another index.
    """
    groups: dict[Any, list[int]] = {}
    for i, plan in enumerate(plans):
        if plan.layout is not None and (key := _shared_input(plan, records[i])) is not None:
            groups.setdefault(key, []).append(i)
    result = list(plans)
    for members in groups.values():
        if len(members) > 1:
            rows = [_rows_of(plans[i]) for i in members]
            for place, i in enumerate(members):
                others = " with " + ", ".join(plans[j].name for j in members if j != i)
                result[i] = dataclasses.replace(
                    plans[i],
                    why=f"{plans[i].why}, joined{others}",
                    joined=tuple(members),
                    first_row=sum(rows[:place]),
                    all_rows=sum(rows),
                )
    return result


def _rows_of(plan: LeafPlan) -> int:
    assert plan.layout is not None
    return plan.layout.n


def _shared_input(plan: LeafPlan, record: Record) -> Any:
    """What leaves must have in common to share a weight; None for one that can share none."""
    assert plan.layout is not None
    of_leaf = plan.layout
    indexed = {"slice", "dynamic_slice", "split"} & set(record.primitives)
    if plan.keeps_dense or len(record.inputs) != 1 or indexed or record.divided:
        return None
    (product,) = record.inputs
    if product.groups or product.batch or not set(of_leaf.contracting) <= set(product.of_x):
        return None
    others = [a for a in product.of_x if a not in of_leaf.contracting]
    order = tuple(product.of_x.index(a) for a in (*others, *of_leaf.contracting))
    # The record holds the array, so that its id stays its own.
    source = id(product.source)
    return source, product.x.shape, order, product.dtype, of_leaf.sizes, plan.leaf.dtype
