# SPDX-License-Identifier: Apache-2.0
"""Makes the pages and pictures that follow from the code, each time the site is built.

The swizzle comes from the index map that packs scales, the map of kernels from the selection
tables, speeds from the bench's JSON in `docs/data/`.
"""

import html
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from jax_nvfp4.config import GemmProblem, select  # noqa: E402 - the tree's own package
from jax_nvfp4.config.gemm import sm90, sm100, sm120  # noqa: E402
from jax_nvfp4.layout import swizzle  # noqa: E402

LLAMA_8B = {
    "qkv 6144 x 4096": (6144, 4096),
    "out 4096 x 4096": (4096, 4096),
    "gate, up 28672 x 4096": (28672, 4096),
    "down 4096 x 14336": (4096, 14336),
}
ROWS = (1, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
GPUS = {
    "sm_90a": ("H100, 16-bit activations", "bfloat16", 132),
    "sm_100f": ("B200, NVFP4 activations", "e2m1", 148),
    "sm_120f": ("RTX PRO 6000, NVFP4 activations", "e2m1", 188),
}
BYTES_PER_WEIGHT = 0.5625
COLORS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")


# ---- SVG ----------------------------------------------------------------------------------------


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """A picture that is readable on light and on dark pages: it brings its own ground."""
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" rx="6" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def rect(x: float, y: float, w: float, h: float, fill: str, extra: str = "") -> str:
    """A rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" fill="{fill}" {extra}/>'


def text(x: float, y: float, words: Any, anchor: str = "middle", extra: str = "") -> str:
    """Words at a point."""
    words = html.escape(str(words))
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#222" {extra}>{words}</text>'


def format_picture() -> str:
    """A block of sixteen elements, their scale, and the bits of each."""
    parts = [text(20, 24, "a block: 16 elements along K share one scale", "start")]
    for i in range(16):
        parts += [rect(20 + 34 * i, 36, 32, 28, COLORS[0], 'fill-opacity="0.25" stroke="#4269d0"')]
        parts += [text(36 + 34 * i, 55, f"e{i}")]
    parts += [rect(580, 36, 80, 28, COLORS[1], 'fill-opacity="0.35" stroke="#efb118"')]
    parts += [text(620, 55, "scale")]
    fields = (
        ("element, e2m1: 4 bits", COLORS[0], (("sign", 1), ("exponent", 2), ("mantissa", 1))),
        ("block scale, e4m3: 8 bits", COLORS[1],
         (("sign: 0", 1), ("exponent", 4), ("mantissa", 3))),
        ("global scale, float32: one for the tensor, or for each row", COLORS[4],
         (("sign: 0", 1), ("exponent", 8), ("mantissa", 23))),
    )  # fmt: skip
    y = 96
    for title, color, bits in fields:
        parts.append(text(20, y, title, "start"))
        x, unit = 20.0, 34 if sum(n for _, n in bits) < 16 else 19
        for name, count in bits:
            for _ in range(count):
                parts.append(rect(x, y + 8, unit - 2, 20, color, 'fill-opacity="0.3"'))
                x += unit
            middle = x - unit * count / 2
            parts.append(text(middle, y + 42, name, extra='font-size="10"'))
        y += 64
    parts.append(text(20, y + 4, "4 + 8/16 = 4.5 bits an element: 0.5625 byte", "start"))
    return svg(680, y + 20, parts)


def swizzle_picture() -> str:
    """Where the scales of a tile of 128 rows by 4 columns lie in its 512 bytes."""
    number = np.arange(128 * 4, dtype=np.int32).reshape(128, 4)
    # One-byte values cannot count to 512: low and high parts go through the map apart.
    low = swizzle.swizzle((number % 256).astype(np.uint8)).reshape(-1).astype(int)
    high = swizzle.swizzle((number // 256).astype(np.uint8)).reshape(-1).astype(int)
    order = low + 256 * high
    parts = [text(20, 22, "a tile of 512 bytes, 16 a line (color: row / 32)", "start")]
    for line in range(8):
        for byte in range(16):
            row, column = divmod(int(order[line * 16 + byte]), 4)
            x, y = 20 + 42 * byte, 34 + 24 * line
            parts.append(rect(x, y, 40, 22, COLORS[row // 32], 'fill-opacity="0.35"'))
            parts.append(text(x + 20, y + 15, f"{row}.{column}", extra='font-size="10"'))
    parts.append(text(20, 250, "row.column; 24 lines more follow: rows 8 to 31, 40 to 63, ...",
                      "start"))  # fmt: skip
    return svg(712, 266, parts)


def registers_picture() -> str:
    """Which rows of a tile the threads of a warpgroup hold, by the formula of `layout.sm90`."""
    title = "the warp (color) and the row r of its 16 that hold each row of a tile"
    parts = [text(20, 22, title, "start")]
    for warp, r, block, half in np.ndindex(4, 8, 2, 2):
        row = 32 * warp + 8 * (r // 2) + 4 * block + 2 * half + r % 2
        x, y = 20 + 42 * (row % 16), 34 + 26 * (row // 16)
        parts.append(rect(x, y, 40, 24, COLORS[warp], 'fill-opacity="0.35"'))
        parts.append(text(x + 20, y + 16, f"{block}: r{r + 8 * half}", extra='font-size="10"'))
    parts.append(text(20, 260, "block of 64 rows: row r of the MMA's fragment", "start"))
    return svg(712, 276, parts)


def lines_picture(
    title: str, x_names: Sequence[str], series: dict[str, Sequence[float]], unit: str
) -> str:
    """Lines over categories, with their values on an axis from 0."""
    width, height, left, bottom = 700, 340, 50, 260
    top = max(max(v) for v in series.values()) * 1.1
    parts = [text(left, 24, title, "start")]
    ticks = [t for t in (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4) if t <= top]
    for tick in ticks if top > 1.2 else [t for t in ticks if t <= 1]:
        y = bottom - tick / top * 210
        stroke = "#999" if tick == 1 else "#e5e5e5"
        parts.append(f'<path d="M{left} {y:g}H{width - 20}" stroke="{stroke}"/>')
        parts.append(text(left - 8, y + 4, f"{tick:g}{unit}", "end"))
    step = (width - left - 60) / max(len(x_names) - 1, 1)
    for i, name in enumerate(x_names):
        parts.append(text(left + 20 + i * step, bottom + 20, name))
    for j, (name, values) in enumerate(series.items()):
        points = [
            (left + 20 + i * step, bottom - v / top * 210) for i, v in enumerate(values)
        ]  # fmt: skip
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        color = COLORS[j % len(COLORS)]
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [f'<circle cx="{x:g}" cy="{y:g}" r="3.5" fill="{color}"/>' for x, y in points]
        column, row = divmod(j, 2)
        at = left + column * 215
        parts.append(rect(at, bottom + 36 + 20 * row, 12, 12, color))
        parts.append(text(at + 18, bottom + 46 + 20 * row, name, "start"))
    return svg(width, height, parts)


# ---- From the tables and the bench --------------------------------------------------------------


def kernel_map() -> str:
    """Which kernel serves how many rows, for the weights of a model, as Markdown tables."""
    out = []
    for arch, (title, x_dtype, sms) in GPUS.items():
        out += [f"### {arch}: {title}", ""]
        out += ["| N x K | " + " | ".join(f"M={m}" for m in ROWS) + " |"]
        out += ["|---" * (len(ROWS) + 1) + "|"]
        for name, (n, k) in LLAMA_8B.items():
            cells = []
            for m in ROWS:
                config, split = select(GemmProblem(m, n, k, arch, x_dtype), sms)
                short = config.name.split("_", 2)[2].replace("bf16_", "")
                cells.append(f"`{short}`" + (f" /{split}" if split > 1 else ""))
            out.append(f"| {name} | " + " | ".join(cells) + " |")
        out += ["", "`/2`: K is split in two.", ""]
    return "\n".join(out)


def kernel_tables() -> str:
    """Every row of the selection tables, with its reason."""
    out = []
    for module, title in ((sm90, "sm_90a"), (sm100, "sm_100f, sm_103a"), (sm120, "sm_120f")):
        out += [f"### {title}", "", "| kernel | reason |", "|---|---|"]
        for rule in dict.fromkeys((r.config.name, r.reason) for r in module.RULES):
            name, reason = rule
            out.append(f"| `{name}` | {' '.join(reason.split())} |")
        out.append("")
    return "\n".join(out)


def bench() -> dict[str, Any]:
    """The newest run of the bench that is kept."""
    newest = sorted((ROOT / "docs" / "data").glob("*.json"))[-1]
    return json.loads(newest.read_text())


def speedup_picture() -> str:
    """Speed-up over bf16 by the number of rows, for four weights."""
    data = bench()
    rows = sorted({r["m"] for r in data["linear"]})
    shapes = dict.fromkeys((r["n"], r["k"]) for r in data["linear"])
    series = {
        f"{n} x {k}": [
            next(
                r["bf16"] / r["w4a16"]
                for r in data["linear"]
                if (r["n"], r["k"], r["m"]) == (n, k, m)
            )
            for m in rows
        ]
        for n, k in shapes
    }
    title = f"times as fast as XLA's bf16 dot, NVFP4 weights, by rows of x ({data['device']})"
    return lines_picture(title, [str(m) for m in rows], series, "x")


def roofline_picture() -> str:
    """Share of the read bandwidth at one row, by the size of the weight."""
    data = bench()
    ones = sorted((r for r in data["linear"] if r["m"] == 1), key=lambda r: r["n"] * r["k"])
    names = [f"{r['n'] * r['k'] * BYTES_PER_WEIGHT / 1e6:.0f} MB" for r in ones]
    read = data["ceilings"]["read"]
    series = {"M = 1": [r["n"] * r["k"] * BYTES_PER_WEIGHT / r["w4a16"] / read for r in ones]}
    title = f"share of the read bandwidth measured in the same run ({data['device']})"
    return lines_picture(title, names, series, "")


PICTURES: dict[str, Callable[[], str]] = {
    "pictures/format.svg": format_picture,
    "pictures/swizzle.svg": swizzle_picture,
    "pictures/sm90.svg": registers_picture,
    "pictures/speedup.svg": speedup_picture,
    "pictures/roofline.svg": roofline_picture,
}
PAGES = {
    "inside/notes.md": ROOT / "jax_nvfp4" / "kernels" / "NOTES.md",
    "inside/ptx-machine.md": ROOT / "tests" / "ptx_machine" / "README.md",
    "inside/release.md": ROOT / "release.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pictures, and the pages that live beside the code."""
    for name, draw in PICTURES.items():
        if (kept := files.get_file_from_path(name)) is not None:
            files.remove(kept)  # the README's copy
        files.append(File.generated(config, name, content=draw()))
    for name, path in PAGES.items():
        files.append(File.generated(config, name, content=path.read_text(encoding="utf-8")))
    return files


def speed_table() -> str:
    """Times as fast as bf16, with 16-bit activations / with activations quantized per token."""
    data = bench()
    rows = sorted({r["m"] for r in data["linear"]})
    shapes = dict.fromkeys((r["n"], r["k"]) for r in data["linear"])
    found = {(r["n"], r["k"], r["m"]): r for r in data["linear"]}
    head = "Times as fast as XLA's bf16 dot, 16-bit activations / quantized per token, "
    out = [f"{head}{data['date'][:10]}, jax {data['versions']['jax']}:", ""]
    out += [
        "| N x K | " + " | ".join(f"M = {m}" for m in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for n, k in shapes:
        cells = []
        for m in rows:
            row = found[n, k, m]
            pair = (row["w4a16"], row["w4a4"])
            cells.append(" / ".join("-" if t is None else f"{row['bf16'] / t:.2f}" for t in pair))
        out.append(f"| {n} x {k} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables where a page asks for them."""
    if "<!-- speed table -->" in markdown:
        markdown = markdown.replace("<!-- speed table -->", speed_table())
    if "<!-- kernel map -->" in markdown:
        markdown = markdown.replace("<!-- kernel map -->", kernel_map())
        markdown = markdown.replace("<!-- kernel tables -->", kernel_tables())
    return markdown


if __name__ == "__main__":  # python docs/hooks.py: the README's copy of a picture
    (ROOT / "docs" / "pictures").mkdir(exist_ok=True)
    (ROOT / "docs" / "pictures" / "speedup.svg").write_text(speedup_picture(), encoding="utf-8")
