"""The ids of the live trajectories at one moment, also where they are not consecutive."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Lists", "LiveIds"]

_NONE = np.empty(0, dtype=np.int64)


class Lists(NamedTuple):
    """The lists of a ledger, each of ascending ids, ``int64`` ``[n]``; see :mod:`.members`."""

    pinned: np.ndarray
    holes: np.ndarray
    stragglers: np.ndarray


class LiveIds:
    """The live ids in ascending order: some that are kept, and all of a range but for its holes.

    Without pinned and discarded trajectories they are the range ``[oldest, end)``. A trajectory is *kept* if it is live
    although the range has moved past it. A *hole* is an id of the range that is not live.

    Args:
        oldest: first id of the range.
        end: end of the range, exclusive.
        kept: the live ids below ``oldest``, ascending, ``int64`` ``[k]``.
        holes: the ids of the range that are not live, ascending, ``int64`` ``[h]``.

    Example:
        >>> live = LiveIds(10, 15, kept=np.array([3]), holes=np.array([11, 12]))
        >>> len(live), live.all().tolist(), live.at(np.array([0, 2])).tolist()
        (4, [3, 10, 13, 14], [3, 13])
        >>> live.contains(np.array([3, 4, 11, 14])).tolist()
        [True, False, False, True]
    """

    __slots__ = ("_before", "end", "holes", "kept", "oldest")

    def __init__(self, oldest: int, end: int, kept: np.ndarray = _NONE, holes: np.ndarray = _NONE) -> None:
        self.oldest, self.end, self.kept, self.holes = oldest, end, kept, holes
        # For each hole the number of live ids of the range before it.
        self._before = holes - oldest - np.arange(len(holes)) if len(holes) else _NONE

    @classmethod
    def of(cls, oldest: int, end: int, lists: Lists, first_straggler: int) -> LiveIds:
        """Return the live ids by the counters and the lists of a ledger."""
        pinned, holes, stragglers = lists
        kept = pinned[: np.searchsorted(pinned, oldest)]
        left = stragglers[first_straggler:]
        if len(left):
            kept = np.union1d(kept, left) if len(kept) else left
        return cls(oldest, end, kept, holes[slice(*np.searchsorted(holes, [oldest, end]))])

    @property
    def consecutive(self) -> bool:
        """Whether the live ids are the range ``[oldest, end)``."""
        return not len(self.kept) and not len(self.holes)

    def __len__(self) -> int:
        return len(self.kept) + self.end - self.oldest - len(self.holes)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Return the ids at some positions, 0 for the oldest; ``int64`` of the shape of ``positions``."""
        ids: np.ndarray = positions + (self.oldest - len(self.kept))
        if len(self.holes):
            ids += np.searchsorted(self._before, positions - len(self.kept), side="right")
        if len(self.kept):
            ids = np.where(positions < len(self.kept), self.kept[np.minimum(positions, len(self.kept) - 1)], ids)
        return ids

    def all(self) -> np.ndarray:
        """Return all ids, ``int64`` ``[n]``."""
        ids = np.arange(self.oldest, self.end)
        if len(self.holes):
            ids = np.delete(ids, self.holes - self.oldest)
        return np.concatenate([self.kept, ids]) if len(self.kept) else ids

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return a mask of the numbers that are live ids."""
        live: np.ndarray = (ids >= self.oldest) & (ids < self.end)
        if len(self.holes):
            live &= ~np.isin(ids, self.holes)
        if len(self.kept):
            live |= np.isin(ids, self.kept)
        return live

    def without_first(self, count: int) -> LiveIds:
        """Return the ids but for the ``count`` first ones."""
        if count <= len(self.kept):
            return LiveIds(self.oldest, self.end, self.kept[count:], self.holes)
        oldest = int(self.at(np.array([count]))[0]) if count < len(self) else self.end
        return LiveIds(oldest, self.end, holes=self.holes[self.holes >= oldest])
