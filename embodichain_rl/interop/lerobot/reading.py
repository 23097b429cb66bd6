"""Read the episodes of a LeRobot dataset of version 2.1 or 3, each file once."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.errors import DatasetReadError
from embodichain_rl.interop.lerobot.packages import package
from embodichain_rl.interop.lerobot.video import decode

__all__ = ["StoredDataset", "StoredEpisode"]

VERSIONS = ("v2.0", "v2.1", "v3.0")

_NUMBERS = ("frame_index", "episode_index", "index", "task_index")


@dataclass(frozen=True)
class StoredEpisode:
    """One episode of a dataset.

    Attributes:
        number: of the episode.
        values: by feature ``[T, *shape]``; images ``uint8`` ``[T, H, W, C]``; text is a list of strings.
        tasks: the task of each frame.
    """

    number: int
    values: dict[str, Any]
    tasks: list[str]

    def __len__(self) -> int:
        return len(self.tasks)


class StoredDataset:
    """The files of a LeRobot dataset.

    Args:
        root: the folder.
        episodes: the numbers of the episodes that are read; None: all.

    Raises:
        DatasetReadError: when there is no dataset, or it is of another version, or lacks an episode.
    """

    def __init__(self, root: Path, episodes: Sequence[int] | None = None) -> None:
        self.root = root
        path = root / "meta/info.json"
        if not path.exists():
            raise DatasetReadError(f"Got {root}, where there is no LeRobot dataset: {path} is missing.")
        self.info: dict[str, Any] = json.loads(path.read_text())
        version = self.info.get("codebase_version")
        if version not in VERSIONS:
            raise DatasetReadError(f"Got {root}, a LeRobot dataset of version {version}; versions are {VERSIONS}.")
        self.is_v3 = version == "v3.0"
        self.fps = float(self.info["fps"])
        self.features: dict[str, dict[str, Any]] = self.info["features"]
        self._rows = self._episode_rows()
        self._tasks = self._read_tasks()
        known = [int(row["episode_index"]) for row in self._rows]
        self.episodes = known if episodes is None else [int(number) for number in episodes]
        if missing := sorted(set(self.episodes) - set(known)):
            raise DatasetReadError(f"Got episodes={missing[:5]}, but {root} has the episodes 0 to {len(known) - 1}.")

    @property
    def num_frames(self) -> int:
        """The number of frames of the chosen episodes."""
        chosen = set(self.episodes)
        return sum(int(row["length"]) for row in self._rows if row["episode_index"] in chosen)

    @property
    def one_task_an_episode(self) -> bool:
        """Whether no episode has several tasks."""
        return all(len(row["tasks"]) <= 1 for row in self._rows)

    def __iter__(self) -> Iterator[StoredEpisode]:
        rows = {int(row["episode_index"]): row for row in self._rows}
        path, table, numbers = None, None, np.empty(0)
        for number in self.episodes:
            row = rows[number]
            if self._data_path(row) != path:
                path = self._data_path(row)
                table = package("pyarrow.parquet").read_table(path)
                numbers = table.column("episode_index").to_numpy()
            own = np.flatnonzero(numbers == number)
            if len(own) != int(row["length"]):
                raise DatasetReadError(
                    f"Got {len(own)} frames of episode {number} in {path}; its length is {row['length']}."
                )
            assert table is not None
            yield self._episode(row, table.slice(int(own[0]), len(own)))

    def _episode(self, row: dict[str, Any], table: Any) -> StoredEpisode:
        values: dict[str, Any] = {}
        for name, feature in self.features.items():
            if name in _NUMBERS:
                continue
            if feature["dtype"] == "video":
                values[name] = self._frames_of_video(row, name)
            else:
                values[name] = _values(table.column(name), feature)
        tasks = [self._tasks[task] for task in table.column("task_index").to_pylist()]
        return StoredEpisode(int(row["episode_index"]), values, tasks)

    def _episode_rows(self) -> list[dict[str, Any]]:
        if not self.is_v3:
            return _lines(self.root / "meta/episodes.jsonl")
        rows: list[dict[str, Any]] = []
        parquet = package("pyarrow.parquet")
        for path in sorted((self.root / "meta/episodes").glob("*/*.parquet")):
            columns = [name for name in parquet.read_schema(path).names if not name.startswith("stats/")]
            rows += parquet.read_table(path, columns=columns).to_pylist()
        return sorted(rows, key=lambda row: int(row["episode_index"]))

    def _read_tasks(self) -> dict[int, str]:
        if not self.is_v3:
            return {int(line["task_index"]): line["task"] for line in _lines(self.root / "meta/tasks.jsonl")}
        tasks = package("pandas").read_parquet(self.root / "meta/tasks.parquet")
        return {int(number): str(task) for task, number in zip(tasks.index, tasks["task_index"], strict=True)}

    def _data_path(self, row: dict[str, Any]) -> Path:
        if self.is_v3:
            place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        else:
            place = self._old_place(row)
        return self.root / self.info["data_path"].format(**place)

    def _old_place(self, row: dict[str, Any]) -> dict[str, int]:
        number = int(row["episode_index"])
        return {"episode_chunk": number // int(self.info.get("chunks_size", 1000)), "episode_index": number}

    def _frames_of_video(self, row: dict[str, Any], name: str) -> np.ndarray:
        start = 0.0
        if self.is_v3:
            place = {part: row[f"videos/{name}/{part}"] for part in ("chunk_index", "file_index")}
            start = float(row[f"videos/{name}/from_timestamp"])
        else:
            place = self._old_place(row)
        path = self.root / self.info["video_path"].format(video_key=name, **place)
        return decode(path, start, int(row["length"]), self.fps)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _values(column: Any, feature: dict[str, Any]) -> Any:
    """Return a column as an array ``[T, *shape]``, or as a list of strings."""
    if feature["dtype"] == "string":
        return [str(text) for text in column.to_pylist()]
    if feature["dtype"] == "image":
        pil = package("PIL.Image")
        pictures = [pil.open(io.BytesIO(picture["bytes"])) for picture in column.to_pylist()]
        return np.stack([np.asarray(picture) for picture in pictures])
    flat = column.combine_chunks()
    while True:
        if hasattr(flat, "chunks"):
            flat = flat.chunk(0)
        elif hasattr(flat, "storage"):  # an array of the datasets package
            flat = flat.storage
        elif hasattr(flat, "flatten") and hasattr(flat.type, "value_type"):
            flat = flat.flatten()
        else:
            break
    values = flat.to_numpy(zero_copy_only=False).astype(feature["dtype"], copy=False)
    return values.reshape(len(column), *feature["shape"])
