"""How many chunks are drawn for every trajectory inserted: pacing between producers and consumers.

The terms are Reverb's (Cassirer et al. 2021, "Reverb: A Framework For Experience Replay", arXiv:2102.04736)::

    diff = inserts * samples_per_insert - samples

An insert may go ahead while ``diff + samples_per_insert <= max_diff``, a sample of ``n`` chunks while
``diff - n >= min_diff``. Before ``min_size_to_sample`` inserts, every insert may go ahead and no sample.

**Counting takes no lock.** Every process adds to a row of its own in shared memory; readers sum the rows. The lock
between processes is taken to claim a row, once a process, and to change the settings.

**Dead processes.** A row outlives its process with its counts. When no fresh row is left, a new process continues to
count in the row of a dead one. No count is moved, so none is ever missing or counted twice.

**Every change is one store.** The settings, and the counts at which they were set, have two copies. The number of
changes, even or odd, selects the valid one. A process killed in the middle of a change has changed nothing or
everything.
"""

from __future__ import annotations

import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import CheckpointError, InvalidArgumentError, RateLimitTimeoutError, SharingError
from embodichain_rl.shared import ALIGNMENT, CrossProcessLock, Deadline, SharedBlock, own_process, process_is_alive

__all__ = ["RateLimiter"]

ROWS = 1024
"""Living processes that can count."""

LEAST_RATIO = 1e-6
"""The least ``samples_per_insert``: one chunk for a million trajectories. To insert without end, raise ``max_diff``."""

FIRST_PAUSE, LONGEST_PAUSE = 0.5e-3, 20e-3
"""Seconds between two polls of a waiting process: doubled from the first up to the longest."""

CHANGES, USED_ROWS, LOCK_HOLDER = range(3)  # words of the header
PID, PROCESS_START, INSERTS, SAMPLES, WAITING, INSERT_WAIT, SAMPLE_WAIT = range(7)  # columns of a row
WORDS = ALIGNMENT // 8  # of the header and of each row: a cache line, so that counting processes don't share one


@dataclass(slots=True)
class _State:
    """The settings, and the counts at one moment; whole numbers are exact up to 9e15."""

    samples_per_insert: float
    paused: float = 0.0
    inserts: float = 0.0
    """All inserts ever counted, also while paused; ``samples`` likewise."""
    samples: float = 0.0
    paced_inserts: float = 0.0
    """Inserts counted while not paused; ``paced_samples`` likewise."""
    paced_samples: float = 0.0
    inserts_when_set: float = 0.0
    """``paced_inserts`` when ``samples_per_insert`` was last set."""
    samples_when_set: float = 0.0
    diff: float = 0.0
    free: float = 0.0
    """The part of ``diff`` from inserts before ``min_size_to_sample``, which need no samples."""


_FIELDS = tuple(_State.__dataclass_fields__)


