# SPDX-License-Identifier: Apache-2.0
"""Draws the pictures of the documentation as SVG, from the code and from the bench's figures.

`python docs/pictures.py` writes them all to `docs/pictures/`, where GitHub shows them; the site
draws them anew each time it is built.
"""

import html
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jax_nvfp4.bench.report import LinearRow  # noqa: E402 - the tree's own package
from jax_nvfp4.config import GemmConfig, GemmProblem, select  # noqa: E402
from jax_nvfp4.layout import sm90, swizzle  # noqa: E402

LLAMA_8B = {
    "q, k, v": (6144, 4096),
    "out": (4096, 4096),
    "gate, up": (28672, 4096),
    "down": (4096, 14336),
}
ROWS = (1, 16, 32, 64, 128, 256, 512, 2048)
GPUS = {
    "sm_90a": ("H100, 16-bit activations", "bfloat16", 132),
    "sm_100f": ("B200, NVFP4 activations", "e2m1", 148),
    "sm_120f": ("RTX PRO 6000, NVFP4 activations", "e2m1", 188),
}
COLORS = ("#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2")
# Wide enough for sixteen cells, and so narrow that a telephone shows its words at 9 pixels.
WIDTH = 480
# A picture brings its own ground, and follows the page from light to dark.
STYLE = """<style>
.ground { fill: #fff; stroke: #ddd } text { fill: #222; font: 13px sans-serif }
.small { font-size: 11px } .grid { stroke: #e4e4e4 }
.axis { stroke: #888; stroke-width: 1.5; fill: none }
.box { fill: #f4f5f9; stroke: #888 }
@media (prefers-color-scheme: dark) {
  .ground { fill: #1e2129; stroke: #3a3f4d } text { fill: #e3e5ea } .grid { stroke: #343947 }
  .box { fill: #2a2e3a }
}
</style>"""


def svg(height: float, parts: Iterable[str]) -> str:
    """A picture of its parts."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}">\n{STYLE}\n'
        f'<rect class="ground" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" '
        f'rx="6"/>\n{body}\n</svg>\n'
    )


def rect(x: float, y: float, w: float, h: float, color: int, opacity: float = 0.35) -> str:
    """A colored rectangle."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{COLORS[color]}" '
        f'fill-opacity="{opacity:g}"/>'
    )


def text(x: float, y: float, words: Any, anchor: str = "middle", small: bool = False) -> str:
    """Words at a point."""
    kind = ' class="small"' if small else ""
    words = html.escape(str(words))
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{kind}>{words}</text>'


def line(points: Sequence[tuple[float, float]], kind: str, color: int | None = None) -> str:
    """A line through points."""
    at = " ".join(f"{x:g},{y:g}" for x, y in points)
    paint = "" if color is None else f' stroke="{COLORS[color]}" stroke-width="2.5" fill="none"'
    return f'<polyline class="{kind}" points="{at}"{paint}/>'


# ---- The format and the orders ------------------------------------------------------------------


def format_picture() -> str:
    """A block of sixteen elements, their scale, and the bits of each."""
    parts = [text(16, 24, "A block: 16 elements along K share one scale.", "start")]
    for i in range(16):
        parts += [rect(16 + 23 * i, 34, 22, 24, 0), text(27 + 23 * i, 50, f"e{i}", small=True)]
    parts += [rect(400, 34, 64, 24, 1), text(432, 50, "scale", small=True)]
    fields = (
        ("Element, e2m1: 4 bits", 0, (("sign", 1), ("exponent", 2), ("mantissa", 1)), 52),
        ("Block scale, e4m3: 8 bits", 1, (("sign: 0", 1), ("exponent", 4), ("mantissa", 3)), 46),
        (
            "Global scale, float32: one for the tensor, or for each row",
            3,
            (("sign", 1), ("exponent", 8), ("mantissa", 23)),
            14,
        ),
    )
    y = 86
    for title, color, bits, unit in fields:
        parts.append(text(16, y, title, "start"))
        x = 16.0
        for name, count in bits:
            parts += [rect(x + i * unit, y + 8, unit - 1, 18, color) for i in range(count)]
            start = count * unit < 30
            middle = x if start else x + unit * count / 2
            parts.append(text(middle, y + 40, name, "start" if start else "middle", True))
            x += unit * count
        y += 66
    codes = np.arange(8, dtype=np.uint8)
    values = codes.view(ml_dtypes.float4_e2m1fn).astype(float)
    parts.append(text(16, y, "The magnitudes of an element, and their bits", "start"))
    for code, value in zip(codes, values, strict=True):
        x = 16 + 56 * int(code)
        parts += [rect(x, y + 8, 55, 40, 0), text(x + 27, y + 25, f"{value:g}")]
        parts.append(text(x + 27, y + 41, f"{code:03b}", small=True))
    parts.append(text(16, y + 70, "4 + 8/16 = 4.5 bits an element: 0.5625 byte", "start"))
    return svg(y + 84, parts)


