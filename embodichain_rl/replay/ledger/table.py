"""What stands in the ledger's memory, and how it is read without a lock. The protocol is told in ``ledger.py``."""

from __future__ import annotations

import bisect
import math
import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from embodichain_rl.replay.ledger.priorities import PriorityTree, tree_words
from embodichain_rl.shared import ALIGNMENT, CrossProcessLock, SharedBlock, check_memory, keep_order, take_part_in_order

__all__ = ["GONE", "Counters", "LedgerTable", "Rows"]

WRITER_SLOTS = 256
"""How many trajectories may be in the middle of being written at the same moment."""

# Columns of a row. A row belongs to trajectory ``id`` as long as its first word is ``id``.
ID, START, LENGTH, LONGEST_SEGMENT, STEPS_BEFORE, POLICY_VERSION = range(6)

# Columns of a writer's slot. It is in use as long as its first word is not -1; PUBLISHED_AS is the id that the writer
# was about to publish its trajectory as, -1 before.
TICKET, PID, PROCESS_START, SINCE, SLOT_START, SLOT_LENGTH, PUBLISHED_AS = range(7)


@dataclass(slots=True)
class Counters:
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
    times_emptied: int
    """How often all live trajectories were retired at once."""


COUNTERS = tuple(Counters.__dataclass_fields__)
_words_of = operator.attrgetter(*COUNTERS)


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


class LedgerTable:
    """The arrays of a ledger, and all that is asked of them without its lock; see :class:`Ledger`."""

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
        empty = Counters(*(0 for _ in COUNTERS))
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

    def _read(self) -> Counters:
        while True:
            active = self._active[0]
            counters = self._counters[active & 1].tolist()
            if self._active[0] == active:
                return Counters(*counters)

    def _commit(self, counters: Counters) -> None:
        following = self._active[0] + 1
        keep_order()  # whoever sees the copy change sees that it holds no more
        self._counters[following & 1] = _words_of(counters)
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

    @property
    def times_emptied(self) -> int:
        """How often all live trajectories were retired at once: what was drawn before the last time is stale."""
        while True:
            active = self._active[0]
            count = self._counters[active & 1][_TIMES_EMPTIED]
            if self._active[0] == active:
                return int(count)

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


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


_OLDEST_ID = COUNTERS.index("oldest_id")
_NEXT_ID = COUNTERS.index("next_id")
_TIMES_EMPTIED = COUNTERS.index("times_emptied")
