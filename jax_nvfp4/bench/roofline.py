# SPDX-License-Identifier: Apache-2.0
"""The roofline picture of a bench run."""

from __future__ import annotations

import pathlib

from jax_nvfp4.bench.report import Report


def plot(report: Report, path: pathlib.Path) -> None:
    """Draws what was reached against what the memory and XLA's largest dot allow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    reading, fastest = report.ceilings.read, report.ceilings.multiply
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    intensities = [row.flops / row.bytes for row in report.linear]
    knee = fastest / reading
    low, high = min(*intensities, knee) / 2, max(intensities) * 2
    axes.plot(
        [low, knee, max(high, 2 * knee)],
        [low * reading / 1e12, fastest / 1e12, fastest / 1e12],
        color="black",
        linewidth=1,
        label=f"read {reading / 1e12:.2f} TB/s, bf16 {fastest / 1e12:.0f} TFLOP/s",
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
        title=f"jax_nvfp4 linear on {report.device}, {report.date[:10]}",
    )
    axes.grid(which="both", linewidth=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _columns(points: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
