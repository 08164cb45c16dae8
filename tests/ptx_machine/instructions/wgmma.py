# SPDX-License-Identifier: Apache-2.0
"""wgmma: asynchronous warpgroup matrix multiply-accumulate.

The four warps of a warpgroup issue one operation together; it runs at some later time, in order,
and its registers are unusable (``None``) until a ``wait_group`` covers it.
"""

from __future__ import annotations

import re

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, op
from ..errors import Fault
from ..operands import check_operand, chunk_index, decode_hopper, element_values, gather
from ..parser import Imm, Instruction, Vec
from .mma import a_layout, split_elements

U32 = np.uint32
KIND_BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}


class Operation:
    """One wgmma of a warpgroup."""

    __slots__ = ("done", "issued", "line", "results", "time", "waiters")

    def __init__(self, line: int) -> None:
        self.line, self.done = line, False
        self.issued: dict[int, tuple] = {}
        self.results: dict[int, dict[int, np.ndarray]] = {}
        self.waiters: list = []
        self.time = -1


class WarpGroup:
    """Operations of four consecutive warps."""

    def __init__(self, cta, first: int) -> None:
        from ..machine import OpQueue

        self.cta, self.first = cta, first
        self.members = [w for w in cta.warps if first <= w.index < first + 4]
        self.operations: list[Operation] = []
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
    return _mma(ctx, ins)


def _whole_warp(w, what: str) -> None:
    if w.mask is not None:
        raise Fault(f"{what} with inactive lanes")


def _fence(w) -> None:
    _whole_warp(w, "wgmma.fence")
    state = warp_state(w)
    state.fenced = state.ever_fenced = True


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
        w.sync_reads(max([o.time for g in state.committed[:limit] for o in g], default=-1))
        state.committed = state.committed[limit:]
        for register, operation in list(state.holder.items()):
            if id(operation) in covered:
                value = operation.results[w.index][register]
                w.R[register] = value
                state.results[register] = value
                del state.holder[register]
                state.fenced = False
        return None

    return run


