"""The arrays of the ledger in shared memory, and the lock-free reads of them.

The protocol that makes these reads correct is described in ``ledger.py``.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger.agreements import Agreements, agreement_words
from embodichain_rl.replay.ledger.holds import Holds, hold_words
from embodichain_rl.replay.ledger.live_ids import Lists, LiveIds
from embodichain_rl.replay.ledger.metrics import METRICS_BYTES, Metrics
from embodichain_rl.replay.ledger.priorities import PriorityTree, tree_words
from embodichain_rl.replay.ledger.words import (
    CHANGES,
    COMMIT_COPIES,
    COMMITTED,
    COPY_WORDS,
    COUNTERS,
    FIRST_STRAGGLER,
    GONE,
    HOLES,
    ID,
    IN_PIECES,
    LENGTH,
    LISTS,
    LIVE,
    LONGEST_SEGMENT,
    NEWEST_VERSION,
    NEXT_ID,
    NO_VERSION,
    OLDEST_ID,
    PINNED,
    POLICY_VERSION,
    PUBLISHED_AS,
    PUBLISHED_AT,
    SPARE_WORDS,
    START,
    STEPS_BEFORE,
    STRAGGLERS,
    TICKET,
    Counters,
    Rows,
    words_of,
)
from embodichain_rl.shared import (
    ALIGNMENT,
    BlockSource,
    CrossProcessLock,
    register_for_barriers,
    write_barrier,
)

__all__ = ["JOURNAL_BYTES", "LedgerTable"]

WRITER_SLOTS = 256
"""Number of trajectories that can be written at the same time."""

JOURNAL_BYTES = 16 << 20
"""Size of the journal of changes: the most bytes of one trajectory that can be changed at once. It is address space."""

BYTES_BESIDE = JOURNAL_BYTES + METRICS_BYTES
"""Bytes of the block beside the arrays: the journal and the metrics. Little of it ever takes memory."""


class LedgerTable:
    """The arrays of a ledger and the reads that take no lock; see :class:`Ledger` for the arguments."""

    def __init__(
        self,
        max_trajectories: int,
        max_total_steps: int,
        arena_steps: int,
        *,
        margin: int = 0,
        writer_slots: int = WRITER_SLOTS,
        max_pinned: float = 0.5,
        usual_steps: int | None = None,
        blocks: BlockSource | None = None,
    ) -> None:
        self.max_trajectories = max_trajectories
        self.max_total_steps = max_total_steps
        self.arena_steps = arena_steps
        self.margin = margin
        self.max_pinned = max_pinned
        self.usual_steps = arena_steps if usual_steps is None else usual_steps
        # More rows than live trajectories, so that a retired trajectory keeps its row for a while and reads can finish.
        self.num_rows = max_trajectories + 2 * writer_slots
        self._shapes: dict[str, tuple[int, ...]] = {
            "_active": (1,),
            "_holder": (1,),
            "_counters": (2, len(COUNTERS)),
            "_slots": (writer_slots, 7),
            "_rows": (self.num_rows, 8),
            "_priorities": (tree_words(self.num_rows),),
            "_agreed": agreement_words(),
            "_unusual": (1,),
            "_journal": (5,),
            "_closed": (1,),
            "_pinned": (2, self.num_rows),
            "_holes": (2, self.num_rows),
            "_stragglers": (2, self.num_rows),
            "commit_words": (COMMIT_COPIES + 2 * COPY_WORDS + SPARE_WORDS,),
            "_held": hold_words(),
            "_rooms": (self.num_rows,),
            "_slot_rooms": (writer_slots,),
        }
        nbytes = self.nbytes
        blocks = blocks or BlockSource()
        if blocks.fresh:
            blocks.check_room(nbytes, f"The ledger of {max_trajectories:,} trajectories", "Lower max_trajectories.")
        self._block = blocks.block("ledger", nbytes + BYTES_BESIDE)
        self._map()
        if blocks.fresh:
            self._block.back(0, nbytes)  # not the journal and the metrics, whose room is taken where they are used
            self._start_empty()

    def _start_empty(self) -> None:
        self._slots[:, TICKET] = -1
        self._rows[:, ID] = -1
        self._commit(self.empty_counters())
        if not self.holds.identity:
            self.holds.identify()

    def empty_counters(self) -> Counters:
        """Return the counters of a ledger that nothing was written to."""
        empty = Counters(*(0 for _ in COUNTERS))
        empty.high_water = self.max_total_steps
        empty.gap_end = self.max_total_steps
        empty.newest_version = NO_VERSION
        return empty

    @property
    def nbytes(self) -> int:
        """Bytes that the ledger takes at most, without the journal and the metrics."""
        return sum(_aligned(8 * math.prod(shape)) for shape in self._shapes.values())

    @property
    def nbytes_used(self) -> int:
        """Bytes of the pages that were written so far, without the journal and the metrics."""
        return min(self._block.nbytes_used, self.nbytes)

    rooms_vary = False
    """Whether a region may be larger than its trajectory and the margin; see :meth:`Ledger.reserve`."""

    def resize(self, max_total_steps: int, arena_steps: int, usual_steps: int, *, rooms_vary: bool = False) -> None:
        """Set the sizes in steps, in this process, where they depend on the schema. Every process must call this."""
        self.rooms_vary = rooms_vary
        self.max_total_steps, self.arena_steps, self.usual_steps = max_total_steps, arena_steps, usual_steps

    def _map(self) -> None:
        offset = 0
        for name, shape in self._shapes.items():
            setattr(self, name, self._block.array(np.int64, shape, offset))
            offset += _aligned(8 * math.prod(shape))
        self._journalled = self._block.array(np.uint8, (JOURNAL_BYTES,), offset)
        metrics_offset = offset + JOURNAL_BYTES
        self._row_ids = self._rows[:, ID]  # for indexing: take() would copy the whole column first
        self._published_at = self._rows[:, PUBLISHED_AT]
        self._lists: tuple[int, Lists] = 0, Lists(self._pinned[0, :0], self._holes[0, :0], self._stragglers[0, :0])
        self.priorities = PriorityTree(self._priorities.view(np.float64))
        self._lock = CrossProcessLock(self._block, self._holder)
        self.agreements = Agreements(self._agreed, self._lock)
        self.name_no_more: Callable[[int, Lists], None] | None = None
        self.holds = Holds(self._held, self._lock)
        self.metrics = Metrics(self._block, metrics_offset, self._lock)
        register_for_barriers()

    _active: np.ndarray
    _holder: np.ndarray
    _counters: np.ndarray
    _slots: np.ndarray
    _rows: np.ndarray
    _published_at: np.ndarray
    _priorities: np.ndarray
    _agreed: np.ndarray
    _held: np.ndarray
    _rooms: np.ndarray
    _slot_rooms: np.ndarray
    _unusual: np.ndarray
    _journal: np.ndarray
    _closed: np.ndarray
    _pinned: np.ndarray
    _holes: np.ndarray
    _stragglers: np.ndarray
    commit_words: np.ndarray

    def __getstate__(self) -> dict[str, Any]:
        views = {"_lists", "memory", "_left", "_journalled", "_row_ids", "_published_at"}
        rebuilt = {"_lock", "priorities", "agreements", "holds", "metrics", "name_no_more", *views, *self._shapes}
        return {name: value for name, value in self.__dict__.items() if name not in rebuilt}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    # ------------------------------------------------------------------------------------------------ counters

    def _read_counters(self) -> Counters:
        """Return the counters; read again if a commit happened meanwhile."""
        while True:
            active = self._active[0]
            counters = self._counters[active & 1].tolist()
            if self._active[0] == active:
                return Counters(*counters)

    def _commit(self, counters: Counters) -> None:
        """Make a prepared change take effect, with one atomic store. Inside the lock."""
        following = self._active[0] + 1
        write_barrier()  # a reader that sees this copy change also sees that it is no longer the valid one
        self._counters[following & 1] = words_of(counters)
        write_barrier()
        self._active[0] = following

    @property
    def changes(self) -> int:
        """Number of changes that were ever committed."""
        return int(self._active[0])

    @property
    def row_words(self) -> int:
        """Number of words of a row."""
        return self._rows.shape[1]

    def last_commit(self) -> np.ndarray:
        """Return what is known of the last commit record, a view of ``COPY_WORDS`` words; see the room ``durable``."""
        begin = COMMIT_COPIES + COPY_WORDS * (self.commit_words.item(COMMITTED) & 1)
        return self.commit_words[begin : begin + COPY_WORDS]

    def __len__(self) -> int:
        """Return the number of live trajectories."""
        while True:
            active = self._active[0]
            live = self._counters[active & 1][LIVE]
            if self._active[0] == active:
                return int(live)

    @property
    def num_steps(self) -> int:
        """Number of steps of all live trajectories."""
        return self._read_counters().live_steps

    @property
    def steps_written(self) -> int:
        """Number of steps published since the counter was last set; see :meth:`Ledger.count_steps_from`."""
        return self._read_counters().steps_written

    @property
    def steps_published(self) -> int:
        """Number of steps ever published."""
        return self._read_counters().steps_published

    def stats(self) -> dict[str, int]:
        """Return the counters of the ledger by name."""
        counters = self._read_counters()
        return {
            "trajectories": counters.live,
            "steps": counters.live_steps,
            "published": counters.next_id - counters.skipped,
            "evicted": counters.next_id - counters.skipped - counters.live - counters.discarded,
            "evicted_early": counters.evicted_early,
            "pinned": counters.pinned,
            "discarded": counters.discarded,
            "reclaimed": counters.reclaimed,
            "writing": int(np.count_nonzero(self._being_written())),
        }

    def _being_written(self) -> np.ndarray:
        """Return a mask of the slots whose trajectory is whole and being written."""
        written: np.ndarray = (self._slots[:, TICKET] >= 0) & (self._slots[:, PUBLISHED_AS] != IN_PIECES)
        return written

    @property
    def times_emptied(self) -> int:
        """How often all live trajectories were retired at once: what was drawn before the last time is stale."""
        return self._read_counters().times_emptied

    @property
    def edits(self) -> tuple[int, int, int]:
        """Return three counts, one of which grows whenever what was drawn before must not be used any more.

        They count how often all trajectories were retired at once, the discarded trajectories and the relabelled ones.
        """
        counters = self._read_counters()
        return counters.times_emptied, counters.discarded, self.relabelled

    @property
    def relabelled(self) -> int:
        """Number of times that the steps of a published trajectory were changed."""
        return max(0, int(self._unusual[0]) - 1)

    @property
    def closed(self) -> bool:
        """Whether the ledger was closed: it stays empty."""
        return bool(self._closed[0])

    @property
    def plain(self) -> bool:
        """Whether nothing was ever pinned, discarded or relabelled: live ids are a range, and rows never change.

        A reader that relies on it must ask before it draws, and again after its copy.
        """
        return self._unusual.item(0) == 0

    # ------------------------------------------------------------------------------------------------- readers

    def addresses(self) -> list[int]:
        """Return where a reader in this process finds the ledger's words, as the compiled kernels take it.

        Returns:
            The addresses of ``active``, of the counters and of the rows; the number of words of a copy of the counters,
            and the places of ``oldest_id``, ``next_id`` and ``newest_version`` in it; and the number of rows.
        """
        arrays = [array.ctypes.data for array in (self._active, self._counters, self._rows)]
        return [*arrays, len(COUNTERS), OLDEST_ID, NEXT_ID, NEWEST_VERSION, self.num_rows]

    def live(self) -> LiveIds:
        """Return the ids of the live trajectories."""
        while True:
            active = self._active.item(0)
            counters = self._counters[active & 1]
            oldest, end, lists = counters.item(OLDEST_ID), counters.item(NEXT_ID), counters.item(LISTS)
            if not lists:
                if self._active.item(0) == active:
                    return LiveIds(oldest, end)
                continue
            known, found = self._lists
            if known != lists:
                copy = lists & 1
                found = Lists(
                    self._pinned[copy, : counters.item(PINNED)].copy(),
                    self._holes[copy, : counters.item(HOLES)].copy(),
                    self._stragglers[copy, : counters.item(STRAGGLERS)].copy(),
                )
            first_straggler = counters.item(FIRST_STRAGGLER)
            if self._active.item(0) == active:
                self._lists = lists, found
                return LiveIds.of(oldest, end, found, first_straggler)

    def pinned_ids(self) -> np.ndarray:
        """Return the ids of the pinned trajectories, ascending, ``int64`` ``[n]``."""
        self.live()
        return self._lists[1].pinned

    def live_range(self) -> tuple[int, int]:
        """Return ``(oldest, end)``: the live ids are ``[oldest, end)``, but for what :meth:`live` makes of it."""
        while True:
            active = self._active[0]
            counters = self._counters[active & 1]
            oldest, end = counters[OLDEST_ID], counters[NEXT_ID]
            if self._active[0] == active:
                return int(oldest), int(end)

    def rows_of(self, ids: np.ndarray) -> Rows:
        """Return the rows of the trajectories ``ids``. Those that no longer exist have the length ``GONE``.

        A returned row is consistent. Its id was written by the publication, before this call, and it is still there
        after the row was read.

        Args:
            ids: ``int64`` ``[n]``, ids of published trajectories.
        """
        at = ids % self.num_rows
        rows = self._rows.take(at, axis=0)
        held = self._row_ids[at] == ids
        starts, lengths = rows[:, START], rows[:, LENGTH]
        changes = rows[:, CHANGES]
        if self._unusual.item(0) > 1:
            held &= (changes & 1) == 0  # an odd one is just being relabelled
        if np.count_nonzero(held) < len(held):
            starts, lengths = np.where(held, starts, 0), np.where(held, lengths, GONE)
        return Rows(
            ids, starts, lengths, rows[:, LONGEST_SEGMENT], rows[:, POLICY_VERSION], rows[:, PUBLISHED_AT], changes
        )

    def published(self, ids: np.ndarray) -> np.ndarray:
        """Return a mask of the numbers that are ids of published trajectories, live or not."""
        return (ids >= 0) & (ids < self.live_range()[1])

    def still_valid(self, ids: np.ndarray) -> np.ndarray:
        """Return a mask of the trajectories whose data stayed intact since their rows were read.

        Call this after the copy. Data copied from a trajectory outside the mask must be discarded.
        """
        return self._row_ids[ids % self.num_rows] == ids

    def unchanged(self, rows: Rows) -> np.ndarray:
        """Return a mask of the trajectories whose data stayed intact, and was not relabelled, since ``rows`` were read.

        As :meth:`still_valid`, for copies of steps or values that :meth:`Ledger.relabel` may change.
        """
        at = rows.ids % self.num_rows
        valid: np.ndarray = self._row_ids[at] == rows.ids
        if self._unusual.item(0) > 1:
            changes = self._rows[at, CHANGES]
            valid &= (changes == rows.changes) & ((changes & 1) == 0)
        return valid

    def live_rows(self) -> Rows:
        """Return the rows of all live trajectories, oldest first. The cost grows with their number."""
        return self.existing(self.live().all())

    def existing(self, ids: np.ndarray) -> Rows:
        """Return the rows of those of the trajectories ``ids`` that still exist."""
        rows = self.rows_of(ids)
        exists = rows.lengths >= 0
        return rows if exists.all() else rows.select(exists)

    def published_at(self, ids: np.ndarray) -> np.ndarray:
        """Return the publication times of trajectories, in nanoseconds of ``time.monotonic_ns``."""
        return self._published_at[ids % self.num_rows]

    def live_since(self, moment: int, live: LiveIds) -> LiveIds:
        """Return those of the ids ``live`` that were published at ``moment`` or later.

        Args:
            moment: time in nanoseconds of ``time.monotonic_ns``.
            live: ids of trajectories.
        """

        def published_at(position: int) -> int:
            return int(self._published_at[live.at(np.array(position)) % self.num_rows])

        return live.without_first(bisect.bisect_left(range(len(live)), moment, key=published_at))

    def steps_before(self, ids: np.ndarray) -> np.ndarray:
        """Return the number of steps that were published before each of the trajectories ``ids``."""
        return self._rows[ids % self.num_rows, STEPS_BEFORE]

    @property
    def newest_policy_version(self) -> int:
        """The highest policy version of any live trajectory; ``NO_VERSION`` if none has one."""
        while True:
            active = self._active.item(0)
            version = self._counters.item(active & 1, NEWEST_VERSION)
            if self._active.item(0) == active:
                return version

    def ids_at(self, rows: np.ndarray) -> np.ndarray:
        """Return the ids in the rows with the given numbers; -1 for a row without a trajectory."""
        return self._row_ids[rows]

    def weights_of(self, ids: np.ndarray) -> np.ndarray:
        """Return the weights of the trajectories ``ids``, ``float64`` ``[n]``; see :meth:`Ledger.prioritize`."""
        return self.priorities.weights(ids % self.num_rows)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
