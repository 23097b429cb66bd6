"""What a ledger consists of at one moment, for commit records, and a ledger that is set to it."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import NamedTuple

import numpy as np

from embodichain_rl.replay.ledger.ledger import Ledger
from embodichain_rl.replay.ledger.live_ids import Lists, LiveIds
from embodichain_rl.replay.ledger.table import BYTES_BESIDE
from embodichain_rl.replay.ledger.words import (
    COUNTERS,
    ID,
    LENGTH,
    NO_VERSION,
    POLICY_VERSION,
    PROCESS_START,
    PUBLISHED_AT,
    START,
    TICKET,
    UPCOMING_END,
    Counters,
)

__all__ = ["NO_ROOMS", "LedgerState", "ledger_layout", "reclaim_all", "restore_ledger", "state_of_ledger"]


NO_ROOMS = np.empty(0, dtype=np.int64)


class LedgerState(NamedTuple):
    """The counters of a ledger and the rows of trajectories at one moment."""

    changes: int
    """Number of committed changes of the ledger."""
    counters: Counters
    rows: np.ndarray
    """Rows of consecutive trajectories, ``int64`` ``[n, columns]``, the newest last."""
    weights: np.ndarray | None
    """Weight of each live trajectory by priority, ``float64`` ``[live]``, oldest first; None without priorities."""
    lists: Lists
    """The pinned ids, the holes and the stragglers that were not evicted."""
    unusual: int = 0
    """0 if nothing was ever pinned, discarded or relabelled; else one more than the number of changes."""
    rooms: np.ndarray = NO_ROOMS
    """The sizes of the regions of the rows, in steps, ``int64`` ``[n]``; empty in a ledger whose rooms do not vary."""

    @property
    def live(self) -> LiveIds:
        """The ids of the live trajectories."""
        return LiveIds.of(self.counters.oldest_id, self.counters.next_id, self.lists, 0)

    @property
    def ids(self) -> np.ndarray:
        """The ids of the rows, ``int64`` ``[n]``."""
        return self.rows[:, ID]

    @property
    def regions(self) -> np.ndarray:
        """First step and length of the rows, ``int64`` ``[n, 2]``."""
        return self.rows[:, [START, LENGTH]]


@cache
def ledger_layout() -> str:
    """Return a description of the arrays of a ledger in this version of the library."""
    arrays = Ledger(1, 1, 3, writer_slots=1)._shapes
    meaning = (COUNTERS, BYTES_BESIDE, [(name, shape[1:]) for name, shape in arrays.items()])
    return hashlib.sha256(repr(meaning).encode()).hexdigest()[:16]


def state_of_ledger(ledger: Ledger, since: int) -> LedgerState:
    """Return the state with the rows of the live trajectories from id ``since`` on, inside the lock.

    From now on, the ledger asks before it overwrites one of them; see :meth:`Ledger._names`. The ``rooms`` are what the
    ledger has in their place: the caller knows whether they vary.
    """
    with ledger.frozen():
        counters = ledger._read_counters()
        ledger.commit_words[UPCOMING_END] = counters.next_id
        live = ledger._live_of(counters).all()
        at = live[live >= since] % ledger.num_rows
        weights = ledger.weights_of(live) if ledger.priorities.built else None
        lists, unusual = ledger._lists_of(counters), int(ledger._unusual[0])
        changes = int(ledger._active[0])
        return LedgerState(changes, counters, ledger._rows[at], weights, lists, unusual, ledger._rooms[at])


def restore_ledger(ledger: Ledger, state: LedgerState, *, later: int) -> None:
    """Set a ledger that no other process uses to a state. Reservations and agreements are dropped.

    Args:
        ledger: the ledger.
        state: the state; its rows are those of all live trajectories.
        later: what is added to the times of publication, in nanoseconds.
    """
    ledger._start_empty()
    for array in (ledger._agreed, ledger._priorities, ledger._held[1:], ledger._journal, ledger._closed):
        array[:] = 0
    counters, rows = state.counters, state.rows.copy()
    rows[:, PUBLISHED_AT] += later
    ids = rows[:, ID]
    counters.live, counters.live_steps = len(rows), int(rows[:, LENGTH].sum())
    counters.pinned_steps = int(rows[np.isin(ids, state.lists.pinned), LENGTH].sum())
    counters.gap_start = counters.gap_end = 0  # the next reservation looks for a gap
    if ledger.rooms_vary:
        ledger._rooms[ids % ledger.num_rows] = state.rooms
    ends = rows[:, START] + (state.rooms if ledger.rooms_vary else rows[:, LENGTH] + ledger.margin)
    counters.high_water = max(ledger.max_total_steps, int(ends.max(initial=0)))
    counters.newest_version = int(rows[:, POLICY_VERSION].max(initial=NO_VERSION))
    newest = np.flatnonzero(rows[:, POLICY_VERSION] == counters.newest_version)
    counters.newest_version_id = int(ids[newest[-1]]) if len(newest) else 0
    ledger._rows[ids % ledger.num_rows] = rows
    unusual = bool(counters.lists) or any(map(len, state.lists))
    ledger._unusual[0] = max(state.unusual, unusual)
    if unusual:
        ledger._replace_lists(counters, state.lists)
    ledger._commit(counters)
    if state.weights is not None:
        ledger.priorities.build(np.empty(0, dtype=np.int64))
        ledger.priorities.set(ids % ledger.num_rows, state.weights)


def reclaim_all(ledger: Ledger) -> None:
    """Reclaim every reservation, and drop the agreements. No other process may use the ledger."""
    with ledger.frozen():
        counters = ledger._read_counters()
        for slot in np.flatnonzero(ledger._slots[:, TICKET] >= 0):
            ledger._slots[slot, PROCESS_START] = -2  # of no process
        ledger._reclaim_dead_writers(counters, suspect_after=-(2**62))
        ledger._agreed[:] = 0
        ledger._held[1:] = 0
        ledger._commit(counters)
