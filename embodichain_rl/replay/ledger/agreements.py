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


def agreement_words() -> tuple[int, int]:
    """Return the shape of the ``int64`` array that :class:`Agreements` needs."""
    return 1 + AGREEMENTS, 1 + AGREED_NUMBERS


class Agreements:
    """A table of agreements in shared memory.

    Row 0 counts the agreements that were ever made. Every other row has a key, which is 0 in an unused row, and the
    numbers. A process that is killed while it writes a row leaves the key 0, and so nothing.

    Args:
        table: ``int64``, in shared memory, of the shape :func:`agreement_words`; zeros at first.
        lock: held while the table is read or written.
    """

    def __init__(self, table: np.ndarray, lock: CrossProcessLock) -> None:
        self._count, self._rows, self._lock = table[0], table[1:], lock

    def on(
        self, key: int, propose: Callable[[], Sequence[int]], outdated: Callable[[Sequence[int]], bool]
    ) -> list[int]:
        """Return the numbers that all processes use for ``key``.

        Args:
            key: identifies what is agreed on; not 0.
            propose: called if there is no agreement yet; returns ``AGREED_NUMBERS`` integers.
            outdated: returns whether an agreement that was found is of no use any more, so that it is replaced.
        """
        found = self._find(key)
        if found is not None and not outdated(found):
            return found
        proposal = list(propose())
        with self._lock:
            other = self._found(key)
            if other is not None and other != found:  # another process was faster
                return other
            at = self._at(key)
            if at is None:
                at = int(self._count[0]) % AGREEMENTS
                self._count[0] += 1
            row = self._rows[at]
            row[0] = 0
            write_barrier()
            row[1:] = proposal
            write_barrier()
            row[0] = key
        return proposal

    def _find(self, key: int) -> list[int] | None:
        with self._lock:
            return self._found(key)

    def _found(self, key: int) -> list[int] | None:
        at = self._at(key)
        return None if at is None else self._rows[at, 1:].tolist()

    def _at(self, key: int) -> int | None:
        at = np.flatnonzero(self._rows[:, 0] == key)
        return int(at[0]) if len(at) else None
