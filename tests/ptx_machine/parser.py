# SPDX-License-Identifier: Apache-2.0
"""Parser of PTX text into functions of flat instruction lists.

Nested ``{ ... }`` scopes (inline assembly opens them) are flattened: registers and labels declared
in a scope get names that are unique in the function, so that later stages see one name space.
"""

from __future__ import annotations

import bisect
import re
import struct
from dataclasses import dataclass, field

from .errors import PtxSyntaxError

TYPE_BYTES = {
    "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "tf32": 4, "f16x2": 4, "bf16x2": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8, "b128": 16, "pred": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Reg:
    """A register operand; ``negated`` for ``!%p``."""

    name: str
    negated: bool = False


@dataclass(frozen=True)
class Imm:
    """An immediate: ``bits`` for 0f/0d literals, else a Python int or float."""

    value: int | float
    float_bits: int = 0  # 32 or 64 when the literal gives the bits of a float


@dataclass(frozen=True)
class Sym:
    """A symbol (variable, function or label) with a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Vec:
    """``{a, b, ...}``."""

    items: tuple


@dataclass(frozen=True)
class Mem:
    """``[base + offset]`` and the tensor form ``[base, {coords}]``."""

    base: object
    offset: int = 0
    extra: tuple = ()


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: object
    second: object


@dataclass(frozen=True)
class Discard:
    """``_``: a destination that is not kept."""


@dataclass
class Instruction:
    """One instruction with its operands resolved to operand objects."""

    opcode: str
    operands: list
    line: int
    text: str
    guard: Reg | None = None

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Variable:
    """A module- or function-scope variable or parameter."""

    name: str
    space: str
    size: int
    align: int
    data: bytes | None = None


@dataclass
class Function:
    """A parsed ``.entry`` or ``.func``."""

    name: str
    is_entry: bool
    params: list[Variable]
    returns: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)
    variables: list[Variable] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    branch_targets: dict[str, list[str]] = field(default_factory=dict)
    directives: dict[str, list[int]] = field(default_factory=dict)
    line: int = 0


@dataclass
class Module:
    """A parsed PTX file."""

    version: str
    target: str
    functions: dict[str, Function]
    variables: list[Variable]
    lines: list[str]

    def entry(self, name: str | None) -> Function:
        """Returns the named kernel, or the only one."""
        entries = [f for f in self.functions.values() if f.is_entry]
        if name is not None:
            for function in entries:
                if function.name == name:
                    return function
            raise PtxSyntaxError(f"no kernel {name!r}; the module has {[f.name for f in entries]}")
        if len(entries) != 1:
            raise PtxSyntaxError(f"name one of the kernels {[f.name for f in entries]}")
        return entries[0]


_IDENT = r"[A-Za-z_$%][\w$%]*"
_LABEL = re.compile(rf"({_IDENT})\s*:(?!:)")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_NUMBER = re.compile(r"^[+-]?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uU]?$")
_FLOAT = re.compile(r"^[+-]?(\d+\.\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|\d+[eE][+-]?\d+)$")
_VARIABLE = re.compile(
    rf"^(?P<mods>(?:\.[\w:]+(?:\s+\d+)?\s+)*)(?P<name>{_IDENT})\s*(?P<dims>(?:\[[^\]]*\])*)"
    r"(?:\s*=\s*(?P<init>.*))?$",
    re.S,
)


def parse_int(text: str) -> int:
    """Parses a PTX integer literal."""
    text = text.strip().rstrip("uU") if not text.strip().lower().startswith("0x") else text.strip()
    text = text.rstrip("uU")
    sign = -1 if text.startswith("-") else 1
    body = text.lstrip("+-")
    if len(body) > 1 and body[0] == "0" and body[1:].isdigit():
        return sign * int(body, 8)
    return sign * int(body, 0)


def split_top(text: str, separator: str = ",") -> list[str]:
    """Splits at separators outside of brackets, braces and parentheses."""
    if not any(c in text for c in "{[("):
        return [part.strip() for part in text.split(separator)] if text.strip() else []
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        if char in "{[(":
            depth += 1
        elif char in "}])":
            depth -= 1
        elif char == separator and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    tail = text[start:].strip()
    if tail or parts:
        parts.append(tail)
    return parts


class _Scope:
    """Names visible in one ``{ ... }``: PTX name to unique name."""

    def __init__(self, parent: _Scope | None, suffix: str) -> None:
        self.parent, self.suffix = parent, suffix
        self.names: dict[str, str] = {}
        self.ranges: list[tuple[str, int]] = []

    def lookup(self, name: str) -> str | None:
        scope: _Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            for prefix, count in scope.ranges:
                if name.startswith(prefix):
                    digits = name[len(prefix) :]
                    if digits.isdigit() and int(digits) < count:
                        return name + scope.suffix
            scope = scope.parent
        return None


class _Parser:
    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        # Comments become blanks of the same number of lines, so that line numbers stay true.
        self.text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)
        self.starts = [0]
        for match in re.finditer("\n", self.text):
            self.starts.append(match.end())
        self.pos = 0
        self.functions: dict[str, Function] = {}
        self.variables: list[Variable] = []
        self.version = self.target = ""
        self.scope_count = 0
        self.registers_in_function: dict[str, str] = {}

    def line_of(self, pos: int) -> int:
        return bisect.bisect_right(self.starts, pos)

    def fail(self, message: str, pos: int | None = None) -> PtxSyntaxError:
        line = self.line_of(self.pos if pos is None else pos)
        return PtxSyntaxError(f"PTX line {line}: {message}: {self.lines[line - 1].strip()}")

    def skip_space(self) -> bool:
        while self.pos < len(self.text) and self.text[self.pos].isspace():
            self.pos += 1
        return self.pos < len(self.text)

    def until(self, chars: str) -> str:
        start = self.pos
        while self.pos < len(self.text) and self.text[self.pos] not in chars:
            self.pos += 1
        if self.pos >= len(self.text):
            raise self.fail(f"expected one of {chars!r}", start)
        return self.text[start : self.pos]

    # -- module level ------------------------------------------------------------------------
    def module(self) -> Module:
        while self.skip_space():
            start = self.pos
            rest = self.text[self.pos : self.pos + 200]
            if rest.startswith((".version", ".target", ".address_size")):
                end = self.text.find("\n", self.pos)
                end = len(self.text) if end < 0 else end
                words = self.text[self.pos : end].split(None, 1)
                if words[0] == ".version":
                    self.version = words[1].strip()
                elif words[0] == ".target":
                    self.target = words[1].split(",")[0].strip()
                self.pos = end
            elif rest.startswith((".file", ".loc ", ".loc\t", ".section")):
                if rest.startswith(".section"):
                    self.until("{")
                    self.until("}")
                    self.pos += 1
                else:
                    end = self.text.find("\n", self.pos)
                    self.pos = len(self.text) if end < 0 else end
            elif re.match(r"(\.(visible|extern|weak|common)\s+)*\.(entry|func)\b", rest):
                self.function()
            elif rest.startswith("."):
                statement = self.until(";")
                self.pos += 1
                if statement.startswith((".alias", ".pragma")):
                    continue
                self.variables.append(self.variable(statement, start))
            else:
                raise self.fail("unexpected text")
        return Module(self.version, self.target, self.functions, self.variables, self.lines)

    def variable(self, statement: str, pos: int) -> Variable:
        match = _VARIABLE.match(statement.strip())
        if not match:
            raise self.fail(f"cannot parse declaration {statement.strip()!r}", pos)
        mods = re.findall(r"\.([\w:]+)(?:\s+(\d+))?", match["mods"])
        space, size, align, vector = "", 0, 0, 1
        # `.ptr` and what follows it describe what a kernel parameter points to.
        pointee = [name for name, _ in mods].index("ptr") if ("ptr", "") in mods else len(mods)
        for name, number in mods[:pointee]:
            if name in ("global", "const", "shared", "local", "param", "shared::cta"):
                space = "shared" if name.startswith("shared") else name
            elif name == "align":
                align = int(number)
            elif name in ("v2", "v4", "v8"):
                vector = int(name[1:])
            elif name in TYPE_BYTES:
                size = TYPE_BYTES[name]
            elif name not in ("extern", "visible", "weak", "common", "attribute"):
                raise self.fail(f"unknown directive .{name}", pos)
        element = size
        count = vector
        for dim in re.findall(r"\[([^\]]*)\]", match["dims"]):
            count *= parse_int(dim) if dim.strip() else 0
        data = None
        if match["init"]:
            values = [v for v in re.split(r"[{},\s]+", match["init"]) if v]
            data = b"".join(self.initializer(v, element) for v in values)
            data = data.ljust(element * max(count, len(values)), b"\0")
            count = max(count, len(values))
        return Variable(match["name"], space, element * count, align or element, data)

    def initializer(self, text: str, size: int) -> bytes:
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", text):
            return int(text[2:], 16).to_bytes(4, "little")
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", text):
            return int(text[2:], 16).to_bytes(8, "little")
        if _FLOAT.match(text):
            return struct.pack("<f" if size == 4 else "<d", float(text))
        return (parse_int(text) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")

    # -- functions ---------------------------------------------------------------------------
    def function(self) -> None:
        start = self.pos
        head = self.until("({;")
        is_entry = ".entry" in head
        returns: list[Variable] = []
        params: list[Variable] = []
        words = head.split()
        name = words[-1] if not words[-1].startswith(".") else ""
        groups = []
        if self.text[self.pos] == "(":
            groups.append(self.parenthesized())
        if not name:
            self.skip_space()
            name = re.match(_IDENT, self.text[self.pos :]).group()  # type: ignore[union-attr]
            self.pos += len(name)
            returns = self.parameters(groups.pop(), start)
            self.skip_space()
            if self.text[self.pos] == "(":
                groups.append(self.parenthesized())
        if groups:
            params = self.parameters(groups[0], start)
        function = Function(name, is_entry, params, returns, line=self.line_of(start))
        tail = self.until("{;")
        for match in re.finditer(r"\.(\w+)((?:[ \t]*,?[ \t]*\d+)*)", tail):
            numbers = [int(n) for n in re.findall(r"\d+", match[2])]
            function.directives[match[1]] = numbers
        if self.text[self.pos] == ";":
            self.pos += 1
            self.functions.setdefault(name, function)
            return
        self.pos += 1
        self.body(function)
        self.functions[name] = function

    def parenthesized(self) -> str:
        depth, start = 0, self.pos
        while True:
            char = self.text[self.pos]
            depth += char == "("
            depth -= char == ")"
            self.pos += 1
            if depth == 0:
                return self.text[start + 1 : self.pos - 1]

    def parameters(self, text: str, pos: int) -> list[Variable]:
        return [self.variable(part, pos) for part in split_top(text) if part]

    def body(self, function: Function) -> None:
        # First pass: scopes, declarations, labels; operands are resolved once the scope is
        # complete, because a branch may name a label that comes later.
        scope = _Scope(None, "")
        self.registers_in_function = function.registers
        for param in function.params + function.returns:
            scope.names[param.name] = param.name
        pending: list[tuple[int, str, _Scope, int]] = []
        while True:
            if not self.skip_space():
                raise self.fail("function without end")
            start, char = self.pos, self.text[self.pos]
            if char == "{":
                self.scope_count += 1
                scope = _Scope(scope, f"~{self.scope_count}")
                self.pos += 1
                continue
            if char == "}":
                self.pos += 1
                if scope.parent is None:
                    break
                scope = scope.parent
                continue
            label = _LABEL.match(self.text, self.pos)
            if label:
                self.pos = label.end()
                unique = label[1] + scope.suffix
                scope.names[label[1]] = unique
                function.labels[unique] = len(pending)
                # `ts: .branchtargets a, b;` names a table for brx.idx.
                if self.skip_space() and self.text.startswith(".branchtargets", self.pos):
                    statement = self.until(";")
                    self.pos += 1
                    names = split_top(statement[len(".branchtargets") :])
                    function.branch_targets[unique] = [n + scope.suffix for n in names]
                continue
            if char == ".":
                if self.text.startswith((".loc ", ".loc\t", ".file"), self.pos):
                    end = self.text.find("\n", self.pos)
                    self.pos = end
                    continue
                statement = self.until(";")
                self.pos += 1
                if statement.startswith(".reg"):
                    self.registers(statement, scope, function, start)
                elif not statement.startswith((".pragma", ".callprototype")):
                    variable = self.variable(statement, start)
                    scope.names[variable.name] = variable.name + scope.suffix
                    variable.name += scope.suffix
                    function.variables.append(variable)
                continue
            statement = self.until(";")
            self.pos += 1
            pending.append((start, statement, scope, len(pending)))
        for start, statement, where, _ in pending:
            function.instructions.append(self.instruction(start, statement, where, function))

    def registers(self, statement: str, scope: _Scope, function: Function, pos: int) -> None:
        words = statement.split(None, 2)
        if len(words) < 3:
            raise self.fail("cannot parse .reg", pos)
        kind = words[1].lstrip(".")
        if kind not in TYPE_BYTES:
            raise self.fail(f"unknown register type .{kind}", pos)
        for name in split_top(words[2]):
            match = re.match(rf"({_IDENT})(?:<(\d+)>)?$", name)
            if not match:
                raise self.fail(f"cannot parse register {name!r}", pos)
            if match[2]:
                scope.ranges.append((match[1], int(match[2])))
                function.registers[match[1] + "*" + scope.suffix] = kind
                for i in range(int(match[2])):
                    function.registers[f"{match[1]}{i}{scope.suffix}"] = kind
            else:
                scope.names[match[1]] = match[1] + scope.suffix
                function.registers[match[1] + scope.suffix] = kind

    def instruction(
        self, start: int, statement: str, scope: _Scope, function: Function
    ) -> Instruction:
        text = " ".join(statement.split())
        line = self.line_of(start)
        guard = None
        rest = text
        if rest.startswith("@"):
            match = re.match(rf"@(!?)\s*({_IDENT})\s+(.*)$", rest)
            if not match:
                raise self.fail("cannot parse guard", start)
            name = scope.lookup(match[2])
            if name is None:
                raise self.fail(f"unknown predicate {match[2]}", start)
            guard = Reg(name, bool(match[1]))
            rest = match[3]
        words = rest.split(None, 1)
        opcode = words[0]
        arguments = words[1] if len(words) > 1 else ""
        operands = [self.operand(a, scope, start) for a in split_top(arguments)]
        return Instruction(opcode, operands, line, text, guard)

    def operand(self, text: str, scope: _Scope, pos: int) -> object:
        text = text.strip()
        if text == "_":
            return Discard()
        if text.startswith("{"):
            return Vec(tuple(self.operand(t, scope, pos) for t in split_top(text[1:-1])))
        if text.startswith("("):
            return Vec(tuple(self.operand(t, scope, pos) for t in split_top(text[1:-1])))
        if text.startswith("["):
            inner = split_top(text[1:-1])
            base = self.operand(inner[0], scope, pos)
            extra = tuple(self.operand(t, scope, pos) for t in inner[1:])
            if isinstance(base, Pair):  # [reg+offset] parses as a sum below
                raise self.fail("bad address", pos)
            if isinstance(base, tuple):
                return Mem(base[0], base[1], extra)
            if isinstance(base, Sym):
                return Mem(Sym(base.name), base.offset, extra)
            return Mem(base, 0, extra)
        if "|" in text:
            first, second = text.split("|", 1)
            return Pair(self.operand(first, scope, pos), self.operand(second, scope, pos))
        if text.startswith("!"):
            inner_reg = self.operand(text[1:], scope, pos)
            assert isinstance(inner_reg, Reg)
            return Reg(inner_reg.name, True)
        if re.match(r"^[+-]?0[fF][0-9a-fA-F]{8}$", text):
            bits = int(text[-8:], 16) ^ (0x80000000 if text[0] == "-" else 0)
            return Imm(bits, 32)
        if re.match(r"^[+-]?0[dD][0-9a-fA-F]{16}$", text):
            bits = int(text[-16:], 16) ^ ((1 << 63) if text[0] == "-" else 0)
            return Imm(bits, 64)
        if _NUMBER.match(text):
            return Imm(parse_int(text))
        if _FLOAT.match(text):
            return Imm(float(text))
        match = re.match(rf"^({_IDENT}(?:\.[xyzw])?)\s*(?:([+-])\s*(-?\w+))?$", text)
        if not match:
            raise self.fail(f"cannot parse operand {text!r}", pos)
        name, offset = match[1], 0
        if match[3] is not None:
            offset = parse_int(match[3]) * (-1 if match[2] == "-" else 1)
        if name.startswith("%") and scope.lookup(name) is None:
            return (Reg(name), offset) if match[3] else Reg(name)  # special register
        unique = scope.lookup(name)
        if unique is not None and unique in self.registers_in_function:
            return (Reg(unique), offset) if match[3] is not None else Reg(unique)
        return Sym(unique or name, offset)


def parse(text: str) -> Module:
    """Parses PTX text.

    Raises:
        PtxSyntaxError: the text is not PTX that the parser understands.
    """
    return _Parser(text).module()
