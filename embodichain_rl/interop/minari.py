"""Minari: whole datasets into a buffer, and a buffer into one, equal to the bit.

An episode of ``T`` steps has ``T + 1`` observations in Minari. In a buffer, those at the root are the first ``T``, and
those under ``"next"`` the last ``T``::

    observations         "observation", ("next", "observation")    a space of arrays
                         key, ("next", key)                        for each key of a space of dicts, as in TorchRL
    actions              "action", or ("action", key)
    rewards              ("next", "reward")       [T, 1]
    terminations         ("next", "terminated")   [T, 1]
    truncations          ("next", "truncated")    [T, 1]
    infos                ("infos", key) and ("next", "infos", key); those that ``export`` adds, their own key
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl._progress import progress_bar
from embodichain_rl.errors import (
    DatasetReadError,
    DatasetWriteError,
    EmptyBufferError,
    MissingPackageError,
    SchemaMismatchError,
)
from embodichain_rl.replay.schema import TRAJECTORY, Key, Schema, StepField, as_array, as_non_tensor
from embodichain_rl.replay.storage import TrajectoryStorage, storage_of
from embodichain_rl.shared import own_process

__all__ = ["export", "load"]

INFOS = "infos"
OTHERS = "embodichain_rl"
"""The entry of ``infos`` with what a buffer has besides observations, actions, rewards and flags."""

FLAGS = ("done", "terminated", "truncated")
REWARD: Key = ("next", "reward")


def load(
    dataset: Any,
    into: Any,
    *,
    episodes: Sequence[int] | None = None,
    progress: bool = True,
) -> int:
    """Write the episodes of a Minari dataset to a buffer, each as one trajectory; see the module for the keys.

    Values keep their dtypes. If the buffer has data already, floats are converted to its dtypes, and only entries that
    its steps have are written.

    Args:
        dataset: a ``MinariDataset``; the folder of one, which has ``main_data.hdf5``; or the id of a local one.
        into: a buffer.

    Keyword Args:
        episodes: the indices of the episodes that are loaded; by default all.
        progress: whether to show a progress bar.

    Returns:
        The number of episodes.

    Raises:
        MissingPackageError: when Minari is not installed.
        DatasetReadError: when there is no such dataset, or an episode has no end.
        SchemaMismatchError: when the buffer has steps with other keys, shapes or dtypes.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=300_000, chunk_size=16)
        >>> load("mujoco/hopper/expert-v0", into=rb)  # doctest: +SKIP
        1027
    """
    found = _dataset(dataset)
    schema = storage_of(into, "load").schema
    chosen = None if episodes is None else [int(number) for number in episodes]
    total = found.total_episodes if chosen is None else len(chosen)
    if chosen is not None and any(not 0 <= number < found.total_episodes for number in chosen):
        raise DatasetReadError(f"Got episodes={chosen[:5]}, but the dataset has {found.total_episodes} episodes.")
    done = 0
    for episode in progress_bar(found.iterate_episodes(chosen), total=total, desc="Loading", unit="ep", shown=progress):
        into.extend(_trajectory(episode, schema))
        done += 1
    return done


def export(
    source: Any,
    root: str | Path,
    *,
    dataset_id: str | None = None,
    observation_space: Any = None,
    action_space: Any = None,
    env: Any = None,
    progress: bool = True,
) -> int:
    """Write all live trajectories of a buffer to a Minari dataset; see the module for the keys.

    The steps need ``"action"``, ``("next", "reward")``, and observations at the root and under ``"next"``. None of the
    trajectories is evicted meanwhile: writers wait. All values are kept to the bit: images are not compressed as JPEG.

    Args:
        source: a buffer, a storage or an engine.
        root: the folder of the dataset; it must not have one yet. ``minari.MinariDataset(root)`` opens it.

    Keyword Args:
        dataset_id: the name of the dataset; by default that of the folder, with ``-v0``.
        observation_space: a space of Gymnasium; by default boxes without bounds, of the shapes and dtypes.
        action_space: the same.
        env: an environment of Gymnasium, its spec or its id, whose spec and spaces are stored.
        progress: whether to show a progress bar.

    Returns:
        The number of episodes.

    Raises:
        MissingPackageError: when Minari is not installed.
        EmptyBufferError: when there is no trajectory.
        SchemaMismatchError: when the steps lack an entry that Minari needs.
        DatasetWriteError: when there is a dataset at ``root``.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=300_000, chunk_size=16)
        >>> export(rb, "outputs/minari")  # doctest: +SKIP
        120
    """
    minari = _minari()
    storage = storage_of(source, "export")
    if storage.schema is None or not len(storage):
        raise EmptyBufferError("Got a buffer without a trajectory; there is nothing to export. Wait until len(rb) > 0.")
    layout = _Layout(storage.arena.schema)
    env_spec = None
    if env is not None:
        gymnasium = importlib.import_module("gymnasium")
        made = gymnasium.make(env) if not isinstance(env, gymnasium.Env) else env
        env_spec = made.spec
        observation_space = observation_space or made.observation_space
        action_space = action_space or made.action_space
    root = Path(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    try:
        target = minari.dataset.minari_storage.MinariStorage.new(
            root,
            observation_space=observation_space or _space(layout.observations, layout.fields),
            action_space=action_space or _space(layout.actions, layout.fields),
            env_spec=env_spec,
            data_format="hdf5",
            jpeg_encoding=False,
        )
    except (ValueError, FileExistsError) as error:
        raise DatasetWriteError(f"Got {root}, where no dataset can be made: {error}") from error
    target.update_metadata({"dataset_id": dataset_id or f"{root.name}-v0", "minari_version": minari.__version__})
    hold = storage.ledger.holds.claim(storage.ledger.live_range()[0], *own_process())
    try:
        ids = storage.ledger.live().all().tolist()
        numbers = progress_bar(ids, desc=f"Exporting {root.name}", unit="ep", shown=progress)
        target.update_episodes(_buffers(minari, storage, layout, numbers))
    finally:
        storage.ledger.holds.release(hold)
    return len(ids)


def _minari() -> Any:
    try:
        importlib.import_module("h5py")
        return importlib.import_module("minari")
    except ImportError as error:
        raise MissingPackageError(
            f"Got no package for Minari's datasets: {error}. Install it with pip install 'embodichain-rl[minari]'."
        ) from error


def _dataset(dataset: Any) -> Any:
    minari = _minari()
    if isinstance(dataset, minari.MinariDataset):
        return dataset
    if not isinstance(dataset, str | Path):
        raise DatasetReadError(f"Got {dataset!r}; needed is a MinariDataset, its folder, or the id of a local one.")
    try:
        for folder in (Path(dataset), Path(dataset) / "data"):
            if (folder / "metadata.json").exists():
                return minari.MinariDataset(folder)
        return minari.load_dataset(str(dataset))
    except (ValueError, FileNotFoundError, KeyError) as error:
        raise DatasetReadError(f"Got {dataset}, which is no Minari dataset on this machine: {error}") from error


# ----------------------------------------------------------------------------------------------------- into a buffer


def _trajectory(episode: Any, schema: Schema | None) -> TensorDict:
    length = len(episode.rewards)
    if not length or not (episode.terminations[-1] or episode.truncations[-1]):
        raise DatasetReadError(
            f"Got episode {episode.id} of {length} steps, whose last one is neither terminated nor truncated."
        )
    entries: dict[Key, Any] = {}
    observations = _flat(episode.observations)
    for key, values in observations.items():
        own = key or ("observation",)
        entries[own], entries["next", *own] = values[:-1], values[1:]
    for key, values in _flat(episode.actions).items():
        entries["action", *key] = values
    for key, values in _flat(dict(episode.infos or {})).items():
        if key[0] == OTHERS:
            entries[key[1:]] = values
        elif len(values) == length + 1:
            entries[INFOS, *key], entries["next", INFOS, *key] = values[:-1], values[1:]
        elif len(values) == length:
            entries["next", INFOS, *key] = values
        else:
            raise DatasetReadError(f"Got {len(values)} infos {key} in episode {episode.id} of {length} steps.")
    terminated, truncated = np.asarray(episode.terminations, bool), np.asarray(episode.truncations, bool)
    flags = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
    entries[REWARD] = np.asarray(episode.rewards)[:, None]
    for name, flag in flags.items():
        entries["next", name] = flag[:, None]
        if schema is not None:
            entries[(name,)] = np.zeros((length, 1), dtype=bool)
    data = TensorDict({}, [length])
    for key, values in entries.items():
        if schema is None or key in schema:
            data.set(key, _as_entry(values, None if schema is None else schema.kinds[key]))
    return data


def _flat(values: Any, key: Key = ()) -> dict[Key, Any]:
    """Return the leaves of nested dicts and tuples, by their key."""
    if isinstance(values, Mapping):
        children = {(*key, str(name)): value for name, value in values.items()}
    elif isinstance(values, tuple):
        children = {(*key, str(number)): value for number, value in enumerate(values)}
    else:
        return {key: values}
    return {leaf: found for name, value in children.items() for leaf, found in _flat(value, name).items()}


def _as_entry(values: Any, kind: tuple[tuple[int, ...], torch.dtype, bool] | None) -> Any:
    if len(values) and isinstance(values[0], str | bytes):
        return as_non_tensor([text.decode() if isinstance(text, bytes) else text for text in values])
    tensor = torch.from_numpy(np.array(values))  # a copy: what h5py returns may be read-only
    if kind is None:
        return tensor
    shape, dtype, _ = kind
    if tensor.dtype.is_floating_point and dtype.is_floating_point:
        tensor = tensor.to(dtype)
    return tensor[:, None] if (*tensor.shape[1:], 1) == shape else tensor


# ---------------------------------------------------------------------------------------------------- out of a buffer


class _Layout:
    """Which fields of a schema are what in Minari.

    Raises:
        SchemaMismatchError: when something is missing.
    """

    def __init__(self, schema: Schema) -> None:
        self.fields = {field.key: field for field in schema.all_fields}
        following = {key[1:] for key in self.fields if key[0] == "next"}
        root = [key for key in self.fields if key[0] not in ("next", "collector", TRAJECTORY, INFOS)]
        self.actions = [key for key in root if key[0] == "action"]
        self.observations = [
            key for key in root if key in following and key[-1] not in FLAGS and key not in self.actions
        ]
        self.infos = [key for key in self.fields if key[:2] == ("next", INFOS)]
        known = {*self.observations, *self.actions, *self.infos, *(key[1:] for key in self.infos), REWARD}
        known |= {("next", *key) for key in self.observations} | {(flag,) for flag in FLAGS}
        known |= {("next", flag) for flag in FLAGS}
        self.others = [key for key in self.fields if key not in known and key[0] != "collector" and key[:2] != HAS]
        for name, found in (("'action'", self.actions), ("an observation with its next one", self.observations)):
            if not found:
                raise SchemaMismatchError(f"Got steps without {name}, which Minari needs: {schema}.")
        if REWARD not in self.fields:
            raise SchemaMismatchError(f"Got steps without {REWARD}, which Minari needs: {schema}.")


HAS = (TRAJECTORY, "has")


def _buffers(minari: Any, storage: TrajectoryStorage, layout: _Layout, numbers: Any) -> Iterator[Any]:
    buffer = minari.data_collector.EpisodeBuffer
    for number in numbers:
        data = storage.trajectory(number)
        length = data.shape[0]
        observations = {
            key: _joined(_values(storage, data, key), _values(storage, data, ("next", *key)))
            for key in layout.observations
        }
        terminated, truncated = _flags(data, layout, length)
        infos: dict[Key, Any] = {}
        for key in layout.infos:
            values = _values(storage, data, key)
            root = key[1:]
            infos[key[2:]] = _joined(_values(storage, data, root), values) if root in layout.fields else values
        infos |= {(OTHERS, *key): _values(storage, data, key) for key in layout.others}
        yield buffer(
            observations=_nested(observations),
            actions=_nested({key[1:]: _values(storage, data, key) for key in layout.actions}),
            rewards=_values(storage, data, REWARD).reshape(length),
            terminations=terminated,
            truncations=truncated,
            infos=_nested(infos) if infos else None,
        )


def _values(storage: TrajectoryStorage, data: TensorDict, key: Key) -> Any:
    values = data.get(key)
    field = next(field for field in storage.arena.schema.all_fields if field.key == key)
    if field.is_text:
        return [storage.texts.resolve(number) for number in values.reshape(-1).tolist()]
    if field.is_ragged:
        raise SchemaMismatchError(f"Got {key} with ragged values, which Minari can't store. Leave it out (exclude).")
    if values.dtype == torch.bfloat16:
        raise SchemaMismatchError(f"Got {key} of torch.bfloat16, which Minari can't store. Convert it before writing.")
    return as_array(values.cpu())


def _joined(values: Any, following: Any) -> Any:
    """Return the ``T + 1`` values of an episode.

    Raises:
        SchemaMismatchError: when the next value of a step is not the value of the following one.
    """
    same = values[1:] == following[:-1]
    if isinstance(values, list):
        whole = values + following[-1:]
    else:
        same = np.array_equal(values[1:], following[:-1], equal_nan=values.dtype.kind == "f")
        whole = np.concatenate([values, following[-1:]])
    if not same:
        raise SchemaMismatchError(
            "Got steps whose next observation is not the observation of the following step, which Minari can't store."
        )
    return whole


def _flags(data: TensorDict, layout: _Layout, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the terminations and truncations; without them, an episode is truncated where it is done."""
    found: dict[str, np.ndarray] = {
        flag: np.asarray(as_array(data.get(("next", flag)).cpu()).reshape(length, -1).any(axis=1))
        for flag in FLAGS
        if ("next", flag) in layout.fields
    }
    last = np.zeros(length, dtype=bool)
    last[-1] = True
    terminated = found.get("terminated", np.zeros(length, dtype=bool))
    return terminated, found.get("truncated", found.get("done", last) & ~terminated)


