# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 bench`: how fast the kernels are on this machine, beside XLA's bf16."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax_nvfp4.cli import COMMANDS, BadInputError

if TYPE_CHECKING:
    from jax_nvfp4.cli.measurements import LinearRow, QuantizeRow

_DESCRIPTION = """\
Times the linear layer beside XLA's bf16 dot, the quantizer beside a copy, the cost of one custom
call, and a stack of Llama-8B-sized layers at batch 1. Weights come from memory and not from a
cache, everything runs inside jit, captured into CUDA graphs. The ceilings that figures are held
against are measured in the same run.
"""

# (N, K) of the linear layers of three models.
SHAPES = {
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-70b": ((8192, 8192), (57344, 8192), (8192, 28672)),
    "deepseek": ((7168, 16384), (24576, 1536), (4096, 7168)),
}
ROWS = (1, 4, 16, 64, 128, 256, 1024, 4096)
QUANTIZE_SHAPES = ((16, 4096), (1024, 4096), (2048, 5120), (8192, 8192), (16384, 8192))
_QUICK_SHAPES = ((4096, 4096), (28672, 4096), (8192, 28672))
_QUICK_ROWS = (1, 16, 64, 256, 2048)
_QUICK_QUANTIZE = ((1024, 4096), (8192, 8192))

_MIB = 1 << 20


def _pair(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"expected NxK, for example 4096x14336; got {text!r}")
    return int(match[1]), int(match[2])


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"expected numbers with commas; got {text!r}")
    return tuple(int(part) for part in text.split(","))


