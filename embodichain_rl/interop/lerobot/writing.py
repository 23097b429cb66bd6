"""Write a LeRobot dataset of version 3, episode by episode, so that it is whole after every commit.

LeRobot's files: ``meta/info.json`` has the features and the counts, ``meta/tasks.parquet`` the tasks,
``meta/stats.json`` the statistics, ``meta/episodes/`` a row for each episode, ``data/`` a row for each frame, and
``videos/`` the images. All are written by this file itself: LeRobot's own writer closes its files only at the end.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodichain_rl.errors import DatasetWriteError, InvalidArgumentError
from embodichain_rl.interop.lerobot.episodes import Episode, combined, statistics_of
from embodichain_rl.interop.lerobot.packages import package
from embodichain_rl.interop.lerobot.trees import TwoTrees
from embodichain_rl.interop.lerobot.video import encode, video_info

__all__ = ["DatasetWriter"]

INFO, STATS, TASKS = "meta/info.json", "meta/stats.json", "meta/tasks.parquet"
FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
DATA, EPISODES = f"data/{FILE}.parquet", f"meta/episodes/{FILE}.parquet"
VIDEO = f"videos/{{video_key}}/{FILE}.mp4"

FILES_IN_CHUNK = 1000
"""The number of files in a folder, as in LeRobot."""

TAIL_BYTES = 1 << 21
"""The size up to which new frames are added to the newest file, which is written anew for it."""

TAIL_EPISODES = 100
"""The number of episodes up to which new ones are added to the newest file of episodes."""

CODEBASE_VERSION = "v3.0"

OWN = "embodichain_rl"
"""The entry of ``info.json`` that this library reads: the keys of features, and how far a buffer is recorded."""


class _Tail:
    """The newest of a series of parquet files, to which rows are added until it is large enough."""

    def __init__(self, pattern: str, first: int) -> None:
        self.pattern = pattern
        self.number = first
        self.tables: list[Any] = []

    @property
    def place(self) -> tuple[int, int]:
        """The numbers of its folder and its file."""
        return divmod(self.number, FILES_IN_CHUNK)

    @property
    def path(self) -> str:
        chunk, file = self.place
        return self.pattern.format(chunk_index=chunk, file_index=file)

    @property
    def rows(self) -> int:
        return sum(len(table) for table in self.tables)

    @property
    def nbytes(self) -> int:
        return sum(table.nbytes for table in self.tables)

    def close(self) -> None:
        """Leave the file as it is; further rows go to the next one."""
        if self.tables:
            self.number += 1
            self.tables = []

    def write(self, trees: TwoTrees) -> None:
        pyarrow, parquet = package("pyarrow"), package("pyarrow.parquet")
        whole = pyarrow.concat_tables(self.tables)
        trees.write_with(self.path, lambda path: parquet.write_table(whole, path, compression="snappy"))


class DatasetWriter:
    """A writer of a LeRobot dataset of version 3.

    Args:
        root: the folder of the dataset. If there is a dataset with the same features, episodes are added to it.
        fps: frames per second.
        features: the features by name, as in ``info.json``.
        robot_type: for ``info.json``.
        codec: of videos.
        keys: the keys of a buffer, for features whose names don't tell them.

    Raises:
        DatasetWriteError: when another process writes the dataset, or the folder has something else.
        InvalidArgumentError: when the dataset has other features or another ``fps``.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        fps: float,
        features: dict[str, dict[str, Any]],
        robot_type: str | None = None,
        codec: str = "h264",
        keys: dict[str, list[str]] | None = None,
    ) -> None:
        self.root = Path(root)
        self.features = features
        self.fps = int(fps) if float(fps).is_integer() else fps
        self.codec = codec
        for name in (
            "pyarrow",
            "pandas",
            *(("av",) if self._of("video") else ()),
            *(("PIL.Image",) if self._of("image") else ()),
        ):
            package(name)
        found = _existing(self.root)
        self.trees = TwoTrees(self.root)
        self.tasks: list[str] = []
        self.stats: dict[str, dict[str, np.ndarray]] = {}
        self.info: dict[str, Any] = {
            "codebase_version": CODEBASE_VERSION,
            "robot_type": robot_type,
            "total_episodes": 0,
            "total_frames": 0,
            "total_tasks": 0,
            "chunks_size": FILES_IN_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": self.fps,
            "splits": {},
            "data_path": DATA,
            "video_path": VIDEO if self._of("video") else None,
            "features": {name: {**feature, "shape": list(feature["shape"])} for name, feature in features.items()},
        }
        self.info[OWN] = {"keys": keys or {}}
        if found is not None:
            self._resume(found)
        self._data = _Tail(DATA, _next_number(self.root / "data"))
        self._episodes = _Tail(EPISODES, _next_number(self.root / "meta/episodes"))
        self._videos = {name: _next_number(self.root / "videos" / name) for name in self._of("video")}

    def _of(self, dtype: str) -> list[str]:
        return [name for name, feature in self.features.items() if feature["dtype"] == dtype]

    def _resume(self, info: dict[str, Any]) -> None:
        theirs = {name: (f["dtype"], tuple(f["shape"])) for name, f in info["features"].items()}
        ours = {name: (f["dtype"], tuple(f["shape"])) for name, f in self.features.items()}
        if theirs != ours or info["fps"] != self.fps:
            self.trees.close()
            differing = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
            raise InvalidArgumentError(
                f"Got the dataset {self.root} with fps={info['fps']} and other features than the buffer's at "
                f"fps={self.fps}: {differing}. Give another root, or the same keys=, names= and cameras=."
            )
        robot_type = self.info["robot_type"] or info.get("robot_type")
        self.info = {**info, "robot_type": robot_type}
        tasks = package("pandas").read_parquet(self.root / TASKS)
        self.tasks = [str(task) for task in tasks.sort_values("task_index").index]
        for name, values in json.loads((self.root / STATS).read_text()).items():
            self.stats[name] = {kind: np.array(value) for kind, value in values.items()}

    @property
    def total_episodes(self) -> int:
        """The number of episodes of the dataset."""
        return int(self.info["total_episodes"])

    @property
    def total_frames(self) -> int:
        """The number of frames of the dataset."""
        return int(self.info["total_frames"])

    def append(self, episodes: Sequence[Episode]) -> None:
        """Add episodes to the dataset, all or none of them, and make them durable."""
        if not episodes:
            return
        known = len(self.tasks)
        frames, rows = self.total_frames, []
        if self._data.nbytes > TAIL_BYTES:
            self._data.close()
        if self._episodes.rows > TAIL_EPISODES:
            self._episodes.close()
        for number, episode in enumerate(episodes, self.total_episodes):
            rows.append(self._add(episode, number, frames))
            frames += len(episode)
        self._episodes.tables.append(package("pyarrow").Table.from_pylist(rows))
        self._data.write(self.trees)
        self._episodes.write(self.trees)
        if len(self.tasks) > known:
            self._write_tasks()
        self.info["total_episodes"] += len(episodes)
        self.info["total_frames"] = frames
        self.info["total_tasks"] = len(self.tasks)
        self.info["splits"] = {"train": f"0:{self.info['total_episodes']}"}
        self.trees.write(STATS, _json({name: _listed(values) for name, values in self.stats.items()}))
        self.trees.write(INFO, _json(self.info))
        self.trees.commit()

    def close(self) -> None:
        """Let other processes write the dataset."""
        self.trees.close()

    def _add(self, episode: Episode, number: int, first: int) -> dict[str, Any]:
        length = len(episode)
        for task in episode.tasks:
            if task not in self.tasks:
                self.tasks.append(task)
        numbers = {
            "timestamp": episode.timestamps,
            "frame_index": np.arange(length),
            "episode_index": np.full(length, number),
            "index": np.arange(first, first + length),
            "task_index": np.array([self.tasks.index(task) for task in episode.tasks], dtype=np.int64),
        }
        values = {**episode.values, **numbers}
        chunk, file = self._data.place
        row: dict[str, Any] = {
            "episode_index": number,
            "tasks": list(dict.fromkeys(episode.tasks)),
            "length": length,
            "data/chunk_index": chunk,
            "data/file_index": file,
            "dataset_from_index": first,
            "dataset_to_index": first + length,
        }
        for name in self._of("video"):
            row.update(self._add_video(name, values[name]))
        self._data.tables.append(self._table(values))
        for name, feature in self.features.items():
            if feature["dtype"] != "string":
                own = statistics_of(values[name], image=feature["dtype"] in ("image", "video"))
                self.stats[name] = combined(self.stats[name], own) if name in self.stats else own
                row.update({f"stats/{name}/{kind}": value.tolist() for kind, value in own.items()})
        chunk, file = self._episodes.place
        return {**row, "meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}

    def _add_video(self, name: str, images: np.ndarray) -> dict[str, Any]:
        chunk, file = divmod(self._videos[name], FILES_IN_CHUNK)
        self._videos[name] += 1
        path = VIDEO.format(video_key=name, chunk_index=chunk, file_index=file)
        self.trees.write_with(path, lambda target: encode(target, images, self.fps, self.codec))
        if "info" not in self.info["features"][name]:
            self.info["features"][name]["info"] = video_info(self.trees.hidden / path)
        return {
            f"videos/{name}/chunk_index": chunk,
            f"videos/{name}/file_index": file,
            f"videos/{name}/from_timestamp": 0.0,
            f"videos/{name}/to_timestamp": len(images) / self.fps,
        }

    def _table(self, values: dict[str, Any]) -> Any:
        pyarrow = package("pyarrow")
        columns = {}
        for name, feature in self.features.items():
            if feature["dtype"] == "video":
                continue
            if feature["dtype"] == "image":
                columns[name] = pyarrow.array(_pictures(values[name]), _picture_type())
            elif feature["dtype"] == "string":
                columns[name] = pyarrow.array(values[name], pyarrow.string())
            else:
                columns[name] = _column(values[name], feature)
        return pyarrow.table(columns)

    def _write_tasks(self) -> None:
        frame = package("pandas").DataFrame({"task_index": range(len(self.tasks))}, index=list(self.tasks))
        self.trees.write_with(TASKS, frame.to_parquet)


def _existing(root: Path) -> dict[str, Any] | None:
    """Return ``info.json`` of a dataset that exists; None if there is nothing."""
    if (root / INFO).exists():
        found: dict[str, Any] = json.loads((root / INFO).read_text())
        if found["codebase_version"] != CODEBASE_VERSION:
            raise DatasetWriteError(
                f"Got {root}, a LeRobot dataset of version {found['codebase_version']}; episodes can be added to "
                f"{CODEBASE_VERSION}. Convert it with LeRobot's convert_dataset_v21_to_v30."
            )
        return found
    if root.exists() and any(root.iterdir()):
        raise DatasetWriteError(f"Got {root}, a folder with files that are no LeRobot dataset. Give another root.")
    return None


def _next_number(folder: Path) -> int:
    """Return the number of the first file that is not in a folder yet."""
    taken = [
        int(path.parent.name.removeprefix("chunk-")) * FILES_IN_CHUNK + int(path.stem.removeprefix("file-"))
        for path in folder.glob("chunk-*/file-*.*")
    ]
    return max(taken, default=-1) + 1


def _column(values: np.ndarray, feature: dict[str, Any]) -> Any:
    """Return an array ``[T, *shape]`` as a column: numbers, or nested lists of them."""
    pyarrow = package("pyarrow")
    shape = tuple(feature["shape"])
    flat = np.ascontiguousarray(values).reshape(-1).astype(feature["dtype"], copy=False)
    column = pyarrow.array(flat)
    if shape == (1,):
        return column
    if len(shape) == 1:
        return pyarrow.FixedSizeListArray.from_arrays(column, shape[0])
    for size in shape[::-1]:
        offsets = pyarrow.array(np.arange(0, len(column) + 1, size, dtype=np.int32))
        column = pyarrow.ListArray.from_arrays(offsets, column)
    return column


def _picture_type() -> Any:
    pyarrow = package("pyarrow")
    return pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def _pictures(images: np.ndarray) -> list[dict[str, Any]]:
    pil = package("PIL.Image")
    pictures = []
    for number, image in enumerate(images):
        memory = io.BytesIO()
        pil.fromarray(image).save(memory, format="PNG", compress_level=1)
        pictures.append({"bytes": memory.getvalue(), "path": f"frame-{number:06d}.png"})
    return pictures


def _listed(values: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: value.tolist() for name, value in values.items()}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=4, ensure_ascii=False).encode()
