# SPDX-License-Identifier: Apache-2.0
"""CTA and cluster barriers, mbarriers, fences."""

from __future__ import annotations

import numpy as np

from ..decode import WARP, YIELD, Closure, Context, op, put
from ..errors import Fault
from ..memory import CTA_SHIFT, GENERIC_SHARED
from ..order import CLOCK_BITS, CLOCK_MASK, LEVELS, PROXY, SEEN, Knowledge
from ..parser import Instruction, Mem

U64 = np.uint64


# -- bar and barrier ---------------------------------------------------------------------------
def _named_barrier(cta, number: int) -> dict:
    if not 0 <= number < 16:
        raise Fault(f"barrier {number} is not in 0..15")
    state = cta.barriers.get(number)
    if state is None:
        state = {"arrived": 0, "warps": [], "count": 0, "all": False, "members": [],
                 "known": Knowledge(cta.cluster.agents)}  # fmt: skip
        cta.barriers[number] = state

        def check() -> None:
            if not state["arrived"]:
                return
            needed = cta.live_threads() if state["all"] else state["count"]
            if state["arrived"] > needed:
                raise Fault(
                    f"barrier {number}: {state['arrived']} threads arrived, {needed} expected"
                )
            if state["arrived"] == needed:
                waiting, known = state["warps"], state["known"]
                state.update(arrived=0, warps=[], members=[], known=Knowledge(cta.cluster.agents))
                for warp, key in waiting:
                    warp.ledger.acquire(known)
                    warp.token[key] = True
                    warp.wake()
                cta.machine.progress()

        state["check"] = check
    return state


