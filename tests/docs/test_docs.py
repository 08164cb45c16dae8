# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation: their code runs, and the site builds without a warning."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jax_nvfp4

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_PARENT = str(Path(jax_nvfp4.__file__).resolve().parents[1])
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "```python" in p.read_text("utf-8"))
RUNNER = """
import json, os, sys, tempfile, traceback
failed = {}
for page, code in json.load(sys.stdin).items():
    os.chdir(tempfile.mkdtemp())
    try:
        exec(compile(code, page, "exec"), {"__name__": page})
    except Exception:
        failed[page] = traceback.format_exc()
print(json.dumps(failed), file=sys.stderr)
"""


def test_the_code_of_each_page_runs():
    """The blocks of a page run one after the other, as a reader would run them."""
    assert len(PAGES) >= 10
    blocks = {
        str(page.relative_to(ROOT)): "\n".join(
            re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
        )
        for page in PAGES
    }
    inherited = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER],
        input=json.dumps(blocks),
        env={**inherited, "PYTHONPATH": PACKAGE_PARENT},
        capture_output=True,
        text=True,
    )
    failed = json.loads(done.stderr.strip().splitlines()[-1])
    assert not failed, "\n".join(failed.values())


@pytest.mark.skipif(
    importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed (the extra docs)"
)
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in ("index.html", "kernels/index.html", "api/index.html"):
        assert (tmp_path / page).exists()
    assert "<svg" in (tmp_path / "pictures" / "format.svg").read_text()
