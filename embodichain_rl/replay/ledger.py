"""The shared table that says which trajectory lies where in the arena.

The ledger knows numbers only: it hands out regions of ``[0, arena_steps)``, remembers who is writing into which, and
lists the trajectories that may be read. It is a handful of ``int64`` arrays in one :class:`SharedBlock`.

**Who may do what.** Writers change the ledger inside the lock, for microseconds: :meth:`Ledger.reserve` before they
copy a trajectory into its region, :meth:`Ledger.publish` after. Readers never lock.

**Every change is one store.** The counters stand in two copies, and the word ``active``, which counts the changes, says
by its lowest bit which copy holds. A change is prepared where nobody looks (the other copy, a row that no counter
refers to) and takes effect when ``active`` goes on by one. A process that is killed before has changed nothing, one
killed after it has changed everything: there is no state to repair. A reader whose ``active`` has gone on while it read
a copy reads again: that copy may be in preparation by now, and may have the id of a trajectory that is never published,
and is another's later, because its writer is killed.

**How a reader knows that what it read was whole.** A trajectory's id is its place in the order of publication, and is
never used again. Its row (``id % rows``) carries that id from its publication until its region, or its row, is given to
another. The word is taken back *before* the first byte changes. So whoever finds the id in the row before a copy and
after it has copied that trajectory and nothing else (a sequence lock whose version is the id). A trajectory that is
retired while it is read stays whole until its room is needed.

**Room.** Free steps are handed out from a *window*, a gap between trajectories. When the window is used up, the next
one is looked up from the rows at hand: a pass over the rows once per window, and a window is at least 1/32 of a large
arena, so that the cost per trajectory does not depend on how many there are. The arena has head-room beyond
``max_total_steps`` for the trajectories being written, and nothing touches that memory before it is needed. A region
may have a *margin*, steps behind those of its trajectory that are its own as well.
"""

from __future__ import annotations

import bisect
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embodichain_rl.errors import SharingError, TooManyWritersError, TrajectoryTooLongError
from embodichain_rl.replay.memory_check import check_memory
from embodichain_rl.replay.memory_order import keep_order, take_part_in_order
from embodichain_rl.replay.priorities import PriorityTree, tree_words
from embodichain_rl.replay.processes import own_process, process_is_alive
from embodichain_rl.replay.shared_memory import ALIGNMENT, CrossProcessLock, SharedBlock

__all__ = ["GONE", "Ledger", "Reservation", "Rows"]

WRITER_SLOTS = 256
"""How many trajectories may be in the middle of being written at the same moment."""

SUSPECT_AFTER = 50_000_000
"""Nanoseconds that a reservation may take before the next writer asks whether its owner still lives."""

# Columns of a row. A row belongs to trajectory ``id`` as long as its first word is ``id``.
ID, START, LENGTH, LONGEST_SEGMENT, STEPS_BEFORE, POLICY_VERSION = range(6)

# Columns of a writer's slot. It is in use as long as its first word is not -1; PUBLISHED_AS is the id that the writer
# was about to publish its trajectory as, -1 before.
TICKET, PID, PROCESS_START, SINCE, SLOT_START, SLOT_LENGTH, PUBLISHED_AS = range(7)


@dataclass(slots=True)
class _Counters:
    """The words that change together, with the flip of ``active``."""

    next_ticket: int
    """The number of the next reservation."""
    next_id: int
    """The id of the next trajectory that is published."""
    oldest_id: int
    """The id of the oldest live trajectory: those from here to ``next_id`` are live."""
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
    steps_published: int
    """Steps ever published, where a trajectory's ``STEPS_BEFORE`` counts on."""
    newest_version: int
    """The highest policy version of any trajectory."""
    evicted_early: int
    """Trajectories evicted because the head-room did not suffice, before a limit asked for it."""
    reclaimed: int
    """Reservations taken back from processes that died while writing."""


COUNTERS = tuple(_Counters.__dataclass_fields__)


@dataclass(frozen=True, slots=True)
class Reservation:
    """A region of the arena that one writer fills: steps ``[start, start + length)``, and the margin behind them."""

    ticket: int
    start: int
    length: int
    slot: int


