# SPDX-License-Identifier: Apache-2.0
"""The machine: launches, CTAs, warps and the scheduler of warps and asynchronous operations."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import instructions as _instructions  # noqa: F401  (registers the builders)
from .decode import BLOCK, EXIT, WARP, YIELD, Closure, Context, reconvergence_points
from .errors import DeadlockError, Fault, PtxError, PtxRuntimeError
from .memory import (
    CTA_SHIFT,
    GENERIC_LOCAL,
    GENERIC_SHARED,
    PARAM_BASE,
    SHARED_BASE,
    UNSIGNED,
    Allocation,
    GlobalMemory,
    SharedMemory,
    TensorMemory,
)
from .order import Agents, Knowledge, Ledger, Messages
from .parser import Function, Module, Variable, parse
from .races import GlobalAccesses
from .tensormap import TensorMap

SHARED_LIMIT = {"sm_90": 232448, "sm_100": 232448, "sm_103": 232448, "sm_110": 232448}
SHARED_LIMIT_OTHER = 101376  # sm_120 and sm_121, and older consumer parts
LIVELOCK_INSTRUCTIONS = 4_000_000


@dataclass(frozen=True)
class Pointer:
    """A kernel parameter that points ``offset`` bytes into an array."""

    array: np.ndarray
    offset: int = 0


class Program:
    """A decoded function: closures, reconvergence points and the register file's first state."""

    def __init__(self, module: Module, function: Function) -> None:
        self.module, self.function = module, function
        context = Context(module, function)
        context.reconverge = reconvergence_points(function)
        context.find_asynchronous()
        self.context = context
        self.code: list[Closure] = [
            context.build(i, ins) for i, ins in enumerate(function.instructions)
        ]
        self.code.append(lambda w: w.exit_lanes())
        self.noting: tuple[set[int], list[Closure]] | None = None  # the code with coverage on
        self.initial = context.initial
        self.params: dict[str, tuple[int, int]] = {}
        offset = 0
        for param in function.params:
            offset = (offset + param.align - 1) // param.align * param.align
            self.params[param.name] = (offset, param.size)
            offset += param.size
        self.param_bytes = offset


_PROGRAMS: dict[tuple[str, str | None], tuple[Module, dict[str, Program]]] = {}


def load_program(ptx_text: str, kernel: str | None) -> tuple[Module, Program, dict[str, Program]]:
    """Parses and decodes, with a cache by text."""
    key = (ptx_text, None)
    if key not in _PROGRAMS:
        if len(_PROGRAMS) > 64:
            _PROGRAMS.clear()
        _PROGRAMS[key] = (parse(ptx_text), {})
    module, programs = _PROGRAMS[key]
    entry = module.entry(kernel)
    if entry.name not in programs:
        programs[entry.name] = Program(module, entry)
    return module, programs[entry.name], programs


