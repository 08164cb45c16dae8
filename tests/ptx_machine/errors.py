# SPDX-License-Identifier: Apache-2.0
"""Errors of the PTX machine; each names the PTX line it comes from."""

from __future__ import annotations


class PtxError(Exception):
    """Base class of everything the machine raises on purpose."""


class PtxSyntaxError(PtxError):
    """The PTX text cannot be parsed, or holds an instruction the machine does not know."""


class PtxRuntimeError(PtxError):
    """The program did something a GPU forbids or leaves undefined.

    Attributes:
        line: 1-based line of the PTX text.
        text: the source text of the instruction.
        where: CTA and warp.
    """

    def __init__(self, message: str, line: int = 0, text: str = "", where: str = "") -> None:
        self.message, self.line, self.text, self.where = message, line, text, where
        place = f" [PTX line {line}: {text.strip()}]" if line else ""
        agent = f" in {where}" if where else ""
        super().__init__(f"{message}{agent}{place}")


class DeadlockError(PtxRuntimeError):
    """No warp can run and no asynchronous operation is pending."""


class Fault(Exception):  # noqa: N818 (never seen outside of the machine)
    """Raised inside an instruction; the scheduler adds the PTX line and re-raises."""
