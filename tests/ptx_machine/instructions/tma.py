# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies: cp.async, cp.async.bulk, tensor copies, reductions, and their completion."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..decode import Closure, Context, op
from ..errors import Fault
from ..memory import UNSIGNED, check_launched
from ..order import BULK, BULK_READ, COPY, PROXY, SEEN, stamp
from ..parser import TYPE_BYTES, Instruction, Mem
from ..tensormap import TensorMap, swizzle_offsets
from .memory import atomic_function, lane_addresses, shared_parts
from .sync import check_initialized, shared_target


class Groups:
    """Commit groups of a warp: lists of operations with ``read`` and ``done`` flags.

    Attributes:
        waited: count of the newest operation that a wait covered.
    """

    def __init__(self) -> None:
        self.open: list[Transfer] = []
        self.committed: list[list[Transfer]] = []
        self.waited = 0

    def commit(self) -> None:
        self.committed.append(self.open)
        self.open = []

    def pending(self, keep: int, read: bool) -> list[Transfer]:
        """Operations that a wait for all but the last ``keep`` groups still waits for."""
        limit = max(len(self.committed) - keep, 0)
        covered = [t for group in self.committed[:limit] for t in group]
        waiting = [t for t in covered if not (t.read if read else t.done)]
        if waiting:
            return waiting
        self.waited = max([self.waited] + [t.count for t in covered])
        unfinished = [g for g in self.committed[:limit] if any(not t.done for t in g)]
        self.committed = unfinished + self.committed[limit:]
        return []


class Transfer:
    """One asynchronous copy: ``read`` once its source was read, ``done`` once it is visible."""

    __slots__ = ("count", "done", "read", "waiters")

    def __init__(self, count: int) -> None:
        self.read = self.done = False
        self.count = count
        self.waiters: list = []

    def notify(self) -> None:
        for wake in self.waiters:
            wake()
        self.waiters.clear()


def bulk_groups(w) -> Groups:
    if w.bulk is None:
        w.bulk = Groups()
    return w.bulk


def async_groups(w) -> Groups:
    if w.cp_async is None:
        w.cp_async = Groups()
    return w.cp_async


@op("cp")
def cp(ctx: Context, ins: Instruction) -> Closure:
    text = ins.opcode
    if text == "cp.async.commit_group":
        return lambda w: async_groups(w).commit()
    if text in ("cp.async.wait_group", "cp.async.wait_all"):
        keep = int(ins.operands[0].value) if ins.operands else 0
        return _wait(async_groups, keep, False, (COPY,), everything=text.endswith("all"))
    if text == "cp.async.bulk.commit_group":
        return lambda w: bulk_groups(w).commit()
    if text.startswith("cp.async.bulk.wait_group"):
        read = text.endswith(".read")
        kinds = (BULK_READ,) if read else (BULK_READ, BULK)
        return _wait(bulk_groups, int(ins.operands[0].value), read, kinds)
    if text.startswith("cp.async.mbarrier.arrive"):
        return _cp_async_arrive(ctx, ins)
    if text.startswith("cp.async.bulk.prefetch.tensor"):
        slot, _ = ctx.address(ins.operands[0])
        return lambda w: w.machine.tensor_map(int(w.R[slot][w.first()])) and None
    if text.startswith("cp.async.bulk.prefetch"):
        return lambda w: None
    if text.startswith(("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor")):
        return _tensor(ctx, ins)
    if text.startswith(("cp.async.bulk.", "cp.reduce.async.bulk.")):
        return _bulk(ctx, ins)
    if text.startswith(("cp.async.ca", "cp.async.cg")):
        return _cp_async(ctx, ins)
    raise ctx.error("unknown copy instruction")


def _wait(
    groups: Callable, keep: int, read: bool, kinds: tuple[int, ...], everything: bool = False
) -> Closure:
    def run(w) -> int | None:
        mine = groups(w)
        if everything and mine.open:
            mine.commit()
        waiting = mine.pending(keep, read)
        if not waiting:
            for kind in kinds:
                w.ledger.completed(kind, mine.waited)
            return None
        for transfer in waiting:
            transfer.waiters.append(w.wake)
        return w.block(f"wait_group {keep}: {len(waiting)} copies pending")

    return run


