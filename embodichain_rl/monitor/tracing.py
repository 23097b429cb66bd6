"""A trace of workers, inserts and samples, for Perfetto or ``chrome://tracing``: what is seen from outside.

The rows in shared memory are read some hundred times a second. What has grown between two looks becomes an event, as
long as the time that its process has counted for it. So nothing in the run changes, and the cost is that of the reader.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import numpy as np

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import SharingError
from embodichain_rl.monitor.source import Source, Watchable, watched
from embodichain_rl.replay.ledger import MetricWord

__all__ = ["trace"]

W = MetricWord
LOOK_EVERY = 0.004
"""Seconds between two looks."""

COUNTERS_EVERY = 0.1
"""Seconds between two values of the curves."""


def trace(engine_or_buffer: Watchable | Source, path: str | os.PathLike[str], seconds: float = 10.0) -> int:
    """Record what workers and learners do for some seconds, in Chrome's trace format; return the number of events.

    Open the file at https://ui.perfetto.dev or ``chrome://tracing``. Each process has a track, with its calls of
    ``extend()`` and ``sample()``; each worker of an engine one with its phases; and the fill of the buffer, uploads and
    waiting workers are curves. Calls within 4 ms are one event, which says how many there were.

    Args:
        engine_or_buffer: of this process, or a :class:`Source` that is attached to another one.
        path: the file, ``.json``.
        seconds: how long to look.

    Raises:
        InvalidArgumentError: ``seconds`` is not positive.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=100, chunk_size=4)
        >>> trace(rb, os.devnull, seconds=0.2) > 0
        True
    """
    source = watched(engine_or_buffer)
    seconds = checked_float("seconds", seconds, minimum=0.01)
    recording = _Recording(source)
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        try:
            recording.look()
        except SharingError:
            break
        time.sleep(LOOK_EVERY)
    recording.end()
    with open(path, "w") as file:
        json.dump({"traceEvents": recording.events, "displayTimeUnit": "ms"}, file)
    return len(recording.events)


class _Recording:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.events: list[dict[str, Any]] = []
        self._before: dict[int, np.ndarray] = {}
        self._phases: dict[int, tuple[str, int, int]] = {}
        self._named: set[tuple[int, str]] = set()
        self._counters_at = 0.0

    def look(self) -> None:
        now = time.monotonic_ns()
        for row in self.source.buffer.storage.ledger.metrics.used():
            pid, before = int(row[W.PID]), self._before.get(int(row[W.PID]))
            self._before[pid] = row
            if before is None:
                continue
            self._calls(pid, "extend", row, before, (W.EXTENDS, W.EXTEND_NS, W.LAST_INSERT_AT))
            self._calls(pid, "sample", row, before, (W.BATCHES, W.DATA_NS, W.LAST_SAMPLE_AT))
        if time.monotonic() >= self._counters_at:
            self._counters_at = time.monotonic() + COUNTERS_EVERY
            self._counters(now)

    def _calls(self, pid: int, name: str, row: np.ndarray, before: np.ndarray, words: tuple[int, int, int]) -> None:
        count, spent, last = words
        calls, took, ended = int(row[count] - before[count]), int(row[spent] - before[spent]), int(row[last])
        if calls <= 0:
            return
        self._name(pid, name)
        self._add("X", name, pid, name, ended - took, dur=took / 1e3, args={"calls": calls})

    def _counters(self, now: int) -> None:
        stats = self.source.read().stats
        curves = {"trajectories": stats["trajectories"], "being copied": stats.get("writing", 0)}
        if stats.get("rate_limiter"):
            curves["workers that wait"] = stats["rate_limiter"]["waiting_producers"]
        for name, value in curves.items():
            self._add("C", name, self.source.pid or 0, name, now, args={name: value})
        for index, worker in enumerate(stats.get("workers", ())):
            phase = "held" if worker["held"] else worker["phase"]
            known = self._phases.get(index)
            if known is None or known[0] != phase:
                self._end_phase(index, now)
                self._phases[index] = phase, now, worker["pid"]

    def _end_phase(self, index: int, now: int) -> None:
        if index in self._phases:
            phase, since, pid = self._phases[index]
            self._name(pid, "phase")
            self._add("X", phase, pid, "phase", since, dur=(now - since) / 1e3, args={"worker": index})

    def end(self) -> None:
        now = time.monotonic_ns()
        for index in self._phases:
            self._end_phase(index, now)

    def _name(self, pid: int, track: str) -> None:
        if (pid, track) not in self._named:
            self._named.add((pid, track))
            self._add("M", "thread_name", pid, track, 0, args={"name": track})

    def _add(self, kind: str, name: str, pid: int, track: str, at: int, **more: Any) -> None:
        tracks = {"phase": 1, "extend": 2, "sample": 3}
        self.events.append({"ph": kind, "name": name, "pid": pid, "tid": tracks.get(track, 0), "ts": at / 1e3, **more})
