# SPDX-License-Identifier: Apache-2.0
"""Moves, loads, stores, atomics, address conversion, ldmatrix and stmatrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..decode import WARP, Closure, Context, elementwise, op, put, storage, where
from ..errors import Fault
from ..memory import (
    CTA_SHIFT,
    GENERIC_LOCAL,
    GENERIC_SHARED,
    PARAM_BASE,
    UNSIGNED,
    words_of,
)
from ..order import LEVELS
from ..parser import TYPE_BYTES, Discard, Instruction, Mem, Reg, Sym, Vec
from . import floating

if TYPE_CHECKING:
    from ..machine import Cta

U32, U64 = np.uint32, np.uint64
OFFSET_MASK = (1 << CTA_SHIFT) - 1
TIMERS = ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo", "%globaltimer_hi")


# -- mov ---------------------------------------------------------------------------------------
@op("mov")
def mov(ctx: Context, ins: Instruction) -> Closure:
    kind = ins.parts[-1]
    first, second = ins.operands
    if isinstance(first, Vec):
        return _unpack(ctx, first, second, kind)
    if isinstance(second, Vec):
        return _pack(ctx, first, second, kind)
    dst = ctx.dst(first)
    if isinstance(second, Reg) and second.name in TIMERS:
        return _timer(ctx, dst, second.name)
    if kind == "b128":
        a = ctx.reg(second.name)
        return lambda w: put(w, dst, w.R[a])
    if kind == "pred" and isinstance(second, Reg) and second.negated:
        a = ctx.reg(second.name)
        return elementwise(np.invert, dst, a)
    a = ctx.src(second, kind)
    dtype = storage(kind)
    if isinstance(second, Sym) or (isinstance(second, Reg) and second.name not in ctx.kinds):
        return elementwise(lambda x: x.astype(dtype), dst, a)

    def run(w) -> None:
        R = w.R
        m = w.mask
        R[dst] = R[a] if m is None else where(m, R[a], R[dst])

    return run


def _timer(ctx: Context, dst: int, name: str) -> Closure:
    wide = name in ("%clock64", "%globaltimer")

    def run(w) -> None:
        machine = w.machine
        machine.clock += 32
        value = machine.clock + machine.instructions_run
        if name.endswith("_hi"):
            value >>= 32
        put(w, dst, np.full(WARP, value if wide else value & 0xFFFFFFFF, U64 if wide else U32))

    return run


def _unpack(ctx: Context, target: Vec, source: object, kind: str) -> Closure:
    total = TYPE_BYTES[kind]
    part = total // len(target.items)
    dsts = [ctx.dst(o) for o in target.items]
    a = ctx.src(source, kind) if kind != "b128" else ctx.reg(source.name)
    keep = [storage(ctx.kinds[o.name]) if isinstance(o, Reg) else None for o in target.items]

    def run(w) -> None:
        pieces = np.ascontiguousarray(w.R[a]).view(UNSIGNED[part]).reshape(WARP, -1)
        for i, dst in enumerate(dsts):
            if dst >= 0:
                put(w, dst, pieces[:, i].astype(keep[i]))

    return run


def _pack(ctx: Context, target: object, source: Vec, kind: str) -> Closure:
    total = TYPE_BYTES[kind]
    part = total // len(source.items)
    dst = ctx.dst(target)
    srcs = [ctx.src(o, f"b{8 * part}") for o in source.items]
    out = U64 if kind == "b128" else storage(kind)

    def run(w) -> None:
        pieces = np.empty((WARP, len(srcs)), UNSIGNED[part])
        for i, s in enumerate(srcs):
            pieces[:, i] = w.R[s]
        value = pieces.view(out)
        put(w, dst, value if kind == "b128" else value.reshape(-1))

    return run


# -- address spaces ----------------------------------------------------------------------------
@op("cvta")
def cvta(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    to = "to" in parts
    space = next(p.split("::")[0] for p in parts if p.split("::")[0] in
                 ("global", "shared", "local", "const", "param"))  # fmt: skip
    dst = ctx.dst(ins.operands[0])
    kind = parts[-1]
    a = ctx.src(ins.operands[1], kind)
    base = {"shared": GENERIC_SHARED, "local": GENERIC_LOCAL}.get(space, 0)
    if base == 0:
        return elementwise(lambda x: x.astype(U64), dst, a)
    shift = U64(base)
    if kind == "u32":
        raise ctx.error("32-bit generic addresses")
    if to:
        return elementwise(lambda x: x - shift, dst, a)
    return elementwise(lambda x: x.astype(U64) + shift, dst, a)


@op("isspacep")
def isspacep(ctx: Context, ins: Instruction) -> Closure:
    space = ins.parts[1]
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], "u64")

    def run(w) -> None:
        x = w.R[a].astype(np.int64)
        shared = x >= GENERIC_SHARED
        local = (x >= GENERIC_LOCAL) & ~shared
        param = (x >= PARAM_BASE) & ~shared & ~local
        if space == "shared::cluster":
            result = shared
        elif space.startswith("shared"):
            result = shared & (((x - GENERIC_SHARED) >> CTA_SHIFT) == w.cta.rank)
        elif space == "local":
            result = local
        elif space == "param":
            result = param
        else:
            result = ~(shared | local | param)
        put(w, dst, result)

    return run


@op("mapa")
def mapa(ctx: Context, ins: Instruction) -> Closure:
    generic = not any(p.startswith("shared") for p in ins.parts)
    kind = ins.parts[-1]
    dst = ctx.dst(ins.operands[0])
    a = ctx.src(ins.operands[1], kind)
    b = ctx.src(ins.operands[2], "u32")
    dtype = storage(kind)

    def run(w) -> None:
        x = w.R[a].astype(np.int64)
        # A rank that the cluster does not have is an error once the address is used.
        rank = np.minimum(w.R[b].astype(np.int64), 0xFF)
        offset = (x - GENERIC_SHARED if generic else x) & OFFSET_MASK
        value = offset + (rank << CTA_SHIFT) + (GENERIC_SHARED if generic else 0)
        put(w, dst, value.astype(dtype))

    return run


@op("getctarank")
def getctarank(ctx: Context, ins: Instruction) -> Closure:
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], ins.parts[-1])
    return elementwise(
        lambda x: ((x.astype(U64) >> U64(CTA_SHIFT)) & U64(0xFF)).astype(U32), dst, a
    )


@op("createpolicy")
def createpolicy(ctx: Context, ins: Instruction) -> Closure:
    dst = ctx.dst(ins.operands[0])
    return lambda w: put(w, dst, np.zeros(WARP, U64))


@op("alloca", "stacksave", "stackrestore")
def alloca(ctx: Context, ins: Instruction) -> Closure:
    raise ctx.error("dynamic stack allocation is not modeled")


# -- loads and stores --------------------------------------------------------------------------
SPACES = ("global", "shared", "local", "param", "const")
STRONG = ("volatile", "acquire", "release", "acq_rel", "relaxed", "mmio", "atom", "red")


class Access:
    """Decoded space, vector length and element type of a memory instruction."""

    def __init__(self, ctx: Context, ins: Instruction) -> None:
        parts = ins.parts
        self.space = next((p for p in parts[1:] if p.split("::")[0] in SPACES), "generic")
        self.cluster = self.space == "shared::cluster"
        self.space = self.space.split("::")[0]
        self.vector = next((int(p[1:]) for p in parts if p in ("v2", "v4", "v8")), 1)
        self.kind = next(p for p in reversed(parts) if p in TYPE_BYTES)
        self.width = TYPE_BYTES[self.kind]
        if self.kind == "b128":
            self.width, self.vector = 8, 2 * self.vector
        self.total = self.width * self.vector
        # Strong: morally strong accesses do not race with each other, and carry messages.
        self.strong = any(p in STRONG for p in parts)
        self.acquire = any(p in ("acquire", "acq_rel") for p in parts)
        self.release = any(p in ("release", "acq_rel") for p in parts)
        scope = next((p for p in parts if p in LEVELS), "gpu")
        self.level = LEVELS[scope]


def _check_aligned(addresses: np.ndarray, total: int, what: str) -> None:
    if total > 1 and (addresses & (total - 1)).any():
        bad = int(addresses[int(np.argmax((addresses & (total - 1)) != 0))])
        raise Fault(f"misaligned {what}: address {bad:#x} for {total} bytes")


def resolve_space(addresses: np.ndarray, space: str) -> tuple[str, np.ndarray]:
    """Space and in-space addresses (int64) of lanes that all access one space."""
    if space != "generic":
        if space == "shared" and addresses.size and int(addresses.max()) >= GENERIC_SHARED:
            raise Fault("a generic address used in the shared space (cvta.to.shared missing)")
        return space, addresses
    top = int(addresses.max())
    low = int(addresses.min())
    for base, name in ((GENERIC_SHARED, "generic_shared"), (GENERIC_LOCAL, "local"),
                       (PARAM_BASE, "param")):  # fmt: skip
        if top >= base:
            if low < base:
                raise Fault("lanes of one generic access reach different spaces")
            return name, addresses - base if name != "param" else addresses
    return "global", addresses


def shared_parts(
    w, addresses: np.ndarray, total: int, cluster: bool, what: str
) -> list[tuple[Cta, slice | np.ndarray, np.ndarray]]:
    """(CTA, selection, offsets) of shared addresses of ``total`` bytes each, within bounds."""
    own = w.cta.rank
    low, high = int(addresses.min()), int(addresses.max())
    if low >> CTA_SHIFT == high >> CTA_SHIFT == own:
        w.cta.shared.check_range(low & OFFSET_MASK, (high & OFFSET_MASK) + total, what)
        return [(w.cta, slice(None), addresses & OFFSET_MASK)]
    ranks = addresses >> CTA_SHIFT
    offsets = addresses & OFFSET_MASK
    if not cluster:
        bad = int(addresses[int(np.argmax(ranks != own))])
        raise Fault(f"{what}: shared address {bad:#x} is outside of this CTA's window")
    parts = []
    for rank in np.unique(ranks):
        selection = ranks == rank
        cta, part = w.cta.cluster.cta(int(rank)), offsets[selection]
        cta.shared.check_range(int(part.min()), int(part.max()) + total, what)
        parts.append((cta, selection, part))
    return parts


def load_words(w, addresses: np.ndarray, acc: Access) -> np.ndarray:
    """Words (n, vector) at int64 lane addresses."""
    _check_aligned(addresses, acc.total, "read")
    space, addresses = resolve_space(addresses, acc.space)
    count, width = acc.vector, acc.width
    if space in ("global", "const"):
        words = w.machine.memory.load(addresses, acc.total, w, acc.strong)
        return words.view(UNSIGNED[width]).reshape(-1, count)
    if space in ("shared", "generic_shared"):
        cluster = acc.cluster or space == "generic_shared"
        parts = shared_parts(w, addresses, acc.total, cluster, "read")
        if len(parts) == 1:
            ((cta, _, offsets),) = parts
            words = cta.shared.load(offsets, acc.total, w, acc.strong)
            return words.view(UNSIGNED[width]).reshape(-1, count)
        out = np.empty((addresses.size, count), UNSIGNED[width])
        for cta, selection, offsets in parts:
            words = cta.shared.load(offsets, acc.total, w, acc.strong)
            out[selection] = words.view(UNSIGNED[width]).reshape(-1, count)
        return out
    if space == "local":
        index = _local_index(w, addresses, acc.total, "read")
        data, written = w.local_memory()
        if not written[index].all():
            raise Fault("read of local memory that was never written")
        return data[index].view(UNSIGNED[width])
    if space == "param":
        spread = (addresses[:, None] + np.arange(0, acc.total, width)).reshape(-1)
        words = [w.machine.load_param(int(a) - PARAM_BASE, width) for a in spread]
        return np.array(words, UNSIGNED[width]).reshape(-1, count)
    raise Fault(f"read of space {space}")


def store_words(w, addresses: np.ndarray, values: np.ndarray, acc: Access) -> None:
    """Stores words (n, vector) at int64 lane addresses."""
    _check_aligned(addresses, acc.total, "write")
    space, addresses = resolve_space(addresses, acc.space)
    if space == "global":
        words = words_of(np.ascontiguousarray(values).reshape(-1), acc.total)
        w.machine.memory.store(addresses, words, acc.total, w, acc.strong)
        w.machine.progress()
        return
    if space in ("shared", "generic_shared"):
        cluster = acc.cluster or space == "generic_shared"
        words = words_of(np.ascontiguousarray(values).reshape(-1), acc.total)
        for cta, selection, offsets in shared_parts(w, addresses, acc.total, cluster, "write"):
            cta.shared.store(offsets, words[selection], acc.total, w, acc.strong)
        w.machine.progress()
        return
    if space == "local":
        index = _local_index(w, addresses, acc.total, "write")
        data, written = w.local_memory()
        data[index] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, acc.total)
        written[index] = True
        return
    raise Fault(f"write to space {space}")


def _local_index(w, addresses: np.ndarray, total: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Lanes (n, 1) and bytes (n, total) of the active lanes' local memory."""
    index = addresses[:, None] + np.arange(total)
    if index.min() < 0 or index.max() >= w.local_memory()[0].shape[1]:
        raise Fault(f"local memory {what} out of bounds")
    return w.lanes()[:, None], index