def _nested(values: Mapping[Key, Any]) -> Any:
    """Return a tree of dicts; a single ``observation`` or action is no dict."""
    if [*values] in ([()], [("observation",)]):
        return next(iter(values.values()))
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value
    return tree


def _space(keys: Sequence[Key], fields: Mapping[Key, StepField]) -> Any:
    spaces = importlib.import_module("gymnasium").spaces
    own = {key[1:] if key[0] == "action" else key: _box(spaces, fields[key]) for key in keys}
    tree = _nested(own)
    return _dict_space(spaces, tree)


def _dict_space(spaces: Any, tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return spaces.Dict({name: _dict_space(spaces, value) for name, value in tree.items()})


def _box(spaces: Any, field: StepField) -> Any:
    if field.is_text:
        return spaces.Text(max_length=1 << 20)
    if field.is_ragged:
        raise SchemaMismatchError(
            f"Got {field.key} with ragged values, which Minari can't store. Leave it out (exclude)."
        )
    dtype = as_array(torch.zeros(1, dtype=field.dtype)).dtype
    if dtype.kind == "b":
        return spaces.Box(0, 1, field.shape, np.int8)
    if dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, field.shape, dtype.type)
    limits = np.iinfo(dtype)
    return spaces.Box(limits.min, limits.max, field.shape, dtype.type)
