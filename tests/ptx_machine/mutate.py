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
from dataclasses import dataclass, field

_STATEMENT = re.compile(r"^\s*(?:@!?%?\w+\s+)?([a-z][\w.:]*)")


@dataclass(frozen=True)
class Mutant:
    """A changed program.

    Attributes:
        rule: which rule made it.
        line: 1-based line of the change.
        before, after: the line's text.
        lines: the original's lines.
        also: further lines that change, by their index, and what they become.
    """

    rule: str
    line: int
    before: str
    after: str
    lines: list[str] = field(repr=False, compare=False)
    also: tuple[tuple[int, str], ...] = ()

    @property
    def text(self) -> str:
        """The whole PTX; made when asked for, since a kernel has thousands of mutants."""
        changed = list(self.lines)
        for index, line in ((self.line - 1, self.after), *self.also):
            changed[index] = line
        return "\n".join(changed)

    def __str__(self) -> str:
        return f"{self.rule} at line {self.line}: {self.before.strip()[:90]}"


def _opcode(line: str) -> str:
    match = _STATEMENT.match(line)
    return match[1] if match else ""


def _replace(lines: list[str], index: int, after: str, rule: str) -> Mutant:
    return Mutant(rule, index + 1, lines[index], after, lines)


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
    wait = r"\bmbarrier\.(?:try|test)_wait\.\S+\s+(%?\w+)\s*,[^;]*;"
    lines = text.split("\n")
    for i, line in enumerate(lines):
        after, count = re.subn(wait, r"setp.eq.u32 \1, 0, 0;", line)
        if count:
            yield _replace(lines, i, after, "drop_wait")


def wrong_parity(text: str) -> Iterator[Mutant]:
    """An mbarrier wait for the other phase (where the parity is a register, xored with 1)."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        match = re.match(
            r"^(.*?)(\w+:\s*)?(mbarrier\.(?:try|test)_wait\.parity[^;\]]*\],\s*)(%\w+|\d)(.*)$",
            line,
        )
        if not match:
            continue
        before, label, head, parity, rest = match[1], match[2] or "", match[3], match[4], match[5]
        if parity.isdigit():
            after = f"{before}{label}{head}{1 - int(parity)}{rest}"
        else:
            # The flip is outside of a loop on this line; one over several lines flips each time.
            flip = f"xor.b32 {parity}, {parity}, 1;"
            after = f"{before}{flip} {label}{head}{parity}{rest} {flip}"
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
    """Block scales of a neighbor.

    Of the next column (tcgen05), the other thread pair (mma.sync), the other of two rows (a half
    that is doubled, to multiply by); where scales are stored as bytes, a byte further on.
    """
    lines = text.split("\n")
    for i, line in enumerate(lines):
        match = re.search(r"\{([lh]), \1\};", line)
        if match:
            other = "h" if match[1] == "l" else "l"
            after = line.replace(match[0], "{" + f"{other}, {other}" + "};")
            yield _replace(lines, i, after, "scale_column")
    for lines, i, line in _each(text, ("st.global.u8", "st.global.b8")):
        if mutant := _swap_last_offset(lines, i, line, "scale_column", 1):
            yield mutant
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
            match = re.search(r"(\{\s*\d\s*,\s*)(\d)(\s*\}\s*;)", lines[j])
            if match:  # of the columns, in lanes 0 to 3 of a group of four
                other = f"{match[1]}{int(match[2]) ^ 1}{match[3]}"
                yield _replace(lines, j, lines[j].replace(match[0], other), "scale_column")
                break
            match = re.search(r"(\{\s*%\w+\s*,\s*)(%\w+)(\s*\}\s*;)", lines[j])
            if match:
                flip = f"xor.b16 {match[2]}, {match[2]}, 1;"
                first, last = f"{flip} {lines[i].strip()}", f"{lines[end]} {flip}"
                also = ((end, last),)
                if end == i:
                    first, also = f"{first} {flip}", ()
                yield Mutant("scale_column", i + 1, lines[i], first, lines, also)
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
    for lines, i, line in _each(text, ("wgmma.mma_async",)):
        match = re.search(r"%rd\d+,\s*(%?p\d*)\s*,", line)
        if match:
            after = f"not.pred {match[1]}, {match[1]}; {line.strip()}"
            yield _replace(lines, i, after, "accumulate_flag")


def drop_predicate(text: str) -> Iterator[Mutant]:
    """A guarded instruction loses its guard: a bounds check, or one thread for many."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        match = re.match(r"^(\s*)@!?%?\w+\s+(.*)$", line)
        if match and not match[2].startswith("bra") and "_group" not in match[2]:
            yield _replace(lines, i, match[1] + match[2], "drop_predicate")