def message_keys(w, addresses: np.ndarray, acc: Access) -> list:
    """Names of the locations that lanes access, alike for every address that reaches them."""
    space, addresses = resolve_space(addresses, acc.space)
    flat = {int(a) for a in addresses}
    return [a if space == "global" else (w.cta.cluster, a) for a in flat]


def take_messages(w, addresses: np.ndarray, acc: Access) -> None:
    """What an acquire learns at the locations it reads."""
    messages = w.machine.messages
    if messages.found:
        for key in message_keys(w, addresses, acc):
            messages.take(key, w, acc.acquire, acc.level)


def leave_messages(w, addresses: np.ndarray, acc: Access, joined: bool) -> None:
    """What a release leaves at the locations it writes."""
    for key in message_keys(w, addresses, acc):
        w.machine.messages.leave(key, w, acc.release, acc.level, joined)


def lane_addresses(w, slot: int, offset: int) -> np.ndarray:
    """int64 addresses of the active lanes."""
    a = w.R[slot]
    if w.mask is not None:
        a = a[w.mask]
    a = a.astype(np.int64)
    return a + offset if offset else a


def _extend(kind: str, dtype: type) -> Callable[[np.ndarray], np.ndarray]:
    """Widens a loaded word to the register, with the sign for the signed types."""
    if kind[0] == "s":
        signed = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}[TYPE_BYTES[kind]]
        wide = {2: np.int16, 4: np.int32, 8: np.int64}[dtype().itemsize]
        return lambda x: np.ascontiguousarray(x).view(signed).astype(wide).view(dtype)
    return lambda x: x.astype(dtype)


