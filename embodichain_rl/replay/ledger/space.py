"""The slots of the writers, and the space in the arena: what is done inside the lock to reserve a region.

``ledger.py`` explains the protocol, and how space is allocated from a free gap.
"""

from __future__ import annotations

import time

import numpy as np

from embodichain_rl.errors import TooManyWritersError
from embodichain_rl.replay.ledger.relabels import LedgerRelabels
from embodichain_rl.replay.ledger.words import (
    ID,
    LENGTH,
    SLOT_START,
    START,
    TICKET,
    Counters,
)
from embodichain_rl.shared import process_is_alive, write_barrier

__all__ = ["LedgerSpace"]

SUSPECT_AFTER = 50_000_000
"""Age of a reservation, in nanoseconds, from which the next writer checks whether its owner is alive. When space or
slots are short, writers check at once."""


class LedgerSpace(LedgerRelabels):
    """A ledger that reserves regions of the arena; see :class:`Ledger`."""

    # ------------------------------------------------------------------------------- inside the lock: slots and space

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
                dead = now - since > suspect_after and not process_is_alive(pid, process_start)
                counters.reclaimed += dead
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

    def _open_gap(self, counters: Counters, length: int) -> None:
        """Make the next free gap the current one that is wide enough for a region of ``length`` steps.

        The gaps are taken in turn, as in a ring: the oldest trajectories lie there, so the freed steps are one gap. If
        none is wide enough, take head-room. If that is used up too, evict.
        """
        while True:
            starts, ends = self._regions_in_use(counters)
            high_water = counters.high_water
            begins, widths = np.append(0, ends), np.append(starts, high_water)
            widths -= begins
            wide = np.flatnonzero(widths >= length)
            last_end = int(ends[-1]) if len(ends) else 0
            if len(wide):
                following = wide[begins[wide] >= counters.gap_end]
                nearest = int(following[0] if len(following) else wide[0])
                gap_start, gap_end = int(begins[nearest]), int(begins[nearest] + widths[nearest])
                break
            limit = self.arena_steps
            if self._can_evict(counters):
                writing = self._slot_rooms[self._slots[:, TICKET] >= 0]
                limit = min(limit, self.usual_steps + int(writing.sum()))
            if limit - last_end >= length:
                gap_start = last_end
                wanted = last_end + max(length, self.max_total_steps // 32)
                gap_end = high_water = max(min(limit, wanted), high_water)
                break
            if self._reclaim_dead_writers(counters, suspect_after=0):  # before evicting or raising
                continue
            self._make_room(counters, length, len(starts))
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

    # ------------------------------------------------------- inside the lock: overridden by a ledger without eviction

    def _check_capacity(self, counters: Counters) -> None:
        """Raise if no further reservation is allowed. Here publishing evicts, so one always is."""

    def _make_room(self, counters: Counters, length: int, in_use: int) -> None:
        """Evict the oldest trajectories, at least ``length`` steps in all, or raise if none is live.

        Args:
            counters: counters of the change that is being prepared.
            length: number of steps that are needed.
            in_use: number of regions in use, for the error message.
        """
        if not self._can_evict(counters):
            raise TooManyWritersError(
                f"No {length:,} consecutive free steps: {in_use} trajectories are being written, or are pinned, in an "
                f"arena of {self.arena_steps:,} steps. Raise max_writers, use fewer writer processes, or pin fewer "
                "trajectories."
            )
        evicted, before = 0, self._live_of(counters)
        while evicted < length and self._can_evict(counters):
            evicted += self._retire_oldest(counters)
            counters.evicted_early += 1
        self._renew_newest_version(counters)
        self._commit(counters)  # before their rows are cleared: a live trajectory must have its row
        if self.priorities.built:
            self.priorities.remove(self._retired_rows(before, counters))
