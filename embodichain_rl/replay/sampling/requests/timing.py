"""The number of steps per second of trajectories, and checks of windows that are given as times."""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.requests.windows import TimedWindows
from embodichain_rl.replay.schema import TRAJECTORY, Key, Schema, StepField, as_array
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["FPS", "check_rate", "check_timestamps", "rates_of"]

FPS: Key = (TRAJECTORY, "fps")
"""The number of steps per second of a trajectory, if it is stored."""

TIMESTAMP: Key = ("timestamp",)
"""The time of a step in seconds, as LeRobot names it, if it is stored."""


def rates_of(storage: TrajectoryReader, rows: Rows, timed: TimedWindows) -> np.ndarray:
    """Return the number of steps per second of each trajectory, ``float64`` ``[B]``.

    Raises:
        SchemaMismatchError: when there is no number at the key.
        InvalidArgumentError: when a number is not positive.
    """
    if not isinstance(timed.fps, tuple):
        return np.full(len(rows.ids), timed.fps)
    field = _number_of_trajectory(storage.arena.schema, timed.fps)
    if field is None:
        raise SchemaMismatchError(
            f"Got fps={timed.fps!r}, but what is stored has no number there for each trajectory: {storage.schema}. "
            "Write it with the steps, the same at each step of a trajectory, or give fps as a number."
        )
    rates = _read(storage, field, rows)
    wrong = ~(np.isfinite(rates) & (rates > 0.0))
    if wrong.any():
        whole = wrong & storage.ledger.still_valid(rows.ids)
        if whole.any():
            raise InvalidArgumentError(
                f"Got {np.unique(rates[whole])[:5]} steps per second at {timed.fps!r} of the trajectories "
                f"{np.unique(rows.ids[whole])[:5]}; they must be positive."
            )
        rates = np.where(wrong, 1.0, rates)
    return rates


def check_rate(storage: TrajectoryReader, rows: Rows, timed: TimedWindows) -> None:
    """Refuse trajectories that say another number of steps per second than the one that was given.

    Raises:
        InvalidArgumentError: when one does.
    """
    field = _number_of_trajectory(storage.arena.schema, FPS)
    if field is None:
        return
    rates = _read(storage, field, rows)
    different = ~np.isclose(rates, timed.fps, rtol=1e-5)
    if different.any():
        different &= storage.ledger.still_valid(rows.ids)
    if different.any():
        raise InvalidArgumentError(
            f"Got delta_timestamps at fps={timed.fps:g}, but trajectories {np.unique(rows.ids[different])[:5]} have "
            f"{np.unique(rates[different])[:5]} steps per second, by {FPS}. Give fps={FPS!r}: then the steps are those "
            "at each trajectory's own rate."
        )


def check_timestamps(
    storage: TrajectoryReader,
    rows: Rows,
    wanted: list[np.ndarray],
    edges: tuple[np.ndarray, np.ndarray],
    placed: np.ndarray,
    timed: TimedWindows,
) -> None:
    """Refuse windows whose steps are not at the times that were asked for, by the stored timestamps of the steps.

    Args:
        storage: where the trajectories are.
        rows: the trajectories.
        wanted: the steps of each window, ``int64`` ``[B, n]``.
        edges: the first and the last step that there are, ``int64`` ``[B, 1]``.
        placed: the drawn steps, and what belongs to them.
        timed: what was asked for.

    Raises:
        InvalidArgumentError: when the difference is above the tolerance.
    """
    schema = storage.arena.schema
    number = schema.number_of(TIMESTAMP)
    if number is None or not _is_time(schema.fields[number]):
        return
    drawn = placed[:, None] if placed.ndim == 1 else placed[:, :1]
    steps = np.concatenate([drawn, *wanted], axis=1)
    there = (steps >= edges[0]) & (steps <= edges[1])
    at = rows.starts[:, None] + np.where(there, steps, drawn)
    stored = as_array(storage.arena.copy_steps(number, at)).reshape(steps.shape)
    asked = np.concatenate([np.asarray(times) for _, times in timed.times])
    # A stored float has a rounding error of its own.
    slack = 4.0 * np.finfo(stored.dtype).eps * np.abs(stored).max(initial=0.0)
    late = stored[:, 1:].astype(np.float64) - stored[:, :1] - asked
    wrong = (np.abs(late) > timed.tolerance_s + slack) & there[:, 1:]
    if not wrong.any():
        return
    of_row = wrong.any(axis=1) & storage.ledger.still_valid(rows.ids)
    if of_row.any():
        row = int(np.argmax(of_row))
        column = int(np.argmax(wrong[row]))
        fps = f"fps={timed.fps:g}" if isinstance(timed.fps, float) else f"fps={timed.fps!r}"
        raise InvalidArgumentError(
            f"Got delta_timestamps at {fps}, but in trajectory {rows.ids[row]} the step {steps[row, 1 + column]} is "
            f"{stored[row, 1 + column] - stored[row, 0]:.6g} s after the step {drawn[row, 0]} by 'timestamp', not "
            f"{asked[column]:g} s. Give the fps that it was recorded at, or a larger tolerance_s than "
            f"{timed.tolerance_s:g} s."
        )


def _is_time(field: StepField) -> bool:
    return field.dtype in (torch.float32, torch.float64) and torch.Size(field.shape).numel() == 1


def _number_of_trajectory(schema: Schema, key: Key) -> StepField | None:
    """Return the field of a number of each trajectory; None where there is none."""
    for field in schema.trajectory_fields:
        is_number = not (field.is_text or field.dtype.is_complex or field.dtype == torch.bool)
        if field.key == key and is_number and torch.Size(field.shape).numel() == 1:
            return field
    return None


def _read(storage: TrajectoryReader, field: StepField, rows: Rows) -> np.ndarray:
    values = storage.trajectory_values(field.key, rows.ids)
    return torch.from_numpy(np.ascontiguousarray(values)).view(field.dtype).double().numpy().reshape(-1)
