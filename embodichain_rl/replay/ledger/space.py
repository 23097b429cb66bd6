"""The slots of the writers, and the space in the arena: what is done inside the lock to reserve a region.

``ledger.py`` explains the protocol, and how space is allocated from a free gap.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from embodichain_rl.errors import SharingError, TooManyWritersError
from embodichain_rl.replay.ledger.relabels import LedgerRelabels
from embodichain_rl.replay.ledger.words import (
    ID,
    LENGTH,
    SINCE,
    SLOT_LENGTH,
    SLOT_START,
    START,
    TICKET,
    Counters,
)
from embodichain_rl.shared import own_process, process_is_alive, write_barrier

__all__ = ["LedgerSpace", "Reservation"]

SUSPECT_AFTER = 50_000_000
"""Age of a reservation, in nanoseconds, from which the next writer checks whether its owner is alive. When space or
slots are short, writers check at once."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """A region of the arena that one writer may fill: steps ``[start, start + length)``, and the margin behind them."""

    ticket: int
    start: int
    length: int
    slot: int
    room: int
    """Size of the region in steps, with the margin."""


class LedgerSpace(LedgerRelabels):
    """A ledger that reserves regions of the arena; see :class:`Ledger`."""

    # ------------------------------------------------------------------------------- inside the lock: slots and space

    def _slot_of(self, reservation: Reservation) -> np.ndarray:
        """Return the slot of a reservation.

        Raises:
            SharingError: if another process has reclaimed it.
        """
        slot: np.ndarray = self._slots[reservation.slot]
        if slot[TICKET] != reservation.ticket:
            raise SharingError(
                f"Reservation {reservation.ticket} was reclaimed while its trajectory was being written, because "
                f"another process could not see its owner, process {os.getpid()}. All processes that share a "
                "buffer must see each other's process ids: run them in one container (one pid namespace)."
            )
        return slot

    def _free_slot(self, counters: Counters) -> int:
        tickets = self._slots[:, TICKET]
        free = int(tickets.argmin())
        if tickets[free] < 0:
            return free
        if self._reclaim_dead_writers(counters, suspect_after=0):
            return int(tickets.argmin())
        raise TooManyWritersError(
            f"{len(self._slots)} trajectories are being written at the same time, which is the limit. "
            "Use fewer writer processes."
        )

    def _reclaim_dead_writers(self, counters: Counters, *, suspect_after: int = SUSPECT_AFTER) -> bool:
        """Reclaim the reservations of dead processes; return whether any was reclaimed.

        Only reservations older than ``suspect_after`` nanoseconds are checked for a living owner.
        """
        now, reclaimed = time.monotonic_ns(), False
        for number in (self._slots[:, TICKET] >= 0).nonzero()[0].tolist():
            ticket, pid, process_start, since, start, _, published_as = self._slots[number].tolist()
            if ticket >= counters.next_ticket:
                dead = True  # killed before the commit of its reservation
            elif published_as >= 0:
                # Killed inside publish(): only the holder of the lock sets this word, and this process holds it now.
                dead = True
                row = self._rows[published_as % self.num_rows]
                committed = published_as < counters.next_id and row[ID] == published_as and row[START] == start
                counters.reclaimed += not committed
            else:
                suspect = now - since > suspect_after
                own = suspect and (pid, process_start) == own_process()
                dead = suspect and not own and not process_is_alive(pid, process_start)
                counters.reclaimed += dead
                if suspect and not dead:
                    self._slots[number, SINCE] = now  # a region that is kept for long is not looked at every time
            if dead:
                self._slots[number, TICKET] = -1
                reclaimed = True
        return reclaimed

    def _regions_in_use(self, counters: Counters) -> tuple[np.ndarray, np.ndarray]:
        """Return the starts and the ends of all regions in use, live or being written, in ascending order."""
        first, end = counters.oldest_id % self.num_rows, counters.next_id % self.num_rows
        rows = self._rows  # more rows than live trajectories, so first == end only if none is live
        writing = self._slots[:, TICKET] >= 0
        if counters.lists or self.rooms_vary:
            numbers = self._live_of(counters).all() % self.num_rows
            live, rooms = rows[numbers], self._rooms_of(numbers)
        else:
            live = rows[first:end] if first <= end else np.concatenate([rows[first:], rows[:end]])
            rooms = live[:, LENGTH] + self.margin
        starts = np.concatenate([live[:, START], self._slots[writing, SLOT_START]])
        rooms = np.concatenate([rooms, self._slot_rooms[writing]])
        order = starts.argsort(kind="stable")
        starts = starts[order]
        return starts, starts + rooms[order]

    def _rooms_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the sizes of the regions of some rows, in steps, with the margins."""
        return self._rooms[rows] if self.rooms_vary else self._rows[rows, LENGTH] + self.margin

    def _open_gap(self, counters: Counters, room: int, steps: int | None = None) -> bool:
        """Make the next free gap the current one that is wide enough for a region of ``room`` steps.

        The gaps are taken in turn, as in a ring: the oldest trajectories lie there, so the freed steps are one gap. If
        none is wide enough, take head-room. If that is used up too, evict for a trajectory of ``steps`` steps, or
        return False if that is None.
        """
        while True:
            starts, ends = self._regions_in_use(counters)
            high_water = counters.high_water
            begins, widths = np.append(0, ends), np.append(starts, high_water)
            widths -= begins
            wide = np.flatnonzero(widths >= room)
            last_end = int(ends[-1]) if len(ends) else 0
            if len(wide):
                following = wide[begins[wide] >= counters.gap_end]
                nearest = int(following[0] if len(following) else wide[0])
                gap_start, gap_end = int(begins[nearest]), int(begins[nearest] + widths[nearest])
                break
            limit = self._head_room_end(counters)
            if limit - last_end >= room:
                gap_start = last_end
                wanted = last_end + max(room, self.max_total_steps // 32)
                gap_end = high_water = max(min(limit, wanted), high_water)
                break
            if self._reclaim_dead_writers(counters, suspect_after=0):  # before evicting or raising
                continue
            if steps is None:
                return False
            self._make_room(counters, room, steps)
        # A gap contains no live trajectory, so these rows belong to retired ones.
        starts = self._rows[:, START]
        rooms = self._rooms if self.rooms_vary else self._rows[:, LENGTH] + self.margin
        inside = starts + rooms > gap_start
        inside &= starts < gap_end
        if self.name_no_more is not None and self._names(self._row_ids[inside]).any():
            self.name_no_more(counters.oldest_id, self._lists_of(counters))
        self._row_ids[inside] = -1
        write_barrier()
        counters.gap_start, counters.gap_end, counters.high_water = gap_start, gap_end, high_water
        return True

    def _head_room_end(self, counters: Counters) -> int:
        """Return the step up to which head-room may be taken now."""
        if not self._can_evict(counters):
            return self.arena_steps
        writing = self._slot_rooms[self._slots[:, TICKET] >= 0]
        return min(self.arena_steps, self.usual_steps + int(writing.sum()))

    def give_back_free(self, give_back: Callable[[int, int], None]) -> None:
        """Give the memory of all free steps back, and lower the high-water mark.

        No reader uses a copy of these steps: the ids of the retired trajectories there are removed before. A process
        that is killed meanwhile has given back less.

        Args:
            give_back: called with the first step and the end of each range of free steps.
        """
        with self._lock:
            counters = self._read_counters()
            starts, ends = self._regions_in_use(counters)
            live = self._live_of(counters)
            self._row_ids[~live.contains(self._row_ids)] = -1
            write_barrier()
            begins = np.append(0, np.maximum.accumulate(ends) if len(ends) else ends)
            gap_ends = np.append(starts, counters.high_water)
            gaps = begins < gap_ends
            for begin, end in zip(begins[gaps].tolist(), gap_ends[gaps].tolist(), strict=True):
                give_back(begin, end)
            last_end = int(begins[-1])
            if counters.gap_start >= last_end:  # the gap is behind all regions: the next one is looked for from there
                counters.gap_start = counters.gap_end = last_end
            counters.high_water = max(self.max_total_steps, last_end, counters.gap_end)
            self._commit(counters)

    # ------------------------------------------------------- inside the lock: overridden by a ledger without eviction

    def _check_capacity(self, counters: Counters) -> None:
        """Raise if no further reservation is allowed. Here publishing evicts, so one always is."""

    def _make_room(self, counters: Counters, room: int, steps: int) -> None:
        """Evict as few of the oldest trajectories as possible, so that a region fits, or raise if none is live.

        Args:
            counters: counters of the change that is being prepared.
            room: number of consecutive free steps that are needed.
            steps: number of steps of the trajectory that is to be written.
        """
        if not self._can_evict(counters):
            raise TooManyWritersError(
                f"No {room:,} consecutive free steps: {len(self._regions_in_use(counters)[0])} trajectories are being "
                f"written, or are pinned, in an arena of {self.arena_steps:,} steps. Raise max_writers, use fewer "
                "writer processes, or pin fewer trajectories."
            )
        before, writing = self._live_of(counters), self._slots[:, TICKET] >= 0
        coming, more = steps + int(self._slots[writing, SLOT_LENGTH].sum()), 1 + int(np.count_nonzero(writing))
        left = self._evictions_for(counters, room)
        while left and self._can_evict(counters):  # which moves past pinned and discarded ones
            # Those that go at the publication of what is being written are only evicted a moment before it.
            within = counters.live_steps + coming <= self.max_total_steps
            counters.evicted_early += within and counters.live + more <= self.max_trajectories
            self._retire_oldest(counters)
            left -= 1
        self._renew_newest_version(counters)
        self._commit(counters)  # before their rows are cleared: a live trajectory must have its row
        if self.priorities.built:
            self.priorities.remove(self._retired_rows(before, counters))

    def _evictions_for(self, counters: Counters, room: int) -> int:
        """Return how many of the oldest trajectories must go until ``room`` consecutive steps are free, at least 1.

        It is the number of all of them if that is not enough either.
        """
        pinned = self._lists_of(counters).pinned
        live = self._live_of(counters).all()
        stay = np.isin(live, pinned) if len(pinned) else np.zeros(len(live), dtype=bool)
        rows = live % self.num_rows
        writing = self._slots[:, TICKET] >= 0
        starts = np.concatenate([self._rows[rows, START], self._slots[writing, SLOT_START]])
        rooms = np.concatenate([self._rooms_of(rows), self._slot_rooms[writing]])
        count = int(np.count_nonzero(~stay))
        turns = np.full(len(starts), count)  # the oldest goes first; what is pinned or written does not go
        turns[: len(live)][~stay] = np.arange(count)
        order = starts.argsort(kind="stable")
        starts, ends, turns = starts[order], (starts + rooms)[order], turns[order]
        end = max(counters.high_water, self._head_room_end(counters))

        def enough(evicted: int) -> bool:
            left = turns >= evicted
            begins, following = np.append(0, ends[left]), np.append(starts[left], end)
            return bool((following - begins).max() >= room)

        low, high = 0, 1  # few are enough as a rule
        while high < count and not enough(high):
            low, high = high, 2 * high
        high = min(high, count)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high