class Warp:
    """32 lanes: registers, active mask and the stack of divergent paths."""

    def __init__(self, cta: Cta, index: int, program: Program, alive: np.ndarray) -> None:
        self.cta, self.index, self.machine = cta, index, cta.machine
        self.program = program
        self.code = cta.machine.code_of(program)
        self.R: list = list(program.initial)
        self.live = alive
        self.mask: np.ndarray | None = None if alive.all() else alive
        self.pc, self.rpc = 0, -1
        self.stack: list[tuple[int, np.ndarray | None, int]] = []
        self.frames: list = []
        self.done = False
        self.waiting: str | Callable[[], str] = ""  # what a blocked warp waits for
        self.ready = True
        self.queued = True  # in the machine's list of ready warps
        machine = cta.machine
        self.ledger = Ledger(cta.cluster.agents, cta.rank, index, machine.tensor_fences)
        self.spurious = 0
        self.wgmma: object = None
        self.bulk: object = None
        self.cp_async: object = None
        self.token: dict = {}
        self.local: tuple[np.ndarray, np.ndarray] | None = None
        self.params_here: dict[str, np.ndarray] | None = None
        self.fill_specials()

    def fill_specials(self) -> None:
        context = self.program.context
        for name, slot in context.specials.items():
            self.R[slot] = self.cta.special(name, self)
        for (name, offset), slot in context.symbols.items():
            self.R[slot] = self.cta.symbol(name, offset, self)

    # -- masks ---------------------------------------------------------------------------------
    def active(self) -> np.ndarray:
        """The active lanes as a bool array."""
        return np.ones(WARP, bool) if self.mask is None else self.mask

    def lanes(self) -> np.ndarray:
        """Indices of the active lanes."""
        return np.arange(WARP) if self.mask is None else np.flatnonzero(self.mask)

    def first(self) -> int:
        """The lowest active lane."""
        return 0 if self.mask is None else int(np.argmax(self.mask))

    def diverge(self, taken: np.ndarray, target: int, fall: int, rpc: int) -> int:
        """Splits the active lanes; runs the taken path first or the other, by the schedule."""
        current = self.active()
        other = current & ~taken
        if rpc >= 0 and rpc != self.rpc:
            self.stack.append((rpc, self.mask, self.rpc))
        paths = [(target, taken), (fall, other)]
        if self.machine.rng.random() < 0.5:
            paths.reverse()
        (pc, mask), (pc2, mask2) = paths
        if pc2 != rpc:
            self.stack.append((pc2, mask2, rpc))
        if pc == rpc:
            return self.pop()
        self.mask, self.rpc = mask, rpc
        return pc

    def pop(self) -> int:
        """Continues with the next path of the stack; EXIT if there is none."""
        while self.stack:
            pc, mask, rpc = self.stack.pop()
            lanes = self.live if mask is None else mask & self.live
            if not lanes.any():
                continue
            if pc == rpc and self.stack:
                continue  # already at the join that a lower entry continues from
            self.mask = None if lanes.all() else lanes
            self.rpc = rpc
            return pc
        return EXIT

    def exit_lanes(self) -> int:
        """The active lanes leave the kernel."""
        self.live = self.live & ~self.active()
        if not self.live.any():
            self.stack.clear()
            return EXIT
        return self.pop()

    def settle_register(self, slot: int) -> None:
        """Makes a register usable that an asynchronous operation may still hold.

        tcgen05.ld: ptxas tracks its registers, and compilers rely on that, so a use before the wait
        completes the load. wgmma: nothing tracks them; the use is an error.
        """
        pending = self.token.get("tcgen05")
        if pending and pending["ld"]:
            pending["finish"]()
        if self.R[slot] is None:
            name = self.program.context.slot_names[slot].split("~")[0]
            raise Fault(f"use of register {name}, which a wgmma in flight still holds")

    def block(self, reason: str | Callable[[], str]) -> int:
        """The warp stops here until someone wakes it; the reason is for the deadlock report."""
        self.ready = False
        self.waiting = reason
        return BLOCK

    def wake(self) -> None:
        if not self.ready and not self.done:
            self.ready = True
            self.waiting = ""
            if not self.queued:
                self.queued = True
                self.machine.ready.append(self)

    def where(self) -> str:
        return f"CTA {self.cta.ctaid} warp {self.index}"

    def param_space(self) -> dict[str, np.ndarray]:
        """Parameters of calls in the current frame: (32, size) bytes by name."""
        if self.params_here is None:
            self.params_here = {}
        return self.params_here

    def local_memory(self) -> tuple[np.ndarray, np.ndarray]:
        """Bytes and written flags of the lanes' local memory, (32, size)."""
        if self.local is None:
            size = (self.machine.local_size + 15) // 16 * 16
            data = np.full((WARP, size), 0xCB, np.uint8)
            self.local = (data, np.zeros((WARP, size), bool))
        return self.local


