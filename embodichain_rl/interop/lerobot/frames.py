"""The live frames of a buffer, numbered as in a LeRobot dataset, and their tasks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError
from embodichain_rl.interop.lerobot.features import Columns
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Frames", "LiveFrames", "checked_rate", "rate_of", "without_rate"]

TIMESTAMPS_FOR_RATE = 256
"""The number of timestamps that the number of frames per second is read off."""


class Frames(NamedTuple):
    """The frames of some trajectories, one after the other, oldest first."""

    rows: Rows
    """The trajectories."""
    ends: np.ndarray
    """The position behind the last frame of each trajectory, ``int64`` ``[n]``."""
    before: np.ndarray
    """The number of steps that were published before each trajectory, ``int64`` ``[n]``."""

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the trajectory and the step within it, for each position of a frame."""
        of = np.searchsorted(self.ends, positions, side="right")
        return of, positions - (self.ends[of] - self.rows.lengths[of])


class LiveFrames:
    """The live frames of a storage; the same list until a trajectory is published or evicted.

    Args:
        storage: where they are.
        columns: which field has the task.
        default_task: the task where there is no text.

    Attributes:
        tasks (list[str]): the tasks that were found so far, in the order of their first frame.
    """

    def __init__(self, storage: TrajectoryStorage, columns: Columns, default_task: str) -> None:
        self.storage = storage
        self.task = columns.task
        self.default_task = default_task
        self.tasks: list[str] = []
        self._numbers: dict[str, int] = {}
        self._seen_until = 0
        self._range: tuple[int, ...] | None = None
        self._frames: Frames | None = None

    def now(self) -> Frames:
        """Return the live frames.

        Raises:
            EmptyBufferError: when there is no trajectory.
        """
        ledger = self.storage.ledger
        ids = ledger.live()
        live = (ids.oldest, ids.end, len(ids), *ledger.edits)
        if self._frames is None or live != self._range:
            rows = ledger.existing(ids.all())
            before = ledger.steps_before(rows.ids)
            valid = ledger.unchanged(rows)
            if not valid.all():
                rows, before = rows.select(valid), before[valid]
            if not len(rows.ids):
                raise EmptyBufferError("Got a buffer without a trajectory. Wait until len(rb) > 0.")
            self._frames, self._range = Frames(rows, np.cumsum(rows.lengths), before), live
            self._find_tasks(rows)
        return self._frames

    def task_numbers(self, ids: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the number of the task of each step, ``int64`` ``[B]``; see :attr:`tasks`.

        Args:
            ids: of the trajectories, ``int64`` ``[B]``.
            steps: in the arena, ``int64`` ``[B]``.
        """
        if self.task is None:
            return np.zeros(len(ids), dtype=np.int64)
        field, number = self.task
        if number is None:
            texts = self.storage.trajectory_values(field.key, ids)
        else:
            texts = as_array(self.storage.arena.copy_steps(number, steps).cpu())
        return self._numbers_of(texts.reshape(-1))

    def _find_tasks(self, rows: Rows) -> None:
        """Give numbers to the tasks of trajectories that are new, in their order."""
        new = rows.select(rows.ids >= self._seen_until)
        if self.task is None:
            if not self.tasks:
                self._number(self.default_task)
        elif len(new.ids):
            steps = np.repeat(new.starts - (np.cumsum(new.lengths) - new.lengths), new.lengths)
            at = steps + np.arange(len(steps))
            self.task_numbers(new.ids, at)
        if len(new.ids):
            self._seen_until = int(new.ids[-1]) + 1

    def _numbers_of(self, text_ids: np.ndarray) -> np.ndarray:
        unique, first, inverse = np.unique(text_ids, return_index=True, return_inverse=True)
        numbers = np.zeros(len(unique), dtype=np.int64)
        for position in np.argsort(first):
            text = self.storage.texts.get(int(unique[position]))
            if text is not None:  # else overwritten while it was read
                numbers[position] = self._number(text)
        return numbers[inverse.reshape(-1)]

    def _number(self, task: str) -> int:
        number = self._numbers.get(task)
        if number is None:
            number = self._numbers[task] = len(self.tasks)
            self.tasks.append(task)
        return number


def checked_rate(storage: TrajectoryStorage, columns: Columns, fps: float | None) -> float:
    """Return ``fps``; where it is None, the rate that the trajectories say, see :func:`rate_of`.

    Raises:
        InvalidArgumentError: when it is not positive, or not given and not found.
    """
    rate = rate_of(storage, columns) if fps is None else checked_float("fps", fps, minimum=1e-9)
    if rate is None:
        raise without_rate()
    return rate


def without_rate() -> InvalidArgumentError:
    """Return the error for trajectories whose rate nobody says."""
    return InvalidArgumentError(
        "Got no fps, and the trajectories don't say it at ('trajectory', 'fps') or 'timestamp'. Give fps=..., the "
        "number of frames per second."
    )


def rate_of(storage: TrajectoryStorage, columns: Columns) -> float | None:
    """Return the number of frames per second that the newest trajectories say; None if they don't say it.

    It is read from ``("trajectory", "fps")``, else from the differences of the timestamps of the newest trajectory.

    Raises:
        InvalidArgumentError: when trajectories have different rates.
    """
    rows = storage.ledger.live_rows()
    for field in storage.arena.schema.trajectory_fields:
        if field.key == ("trajectory", "fps") and len(rows.ids):
            values = np.ascontiguousarray(storage.trajectory_values(field.key, rows.ids))
            rates = np.unique(torch.from_numpy(values).view(field.dtype).double().numpy())
            if len(rates) > 1:
                raise InvalidArgumentError(
                    f"Got trajectories of {rates[:5]} frames per second; a LeRobot dataset has one rate. Give fps=..."
                )
            return float(rates[0])
    if columns.timestamp is None or not len(rows.ids):
        return None
    length = min(int(rows.lengths[-1]), TIMESTAMPS_FOR_RATE)
    times = as_array(storage.arena.copy_steps(columns.timestamp, int(rows.starts[-1]) + np.arange(length)).cpu())
    gaps = np.diff(times.reshape(-1).astype(np.float64))
    if not len(gaps) or not np.isfinite(gaps).all() or np.median(gaps) <= 0.0:
        return None
    rate = 1.0 / float(np.median(gaps))
    return float(round(rate)) if abs(rate - round(rate)) < 1e-2 * rate else rate