class RateLimiter:
    """Pacing that keeps the number of chunks drawn per trajectory inserted close to a target, across processes.

    Producers call :meth:`wait_to_insert` before they make a trajectory and :meth:`count_insert` after inserting it,
    consumers :meth:`wait_to_sample` and :meth:`count_sample`. Permission is not a reservation: several processes that
    go ahead at the same moment can take ``diff`` beyond a limit by as much as they insert or draw.

    Pass it to other processes when they are started, under every start method. All must see each other's process ids
    (one container, one pid namespace).

    Args:
        samples_per_insert: chunks to draw for every trajectory inserted, on average; at least 1e-6.
        min_size_to_sample: trajectories inserted before the first sample may go ahead; until then inserts are free.
            Those inserted while paused count here. At most the ``max_trajectories`` of the buffer.
        min_diff: samples wait that would take ``diff``, in chunks, below it; ``-inf``: none waits.
        max_diff: inserts wait that would take ``diff``, in chunks, above it; ``inf``: none waits. The default is the
            ``diff`` of the free inserts, plus a tenth of that of ``min_size_to_sample`` inserts, at least that of two
            inserts and two chunks. It changes with ``samples_per_insert``.

    Raises:
        InvalidArgumentError: an argument is invalid; or ``max_diff - min_diff`` is less than
            ``samples_per_insert + 1``, so that producers and consumers would wait for each other.

    Example:
        >>> limiter = RateLimiter(4.0, max_diff=8.0)
        >>> for _ in range(2):
        ...     assert limiter.wait_to_insert(timeout=0.0)
        ...     limiter.count_insert()
        >>> limiter.wait_to_insert(timeout=0.0)  # a third would make diff 12
        False
        >>> limiter.wait_to_sample(4, timeout=1.0)
        >>> limiter.count_sample(4)
        >>> limiter.wait_to_insert(timeout=0.0), limiter.stats()["diff"]
        (True, 4.0)
    """

    def __init__(
        self,
        samples_per_insert: float,
        *,
        min_size_to_sample: int = 1,
        min_diff: float = -math.inf,
        max_diff: float | None = None,
    ) -> None:
        start = _State(checked_float("samples_per_insert", samples_per_insert, minimum=LEAST_RATIO))
        self.min_size_to_sample = checked_int("min_size_to_sample", min_size_to_sample, minimum=1)
        self.min_diff = min_diff if min_diff == -math.inf else checked_float("min_diff", min_diff)
        unlimited = max_diff is None or max_diff == math.inf
        self._given_max_diff = max_diff if unlimited else checked_float("max_diff", max_diff)
        self._check_room_for(1, start)
        self._block = SharedBlock(8 * (WORDS + ROWS * WORDS + 2 * len(_FIELDS)))
        self._map()
        self._commit(start)

    def described(self) -> dict[str, Any]:
        """Return the settings, as JSON, and the number of the shared memory; see :meth:`over`."""
        unlimited = self._given_max_diff is None or math.isinf(self._given_max_diff)
        return {
            "number": self._block.number,
            "min_size_to_sample": self.min_size_to_sample,
            "min_diff": None if math.isinf(self.min_diff) else self.min_diff,
            "max_diff": None if unlimited else self._given_max_diff,
        }

    @classmethod
    def over(cls, described: dict[str, Any], block: SharedBlock) -> RateLimiter:
        """Return the rate limiter of another process, to read its counters.

        Args:
            described: what :meth:`described` returned there.
            block: its shared memory; it may be read-only.
        """
        limiter = cls.__new__(cls)
        limiter.min_size_to_sample = described["min_size_to_sample"]
        limiter.min_diff = -math.inf if described["min_diff"] is None else described["min_diff"]
        limiter._given_max_diff, limiter._block = described["max_diff"], block
        limiter._map()
        return limiter

    def _map(self) -> None:
        self._header = self._block.array(np.int64, (WORDS,))
        self._rows = self._block.array(np.int64, (ROWS, WORDS), offset=8 * WORDS)
        self._states = self._block.array(np.float64, (2, len(_FIELDS)), offset=8 * (WORDS + ROWS * WORDS))
        self._lock = CrossProcessLock(self._block, self._header[LOCK_HOLDER:])
        self._start_anew()
        _limiters.add(self)

    def _start_anew(self) -> None:
        # Also in a forked child: it must not add to its parent's row, and another thread may hold the parent's mutex.
        self._row: np.ndarray | None = None
        self._mutex = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_header", "_rows", "_states", "_lock", "_row", "_mutex")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    # -------------------------------------------------------------------------------------------------- counting

    @graph_break
    def count_insert(self, n: int = 1) -> None:
        """Count ``n`` trajectories as inserted.

        Raises:
            InvalidArgumentError: ``n`` is not an integer of at least 0.
            SharingError: more living processes count than there are rows for.
            LedgerLockTimeoutError: at a process's first count, when a stopped process holds the lock.
        """
        self._add(INSERTS, checked_int("n", n, minimum=0))

    @graph_break
    def count_sample(self, n: int) -> None:
        """Count ``n`` chunks as drawn; raise what :meth:`count_insert` raises."""
        self._add(SAMPLES, checked_int("n", n, minimum=0))

    def _add(self, column: int, n: int) -> None:
        with self._mutex:  # between the threads of this process: an addition is a load and a store
            if self._row is None:
                self._row = self._claim_row()
            self._row[column] += n

    def _claim_row(self) -> np.ndarray:
        with self._lock:
            used = int(self._header[USED_ROWS])
            number = used if used < ROWS else self._row_of_a_dead_process()
            row = self._rows[number]
            row[WAITING] = 0
            row[PID], row[PROCESS_START] = own_process()
            self._header[USED_ROWS] = max(used, number + 1)
            return row

    def _row_of_a_dead_process(self) -> int:
        for number, (pid, start) in enumerate(self._rows[:, [PID, PROCESS_START]].tolist()):
            if not process_is_alive(pid, start):
                return number
        raise SharingError(
            f"{ROWS} living processes count inserts and samples, as many as there are rows for; process {os.getpid()} "
            "is one too many. Use fewer producer and consumer processes."
        )

    def _read(self) -> _State:
        while True:
            changes = int(self._header[CHANGES])
            state = _State(*self._states[changes % 2].tolist())
            rows = self._rows[: self._header[USED_ROWS], INSERTS : SAMPLES + 1]
            inserts, samples = rows.sum(axis=0).tolist()
            if self._header[CHANGES] == changes:  # else the counts may belong to another state
                break
        new_inserts, new_samples = inserts - state.inserts, samples - state.samples
        if not state.paused:
            free_inserts = min(new_inserts, max(0.0, self.min_size_to_sample - state.inserts))
            state.free += free_inserts * state.samples_per_insert
            state.diff += new_inserts * state.samples_per_insert - new_samples
            state.paced_inserts += new_inserts
            state.paced_samples += new_samples
        state.inserts, state.samples = inserts, samples
        return state

    @graph_break
    def stats(self) -> dict[str, float]:
        """Return the counters by name.

        * ``inserts``, ``samples``: trajectories and chunks counted while not paused.
        * ``samples_per_insert``: the target; ``samples_per_insert_measured``: the ratio since the target was last set,
          NaN before an insert.
        * ``diff``: in chunks.
        * ``waiting_producers``: producers that are blocked in :meth:`wait_to_insert`, in living processes.
        """
        now = self._read()
        waiting = self._rows[self._rows[:, WAITING] > 0].tolist()
        inserts, samples = now.paced_inserts - now.inserts_when_set, now.paced_samples - now.samples_when_set
        return {
            "inserts": int(now.paced_inserts),
            "samples": int(now.paced_samples),
            "samples_per_insert": now.samples_per_insert,
            "samples_per_insert_measured": samples / inserts if inserts else math.nan,
            "diff": now.diff,
            "waiting_producers": sum(r[WAITING] for r in waiting if process_is_alive(r[PID], r[PROCESS_START])),
        }

    def waited(self) -> dict[str, float]:
        """Return the seconds that all producers, and all consumers, have spent in waits that have ended.

        Returns:
            ``insert_wait_s`` and ``sample_wait_s``.
        """
        insert, sample = self._rows[:, INSERT_WAIT : SAMPLE_WAIT + 1].sum(axis=0).tolist()
        return {"insert_wait_s": insert / 1e9, "sample_wait_s": sample / 1e9}

    def state_dict(self) -> dict[str, float]:
        """Return the counts and the current settings as numbers by name, for a checkpoint.

        Example:
            >>> limiter, other = RateLimiter(4.0), RateLimiter(4.0)
            >>> limiter.count_insert(3)
            >>> other.load_state_dict(limiter.state_dict())
            >>> other.stats()["diff"]
            12.0
        """
        state = self._read()
        return {name: getattr(state, name) for name in _FIELDS}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Set the counts and the settings that can change to those of :meth:`state_dict` of a limiter.

        ``min_size_to_sample``, ``min_diff`` and ``max_diff`` stay as they are.

        Raises:
            CheckpointError: ``state`` is not a state of a rate limiter.
        """
        try:
            loaded = _State(**{name: float(state[name]) for name in _FIELDS})
            valid = len(state) == len(_FIELDS) and all(map(math.isfinite, state.values()))
        except (KeyError, TypeError, ValueError, AttributeError):
            valid = False
        if not valid or loaded.samples_per_insert < LEAST_RATIO or min(loaded.inserts, loaded.samples) < 0:
            raise CheckpointError(f"Got the state {state!r}, which is not that of a rate limiter.")
        self._add(INSERTS, 0)  # claims a row
        with self._lock:
            # The counts are sums over the rows of all processes: this one's makes up for the difference.
            now = self._read()
            self._add(INSERTS, int(loaded.inserts - now.inserts))
            self._add(SAMPLES, int(loaded.samples - now.samples))
            self._commit(loaded)

    # --------------------------------------------------------------------------------------------------- waiting

    @graph_break
    def wait_to_insert(self, timeout: float, *, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Wait until an insert may go ahead; return whether it may.

        Args:
            timeout: seconds to wait at most; 0 does not wait.
            interrupted: called at every poll, at least every 20 ms; when it returns True, the wait ends with False.

        Raises:
            InvalidArgumentError: ``timeout`` is not a number of at least 0.
        """
        timeout = checked_float("timeout", timeout, minimum=0.0)
        if self._may_insert():
            return True
        self._add(WAITING, 1)
        began = time.monotonic_ns()
        try:
            return _wait(self._may_insert, timeout, interrupted)
        finally:
            self._add(WAITING, -1)
            self._add(INSERT_WAIT, time.monotonic_ns() - began)

    @graph_break
    def wait_to_sample(self, n: int, timeout: float) -> None:
        """Wait until ``n`` chunks may be drawn, at most ``timeout`` seconds.

        Raises:
            RateLimitTimeoutError: the time has passed; the message names what was missing.
            InvalidArgumentError: ``max_diff - min_diff`` is less than ``samples_per_insert + n``, so that producers
                and consumers would wait for each other; or an argument is invalid.
        """
        n = checked_int("n", n, minimum=1)
        timeout = checked_float("timeout", timeout, minimum=0.0)
        if self._may_sample(n):
            return
        began = time.monotonic_ns()
        try:
            if _wait(lambda: self._may_sample(n), timeout, lambda: False):
                return
        finally:
            self._add(SAMPLE_WAIT, time.monotonic_ns() - began)
        size = int(self._read().inserts)
        counters = ", ".join(f"{name}={value:.15g}" for name, value in self.stats().items())
        raise RateLimitTimeoutError(
            f"No sample of {n} chunks could go ahead within {timeout:g} s: it needs min_size_to_sample="
            f"{self.min_size_to_sample} trajectories, of which there were {size}, and diff - {n} of at least "
            f"min_diff={self.min_diff:g} ({counters}). Look whether the producers run and end their episodes. If they "
            "are slow: raise samples_per_insert or the timeout, or lower min_diff or min_size_to_sample."
        )

    def _may_insert(self) -> bool:
        now = self._read()
        if now.paused or now.inserts < self.min_size_to_sample:
            return True
        return now.diff + now.samples_per_insert <= self._max_diff(now)

    def _may_sample(self, n: int) -> bool:
        now = self._read()
        if now.paused:
            return True
        self._check_room_for(n, now)  # at every poll: samples_per_insert may have changed
        return now.inserts >= self.min_size_to_sample and now.diff - n >= self.min_diff

    def _max_diff(self, state: _State) -> float:
        if self._given_max_diff is not None:
            return self._given_max_diff
        ratio, first = state.samples_per_insert, self.min_size_to_sample
        return state.free + max(0.0, first - state.inserts) * ratio + max(0.1 * first * ratio, 2 * ratio, 2.0)

    def _check_room_for(self, n: int, state: _State) -> None:
        needed, max_diff = self.min_diff + state.samples_per_insert + n, self._max_diff(state)
        if max_diff < needed:
            raise InvalidArgumentError(
                f"To draw {n} chunks at once, max_diff must be at least min_diff + samples_per_insert + {n} = "
                f"{needed:g}, got {max_diff:g}: producers and consumers would wait for each other. Raise max_diff or "
                "lower min_diff."
            )

    # -------------------------------------------------------------------------------------------------- changing

    @property
    def samples_per_insert(self) -> float:
        """Chunks to draw for every trajectory inserted; can be set by every process, while the others run.

        A new value applies to what is counted from then on. ``diff`` continues from its current value, at most from
        ``max_diff``: inserts and samples of the past are not judged by the new value.

        Raises:
            InvalidArgumentError: when set to a value that the constructor refuses.
        """
        return self._read().samples_per_insert

    @samples_per_insert.setter
    def samples_per_insert(self, value: float) -> None:
        ratio = checked_float("samples_per_insert", value, minimum=LEAST_RATIO)
        with self._lock:
            state = self._read()
            state.samples_per_insert = ratio
            self._check_room_for(1, state)
            state.inserts_when_set, state.samples_when_set = state.paced_inserts, state.paced_samples
            # The default max_diff falls with the ratio: producers must not block until the excess is drawn.
            state.diff = min(state.diff, self._max_diff(state))
            self._commit(state)

    @property
    def paused(self) -> bool:
        """Whether nobody waits and ``diff`` stays as it is."""
        return bool(self._read().paused)

    def pause(self) -> None:
        """Let every insert and sample go ahead, in all processes, without a change of ``diff``: for a prefill."""
        self._pause(1.0)

    def resume(self) -> None:
        """End :meth:`pause`; ``diff`` continues from its value then."""
        self._pause(0.0)

    def _pause(self, paused: float) -> None:
        with self._lock:
            state = self._read()
            state.paused = paused
            self._commit(state)

    def _commit(self, state: _State) -> None:
        changes = int(self._header[CHANGES]) + 1
        self._states[changes % 2] = [getattr(state, name) for name in _FIELDS]
        self._header[CHANGES] = changes


def _wait(may_go_ahead: Callable[[], bool], timeout: float, interrupted: Callable[[], bool]) -> bool:
    deadline = Deadline(timeout)
    pause = FIRST_PAUSE
    while not may_go_ahead():
        left = deadline.left()
        if left <= 0 or interrupted():
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, LONGEST_PAUSE)
    return True


_limiters: weakref.WeakSet[RateLimiter] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    for limiter in list(_limiters):
        limiter._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
