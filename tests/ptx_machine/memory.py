# SPDX-License-Identifier: Apache-2.0
"""Memories of the machine: global, constant and local, shared, tensor memory, and mbarriers.

Every byte of shared and tensor memory carries a state, so that reads of bytes that were never
written, or that an asynchronous copy is still writing, are errors and not garbage.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .errors import Fault
from .order import Agents, Knowledge, stamp
from .races import SharedAccesses, TensorAccesses

POISON_BYTE = 0xCB
SHIFT = {1: 0, 2: 1, 4: 2, 8: 3, 16: 4, 32: 5}  # log2 of the widths of accesses
UNWRITTEN, WRITTEN, IN_FLIGHT, BARRIER = 0, 1, 2, 3
STATE_TEXT = {
    UNWRITTEN: "never written",
    IN_FLIGHT: "still being written by an asynchronous operation",
    BARRIER: "an mbarrier object",
}
SHARED_BASE = 1024  # the first KiB of a CTA's shared memory is the system's
CTA_SHIFT = 24  # shared::cluster address = rank << 24 | offset
GENERIC_SHARED = 0x7F00_0000_0000  # generic addresses of the shared window
GENERIC_LOCAL = 0x7E00_0000_0000
PARAM_BASE = 0x7D00_0000_0000
GLOBAL_BASE = 0x5000_0000_0000


@dataclass
class Allocation:
    """A range of global memory backed by a NumPy array's bytes.

    Attributes:
        base: device address of byte 0.
        data: uint8 view of the array; writes go to it.
        name: how errors call it.
        state: 0/1 per byte for arrays that start unwritten, else None.
        read_only: whether stores are errors.
        previous: whether the launch before may still write it, until griddepcontrol.wait.
    """

    base: int
    data: np.ndarray
    name: str
    state: np.ndarray | None = None
    read_only: bool = False
    previous: bool = False
    words: dict | None = None

    @property
    def end(self) -> int:
        return self.base + self.data.size

    def typed(self, width: int) -> np.ndarray | None:
        """The bytes as words of a width, as far as they are whole; None if they are not aligned."""
        if self.words is None:
            self.words = {}
        if width not in self.words:
            usable = self.data.size - self.data.size % width
            aligned = self.base % width == 0
            self.words[width] = words_of(self.data[:usable], width) if aligned else None
        return self.words[width]


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def words_of(data: np.ndarray, width: int) -> np.ndarray:
    """Bytes as words of a width: unsigned integers (n,), and (n, width / 8) of 8 bytes above 8."""
    return data.view(UNSIGNED[min(width, 8)]).reshape((-1,) if width <= 8 else (-1, width // 8))


def unit_index(allocation: Allocation, offsets: np.ndarray, width: int) -> tuple[np.ndarray, int]:
    """Index of words at offsets among units of so many bytes: whole words, if they are aligned."""
    if allocation.base % width == 0:
        return offsets >> SHIFT[width], width
    return offsets[:, None] + np.arange(width), 1


def check_launched(allocation: Allocation, w, action: str, writes: bool = False) -> None:
    """Raises if a warp touches what the launch before may still use.

    Writes come after griddepcontrol.wait wherever the kernel has one: what the launch before reads
    is not known.
    """
    if not (allocation.previous or (writes and w.machine.waits_for_launch)):
        return
    if not w.ledger.launch_known:
        raise Fault(
            f"{action} {allocation.name} before griddepcontrol.wait: the launch before may still "
            f"{'use' if writes else 'write'} it"
        )


class GlobalMemory:
    """Global memory: disjoint allocations with gaps between them."""

    def __init__(self) -> None:
        self.allocations: list[Allocation] = []
        self.bases: list[int] = []
        self.next_base = GLOBAL_BASE

    def register(
        self,
        array: np.ndarray,
        name: str,
        base: int | None = None,
        uninitialized: bool = False,
        read_only: bool = False,
    ) -> Allocation:
        """Makes an array's bytes global memory; the same array again gives the same address."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name}: global memory must be a contiguous array")
        data = array.reshape(-1).view(np.uint8) if array.size else np.zeros(0, np.uint8)
        for known in self.allocations:
            if (
                base is None
                and data.size
                and known.data.size == data.size
                and known.data.ctypes.data == data.ctypes.data
            ):
                return known
        if base is None:
            base = self.next_base
            # A gap of at least 1 MiB: an index that runs off one array never lands in the next.
            self.next_base += (data.size + (1 << 21)) & ~((1 << 20) - 1)
        state = np.zeros(data.size, np.uint8) if uninitialized else None
        allocation = Allocation(base, data, name, state, read_only)
        index = bisect.bisect(self.bases, base)
        self.bases.insert(index, base)
        self.allocations.insert(index, allocation)
        return allocation

    def mark_previous(self, arrays) -> None:
        """Says which arrays the launch before may still write."""
        starts = {a.ctypes.data for a in arrays if a.size}
        known = {a.data.ctypes.data for a in self.allocations}
        if starts - known:
            raise ValueError("previous: an array that no parameter points to")
        for allocation in self.allocations:
            allocation.previous = allocation.data.ctypes.data in starts

    def find(self, low: int, high: int, action: str) -> Allocation:
        """The allocation that holds [low, high)."""
        index = bisect.bisect_right(self.bases, low) - 1
        if index >= 0:
            allocation = self.allocations[index]
            if high <= allocation.end:
                return allocation
            if low < allocation.end + (1 << 20):
                raise Fault(
                    f"{action} out of bounds: bytes [{low - allocation.base}, "
                    f"{high - allocation.base}) of {allocation.name}, "
                    f"which has {allocation.data.size}"
                )
        raise Fault(f"{action} out of bounds: address {low:#x} is in no global allocation")

    def load(self, addresses: np.ndarray, width: int, w=None, strong: bool = False) -> np.ndarray:
        """Loads one word of ``width`` bytes per address, in the form that `words_of` gives them.

        A warp ``w`` reads them, or the machine itself, which is checked for no race.
        """
        allocation, offsets = self._locate(addresses, width, "global read")
        if allocation is None:
            words = [self.load(addresses[i : i + 1], width, w, strong) for i in offsets]
            return np.concatenate(words)
        if w is not None:
            check_launched(allocation, w, "read of")
            accesses = w.machine.global_accesses
            if accesses is not None and allocation.base in accesses.writes:
                accesses.read(allocation, *unit_index(allocation, offsets, width), w, strong)
        if allocation.state is not None:
            span = offsets[:, None] + np.arange(width)
            if not allocation.state[span].all():
                raise Fault(f"read of bytes of {allocation.name} that were never written")
        typed = allocation.typed(width)
        if typed is not None:
            return typed[offsets >> SHIFT[width]]
        return words_of(allocation.data[offsets[:, None] + np.arange(width)].reshape(-1), width)

    def store(
        self, addresses: np.ndarray, values: np.ndarray, width: int, w=None, strong: bool = False
    ) -> None:
        """Stores one word per address, in the form that `words_of` gives them.

        Where addresses repeat, one of the values stays.
        """
        allocation, offsets = self._locate(addresses, width, "global write")
        if allocation is None:
            for i in offsets:
                self.store(addresses[i : i + 1], values[i : i + 1], width, w, strong)
            return
        if allocation.read_only:
            raise Fault(f"write to read-only {allocation.name}")
        if w is not None:
            check_launched(allocation, w, "write to", writes=True)
            if w.machine.global_accesses is not None:
                raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
                index, unit = unit_index(allocation, offsets, width)
                w.machine.global_accesses.write(allocation, index, unit, raw, w, strong)
        if allocation.state is not None:
            allocation.state[offsets[:, None] + np.arange(width)] = 1
        typed = allocation.typed(width)
        if typed is not None:
            typed[offsets >> SHIFT[width]] = values
        else:
            raw = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
            allocation.data[offsets[:, None] + np.arange(width)] = raw

    def _locate(
        self, addresses: np.ndarray, width: int, action: str
    ) -> tuple[Allocation | None, np.ndarray]:
        low, high = int(addresses.min()), int(addresses.max()) + width
        try:
            allocation = self.find(low, high, action)
        except Fault:
            if addresses.size == 1 or low + width == high:
                raise
            return None, np.arange(addresses.size)
        return allocation, addresses - allocation.base

    def read_bytes(self, address: int, count: int) -> np.ndarray:
        """A copy of ``count`` bytes."""
        allocation = self.find(address, address + count, "global read")
        offset = address - allocation.base
        if allocation.state is not None and not allocation.state[offset : offset + count].all():
            raise Fault(f"read of bytes of {allocation.name} that were never written")
        return allocation.data[offset : offset + count].copy()

    def write_bytes(self, address: int, values: np.ndarray) -> None:
        """Writes bytes."""
        allocation = self.find(address, address + values.size, "global write")
        if allocation.read_only:
            raise Fault(f"write to read-only {allocation.name}")
        offset = address - allocation.base
        allocation.data[offset : offset + values.size] = values
        if allocation.state is not None:
            allocation.state[offset : offset + values.size] = 1


