# SPDX-License-Identifier: Apache-2.0
"""wgmma: asynchronous warpgroup matrix multiply-accumulate.

The four warps of a warpgroup issue one operation together; it runs at some later time, in order,
and its registers are unusable (``None``) until a ``wait_group`` covers it.
"""

from __future__ import annotations

import re

import numpy as np

from ..accumulate import FRACTION_BITS, fused_dot_add
from ..decode import Closure, Context, op
from ..errors import Fault
from ..operands import check_operand, chunk_index, decode_hopper, element_values, gather
from ..order import WGMMA, stamp
from ..parser import Imm, Instruction, Vec
from .mma import a_fragment, accumulated, c_fragment, c_registers, elements

KIND_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


class Operation:
    """One wgmma of a warpgroup.

    Attributes:
        issued: by warp, what it passed.
        total: the result (64, n), in the type of the accumulators.
    """

    __slots__ = ("count", "done", "issued", "line", "multiply", "registers", "total", "waiters")

    def __init__(self, multiply: Multiply, count: int) -> None:
        self.multiply, self.line, self.done, self.count = multiply, multiply.line, False, count
        self.issued: dict[int, tuple] = {}
        self.total: np.ndarray | None = None
        self.registers: dict[int, dict[int, np.ndarray]] = {}
        self.waiters: list = []

    def results(self, quarter: int) -> dict[int, np.ndarray]:
        """Registers of the result in one of the four warps."""
        if quarter not in self.registers:
            part = self.total[16 * quarter : 16 * quarter + 16]
            values = c_registers(part, self.multiply.dkind)
            self.registers[quarter] = dict(zip(self.multiply.dst, values, strict=True))
        return self.registers[quarter]


class WarpGroup:
    """Operations of four consecutive warps."""

    def __init__(self, cta, first: int) -> None:
        from ..machine import OpQueue

        self.cta, self.first = cta, first
        self.agent = cta.cluster.agents.of_warp(cta.rank, first, WGMMA)
        self.members = [w for w in cta.warps if first <= w.index < first + 4]
        self.operations: dict[int, Operation] = {}  # that some warp has yet to issue, by position
        self.queue = OpQueue(cta.machine)


class WarpState:
    """A warp's side: groups, in-flight registers and the last fence."""

    def __init__(self, w) -> None:
        groups = w.cta.__dict__.setdefault("warpgroups", {})
        first = w.index // 4 * 4
        if first not in groups:
            groups[first] = WarpGroup(w.cta, first)
        self.group = groups[first]
        if len(self.group.members) != 4:
            raise Fault("wgmma in a CTA whose last warpgroup has fewer than four warps")
        self.count = 0  # operations issued
        self.open: list[Operation] = []
        self.committed: list[list[Operation]] = []
        self.holder: dict[int, Operation] = {}  # in-flight register -> its last operation
        self.fenced = False  # a wgmma.fence since the last wait that handed registers back
        self.ever_fenced = False
        self.results: dict[int, np.ndarray] = {}  # registers as the last wait left them
        self.operands: dict[int, list[tuple[int, np.ndarray]]] = {}  # of A, by operation's id
        self.at_fence: dict[int, np.ndarray] = {}  # registers that hold A

    def pending(self) -> bool:
        return bool(self.open or self.holder)


def warp_state(w) -> WarpState:
    if w.wgmma is None:
        w.wgmma = WarpState(w)
    return w.wgmma


@op("wgmma")
def wgmma(ctx: Context, ins: Instruction) -> Closure:
    name = ins.parts[1]
    if name == "fence":
        return _fence
    if name == "commit_group":
        return _commit
    if name == "wait_group":
        return _wait(int(ins.operands[0].value))
    if name != "mma_async" or "sp" in ins.parts:
        raise ctx.error("unknown wgmma")
    return Multiply(ctx, ins).issue


def _whole_warp(w, what: str) -> None:
    if w.mask is not None:
        raise Fault(f"{what} with inactive lanes")


def _fence(w) -> None:
    _whole_warp(w, "wgmma.fence")
    state = warp_state(w)
    state.fenced = state.ever_fenced = True
    state.at_fence = {s: w.R[s] for s in w.program.context.wgmma_operands}


def _commit(w) -> None:
    _whole_warp(w, "wgmma.commit_group")
    state = warp_state(w)
    state.committed.append(state.open)
    state.open = []


