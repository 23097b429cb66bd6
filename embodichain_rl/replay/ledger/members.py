"""Which trajectories of a ledger are live: eviction, and what is pinned or discarded.

**Ids stay consecutive where nothing is pinned or discarded.** Then the live ids are ``[oldest_id, next_id)``.

**Pinned trajectories stay in their rows.** The ledger has a list of the pinned ids. Eviction moves ``oldest_id`` past
them and does not retire them, so a pinned id below ``oldest_id`` is live. The row of a new trajectory is ``id %
num_rows``. If that row belongs to a live trajectory, its id is *skipped*: no trajectory ever gets it. So rows, their
ids and everything that is stored per row stay where they are, and readers check a pinned trajectory like any other.

**A discarded trajectory leaves a hole.** Discarded and skipped ids from ``oldest_id`` on are in the list of *holes*.
The region of a discarded trajectory is free from then on.

**Stragglers are live ids below** ``oldest_id`` **that are not pinned.** A trajectory that is unpinned late becomes one.
And if there would be more holes than rows, because most of a stream is discarded, ``oldest_id`` moves to the end: then
all live trajectories are stragglers or pinned, and there are no holes. Stragglers are evicted first.

**The lists change with the counters.** Each list exists in two copies. Under the lock, new lists are written to the
copies that no counter refers to. They take effect with the commit, like everything else. So a call that pins or
discards several trajectories does so for all of them, or, if its process is killed, for none.

**Pins leave room for one more trajectory.** At most a share of the limits can be pinned (``max_pinned``), and at most
all trajectories but one. A new trajectory is refused if the pinned steps leave no room for it, before it is written.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from embodichain_rl.errors import OwnerGoneError, PinLimitError, TrajectoryEvictedError
from embodichain_rl.replay.ledger.live_ids import Lists, LiveIds
from embodichain_rl.replay.ledger.table import BYTES_BESIDE, LedgerTable
from embodichain_rl.replay.ledger.words import (
    END,
    FLOOR,
    ID,
    LENGTH,
    NO_VERSION,
    POLICY_VERSION,
    SLOT_LENGTH,
    UPCOMING_END,
    Counters,
)
from embodichain_rl.shared import SharedBlock, write_barrier

__all__ = ["LedgerMembers"]


class LedgerMembers(LedgerTable):
    """A ledger of which trajectories can be retired, pinned and discarded; see :class:`Ledger`."""

    memory: tuple[np.ndarray, ...] = ()
    """The bytes that changes are made to, ``uint8``, as this process has mapped them; empty before that."""

    _left: Any = None

    # ------------------------------------------------------------------------------------------------ all of them

    def retire_all(self) -> None:
        """Retire every live trajectory, pinned or not. Those that are being written can still be published."""
        with self._lock:
            counters = self._read_counters()
            counters.oldest_id = counters.next_id
            self._commit_emptied(counters)

    def close(self) -> None:
        """Retire every trajectory, let no read that was begun be used, and refuse every reservation from now on."""
        self._closed[0] = 1
        self.retire_all()
        with self._lock:
            self._row_ids[:] = -1

    def leave(self) -> None:
        """Use no shared words any more in this process, but empty ones of its own, of a closed ledger."""
        self._left = self._block.mapped()  # the kernels of another thread may just read them
        self._block = SharedBlock(self.nbytes + BYTES_BESIDE)
        self.memory = ()
        self._map()
        self._start_empty()
        self._unusual[0] = 1  # so that no thread samples by the kernels, from the words that were left
        self._closed[0] = 1

    def check_open(self) -> None:
        """Refuse what needs an open ledger.

        Raises:
            OwnerGoneError: if it was closed.
        """
        if self.closed:
            raise OwnerGoneError(
                "The buffer was closed, by rb.close() in the process that made it. Make a new one. One in a file is "
                "closed in one process only, and can be opened again."
            )

    def resume_from(self, *, next_id: int) -> None:
        """Retire every live trajectory, and assign no id below ``next_id`` from now on; for restoring a checkpoint."""
        with self._lock:
            counters = self._read_counters()
            counters.oldest_id = counters.next_id = max(counters.next_id, next_id)
            self._commit_emptied(counters)

    def skip_to(self, number: int) -> None:
        """Assign no id below ``number`` from now on, and keep what is live; for restoring a checkpoint."""
        with self._lock:
            counters = self._read_counters()
            if number <= counters.next_id:
                return
            self._unusual[0] = max(1, self._unusual[0])
            counters.skipped += number - counters.next_id
            lists = self._lists_of(counters)
            if number - counters.next_id > self.num_rows or not self._range_begins(counters):
                lists = self._all_as_stragglers(counters, lists)
                counters.oldest_id = number
            else:
                lists = lists._replace(holes=np.append(lists.holes, np.arange(counters.next_id, number)))
            counters.next_id = number
            self._replace_lists(counters, lists)
            self._commit(counters)

    def _commit_emptied(self, counters: Counters) -> None:
        counters.live_steps = counters.live = 0
        if counters.lists:
            nothing = np.empty(0, dtype=np.int64)
            self._replace_lists(counters, Lists(nothing, nothing, nothing))
        self._renew_newest_version(counters)
        counters.times_emptied += 1
        self._commit(counters)
        if self.priorities.built:
            self.priorities.build(np.empty(0, dtype=np.int64))

    # ------------------------------------------------------------------------------------------------ some of them

    @property
    def pin_limits(self) -> tuple[int, int]:
        """The largest number of trajectories that can be pinned, and of their steps."""
        return min(int(self.max_pinned * self.max_trajectories), self.max_trajectories - 1), int(
            self.max_pinned * self.max_total_steps
        )

    def pin(self, ids: np.ndarray) -> None:
        """Keep the trajectories ``ids``, ``int64`` ``[n]``: they are never evicted. All are pinned, or none.

        Raises:
            TrajectoryEvictedError: if one of them is not live.
            PinLimitError: if more would be pinned than :attr:`pin_limits` allows.
        """
        with self._lock:
            counters = self._read_counters()
            live, (pinned, holes, stragglers) = self.live(), self._lists_of(counters)
            missing = ids[~live.contains(ids)]
            if len(missing):
                raise TrajectoryEvictedError(
                    f"Got the ids {missing[:5].tolist()} to pin, which are not in the buffer (any more). Pin a "
                    "trajectory before it is evicted: best when extend() has returned its id."
                )
            new = np.setdiff1d(ids, pinned)
            counters.pinned_steps += int(self._rows[new % self.num_rows, LENGTH].sum())
            self._check_pins(counters, len(pinned) + len(new))
            self._unusual[0] = max(1, self._unusual[0])
            self._replace_lists(counters, Lists(np.union1d(pinned, new), holes, np.setdiff1d(stragglers, new)))
            self._commit(counters)

    def _check_pins(self, counters: Counters, count: int) -> None:
        """Refuse more pinned trajectories than allowed, or so many steps that a reserved region would not fit."""
        most, most_steps = self.pin_limits
        writing = self._slots[self._being_written(), SLOT_LENGTH].max(initial=0)
        if count > most or counters.pinned_steps > min(most_steps, self.max_total_steps - int(writing)):
            raise PinLimitError(
                f"With these, {count:,} trajectories with {counters.pinned_steps:,} steps would be pinned. At most "
                f"{most:,} trajectories with {most_steps:,} steps can be, a share of max_pinned={self.max_pinned:g} of "
                f"max_trajectories={self.max_trajectories:,} and max_total_steps={self.max_total_steps:,}, and the "
                "trajectories that are being written must fit beside them. Unpin others (rb.unpin), raise max_pinned, "
                "or make the buffer larger."
            )

    def _check_room(self, length: int, counters: Counters) -> None:
        if length > self.max_total_steps - counters.pinned_steps and counters.pinned:
            raise PinLimitError(
                f"Got a trajectory of {length:,} steps, but {counters.pinned:,} pinned trajectories take "
                f"{counters.pinned_steps:,} of max_total_steps={self.max_total_steps:,}. Unpin some of them "
                "(rb.unpin), or raise max_total_steps."
            )

    def unpin(self, ids: np.ndarray) -> None:
        """Let the trajectories ``ids``, ``int64`` ``[n]``, be evicted again; others than pinned ones are ignored."""
        with self._lock:
            counters = self._read_counters()
            pinned, holes, stragglers = self._lists_of(counters)
            freed = np.intersect1d(ids, pinned)
            counters.pinned_steps -= int(self._rows[freed % self.num_rows, LENGTH].sum())
            stragglers = np.union1d(stragglers, freed[freed < counters.oldest_id])
            self._replace_lists(counters, Lists(np.setdiff1d(pinned, freed), holes, stragglers))
            self._commit(counters)

    def discard(self, ids: np.ndarray) -> int:
        """Retire the trajectories ``ids``, ``int64`` ``[n]``, pinned or not; return how many of them were live.

        They are never drawn again. Those that are not live are ignored.
        """
        with self._lock:
            counters = self._read_counters()
            live, (pinned, holes, stragglers) = self.live(), self._lists_of(counters)
            ids = np.unique(ids)
            gone = ids[live.contains(ids)]
            rows, was_pinned = gone % self.num_rows, np.intersect1d(gone, pinned)
            counters.pinned_steps -= int(self._rows[was_pinned % self.num_rows, LENGTH].sum())
            counters.live_steps -= int(self._rows[rows, LENGTH].sum())
            counters.live -= len(gone)
            counters.discarded += len(gone)
            holes = np.union1d(holes, gone[gone >= counters.oldest_id])
            self._unusual[0] = max(1, self._unusual[0])
            self._replace_lists(counters, Lists(np.setdiff1d(pinned, gone), holes, np.setdiff1d(stragglers, gone)))
            self._renew_newest_version(counters)
            self._commit(counters)
            if self.name_no_more is not None and self._names(gone).any():
                self.name_no_more(counters.oldest_id, self._lists_of(counters))  # before its room is free
            self._row_ids[rows] = -1  # so that no read that was begun is used
            if self.priorities.built:
                self.priorities.remove(rows)
            return len(gone)

    def _names(self, ids: Any) -> Any:
        """Return which trajectories a commit record names, or the one that is being written; see the room ``durable``.

        Their steps, their rows and their values may not be overwritten. Where something was ever pinned, a record may
        name ids below its floor, so all that are lower than its end count.
        """
        last = self.last_commit().tolist()  # as ints, with which the comparisons are faster
        first = max(0, last[FLOOR]) if self.plain else 0
        return (ids >= first) & (ids < max(last[END], self.commit_words.item(UPCOMING_END)))

    def current_lists(self) -> tuple[int, Lists]:
        """Return ``oldest_id`` and copies of the lists at one moment, without the stragglers that were evicted."""
        while True:
            active = self._active.item(0)
            counters = Counters(*self._counters[active & 1].tolist())
            lists = self._lists_of(counters)
            if self._active.item(0) == active:
                return counters.oldest_id, lists

    # ------------------------------------------------------------------------------------------ inside the lock: lists

    def _lists_of(self, counters: Counters) -> Lists:
        """Return copies of the lists, without the stragglers that were evicted."""
        copy = counters.lists & 1
        return Lists(
            self._pinned[copy, : counters.pinned].copy(),
            self._holes[copy, : counters.holes].copy(),
            self._stragglers[copy, counters.first_straggler : counters.stragglers].copy(),
        )

    def _replace_lists(self, counters: Counters, lists: Lists) -> None:
        """Write the lists to the copies that are not in use, and prepare the counters; once per commit."""
        pinned, holes, stragglers = lists
        holes = holes[np.searchsorted(holes, counters.oldest_id) :]
        if len(holes) > self.num_rows:
            pinned, holes, stragglers = self._all_as_stragglers(counters, Lists(pinned, holes, stragglers))
        counters.lists += 1
        copy = counters.lists & 1
        write_barrier()  # the commit that left these copies unused is visible before they change
        self._pinned[copy, : len(pinned)] = pinned
        self._holes[copy, : len(holes)] = holes
        self._stragglers[copy, : len(stragglers)] = stragglers
        counters.pinned, counters.holes = len(pinned), len(holes)
        counters.stragglers, counters.first_straggler = len(stragglers), 0
        if not len(pinned):
            counters.pinned_steps = 0

    @staticmethod
    def _all_as_stragglers(counters: Counters, lists: Lists) -> Lists:
        """Move ``oldest_id`` to the end; return the lists in which all that is live is pinned or a straggler."""
        pinned, _, stragglers = lists
        live = LiveIds.of(counters.oldest_id, counters.next_id, lists, 0).all()
        counters.oldest_id = counters.next_id
        return Lists(pinned, np.empty(0, dtype=np.int64), np.union1d(stragglers, np.setdiff1d(live, pinned)))

    def _live_of(self, counters: Counters) -> LiveIds:
        """Return the live ids by counters that are not committed yet."""
        if not counters.lists:
            return LiveIds(counters.oldest_id, counters.next_id)
        return LiveIds.of(counters.oldest_id, counters.next_id, self._lists_of(counters), 0)

    # --------------------------------------------------------------------------------------- inside the lock: eviction

    def _can_evict(self, counters: Counters) -> bool:
        """Return whether any trajectory can be evicted."""
        return counters.first_straggler < counters.stragglers or self._range_begins(counters)

    def _range_begins(self, counters: Counters) -> bool:
        """Move ``oldest_id`` to the first trajectory of the range that can be evicted; return whether there is one."""
        if counters.pinned or counters.holes:
            copy = counters.lists & 1
            passed = self._pinned[copy, : counters.pinned], self._holes[copy, : counters.holes]
            run = 1
            while run:
                run = sum(_run_from(counters.oldest_id, ids) for ids in passed)  # it is in one of them at most
                counters.oldest_id += run
        return counters.oldest_id < counters.next_id

    def _retire_oldest(self, counters: Counters) -> int:
        """Retire the oldest trajectory that is not pinned, if :meth:`_can_evict`; return the size of its region."""
        if counters.first_straggler < counters.stragglers:
            number = int(self._stragglers[counters.lists & 1, counters.first_straggler])
            counters.first_straggler += 1
        else:
            number = counters.oldest_id
            counters.oldest_id += 1
        row = number % self.num_rows
        length = int(self._rows[row, LENGTH])
        counters.live -= 1
        counters.live_steps -= length
        return int(self._rooms[row]) if self.rooms_vary else length + self.margin

    def _retired_rows(self, before: LiveIds, counters: Counters) -> np.ndarray:
        """Return the rows of the trajectories that were retired since ``before``."""
        if not counters.lists:
            return np.arange(before.oldest, counters.oldest_id) % self.num_rows
        ids = before.all()
        return ids[~self._live_of(counters).contains(ids)] % self.num_rows

    def _next_id(self, counters: Counters) -> int:
        """Return the id of the next trajectory; skip those whose row belongs to a live trajectory."""
        if not counters.lists:
            return counters.next_id
        live, number = self._live_of(counters), counters.next_id
        while True:
            holders = self._rows[(number + np.arange(64)) % self.num_rows, ID]
            free = np.flatnonzero((holders < 0) | ~live.contains(holders))
            if len(free):
                break
            number += 64
        number += int(free[0])
        if number > counters.next_id:
            lists = self._lists_of(counters)
            lists = lists._replace(holes=np.append(lists.holes, np.arange(counters.next_id, number)))
            counters.skipped += number - counters.next_id
            counters.next_id = number
            self._replace_lists(counters, lists)
        return number

    def _renew_newest_version(self, counters: Counters) -> None:
        """Look up the newest policy version of what is live, if the trajectory that had it is no longer live."""
        newest = counters.newest_version_id
        if newest >= counters.oldest_id and not counters.lists:
            return
        if counters.lists and self._live_of(counters).contains(np.array([newest])).all():
            return
        live = self._live_of(counters).all()
        versions = self._rows[live % self.num_rows, POLICY_VERSION]
        counters.newest_version = int(versions.max(initial=NO_VERSION))
        with_it = np.flatnonzero(versions == counters.newest_version)
        counters.newest_version_id = int(live[with_it[-1]]) if len(with_it) else 0


def _run_from(first: int, ids: np.ndarray) -> int:
    """Return how many of the numbers ``first``, ``first + 1``, ... are in ``ids``, ascending, without a gap."""
    at = int(np.searchsorted(ids, first))
    if at == len(ids) or ids[at] != first:
        return 0
    later = ids[at:] - first != np.arange(len(ids) - at)
    return int(later.argmax()) if later.any() else len(later)
