"""The memory of the gaps of a buffer, given back where they take too much of it."""

from __future__ import annotations

from collections.abc import Sequence

from embodichain_rl.shared import SharedBlock

__all__ = ["Gaps"]

MOST = 1.1
"""Memory that may be taken, as a multiple of what was announced, before that of the gaps is given back."""

PAGE = 4096


class Gaps:
    """The free steps between the regions of an arena that has more address space than memory; see :class:`Sizing`.

    A trajectory may be so long that no gap is wide enough for it. Then its region is taken from further above, and the
    pages of the gaps below it take memory without use. Nothing is moved: the pages are given back, and taken again when
    a gap is used.

    Args:
        block: the memory of the arena.
        columns: byte offset of each column, and bytes of one step; see :func:`arena_columns`.
        announced: bytes of the arena that were announced.
    """

    def __init__(self, block: SharedBlock, columns: Sequence[tuple[int, int]], announced: int) -> None:
        self._block, self._columns = block, columns
        self._most = self._next = int(MOST * announced)
        self._tolerance = announced // 64

    @property
    def too_large(self) -> bool:
        """Whether more memory is taken than was announced, with some tolerance."""
        return self._block.nbytes_used > self._next

    def given_back(self) -> None:
        """Note that all gaps were given back, so that it is not done at every write if they are smaller than pages."""
        self._next = max(self._most, self._block.nbytes_used + self._tolerance)

    def give_back(self, begin: int, end: int) -> None:
        """Give the pages back that have only steps ``[begin, end)``, of all columns."""
        for offset, nbytes in self._columns:
            first = -(-(offset + begin * nbytes) // PAGE) * PAGE
            self._block.give_back(first, (offset + end * nbytes) // PAGE * PAGE - first)
