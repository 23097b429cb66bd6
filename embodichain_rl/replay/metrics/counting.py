"""What ``len`` of a buffer counts, and loops that wait for another number than that."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
import weakref
from collections.abc import Iterator
from typing import Any, Literal

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Count", "GateWatch", "checked_count"]

Count = Literal["trajectories", "steps"]

MANY_ASKS = 64
"""Calls of ``len(rb)``, each after more trajectories came, that are many where no batch was sampled meanwhile."""

ASKS_WHEN_FULL = 16
"""The same for a buffer that is full, whose length does not grow any more."""

STEPS_OF_A_GATE = 1000
"""Steps below which few programs begin to sample."""

WORTH_A_WORD = 200
"""Live steps that were never sampled, of which a program is told when it ends."""


def checked_count(count: Any) -> Count:
    """Return the argument ``count``.

    Raises:
        InvalidArgumentError: when it is neither ``"trajectories"`` nor ``"steps"``.
    """
    if count not in ("trajectories", "steps"):
        raise InvalidArgumentError(f"Got count={count!r}; it must be 'trajectories' or 'steps'.")
    checked: Count = count
    return checked


class GateWatch:
    """Warns once of a loop that asks for ``len(rb)`` again and again, and never samples.

    Such loops wait for a number of steps, as ``len`` of TorchRL's buffers counts them. Only calls between which this
    process published trajectories count: a loop that waits for other processes is left alone.

    Attributes:
        sampled (bool): whether the buffer was read, so that nothing waits.
    """

    def __init__(self, storage: TrajectoryStorage) -> None:
        self.sampled = False
        self._state = _State(storage.ledger)
        self._finalizer = weakref.finalize(self, self._state.report)

    def asked(self, storage: TrajectoryStorage, published: int) -> None:
        """Take note of a call of ``len(rb)`` that counts trajectories.

        Args:
            storage: that of the buffer.
            published: the number of trajectories that this process has published.
        """
        state = self._state
        if self.sampled or state.warned or published == state.published:
            return
        state.published, state.ledger = published, storage.ledger
        state.asks += 1
        full = len(storage) >= storage.max_size
        if state.asks < (ASKS_WHEN_FULL if full else MANY_ASKS) or storage.num_steps < STEPS_OF_A_GATE:
            return
        state.warn(
            f"len(rb) was asked for {state.asks:,} times and more, while this process wrote trajectories, and no batch "
            "was sampled since."
        )

    @contextlib.contextmanager
    def unasked(self) -> Iterator[None]:
        """Take no note of calls of ``len(rb)`` meanwhile."""
        sampled, self.sampled = self.sampled, True
        try:
            yield
        finally:
            self.sampled = sampled

    def read(self) -> None:
        """Take note that the buffer was read: nothing waits for its length."""
        self.sampled = True
        self._finalizer.detach()


class _State:
    """What a watch has seen; it outlives the buffer for one last look, and so does not refer to it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.published = 0
        self.asks = 0
        self.warned = False

    def warn(self, seen: str) -> None:
        self.warned = True
        ledger = self.ledger
        full = len(ledger) >= ledger.max_trajectories
        limit = f", and never more than max_trajectories={ledger.max_trajectories:,}" if full else ""
        warnings.warn(
            f"{seen} len(rb) counts trajectories: it is {len(ledger):,} now{limit}, for {ledger.num_steps:,} steps. "
            "If the program waits for a number of steps, build the buffer with count='steps', or ask for "
            "rb.storage.num_steps or rb.write_count.",
            stacklevel=5,
        )

    def report(self) -> None:
        """Warn at the end of the buffer if it was filled, asked for its length, and never read."""
        if self.warned or self.asks < 2 or multiprocessing.parent_process() is not None:
            return
        if self.ledger.num_steps >= WORTH_A_WORD:
            self.warn(f"The buffer was asked for its length {self.asks:,} times and more, and never sampled.")
