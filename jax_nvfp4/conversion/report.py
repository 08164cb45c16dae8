# SPDX-License-Identifier: Apache-2.0
"""What became of each leaf of the params, as a value."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """What became of one leaf.

    Attributes:
        path: of the leaf.
        shape: of the leaf.
        dtype: its name.
        bytes_before: of the dense leaf.
        bytes_after: of what stands in its place.
        quantized: whether products with it are NVFP4 ones.
        why: of a quantized leaf its matrices; of any other what keeps it as it is.
    """

    path: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes_before: int
    bytes_after: int
    quantized: bool
    why: str

    @property
    def name(self) -> str:
        """The path, joined by dots."""
        return ".".join(self.path)


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the params; `print` shows a table.

    Attributes:
        leaves: a report for each array of the params, in their order.
    """

    leaves: tuple[LeafReport, ...]

    @property
    def bytes_before(self) -> int:
        """Of the dense params."""
        return sum(leaf.bytes_before for leaf in self.leaves)

    @property
    def bytes_after(self) -> int:
        """Of the converted params."""
        return sum(leaf.bytes_after for leaf in self.leaves)

    @property
    def share(self) -> float:
        """The quantized leaves' part of the dense bytes."""
        reached = sum(leaf.bytes_before for leaf in self.leaves if leaf.quantized)
        return reached / self.bytes_before if self.bytes_before else 0.0

    @property
    def quantized(self) -> tuple[LeafReport, ...]:
        """The leaves that are in NVFP4."""
        return tuple(leaf for leaf in self.leaves if leaf.quantized)

    @property
    def left(self) -> tuple[LeafReport, ...]:
        """The leaves that stay dense, the largest first."""
        rest = (leaf for leaf in self.leaves if not leaf.quantized)
        return tuple(sorted(rest, key=lambda leaf: -leaf.bytes_before))

    def __str__(self) -> str:
        """A table; leaves that differ in the numbers of their path alone share a row."""
        groups: dict[tuple[str, ...], list[LeafReport]] = {}
        for leaf in (*self.quantized, *self.left):
            name = ".".join("*" if part.isdigit() else part for part in leaf.path)
            shape = "x".join(map(str, leaf.shape)) or "scalar"
            groups.setdefault((name, shape, str(leaf.quantized), leaf.why), []).append(leaf)
        rows = [("leaf", "leaves", "shape", "bytes", "in NVFP4", "what became of it")]
        for (name, shape, _, why), leaves in groups.items():
            name = leaves[0].name if len(leaves) == 1 else name
            before, after = (
                sum(getattr(leaf, field) for leaf in leaves)
                for field in ("bytes_before", "bytes_after")
            )
            quantized = f"{after:,}" if leaves[0].quantized else "-"
            rows.append((name, str(len(leaves)), shape, f"{before:,}", quantized, why))
        total = f"{self.share:.1%} of the bytes are in NVFP4"
        counts = (f"{self.bytes_before:,}", f"{self.bytes_after:,}", total)
        rows.append(("total", str(len(self.leaves)), "", *counts))
        return _table(rows)


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest entry, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = (1, 3, 4)
    lines = []
    for row in rows:
        cells = (
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
