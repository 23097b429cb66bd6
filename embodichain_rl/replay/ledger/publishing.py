"""How trajectories become live: what is done inside the lock to publish one, or several in one region.

``ledger.py`` explains the protocol.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from embodichain_rl.replay.ledger.pieces import LedgerPieces
from embodichain_rl.replay.ledger.space import Reservation
from embodichain_rl.replay.ledger.words import (
    CHANGES,
    ID,
    LENGTH,
    LONGEST_SEGMENT,
    NO_VERSION,
    POLICY_VERSION,
    PUBLISHED_AS,
    PUBLISHED_AT,
    START,
    STEPS_BEFORE,
    TICKET,
    Counters,
)
from embodichain_rl.shared import write_barrier

__all__ = ["LedgerPublishing"]


class LedgerPublishing(LedgerPieces):
    """A ledger that publishes trajectories; see :class:`Ledger`."""

    def publish_together(
        self,
        reservation: Reservation,
        starts: np.ndarray,
        lengths: np.ndarray,
        longest_segments: np.ndarray,
        *,
        policy_versions: np.ndarray,
        fill: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Make several trajectories live that were copied to one region; return their ids, ``int64`` ``[n]``.

        Whatever their number, this takes two changes of the ledger: one retires the oldest trajectories beyond the
        limits, and one adds the new ones. So ``n`` should be a small part of ``max_trajectories``.

        Args:
            reservation: the region. Steps of it that none of them needs become free.
            starts: first step of each, ``int64`` ``[n]``. Each has the ledger's margin behind it.
            lengths: numbers of steps, ``int64`` ``[n]``.
            longest_segments: lengths of the longest segments, ``int64`` ``[n]``; those of the trajectories if there are
                no segments.
            policy_versions: likewise.
            fill: as there; it gets the row, and the number of the trajectory among these.

        Raises:
            SharingError: if another process has reclaimed the reservation.
            LedgerLockTimeoutError: if a stopped process holds the lock.
        """
        with self._lock:
            slot = self._slot_of(reservation)
            counters = self._read_counters()
            if len(lengths) == 1 or counters.lists or self.priorities.built or self.rooms_vary:
                numbers = []
                for k in range(len(lengths)):
                    length, version = int(lengths[k]), int(policy_versions[k])
                    part = Reservation(
                        reservation.ticket, int(starts[k]), length, reservation.slot, length + self.margin
                    )
                    of_row = None if fill is None else _of(fill, k)
                    numbers.append(
                        self._publish_at(
                            counters, slot, part, int(longest_segments[k]), policy_version=version, fill=of_row
                        )
                    )
                    counters = self._read_counters()
                ids = np.array(numbers)
            else:
                ids = self._publish_range(counters, slot, starts, lengths, longest_segments, policy_versions, fill)
            slot[TICKET] = -1
        return ids

    # -------------------------------------------------------------------------------------------------- inside the lock

    def _publish_at(
        self,
        counters: Counters,
        slot: np.ndarray,
        reservation: Reservation,
        longest_segment: int | None,
        *,
        policy_version: int,
        fill: Callable[[int], None] | None,
    ) -> int:
        """Publish one trajectory; see :meth:`Ledger.publish`."""
        before = self._live_of(counters) if self.priorities.built else None
        trajectory = self._next_id(counters)
        if self.name_no_more is not None and self._names(self._row_ids[trajectory % self.num_rows]):
            self.name_no_more(counters.oldest_id, self._lists_of(counters))
        slot[PUBLISHED_AS] = trajectory
        row = self._rows[trajectory % self.num_rows]
        row[ID] = -1
        write_barrier()
        if fill is not None:
            fill(trajectory % self.num_rows)
        row[START], row[LENGTH] = reservation.start, reservation.length
        if self.rooms_vary:
            self._rooms[trajectory % self.num_rows] = reservation.room
        row[LONGEST_SEGMENT] = reservation.length if longest_segment is None else longest_segment
        row[STEPS_BEFORE], row[POLICY_VERSION] = counters.steps_published, policy_version
        row[PUBLISHED_AT], row[CHANGES] = time.monotonic_ns(), 0
        write_barrier()
        row[ID] = trajectory
        counters.next_id += 1
        counters.live += 1
        counters.live_steps += reservation.length
        counters.steps_written += reservation.length
        counters.steps_published += reservation.length
        while (counters.live > self.max_trajectories or counters.live_steps > self.max_total_steps) and self._can_evict(
            counters
        ):
            self._retire_oldest(counters)
        if policy_version >= counters.newest_version:
            counters.newest_version, counters.newest_version_id = policy_version, trajectory
        self._renew_newest_version(counters)
        if before is not None:  # before it can be drawn
            kept = self._live_of(counters).kept % self.num_rows
            self.priorities.add(
                trajectory % self.num_rows, counters.oldest_id % self.num_rows, trajectory % self.num_rows, kept
            )
        self._commit(counters)
        if before is not None:  # after the commit, when they can no longer be drawn
            self.priorities.remove(self._retired_rows(before, counters))
        return trajectory

    def _publish_range(
        self,
        counters: Counters,
        slot: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        longest_segments: np.ndarray,
        policy_versions: np.ndarray,
        fill: Callable[[int, int], None] | None,
    ) -> np.ndarray:
        """Publish several trajectories where the live ids are a range and rows have no priorities."""
        count, steps = len(lengths), int(lengths.sum())
        self._retire_for(counters, count, steps)
        self._renew_newest_version(counters)
        self._commit(counters)  # before their rows are cleared: a live trajectory must have its row
        ids = counters.next_id + np.arange(count)
        at = ids % self.num_rows
        slot[PUBLISHED_AS] = ids[0]
        self._row_ids[at] = -1
        write_barrier()
        if fill is not None:
            for number, row in enumerate(at.tolist()):
                fill(row, number)
        self._rows[at, START], self._rows[at, LENGTH] = starts, lengths
        self._rows[at, LONGEST_SEGMENT], self._rows[at, POLICY_VERSION] = longest_segments, policy_versions
        self._rows[at, STEPS_BEFORE] = counters.steps_published + np.cumsum(lengths) - lengths
        self._rows[at, PUBLISHED_AT], self._rows[at, CHANGES] = time.monotonic_ns(), 0
        write_barrier()
        self._row_ids[at] = ids
        counters.next_id += count
        counters.live += count
        counters.live_steps += steps
        counters.steps_written += steps
        counters.steps_published += steps
        newest = int(policy_versions.max(initial=NO_VERSION))
        if newest >= counters.newest_version:
            counters.newest_version = newest
            counters.newest_version_id = int(ids[np.flatnonzero(policy_versions == newest)[-1]])
        self._commit(counters)
        return ids

    def _retire_for(self, counters: Counters, count: int, steps: int) -> None:
        """Retire as many of the oldest trajectories as must go for ``count`` new ones with ``steps`` steps."""
        live = (counters.oldest_id + np.arange(counters.live)) % self.num_rows
        freed = np.cumsum(self._rows[live, LENGTH])
        too_many, too_long = counters.live + count - self.max_trajectories, counters.live_steps + steps
        of_steps = int(np.searchsorted(freed, too_long - self.max_total_steps)) + 1 if len(freed) else 0
        retired = min(max(too_many, of_steps if too_long > self.max_total_steps else 0, 0), counters.live)
        if retired:
            counters.oldest_id += retired
            counters.live -= retired
            counters.live_steps -= int(freed[retired - 1])


def _of(fill: Callable[[int, int], None], number: int) -> Callable[[int], None]:
    return lambda row: fill(row, number)
