"""The unfinished trajectories of a writer, which belong to one process: what it holds, counts and begins anew."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from pathlib import Path
from typing import Any

from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, WorkerDiedError
from embodichain_rl.replay.ledger import MetricWord
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.boundary_keys import BoundaryKeys
from embodichain_rl.replay.writing.continuing import PendingTrajectories
from embodichain_rl.replay.writing.cutting import Cutter
from embodichain_rl.replay.writing.starvation import StarvationWatch, explained
from embodichain_rl.replay.writing.text_holds import TextsHeld

__all__ = ["PendingWriter"]


class PendingWriter(Writer):
    """The part of a writer that holds unfinished trajectories, which stay in the process that collected them.

    A copy of the writer in another process starts without any.

    Args:
        sequences, max_pending_bytes, keys: see :class:`~embodichain_rl.TrajectoryWriter`.
    """

    _storage: TrajectoryStorage
    _watch: StarvationWatch = None  # type: ignore[assignment]
    _OWN = ("_pending", "_shows_pending", "_watch", "_failures", "_of_thread", "_cutter", "_texts_held")
    """What a copy in another process begins anew."""

    # A writer that an earlier version pickled has none of these.
    sequences: bool = False
    max_pending_bytes: int | None = None
    _keys = BoundaryKeys()

    def __init__(self, *, sequences: bool, max_pending_bytes: int | None, keys: BoundaryKeys) -> None:
        super().__init__()
        self.sequences = sequences
        self.max_pending_bytes = max_pending_bytes
        self._keys = keys
        self._start_anew()
        _writers.add(self)

    def _start_anew(self) -> None:
        self._pending = PendingTrajectories()
        self._shows_pending = False
        if self._watch is not None:
            self._watch.forget()
        self._watch = StarvationWatch(self._pending)
        self._failures: deque[tuple[threading.Thread, Exception]] = deque(maxlen=8)
        self._of_thread = threading.local()
        self._texts_held = TextsHeld(lambda: self._storage.texts, self._pending)
        if self.registered:
            self._start_cutting()

    def _start_cutting(self) -> None:
        self._cutter = Cutter(
            self._storage,
            self._pending,
            keys=self._keys,
            sequences=self.sequences,
            max_pending_bytes=self.max_pending_bytes,
        )

    def _producer(self) -> int:
        """Return a number of the calling thread's own: the ids of threads are used again, and can't tell them apart."""
        number: int | None = getattr(self._of_thread, "number", None)
        if number is None:
            number = self._of_thread.number = next(_numbers)
        return number

    def register_storage(self, storage: TrajectoryStorage) -> None:
        """Attach the storage to write to.

        Raises:
            InvalidArgumentError: when it is not a :class:`TrajectoryStorage`.
        """
        if not isinstance(storage, TrajectoryStorage):
            raise InvalidArgumentError(
                f"Got a {type(storage).__name__}; a TrajectoryWriter writes to a TrajectoryStorage. For other storages "
                "use TorchRL's RoundRobinWriter."
            )
        super().register_storage(storage)
        self._start_cutting()

    @property
    def registered(self) -> bool:
        """Whether there is a storage to write to."""
        storage: TrajectoryStorage | None = self._storage
        return storage is not None

    def explained(self, error: EmptyBufferError) -> EmptyBufferError | WorkerDiedError:
        """Return the error to raise for a buffer without a trajectory.

        It says what this process holds of unfinished ones, and which writers have failed. If no other is left, it is a
        ``WorkerDiedError``: waiting is in vain.
        """
        return explained(error, self._storage.handed_over, self._failures, self._watch if self.pending_steps else None)

    def note_failure(self, error: Exception) -> None:
        """Take note of an error of ``extend`` in a thread: where a collector has one, it ends with it, unseen."""
        if threading.current_thread() is not threading.main_thread():
            self._failures.append((threading.current_thread(), error))

    @property
    def published(self) -> int:
        """Trajectories that this process has published."""
        return self._watch.published

    @property
    def pending_steps(self) -> int:
        """Steps of unfinished trajectories that this process holds."""
        return self._pending.steps

    @property
    def pending_trajectories(self) -> int:
        """Unfinished trajectories that this process holds."""
        return len(self._pending)

    @property
    def pending_bytes(self) -> int:
        """Bytes of the unfinished trajectories that this process holds."""
        schema = self._storage.schema if self.registered else None
        return 0 if schema is None else self._pending.held_steps * schema.bytes_of_step

    @property
    def truncated(self) -> int:
        """Trajectories that this process ended although no end flag said so."""
        return self._pending.truncated

    def _show_pending(self) -> None:
        """Set what those who watch the buffer see of the unfinished trajectories."""
        words = self._storage.ledger.metrics.own.words
        words[MetricWord.PENDING_TRAJECTORIES] = len(self._pending)
        words[MetricWord.PENDING_STEPS] = self._pending.steps
        words[MetricWord.TRUNCATED] = self._pending.truncated
        self._shows_pending = len(self._pending) > 0

    def _note_kept(self, schema: Schema | None, unfinished: int, steps: int) -> None:
        if schema is not None:
            self._watch.kept(steps, unfinished, schema, self._cutter.keys(schema), self._storage.max_total_steps)

    def discard_pending(self) -> int:
        """Drop the unfinished trajectories of this process; return how many steps they had."""
        steps = self.pending_steps
        self._pending.clear()
        self._texts_held.settle()
        self._watch.forgive()
        return steps

    def state_dict(self) -> dict[str, Any]:
        """Return an empty dict: the counts are part of the storage's state, unfinished trajectories are not saved."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.discard_pending()

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)

    def loads(self, path: str | Path) -> None:
        self.discard_pending()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k not in self._OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()
        _writers.add(self)


_numbers = itertools.count()
_writers: weakref.WeakSet[PendingWriter] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    # Unfinished trajectories stay in the parent, where they were begun.
    for writer in list(_writers):
        writer._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
