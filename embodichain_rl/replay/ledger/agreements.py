"""Numbers that several processes agree on without a message: the first process that proposes them decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from embodichain_rl.shared import CrossProcessLock, write_barrier

__all__ = ["AGREED_NUMBERS", "Agreements", "agreement_words"]

AGREEMENTS = 512
"""Number of agreements that are kept; the oldest are forgotten."""

AGREED_NUMBERS = 4
"""Number of integers of one agreement."""

PARTY_WORDS = 8
PARTY_BITS = 62
"""Words that record which parties have joined, and the bits that are used of each."""


def agreement_words() -> tuple[int, int]:
    """Return the shape of the ``int64`` array that :class:`Agreements` needs."""
    return 1 + AGREEMENTS, 1 + AGREED_NUMBERS + PARTY_WORDS


class Agreements:
    """A table of agreements in shared memory.

    Row 0 counts the agreements that were ever made. Every other row has a key, which is 0 in an unused row, the
    numbers, and one bit for each party that has joined. A process that is killed while it writes a row leaves the key
    0, and so nothing.

    Args:
        table: ``int64``, in shared memory, of the shape :func:`agreement_words`; zeros at first.
        lock: held while the table is read or written.
    """

    def __init__(self, table: np.ndarray, lock: CrossProcessLock) -> None:
        self._count, self._rows, self._lock = table[0], table[1:], lock

    def join(
        self,
        key: int,
        party: int,
        propose: Callable[[], Sequence[int]],
        outdated: Callable[[Sequence[int]], bool],
    ) -> list[int]:
        """Return the numbers that all parties use for ``key``.

        A party that joins again has begun anew, and so have the others: the numbers are proposed again.

        Args:
            key: identifies what is agreed on; not 0.
            party: the number of the caller among those that agree.
            propose: called if there is no agreement to join; returns ``AGREED_NUMBERS`` integers.
            outdated: returns whether an agreement that was found is of no use any more, so that it is replaced.
        """
        with self._lock:
            found = self._joined(key, party, outdated)
        if found is not None:
            return found
        proposal = list(propose())
        with self._lock:
            found = self._joined(key, party, outdated)  # another process may have been faster
            if found is None:
                found = proposal
                self._set(key, party, proposal)
        return found

    def _joined(self, key: int, party: int, outdated: Callable[[Sequence[int]], bool]) -> list[int] | None:
        """Join an agreement; return its numbers, or None if there is none to join."""
        at = self._at(key)
        if at is None:
            return None
        numbers: list[int] = self._rows[at, 1 : 1 + AGREED_NUMBERS].tolist()
        word, bit = _bit_of(party)
        if self._rows[at, word] & bit or outdated(numbers):
            return None
        self._rows[at, word] |= bit
        return numbers

    def _set(self, key: int, party: int, numbers: Sequence[int]) -> None:
        at = self._at(key)
        if at is None:
            at = int(self._count[0]) % AGREEMENTS
            self._count[0] += 1
        row = self._rows[at]
        row[0] = 0
        write_barrier()
        row[1 : 1 + AGREED_NUMBERS] = numbers
        row[1 + AGREED_NUMBERS :] = 0
        word, bit = _bit_of(party)
        row[word] = bit
        write_barrier()
        row[0] = key

    def _at(self, key: int) -> int | None:
        at = np.flatnonzero(self._rows[:, 0] == key)
        return int(at[0]) if len(at) else None


def _bit_of(party: int) -> tuple[int, int]:
    word, bit = divmod(party % (PARTY_WORDS * PARTY_BITS), PARTY_BITS)
    return 1 + AGREED_NUMBERS + word, 1 << bit
