# SPDX-License-Identifier: Apache-2.0
"""The results of a run of `bench`, and the tables that show them."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax_nvfp4.bench.timing import Ceilings

BYTES_PER_WEIGHT = 0.5625  # four bits, and one eight-bit scale for sixteen weights


@dataclasses.dataclass(frozen=True)
class LinearRow:
    """One shape and number of rows. Times are seconds a call; None: not measured, or not credible.

    Attributes:
        n: rows of the weight.
        k: its columns.
        m: rows of x.
        w4a16: with 16-bit activations.
        w4a4: with activations quantized per token, their quantization included.
        invariant: as `w4a16`, or `w4a4` where there is none, with `batch_invariant=True`.
        bf16: XLA's dot of bf16 operands.
    """

    n: int
    k: int
    m: int
    w4a16: float | None
    w4a4: float | None
    invariant: float | None
    bf16: float | None

    @property
    def weight_bytes(self) -> float:
        """Bytes of the weight, codes and scales."""
        return self.n * self.k * BYTES_PER_WEIGHT

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: the weight once, x and y."""
        return self.weight_bytes + 2 * self.m * (self.n + self.k)

    @property
    def flops(self) -> float:
        """Multiplications and additions of a call."""
        return 2.0 * self.m * self.n * self.k

    @property
    def main(self) -> float | None:
        """The time of one GEMM: with 16-bit activations, or, where those have no kernel, W4A4."""
        return self.w4a16 if self.w4a16 is not None else self.w4a4

    @property
    def best(self) -> float | None:
        """The faster of the two ways to treat activations."""
        return min((t for t in (self.w4a16, self.w4a4) if t is not None), default=None)


@dataclasses.dataclass(frozen=True)
class QuantizeRow:
    """One shape of the quantizer's input, bf16. Times are seconds a call; None: not credible.

    Attributes:
        m: rows.
        k: columns.
        static: with the global scale given.
        token: with one computed for each row.
        tensor: with one computed for all of x.
        copy: of an elementwise operation that reads x and writes as much.
    """

    m: int
    k: int
    static: float | None
    token: float | None
    tensor: float | None
    copy: float | None

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: x, the codes and the scales."""
        return self.m * self.k * (2 + BYTES_PER_WEIGHT)


@dataclasses.dataclass
class Report:
    """Everything that was measured; times in seconds.

    Attributes:
        device: its kind.
        arch: of the kernels that serve it.
        date: when, UTC.
        versions: of what.
        ceilings: of the device.
        linear: the layer.
        quantize: the quantizer.
        call: what one custom call costs, by the way in which it is called.
        stack: layers of a model, one after another.
        model: steps of a whole model.
        experts: layers of experts.
        errors: results that were wrong, and times that cannot be.
    """

    device: str
    arch: str
    date: str
    versions: dict[str, str]
    ceilings: Ceilings
    linear: list[LinearRow] = dataclasses.field(default_factory=list)
    quantize: list[QuantizeRow] = dataclasses.field(default_factory=list)
    call: dict[str, float] = dataclasses.field(default_factory=dict)
    stack: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: list[Any] = dataclasses.field(default_factory=list)
    experts: list[Any] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)


# ---- Tables -------------------------------------------------------------------------------------

LINEAR_NOTE = """\
invar.: with batch_invariant=True, and what that costs (as W4A16; 1.00x: the same kernel).
speedup: bf16's time over W4A16's and over W4A4's. R: share of the read ceiling that W4A16 reaches.
Without a kernel for 16-bit activations, W4A4 stands in for W4A16."""
LINEAR_HEAD = (
    f"{'N':>6} {'K':>6} {'M':>5} {'MB':>6} | {'W4A16':>8} {'W4A4':>8} {'bf16':>8} | "
    f"{'speedup':>7} {'W4A4':>6} | {'R':>5} {'TF/s':>7} | {'invar.':>8} {'cost':>6}"
)


def ceilings_line(most: Ceilings) -> str:
    """What the device does at most, in units that suit it."""
    dot = most.multiply
    speed = f"{dot / 1e12:.0f} TFLOP/s" if dot >= 1e13 else f"{dot / 1e9:.0f} GFLOP/s"
    return (
        f"ceilings: read {most.read / 1e12:.3g} TB/s, copy {most.copy / 1e12:.3g} TB/s (read and "
        f"written), bf16 dot {speed}"
    )


def us(seconds: float | None) -> str:
    """A time in microseconds, or a dash."""
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def ratio(over: float | None, under: float | None) -> str:
    """How many times one time is the other, or a dash."""
    return f"{over / under:.2f}x" if over and under else "-"


def linear_line(row: LinearRow, read_ceiling: float) -> str:
    """A line of the table of the layer."""
    main = row.main
    reached = f"{row.bytes / main / read_ceiling:.2f}" if main else "-"
    speed = f"{row.flops / main / 1e12:.3g}" if main else "-"
    return (
        f"{row.n:>6} {row.k:>6} {row.m:>5} {row.weight_bytes / 1e6:>6.0f} | "
        f"{us(row.w4a16):>8} {us(row.w4a4):>8} {us(row.bf16):>8} | "
        f"{ratio(row.bf16, main):>7} {ratio(row.bf16, row.w4a4):>6} | "
        f"{reached:>5} {speed:>7} | {us(row.invariant):>8} {ratio(row.invariant, main):>6}"
    )


QUANTIZE_HEAD = (
    f"{'M':>6} {'K':>6} {'MB in':>6} | {'given':>8} {'token':>8} {'tensor':>8} {'copy':>8} | "
    f"{'of copy':>7} | {'token':>6} {'tensor':>6}"
)
QUANTIZE_NOTE = """\
copy: an elementwise operation that reads x and writes as much. of copy: bytes a second with the
scale given over the copy ceiling. The last two: times the one with the scale given."""


def quantize_line(row: QuantizeRow, copy_ceiling: float) -> str:
    """A line of the table of the quantizer."""
    reached = f"{row.bytes / row.static / copy_ceiling:.2f}" if row.static else "-"
    return (
        f"{row.m:>6} {row.k:>6} {row.m * row.k * 2 / 1e6:>6.1f} | "
        f"{us(row.static):>8} {us(row.token):>8} {us(row.tensor):>8} {us(row.copy):>8} | "
        f"{reached:>7} | "
        f"{ratio(row.token, row.static):>6} {ratio(row.tensor, row.static):>6}"
    )


def call_lines(call: dict[str, float]) -> list[str]:
    """The cost of one custom call."""
    return [f"  {name:<44} {seconds * 1e6:8.2f}" for name, seconds in call.items()]


def stack_lines(stack: dict[str, Any]) -> list[str]:
    """The stack of layers, each way beside bf16."""
    seconds = stack["seconds"]
    lines = []
    for name, value in seconds.items():
        size = stack["bytes"]["bf16" if name == "bf16" else "nvfp4"]
        lines.append(
            f"  {name:<6} {value * 1e3:8.3f} ms  {size / value / 1e12:5.3g} TB/s of weights  "
            f"{ratio(seconds.get('bf16'), value):>6}"
        )
    return lines
