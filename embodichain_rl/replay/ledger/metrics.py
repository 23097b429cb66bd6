"""Counters and histograms of what every process does with a buffer, in shared memory, for those who watch it.

Each process has a row of its own, and is the only one that writes it. So counting takes no lock between processes, a
process that is killed damages nothing, and a reader never blocks anybody. A row outlives its process with its counts;
when no fresh row is left, a new process goes on counting in the row of a dead one.

Histograms have fixed buckets. A batch is counted when it is sampled. What is in it (ages, offsets, padding) is looked
at in at most one batch every ``DETAIL_INTERVAL``, so that the cost does not depend on how fast a process samples.
"""

from __future__ import annotations

import os
import threading
import time
import weakref

import numpy as np

from embodichain_rl.shared import CrossProcessLock, SharedBlock, own_process, process_is_alive

__all__ = ["AGE_EDGES", "HEAT_SHAPE", "LAG_EDGES", "METRICS_BYTES", "Meter", "MetricWord", "Metrics"]

ROWS = 128
"""Number of living processes that can count. Those beyond count for themselves."""

DETAIL_INTERVAL = 250_000_000
"""Nanoseconds between two batches of a process that are looked into, which takes longer than to sample them."""

AGE_EDGES = 1e-3 * 2.0 ** (np.arange(47) / 2.0)
"""The upper bounds of the buckets of ages, in seconds, 1 ms to 2.3 h, each the root of 2 apart; one bucket is above."""

LAG_EDGES = np.array([*range(16), *(base * 2**power for power in range(4, 12) for base in (1, 1.5))][:31], dtype=float)
"""The upper bounds of the buckets of policy versions, inclusive; one bucket is above."""

HEAT_SHAPE = (20, 24)
"""Buckets of the place in the trajectory, first to last step, and of the age, two of ``AGE_EDGES`` each."""

TIME_BUCKETS = 48
"""Buckets of durations: bucket ``k`` counts those below ``2**k`` nanoseconds and not below half of that."""

GROUPS = 16
"""Number of groups of a mixture that are counted."""


class MetricWord:
    """The words of a row. All are written by the process of the row."""

    (
        PID,
        PROCESS_START,
        INSERTED,
        INSERTED_STEPS,
        REJECTED,
        TRUNCATED,
        PENDING_TRAJECTORIES,
        PENDING_STEPS,
        EXTENDS,
        EXTEND_NS,
        CLAIMED_AT,
        LAST_INSERT_AT,
        BATCHES,
        CHUNKS,
        DATA_NS,
        FIRST_SAMPLE_BEGAN,
        LAST_SAMPLE_AT,
        REDRAWN,
        UNFIT,
        SEEN_CHUNKS,
        AGE_SUM,
        AGE_MIN,
        AGE_MAX,
        VERSIONED,
        LAG_SUM,
        LAG_MIN,
        LAG_MAX,
        SEEN_STEPS,
        PADDED_STEPS,
        GROUPS_USED,
        GROUPS_ARE_TEXT,
    ) = range(31)
    AGES = 32
    LAGS = AGES + len(AGE_EDGES) + 1
    HEAT = LAGS + len(LAG_EDGES) + 1
    SAMPLE_TIMES = HEAT + HEAT_SHAPE[0] * HEAT_SHAPE[1]
    GROUP_VALUES = SAMPLE_TIMES + TIME_BUCKETS
    GROUP_DRAWN = GROUP_VALUES + GROUPS
    GROUP_ASKED = GROUP_DRAWN + GROUPS
    """Shares in millionths; -1 where no mixture was asked for."""
    END = GROUP_ASKED + GROUPS