@op("ld", "ldu")
def ld(ctx: Context, ins: Instruction) -> Closure:
    acc = Access(ctx, ins)
    if acc.space == "param":
        closure = _ld_param(ctx, ins, acc)
        if closure is not None:
            return closure
    items = ctx.vector(ins.operands[0])
    slot, offset = ctx.address(ins.operands[1])
    dsts = [ctx.dst(o) for o in items]
    if acc.kind == "b128":
        (dst,) = dsts

        def run128(w) -> None:
            words = load_words(w, lane_addresses(w, slot, offset), acc)
            out = w.R[dst].copy()
            out[w.lanes()] = words
            w.R[dst] = out

        return run128
    kinds = [storage(ctx.kinds[o.name]) if not isinstance(o, Discard) else U32 for o in items]
    extend = [_extend(acc.kind, k) for k in kinds]

    def run(w) -> None:
        addresses = lane_addresses(w, slot, offset)
        words = load_words(w, addresses, acc)
        if acc.strong:
            take_messages(w, addresses, acc)
        m = w.mask
        R = w.R
        for i, dst in enumerate(dsts):
            if dst < 0:
                continue
            value = extend[i](words[:, i])
            if m is None:
                R[dst] = value
            else:
                old = R[dst]
                out = np.zeros(WARP, value.dtype) if old is None else old.copy()
                out[m] = value
                R[dst] = out

    return run


