# SPDX-License-Identifier: Apache-2.0
"""Which axes of an array became the rows of an NVFP4 weight, and which its columns."""

import dataclasses
import math
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """The axes of an array that an NVFP4 weight (batch..., N, K) stands for.

    They are those of one matrix without batch axes, so that `scan`, `vmap` and `shard_map` may take
    leading axes off the weight and add others: the batch axes there are, the weight alone knows.

    Attributes:
        sizes: of the axes of one matrix, in the order of the array. Of a device's part, in
            `shard_map`, those of the whole.
        free: the axes that N runs over, major first, as positions in `sizes`.
        contracting: the axes that K runs over, likewise.
        batch: positions among all axes of the array, in the order in which the weight has them.
            Batch axes that are not named come first. Empty where all do.
    """

    sizes: tuple[int, ...]
    free: tuple[int, ...]
    contracting: tuple[int, ...]
    batch: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.batch == tuple(range(len(self.batch))):
            object.__setattr__(self, "batch", ())

    def places(self, lead: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """Where the axes of a weight with `lead` batch axes are in its array.

        Returns:
            The positions of the batch axes, in the weight's order; of those that N runs over; of
            those that K runs over.
        """
        missing = len(self.batch) - lead
        taken, left = self.batch[: max(missing, 0)], self.batch[max(missing, 0) :]
        added = max(-missing, 0)
        moved = (p - sum(t < p for t in taken) + added for p in left)
        batch = (*range(added), *moved)
        matrix = [p for p in range(lead + len(self.sizes)) if p not in batch]
        return (
            batch,
            tuple(matrix[a] for a in self.free),
            tuple(matrix[a] for a in self.contracting),
        )

    def sizes_of(self, n: int, k: int) -> tuple[int, ...]:
        """The sizes of one matrix (n, k), which may be a device's part of the whole.

        Raises:
            ValueError: the part is not one of whole slices of the major axis.
        """
        sizes = list(self.sizes)
        for name, axes, total in (("rows", self.free, n), ("columns", self.contracting, k)):
            if math.prod(self.sizes[a] for a in axes) == total:
                continue
            minor = math.prod(self.sizes[a] for a in axes[1:])
            if not axes or not minor or total % minor:
                raise ValueError(
                    f"a weight of {total} {name} is no part of a kernel whose {name} run over axes "
                    f"of sizes {tuple(self.sizes[a] for a in axes)}: only the first of them may be "
                    f"divided"
                )
            sizes[axes[0]] = total // minor
        return tuple(sizes)

    def shape(self, weight_shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the array that a weight of this shape stands for."""
        *lead, n, k = weight_shape
        batch = self.places(len(lead))[0]
        sizes, lengths = iter(self.sizes_of(n, k)), dict(zip(batch, lead, strict=True))
        ndim = len(lead) + len(self.sizes)
        return tuple(lengths[p] if p in lengths else next(sizes) for p in range(ndim))

    def transposed(self, permutation: Sequence[int]) -> "KernelAxes":
        """The axes of the array with its axes in another order, as `jnp.transpose` has it."""
        lead = len(permutation) - len(self.sizes)
        batch, _, _ = self.places(lead)
        before = [p for p in range(len(permutation)) if p not in batch]
        after = [before.index(p) for p in permutation if p not in batch]
        return KernelAxes(
            sizes=tuple(self.sizes[a] for a in after),
            free=tuple(after.index(a) for a in self.free),
            contracting=tuple(after.index(a) for a in self.contracting),
            batch=tuple(list(permutation).index(p) for p in batch),
        )

    def with_batch(self, lead: int, chosen: Iterable[int]) -> "KernelAxes":
        """The axes once some free ones, by their positions in the array, are batch axes."""
        chosen = tuple(chosen)
        batch, free, contracting = self.places(lead)
        ndim = lead + len(self.sizes)
        matrix = [p for p in range(ndim) if p not in (*batch, *chosen)]
        every = [p for p in range(ndim) if p not in batch]
        return KernelAxes(
            sizes=tuple(self.sizes[every.index(p)] for p in matrix),
            free=tuple(matrix.index(p) for p in free if p not in chosen),
            contracting=tuple(matrix.index(p) for p in contracting),
            batch=(*batch, *chosen),
        )