def _wait(keep: int) -> Closure:
    def run(w) -> int | None:
        _whole_warp(w, "wgmma.wait_group")
        state = warp_state(w)
        limit = max(len(state.committed) - keep, 0)
        waiting = [o for g in state.committed[:limit] for o in g if not o.done]
        if waiting:
            for operation in waiting:
                operation.waiters.append(w.wake)
            return w.block(f"wgmma.wait_group {keep}")
        covered = {id(o) for g in state.committed[:limit] for o in g}
        count = max([o.count for g in state.committed[:limit] for o in g], default=0)
        if count:
            agent, known = state.group.agent, w.ledger.known.own
            known[:, agent] = np.maximum(known[:, agent], count)
        state.committed = state.committed[limit:]
        for identity in covered:
            for register, value in state.operands.pop(identity, ()):
                if w.R[register] is not value:
                    name = w.program.context.slot_names[register].split("~")[0]
                    raise Fault(
                        f"register {name}, an operand of a wgmma, was written before the wait that"
                        " covers it"
                    )
        quarter = w.index - state.group.first
        for register, operation in list(state.holder.items()):
            if id(operation) in covered:
                value = operation.results(quarter)[register]
                w.R[register] = value
                state.results[register] = value
                del state.holder[register]
                state.fenced = False
        return None

    return run