class Mbarrier:
    """An mbarrier object: phase, pending arrivals and transaction count.

    Attributes:
        agent: in whose name copies write that complete on it.
        init: stamp of its initialization.
        known: what arrivals handed over so far to waits of any scope, and ``far`` to waits of the
            cluster's scope alone; ``done`` and ``far_done`` are those of the last completed phase.
    """

    def __init__(self, address: int, count: int, line: int, agents: Agents, init: int) -> None:
        self.address, self.expected, self.pending = address, count, count
        self.phase, self.tx, self.line = 0, 0, line
        self.waiters: list = []
        self.agent, self.init = agents.new_mbarrier(), init
        self.known = Knowledge(agents)
        self.done: Knowledge | None = None
        self.far: Knowledge | None = None
        self.far_done: Knowledge | None = None

    def arrive(self, count: int) -> int:
        """Counts arrivals; returns the phase they belong to."""
        if count > self.pending:
            raise Fault(
                f"mbarrier {self.address:#x} (initialized at line {self.line} for {self.expected} "
                f"arrivals) got {count} arrivals with {self.pending} pending"
            )
        phase = self.phase
        self.pending -= count
        self.settle()
        return phase

    def add_tx(self, count: int) -> None:
        """Adds to the transaction count: expect_tx is positive, complete_tx negative."""
        self.tx += count
        if not -(1 << 20) < self.tx < (1 << 20):
            raise Fault(f"mbarrier {self.address:#x}: transaction count {self.tx} out of range")
        self.settle()

    def settle(self) -> None:
        if self.pending == 0 and self.tx == 0:
            self.phase += 1
            self.known.own[:, self.agent] = self.phase
            self.done = self.known.copy()
            self.far_done = None if self.far is None else self.far.copy()
            self.pending = self.expected
            for wake in self.waiters:
                wake()
            self.waiters.clear()

    def stamp(self) -> int:
        """Stamp of what a copy writes that completes in the current phase."""
        return stamp(self.agent, self.phase + 1)

    def describe(self) -> str:
        return (
            f"mbarrier {self.address:#x} (line {self.line}): phase {self.phase}, "
            f"{self.pending} of {self.expected} arrivals pending, transaction count {self.tx}"
        )


