"""Room on the disk for the steps of an arena in a file, taken ahead of their first write."""

from __future__ import annotations

from collections.abc import Sequence

from embodichain_rl.errors import DiskFullError
from embodichain_rl.shared import SharedBlock

__all__ = ["Backing"]

AHEAD = 32 << 20
"""Room is taken in pieces of about this size, in bytes."""


class Backing:
    """Room for the steps of an arena, from the first one up to :attr:`end`.

    Regions are taken from below, so one number says which steps have room. Each process has its own: to take room that
    is there already changes nothing.

    Args:
        block: the file of the arena.
        columns: byte offset of each column, and bytes of one step; see :func:`arena_columns`.
        steps: number of steps in the arena.

    Attributes:
        end (int): end of the steps that have room for sure, exclusive.
    """

    def __init__(self, block: SharedBlock, columns: Sequence[tuple[int, int]], steps: int) -> None:
        self._block, self._columns, self._steps = block, columns, steps
        self._ahead = AHEAD // max(1, sum(nbytes for _, nbytes in columns))
        self.end = 0

    def reach(self, end: int) -> None:
        """Take room for all steps below ``end``.

        Raises:
            DiskFullError: if the disk has no room left.
        """
        try:
            self._take(min(self._steps, max(end, self.end + self._ahead)))
        except DiskFullError:
            self._take(end)

    def _take(self, end: int) -> None:
        for offset, nbytes in self._columns:
            self._block.back(offset + self.end * nbytes, (end - self.end) * nbytes)
        self.end = end
