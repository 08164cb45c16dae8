# SPDX-License-Identifier: Apache-2.0
"""Decoding: each PTX instruction becomes one Python closure, once per kernel.

A closure takes the warp and returns ``None`` (go on), a target index (jump), or one of the negative
codes below. Every operand is an index into the warp's register list ``R``: immediates, special
registers and symbol addresses occupy slots there too, so reading an operand is one list access.
Register values are arrays of 32 lanes and are never modified in place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .errors import PtxSyntaxError
from .parser import (
    TYPE_BYTES,
    Discard,
    Function,
    Imm,
    Instruction,
    Mem,
    Module,
    Pair,
    Reg,
    Sym,
    Vec,
)

if TYPE_CHECKING:
    from .machine import Warp

BLOCK, YIELD, EXIT = -1, -2, -3
WARP = 32
Closure = Callable[["Warp"], "int | None"]
Builder = Callable[["Context", Instruction], Closure]

_BUILDERS: dict[str, Builder] = {}
STORAGE = {1: np.uint16, 2: np.uint16, 4: np.uint32, 8: np.uint64}
where = np.where


def op(*names: str) -> Callable[[Builder], Builder]:
    """Registers the builder of the instructions that start with a name."""

    def register(builder: Builder) -> Builder:
        for name in names:
            _BUILDERS[name] = builder
        return builder

    return register


def storage(kind: str) -> type:
    """NumPy type in which registers of a PTX type are kept."""
    return np.bool_ if kind == "pred" else STORAGE[TYPE_BYTES[kind]]


def immediate_bits(imm: Imm, kind: str) -> int | bool:
    """The bits of an immediate when used as a PTX type."""
    width = 8 * TYPE_BYTES[kind]
    if kind == "pred":
        return bool(imm.value)
    value = imm.value
    if imm.float_bits:
        bits = int(value)
        if imm.float_bits == 64 and width == 32:
            return _float_bits(struct.unpack("<d", bits.to_bytes(8, "little"))[0], 32)
        if imm.float_bits == 32 and width == 64 and kind == "f64":
            return _float_bits(struct.unpack("<f", bits.to_bytes(4, "little"))[0], 64)
        return bits
    if isinstance(value, float) or kind in ("f32", "f64", "f16", "bf16"):
        if kind in ("f16", "bf16") and not isinstance(value, float):
            return int(value) & 0xFFFF
        return _float_bits(float(value), width)
    return int(value) & ((1 << width) - 1)


def _float_bits(value: float, width: int) -> int:
    kind = {16: "<e", 32: "<f", 64: "<d"}[width]
    return int.from_bytes(struct.pack(kind, value), "little")


class Context:
    """Decoder of one function: assigns register slots and builds the closures."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        self.slots: dict[str, int] = {}
        self.initial: list[np.ndarray | None] = []
        self.kinds: dict[str, str] = function.registers
        self.constants: dict[tuple, int] = {}
        self.specials: dict[str, int] = {}
        self.symbols: dict[tuple[str, int], int] = {}
        self.slot_names: dict[int, str] = {}
        self.instruction: Instruction
        self.index = 0
        self.reconverge: list[int] = []
        self.cached: dict = {}
        self.asynchronous: set[int] = set()  # slots that wgmma or tcgen05.ld write
        self.wgmma_operands: set[int] = set()  # slots that wgmma reads A from

    # -- slots -------------------------------------------------------------------------------
    def _new_slot(self, value: np.ndarray | None, name: str) -> int:
        self.initial.append(value)
        self.slot_names[len(self.initial) - 1] = name
        return len(self.initial) - 1

    def reg(self, name: str) -> int:
        """Slot of a declared register."""
        if name not in self.slots:
            if name not in self.kinds:
                raise self.error(f"unknown register {name}")
            kind = self.kinds[name]
            if kind == "pred":
                value = np.zeros(WARP, np.bool_)
            elif kind == "b128":
                value = np.full((WARP, 2), 0xCBCBCBCBCBCBCBCB, np.uint64)
            else:
                size = TYPE_BYTES[kind]
                poison = int.from_bytes(b"\xcb" * max(size, 2), "little")
                value = np.full(WARP, poison, storage(kind))
            self.slots[name] = self._new_slot(value, name)
        return self.slots[name]

    def constant(self, value: int | bool, dtype: type) -> int:
        """Slot of a constant."""
        key = (value, dtype)
        if key not in self.constants:
            self.constants[key] = self._new_slot(np.full(WARP, value, dtype), str(value))
        return self.constants[key]

    def special(self, name: str) -> int:
        """Slot of a special register, filled in when a warp starts."""
        if name not in self.specials:
            self.specials[name] = self._new_slot(None, name)
        return self.specials[name]

    def symbol(self, name: str, offset: int) -> int:
        """Slot of the address of a variable or parameter."""
        key = (name, offset)
        if key not in self.symbols:
            self.symbols[key] = self._new_slot(None, name)
        return self.symbols[key]

    def src(self, operand: object, kind: str) -> int:
        """Slot of a source operand used as a PTX type."""
        if isinstance(operand, Reg):
            if operand.negated:
                raise self.error("negated predicate not expected here")
            return self.reg(operand.name) if operand.name in self.kinds else self._special(operand)
        if isinstance(operand, Imm):
            return self.constant(immediate_bits(operand, kind), storage(kind))
        if isinstance(operand, Sym):
            return self.symbol(operand.name, operand.offset)
        raise self.error(f"cannot use {operand} as a source")

    def _special(self, operand: Reg) -> int:
        return self.special(operand.name)

    def dst(self, operand: object) -> int:
        """Slot of a destination register; -1 for ``_``."""
        if isinstance(operand, Discard):
            return -1
        if isinstance(operand, Reg) and operand.name in self.kinds:
            return self.reg(operand.name)
        raise self.error(f"cannot write {operand}")

    def width(self, operand: object) -> int:
        """Bytes of a register operand, 0 for anything else."""
        if isinstance(operand, Reg) and operand.name in self.kinds:
            return TYPE_BYTES[self.kinds[operand.name]]
        return 0

    def pred(self, operand: object) -> Callable[[list], np.ndarray]:
        """Getter of a predicate that may be negated or constant."""
        if isinstance(operand, Reg) and operand.negated:
            index = self.reg(operand.name)
            return lambda R: ~R[index]
        index = self.src(operand, "pred")
        return lambda R: R[index]

    def address(self, operand: object) -> tuple[int, int]:
        """(slot, byte offset) of a memory operand."""
        if not isinstance(operand, Mem):
            raise self.error(f"expected an address, found {operand}")
        base = operand.base
        if isinstance(base, Reg):
            return self.src(base, "u64"), operand.offset
        if isinstance(base, Sym):
            return self.symbol(base.name, operand.offset), 0
        if isinstance(base, Imm):
            return self.constant(int(base.value), np.uint64), operand.offset
        raise self.error(f"unknown address {operand}")

    def vector(self, operand: object) -> list:
        """The elements of a vector operand, or the operand alone."""
        return list(operand.items) if isinstance(operand, Vec) else [operand]

    def target(self, operand: object) -> int:
        """Instruction index of a label."""
        if not isinstance(operand, Sym) or operand.name not in self.function.labels:
            raise self.error(f"unknown label {operand}")
        return self.function.labels[operand.name]

    def error(self, message: str) -> PtxSyntaxError:
        ins = self.instruction
        return PtxSyntaxError(f"PTX line {ins.line}: {message}: {ins.text}")

    def operand_slots(self, ins: Instruction) -> list[int]:
        """Slots of all registers that an instruction names."""
        slots = []

        def visit(operand: object) -> None:
            if isinstance(operand, Reg):
                if operand.name in self.kinds:
                    slots.append(self.reg(operand.name))
            elif isinstance(operand, Vec):
                for item in operand.items:
                    visit(item)
            elif isinstance(operand, Mem):
                visit(operand.base)
                for item in operand.extra:
                    visit(item)
            elif isinstance(operand, Pair):
                visit(operand.first)
                visit(operand.second)

        for operand in ins.operands:
            visit(operand)
        return slots

    def find_asynchronous(self) -> None:
        """Collects the registers that wgmma and tcgen05.ld write, and those of wgmma's A."""
        for ins in self.function.instructions:
            if ins.opcode.startswith(("wgmma.mma_async", "tcgen05.ld")):
                for item in self.vector(ins.operands[0]):
                    self.asynchronous.add(self.reg(item.name))
            if ins.opcode.startswith("wgmma.mma_async") and isinstance(ins.operands[1], Vec):
                self.wgmma_operands.update(self.src(o, "b32") for o in ins.operands[1].items)

    # -- building ----------------------------------------------------------------------------
    def build(self, index: int, ins: Instruction) -> Closure:
        """Builds the closure of one instruction, guard included."""
        self.instruction, self.index = ins, index
        name = ins.opcode.split(".", 1)[0]
        builder = _BUILDERS.get(name)
        if builder is None:
            raise self.error(f"unknown instruction {ins.opcode!r}")
        body = builder(self, ins)
        if self.asynchronous and name not in ("wgmma", "bra"):
            slots = [s for s in self.operand_slots(ins) if s in self.asynchronous]
            if slots and not ins.opcode.startswith("tcgen05.ld"):
                body = _settled(body, slots)
        if ins.guard is None or name in ("bra", "ret", "exit"):
            return body
        return _guarded(body, self.reg(ins.guard.name), ins.guard.negated)


