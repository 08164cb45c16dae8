# SPDX-License-Identifier: Apache-2.0
"""Planted faults: mutants of PTX text, made by structural rules.

Each rule yields mutants that differ from the original in one place. A test runs them all and counts
those that the machine reports or whose result is wrong. Some mutants are equivalent to the original
(a fence that orders nothing, a wait that another implies): the count is a rate and no verdict on
single ones. Rules that find nothing in a kernel yield nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_STATEMENT = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z][\w.:]*)")


@dataclass(frozen=True)
class Mutant:
    """A changed program.

    Attributes:
        rule: which rule made it.
        line: 1-based line of the change.
        before, after: the line's text.
        text: the whole PTX.
    """

    rule: str
    line: int
    before: str
    after: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule} at line {self.line}: {self.before.strip()[:90]}"


def _opcode(line: str) -> str:
    match = _STATEMENT.match(line)
    return match[1] if match else ""


def _replace(lines: list[str], index: int, after: str, rule: str) -> Mutant:
    changed = [*lines[:index], after, *lines[index + 1 :]]
    return Mutant(rule, index + 1, lines[index], after, "\n".join(changed))


def _each(text: str, prefixes: tuple[str, ...]) -> Iterator[tuple[list[str], int, str]]:
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if _opcode(line).startswith(prefixes):
            yield lines, i, line


def _drop(rule: str, *prefixes: str) -> Callable[[str], Iterator[Mutant]]:
    """Rule that removes one instruction at a time."""

    def mutate(text: str) -> Iterator[Mutant]:
        for lines, i, line in _each(text, prefixes):
            indent = line[: len(line) - len(line.lstrip())]
            yield _replace(lines, i, f"{indent}// dropped", rule)

    return mutate


def drop_wait(text: str) -> Iterator[Mutant]:
    """An mbarrier wait that lets everyone through: its predicate is made true.

    Loops around ``try_wait`` then run once, whatever the barrier's phase.
    """
    for lines, i, line in _each(text, ("mbarrier.try_wait", "mbarrier.test_wait")):
        match = re.match(r"^(\s*(?:@!?%?\w+\s+)?)mbarrier\.\S+\s+(%?\w+)\s*,", line)
        if match:
            after = f"{match[1]}setp.eq.u32 {match[2]}, 0, 0;"
            yield _replace(lines, i, after, "drop_wait")


def wrong_parity(text: str) -> Iterator[Mutant]:
    """An mbarrier wait for the other phase (where the parity is a register, xored with 1)."""
    for lines, i, line in _each(text, ("mbarrier.try_wait.parity", "mbarrier.test_wait.parity")):
        match = re.match(r"^(.*\],\s*)(%\w+|\d)(\s*[,;].*)$", line)
        if not match:
            continue
        if match[2].isdigit():
            after = f"{match[1]}{1 - int(match[2])}{match[3]}"
        else:
            flip = f"xor.b32 {match[2]}, {match[2]}, 1;"
            after = f"{flip} {line.strip()} {flip}"
        yield _replace(lines, i, after, "wrong_parity")


def wrong_bytes(text: str) -> Iterator[Mutant]:
    """expect_tx of 16 bytes more or fewer, through the register that holds the count."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        match = re.search(r"expect_tx\S*\s+(?:%?\w+,\s*)?\[[^\]]*\],\s*(%\w+|\d+)\s*;", line)
        if not match:
            continue
        count = match[1]
        guard = re.match(r"^\s*(@!?%?\w+\s+)?", line)
        prefix = (guard[1] or "") if guard else ""
        for step in (-16, 16):
            if count.isdigit():
                after = line.replace(match[0], match[0].replace(count, str(int(count) + step)))
            else:
                change = f"{prefix}add.s32 {count}, {count}, {step};"
                undo = f"{prefix}add.s32 {count}, {count}, {-step};"
                after = f"{change} {line.strip()} {undo}"
            yield _replace(lines, i, after, "wrong_bytes")


def wrong_arrival_count(text: str) -> Iterator[Mutant]:
    """mbarrier.init with one arrival more."""
    for lines, i, line in _each(text, ("mbarrier.init",)):
        match = re.match(r"^(.*\],\s*)(%\w+|\d+)\s*;(.*)$", line)
        if not match:
            continue
        if match[2].isdigit():
            after = f"{match[1]}{int(match[2]) + 1};{match[3]}"
        else:
            step = f"add.s32 {match[2]}, {match[2]}"
            after = f"{step}, 1; {line.strip()} {step}, -1;"
        yield _replace(lines, i, after, "wrong_arrival_count")


