"""The shared memory of an engine: named words, packed error reports and notes; ``lifecycle.py`` builds on it.

Each word has a single writer: the owner writes the head, worker ``k`` writes its row and its report, and each process
that samples writes a separate row. So a process that is killed at any instruction does not affect the others. A lock,
which is released when its holder dies, is only taken to claim a row, or the turn to write a requested trajectory.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from embodichain_rl.engine.processes import pack_exception
from embodichain_rl.shared import CrossProcessLock, SharedBlock, own_process, process_is_alive, process_state

__all__ = [
    "MAX_CONSUMERS",
    "MAX_EXCEPTION_BYTES",
    "MAX_GENERATIONS",
    "NOTE_BYTES",
    "SAMPLED_STATES",
    "ChannelMemory",
    "ConsumerWord",
    "HeadWord",
    "OnlineDataEngineState",
    "WorkerWord",
]

REPORT_BYTES = 256 * 1024
"""Size of the area for one packed exception, in bytes. Pages that are never written take no memory."""

MAX_EXCEPTION_BYTES = REPORT_BYTES - 1024
"""Maximum size of the exception itself, in bytes. The rest of the area is for what the owner adds."""

NOTE_BYTES = 512
"""Size of a worker's note about its collector, in bytes of UTF-8."""

MAX_GENERATIONS = 65_536
"""Number of generations whose size is known. Older ones count as the oldest of them."""

MAX_CONSUMERS = 1024
"""Maximum number of sampling processes that are counted separately. Further processes share a row."""


class OnlineDataEngineState(enum.StrEnum):
    """State of an engine: ``CREATED -> STARTING -> READY -> STOPPED | FAILED``. The last two are final.

    A state equals its name, and prints as its name.

    Example:
        >>> OnlineDataEngineState.READY == "READY", str(OnlineDataEngineState.READY)
        (True, 'READY')
    """

    CREATED = "CREATED"
    """The engine is not started yet."""
    STARTING = "STARTING"
    """The workers are starting, and the buffer is being filled."""
    READY = "READY"
    """The buffer has been filled, and the workers continue to collect."""
    FAILED = "FAILED"
    """The engine has failed. Sampling raises the reason."""
    STOPPED = "STOPPED"
    """The owner has stopped the engine."""

    @property
    def is_final(self) -> bool:
        """Whether the engine has failed or was stopped."""
        return self in (OnlineDataEngineState.FAILED, OnlineDataEngineState.STOPPED)


_STATES = tuple(OnlineDataEngineState)
"""The states in the order of their numbers in shared memory."""

SAMPLED_STATES = (_STATES.index(OnlineDataEngineState.STARTING), _STATES.index(OnlineDataEngineState.READY))
"""The numbers of the states in which an engine can be sampled."""


# The words of each table. They are plain integers, since indexing an array with a member of an enumeration takes
# microseconds, and numpy discards a Ctrl-C during that time.


class HeadWord:
    """The words of the whole engine. Written by its owner."""

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
        CLAIMS_LOCK_HOLDER,
        RUN_ID,
        CLOCK_OFFSET,
        HELD,
        BUFFER_SIZE,
        MANUAL,
        REQUESTED_GENERATION,
    ) = range(16)
    WORDS = 16


class ConsumerWord:
    """The words of one process that samples. Written by that process."""

    PID, PROCESS_START, CHUNKS, REDRAWN, RAISED_FAILURE = range(5)
    WORDS = 5


class WorkerWord:
    """The words of one worker. Written by the worker, except those that the owner clears or notes."""

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
        CLOSING_REPORT_SIZE,
        CLAIM,
        RESTING,
        BUILT_AT,
        STEPS_WHEN_BUILT,
        LAST_ERROR_SIZE,
    ) = range(19)
    WORDS = 19