class SharedMemory:
    """Shared memory of one CTA; addresses here are offsets (24 bits, no CTA rank)."""

    def __init__(self, size: int, agents: Agents, races: bool) -> None:
        size = (size + 15) // 16 * 16
        self.agents = agents
        self.accesses = SharedAccesses(size, agents, races)
        self.size = size
        self.data = np.full(size, POISON_BYTE, np.uint8)
        self.state = np.zeros(size, np.uint8)
        self.barriers: dict[int, Mbarrier] = {}
        self.words = {w: words_of(self.data, w) for w in (1, 2, 4, 8, 16)}
        self.word_state = {w: words_of(self.state, w) for w in (1, 2, 4, 8, 16)}
        # In chunks of 16 bytes, for matrix operands.
        self.chunks = self.data.reshape(-1, 16)
        self.chunk_state = self.word_state[16]

    # The states of a word, as an integer of its size, and of the halves of 16 bytes.
    ALL_WRITTEN: ClassVar[dict[int, int]] = {
        w: int.from_bytes(bytes([WRITTEN] * min(w, 8)), "little") for w in (1, 2, 4, 8, 16)
    }

    def check_range(self, low: int, high: int, action: str) -> None:
        if low < SHARED_BASE or high > self.size:
            raise Fault(
                f"{action} out of bounds: shared memory bytes [{low}, {high}) of "
                f"[{SHARED_BASE}, {self.size})"
            )

    def check_readable(self, index: object, action: str) -> None:
        states = self.state[index]
        if not (states == WRITTEN).all():
            flat = np.atleast_1d(states).reshape(-1)
            bad = int(np.flatnonzero(flat != WRITTEN)[0])
            if isinstance(index, slice):
                where = f"byte {index.start + bad}"
            else:
                where = f"byte {int(np.asarray(index).reshape(-1)[bad])}"
            raise Fault(f"{action} of shared memory {where}, which is {STATE_TEXT[int(flat[bad])]}")

    def check_no_barrier(self, index: object, action: str) -> None:
        if self.barriers and (self.state[index] == BARRIER).any():
            raise Fault(f"{action} over an mbarrier object")

    def load(self, offsets: np.ndarray, width: int, w, strong: bool = False) -> np.ndarray:
        """Loads one word per lane of a warp; ``strong`` if relaxed, volatile or of an atomic."""
        index = offsets >> SHIFT[width]
        if not (self.word_state[width][index] == self.ALL_WRITTEN[width]).all():
            self.check_readable(offsets[:, None] + np.arange(width), "read")
        if not strong:
            self.accesses.read(index, width, w)
        return self.words[width][index]

    def store(
        self, offsets: np.ndarray, values: np.ndarray, width: int, w, strong: bool = False
    ) -> None:
        """Stores one word per lane of a warp through the generic proxy."""
        index = offsets >> SHIFT[width]
        states = self.word_state[width][index]
        written = states == self.ALL_WRITTEN[width]
        if not written.all() and not (written | (states == 0)).all():
            span = self.state[offsets[:, None] + np.arange(width)]
            if (span == BARRIER).any():
                raise Fault("write over an mbarrier object")
            if (span == IN_FLIGHT).any():
                raise Fault("write to shared memory that an asynchronous copy is writing")
        self.accesses.write(index, width, w, strong)
        self.words[width][index] = values
        self.word_state[width][index] = self.ALL_WRITTEN[width]

    def barrier(self, offset: int) -> Mbarrier:
        """The mbarrier object at an offset."""
        if offset % 8:
            raise Fault(f"mbarrier address {offset:#x} is not 8-byte aligned")
        found = self.barriers.get(offset)
        if found is None:
            raise Fault(f"no mbarrier was initialized at shared memory offset {offset}")
        return found

    def init_barrier(self, offset: int, count: int, line: int, init: int) -> None:
        """Makes an mbarrier object; ``init`` is the stamp of the warp that does it."""
        if offset % 8:
            raise Fault(f"mbarrier address {offset:#x} is not 8-byte aligned")
        self.check_range(offset, offset + 8, "mbarrier.init")
        if offset in self.barriers:
            raise Fault(f"mbarrier.init of a live mbarrier at offset {offset}")
        if not 1 <= count < (1 << 20):
            raise Fault(f"mbarrier.init with count {count}")
        self.barriers[offset] = Mbarrier(offset, count, line, self.agents, init)
        self.state[offset : offset + 8] = BARRIER

    def invalidate_barrier(self, offset: int) -> None:
        found = self.barrier(offset)
        if found.tx:
            raise Fault(f"mbarrier.inval with transactions under way: {found.describe()}")
        del self.barriers[offset]
        self.state[offset : offset + 8] = UNWRITTEN

    # -- asynchronous writes -----------------------------------------------------------------
    def begin_write(self, index: object, span: slice, w) -> None:
        """A warp issues a copy to bytes ``index``, all within ``span``."""
        self.accesses.async_write_issued(span, w)
        states = self.state[index]
        if (states == BARRIER).any():
            raise Fault("asynchronous copy over an mbarrier object")
        if (states == IN_FLIGHT).any():
            raise Fault("asynchronous copy to bytes that another one is still writing")
        self.state[index] = IN_FLIGHT

    def finish_write(self, index: object, values: np.ndarray, code: int) -> None:
        """A copy has arrived; its stamp says what to wait for before reading it."""
        self.data[index] = values
        self.state[index] = WRITTEN
        self.accesses.async_written(index, code)


