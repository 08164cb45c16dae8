# SPDX-License-Identifier: Apache-2.0
"""tcgen05: tensor memory and the fifth-generation tensor core.

cp, mma, shift and commit of a CTA (or of a CTA pair, from the CTA that issues) run in issue order,
each at some later time. ld and st move data between registers and tensor memory; they take effect
between their issue and the matching wait, and the registers of a ld are unusable until then.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .. import formats as fmt
from ..decode import Closure, Context, op
from ..errors import Fault
from ..memory import TensorMemory
from ..operands import (
    MatrixDescriptor,
    check_operand,
    chunk_index,
    decode_blackwell,
    element_values,
    gather,
)
from ..order import stamp
from ..parser import Imm, Instruction, Mem, Vec
from .sync import check_initialized, shared_target

U32 = np.uint32
LANE = np.arange(32)


@op("tcgen05")
def tcgen05(ctx: Context, ins: Instruction) -> Closure:
    name = ins.parts[1].split("::")[0]
    builders = {
        "alloc": _alloc, "dealloc": _dealloc, "relinquish_alloc_permit": _relinquish,
        "ld": _ld, "st": _st, "wait": _wait, "cp": _cp, "mma": _mma, "commit": _commit,
        "fence": _fence, "shift": _shift,
    }  # fmt: skip
    if name not in builders:
        raise ctx.error("unknown tcgen05 instruction")
    return builders[name](ctx, ins)


def _group_size(ctx: Context, ins: Instruction) -> int:
    for part in ins.parts:
        if part.startswith("cta_group::"):
            return int(part[-1])
    raise ctx.error("tcgen05 instruction without .cta_group")


def split_address(value: int) -> tuple[int, int]:
    """(lane, column) of a tensor memory address."""
    return value >> 16, value & 0xFFFF


def pair_of(cta) -> list:
    """The two CTAs of a CTA's pair, even rank first."""
    ctas = cta.cluster.ctas
    even = cta.rank & ~1
    if even + 1 >= len(ctas):
        raise Fault("cta_group::2 in a cluster without a peer CTA")
    return [cta.cluster.cta(even), cta.cluster.cta(even + 1)]


def queue_of(cta):
    from ..machine import OpQueue

    if not isinstance(cta.tensor_queue, OpQueue):
        cta.tensor_queue = OpQueue(cta.machine)
    return cta.tensor_queue


def push(cta, run: Callable, what: str, line: int, owners: list) -> None:
    from ..machine import AsyncOp

    run.smem_owner = cta
    run.smem_owners = owners
    queue_of(cta).push(AsyncOp(run, what, line))


# -- allocation --------------------------------------------------------------------------------
def _use_group(cta, size: int) -> None:
    known = cta.__dict__.setdefault("tcgen05_group", size)
    if known != size:
        raise Fault("tcgen05 instructions of one kernel use both CTA groups")