def _settled(body: Closure, slots: list[int]) -> Closure:
    """Checks that registers which asynchronous operations write have arrived."""

    def run(w: Warp) -> int | None:
        R = w.R
        for slot in slots:
            if R[slot] is None:
                w.settle_register(slot)
        return body(w)

    return run


def _guarded(body: Closure, slot: int, negated: bool) -> Closure:
    def run(w: Warp) -> int | None:
        p = w.R[slot]
        if negated:
            p = ~p
        old = w.mask
        if old is not None:
            p = p & old
        active = p.sum()
        if active == 0:
            return None
        if active == WARP:
            return body(w)
        w.mask = p
        try:
            return body(w)
        finally:
            w.mask = old

    return run


def put(w: Warp, slot: int, value: np.ndarray) -> None:
    """Writes a register in the active lanes."""
    if slot < 0:
        return
    m = w.mask
    if m is None:
        w.R[slot] = value
        return
    old = w.R[slot]
    if old is None:
        w.R[slot] = value
        return
    w.R[slot] = where(m if value.ndim == 1 else m[:, None], value, old)


def elementwise(fn: Callable, dst: int, *srcs: int) -> Closure:
    """Closure of a lane-wise function of one to four registers."""
    if len(srcs) == 1:
        (a,) = srcs

        def run1(w: Warp) -> None:
            R = w.R
            value = fn(R[a])
            m = w.mask
            R[dst] = value if m is None else where(m, value, R[dst])

        return run1
    if len(srcs) == 2:
        a, b = srcs

        def run2(w: Warp) -> None:
            R = w.R
            value = fn(R[a], R[b])
            m = w.mask
            R[dst] = value if m is None else where(m, value, R[dst])

        return run2
    if len(srcs) == 3:
        a, b, c = srcs

        def run3(w: Warp) -> None:
            R = w.R
            value = fn(R[a], R[b], R[c])
            m = w.mask
            R[dst] = value if m is None else where(m, value, R[dst])

        return run3

    def run_any(w: Warp) -> None:
        R = w.R
        value = fn(*[R[s] for s in srcs])
        m = w.mask
        R[dst] = value if m is None else where(m, value, R[dst])

    return run_any


