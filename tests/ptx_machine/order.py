# SPDX-License-Identifier: Apache-2.0
"""What is ordered before what: vector clocks of the agents of a cluster.

An agent is a warp, or something asynchronous that completes operations: an mbarrier (copies that
complete on it), a warp's bulk groups, the tensor core of a CTA. Each agent counts; an access is
stamped with the agent and its count. A warp's knowledge says of each agent up to which count its
accesses are ordered before what the warp does next. Synchronization moves knowledge: a release
(an arrival, ``st.release``, ...) hands it over, an acquire (a wait, ``ld.acquire``, ...) joins it.

Knowledge has three rows, because ordering and visibility differ:

- SEEN: ordered before the warp's next generic accesses to shared or tensor memory;
- PROXY: also made visible to the async proxy, by ``fence.proxy.async`` on the way;
- GLOBAL: ordered before the warp's next generic accesses to global memory, which a fence with
  ``.sync_restrict`` leaves out.

A relaxed operation hands over only what a fence before it put into ``Ledger.fenced`` and, of tensor
memory, what ``tcgen05.fence::before_thread_sync`` ordered before it. What a relaxed load or wait
observed counts after the next fence. Knowledge moves as far as the scopes of both sides reach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .machine import Warp

SEEN, PROXY, GLOBAL = range(3)
ROWS = 3
CLOCK_BITS = 20
CLOCK_MASK = (1 << CLOCK_BITS) - 1
# Agents of a warp, by kind: generic accesses, tcgen05.ld and st, mbarrier.init, what bulk stores
# have read, what they have written, cp.async, wgmma (of the warpgroup's first warp).
GENERIC, TENSOR, INIT, BULK_READ, BULK, COPY, WGMMA = range(7)
KINDS = 7
KIND_TEXT = (
    "warp {}", "a tcgen05.ld or st of warp {}", "mbarrier.init of warp {}",
    "a bulk store of warp {}", "a bulk store of warp {}", "a cp.async of warp {}",
    "a wgmma of warp {}",
)  # fmt: skip
LEVELS = {"cta": 0, "cluster": 1, "gpu": 2, "sys": 2}
MBARRIERS = 96  # agents set aside for the mbarriers of a CTA


def stamp(agent: int, count: int) -> int:
    """Agent and count in one 32-bit word; 0 means never."""
    return agent << CLOCK_BITS | min(count, CLOCK_MASK)


def late(codes: np.ndarray, seen: np.ndarray, me: int = -1) -> bool:
    """Whether any stamp is of another agent than ``me`` and not covered by what was seen."""
    first = codes.item(0)
    if not np.count_nonzero(codes != first):
        agent = first >> CLOCK_BITS
        return agent != me and (first & CLOCK_MASK) > seen[agent]
    return bool(late_each(codes, seen, me).any())


def late_each(codes: np.ndarray, seen: np.ndarray, me: int = -1) -> np.ndarray:
    """``late`` of each stamp."""
    agents = codes >> CLOCK_BITS
    return ((codes & CLOCK_MASK) > seen[agents]) & (agents != me)


class Agents:
    """The agents of one cluster, numbered."""

    def __init__(self, serial: int, warps_per_cta: int, ctas: int) -> None:
        self.serial, self.warps_per_cta, self.ctas = serial, warps_per_cta, ctas
        self.warps = warps_per_cta * ctas
        self.first_queue = KINDS * self.warps
        self.dependency = self.first_queue + ctas  # what griddepcontrol.wait waits for
        self.first_mbarrier = self.dependency + 1
        limit = (1 << (32 - CLOCK_BITS)) - self.first_mbarrier
        self.mbarriers = max(min(MBARRIERS * ctas, limit), 1)
        self.size = self.first_mbarrier + self.mbarriers
        self.used = 0
        self.of_tensor_memory = (
            slice(TENSOR * self.warps, (TENSOR + 1) * self.warps),
            slice(self.first_queue, self.dependency),
        )

    def of_warp(self, rank: int, index: int, kind: int) -> int:
        return kind * self.warps + rank * self.warps_per_cta + index

    def tensor_queue(self, rank: int) -> int:
        return self.first_queue + rank

    def new_mbarrier(self) -> int:
        """An agent for an mbarrier. When they run out two share one, and some races hide."""
        self.used += 1
        return self.first_mbarrier + (self.used - 1) % self.mbarriers

    def text(self, agent: int) -> str:
        """How errors call an agent."""
        if agent >= self.first_mbarrier:
            return "an asynchronous copy"
        if agent >= self.first_queue:
            return "a tcgen05 operation"
        kind, warp = divmod(agent, self.warps)
        rank, index = divmod(warp, self.warps_per_cta)
        text = KIND_TEXT[kind].format(index)
        return text if self.ctas == 1 else f"{text} of CTA rank {rank}"


class Knowledge:
    """Counts known of each agent: an array (ROWS, agents) for the own cluster, others by serial."""

    __slots__ = ("others", "own", "serial")

    def __init__(self, agents: Agents) -> None:
        self.serial = agents.serial
        self.own = np.zeros((ROWS, agents.size), np.int32)
        self.others: dict[int, np.ndarray] | None = None

    def copy(self) -> Knowledge:
        new = Knowledge.__new__(Knowledge)
        new.serial, new.own = self.serial, self.own.copy()
        new.others = {s: k.copy() for s, k in self.others.items()} if self.others else None
        return new

    def of_shared_memory(self) -> Knowledge:
        """A copy without what is known of global memory."""
        new = self.copy()
        new.own[GLOBAL] = 0
        for known in (new.others or {}).values():
            known[GLOBAL] = 0
        return new

    def join(self, other: Knowledge) -> None:
        """Adds what another one knows."""
        if other.serial == self.serial:
            np.maximum(self.own, other.own, out=self.own)
        else:
            self._join_other(other.serial, other.own)
        if other.others:
            for serial, known in other.others.items():
                if serial == self.serial:
                    np.maximum(self.own, known, out=self.own)
                else:
                    self._join_other(serial, known)

    def _join_other(self, serial: int, known: np.ndarray) -> None:
        if self.others is None:
            self.others = {}
        mine = self.others.get(serial)
        if mine is None:
            self.others[serial] = known.copy()
        else:
            np.maximum(mine, known, out=mine)

    def covers(self, serial: int, code: int, row: int = SEEN) -> bool:
        """Whether a stamp of a cluster is known."""
        known = self.own if serial == self.serial else (self.others or {}).get(serial)
        return known is not None and (code & CLOCK_MASK) <= known[row][code >> CLOCK_BITS]


class Ledger:
    """One warp's knowledge and counts.

    Attributes:
        known: what is ordered before the warp's next accesses.
        me, tensor, init: the warp's agents.
        clock: stamp count of its next generic access.
        fenced: by level of scope (CTA, cluster, GPU), what a relaxed operation hands over.
        tensor_fenced: likewise of accesses to tensor memory, whatever the scope.
        observed: what relaxed loads and waits saw, to be known after a fence.
        tensor_seen: row of knowledge that tcgen05 operations of the warp go by.
    """

    def __init__(self, agents: Agents, rank: int, index: int, tensor_fences: bool) -> None:
        self.agents, self.rank, self.index = agents, rank, index
        self.known = Knowledge(agents)
        self.me = agents.of_warp(rank, index, GENERIC)
        self.init = agents.of_warp(rank, index, INIT)
        self.tensor_fences = tensor_fences
        self.tensor = agents.of_warp(rank, index, TENSOR) if tensor_fences else self.me
        self.clock = self.init_clock = self.tensor_clock = 1
        self.counts = [0] * KINDS
        self.fenced: list[Knowledge | None] = [None, None, None]
        self.tensor_fenced: Knowledge | None = None
        self.observed: list[Knowledge | None] | None = None
        self.tensor_seen = self.known.own[SEEN]
        if tensor_fences:
            self.tensor_seen = self.tensor_seen.copy()

    # -- stamps ------------------------------------------------------------------------------
    def generic_stamp(self) -> int:
        return stamp(self.me, self.clock)

    def init_stamp(self) -> int:
        return stamp(self.init, self.init_clock)

    def tensor_stamp(self) -> int:
        return stamp(self.tensor, self.tensor_clock if self.tensor_fences else self.clock)

    def next(self, kind: int) -> int:
        """Count of the next asynchronous operation of a kind."""
        self.counts[kind] += 1
        return self.counts[kind]

    def agent(self, kind: int) -> int:
        return self.agents.of_warp(self.rank, self.index, kind)

    # -- synchronization ---------------------------------------------------------------------
    def release(self) -> Knowledge:
        """What a release hands over now. The caller joins or copies it at once."""
        own = self.known.own
        own[SEEN, self.me] = own[GLOBAL, self.me] = self.clock
        self.clock += 1
        own[SEEN, self.init] = self.init_clock
        self.init_clock += 1
        return self.known

    def acquire(self, known: Knowledge | None) -> None:
        if known is not None:
            self.known.join(known)

    def completed(self, kind: int, count: int) -> None:
        """The warp has waited for its asynchronous operations of a kind, up to a count."""
        agent = self.agent(kind)
        own = self.known.own
        if own[SEEN, agent] < count:
            own[:, agent] = count

    def observe(self, known: Knowledge | None, level: int) -> None:
        """A relaxed load or wait saw what was handed over; a fence of that level makes it known."""
        if known is None:
            return
        if self.observed is None:
            self.observed = [None, None, None]
        seen = self.observed[level]
        if seen is None:
            self.observed[level] = known.copy()
        else:
            seen.join(known)

    def fence(self, level: int, acquire: bool = True, release: bool = True) -> None:
        """A fence of a scope."""
        if acquire and self.observed is not None:
            for observed in self.observed[: level + 1]:
                self.acquire(observed)
            self.observed[: level + 1] = [None] * (level + 1)
        if release:
            known = self.release().copy()
            for i in range(level + 1):
                self.fenced[i] = known

    def fence_shared(self, level: int, acquire: bool) -> None:
        """A fence of a scope with .sync_restrict: to what was done with shared memory."""
        if acquire:
            for observed in (self.observed or [])[: level + 1]:
                if observed is not None:
                    self.acquire(observed.of_shared_memory())
            return
        restricted = self.release().of_shared_memory()
        for i in range(level + 1):
            wider = self.fenced[i]
            self.fenced[i] = restricted.copy()
            if wider is not None:
                self.fenced[i].join(wider)

    def handed_by_relaxed(self, level: int) -> Knowledge | None:
        """What a relaxed arrival hands over."""
        fenced, tensor = self.fenced[level], self.tensor_fenced
        if tensor is None or fenced is None:
            return fenced or tensor
        both = fenced.copy()
        both.join(tensor)
        return both

    def fence_proxy(self) -> None:
        """fence.proxy.async: what is ordered before it is visible to the async proxy."""
        own = self.release().own
        np.maximum(own[PROXY], own[SEEN], out=own[PROXY])

    def fence_init(self) -> None:
        """fence.mbarrier_init.release.cluster."""
        for i in (0, 1):
            fenced = self.fenced[i]
            fenced = Knowledge(self.agents) if fenced is None else fenced.copy()
            fenced.own[:, self.init] = self.init_clock
            self.fenced[i] = fenced
        self.known.own[:, self.init] = self.init_clock
        self.init_clock += 1

    def before_thread_sync(self) -> None:
        if self.tensor_fences:
            own = self.known.own
            own[SEEN, self.tensor] = self.tensor_clock
            self.tensor_clock += 1
            # Accesses to tensor memory, of warps and of tensor cores, that are ordered before this.
            self.tensor_fenced = Knowledge(self.agents)
            for agents in self.agents.of_tensor_memory:
                self.tensor_fenced.own[SEEN, agents] = own[SEEN, agents]

    def after_thread_sync(self) -> None:
        if self.tensor_fences:
            np.maximum(self.tensor_seen, self.known.own[SEEN], out=self.tensor_seen)

    def waited_for_launch(self) -> None:
        self.known.own[:, self.agents.dependency] = 1

    @property
    def launch_known(self) -> bool:
        """Whether griddepcontrol.wait is ordered before what the warp does."""
        return bool(self.known.own[SEEN, self.agents.dependency])


class Messages:
    """What releases left at memory locations, for acquires to find."""

    def __init__(self) -> None:
        self.found: dict[object, list[Knowledge | None]] = {}

    def leave(self, key: object, w: Warp, release: bool, level: int, joined: bool) -> None:
        """A release or relaxed write at a location; ``joined`` if it continues what is there."""
        ledger = w.ledger
        old = self.found.get(key)
        if not release and ledger.fenced[0] is None and (old is None or joined):
            return
        known = ledger.release().copy() if release else None
        new: list[Knowledge | None] = [None, None, None]
        for i in range(level + 1):
            new[i] = known if release else ledger.fenced[i]
        if joined and old is not None:
            for i, before in enumerate(old):
                if before is None:
                    continue
                after = new[i]
                if after is None:
                    new[i] = before
                else:
                    new[i] = after.copy()
                    new[i].join(before)
        self.found[key] = new

    def take(self, key: object, w: Warp, acquire: bool, level: int) -> None:
        """An acquire or relaxed read of a location."""
        left = self.found.get(key)
        if left is None:
            return
        ledger = w.ledger
        for i, known in enumerate(left[: level + 1]):
            if known is None:
                continue
            # The scope must reach the warp that released: level 0 within a CTA, 1 within a
            # cluster, 2 everywhere.
            if i < 2 and known.serial != ledger.known.serial:
                continue
            if acquire:
                ledger.acquire(known)
            else:
                ledger.observe(known, i)