def loop_bound(text: str) -> Iterator[Mutant]:
    """An off-by-one in a loop: the comparison that decides a backward branch."""
    lines = text.split("\n")
    labels = {m[1]: i for i, t in enumerate(lines) if (m := re.match(r"^\s*(\$?\w+):", t))}
    for i, line in enumerate(lines):
        branch = re.match(r"^\s*@!?(%p\d+)\s+bra(?:\.uni)?\s+(\$?\w+);", line)
        if not branch or labels.get(branch[2], i) >= i:
            continue
        for j in range(i - 1, max(i - 40, -1), -1):
            compare = re.match(
                rf"^(\s*setp\.\w+\.([su](?:32|64)|b(?:32|64))\s+{re.escape(branch[1])},\s*"
                r"(%\w+),\s*)(%\w+|-?\d+)\s*;",
                lines[j],
            )
            if not compare:
                continue
            kind = "s64" if compare[2].endswith("64") else "s32"
            if compare[4].lstrip("-").isdigit():
                after = f"{compare[1]}{int(compare[4]) - 1};"
            else:
                step = f"add.{kind} {compare[4]}, {compare[4]}"
                after = f"{step}, -1; {lines[j].strip()} {step}, 1;"
            yield _replace(lines, j, after, "loop_bound")
            break


def shift_coordinate(text: str) -> Iterator[Mutant]:
    """A tensor copy of the neighboring box: one coordinate off by one."""
    for lines, i, line in _each(text, ("cp.async.bulk.tensor",)):
        match = re.search(r"\{([^}]*)\}", line)
        if not match:
            continue
        for axis, operand in enumerate(c.strip() for c in match[1].split(",")):
            guard = re.match(r"^\s*(@!?%?\w+\s+)?", line)
            prefix = (guard[1] or "") if guard else ""
            if operand.startswith("%"):
                step = f"{prefix}add.s32 {operand}, {operand}"
                after = f"{step}, 1; {line.strip()} {step}, -1;"
            else:
                parts = [c.strip() for c in match[1].split(",")]
                parts[axis] = str(int(operand) + 1)
                after = line.replace(match[0], "{" + ", ".join(parts) + "}")
            yield _replace(lines, i, after, "shift_coordinate")


def _swap_last_offset(lines: list[str], i: int, line: str, rule: str, step: int) -> Mutant | None:
    """Adds ``step`` to the register or offset of the last memory operand."""
    matches = list(re.finditer(r"\[(%\w+)(?:\+(-?\d+))?\]", line))
    if not matches:
        return None
    last = matches[-1]
    offset = int(last[2] or 0) + step
    after = f"{line[: last.start()]}[{last[1]}+{offset}]{line[last.end() :]}"
    return _replace(lines, i, after, rule)


def scale_column(text: str) -> Iterator[Mutant]:
    """Scale factors of the neighboring column (tcgen05), or the other thread pair (mma.sync)."""
    for lines, i, line in _each(text, ("tcgen05.mma",)):
        if "block_scale" in line and (
            mutant := _swap_last_offset(lines, i, line, "scale_column", 1)
        ):
            yield mutant
    for lines, i, line in _each(text, ("tcgen05.cp",)):
        match = re.search(r"\[(%\w+)(?:\+(-?\d+))?\]", line)
        if match:
            moved = f"[{match[1]}+{int(match[2] or 0) + 4}]"
            after = line[: match.start()] + moved + line[match.end() :]
            yield _replace(lines, i, after, "scale_column")
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if not _opcode(line).startswith("mma.sync") or "block_scale" not in line:
            continue
        # The operands may go on for several lines: {sa}, {byte, thread}, {sb}, {byte, thread};
        end = next((j for j in range(i, min(i + 12, len(lines))) if ";" in lines[j]), i)
        for j in range(i, end + 1):
            match = re.search(r"(\{\s*%\w+\s*,\s*)(%\w+)(\s*\}\s*;)", lines[j])
            if match:
                flip = f"xor.b16 {match[2]}, {match[2]}, 1;"
                first = f"{flip} {lines[i].strip()}"
                changed = list(lines)
                changed[i] = first
                changed[end] = f"{changed[end]} {flip}"
                yield Mutant("scale_column", i + 1, lines[i], first, "\n".join(changed))
                break


