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

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from embodichain_rl.errors import SharingError, TooManyWritersError, TrajectoryTooLongError
from embodichain_rl.replay.ledger.table import (
    ID,
    LENGTH,
    LONGEST_SEGMENT,
    PID,
    POLICY_VERSION,
    PUBLISHED_AS,
    SLOT_LENGTH,
    SLOT_START,
    START,
    STEPS_BEFORE,
    TICKET,
    Counters,
    LedgerTable,
)
from embodichain_rl.shared import keep_order, own_process, process_is_alive

__all__ = ["Ledger", "Reservation"]

SUSPECT_AFTER = 50_000_000
"""Nanoseconds that a reservation may take before the next writer asks whether its owner still lives; less where room is
short."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A region of the arena that one writer fills: steps ``[start, start + length)``, and the margin behind them."""

    ticket: int
    start: int
    length: int
    slot: int


class Ledger(LedgerTable):
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
            self._refuse_if_full(counters)
            free = self._free_slot(counters)
            if counters.window_end - counters.window < length + self.margin:
                self._open_window(counters, length + self.margin)
            reservation = Reservation(counters.next_ticket, counters.window, length, free)
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

    def _commit_empty(self, counters: Counters) -> None:
        counters.live_steps = 0
        counters.times_emptied += 1
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

    def _retire_oldest(self, counters: Counters) -> int:
        length = int(self._rows[counters.oldest_id % self.num_rows, LENGTH])
        counters.oldest_id += 1
        counters.live_steps -= length
        return length

    def _free_slot(self, counters: Counters) -> int:
        tickets = self._slots[:, TICKET]
        free = int(tickets.argmin())
        if tickets[free] < 0:
            return free
        if self._reclaim_from_the_dead(counters, suspect_after=0):
            return int(tickets.argmin())
        raise TooManyWritersError(
            f"{len(self._slots)} trajectories are in the middle of being written, as many as the ledger has slots for. "
            "Use fewer writer processes."
        )

    def _reclaim_from_the_dead(self, counters: Counters, *, suspect_after: int = SUSPECT_AFTER) -> bool:
        """Takes back the reservations of the dead; says whether there were any."""
        now, reclaimed = time.monotonic_ns(), False
        for number in (self._slots[:, TICKET] >= 0).nonzero()[0].tolist():
            ticket, pid, process_start, since, start, _, published_as = self._slots[number].tolist()
            if ticket >= counters.next_ticket:
                gone = True  # killed before the reservation was committed
            elif published_as >= 0:
                gone = True  # killed inside publish: only the lock's holder sets the word, and this is not it
                row = self._rows[published_as % self.num_rows]
                committed = published_as < counters.next_id and row[ID] == published_as and row[START] == start
                counters.reclaimed += not committed
            else:
                gone = now - since > suspect_after and not process_is_alive(pid, process_start)
                counters.reclaimed += gone
            if gone:
                self._slots[number, TICKET] = -1
                reclaimed = True
        return reclaimed

    def _busy(self, counters: Counters) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of all regions whose steps must not be touched, live or being written, in order."""
        first, end = counters.oldest_id % self.num_rows, counters.next_id % self.num_rows
        rows = self._rows  # more than there are live trajectories: the two are the same only where there is none
        live = rows[first:end] if first <= end else np.concatenate([rows[first:], rows[:end]])
        writing = self._slots[self._slots[:, TICKET] >= 0]
        starts = np.concatenate([live[:, START], writing[:, SLOT_START]])
        lengths = np.concatenate([live[:, LENGTH], writing[:, SLOT_LENGTH]])
        order = starts.argsort(kind="stable")
        starts = starts[order]
        return starts, starts + lengths[order] + self.margin

    def _open_window(self, counters: Counters, length: int) -> None:
        """Finds the widest gap for a region of ``length`` steps; takes head-room, then evicts, where there is none."""
        while True:
            starts, ends = self._busy(counters)
            high_water = counters.high_water
            gaps = np.concatenate([starts, [high_water]])
            gaps[1:] -= ends
            widest = int(gaps.argmax())
            last_end = int(ends[-1]) if len(ends) else 0
            if gaps[widest] >= length:
                window = int(ends[widest - 1]) if widest else 0
                window_end = window + int(gaps[widest])
                break
            if self.arena_steps - last_end >= length:
                window = last_end
                wanted = last_end + max(length, self.max_total_steps // 32)
                window_end = high_water = min(self.arena_steps, max(wanted, high_water))
                break
            if self._reclaim_from_the_dead(counters, suspect_after=0):  # rather than to evict, or to give up
                continue
            self._make_room(counters, length, len(starts))
        # No live trajectory lies in a gap: these rows are of retired ones.
        starts = self._rows[:, START]
        inside = starts + self._rows[:, LENGTH] > window - self.margin
        inside &= starts < window_end
        self._row_ids[inside] = -1
        keep_order()
        counters.window, counters.window_end, counters.high_water = window, window_end, high_water

    # ------------------------------------------------------------- inside the lock: what another ledger does otherwise

    def _refuse_if_full(self, counters: Counters) -> None:
        """Raises where one more would be too many; here publishing makes room for it."""

    def _make_room(self, counters: Counters, length: int, busy: int) -> None:
        """Evicts the oldest, at least ``length`` steps of them; ``busy`` regions are in use."""
        if counters.oldest_id == counters.next_id:
            raise TooManyWritersError(
                f"No {length:,} free steps in a row: {busy} trajectories in the middle of being written lie "
                f"in the arena of {self.arena_steps:,} steps. Raise max_writers, or use fewer writer processes."
            )
        evicted, oldest = 0, counters.oldest_id
        while evicted < length and counters.oldest_id < counters.next_id:
            evicted += self._retire_oldest(counters) + self.margin
            counters.evicted_early += 1
        self._commit(counters)  # before their rows are taken back: what counts as live must be there
        if self.priorities.built:
            self.priorities.remove(np.arange(oldest, counters.oldest_id) % self.num_rows)