def negate_branch(text: str) -> Iterator[Mutant]:
    """A forward branch that is taken where it should not be."""
    lines = text.split("\n")
    labels = {m[1]: i for i, t in enumerate(lines) if (m := re.match(r"^\s*(\$?\w+):", t))}
    for i, line in enumerate(lines):
        match = re.match(r"^(\s*)@(!?)(%p\d+)\s+(bra(?:\.uni)?\s+(\$?\w+);.*)$", line)
        if match and labels.get(match[5], 0) > i:
            negated = "" if match[2] else "!"
            yield _replace(lines, i, f"{match[1]}@{negated}{match[3]} {match[4]}", "negate_branch")


def skip_check(text: str) -> Iterator[Mutant]:
    """A forward branch that is never taken: what it was to skip runs for everybody."""
    lines = text.split("\n")
    labels = {m[1]: i for i, t in enumerate(lines) if (m := re.match(r"^\s*(\$?\w+):", t))}
    for i, line in enumerate(lines):
        match = re.match(r"^\s*@!?%p\d+\s+bra(?:\.uni)?\s+(\$?\w+);", line)
        if match and labels.get(match[1], 0) > i:
            yield _replace(lines, i, "\t// never taken", "skip_check")


def missing_zero(text: str) -> Iterator[Mutant]:
    """A value that is kept where a selection would have put a zero, as in padding."""
    for lines, i, line in _each(text, ("selp.",)):
        match = re.match(r"^\s*selp\.(\w+)\s+(%\w+),\s*([^,;]+),\s*([^,;]+),\s*!?%p\d+;", line)
        if not match:
            continue
        operands = [match[3].strip(), match[4].strip()]
        zero = [o in ("0", "0f00000000") for o in operands]
        kept = operands[zero.index(True) ^ 1] if any(zero) else ""
        if kept.startswith("%"):
            after = f"\tmov.{match[1]} {match[2]}, {kept};"
            yield _replace(lines, i, after, "missing_zero")


_CONSTANT = re.compile(r"(?<=[,\s])(-?\d+)\s*;\s*$")
_WITH_CONSTANTS = (
    "add.s", "sub.s", "mul.", "mad.", "and.b", "or.b", "xor.b", "shl.", "shr.", "setp.", "min.",
    "max.", "div.", "rem.", "mov.b32", "mov.b64", "mov.u32", "lop3.", "prmt.", "shf.",
)  # fmt: skip


def wrong_constant(text: str) -> Iterator[Mutant]:
    """A constant one too large, be it an offset, a mask, a shift, a bound or a descriptor's."""
    for lines, i, line in _each(text, _WITH_CONSTANTS):
        match = _CONSTANT.search(line)
        if match:
            after = f"{line[: match.start(1)]}{int(match[1]) + 1};"
            yield _replace(lines, i, after, "wrong_constant")