class Multiply:
    """One decoded wgmma.mma_async; ``issue`` is its closure."""

    def __init__(self, ctx: Context, ins: Instruction) -> None:
        parts = ins.parts
        shape = next(p for p in parts if re.fullmatch(r"m64n\d+k\d+", p))
        _, self.n, self.k = (int(v) for v in re.findall(r"\d+", shape))
        at = parts.index(shape)
        self.dkind, self.akind, self.bkind = parts[at + 1 : at + 4]
        self.bits = KIND_BITS[self.akind]
        if self.k != 256 // self.bits or self.n % 8 or not 8 <= self.n <= 256:
            raise ctx.error(f"wgmma shape {shape} of {self.akind}")
        operands = list(ins.operands)
        self.dst = [ctx.dst(o) for o in ctx.vector(operands[0])]
        expected = self.n // 4 if self.dkind == "f16" else self.n // 2
        if len(self.dst) != expected:
            raise ctx.error(f"{shape}.{self.dkind} has {expected} accumulator registers")
        self.registers_a: list[int] | None = None
        self.desc_a = -1
        if isinstance(operands[1], Vec):
            self.registers_a = [ctx.src(o, "b32") for o in operands[1].items]
        else:
            self.desc_a = ctx.src(operands[1], "b64")
        self.desc_b = ctx.src(operands[2], "b64")
        if isinstance(operands[3], Imm):
            constant = np.full(32, bool(operands[3].value))
            self.scale_d = lambda R: constant
        else:
            self.scale_d = ctx.pred(operands[3])
        rest = [int(o.value) for o in operands[4:]]
        self.sign_a, self.sign_b = (*rest, 1, 1)[:2] if rest else (1, 1)
        self.trans_a = self.trans_b = 0
        if self.registers_a is not None:
            self.trans_b = rest[2] if len(rest) > 2 else 0
        elif len(rest) > 2:
            self.trans_a, self.trans_b = rest[2], rest[3]
        if (self.trans_a or self.trans_b) and self.bits != 16:
            raise ctx.error("transposed operands need 16-bit elements")
        self.line = ins.line

    def index_a(self, value: int) -> np.ndarray:
        return self._index(value, self.trans_a, 64)

    def index_b(self, value: int) -> np.ndarray:
        return self._index(value, self.trans_b, self.n)

    def _index(self, value: int, transposed: int, extent: int) -> np.ndarray:
        desc = decode_hopper(value)
        if transposed:
            return chunk_index(desc, False, extent, self.k, self.bits // 8)
        return chunk_index(desc, True, extent, self.k * self.bits // 8, self.bits // 8)

    def issue(self, w) -> None:
        """A warp issues the operation; with the fourth warp's issue it is on its way."""
        _whole_warp(w, "wgmma")
        R = w.R
        state = warp_state(w)
        group = state.group
        if not state.ever_fenced:
            raise Fault("wgmma.mma_async without wgmma.fence before it")
        position = state.count
        state.count += 1
        if position not in group.operations:
            group.operations[position] = Operation(self, position + 1)
        operation = group.operations[position]
        if operation.line != self.line:
            raise Fault(
                f"warps of one warpgroup issue different wgmma instructions (line {operation.line})"
            )
        flag = self.scale_d(R)
        keep = bool(flag[0])
        if not (flag == keep).all():
            raise Fault("wgmma scale-d differs between lanes")
        previous = self._accumulators(w, state, keep)
        a_values = None
        if self.registers_a is not None:
            if any(R[s] is None for s in self.registers_a):
                raise Fault("wgmma A register is held by an operation in flight")
            if any(R[s] is not state.at_fence[s] for s in self.registers_a):
                raise Fault("wgmma A register was written after the last wgmma.fence")
            a_values = np.array([R[s] for s in self.registers_a])
            state.operands[id(operation)] = [(s, R[s]) for s in self.registers_a]
        values = (int(R[self.desc_a][0]) if self.desc_a >= 0 else 0, int(R[self.desc_b][0]))
        shared = w.cta.shared
        if self.desc_a >= 0:
            check_operand(shared, self.index_a(values[0]), w, "wgmma reads A")
        check_operand(shared, self.index_b(values[1]), w, "wgmma reads B")
        state.holder.update(dict.fromkeys(self.dst, operation))
        if not isinstance(previous, Operation):  # whose registers are taken already
            for d in self.dst:
                R[d] = None
        operation.issued[w.index] = (previous, a_values, values, keep)
        state.open.append(operation)
        if len(operation.issued) == 4:
            del group.operations[position]
            self._start(group, operation)

    def _accumulators(
        self, w, state: WarpState, keep: bool
    ) -> Operation | dict[int, Operation | np.ndarray]:
        """What the accumulator registers add: the result of one operation before it, or by register
        a value or the operation that will give it.
        """
        holders = {state.holder.get(d) for d in self.dst}
        if len(holders) == 1:
            (holder,) = holders
            if holder is not None and holder.multiply.dst == self.dst:
                return holder
        previous: dict[int, Operation | np.ndarray] = {}
        for d in self.dst:
            holder = state.holder.get(d)
            if holder is not None:
                previous[d] = holder
                continue
            value = w.R[d]
            # Compilers sink register initialization below the fence, so that its place among the
            # moves is not checked; that there is one since the registers came back is.
            if not state.fenced and not (keep and value is state.results.get(d)):
                raise Fault("wgmma on registers that were accessed after the last wgmma.fence")
            if keep:
                previous[d] = value
        return previous

    def _start(self, group: WarpGroup, operation: Operation) -> None:
        from ..machine import AsyncOp

        variants = {(v[2], v[3]) for v in operation.issued.values()}
        if len(variants) != 1:
            raise Fault("warps of one warpgroup pass different descriptors or scale-d")
        (descriptors, keep) = next(iter(variants))
        accesses = group.cta.shared.accesses
        read = [self.index_b(descriptors[1])]
        if self.desc_a >= 0:
            read.append(self.index_a(descriptors[0]))
        for index in read:
            accesses.pending[index] += 1

        def compute() -> None:
            self._compute(group, operation, descriptors, keep)
            for index in read:
                accesses.async_read_done(index, stamp(group.agent, operation.count))
            operation.done = True
            for wake in operation.waiters:
                wake()
            operation.waiters.clear()
            # Results that a later operation chains on stay; the operands are not needed again.
            operation.issued = dict.fromkeys(operation.issued, ())

        compute.smem_owner = group.cta
        group.queue.push(AsyncOp(compute, "wgmma", self.line))

    def _compute(
        self, group: WarpGroup, operation: Operation, descriptors: tuple[int, int], keep: bool
    ) -> None:
        shared = group.cta.shared
        raw = gather(shared, self.index_b(descriptors[1]), "wgmma reads B")
        B = element_values(raw, self.bkind, not self.trans_b) * self.sign_b
        if self.desc_a >= 0:
            raw = gather(shared, self.index_a(descriptors[0]), "wgmma reads A")
            A = element_values(raw, self.akind, not self.trans_a)
        else:
            parts = [operation.issued[group.first + q][1] for q in range(4)]
            A = elements(np.concatenate([a_fragment(p) for p in parts]), self.akind, self.bits)
        before = self._before(group, operation) if keep else None
        operation.total = accumulated(self._add(A * self.sign_a, B, before), self.dkind)

    def _before(self, group: WarpGroup, operation: Operation) -> np.ndarray:
        """The accumulators that an operation adds to, (64, n)."""
        sources = [operation.issued[group.first + q][0] for q in range(4)]
        if isinstance(sources[0], Operation) and all(p is sources[0] for p in sources):
            return sources[0].total
        before = []
        for q, source in enumerate(sources):
            old = source.results(q) if isinstance(source, Operation) else {
                d: p.results(q)[d] if isinstance(p, Operation) else p for d, p in source.items()
            }  # fmt: skip
            before.append(c_fragment(np.array([old[d] for d in self.dst]), self.dkind))
        return np.concatenate(before)

    def _add(self, A: np.ndarray, B: np.ndarray, before: np.ndarray | None) -> np.ndarray:
        """The sum of products and accumulator: the hardware's bits where they are known."""
        if self.dkind == "f32" and self.akind == self.bkind in FRACTION_BITS:
            return fused_dot_add(A, B, before, self.akind)
        return A @ B.T if before is None else A @ B.T + before
