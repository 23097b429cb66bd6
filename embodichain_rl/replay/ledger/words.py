"""The words of a ledger: what the columns of its arrays mean, and the counters that change together."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

__all__ = [
    "CHANGES",
    "COMMITTED",
    "COMMIT_COPIES",
    "COPY_WORDS",
    "COUNTERS",
    "END",
    "FIRST_STRAGGLER",
    "FLOOR",
    "GONE",
    "HOLES",
    "ID",
    "IN_PIECES",
    "LENGTH",
    "LISTS",
    "LIVE",
    "LONGEST_SEGMENT",
    "NEWEST_VERSION",
    "NEXT_ID",
    "NO_VERSION",
    "OLDEST_ID",
    "PID",
    "PINNED",
    "POLICY_VERSION",
    "PROCESS_START",
    "PUBLISHED_AS",
    "PUBLISHED_AT",
    "SINCE",
    "SLOT_LENGTH",
    "SLOT_START",
    "SPARE_WORDS",
    "START",
    "STEPS_BEFORE",
    "STRAGGLERS",
    "TICKET",
    "UPCOMING_END",
    "Counters",
    "Rows",
    "words_of",
]

# Columns of a row. A row belongs to trajectory ``id`` while its first word is ``id``.
ID, START, LENGTH, LONGEST_SEGMENT, STEPS_BEFORE, POLICY_VERSION, PUBLISHED_AT, CHANGES = range(8)

# Words of a ledger in a file, for the room ``durable``: up to which id the commit record that is being written names
# trajectories; and two copies of what is known of the last one, of which the lowest bit of COMMITTED selects the valid
# one. It names the trajectories [FLOOR, END).
UPCOMING_END, COMMITTED, COMMIT_COPIES = range(3)
FLOOR, END = range(2)
COPY_WORDS, SPARE_WORDS = 8, 8

NO_VERSION = -1
"""The policy version of a trajectory whose writer gave none."""

# Columns of a writer slot. A slot is in use while its first word is not -1. PUBLISHED_AS is -1 until the writer enters
# publish(), and then the id that its trajectory gets.
TICKET, PID, PROCESS_START, SINCE, SLOT_START, SLOT_LENGTH, PUBLISHED_AS = range(7)

IN_PIECES = -2
"""What ``PUBLISHED_AS`` is while a trajectory is written piece by piece, so that its length is not known yet."""


@dataclass(slots=True)
class Counters:
    """The counters that change together, with one flip of ``active``."""

    next_ticket: int
    """Number of the next reservation."""
    next_id: int
    """Id of the next trajectory that is published."""
    oldest_id: int
    """The ids ``[oldest_id, next_id)`` are live, but for the holes. Of the lower ids, those of
    pinned trajectories and of stragglers are."""
    live: int
    """Number of live trajectories."""
    live_steps: int
    """Number of steps of all live trajectories."""
    gap_start: int
    """First step of the current free gap."""
    gap_end: int
    """End of the current free gap, exclusive."""
    high_water: int
    """High-water mark: the end of the part of the arena that is in use. The head-room beyond it is untouched memory."""
    steps_written: int
    """Number of steps published since this counter was last set; see :meth:`Ledger.count_steps_from`."""
    steps_published: int
    """Number of steps ever published. It is never set back, so that ``STEPS_BEFORE`` grows with the ids."""
    newest_version: int
    """Highest policy version of any live trajectory; ``NO_VERSION`` if none has one."""
    newest_version_id: int
    """Id of the newest live trajectory with that version."""
    evicted_early: int
    """Number of trajectories that were evicted within the limits, because the head-room was used up."""
    reclaimed: int
    """Number of reservations that were reclaimed from dead processes."""
    times_emptied: int
    """Number of times that all live trajectories were retired at once."""
    pinned: int
    """Number of pinned trajectories: the length of the list of their ids."""
    pinned_steps: int
    """Number of steps of the pinned trajectories."""
    holes: int
    """Length of the list of holes: ids from some ``oldest_id`` on that are not live, though it has not passed them."""
    stragglers: int
    """Length of the list of stragglers: ids below ``oldest_id`` that are live and not pinned."""
    first_straggler: int
    """Position of the first of them that was not evicted."""
    lists: int
    """Number of times that the three lists were replaced. The lowest bit selects their valid copy."""
    skipped: int
    """Number of ids that were never assigned, because their row belongs to a live trajectory."""
    discarded: int
    """Number of trajectories that were discarded while they were live."""


COUNTERS = tuple(Counters.__dataclass_fields__)
words_of = operator.attrgetter(*COUNTERS)


class Rows(NamedTuple):
    """Rows of some trajectories, as ``int64`` arrays of the same length."""

    ids: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    """Number of steps; ``GONE`` if the trajectory no longer exists."""
    longest_segments: np.ndarray
    """Length of the longest segment, in steps; the length of the trajectory if it has no segments."""
    policy_versions: np.ndarray
    """Number of updates of the policy that chose the last action; ``NO_VERSION`` if unknown."""
    published_at: np.ndarray
    """Time of publication, in nanoseconds of ``time.monotonic_ns``."""
    changes: np.ndarray
    """Number of changes by :meth:`Ledger.relabel` that were begun and ended, two for each; see
    :meth:`LedgerTable.unchanged`."""

    def select(self, which: np.ndarray) -> Rows:
        """Return the rows at ``which``, an index array or a mask."""
        return Rows(*(column[which] for column in self))

    def replace(self, at: np.ndarray, new: Rows) -> Rows:
        """Return a copy of the rows in which those at the indices ``at`` are replaced by ``new``."""
        columns = [column.copy() for column in self]
        for column, values in zip(columns, new, strict=True):
            column[at] = values
        return Rows(*columns)


GONE = -(2**40)
"""Length that stands for a trajectory that no longer exists. It is negative, so that no chunk fits into it."""

# The places of some counters in a copy of them.
OLDEST_ID = COUNTERS.index("oldest_id")
NEXT_ID = COUNTERS.index("next_id")
NEWEST_VERSION = COUNTERS.index("newest_version")
LIVE = COUNTERS.index("live")
PINNED = COUNTERS.index("pinned")
HOLES = COUNTERS.index("holes")
STRAGGLERS = COUNTERS.index("stragglers")
FIRST_STRAGGLER = COUNTERS.index("first_straggler")
LISTS = COUNTERS.index("lists")
