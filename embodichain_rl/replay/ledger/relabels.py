"""Changes of steps that are published already: a reader sees the old values of a trajectory, or the new ones.

**A row is also a seqlock whose version is its count of changes.** The count is odd while the values are written. A
reader that finds an odd count does not draw the trajectory. A reader that finds another count after its copy than
before discards the copy (:meth:`LedgerTable.unchanged`).

**A journal makes the change atomic.** The new bytes are first written to a journal in the memory of the ledger. One
store marks it as complete. A process that is killed before this store has changed nothing. If it is killed after it,
the next one that reserves a region, or that takes the lock for a read, copies the bytes once more. A region can only be
reused after a reservation, so the journal never writes to the steps of another trajectory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from embodichain_rl.replay.ledger.members import LedgerMembers
from embodichain_rl.replay.ledger.words import (
    CHANGES,
    ID,
)
from embodichain_rl.shared import write_barrier

__all__ = ["LedgerRelabels"]

STATE, TRAJECTORY, TARGET, OFFSET, NBYTES = range(5)
EMPTY, COMPLETE = range(2)


class LedgerRelabels(LedgerMembers):
    """A ledger whose published trajectories can be changed; see :class:`Ledger`."""

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Hold the lock, so that no trajectory changes its state; for a reader that must see all live trajectories."""
        with self._lock:
            self._end_change()
            yield

    def relabel(self, number: int, target: int, offset: int, new: np.ndarray) -> bool:
        """Replace some bytes of a trajectory; return whether it was live, and so has them.

        Args:
            number: its id.
            target: which element of :attr:`memory` they are in.
            offset: the first of them there.
            new: the new bytes, ``uint8`` ``[n]``, at most ``JOURNAL_BYTES``.
        """
        with self._lock:
            self._end_change()
            if not self.live().contains(np.array([number])).all():
                return False
            journal = self._journal
            self._block.back(self.nbytes, len(new))
            self._journalled[: len(new)] = new
            journal[TRAJECTORY], journal[TARGET], journal[OFFSET], journal[NBYTES] = number, target, offset, len(new)
            self._unusual[0] = max(1, self._unusual[0]) + 1
            write_barrier()
            journal[STATE] = COMPLETE
            self._end_change()
            return True

    def take_journal(self, nbytes: int) -> None:
        """Take room for so many bytes in the journal, where it is in a file.

        Raises:
            DiskFullError: if the disk has no room left.
        """
        self._block.back(self.nbytes, nbytes)

    def end_change(self) -> None:
        """End a change whose process was killed, if there is one. This takes the lock only then."""
        if self._journal[STATE] == COMPLETE:
            with self._lock:
                self._end_change()

    def _end_change(self) -> None:
        """Make the change in the journal, if there is one. It can be made any number of times."""
        journal = self._journal
        if journal[STATE] != COMPLETE or not self.memory:
            return
        _, number, target, offset, nbytes = journal.tolist()
        row = self._rows[number % self.num_rows]
        if row[ID] == number:
            begun = row[CHANGES] | 1
            row[CHANGES] = begun
            write_barrier()
            self.memory[target][offset : offset + nbytes] = self._journalled[:nbytes]
            write_barrier()
            row[CHANGES] = begun + 1
        write_barrier()
        journal[STATE] = EMPTY
