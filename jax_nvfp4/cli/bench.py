# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 bench`: how fast the kernels are on this machine, beside XLA's bf16."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from jax_nvfp4.cli import COMMANDS, BadInputError

if TYPE_CHECKING:
    import jax

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

_BYTES_PER_WEIGHT = 0.5625  # four bits, and one eight-bit scale for sixteen weights
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


# ---- What is measured ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LinearRow:
    """One shape and number of rows. Times are seconds a call; None: not measured.

    Attributes:
        n: rows of the weight.
        k: its columns.
        m: rows of x.
        w4a16: with 16-bit activations.
        w4a4: with activations quantized per token.
        invariant: as `w4a16`, or `w4a4` where there is none, with `batch_invariant=True`.
        bf16: XLA's dot of bf16 operands.
    """

    n: int
    k: int
    m: int
    w4a16: float | None
    w4a4: float | None
    invariant: float | None
    bf16: float

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: the weight once, x and y."""
        return self.n * self.k * _BYTES_PER_WEIGHT + 2 * self.m * (self.n + self.k)

    @property
    def flops(self) -> float:
        """Multiplications and additions of a call."""
        return 2.0 * self.m * self.n * self.k

    @property
    def best(self) -> float:
        """The faster of the two ways to treat activations."""
        return min(t for t in (self.w4a16, self.w4a4) if t is not None)


@dataclasses.dataclass(frozen=True)
class QuantizeRow:
    """One shape of the quantizer's input, bf16. Times are seconds a call."""

    m: int
    k: int
    static: float
    token: float
    tensor: float

    @property
    def bytes(self) -> float:
        """Bytes that a call must move: x, the codes and the scales."""
        return self.m * self.k * (2 + _BYTES_PER_WEIGHT)


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

    from jax_nvfp4.cli import timing
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

    print(f"\nlinear, us a call\n{_LINEAR_HEAD}", flush=True)
    for n, k in shapes:
        for linear_row in _measure_linear(n, k, rows, rotate, report.arch):
            report.linear.append(linear_row)
            print(_linear_line(linear_row, report.read_ceiling), flush=True)
    print(f"\nquantize bf16, us a call\n{_QUANTIZE_HEAD}", flush=True)
    for m, k in quantize_shapes:
        report.quantize.append(_measure_quantize(m, k, rotate))
        print(_quantize_line(report.quantize[-1], report.copy_ceiling), flush=True)
    report.call = _measure_call()
    print("\none custom call, us")
    for name, seconds in report.call.items():
        print(f"  {name:<44} {seconds * 1e6:8.2f}")
    if layers:
        report.stack = _measure_stack(layers, *args.layer_width)
        _print_stack(report.stack)

    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")
    if args.plot:
        from jax_nvfp4.cli import roofline

        roofline.plot(report, args.plot)
    return 0


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


# ---- Linear -------------------------------------------------------------------------------------


def _weight_only_kernels(arch: str) -> bool:
    """Whether 16-bit activations have kernels; the pure-JAX path serves them in any case."""
    from jax_nvfp4.config import REFERENCE, configs

    return arch == REFERENCE or any(c.x_dtype != "e2m1" for c in configs(arch))


