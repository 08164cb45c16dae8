# SPDX-License-Identifier: Apache-2.0
"""`python -m jax_nvfp4 report FILE`: what a maintainer would ask the owner of a GPU, in one file.

Each part is a process of its own with a limit of time, so that one that hangs, or that leaves the
GPU in a bad state, does not take the others with it.
"""

from __future__ import annotations

import argparse
import pathlib
import subprocess
import sys
import time
from typing import Any, TextIO

from jax_nvfp4.cli import COMMANDS, BadInputError

_DESCRIPTION = """\
Runs the self-test, tries every kernel that is built in for this machine's GPU on a few tiles, runs
the GPU tests where there are any, and the quick benchmark, and writes what they say to one file. It
takes some minutes. Nothing is sent anywhere.
"""
_TESTS = pathlib.Path("tests/gpu")


def add_parser(commands: Any) -> None:
    """Adds the arguments of the command."""
    parser = commands.add_parser("report", help=COMMANDS["report"], description=_DESCRIPTION)
    parser.add_argument("file", type=pathlib.Path, help="the file to write")
    parser.add_argument(
        "--tests",
        type=pathlib.Path,
        metavar="DIR",
        help=f"the GPU tests, run by pytest (default: {_TESTS}, where it is)",
    )
    parser.add_argument("--minutes", type=float, default=20, help="limit of each part")


def run(args: argparse.Namespace) -> int:
    """Runs all parts and writes the file.

    Returns:
        The exit code: 0, or 1 where a part failed.
    """
    if args.tests is not None and not args.tests.is_dir():
        raise BadInputError(f"--tests: there is no folder {args.tests}")
    if not args.minutes > 0:
        raise BadInputError(f"--minutes must be positive; got {args.minutes}")
    tests = args.tests or (_TESTS if _TESTS.is_dir() else None)
    python = [sys.executable, "-m"]
    parts = {"driver": ["nvidia-smi"], "info": [*python, "jax_nvfp4", "info", "--kernels"]}
    if tests is not None:
        parts["tests"] = [*python, "pytest", "-q", str(tests)]
    parts["bench"] = [*python, "jax_nvfp4", "bench", "--quick"]
    failed = []
    try:
        with open(args.file, "w", encoding="utf-8") as file:
            for name, command in parts.items():
                print(f"{name} ...", end=" ", flush=True)
                outcome, fine = _part(name, command, 60 * args.minutes, file)
                print(outcome)
                if not fine and name != "driver":
                    failed.append(name)
    except OSError as error:
        raise BadInputError(f"{args.file}: {error.strerror or error}") from None
    print(f"{args.file}: " + (f"failed: {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


def _part(name: str, command: list[str], seconds: float, file: TextIO) -> tuple[str, bool]:
    """Runs a part; writes what it printed to the file.

    Returns:
        How it ended, and whether well.
    """
    file.write(f"==== {name}: {' '.join(command)}\n")
    file.flush()
    started = time.perf_counter()
    try:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, timeout=seconds, check=False
        ).returncode
        outcome, fine = f"exit code {code}", code == 0
    except subprocess.TimeoutExpired:
        outcome, fine = f"stopped after {seconds / 60:.0f} min", False
    except OSError as error:
        outcome, fine = f"did not start: {error.strerror}", False
    outcome += f", {time.perf_counter() - started:.0f} s"
    file.write(f"\n==== {name}: {outcome}\n\n")
    file.flush()
    return outcome, fine
