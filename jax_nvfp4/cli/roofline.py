# SPDX-License-Identifier: Apache-2.0
"""The roofline picture of a bench run."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax_nvfp4.cli.bench import Report


def plot(report: Report, path: pathlib.Path) -> None:
    """Draws what was reached against what the memory and XLA's fastest dot allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fastest = max(row.flops / row.bf16 for row in report.linear)
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [row.flops / row.bytes for row in report.linear]
    knee = fastest / report.read_ceiling
    low, high = min(*intensities, knee) / 2, max(intensities) * 2
    axes.plot(
        [low, knee, max(high, 2 * knee)],
        [low * report.read_ceiling / 1e12, fastest / 1e12, fastest / 1e12],
        color="black",
        linewidth=1,
        label=f"read {report.read_ceiling / 1e12:.2f} TB/s, bf16 {fastest / 1e12:.0f} TFLOP/s",
    )
    rows = sorted({row.m for row in report.linear})
    colors = plt.get_cmap("viridis")([i / max(1, len(rows) - 1) for i in range(len(rows))])
    for m, color in zip(rows, colors, strict=True):
        mine = [row for row in report.linear if row.m == m]
        x = [row.flops / row.bytes for row in mine]
        nvfp4 = [row.flops / row.best / 1e12 for row in mine]
        bf16 = [row.flops / row.bf16 / 1e12 for row in mine]
        axes.scatter(x, nvfp4, color=color, s=28, label=f"NVFP4, M = {m}", zorder=3)
        axes.scatter(x, bf16, color=color, s=20, marker="x", linewidths=1)
    axes.scatter([], [], color="gray", marker="x", linewidths=1, label="XLA bf16, same problem")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations for each byte that NVFP4 must move",
        ylabel="TFLOP/s",
        title=f"jax_nvfp4 linear on {report.device}, {report.date[:10]}",
    )
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
