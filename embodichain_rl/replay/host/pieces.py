"""A region of the arena in which a trajectory is written piece by piece."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence

import numpy as np

from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.backing import Backing
from embodichain_rl.replay.ledger import Ledger, Reservation

__all__ = ["RegionInPieces"]


class RegionInPieces:
    """The steps of an unfinished trajectory, where they stay when it is published.

    So a long trajectory takes its memory once, and is copied once. The region is given back by :meth:`give_back`, when
    the last reference to it is gone, or when its process ends.

    Args:
        ledger: that of the arena.
        arena: where the steps are written.
        backing: takes room on the disk; None without a file.
        reservation: what :meth:`Ledger.reserve_pieces` returned.

    Attributes:
        arena (Arena): the given arena.
        steps (int): number of steps that were written.
    """

    def __init__(self, ledger: Ledger, arena: Arena, backing: Backing | None, reservation: Reservation) -> None:
        self._ledger, self._backing = ledger, backing
        self.arena = arena
        self.steps = 0
        self._hold(reservation)

    def _hold(self, reservation: Reservation) -> None:
        self._reservation = reservation
        # Not by give_back(): a finalizer may run while this thread holds the lock.
        self._finalizer = weakref.finalize(self, _release, self._ledger, reservation, os.getpid())
        self._finalizer.atexit = False

    def append(self, piece: Sequence[np.ndarray]) -> bool:
        """Write the next steps; return whether there was room for them. If not, nothing has changed.

        Args:
            piece: one array ``[n, *shape]`` per field.
        """
        end = self.steps + len(piece[0])
        if end > self._reservation.length and not self._make_room(end):
            return False
        self._write(self.steps, piece)
        self.steps = end
        return True

    def overwrite_last(self, step: Sequence[np.ndarray]) -> None:
        """Overwrite the last step.

        Args:
            step: one array ``[1, *shape]`` per field.
        """
        self._write(self.steps - 1, step)

    def _write(self, at: int, piece: Sequence[np.ndarray]) -> None:
        begin = self._reservation.start + at
        end = begin + len(piece[0]) + self._ledger.margin
        if self._backing is not None and end > self._backing.end:
            self._backing.reach(end)
        self.arena.write(begin, [piece])

    def _make_room(self, steps: int) -> bool:
        """Grow, or move to a larger region; return whether there are ``steps`` steps now."""
        most = self._ledger.max_total_steps
        for length in (min(most, 2 * steps), min(most, steps + steps // 8)):
            grown = self._ledger.grow(self._reservation, length)
            if grown is not None:
                self._finalizer.detach()
                self._hold(grown)
                return True
            other = self._ledger.reserve_pieces(length)
            if other is not None:
                written = self.piece()
                self._finalizer.detach()
                before = self._reservation
                self._hold(other)
                self._write(0, written)
                self._ledger.give_back(before)
                return True
        return False

    def piece(self) -> list[np.ndarray]:
        """Return all written steps, one array ``[steps, *shape]`` per field. They are views of the arena."""
        return self.arena.views(self._reservation.start, self.steps)

    def end(self) -> tuple[Reservation, int | None]:
        """End the trajectory, and give the rest of its region back.

        Returns:
            The region, to be published; and the length of the longest segment, None without segments.
        """
        self._finalizer.detach()
        self._hold(self._ledger.end_pieces(self._reservation, self.steps))
        start = self._reservation.start
        return self._reservation, self.arena.mark_segments(start, start + self.steps)

    def give_back(self) -> None:
        """Give the region back. Does nothing if its trajectory was published."""
        self._finalizer.detach()
        self._ledger.give_back(self._reservation)


def _release(ledger: Ledger, reservation: Reservation, owner: int) -> None:
    if os.getpid() == owner:  # a forked child has a copy of the region's object
        ledger.release(reservation)