def accumulate_flag(text: str) -> Iterator[Mutant]:
    """The first k-step accumulates on what was there, or the others forget it."""
    for lines, i, line in _each(text, ("tcgen05.mma",)):
        match = re.search(r",\s*(%p\d+)\s*;", line)
        if match:
            after = (
                f"not.pred {match[1]}, {match[1]}; {line.strip()} not.pred {match[1]}, {match[1]};"
            )
            yield _replace(lines, i, after, "accumulate_flag")


def drop_predicate(text: str) -> Iterator[Mutant]:
    """A guarded global access or copy loses its bounds check."""
    for lines, i, line in _each(text, ("ld.global", "st.global", "cp.async", "red.global")):
        match = re.match(r"^(\s*)@!?%?\w+\s+(.*)$", line)
        if match and "_group" not in match[2]:
            yield _replace(lines, i, match[1] + match[2], "drop_predicate")


RULES: dict[str, Callable[[str], Iterator[Mutant]]] = {
    "drop_proxy_fence": _drop("drop_proxy_fence", "fence.proxy.async"),
    "drop_barrier": _drop("drop_barrier", "bar.sync", "barrier.sync", "barrier.cta.sync"),
    "drop_cluster_barrier": _drop("drop_cluster_barrier", "barrier.cluster.wait"),
    "drop_wait": drop_wait,
    "wrong_parity": wrong_parity,
    "drop_arrive": _drop("drop_arrive", "mbarrier.arrive.shared", "mbarrier.arrive.release"),
    "wrong_bytes": wrong_bytes,
    "wrong_arrival_count": wrong_arrival_count,
    "drop_bulk_wait": _drop("drop_bulk_wait", "cp.async.bulk.wait_group"),
    "drop_async_wait": _drop("drop_async_wait", "cp.async.wait_group", "cp.async.wait_all"),
    "drop_wgmma_wait": _drop("drop_wgmma_wait", "wgmma.wait_group"),
    "drop_wgmma_fence": _drop("drop_wgmma_fence", "wgmma.fence"),
    "drop_mma": _drop("drop_mma", "tcgen05.mma", "wgmma.mma_async"),
    "drop_commit": _drop("drop_commit", "tcgen05.commit", "wgmma.commit_group"),
    "drop_tmem_wait": _drop("drop_tmem_wait", "tcgen05.wait"),
    "leak_tmem": _drop("leak_tmem", "tcgen05.dealloc"),
    "drop_scale_copy": _drop("drop_scale_copy", "tcgen05.cp"),
    "drop_copy": _drop("drop_copy", "cp.async.bulk.tensor"),
    "drop_store": _drop("drop_store", "st.global"),
    "drop_shared_store": _drop("drop_shared_store", "st.shared", "stmatrix"),
    "loop_bound": loop_bound,
    "shift_coordinate": shift_coordinate,
    "scale_column": scale_column,
    "accumulate_flag": accumulate_flag,
    "drop_predicate": drop_predicate,
}


def mutants(
    text: str, rules: tuple[str, ...] | None = None, lines: set[int] | None = None
) -> Iterator[Mutant]:
    """All mutants of a PTX text.

    Args:
        text: the PTX.
        rules: names out of ``RULES``; all by default.
        lines: only changes on these lines, such as the ones a test's runs executed.
    """
    for name in rules or tuple(RULES):
        for mutant in RULES[name](text):
            if lines is None or mutant.line in lines:
                yield mutant


def sample(
    text: str,
    count: int,
    seed: int = 0,
    rules: tuple[str, ...] | None = None,
    lines: set[int] | None = None,
) -> list[Mutant]:
    """``count`` mutants, spread evenly over the rules that find something."""
    rng = random.Random(seed)
    groups = [list(mutants(text, (name,), lines)) for name in rules or tuple(RULES)]
    for group in groups:
        rng.shuffle(group)
    chosen: list[Mutant] = []
    while len(chosen) < count and any(groups):
        for group in groups:
            if group and len(chosen) < count:
                chosen.append(group.pop())
    return chosen
