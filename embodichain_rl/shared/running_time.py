"""Timeouts that count only the time in which the process that waits was running itself.

A whole job can be frozen for minutes or hours: ``scontrol suspend``, ``docker pause``, SIGSTOP, a virtual machine that
is moved. All clocks of the operating system go on meanwhile. When the job continues, nobody is late because of it. So
a process that waits measures how long it was away itself: it looks at the clock several times a second, and a much
longer gap is time in which it could not have seen anything.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

__all__ = ["LONGEST_SLICE", "Deadline", "RunningClock"]

LONGEST_SLICE = 0.2
"""Maximum seconds between two looks at the clock while one waits."""

LONGEST_GAP = 0.3
"""Seconds that a gap between two looks counts at most. What is longer, the process was not running."""

Result = TypeVar("Result")


class RunningClock:
    """A clock that stands still while this process is stopped or frozen.

    It must be read at least every ``LONGEST_SLICE`` seconds. It belongs to one thread.

    Example:
        >>> clock = RunningClock()
        >>> start = clock.now()
        >>> clock.now() - start < 1.0
        True
    """

    def __init__(self) -> None:
        self._read_at = time.monotonic()
        self._away = 0.0
        self._gaps: deque[tuple[float, float]] = deque(maxlen=1024)  # (end, seconds away until then)

    def now(self) -> float:
        """Return the time in seconds; only differences have a meaning."""
        now = time.monotonic()
        gap = now - self._read_at - LONGEST_GAP
        if gap > 0.0:
            self._away += gap
            self._gaps.append((now, self._away))
        self._read_at = now
        return now - self._away

    def seconds_since(self, moment: float) -> float:
        """Return how long this process was running since a moment of ``time.monotonic()``, in any process."""
        now = self.now() + self._away
        away_before = 0.0
        for end, away in reversed(self._gaps):
            if end <= moment:
                away_before = away
                break
        return max(0.0, now - moment - (self._away - away_before))


class Deadline:
    """A deadline that is postponed by the time in which this process is stopped or frozen.

    It must be looked at, by any of its methods, at least every ``LONGEST_SLICE`` seconds. Longer calls that block are
    made in slices.

    Args:
        seconds: the time until the deadline; it may be infinite.

    Example:
        >>> import threading
        >>> deadline = Deadline(60.0)
        >>> deadline.passed()
        False
        >>> Deadline(0.0).wait(threading.Event().wait)
        False
    """

    def __init__(self, seconds: float) -> None:
        self._clock = RunningClock()
        self._end = self._clock.now() + seconds

    def left(self) -> float:
        """Return the seconds that are left, at least 0."""
        return max(0.0, self._end - self._clock.now())

    def passed(self) -> bool:
        """Return whether the deadline has passed."""
        return self._clock.now() >= self._end

    def slice(self) -> float:
        """Return the seconds for which a call may block until the next look at the clock."""
        return min(self.left(), LONGEST_SLICE)

    def wait(self, wait: Callable[[float], Result]) -> Result:
        """Call a function that blocks for the given seconds, until its result is true or the deadline has passed.

        It is called at least once. The last result is returned.
        """
        while True:
            result = wait(self.slice())
            if result or self.passed():
                return result

    def join(self, thread: object) -> None:
        """Join a thread, until the deadline has passed."""

        def ended(seconds: float) -> bool:
            thread.join(seconds)  # type: ignore[attr-defined]
            return not thread.is_alive()  # type: ignore[attr-defined]

        self.wait(ended)
