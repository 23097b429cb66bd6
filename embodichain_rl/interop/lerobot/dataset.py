"""``as_lerobot``: a live buffer in place of a ``LeRobotDataset``."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey
from torch.utils.data import Dataset

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    TrajectoryEvictedError,
    TrajectoryIndexError,
)
from embodichain_rl.interop.lerobot.features import Column, Columns, columns_of
from embodichain_rl.interop.lerobot.frames import Frames, LiveFrames, checked_rate
from embodichain_rl.interop.lerobot.meta import LiveMetadata
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import TrajectoryStorage, storage_of

__all__ = ["LiveDataset", "as_lerobot"]

ATTEMPTS = 20
"""The number of times that frames are read again if their trajectories were evicted meanwhile."""

TOLERANCE = 1e-4
"""The largest distance between a time of ``delta_timestamps`` and a frame, in seconds, as in LeRobot."""

_TIMES = ("timestamp", "frame_index", "episode_index", "index", "task_index")


def as_lerobot(
    source: Any,
    *,
    delta_timestamps: Mapping[str, Sequence[float]] | None = None,
    fps: float | None = None,
    image_transforms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    keys: Iterable[NestedKey] | None = None,
    names: Mapping[NestedKey, str] | None = None,
    task_key: NestedKey | None = None,
    task: str = "",
    robot_type: str | None = None,
    repo_id: str = "embodichain_rl/live",
    tolerance_s: float = TOLERANCE,
    refresh_s: float = 30.0,
) -> LiveDataset:
    """Return a dataset over a live buffer that stands where a ``LeRobotDataset`` stood.

    Its items equal those of a ``LeRobotDataset`` of the same episodes, key by key; see :class:`LiveDataset`. LeRobot
    itself is not needed for it.

    Args:
        source: a buffer, a storage or an engine, with at least one trajectory.

    Keyword Args:
        delta_timestamps: for names of features, the times of the frames that an item has, in seconds relative to the
            frame of the item, as in LeRobot. Features without an entry have the current frame only, without an axis of
            time.
        fps: frames per second. By default it is read from the trajectories: ``("trajectory", "fps")``, else the
            differences of ``"timestamp"``.
        image_transforms: a callable for images ``float32`` ``[..., C, H, W]``, as in LeRobot.
        keys: the keys of the buffer that become features; by default all that are not only for TorchRL (end flags at
            the root, ``("next", key)`` of a key that is in the steps as well, entries of a collector).
        names: names of features for some keys. By default a key is its parts joined by dots, but ``"observation"`` is
            ``"observation.state"``, and ``"pixels"`` is ``"observation.image"``.
        task_key: the key of the text that is the task; by default a key of text that ends in ``"task"``,
            ``"instruction"`` or ``"language_instruction"``.
        task: the task of all frames, if there is no such text.
        robot_type: for ``meta``.
        repo_id: for ``meta``.
        tolerance_s: the largest distance between a time of ``delta_timestamps`` and a frame, in seconds.
        refresh_s: the age in seconds from which ``meta.stats`` is computed anew.

    Raises:
        EmptyBufferError: when there is no trajectory yet.
        InvalidArgumentError: when ``fps`` is not given and not found, or ``delta_timestamps`` are no times of frames or
            name no feature.
        SchemaMismatchError: when a key has values that LeRobot can't store; see ``keys``.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> data = {"observation": torch.randn(3, 4), "action": torch.randn(3, 2), "next": {"done": done}}
        >>> _ = rb.extend(TensorDict(data, [3]))
        >>> dataset = as_lerobot(rb, delta_timestamps={"action": [0.0, 0.1]}, fps=10)
        >>> dataset[2]["action"].shape, dataset[2]["action_is_pad"], dataset[2]["observation.state"].shape
        (torch.Size([2, 2]), tensor([False,  True]), torch.Size([4]))
    """
    storage = storage_of(source, "as_lerobot")
    if storage.schema is None or not len(storage):
        raise EmptyBufferError(
            "Got a buffer without a trajectory, whose features are not known. Wait until len(rb) > 0."
        )
    columns = columns_of(storage.arena.schema, keys=keys, names=names, task_key=task_key)
    rate = checked_rate(storage, columns, fps)
    frames = LiveFrames(storage, columns, task)
    meta = LiveMetadata(
        frames, columns, rate, robot_type=robot_type, repo_id=repo_id, refresh_s=checked_float("refresh_s", refresh_s)
    )
    dataset = LiveDataset(storage, columns, frames, meta, checked_float("tolerance_s", tolerance_s, minimum=0.0))
    return dataset.with_windows(delta_timestamps, image_transforms)


class LiveDataset(Dataset[dict[str, Any]]):
    """The live frames of a buffer, as a ``LeRobotDataset`` has those of a recording; made by :func:`as_lerobot`.

    ``dataset[i]`` is a dict of the i-th live frame, counted from the oldest trajectory:

    * the features by name: ``float32``, ``int64`` or ``bool``, as LeRobot converts them; one number is a tensor ``[]``;
      images are ``float32`` ``[C, H, W]`` from 0 to 1; text is a string.
    * features with ``delta_timestamps`` have an axis of time in front, and ``"<name>_is_pad"``, ``bool`` ``[n]``, is
      True where the time is beyond an end of the episode. There they have the first or the last frame of it.
    * ``"timestamp"``, ``"frame_index"``, ``"episode_index"``, ``"index"``, ``"task_index"`` and ``"task"``. The
      episodes are numbered by the ids of their trajectories, and ``"index"`` counts the frames that were published
      before: evicted ones count. So a frame keeps its numbers while data streams.

    A ``DataLoader`` takes it as it takes a ``LeRobotDataset``, with ``shuffle=True`` and with worker processes. Its
    items are gathered together, one batch at a time. An epoch is as long as the buffer was when it began. While old
    trajectories are evicted, the positions of frames shift; a position behind the last live frame is then counted from
    the oldest frame again, so that an epoch that began earlier goes on over live frames. A position that no frame has
    ever had is an ``IndexError``.

    Attributes:
        meta (LiveMetadata): what ``LeRobotDataset.meta`` is: features, ``fps``, tasks, episodes, and ``stats`` that
            follow the data.
        episodes: None: all.
    """

    episodes = None

    def __init__(
        self,
        storage: TrajectoryStorage,
        columns: Columns,
        frames: LiveFrames,
        meta: LiveMetadata,
        tolerance_s: float = TOLERANCE,
    ) -> None:
        self.meta = meta
        self._delta_timestamps: Mapping[str, Sequence[float]] | None = None
        self.image_transforms: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.tolerance_s = tolerance_s
        self._storage, self._columns, self._frames = storage, columns, frames
        self._windows: dict[str, np.ndarray] = {}

    def with_windows(
        self,
        delta_timestamps: Mapping[str, Sequence[float]] | None,
        image_transforms: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> LiveDataset:
        """Return a dataset of the same frames with other ``delta_timestamps``; see :func:`as_lerobot`.

        Raises:
            InvalidArgumentError: when they are no times of frames, or name no feature.
        """
        if image_transforms is not None and not callable(image_transforms):
            raise InvalidArgumentError(f"Got image_transforms={image_transforms!r}; it must be a callable.")
        other = copy.copy(self)
        other.delta_timestamps, other.image_transforms = delta_timestamps, image_transforms
        return other

    @property
    def delta_timestamps(self) -> Mapping[str, Sequence[float]] | None:
        """The times of the frames that an item has, by feature; see :func:`as_lerobot`. It can be set."""
        return self._delta_timestamps

    @delta_timestamps.setter
    def delta_timestamps(self, delta_timestamps: Mapping[str, Sequence[float]] | None) -> None:
        self._windows = _windows(delta_timestamps, self.meta.fps, self.tolerance_s, self.meta.features)
        self._delta_timestamps = delta_timestamps

    @property
    def delta_indices(self) -> dict[str, list[int]] | None:
        """The same as numbers of frames; None if there are no such times."""
        return {name: window.tolist() for name, window in self._windows.items()} or None

    @property
    def hf_dataset(self) -> Any:
        """Raise an ``AttributeError``: the rows of a live dataset are in its buffer, and change."""
        raise AttributeError(
            "A live dataset has no table of rows (hf_dataset). dataset.batch(indices) returns frames by their "
            "positions, and export(rb, root) writes a LeRobotDataset, which has one."
        )

    @property
    def repo_id(self) -> str:
        """The name of the dataset in ``meta``."""
        return self.meta.repo_id

    @property
    def fps(self) -> float:
        """The number of frames per second."""
        return self.meta.fps

    @property
    def features(self) -> dict[str, dict[str, Any]]:
        """The features by name, as in ``info.json``."""
        return self.meta.features

    @property
    def num_frames(self) -> int:
        """The number of live frames."""
        return self._storage.ledger.num_steps

    @property
    def num_episodes(self) -> int:
        """The number of live trajectories."""
        return len(self._storage)

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._items([operator.index(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items at some positions; ``DataLoader`` calls it with those of a batch."""
        return self._items([operator.index(index) for index in indices])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for position in range(len(self)):
            yield self[position]

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """Return the items at some positions as one batch, as ``DataLoader`` collates them.

        Args:
            indices: positions ``[B]``.

        Returns:
            Tensors ``[B, ...]``, and lists of ``B`` strings.

        Raises:
            TrajectoryIndexError: when there is no frame at a position.
            TrajectoryEvictedError: when trajectories are evicted faster than they can be read.
        """
        return self._read(np.asarray([operator.index(index) for index in indices], dtype=np.int64))

    def sample(self, batch_size: int, *, generator: torch.Generator | None = None) -> dict[str, Any]:
        """Return a batch of random live frames, drawn with replacement; see :meth:`batch`."""
        positions = torch.randint(len(self._frames.now()), (batch_size,), generator=generator)
        return self._read(positions.numpy())

    def _items(self, indices: list[int]) -> list[dict[str, Any]]:
        batch = self._read(np.asarray(indices, dtype=np.int64))
        parts = [value.unbind() if isinstance(value, torch.Tensor) else value for value in batch.values()]
        return [dict(zip(batch, item, strict=True)) for item in zip(*parts, strict=True)]

    def _read(self, positions: np.ndarray) -> dict[str, Any]:
        for _ in range(ATTEMPTS):
            frames = self._frames.now()
            of, steps = frames.locate(self._live(positions, frames))
            ids = frames.rows.ids[of]
            batch = self._gather(frames, of, steps, ids)
            if self._storage.ledger.unchanged(frames.rows.select(of)).all():
                return self._transformed(batch)
        raise TrajectoryEvictedError(
            f"{ATTEMPTS} times in a row a trajectory was evicted while it was read. Make the buffer larger."
        )

    def _live(self, positions: np.ndarray, frames: Frames) -> np.ndarray:
        live = len(frames)
        positions = np.where(positions < 0, positions + live, positions)
        beyond = (positions < 0) | (positions >= live)
        if beyond.any():
            ever = int(frames.before[-1] + frames.rows.lengths[-1])
            if (positions < 0).any() or (positions >= ever).any():
                raise TrajectoryIndexError(
                    f"Got the positions {positions[beyond][:5].tolist()}, but there are {live:,} frames."
                )
            positions = positions % live
        return positions

    def _gather(self, frames: Frames, of: np.ndarray, steps: np.ndarray, ids: np.ndarray) -> dict[str, Any]:
        starts, lengths = frames.rows.starts[of], frames.rows.lengths[of]
        batch: dict[str, Any] = {}
        padding: dict[str, torch.Tensor] = {}
        moved: dict[int, np.ndarray] = {}  # by window: features often share one
        for column in self._columns.columns:
            window = self._windows.get(column.name)
            within = steps if window is None else moved.get(id(window))
            if within is None:
                wanted = steps[:, None] + window
                within = moved[id(window)] = np.minimum(np.maximum(wanted, 0), lengths[:, None] - 1)
            batch[column.name] = self._values(column, ids, starts, within)
        numbers = {
            "timestamp": self._times(starts, steps),
            "frame_index": steps,
            "episode_index": ids,
            "index": frames.before[of] + steps,
            "task_index": self._frames.task_numbers(ids, starts + steps),
        }
        for name in _TIMES:
            window = self._windows.get(name)
            if window is not None:
                within = np.minimum(np.maximum(steps[:, None] + window, 0), lengths[:, None] - 1)
                numbers[name] = self._number_at(name, frames, of, within, ids, starts)
            batch[name] = torch.from_numpy(numbers[name])
        for name, window in self._windows.items():
            wanted = steps[:, None] + window
            padding[f"{name}_is_pad"] = torch.from_numpy((wanted < 0) | (wanted >= lengths[:, None]))
        tasks = (
            self._frames.task_numbers(ids, starts + steps) if "task_index" in self._windows else numbers["task_index"]
        )
        return {**batch, **padding, "task": [self._frames.tasks[number] for number in tasks.tolist()]}

    def _number_at(
        self, name: str, frames: Frames, of: np.ndarray, within: np.ndarray, ids: np.ndarray, starts: np.ndarray
    ) -> np.ndarray:
        """Return one of the numbers of LeRobot for the steps of a window, ``[B, n]``."""
        if name == "timestamp":
            return self._times(starts[:, None], within)
        if name == "episode_index":
            return np.broadcast_to(ids[:, None], within.shape).copy()
        if name == "index":
            return frames.before[of][:, None] + within
        if name == "task_index":
            flat = (starts[:, None] + within).reshape(-1)
            return self._frames.task_numbers(np.repeat(ids, within.shape[1]), flat).reshape(within.shape)
        return within

    def _times(self, starts: np.ndarray, steps: np.ndarray) -> np.ndarray:
        number = self._columns.timestamp
        if number is None:
            return (steps / self.meta.fps).astype(np.float32)
        stored = self._storage.arena.copy_steps(number, starts + steps).cpu()
        return as_array(stored).reshape(steps.shape).astype(np.float32)

    def _values(self, column: Column, ids: np.ndarray, starts: np.ndarray, within: np.ndarray) -> Any:
        storage = self._storage
        if column.number is None:
            values = np.ascontiguousarray(storage.trajectory_values(column.field.key, ids))
            read = torch.from_numpy(values).view(column.field.dtype)
            if within.ndim > 1:
                read = read[:, None].expand(*within.shape, *read.shape[1:])
        else:
            at = starts + within if within.ndim == 1 else starts[:, None] + within
            read = storage.values_at(column.number, at, storage.ledger.rows_of(ids)).cpu()
        if column.kind == "text":
            texts = [storage.texts.resolve(number) for number in read.reshape(len(ids), -1)[:, 0].tolist()]
            return texts
        if column.kind == "image":
            return _as_images(read.numpy(), column.channels_first)
        if column.is_scalar:
            read = read.reshape(within.shape)
        if read.dtype.is_floating_point:
            return read.float()
        return read if read.dtype == torch.bool else read.long()

    def _transformed(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.image_transforms is not None:
            for column in self._columns.columns:
                if column.kind == "image":
                    images = [self.image_transforms(image) for image in batch[column.name]]
                    batch[column.name] = torch.stack(images)
        return batch

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({{\n    Number of live episodes: '{self.num_episodes}',\n"
            f"    Number of live frames: '{self.num_frames}',\n    Features: '{list(self.features)}',\n}})"
        )


def _as_images(stored: np.ndarray, channels_first: bool) -> torch.Tensor:
    """Return bytes ``[..., H, W, C]`` or ``[..., C, H, W]`` as images ``float32`` ``[..., C, H, W]`` from 0 to 1."""
    source = stored if channels_first else np.moveaxis(stored, -1, -3)
    images = np.empty(source.shape, dtype=np.float32)
    # In numpy: torch would start threads for it, which wait for each other where the processor is busy collecting.
    np.divide(source, np.float32(255), out=images, dtype=np.float32)
    return torch.from_numpy(images)


def _windows(
    delta_timestamps: Mapping[str, Sequence[float]] | None,
    fps: float,
    tolerance_s: float,
    features: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """Return the steps of each feature relative to that of the item, ``int64`` ``[n]``; equal ones are one array."""
    windows: dict[str, np.ndarray] = {}
    known: dict[tuple[int, ...], np.ndarray] = {}
    for name, seconds in (delta_timestamps or {}).items():
        if name not in features:
            raise InvalidArgumentError(f"Got delta_timestamps for {name!r}; the features are {sorted(features)}.")
        if features[name]["dtype"] == "string":
            raise InvalidArgumentError(f"Got delta_timestamps for {name!r}, which is text; items have one string.")
        try:
            times = np.asarray(seconds, dtype=np.float64)
        except (TypeError, ValueError):
            times = np.empty(0)
        if times.ndim != 1 or not len(times) or not np.isfinite(times).all():
            raise InvalidArgumentError(f"Got the times {seconds!r} for {name!r}; needed is a list of seconds.")
        steps = np.round(times * fps)
        wrong = np.abs(times * fps - steps) / fps > tolerance_s
        if wrong.any():
            raise InvalidArgumentError(
                f"Got the times {times[wrong][:5].tolist()} for {name!r}, which are no times of frames at {fps:g} "
                "frames per second. Give multiples of 1/fps, or another fps."
            )
        whole = tuple(steps.astype(np.int64).tolist())
        windows[name] = known.setdefault(whole, steps.astype(np.int64))
    return windows
