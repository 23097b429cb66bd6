"""The shared table that says which trajectory lies where in the arena.

The ledger knows numbers only: it hands out regions of ``[0, arena_steps)``, remembers who is writing into which, and
lists the trajectories that may be read. It is a handful of ``int64`` arrays in one :class:`SharedBlock`.

**Who may do what.** Writers change the ledger inside the lock, for microseconds: :meth:`Ledger.reserve` before they
copy a trajectory into its region, :meth:`Ledger.publish` after. Readers never lock.

**Every change is one store.** The counters stand in two copies, and the word ``active`` says which copy holds. A change
is prepared where nobody looks (the other copy, a row that no counter refers to) and takes effect when ``active``
flips. A process that is killed before the flip has changed nothing, one killed after it has changed everything: there
is no state to repair.

**How a reader knows that what it read was whole.** Every trajectory has an id that is never used again, and its row
(``id % rows``) carries that id from before it is published until its region, or its row, is given to another. The word
is taken back *before* the first byte changes. So whoever finds the id in the row before a copy and after it has
copied that trajectory and nothing else (a sequence lock whose version is the id). A trajectory that is retired while
it is read stays whole until its room is needed.

**Room.** Free steps are handed out from a *window*, a gap between trajectories. When the window is used up, the next
one is looked up from the rows at hand: a pass over the rows once per window, and a window is at least 1/32 of a large
arena, so that the cost per trajectory does not depend on how many there are. The arena has head-room beyond
``max_total_steps`` for the trajectories being written, and nothing touches that memory before it is needed.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodichain_rl.errors import SharingError, TooManyWritersError, TrajectoryTooLongError
from embodichain_rl.replay.memory_check import check_memory
from embodichain_rl.replay.processes import own_process, process_is_alive
from embodichain_rl.replay.shared_memory import ALIGNMENT, CrossProcessLock, SharedBlock

__all__ = ["Ledger", "Reservation", "Rows"]

WRITER_SLOTS = 256
"""How many trajectories may be in the middle of being written at the same moment."""

SUSPECT_AFTER = 50_000_000
"""Nanoseconds that a reservation may take before the next writer asks whether its owner still lives."""

# Columns of a row. A row belongs to trajectory ``id`` as long as its first word is ``id``.
ID, START, LENGTH, SEQ = range(4)

# Columns of a writer's slot.
SLOT_ID, SLOT_PID, SLOT_PROCESS_START, SLOT_SINCE = range(4)


@dataclass(slots=True)
class _Counters:
    """The words that change together, with the flip of ``active``."""

    next_id: int
    """The id of the next trajectory that is reserved."""
    next_seq: int
    """How many trajectories were published, and the place of the next one in the order of publication."""
    oldest_seq: int
    """The place of the oldest live trajectory: those from here to ``next_seq`` are live."""
    live_steps: int
    """Steps of all live trajectories."""
    window: int
    """The first free step of the window."""
    window_end: int
    """The step behind the window."""
    high_water: int
    """The step behind the part of the arena that is in use; head-room beyond it is untouched memory."""
    steps_written: int
    """Steps ever published, since the count was last set."""
    evicted_early: int
    """Trajectories evicted because the head-room did not suffice, before a limit asked for it."""
    reclaimed: int
    """Reservations taken back from processes that died while writing."""


COUNTERS = tuple(_Counters.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A region of the arena that one writer fills: steps ``[start, start + length)`` for the trajectory ``id``."""

    id: int
    start: int
    length: int
    slot: int