@op("bar", "barrier")
def bar(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    if parts[1] == "warp":
        return _bar_warp(ctx, ins)
    if parts[1] == "cluster":
        return _barrier_cluster(ctx, ins)
    action = next(p for p in parts if p in ("sync", "arrive", "red"))
    if action == "red":
        return _bar_red(ctx, ins)
    number = ctx.src(ins.operands[0], "u32")
    count = ctx.src(ins.operands[1], "u32") if len(ins.operands) > 1 else -1
    key = ("bar", ctx.index)

    def run(w) -> int | None:
        if w.token.pop(key, False):
            return None
        lane = w.first()
        if w.mask is not None and not (w.mask == w.live).all():
            raise Fault("barrier with inactive lanes: the whole warp must take part")
        state = _named_barrier(w.cta, int(w.R[number][lane]))
        if count >= 0:
            expected = int(w.R[count][lane])
            if expected % WARP or expected == 0:
                raise Fault(f"barrier with {expected} threads, not a multiple of the warp size")
        else:
            expected = 0
        if state["arrived"] and (state["all"] != (count < 0) or state["count"] != expected):
            raise Fault("warps of one barrier disagree on its thread count")
        state["all"], state["count"] = count < 0, expected
        if w in state["members"]:
            raise Fault("a warp arrived twice at a barrier that has not completed")
        state["members"].append(w)
        state["known"].join(w.ledger.release())
        state["arrived"] += int(w.live.sum()) if count < 0 else WARP
        if action == "arrive":
            state["check"]()
            return None
        state["warps"].append((w, key))
        result = w.block(f"barrier {int(w.R[number][lane])}")
        state["check"]()
        return result

    return run


def _bar_red(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    name = next(p for p in parts if p in ("popc", "and", "or"))
    dst = ctx.dst(ins.operands[0])
    number = ctx.src(ins.operands[1], "u32")
    has_count = len(ins.operands) > 3
    p = ctx.pred(ins.operands[-1])
    key = ("bar", ctx.index)
    shared: dict = {}

    def run(w) -> int | None:
        if w.token.pop(key, False):
            total, threads = w.token.pop(("red", ctx_index))
            if name == "popc":
                put(w, dst, np.full(WARP, total, np.uint32))
            else:
                put(w, dst, np.full(WARP, total == threads if name == "and" else total > 0, bool))
            return None
        if has_count:
            raise Fault("barrier.red with a thread count is not modeled")
        state = _named_barrier(w.cta, int(w.R[number][w.first()]))
        state["all"] = True
        box = shared.setdefault(id(w.cta), {"total": 0, "threads": 0, "warps": []})
        active = w.active()
        box["total"] += int((p(w.R) & active).sum())
        box["threads"] += int(active.sum())
        box["warps"].append(w)
        state["members"].append(w)
        state["known"].join(w.ledger.release())
        state["arrived"] += int(w.live.sum())
        state["warps"].append((w, key))
        result = w.block("barrier.red")
        if state["arrived"] == w.cta.live_threads():
            for warp in box["warps"]:
                warp.token["red", ctx_index] = (box["total"], box["threads"])
            del shared[id(w.cta)]
        state["check"]()
        return result

    ctx_index = ctx.index
    return run


def _bar_warp(ctx: Context, ins: Instruction) -> Closure:
    from .warp import check_members

    members = ctx.src(ins.operands[0], "b32")
    return lambda w: check_members(w, members, "bar.warp.sync") and None


def _barrier_cluster(ctx: Context, ins: Instruction) -> Closure:
    arrive = ins.parts[2] == "arrive"
    relaxed = "relaxed" in ins.parts

    def run_arrive(w) -> None:
        cluster = w.cta.cluster
        if w.mask is not None and not (w.mask == w.live).all():
            raise Fault("barrier.cluster.arrive with inactive lanes")
        if w in cluster.arrived:
            raise Fault("a warp arrived twice at barrier.cluster without a wait between")
        if w.token.get("cluster") is not None:
            raise Fault("barrier.cluster.arrive before the wait of the one before")
        cluster.arrived.add(w)
        level = LEVELS["cluster"]
        known = w.ledger.handed_by_relaxed(level) if relaxed else w.ledger.release()
        if known is not None:
            cluster.known.join(known)
        w.token["cluster"] = cluster.phase
        _check_cluster(cluster)

    def run_wait(w) -> int | None:
        cluster = w.cta.cluster
        phase = w.token.get("cluster")
        if phase is None:
            raise Fault("barrier.cluster.wait without arrive")
        if cluster.phase > phase:
            w.token["cluster"] = None
            w.ledger.acquire(cluster.done_known)
            return None
        cluster.__dict__.setdefault("waiters", []).append(w)
        return w.block("barrier.cluster.wait")

    return run_arrive if arrive else run_wait


def _check_cluster(cluster) -> None:
    cluster.check = lambda: _check_cluster(cluster)
    everyone = [w for cta in cluster.ctas for w in cta.warps if not w.done]
    if cluster.arrived and all(w in cluster.arrived for w in everyone):
        cluster.phase += 1
        cluster.done_known, cluster.known = cluster.known, Knowledge(cluster.agents)
        cluster.arrived.clear()
        waiters = cluster.__dict__.get("waiters", [])
        cluster.waiters = []
        for w in waiters:
            w.wake()
        cluster.machine.progress()


# -- addresses of mbarriers --------------------------------------------------------------------
def shared_target(w, address: int, cluster_space: bool, what: str) -> tuple:
    """(CTA, offset) of a shared or generic address of one lane."""
    if address >= GENERIC_SHARED:
        address -= GENERIC_SHARED
    if address >> 32:
        raise Fault(f"{what}: {address:#x} is not a shared memory address")
    rank, offset = address >> CTA_SHIFT, address & ((1 << CTA_SHIFT) - 1)
    if rank == w.cta.rank:
        return w.cta, offset
    if not cluster_space:
        raise Fault(f"{what}: address {address:#x} belongs to CTA rank {rank}, not this CTA")
    return w.cta.cluster.cta(rank), offset


def check_initialized(barrier, w, asynchronous: bool = False) -> None:
    """Raises if the initialization of the mbarrier is not ordered before the warp's use of it.

    For ``asynchronous`` use, by copies and commits, it must also be visible to the async proxy.
    """
    if not w.machine.races:
        return
    known = w.ledger.known.own
    agent, count = barrier.init >> CLOCK_BITS, barrier.init & CLOCK_MASK
    if agent != w.ledger.init and count > known[SEEN, agent]:
        who = w.ledger.agents.text(barrier.init >> CLOCK_BITS)
        raise Fault(
            f"mbarrier {barrier.address:#x} is used with no synchronization since {who} "
            f"(line {barrier.line})"
        )
    if asynchronous and count > known[PROXY, agent]:
        raise Fault(
            f"mbarrier {barrier.address:#x} is used by an asynchronous operation with no "
            f"fence.mbarrier_init or fence.proxy.async since its initialization "
            f"(line {barrier.line})"
        )


def wake_on(barrier, w) -> None:
    barrier.waiters.append(w.wake)


@op("mbarrier")
def mbarrier(ctx: Context, ins: Instruction) -> Closure:
    name = ins.parts[1]
    builders = {
        "init": _init, "inval": _inval, "arrive": _arrive, "arrive_drop": _arrive,
        "expect_tx": _tx, "complete_tx": _tx, "test_wait": _wait, "try_wait": _wait,
        "pending_count": _pending_count,
    }  # fmt: skip
    if name not in builders:
        raise ctx.error("unknown mbarrier operation")
    return builders[name](ctx, ins)


def _init(ctx: Context, ins: Instruction) -> Closure:
    slot, offset = ctx.address(ins.operands[0])
    count = ctx.src(ins.operands[1], "u32")
    line = ins.line

    def run(w) -> None:
        for lane in w.lanes():
            cta, where = shared_target(w, int(w.R[slot][lane]) + offset, False, "mbarrier.init")
            number = int(w.R[count][lane])
            cta.shared.init_barrier(where, number, line, w.ledger.init_stamp())

    return run


def _inval(ctx: Context, ins: Instruction) -> Closure:
    slot, offset = ctx.address(ins.operands[0])

    def run(w) -> None:
        for lane in w.lanes():
            cta, where = shared_target(w, int(w.R[slot][lane]) + offset, False, "mbarrier.inval")
            cta.shared.invalidate_barrier(where)

    return run


def _arrive(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    operands = list(ins.operands)
    dst = -1
    if not isinstance(operands[0], Mem):
        dst = ctx.dst(operands.pop(0))
    slot, offset = ctx.address(operands[0])
    remote = "shared::cluster" in ins.opcode
    expect = "expect_tx" in parts
    drop = parts[1] == "arrive_drop"
    no_complete = "noComplete" in parts
    relaxed = "relaxed" in parts
    level = LEVELS["cluster" if "cluster" in parts else "cta"]
    count = ctx.src(operands[1], "u32") if len(operands) > 1 else -1

    def run(w) -> None:
        R = w.R
        state = np.zeros(WARP, U64)
        lanes = w.lanes()
        # Lanes that all arrive on one mbarrier, and do not go beyond its phase, do so at once.
        times = 1
        if lanes.size > 1 and not (expect or drop or no_complete or count >= 0):
            addresses = R[slot][lanes]
            if (addresses == addresses[0]).all():
                cta, where = shared_target(w, int(addresses[0]) + offset, remote, "mbarrier.arrive")
                if lanes.size <= cta.shared.barrier(where).pending:
                    times, lanes = lanes.size, lanes[:1]
        for lane in lanes:
            cta, where = shared_target(w, int(R[slot][lane]) + offset, remote, "mbarrier.arrive")
            barrier = cta.shared.barrier(where)
            number = int(R[count][lane]) if count >= 0 else times
            arrivals = 1 if expect else number
            if arrivals < 1:
                raise Fault(f"mbarrier.arrive with count {arrivals}")
            phase = barrier.phase
            if no_complete and arrivals >= barrier.pending:
                raise Fault("mbarrier.arrive.noComplete completes the phase")
            if drop:
                barrier.expected -= arrivals
            if expect:
                # The transactions are expected before the arrival counts.
                barrier.tx += number
            before = barrier.phase
            check_initialized(barrier, w)
            known = w.ledger.handed_by_relaxed(level) if relaxed else w.ledger.release()
            if known is not None:
                _hand_over(barrier, known, level, cta is w.cta or not w.machine.scopes)
            barrier.arrive(arrivals)
            if barrier.phase != before:
                w.machine.progress()
            state[lane if times == 1 else slice(None)] = phase
        put(w, dst, state)

    return run


def _hand_over(barrier, known, level: int, near: bool) -> None:
    """An arrival hands over what it knows, as far as its scope reaches.

    Scopes must reach each other (PTX ISA, "Memory Consistency Model", morally strong operations):
    an arrival from another CTA says something to a wait only if both have the cluster's scope.
    """
    if near:
        barrier.known.join(known)
    elif level >= LEVELS["cluster"]:
        if barrier.far is None:
            barrier.far = known.copy()
        else:
            barrier.far.join(known)


def _tx(ctx: Context, ins: Instruction) -> Closure:
    slot, offset = ctx.address(ins.operands[0])
    count = ctx.src(ins.operands[1], "u32")
    sign = 1 if ins.parts[1] == "expect_tx" else -1

    def run(w) -> None:
        for lane in w.lanes():
            cta, where = shared_target(w, int(w.R[slot][lane]) + offset, True, "mbarrier tx")
            barrier = cta.shared.barrier(where)
            check_initialized(barrier, w)
            # expect_tx alone never completes a phase.
            if sign > 0:
                barrier.tx += int(w.R[count][lane])
            else:
                barrier.add_tx(-int(w.R[count][lane]))

    return run


def _wait(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    dst = ctx.dst(ins.operands[0])
    slot, offset = ctx.address(ins.operands[1])
    parity = "parity" in parts
    token = ctx.src(ins.operands[2], "u32" if parity else "b64")
    blocking = parts[1] == "try_wait"
    relaxed = "relaxed" in parts
    level = LEVELS["cluster" if "cluster" in parts else "cta"]

    def run(w) -> int | None:
        R = w.R
        lanes = w.lanes()
        addresses, tokens = R[slot], R[token]
        first = lanes[0]
        uniform = bool(
            (addresses[lanes] == addresses[first]).all() and (tokens[lanes] == tokens[first]).all()
        )
        result = np.zeros(WARP, bool)
        barrier = None
        learned = []
        for lane in lanes[:1] if uniform else lanes:
            _, where = shared_target(w, int(addresses[lane]) + offset, False, "mbarrier wait")
            barrier = w.cta.shared.barrier(where)
            check_initialized(barrier, w)
            learned.append(barrier.done)
            if level >= LEVELS["cluster"] or not w.machine.scopes:
                learned.append(barrier.far_done)
            value = int(tokens[lane])
            if parity:
                if value > 1:
                    raise Fault(f"mbarrier wait with parity {value}")
                passed = (barrier.phase & 1) != value
            else:
                passed = barrier.phase != value
            result[lane] = passed
        if uniform:
            result[lanes] = result[first]
        if result[first] or not uniform:
            w.spurious = 0
            if result[lanes].all():
                for known in learned:
                    if relaxed:
                        w.ledger.observe(known, level)
                    else:
                        w.ledger.acquire(known)
            put(w, dst, result)
            return None if result[lanes].all() else YIELD
        # try_wait may time out: the schedule decides whether it reports that or keeps waiting.
        if blocking and (w.spurious >= 2 or w.machine.rng.random() < 0.5):
            wake_on(barrier, w)
            wanted = int(tokens[first])
            return w.block(lambda: f"{barrier.describe()}, waiting for {wanted}")
        w.spurious += 1
        put(w, dst, result)
        return YIELD

    return run


def _pending_count(ctx: Context, ins: Instruction) -> Closure:
    raise ctx.error("mbarrier.pending_count is not modeled: states hold the phase only")


# -- fences ------------------------------------------------------------------------------------
RESTRICTED = (
    "fence.acquire.sync_restrict::shared::cluster.cluster",
    "fence.release.sync_restrict::shared::cta.cluster",
)


@op("fence", "membar")
def fence(ctx: Context, ins: Instruction) -> Closure:
    text = ins.opcode
    if text.startswith("fence.proxy.async"):
        return lambda w: w.ledger.fence_proxy()
    known = ("membar.", "fence.sc", "fence.acq_rel", "fence.acquire", "fence.release",
             "fence.mbarrier_init", "fence.proxy.alias", "fence.proxy.tensormap")  # fmt: skip
    if not text.startswith(known):
        raise ctx.error("unknown fence")
    if text.startswith("fence.mbarrier_init"):
        return lambda w: w.ledger.fence_init()
    if text.startswith(("membar.", "fence.sc", "fence.acq_rel", "fence.acquire", "fence.release")):
        scope = {"gl": "gpu"}.get(ins.parts[-1], ins.parts[-1])
        if scope not in LEVELS:
            raise ctx.error("fence of an unknown scope")
        level = LEVELS[scope]
        acquire, release = ("release" not in ins.parts), ("acquire" not in ins.parts)
        if "sync_restrict" in text:
            if text not in RESTRICTED:
                raise ctx.error("fence with an unknown restriction")
            return lambda w: w.ledger.fence_shared(level, acquire)
        return lambda w: w.ledger.fence(level, acquire, release)
    return lambda w: None


@op("clusterlaunchcontrol")
def clusterlaunchcontrol(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    if parts[1] == "try_cancel":
        return _try_cancel(ctx, ins)
    query = parts[2]
    if query == "is_canceled":
        dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], "b64")
        return lambda w: put(w, dst, w.R[a][:, 0] != 0)
    a = ctx.src(ins.operands[1], "b64")
    dsts = [ctx.dst(o) for o in ctx.vector(ins.operands[0])]
    axes = [0, 1, 2, 3] if len(dsts) > 1 else ["xyz".index(query.split("::")[-1])]

    def run(w) -> None:
        response = w.R[a][:, 1]
        for dst, axis in zip(dsts, axes, strict=True):
            value = (response >> U64(16 * axis)) & U64(0xFFFF) if axis < 3 else response * U64(0)
            put(w, dst, value.astype(np.uint32))

    return run


def _try_cancel(ctx: Context, ins: Instruction) -> Closure:
    slot, offset = ctx.address(ins.operands[0])
    bar_slot, bar_offset = ctx.address(ins.operands[1])
    multicast = "multicast::cluster::all" in ins.opcode
    line = ins.line

    def run(w) -> None:
        machine = w.machine
        lane = w.first()
        cta, where = shared_target(w, int(w.R[slot][lane]) + offset, True, "try_cancel")
        _, barrier_at = shared_target(w, int(w.R[bar_slot][lane]) + bar_offset, True, "try_cancel")
        targets = w.cta.cluster.ctas if multicast else [cta]
        for target in targets:
            target.shared.check_range(where, where + 16, "try_cancel")
            span = slice(where, where + 16)
            target.shared.begin_write(span, span, w)
            target.shared.accesses.answer_asked_for(where >> 4, w)
            check_initialized(target.shared.barrier(barrier_at), w, asynchronous=True)

        def complete() -> None:
            origin = next(machine.next_cluster, None)
            value = np.zeros(2, U64)
            if origin is not None:
                value[0] = 1
                value[1] = origin[0] | origin[1] << 16 | origin[2] << 32
            for target in targets:
                barrier = target.shared.barrier(barrier_at)
                span = slice(where, where + 16)
                target.shared.finish_write(span, value.view(np.uint8), barrier.stamp())
                barrier.add_tx(-16)

        machine.async_op(complete, "clusterlaunchcontrol.try_cancel", line)

    return run
