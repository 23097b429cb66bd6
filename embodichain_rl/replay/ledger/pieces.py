"""Regions of trajectories that are written piece by piece, whose length is not known before their end.

A region is reserved for more steps than are there yet, and grows where the steps behind it are free. Its rest is given
back when the trajectory is whole. These regions never let a trajectory be evicted, and all of them together take no
more than the address space that the arena has for what is being written: where that is used up, the writer keeps the
pieces itself. A region is reclaimed with its process, as every reservation.
"""

from __future__ import annotations

import time

import numpy as np

from embodichain_rl.replay.ledger.space import LedgerSpace, Reservation
from embodichain_rl.replay.ledger.words import IN_PIECES, PID, PUBLISHED_AS, SLOT_LENGTH, TICKET, Counters
from embodichain_rl.shared import own_process

__all__ = ["LedgerPieces"]


class LedgerPieces(LedgerSpace):
    """A ledger that reserves regions for trajectories whose length is not known yet; see :class:`Ledger`."""

    def reserve_pieces(self, length: int) -> Reservation | None:
        """Reserve a region for a trajectory that may get ``length`` steps; None if there is no room for that.

        There is none in a ledger whose ``rooms_vary``.

        It must be ended with :meth:`Ledger.end_pieces` before it is published, or be given back.
        """
        if self.rooms_vary:
            return None
        room = length + self.margin
        with self._lock:
            self.check_open()
            self._end_change()
            counters = self._read_counters()
            self._reclaim_dead_writers(counters)
            tickets = self._slots[:, TICKET]
            slots_in_pieces, steps = self._in_pieces()
            number = int(tickets.argmin())
            if (
                tickets[number] >= 0
                or slots_in_pieces >= len(tickets) // 2
                or steps + room > self._most_in_pieces
                or (counters.gap_end - counters.gap_start < room and not self._open_gap(counters, room))
            ):
                self._commit(counters)  # keeps the counts of reclaimed reservations
                return None
            reservation = Reservation(counters.next_ticket, counters.gap_start, length, number, room)
            slot = self._slots[number]
            slot[PID:] = (*own_process(), time.monotonic_ns(), reservation.start, length, IN_PIECES)
            self._slot_rooms[number] = room
            slot[TICKET] = reservation.ticket
            counters.gap_start += room
            counters.next_ticket += 1
            self._commit(counters)
            return reservation

    def grow(self, reservation: Reservation, length: int) -> Reservation | None:
        """Let a region have ``length`` steps, more than before, if the steps behind it are free; else return None."""
        with self._lock:
            slot = self._slot_of(reservation)
            counters = self._read_counters()
            more = length - reservation.length
            if counters.gap_start != reservation.start + reservation.length + self.margin:
                return None
            if self._in_pieces()[1] + more > self._most_in_pieces:
                return None
            if counters.gap_end - counters.gap_start < more:
                limit = self._head_room_end(counters)
                if counters.gap_end < counters.high_water or limit < counters.gap_start + more:
                    return None
                wanted = counters.gap_start + max(more, self.max_total_steps // 32)
                counters.gap_end = counters.high_water = max(min(limit, wanted), counters.high_water)
            counters.gap_start += more
            self._commit(counters)
            # A process that is killed before leaves these steps to nobody: they are free.
            return self._resize(slot, reservation, length)

    def _end_pieces(self, counters: Counters, reservation: Reservation, length: int) -> Reservation:
        slot = self._slot_of(reservation)
        ended = self._resize(slot, reservation, length)  # first: the gap must never overlap the region
        slot[PUBLISHED_AS] = -1
        if counters.gap_start == reservation.start + reservation.length + self.margin:
            counters.gap_start -= reservation.length - length
        self._commit(counters)
        return ended

    def _resize(self, slot: np.ndarray, reservation: Reservation, length: int) -> Reservation:
        room = length + self.margin
        slot[SLOT_LENGTH] = length
        self._slot_rooms[reservation.slot] = room
        return Reservation(reservation.ticket, reservation.start, length, reservation.slot, room)

    def release(self, reservation: Reservation) -> None:
        """Give a region back with one store, without the lock, in the process that reserved it."""
        slot = self._slots[reservation.slot]
        if slot[TICKET] == reservation.ticket:
            slot[TICKET] = -1

    @property
    def _most_in_pieces(self) -> int:
        """The number of steps that these regions may take together."""
        return self.arena_steps - self.usual_steps

    def _in_pieces(self) -> tuple[int, int]:
        """Return how many of these regions there are, and how many steps they take."""
        lengths = self._slots[(self._slots[:, TICKET] >= 0) & (self._slots[:, PUBLISHED_AS] == IN_PIECES), SLOT_LENGTH]
        return len(lengths), int(np.sum(lengths)) + len(lengths) * self.margin