def wrong_offset(text: str) -> Iterator[Mutant]:
    """A load or store of the place 16 bytes further on."""
    for lines, i, line in _each(text, ("ld.shared", "st.shared", "ldmatrix", "stmatrix",
                                       "ld.global", "st.global", "mbarrier.arrive",
                                       "mbarrier.init")):  # fmt: skip
        if mutant := _swap_last_offset(lines, i, line, "wrong_offset", 16):
            yield mutant


_OPERATIONS = {
    "add.s": "sub.s", "sub.s": "add.s", "and.b": "or.b", "or.b": "and.b", "and.pred": "or.pred",
    "or.pred": "and.pred", "min.": "max.", "max.s": "min.s", "max.u": "min.u", "max.f": "min.f",
    "shl.": "shr.", "shr.u": "shl.b", "fma.rm": "fma.rp", "fma.rp": "fma.rm", "mul.f32": "add.f32",
    "mul.rn.f32": "add.rn.f32", "add.f32": "mul.f32", "cvt.rn.": "cvt.rz.", "setp.lt": "setp.le",
    "setp.le": "setp.lt", "setp.gt": "setp.ge", "setp.ge": "setp.gt", "setp.eq": "setp.ne",
    "setp.ne": "setp.eq", "mul.rn.bf16x2": "add.rn.bf16x2", "mul.rn.f16x2": "add.rn.f16x2",
}  # fmt: skip


def wrong_operation(text: str) -> Iterator[Mutant]:
    """Another operation: a difference for a sum, the wrong direction of rounding, <= for <."""
    for lines, i, line in _each(text, tuple(_OPERATIONS)):
        opcode = _opcode(line)
        key = max((k for k in _OPERATIONS if opcode.startswith(k)), key=len)
        after = line.replace(key, _OPERATIONS[key], 1)
        if not opcode.startswith("min.NaN") and "satfinite" not in opcode:
            yield _replace(lines, i, after, "wrong_operation")


def swap_operands(text: str) -> Iterator[Mutant]:
    """Two operands exchanged: of a selection, a difference, a vector; the matrices of an MMA."""
    for lines, i, line in _each(text, ("selp.", "sub.", "shl.", "prmt.", "shf.", "div.")):
        match = re.match(r"^(.*?\s%\w+,\s*)([^,;]+),\s*([^,;]+)([,;].*)$", line)
        if match and match[2].strip() != match[3].strip():
            after = f"{match[1]}{match[3]}, {match[2]}{match[4]}"
            yield _replace(lines, i, after, "swap_operands")
    vectors = ("ld.shared.v", "st.shared.v", "ld.global", "st.global.v", "ldmatrix", "stmatrix",
               "mma.sync", "wgmma.mma_async")  # fmt: skip
    for lines, i, line in _each(text, vectors):
        for match in list(re.finditer(r"\{\s*(%\w+)\s*,\s*(%\w+)\s*([,}])", line))[-3:]:
            if match[1] != match[2]:
                swapped = "{" + f"{match[2]}, {match[1]}{match[3]}"
                after = line[: match.start()] + swapped + line[match.end() :]
                yield _replace(lines, i, after, "swap_operands")
    for lines, i, line in _each(text, ("tcgen05.mma",)):
        for first, second in (
            (r"(\],\s*)(%rd\d+)(,\s*)(%rd\d+)", ("a", "b")),
            (r"(,\s*)(\[%\w+\])(,\s*)(\[%\w+\])(?=,\s*%p)", ("sfa", "sfb")),
        ):
            after = re.sub(first, r"\1\4\3\2", line, count=1)
            if after != line and second:
                yield _replace(lines, i, after, "swap_operands")