class ChannelMemory:
    """The words, reports and notes of one engine.

    Like every shared block, it is passed to a child process when that process is started.

    Args:
        num_workers: the number of workers, each of which has a row.
        buffer_size: the number of trajectories of the first generation.
        manual: whether workers write only what is requested.
    """

    def __init__(self, num_workers: int, *, buffer_size: int = 1, manual: bool = False) -> None:
        self.num_workers = num_workers
        self._block = SharedBlock(
            self._words_size() + (1 + 2 * num_workers) * REPORT_BYTES + 2 * num_workers * NOTE_BYTES
        )
        self._map()
        self.head[HeadWord.RUN_ID] = secrets.randbits(63)
        self.head[HeadWord.CLOCK_OFFSET] = time.time_ns() - time.monotonic_ns()
        self.head[HeadWord.BUFFER_SIZE], self.head[HeadWord.MANUAL] = buffer_size, manual
        self.head[HeadWord.REQUESTED_GENERATION] = 1
        self.generation_ends[1] = buffer_size

    def _shapes(self) -> list[tuple[int, int]]:
        return [
            (1, HeadWord.WORDS),
            (self.num_workers, WorkerWord.WORDS),
            (MAX_CONSUMERS, ConsumerWord.WORDS),
            (1, MAX_GENERATIONS),
        ]

    def _words_size(self) -> int:
        return sum(8 * rows * columns for rows, columns in self._shapes())

    def _map(self) -> None:
        offset = 0
        tables = []
        for shape in self._shapes():
            tables.append(self._block.array(np.int64, shape, offset))
            offset += 8 * shape[0] * shape[1]
        self.head = self._head = tables[0][0]
        """The words of the whole engine."""
        self._worker_rows: np.ndarray = tables[1]
        self._consumer_rows: np.ndarray = tables[2]
        self.generation_ends = tables[3][0]
        """The number of trajectories at the end of each generation; of the newest ``MAX_GENERATIONS``."""
        self._reports = self._block.array(np.uint8, (1 + 2 * self.num_workers, REPORT_BYTES), offset)
        offset += self._reports.nbytes
        holder = self._head[HeadWord.CLAIMS_LOCK_HOLDER : HeadWord.CLAIMS_LOCK_HOLDER + 1]
        self._claims_lock = CrossProcessLock(self._block, holder)
        self._notes = self._block.array(np.uint8, (2 * self.num_workers, NOTE_BYTES), offset)

    @classmethod
    def over(cls, num_workers: int, block: SharedBlock) -> Self:
        """Return the memory of an engine that is in a block already, such as that of another process.

        Args:
            num_workers: the number of its workers.
            block: the block; it may be read-only.
        """
        memory = cls.__new__(cls)
        memory.__setstate__({"num_workers": num_workers, "block": block})
        return memory

    @property
    def block(self) -> SharedBlock:
        """The shared memory."""
        return self._block

    def __getstate__(self) -> dict[str, Any]:
        return {"num_workers": self.num_workers, "block": self._block}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.num_workers, self._block = state["num_workers"], state["block"]
        self._map()

    @property
    def state(self) -> OnlineDataEngineState:
        """The state of the engine."""
        return _STATES[self._head.item(HeadWord.STATE)]

    @state.setter
    def state(self, state: OnlineDataEngineState) -> None:
        self._head[HeadWord.STATE] = _STATES.index(state)

    def owner_is_alive(self) -> bool:
        """Return whether the process that made the engine is still running."""
        return process_is_alive(int(self._head[HeadWord.OWNER_PID]), int(self._head[HeadWord.OWNER_START]))

    def owner_is_stopped(self) -> bool:
        """Return whether the process that made the engine is stopped by a signal, such as Ctrl-Z."""
        return process_state(int(self._head[HeadWord.OWNER_PID])) == "T"

    def is_owner(self) -> bool:
        """Return whether this process made the engine."""
        return own_process() == (int(self._head[HeadWord.OWNER_PID]), int(self._head[HeadWord.OWNER_START]))

    @property
    def run_id(self) -> int:
        """A random number of the engine, at most 63 bits."""
        return self._head.item(HeadWord.RUN_ID)

    @property
    def clock_offset(self) -> int:
        """Unix time minus ``time.monotonic_ns``, in nanoseconds, when the engine was made."""
        return self._head.item(HeadWord.CLOCK_OFFSET)

    @property
    def held(self) -> bool:
        """Whether the producers are requested to pause."""
        return self._head.item(HeadWord.HELD) != 0

    @held.setter
    def held(self, held: bool) -> None:
        self._head[HeadWord.HELD] = held

    def claim_turn(self, index: int, published: Callable[[], int], target: int) -> bool:
        """Claim that worker ``index`` writes one more trajectory, and return whether it may.

        Args:
            index: the index of the worker.
            published: a function of the number of trajectories so far.
            target: the number of trajectories that may be written in all.
        """
        with self._claims_lock:
            claims = self._worker_rows[:, WorkerWord.CLAIM]
            if published() + int(claims.sum() - claims[index]) >= target:
                return False
            self.row(index)[WorkerWord.CLAIM] = 1
            return True

    def request_stop(self) -> None:
        """Request the producers to stop. Called by the owner."""
        self._head[HeadWord.STOP] = 1

    def stop_requested(self) -> bool:
        """Return whether the producers are requested to stop."""
        return self._head.item(HeadWord.STOP) != 0

    def row(self, index: int) -> np.ndarray:
        """Return the words of worker ``index``; for :class:`WorkerRecord`."""
        return self._worker_rows[index]

    def fewest_written(self) -> int:
        """Return the smallest number of trajectories that a worker has written."""
        return int(self._worker_rows[:, WorkerWord.WRITTEN_TRAJECTORIES].min())

    def write_report(self, index: int, error: BaseException, *, closing: bool = False) -> int:
        """Store the exception that worker ``index`` reports, and return its size in bytes.

        Args:
            index: the index of the worker.
            error: the exception.
            closing: whether it was raised while the worker closed its environments. It is stored beside the other one.
        """
        return self.store(self._report_row(index, closing), pack_exception(error, max_bytes=MAX_EXCEPTION_BYTES))

    def forward_report(self, index: int, packed: bytes, *, closing: bool = False) -> int:
        """Store the packed exception that worker ``index`` reported on another machine, and return its size."""
        return self.store(self._report_row(index, closing), packed)

    def read_report(self, index: int, size: int, *, closing: bool = False) -> bytes:
        """Return the packed exception that worker ``index`` reported."""
        return self._reports[self._report_row(index, closing), :size].tobytes()

    def _report_row(self, index: int, closing: bool) -> int:
        return 1 + index + (self.num_workers if closing else 0)

    def note(self, index: int) -> np.ndarray:
        """Return the bytes of the note of worker ``index`` about its collector; for :class:`WorkerRecord`."""
        return self._notes[index]

    def last_error(self, index: int) -> np.ndarray:
        """Return the bytes of the last error of worker ``index``; for :class:`WorkerRecord`."""
        return self._notes[self.num_workers + index]

    def store(self, row: int, content: bytes) -> int:
        """Store the content of report ``row`` and return its size in bytes. Row 0 belongs to the engine itself."""
        self._reports[row, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        return len(content)
