"""The status of one worker in shared memory: phase, heartbeat, counters and the reported exception."""

from __future__ import annotations

import enum
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from embodichain_rl.engine.state.channel_memory import NOTE_BYTES, ChannelMemory, WorkerWord
from embodichain_rl.shared import process_state

__all__ = ["DOING", "Phase", "WorkerRecord"]

REPORT_INTERVAL = 5_000_000
"""Minimum time between two heartbeats of a worker that takes steps, in nanoseconds."""


REST_INTERVAL = 0.02
"""Seconds of one pause of a worker that is held."""


class Phase(enum.IntEnum):
    """The phase of a worker."""

    ABSENT = 0
    """There is no process, or it has not run any code of the engine yet."""
    BUILDING = 1
    """It is building its environment and its policy."""
    BUILT = 2
    """It has built them but has not finished a step."""
    ACTING = 3
    """It is collecting steps."""


DOING = {
    Phase.ABSENT: "importing",
    Phase.BUILDING: "building the environment",
    Phase.BUILT: "in the first reset",
    Phase.ACTING: "collecting",
}
"""What a worker does in each phase, in words."""

_PHASE, _BEAT, _STEPS, _PENDING = WorkerWord.PHASE, WorkerWord.BEAT, WorkerWord.STEPS, WorkerWord.PENDING
_ACTING = Phase.ACTING.value