def wrong_descriptor(text: str) -> Iterator[Mutant]:
    """A bit of a matrix descriptor, or of an instruction descriptor of tcgen05, is wrong."""
    smem_bits = (0, 16, 32, 61, 62)  # address, leading and stride offsets, swizzle
    for lines, i, line in _each(text, ("tcgen05.mma", "tcgen05.cp", "wgmma.mma_async")):
        for register in dict.fromkeys(re.findall(r"%rd\d+", line)):
            for bit in smem_bits:
                flip = f"xor.b64 {register}, {register}, {1 << bit};"
                after = f"{flip} {line.strip()} {flip}"
                yield _replace(lines, i, after, "wrong_descriptor")
        match = re.search(r"%rd\d+,\s*(%r\d+),", line)
        if not match:
            continue
        # Scale factor of B, formats of A and B, N, M, scale factor of A.
        for bit in (4, 7, 10, 17, 20, 27, 28, 29):
            flip = f"xor.b32 {match[1]}, {match[1]}, {1 << bit};"
            yield _replace(lines, i, f"{flip} {line.strip()} {flip}", "wrong_descriptor")


def narrow_scope(text: str) -> Iterator[Mutant]:
    """An arrival, a wait or a fence reaches the CTA alone, and not the cluster."""
    scoped = re.compile(r"\.(release|acquire|acq_rel)(\.sync_restrict::shared::cta)?\.cluster\b")
    lines = text.split("\n")
    for i, line in enumerate(lines):
        if "mbarrier_init" not in line and scoped.search(line):
            yield _replace(lines, i, scoped.sub(r".\1.cta", line, count=1), "narrow_scope")


RULES: dict[str, Callable[[str], Iterator[Mutant]]] = {
    "drop_proxy_fence": _drop("drop_proxy_fence", "fence.proxy.async"),
    "drop_barrier": _drop("drop_barrier", "bar.sync", "barrier.sync", "barrier.cta.sync"),
    "drop_fence": _drop(
        "drop_fence",
        *("fence.mbarrier_init", "fence.acq_rel", "fence.release", "fence.acquire", "fence.sc"),
        *("membar", "tcgen05.fence"),
    ),
    "narrow_scope": narrow_scope,
    "drop_cluster_barrier": _drop("drop_cluster_barrier", "barrier.cluster"),
    "drop_wait": drop_wait,
    "wrong_parity": wrong_parity,
    "drop_arrive": _drop("drop_arrive", "mbarrier.arrive"),
    "wrong_bytes": wrong_bytes,
    "wrong_arrival_count": wrong_arrival_count,
    "drop_bulk_wait": _drop("drop_bulk_wait", "cp.async.bulk.wait_group"),
    "drop_async_wait": _drop("drop_async_wait", "cp.async.wait_group", "cp.async.wait_all"),
    "drop_wgmma_wait": _drop("drop_wgmma_wait", "wgmma.wait_group"),
    "drop_wgmma_fence": _drop("drop_wgmma_fence", "wgmma.fence"),
    "drop_mma": _drop("drop_mma", "tcgen05.mma", "wgmma.mma_async", "mma.sync"),
    "drop_commit": _drop("drop_commit", "tcgen05.commit", "wgmma.commit_group"),
    "drop_tmem_wait": _drop("drop_tmem_wait", "tcgen05.wait"),
    "leak_tmem": _drop("leak_tmem", "tcgen05.dealloc"),
    "drop_scale_copy": _drop("drop_scale_copy", "tcgen05.cp"),
    "drop_copy": _drop("drop_copy", "cp.async.bulk.tensor", "cp.async.bulk.shared"),
    "drop_store": _drop("drop_store", "st.global"),
    "drop_shared_store": _drop("drop_shared_store", "st.shared", "st.async", "stmatrix"),
    "loop_bound": loop_bound,
    "shift_coordinate": shift_coordinate,
    "scale_column": scale_column,
    "accumulate_flag": accumulate_flag,
    "drop_predicate": drop_predicate,
    "negate_branch": negate_branch,
    "skip_check": skip_check,
    "missing_zero": missing_zero,
    "wrong_constant": wrong_constant,
    "wrong_offset": wrong_offset,
    "wrong_operation": wrong_operation,
    "swap_operands": swap_operands,
    "wrong_descriptor": wrong_descriptor,
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
