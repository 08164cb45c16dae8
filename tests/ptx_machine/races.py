# SPDX-License-Identifier: Apache-2.0
"""Races that no schedule needs to expose: accesses that synchronization does not order.

The last write and the last read of every byte of shared memory (of every column of tensor memory,
of every byte of global memory that the launch writes) are stamped with their agent (see order.py).
An access by a warp whose knowledge does not cover such a stamp is a race, whichever came first in
this schedule. Of several readers only the last is remembered, so that a race with another one may
need another schedule to show.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import Fault
from .order import BULK, CLOCK_BITS, GLOBAL, PROXY, SEEN, Agents, late, late_each, stamp

if TYPE_CHECKING:
    from .machine import Warp
    from .memory import Allocation

MISSING = "with no synchronization between (a barrier or a wait is missing)"
NO_PROXY_FENCE = "through the generic proxy, with no fence.proxy.async between"


def late_agent(codes: np.ndarray, seen: np.ndarray, me: int) -> int:
    """The agent of the first stamp that is late; some must be."""
    flat = np.asarray(codes).reshape(-1)
    return int(flat[late_each(flat, seen, me)][0]) >> CLOCK_BITS


class SharedAccesses:
    """Last write and last read of every byte of a CTA's shared memory, and by whom."""

    def __init__(self, size: int, agents: Agents, on: bool) -> None:
        self.agents, self.on = agents, on
        self.writes = np.zeros(size, np.uint32)
        self.reads = np.zeros(size, np.uint32)
        self.async_reads = np.zeros(size // 16, np.uint32)  # by chunk of 16 bytes
        self.pending = np.zeros(size // 16, np.uint16)  # asynchronous reads yet to happen
        self.strong: np.ndarray | None = None  # bytes last written by an atomic
        # Of chunks that launch control writes answers to: each reader's last read, by agent.
        self.answers: dict[int, dict[int, int]] = {}
        widths = (1, 2, 4, 8, 16)
        self.write_rows = {w: self.writes.reshape(-1, w) for w in widths}
        self.read_rows = {w: self.reads.reshape(-1, w) for w in widths}

    def fault(self, codes: np.ndarray, seen: np.ndarray, me: int, action: str, did: str) -> Fault:
        who = self.agents.text(late_agent(codes, seen, me))
        return Fault(f"{action} shared memory that {who} {did}, {MISSING}")

    # -- generic proxy -----------------------------------------------------------------------
    def read(self, index: np.ndarray, width: int, w: Warp) -> None:
        """A warp reads words, by their index among words of that width."""
        if not self.on:
            return
        ledger = w.ledger
        codes = self.write_rows[width][index]
        seen = ledger.known.own[SEEN]
        if late(codes, seen, ledger.me):
            raise self.fault(codes, seen, ledger.me, "read of", "wrote")
        code = ledger.generic_stamp()
        self.read_rows[width][index] = code
        if self.answers:
            for chunk in self.answers.keys() & set((index * width >> 4).tolist()):
                self.answers[chunk][ledger.me] = code

    def write(self, index: np.ndarray, width: int, w: Warp, strong: bool = False) -> None:
        """A warp writes words; ``strong`` if it is an atomic."""
        if not self.on:
            return
        ledger = w.ledger
        seen, me = ledger.known.own[SEEN], ledger.me
        chunks = index * width >> 4
        if self.pending[chunks].any() or late(self.async_reads[chunks], seen):
            self.check_async_reads(chunks, seen, "write to")
        rows = self.read_rows[width][index]
        if late(rows, seen, me):
            raise self.fault(rows, seen, me, "write to", "read")
        rows = self.write_rows[width][index]
        if late(rows, seen, me):
            if strong and self.strong is not None:
                rows = rows[~self.strong[index * width]]
            if rows.size and late(rows, seen, me):
                raise self.fault(rows, seen, me, "overwrite of", "wrote")
        self.write_rows[width][index] = ledger.generic_stamp()
        if strong and self.strong is None:
            self.strong = np.zeros(self.writes.size, bool)
        if self.strong is not None:
            self.strong.reshape(-1, width)[index] = strong

    def check_async_reads(self, chunks: object, seen: np.ndarray, action: str) -> None:
        """Raises if an asynchronous operation may still read chunks, as far as is known."""
        if self.pending[chunks].any():
            raise Fault(f"{action} shared memory that an asynchronous operation is yet to read")
        codes = self.async_reads[chunks]
        if late(codes, seen):
            who = self.agents.text(late_agent(codes, seen, -1))
            raise Fault(f"{action} shared memory that {who} read, and this warp has not waited "
                        "for it")  # fmt: skip

    # -- asynchronous operations -------------------------------------------------------------
    def async_write_issued(self, span: slice, w: Warp) -> None:
        """A warp issues a copy that will write a range."""
        if not self.on:
            return
        ledger = w.ledger
        seen, me = ledger.known.own[SEEN], ledger.me
        chunks = slice(span.start >> 4, (span.stop + 15) >> 4)
        if self.pending[chunks].any() or late(self.async_reads[chunks], seen):
            self.check_async_reads(chunks, seen, "asynchronous copy to")
        step = 1 if span.stop - span.start <= 1024 else 4
        codes = self.reads[span.start : span.stop : step]
        if late(codes, seen, me):
            raise self.fault(codes, seen, me, "asynchronous copy to", "read")
        codes = self.writes[span.start : span.stop : step]
        if late(codes, seen, me):
            raise self.fault(codes, seen, me, "asynchronous overwrite of", "wrote")

    def answer_asked_for(self, chunk: int, w: Warp) -> None:
        """A warp asks for an answer of launch control, which the async proxy writes to a chunk.

        Who read an answer there through the generic proxy must have done so before, and with a
        fence.proxy.async on the way from the read to this. That of the reader is the usual one: a
        release of the read to the async proxy (PTX ISA, "Memory Consistency Model": operations of
        different proxies are ordered by a proxy fence along their causality order). Copies are not
        held to that, since compilers and libraries alike leave it out there.
        """
        if not self.on:
            return
        known = w.ledger.known.own
        codes = np.array([*self.answers.get(chunk, {}).values()], np.uint32)
        self.answers[chunk] = {}
        if not codes.size or not late(codes, known[PROXY]):
            return
        if late(codes, known[SEEN], w.ledger.me):
            raise self.fault(codes, known[SEEN], w.ledger.me, "an answer over", "read")
        who = self.agents.text(late_agent(codes, known[PROXY], -1))
        raise Fault(f"an answer over shared memory that {who} read {NO_PROXY_FENCE}")

    def async_written(self, index: object, code: int) -> None:
        """A copy has written bytes; the stamp says what to wait for."""
        self.writes[index] = code

    def async_read_issued(self, chunks: object, w: Warp, action: str) -> None:
        """A warp issues an operation that will read chunks."""
        self.check_chunks(chunks, w, action)
        self.pending[chunks] += 1

    def check_chunks(self, chunks: object, w: Warp, action: str) -> None:
        """Raises if chunks hold writes that the async proxy need not see yet."""
        if not self.on:
            return
        ledger = w.ledger
        known = ledger.known.own
        for byte in (0, 15):
            codes = self.writes[byte::16][chunks]
            if late(codes, known[PROXY]):
                if late(codes, known[SEEN], ledger.me):
                    raise self.fault(codes, known[SEEN], ledger.me, action, "wrote")
                who = self.agents.text(late_agent(codes, known[PROXY], -1))
                raise Fault(
                    f"{action} through the async proxy shared memory that {who} wrote "
                    f"{NO_PROXY_FENCE}"
                )

    def async_read_done(self, chunks: object, code: int) -> None:
        """An operation has read its chunks."""
        self.pending[chunks] -= 1
        self.async_reads[chunks] = code


class TensorAccesses:
    """Accesses to tensor memory, by quadrant of 32 lanes and column."""

    def __init__(self, agents: Agents, on: bool) -> None:
        self.agents, self.on = agents, on
        self.pending_use = np.zeros(512, np.int32)  # queued tensor core operations
        self.pending_write = np.zeros(512, np.int32)
        self.use = np.zeros(512, np.uint32)
        self.write = np.zeros(512, np.uint32)
        self.pending_load = np.zeros((4, 512), np.int32)
        self.load = np.zeros((4, 512), np.uint32)
        self.pending_store = np.zeros((4, 512), np.int32)
        self.stores = np.zeros((4, 512), np.uint32)
        self.access = np.zeros((4, 512), np.uint32)  # the last ld or st, as a generic access
        # The last mma to write a column, by half of each 16 of 32 lanes: its stamp, and what its
        # accumulator is (a number for each, in the order they came).
        self.mma = np.zeros((2, 512), np.uint32)
        self.accumulator = np.zeros((2, 512), np.int32)
        self.accumulators: dict[tuple, int] = {}

    def check(self, codes: np.ndarray, w: Warp, me: int, action: str, did: str, cure: str) -> None:
        """Raises if a stamp is not ordered before a tcgen05 operation of the warp."""
        ledger = w.ledger
        if not self.on or not late(codes, ledger.tensor_seen, me):
            return
        who = self.agents.text(late_agent(codes, ledger.tensor_seen, me))
        if not late(codes, ledger.known.own[SEEN], me):
            cure = "no tcgen05.fence::after_thread_sync since the two were synchronized"
        raise Fault(f"{action} tensor memory that {who} {did}: {cure}")

    def ordered(self, w: Warp) -> str:
        """What may be missing between threads, for messages."""
        if w.ledger.tensor_fences:
            return "no synchronization between, or no tcgen05.fence::before_thread_sync before it"
        return "no synchronization between"

    def load_issued(self, columns: np.ndarray, w: Warp) -> None:
        """A warp issues tcgen05.ld of columns."""
        quadrant = w.index % 4
        if self.pending_write[columns].any():
            raise Fault("tcgen05.ld of columns that a tcgen05 operation has yet to write")
        if self.pending_store[quadrant, columns].any():
            raise Fault("tcgen05.ld of columns that a tcgen05.st has yet to write (no wait::st)")
        self.check(
            self.write[columns], w, -1, "tcgen05.ld of", "wrote",
            "this warp has not waited for a commit after it",
        )  # fmt: skip
        self.check(
            self.stores[quadrant, columns], w, w.ledger.tensor, "tcgen05.ld of", "stored to",
            self.ordered(w),
        )  # fmt: skip
        self.pending_load[quadrant, columns] += 1

    def load_done(self, columns: np.ndarray, w: Warp) -> None:
        quadrant = w.index % 4
        self.pending_load[quadrant, columns] -= 1
        self.load[quadrant, columns] = w.ledger.tensor_stamp()
        self.access[quadrant, columns] = w.ledger.generic_stamp()

    def store_issued(self, columns: np.ndarray, w: Warp) -> None:
        """A warp issues tcgen05.st to columns."""
        if self.pending_use[columns].any():
            raise Fault("tcgen05.st to columns that a tcgen05 operation is yet to use")
        self.check(
            self.use[columns], w, -1, "tcgen05.st to", "uses",
            "this warp has not waited for a commit after it",
        )  # fmt: skip
        if self.pending_load[w.index % 4, columns].any():
            raise Fault("tcgen05.st to columns that a tcgen05.ld has yet to read (no wait::ld)")
        self.pending_store[w.index % 4, columns] += 1

    def stored(self, columns: np.ndarray, w: Warp) -> None:
        """The warp has waited for a tcgen05.st."""
        self.pending_store[w.index % 4, columns] -= 1
        self.stores[w.index % 4, columns] = w.ledger.tensor_stamp()
        self.access[w.index % 4, columns] = w.ledger.generic_stamp()

    def operation_issued(
        self, used: np.ndarray, written: np.ndarray, w: Warp, queue: int, what: str
    ) -> None:
        """A warp issues an operation of a tensor core queue."""
        if self.pending_store[:, used].any():
            raise Fault(f"{what} uses columns that a tcgen05.st has yet to write (no wait::st)")
        ledger = w.ledger
        self.check(
            self.stores[:, used], w, ledger.tensor, f"{what} uses", "stored to", self.ordered(w)
        )
        self.check_overwrite(written, w, what)
        for codes in (self.use[written], self.write[used]):
            self.check(codes, w, queue, f"{what} uses", "uses", "no commit was waited for between")
        np.add.at(self.pending_use, used, 1)
        np.add.at(self.pending_write, written, 1)

    def mma_issued(
        self, halves: slice, written: np.ndarray, accumulator: tuple, w: Warp, code: int
    ) -> None:
        """A warp issues an mma: one on the same columns before it must be done, or be alike.

        Of asynchronous tcgen05 operations only certain pairs run in the order of their issue. Two
        mma do if they have the same accumulator and shape (and kind and CTA group); for others
        their order needs a commit, and a wait for it (PTX ISA, "tcgen05 Memory Consistency Model",
        on pipelined instructions).

        Args:
            halves: rows of ``mma``: those of the lanes that D takes.
            written: columns of D.
            accumulator: all that has to be alike.
            w: the warp.
            code: the mma's stamp.
        """
        number = self.accumulators.setdefault(accumulator, len(self.accumulators) + 1)
        codes = self.mma[halves, written][self.accumulator[halves, written] != number]
        if codes.size:
            self.check(
                codes, w, -1, "tcgen05.mma writes", "uses",
                "that mma has another accumulator or shape, and no commit was waited for between",
            )  # fmt: skip
        self.mma[halves, written], self.accumulator[halves, written] = code, number

    def check_overwrite(self, written: np.ndarray, w: Warp, what: str) -> None:
        """Raises if loads of columns are under way or not ordered before what the warp does."""
        if self.pending_load[:, written].any():
            raise Fault(f"{what} writes columns that a tcgen05.ld has yet to read (no wait::ld)")
        self.check(
            self.load[:, written], w, w.ledger.tensor, f"{what} writes", "loaded", self.ordered(w)
        )

    def check_free(self, columns: np.ndarray, w: Warp) -> None:
        """Raises unless a warp that deallocates columns knows that nobody uses them any more.

        Deallocation is synchronous: a ld or st that its warp waited for needs no tcgen05.fence.
        """
        if self.pending_load[:, columns].any() or self.pending_store[:, columns].any():
            raise Fault("tcgen05.dealloc of columns that a tcgen05.ld or st is yet to access")
        seen, me = w.ledger.known.own[SEEN], w.ledger.me
        for codes, did, cure in (
            (self.access[:, columns], "loaded or stored", "no synchronization between"),
            (self.use[columns], "uses", "this warp has not waited for a commit after it"),
        ):
            if self.on and late(codes, seen, me):
                who = self.agents.text(late_agent(codes, seen, me))
                raise Fault(f"tcgen05.dealloc of tensor memory that {who} {did}: {cure}")

    def operation_done(self, used: np.ndarray, written: np.ndarray, code: int) -> None:
        np.add.at(self.pending_use, used, -1)
        np.add.at(self.pending_write, written, -1)
        self.use[used] = code
        self.write[written] = code

    def freed(self, columns: slice) -> None:
        for codes in (self.use, self.write):
            codes[columns] = 0
        for codes in (self.load, self.stores, self.access, self.mma):
            codes[:, columns] = 0


STRONG = 1 << 62
SERIAL_SHIFT = 32
CODE_MASK = (1 << 32) - 1


class GlobalAccesses:
    """Writes of a launch to global memory, and reads of the arrays it has written to.

    A stamp is ``cluster serial << 32 | code``; atomics and relaxed or volatile writes carry
    ``STRONG``. Strong accesses never race with each other. Bytes written twice with the same value
    are no race either.
    """

    def __init__(self) -> None:
        self.writes: dict[int, np.ndarray] = {}  # by base of the allocation
        self.reads: dict[int, np.ndarray] = {}

    @staticmethod
    def stamps_of(allocation: Allocation) -> np.ndarray:
        """Room for a stamp of each byte, in whole units of every width."""
        return np.zeros(-(-allocation.data.size // 32) * 32, np.int64)

    def full_stamp(self, w: Warp, code: int, strong: bool = False) -> int:
        return w.ledger.known.serial << SERIAL_SHIFT | code | (STRONG if strong else 0)

    def first_late(self, codes: np.ndarray, w: Warp, strong: bool, row: int) -> int:
        """The first stamp that the warp's knowledge does not cover, or 0."""
        known, me = w.ledger.known, w.ledger.me
        head = codes.item(0)
        different = np.unique(codes) if np.count_nonzero(codes != head) else [head]
        for value in different:
            full = int(value)
            if full == 0 or (strong and full & STRONG):
                continue
            serial, code = full >> SERIAL_SHIFT & 0x3FFFFFFF, full & CODE_MASK
            own = serial == known.serial and code >> CLOCK_BITS == me and row != PROXY
            if not own and not known.covers(serial, code, row):
                return full
        return 0

    def fault(self, w: Warp, full: int, name: str, action: str, did: str) -> Fault:
        serial, code = full >> SERIAL_SHIFT & 0x3FFFFFFF, full & CODE_MASK
        who = w.ledger.agents.text(code >> CLOCK_BITS)
        if serial != w.ledger.known.serial:
            who += " of another cluster"
        return Fault(
            f"{action} global memory ({name}) that {who} {did}, with no synchronization between "
            "(a barrier, or a release and an acquire that meet)"
        )

    def read(
        self, allocation: Allocation, index: object, unit: int, w: Warp, strong: bool = False,
        row: int = GLOBAL,
    ) -> None:  # fmt: skip
        """A warp reads units of so many bytes; with row PROXY it issues a copy that will."""
        writes = self.writes.get(allocation.base)
        if writes is None:
            return
        codes = writes.reshape(-1, unit)[index]
        if codes.size and (full := self.first_late(codes, w, strong, row)):
            if row == PROXY and not self.first_late(codes, w, strong, GLOBAL):
                raise Fault(
                    f"copy from global memory ({allocation.name}) that was written {NO_PROXY_FENCE}"
                )
            raise self.fault(w, full, allocation.name, "read of", "wrote")
        if not strong:
            reads = self.reads.get(allocation.base)
            if reads is None:
                reads = self.reads[allocation.base] = self.stamps_of(allocation)
            reads.reshape(-1, unit)[index] = self.full_stamp(w, w.ledger.generic_stamp())

    def write(
        self, allocation: Allocation, index: object, unit: int, values: np.ndarray, w: Warp,
        strong: bool = False, copy: int = 0,
    ) -> None:  # fmt: skip
        """A warp writes units of so many bytes.

        ``copy`` is the count of the bulk copy that does it for the warp.
        """
        base = allocation.base
        writes = self.writes.get(base)
        if writes is None:
            writes = self.writes[base] = self.stamps_of(allocation)
        units = writes.reshape(-1, unit)
        codes = units[index]
        if codes.size == 0:
            return
        if (full := self.first_late(codes, w, strong, GLOBAL)) and not np.array_equal(
            allocation.data[: allocation.data.size // unit * unit].reshape(-1, unit)[index], values
        ):
            raise self.fault(w, full, allocation.name, "overwrite of", "wrote")
        reads = self.reads.get(base)
        if reads is not None and (
            full := self.first_late(reads.reshape(-1, unit)[index], w, strong, GLOBAL)
        ):
            raise self.fault(w, full, allocation.name, "write to", "read")
        ledger = w.ledger
        code = stamp(ledger.agent(BULK), copy) if copy else ledger.generic_stamp()
        units[index] = self.full_stamp(w, code, strong)