class Cta:
    """One thread block: its shared memory, tensor memory, barriers and warps."""

    def __init__(self, machine: Machine, cluster: Cluster, ctaid: tuple, rank: int) -> None:
        self.machine, self.cluster, self.ctaid, self.rank = machine, cluster, ctaid, rank
        self.shared_symbols, size = machine.shared_layout
        self.shared = SharedMemory(size, cluster.agents, machine.races)
        self.tensor = TensorMemory(cluster.agents, machine.races)
        self.tensor_queue: list = []  # tcgen05 operations in issue order
        self.barriers: dict[int, dict] = {}
        self.bulk_writes = 0
        self.done = False
        self.params_local: dict = {}
        threads = machine.block[0] * machine.block[1] * machine.block[2]
        self.threads = threads
        self.warps: list[Warp] = []
        for index in range((threads + WARP - 1) // WARP):
            alive = np.arange(index * WARP, (index + 1) * WARP) < threads
            self.warps.append(Warp(self, index, machine.program, alive))

    @property
    def address_base(self) -> int:
        return self.rank << CTA_SHIFT

    def live_threads(self) -> int:
        return sum(int(w.live.sum()) for w in self.warps if not w.done)

    def special(self, name: str, warp: Warp) -> np.ndarray:
        """Value of a special register for a warp's lanes."""
        machine = self.machine
        thread = np.arange(warp.index * WARP, (warp.index + 1) * WARP)
        bx, by, _ = machine.block
        cx, cy, cz = machine.cluster
        base, _, axis = name.partition(".")
        k = "xyz".find(axis) if axis else 0
        c, g = self.ctaid, machine.grid
        clusters = [-(-g[i] // (cx, cy, cz)[i]) for i in range(3)]
        in_cluster = [c[i] % (cx, cy, cz)[i] for i in range(3)]
        lane = np.arange(WARP)
        if axis == "w":
            value: object = 0
        elif base == "%tid":
            value = (thread % bx, thread // bx % by, thread // (bx * by))[k]
        elif base == "%laneid":
            value = lane
        elif base.startswith("%lanemask_"):
            one = np.uint64(1) << lane.astype(np.uint64)
            full = np.uint64(0xFFFFFFFF)
            value = {
                "eq": one,
                "lt": one - np.uint64(1),
                "le": (one << np.uint64(1)) - np.uint64(1),
                "gt": full & ~((one << np.uint64(1)) - np.uint64(1)),
                "ge": full & ~(one - np.uint64(1)),
            }[base[-2:]]
        else:
            table = {
                "%ntid": machine.block[k],
                "%ctaid": c[k],
                "%nctaid": g[k],
                "%warpid": warp.index,
                "%nwarpid": 64,
                "%smid": self.cluster.slot * machine.cluster_size + self.rank,
                "%nsmid": machine.num_sms,
                "%gridid": 0,
                "%cluster_ctarank": self.rank,
                "%cluster_nctarank": machine.cluster_size,
                "%cluster_ctaid": in_cluster[k],
                "%cluster_nctaid": machine.cluster[k],
                "%clusterid": c[k] // machine.cluster[k],
                "%nclusterid": clusters[k],
                "%is_explicit_cluster": machine.cluster_size > 1,
                "%dynamic_smem_size": machine.dynamic_smem,
                "%total_smem_size": machine.shared_layout[1] - SHARED_BASE,
                "%aggr_smem_size": machine.shared_layout[1],
                "%reserved_smem_offset_begin": 0,
                "%reserved_smem_offset_end": SHARED_BASE,
                "%reserved_smem_offset_cap": SHARED_BASE,
                "%WARP_SZ": WARP,
            }
            if base not in table:
                if base in ("%clock", "%clock64", "%clock_hi", "%globaltimer", "%globaltimer_lo",
                            "%globaltimer_hi"):  # fmt: skip
                    return np.zeros(WARP, np.uint64)  # read through mov, which asks the machine
                raise PtxError(f"unknown special register {name}")
            value = table[base]
        dtype = np.bool_ if base == "%is_explicit_cluster" else np.uint32
        if base == "%gridid":
            dtype = np.uint64
        array = np.empty(WARP, dtype)
        array[:] = value
        return array

    def symbol(self, name: str, offset: int, warp: Warp) -> np.ndarray:
        """Address of a variable or parameter, 64 bits."""
        machine = self.machine
        if name in self.shared_symbols:
            value = self.address_base + self.shared_symbols[name] + offset
        elif name in machine.program.params:
            value = PARAM_BASE + machine.program.params[name][0] + offset
        elif name in machine.module_symbols:
            value = machine.module_symbols[name] + offset
        elif name in machine.local_symbols:
            value = machine.local_symbols[name] + offset
        else:
            raise PtxError(f"unknown symbol {name}")
        return np.full(WARP, value, np.uint64)


class Cluster:
    """CTAs that run together and see each other's shared memory."""

    def __init__(self, machine: Machine, origin: tuple[int, int, int], slot: int) -> None:
        self.machine, self.origin, self.slot = machine, origin, slot
        cx, cy, _ = machine.cluster
        self.arrived: set = set()
        self.phase = 0
        machine.cluster_serial += 1
        x, y, z = machine.block
        self.agents = Agents(machine.cluster_serial, -(-x * y * z // WARP), machine.cluster_size)
        self.known = Knowledge(self.agents)  # of the warps that arrived in this phase
        self.done_known: Knowledge | None = None  # of the last phase
        self.ctas = []
        for rank in range(machine.cluster_size):
            x, y, z = rank % cx, rank // cx % cy, rank // (cx * cy)
            ctaid = (origin[0] + x, origin[1] + y, origin[2] + z)
            self.ctas.append(Cta(machine, self, ctaid, rank))
        self.done = False

    def cta(self, rank: int) -> Cta:
        """A CTA by its rank; it must not have exited."""
        if rank >= len(self.ctas):
            raise Fault(f"shared memory of CTA rank {rank} of a cluster of {len(self.ctas)}")
        cta = self.ctas[rank]
        if cta.done:
            raise Fault(f"access to shared memory of CTA rank {rank}, which has exited")
        return cta


class AsyncOp:
    """An operation that completes later: ``run`` does it."""

    __slots__ = ("line", "run", "what")

    def __init__(self, run: Callable[[], None], what: str, line: int) -> None:
        self.run, self.what, self.line = run, what, line


class OpQueue:
    """Asynchronous operations that happen in order (one tensor core pipe, one bulk group)."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.items: list[AsyncOp] = []

    def push(self, op: AsyncOp) -> None:
        self.items.append(op)
        if len(self.items) == 1:
            self.machine.queues.append(self)

    def step(self) -> None:
        op = self.items.pop(0)
        if not self.items:
            self.machine.queues.remove(self)
        self.machine.perform(op)

    def drain(self) -> None:
        while self.items:
            self.step()


class Machine:
    """Runs one kernel launch."""

    def __init__(
        self,
        module: Module,
        program: Program,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int],
        dynamic_smem: int,
        memory: GlobalMemory,
        seed: int,
        resident_clusters: int,
        strict_exit: bool = True,
        races: bool = True,
        tensor_fences: bool = False,
        scopes: bool = True,
    ) -> None:
        self.strict_exit, self.races, self.tensor_fences = strict_exit, races, tensor_fences
        self.scopes = scopes
        self.cluster_serial = 0
        self.messages = Messages()
        self.global_accesses = GlobalAccesses() if races else None
        self.written: set[int] = set()  # bases of the allocations that the launch wrote
        self.module, self.program = module, program
        self.grid, self.block, self.cluster = grid, block, cluster
        self.cluster_size = cluster[0] * cluster[1] * cluster[2]
        self.dynamic_smem = dynamic_smem
        self.memory = memory
        self.rng = random.Random(seed)
        self.seed = seed
        # A seed also picks the pace of asynchronous operations, from eager to as late as possible.
        self.op_rate = 0.3 if seed == 0 else self.rng.choice((0.02, 0.1, 0.3, 0.6, 0.9))
        self.quantum = (64, 64) if seed == 0 else self.rng.choice(((1, 16), (8, 64), (64, 512)))
        # It may favor some kinds of operations and some warps over others, as far as to starve them
        # while there is something else to do.
        self.op_bias = 0.0 if seed == 0 else self.rng.choice((0.0, 0.95))
        self.warp_bias = 0.0 if seed == 0 else self.rng.choice((0.0, 0.0, 0.9))
        self.ranks: dict[object, float] = {}
        self.ready: list[Warp] = []
        self.queues: list[OpQueue] = []
        self.param_data = np.zeros(0, np.uint8)
        self.param_maps: dict[int, TensorMap] = {}
        self.maps_by_bytes: dict[bytes, TensorMap] = {}
        self.instructions_run = 0
        self.last_progress = 0
        self.clusters: list[Cluster] = []
        self.resident_clusters = resident_clusters
        self.shared_layout = self._layout_shared()
        self.module_symbols: dict[str, int] = {}
        self.local_symbols, self.local_size = self._layout_local()
        self._place_module_variables()
        self.num_sms = max(1, min(132, grid[0] * grid[1] * grid[2]))
        self.clock = 0
        self.cancelled: set = set()
        self.coverage: set[int] | None = None
        self.next_cluster = iter(())
        self.waits_for_launch = any(
            ins.opcode == "griddepcontrol.wait" for ins in program.function.instructions
        )

    # -- layout ------------------------------------------------------------------------------
    def _layout_shared(self) -> tuple[dict[str, int], int]:
        symbols: dict[str, int] = {}
        offset = SHARED_BASE
        dynamic: list[Variable] = []
        variables = self.module.variables + self.program.function.variables
        for variable in variables:
            if variable.space != "shared":
                continue
            if variable.size == 0:
                dynamic.append(variable)
                continue
            offset = (offset + variable.align - 1) // variable.align * variable.align
            symbols[variable.name] = offset
            offset += variable.size
        align = max([16] + [v.align for v in dynamic])
        start = (offset + align - 1) // align * align if self.dynamic_smem else offset
        for variable in dynamic:
            symbols[variable.name] = start
        end = start + self.dynamic_smem
        target = self.module.target.rstrip("af")
        limit = SHARED_LIMIT.get(target, SHARED_LIMIT_OTHER)
        if end - SHARED_BASE > limit:
            raise PtxError(
                f"{end - SHARED_BASE} bytes of shared memory, {target} has {limit} for a CTA"
            )
        return symbols, end

    def _layout_local(self) -> tuple[dict[str, int], int]:
        symbols: dict[str, int] = {}
        offset = 16
        for variable in self.program.function.variables:
            if variable.space in ("local", "param"):
                offset = (offset + variable.align - 1) // variable.align * variable.align
                symbols[variable.name] = offset
                offset += variable.size
        return symbols, offset

    def _place_module_variables(self) -> None:
        for variable in self.module.variables:
            if variable.space in ("global", "const"):
                data = np.zeros(max(variable.size, 1), np.uint8)
                if variable.data is not None:
                    data[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
                allocation = self.memory.register(
                    data, variable.name, read_only=variable.space == "const"
                )
                self.module_symbols[variable.name] = allocation.base

    # -- services of the instructions --------------------------------------------------------
    def code_of(self, program: Program) -> list[Closure]:
        """The closures of a function; with coverage on, they note their line when they run."""
        if self.coverage is None:
            return program.code
        if program.noting is None or program.noting[0] is not self.coverage:
            lines = [ins.line for ins in program.function.instructions]
            noting = [
                _noting(closure, line, self.coverage)
                for closure, line in zip(program.code, [*lines, 0], strict=True)
            ]
            program.noting = self.coverage, noting  # runs of a test have a set in common
        return program.noting[1]

    def progress(self) -> None:
        """Something happened that a spinning warp may be waiting for."""
        self.last_progress = self.instructions_run

    def async_op(self, run: Callable[[], None], what: str, line: int) -> None:
        """Schedules an operation that completes at a random later time, in no order."""
        OpQueue(self).push(AsyncOp(run, what, line))

    def perform(self, op: AsyncOp) -> None:
        try:
            op.run()
        except Fault as fault:
            raise self.error(str(fault), op.line, op.what) from None
        self.progress()

    def error(self, message: str, line: int, where: str) -> PtxRuntimeError:
        text = self.module.lines[line - 1] if 0 < line <= len(self.module.lines) else ""
        return PtxRuntimeError(message, line, text, where)

    def tensor_map(self, address: int) -> TensorMap:
        """The tensor map at a generic address."""
        found = self.param_maps.get(address - PARAM_BASE)
        if found is not None:
            return found
        if address % 64:
            raise Fault(f"tensor map address {address:#x} is not 64-byte aligned")
        if PARAM_BASE <= address < PARAM_BASE + self.param_data.size:
            offset = address - PARAM_BASE
            raw = self.param_data[offset : offset + 128].tobytes()
        else:
            raw = self.memory.read_bytes(address, 128).tobytes()
        if raw not in self.maps_by_bytes:
            self.maps_by_bytes[raw] = TensorMap.from_descriptor(raw)
        return self.maps_by_bytes[raw]

    def load_param(self, offset: int, width: int) -> int:
        """An integer from the parameter space."""
        if offset < 0 or offset + width > self.param_data.size:
            raise Fault(f"parameter read out of bounds: bytes [{offset}, {offset + width})")
        if offset % width:
            raise Fault(f"misaligned parameter read at {offset}")
        return int(self.param_data[offset : offset + width].view(UNSIGNED[width])[0])

    def written_arrays(self) -> list[np.ndarray]:
        """The arrays that the launch has written to, as bytes."""
        return [a.data for a in self.memory.allocations if a.base in self.written]

    # -- running -----------------------------------------------------------------------------
    def run(self) -> None:
        """Runs the grid to its end.

        Raises:
            PtxRuntimeError: the program broke a rule of the machine.
        """
        try:
            with np.errstate(all="ignore"):
                self._run()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Drops the memories, which cycles of references would keep for long after the run."""
        for cluster in self.clusters:
            for cta in cluster.ctas:
                cta.shared = cta.tensor = None
        for queue in self.queues:
            queue.items = []
        self.clusters, self.ready, self.queues = [], [], []
        if self.global_accesses is not None:
            self.written = set(self.global_accesses.writes)
            self.global_accesses = GlobalAccesses()

    def _origins(self):
        cx, cy, cz = self.cluster
        for z in range(0, self.grid[2], cz):
            for y in range(0, self.grid[1], cy):
                for x in range(0, self.grid[0], cx):
                    yield (x, y, z)

    def _start_clusters(self) -> None:
        while len(self.clusters) < self.resident_clusters:
            origin = next(self.next_cluster, None)
            while origin is not None and origin in self.cancelled:
                origin = next(self.next_cluster, None)
            if origin is None:
                return
            used = {c.slot for c in self.clusters}
            slot = next(i for i in range(len(used) + 1) if i not in used)
            cluster = Cluster(self, origin, slot)
            self.clusters.append(cluster)
            for cta in cluster.ctas:
                self.ready.extend(cta.warps)

    def _run(self) -> None:
        rng = self.rng
        self.next_cluster = self._origins()
        self._start_clusters()
        low, high = self.quantum
        while True:
            if self.queues and (not self.ready or rng.random() < self.op_rate):
                self._pick_queue().step()
                continue
            if not self.ready:
                if not self.clusters:
                    break
                self.deadlock()
            ready = self.ready
            index = self._pick_warp() if len(ready) > 1 else 0
            warp = ready[index]
            quantum = low if low == high else rng.randint(low, high)
            self.step(warp, quantum)
            if not warp.ready or warp.done:
                warp.queued = False
                ready[index] = ready[-1]  # nothing but this loop removes from the list
                ready.pop()
                if warp.done:
                    self.finish(warp)
            if self.instructions_run - self.last_progress > LIVELOCK_INSTRUCTIONS:
                self.livelock()

    def _rank(self, key: object) -> float:
        if key not in self.ranks:
            self.ranks[key] = self.rng.random()
        return self.ranks[key]

    def _pick_queue(self) -> OpQueue:
        if len(self.queues) > 1 and self.rng.random() < self.op_bias:
            return min(self.queues, key=lambda q: self._rank(q.items[0].what))
        return self.queues[self.rng.randrange(len(self.queues))]

    def _pick_warp(self) -> int:
        ready = self.ready
        if self.warp_bias and self.rng.random() < self.warp_bias:
            return min(
                range(len(ready)), key=lambda i: self._rank((ready[i].cta.rank, ready[i].index))
            )
        return self.rng.randrange(len(ready))

    def step(self, w: Warp, quantum: int) -> None:
        """Runs up to ``quantum`` instructions of a warp."""
        code = w.code
        pc = w.pc
        n = 0
        try:
            while n < quantum:
                n += 1
                r = code[pc](w)
                if r is None:
                    pc += 1
                elif r >= 0:
                    pc = r
                elif r == BLOCK:
                    break
                elif r == YIELD:
                    pc += 1
                    n = quantum
                else:
                    w.done = True
                    w.ready = False
                    break
                if pc == w.rpc:
                    pc = w.pop()
                    if pc < 0:
                        w.done = True
                        w.ready = False
                        break
                if code is not w.code:
                    code = w.code
        except Fault as fault:
            raise self.fault(w, code, pc, str(fault)) from None
        except PtxError:
            raise
        except Exception as error:
            raise self.fault(w, code, pc, self.diagnose(w, pc, error)) from error
        w.pc = pc
        self.instructions_run += n

    def fault(self, w: Warp, code: list, pc: int, message: str) -> PtxRuntimeError:
        ins = w.program.function.instructions[pc]
        return PtxRuntimeError(message, ins.line, ins.text, w.where())

    def diagnose(self, w: Warp, pc: int, error: Exception) -> str:
        """Explains a Python error inside an instruction."""
        return f"the machine failed on this instruction: {type(error).__name__}: {error}"

    def finish(self, warp: Warp) -> None:
        """A warp has exited."""
        cta = warp.cta
        if warp.wgmma is not None and warp.wgmma.pending():
            raise self.error("exit with wgmma in flight", 0, warp.where())
        self.progress()
        for state in cta.barriers.values():
            state["check"]()
        cluster = cta.cluster
        if all(w.done for w in cta.warps) and not cta.done:
            # Copies that read this CTA's shared memory must have read it before it goes away.
            self.retire(cta)
            if all(c.done for c in cluster.ctas):
                self.clusters.remove(cluster)
                if self.strict_exit:
                    for done in cluster.ctas:
                        done.shared = done.tensor = None
                self._start_clusters()
        elif cluster.arrived:
            cluster_check = getattr(cluster, "check", None)
            if cluster_check:
                cluster_check()

    def retire(self, cta: Cta) -> None:
        """Checks what a CTA leaves behind."""
        where = f"CTA {cta.ctaid}"
        for q in list(self.queues) if self.strict_exit else ():
            for op in q.items:
                owner = getattr(op.run, "smem_owner", None)
                if owner is cta:
                    raise self.error(
                        f"the CTA exits while an asynchronous operation still uses its shared "
                        f"memory ({op.what})",
                        op.line,
                        where,
                    )
        for barrier in cta.shared.barriers.values():
            if barrier.tx:
                raise self.error(
                    f"the CTA exits with an unsettled transaction count: {barrier.describe()}",
                    barrier.line,
                    where,
                )
        for start, (columns, line) in cta.tensor.allocations.items():
            raise self.error(
                f"tensor memory leaked: {columns} columns at {start} were never deallocated",
                line,
                where,
            )
        cta.done = True

    def stuck(self) -> str:
        """Describes every warp that has not finished, and the mbarriers they wait on."""
        lines = []
        for cluster in self.clusters:
            for cta in cluster.ctas:
                for w in cta.warps:
                    if not w.done:
                        ins = w.program.function.instructions[
                            min(w.pc, len(w.program.function.instructions) - 1)
                        ]
                        state = w.waiting() if callable(w.waiting) else w.waiting or "running"
                        lines.append(f"  {w.where()} line {ins.line} ({ins.text[:70]}): {state}")
        return "\n".join(lines[:64])

    def _stuck_line(self) -> tuple[int, str]:
        for cluster in self.clusters:
            for cta in cluster.ctas:
                for w in cta.warps:
                    if not w.done:
                        ins = w.program.function.instructions[
                            min(w.pc, len(w.program.function.instructions) - 1)
                        ]
                        return ins.line, ins.text
        return 0, ""

    def deadlock(self) -> None:
        line, text = self._stuck_line()
        raise DeadlockError(f"deadlock:\n{self.stuck()}\n", line, text)

    def livelock(self) -> None:
        line, text = self._stuck_line()
        raise DeadlockError(
            f"no progress in {LIVELOCK_INSTRUCTIONS} warp instructions:\n{self.stuck()}\n",
            line,
            text,
        )


def _noting(closure: Closure, line: int, lines: set[int]) -> Closure:
    def run(w: Warp) -> int | None:
        lines.add(line)
        return closure(w)

    return run


def pack_params(
    program: Program, params: Sequence, memory: GlobalMemory, uninitialized: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[int, TensorMap]]:
    """Lays the parameters out as the kernel reads them.

    Returns:
        The bytes of the parameter space, and the tensor maps in it by offset.
    """
    declared = program.function.params
    if len(params) != len(declared):
        raise ValueError(f"the kernel has {len(declared)} parameters, {len(params)} were given")
    data = np.zeros(program.param_bytes, np.uint8)
    maps: dict[int, TensorMap] = {}
    fresh = {a.ctypes.data for a in uninitialized}
    for i, (value, variable) in enumerate(zip(params, declared, strict=True)):
        offset, size = program.params[variable.name]
        if isinstance(value, TensorMap):
            if size != 128:
                raise ValueError(f"parameter {i} has {size} bytes, a tensor map has 128")
            value.place(memory, f"array of the tensor map in parameter {i}", fresh)
            maps[offset] = value
            continue
        if isinstance(value, np.ndarray | Pointer):
            array = value.array if isinstance(value, Pointer) else value
            shift = value.offset if isinstance(value, Pointer) else 0
            allocation = memory.register(
                array, f"array of parameter {i}", uninitialized=array.ctypes.data in fresh
            )
            raw = (allocation.base + shift).to_bytes(8, "little")
        elif isinstance(value, bytes | bytearray):
            raw = bytes(value)
        elif isinstance(value, bool | int | np.integer):
            raw = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        elif isinstance(value, float | np.floating):
            raw = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], float(value))
        else:
            raise TypeError(f"parameter {i}: cannot pass {type(value).__name__}")
        if len(raw) != size:
            raise ValueError(f"parameter {i} has {size} bytes, {len(raw)} were given")
        data[offset : offset + size] = np.frombuffer(raw, np.uint8)
    return data, maps


def launch(
    ptx_text: str,
    *,
    kernel: str | None = None,
    grid: tuple[int, ...] | int,
    block: tuple[int, ...] | int,
    cluster: tuple[int, ...] = (1, 1, 1),
    dynamic_smem: int = 0,
    params: Sequence = (),
    schedule_seed: int = 0,
    uninitialized: Sequence[np.ndarray] = (),
    memory: GlobalMemory | None = None,
    resident_clusters: int = 160,
    strict_exit: bool = True,
    races: bool = True,
    coverage: set[int] | None = None,
    previous: Sequence[np.ndarray] = (),
    tensor_fences: bool | None = None,
    scopes: bool = True,
) -> Machine:
    """Runs a kernel's PTX on the CPU.

    Args:
        ptx_text: a PTX module.
        kernel: name of the entry; may be left out when there is only one.
        grid: CTAs in x, y, z.
        block: threads in x, y, z.
        cluster: CTAs of a cluster in x, y, z.
        dynamic_smem: bytes of dynamic shared memory.
        params: one value per kernel parameter. NumPy arrays (or ``Pointer``) are global memory,
            written in place; ints and floats are scalars; bytes are the raw parameter bytes;
            ``TensorMap`` stands for a tensor map.
        schedule_seed: shuffles the order in which warps and asynchronous operations progress.
        uninitialized: arrays among the parameters whose bytes count as unwritten, so that reading
            them before writing is an error.
        memory: global memory to run in; by default a fresh one that holds the parameters' arrays.
        resident_clusters: how many clusters run at the same time, as on a GPU with so many slots.
        strict_exit: whether it is an error that a CTA exits while bulk copies still read its shared
            memory.
        races: whether accesses that synchronization does not order are errors (see races.py).
        coverage: a set that receives the PTX lines that were executed.
        previous: arrays that the launch before may still write when this one starts (programmatic
            dependent launch): touching them before griddepcontrol.wait is an error.
        tensor_fences: whether tcgen05 operations of different threads need tcgen05.fence around
            their synchronization, as the PTX ISA says. NVIDIA's own code generator leaves these
            fences out, so that by default they are needed in modules that have any.
        scopes: whether an arrival and a wait order what two CTAs of a cluster do only if both have
            the cluster's scope, as the PTX ISA says. CUTLASS and what is built on it leave the
            scope at its default, the CTA, also where the other side is another CTA.

    Returns:
        The machine after the run, for its counters.

    Raises:
        PtxSyntaxError: the text has an instruction that the machine does not know.
        PtxRuntimeError: a fault, a race it could see, or a deadlock; names the PTX line.
    """
    module, program, _ = load_program(ptx_text, kernel)
    grid3, block3, cluster3 = (_triple(v) for v in (grid, block, cluster))
    required = program.function.directives.get("reqntid")
    if required and _triple(tuple(required)) != block3:
        raise PtxError(f"the kernel requires block {_triple(tuple(required))}, launched {block3}")
    maximum = program.function.directives.get("maxntid")
    threads = block3[0] * block3[1] * block3[2]
    if maximum and threads > int(np.prod(maximum)):
        raise PtxError(f"the kernel allows {int(np.prod(maximum))} threads, launched {threads}")
    needed = program.function.directives.get("reqnctapercluster")
    if needed and _triple(tuple(needed)) != cluster3:
        raise PtxError(f"the kernel requires cluster {_triple(tuple(needed))}, got {cluster3}")
    if any(g % c for g, c in zip(grid3, cluster3, strict=True)):
        raise PtxError(f"grid {grid3} is not a multiple of cluster {cluster3}")
    if cluster3[0] * cluster3[1] * cluster3[2] > 16:
        raise PtxError(f"cluster {cluster3} has more than 16 CTAs")
    memory = memory or GlobalMemory()
    machine = Machine(
        module, program, grid3, block3, cluster3, dynamic_smem, memory, schedule_seed,
        resident_clusters, strict_exit, races,
        "tcgen05.fence" in ptx_text if tensor_fences is None else tensor_fences,
        scopes,
    )  # fmt: skip
    machine.coverage = coverage
    machine.param_data, machine.param_maps = pack_params(program, params, memory, uninitialized)
    memory.mark_previous(previous)
    machine.run()
    return machine


def _triple(value: tuple[int, ...] | int) -> tuple[int, int, int]:
    items = (value,) if isinstance(value, int) else tuple(int(v) for v in value)
    items = items + (1,) * (3 - len(items))
    return items[0], items[1], items[2]


__all__ = [
    "GENERIC_LOCAL",
    "GENERIC_SHARED",
    "YIELD",
    "Allocation",
    "Cluster",
    "Cta",
    "Machine",
    "Pointer",
    "Program",
    "Warp",
    "launch",
    "load_program",
]  # fmt: skip
