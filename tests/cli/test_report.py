# SPDX-License-Identifier: Apache-2.0
"""`report`: each part in a process of its own, and one file, whatever happens to a part."""

import subprocess
import sys

import jax
import pytest

from jax_nvfp4 import cli
from jax_nvfp4.cli import info
from jax_nvfp4.ops import device
from jax_nvfp4.ops.linear import trial


def runs(outcomes, monkeypatch):
    """Stands in for `subprocess.run`: gives the outcome of each part in turn."""
    commands = []

    def run(command, *, stdout, stderr, timeout, check):
        commands.append(command)
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        stdout.write(f"said by {command[-1]}\n")
        return subprocess.CompletedProcess(command, outcome)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_all_parts_come_into_the_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = runs([0, 0, 0], monkeypatch)
    assert cli.main(["report", "r.txt"]) == 0
    assert [c[-1] for c in commands] == ["nvidia-smi", "--kernels", "--quick"]
    assert commands[1][:3] == [sys.executable, "-m", "jax_nvfp4"]
    text = (tmp_path / "r.txt").read_text()
    assert text.count("said by") == 3 and text.count("exit code 0") == 3
    assert capsys.readouterr().out.endswith("r.txt: all passed\n")


def test_a_part_that_fails_or_hangs_does_not_keep_the_others_from_running(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "tests").mkdir()
    hangs = subprocess.TimeoutExpired("pytest", 60)
    runs([FileNotFoundError(2, "No such file"), 1, hangs, 0], monkeypatch)
    file = tmp_path / "r.txt"
    options = ["--tests", str(tmp_path / "tests"), "--minutes", "1"]
    assert cli.main(["report", str(file), *options]) == 1
    text = file.read_text()
    assert "driver: did not start: No such file" in text
    assert "info: exit code 1" in text
    assert "tests: stopped after 1 min" in text
    assert "bench: exit code 0" in text
    assert capsys.readouterr().out.endswith("failed: info, tests\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no/such/folder/r.txt"], "No such file or directory"),
        (["r.txt", "--tests", "nowhere"], "there is no folder nowhere"),
        (["r.txt", "--minutes", "0"], "--minutes must be positive; got 0"),
    ],
)
def test_bad_input(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *options]) == 2
    assert message in capsys.readouterr().err


def test_info_tries_every_kernel(monkeypatch, capsys):
    monkeypatch.setattr(device, "kernel_arch", lambda asked: "sm_103a")
    seen = []

    def fault_of(chosen, multiply, *, per_row):
        seen.append((chosen.gemm.name, chosen.split_k))
        return "it is wrong" if len(seen) == 2 else None

    monkeypatch.setattr(trial, "fault_of", fault_of)
    assert not info._try_kernels("sm_100f")
    printed = capsys.readouterr().out
    assert len(set(seen)) == len(seen) == printed.count("ok  ") + printed.count("FAIL")
    assert printed.count("FAIL") == 1 and "it is wrong" in printed
    assert {name.split("_")[1] for name, _ in seen} == {"sm103a", "sm100f"}
    assert jax.local_devices()[0].platform == "gpu" or info._try_kernels("reference")