def _same_kernel(m: int, n: int, k: int, arch: str) -> bool:
    """Whether `batch_invariant=True` would run the very same kernel, split alike."""
    from jax_nvfp4.config import REFERENCE, GemmProblem, select
    from jax_nvfp4.ops.backend import num_sms

    if arch == REFERENCE:
        return False
    x_dtype = "bfloat16" if _weight_only_kernels(arch) else "e2m1"
    problem = GemmProblem(m, n, -(-k // 64) * 64, arch, x_dtype)
    invariant = dataclasses.replace(problem, batch_invariant=True)
    return select(problem, num_sms(arch)) == select(invariant, num_sms(arch))


def _weights(n: int, k: int, count: int) -> tuple[list[jax.Array], list[Any]]:
    """Random weights in bf16, and the same ones quantized and repacked."""
    import jax
    import jax.numpy as jnp

    import jax_nvfp4

    @jax.jit
    def make(key: jax.Array) -> tuple[jax.Array, Any]:
        w = jax.random.normal(key, (n, k), jnp.bfloat16)
        return w, jax_nvfp4.repack(jax_nvfp4.quantize(w))

    pairs = [make(key) for key in jax.random.split(jax.random.key(n + k), count)]
    return [w for w, _ in pairs], [packed for _, packed in pairs]


def _measure_linear(
    n: int, k: int, rows: Sequence[int], rotate: int, arch: str
) -> Iterator[LinearRow]:
    """Times one weight shape for each number of rows."""
    import jax
    import jax.numpy as jnp

    import jax_nvfp4
    from jax_nvfp4.cli import timing

    count = min(64, max(3, math.ceil(rotate / (n * k * _BYTES_PER_WEIGHT))))
    plain, packed = _weights(n, k, count)
    first = packed[0].dequantize(jnp.bfloat16)
    for m in rows:
        # Short programs would be bound by their launch: several inputs for each weight.
        passes = max(1, min(4, 64 // count, 2048 // m))
        keys = jax.random.split(jax.random.key(m), passes)
        xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]

        def seconds(
            function: Callable[[Any, Any], Any], ws: list[Any], xs: list[Any] = xs
        ) -> float:
            call = functools.partial(timing.each_with_each, function)
            program = timing.compile_program(call, xs, ws)
            return timing.measure(program, (xs, ws), len(xs) * len(ws)).median

        def linear(activation: Any, **options: Any) -> Callable[[Any, Any], Any]:
            return lambda x, w: jax_nvfp4.linear(x, w, activation_scale=activation, **options)

        weight_only = _weight_only_kernels(arch)
        main = linear(None if weight_only else "token")
        _check_result(jax.jit(main)(xs[0], packed[0]), xs[0], first, weight_only)
        w4a16 = seconds(linear(None), packed) if weight_only else None
        w4a4 = seconds(linear("token"), packed)
        default = w4a16 if w4a16 is not None else w4a4
        invariant = default
        if not _same_kernel(m, n, k, arch):
            activation = None if weight_only else "token"
            invariant = seconds(linear(activation, batch_invariant=True), packed)
        bf16 = seconds(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), plain)
        yield LinearRow(n, k, m, w4a16, w4a4, invariant, bf16)


def _check_result(y: jax.Array, x: jax.Array, w: jax.Array, weight_only: bool) -> None:
    """A fast wrong answer is no figure: holds y against XLA's product of the same numbers."""
    import jax.numpy as jnp

    expected = jnp.matmul(x, w.T, preferred_element_type=jnp.float32)
    error = jnp.linalg.norm(y.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)
    # Rounding of w to bf16 and of y; quantized activations differ by some 10%.
    limit = 0.01 if weight_only else 0.2
    if not float(error) < limit:
        raise RuntimeError(
            f"linear is wrong for x {x.shape} and weight {w.shape}: relative error {error}"
        )


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
        f"{row.n:>6} {row.k:>6} {row.m:>5} {row.n * row.k * _BYTES_PER_WEIGHT / 1e6:>6.0f} | "
        f"{_us(row.w4a16):>8} {_us(row.w4a4):>8} {_us(row.invariant):>8} {_us(row.bf16):>8} | "
        f"{row.bf16 / main:>6.2f}x {w4a4:>6} | "
        f"{row.bytes / main / ceiling:>5.2f} {row.flops / main / 1e12:>6.0f}"
    )


# ---- Quantizer ----------------------------------------------------------------------------------


def _measure_quantize(m: int, k: int, rotate: int) -> QuantizeRow:
    """Times the quantizer for one shape, with each source of the global scale."""
    import jax
    import jax.numpy as jnp

    import jax_nvfp4
    from jax_nvfp4.cli import timing

    count = min(48, max(2, math.ceil(rotate / (m * k * 2))))
    keys = jax.random.split(jax.random.key(0), count)
    xs = [jax.random.normal(key, (m, k), jnp.bfloat16) for key in keys]
    scale = jnp.float32(0.002)

    def seconds(function: Callable[[Any, Any], Any]) -> float:
        call = functools.partial(timing.each_with_each, function)
        program = timing.compile_program(call, [scale], xs)
        return timing.measure(program, ([scale], xs), len(xs)).median

    return QuantizeRow(
        m,
        k,
        static=seconds(lambda g, x: jax_nvfp4.quantize(x, global_scale=g)),
        token=seconds(lambda _, x: jax_nvfp4.quantize(x, scaling="token")),
        tensor=seconds(lambda _, x: jax_nvfp4.quantize(x)),
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


# ---- One call -----------------------------------------------------------------------------------


def _measure_call(length: int = 100) -> dict[str, float]:
    """Seconds of a call that has next to nothing to do, in a chain and by itself."""
    import jax
    import jax.numpy as jnp

    import jax_nvfp4
    from jax_nvfp4.cli import timing

    size = 128
    w = jax_nvfp4.repack(jax_nvfp4.quantize(jax.random.normal(jax.random.key(0), (size, size))))
    x = jnp.ones((1, size), jnp.bfloat16)

    def chain(x: jax.Array, w: Any) -> jax.Array:
        for _ in range(length):
            # Each result is the next one's input.
            x = jax_nvfp4.linear(x, w, activation_scale=_smallest_activation())
        return x

    def once(x: jax.Array, w: Any) -> jax.Array:
        return jax_nvfp4.linear(x, w, activation_scale=_smallest_activation())

    def plain(x: jax.Array, w: Any) -> jax.Array:
        return x + w.global_scale.astype(x.dtype)

    figures = {}
    ways = {"in a chain of 100": True, "in a chain of 100, without a CUDA graph": False}
    for name, graph in ways.items():
        program = timing.compile_program(chain, x, w, graph=graph)
        figures[name] = timing.measure(program, (x, w), length).median
    for name, function in (
        ("a jit of one call, waited for", once),
        ("a jit of one addition, waited for", plain),
    ):
        program = timing.compile_program(function, x, w)
        figures[name] = _waited_for(program, (x, w))
    return figures


def _smallest_activation() -> Any:
    """How to treat activations such that `linear` is one custom call, where it can be."""
    from jax_nvfp4.ops.backend import local_arch

    return None if _weight_only_kernels(local_arch()) else "token"


def _waited_for(program: Callable[..., Any], args: Sequence[Any], runs: int = 200) -> float:
    """Seconds from a call to its result, the host waiting each time."""
    import statistics
    import time

    import jax

    jax.block_until_ready(program(*args))
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        jax.block_until_ready(program(*args))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# ---- A stack of layers --------------------------------------------------------------------------


def _measure_stack(layers: int, width: int, qkv: int, feed_forward: int) -> dict[str, Any]:
    """Seconds of one token through a stack of decoder layers without attention's own products.

    Each layer: RMS norm, q k v, output projection, residual; RMS norm, gate and up, SiLU, down,
    residual. Attention over one token is its value, so `width` of the q k v columns are passed on.
    """
    import jax
    import jax.numpy as jnp

    import jax_nvfp4
    from jax_nvfp4.cli import timing
    from jax_nvfp4.ops.backend import local_arch

    shapes = ((qkv, width), (width, width), (2 * feed_forward, width), (width, feed_forward))

    @jax.jit
    def make(key: jax.Array) -> tuple[list[jax.Array], list[Any]]:
        keys = jax.random.split(key, len(shapes))
        plain = [
            jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(shape[1] ** -0.5)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        return plain, [jax_nvfp4.repack(jax_nvfp4.quantize(w)) for w in plain]

    made = [make(key) for key in jax.random.split(jax.random.key(7), layers)]
    plain, packed = [p for p, _ in made], [p for _, p in made]

    def norm(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
        return (wide * scale).astype(x.dtype)

    def forward(linear: Callable[[Any, Any], jax.Array], x: jax.Array, stack: Any) -> jax.Array:
        for w_qkv, w_out, w_up, w_down in stack:
            x = x + linear(linear(norm(x), w_qkv)[:, -width:], w_out)
            gate, up = jnp.split(linear(norm(x), w_up), 2, axis=-1)
            x = x + linear(jax.nn.silu(gate) * up, w_down)
        return x

    def nvfp4(activation: Any) -> Callable[[Any, Any], jax.Array]:
        return lambda x, w: jax_nvfp4.linear(x, w, activation_scale=activation)

    x = jax.random.normal(jax.random.key(1), (1, width), jnp.bfloat16)
    ways: dict[str, tuple[Callable[[Any, Any], jax.Array], Any]] = {
        "bf16": (lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ()))), plain),
        "W4A4": (nvfp4("token"), packed),
    }
    if _weight_only_kernels(local_arch()):
        ways["W4A16"] = (nvfp4(None), packed)
    weights = sum(n * k for n, k in shapes) * layers
    figures: dict[str, Any] = {
        "layers": layers,
        "bytes": {"bf16": 2.0 * weights, "nvfp4": _BYTES_PER_WEIGHT * weights},
        "seconds": {},
    }
    for name, (function, stack) in ways.items():
        program = timing.compile_program(functools.partial(forward, function), x, stack)
        figures["seconds"][name] = timing.measure(program, (x, stack), 1).median
    return figures


def _print_stack(stack: dict[str, Any]) -> None:
    seconds = stack["seconds"]
    print(f"\n{stack['layers']} layers, one token")
    for name, value in seconds.items():
        size = stack["bytes"]["bf16" if name == "bf16" else "nvfp4"]
        print(
            f"  {name:<6} {value * 1e3:8.3f} ms  {size / value / 1e12:5.2f} TB/s of weights  "
            f"{seconds['bf16'] / value:5.2f}x"
        )