def swizzle_picture() -> str:
    """Where the scales of a tile of 128 rows by 4 columns lie in its 512 bytes."""
    number = np.arange(128 * 4, dtype=np.int32).reshape(128, 4)
    # One-byte values cannot count to 512: low and high parts go through the map apart.
    low = swizzle.swizzle((number % 256).astype(np.uint8)).reshape(-1).astype(int)
    high = swizzle.swizzle((number // 256).astype(np.uint8)).reshape(-1).astype(int)
    order = (low + 256 * high).reshape(32, 4, 4)
    parts = [text(16, 24, "The first 8 lines of 16 bytes of a tile's 512", "start")]
    for at, part in np.ndindex(8, 4):
        rows, columns = order[at, part] // 4, order[at, part] % 4
        x, y = 16 + 112 * part, 34 + 25 * at
        parts.append(rect(x, y, 111, 24, int(rows[0]) // 32))
        parts.append(text(x + 8, y + 16, f"row {rows[0]}", "start", True))
        for i in range(4):
            assert rows[i] == rows[0]
            parts.append(text(x + 62 + 13 * i, y + 16, columns[i], small=True))
    parts.append(text(16, 254, "row, and columns 0 to 3 of it; color: row / 32", "start"))
    return svg(268, parts)


def registers_picture() -> str:
    """Which lanes of which warp hold a row of a tile, found by packing each row by itself."""
    parts = [text(16, 24, "The rows of a tile: warp (color), lanes, block (dark: second)", "start")]
    scales = np.zeros((sm90.TILE_N, sm90.TILE_K // 16), np.uint8)
    for row in range(sm90.TILE_N):
        data = np.zeros((sm90.TILE_N, sm90.TILE_K // 2), np.uint8)
        data[row] = 0x77
        # In a tile: [block][half of K][thread][16 bytes].
        packed = sm90.pack(data, scales)[0].reshape(2, 2, 128, 16)
        (block,) = np.flatnonzero(packed.any(axis=(1, 2, 3)))
        threads = np.flatnonzero(packed.any(axis=(0, 1, 3)))
        warp, lanes = threads[0] // 32, threads % 32
        assert len(threads) == 4 and np.all(np.diff(threads) == 1)
        x, y = 16 + 28 * (row % 16), 34 + 33 * (row // 16)
        parts.append(rect(x, y, 27, 32, int(warp), 0.6 if block else 0.25))
        parts.append(text(x + 13.5, y + 14, row, small=True))
        parts.append(text(x + 13.5, y + 27, lanes[0], small=True))
    parts.append(
        text(
            16,
            316,
            "above: row of the weight; below: the first of the four lanes that hold it",
            "start",
        )
    )
    return svg(330, parts)


# ---- The tables ---------------------------------------------------------------------------------


def short_name(config: GemmConfig) -> str:
    """A kernel's name without what the page says anyway: its arch and the dtype of x."""
    name = config.name.split("_", 2)[2]
    return name.replace("bf16_", "").replace("f16_", "")


def kernel_map_picture(arch: str) -> str:
    """Which kernel serves how many rows, for the weights of a model, on one arch."""
    title, x_dtype, sms = GPUS[arch]
    parts = [text(16, 24, f"{arch}: {title}", "start")]
    left, step = 82, (WIDTH - 98) / len(ROWS)
    parts.append(text(16, 50, "M =", "start", True))
    parts += [text(left + (i + 0.5) * step, 50, m, small=True) for i, m in enumerate(ROWS)]
    kinds: list[str] = []
    for j, (name, (n, k)) in enumerate(LLAMA_8B.items()):
        y = 58 + 44 * j
        parts += [
            text(16, y + 17, name, "start", True),
            text(16, y + 32, f"{n}x{k}", "start", True),
        ]
        found = [select(GemmProblem(m, n, k, arch, x_dtype), sms) for m in ROWS]
        at = 0
        while at < len(ROWS):
            config, split = found[at]
            end = next((i for i in range(at, len(ROWS)) if found[i] != found[at]), len(ROWS))
            if config.kind not in kinds:
                kinds.append(config.kind)
            x, middle = left + at * step, left + (at + end) / 2 * step
            parts.append(rect(x, y, (end - at) * step - 1, 42, kinds.index(config.kind)))
            parts.append(text(middle, y + 17, f"{config.tile_m}x{config.tile_n}", small=True))
            if note := [f"K/{split}"] * (split > 1) + ["c2x2"] * (config.cluster_n > 1):
                parts.append(text(middle, y + 32, " ".join(note), small=True))
            at = end
    y = 58 + 44 * len(LLAMA_8B) + 20
    for i, kind in enumerate(kinds):
        parts += [rect(16 + 120 * i, y - 11, 12, 12, i), text(34 + 120 * i, y, kind, "start")]
    return svg(y + 14, parts)


# ---- The bench ----------------------------------------------------------------------------------


def bench() -> dict[str, Any]:
    """The newest run of the bench that is kept."""
    newest = sorted((ROOT / "docs" / "data").glob("*.json"))[-1]
    return json.loads(newest.read_text())


def linear_rows(data: dict[str, Any]) -> list[LinearRow]:
    """The figures of the layer."""
    return [LinearRow(**row) for row in data["linear"]]


def legend(names: Sequence[str], y: float, step: float) -> list[str]:
    """Colors and their names in a line."""
    parts = []
    for i, name in enumerate(names):
        parts += [rect(44 + step * i, y - 11, 12, 12, i, 1), text(62 + step * i, y, name, "start")]
    return parts


def speedup_picture() -> str:
    """Speed-up over bf16 by the number of rows, for each weight."""
    data = bench()
    found = linear_rows(data)
    rows = sorted({r.m for r in found})
    left, bottom, height = 44, 270, 200
    top = 4
    parts = [text(16, 24, "Times as fast as XLA's bf16 dot, by rows of x", "start")]
    parts.append(
        text(16, 42, f"NVFP4 weights, 16-bit activations, {data['device']}", "start", True)
    )
    for tick in range(top + 1):
        y = bottom - tick / top * height
        parts.append(line([(left, y), (WIDTH - 20, y)], "axis" if tick == 1 else "grid"))
        parts.append(text(left - 6, y + 4, f"{tick}x", "end"))
    step = (WIDTH - left - 60) / (len(rows) - 1)
    parts += [text(left + 20 + i * step, bottom + 20, m) for i, m in enumerate(rows)]
    shapes = list(dict.fromkeys((r.n, r.k) for r in found))
    for color, shape in enumerate(shapes):
        mine = {r.m: r for r in found if (r.n, r.k) == shape}
        points = [
            (left + 20 + i * step, bottom - r.bf16 / r.w4a16 / top * height)
            for i, m in enumerate(rows)
            if (r := mine[m]).bf16 and r.w4a16
        ]
        parts.append(line(points, "", color))
        parts += [
            f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{COLORS[color]}"/>' for x, y in points
        ]
    parts += legend([f"{n} x {k}" for n, k in shapes], bottom + 46, 140)
    return svg(bottom + 62, parts)


def roofline_picture() -> str:
    """What was reached against what the memory and the tensor cores allow."""
    data = bench()
    found = linear_rows(data)
    read, most = data["ceilings"]["read"], data["ceilings"]["multiply"]
    left, bottom, width, height = 52, 300, WIDTH - 72, 236

    def place(intensity: float, speed: float) -> tuple[float, float]:
        x, y = math.log10(intensity), math.log10(speed / 1e12)  # 1 to 10^4, and 1 to 10^3
        return left + x / 4 * width, bottom - y / 3 * height

    parts = [text(16, 24, "TFLOP/s, by operations for each byte that NVFP4 must move", "start")]
    parts.append(text(16, 42, f"{data['device']}; roof: measured in the same run", "start", True))
    for power in range(5):
        x, y = place(10**power, 1e12 * 10 ** min(power, 3))
        parts.append(line([(x, bottom), (x, bottom - height)], "grid"))
        parts.append(text(x, bottom + 18, f"{10**power}"))
        if power <= 3:
            parts.append(line([(left, y), (left + width, y)], "grid"))
            parts.append(text(left - 6, y + 4, f"{10**power}", "end"))
    roof = [place(1, read), place(most / read, most), place(1e4, most)]
    parts.append(line(roof, "axis"))
    rows = sorted({r.m for r in found})
    for r in found:
        color = COLORS[rows.index(r.m)]
        if r.bf16:
            x, y = place(r.flops / r.bytes, r.flops / r.bf16)
            parts.append(f'<path d="M{x - 4:g} {y - 4:g}l8 8m0 -8l-8 8" stroke="{color}"/>')
        if r.main:
            x, y = place(r.flops / r.bytes, r.flops / r.main)
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="4" fill="{color}"/>')
    parts += legend([f"M={m}" for m in rows], bottom + 44, 84)
    parts.append(text(44, bottom + 66, "dots: NVFP4 weights; crosses: XLA's bf16 dot", "start"))
    return svg(bottom + 80, parts)


# ---- The PTX machine ----------------------------------------------------------------------------


def box(x: float, y: float, w: float, words: str, color: int | None = None) -> str:
    """Lines of words, which "|" parts, in a box."""
    lines = words.split("|")
    h = 10 + 17 * len(lines)
    paint = "" if color is None else f' style="stroke: {COLORS[color]}; stroke-width: 2"'
    parts = [
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="4"{paint}/>',
        *(text(x + w / 2, y + 19 + 17 * i, at, small=i > 0) for i, at in enumerate(lines)),
    ]
    return "\n".join(parts)


def arrow(x: float, y: float, end: float) -> str:
    """An arrow downward."""
    return (
        line([(x, y), (x, end - 2)], "axis")
        + f'<path class="axis" d="M{x - 4:g} {end - 8:g}l4 6l4 -6"/>'
    )


def machine_picture() -> str:
    """How PTX gets into the machine, what it is made of, and what comes out."""
    call = "runs the host code; stands for the|CUDA runtime: grid, arguments,|tensor maps"
    decode = "each instruction becomes a function on 32 lanes; an unknown one is an error"
    warps = "in random order,|paused anywhere;|divergence, barriers|and clusters"
    memories = "global, shared, tensor:|a state for each byte;|unwritten ones are|poison"
    late = "TMA, cp.async,|wgmma, tcgen05 act|between issue and|wait, as the seed says"
    checks = "vector clocks (races), proxies and fences, byte counts, bounds, deadlocks"
    parts = [
        box(16, 16, 214, "CuTeDSL: export_to_c|host code NAME.o, and its PTX", 0),
        box(250, 16, 214, "nvcc -ptx, or PTX by hand|text of a kernel", 0),
        box(16, 82, 214, f"run_object|{call}"),
        box(250, 82, 214, "launch|grid, block, arguments||"),
        box(16, 182, 448, f"parse, decode|{decode}"),
        box(16, 248, 142, f"warps|{warps}", 3),
        box(169, 248, 142, f"memories|{memories}", 3),
        box(322, 248, 142, f"late operations|{late}", 3),
        box(16, 365, 448, f"checks|{checks}", 1),
        box(16, 431, 214, "arrays|the results, bit for bit", 3),
        box(250, 431, 214, "PtxError|line of PTX, CTA and warp", 2),
    ]
    for x in (123, 357):
        parts += [arrow(x, 60, 82), arrow(x, 160, 182), arrow(x, 409, 431)]
    parts += [arrow(240, 226, 248), arrow(240, 343, 365)]
    return svg(491, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "format": format_picture,
    "swizzle": swizzle_picture,
    "sm90": registers_picture,
    **{f"kernels-{arch}": lambda arch=arch: kernel_map_picture(arch) for arch in GPUS},
    "speedup": speedup_picture,
    "roofline": roofline_picture,
    "machine": machine_picture,
}


if __name__ == "__main__":
    folder = ROOT / "docs" / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw(), encoding="utf-8")
