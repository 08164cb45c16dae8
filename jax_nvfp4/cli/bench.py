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
    from collections.abc import Callable

    from jax_nvfp4.bench.model import Sizes
    from jax_nvfp4.bench.report import Report
    from jax_nvfp4.bench.timing import Compiler

_DESCRIPTION = """\
Times the linear layer beside XLA's bf16 dot, the quantizer beside a copy, the cost of one custom
call, and a stack of Llama-8B-sized layers at batch 1. Weights come from memory and not from a
cache, everything runs inside jit, captured into CUDA graphs. The ceilings that figures are held
against are measured in the same run; a time that they do not allow, or a wrong result, is an error
and not a figure.

With --model, times the steps of a whole decoder with random weights instead: text generated in one
loop on the device, and a prompt read, in bf16 and in NVFP4, with q k v, and gate and up, apart and
joined to one product each; and says what memory that takes.

With --experts, times the products of mixtures of experts beside the dense kernel and XLA's.

On a CPU the sizes are such that a run takes a minute.
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

_CPU_SHAPES = ((2048, 1024), (4096, 2048))
_CPU_ROWS = (1, 64)
_CPU_QUANTIZE = ((256, 1024), (1024, 1024))

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What is measured where the options do not say."""

    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    quantize_shapes: tuple[tuple[int, int], ...]
    layers: int
    layer_width: tuple[int, ...] = (4096, 6144, 14336)
    rotate_mb: int = 512
    model: str = "llama-8b"
    experts: tuple[str, ...] = ("qwen3-30b", "gpt-oss-120b")
    tokens: tuple[int, ...] = (1, 8, 64, 4096)
    prompt: int = 2048
    cache: int = 1024
    steps: int = 64

    def overridden(self, args: argparse.Namespace) -> Defaults:
        """The same with what the options say."""
        said = {
            "shapes": tuple(args.shape or ()),
            "rows": args.rows,
            "quantize_shapes": tuple(args.quantize_shape or ()),
            "layers": args.layers,
            "layer_width": args.layer_width,
            "rotate_mb": args.rotate_mb,
            "model": args.model or None,
            "experts": tuple(args.experts or ()),
            "tokens": args.tokens,
            "prompt": args.prompt,
            "cache": args.cache,
            "steps": args.steps,
        }
        said = {name: value for name, value in said.items() if value not in (None, ())}
        return dataclasses.replace(self, **said)


