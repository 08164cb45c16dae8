# SPDX-License-Identifier: Apache-2.0
"""The pages of the documentation: their code runs, and the site builds without a warning."""

import importlib
import importlib.util
import json
import os
import re
import shutil
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


def test_the_kept_pictures_are_what_the_code_draws(monkeypatch):
    """GitHub shows the files, the site draws them anew: `python docs/pictures.py` writes them."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    pictures = importlib.import_module("pictures")
    kept = {path.stem: path.read_text("utf-8") for path in ROOT.glob("docs/pictures/*.svg")}
    assert kept == {name: draw() for name, draw in pictures.PICTURES.items()}


def test_what_the_page_of_the_ptx_machine_shows(tmp_path):
    """PTX as text and a kernel of CuTeDSL run as its README says, the error included."""
    readme = (ROOT / "tests" / "ptx_machine" / "README.md").read_text("utf-8")
    text, kernel, run = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (shell,) = re.findall(r"^```bash\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    inherited = {**os.environ, "PYTHONPATH": str(ROOT / "tests")}

    def python(code):
        return subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=inherited,
            capture_output=True,
            text=True,
        )

    done = python(text)
    assert done.returncode == 0, done.stderr
    error = " ".join(re.search(r"    (global read .*\n    .*)\n", readme)[1].split())
    assert error in python(text.replace("2.0, 1000]", "2.0, 1001]")).stderr

    if importlib.util.find_spec("cutlass") is None or shutil.which("gcc") is None:
        pytest.skip("CuTeDSL and gcc are not installed: its kernel was not compiled")
    (tmp_path / "scale.py").write_text(kernel, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "-e", "-c", shell], cwd=tmp_path, check=True, env={**inherited, "PATH": path}
    )
    done = python(run)
    assert done.returncode == 0, done.stderr


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