class Rows(NamedTuple):
    """What the ledger says of some trajectories: ``int64`` arrays of the same length."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    """Steps; ``GONE`` where the trajectory is no longer there."""
    longest_segments: np.ndarray
    """Steps of the longest segment; those of the trajectory where there are no segments."""
    policy_versions: np.ndarray
    """How often the policy had been updated that made the last step; 0 where nobody said."""

    def select(self, which: np.ndarray) -> Rows:
        """Returns the rows at ``which``, an index or a mask."""
        return Rows(*(column[which] for column in self))

    def replace(self, at: np.ndarray, new: Rows) -> Rows:
        """Returns the rows with those ``at`` some places replaced by ``new`` ones."""
        columns = [column.copy() for column in self]
        for column, values in zip(columns, new, strict=True):
            column[at] = values
        return Rows(*columns)


GONE = -(2**40)
"""The length of a trajectory that is no longer there: too short for everything."""


class Ledger:
    """The shared table of trajectories; see the module's docstring for the protocol.

    Args:
        max_trajectories: at most so many trajectories are live, the newest.
        max_total_steps: at most so many steps are live.
        arena_steps: the size of the arena, head-room included.
        margin: steps of every region behind those of its trajectory. Limits and counts are of trajectories' steps.
        writer_slots: how many trajectories may be in the middle of being written at the same moment.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> region = ledger.reserve(7)  # copy 7 steps to [region.start, region.start + 7)
        >>> ledger.publish(region)
        0
        >>> len(ledger), ledger.num_steps
        (1, 7)
    """

    def __init__(
        self,
        max_trajectories: int,
        max_total_steps: int,
        arena_steps: int,
        *,
        margin: int = 0,
        writer_slots: int = WRITER_SLOTS,
    ) -> None:
        self.max_trajectories = max_trajectories
        self.max_total_steps = max_total_steps
        self.arena_steps = arena_steps
        self.margin = margin
        # More rows than can be live, so that a retired trajectory that is being read keeps its row for a while.
        self.num_rows = max_trajectories + 2 * writer_slots
        self._shapes: dict[str, tuple[int, ...]] = {
            "_active": (1,),
            "_holder": (1,),
            "_counters": (2, len(COUNTERS)),
            "_slots": (writer_slots, 7),
            "_rows": (self.num_rows, 6),
            "_published_at": (self.num_rows,),
            "_priorities": (tree_words(self.num_rows),),
        }
        nbytes = sum(_aligned(8 * math.prod(shape)) for shape in self._shapes.values())
        check_memory(nbytes, f"The ledger of {max_trajectories:,} trajectories", "Lower max_trajectories.")
        self._block = SharedBlock(nbytes)
        self._map()
        self._slots[:, TICKET] = -1
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
        self._row_ids = self._rows[:, ID]  # to be indexed: take() copies all of a column first
        self.priorities = PriorityTree(self._priorities.view(np.float64))
        self._lock = CrossProcessLock(self._block, self._holder)
        take_part_in_order()

    _active: np.ndarray
    _holder: np.ndarray
    _counters: np.ndarray
    _slots: np.ndarray
    _rows: np.ndarray
    _published_at: np.ndarray
    _priorities: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        made_anew = {"_lock", "_row_ids", "priorities", *self._shapes}
        return {name: value for name, value in self.__dict__.items() if name not in made_anew}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    # ------------------------------------------------------------------------------------------------ counters

    def _read(self) -> _Counters:
        while True:
            active = self._active[0]
            counters = self._counters[active & 1].tolist()
            if self._active[0] == active:
                return _Counters(*counters)

    def _commit(self, counters: _Counters) -> None:
        following = self._active[0] + 1
        keep_order()  # whoever sees the copy change sees that it holds no more
        self._counters[following & 1] = [getattr(counters, name) for name in COUNTERS]
        keep_order()
        self._active[0] = following

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
            "trajectories": counters.next_id - counters.oldest_id,
            "steps": counters.live_steps,
            "published": counters.next_id,
            "evicted": counters.oldest_id,
            "evicted_early": counters.evicted_early,
            "reclaimed": counters.reclaimed,
            "writing": int(np.count_nonzero(self._slots[:, TICKET] >= 0)),
        }

    # ------------------------------------------------------------------------------------------------- readers

    def live_range(self) -> tuple[int, int]:
        """Returns ``(oldest, end)``: the ids of what is live are those from ``oldest`` to ``end - 1``."""
        while True:
            active = self._active[0]
            counters = self._counters[active & 1]
            oldest, end = counters[_OLDEST_ID], counters[_NEXT_ID]
            if self._active[0] == active:
                return int(oldest), int(end)

    def rows_of(self, ids: np.ndarray) -> Rows:
        """Returns the rows of the trajectories ``ids``; one that is no longer there has the length ``GONE``.

        A row that is returned is whole: its id was there before, as it was published, and after it was read.

        Args:
            ids: ``int64`` ``[n]``, of trajectories that were published.
        """
        at = ids % self.num_rows
        rows = self._rows.take(at, axis=0)
        held = self._row_ids[at] == ids
        starts, lengths = rows[:, START], rows[:, LENGTH]
        if np.count_nonzero(held) < len(held):
            starts, lengths = np.where(held, starts, 0), np.where(held, lengths, GONE)
        return Rows(ids, starts, lengths, rows[:, LONGEST_SEGMENT], rows[:, POLICY_VERSION])

    def published(self, ids: np.ndarray) -> np.ndarray:
        """Says of any numbers which of them are ids of trajectories that were published."""
        return (ids >= 0) & (ids < self.live_range()[1])

    def still_valid(self, ids: np.ndarray) -> np.ndarray:
        """Says of each trajectory whether all that was read of it since its row was read is whole."""
        return self._row_ids[ids % self.num_rows] == ids

    def live_rows(self) -> Rows:
        """Returns the rows of all live trajectories, oldest first: a pass over the ledger."""
        return self.rows_between(*self.live_range())

    def rows_between(self, first: int, end: int) -> Rows:
        """Returns the rows of those trajectories from ``first`` to ``end - 1`` that are there, oldest first."""
        rows = self.rows_of(np.arange(first, end))
        there = rows.lengths >= 0
        return rows if there.all() else rows.select(there)

    def published_at(self, ids: np.ndarray) -> np.ndarray:
        """Returns when the trajectories were published, in nanoseconds of ``time.monotonic_ns``."""
        return self._published_at[ids % self.num_rows]

    def first_since(self, moment: int, oldest: int, end: int) -> int:
        """Returns the first of the ids ``oldest`` to ``end - 1`` that was published at ``moment`` or later, or ``end``.

        Args:
            moment: nanoseconds of ``time.monotonic_ns``.
            oldest: the first id to look at.
            end: the id behind the last one.
        """
        times, rows = self._published_at, self.num_rows
        return oldest + bisect.bisect_left(range(oldest, end), moment, key=lambda number: int(times[number % rows]))

    def steps_before(self, ids: np.ndarray) -> np.ndarray:
        """Returns how many steps had been published before each of the trajectories ``ids``."""
        return self._rows[ids % self.num_rows, STEPS_BEFORE]

    @property
    def newest_policy_version(self) -> int:
        """The highest policy version that any trajectory was made with."""
        return self._read().newest_version

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """Returns the ids of the trajectories that have the rows of those numbers; -1 where there is none."""
        return self._row_ids[rows]

    def weights_of(self, ids: np.ndarray) -> np.ndarray:
        """Returns the weights by priority of the trajectories ``ids``, ``float64``; see :meth:`prioritize`."""
        return self.priorities.weights(ids % self.num_rows)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Keeps every live trajectory where it is, for a reader that must have all of them: writers wait meanwhile."""
        with self._lock:
            yield

    # ------------------------------------------------------------------------------------------------- writers

    def reserve(self, length: int) -> Reservation:
        """Hands out a region for a trajectory of ``length`` steps, to be published or given back.

        Raises:
            TrajectoryTooLongError: when ``length`` exceeds ``max_total_steps``.
            TooManyWritersError: when too many trajectories are in the middle of being written.
            LedgerLockTimeoutError: when a stopped process holds the lock.
        """
        if length > self.max_total_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of {length:,} steps, but max_total_steps={self.max_total_steps:,}. Raise "
                "max_total_steps, or end episodes earlier (max_episode_steps, max_frames_per_traj)."
            )
        with self._lock:
            counters = self._read()
            self._reclaim_from_the_dead(counters)
            free = np.flatnonzero(self._slots[:, TICKET] < 0)
            if not len(free):
                raise TooManyWritersError(
                    f"{len(self._slots)} trajectories are in the middle of being written, as many as the ledger has "
                    "slots for. Use fewer writer processes."
                )
            if counters.window_end - counters.window < length + self.margin:
                self._open_window(counters, length + self.margin)
            reservation = Reservation(counters.next_ticket, counters.window, length, int(free[0]))
            slot = self._slots[reservation.slot]
            slot[PID:] = (*own_process(), time.monotonic_ns(), reservation.start, length, -1)
            slot[TICKET] = reservation.ticket
            counters.window += length + self.margin
            counters.next_ticket += 1
            self._commit(counters)
        return reservation

    def publish(
        self,
        reservation: Reservation,
        longest_segment: int | None = None,
        *,
        policy_version: int = 0,
        fill: Callable[[int], None] | None = None,
    ) -> int:
        """Makes the trajectory that was copied to the region live; returns its id.

        Args:
            reservation: the region.
            longest_segment: steps of the trajectory's longest segment; None where it has no segments.
            policy_version: how often the policy had been updated that made its last step.
            fill: writes to what others keep of each row, given the row's number. No id stands in the row meanwhile, so
                what a reader copies from there is as whole as the row.
        """
        with self._lock:
            slot = self._slots[reservation.slot]
            if slot[TICKET] != reservation.ticket:
                raise SharingError(
                    f"The region of reservation {reservation.ticket} was taken back while it was being written: its "
                    f"owner, process {os.getpid()}, was taken for dead. All processes that share a buffer must see "
                    "each other's process ids (one container, one pid namespace)."
                )
            counters = self._read()
            trajectory = counters.next_id
            slot[PUBLISHED_AS] = trajectory
            row = self._rows[trajectory % self.num_rows]
            row[ID] = -1
            keep_order()
            if fill is not None:
                fill(trajectory % self.num_rows)
            row[START], row[LENGTH] = reservation.start, reservation.length
            row[LONGEST_SEGMENT] = reservation.length if longest_segment is None else longest_segment
            row[STEPS_BEFORE], row[POLICY_VERSION] = counters.steps_published, policy_version
            keep_order()
            row[ID] = trajectory
            self._published_at[trajectory % self.num_rows] = time.monotonic_ns()
            counters.next_id += 1
            counters.live_steps += reservation.length
            counters.steps_written += reservation.length
            counters.steps_published += reservation.length
            counters.newest_version = max(counters.newest_version, policy_version)
            oldest = counters.oldest_id
            if self.priorities.built:  # before it can be drawn
                self.priorities.add(trajectory % self.num_rows)
            while (
                counters.next_id - counters.oldest_id > self.max_trajectories
                or counters.live_steps > self.max_total_steps
            ):
                self._retire_oldest(counters)
            self._commit(counters)
            if self.priorities.built:  # after they can be drawn no more
                self.priorities.remove(np.arange(oldest, counters.oldest_id) % self.num_rows)
            slot[TICKET] = -1
        return trajectory

    def give_back(self, reservation: Reservation) -> None:
        """Ends a reservation without publishing anything."""
        with self._lock:
            slot = self._slots[reservation.slot]
            if slot[TICKET] == reservation.ticket:
                slot[TICKET] = -1

    def retire_all(self) -> None:
        """Makes every live trajectory one that is no longer sampled; those being written are published as usual."""
        with self._lock:
            counters = self._read()
            counters.oldest_id = counters.next_id
            self._commit_empty(counters)

    def resume_from(self, *, next_id: int) -> None:
        """Empties the ledger and goes on where a checkpoint stopped: no id below ``next_id`` is given out any more."""
        with self._lock:
            counters = self._read()
            counters.oldest_id = counters.next_id = max(counters.next_id, next_id)
            self._commit_empty(counters)

    def _commit_empty(self, counters: _Counters) -> None:
        counters.live_steps = 0
        self._commit(counters)
        if self.priorities.built:
            self.priorities.build(np.empty(0, dtype=np.int64))

    def count_steps_from(self, steps_written: int) -> None:
        """Sets the count of steps written, for a buffer that is emptied or restored."""
        with self._lock:
            counters = self._read()
            counters.steps_written = steps_written
            self._commit(counters)

    def prioritize(self, ids: np.ndarray | None = None, weights: np.ndarray | None = None) -> None:
        """Gives every live trajectory a weight of 1, from now on, and those of ``ids`` another one.

        Trajectories that are gone meanwhile are left out.

        Args:
            ids: ``int64`` ``[n]``, none of them twice; None changes no weight that there is.
            weights: ``float64`` ``[n]``, positive.
        """
        with self._lock:
            counters = self._read()
            if not self.priorities.built:
                self.priorities.build(np.arange(counters.oldest_id, counters.next_id) % self.num_rows)
            if ids is not None and weights is not None:
                live = (ids >= counters.oldest_id) & (ids < counters.next_id)
                self.priorities.set(ids[live] % self.num_rows, weights[live])

    @property
    def next_id(self) -> int:
        """The id that no trajectory has had yet."""
        return self._read().next_id

    # ------------------------------------------------------------------------------- inside the lock: who and where

    def _retire_oldest(self, counters: _Counters) -> int:
        length = int(self._rows[counters.oldest_id % self.num_rows, LENGTH])
        counters.oldest_id += 1
        counters.live_steps -= length
        return length

    def _reclaim_from_the_dead(self, counters: _Counters) -> None:
        now = time.monotonic_ns()
        for number in np.flatnonzero(self._slots[:, TICKET] >= 0).tolist():
            ticket, pid, process_start, since, start, _, published_as = self._slots[number].tolist()
            if ticket >= counters.next_ticket:
                gone = True  # killed before the reservation was committed
            elif published_as >= 0:
                gone = True  # killed inside publish: only the lock's holder sets the word, and this is not it
                row = self._rows[published_as % self.num_rows]
                committed = published_as < counters.next_id and row[ID] == published_as and row[START] == start
                counters.reclaimed += not committed
            else:
                gone = now - since > SUSPECT_AFTER and not process_is_alive(pid, process_start)
                counters.reclaimed += gone
            if gone:
                self._slots[number, TICKET] = -1

    def _busy(self, counters: _Counters) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of all regions whose steps must not be touched, live or being written, in order."""
        live = self._rows.take(np.arange(counters.oldest_id, counters.next_id) % self.num_rows, axis=0)
        writing = self._slots[self._slots[:, TICKET] >= 0]
        starts = np.concatenate([live[:, START], writing[:, SLOT_START]])
        lengths = np.concatenate([live[:, LENGTH], writing[:, SLOT_LENGTH]])
        order = np.argsort(starts, kind="stable")
        return starts[order], (starts + lengths + self.margin)[order]

    def _open_window(self, counters: _Counters, length: int) -> None:
        """Finds the widest gap for a region of ``length`` steps; takes head-room, then evicts, where there is none."""
        while True:
            starts, ends = self._busy(counters)
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
            if counters.oldest_id == counters.next_id:
                raise TooManyWritersError(
                    f"No {length:,} free steps in a row: {len(starts)} trajectories in the middle of being written lie "
                    f"in the arena of {self.arena_steps:,} steps. Raise max_writers, or use fewer writer processes."
                )
            evicted, oldest = 0, counters.oldest_id
            while evicted < length and counters.oldest_id < counters.next_id:
                evicted += self._retire_oldest(counters) + self.margin
                counters.evicted_early += 1
            self._commit(counters)  # before their rows are taken back: what counts as live must be there
            if self.priorities.built:
                self.priorities.remove(np.arange(oldest, counters.oldest_id) % self.num_rows)
        # No live trajectory lies in a gap: these rows are of retired ones.
        ends = self._rows[:, START] + self._rows[:, LENGTH] + self.margin
        self._row_ids[(self._rows[:, START] < window_end) & (ends > window)] = -1
        keep_order()
        counters.window, counters.window_end, counters.high_water = window, window_end, high_water


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_OLDEST_ID = COUNTERS.index("oldest_id")
_NEXT_ID = COUNTERS.index("next_id")
