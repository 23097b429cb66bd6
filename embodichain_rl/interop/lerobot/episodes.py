"""Whole episodes as arrays: what LeRobot datasets are written from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embodichain_rl.interop.lerobot.features import Column, Columns
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["Episode", "combined", "read_episode", "statistics_of"]

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)

SAMPLED_IMAGES = 32
"""The number of images of an episode that its statistics are computed from."""


@dataclass(frozen=True)
class Episode:
    """One episode.

    Attributes:
        values: by feature ``[T, *shape]``; images ``uint8`` ``[T, H, W, C]``; text is a list of strings.
        tasks: the task of each frame.
        timestamps: ``float32`` ``[T]``.
    """

    values: dict[str, Any]
    tasks: list[str]
    timestamps: np.ndarray

    def __len__(self) -> int:
        return len(self.timestamps)

    @property
    def nbytes(self) -> int:
        """The number of bytes of its arrays."""
        return sum(value.nbytes for value in self.values.values() if isinstance(value, np.ndarray))


def read_episode(
    storage: TrajectoryStorage, columns: Columns, trajectory_id: int, fps: float, task: str = ""
) -> Episode | None:
    """Read one trajectory; return None if it has been overwritten.

    A retired trajectory is read as well, as long as its memory has not been used for another one.
    """
    ids = np.array([trajectory_id])
    rows = storage.ledger.rows_of(ids)
    length = int(rows.lengths[0])
    if length < 0:
        return None
    steps = int(rows.starts[0]) + np.arange(length)
    values = {column.name: _read(storage, column, ids, steps) for column in columns.columns}
    tasks = [task] * length
    if columns.task is not None:
        field, number = columns.task
        if number is None:
            texts = np.repeat(storage.trajectory_values(field.key, ids).reshape(-1), length)
        else:
            texts = as_array(storage.arena.copy_steps(number, steps).cpu()).reshape(-1)
        tasks = _strings(storage, texts)
    if columns.timestamp is None:
        timestamps = (np.arange(length) / fps).astype(np.float32)
    else:
        stored = storage.arena.copy_steps(columns.timestamp, steps).cpu()
        timestamps = as_array(stored).reshape(-1).astype(np.float32)
    if not storage.ledger.unchanged(rows).all():
        return None
    return Episode(values, tasks, timestamps)


def _read(storage: TrajectoryStorage, column: Column, ids: np.ndarray, steps: np.ndarray) -> Any:
    if column.number is None:
        stored = np.ascontiguousarray(storage.trajectory_values(column.field.key, ids))
        read = torch.from_numpy(stored).view(column.field.dtype).repeat_interleave(len(steps), dim=0)
    else:
        read = storage.values_at(column.number, steps, storage.ledger.rows_of(ids)).cpu()
    if column.kind == "text":
        return _strings(storage, as_array(read).reshape(-1))
    if read.dtype == torch.bfloat16:
        read = read.float()
    array = as_array(read)
    if column.kind == "image" and column.channels_first:
        array = np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return array.reshape(len(steps), *(column.field.shape or (1,))) if column.kind == "value" else array


def _strings(storage: TrajectoryStorage, text_ids: np.ndarray) -> list[str]:
    known = {number: storage.texts.get(number) or "" for number in np.unique(text_ids).tolist()}
    return [known[number] for number in text_ids.tolist()]  # others are overwritten: the ids say so afterwards


def statistics_of(values: np.ndarray, *, image: bool) -> dict[str, np.ndarray]:
    """Return the statistics of one feature in one episode, as LeRobot names and shapes them.

    Args:
        values: ``[T, *shape]``; images ``[T, H, W, C]``.
        image: whether these are images: then the statistics are those of the channels, ``[C, 1, 1]``, from 0 to 1.

    Returns:
        The statistics of each number of a vector, and of each column of a matrix: LeRobot can't aggregate others.
    """
    count = len(values)
    if image:
        values = values[:: max(1, count // SAMPLED_IMAGES)]
        flat = values.reshape(-1, values.shape[-1])[:: max(1, values[0].size // 30_000)]
    else:
        flat = values.reshape(-1, values.shape[-1] if values.ndim > 1 else 1)
    exact = flat.astype(np.float64)
    quantiles = np.quantile(exact, QUANTILES, axis=0)
    found = {
        "min": exact.min(axis=0),
        "max": exact.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
        **{f"q{round(100 * q):02d}": value for q, value in zip(QUANTILES, quantiles, strict=True)},
    }
    shape = (-1, 1, 1) if image else (-1,)
    scale = 255.0 if image else 1.0
    return {**{name: (value / scale).reshape(shape) for name, value in found.items()}, "count": np.array([count])}


def combined(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the statistics of two sets of frames together; quantiles are averaged, as LeRobot does."""
    n, m = int(first["count"][0]), int(second["count"][0])
    mean = (n * first["mean"] + m * second["mean"]) / (n + m)
    squares = n * (first["std"] ** 2 + (first["mean"] - mean) ** 2)
    squares = squares + m * (second["std"] ** 2 + (second["mean"] - mean) ** 2)
    quantiles = {name: (n * first[name] + m * second[name]) / (n + m) for name in first if name.startswith("q")}
    return {
        "min": np.minimum(first["min"], second["min"]),
        "max": np.maximum(first["max"], second["max"]),
        "mean": mean,
        "std": np.sqrt(squares / (n + m)),
        **quantiles,
        "count": np.array([n + m]),
    }
