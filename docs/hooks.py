# SPDX-License-Identifier: Apache-2.0
"""Makes the pages, pictures and tables that follow from the code, when the site is built."""

from typing import Any

import pictures
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from jax_nvfp4.config.gemm import sm90, sm100, sm120

PAGES = {
    "inside/notes.md": "jax_nvfp4/kernels/NOTES.md",
    "inside/ptx-machine.md": "tests/ptx_machine/README.md",
    "inside/release.md": "release.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Draws the pictures, and adds the pages that live beside the code."""
    for name, draw in pictures.PICTURES.items():
        name = f"pictures/{name}.svg"
        if (kept := files.get_file_from_path(name)) is not None:
            files.remove(kept)
        files.append(File.generated(config, name, content=draw()))
    for name, path in PAGES.items():
        content = (pictures.ROOT / path).read_text(encoding="utf-8")
        # Their pictures and pages lie one folder up here, and elsewhere seen from the code.
        content = content.replace("](../../docs/", "](../").replace("](docs/", "](../")
        files.append(File.generated(config, name, content=content))
    return files


def kernel_tables() -> str:
    """The reasons of the selection tables and the kernels they choose, a fold for each arch."""
    out = []
    for module, title in ((sm90, "sm_90a"), (sm100, "sm_100f, sm_103a"), (sm120, "sm_120f")):
        reasons: dict[str, list[str]] = {}
        for rule in module.RULES:
            name = pictures.short_name(rule.config)
            for twin in ("grouped_", "gated_"):
                name = name.removeprefix(twin)
            kernels = reasons.setdefault(" ".join(rule.reason.split()), [])
            if name not in kernels:
                kernels.append(name)
        out += [f'??? note "{title}: {len(reasons)} reasons"', ""]
        out += ["    | kernels | why |", "    |---|---|"]
        out += [
            f"    | {' '.join(f'`{name}`' for name in kernels)} | {reason} |"
            for reason, kernels in reasons.items()
        ]
        out.append("")
    return "\n".join(out)


def speed_table() -> str:
    """Times as fast as bf16, with 16-bit activations / with activations quantized per token."""
    data = pictures.bench()
    found = {(r.n, r.k, r.m): r for r in pictures.linear_rows(data)}
    rows = sorted({m for _, _, m in found})
    head = "Times as fast as XLA's bf16 dot, 16-bit activations / quantized per token, "
    out = [f"{head}{data['date'][:10]}, jax {data['versions']['jax']}:", ""]
    out += ["| N x K | " + " | ".join(f"M = {m}" for m in rows) + " |"]
    out += ["|---" * (len(rows) + 1) + "|"]
    for n, k in dict.fromkeys((n, k) for n, k, _ in found):
        cells = []
        for m in rows:
            row = found[n, k, m]
            pair = (row.w4a16, row.w4a4)
            cells.append(" / ".join(f"{row.bf16 / t:.2f}" if row.bf16 and t else "-" for t in pair))
        out.append(f"| {n} x {k} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts the tables where a page asks for them."""
    for place, table in (("speed table", speed_table), ("kernel tables", kernel_tables)):
        if f"<!-- {place} -->" in markdown:
            markdown = markdown.replace(f"<!-- {place} -->", table())
    return markdown