def add_parser(commands: Any) -> None:
    """Adds the arguments of the command."""
    parser = commands.add_parser(
        "bench",
        help=COMMANDS["bench"],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes only")
    parser.add_argument(
        "--shape",
        type=_pair,
        action="append",
        metavar="NxK",
        help="a weight's shape; may be repeated (default: those of three models)",
    )
    parser.add_argument("--rows", type=_numbers, metavar="M,M,...", help="rows of x")
    parser.add_argument(
        "--quantize-shape",
        type=_pair,
        action="append",
        metavar="MxK",
        help="a shape for the quantizer; may be repeated",
    )
    parser.add_argument("--layers", type=int, help="layers of the stack (0: leave it out)")
    parser.add_argument(
        "--layer-width",
        type=_numbers,
        metavar="D,QKV,FF",
        default=(4096, 6144, 14336),
        help="width of the model, of q, k and v together, and of the feed-forward layer",
    )
    parser.add_argument(
        "--rotate-mb",
        type=int,
        default=512,
        metavar="MB",
        help="size of the weights that take turns (default: 512)",
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE", help="draw the roofline (PNG)")


@dataclasses.dataclass
class Report:
    """Everything that was measured; bandwidths in bytes a second, times in seconds."""

    device: str
    arch: str
    date: str
    versions: dict[str, str]
    read_ceiling: float = 0.0
    copy_ceiling: float = 0.0
    linear: list[LinearRow] = dataclasses.field(default_factory=list)
    quantize: list[QuantizeRow] = dataclasses.field(default_factory=list)
    call: dict[str, float] = dataclasses.field(default_factory=dict)
    stack: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables and writes the files asked for.

    Returns:
        The exit code: 0, or 1 where a result of the kernels is wrong.
    """
    import jax

    from jax_nvfp4.cli import measurements, timing
    from jax_nvfp4.ops.backend import local_arch

    if len(args.layer_width) != 3:
        raise BadInputError(f"--layer-width takes three numbers, got {len(args.layer_width)}")
    for path in (args.json, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise BadInputError(f"{path}: there is no folder {path.resolve().parent}")
    shapes = args.shape or (_QUICK_SHAPES if args.quick else sum(SHAPES.values(), ()))
    rows = args.rows or (_QUICK_ROWS if args.quick else ROWS)
    quantize_shapes = args.quantize_shape or (_QUICK_QUANTIZE if args.quick else QUANTIZE_SHAPES)
    layers = args.layers if args.layers is not None else (8 if args.quick else 32)

    device = jax.local_devices()[0]
    report = Report(
        device=device.device_kind,
        arch=local_arch(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=_versions(),
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    print(f"{report.device}, arch {report.arch}, {report.date}\n{versions}", flush=True)
    rotate = args.rotate_mb * _MIB
    report.read_ceiling = timing.read_ceiling(4 * rotate)
    report.copy_ceiling = timing.copy_ceiling(2 * rotate)
    print(
        f"ceilings: read {report.read_ceiling / 1e12:.2f} TB/s, "
        f"copy {report.copy_ceiling / 1e12:.2f} TB/s (read and written)",
        flush=True,
    )

    try:
        _measure(report, args, shapes, rows, quantize_shapes, layers)
    except measurements.WrongResultError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    if args.plot:
        from jax_nvfp4.cli import roofline

        roofline.plot(report, args.plot)
    return 0


def _measure(
    report: Report,
    args: argparse.Namespace,
    shapes: Sequence[tuple[int, int]],
    rows: Sequence[int],
    quantize_shapes: Sequence[tuple[int, int]],
    layers: int,
) -> None:
    """Fills the report and prints it as it grows; the file is up to date after each part."""
    from jax_nvfp4.cli import measurements

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")

    rotate = args.rotate_mb * _MIB
    print(f"\nlinear, us a call\n{_LINEAR_HEAD}", flush=True)
    for n, k in shapes:
        for linear_row in measurements.measure_linear(n, k, rows, rotate):
            report.linear.append(linear_row)
            print(_linear_line(linear_row, report.read_ceiling), flush=True)
        save()
    print(f"\nquantize bf16, us a call\n{_QUANTIZE_HEAD}", flush=True)
    for m, k in quantize_shapes:
        report.quantize.append(measurements.measure_quantize(m, k, rotate))
        print(_quantize_line(report.quantize[-1], report.copy_ceiling), flush=True)
    report.call = measurements.measure_call()
    print("\none custom call, us")
    for name, seconds in report.call.items():
        print(f"  {name:<44} {seconds * 1e6:8.2f}", flush=True)
    save()
    if layers:
        report.stack = measurements.measure_stack(layers, *args.layer_width)
        _print_stack(report.stack)
        save()


def _versions() -> dict[str, str]:
    import jax
    import jaxlib

    import jax_nvfp4

    platform_version = jax.local_devices()[0].client.platform_version
    return {
        "jax_nvfp4": jax_nvfp4.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "runtime": " ".join(platform_version.split())[:60],
    }


# ---- Tables -------------------------------------------------------------------------------------

_LINEAR_HEAD = (
    f"{'N':>6} {'K':>6} {'M':>5} {'MB':>6} | {'W4A16':>8} {'W4A4':>8} {'invar.':>8} {'bf16':>8} | "
    f"{'speedup':>7} {'W4A4':>6} | {'R':>5} {'TF/s':>6}"
)


def _us(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f}"


def _linear_line(row: LinearRow, ceiling: float) -> str:
    main = row.w4a16 if row.w4a16 is not None else row.w4a4
    assert main is not None
    w4a4 = f"{row.bf16 / row.w4a4:.2f}x" if row.w4a4 else "-"
    return (
        f"{row.n:>6} {row.k:>6} {row.m:>5} {row.weight_bytes / 1e6:>6.0f} | "
        f"{_us(row.w4a16):>8} {_us(row.w4a4):>8} {_us(row.invariant):>8} {_us(row.bf16):>8} | "
        f"{row.bf16 / main:>6.2f}x {w4a4:>6} | "
        f"{row.bytes / main / ceiling:>5.2f} {row.flops / main / 1e12:>6.0f}"
    )


_QUANTIZE_HEAD = (
    f"{'M':>6} {'K':>6} {'MB in':>6} | {'given':>8} {'token':>8} {'tensor':>8} | "
    f"{'of copy':>7} | {'token':>6} {'tensor':>6}  (times the one with the scale given)"
)


def _quantize_line(row: QuantizeRow, ceiling: float) -> str:
    return (
        f"{row.m:>6} {row.k:>6} {row.m * row.k * 2 / 1e6:>6.1f} | "
        f"{_us(row.static):>8} {_us(row.token):>8} {_us(row.tensor):>8} | "
        f"{row.bytes / row.static / ceiling:>7.2f} | "
        f"{row.token / row.static:>5.2f}x {row.tensor / row.static:>5.2f}x"
    )


def _print_stack(stack: dict[str, Any]) -> None:
    seconds = stack["seconds"]
    print(f"\n{stack['layers']} layers, one token")
    for name, value in seconds.items():
        size = stack["bytes"]["bf16" if name == "bf16" else "nvfp4"]
        print(
            f"  {name:<6} {value * 1e3:8.3f} ms  {size / value / 1e12:5.2f} TB/s of weights  "
            f"{seconds['bf16'] / value:5.2f}x"
        )
