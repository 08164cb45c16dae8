# SPDX-License-Identifier: Apache-2.0
"""Plants faults into the compiled kernels and runs the kernels' own tests on them.

    PYTHONPATH=tests python tests/support/mutation.py --kernel 'gemm_sm120f_*' --out out/mutation

A fault counts as killed when a test fails on it: the PTX machine reports an error, or the result is
wrong. Tests that do not execute the changed line cannot see it and are not run; lines that no test
executes are counted apart. Results are one JSON file for each kernel, rewritten after each fault.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib.util
import inspect
import itertools
import json
import pathlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Self

import numpy as np
from ptx_machine import PtxError, machine, mutate
from ptx_machine.host import run_object

import kernel_objects

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "kernels"
LIVELOCK_INSTRUCTIONS = 300_000
MEMORY = 6 * 2**30
"""Bytes of data that a process may have: what a fault takes beyond them is an error as well."""
ABOUT_LINES = {"test_the_cases_execute_all_code"}
"""Tests that would fail on a fault because other lines run, which says nothing about the result."""


class HangError(Exception):
    """A run that takes much longer than the original."""


@dataclass
class Call:
    """One test function with its arguments.

    Attributes:
        name: function and arguments, for reports.
        run: the test.
        seconds: how long the original takes.
        lines: PTX lines of the kernel that the original executes.
    """

    name: str
    run: Callable[[], None]
    seconds: float = 0.0
    lines: set[int] = field(default_factory=set)


def family(kernel: str) -> str:
    """The family of a kernel's name: "quantize", "sm_90a", "sm_100f", "sm_103a" or "sm_120f"."""
    if kernel.startswith("quantize"):
        return "quantize"
    return "sm_" + kernel.removeprefix("gemm_sm").partition("_")[0]


