# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 quantize SRC DST`."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from jax_nvfp4.cli import COMMANDS, BadInputError

if TYPE_CHECKING:
    from rich.console import Console

    from jax_nvfp4.checkpoint.convert import Plan, TensorReport

_DESCRIPTION = """\
Quantizes the linear layers of a Hugging Face style checkpoint (safetensors in bf16, f16 or f32) to
NVFP4, weight-only, and writes it as NVIDIA ModelOpt does.

Every X.weight of two axes with K a multiple of 16 is quantized, and experts that a model keeps in
one parameter, expert by expert; but for embeddings, norms, the
output heads and routers; the summary says what was left alone and why. A killed run leaves nothing
that loads; the same command finishes it.
"""


def add_parser(commands: Any) -> None:
    """Adds the arguments of the command."""
    parser = commands.add_parser(
        "quantize",
        help=COMMANDS["quantize"],
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="a folder with safetensors files")
    parser.add_argument("destination", metavar="DST", help="a new folder, or an unfinished one")
    parser.add_argument(
        "--skip",
        metavar="GLOB",
        action="append",
        default=[],
        help="leave tensors or modules of this name alone (a glob, or re:REGEX); may be repeated",
    )
    parser.add_argument(
        "--only",
        metavar="GLOB",
        action="append",
        default=[],
        help="quantize only tensors or modules of this name; may be repeated",
    )
    parser.add_argument(
        "--search",
        choices=("none", "4over6", "sweep"),
        default="none",
        help="choose each block scale by the error it leaves: among two, or nine",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="statistics of the inputs (an .npz of jax_nvfp4.calibrate) that guide the search",
    )
    parser.add_argument(
        "--no-default-skip",
        action="store_true",
        help="do not leave embeddings, norms, the output head and routers alone",
    )


def run(args: argparse.Namespace) -> int:
    """Quantizes a checkpoint and prints a summary.

    Returns:
        The exit code, 0.

    Raises:
        BadInputError: the source cannot be used, or the destination not written.
    """
    from jax_nvfp4.checkpoint import CheckpointError, convert

    try:
        plan = convert.plan(
            args.source,
            args.destination,
            skip=args.skip,
            only=args.only,
            default_skip=not args.no_default_skip,
            search=None if args.search == "none" else args.search,
            calibration=args.calibration,
        )
        if args.calibration:
            quantized = sum(reason is None for reason in plan.reasons.values())
            print(f"calibration: of {len(plan.importance)} of {quantized} weights", file=sys.stderr)
        for pattern in plan.unmatched:
            print(f"note: {pattern!r} matches no tensor", file=sys.stderr)
        reports = _run_with_progress(plan)
    except (CheckpointError, OSError) as error:
        raise BadInputError(" ".join(str(error).split())) from error
    _print_summary(plan, reports)
    return 0


def _run_with_progress(plan: Plan) -> list[TensorReport]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from jax_nvfp4.checkpoint import convert
    from jax_nvfp4.checkpoint.files import Entry

    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=plan.total_bytes)

        def show(entry: Entry) -> None:
            progress.update(task, advance=entry.nbytes, description=entry.name)

        return convert.run(plan, show)


def _print_summary(plan: Plan, reports: list[TensorReport]) -> None:
    """Prints a row for each quantized layer, the tensors left alone by reason, and the totals."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe: do not cut names
    quantized = [report for report in reports if report.error is not None]
    # Names are not markup, which they would be where they have brackets.
    table = Table("layer", "N x K", title=Text(str(plan.destination)), title_justify="left")
    for column in ("before", "after", "relative error"):
        table.add_column(column, justify="right")
    for report in quantized:
        table.add_row(
            Text(report.name.removesuffix(".weight")),
            " x ".join(map(str, report.shape)),
            _size(report.bytes_before),
            _size(report.bytes_after),
            f"{report.error:.4f}",
        )
    table.add_section()
    table.add_row(f"{len(quantized)} layers quantized", "", *_totals(quantized), _mean(quantized))
    reasons: dict[str, list[TensorReport]] = {}
    for report in reports:
        if report.reason is not None:
            reasons.setdefault(report.reason, []).append(report)
    for reason, left in reasons.items():
        table.add_row(Text(f"{len(left)} left alone: {reason}"), "", *_totals(left), "")
    table.add_section()
    table.add_row(f"{len(reports)} tensors", "", *_totals(reports), "")
    console.print(table)
    for report in reports:
        # Matrices that are too odd to quantize may matter: name them.
        if report.reason is not None and report.reason.startswith("K ="):
            console.print(Text(f"{report.name}: {report.reason}, left alone"))
    _print_other_files(plan, console)


def _print_other_files(plan: Plan, console: Console) -> None:
    """Names the files with weights that were copied as they are, or not at all."""
    from rich.text import Text

    from jax_nvfp4.checkpoint import convert

    others = convert.other_files(plan.source)
    for path in others.copied:
        if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
            name = path.relative_to(plan.source.path)
            console.print(Text(f"{name}: weights of another module, copied as they are"))
    for path in others.left_out:
        name = path.relative_to(plan.source.path)
        console.print(Text(f"{name}: taken for the same weights once more, not copied"))


def _totals(reports: list[TensorReport]) -> tuple[str, str]:
    return (
        _size(sum(report.bytes_before for report in reports)),
        _size(sum(report.bytes_after for report in reports)),
    )


def _mean(reports: list[TensorReport]) -> str:
    """The root of the mean squared relative error, weighted by the number of weights."""
    if not reports:
        return ""
    sizes = [math.prod(report.shape) for report in reports]
    squares = sum(n * (r.error or 0.0) ** 2 for n, r in zip(sizes, reports, strict=True))
    return f"{math.sqrt(squares / sum(sizes)):.4f}"


def _size(count: int) -> str:
    """A number of bytes in decimal units, as disks count."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