class TensorMemory:
    """Tensor memory of one CTA: 128 lanes x 512 columns of 32 bits, all poisoned at first."""

    LANES, COLUMNS = 128, 512

    def __init__(self, agents: Agents, races: bool) -> None:
        self.accesses = TensorAccesses(agents, races)
        self.data = np.zeros((0, 0), np.uint32)  # made at the first allocation
        self.written = np.zeros((0, 0), bool)
        self.owner = np.full(self.COLUMNS, -1, np.int32)  # allocation id of a column
        self.allocations: dict[int, tuple[int, int]] = {}  # first column -> (columns, line)
        self.permit = True
        self.next_id = 0

    def allocate(self, columns: int, line: int) -> int | None:
        """First column of a new allocation, or None if there is no room now."""
        if columns not in (32, 64, 128, 256, 512):
            raise Fault(f"tcgen05.alloc of {columns} columns: not a power of two in [32, 512]")
        if not self.permit:
            raise Fault("tcgen05.alloc after relinquish_alloc_permit")
        if not self.data.size:
            self.data = np.full((self.LANES, self.COLUMNS), 0xCBCBCBCB, np.uint32)
            self.written = np.zeros((self.LANES, self.COLUMNS), bool)
        for start in range(0, self.COLUMNS - columns + 1, 32):
            if (self.owner[start : start + columns] < 0).all():
                self.owner[start : start + columns] = self.next_id
                self.next_id += 1
                self.allocations[start] = (columns, line)
                return start
        return None

    def free(self, start: int, columns: int) -> None:
        if self.allocations.get(start, (0, 0))[0] != columns:
            raise Fault(f"tcgen05.dealloc of {columns} columns at {start}: no such allocation")
        del self.allocations[start]
        self.owner[start : start + columns] = -1
        self.accesses.freed(slice(start, start + columns))
        self.written[:, start : start + columns] = False
        self.data[:, start : start + columns] = 0xCBCBCBCB

    def check(self, columns: np.ndarray, action: str) -> None:
        """Raises unless all columns belong to one allocation."""
        low, high = int(np.min(columns)), int(np.max(columns))
        if low < 0 or high >= self.COLUMNS:
            raise Fault(f"{action} of tensor memory columns {low}..{high}, outside of 0..511")
        owners = self.owner[columns]
        if (owners < 0).any():
            bad = int(np.asarray(columns).reshape(-1)[int(np.argmax(owners.reshape(-1) < 0))])
            raise Fault(f"{action} of tensor memory column {bad}, which is not allocated")
        if (owners != owners.flat[0]).any():
            raise Fault(f"{action} of tensor memory columns {low}..{high} spans two allocations")

    def read(self, lanes: np.ndarray, columns: np.ndarray, action: str) -> np.ndarray:
        """Words at broadcast (lanes, columns)."""
        self.check(columns, action)
        written = self.written[lanes, columns]
        if not written.all():
            lane, column = np.broadcast_arrays(lanes, columns)
            bad = np.argwhere(~written)[0]
            place = (int(lane[tuple(bad)]), int(column[tuple(bad)]))
            raise Fault(
                f"{action} of tensor memory lane {place[0]} column {place[1]}, never written"
            )
        return self.data[lanes, columns]

    def write(self, lanes: np.ndarray, columns: np.ndarray, values: np.ndarray, action: str):
        """Stores words at broadcast (lanes, columns)."""
        self.check(columns, action)
        self.data[lanes, columns] = values
        self.written[lanes, columns] = True
