# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m jax_nvfp4 info | quantize | bench | report`.

Each command is a module of this package with `add_parser(commands)`, which adds its arguments, and
`run(args)`, which returns the exit code. Only the module of the command at hand is imported.

Exit codes: 0 success, 1 the command ran and found a failure, 2 bad input (one line on stderr says
what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from jax_nvfp4._version import __version__

COMMANDS = {
    "info": "show versions, devices and kernels, and run a self-test",
    "quantize": "quantize a safetensors checkpoint to NVFP4",
    "bench": "measure the speed of the linear layer and the quantizer",
    "report": "run all that tells how the kernels do on this GPU, into one file",
}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(prog="jax_nvfp4", description="NVFP4 quantization and linear layers for JAX.")
    parser.add_argument("--version", action="version", version=f"jax_nvfp4 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((a for a in arguments if not a.startswith("-")), None)
    module = None
    for name, summary in COMMANDS.items():
        if name == chosen:
            module = importlib.import_module(f"jax_nvfp4.cli.{name}")
            module.add_parser(commands)
        else:
            commands.add_parser(name, help=summary)
    args = parser.parse_args(arguments)
    assert module is not None  # parse_args has refused any other command
    try:
        return module.run(args)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BadInputError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2


class BadInputError(Exception):
    """What the user gave cannot be used; the message is one line for stderr."""
