# SPDX-License-Identifier: Apache-2.0
"""Compares the PTX of two sets of kernels, names aside.

    python -m jax_nvfp4.kernels.compare BEFORE AFTER [--only PATTERN]

Each of the two is a folder that `jax_nvfp4.kernels.build --keep-ptx` wrote, or a git revision,
whose kernels are built. A kernel that has another name in AFTER is found by its code. The exit
status is 0 where all kernels have the same code, byte for byte; a change that is meant to move or
to rename only should show that.
"""

import argparse
import difflib
import fnmatch
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence

_ENTRY = re.compile(r"^\.visible \.entry (\w+)\($", re.MULTILINE)
_LABEL = re.compile(r"\$L__BB\d+_")
_SHOWN = 20


def normalized(ptx: str) -> str:
    """PTX without names: entries are called by their number, and their labels by none."""
    ptx = re.sub(r"^\s*// \.globl\s.*\n", "", ptx, flags=re.MULTILINE)
    names = _ENTRY.findall(ptx)
    numbers = {name: f"kernel_{number}" for number, name in enumerate(names)}
    # Parameters are called after the entry: NAME_param_0.
    ptx = re.sub(
        r"\b("
        + "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        + r")(?=_param_|\b)",
        lambda found: numbers[found[1]],
        ptx,
    )
    return _LABEL.sub("$L_", ptx)


def read(folder: pathlib.Path, only: str) -> dict[str, str]:
    """The normalized PTX of each kernel in a folder."""
    found = {
        path.stem: normalized(path.read_text())
        for path in sorted(folder.glob("*.ptx"))
        if fnmatch.fnmatchcase(path.stem, only)
    }
    if not found:
        raise SystemExit(f"{folder}: no PTX of kernels named {only!r} (build with --keep-ptx)")
    return found


def built(revision: str, only: str, scratch: pathlib.Path) -> pathlib.Path:
    """The folder of the kernels of a git revision, which are compiled."""
    tree, out = scratch / "tree", scratch / "kernels"
    subprocess.run(["git", "worktree", "add", "--detach", str(tree), revision], check=True)
    try:
        command = [sys.executable, "-m", "jax_nvfp4.kernels.build", "--keep-ptx"]
        environment = os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"}
        subprocess.run(
            [*command, "--out", str(out), "--only", only], cwd=tree, env=environment, check=True
        )
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(tree)], check=True)
    return out


def differences(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """What to say of two sets of kernels: nothing where the code of all is the same."""
    said = []
    gone, new = ({*a} - {*b} for a, b in ((before, after), (after, before)))
    for name in sorted(gone):
        match = next((other for other in sorted(new) if after[other] == before[name]), None)
        if match is None:
            said.append(f"{name}: no kernel of the same code in the second")
        else:
            new.remove(match)
            print(f"{name} is {match} now")
    said += [f"{name}: no kernel of the same code in the first" for name in sorted(new)]
    for name in sorted({*before} & {*after}):
        if before[name] != after[name]:
            lines = difflib.unified_diff(
                before[name].splitlines(), after[name].splitlines(), lineterm="", n=1
            )
            shown = [line for line, _ in zip(lines, range(_SHOWN), strict=False)]
            said.append("\n  ".join((f"{name}: other code", *shown)))
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m jax_nvfp4.kernels.compare", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("before", help="folder or git revision")
    parser.add_argument("after", help="folder or git revision")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="names of kernels")
    args = parser.parse_args(argv)
    sets = []
    for source in (args.before, args.after):
        with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
            folder = pathlib.Path(source)
            if not folder.is_dir():
                folder = built(source, args.only, pathlib.Path(scratch))
            sets.append(read(folder, args.only))
    said = differences(*sets)
    print("\n".join(said) or f"{len(sets[0])} kernels: the same code in both")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
