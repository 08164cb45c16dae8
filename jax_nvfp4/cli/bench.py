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
import time
from typing import TYPE_CHECKING, Any

from jax_nvfp4.cli import COMMANDS, BadInputError

if TYPE_CHECKING:
    from jax_nvfp4.bench.report import Report
    from jax_nvfp4.bench.timing import Compiler

_DESCRIPTION = """\
Times the linear layer beside XLA's bf16 dot, the quantizer beside a copy, the cost of one custom
call, and a stack of Llama-8B-sized layers at batch 1. Weights come from memory and not from a
cache, everything runs inside jit, captured into CUDA graphs. The ceilings that figures are held
against are measured in the same run; a time that they do not allow, or a wrong result, is an error
and not a figure.
"""

# (N, K) of the linear layers of three models.
SHAPES = {
    "llama-8b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "llama-70b": ((8192, 8192), (57344, 8192), (8192, 28672)),
    "deepseek": ((7168, 16384), (24576, 1536), (4096, 7168)),
}
ROWS = (1, 16, 64, 128, 256, 1024, 4096)
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


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables and writes the files asked for.

    Returns:
        The exit code: 0, or 1 where a result is wrong or a time cannot be.
    """
    import jax

    from jax_nvfp4.bench import timing
    from jax_nvfp4.bench.report import Report
    from jax_nvfp4.ops.device import local_arch

    if len(args.layer_width) != 3:
        raise BadInputError(f"--layer-width takes three numbers, got {len(args.layer_width)}")
    for path in (args.json, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise BadInputError(f"{path}: there is no folder {path.resolve().parent}")

    device = jax.local_devices()[0]
    arch = local_arch()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = _versions()
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{device.device_kind}, arch {arch}, {date}\n{shown}", flush=True)
    most = timing.ceilings(2 * args.rotate_mb * _MIB)
    print(
        f"ceilings: read {most.read / 1e12:.2f} TB/s, copy {most.copy / 1e12:.2f} TB/s (read and "
        f"written), bf16 dot {most.multiply / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    report = Report(device.device_kind, arch, date, versions, most)
    with timing.Compiler() as compiler:
        _measure(report, args, compiler)
    if args.plot:
        from jax_nvfp4.bench import roofline

        roofline.plot(report, args.plot)
    for error in report.errors:
        print(f"bench: {error}", file=sys.stderr)
    return 1 if report.errors else 0


def _measure(report: Report, args: argparse.Namespace, compiler: Compiler) -> None:
    """Fills the report and prints it as it grows; the file is up to date after each part."""
    from jax_nvfp4.bench import measurements
    from jax_nvfp4.bench import report as tables

    shapes = args.shape or (_QUICK_SHAPES if args.quick else sum(SHAPES.values(), ()))
    rows = args.rows or (_QUICK_ROWS if args.quick else ROWS)
    quantize_shapes = args.quantize_shape or (_QUICK_QUANTIZE if args.quick else QUANTIZE_SHAPES)
    layers = args.layers if args.layers is not None else (8 if args.quick else 32)
    rotate, most = args.rotate_mb * _MIB, report.ceilings

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")

    started = time.perf_counter()
    linear = [measurements.Linear(compiler, n, k, rows, rotate, most) for n, k in shapes]
    quantize = [measurements.Quantize(compiler, m, k, rotate, most) for m, k in quantize_shapes]
    call = measurements.Call(compiler)
    stack = None
    if layers:
        stack = measurements.Stack(compiler, layers, args.layer_width, most)
    count = compiler.wait(_progress)
    print(f"{count} programs compiled in {time.perf_counter() - started:.0f} s")

    print(f"\nlinear, us a call\n{tables.LINEAR_NOTE}\n{tables.LINEAR_HEAD}", flush=True)
    while linear:  # and let go of the programs that are done with
        for row, errors in linear.pop(0).measure():
            report.linear.append(row)
            report.errors += errors
            print(tables.linear_line(row, most.read), flush=True)
        save()
    print(f"\nquantize bf16, us a call\n{tables.QUANTIZE_NOTE}\n{tables.QUANTIZE_HEAD}", flush=True)
    while quantize:
        quantized, errors = quantize.pop(0).measure()
        report.quantize.append(quantized)
        report.errors += errors
        print(tables.quantize_line(report.quantize[-1], most.copy), flush=True)
    report.call = call.measure()
    print("\none custom call, us", *tables.call_lines(report.call), sep="\n", flush=True)
    save()
    if stack is not None:
        report.stack, errors = stack.measure()
        report.errors += errors
        print(f"\n{layers} layers, one token", *tables.stack_lines(report.stack), sep="\n")
        save()
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def _progress(ready: int, of: int) -> None:
    """Says on a terminal how far the compiler is."""
    if sys.stderr.isatty():
        end = "\n" if ready == of else ""
        print(f"\r{ready} of {of} programs compiled", end=end, file=sys.stderr, flush=True)


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
