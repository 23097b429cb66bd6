"""What every process of an engine sees of it: its state, its workers' signs of life, and why it failed.

All of it is numbers and bytes in one :class:`~embodichain_rl.replay.shared_memory.SharedBlock`. No word has two
writers: the owner writes the head, worker ``k`` its row and its report, each process that samples a row of its own.
So there is no lock, and a process that is killed at any instruction leaves the others as they are.
"""

from __future__ import annotations

import enum
import json
import os
import threading
import time
from typing import Any, NoReturn

import numpy as np

from embodichain_rl.engine.remote_errors import pack_exception, unpack_exception
from embodichain_rl.engine.worker_record import NOTE_BYTES, WorkerRecord
from embodichain_rl.errors import EngineStateError
from embodichain_rl.replay.processes import own_process, process_is_alive
from embodichain_rl.replay.shared_memory import CrossProcessLock, SharedBlock

__all__ = ["EngineChannel", "OnlineDataEngineState"]

REPORT_BYTES = 256 * 1024
"""Room for one packed exception. Pages that nobody touches take no memory."""

REPORT_ROOM = REPORT_BYTES - 1024
"""Of it, what the exception itself may take; the rest is for what the owner adds."""

MAX_CONSUMERS = 1024
"""Processes that sample at the same time and are counted one by one; those beyond share a row."""

OWNER_CHECK_INTERVAL = 1.0
"""Seconds between two looks, in a process that samples, at whether the engine's owner still lives."""


class OnlineDataEngineState(enum.IntEnum):
    """Where an engine stands: ``CREATED -> STARTING -> READY -> STOPPED | FAILED``; the last two are final."""

    CREATED = 0
    """Made, not started."""
    STARTING = 1
    """Workers come up and the buffer is being filled."""
    READY = 2
    """The buffer is filled, workers go on."""
    FAILED = 3
    """It can't go on; sampling raises the reason."""
    STOPPED = 4
    """Its owner stopped it."""


# The words of each table. Plain integers: to index an array with an enumeration's member costs microseconds, in which
# numpy swallows a Ctrl-C.


class _Head:
    (
        STATE,
        STOP,
        OWNER_PID,
        OWNER_START,
        FAILURE_SIZE,
        RESTARTS,
        POLICY_VERSION,
        READY_SINCE,
        INSERTED_BEFORE_READY,
        CONSUMERS_LOCK_HOLDER,
    ) = range(10)
    WORDS = 10


class _Consumer:
    PID, PROCESS_START, CHUNKS, REDRAWN = range(4)
    WORDS = 4