def _mma(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    shape = next(p for p in parts if re.fullmatch(r"m64n\d+k\d+", p))
    _, n, k = (int(v) for v in re.findall(r"\d+", shape))
    at = parts.index(shape)
    dkind, akind, bkind = parts[at + 1 : at + 4]
    bits = KIND_BITS[akind]
    if k != 256 // bits or n % 8 or not 8 <= n <= 256:
        raise ctx.error(f"wgmma shape {shape} of {akind}")
    operands = list(ins.operands)
    dst = [ctx.dst(o) for o in ctx.vector(operands[0])]
    registers_a = None
    desc_a = -1
    if isinstance(operands[1], Vec):
        registers_a = [ctx.src(o, "b32") for o in operands[1].items]
    else:
        desc_a = ctx.src(operands[1], "b64")
    desc_b = ctx.src(operands[2], "b64")
    if isinstance(operands[3], Imm):
        keep_d = bool(operands[3].value)
        scale_d = lambda R: np.full(32, keep_d)  # noqa: E731
    else:
        scale_d = ctx.pred(operands[3])
    rest = [int(o.value) for o in operands[4:]]
    sign_a = rest[0] if len(rest) > 0 else 1
    sign_b = rest[1] if len(rest) > 1 else 1
    trans_a = trans_b = 0
    if registers_a is not None:
        trans_b = rest[2] if len(rest) > 2 else 0
    elif len(rest) > 2:
        trans_a, trans_b = rest[2], rest[3]
    if (trans_a or trans_b) and bits != 16:
        raise ctx.error("transposed operands need 16-bit elements")
    half = dkind == "f16"
    expected = n // 4 if half else n // 2
    if len(dst) != expected:
        raise ctx.error(f"{shape}.{dkind} has {expected} accumulator registers, got {len(dst)}")
    k_bytes = k * bits // 8
    # Accumulator layout: register and lane to (row, column) of a warp's 16 x n part.
    lane = np.arange(32)
    element = np.arange(n // 2)
    row = (lane // 4)[:, None] + 8 * (element // 2 % 2)[None, :]
    column = (2 * (lane % 4))[:, None] + 8 * (element // 4)[None, :] + (element % 2)[None, :]
    ra, ca = a_layout(k, bits)
    line = ins.line

    def operand_index(value: int, transposed: int, extent: int) -> np.ndarray:
        desc = decode_hopper(value)
        if transposed:
            return chunk_index(desc, False, extent, k, bits // 8)
        return chunk_index(desc, True, extent, k_bytes, bits // 8)

    def run(w) -> None:
        _whole_warp(w, "wgmma")
        R = w.R
        state = warp_state(w)
        group = state.group
        if not state.ever_fenced:
            raise Fault("wgmma.mma_async without wgmma.fence before it")
        position = state.count
        state.count += 1
        if position == len(group.operations):
            group.operations.append(Operation(line))
        operation = group.operations[position]
        if operation.line != line:
            raise Fault(
                f"warps of one warpgroup issue different wgmma instructions (line {operation.line})"
            )
        flag = scale_d(R)
        keep = bool(flag[0])
        if not (flag == keep).all():
            raise Fault("wgmma scale-d differs between lanes")
        previous: dict[int, object] = {}
        for d in dst:
            holder = state.holder.get(d)
            if holder is not None:
                previous[d] = holder
                continue
            value = R[d]
            # Compilers sink register initialization below the fence, so that its place among the
            # moves is not checked; that there is one since the registers came back is.
            if not state.fenced and not (keep and value is state.results.get(d)):
                raise Fault("wgmma on registers that were accessed after the last wgmma.fence")
            if keep:
                previous[d] = value
        a_values = None
        if registers_a is not None:
            for s in registers_a:
                if R[s] is None:
                    raise Fault("wgmma A register is held by an operation in flight")
            a_values = np.stack([R[s] for s in registers_a], axis=1)
        values = (int(R[desc_a][0]) if desc_a >= 0 else 0, int(R[desc_b][0]))
        shared = w.cta.shared
        if desc_a >= 0:
            check_operand(shared, operand_index(values[0], trans_a, 64), w, "wgmma reads A")
        check_operand(shared, operand_index(values[1], trans_b, n), w, "wgmma reads B")
        for d in dst:
            state.holder[d] = operation
            R[d] = None
        operation.issued[w.index] = (previous, a_values, values, keep)
        state.open.append(operation)
        if len(operation.issued) == 4:
            _launch(group, operation)

    def _launch(group: WarpGroup, operation: Operation) -> None:
        from ..machine import AsyncOp

        variants = {(v[2], v[3]) for v in operation.issued.values()}
        if len(variants) != 1:
            raise Fault("warps of one warpgroup pass different descriptors or scale-d")
        (pair, keep) = next(iter(variants))
        shared = group.cta.shared
        operands_read = [operand_index(pair[1], trans_b, n)]
        if desc_a >= 0:
            operands_read.append(operand_index(pair[0], trans_a, 64))
        for index in operands_read:
            shared.accesses.pending[index] += 1

        def compute() -> None:
            B = element_values(
                gather(shared, operand_index(pair[1], trans_b, n), "wgmma reads B"),
                bkind, not trans_b,
            )  # fmt: skip
            if desc_a >= 0:
                A64 = element_values(
                    gather(shared, operand_index(pair[0], trans_a, 64), "wgmma reads A"),
                    akind, not trans_a,
                )  # fmt: skip
            for index, (previous, a_values, _, _) in operation.issued.items():
                q = index - group.first
                if a_values is not None:
                    A = np.empty((16, k))
                    A[ra, ca] = split_elements(a_values, akind, bits)
                else:
                    A = A64[16 * q : 16 * q + 16]
                product = (A * sign_a) @ (B * sign_b).T
                acc = product[row, column]  # (32, n / 2)
                if keep:
                    old = []
                    for d in dst:
                        p = previous[d]
                        old.append(p.results[index][d] if isinstance(p, Operation) else p)
                    stacked = np.stack(old, axis=1)
                    if half:
                        prior = fmt.float_values(stacked.view(np.uint16), "f16")
                    elif dkind == "s32":
                        prior = stacked.view(np.int32)
                    else:
                        prior = stacked.view(np.float32)
                    acc = acc + prior
                if half:
                    bits_out = acc.astype(np.float16).view(U32)
                elif dkind == "s32":
                    bits_out = acc.astype(np.int64).astype(U32)
                else:
                    bits_out = acc.astype(np.float32).view(U32)
                columns = np.ascontiguousarray(bits_out.T)
                operation.results[index] = {d: columns[i] for i, d in enumerate(dst)}
            for read in operands_read:
                shared.accesses.async_read_done(read)
            operation.done = True
            operation.time = group.cta.machine.tick()
            for wake in operation.waiters:
                wake()
            operation.waiters.clear()
            # Results that a later operation chains on stay; the operands are not needed again.
            operation.issued = dict.fromkeys(operation.issued, ())

        compute.smem_owner = group.cta
        group.queue.push(AsyncOp(compute, "wgmma", operation.line))

    return run
