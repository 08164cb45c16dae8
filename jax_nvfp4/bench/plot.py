# SPDX-License-Identifier: Apache-2.0
"""The picture of a bench run: its roofline, and the speed-up by the number of rows."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_nvfp4.bench.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot(report: Report, path: pathlib.Path) -> None:
    """Draws both beside each other; the file's ending says its format: PNG, SVG or PDF."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        ncols=2, figsize=(14, 5.5), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(f"jax_nvfp4 linear on {report.device}, {report.date[:10]}")
    _roofline(report, left)
    _speedup(report, right)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _roofline(report: Report, axes: Axes) -> None:
    """What was reached against what the memory and XLA's largest dot allow."""
    import matplotlib.pyplot as plt

    reading, fastest = report.ceilings.read, report.ceilings.multiply
    intensities = [row.flops / row.bytes for row in report.linear]
    knee = fastest / reading
    low, high = min(*intensities, knee) / 2, max(intensities) * 2
    axes.plot(
        [low, knee, max(high, 2 * knee)],
        [low * reading / 1e12, fastest / 1e12, fastest / 1e12],
        color="black",
        linewidth=1,
        label=f"read {reading / 1e12:.3g} TB/s, bf16 {fastest / 1e12:.3g} TFLOP/s",
    )
    rows = sorted({row.m for row in report.linear})
    colors = plt.get_cmap("viridis")([i / max(1, len(rows) - 1) for i in range(len(rows))])
    for m, color in zip(rows, colors, strict=True):
        mine = [row for row in report.linear if row.m == m]
        nvfp4 = [(r.flops / r.bytes, r.flops / r.best / 1e12) for r in mine if r.best]
        bf16 = [(r.flops / r.bytes, r.flops / r.bf16 / 1e12) for r in mine if r.bf16]
        label = f"NVFP4, M = {m}"
        axes.scatter(*_columns(nvfp4), color=color, s=28, label=label, zorder=3)
        axes.scatter(*_columns(bf16), color=color, s=20, marker="x", linewidths=1)
    axes.scatter([], [], color="gray", marker="x", linewidths=1, label="XLA bf16, same problem")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte that NVFP4 must move",
        ylabel="TFLOP/s",
    )
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize="small")


def _speedup(report: Report, axes: Axes) -> None:
    """Times as fast as XLA's bf16 dot by rows of x: 16-bit activations, and NVFP4 ones dashed."""
    for i, (n, k) in enumerate(dict.fromkeys((row.n, row.k) for row in report.linear)):
        mine = sorted((r for r in report.linear if (r.n, r.k) == (n, k)), key=lambda r: r.m)
        wide = [(r.m, r.bf16 / r.w4a16) for r in mine if r.bf16 and r.w4a16]
        narrow = [(r.m, r.bf16 / r.w4a4) for r in mine if r.bf16 and r.w4a4]
        axes.plot(*_columns(wide), color=f"C{i % 10}", marker="o", markersize=4, label=f"{n} x {k}")
        axes.plot(*_columns(narrow), color=f"C{i % 10}", linestyle="--", linewidth=1)
    axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="activations in NVFP4 too")
    axes.axhline(1, color="black", linewidth=1)
    rows = sorted({row.m for row in report.linear})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, labels=[str(m) for m in rows])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="M, rows of x", ylabel="times as fast as XLA's bf16 dot")
    axes.grid(linewidth=0.3)
    axes.legend(fontsize="small")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
