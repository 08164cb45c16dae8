# SPDX-License-Identifier: Apache-2.0
"""The command line: help, info and its self-test, exit codes, one clear line on bad input."""

import os
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

import jax_nvfp4
from jax_nvfp4.cli import COMMANDS, main, selftest


def exit_code(*arguments: str) -> int:
    """The exit code, whether `main` returns it or argparse exits with it."""
    try:
        return main(arguments)
    except SystemExit as exit:
        return int(exit.code or 0)


def test_help_lists_the_commands_and_imports_none_of_them():
    script = (
        "import sys; from jax_nvfp4.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: code = e.code\n"
        "loaded = [m for m in sys.modules if m.startswith('jax_nvfp4.cli.')]\n"
        "assert code == 0 and not loaded, loaded"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    for command, summary in COMMANDS.items():
        assert command in result.stdout
        assert summary in result.stdout


def test_module_runs():
    result = subprocess.run(
        [sys.executable, "-m", "jax_nvfp4", "info"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_LOG_COMPILES": "0"},
    )
    assert result.returncode == 0, result.stderr
    assert f"jax_nvfp4 {jax_nvfp4.__version__}, jax {jax.__version__}" in result.stdout
    assert f"numpy {np.__version__}" in result.stdout
    assert platform.platform() in result.stdout
    assert "\nJAX_LOG_COMPILES=0\n" in result.stdout
    assert "arch reference" in result.stdout
    assert result.stdout.count("\n  ok ") == 7
    assert result.stdout.endswith("\npassed\n")


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"jax_nvfp4 {jax_nvfp4.__version__}\n"


@pytest.mark.parametrize("command", ["info", "quantize"])
def test_help_of_a_command(command, capsys):
    assert exit_code(command, "--help") == 0
    assert f"jax_nvfp4 {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("info", "--nonsense"), ("quantize",), ("quantize", "a"), ("--wrong",)],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(arguments, capsys):
    assert exit_code(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("jax_nvfp4")
    assert ": error: " in err
    assert err.count("\n") == 1


def test_interrupt(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "checks", interrupt)
    assert exit_code("info") == 130
    assert capsys.readouterr().err == "jax_nvfp4: interrupted\n"


# --- the self-test can fail ------------------------------------------------------------------


def failed_checks(capsys) -> list[str]:
    assert exit_code("info") == 1
    out = capsys.readouterr().out
    assert out.endswith("\nFAILED\n")
    return [line.split("FAIL ")[1] for line in out.splitlines() if line.startswith("  FAIL")]


def test_selftest_finds_a_wrong_bit(monkeypatch, capsys):
    right = jax_nvfp4.quantize

    def wrong(x, **options):
        t = right(x, **options)
        flipped = t.data.at[..., 0, 0].set(t.data[..., 0, 0] ^ 8)  # a sign
        return jax_nvfp4.Nvfp4Tensor(flipped, t.block_scale, t.global_scale)

    monkeypatch.setattr(jax_nvfp4, "quantize", wrong)
    line = failed_checks(capsys)[0]
    assert line.startswith("quantize")
    assert line.endswith("1 codes differ")


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_selftest_finds_a_wrong_product(error, monkeypatch, capsys):
    right = jax_nvfp4.linear

    def wrong(*arguments, **options):
        y = right(*arguments, **options)
        return y.at[-1, -1].add(error)

    monkeypatch.setattr(jax_nvfp4, "linear", wrong)
    lines = failed_checks(capsys)
    assert len([line for line in lines if "float32" in line]) == 3
    assert all(line.startswith("linear") for line in lines)
