"""The ledger: a shared table that says which trajectory lies where in the arena.

The arena holds the steps; the ledger holds only numbers about them, in a few ``int64`` arrays in one
:class:`SharedBlock`. It reserves regions of ``[0, arena_steps)`` for writers, records who is writing to which region,
and lists the trajectories that may be read. Many processes write and read it at the same time, and any of them may be
killed at any instruction. This docstring describes the protocol that keeps every read correct; :mod:`.table` describes
the arrays.

**Writers lock, readers do not.** A writer changes the ledger only inside the lock, which it holds for microseconds. It
calls :meth:`Ledger.reserve` before it copies a trajectory to the arena, and :meth:`Ledger.publish` after. The copy
itself needs no lock. The lock is a ``flock``, so the kernel releases it when its holder dies.

**Double-buffered counters, one atomic flip.** The counters are stored twice. The word ``active`` counts the committed
changes, and its lowest bit selects the copy that is valid. A writer prepares a change where no reader looks: in the
other copy, and in rows that no counter refers to yet. Then it increments ``active``, a single store. A process that is
killed before this store has changed nothing, and one that is killed after it has changed everything. So no state ever
needs a repair. A reader loads ``active`` before and after it reads a copy, and reads again if the two values differ.
Otherwise it could read a copy that a writer is preparing, and get the id of a trajectory that is never published. If
that writer is killed, another trajectory gets this id later.

**Rows are seqlocks whose version is the trajectory id.** Ids are assigned in the order of publication and are never
reused. Trajectory ``id`` uses row ``id % num_rows``. The row carries the id from publication until its region, or the
row itself, is reused. The id is cleared *before* the first byte changes. So a reader that finds the id in the row both
before and after its copy has copied this trajectory and nothing else. A reader that does not find it discards its copy.

**Retirement is not reuse.** Eviction only *retires* a trajectory: the counter of the oldest live id moves past it, and
samplers no longer draw it. Its steps stay intact until their space is needed, so that a reader in the middle of a copy
usually finishes it.

**Reservations of dead processes are reclaimed.** A reservation takes one of a fixed number of writer slots, and records
the process id and the start time of its owner. A later :meth:`Ledger.reserve` checks whether the owner is alive, and
reclaims the reservation if it is not. Only the trajectory that was being written is lost.

**Space is bump-allocated from a free gap.** A *free gap* is a run of steps between regions that are in use. Consecutive
reservations take consecutive steps of the current gap. When it is used up, one pass over the rows finds the next gap
that is wide enough, as in a ring. The arena has *head-room* beyond ``max_total_steps`` for what is being written, and
for what no gap is wide enough for. It is taken in pieces of at least 1/32 of ``max_total_steps``, up to
``usual_steps`` and what is being written. Beyond that, as few of the oldest trajectories as possible are evicted before
the write. So in a large arena one gap serves many reservations, and the cost of a reservation does not depend on the
number of trajectories. The *high-water mark* is the end of the part of the arena that is in use; the memory beyond it
stays untouched. A region may have a *margin*: extra steps behind those of its trajectory, which belong to the region as
well. Where a step may have any number of bytes, a region has as many steps as its bytes need: its *room*.

**Pinned and discarded trajectories** leave the ids of the live ones no longer consecutive; see :mod:`.members`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from embodichain_rl.errors import DataTimeoutError, TrajectoryTooLongError
from embodichain_rl.replay.ledger.publishing import LedgerPublishing
from embodichain_rl.replay.ledger.space import Reservation
from embodichain_rl.replay.ledger.words import (
    LENGTH,
    NO_VERSION,
    PID,
    SLOT_LENGTH,
    TICKET,
    Counters,
)
from embodichain_rl.shared import Deadline, own_process, write_barrier

__all__ = ["Ledger", "Reservation"]

READER_PATIENCE = 60.0
"""Seconds that a writer waits for a reader which holds trajectories and reads none."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5e-3, 10e-3
"""Seconds between two looks of such a writer: doubled from the first up to the longest."""


class _Waiting:
    """A writer that waits for readers which hold trajectories."""

    def __init__(self, held: int) -> None:
        self.held, self.deadline, self.seconds = held, Deadline(READER_PATIENCE), FIRST_PAUSE

    def pause(self, held: int) -> None:
        """Sleep for a moment; raise if no reader has read for too long."""
        if held != self.held:
            self.held, self.deadline, self.seconds = held, Deadline(READER_PATIENCE), FIRST_PAUSE
        if self.deadline.passed():
            raise DataTimeoutError(
                f"A recorder has not read trajectory {held:,} for {READER_PATIENCE:.0f} s, and the buffer has no room "
                "for another one meanwhile. Stop the recorder, or find out what stopped its process."
            )
        time.sleep(self.seconds)
        self.seconds = min(2.0 * self.seconds, LONGEST_PAUSE)