WORDS = -(-MetricWord.END // 64) * 64
METRICS_BYTES = 8 * ROWS * WORDS

W = MetricWord


class Meter:
    """What one process counts of one buffer.

    Args:
        row: ``int64`` ``[WORDS]``, which only this process writes.

    Attributes:
        row (np.ndarray): the row.
        words (memoryview): the same memory, in which access to a single word takes half the time. ``words[i] += n`` is
            not interrupted by another thread, since the interpreter changes threads only at calls and jumps.
        detail_at (int): the time, in nanoseconds, from which the next batch is looked into.
    """

    __slots__ = ("_lock", "detail_at", "row", "words")

    def __init__(self, row: np.ndarray) -> None:
        self.row = row
        self.words = row.data
        self.detail_at = 0
        self._lock = threading.Lock()

    def inserted(self, steps: int) -> None:
        """Count a published trajectory."""
        words = self.words
        words[W.INSERTED] += 1
        words[W.INSERTED_STEPS] += steps

    def looked_into(
        self, ages: np.ndarray, lags: np.ndarray, places: np.ndarray, steps: int, padded: int, took: int, now: int
    ) -> None:
        """Count what is in a batch.

        Args:
            ages: seconds since the publication of the trajectory of each chunk, ``float64`` ``[B]``.
            lags: policy versions behind the newest one, ``int64`` ``[n]``, of the chunks whose version is known.
            places: where each chunk begins in its trajectory, from 0 for the first to 1 for the last possible step.
            steps: the number of steps of the batch.
            padded: how many of them are padding.
            took: how long the call took, in nanoseconds.
            now: the time, in nanoseconds.
        """
        row, of_age = self.row, np.searchsorted(AGE_EDGES, ages)
        with self._lock:
            self.detail_at = now + DETAIL_INTERVAL
            row[W.SAMPLE_TIMES + took.bit_length()] += 1
            row[W.AGES : W.LAGS] += np.bincount(of_age, minlength=W.LAGS - W.AGES)
            heat = (np.minimum(places * HEAT_SHAPE[0], HEAT_SHAPE[0] - 1)).astype(np.int64) * HEAT_SHAPE[1]
            row[W.HEAT : W.SAMPLE_TIMES] += np.bincount(heat + of_age // 2, minlength=W.SAMPLE_TIMES - W.HEAT)
            _note_values(row, W.SEEN_CHUNKS, (ages * 1e9).astype(np.int64))
            if len(lags):
                row[W.LAGS : W.HEAT] += np.bincount(np.searchsorted(LAG_EDGES, lags), minlength=W.HEAT - W.LAGS)
                _note_values(row, W.VERSIONED, lags)
            row[W.SEEN_STEPS] += steps
            row[W.PADDED_STEPS] += padded

    def set_groups(self, values: list[int], drawn: list[int], asked: list[float | None], are_text: bool) -> None:
        """Set how often each group of a mixture was drawn by this process, and the share that was asked for."""
        n = min(len(values), GROUPS)
        with self._lock:
            self.row[W.GROUP_VALUES : W.GROUP_VALUES + n] = values[:n]
            self.row[W.GROUP_DRAWN : W.GROUP_DRAWN + n] = drawn[:n]
            shares = [-1 if share is None else round(share * 1e6) for share in asked[:n]]
            self.row[W.GROUP_ASKED : W.GROUP_ASKED + n] = shares
            self.row[W.GROUPS_USED], self.row[W.GROUPS_ARE_TEXT] = n, are_text


def _note_values(row: np.ndarray, first: int, values: np.ndarray) -> None:
    """Add values to four words: their number, sum, minimum and maximum."""
    known = row[first] > 0
    low, high = int(values.min()), int(values.max())
    row[first] += len(values)
    row[first + 1] += int(values.sum())
    row[first + 2] = min(int(row[first + 2]), low) if known else low
    row[first + 3] = max(int(row[first + 3]), high)


class Metrics:
    """The rows of all processes.

    Args:
        block: the shared memory.
        offset: where the rows begin, in bytes.
        lock: of the ledger; it is only taken to claim a row, once a process.
    """

    def __init__(self, block: SharedBlock, offset: int, lock: CrossProcessLock) -> None:
        self.rows: np.ndarray = block.array(np.int64, (ROWS, WORDS), offset)
        self._block, self._offset, self._lock = block, offset, lock
        self._meter: Meter | None = None
        self._claiming = threading.Lock()
        _every_metrics.add(self)

    @property
    def own(self) -> Meter:
        """The meter of this process."""
        meter = self._meter
        return self._claim() if meter is None else meter

    @property
    def has_own(self) -> bool:
        """Whether this process has counted anything."""
        return self._meter is not None

    def used(self) -> np.ndarray:
        """Return a copy of the rows in which a process has counted, ``int64`` ``[n, WORDS]``."""
        return self.rows[self.rows[:, W.PID] > 0]

    def _claim(self) -> Meter:
        with self._claiming:
            if self._meter is None:
                row = None if self._block.read_only else self._claimed_row()
                self._meter = Meter(np.zeros(WORDS, dtype=np.int64) if row is None else row)
            return self._meter

    def _claimed_row(self) -> np.ndarray | None:
        pid, start = own_process()
        with self._lock:
            for number, row in enumerate(self.rows):
                owner = int(row[W.PID]), int(row[W.PROCESS_START])
                if owner[0] and owner != (pid, start) and process_is_alive(*owner):
                    continue
                if not owner[0]:
                    try:
                        self._block.back(self._offset + 8 * WORDS * number, 8 * WORDS)
                    except OSError:  # a full disk: nobody sees the counts then
                        return None
                row[W.PENDING_TRAJECTORIES] = row[W.PENDING_STEPS] = 0
                row[W.CLAIMED_AT] = row[W.CLAIMED_AT] or time.monotonic_ns()
                row[W.PROCESS_START], row[W.PID] = start, pid
                return row
        return None

    def _start_anew(self) -> None:
        self._meter = None
        self._claiming = threading.Lock()


_every_metrics: weakref.WeakSet[Metrics] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    # A child must not add to the row of its parent.
    for metrics in list(_every_metrics):
        metrics._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