def pair(operand: object) -> tuple[object, object]:
    """The two destinations of ``a|b``; the second is ``_`` when there is one."""
    if isinstance(operand, Pair):
        return operand.first, operand.second
    return operand, Discard()


def label_index(table: dict, name: str, ins: Instruction) -> object:
    """Looks a label up; an unknown one is a syntax error of the instruction."""
    if name not in table:
        raise PtxSyntaxError(f"PTX line {ins.line}: unknown label {name}: {ins.text}")
    return table[name]


# -- control flow graph ------------------------------------------------------------------------
def successors(function: Function, index: int) -> list[int]:
    """Instruction indices that may follow one; len(instructions) is the exit."""
    ins = function.instructions[index]
    name = ins.opcode.split(".", 1)[0]
    end = len(function.instructions)
    following = [index + 1] if index + 1 <= end else [end]
    if name == "bra":
        target = label_index(function.labels, ins.operands[0].name, ins)
        return [target] if ins.guard is None else [target, *following]
    if name == "brx":
        table = label_index(function.branch_targets, ins.operands[1].name, ins)
        return [label_index(function.labels, label, ins) for label in table]
    if name in ("ret", "exit", "trap"):
        return [end] if ins.guard is None else [end, *following]
    return following


def reconvergence_points(function: Function) -> list[int]:
    """Immediate post-dominator of every instruction, as an instruction index; -1 for none.

    Computed on basic blocks by the iterative algorithm of Cooper, Harvey and Kennedy over the
    reversed graph.
    """
    n = len(function.instructions)
    leaders = {0, n}
    for i in range(n):
        succ = successors(function, i)
        if succ != [i + 1]:
            leaders.update(succ)
            leaders.add(i + 1)
    leaders.update(i for i in function.labels.values())
    starts = sorted(leaders)
    block_of = {}
    ends = {}
    for k, s in enumerate(starts):
        e = starts[k + 1] if k + 1 < len(starts) else s + 1
        ends[s] = e - 1
        for i in range(s, e):
            block_of[i] = s
    succs = {s: (successors(function, ends[s]) if s < n else []) for s in starts}
    preds: dict[int, list[int]] = {s: [] for s in starts}
    for s, out in succs.items():
        for t in out:
            preds[t].append(s)
    order: list[int] = []
    seen: set[int] = set()

    def visit(root: int) -> None:
        stack = [(root, iter(preds[root]))]
        seen.add(root)
        while stack:
            node, it = stack[-1]
            for p in it:
                if p not in seen:
                    seen.add(p)
                    stack.append((p, iter(preds[p])))
                    break
            else:
                order.append(node)
                stack.pop()

    visit(n)
    rank = {b: i for i, b in enumerate(order)}
    idom: dict[int, int] = {n: n}
    changed = True
    while changed:
        changed = False
        for b in reversed(order):
            if b == n:
                continue
            new = -1
            for s in succs[b]:
                if s not in idom:
                    continue
                if new < 0:
                    new = s
                    continue
                x, y = s, new
                while x != y:
                    while rank[x] < rank[y]:
                        x = idom[x]
                    while rank[y] < rank[x]:
                        y = idom[y]
                new = x
            if new >= 0 and idom.get(b) != new:
                idom[b] = new
                changed = True
    result = []
    for i in range(n):
        b = block_of[i]
        join = idom.get(b, -1)
        result.append(join if 0 <= join < n else -1)
    return result