# -- cp.async ----------------------------------------------------------------------------------
def _cp_async(ctx: Context, ins: Instruction) -> Closure:
    dst_slot, dst_offset = ctx.address(ins.operands[0])
    src_slot, src_offset = ctx.address(ins.operands[1])
    size = int(ins.operands[2].value)
    source_size = -1
    if (len(ins.operands) > 3 and "cache_hint" not in ins.opcode) or len(ins.operands) > 4:
        source_size = ctx.src(ins.operands[3], "u32")
    if size not in (4, 8, 16) or (size != 16 and ".cg" in ins.opcode):
        raise ctx.error(f"cp.async of {size} bytes")
    line = ins.line

    def run(w) -> None:
        if not w.active().any():
            return
        dst = lane_addresses(w, dst_slot, dst_offset)
        src = lane_addresses(w, src_slot, src_offset)
        counts = np.full(dst.size, size)
        if source_size >= 0:
            counts = w.R[source_size][w.active()].astype(np.int64)
            if (counts > size).any():
                raise Fault("cp.async: src-size exceeds cp-size")
        if (dst % size).any() or (src[counts > 0] % size).any():
            raise Fault("misaligned cp.async")
        cta = w.cta
        ((_, _, dst),) = shared_parts(w, dst, size, False, "cp.async")
        index = dst[:, None] + np.arange(size)
        for i in range(dst.size):
            row = slice(int(dst[i]), int(dst[i]) + size)
            cta.shared.begin_write(row, row, w)
        transfer = Transfer(w.ledger.next(COPY))
        code = stamp(w.ledger.agent(COPY), transfer.count)
        async_groups(w).open.append(transfer)
        memory = w.machine.memory
        if (counts > 0).any():
            copied = src[counts > 0]
            check_global_read(w, copied[:, None] + np.arange(size), counts[counts > 0], SEEN)

        def complete() -> None:
            values = np.zeros((dst.size, size), np.uint8)
            full = counts == size
            if full.all():
                values[...] = memory.load(src, size).view(np.uint8).reshape(dst.size, -1)
            else:
                for i, n in enumerate(counts):
                    if n:
                        values[i, :n] = memory.read_bytes(int(src[i]), int(n))
            cta.shared.finish_write(index, values, code)
            transfer.read = transfer.done = True
            transfer.notify()

        complete.smem_owner = cta
        w.machine.async_op(complete, "cp.async", line)

    return run


def _cp_async_arrive(ctx: Context, ins: Instruction) -> Closure:
    """Arrives on an mbarrier when the warp's earlier cp.async operations are complete."""
    slot, offset = ctx.address(ins.operands[0])
    noinc = "noinc" in ins.parts
    line = ins.line

    def run(w) -> None:
        barriers = []
        for lane in w.lanes():
            _, where = shared_target(w, int(w.R[slot][lane]) + offset, False, "cp.async.mbarrier")
            barrier = w.cta.shared.barrier(where)
            if not noinc:
                barrier.pending += 1
            barriers.append(barrier)
        groups = async_groups(w)
        before = [t for g in groups.committed for t in g if not t.done]
        before += [t for t in groups.open if not t.done]
        agent, count = w.ledger.agent(COPY), w.ledger.counts[COPY]
        for barrier in barriers:
            check_initialized(barrier, w)

        def arrive() -> None:
            for barrier in barriers:
                known = barrier.known.own[:, agent]
                np.maximum(known, count, out=known)
                barrier.arrive(1)

        if not before:
            w.machine.async_op(arrive, "cp.async.mbarrier.arrive", line)
            return
        left = [len(before)]

        def one() -> None:
            left[0] -= 1
            if left[0] == 0:
                arrive()

        for transfer in before:
            transfer.waiters.append(one)

    return run


# -- bulk copies -------------------------------------------------------------------------------
def _completion(ctx: Context, operands: list) -> tuple[int, int]:
    """The mbarrier operand."""
    memory = next(o for o in operands if isinstance(o, Mem))
    operands.remove(memory)
    return ctx.address(memory)