@dataclass(frozen=True, slots=True)
class Rows:
    """What the ledger says of some trajectories: three ``int64`` arrays of the same length."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class Ledger:
    """The shared table of trajectories; see the module's docstring for the protocol.

    Args:
        max_trajectories: at most so many trajectories are live, the newest.
        max_total_steps: at most so many steps are live.
        arena_steps: the size of the arena, head-room included.
        writer_slots: how many trajectories may be in the middle of being written at the same moment.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> with ledger.reserve(7) as region:
        ...     pass  # copy 7 steps to [region.start, region.start + 7)
        >>> len(ledger), ledger.num_steps
        (1, 7)
    """

    def __init__(
        self, max_trajectories: int, max_total_steps: int, arena_steps: int, *, writer_slots: int = WRITER_SLOTS
    ) -> None:
        self.max_trajectories = max_trajectories
        self.max_total_steps = max_total_steps
        self.arena_steps = arena_steps
        # A row is used again only after so many others that no live trajectory and no unfinished one can stand in it,
        # bar a writer that was stopped for long: its row is passed over.
        self.num_rows = max_trajectories + 2 * writer_slots
        self._shapes: dict[str, tuple[int, ...]] = {
            "_active": (1,),
            "_holder": (1,),
            "_counters": (2, len(COUNTERS)),
            "_slots": (writer_slots, 4),
            "_order": (self.num_rows,),
            "_rows": (self.num_rows, 4),
            "_published_at": (self.num_rows,),
        }
        nbytes = sum(_aligned(8 * math.prod(shape)) for shape in self._shapes.values())
        check_memory(nbytes, f"The ledger of {max_trajectories:,} trajectories", "Lower max_trajectories.")
        self._block = SharedBlock(nbytes)
        self._map()
        self._slots[:, SLOT_ID] = -1
        self._rows[:, ID] = -1
        empty = _Counters(*(0 for _ in COUNTERS))
        empty.high_water = max_total_steps
        empty.window_end = max_total_steps
        self._commit(empty)

    def _map(self) -> None:
        offset = 0
        for name, shape in self._shapes.items():
            setattr(self, name, self._block.array(np.int64, shape, offset))
            offset += _aligned(8 * math.prod(shape))
        self._row_ids = self._rows[:, ID]
        self._lock = CrossProcessLock(self._block, self._holder)

    _active: np.ndarray
    _holder: np.ndarray
    _counters: np.ndarray
    _slots: np.ndarray
    _order: np.ndarray
    _rows: np.ndarray
    _published_at: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_row_ids") and k not in self._shapes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    # ------------------------------------------------------------------------------------------------ counters

    def _read(self) -> _Counters:
        return _Counters(*self._counters[int(self._active[0])].tolist())

    def _commit(self, counters: _Counters) -> None:
        other = 1 - int(self._active[0])
        self._counters[other] = [getattr(counters, name) for name in COUNTERS]
        self._active[0] = other

    def __len__(self) -> int:
        """The number of live trajectories."""
        oldest, end = self.live_range()
        return end - oldest

    @property
    def num_steps(self) -> int:
        """The number of steps of all live trajectories."""
        return self._read().live_steps

    @property
    def steps_written(self) -> int:
        """The number of steps ever published."""
        return self._read().steps_written

    def stats(self) -> dict[str, int]:
        """Returns the ledger's counters by name."""
        counters = self._read()
        return {
            "trajectories": counters.next_seq - counters.oldest_seq,
            "steps": counters.live_steps,
            "published": counters.next_seq,
            "evicted": counters.oldest_seq,
            "evicted_early": counters.evicted_early,
            "reclaimed": counters.reclaimed,
            "writing": int(np.count_nonzero(self._slots[:, SLOT_ID] >= 0)),
        }

    # ------------------------------------------------------------------------------------------------- readers

    def live_range(self) -> tuple[int, int]:
        """Returns ``(oldest, end)``: the places, in the order of publication, of what is live."""
        counters = self._counters[int(self._active[0])]
        oldest, end = counters[_OLDEST_SEQ], counters[_NEXT_SEQ]
        return int(oldest), int(end)

    def rows_at(self, seqs: np.ndarray) -> Rows:
        """Returns the rows of the trajectories at the places ``seqs``; a row that just went has length -1.

        A row that is returned is whole: its id was there before and after it was read.
        """
        ids = self._order.take(seqs % self.num_rows)
        at = ids % self.num_rows
        rows = self._rows.take(at, axis=0)
        return _rows_where(self._row_ids.take(at) == ids, ids, rows)

    def rows_of(self, ids: np.ndarray) -> Rows:
        """Returns the rows of the trajectories ``ids``; one that is not, or no longer, there has length -1."""
        at = ids % self.num_rows
        rows = self._rows.take(at, axis=0)
        held = (self._row_ids.take(at) == ids) & (rows[:, SEQ] >= 0) & (ids >= 0)
        return _rows_where(held, ids, rows)

    def still_valid(self, ids: np.ndarray) -> np.ndarray:
        """Says of each trajectory whether all that was read of it since its row was read is whole."""
        return self._row_ids.take(ids % self.num_rows) == ids

    def live_rows(self) -> Rows:
        """Returns the rows of all live trajectories, oldest first: a pass over the ledger."""
        oldest, end = self.live_range()
        rows = self.rows_at(np.arange(oldest, end))
        there = rows.lengths >= 0
        return rows if there.all() else Rows(rows.ids[there], rows.starts[there], rows.lengths[there])

    def published_at(self, ids: np.ndarray) -> np.ndarray:
        """Returns when the trajectories were published, in nanoseconds of ``time.monotonic_ns``."""
        return self._published_at[ids % self.num_rows]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keeps every live trajectory where it is, for a reader that must have all of them: writers wait meanwhile."""
        with self._lock:
            yield

    # ------------------------------------------------------------------------------------------------- writers

    @contextmanager
    def reserve(self, length: int) -> Iterator[Reservation]:
        """Hands out a region for a trajectory of ``length`` steps, and publishes it when the block ends.

        When the block raises, the region is given back and nothing was written.

        Raises:
            TrajectoryTooLongError: when ``length`` exceeds ``max_total_steps``.
            TooManyWritersError: when too many trajectories are in the middle of being written.
            LedgerLockTimeoutError: when a stopped process holds the lock.
        """
        reservation = self._reserve(length)
        try:
            yield reservation
        except BaseException:
            self._abort(reservation)
            raise
        self._publish(reservation)

    def _reserve(self, length: int) -> Reservation:
        if length > self.max_total_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of {length:,} steps, but max_total_steps={self.max_total_steps:,}. Raise "
                "max_total_steps, or end episodes earlier (max_episode_steps, max_frames_per_traj)."
            )
        with self._lock:
            counters = self._read()
            self._reclaim_from_the_dead(counters)
            free = np.flatnonzero(self._slots[:, SLOT_ID] < 0)
            if not len(free):
                raise TooManyWritersError(
                    f"{len(self._slots)} trajectories are in the middle of being written, as many as the ledger has "
                    "slots for. Use fewer writer processes."
                )
            if counters.window_end - counters.window < length:
                self._open_window(counters, length)
            start = counters.window
            counters.window += length
            while self._is_taken(counters.next_id, counters):
                counters.next_id += 1
            row = self._rows[counters.next_id % self.num_rows]
            row[ID] = -1
            row[START], row[LENGTH], row[SEQ] = start, length, -1
            row[ID] = counters.next_id
            reservation = Reservation(counters.next_id, start, length, int(free[0]))
            slot = self._slots[reservation.slot]
            slot[SLOT_PID], slot[SLOT_PROCESS_START], slot[SLOT_SINCE] = *own_process(), time.monotonic_ns()
            slot[SLOT_ID] = reservation.id
            counters.next_id += 1
            self._commit(counters)
        return reservation

    def _publish(self, reservation: Reservation) -> None:
        with self._lock:
            row = self._rows[reservation.id % self.num_rows]
            if row[ID] != reservation.id:
                raise SharingError(
                    f"The region of trajectory {reservation.id} was taken back while it was being written: its owner, "
                    f"process {os.getpid()}, was taken for dead. All processes that share a buffer must see each "
                    "other's process ids (one container, one pid namespace)."
                )
            counters = self._read()
            self._published_at[reservation.id % self.num_rows] = time.monotonic_ns()
            row[SEQ] = counters.next_seq
            self._order[counters.next_seq % self.num_rows] = reservation.id
            counters.next_seq += 1
            counters.live_steps += reservation.length
            counters.steps_written += reservation.length
            while (
                counters.next_seq - counters.oldest_seq > self.max_trajectories
                or counters.live_steps > self.max_total_steps
            ):
                self._retire_oldest(counters)
            self._commit(counters)
            self._slots[reservation.slot, SLOT_ID] = -1

    def _abort(self, reservation: Reservation) -> None:
        with self._lock:
            if self._slots[reservation.slot, SLOT_ID] == reservation.id:
                self._give_back(reservation.slot, self._read())

    def retire_all(self) -> None:
        """Makes every live trajectory one that is no longer sampled; those being written are published as usual."""
        with self._lock:
            counters = self._read()
            counters.oldest_seq = counters.next_seq
            counters.live_steps = 0
            self._commit(counters)

    def resume_from(self, *, next_id: int) -> None:
        """Goes on where a checkpoint stopped: no id below ``next_id`` is given out any more."""
        with self._lock:
            counters = self._read()
            counters.next_id = max(counters.next_id, next_id)
            self._commit(counters)

    def count_steps_from(self, steps_written: int) -> None:
        """Sets the count of steps written, for a buffer that is emptied or restored."""
        with self._lock:
            counters = self._read()
            counters.steps_written = steps_written
            self._commit(counters)

    @property
    def next_id(self) -> int:
        """The id that no trajectory has had yet."""
        return self._read().next_id

    # ------------------------------------------------------------------------------- inside the lock: who and where

    def _retire_oldest(self, counters: _Counters) -> int:
        row = self._rows[self._order[counters.oldest_seq % self.num_rows] % self.num_rows]
        length = int(row[LENGTH])
        counters.oldest_seq += 1
        counters.live_steps -= length
        return length

    def _is_published(self, trajectory: int, counters: _Counters) -> bool:
        row = self._rows[trajectory % self.num_rows]
        seq = int(row[SEQ])
        return (
            int(row[ID]) == trajectory
            and 0 <= seq < counters.next_seq
            and int(self._order[seq % self.num_rows]) == trajectory
        )

    def _is_taken(self, candidate: int, counters: _Counters) -> bool:
        """Whether the row that ``candidate`` would get still belongs to a trajectory that is live or being written."""
        row = self._rows[candidate % self.num_rows]
        trajectory = int(row[ID])
        if trajectory < 0 or trajectory >= counters.next_id:  # free, or left by a process killed before it committed
            return False
        if self._is_published(trajectory, counters):
            return int(row[SEQ]) >= counters.oldest_seq
        return True

    def _reclaim_from_the_dead(self, counters: _Counters) -> None:
        now = time.monotonic_ns()
        for slot in np.flatnonzero(self._slots[:, SLOT_ID] >= 0).tolist():
            trajectory, pid, start, since = self._slots[slot].tolist()
            if trajectory >= counters.next_id or self._is_published(trajectory, counters):
                self._slots[slot, SLOT_ID] = -1  # its owner was killed just before, or just after, it committed
            elif now - since > SUSPECT_AFTER and not process_is_alive(pid, start):
                counters.reclaimed += 1
                self._give_back(slot, counters)

    def _give_back(self, slot: int, counters: _Counters) -> None:
        trajectory = int(self._slots[slot, SLOT_ID])
        if not self._is_published(trajectory, counters):
            self._rows[trajectory % self.num_rows, ID] = -1
        self._slots[slot, SLOT_ID] = -1

    def _busy(self, counters: _Counters) -> np.ndarray:
        """Row numbers of all trajectories whose steps must not be touched: live, or being written."""
        live = self._order[np.arange(counters.oldest_seq, counters.next_seq) % self.num_rows]
        writing = self._slots[:, SLOT_ID]
        return np.concatenate([live, writing[writing >= 0]]) % self.num_rows

    def _open_window(self, counters: _Counters, length: int) -> None:
        """Finds the widest gap of at least ``length`` steps; takes head-room, then evicts, where there is none."""
        while True:
            busy = self._busy(counters)
            starts = self._rows[busy, START]
            order = np.argsort(starts, kind="stable")
            starts = starts[order]
            ends = starts + self._rows[busy[order], LENGTH]
            gap_starts = np.concatenate([[0], ends])
            gaps = np.concatenate([starts, [counters.high_water]]) - gap_starts
            widest = int(np.argmax(gaps))
            last_end = int(gap_starts[-1])
            high_water = counters.high_water
            if gaps[widest] >= length:
                window = int(gap_starts[widest])
                window_end = window + int(gaps[widest])
                break
            if self.arena_steps - last_end >= length:
                window = last_end
                wanted = last_end + max(length, self.max_total_steps // 32)
                window_end = high_water = min(self.arena_steps, max(wanted, high_water))
                break
            if counters.oldest_seq == counters.next_seq:
                raise TooManyWritersError(
                    f"No {length:,} free steps in a row: {len(busy)} trajectories in the middle of being written lie "
                    f"in the arena of {self.arena_steps:,} steps. Raise max_writers, or use fewer writer processes."
                )
            evicted = 0
            while evicted < length and counters.oldest_seq < counters.next_seq:
                evicted += self._retire_oldest(counters)
                counters.evicted_early += 1
            self._commit(counters)  # before their rows are taken back: what counts as live must be there
        kept = np.ones(self.num_rows, dtype=bool)
        kept[busy] = False
        ends = self._rows[:, START] + self._rows[:, LENGTH]
        self._rows[kept & (self._rows[:, START] < window_end) & (ends > window), ID] = -1
        counters.window, counters.window_end, counters.high_water = window, window_end, high_water


def _rows_where(held: np.ndarray, ids: np.ndarray, rows: np.ndarray) -> Rows:
    if held.all():
        return Rows(ids, rows[:, START], rows[:, LENGTH])
    return Rows(ids, np.where(held, rows[:, START], 0), np.where(held, rows[:, LENGTH], -1))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_OLDEST_SEQ = COUNTERS.index("oldest_seq")
_NEXT_SEQ = COUNTERS.index("next_seq")