@functools.cache
def module_of(stem: str) -> ModuleType:
    """A module of the kernels' tests, by the name of its file."""
    spec = importlib.util.spec_from_file_location(f"mutation_{stem}", FOLDER / f"{stem}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tests_of(name: str) -> tuple[ModuleType, ...]:
    """The modules with a family's tests."""
    arch = name[:2] + name[3:-1].replace("103", "100")
    gemm = (f"test_gemm_{arch}.py", "test_gemm_outputs.py")
    if name != "sm_90a":
        gemm = (*gemm, "test_gemm_blackwell.py")
    patterns = ("test_quantize*.py",) if name == "quantize" else gemm
    found = sorted(path.stem for pattern in patterns for path in FOLDER.glob(pattern))
    assert found, f"no tests of {name}"
    return tuple(module_of(stem) for stem in found)


@functools.cache
def text_of(kernel: str) -> str:
    """A kernel's PTX."""
    return (kernel_objects.folder() / f"{kernel}.ptx").read_text()


class Interception:
    """While it lasts, a kernel's tests call another `run_object`."""

    def __init__(self, kernel: str, run: Callable[..., Any]) -> None:
        self.kernel, self.tests, self.run = kernel, tests_of(family(kernel)), run
        # The family's tests, and the modules that their functions come from.
        names = {getattr(v, "__module__", None) for m in self.tests for v in vars(m).values()}
        modules = [*self.tests, *(sys.modules[n] for n in names if n in sys.modules)]
        self.namespaces = [
            vars(m)
            for m in modules
            if "run_object" in vars(m) and m.__name__ != run_object.__module__
        ]

    def _install(self, function: Callable[..., Any]) -> None:
        for namespace in self.namespaces:
            namespace["run_object"] = function

    def __enter__(self) -> Self:
        self._install(self.run)
        return self

    def __exit__(self, *_: object) -> None:
        self._install(run_object)


class Substitution(Interception):
    """Replaces one kernel's PTX in every run, or collects the lines it executes."""

    def __init__(self, kernel: str) -> None:
        super().__init__(kernel, self.substitute)
        self.text = ""
        self.coverage: set[int] | None = None

    def substitute(self, path: Any, text: str, *args: Any, **options: Any) -> Any:
        # A test that plants a fault of its own has to see that one.
        if pathlib.Path(path).stem != self.kernel or text != text_of(self.kernel):
            return run_object(path, text, *args, **options)
        text = self.text or text
        if self.coverage is None:
            return run_object(path, text, *args, **options)
        own = options.pop("coverage", None)  # of a test that looks at it itself
        lines: set[int] = set()
        machines = run_object(path, text, *args, coverage=lines, **options)
        self.coverage |= lines
        if own is not None:
            own |= lines
        return machines


def _values(mark: Any) -> Iterator[dict[str, Any]]:
    """The arguments that one `parametrize` gives."""
    names = mark.args[0]
    names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
    for value in mark.args[1]:
        value = getattr(value, "values", value) if type(value).__name__ == "ParameterSet" else value
        if len(names) == 1 and not (isinstance(value, tuple) and len(value) == 1):
            value = (value,)
        yield dict(zip(names, value, strict=True))


def calls_of(kernel: str, unnamed: bool = True) -> Iterator[Call]:
    """The calls of its family that may run a kernel; `unnamed`: also where none is named."""
    short = kernel.partition("f_")[2] or kernel
    functions = {n: f for module in tests_of(family(kernel)) for n, f in vars(module).items()}
    for name, function in functions.items():
        if not name.startswith("test_") or "monkeypatch" in inspect.signature(function).parameters:
            continue
        if name in ABOUT_LINES:
            continue
        marks = [m for m in getattr(function, "pytestmark", []) if m.name == "parametrize"]
        for parts in itertools.product(*[list(_values(m)) for m in marks]):
            arguments = {k: v for part in parts for k, v in part.items()}
            config = arguments.get("config", arguments.get("name"))
            if config is None and not unnamed:
                continue
            if config is not None and getattr(config, "name", config) not in (kernel, short):
                continue
            label = ", ".join(str(getattr(v, "name", v)) for v in arguments.values())
            yield Call(f"{name}({label})", functools.partial(function, **arguments))


def _limited(run: Callable[[], None], seconds: float) -> None:
    """Runs with a limit of processor time."""

    def stop(*_: object) -> None:
        raise HangError(f"more than {seconds:.0f} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        with np.errstate(all="ignore"):
            run()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)


def measured(substitution: Substitution, calls: Iterable[Call]) -> list[Call]:
    """Those calls that execute the kernel, the fastest first; the original passes them all."""
    found = []
    for call in calls:
        substitution.coverage = set()
        started = time.process_time()
        call.run()
        call.seconds = time.process_time() - started
        call.lines, substitution.coverage = substitution.coverage, None
        if call.lines:
            found.append(call)
    return sorted(found, key=lambda c: c.seconds)


def verdict(substitution: Substitution, mutant: mutate.Mutant, calls: list[Call]) -> dict[str, Any]:
    """Whether, by what and how a fault is seen."""
    started = time.process_time()
    result: dict[str, Any] = {
        "rule": mutant.rule,
        "line": mutant.line,
        "before": mutant.before.strip(),
        "after": mutant.after.strip(),
        "killed": False,
    }
    substitution.text = mutant.text
    try:
        for call in calls:
            if mutant.line not in call.lines:
                continue
            try:
                _limited(call.run, max(30.0, 20 * call.seconds))
            except Exception as error:
                kinds = ((PtxError, "machine"), (AssertionError, "result"), (HangError, "hang"))
                by = next((k for t, k in kinds if isinstance(error, t)), type(error).__name__)
                result |= {"killed": True, "by": by, "call": call.name, "how": str(error)[:240]}
                break
    finally:
        substitution.text = ""
        machine._PROGRAMS.pop((mutant.text, None), None)  # a decoded kernel takes megabytes
        gc.collect()
    return result | {"seconds": round(time.process_time() - started, 2)}


def run_kernel(kernel: str, count: int, seed: int, out: pathlib.Path) -> dict[str, Any]:
    """Samples faults of a kernel, evenly over the rules, and runs its tests on each."""
    machine.LIVELOCK_INSTRUCTIONS = LIVELOCK_INSTRUCTIONS
    text = text_of(kernel)
    with Substitution(kernel) as substitution:
        calls = measured(substitution, calls_of(kernel))
        lines = set().union(*(c.lines for c in calls))
        everywhere = list(mutate.mutants(text))
        executed = sum(m.line in lines for m in everywhere)
        report: dict[str, Any] = {
            "kernel": kernel,
            "family": family(kernel),
            "seed": seed,
            "faults_possible": len(everywhere),
            "faults_in_executed_lines": executed,
            "baseline_seconds": round(sum(c.seconds for c in calls), 1),
            "faults": [],
        }
        unseen = sorted({m.line for m in everywhere} - lines)
        report["lines_not_executed"] = unseen
        for mutant in mutate.sample(text, count, seed, lines=lines):
            report["faults"].append(verdict(substitution, mutant, calls))
            (out / f"{kernel}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def recheck(kernel: str, out: pathlib.Path) -> dict[str, Any]:
    """Runs the tests on what survived in an earlier report, and notes the outcome."""
    machine.LIVELOCK_INSTRUCTIONS = LIVELOCK_INSTRUCTIONS
    report = json.loads((out / f"{kernel}.json").read_text())
    text = text_of(kernel)
    known = {(m.rule, m.line, m.after.strip()): m for m in mutate.mutants(text)}
    with Substitution(kernel) as substitution:
        calls = measured(substitution, calls_of(kernel))
        for i, fault in enumerate(report["faults"]):
            if not fault["killed"] or fault.get("by") == "hang":
                mutant = known[fault["rule"], fault["line"], fault["after"]]
                report["faults"][i] = verdict(substitution, mutant, calls) | {"rechecked": True}
                (out / f"{kernel}.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernel", action="append", required=True, help="name or pattern")
    parser.add_argument("--count", type=int, default=40, help="faults for each kernel")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--recheck", action="store_true", help="only what survived before")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    names = [k["name"] for k in kernel_objects.manifest()["kernels"]]
    for name in names:
        if not any(fnmatch.fnmatchcase(name, p) for p in args.kernel):
            continue
        if args.recheck:
            report = recheck(name, args.out)
        else:
            report = run_kernel(name, args.count, args.seed, args.out)
        killed = sum(f["killed"] for f in report["faults"])
        print(f"{name}: {killed} of {len(report['faults'])} killed", flush=True)
        for fault in report["faults"]:
            if not fault["killed"]:
                print(f"  survived: {fault['rule']} {fault['line']}: {fault['before'][:120]}")
    return 0


if __name__ == "__main__":
    # The tests import this module by its name: one copy of it has to do.
    import mutation

    sys.exit(mutation.main())