class WorkerRecord:
    """The status of one producer. Written by that producer, except :meth:`begin` and :meth:`used_policy`.

    Args:
        channel: the channel of the engine.
        index: the index of the producer.
    """

    def __init__(self, channel: ChannelMemory, index: int) -> None:
        self.channel = channel
        self.index = index
        self._row = channel.row(index)
        self._words = self._row.data  # the same memory, in which access to a single word takes half the time
        self._note = channel.note(index)
        self._unreported = 0
        self._reported_at = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"channel": self.channel, "index": self.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["channel"], state["index"])  # type: ignore[misc]

    def begin(self, *, again: bool = False) -> None:
        """Clear the status of an earlier process before another one starts. Called by the owner.

        Args:
            again: whether it was called for this start before, which counts once.
        """
        for word in (
            WorkerWord.REPORT_SIZE,
            WorkerWord.CLOSING_REPORT_SIZE,
            WorkerWord.NOTE_SIZE,
            WorkerWord.PID,
            WorkerWord.PENDING,
            WorkerWord.CLAIM,
            WorkerWord.RESTING,
        ):
            self._row[word] = 0
        self._row[WorkerWord.STARTS] += not again
        self.enter(Phase.ABSENT)

    def enter(self, phase: Phase) -> None:
        """Change to ``phase``."""
        if phase is Phase.BUILDING:
            self._row[WorkerWord.PID] = os.getpid()
        self.beat()
        if phase is Phase.BUILT:
            self._row[WorkerWord.BUILT_AT] = time.monotonic_ns()
            self._row[WorkerWord.STEPS_WHEN_BUILT] = self._row[WorkerWord.STEPS]
        self._row[WorkerWord.PHASE] = phase.value

    def beat(self) -> None:
        """Write a heartbeat, and report all counted steps."""
        self._report_steps(time.monotonic_ns())

    def stepped(self, steps: int) -> bool:
        """Count steps of the environments, and report them at most every ``REPORT_INTERVAL``.

        Fast environments take a step in a few microseconds, and writing the shared words at each step would add one or
        two.

        Args:
            steps: the number of steps since the last call.

        Returns:
            Whether the steps were reported and a heartbeat was written.
        """
        self._unreported += steps
        now = time.monotonic_ns()
        if now - self._reported_at < REPORT_INTERVAL:
            return False
        self._report_steps(now)
        return True

    def _report_steps(self, now: int) -> None:
        words = self._words
        if self._unreported:  # also where a short first episode waits for its turn
            words[_PHASE] = _ACTING
        words[_STEPS] += self._unreported
        words[_PENDING] += self._unreported
        words[_BEAT] = self._reported_at = now
        self._unreported = 0

    def claim_turn(self, published: Callable[[], int], target: int) -> bool:
        """Claim that this worker writes one more trajectory; see :meth:`EngineChannel.claim_turn`."""
        return self.channel.claim_turn(self.index, published, target)

    @property
    def is_ahead(self) -> bool:
        """Whether this worker has written more trajectories than another one."""
        return self.trajectories > self.channel.fewest_written()

    def rest(self) -> None:
        """Pause for a moment, since the engine holds its producers."""
        self._row[WorkerWord.RESTING] = 1
        self.beat()
        time.sleep(REST_INTERVAL)
        self._row[WorkerWord.RESTING] = self.channel.held

    def wrote(self, steps: int) -> None:
        """Count one written trajectory."""
        self.beat()  # reports its steps before the trajectory itself is counted
        self.count_written(steps)
        self._settle(steps)

    def count_written(self, steps: int) -> None:
        """Count one trajectory that was written on behalf of the worker."""
        self._row[WorkerWord.CLAIM] = 0
        self._row[WorkerWord.WRITTEN_TRAJECTORIES] += 1
        self._row[WorkerWord.WRITTEN_STEPS] += steps

    def rejected(self, steps: int) -> None:
        """Count one rejected trajectory."""
        self.beat()
        self._row[WorkerWord.REJECTED] += 1
        self._settle(steps)

    def _settle(self, steps: int) -> None:
        self._row[WorkerWord.PENDING] = max(0, int(self._row[WorkerWord.PENDING]) - steps)
        self._row[WorkerWord.PHASE] = Phase.ACTING.value

    def count_attempts(self, rejected: int, failed: int) -> None:
        """Set the numbers of rejected demonstrations and of failed planning attempts."""
        self._row[WorkerWord.REJECTED], self._row[WorkerWord.FAILED_ATTEMPTS] = rejected, failed

    def note_collector(self, text: str) -> None:
        """Store which collector is used, and why no faster one is."""
        # The text is written before its size, which announces it.
        content = text.encode()[:NOTE_BYTES]
        self._note[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        self._row[WorkerWord.NOTE_SIZE] = len(content)

    def note_loss(self, error: BaseException) -> None:
        """Store why the worker was lost, for those who watch the engine. Called by the owner."""
        content = f"{type(error).__name__}: {error}".encode()[:NOTE_BYTES]
        self.channel.last_error(self.index)[: len(content)] = np.frombuffer(content, dtype=np.uint8)
        self._row[WorkerWord.LAST_ERROR_SIZE] = len(content)

    @property
    def last_error(self) -> str | None:
        """Why a process of this worker was lost last; None if none was."""
        size = int(self._row[WorkerWord.LAST_ERROR_SIZE])
        return self.channel.last_error(self.index)[:size].tobytes().decode(errors="replace") if size else None

    @property
    def steps_per_second(self) -> float | None:
        """Mean rate of steps since its environment was built; None before that."""
        built, beat = int(self._row[WorkerWord.BUILT_AT]), int(self._row[WorkerWord.BEAT])
        if not built or beat <= built:
            return None
        return (self.steps - int(self._row[WorkerWord.STEPS_WHEN_BUILT])) * 1e9 / (beat - built)

    def report(self, error: BaseException) -> None:
        """Store an exception for the owner."""
        self.beat()
        # The report is written before its size, which announces it.
        self._row[WorkerWord.REPORT_SIZE] = self.channel.write_report(self.index, error)

    def report_closing(self, error: BaseException) -> None:
        """Store an exception that was raised while the environments were closed."""
        self._row[WorkerWord.CLOSING_REPORT_SIZE] = self.channel.write_report(self.index, error, closing=True)

    def used_policy(self, version: int) -> None:
        """Set the version of the policy that the worker has received. Called by the owner."""
        self._row[WorkerWord.POLICY_VERSION] = version

    # --------------------------------------------------------------------------------- workers on other machines

    def snapshot(self) -> dict[str, Any]:
        """Return the status of a worker on another machine, for :meth:`mirror`."""
        return {
            "pid": os.getpid(),
            "phase": int(self.phase),
            "seconds_since_beat": self.seconds_since_beat(),
            "steps": self.steps,
            "pending": int(self._row[WorkerWord.PENDING]),
            "rejected": self.num_rejected,
            "failed_attempts": int(self._row[WorkerWord.FAILED_ATTEMPTS]),
            "policy_version": self.policy_version,
            "resting": bool(self._row[WorkerWord.RESTING]),
            "collector": self.collector,
            "reported": self.reported,
            "reported_closing": self.reported_closing,
        }

    def mirror(self, snapshot: dict[str, Any], before: dict[str, Any] | None) -> None:
        """Write the status of a worker on another machine, in its place.

        Args:
            snapshot: what :meth:`snapshot` returned there just now.
            before: the snapshot of the same worker that was mirrored before; None for the first one.
        """
        row = self._row
        earlier = before or {"steps": 0, "rejected": 0}
        row[WorkerWord.PID] = snapshot["pid"]
        row[WorkerWord.STEPS] += snapshot["steps"] - earlier["steps"]
        row[WorkerWord.REJECTED] += snapshot["rejected"] - earlier["rejected"]
        row[WorkerWord.PENDING] = snapshot["pending"]
        row[WorkerWord.FAILED_ATTEMPTS] = snapshot["failed_attempts"]
        row[WorkerWord.POLICY_VERSION] = snapshot["policy_version"]
        row[WorkerWord.RESTING] = snapshot["resting"]
        if snapshot["collector"] is not None and not row[WorkerWord.NOTE_SIZE]:
            self.note_collector(snapshot["collector"])
        for word, closing, name in (
            (WorkerWord.REPORT_SIZE, False, "reported"),
            (WorkerWord.CLOSING_REPORT_SIZE, True, "reported_closing"),
        ):
            if snapshot[name] is not None and not row[word]:
                row[word] = self.channel.forward_report(self.index, snapshot[name], closing=closing)
        if self.phase < Phase.BUILT <= snapshot["phase"]:
            row[WorkerWord.BUILT_AT] = time.monotonic_ns()
            row[WorkerWord.STEPS_WHEN_BUILT] = row[WorkerWord.STEPS]
        row[WorkerWord.BEAT] = time.monotonic_ns() - int(1e9 * snapshot["seconds_since_beat"])
        row[WorkerWord.PHASE] = snapshot["phase"]

    # ----------------------------------------------------------------------------------------- reading by the owner

    @property
    def reported(self) -> bytes | None:
        """The packed exception that the worker reported; None if it reported none."""
        size = int(self._row[WorkerWord.REPORT_SIZE])
        return self.channel.read_report(self.index, size) if size else None

    @property
    def reported_closing(self) -> bytes | None:
        """The packed exception that was raised while the worker closed its environments; None if there was none."""
        size = int(self._row[WorkerWord.CLOSING_REPORT_SIZE])
        return self.channel.read_report(self.index, size, closing=True) if size else None

    @property
    def phase(self) -> Phase:
        """The phase of the worker."""
        return Phase(int(self._row[WorkerWord.PHASE]))

    @property
    def pid(self) -> int:
        """The process id of the worker; 0 before it runs."""
        return int(self._row[WorkerWord.PID])

    @property
    def collector(self) -> str | None:
        """Which collector is used, and why no faster one is; None before it is built."""
        size = int(self._row[WorkerWord.NOTE_SIZE])
        return self._note[:size].tobytes().decode(errors="ignore") if size else None

    @property
    def policy_version(self) -> int:
        """The version of the policy that the worker received last."""
        return int(self._row[WorkerWord.POLICY_VERSION])

    @property
    def trajectories(self) -> int:
        """Number of trajectories written by this worker and its predecessors."""
        return int(self._row[WorkerWord.WRITTEN_TRAJECTORIES])

    @property
    def steps(self) -> int:
        """Number of steps taken by this worker and its predecessors."""
        return int(self._row[WorkerWord.STEPS])

    @property
    def num_rejected(self) -> int:
        """Number of rejected trajectories."""
        return int(self._row[WorkerWord.REJECTED])

    @property
    def last_beat(self) -> float:
        """The time of the last heartbeat, in seconds of ``time.monotonic()``."""
        return int(self._row[WorkerWord.BEAT]) / 1e9

    def seconds_since_beat(self) -> float:
        """Return the seconds since the last heartbeat."""
        return time.monotonic() - self.last_beat

    def stats(self) -> dict[str, Any]:
        """Return the status of the worker as a dict.

        * ``pid``: the process id, 0 before it runs; ``phase``: ``"absent"``, ``"building"``, ``"built"`` or
          ``"acting"``.
        * ``collector``: ``"GymnasiumCollector"``, ``"DemonstrationCollector"``, or ``"Collector: "`` (TorchRL's) with
          the reason why it is not the first; None before it is built, and if the producer has no collector.
        * ``steps``: steps taken; ``pending_steps``: those of unfinished trajectories.
        * ``trajectories``, ``rejected``: trajectories written and not accepted; ``failed_attempts``: failed plans of
          demonstrations.
        * ``restarts``: how often the worker was replaced; ``seconds_since_heartbeat``; ``policy_version``: the version
          of the policy that it received last.
        * ``steps_per_second``: since its environment was built; ``last_error``: why a process of it was lost last, None
          if none was; ``held``: whether it pauses, since the engine holds its producers.
        """
        return {
            "pid": self.pid,
            "phase": self.phase.name.lower(),
            "collector": self.collector,
            "steps": self.steps,
            "steps_per_second": self.steps_per_second,
            "pending_steps": int(self._row[WorkerWord.PENDING]),
            "trajectories": self.trajectories,
            "rejected": self.num_rejected,
            "failed_attempts": int(self._row[WorkerWord.FAILED_ATTEMPTS]),
            "restarts": max(0, int(self._row[WorkerWord.STARTS]) - 1),
            "seconds_since_heartbeat": self.seconds_since_beat(),
            "last_error": self.last_error,
            "policy_version": self.policy_version,
            "held": bool(self._row[WorkerWord.RESTING]),
        }

    def _stopped(self) -> str:
        state = process_state(self.pid)
        if state not in ("T", "t"):
            return ""
        return f", and is stopped (state {state}): continue it with `kill -CONT {self.pid}`"

    def describe(self) -> str:
        """Return the status of the worker as part of a sentence."""
        if self.phase is Phase.ABSENT:
            return f"worker {self.index} is starting"
        return (
            f"worker {self.index} (process {self.pid}) is {self.phase.name.lower()}, has taken {self.steps:,} steps, "
            f"written {self.trajectories:,} trajectories and rejected {self.num_rejected:,}, and sent its last "
            f"heartbeat {self.seconds_since_beat():.1f} s ago{self._stopped()}"
        )
