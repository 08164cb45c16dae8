# SPDX-License-Identifier: Apache-2.0
"""Warp-wide communication: shuffle, vote, match, reduce, elect."""

from __future__ import annotations

import numpy as np

from ..decode import WARP, Closure, Context, op, pair, put, storage, where
from ..errors import Fault
from ..parser import Imm, Instruction

U32 = np.uint32
LANES = np.arange(WARP)
POWERS = (np.uint64(1) << LANES.astype(np.uint64)).astype(U32)


def mask_bits(flags: np.ndarray) -> int:
    """The 32-bit mask of a bool array."""
    return int(POWERS[flags].sum(dtype=np.uint64))


def check_members(w, slot: int, what: str) -> int:
    """Checks that the lanes a membermask names are the active ones; returns the mask.

    Lanes that have exited may be named; a lane that is alive and elsewhere is an error, because
    the machine runs convergent code only.
    """
    members = int(w.R[slot][w.first()])
    active = mask_bits(w.active())
    if active & ~members:
        raise Fault(f"{what}: an executing lane is not in membermask {members:#010x}")
    missing = members & mask_bits(w.live) & ~active
    if missing:
        raise Fault(f"{what}: lanes {missing:#010x} of membermask {members:#010x} are elsewhere")
    return members


@op("shfl")
def shfl(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    if "sync" not in parts:
        raise ctx.error("shfl without .sync")
    mode = parts[2]
    first, second = pair(ins.operands[0])
    dst, pdst = ctx.dst(first), ctx.dst(second)
    a = ctx.src(ins.operands[1], "b32")
    b, c = ctx.src(ins.operands[2], "b32"), ctx.src(ins.operands[3], "b32")
    members = ctx.src(ins.operands[4], "b32")
    broadcast = (
        mode == "idx"
        and isinstance(ins.operands[2], Imm)
        and isinstance(ins.operands[3], Imm)
        and ins.operands[3].value == 31
        and pdst < 0
    )
    source_lane = int(ins.operands[2].value) & 31 if broadcast else 0

    def run(w) -> None:
        R = w.R
        if w.mask is None:
            if not (R[members] == 0xFFFFFFFF).all():
                check_members(w, members, "shfl.sync")
        else:
            check_members(w, members, "shfl.sync")
        value = R[a]
        if broadcast:
            if w.mask is not None and not w.mask[source_lane]:
                raise Fault(f"shfl.sync reads lane {source_lane}, which is not active")
            result = np.empty(WARP, U32)
            result[:] = value[source_lane]
            put(w, dst, result)
            return
        index = (R[b] & U32(31)).astype(np.int64)
        clamp = (R[c] & U32(31)).astype(np.int64)
        segment = ((R[c] >> U32(8)) & U32(31)).astype(np.int64)
        high = (LANES & segment) | (clamp & ~segment)
        low = LANES & segment
        if mode == "up":
            j = LANES - index
            ok = j >= high
        elif mode == "down":
            j = LANES + index
            ok = j <= high
        elif mode == "bfly":
            j = LANES ^ index
            ok = j <= high
        else:
            j = low | (index & ~segment)
            ok = j <= high
        j = where(ok, j, LANES) & 31
        if w.mask is not None and not w.mask[j[w.mask]].all():
            raise Fault("shfl.sync reads a lane that is not active")
        put(w, dst, value[j])
        put(w, pdst, ok)

    return run


@op("vote")
def vote(ctx: Context, ins: Instruction) -> Closure:
    mode = ins.parts[2]
    dst = ctx.dst(ins.operands[0])
    p = ctx.pred(ins.operands[1])
    members = ctx.src(ins.operands[2], "b32")

    def run(w) -> None:
        check_members(w, members, "vote.sync")
        active = w.active()
        flags = p(w.R) & active
        if mode == "ballot":
            put(w, dst, np.full(WARP, mask_bits(flags), U32))
            return
        result = {
            "all": bool((flags == active).all()),
            "any": bool(flags.any()),
            "uni": bool((flags == active).all() or not flags.any()),
        }[mode]
        put(w, dst, np.full(WARP, result, bool))

    return run


@op("match")
def match(ctx: Context, ins: Instruction) -> Closure:
    mode, kind = ins.parts[1], ins.parts[-1]
    first, second = pair(ins.operands[0])
    dst, pdst = ctx.dst(first), ctx.dst(second)
    a = ctx.src(ins.operands[1], kind)
    members = ctx.src(ins.operands[2], "b32")

    def run(w) -> None:
        check_members(w, members, "match.sync")
        active = w.active()
        value = w.R[a]
        same = (value[:, None] == value[None, :]) & active[None, :]
        if mode == "any":
            put(w, dst, (same * POWERS[None, :].astype(np.uint64)).sum(axis=1).astype(U32))
            return
        equal = bool(same[active].sum() == active.sum() ** 2)
        put(w, dst, np.full(WARP, mask_bits(active) if equal else 0, U32))
        put(w, pdst, np.full(WARP, equal, bool))

    return run


@op("redux")
def redux(ctx: Context, ins: Instruction) -> Closure:
    parts = ins.parts
    kind, name = parts[-1], parts[2]
    dst = ctx.dst(ins.operands[0])
    a = ctx.src(ins.operands[1], kind)
    members = ctx.src(ins.operands[2], "b32")

    def run(w) -> None:
        check_members(w, members, "redux.sync")
        value = w.R[a][w.active()]
        if kind == "f32":
            x = value.view(np.float32)
            if "abs" in parts:
                x = np.abs(x)
            if np.isnan(x).any() and ("NaN" in parts or np.isnan(x).all()):
                bits = U32(0x7FFFFFFF)
            else:
                good = x[~np.isnan(x)]
                picked = good.min() if name == "min" else good.max()
                bits = picked.astype(np.float32).view(U32)
        else:
            signed = value.view(np.int32) if kind == "s32" else value
            bits = {
                "add": lambda: value.sum(dtype=np.uint64).astype(U32),
                "min": lambda: np.asarray(signed.min()).astype(signed.dtype).view(U32),
                "max": lambda: np.asarray(signed.max()).astype(signed.dtype).view(U32),
                "and": lambda: np.bitwise_and.reduce(value),
                "or": lambda: np.bitwise_or.reduce(value),
                "xor": lambda: np.bitwise_xor.reduce(value),
            }[name]()
        put(w, dst, np.full(WARP, bits, U32))

    return run


@op("activemask")
def activemask(ctx: Context, ins: Instruction) -> Closure:
    dst = ctx.dst(ins.operands[0])
    return lambda w: put(w, dst, np.full(WARP, mask_bits(w.active()), U32))


@op("elect")
def elect(ctx: Context, ins: Instruction) -> Closure:
    first, second = pair(ins.operands[0])
    dst, pdst = ctx.dst(first), ctx.dst(second)
    members = ctx.src(ins.operands[1], "b32")

    def run(w) -> None:
        check_members(w, members, "elect.sync")
        leader = w.first()
        put(w, dst, np.full(WARP, leader, U32))
        put(w, pdst, leader == LANES)

    return run


@op("movmatrix")
def movmatrix(ctx: Context, ins: Instruction) -> Closure:
    dst, a = ctx.dst(ins.operands[0]), ctx.src(ins.operands[1], "b32")

    def run(w) -> None:
        if w.mask is not None:
            raise Fault("movmatrix with inactive lanes")
        matrix = np.ascontiguousarray(w.R[a]).view(np.uint16).reshape(8, 8)
        w.R[dst] = np.ascontiguousarray(matrix.T).reshape(-1).view(storage("b32"))

    return run
