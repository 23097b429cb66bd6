"""Whole LeRobot datasets into a buffer, and a buffer into one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_key
from embodichain_rl._progress import progress_bar
from embodichain_rl.errors import DatasetReadError, EmptyBufferError, InvalidArgumentError, TrajectoryEvictedError
from embodichain_rl.interop.lerobot.episodes import Episode, read_episode
from embodichain_rl.interop.lerobot.features import Columns, buffer_key, columns_of, feature_name
from embodichain_rl.interop.lerobot.frames import checked_rate
from embodichain_rl.interop.lerobot.reading import StoredDataset, StoredEpisode
from embodichain_rl.interop.lerobot.writing import DatasetWriter
from embodichain_rl.replay.schema import Key, Schema, as_non_tensor
from embodichain_rl.replay.storage import TrajectoryStorage, storage_of
from embodichain_rl.shared import own_process

__all__ = ["export", "load"]

DONE: Key = ("next", "done")
TASK: Key = ("trajectory", "task")
TASK_OF_STEPS: Key = ("task",)
FPS: Key = ("trajectory", "fps")

COMMIT_BYTES = 1 << 27
"""The size of episodes that are written together."""


def load(
    dataset: Any,
    into: Any,
    *,
    episodes: Sequence[int] | None = None,
    names: Mapping[NestedKey, str] | None = None,
    keys: Iterable[NestedKey] | None = None,
    progress: bool = True,
) -> int:
    """Write the episodes of a LeRobot dataset to a buffer, each as one trajectory.

    Features get the keys that their names stand for: ``"next.reward"`` becomes ``("next", "reward")``. Images are
    ``uint8`` ``[H, W, C]``; videos are decoded once. LeRobot itself is not needed.

    These entries are added to each trajectory: ``("next", "done")``, True at the last step, unless the dataset has it;
    the task, ``("trajectory", "task")``, or ``"task"`` if it changes within an episode; ``("trajectory", "fps")``; and
    ``"timestamp"``. If the buffer has data already, only those of them are added that its steps have, and the flags
    ``done``, ``terminated`` and ``truncated`` that they have are filled in.

    Args:
        dataset: the folder of a dataset of version 2.1 or 3, or a ``LeRobotDataset``, whose ``episodes`` are loaded.
        into: a buffer.

    Keyword Args:
        episodes: the numbers of the episodes that are loaded; by default all.
        names: the names of features for keys of the buffer, as in :func:`as_lerobot`. By default
            ``"observation.state"`` is ``"observation"`` if the buffer has that key, or had it when the dataset was
            recorded.
        keys: the keys of the buffer that are loaded; by default those of all features.
        progress: whether to show a progress bar.

    Returns:
        The number of episodes.

    Raises:
        DatasetReadError: when there is no dataset, or it is damaged, or an episode is done before its end.
        MissingPackageError: when a package is missing that its files need.
        SchemaMismatchError: when the buffer has steps with other keys, shapes or dtypes.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=300_000, chunk_size=16)
        >>> load("outputs/recording", into=rb)  # doctest: +SKIP
        120
    """
    root, chosen = _root_of(dataset)
    stored = StoredDataset(root, chosen if episodes is None else episodes)
    schema = storage_of(into, "load").schema
    mapping = _keys_of(stored, schema, names, keys)
    done = 0
    with progress_bar(total=stored.num_frames, desc=f"Loading {root.name}", unit="step", shown=progress) as bar:
        for episode in stored:
            into.extend(_trajectory(episode, stored, mapping, schema))
            bar.update(len(episode))
            done += 1
    return done


def export(
    source: Any,
    root: str | Path,
    *,
    fps: float | None = None,
    keys: Iterable[NestedKey] | None = None,
    names: Mapping[NestedKey, str] | None = None,
    task_key: NestedKey | None = None,
    task: str = "",
    cameras: str = "video",
    codec: str = "h264",
    robot_type: str | None = None,
    progress: bool = True,
) -> int:
    """Write all live trajectories of a buffer to a LeRobot dataset of version 3.

    None of them is evicted meanwhile: writers wait. If there is a dataset with the same features, they are added to it.

    Args:
        source: a buffer, a storage or an engine.
        root: the folder of the dataset.

    Keyword Args:
        fps: frames per second; by default as in :func:`as_lerobot`.
        keys: as in :func:`as_lerobot`.
        names: as there.
        task_key: as there.
        task: as there.
        cameras: how images are written: ``"video"``, or ``"image"``, which keeps them to the bit.
        codec: of videos: ``"h264"``, ``"hevc"`` or ``"libsvtav1"``.
        robot_type: for ``info.json``.
        progress: whether to show a progress bar.

    Returns:
        The number of episodes that were written.

    Raises:
        EmptyBufferError: when there is no trajectory.
        InvalidArgumentError: when ``fps`` is not given and not found, or the dataset has other features.
        DatasetWriteError: when the dataset can't be written.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=300_000, chunk_size=16)
        >>> export(rb, "outputs/dataset", fps=30)  # doctest: +SKIP
        120
    """
    storage = storage_of(source, "export")
    if storage.schema is None or not len(storage):
        raise EmptyBufferError("Got a buffer without a trajectory; there is nothing to export. Wait until len(rb) > 0.")
    columns = columns_of(storage.arena.schema, keys=keys, names=names, task_key=task_key)
    rate = checked_rate(storage, columns, fps)
    if cameras not in ("video", "image"):
        raise InvalidArgumentError(f"Got cameras={cameras!r}; it must be 'video' or 'image'.")
    hold = storage.ledger.holds.claim(storage.ledger.live_range()[0], *own_process())
    try:
        writer = DatasetWriter(
            root, fps=rate, features=columns.features(cameras), robot_type=robot_type, codec=codec, keys=columns.keys()
        )
        try:
            return _write_all(storage, columns, writer, rate, task, progress)
        finally:
            writer.close()
    finally:
        storage.ledger.holds.release(hold)


def _write_all(
    storage: TrajectoryStorage, columns: Columns, writer: DatasetWriter, fps: float, task: str, progress: bool
) -> int:
    numbers = storage.ledger.live().all().tolist()
    episodes: list[Episode] = []
    for number in progress_bar(numbers, desc=f"Exporting {writer.root.name}", unit="ep", shown=progress):
        episode = read_episode(storage, columns, number, fps, task)
        if episode is None:
            raise TrajectoryEvictedError(f"Trajectory {number:,} was overwritten: the buffer was emptied meanwhile.")
        episodes.append(episode)
        if sum(each.nbytes for each in episodes) > COMMIT_BYTES:
            writer.append(episodes)
            episodes = []
    writer.append(episodes)
    return len(numbers)


def _root_of(dataset: Any) -> tuple[Path, Sequence[int] | None]:
    if isinstance(dataset, str | Path):
        return Path(dataset), None
    root = getattr(dataset, "root", None)
    if root is None:
        raise DatasetReadError(f"Got {dataset!r}; needed is the folder of a LeRobot dataset, or a LeRobotDataset.")
    return Path(root), getattr(dataset, "episodes", None)


def _keys_of(
    stored: StoredDataset,
    schema: Schema | None,
    names: Mapping[NestedKey, str] | None,
    keys: Iterable[NestedKey] | None,
) -> dict[str, Key]:
    """Return the key of each feature."""
    given = {name: checked_key(key) for key, name in (names or {}).items()}
    recorded = {name: tuple(key) for name, key in stored.info.get("embodichain_rl", {}).get("keys", {}).items()}
    by_name = {} if schema is None else {feature_name(field.key): field.key for field in schema.all_fields}
    if unknown := sorted(set(given) - set(stored.features)):
        raise DatasetReadError(f"Got names for {unknown}, but the features are {sorted(stored.features)}.")
    mapping: dict[str, Key] = {}
    for name in stored.features:
        if name in ("frame_index", "episode_index", "index", "task_index"):
            continue
        mapping[name] = given.get(name) or by_name.get(name) or recorded.get(name) or checked_key(buffer_key(name))
    if keys is not None:
        wanted = {checked_key(key) for key in keys}
        if unknown_keys := sorted(wanted - set(mapping.values())):
            raise DatasetReadError(f"Got keys={unknown_keys}, but the features have the keys {[*mapping.values()]}.")
        mapping = {name: key for name, key in mapping.items() if key in wanted}
    elif schema is not None and ("timestamp",) not in schema:
        mapping.pop("timestamp", None)
    return mapping


def _trajectory(
    episode: StoredEpisode, stored: StoredDataset, mapping: Mapping[str, Key], schema: Schema | None
) -> TensorDict:
    length = len(episode)
    data = TensorDict({}, [length])
    for name, key in mapping.items():
        value = episode.values[name]
        if isinstance(value, list):
            data.set(key, as_non_tensor(value))
            continue
        tensor = torch.from_numpy(np.array(value))  # a copy: Arrow's memory is read-only
        if schema is not None and key in schema:
            tensor = _shaped(tensor, schema.kinds[key][0])
        data.set(key, tensor)
    for key, added in _added(episode, stored, schema).items():
        if key not in data.keys(True) and (schema is None or key in schema):
            data.set(key, added)
    _check_end(data, episode)
    return data


def _shaped(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return values in the shape of a step of the buffer: an image with its channels first, a number without an
    axis.
    """
    own = tuple(tensor.shape[1:])
    if own != tuple(shape) and len(own) == 3 and (own[2], own[0], own[1]) == tuple(shape):
        return tensor.movedim(-1, 1).contiguous()
    if own == (1,) and tuple(shape) == ():
        return tensor[:, 0]
    return tensor