def _alloc(ctx: Context, ins: Instruction) -> Closure:
    size = _group_size(ctx, ins)
    slot, offset = ctx.address(ins.operands[0])
    columns = ctx.src(ins.operands[1], "u32")
    line = ins.line
    key = ("tcgen05.alloc", ctx.index)

    def store(w, address: int) -> None:
        cta, at = shared_target(w, int(w.R[slot][w.first()]) + offset, False, "tcgen05.alloc")
        cta.shared.check_range(at, at + 4, "tcgen05.alloc")
        cta.shared.store(np.array([at]), np.array([address], U32), 4, w)

    def run(w) -> int | None:
        if w.mask is not None:
            raise Fault("tcgen05.alloc with inactive lanes")
        cta = w.cta
        _use_group(cta, size)
        count = int(w.R[columns][0])
        if size == 1:
            start = cta.tensor.allocate(count, line)
            if start is None:
                cta.__dict__.setdefault("alloc_waiters", []).append(w)
                return w.block(f"tcgen05.alloc of {count} columns")
            store(w, start)
            return None
        done = w.token.pop(key, None)
        if done is not None:
            store(w, done)
            return None
        requests = cta.cluster.__dict__.setdefault("alloc_requests", {})
        mine = requests.setdefault(cta.rank // 2, {})
        mine[cta.rank & 1] = (w, count)
        pair = pair_of(cta)
        if len(mine) == 2:
            if mine[0][1] != mine[1][1]:
                raise Fault("the CTAs of a pair allocate different numbers of columns")
            first = pair[0].tensor.allocate(count, line)
            second = pair[1].tensor.allocate(count, line)
            if first is None or first != second:
                raise Fault("tcgen05.alloc cannot be served alike in both CTAs of the pair")
            for other, _ in mine.values():
                other.token[key] = first
                other.wake()
            requests.pop(cta.rank // 2)
            store(w, w.token.pop(key))
            return None
        return w.block("tcgen05.alloc: the peer CTA has not come")

    return run


def _dealloc(ctx: Context, ins: Instruction) -> Closure:
    size = _group_size(ctx, ins)
    address = ctx.src(ins.operands[0], "b32")
    columns = ctx.src(ins.operands[1], "u32")

    def run(w) -> None:
        if w.mask is not None:
            raise Fault("tcgen05.dealloc with inactive lanes")
        cta = w.cta
        _use_group(cta, size)
        lane, column = split_address(int(w.R[address][0]))
        if lane:
            raise Fault(f"tcgen05.dealloc of address with lane {lane}")
        even = cta.rank & ~1
        for other in cta.cluster.ctas[even : even + 2] if size == 2 else [cta]:
            queue = getattr(other, "tensor_queue", [])
            pending = getattr(queue, "items", queue)
            if pending:
                raise Fault(
                    f"tcgen05.dealloc while {pending[0].what} (line {pending[0].line}) is pending"
                )
        count = int(w.R[columns][0])
        freed = np.arange(column, column + count)
        cta.tensor.accesses.check_free(freed[freed < 512], w)
        cta.tensor.free(column, count)
        for waiter in cta.__dict__.pop("alloc_waiters", []):
            waiter.wake()

    return run


def _relinquish(ctx: Context, ins: Instruction) -> Closure:
    def run(w) -> None:
        w.cta.tensor.permit = False

    return run


def _fence(ctx: Context, ins: Instruction) -> Closure:
    if ins.parts[1] == "fence::before_thread_sync":
        return lambda w: w.ledger.before_thread_sync()
    if ins.parts[1] == "fence::after_thread_sync":
        return lambda w: w.ledger.after_thread_sync()
    raise ctx.error("unknown tcgen05.fence")


# -- ld and st ---------------------------------------------------------------------------------
def fragment(shape: str, num: int, split: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Lane and column, relative to the address, of each (lane of the warp, register).

    Returns:
        lanes (32, registers), columns (32, registers), tensor memory lanes spanned.
    """
    if shape == "32x32b":
        r = np.arange(num)
        return np.broadcast_to(LANE[:, None], (32, num)), np.broadcast_to(r, (32, num)), 32
    if shape == "16x64b":
        r = np.arange(num)
        lane = LANE // 4 + 8 * (LANE % 2)
        column = (LANE // 2 % 2)[:, None] + 2 * r[None, :]
        return np.broadcast_to(lane[:, None], column.shape), column, 16
    if shape == "16x128b":
        r = np.arange(2 * num)
        lane = (LANE // 4)[:, None] + 8 * (r % 2)[None, :]
        column = (LANE % 4)[:, None] + 4 * (r // 2)[None, :]
        return lane, column, 16
    if shape == "16x256b":
        r = np.arange(4 * num)
        lane = (LANE // 4)[:, None] + 8 * (r // 2 % 2)[None, :]
        column = (2 * (LANE % 4))[:, None] + (r % 2)[None, :] + 8 * (r // 4)[None, :]
        return lane, column, 16
    if shape == "16x32bx2":
        r = np.arange(num)
        column = r[None, :] + (split * (LANE // 16))[:, None]
        return np.broadcast_to((LANE % 16)[:, None], column.shape), column, 16
    raise ValueError(shape)


def _transfer(ctx: Context, ins: Instruction, vector: object, memory: object) -> tuple:
    parts = ins.parts
    shape = next(p for p in parts if re.fullmatch(r"\d+x\d+b(x2)?", p))
    num = int(next(p for p in parts if re.fullmatch(r"x\d+", p))[1:])
    items = ctx.vector(vector)
    split = 0
    extras = [o for o in ins.operands if isinstance(o, Imm)]
    if shape == "16x32bx2":
        if not extras:
            raise ctx.error("16x32bx2 needs an immediate half split offset")
        split = int(extras[0].value)
    packed = "pack::16b" in parts or "unpack::16b" in parts
    lanes, columns, span = fragment(shape, num, split)
    if len(items) != lanes.shape[1]:
        raise ctx.error(f"{shape}.x{num} has {lanes.shape[1]} registers, got {len(items)}")
    slot, offset = ctx.address(memory)
    return items, slot, offset, lanes, columns, span, packed


def _place(w, address: int, lanes: np.ndarray, columns: np.ndarray, span: int) -> tuple:
    lane, column = split_address(address)
    quadrant = w.index % 4
    if lane // 32 != quadrant or lane % span:
        raise Fault(
            f"tensor memory address lane {lane}: warp {w.index} can access lanes "
            f"{32 * quadrant}..{32 * quadrant + 31}, aligned to {span}"
        )
    return lanes + lane, columns + column


def _uniform_address(w, slot: int, offset: int, what: str) -> int:
    if w.mask is not None:
        raise Fault(f"{what} with inactive lanes")
    value = w.R[slot]
    if not (value == value[0]).all():
        raise Fault(f"{what}: the tensor memory address differs between lanes")
    return int(value[0]) + offset


def _pending(w) -> dict:
    state = w.token.get("tcgen05")
    if state is None:
        state = {"ld": [], "st": [], "finish": lambda: _finish_loads(w)}
        w.token["tcgen05"] = state
    return state


def _finish_loads(w) -> None:
    """Delivers the registers of the warp's tcgen05.ld operations."""
    state = _pending(w)
    for dsts, early, read, tensor, used in state["ld"]:
        values = early if early is not None else read()
        tensor.accesses.load_done(used, w)
        columns = np.ascontiguousarray(values.T)
        for i, d in enumerate(dsts):
            w.R[d] = columns[i]
    state["ld"] = []


def _ld(ctx: Context, ins: Instruction) -> Closure:
    if "red" in ins.parts:
        raise ctx.error("tcgen05.ld.red is not modeled")
    vector, memory = ins.operands[0], ins.operands[1]
    items, slot, offset, lanes, columns, span, packed = _transfer(ctx, ins, vector, memory)
    dsts = [ctx.dst(o) for o in items]

    def run(w) -> None:
        at, where = _place(w, _uniform_address(w, slot, offset, "tcgen05.ld"), lanes, columns, span)
        tensor: TensorMemory = w.cta.tensor

        def read() -> np.ndarray:
            if packed:
                first = where.min()
                target = first + 2 * (where - first)
                low = tensor.read(at, target, "tcgen05.ld") & U32(0xFFFF)
                high = tensor.read(at, target + 1, "tcgen05.ld")
                return low | (high << U32(16))
            return tensor.read(at, where, "tcgen05.ld")

        used = np.unique(where)
        if packed:
            used = np.unique(
                np.concatenate([used.min() + 2 * (used - used.min()) + i for i in (0, 1)])
            )
        tensor.check(used, "tcgen05.ld")
        tensor.accesses.load_issued(used, w)
        # The data may be read at once or as late as the wait.
        early = read() if w.machine.rng.random() < 0.5 else None
        for d in dsts:
            w.R[d] = None
        _pending(w)["ld"].append((dsts, early, read, tensor, used))

    return run


def _st(ctx: Context, ins: Instruction) -> Closure:
    memory, vector = ins.operands[0], ins.operands[-1]
    items, slot, offset, lanes, columns, span, packed = _transfer(ctx, ins, vector, memory)
    srcs = [ctx.src(o, "b32") for o in items]

    def run(w) -> None:
        at, where = _place(w, _uniform_address(w, slot, offset, "tcgen05.st"), lanes, columns, span)
        tensor: TensorMemory = w.cta.tensor
        values = np.stack([w.R[s] for s in srcs], axis=1)

        def write() -> None:
            if packed:
                first = where.min()
                target = first + 2 * (where - first)
                tensor.write(at, target, values & U32(0xFFFF), "tcgen05.st")
                tensor.write(at, target + 1, values >> U32(16), "tcgen05.st")
            else:
                tensor.write(at, where, values, "tcgen05.st")

        tensor.check(where, "tcgen05.st")
        used = np.unique(where)
        tensor.accesses.store_issued(used, w)
        early = w.machine.rng.random() < 0.5
        if early:
            write()
        _pending(w)["st"].append((None if early else write, tensor, used))

    return run


def _wait(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[1].split("::")[1]

    def run(w) -> None:
        if w.mask is not None:
            raise Fault("tcgen05.wait with inactive lanes")
        state = _pending(w)
        if kind == "ld":
            _finish_loads(w)
        else:
            for write, tensor, used in state["st"]:
                if write is not None:
                    write()
                tensor.accesses.stored(used, w)
            state["st"] = []

    return run


def next_stamp(cta) -> int:
    """Stamp of the next operation of the CTA's queue; a later commit hands it over."""
    count = cta.__dict__.get("tensor_count", 0) + 1
    cta.tensor_count = count
    return stamp(cta.cluster.agents.tensor_queue(cta.rank), count)


# -- cp and shift ------------------------------------------------------------------------------
def _copy_lanes(shape: str, multicast: str) -> np.ndarray:
    """Tensor memory lanes (copies, rows) that each source row goes to."""
    if shape in ("128x256b", "128x128b"):
        return np.arange(128)[None, :]
    if shape == "4x256b":
        return (32 * np.arange(4))[None, :]
    if shape == "32x128b":
        return np.arange(32)[None, :] + 32 * np.arange(4)[:, None]
    rows = np.arange(64)
    if multicast == "warpx2::02_13":
        return rows[None, :] + 64 * np.arange(2)[:, None]
    base = np.where(rows < 32, rows, rows + 32)
    return base[None, :] + 32 * np.arange(2)[:, None]


def _cp(ctx: Context, ins: Instruction) -> Closure:
    size = _group_size(ctx, ins)
    parts = ins.parts
    shape = next(p for p in parts if re.fullmatch(r"\d+x\d+b", p))
    multicast = next((p for p in parts if p.startswith("warpx")), "")
    if (shape == "32x128b") != (multicast == "warpx4"):
        raise ctx.error("tcgen05.cp.32x128b goes with .warpx4")
    rows, bits = (int(v) for v in re.findall(r"\d+", shape)[:2])
    if any(p.startswith("b8x16") for p in parts):
        raise ctx.error("tcgen05.cp with decompression is not modeled")
    slot, offset = ctx.address(ins.operands[0])
    desc_slot = ctx.src(ins.operands[1], "b64")
    lanes = _copy_lanes(shape, multicast)
    line = ins.line

    def run(w) -> None:
        cta = w.cta
        _use_group(cta, size)
        lanes_of_warp = w.lanes()
        if lanes_of_warp.size != 1:
            # An mma or a commit of one of the threads would not follow the others' copies.
            raise Fault("tcgen05.cp issued by more than one thread")
        lane = lanes_of_warp[0]
        base_lane, column = split_address(int(w.R[slot][lane]) + offset)
        desc = decode_blackwell(int(w.R[desc_slot][lane]))
        index = chunk_index(desc, True, rows, bits // 8, 1)
        ctas = pair_of(cta) if size == 2 else [cta]
        written = np.arange(column, column + bits // 32)
        queue = cta.cluster.agents.tensor_queue(cta.rank)
        for target in ctas:
            check_operand(target.shared, index, w, "tcgen05.cp reads")
            target.shared.accesses.pending[index] += 1
            target.tensor.check(written, "tcgen05.cp")
            target.tensor.accesses.operation_issued(written, written, w, queue, "tcgen05.cp")
        code = next_stamp(cta)
        if base_lane % 32 and shape != "4x256b":
            raise Fault(f"tcgen05.cp to lane {base_lane}")

        def complete() -> None:
            for target in ctas:
                raw = gather(target.shared, index, "tcgen05.cp reads")
                target.shared.accesses.async_read_done(index, code)
                words = np.ascontiguousarray(raw).view(U32)  # (rows, bits / 32)
                where = np.arange(column, column + bits // 32)
                for copy in lanes:
                    target.tensor.write(
                        (copy + base_lane)[:, None], where[None, :], words, "tcgen05.cp"
                    )
                target.tensor.accesses.operation_done(written, written, code)

        push(cta, complete, "tcgen05.cp", line, ctas)

    return run


def _shift(ctx: Context, ins: Instruction) -> Closure:
    # The ISA's text leaves open how many rows move when the address names a lane above 0.
    raise ctx.error("tcgen05.shift is not modeled")


# -- commit ------------------------------------------------------------------------------------
def _commit(ctx: Context, ins: Instruction) -> Closure:
    size = _group_size(ctx, ins)
    multicast = "multicast::cluster" in ins.parts
    slot, offset = ctx.address(ins.operands[0])
    mask_slot = ctx.src(ins.operands[1], "u16") if multicast else -1
    line = ins.line

    def run(w) -> None:
        cta = w.cta
        _use_group(cta, size)
        for lane in w.lanes():
            target, at = shared_target(w, int(w.R[slot][lane]) + offset, True, "tcgen05.commit")
            if multicast:
                mask = int(w.R[mask_slot][lane])
                if mask == 0 or mask >> len(cta.cluster.ctas):
                    raise Fault(f"tcgen05.commit multicast mask {mask:#x}")
                targets = [cta.cluster.cta(r) for r in range(16) if mask >> r & 1]
            else:
                targets = [target]
            for t in targets:
                check_initialized(t.shared.barrier(at), w, asynchronous=True)
            # What the issuing thread did before counts as ordered too: its reads are complete.
            known = w.ledger.release().copy()
            agent = cta.cluster.agents.tensor_queue(cta.rank)
            handed = known.own[:, agent]
            np.maximum(handed, cta.__dict__.get("tensor_count", 0), out=handed)

            def complete(targets=targets, at=at, known=known) -> None:
                for t in targets:
                    if t.done:
                        raise Fault(f"commit arrives at CTA rank {t.rank}, which has exited")
                    barrier = t.shared.barrier(at)
                    barrier.known.join(known)
                    barrier.arrive(1)

            push(cta, complete, "tcgen05.commit", line, targets)

    return run


# -- mma ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class InstructionDescriptor:
    """A decoded 32-bit instruction descriptor."""

    m: int
    n: int
    k: int
    a_kind: str
    b_kind: str
    d_kind: str
    negate_a: bool
    negate_b: bool
    transpose_a: bool
    transpose_b: bool
    sfa_id: int = 0
    sfb_id: int = 0
    scale_kind: str = ""


FLOAT8 = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}


def decode_instruction(value: int, kind: str) -> InstructionDescriptor:
    """Decodes the instruction descriptor of one ``.kind``."""
    a, b = value >> 7 & 7, value >> 10 & 7
    common = {
        "n": (value >> 17 & 0x3F) << 3,
        "negate_a": bool(value >> 13 & 1), "negate_b": bool(value >> 14 & 1),
        "transpose_a": bool(value >> 15 & 1), "transpose_b": bool(value >> 16 & 1),
    }  # fmt: skip
    if value >> 2 & 1:
        raise Fault("sparse tcgen05.mma is not modeled")
    scaled = {
        "m": (value >> 27 & 3) << 7, "d_kind": "f32",
        "sfa_id": value >> 29 & 3, "sfb_id": value >> 4 & 3,
        "scale_kind": "ue8m0" if value >> 23 & 1 else "ue4m3",
    }  # fmt: skip
    try:
        if kind in ("kind::mxf4", "kind::mxf4nvf4"):
            b = value >> 10 & 3
            if (a, b) != (1, 1):
                raise Fault(f"{kind}: atype {a}, btype {b}; E2M1 is 1")
            k = 96 if value >> 31 & 1 else 64
            return InstructionDescriptor(k=k, a_kind="e2m1x2", b_kind="e2m1x2", **scaled, **common)
        if kind == "kind::mxf8f6f4":
            return InstructionDescriptor(
                k=32, a_kind=FLOAT8[a], b_kind=FLOAT8[b], **scaled, **common
            )
        m = (value >> 24 & 0x1F) << 4
        d = value >> 4 & 3
        if kind == "kind::f16":
            names = {0: "f16", 1: "bf16"}
            return InstructionDescriptor(
                m=m, k=16, a_kind=names[a], b_kind=names[b], d_kind={0: "f16", 1: "f32"}[d],
                **common,
            )  # fmt: skip
        if kind == "kind::tf32":
            if (a, b, d) != (2, 2, 1):
                raise Fault(f"kind::tf32 with types {a}, {b}, {d}")
            return InstructionDescriptor(
                m=m, k=8, a_kind="tf32", b_kind="tf32", d_kind="f32", **common
            )
        if kind == "kind::f8f6f4":
            return InstructionDescriptor(
                m=m, k=32, a_kind=FLOAT8[a], b_kind=FLOAT8[b],
                d_kind={0: "f16", 1: "f32"}[d], **common,
            )  # fmt: skip
        if kind == "kind::i8":
            names = {0: "u8", 1: "s8"}
            return InstructionDescriptor(
                m=m, k=32, a_kind=names[a], b_kind=names[b], d_kind={2: "s32"}[d], **common
            )
    except KeyError as error:
        raise Fault(f"instruction descriptor {value:#010x} of {kind}: bad type {error}") from None
    raise Fault(f"{kind} is not modeled")


K_BYTES = {"f16": 32, "bf16": 32, "tf32": 32, "e2m1x2": 32}


def _element_bytes(kind: str) -> int:
    return {"f16": 2, "bf16": 2, "tf32": 4}.get(kind, 1)


def _decode_elements(raw: np.ndarray, kind: str, k_major: bool) -> np.ndarray:
    if kind in ("e2m1", "e2m3", "e3m2"):  # sixteen elements in 16 bytes, padded at the end
        groups = raw.reshape(raw.shape[0], -1, 16)
        if kind == "e2m1":
            values = fmt.E2M1_PAIRS[groups[..., :8]].reshape(raw.shape[0], -1)
        else:
            bits = np.unpackbits(groups[..., :12], axis=-1, bitorder="little")
            codes = (bits.reshape(*groups.shape, 6) * (1 << np.arange(6))).sum(axis=-1)
            values = fmt.TABLES[kind][codes].reshape(raw.shape[0], -1)
        return values if k_major else values.T
    return element_values(raw, kind, k_major)


def operand_chunks(
    desc: MatrixDescriptor, idesc: InstructionDescriptor, kind: str, transposed: bool, extent: int
) -> np.ndarray:
    """Chunk numbers of an operand of a tcgen05.mma."""
    if transposed:
        return chunk_index(desc, False, extent, idesc.k, _element_bytes(kind))
    k_bytes = idesc.k // 2 if kind == "e2m1x2" else idesc.k * _element_bytes(kind)
    return chunk_index(desc, True, extent, k_bytes, 1)


def check_shape(idesc: InstructionDescriptor, kind: str, size: int) -> None:
    """Raises unless the ISA lists the shape for the kind and CTA group."""
    m, n = idesc.m, idesc.n
    scaled = kind in ("kind::mxf8f6f4", "kind::mxf4", "kind::mxf4nvf4")
    if size == 1:
        rows = (128,) if scaled else (64, 128)
        step = 8 if m == 64 or scaled or kind != "kind::i8" else 16
        if m == 128 and not scaled:
            step = 16  # N in multiples of 16 where M is 128
    else:
        rows, step = (128, 256), 16 if m == 128 or scaled else 32
        if scaled:
            step = 16
    if scaled and size == 2 and m == 128:
        raise Fault("block-scaled cta_group::2 with M = 128 is not modeled")
    if m not in rows or n % step or not step <= n <= 256:
        raise Fault(f"tcgen05.mma {kind} cta_group::{size} of shape {m}x{n}x{idesc.k}")


def scale_factors(
    tensor: TensorMemory, address: int, rows: int, count: int, first: int, kind: str, what: str
) -> np.ndarray:
    """Scale factors (rows, count) from tensor memory.

    Row r sits in lane r % 32 of every quadrant of 32 lanes (the hardware wants all four copies),
    in column r // 32; ``count`` bytes from byte ``first``, going on in the next group of columns.
    """
    lane, column = split_address(address & 0x3FFFFFFF)
    if lane % 32:
        raise Fault(f"{what} at lane {lane}")
    columns = -(-rows // 32)
    words = -(-(first + count) // 4)
    where = column + np.arange(columns)[None, :, None] + columns * np.arange(words)[None, None, :]
    copies = []
    for quadrant in range(4):
        lanes = (np.arange(32) + 32 * quadrant)[:, None, None]
        data = tensor.read(lanes, np.broadcast_to(where, (32, columns, words)), what)
        copies.append(data)
    if any(not np.array_equal(copies[0], c) for c in copies[1:]):
        raise Fault(f"{what}: the four 32-lane copies of the scale factors differ")
    raw = np.ascontiguousarray(copies[0]).view(np.uint8)  # (32, columns, 4 * words)
    raw = raw[:, :, first : first + count]
    return fmt.TABLES[kind][raw.transpose(1, 0, 2).reshape(32 * columns, count)[:rows]]


def accumulator_places(m: int, n: int, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Lane (rows, 1) or (rows, n) and column of D's part in each CTA of the group."""
    columns = np.arange(n)[None, :]
    if size == 1:
        rows = np.arange(m)[:, None]
        lanes = rows if m == 128 else rows // 16 * 32 + rows % 16
        return [(lanes, columns)]
    if m == 256:
        return [(np.arange(128)[:, None], columns)] * 2
    rows = np.arange(64)[:, None]
    half = n // 2
    lanes = rows + 64 * (columns >= half)
    return [(lanes, columns % half)] * 2


def _mma(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    if "ws" in parts or "sp" in parts or "ashift" in parts:
        raise ctx.error("tcgen05.mma .ws, .sp and .ashift are not modeled")
    size = _group_size(ctx, ins)
    kind = next(p for p in parts if p.startswith("kind::"))
    scaled = "block_scale" in parts
    vec = next((p for p in parts if p.startswith("scale_vec::") or p in ("block16", "block32")), "")
    operands = list(ins.operands)
    d_slot, d_offset = ctx.address(operands.pop(0))
    a_operand = operands.pop(0)
    a_tensor = isinstance(a_operand, Mem)
    if a_tensor:
        a_slot, a_offset = ctx.address(a_operand)
    else:
        a_slot, a_offset = ctx.src(a_operand, "b64"), 0
    b_slot = ctx.src(operands.pop(0), "b64")
    i_slot = ctx.src(operands.pop(0), "b32")
    scales = []
    disable: list[int] = []
    if scaled:
        scales = [ctx.address(operands.pop(0)) for _ in range(2)]
    elif operands and isinstance(operands[0], Vec):
        disable = [ctx.src(o, "b32") for o in operands.pop(0).items]
    enable = ctx.pred(operands.pop(0))
    scale_input = int(operands.pop(0).value) if operands else 0
    default_vec = {"kind::mxf8f6f4": 32, "kind::mxf4": 32}.get(kind, 0)
    block = {
        "scale_vec::1X": 32, "scale_vec::2X": 32, "scale_vec::4X": 16, "block16": 16,
        "block32": 32, "": default_vec,
    }[vec]  # fmt: skip
    if scaled and block == 0:
        raise ctx.error("kind::mxf4nvf4 needs a scale vector size")
    line = ins.line

    def run(w) -> None:
        cta = w.cta
        _use_group(cta, size)
        lanes = w.lanes()
        if lanes.size != 1:
            raise Fault("tcgen05.mma issued by more than one thread")
        lane = lanes[0]
        R = w.R
        idesc = decode_instruction(int(R[i_slot][lane]), kind)
        check_shape(idesc, kind, size)
        ctas = pair_of(cta) if size == 2 else [cta]
        d_lane, d_column = split_address(int(R[d_slot][lane]) + d_offset)
        a_value = int(R[a_slot][lane]) + a_offset
        b_desc = decode_blackwell(int(R[b_slot][lane]))
        accumulate = bool(enable(R)[lane])
        masks = [int(R[s][lane]) for s in disable]
        m_part, n_part = idesc.m // size, idesc.n // size
        a_index = None
        if not a_tensor:
            a_desc = decode_blackwell(a_value)
            a_index = operand_chunks(a_desc, idesc, idesc.a_kind, idesc.transpose_a, m_part)
        b_index = operand_chunks(b_desc, idesc, idesc.b_kind, idesc.transpose_b, n_part)
        sf = [int(R[s][lane]) + o for s, o in scales]
        if any(masks):
            raise Fault("tcgen05.mma with disabled output lanes is not modeled")
        places = accumulator_places(idesc.m, idesc.n, size)
        if d_lane and not (idesc.m == 64 and d_lane == 16):
            raise Fault(f"tcgen05.mma with D at lane {d_lane}")

        used, written = _columns_used(idesc, size, d_column, sf, block, a_value if a_tensor else -1)
        queue = cta.cluster.agents.tensor_queue(cta.rank)
        code = next_stamp(cta)
        shape = (d_lane, d_column, idesc.m, idesc.n, idesc.k, kind, size)
        halves = slice(d_lane // 16, d_lane // 16 + 1) if idesc.m == 64 else slice(0, 2)
        for target in ctas:
            if a_index is not None:
                check_operand(target.shared, a_index, w, "tcgen05.mma reads A")
            check_operand(target.shared, b_index, w, "tcgen05.mma reads B")
            target.tensor.accesses.mma_issued(halves, written, shape, w, code)
            target.tensor.accesses.operation_issued(used, written, w, queue, "tcgen05.mma")
            if a_index is not None:
                target.shared.accesses.pending[a_index] += 1
            target.shared.accesses.pending[b_index] += 1

        def complete() -> None:
            B = np.concatenate(
                [
                    _decode_elements(
                        gather(t.shared, b_index, "tcgen05.mma reads B"),
                        idesc.b_kind, not idesc.transpose_b,
                    )
                    for t in ctas
                ]
            )  # fmt: skip
            for target, (d_lanes, d_columns) in zip(ctas, places, strict=True):
                if a_index is not None:
                    A = _decode_elements(
                        gather(target.shared, a_index, "tcgen05.mma reads A"),
                        idesc.a_kind, not idesc.transpose_a,
                    )  # fmt: skip
                else:
                    A = _a_from_tensor(target.tensor, a_value, idesc, m_part, size)
                Bt = B
                if scaled:
                    count = idesc.k // block
                    sfa = scale_factors(
                        target.tensor, sf[0], m_part, count, idesc.sfa_id, idesc.scale_kind,
                        "scale factors of A",
                    )  # fmt: skip
                    sfb = scale_factors(
                        target.tensor, sf[1], idesc.n, count, idesc.sfb_id, idesc.scale_kind,
                        "scale factors of B",
                    )  # fmt: skip
                    A = A * np.repeat(sfa, block, axis=1)
                    Bt = B * np.repeat(sfb, block, axis=1)
                if idesc.negate_a:
                    A = -A
                if idesc.negate_b:
                    Bt = -Bt
                D = A @ Bt.T
                d_at, d_where = d_lanes + d_lane, d_columns + d_column
                if accumulate:
                    old = target.tensor.read(d_at, d_where, "tcgen05.mma reads D")
                    if idesc.d_kind == "f16":
                        prior = fmt.float_values(old & U32(0xFFFF), "f16")
                    elif idesc.d_kind == "s32":
                        prior = old.view(np.int32).astype(np.float64)
                    else:
                        prior = old.view(np.float32).astype(np.float64)
                    D = D + prior * 2.0**-scale_input
                if idesc.d_kind == "f16":
                    bits = D.astype(np.float16).view(np.uint16).astype(U32)
                elif idesc.d_kind == "s32":
                    bits = D.astype(np.int64).astype(U32)
                else:
                    bits = D.astype(np.float32).view(U32)
                target.tensor.write(d_at, d_where, bits, "tcgen05.mma writes D")
                if a_index is not None:
                    target.shared.accesses.async_read_done(a_index, code)
                target.shared.accesses.async_read_done(b_index, code)
                target.tensor.accesses.operation_done(used, written, code)

        if scaled:
            ids = {1: (0, 1, 2, 3), 2: (0, 2), 4: (0,), 3: (0, 1, 2, 3), 6: (0, 2)}
            allowed = ids[idesc.k // block]
            if idesc.sfa_id not in allowed or idesc.sfb_id not in allowed:
                raise Fault(f"scale factor ids {idesc.sfa_id}, {idesc.sfb_id}")
        push(cta, complete, "tcgen05.mma", line, ctas)

    return run


def _columns_used(
    idesc: InstructionDescriptor, size: int, d_column: int, sf: list[int], block: int, a_value: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tensor memory columns that an mma uses, and those it writes."""
    n = idesc.n // 2 if size == 2 and idesc.m == 128 else idesc.n
    written = np.arange(d_column, d_column + n)
    parts = [written]
    for value, extent in zip(sf, (idesc.m // size, idesc.n), strict=False):
        column = split_address(value & 0x3FFFFFFF)[1]
        count = -(-extent // 32) * -(-(idesc.k // block) // 4)
        parts.append(np.arange(column, column + count))
    if a_value >= 0:
        column = split_address(a_value)[1]
        k_bytes = idesc.k // 2 if idesc.a_kind == "e2m1x2" else idesc.k
        width = k_bytes if idesc.a_kind == "e2m1x2" else k_bytes * _element_bytes(idesc.a_kind)
        parts.append(np.arange(column, column + width // 4))
    used = np.unique(np.concatenate(parts))
    return used[used < 512], written[written < 512]


def _a_from_tensor(
    tensor: TensorMemory, address: int, idesc: InstructionDescriptor, rows: int, size: int
) -> np.ndarray:
    """A operand (rows, k) in tensor memory: a row per lane, elements packed along columns."""
    base, column = split_address(address)
    if idesc.m // size not in (64, 128) or (size == 2 and idesc.m == 128):
        raise Fault("this shape of A in tensor memory is not modeled")
    row = np.arange(rows)
    lanes = (row if rows == 128 else row // 16 * 32 + row % 16) + base
    k_bytes = idesc.k // 2 if idesc.a_kind == "e2m1x2" else idesc.k * _element_bytes(idesc.a_kind)
    where = np.arange(column, column + k_bytes // 4)
    words = tensor.read(lanes[:, None], where[None, :], "tcgen05.mma reads A")
    raw = np.ascontiguousarray(words).view(np.uint8)
    return element_values(raw, idesc.a_kind, True)