def defaults(on_gpu: bool, quick: bool) -> Defaults:
    """The defaults: those of three models on a GPU, and on a CPU what it does in a minute."""
    if not on_gpu:
        return Defaults(
            _CPU_SHAPES,
            _CPU_ROWS,
            _CPU_QUANTIZE,
            layers=2,
            layer_width=(512, 768, 1536),
            rotate_mb=4,
            model="tiny",
            experts=("tiny",),
            tokens=(1, 16),
            prompt=64,
            cache=64,
            steps=4,
        )
    if quick:
        return Defaults(_QUICK_SHAPES, _QUICK_ROWS, _QUICK_QUANTIZE, layers=8)
    return Defaults(sum(SHAPES.values(), ()), ROWS, QUANTIZE_SHAPES, layers=32)


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
        help="width of the model, of q, k and v together, and of the feed-forward layer",
    )
    parser.add_argument(
        "--rotate-mb",
        type=int,
        metavar="MB",
        help="size of the weights that take turns (default: 512; 4 on a CPU)",
    )
    parser.add_argument(
        "--model",
        nargs="?",
        const="",
        metavar="SIZES",
        help="time a whole decoder: llama-8b, tiny, or LAYERS,WIDTH,HEADS,KV_HEADS,HIDDEN,VOCAB "
        "(default: llama-8b; tiny on a CPU)",
    )
    parser.add_argument(
        "--batches",
        type=_numbers,
        metavar="B,B,...",
        default=(1, 8, 32),
        help="sequences that the model generates at once (default: 1,8,32)",
    )
    parser.add_argument(
        "--experts",
        nargs="*",
        metavar="MODEL",
        help="time layers of experts: qwen3-30b, qwen3-235b, gpt-oss-120b, nemotron-3, tiny "
        "(default: the first and the third; tiny on a CPU)",
    )
    parser.add_argument(
        "--equal", action="store_true", help="experts get as many rows each; else by chance"
    )
    parser.add_argument(
        "--tokens", type=_numbers, metavar="T,T,...", help="tokens of a layer of experts"
    )
    parser.add_argument("--prompt", type=int, help="tokens that the model reads")
    parser.add_argument("--cache", type=int, help="positions of the model's cache, half full")
    parser.add_argument("--steps", type=int, help="tokens that a call of the model generates")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write all figures")
    parser.add_argument(
        "--plot",
        type=pathlib.Path,
        metavar="FILE",
        help="draw the roofline and the speed-up by rows (PNG, SVG or PDF)",
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables and writes the files asked for.

    Returns:
        The exit code: 0, or 1 where a result is wrong or a time cannot be.
    """
    import jax

    from jax_nvfp4.bench import timing
    from jax_nvfp4.bench.report import Report, ceilings_line
    from jax_nvfp4.ops.device import local_arch

    chosen = defaults(timing.on_gpu(), args.quick).overridden(args)
    if len(chosen.layer_width) != 3:
        raise BadInputError(f"--layer-width takes three numbers, got {len(chosen.layer_width)}")
    sizes = None if args.model is None else _model_sizes(chosen.model)
    if chosen.prompt < 2 or chosen.steps < 2 or 2 * chosen.steps > chosen.cache:
        raise BadInputError(
            "--prompt and --steps must be at least 2, and --steps at most half of --cache; got "
            f"{chosen.prompt}, {chosen.steps} and {chosen.cache}"
        )
    if args.experts is not None:
        from jax_nvfp4.bench.experts import PRESETS

        if unknown := [name for name in chosen.experts if name not in PRESETS]:
            raise BadInputError(f"--experts takes {', '.join(PRESETS)}; got {unknown[0]!r}")
        if min(chosen.tokens) < 1:
            raise BadInputError(f"--tokens must be at least 1; got {min(chosen.tokens)}")
    for path in (args.json, args.plot):
        if path is not None and not path.resolve().parent.is_dir():
            raise BadInputError(f"{path}: there is no folder {path.resolve().parent}")

    device = jax.local_devices()[0]
    arch = local_arch()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    versions = _versions()
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(f"{device.device_kind}, arch {arch}, {date}\n{shown}", flush=True)
    most = timing.ceilings(2 * chosen.rotate_mb * _MIB)
    print(ceilings_line(most), flush=True)
    report = Report(device.device_kind, arch, date, versions, most)

    def save() -> None:
        if args.json:
            args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")

    if sizes is not None:
        _measure_model(report, chosen, sizes, args.batches, save)
    elif args.experts is not None:
        _measure_experts(report, chosen, args.equal, save)
    else:
        with timing.Compiler() as compiler:
            _measure(report, chosen, compiler, save)
    if args.plot and report.linear:
        from jax_nvfp4.bench import plot

        plot.plot(report, args.plot)
    for error in report.errors:
        print(f"bench: {error}", file=sys.stderr)
    return 1 if report.errors else 0


def _model_sizes(text: str) -> Sizes:
    """The sizes of a model by the name of a preset or as six numbers."""
    from jax_nvfp4.bench.model import PRESETS, Sizes

    if text in PRESETS:
        return PRESETS[text]
    if not re.fullmatch(r"\d+(,\d+){5}", text):
        raise BadInputError(
            f"--model takes {', '.join(PRESETS)} or "
            f"LAYERS,WIDTH,HEADS,KV_HEADS,HIDDEN,VOCAB; got {text!r}"
        )
    sizes = Sizes(*map(int, text.split(",")))
    if sizes.problem:
        raise BadInputError(f"--model: {sizes.problem}")
    return sizes


def _measure_model(
    report: Report,
    chosen: Defaults,
    sizes: Sizes,
    batches: tuple[int, ...],
    save: Callable[[], None],
) -> None:
    """Fills the report with the steps of a model and prints them as they come."""
    from jax_nvfp4.bench import model

    started = time.perf_counter()
    print(f"\n{sizes}, random weights, cache of {chosen.cache}\n{model.NOTE}\n{model.HEAD}")

    def say(text: str) -> None:
        print(f"{text} ({time.perf_counter() - started:.0f} s)", file=sys.stderr, flush=True)

    uses = model.Uses(batches, chosen.cache, chosen.steps, chosen.prompt)
    for row in model.measure(sizes, uses, say):
        report.model.append(row)
        print(model.line(row, report.model), flush=True)
        save()
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def _measure_experts(
    report: Report, chosen: Defaults, equal: bool, save: Callable[[], None]
) -> None:
    """Fills the report with layers of experts and prints them as they come."""
    from jax_nvfp4.bench import experts

    started = time.perf_counter()
    print(f"\n{experts.NOTE}\n{experts.HEAD}", flush=True)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    layers = [(name, experts.PRESETS[name]) for name in chosen.experts]
    rotate, most = chosen.rotate_mb * _MIB, report.ceilings
    for row, errors in experts.measure(layers, chosen.tokens, equal, rotate, most, say):
        report.experts.append(row)
        report.errors += errors
        print(experts.line(row), flush=True)
        save()
    print(f"\n{time.perf_counter() - started:.0f} s in all")


def _measure(
    report: Report, chosen: Defaults, compiler: Compiler, save: Callable[[], None]
) -> None:
    """Fills the report and prints it as it grows; the file is up to date after each part."""
    from jax_nvfp4.bench import measurements
    from jax_nvfp4.bench import report as tables

    shapes, rows, quantize_shapes = chosen.shapes, chosen.rows, chosen.quantize_shapes
    layers, rotate, most = chosen.layers, chosen.rotate_mb * _MIB, report.ceilings
    started = time.perf_counter()
    linear = [measurements.Linear(compiler, n, k, rows, rotate, most) for n, k in shapes]
    quantize = [measurements.Quantize(compiler, m, k, rotate, most) for m, k in quantize_shapes]
    call = measurements.Call(compiler)
    stack = None
    if layers:
        width, qkv, hidden = chosen.layer_width
        stack = measurements.Stack(compiler, layers, (width, qkv, hidden), most)
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
    """Says how far the compiler is: in one line of a terminal, or in ten lines elsewhere."""
    if sys.stderr.isatty():
        end = "\n" if ready == of else ""
        print(f"\r{ready} of {of} programs compiled", end=end, file=sys.stderr, flush=True)
    elif ready * 10 // of > (ready - 1) * 10 // of:
        print(f"{ready} of {of} programs compiled", file=sys.stderr, flush=True)


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
