"""The state of an engine that all its processes share: lifecycle, heartbeats, failure and counters.

All of it is numbers and bytes in the shared memory of ``channel_memory.py``, which explains why it needs no lock.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import NoReturn

import numpy as np

from embodichain_rl.engine.processes import pack_exception, unpack_exception
from embodichain_rl.engine.state.channel_memory import (
    MAX_EXCEPTION_BYTES,
    SAMPLED_STATES,
    ChannelMemory,
    ConsumerWord,
    HeadWord,
    OnlineDataEngineState,
)
from embodichain_rl.engine.state.worker_record import WorkerRecord
from embodichain_rl.errors import EngineStateError
from embodichain_rl.shared import own_process, process_is_alive

__all__ = ["EngineChannel"]

OWNER_CHECK_INTERVAL = 1.0
"""Seconds between two checks, in a process that samples, of whether the engine's owner is alive."""


class EngineChannel(ChannelMemory):
    """The shared state of one engine.

    Like every shared block, it is passed to a child process when that process is started.

    Args:
        num_workers: the number of producers, each of which has a row.
        buffer_size: the number of trajectories of the first generation.
        manual: whether producers write only what is requested.

    Example:
        >>> channel = EngineChannel(num_workers=2)
        >>> channel.state
        <OnlineDataEngineState.CREATED: 'CREATED'>
        >>> channel.worker(1).beat()
        >>> channel.worker(1).seconds_since_beat() < 60.0
        True
    """

    def __init__(self, num_workers: int, *, buffer_size: int = 1, manual: bool = False) -> None:
        super().__init__(num_workers, buffer_size=buffer_size, manual=manual)
        self._head[HeadWord.OWNER_PID], self._head[HeadWord.OWNER_START] = own_process()

    def _map(self) -> None:
        super()._map()
        self._consumer: tuple[int, np.ndarray, threading.Lock] | None = None
        self._owner_checked_at = 0.0

    # -------------------------------------------------------------------------------------------- state and failure

    def enter(self, state: OnlineDataEngineState) -> None:
        """Change to ``state``, unless the current state is final. Called by the owner."""
        if not self.state.is_final:
            self.state = state

    def fail(self, reason: BaseException | bytes, where: str | None, note: str) -> None:
        """Change to ``FAILED``, unless the state is final. Every later sample raises ``reason``. Called by the owner.

        Args:
            reason: an exception, or the packed exception that a worker reported.
            where: the process of its traceback, as part of a sentence; None if it has no traceback.
            note: a sentence to add to the exception as a note.
        """
        if self.state.is_final:
            return
        self._store_failure(reason, where, note)

    def fail_to_stop(self, reason: BaseException) -> None:
        """Change from ``STOPPED`` to ``FAILED``, since ``stop()`` raises ``reason``. Called by the owner."""
        if self.state is OnlineDataEngineState.STOPPED:
            self._store_failure(reason, "stop()", "The engine was not stopped properly.")
        self.note_failure_raised()

    def _store_failure(self, reason: BaseException | bytes, where: str | None, note: str) -> None:
        packed = reason if isinstance(reason, bytes) else pack_exception(reason, max_bytes=MAX_EXCEPTION_BYTES)
        # The reason is stored completely before the state announces it.
        failure = json.dumps({"error": json.loads(packed), "where": where, "note": note})
        self._head[HeadWord.FAILURE_SIZE] = self.store(0, failure.encode())
        self.state = OnlineDataEngineState.FAILED

    def failure(self) -> BaseException | None:
        """Return a new copy of the exception that the engine failed with; None if it has not failed.

        The traceback of the worker is a note of the exception.
        """
        if self.state is not OnlineDataEngineState.FAILED:
            return None
        failure = json.loads(self._reports[0, : int(self._head[HeadWord.FAILURE_SIZE])].tobytes())
        error = unpack_exception(json.dumps(failure["error"]).encode(), where=str(failure["where"]))
        if failure["where"] is None:
            error.__notes__.pop()
        error.add_note(failure["note"])
        return error

    def check(self) -> None:
        """Raise an error if the engine can't be sampled.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner has ended.
            BaseException: the exception that the engine failed with.
        """
        if self._head.item(HeadWord.STATE) in SAMPLED_STATES:
            self._check_owner()
        else:
            self._refuse()

    def _refuse(self) -> NoReturn:
        failure = self.failure()
        if failure is not None:
            self.note_failure_raised()
            raise failure
        if self.state is OnlineDataEngineState.CREATED:
            raise EngineStateError(
                "The engine is not started (current state is CREATED). Call engine.start() first, in the process that "
                "made it."
            )
        raise EngineStateError(
            "The engine is stopped and can't be restarted (current state is STOPPED). Make a new OnlineDataEngine."
        )

    def _check_owner(self) -> None:
        now = time.monotonic()
        if now - self._owner_checked_at < OWNER_CHECK_INTERVAL:
            return
        if not self.owner_is_alive():
            raise EngineStateError(
                f"The process that owned the engine, {int(self._head[HeadWord.OWNER_PID])}, ended without stopping it; "
                "its workers have ended too, and no new data will arrive. End this process as well."
            )
        self._owner_checked_at = now

    # ------------------------------------------------------------------------------------------------------- workers

    def worker(self, index: int) -> WorkerRecord:
        """Return the record of worker ``index``."""
        return WorkerRecord(self, index)

    # ------------------------------------------------------------------------------------------ counters of the owner

    @property
    def restarts(self) -> int:
        """Number of workers that were lost and replaced."""
        return int(self._head[HeadWord.RESTARTS])

    def count_restart(self) -> None:
        """Count a worker that is replaced. Called by the owner."""
        self._head[HeadWord.RESTARTS] += 1

    @property
    def policy_version(self) -> int:
        """Number of updates of the policy."""
        return int(self._head[HeadWord.POLICY_VERSION])

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._head[HeadWord.POLICY_VERSION] = version

    def note_ready(self, inserted: int) -> None:
        """Note that the buffer is filled now, and how many trajectories were inserted until then."""
        self._head[HeadWord.INSERTED_BEFORE_READY] = inserted
        self._head[HeadWord.READY_SINCE] = time.monotonic_ns()

    @property
    def seconds_ready(self) -> float:
        """Seconds since the buffer was filled; 0 before that."""
        since = int(self._head[HeadWord.READY_SINCE])
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0

    @property
    def inserted_before_ready(self) -> int:
        """Number of trajectories that were inserted until the buffer was filled."""
        return int(self._head[HeadWord.INSERTED_BEFORE_READY])

    # ----------------------------------------------------------------------------------------------------- consumers

    def count_sample(self, chunks: int, redrawn: int) -> None:
        """Count a sample of this process.

        Args:
            chunks: the number of chunks in the sample.
            redrawn: the number of chunks that were drawn again because their trajectory was evicted while it was read.
        """
        consumer = self._consumer
        if consumer is None or consumer[0] != os.getpid():  # a forked child needs another row than its parent
            consumer = self._consumer = (os.getpid(), self._claim_consumer(), threading.Lock())
        _, row, lock = consumer
        with lock:
            row[ConsumerWord.CHUNKS] += chunks
            row[ConsumerWord.REDRAWN] += redrawn

    @property
    def failure_was_raised(self) -> bool:
        """Whether a process has raised the exception that the engine failed with."""
        return bool(self._consumer_rows[:, ConsumerWord.RAISED_FAILURE].any())

    def note_failure_raised(self) -> None:
        """Note that this process raises the exception that the engine failed with."""
        self.count_sample(0, 0)  # claims a row
        assert self._consumer is not None
        self._consumer[1][ConsumerWord.RAISED_FAILURE] = 1

    def _claim_consumer(self) -> np.ndarray:
        """Return a row that no live process uses. The counts of a dead process stay in the row and in the sum."""
        pid, start = own_process()
        with self._claims_lock:
            for row in self._consumer_rows:
                owner = int(row[ConsumerWord.PID]), int(row[ConsumerWord.PROCESS_START])
                if owner == (0, 0) or owner == (pid, start) or not process_is_alive(*owner):
                    row[ConsumerWord.PID], row[ConsumerWord.PROCESS_START] = pid, start
                    return row
        return self._consumer_rows[-1]

    @property
    def chunks_sampled(self) -> int:
        """Number of chunks that all processes have sampled."""
        return int(self._consumer_rows[:, ConsumerWord.CHUNKS].sum())

    @property
    def chunks_redrawn(self) -> int:
        """Number of chunks that were drawn again, in all processes."""
        return int(self._consumer_rows[:, ConsumerWord.REDRAWN].sum())
