"""Holds: readers that every trajectory must reach before it is evicted, such as a recorder.

A hold has the id of the first trajectory that its reader has not read. A writer whose trajectory would evict one that
is held waits before it reserves a region: back-pressure in place of a gap in the recording. A hold ends with its
process, so nobody waits for the dead.
"""

from __future__ import annotations

import secrets

import numpy as np

from embodichain_rl.errors import SharingError
from embodichain_rl.shared import CrossProcessLock, process_is_alive

__all__ = ["Holds", "hold_words"]

HOLDS = 8
"""Number of readers that can hold trajectories at the same time."""

USED, IDENTITY = range(2)  # words of the header
PID, PROCESS_START, NEXT_ID = range(3)  # columns of a hold


def hold_words() -> tuple[int, int]:
    """Return the shape of the ``int64`` array that :class:`Holds` needs."""
    return 1 + HOLDS, 4


class Holds:
    """The readers that trajectories of a ledger wait for.

    Args:
        table: ``int64``, in shared memory, of the shape :func:`hold_words`; zeros at first. The process id is the last
            word of a hold that is written, and the first that is cleared.
        lock: of the ledger.
    """

    def __init__(self, table: np.ndarray, lock: CrossProcessLock) -> None:
        self._header, self._rows, self._lock = table[0], table[1:], lock

    @property
    def any(self) -> bool:
        """Whether there may be a hold."""
        return self._header.item(USED) > 0

    def identify(self) -> None:
        """Give the ledger a number of its own; once, when it is created."""
        self._header[IDENTITY] = secrets.randbits(62)

    @property
    def identity(self) -> int:
        """A random number that tells this ledger from others."""
        return int(self._header[IDENTITY])

    def claim(self, next_id: int, pid: int, start: int) -> int:
        """Hold all trajectories from ``next_id`` on for a process; return the number of the hold.

        Raises:
            SharingError: when there are too many.
        """
        with self._lock:
            for number, row in enumerate(self._rows):
                if row[PID] == 0 or not process_is_alive(int(row[PID]), int(row[PROCESS_START])):
                    row[PID] = 0
                    row[PROCESS_START], row[NEXT_ID] = start, next_id
                    row[PID] = pid
                    self._count()
                    return number
        raise SharingError(f"{HOLDS} recorders read this buffer, which is the limit. Stop one of them first.")

    def pass_on(self, number: int, pid: int, start: int) -> None:
        """Give a hold to another process."""
        with self._lock:
            row = self._rows[number]
            row[PID] = 0
            row[PROCESS_START] = start
            row[PID] = pid

    def advance(self, number: int, next_id: int) -> None:
        """Let the trajectories before ``next_id`` be evicted. Takes no lock: only the holder calls it."""
        self._rows[number, NEXT_ID] = next_id

    def release(self, number: int) -> None:
        """End a hold."""
        with self._lock:
            self._rows[number, PID] = 0
            self._count()

    def first_held(self, *, look: bool = False) -> int | None:
        """Return the first trajectory that is held; None if none is.

        Args:
            look: whether to look which holders are alive, and to end the holds of the others. Inside the lock.
        """
        if look:
            for row in self._rows:  # views
                if row[PID] and not process_is_alive(int(row[PID]), int(row[PROCESS_START])):
                    row[PID] = 0
            self._count()
        held = self._rows[self._rows[:, PID] > 0, NEXT_ID]
        return int(held.min()) if len(held) else None

    def _count(self) -> None:
        self._header[USED] = np.count_nonzero(self._rows[:, PID])
