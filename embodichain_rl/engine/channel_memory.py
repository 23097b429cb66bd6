"""The memory that the processes of an engine share: words by name, packed reports, notes.

No word has two writers: the owner writes the head, worker ``k`` its row and its report, each process that samples a row
of its own. So there is no lock, and a process that is killed at any instruction leaves the others as they are.
"""

from __future__ import annotations

import enum
from typing import Any

import numpy as np

from embodichain_rl.engine.remote_errors import pack_exception
from embodichain_rl.shared import SharedBlock, own_process, process_is_alive

__all__ = [
    "MAX_CONSUMERS",
    "NOTE_BYTES",
    "REPORT_ROOM",
    "ChannelMemory",
    "ConsumerWord",
    "HeadWord",
    "OnlineDataEngineState",
    "WorkerWord",
]

REPORT_BYTES = 256 * 1024
"""Room for one packed exception. Pages that nobody touches take no memory."""

REPORT_ROOM = REPORT_BYTES - 1024
"""Of it, what the exception itself may take; the rest is for what the owner adds."""

NOTE_BYTES = 512
"""Room for a worker's note about how it collects, as UTF-8."""

MAX_CONSUMERS = 1024
"""Processes that sample at the same time and are counted one by one; those beyond share a row."""


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


class HeadWord:
    """The words of the engine as a whole; written by its owner."""

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


class ConsumerWord:
    """The words of one process that samples; written by it."""

    PID, PROCESS_START, CHUNKS, REDRAWN = range(4)
    WORDS = 4


class WorkerWord:
    """The words of one worker; written by it, but for what the owner clears and notes."""

    (
        PID,
        PHASE,
        BEAT,
        STEPS,
        PENDING,
        WRITTEN_TRAJECTORIES,
        WRITTEN_STEPS,
        REJECTED,
        FAILED_ATTEMPTS,
        STARTS,
        REPORT_SIZE,
        POLICY_VERSION,
        NOTE_SIZE,
    ) = range(13)
    WORDS = 13


class ChannelMemory:
    """The words, reports and notes of one engine.

    It travels to child processes while they are started, as every shared block does.

    Args:
        num_workers: how many workers have a row.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._block = SharedBlock(self._words_size() + (1 + num_workers) * REPORT_BYTES + num_workers * NOTE_BYTES)
        self._map()

    def _shapes(self) -> list[tuple[int, int]]:
        return [(1, HeadWord.WORDS), (self.num_workers, WorkerWord.WORDS), (MAX_CONSUMERS, ConsumerWord.WORDS)]

    def _words_size(self) -> int:
        return sum(8 * rows * columns for rows, columns in self._shapes())

    def _map(self) -> None:
        offset = 0
        tables = []
        for shape in self._shapes():
            tables.append(self._block.array(np.int64, shape, offset))
            offset += 8 * shape[0] * shape[1]
        self._head: np.ndarray = tables[0][0]
        self._worker_rows: np.ndarray = tables[1]
        self._consumer_rows: np.ndarray = tables[2]
        self._reports = self._block.array(np.uint8, (1 + self.num_workers, REPORT_BYTES), offset)
        offset += self._reports.nbytes
        self._notes = self._block.array(np.uint8, (self.num_workers, NOTE_BYTES), offset)

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_workers, self._block = state["num_workers"], state["block"]
        self._map()

    @property
    def state(self) -> OnlineDataEngineState:
        """Where the engine stands."""
        return OnlineDataEngineState(int(self._head[HeadWord.STATE]))

    def owner_is_alive(self) -> bool:
        """Whether the process that made the engine still runs."""
        return process_is_alive(int(self._head[HeadWord.OWNER_PID]), int(self._head[HeadWord.OWNER_START]))

    def is_owner(self) -> bool:
        """Whether this process made the engine."""
        return own_process() == (int(self._head[HeadWord.OWNER_PID]), int(self._head[HeadWord.OWNER_START]))

    def request_stop(self) -> None:
        """Tells the producers to end. Called by the owner."""
        self._head[HeadWord.STOP] = 1

    def stop_requested(self) -> bool:
        """Whether the producers should end."""
        return self._head.item(HeadWord.STOP) != 0

    def row(self, index: int) -> np.ndarray:
        """Returns the words of worker ``index``; for :class:`WorkerRecord`."""
        return self._worker_rows[index]

    def write_report(self, index: int, error: BaseException) -> int:
        """Stores an exception that worker ``index`` reports; returns its size, in bytes."""
        return self.store(1 + index, pack_exception(error, room=REPORT_ROOM))

    def read_report(self, index: int, size: int) -> bytes:
        """Returns what worker ``index`` reported, packed."""
        return self._reports[1 + index, :size].tobytes()

    def note(self, index: int) -> np.ndarray:
        """Returns the bytes for what worker ``index`` says of how it collects; for :class:`WorkerRecord`."""
        return self._notes[index]

    def store(self, row: int, content: bytes) -> int:
        """Store the content of report ``row``, 0 being that of the engine itself; return its size, in bytes."""
        self._reports[row, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        return len(content)