def _ld_param(ctx: Context, ins: Instruction, acc: Access) -> Closure | None:
    memory = ins.operands[1]
    assert isinstance(memory, Mem)
    items = ctx.vector(ins.operands[0])
    dsts = [ctx.dst(o) for o in items]
    kinds = [storage(ctx.kinds[o.name]) for o in items]
    extend = [_extend(acc.kind, k) for k in kinds]
    if not isinstance(memory.base, Sym):
        slot, offset = ctx.address(memory)

        def indirect(w) -> None:
            addresses = lane_addresses(w, slot, offset)
            words = load_words(w, addresses, acc)
            for i, dst in enumerate(dsts):
                value = np.zeros(WARP, kinds[i])
                value[w.active()] = extend[i](words[:, i])
                put(w, dst, value)

        return indirect
    name, at = memory.base.name, memory.offset
    is_kernel = ctx.function.is_entry and any(p.name == name for p in ctx.function.params)
    if is_kernel:

        def run(w) -> None:
            machine = w.machine
            base = w.program.params[name][0] + at
            for i, dst in enumerate(dsts):
                word = machine.load_param(base + i * acc.width, acc.width)
                raw = np.full(WARP, word, UNSIGNED[acc.width])
                put(w, dst, extend[i](raw))

        return run

    def run_call(w) -> None:
        space = w.param_space()[name]
        for i, dst in enumerate(dsts):
            start = at + i * acc.width
            raw = np.ascontiguousarray(space[:, start : start + acc.width])
            put(w, dst, extend[i](raw.view(UNSIGNED[acc.width]).reshape(-1)))

    return run_call


