"""What every process of an engine sees of it: its state, its workers' signs of life, and why it failed.

All of it is numbers and bytes in one :class:`~embodichain_rl.shared.memory.SharedBlock`. No word has two
writers: the owner writes the head, worker ``k`` its row and its report, each process that samples a row of its own.
So there is no lock, and a process that is killed at any instruction leaves the others as they are.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import NoReturn

import numpy as np

from embodichain_rl.engine.channel_memory import (
    REPORT_ROOM,
    ChannelMemory,
    ConsumerWord,
    HeadWord,
    OnlineDataEngineState,
)
from embodichain_rl.engine.remote_errors import pack_exception, unpack_exception
from embodichain_rl.engine.worker_record import WorkerRecord
from embodichain_rl.errors import EngineStateError
from embodichain_rl.shared import CrossProcessLock, own_process, process_is_alive

__all__ = ["EngineChannel"]

OWNER_CHECK_INTERVAL = 1.0
"""Seconds between two looks, in a process that samples, at whether the engine's owner still lives."""


class EngineChannel(ChannelMemory):
    """The shared memory of one engine; see the module's docstring.

    It travels to child processes while they are started, as every shared block does.

    Args:
        num_workers: how many producers have a row.

    Example:
        >>> channel = EngineChannel(num_workers=2)
        >>> channel.state
        <OnlineDataEngineState.CREATED: 0>
        >>> channel.worker(1).beat()
        >>> channel.worker(1).seconds_since_beat() < 60.0
        True
    """

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers)
        self._head[HeadWord.OWNER_PID], self._head[HeadWord.OWNER_START] = own_process()

    def _map(self) -> None:
        super()._map()
        holder = self._head[HeadWord.CONSUMERS_LOCK_HOLDER : HeadWord.CONSUMERS_LOCK_HOLDER + 1]
        self._consumers_lock = CrossProcessLock(self._block, holder)
        self._own_consumer: tuple[int, np.ndarray, threading.Lock] | None = None
        self._owner_seen = 0.0

    # -------------------------------------------------------------------------------------------- state and failure

    def enter(self, state: OnlineDataEngineState) -> None:
        """Goes on to ``state``, unless the present one is final. Called by the owner."""
        if self.state < OnlineDataEngineState.FAILED:
            self._head[HeadWord.STATE] = state.value

    def fail(self, reason: BaseException | bytes, where: str | None, note: str) -> None:
        """Makes ``reason`` what everybody's next sample raises, unless the state is final. Called by the owner.

        Args:
            reason: an exception, or one that a worker reported, packed.
            where: the place that its traceback is of, as part of a sentence; None where it has none.
            note: a sentence to add to it.
        """
        if self.state >= OnlineDataEngineState.FAILED:
            return
        packed = reason if isinstance(reason, bytes) else pack_exception(reason, room=REPORT_ROOM)
        # The reason is whole before the state says that there is one.
        failure = json.dumps({"error": json.loads(packed), "where": where, "note": note})
        self._head[HeadWord.FAILURE_SIZE] = self.store(0, failure.encode())
        self._head[HeadWord.STATE] = OnlineDataEngineState.FAILED.value

    def failure(self) -> BaseException | None:
        """Returns a new copy of what the engine failed with, the traceback there a note of it; None if it has not."""
        if self.state is not OnlineDataEngineState.FAILED:
            return None
        failure = json.loads(self._reports[0, : int(self._head[HeadWord.FAILURE_SIZE])].tobytes())
        error = unpack_exception(json.dumps(failure["error"]).encode(), where=str(failure["where"]))
        if failure["where"] is None:
            error.__notes__.pop()
        error.add_note(failure["note"])
        return error

    def check(self) -> None:
        """Raises what the engine failed with, or that there is nothing to be had from it.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner is gone.
            BaseException: the worker's own exception, where the engine has failed.
        """
        state = int(self._head[HeadWord.STATE])
        if state == OnlineDataEngineState.READY or state == OnlineDataEngineState.STARTING:
            self._check_owner()
        else:
            self._refuse()

    def _refuse(self) -> NoReturn:
        failure = self.failure()
        if failure is not None:
            raise failure
        if self.state is OnlineDataEngineState.CREATED:
            raise EngineStateError("The engine is not started. Call engine.start() first, in the process that made it.")
        raise EngineStateError("The engine is stopped, for good. Make a new OnlineDataEngine to go on.")

    def _check_owner(self) -> None:
        now = time.monotonic()
        if now - self._owner_seen < OWNER_CHECK_INTERVAL:
            return
        if not self.owner_is_alive():
            raise EngineStateError(
                f"The process that owned the engine, {int(self._head[HeadWord.OWNER_PID])}, ended without stopping it; "
                "its workers have ended too, and no new data comes. End this process as well."
            )
        self._owner_seen = now

    # ------------------------------------------------------------------------------------------------------- workers

    def worker(self, index: int) -> WorkerRecord:
        """Returns the record of worker ``index``."""
        return WorkerRecord(self, index)

    # ------------------------------------------------------------------------------------------ what the owner counts

    @property
    def restarts(self) -> int:
        """Workers that were lost and replaced."""
        return int(self._head[HeadWord.RESTARTS])

    def count_restart(self) -> None:
        """Counts a worker that is replaced. Called by the owner."""
        self._head[HeadWord.RESTARTS] += 1

    @property
    def policy_version(self) -> int:
        """How often the policy was updated."""
        return int(self._head[HeadWord.POLICY_VERSION])

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._head[HeadWord.POLICY_VERSION] = version

    def note_ready(self, inserted: int) -> None:
        """Notes when the buffer was filled, and how many trajectories it took."""
        self._head[HeadWord.INSERTED_BEFORE_READY] = inserted
        self._head[HeadWord.READY_SINCE] = time.monotonic_ns()

    @property
    def seconds_ready(self) -> float:
        """Seconds since the buffer was filled; 0 before."""
        since = int(self._head[HeadWord.READY_SINCE])
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0

    @property
    def inserted_before_ready(self) -> int:
        """Trajectories that it took to fill the buffer."""
        return int(self._head[HeadWord.INSERTED_BEFORE_READY])

    # ----------------------------------------------------------------------------------------------------- consumers

    def count_sample(self, chunks: int, redrawn: int) -> None:
        """Counts a sample of this process.

        Args:
            chunks: how many chunks it has.
            redrawn: how many of them were drawn again because their trajectory was evicted while it was read.
        """
        own = self._own_consumer
        if own is None or own[0] != os.getpid():  # a forked child is not the process that it was copied from
            own = self._own_consumer = (os.getpid(), self._claim_consumer(), threading.Lock())
        _, row, lock = own
        with lock:
            row[ConsumerWord.CHUNKS] += chunks
            row[ConsumerWord.REDRAWN] += redrawn

    def _claim_consumer(self) -> np.ndarray:
        """A row that no living process has; what the dead have counted in it stays in the sum."""
        pid, start = own_process()
        with self._consumers_lock:
            for row in self._consumer_rows:
                owner = int(row[ConsumerWord.PID]), int(row[ConsumerWord.PROCESS_START])
                if owner == (0, 0) or owner == (pid, start) or not process_is_alive(*owner):
                    row[ConsumerWord.PID], row[ConsumerWord.PROCESS_START] = pid, start
                    return row
        return self._consumer_rows[-1]

    @property
    def chunks_sampled(self) -> int:
        """Chunks that all processes have sampled."""
        return int(self._consumer_rows[:, ConsumerWord.CHUNKS].sum())

    @property
    def chunks_redrawn(self) -> int:
        """Chunks that were drawn again, in all processes."""
        return int(self._consumer_rows[:, ConsumerWord.REDRAWN].sum())