def _targets(w, cta, mask: int | None) -> list:
    if mask is None:
        return [cta]
    if mask == 0:
        raise Fault("multicast to no CTA")
    if mask >> len(w.cta.cluster.ctas):
        raise Fault(f"multicast mask {mask:#x} for a cluster of {len(w.cta.cluster.ctas)}")
    return [w.cta.cluster.cta(r) for r in range(16) if mask >> r & 1]


def _signal(w, pair: bool, mask: int | None, target, bar_cta, bar_at: int):
    """The mbarrier that a copy to ``target`` completes on."""
    if mask is None:
        if bar_cta is not target and not (pair and bar_cta.rank // 2 == target.rank // 2):
            raise Fault("copy to one CTA completes on an mbarrier of another")
        barrier = bar_cta.shared.barrier(bar_at)
    elif pair:
        rank = (target.rank & ~1) | (bar_cta.rank & 1)
        barrier = w.cta.cluster.cta(rank).shared.barrier(bar_at)
    else:
        barrier = target.shared.barrier(bar_at)
    check_initialized(barrier, w, asynchronous=True)
    return barrier


# -- global memory of copies -------------------------------------------------------------------
def check_global_read(
    w, addresses: slice | np.ndarray, counts: np.ndarray | None, row: int
) -> None:
    """Checks that what a copy will read from global memory is there for it.

    Args:
        addresses: a range, or addresses (copies, bytes) of which each copy reads ``counts``.
        row: whether generic writes must be visible to the async proxy (PROXY) or not (SEEN).
    """
    memory = w.machine.memory
    if isinstance(addresses, slice):
        allocation = memory.find(addresses.start, addresses.stop, "global read")
        index: object = slice(addresses.start - allocation.base, addresses.stop - allocation.base)
    else:
        flat = addresses[np.arange(addresses.shape[1]) < counts[:, None]]
        allocation = memory.find(int(flat.min()), int(flat.max()) + 1, "global read")
        index = flat - allocation.base
    _note_read(w, allocation, index, row)


def check_global_write(w, addresses: slice, number: int, strong: bool) -> None:
    """Notes that a bulk store will write a range of global memory."""
    allocation = w.machine.memory.find(addresses.start, addresses.stop, "global write")
    index = slice(addresses.start - allocation.base, addresses.stop - allocation.base)
    _note_write(w, allocation, index, number, strong)


def _check_box_read(w, tensor: TensorMap, boxes: list) -> None:
    memory, accesses = w.machine.memory, w.machine.global_accesses
    allocation = memory.find(tensor.address, tensor.address + 1, "tensor copy reads")
    check_launched(allocation, w, "copy from")
    if accesses is None or allocation.base not in accesses.writes:
        return
    for box in boxes:
        found = tensor.box_bytes_at(memory, box, "tensor copy reads")
        if found is not None:
            _note_read(w, *found, PROXY)


def _note_read(w, allocation, index: object, row: int) -> None:
    check_launched(allocation, w, "copy from")
    if w.machine.global_accesses is not None:
        w.machine.global_accesses.read(allocation, index, 1, w, row=row)


def _note_write(w, allocation, index: object, number: int, strong: bool) -> None:
    check_launched(allocation, w, "copy to", writes=True)
    if w.machine.global_accesses is not None:
        values = np.zeros(0, np.uint8)  # not known yet
        w.machine.global_accesses.write(allocation, index, 1, values, w, strong, copy=number)


REDUCTIONS = ("and", "or", "xor", "add", "inc", "dec", "min", "max")


def _check_bulk(count: int, address: int, origin: int) -> None:
    if count % 16 or count <= 0 or address % 16 or origin % 16:
        raise Fault(
            f"cp.async.bulk of {count} bytes from {origin:#x} to {address:#x}: "
            "size and addresses must be multiples of 16"
        )


def _bulk(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    spaces = [p for p in parts if p.split("::")[0] in ("shared", "global")]
    to, source = spaces[0], spaces[1]
    multicast = "multicast::cluster" in parts
    combine = None
    if parts[1] == "reduce":
        combine = _combine(next(p for p in parts if p in REDUCTIONS), parts[-1])
    operands = list(ins.operands)
    dst_slot, dst_offset = ctx.address(operands.pop(0))
    src_slot, src_offset = ctx.address(operands.pop(0))
    size = ctx.src(operands.pop(0), "u32")
    line = ins.line
    if to == "global":
        if "cp_mask" in parts:
            raise ctx.error("cp.async.bulk with .cp_mask is not modeled")
        return _bulk_store(dst_slot, dst_offset, src_slot, src_offset, size, combine, line)
    bar_slot, bar_offset = _completion(ctx, operands)
    mask_slot = ctx.src(operands.pop(0), "u16") if multicast else -1

    def copy(w, lane: int) -> None:
        count = int(w.R[size][lane])
        address = int(w.R[dst_slot][lane]) + dst_offset
        origin = int(w.R[src_slot][lane]) + src_offset
        _check_bulk(count, address, origin)
        mask = int(w.R[mask_slot][lane]) if mask_slot >= 0 else None
        cta, at = shared_target(w, address, True, "cp.async.bulk")
        bar = int(w.R[bar_slot][lane]) + bar_offset
        bar_cta, bar_at = shared_target(w, bar, True, "cp.async.bulk")
        targets = _targets(w, cta, mask)
        signals = [_signal(w, False, mask, t, bar_cta, bar_at) for t in targets]
        span = slice(at, at + count)
        for target in targets:
            target.shared.check_range(at, at + count, "cp.async.bulk")
            if combine is None:
                target.shared.begin_write(span, span, w)
        own = w.cta
        source_span = source_chunks = slice(0, 0)
        if source.startswith("shared"):
            _, source_at = shared_target(w, origin, False, "cp.async.bulk source")
            own.shared.check_range(source_at, source_at + count, "cp.async.bulk source")
            source_span = slice(source_at, source_at + count)
            source_chunks = slice(source_at >> 4, (source_at + count) >> 4)
            own.shared.accesses.async_read_issued(source_chunks, w, "cp.async.bulk reads")
        else:
            check_global_read(w, slice(origin, origin + count), None, PROXY)

        def complete() -> None:
            if source.startswith("shared"):
                own.shared.check_readable(source_span, "cp.async.bulk reads")
                own.shared.accesses.async_read_done(source_chunks, signals[0].stamp())
                values = own.shared.data[source_span].copy()
            else:
                values = own.machine.memory.read_bytes(origin, count)
            for target, signal in zip(targets, signals, strict=True):
                if combine is not None:
                    target.shared.check_readable(span, "cp.reduce.async.bulk reads")
                    result = combine(target.shared.data[span].copy(), values)
                else:
                    result = values
                target.shared.finish_write(span, result, signal.stamp())
                signal.add_tx(-count)

        complete.smem_owner = targets[0]
        w.machine.async_op(complete, "cp.async.bulk", line)

    def run(w) -> None:
        for lane in w.lanes():
            copy(w, lane)

    return run


def _combine(name: str, kind: str) -> Callable:
    width = TYPE_BYTES[kind]
    fn = atomic_function(name, kind)
    dtype = UNSIGNED[width]

    def run(old: np.ndarray, new: np.ndarray) -> np.ndarray:
        shape = new.shape
        a = np.ascontiguousarray(old).reshape(-1).view(dtype)
        b = np.ascontiguousarray(new).reshape(-1).view(dtype)
        return np.ascontiguousarray(fn(a, b, b)).view(np.uint8).reshape(shape)

    return run


def _store_transfer(w, count: int, line: int, what: str, read: Callable, write: Callable) -> None:
    """Schedules a store: first the source is read, later the destination is written."""
    from ..machine import AsyncOp, OpQueue

    transfer = Transfer(count)
    bulk_groups(w).open.append(transfer)
    box: list = []

    def do_read() -> None:
        box.append(read())
        transfer.read = True
        transfer.notify()

    def do_write() -> None:
        write(box[0])
        transfer.done = True
        transfer.notify()

    do_read.smem_owner = w.cta
    queue = OpQueue(w.machine)
    queue.push(AsyncOp(do_read, what, line))
    queue.push(AsyncOp(do_write, what, line))


def _bulk_store(dst_slot, dst_offset, src_slot, src_offset, size, combine, line) -> Closure:
    def run(w) -> None:
        memory = w.machine.memory
        for lane in w.lanes():
            count = int(w.R[size][lane])
            address = int(w.R[dst_slot][lane]) + dst_offset
            origin = int(w.R[src_slot][lane]) + src_offset
            _check_bulk(count, address, origin)
            _, at = shared_target(w, origin, False, "cp.async.bulk source")
            shared = w.cta.shared
            shared.check_range(at, at + count, "cp.async.bulk reads")
            span = slice(at, at + count)
            shared.check_readable(span, "cp.async.bulk reads")
            chunks = slice(at >> 4, (at + count) >> 4)
            shared.accesses.async_read_issued(chunks, w, "cp.async.bulk reads")
            number = w.ledger.next(BULK)
            code = stamp(w.ledger.agent(BULK_READ), number)
            check_global_write(w, slice(address, address + count), number, combine is not None)

            def read(shared=shared, span=span, chunks=chunks, code=code) -> np.ndarray:
                shared.check_readable(span, "cp.async.bulk reads")
                shared.accesses.async_read_done(chunks, code)
                return shared.data[span].copy()

            def write(values: np.ndarray, address=address, count=count) -> None:
                if combine is not None:
                    values = combine(memory.read_bytes(address, count), values)
                memory.write_bytes(address, values)

            _store_transfer(w, number, line, "cp.async.bulk", read, write)

    return run


# -- tensor copies -----------------------------------------------------------------------------
def _check_map(tensor: TensorMap, rank: int, shared_offset: int) -> None:
    if len(tensor.dims) != rank:
        raise Fault(f"tensor copy of {rank} dimensions with a map of {len(tensor.dims)}")
    align = 128
    if shared_offset % align:
        raise Fault(f"tensor copy: shared address {shared_offset:#x} is not {align}-byte aligned")


def _tensor(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    text = ins.opcode
    rank = int(next(p for p in parts if p in ("1d", "2d", "3d", "4d", "5d"))[0])
    if "im2col" in text or "scatter4" in text:
        raise ctx.error("im2col and scatter4 tensor copies are not modeled")
    spaces = [p for p in parts if p.split("::")[0] in ("shared", "global")]
    if spaces[0] == "global":
        return _tensor_store(ctx, ins, rank)
    gather = "tile::gather4" in parts
    multicast = "multicast::cluster" in parts
    pair = "cta_group::2" in parts
    operands = list(ins.operands)
    dst_slot, dst_offset = ctx.address(operands.pop(0))
    map_slot, coordinates = _map_operand(ctx, operands.pop(0))
    bar_slot, bar_offset = _completion(ctx, operands)
    mask_slot = ctx.src(operands.pop(0), "u16") if multicast else -1
    cluster_space = spaces[0] != "shared::cta"
    line = ins.line

    def run(w) -> None:
        R = w.R
        for lane in w.lanes():
            tensor = w.machine.tensor_map(int(R[map_slot][lane]))
            where = tuple(int(R[c].view(np.int32)[lane]) for c in coordinates)
            address = int(R[dst_slot][lane]) + dst_offset
            mask = int(R[mask_slot][lane]) if mask_slot >= 0 else None
            cta, at = shared_target(w, address, cluster_space, "tensor copy")
            bar_cta, bar_at = shared_target(
                w, int(R[bar_slot][lane]) + bar_offset, True, "tensor copy"
            )
            _check_map(tensor, rank, at)
            targets = _targets(w, cta, mask)
            signals = [_signal(w, pair, mask, t, bar_cta, bar_at) for t in targets]
            if gather:
                boxes = [(where[0], row) for row in where[1:]]
                count = tensor.box_bytes * 4
            else:
                boxes = [where]
                count = tensor.box_bytes
            if tensor.swizzle == "none":
                index: object = slice(at, at + count)
            else:
                index = swizzle_offsets(at, count, tensor.swizzle)
            for target in targets:
                target.shared.check_range(at, at + count, "tensor copy")
                target.shared.begin_write(index, slice(at, at + count), w)
            _check_box_read(w, tensor, boxes)

            def complete(
                tensor=tensor, boxes=boxes, targets=targets, signals=signals, index=index,
                count=count,
            ) -> None:  # fmt: skip
                memory = w.machine.memory
                values = [tensor.read_box(memory, b) for b in boxes]
                data = values[0] if len(values) == 1 else np.concatenate(values)
                for target, signal in zip(targets, signals, strict=True):
                    target.shared.finish_write(index, data, signal.stamp())
                    signal.add_tx(-count)

            complete.smem_owner = targets[0]
            w.machine.async_op(complete, "tensor load", line)

    return run


def _map_operand(ctx: Context, memory: object) -> tuple[int, list[int]]:
    if not isinstance(memory, Mem) or not memory.extra:
        raise ctx.error("expected [tensorMap, {coordinates}]")
    slot, offset = ctx.address(Mem(memory.base, memory.offset))
    if offset:
        raise ctx.error("offset on a tensor map address")
    return slot, [ctx.src(c, "s32") for c in ctx.vector(memory.extra[0])]


def _tensor_store(ctx: Context, ins: Instruction, rank: int) -> Closure:
    parts = ins.parts
    map_slot, coordinates = _map_operand(ctx, ins.operands[0])
    src_slot, src_offset = ctx.address(ins.operands[1])
    line = ins.line
    reduce_name = None
    if parts[1] == "reduce":
        reduce_name = next(p for p in parts if p in REDUCTIONS)

    def combine_for(tensor: TensorMap) -> Callable | None:
        if reduce_name is None:
            return None
        kinds = {
            "uint32": "u32", "int32": "s32", "uint64": "u64", "int64": "s64", "float16": "f16",
            "float32": "f32", "bfloat16": "bf16", "float64": "f64", "uint8": "u8",
            "uint16": "u16", "float32_ftz": "f32",
        }  # fmt: skip
        return _combine(reduce_name, kinds[tensor.element_type])

    def run(w) -> None:
        R = w.R
        memory = w.machine.memory
        noted: set = set()
        for lane in w.lanes():
            tensor = w.machine.tensor_map(int(R[map_slot][lane]))
            where = tuple(int(R[c].view(np.int32)[lane]) for c in coordinates)
            _, at = shared_target(w, int(R[src_slot][lane]) + src_offset, False, "tensor copy")
            _check_map(tensor, rank, at)
            count = tensor.box_bytes
            shared = w.cta.shared
            shared.check_range(at, at + count, "tensor copy reads")
            if tensor.swizzle == "none":
                index: object = slice(at, at + count)
            else:
                index = swizzle_offsets(at, count, tensor.swizzle)
            shared.check_readable(index, "tensor copy reads")
            chunks = slice(at >> 4, (at + count) >> 4)
            shared.accesses.async_read_issued(chunks, w, "tensor copy reads")
            combine = combine_for(tensor)
            number = w.ledger.next(BULK)
            code = stamp(w.ledger.agent(BULK_READ), number)
            found = tensor.box_bytes_at(memory, where, "tensor copy writes")
            if found is not None and (id(tensor), where, at) not in noted:
                # Lanes that all issue the same store (the CuTe DSL's do) do not race.
                noted.add((id(tensor), where, at))
                _note_write(w, *found, number, combine is not None)

            def read(shared=shared, index=index, chunks=chunks, code=code) -> np.ndarray:
                shared.check_readable(index, "tensor copy reads")
                shared.accesses.async_read_done(chunks, code)
                return np.array(shared.data[index])

            def write(values: np.ndarray, tensor=tensor, where=where, combine=combine) -> None:
                tensor.write_box(memory, where, values, combine)

            _store_transfer(w, number, line, "tensor store", read, write)

    return run


@op("tensormap")
def tensormap(ctx: Context, ins: Instruction) -> Closure:
    raise ctx.error("tensormap.replace is not modeled")
