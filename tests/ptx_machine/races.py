# SPDX-License-Identifier: Apache-2.0
"""Races that no schedule needs to expose: accesses that synchronization does not order.

The machine has one clock that ticks when something synchronizes: an mbarrier completes a phase, a
barrier opens, an asynchronous operation completes. A warp's ``epoch`` is the latest tick it
waited for. An access by somebody else at or after that tick is not ordered before what it does
now. Any chain of waits carries later and later ticks, so properly synchronized programs never trip
this; some races hide behind an unrelated wait, which is why schedules are shuffled too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .errors import Fault

if TYPE_CHECKING:
    from .machine import Machine, Warp

REMOTE, ASYNC = 254, 255  # agents that are not warps of this CTA
NEVER = 2**31 - 1


def agent_text(code: int) -> str:
    return {REMOTE: "a warp of another CTA", ASYNC: "an asynchronous operation"}.get(
        code, f"warp {code}"
    )


class SharedAccesses:
    """Last write and last read of every byte of a CTA's shared memory, and by whom."""

    def __init__(self, size: int, clock: Machine, rank: int) -> None:
        self.clock, self.rank = clock, rank
        self.write_time = np.full(size, -1, np.int32)
        self.writer = np.zeros(size, np.uint8)
        self.read_time = np.full(size, -1, np.int32)
        self.reader = np.zeros(size, np.uint8)
        self.async_read = np.full(size // 16, -1, np.int32)  # by chunk of 16 bytes
        self.pending = np.zeros(size // 16, np.uint16)  # asynchronous reads yet to happen
        widths = (1, 2, 4, 8)
        self.write_rows = {w: self.write_time.reshape(-1, w) for w in widths}
        self.read_rows = {w: self.read_time.reshape(-1, w) for w in widths}
        self.writer_rows = {w: self.writer.reshape(-1, w) for w in widths}
        self.reader_rows = {w: self.reader.reshape(-1, w) for w in widths}

    def code(self, w: Warp) -> int:
        """How a warp is called here."""
        return w.index if w.cta.rank == self.rank else REMOTE

    # -- generic proxy -----------------------------------------------------------------------
    def read(self, offsets: np.ndarray, width: int, w: Warp) -> None:
        """A warp reads words."""
        times = self.write_time
        newest = max(int(times[offsets].max()), int(times[offsets + (width - 1)].max()))
        if newest >= w.epoch:
            self.check_written(offsets[:, None] + np.arange(width), w, "read")
        index = offsets // width
        self.read_rows[width][index] = self.clock.time
        self.reader_rows[width][index] = self.code(w)

    def check_written(self, index: object, w: Warp, action: str) -> None:
        """Raises if another agent wrote bytes at a time the warp has not synchronized with."""
        writer = self.writer[index]
        late = (self.write_time[index] >= w.epoch) & (writer != self.code(w))
        if late.any():
            who = agent_text(int(writer[late].flat[0]))
            raise Fault(
                f"{action} of shared memory that {who} wrote, with no synchronization between "
                "(a barrier or a wait is missing)"
            )

    def write(self, offsets: np.ndarray, width: int, w: Warp) -> None:
        """A warp writes words."""
        times = self.read_time
        newest = max(int(times[offsets].max()), int(times[offsets + (width - 1)].max()))
        chunks = offsets >> 4
        if (
            newest >= w.epoch
            or int(self.async_read[chunks].max()) >= w.read_epoch
            or self.pending[chunks].any()
        ):
            self.check_read(offsets[:, None] + np.arange(width), chunks, w, "write")
        newest = max(
            int(self.write_time[offsets].max()), int(self.write_time[offsets + (width - 1)].max())
        )
        if newest >= w.epoch:
            self.check_written(offsets[:, None] + np.arange(width), w, "overwrite")
        index = offsets // width
        self.write_rows[width][index] = self.clock.time
        self.writer_rows[width][index] = self.code(w)

    def check_read(self, index: object, chunks: object, w: Warp, action: str) -> None:
        """Raises if somebody may still read, or read at a time not synchronized with."""
        if self.pending[chunks].any():
            raise Fault(f"{action} to shared memory that an asynchronous operation is yet to read")
        if (self.async_read[chunks] >= w.read_epoch).any():
            raise Fault(
                f"{action} to shared memory that an asynchronous operation read, and this warp has "
                "not waited for it"
            )
        reader = self.reader[index]
        late = (self.read_time[index] >= w.epoch) & (reader != self.code(w))
        if late.any():
            raise Fault(
                f"{action} to shared memory that {agent_text(int(reader[late].flat[0]))} read, "
                "with no synchronization between (a barrier or a wait is missing)"
            )

    # -- asynchronous operations -------------------------------------------------------------
    def async_write_issued(self, span: slice, w: Warp) -> None:
        """A warp issues a copy that will write a range."""
        chunks = slice(span.start >> 4, (span.stop + 15) >> 4)
        if (
            self.pending[chunks].any()
            or int(self.async_read[chunks].max()) >= w.read_epoch
            or int(self.read_time[span].max()) >= w.epoch
        ):
            self.check_read(span, chunks, w, "asynchronous copy")
        if int(self.write_time[span].max()) >= w.epoch:
            self.check_written(span, w, "asynchronous overwrite")

    def async_written(self, index: object, agent: int) -> None:
        """A copy has written bytes."""
        self.write_time[index] = self.clock.time
        self.writer[index] = agent

    def async_read_issued(self, chunks: object, w: Warp, action: str) -> None:
        """A warp issues an operation that will read chunks."""
        self.check_chunks(chunks, w, action)
        self.pending[chunks] += 1

    def check_chunks(self, chunks: object, w: Warp, action: str) -> None:
        """Raises if chunks hold writes that the warp is not synchronized with."""
        for byte in (0, 15):
            times = self.write_time[byte::16][chunks]
            if int(times.max()) >= w.epoch:
                writer = self.writer[byte::16][chunks]
                late = (times >= w.epoch) & (writer != self.code(w))
                if late.any():
                    raise Fault(
                        f"{action} shared memory that {agent_text(int(writer[late].flat[0]))} "
                        "wrote, with no synchronization between (a barrier or a wait is missing)"
                    )

    def async_read_done(self, chunks: object) -> None:
        """An operation has read its chunks."""
        self.pending[chunks] -= 1
        self.async_read[chunks] = self.clock.time


class TensorAccesses:
    """Accesses to tensor memory, by quadrant of 32 lanes and column."""

    def __init__(self, clock: Machine) -> None:
        self.clock = clock
        self.pending_use = np.zeros(512, np.int32)  # queued tensor core operations
        self.pending_write = np.zeros(512, np.int32)
        self.use_time = np.full(512, -1, np.int64)  # NEVER until a commit completes
        self.write_time = np.full(512, -1, np.int64)
        self.pending_load = np.zeros((4, 512), np.int32)
        self.load_time = np.full((4, 512), -1, np.int64)
        self.load_warp = np.zeros((4, 512), np.int32)
        self.store_time = np.full((4, 512), -1, np.int64)
        self.store_warp = np.zeros((4, 512), np.int32)

    def load_issued(self, columns: np.ndarray, w: Warp) -> None:
        """A warp issues tcgen05.ld of columns."""
        if self.pending_write[columns].any():
            raise Fault("tcgen05.ld of columns that a tcgen05 operation has yet to write")
        if (self.write_time[columns] >= w.epoch).any():
            raise Fault(
                "tcgen05.ld of columns that a tcgen05 operation wrote, and this warp has not "
                "waited for a commit after it"
            )
        self._check_stores(columns, w, "tcgen05.ld")
        self.pending_load[w.index % 4, columns] += 1

    def load_done(self, columns: np.ndarray, w: Warp) -> None:
        quadrant = w.index % 4
        self.pending_load[quadrant, columns] -= 1
        self.load_time[quadrant, columns] = self.clock.time
        self.load_warp[quadrant, columns] = w.index

    def _check_stores(self, columns: np.ndarray, w: Warp, action: str) -> None:
        late = self.store_time[:, columns] >= w.epoch
        if action == "tcgen05.ld":  # other quadrants are other warps' business
            late = late[w.index % 4 : w.index % 4 + 1]
            who = self.store_warp[w.index % 4, columns][None, :]
        else:
            who = self.store_warp[:, columns]
        late &= who != w.index
        if late.any():
            raise Fault(
                f"{action} of tensor memory that warp {int(who[late].flat[0])} stored to, with no "
                "synchronization between"
            )

    def store(self, columns: np.ndarray, w: Warp) -> None:
        """A warp issues tcgen05.st to columns."""
        if self.pending_use[columns].any() or (self.use_time[columns] >= w.epoch).any():
            raise Fault(
                "tcgen05.st to columns that a tcgen05 operation uses, and this warp has not waited "
                "for a commit after it"
            )

    def stored(self, columns: np.ndarray, w: Warp) -> None:
        self.store_time[w.index % 4, columns] = self.clock.time
        self.store_warp[w.index % 4, columns] = w.index

    def operation_issued(self, used: np.ndarray, written: np.ndarray, w: Warp, what: str) -> None:
        """A warp issues a tensor core operation that uses columns and writes some of them."""
        self.check_overwrite(written, w, what)
        self._check_stores(used, w, what)
        np.add.at(self.pending_use, used, 1)
        np.add.at(self.pending_write, written, 1)

    def check_overwrite(self, written: np.ndarray, w: Warp, what: str) -> None:
        """Raises if loads of columns are under way or not ordered before what the warp does."""
        if self.pending_load[:, written].any():
            raise Fault(f"{what} writes columns that a tcgen05.ld has yet to read (no wait::ld)")
        late = self.load_time[:, written] >= w.epoch
        late &= self.load_warp[:, written] != w.index
        if late.any():
            who = int(self.load_warp[:, written][late].flat[0])
            raise Fault(
                f"{what} writes columns that warp {who} loaded, with no synchronization between"
            )

    def operation_done(self, used: np.ndarray, written: np.ndarray) -> None:
        np.add.at(self.pending_use, used, -1)
        np.add.at(self.pending_write, written, -1)
        self.use_time[used] = NEVER
        self.write_time[written] = NEVER

    def committed(self, used: np.ndarray, written: np.ndarray) -> None:
        """A commit after the operation completes."""
        self.use_time[used] = np.where(
            self.use_time[used] == NEVER, self.clock.time, self.use_time[used]
        )
        self.write_time[written] = np.where(
            self.write_time[written] == NEVER, self.clock.time, self.write_time[written]
        )

    def freed(self, columns: slice) -> None:
        for times in (self.use_time, self.write_time):
            times[columns] = -1
        for times in (self.load_time, self.store_time):
            times[:, columns] = -1