@op("st")
def st(ctx: Context, ins: Instruction) -> Closure:
    if "async" in ins.parts:
        return _st_async(ctx, ins)
    if "bulk" in ins.parts:
        raise ctx.error("st.bulk is not modeled")
    acc = Access(ctx, ins)
    items = ctx.vector(ins.operands[1])
    kind = f"b{8 * acc.width}"
    dtype = UNSIGNED[acc.width]
    if acc.space == "param":
        memory = ins.operands[0]
        srcs = [ctx.src(o, kind) for o in items]
        sizes = {v.name: v.size for v in ctx.function.variables + ctx.function.returns}
        name, at = memory.base.name, memory.offset

        def run_param(w) -> None:
            space = w.param_space()
            if name not in space:
                space[name] = np.zeros((WARP, max(sizes[name], 1)), np.uint8)
            for i, s in enumerate(srcs):
                start = at + i * acc.width
                raw = w.R[s].astype(dtype).view(np.uint8).reshape(WARP, -1)
                space[name][:, start : start + acc.width] = raw

        return run_param
    slot, offset = ctx.address(ins.operands[0])
    if acc.kind == "b128":
        source = ctx.reg(items[0].name)
        return lambda w: store_words(
            w, lane_addresses(w, slot, offset), w.R[source][w.active()], acc
        )
    srcs = [ctx.src(o, kind) for o in items]

    def run(w) -> None:
        addresses = lane_addresses(w, slot, offset)
        m = w.mask
        values = np.empty((addresses.size, len(srcs)), dtype)
        for i, s in enumerate(srcs):
            values[:, i] = w.R[s] if m is None else w.R[s][m]
        if acc.strong:
            leave_messages(w, addresses, acc, False)
        store_words(w, addresses, values, acc)

    return run


