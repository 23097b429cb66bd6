"""The outbox stands in the place of the buffer on a machine that only produces: trajectories are fetched from it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from embodichain_rl.cluster.messages import MessageBuilder, MessageFormat
from embodichain_rl.engine.state import WorkerRecord
from embodichain_rl.engine.workers import TURN_POLL_INTERVAL, EnterWorker, ProducerWriter
from embodichain_rl.replay.schema import TextTable
from embodichain_rl.replay.writing import AcceptFilter

__all__ = ["Outbox", "OutboxWriter"]


class Outbox:
    """The trajectories of the next message. It has room until these are ``message_bytes``.

    Args:
        format: how they travel.
        texts: the table of the ids of texts.
        message_bytes: the size at which a message is complete, in bytes.
    """

    def __init__(self, format: MessageFormat, texts: TextTable, message_bytes: int) -> None:
        self._format, self._texts, self._message_bytes = format, texts, message_bytes
        self._changed = threading.Condition()
        self._builder = MessageBuilder(format, texts, message_bytes)
        self._closed = False

    def wait_for_room(self, seconds: float) -> bool:
        """Wait until there is room for another trajectory, and return whether there is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._builder.nbytes < self._message_bytes, seconds)

    def put(
        self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], policy_version: int
    ) -> None:
        """Copy a whole trajectory, given in the pieces that ``TrajectoryStorage.write`` takes."""
        with self._changed:
            self._builder.add(pieces, of_trajectory, policy_version, time.monotonic())
            if self._builder.nbytes >= self._message_bytes:
                self._changed.notify_all()

    def take(self, seconds: float) -> dict[str, Any] | None:
        """Return the message when it is complete or the time has passed; None if there is no trajectory then."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._builder.nbytes >= self._message_bytes, seconds)
            if not self._builder.lengths:
                return None
            builder, self._builder = self._builder, MessageBuilder(self._format, self._texts, self._message_bytes)
            self._changed.notify_all()
        return builder.build(time.monotonic())

    def close(self) -> None:
        """Let :meth:`take` return without waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


class OutboxWriter(ProducerWriter):
    """The writer of a producer on another machine: it cuts and judges as usual, and puts trajectories into an outbox.

    Args:
        record: the record of the producer in its own process.
        outbox: where trajectories go.
        accept: the filter of whole trajectories; None accepts all.
        entry: what its process does first.
        source: who acts, which is written with every step; None: it is not.
        between_steps: called while it waits for room.
    """

    _writes_ahead = False

    def __init__(
        self,
        record: WorkerRecord,
        outbox: Outbox,
        *,
        accept: AcceptFilter | None,
        entry: EnterWorker,
        source: str | None = None,
        between_steps: Callable[[], None],
    ) -> None:
        super().__init__(record, accept=accept, entry=entry, source=source)
        self.max_pending_bytes = 1 << 62  # the steps of an episode are limited by the environments themselves
        self._outbox = outbox
        self._between_steps = between_steps
        self._acted_with = 0

    def admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        self._acted_with = self.record.policy_version  # it may change while there is no room
        return super().admits(steps, trajectory)

    def stored_version(self, version: int) -> int:
        return self._acted_with

    def _has_turn(self) -> bool:
        self._between_steps()
        if self.record.channel.held:
            self.record.rest()
            return False
        return self._outbox.wait_for_room(TURN_POLL_INTERVAL)

    def _store(self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], version: int) -> int:
        self._outbox.put(pieces, of_trajectory, version)
        return 0
