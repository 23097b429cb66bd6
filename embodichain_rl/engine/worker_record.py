"""What an engine sees of one worker: how far it has come, what it has counted, why it ended."""

from __future__ import annotations

import enum
import os
import time
from typing import Any

import numpy as np

from embodichain_rl.engine.channel_memory import NOTE_BYTES, ChannelMemory, WorkerWord

__all__ = ["Phase", "WorkerRecord"]

TELL_EVERY = 5_000_000
"""Nanoseconds between two signs of life of a worker that takes steps."""


class Phase(enum.IntEnum):
    """How far a worker has come."""

    ABSENT = 0
    """There is no process, or it has not come to run any code of the engine."""
    BUILDING = 1
    """It builds its environment and its policy."""
    BUILT = 2
    """It has built them, and has not finished a step."""
    ACTING = 3
    """It acts."""


_PHASE, _BEAT, _STEPS, _PENDING = WorkerWord.PHASE, WorkerWord.BEAT, WorkerWord.STEPS, WorkerWord.PENDING
_ACTING = Phase.ACTING.value


class WorkerRecord:
    """What one producer says of itself. Written by that producer, but for :meth:`begin` and :meth:`used_policy`.

    Args:
        channel: the engine's.
        index: which producer.
    """

    def __init__(self, channel: ChannelMemory, index: int) -> None:
        self.channel = channel
        self.index = index
        self._row = channel.row(index)
        self._words = self._row.data  # the same: single words take half the time on it
        self._note = channel.note(index)
        self._untold = 0
        self._told_at = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"channel": self.channel, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["channel"], state["index"])  # type: ignore[misc]

    def begin(self) -> None:
        """Clears what an earlier process left, before another one starts. Called by the owner."""
        for word in (WorkerWord.REPORT_SIZE, WorkerWord.NOTE_SIZE, WorkerWord.PID, WorkerWord.PENDING):
            self._row[word] = 0
        self._row[WorkerWord.STARTS] += 1
        self.enter(Phase.ABSENT)

    def enter(self, phase: Phase) -> None:
        """Says how far the worker has come."""
        if phase is Phase.BUILDING:
            self._row[WorkerWord.PID] = os.getpid()
        self.beat()
        self._row[WorkerWord.PHASE] = phase.value

    def beat(self) -> None:
        """Gives a sign of life, and tells of all steps that were counted."""
        self._tell(time.monotonic_ns())

    def stepped(self, steps: int) -> bool:
        """Counts steps that the environments took, and gives a sign of life every ``TELL_EVERY``; says whether it did.

        Fast environments take a step in microseconds, of which the shared words would take one or two.
        """
        self._untold += steps
        now = time.monotonic_ns()
        if now - self._told_at < TELL_EVERY:
            return False
        self._words[_PHASE] = _ACTING
        self._tell(now)
        return True

    def _tell(self, now: int) -> None:
        words = self._words
        words[_STEPS] += self._untold
        words[_PENDING] += self._untold
        words[_BEAT] = self._told_at = now
        self._untold = 0

    def wrote(self, steps: int) -> None:
        """Counts one trajectory that was written."""
        self.beat()  # its steps are counted before it is
        self._row[WorkerWord.WRITTEN_TRAJECTORIES] += 1
        self._row[WorkerWord.WRITTEN_STEPS] += steps
        self._settle(steps)

    def rejected(self, steps: int) -> None:
        """Counts one trajectory that was not accepted."""
        self.beat()
        self._row[WorkerWord.REJECTED] += 1
        self._settle(steps)

    def _settle(self, steps: int) -> None:
        self._row[WorkerWord.PENDING] = max(0, int(self._row[WorkerWord.PENDING]) - steps)
        self._row[WorkerWord.PHASE] = Phase.ACTING.value

    def count_attempts(self, rejected: int, failed: int) -> None:
        """Sets how many demonstrations were not accepted, and how many could not be planned."""
        self._row[WorkerWord.REJECTED], self._row[WorkerWord.FAILED_ATTEMPTS] = rejected, failed

    def note_collector(self, text: str) -> None:
        """Says which collector rolls out, and why not another one; whole before its size says that it is there."""
        content = text.encode()[:NOTE_BYTES]
        self._note[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        self._row[WorkerWord.NOTE_SIZE] = len(content)

    def report(self, error: BaseException) -> None:
        """Leaves an exception for the owner, whole before its size says that it is there."""
        self.beat()
        self._row[WorkerWord.REPORT_SIZE] = self.channel.write_report(self.index, error)

    def used_policy(self, version: int) -> None:
        """Notes which version of the policy the worker was given. Called by the owner."""
        self._row[WorkerWord.POLICY_VERSION] = version

    # ----------------------------------------------------------------------------------------- what the owner reads

    @property
    def reported(self) -> bytes | None:
        """The exception that the worker left, packed; None if it left none."""
        size = int(self._row[WorkerWord.REPORT_SIZE])
        return self.channel.read_report(self.index, size) if size else None

    @property
    def phase(self) -> Phase:
        """How far the worker has come."""
        return Phase(int(self._row[WorkerWord.PHASE]))

    @property
    def pid(self) -> int:
        """The worker's process id; 0 before it runs."""
        return int(self._row[WorkerWord.PID])

    @property
    def collector(self) -> str | None:
        """Which collector rolls out, and why not another one; None before it is built."""
        size = int(self._row[WorkerWord.NOTE_SIZE])
        return self._note[:size].tobytes().decode(errors="ignore") if size else None

    @property
    def policy_version(self) -> int:
        """The version of the policy that it was given last."""
        return int(self._row[WorkerWord.POLICY_VERSION])

    @property
    def trajectories(self) -> int:
        """Trajectories that it has written, its predecessors' included."""
        return int(self._row[WorkerWord.WRITTEN_TRAJECTORIES])

    @property
    def steps(self) -> int:
        """Steps that its environments took, its predecessors' included."""
        return int(self._row[WorkerWord.STEPS])

    @property
    def num_rejected(self) -> int:
        """Trajectories that were not accepted."""
        return int(self._row[WorkerWord.REJECTED])

    def seconds_since_beat(self) -> float:
        """Seconds since the last sign of life."""
        return (time.monotonic_ns() - int(self._row[WorkerWord.BEAT])) / 1e9

    def stats(self) -> dict[str, Any]:
        """Returns what the worker says of itself, by name.

        ``collector`` is ``"GymnasiumCollector"``, ``"DemonstrationCollector"``, or ``"Collector: "`` (TorchRL's) and
        the reason why it is not the first; None before it is built, and where there is none.
        """
        return {
            "pid": self.pid,
            "phase": self.phase.name.lower(),
            "collector": self.collector,
            "steps": self.steps,
            "pending_steps": int(self._row[WorkerWord.PENDING]),
            "trajectories": self.trajectories,
            "rejected": self.num_rejected,
            "failed_attempts": int(self._row[WorkerWord.FAILED_ATTEMPTS]),
            "restarts": max(0, int(self._row[WorkerWord.STARTS]) - 1),
            "seconds_since_heartbeat": self.seconds_since_beat(),
            "policy_version": self.policy_version,
        }

    def describe(self) -> str:
        """Says how far the worker has come, as part of a sentence."""
        if self.phase is Phase.ABSENT:
            return f"worker {self.index} is starting"
        return (
            f"worker {self.index} (process {self.pid}) is {self.phase.name.lower()}, has taken {self.steps:,} steps, "
            f"written {self.trajectories:,} trajectories and rejected {self.num_rejected:,}, and gave its last sign of "
            f"life {self.seconds_since_beat():.1f} s ago"
        )