def _st_async(ctx: Context, ins: Instruction) -> Closure:
    """st.async: stores to shared memory of the cluster and counts its bytes on an mbarrier."""
    from .sync import shared_target

    acc = Access(ctx, ins)
    slot, offset = ctx.address(ins.operands[0])
    items = ctx.vector(ins.operands[1])
    bar_slot, bar_offset = ctx.address(ins.operands[2])
    dtype = UNSIGNED[acc.width]
    srcs = [ctx.src(o, f"b{8 * acc.width}") for o in items]
    line = ins.line

    def run(w) -> None:
        values = np.stack([w.R[s].astype(dtype) for s in srcs], axis=1)
        for lane in w.lanes():
            address = int(w.R[slot][lane]) + offset
            if address % acc.total:
                raise Fault(f"misaligned st.async to {address:#x}")
            cta, at = shared_target(w, address, True, "st.async")
            bar_cta, bar_at = shared_target(
                w, int(w.R[bar_slot][lane]) + bar_offset, True, "st.async"
            )
            if bar_cta is not cta:
                raise Fault("st.async: the mbarrier is in another CTA than the destination")
            cta.shared.check_range(at, at + acc.total, "st.async")
            span = slice(at, at + acc.total)
            cta.shared.begin_write(span, span, w)
            data = values[lane].view(np.uint8)

            def complete(cta=cta, span=span, data=data, bar_at=bar_at) -> None:
                barrier = cta.shared.barrier(bar_at)
                cta.shared.finish_write(span, data, barrier.stamp())
                barrier.add_tx(-acc.total)

            w.machine.async_op(complete, "st.async", line)

    return run


# -- atomics -----------------------------------------------------------------------------------
def atomic_function(name: str, kind: str) -> Callable:
    """Combines (old, operand) word arrays for one kind of atomic."""
    dtype = UNSIGNED[TYPE_BYTES[kind]]
    if kind in floating.FLOAT_KINDS:
        if name == "add":
            parts = ["add", "rn", kind]
            half = floating.lanewise(kind, "add", parts)
            return lambda old, x, y: half(old, x)
        if name in ("min", "max") and kind in ("f16", "bf16", "f16x2", "bf16x2"):

            def pick(old: np.ndarray, x: np.ndarray, y: object) -> np.ndarray:
                from .. import formats as fmt

                a, b = old.view(np.uint16), x.view(np.uint16)
                base = "f16" if kind.startswith("f16") else "bf16"
                va, vb = fmt.float_values(a, base), fmt.float_values(b, base)
                take = (vb < va) if name == "min" else (vb > va)
                return where(take | np.isnan(va), b, a).view(old.dtype)

            return pick
        if name == "exch":
            return lambda old, x, y: x
        raise ValueError(f"atomic {name}.{kind}")
    signed = {4: np.int32, 8: np.int64, 2: np.int16}[TYPE_BYTES[kind]] if kind[0] == "s" else None

    def view(x: np.ndarray) -> np.ndarray:
        return x.view(signed) if signed else x

    table = {
        "add": lambda old, x, y: old + x,
        "exch": lambda old, x, y: x,
        "and": lambda old, x, y: old & x,
        "or": lambda old, x, y: old | x,
        "xor": lambda old, x, y: old ^ x,
        "min": lambda old, x, y: where(view(x) < view(old), x, old),
        "max": lambda old, x, y: where(view(x) > view(old), x, old),
        "cas": lambda old, x, y: where(old == x, y, old),
        "inc": lambda old, x, y: where(old >= x, dtype(0), old + dtype(1)),
        "dec": lambda old, x, y: where((old == 0) | (old > x), x, old - dtype(1)),
    }
    return table[name]