class Ledger(LedgerPublishing):
    """The shared table of trajectories; see the module's docstring for the protocol.

    Args:
        max_trajectories: limit of live trajectories; the newest stay live.
        max_total_steps: limit of the steps of all live trajectories.
        arena_steps: size of the arena in steps, with head-room.
        margin: extra steps at the end of every region. The limits and counters do not include them.
        writer_slots: number of trajectories that can be written at the same time.
        max_pinned: share of both limits, 0 to 1, that pinned trajectories may take; see :meth:`pin`.
        usual_steps: size of the part of the arena that is used beside the regions that are being written. Beyond it,
            the oldest trajectories are evicted early. None: the whole arena.
        blocks: where the shared memory comes from; by default nameless memory.

    Example:
        >>> ledger = Ledger(max_trajectories=2, max_total_steps=20, arena_steps=60)
        >>> region = ledger.reserve(7)  # copy 7 steps to [region.start, region.start + 7)
        >>> ledger.publish(region)
        0
        >>> len(ledger), ledger.num_steps
        (1, 7)
    """

    # ------------------------------------------------------------------------------------------------- writers

    def begin(self) -> None:
        """Make all steps below the limit one free gap. Inside the lock (:meth:`frozen`), once, after :meth:`resize`."""
        counters = self._read_counters()
        counters.gap_start, counters.gap_end = 0, self.max_total_steps
        counters.high_water = self.max_total_steps
        self._row_ids[:] = -1
        write_barrier()
        self._commit(counters)

    def reserve(self, length: int, room: int = 0) -> Reservation:
        """Reserve a region for a trajectory of ``length`` steps. The caller must publish it or give it back.

        If no free gap is wide enough, this takes head-room, and then evicts the oldest trajectories. It waits while the
        trajectory would evict one that a reader holds; see :mod:`.holds`.

        Args:
            length: number of steps of the trajectory.
            room: number of steps that the region has at least, margin included, in a ledger whose ``rooms_vary``; at
                most ``usual_steps``.

        Raises:
            TrajectoryTooLongError: if ``length`` exceeds ``max_total_steps``.
            OwnerGoneError: if the ledger was closed.
            PinLimitError: if the pinned trajectories leave no room for ``length`` steps.
            DataTimeoutError: if a reader has held the trajectories for a minute without reading.
            TooManyWritersError: if no slot or no space is left, because too many trajectories are being written.
            LedgerLockTimeoutError: if a stopped process holds the lock.
        """
        if length > self.max_total_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of {length:,} steps, but max_total_steps={self.max_total_steps:,}. Raise "
                "max_total_steps, or end episodes earlier (max_episode_steps, max_frames_per_traj)."
            )
        return self._unheld(
            length, room, lambda counters: self._reserve(counters, length, max(room, length + self.margin))
        )

    def _unheld(self, length: int, room: int, then: Callable[[Counters], Reservation]) -> Reservation:
        """Wait until no reader holds what ``length`` more steps would evict; return ``then(counters)``, in the lock."""
        waiting: _Waiting | None = None
        while True:
            with self._lock:
                self.check_open()
                self._end_change()
                counters = self._read_counters()
                self._check_room(length, counters)
                self._reclaim_dead_writers(counters)
                held = self._held_from(counters, length, room) if self.holds.any else None
                if held is None:
                    return then(counters)
            waiting = waiting or _Waiting(held)
            waiting.pause(held)

    def end_pieces(self, reservation: Reservation, length: int) -> Reservation:
        """Give the steps of a region beyond ``length`` back, now that its trajectory is whole, before it is published.

        It waits as :meth:`reserve` does, and raises the same errors.

        Args:
            reservation: what :meth:`reserve_pieces` or :meth:`grow` returned.
            length: number of steps of the trajectory.
        """
        return self._unheld(length, 0, lambda counters: self._end_pieces(counters, reservation, length))

    def _reserve(self, counters: Counters, length: int, room: int) -> Reservation:
        self._check_capacity(counters)
        free_slot = self._free_slot(counters)
        if counters.gap_end - counters.gap_start < room:
            self._open_gap(counters, room, length)
        reservation = Reservation(counters.next_ticket, counters.gap_start, length, free_slot, room)
        slot = self._slots[reservation.slot]
        slot[PID:] = (*own_process(), time.monotonic_ns(), reservation.start, length, -1)
        self._slot_rooms[reservation.slot] = room
        slot[TICKET] = reservation.ticket
        counters.gap_start += room
        counters.next_ticket += 1
        self._commit(counters)
        return reservation

    def _held_from(self, counters: Counters, length: int, room: int) -> int | None:
        """Return the first trajectory that is held, if publishing ``length`` more steps would evict it; else None."""
        first = self.holds.first_held()
        if first is None or self._have_room(counters, length, room, first):
            return None
        first = self.holds.first_held(look=True)
        return None if first is None or self._have_room(counters, length, room, first) else first

    def _have_room(self, counters: Counters, length: int, room: int, first: int) -> bool:
        """Return whether a trajectory fits beside the reserved regions, the pinned trajectories, and those held."""
        writing = self._being_written()
        reserved = self._slots[writing, SLOT_LENGTH]
        ids = self._live_of(counters).all()
        stay = ids[(ids >= first) | np.isin(ids, self._lists_of(counters).pinned)]
        trajectories = len(stay) + len(reserved)
        steps = int(self._rows[stay % self.num_rows, LENGTH].sum() + reserved.sum())
        fits = trajectories < self.max_trajectories and steps + length <= self.max_total_steps
        if self.rooms_vary:
            taken = self._rooms_of(stay % self.num_rows).sum() + self._slot_rooms[writing].sum()
            fits &= int(taken) + room <= self.usual_steps
        return fits or trajectories == 0

    def check_room(self, length: int) -> None:
        """Refuse a trajectory of ``length`` steps if the pinned ones leave no room for it.

        Raises:
            PinLimitError: if they don't.
        """
        self._check_room(length, self._read_counters())

    def publish(
        self,
        reservation: Reservation,
        longest_segment: int | None = None,
        *,
        policy_version: int = NO_VERSION,
        fill: Callable[[int], None] | None = None,
    ) -> int:
        """Make the trajectory in a reserved region live, retire the oldest beyond the limits, and return the new id.

        Args:
            reservation: the region that the trajectory was copied to.
            longest_segment: length of its longest segment, in steps; None if it has no segments.
            policy_version: number of updates of the policy that chose its last action; ``NO_VERSION`` if unknown.
            fill: function that writes data which is stored per row outside the ledger. It gets the row number. The row
                has no id during the call, so a reader's check of the id covers this data too.

        Raises:
            SharingError: if another process has reclaimed the reservation.
            LedgerLockTimeoutError: if a stopped process holds the lock.
        """
        with self._lock:
            slot = self._slot_of(reservation)
            trajectory = self._publish_at(
                self._read_counters(), slot, reservation, longest_segment, policy_version=policy_version, fill=fill
            )
            slot[TICKET] = -1
        return trajectory

    def give_back(self, reservation: Reservation) -> None:
        """Cancel a reservation without publishing. Does nothing if the reservation has already ended."""
        with self._lock:
            slot = self._slots[reservation.slot]
            if slot[TICKET] == reservation.ticket:
                slot[TICKET] = -1

    def count_steps_from(self, steps_written: int) -> None:
        """Set the counter of steps written, for a buffer that is emptied or restored."""
        with self._lock:
            counters = self._read_counters()
            counters.steps_written = steps_written
            self._commit(counters)

    def prioritize(self, ids: np.ndarray | None = None, weights: np.ndarray | None = None) -> None:
        """Set the weights of the trajectories ``ids``. The first call gives all other live trajectories weight 1.

        Evicted trajectories are ignored.

        Args:
            ids: ``int64`` ``[n]``, without duplicates. With None, no existing weight changes.
            weights: ``float64`` ``[n]``, positive.
        """
        with self._lock:
            counters = self._read_counters()
            if not self.priorities.built:
                self.priorities.build(self._live_of(counters).all() % self.num_rows)
            if ids is not None and weights is not None:
                live = self._live_of(counters).contains(ids)
                self.priorities.set(ids[live] % self.num_rows, weights[live])

    def live_weights(self, ids: np.ndarray) -> np.ndarray | None:
        """Return the weights by priority of trajectories that were just live, ``float64``; None without priorities.

        Trajectories that were evicted meanwhile get the largest weight of the others.
        """
        if not self.priorities.built:
            return None
        weights = self.weights_of(ids)
        known = self.live().contains(ids) & (weights > 0.0)
        return np.where(known, weights, weights[known].max(initial=0.0) or 1.0)

    @property
    def next_id(self) -> int:
        """Id of the next trajectory that is published."""
        return self._read_counters().next_id
