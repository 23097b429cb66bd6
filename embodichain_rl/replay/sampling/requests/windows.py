"""Windows: the steps around a drawn step, by key; checks of ``windows`` and ``delta_timestamps``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from embodichain_rl._checks import checked_float, checked_key
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.schema import Key

__all__ = ["TOLERANCE", "TimedWindows", "Windows", "checked_delta_timestamps", "checked_windows"]

Windows = tuple[tuple[Key, tuple[int, ...]], ...]
"""For each key, the steps to be copied, relative to the drawn step."""

TOLERANCE = 1e-4
"""The largest distance between a timestamp and a step, in seconds, as in LeRobot."""

LONGEST_WINDOW = 1_000_000
"""The number of steps of the longest window that is accepted; a longer one can only be a mistake."""


@dataclass(frozen=True, slots=True)
class TimedWindows:
    """Windows in LeRobot's format: for each key, times relative to the drawn step.

    Attributes:
        times: for each key, the times in seconds.
        fps: the number of steps per second; or the key of a trajectory value that says it for each trajectory.
        tolerance_s: the largest distance between a time and a step, in seconds.
    """

    times: tuple[tuple[Key, tuple[float, ...]], ...]
    fps: float | Key
    tolerance_s: float = TOLERANCE

    def steps_at(self, fps: float) -> Windows:
        """Return the steps of the times.

        Args:
            fps: the number of steps per second.

        Raises:
            InvalidArgumentError: when a time is not that of a step, within the tolerance.

        Example:
            >>> TimedWindows(((("observation",), (-0.2, 0.0)),), fps=10.0).steps_at(10.0)
            ((('observation',), (-2, 0)),)
        """
        windows = []
        for key, of_key in self.times:
            times = np.array(of_key)
            steps = np.round(times * fps).astype(np.int64)
            off = np.abs(steps / fps - times) > self.tolerance_s
            if off.any():
                raise InvalidArgumentError(
                    f"Got the times {times[off].tolist()} for {key!r}, which lie between the steps at fps={fps:g}. "
                    f"Give multiples of 1 / fps, or a larger tolerance_s than {self.tolerance_s:g} seconds."
                )
            windows.append((key, tuple(steps.tolist())))
        return tuple(windows)


def checked_windows(windows: Any) -> Windows:
    """Return the steps of each window.

    Args:
        windows: a mapping from keys to the first and the last step relative to the drawn step, as a tuple; or to a list
            of steps.

    Raises:
        InvalidArgumentError: when they are something else.

    Example:
        >>> checked_windows({"observation": [-4, -2, 0], ("next", "reward"): (0, 2)})
        ((('observation',), (-4, -2, 0)), (('next', 'reward'), (0, 1, 2)))
    """
    if not isinstance(windows, Mapping) or not windows:
        raise InvalidArgumentError(
            f"Got windows={windows!r}; it must be a mapping from keys to (first, last) steps, or to lists of steps."
        )
    return tuple((checked_key(name), _steps_of(name, window)) for name, window in windows.items())


def _steps_of(name: Any, window: Any) -> tuple[int, ...]:
    try:
        steps = tuple(_integer(step) for step in window)
    except (TypeError, ValueError):
        steps = ()
    is_range = isinstance(window, tuple)
    if not steps or (is_range and len(steps) != 2):
        raise InvalidArgumentError(
            f"Got the window {window!r} for {name!r}; needed is (first, last), or a list of steps."
        )
    if max(steps) - min(steps) >= LONGEST_WINDOW:
        raise InvalidArgumentError(
            f"Got the window {window!r} for {name!r}; it can have {LONGEST_WINDOW:,} steps at most."
        )
    if not is_range:
        return steps
    first, last = steps
    if first > last:
        raise InvalidArgumentError(f"Got the window {window!r} for {name!r}, whose last step is before its first.")
    return tuple(range(first, last + 1))


def checked_delta_timestamps(delta_timestamps: Any, fps: Any, tolerance_s: Any = None) -> TimedWindows:
    """Return windows in LeRobot's format.

    Args:
        delta_timestamps: a mapping from keys to lists of times in seconds.
        fps: the number of steps per second; or the key of the trajectory value that says it, ``("trajectory", name)``.
        tolerance_s: the largest distance between a time and a step, in seconds; by default 0.1 ms.

    Raises:
        InvalidArgumentError: when they are something else; or when a time is not that of a step at ``fps``.

    Example:
        >>> checked_delta_timestamps({"observation": [-0.2, 0.0], "action": [0.0, 0.1]}, fps=10).steps_at(10.0)
        ((('observation',), (-2, 0)), (('action',), (0, 1)))
    """
    if isinstance(fps, str | tuple):
        fps = checked_key(fps)
        if fps[0] != "trajectory" or len(fps) < 2:
            raise InvalidArgumentError(
                f"Got fps={fps!r}; as a key it must be one of a trajectory value, such as ('trajectory', 'fps')."
            )
    else:
        fps = checked_float("fps", fps, minimum=1e-9)
    tolerance_s = TOLERANCE if tolerance_s is None else checked_float("tolerance_s", tolerance_s, minimum=0.0)
    if not isinstance(delta_timestamps, Mapping) or not delta_timestamps:
        raise InvalidArgumentError(f"Got delta_timestamps={delta_timestamps!r}; it must map keys to lists of seconds.")
    checked = []
    for name, seconds in delta_timestamps.items():
        try:
            times = np.asarray(seconds, dtype=np.float64)
        except (TypeError, ValueError):
            times = np.empty(0)
        if times.ndim != 1 or not len(times) or not np.isfinite(times).all():
            raise InvalidArgumentError(f"Got the times {seconds!r} for {name!r}; needed is a list of seconds.")
        checked.append((checked_key(name), tuple(times.tolist())))
    timed = TimedWindows(tuple(checked), fps, tolerance_s)
    if not isinstance(fps, tuple):
        timed.steps_at(fps)
    return timed


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError
    return int(value)