@op("atom", "red")
def atom(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    returns = parts[0] == "atom"
    if "async" in parts:
        return _red_async(ctx, ins)
    acc = Access(ctx, ins)
    names = ("add", "exch", "and", "or", "xor", "min", "max", "cas", "inc", "dec")
    name = next(p for p in parts if p in names)
    operands = list(ins.operands)
    dsts = [ctx.dst(o) for o in ctx.vector(operands.pop(0))] if returns else []
    slot, offset = ctx.address(operands[0])
    items = ctx.vector(operands[1])
    kind = acc.kind
    xs = [ctx.src(o, kind) for o in items]
    y = ctx.src(operands[2], kind) if name == "cas" else -1
    fn = atomic_function(name, kind)
    word = UNSIGNED[acc.width]
    single = Access(ctx, ins)
    single.vector, single.total = 1, acc.width

    def run(w) -> None:
        addresses = lane_addresses(w, slot, offset)
        _check_aligned(addresses, acc.total, "atomic")
        lanes = w.lanes()
        order = list(range(len(lanes)))
        w.machine.rng.shuffle(order)
        take_messages(w, addresses, acc)
        leave_messages(w, addresses, acc, True)
        for e, x in enumerate(xs):
            old_values = np.zeros(WARP, word)
            values = w.R[x].astype(word)
            third = w.R[y].astype(word) if y >= 0 else values
            for i in order:  # one lane after the other, in an order of the schedule
                lane = lanes[i]
                at = addresses[i : i + 1] + e * acc.width
                with_mask, w.mask = w.mask, np.arange(WARP) == lane
                try:
                    old = load_words(w, at, single).reshape(-1)
                    new = fn(old, values[lane : lane + 1], third[lane : lane + 1])
                    new = np.ascontiguousarray(new).astype(word)
                    if new[0] != old[0]:  # an atomic that polls is no progress
                        store_words(w, at, new, single)
                finally:
                    w.mask = with_mask
                old_values[lane] = old[0]
            if dsts and dsts[e] >= 0:
                put(w, dsts[e], old_values.astype(storage(kind)))

    return run


def _red_async(ctx: Context, ins: Instruction) -> Closure:
    from .sync import shared_target

    parts = ins.parts
    kind = parts[-1]
    width = TYPE_BYTES[kind]
    name = next(p for p in parts if p in ("inc", "dec", "min", "max", "add", "and", "or", "xor"))
    slot, offset = ctx.address(ins.operands[0])
    x = ctx.src(ins.operands[1], kind)
    bar_slot, bar_offset = ctx.address(ins.operands[2])
    fn = atomic_function(name, kind)
    line = ins.line

    def run(w) -> None:
        for lane in w.lanes():
            cta, at = shared_target(w, int(w.R[slot][lane]) + offset, True, "red.async")
            _, bar_at = shared_target(w, int(w.R[bar_slot][lane]) + bar_offset, True, "red.async")
            value = w.R[x][lane : lane + 1]

            def complete(cta=cta, at=at, value=value, bar_at=bar_at) -> None:
                span = slice(at, at + width)
                cta.shared.check_readable(span, "red.async")
                old = cta.shared.data[span].copy().view(UNSIGNED[width])
                new = np.ascontiguousarray(fn(old, value, value)).view(np.uint8)
                barrier = cta.shared.barrier(bar_at)
                cta.shared.finish_write(span, new, barrier.stamp())
                barrier.add_tx(-width)

            w.machine.async_op(complete, "red.async", line)

    return run


# -- ldmatrix and stmatrix ---------------------------------------------------------------------
def _matrix_rows(w, slot: int, offset: int, count: int, what: str, align: int = 16) -> np.ndarray:
    """Offsets in this CTA's shared memory of the rows that lanes 0 .. 8*count-1 point to."""
    if w.mask is not None:
        raise Fault(f"{what} with inactive lanes")
    addresses = w.R[slot][: 8 * count].astype(np.int64) + offset
    if (addresses >= GENERIC_SHARED).any():
        addresses = addresses - GENERIC_SHARED
    _check_aligned(addresses, align, what)
    ((_, _, offsets),) = shared_parts(w, addresses, align, False, what)
    return offsets


def _read_rows(w, rows: np.ndarray) -> np.ndarray:
    """The 16-byte rows at offsets, (rows, 16) bytes."""
    return w.cta.shared.load(rows, 16, w).view(np.uint8)


@op("ldmatrix")
def ldmatrix(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    shape = next(p for p in parts if p.startswith(("m8n", "m16n")))
    count = int(next(p for p in parts if p in ("x1", "x2", "x4"))[1:])
    trans = "trans" in parts
    dsts = [ctx.dst(o) for o in ctx.vector(ins.operands[0])]
    slot, offset = ctx.address(ins.operands[1])
    if shape == "m8n8":

        def run(w) -> None:
            raw = _read_rows(w, _matrix_rows(w, slot, offset, count, "ldmatrix"))
            for i, dst in enumerate(dsts):
                matrix = np.ascontiguousarray(raw[8 * i : 8 * i + 8]).view(np.uint16)
                if trans:
                    matrix = np.ascontiguousarray(matrix.T)
                w.R[dst] = matrix.view(U32).reshape(-1)

        return run
    if shape not in ("m8n16", "m16n16"):
        raise ctx.error(f"ldmatrix shape {shape}")
    packed = next((p for p in parts if p in ("b4x16_p64", "b6x16_p32")), "")

    def widen(raw: np.ndarray) -> np.ndarray:
        """(rows, 16) bytes of a row to 16 one-byte elements, unpacked from 4 or 6 bits."""
        if packed == "b4x16_p64":
            codes = np.stack([raw[:, :8] & 15, raw[:, :8] >> 4], axis=2).reshape(-1, 16)
            return codes.astype(np.uint8)  # in the low four bits; mma wants them moved up by two
        if packed == "b6x16_p32":
            bits = np.unpackbits(raw[:, :12], axis=1, bitorder="little").reshape(-1, 16, 6)
            return (bits * (1 << np.arange(6))).sum(axis=2).astype(np.uint8)
        return raw

    if shape == "m8n16":

        def run8(w) -> None:
            raw = widen(_read_rows(w, _matrix_rows(w, slot, offset, count, "ldmatrix")))
            for i, dst in enumerate(dsts):
                w.R[dst] = np.ascontiguousarray(raw[8 * i : 8 * i + 8]).view(U32).reshape(-1)

        return run8
    if not trans or count == 4:
        raise ctx.error("ldmatrix.m16n16 needs .trans and .x1 or .x2")
    lane = np.arange(WARP)
    element = np.arange(4)

    def run16(w) -> None:
        raw = widen(_read_rows(w, _matrix_rows(w, slot, offset, 2 * count, "ldmatrix")))
        column = (lane // 4)[:, None] + 8 * (element // 2)[None, :]
        for i, dst in enumerate(dsts):
            matrix, half = divmod(i, 2)
            row = 16 * matrix + (4 * (lane % 4))[:, None] + 2 * half + (element % 2)[None, :]
            w.R[dst] = np.ascontiguousarray(raw[row, column]).view(U32).reshape(-1)

    return run16


@op("stmatrix")
def stmatrix(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    shape = next(p for p in parts if p.startswith(("m8n", "m16n")))
    count = int(next(p for p in parts if p in ("x1", "x2", "x4"))[1:])
    trans = "trans" in parts
    slot, offset = ctx.address(ins.operands[0])
    srcs = [ctx.src(o, "b32") for o in ctx.vector(ins.operands[1])]
    if (shape == "m16n8") != (parts[-1] == "b8") or (shape == "m16n8" and not trans):
        raise ctx.error("stmatrix is .m8n8 of b16, or .m16n8.trans of b8")
    lane, element = np.arange(WARP), np.arange(4)
    row8 = (2 * (lane % 4))[:, None] + (element % 2)[None, :]
    column8 = (lane // 4)[:, None] + 8 * (element // 2)[None, :]

    def run(w) -> None:
        rows = _matrix_rows(w, slot, offset, count, "stmatrix")
        for i, s in enumerate(srcs):
            raw = np.ascontiguousarray(w.R[s])
            if shape == "m8n8":
                matrix = raw.view(np.uint16).reshape(8, 8)
                if trans:
                    matrix = np.ascontiguousarray(matrix.T)
                words = matrix.view(U64).reshape(8, 2)
            else:  # 16x8 of b8, always transposed: 8 rows of 16 bytes in memory
                matrix = np.empty((8, 16), np.uint8)
                matrix[row8, column8] = raw.view(np.uint8).reshape(WARP, 4)
                words = matrix.view(U64).reshape(8, 2)
            w.cta.shared.store(rows[8 * i : 8 * i + 8], words, 16, w)

    return run
