"""``LiveMetadata``: what ``LeRobotDatasetMetadata`` is, for a live buffer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.interop.lerobot.features import DEFAULT_FEATURES, Columns
from embodichain_rl.interop.lerobot.frames import Frames, LiveFrames
from embodichain_rl.interop.lerobot.packages import package
from embodichain_rl.replay import buffer_statistics

__all__ = ["QUANTILES", "LiveMetadata"]

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
"""The quantiles that LeRobot's statistics have."""

CODEBASE_VERSION = "v3.0"

Stats = dict[str, dict[str, np.ndarray]]


class LiveEpisodes:
    """The live episodes, as ``meta.episodes`` has them: a column by its name, a row by its number."""

    def __init__(self, frames: LiveFrames) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames.now().ends)

    def __getitem__(self, key: str | int) -> Any:
        columns = self._columns(self._frames.now())
        if isinstance(key, str):
            return columns[key]
        return {name: column[key] for name, column in columns.items()}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = self._columns(self._frames.now())
        for row in zip(*columns.values(), strict=True):
            yield dict(zip(columns, row, strict=True))

    @staticmethod
    def _columns(frames: Frames) -> dict[str, list[int]]:
        return {
            "episode_index": frames.rows.ids.tolist(),
            "length": frames.rows.lengths.tolist(),
            "dataset_from_index": (frames.ends - frames.rows.lengths).tolist(),
            "dataset_to_index": frames.ends.tolist(),
        }


class LiveMetadata:
    """What is known of the live episodes of a buffer, under the names of ``LeRobotDatasetMetadata``.

    ``total_frames``, ``total_episodes``, ``episodes``, ``tasks`` and ``stats`` follow the data. ``tasks`` needs pandas,
    as LeRobot does. ``episodes`` has the positions of frames in the dataset as ``"dataset_from_index"`` and
    ``"dataset_to_index"``.

    Attributes:
        features: the features by name, as in ``info.json``.
        fps: the number of frames per second.
        robot_type: as given, or None.
        repo_id: as given.
        fixed_stats: statistics that replace the computed ones, by feature and name, such as ImageNet's.
    """

    def __init__(
        self,
        frames: LiveFrames,
        columns: Columns,
        fps: float,
        *,
        robot_type: str | None,
        repo_id: str,
        refresh_s: float,
    ) -> None:
        self.features = columns.features()
        self.fps = int(fps) if float(fps).is_integer() else fps
        self.robot_type = robot_type
        self.repo_id = repo_id
        self.revision = CODEBASE_VERSION
        self.root = Path(repo_id)
        self.fixed_stats: dict[str, dict[str, Any]] = {}
        self.episodes = LiveEpisodes(frames)
        self.subtasks = None
        self._frames, self._columns, self._refresh_s = frames, columns, refresh_s
        self._stats: Stats | None = None
        self._computed_at = -np.inf

    @property
    def stats(self) -> Stats:
        """The statistics of all live frames by feature: ``"mean"``, ``"std"``, ``"min"``, ``"max"``, ``"count"``,
        ``"q01"``, ``"q10"``, ``"q50"``, ``"q90"``, ``"q99"``.

        They have the shape of the feature; images have ``[C, 1, 1]``, from 0 to 1. They are computed anew when they
        are older than ``refresh_s`` seconds and read. A preprocessor of LeRobot has a copy: replace it with
        ``lerobot.processor.hotswap_stats(preprocessor, dataset.meta.stats)``.
        """
        if self._stats is None or time.monotonic() - self._computed_at > self._refresh_s:
            self.refresh()
        return self._stats  # type: ignore[return-value]

    def refresh(self) -> None:
        """Compute the statistics of what is live now."""
        self._computed_at = time.monotonic()
        self._stats = _statistics(self._frames, self._columns, self.fps)
        for name, fixed in self.fixed_stats.items():
            self._stats.setdefault(name, {}).update(fixed)

    @property
    def tasks(self) -> Any:
        """The tasks: a data frame with the column ``task_index``, indexed by the text."""
        self._frames.now()
        return package("pandas").DataFrame(
            {"task_index": range(len(self._frames.tasks))}, index=list(self._frames.tasks)
        )

    def get_task_index(self, task: str) -> int | None:
        """Return the number of a task; None if no frame had it so far."""
        self._frames.now()
        return self._frames.tasks.index(task) if task in self._frames.tasks else None

    @property
    def total_frames(self) -> int:
        """The number of live frames."""
        return self._frames.storage.ledger.num_steps

    @property
    def total_episodes(self) -> int:
        """The number of live episodes."""
        return len(self._frames.storage)

    @property
    def total_tasks(self) -> int:
        """The number of tasks that were found so far."""
        self._frames.now()
        return len(self._frames.tasks)

    @property
    def info(self) -> dict[str, Any]:
        """What ``info.json`` has, without paths."""
        return {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": self.robot_type,
            "total_episodes": self.total_episodes,
            "total_frames": self.total_frames,
            "total_tasks": self.total_tasks,
            "fps": self.fps,
            "splits": {"train": f"0:{self.total_episodes}"},
            "features": self.features,
        }

    @property
    def image_keys(self) -> list[str]:
        """The names of images."""
        return [name for name, feature in self.features.items() if feature["dtype"] == "image"]

    @property
    def video_keys(self) -> list[str]:
        """The names of videos: none."""
        return []

    @property
    def camera_keys(self) -> list[str]:
        """The names of images and videos."""
        return self.image_keys

    @property
    def names(self) -> dict[str, Any]:
        """The names of the axes or elements of each feature."""
        return {name: feature["names"] for name, feature in self.features.items()}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the features."""
        return {name: tuple(feature["shape"]) for name, feature in self.features.items()}


def _statistics(frames: LiveFrames, columns: Columns, fps: float) -> Stats:
    steps = {column.name: column for column in columns.columns if column.number is not None and column.kind != "text"}
    images = {
        column.field.key: 0 if column.channels_first else -1 for column in steps.values() if column.kind == "image"
    }
    found = buffer_statistics(
        frames.storage, [column.field.key for column in steps.values()], quantiles=QUANTILES, per_channel=images
    )
    stats: Stats = {}
    for name, column in steps.items():
        values = {kind: value.numpy().astype(np.float64) for kind, value in found[column.field.key].items()}
        count = values.pop("count").astype(np.int64)
        if column.kind == "image":
            values = {kind: value.reshape(-1, 1, 1) / 255 for kind, value in values.items()}
        stats[name] = {**{kind: np.atleast_1d(value) for kind, value in values.items()}, "count": count}
    now = frames.now()
    own = now.rows.lengths
    within = np.concatenate([np.arange(length) for length in own])
    numbers = {
        "timestamp": within / fps,
        "frame_index": within,
        "episode_index": np.repeat(now.rows.ids, own),
        "index": np.repeat(now.before, own) + within,
        "task_index": frames.task_numbers(np.repeat(now.rows.ids, own), np.repeat(now.rows.starts, own) + within),
    }
    for name in DEFAULT_FEATURES:
        stats[name] = _of_numbers(numbers[name])
    return stats


def _of_numbers(values: np.ndarray) -> dict[str, np.ndarray]:
    at = {f"q{round(100 * q):02d}": np.quantile(values, q) for q in QUANTILES}
    named = {"min": values.min(), "max": values.max(), "mean": values.mean(), "std": values.std(), **at}
    return {**{name: np.array([value]) for name, value in named.items()}, "count": np.array([len(values)])}
