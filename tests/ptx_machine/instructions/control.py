# SPDX-License-Identifier: Apache-2.0
"""Branches, calls, exits, and hints that do not change results."""

from __future__ import annotations

import numpy as np

from ..decode import WARP, YIELD, Closure, Context, op
from ..errors import Fault
from ..parser import Instruction, Sym


@op("bra")
def bra(ctx: Context, ins: Instruction) -> Closure:
    target = ctx.target(ins.operands[0])
    if ins.guard is None:
        return lambda w: target
    slot, negated = ctx.reg(ins.guard.name), ins.guard.negated
    fall = ctx.index + 1
    rpc = ctx.reconverge[ctx.index]
    uniform = "uni" in ins.parts

    def run(w) -> int | None:
        p = w.R[slot]
        if negated:
            p = ~p
        m = w.mask
        if m is None:
            count = int(p.sum())
            if count == 0:
                return None
            if count == WARP:
                return target
        else:
            p = p & m
            count = int(p.sum())
            if count == 0:
                return None
            if count == int(m.sum()):
                return target
        if uniform:
            raise Fault("bra.uni with a predicate that differs between lanes")
        return w.diverge(p, target, fall, rpc)

    return run


@op("brx")
def brx(ctx: Context, ins: Instruction) -> Closure:
    index = ctx.src(ins.operands[0], "u32")
    table = ctx.function.branch_targets[ins.operands[1].name]
    targets = [ctx.function.labels[name] for name in table]
    rpc = ctx.reconverge[ctx.index]

    def run(w) -> int:
        values = w.R[index]
        lanes = w.lanes()
        picked = values[lanes]
        if int(picked.max()) >= len(targets):
            raise Fault(f"brx.idx index {int(picked.max())} of {len(targets)} targets")
        first = int(picked[0])
        if (picked == first).all():
            return targets[first]
        # Peel one target off; the rest of the lanes come back to this instruction.
        taken = w.active() & (values == first)
        return w.diverge(taken, targets[first], ctx_index, rpc)

    ctx_index = ctx.index
    return run


@op("ret", "exit")
def ret(ctx: Context, ins: Instruction) -> Closure:
    returns = ins.parts[0] == "ret"

    def leave(w) -> int:
        if returns and w.frames:
            return _return(w)
        return w.exit_lanes()

    if ins.guard is None:
        return leave
    slot, negated = ctx.reg(ins.guard.name), ins.guard.negated
    fall = ctx.index + 1

    def run(w) -> int | None:
        p = w.R[slot]
        p = (~p if negated else p) & w.active()
        if not p.any():
            return None
        if (p == w.active()).all():
            return leave(w)
        if returns and w.frames:
            raise Fault("divergent return from a function")
        rest = w.active() & ~p
        w.mask = p
        w.live = w.live & ~p
        w.mask = rest
        return fall

    return run


@op("trap", "brkpt")
def trap(ctx: Context, ins: Instruction) -> Closure:
    def run(w) -> None:
        raise Fault("trap executed")

    return run


@op("nanosleep")
def nanosleep(ctx: Context, ins: Instruction) -> Closure:
    return lambda w: YIELD


@op("setmaxnreg")
def setmaxnreg(ctx: Context, ins: Instruction) -> Closure:
    count = int(ins.operands[0].value)
    if count % 8 or not 24 <= count <= 256:
        raise ctx.error("setmaxnreg needs a multiple of 8 in [24, 256]")
    limit = ctx.function.directives

    def run(w) -> None:
        if w.mask is not None and not (w.mask == w.live).all():
            raise Fault("setmaxnreg with inactive lanes")
        if not any(k in limit for k in ("maxntid", "reqntid")):
            raise Fault("setmaxnreg in a kernel without .maxntid or .reqntid")

    return run


@op("griddepcontrol")
def griddepcontrol(ctx: Context, ins: Instruction) -> Closure:
    if ins.parts[1] == "wait":
        return lambda w: w.ledger.waited_for_launch()
    if ins.parts[1] == "launch_dependents":
        return lambda w: None
    raise ctx.error("unknown griddepcontrol")


@op("prefetch", "prefetchu", "applypriority", "discard", "pmevent", "createpolicy_hint")
def hint(ctx: Context, ins: Instruction) -> Closure:
    return lambda w: None


# -- calls -------------------------------------------------------------------------------------
@op("call")
def call(ctx: Context, ins: Instruction) -> Closure:
    """Direct calls of functions of the module; parameters travel in the caller's .param space."""
    names = [o for o in ins.operands if isinstance(o, Sym)]
    if not names:
        raise ctx.error("indirect calls are not modeled")
    callee = names[0].name
    groups = [o for o in ins.operands if not isinstance(o, Sym)]
    position = ins.operands.index(names[0])
    returns = groups[0] if position > 0 else None
    arguments = groups[-1] if position < len(ins.operands) - 1 else None
    target = ctx.module.functions.get(callee)
    if target is None or not target.instructions:
        raise ctx.error(f"call of {callee}, which has no body in the module")

    def run(w) -> int:
        from ..machine import Program

        programs = w.machine.__dict__.setdefault("functions", {})
        if callee not in programs:
            programs[callee] = Program(ctx.module, target)
        program = programs[callee]
        copies = []
        for formal, actual in zip(target.params, arguments.items if arguments else (), strict=True):
            copies.append((formal.name, actual.name))
        values = {f: w.param_space()[a].copy() for f, a in copies}
        results = {
            f.name: a.name
            for f, a in zip(target.returns, returns.items if returns else (), strict=True)
        }
        w.frames.append(
            (w.program, w.code, w.R, resume, w.rpc, w.stack, w.mask, results, w.param_space())
        )
        w.program, w.code = program, w.machine.code_of(program)
        w.R = list(program.initial)
        w.stack, w.rpc = [], -1
        w.params_here = values
        w.fill_specials()
        return 0

    resume = ctx.index + 1
    return run


def _return(w) -> int:
    values = w.param_space()
    program, code, registers, resume, rpc, stack, mask, results, space = w.frames.pop()
    w.program, w.code, w.R = program, code, registers
    w.stack, w.rpc, w.mask = stack, rpc, mask
    w.params_here = space
    for formal, actual in results.items():
        space[actual] = np.array(values[formal])
    return resume