class EngineChannel:
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
        self.num_workers = num_workers
        self._block = SharedBlock(self._words_size() + (1 + num_workers) * REPORT_BYTES + num_workers * NOTE_BYTES)
        self._map()
        self._head[_Head.OWNER_PID], self._head[_Head.OWNER_START] = own_process()

    def _shapes(self) -> list[tuple[int, int]]:
        return [(1, _Head.WORDS), (self.num_workers, WorkerRecord.WORDS), (MAX_CONSUMERS, _Consumer.WORDS)]

    def _words_size(self) -> int:
        return sum(8 * rows * columns for rows, columns in self._shapes())

    def _map(self) -> None:
        offset = 0
        tables = []
        for shape in self._shapes():
            tables.append(self._block.array(np.int64, shape, offset))
            offset += 8 * shape[0] * shape[1]
        self._head: np.ndarray = tables[0][0]
        self._workers: np.ndarray = tables[1]
        self._consumers: np.ndarray = tables[2]
        self._reports = self._block.array(np.uint8, (1 + self.num_workers, REPORT_BYTES), offset)
        offset += self._reports.nbytes
        self._notes = self._block.array(np.uint8, (self.num_workers, NOTE_BYTES), offset)
        holder = self._head[_Head.CONSUMERS_LOCK_HOLDER : _Head.CONSUMERS_LOCK_HOLDER + 1]
        self._consumers_lock = CrossProcessLock(self._block, holder)
        self._own_consumer: tuple[int, np.ndarray, threading.Lock] | None = None
        self._owner_seen = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_workers, self._block = state["num_workers"], state["block"]
        self._map()

    # -------------------------------------------------------------------------------------------- state and failure

    @property
    def state(self) -> OnlineDataEngineState:
        """Where the engine stands."""
        return OnlineDataEngineState(int(self._head[_Head.STATE]))

    def enter(self, state: OnlineDataEngineState) -> None:
        """Goes on to ``state``, unless the present one is final. Called by the owner."""
        if self.state < OnlineDataEngineState.FAILED:
            self._head[_Head.STATE] = state.value

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
        self._head[_Head.FAILURE_SIZE] = self._store(0, failure.encode())
        self._head[_Head.STATE] = OnlineDataEngineState.FAILED.value

    def failure(self) -> BaseException | None:
        """Returns a new copy of what the engine failed with, the traceback there a note of it; None if it has not."""
        if self.state is not OnlineDataEngineState.FAILED:
            return None
        failure = json.loads(self._reports[0, : int(self._head[_Head.FAILURE_SIZE])].tobytes())
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
        state = int(self._head[_Head.STATE])
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
                f"The process that owned the engine, {int(self._head[_Head.OWNER_PID])}, ended without stopping it; "
                "its workers have ended too, and no new data comes. End this process as well."
            )
        self._owner_seen = now

    def owner_is_alive(self) -> bool:
        """Whether the process that made the engine still runs."""
        return process_is_alive(int(self._head[_Head.OWNER_PID]), int(self._head[_Head.OWNER_START]))

    def is_owner(self) -> bool:
        """Whether this process made the engine."""
        return own_process() == (int(self._head[_Head.OWNER_PID]), int(self._head[_Head.OWNER_START]))

    def request_stop(self) -> None:
        """Tells the producers to end. Called by the owner."""
        self._head[_Head.STOP] = 1

    def stop_requested(self) -> bool:
        """Whether the producers should end."""
        return self._head.item(_Head.STOP) != 0

    # ------------------------------------------------------------------------------------------------------- workers

    def worker(self, index: int) -> WorkerRecord:
        """Returns the record of worker ``index``."""
        return WorkerRecord(self, index)

    def row(self, index: int) -> np.ndarray:
        """Returns the words of worker ``index``; for :class:`WorkerRecord`."""
        return self._workers[index]

    def write_report(self, index: int, error: BaseException) -> int:
        """Stores an exception that worker ``index`` reports; returns its size, in bytes."""
        return self._store(1 + index, pack_exception(error, room=REPORT_ROOM))

    def read_report(self, index: int, size: int) -> bytes:
        """Returns what worker ``index`` reported, packed."""
        return self._reports[1 + index, :size].tobytes()

    def note(self, index: int) -> np.ndarray:
        """Returns the bytes for what worker ``index`` says of how it collects; for :class:`WorkerRecord`."""
        return self._notes[index]

    def _store(self, row: int, content: bytes) -> int:
        self._reports[row, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        return len(content)

    # ------------------------------------------------------------------------------------------ what the owner counts

    @property
    def restarts(self) -> int:
        """Workers that were lost and replaced."""
        return int(self._head[_Head.RESTARTS])

    def count_restart(self) -> None:
        """Counts a worker that is replaced. Called by the owner."""
        self._head[_Head.RESTARTS] += 1

    @property
    def policy_version(self) -> int:
        """How often the policy was updated."""
        return int(self._head[_Head.POLICY_VERSION])

    @policy_version.setter
    def policy_version(self, version: int) -> None:
        self._head[_Head.POLICY_VERSION] = version

    def note_ready(self, inserted: int) -> None:
        """Notes when the buffer was filled, and how many trajectories it took."""
        self._head[_Head.INSERTED_BEFORE_READY] = inserted
        self._head[_Head.READY_SINCE] = time.monotonic_ns()

    @property
    def seconds_ready(self) -> float:
        """Seconds since the buffer was filled; 0 before."""
        since = int(self._head[_Head.READY_SINCE])
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0

    @property
    def inserted_before_ready(self) -> int:
        """Trajectories that it took to fill the buffer."""
        return int(self._head[_Head.INSERTED_BEFORE_READY])

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
            row[_Consumer.CHUNKS] += chunks
            row[_Consumer.REDRAWN] += redrawn

    def _claim_consumer(self) -> np.ndarray:
        """A row that no living process has; what the dead have counted in it stays in the sum."""
        pid, start = own_process()
        with self._consumers_lock:
            for row in self._consumers:
                owner = int(row[_Consumer.PID]), int(row[_Consumer.PROCESS_START])
                if owner == (0, 0) or owner == (pid, start) or not process_is_alive(*owner):
                    row[_Consumer.PID], row[_Consumer.PROCESS_START] = pid, start
                    return row
        return self._consumers[-1]

    @property
    def chunks_sampled(self) -> int:
        """Chunks that all processes have sampled."""
        return int(self._consumers[:, _Consumer.CHUNKS].sum())

    @property
    def chunks_redrawn(self) -> int:
        """Chunks that were drawn again, in all processes."""
        return int(self._consumers[:, _Consumer.REDRAWN].sum())