def _added(episode: StoredEpisode, stored: StoredDataset, schema: Schema | None) -> dict[Key, Any]:
    length = len(episode)
    last = torch.zeros(length, 1, dtype=torch.bool)
    last[-1] = True
    added: dict[Key, Any] = {DONE: last, FPS: torch.full((length,), stored.fps)}
    of_trajectory = stored.one_task_an_episode if schema is None else TASK in schema
    added[TASK if of_trajectory else TASK_OF_STEPS] = as_non_tensor(episode.tasks)
    if schema is not None:
        terminated = episode.values.get("next.terminated")
        added[("next", "terminated")] = torch.zeros(length, 1, dtype=torch.bool)
        added[("next", "truncated")] = last & bool(terminated is None or not terminated[-1])
        for flag in ("done", "terminated", "truncated"):
            added[(flag,)] = torch.zeros(length, 1, dtype=torch.bool)
    return added


def _check_end(data: TensorDict, episode: StoredEpisode) -> None:
    done = data[DONE].reshape(len(episode), -1).any(-1)
    if done[:-1].any():
        step = int(done[:-1].nonzero()[0])
        raise DatasetReadError(
            f"Got episode {episode.number} with 'next.done' at step {step} of {len(episode)}; a trajectory is done at "
            "its last step only. Leave the feature out: keys=[...] without ('next', 'done')."
        )
    data[DONE][-1] = True
