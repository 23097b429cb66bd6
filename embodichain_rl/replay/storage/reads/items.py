"""What ``storage[index]`` returns: whole trajectories by position, or single steps by trajectory id and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import TrajectoryEvictedError, TrajectoryIndexError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage.reads.index import is_step_index
from embodichain_rl.replay.storage.reads.whole_reads import ReadView, read_live, read_surely

__all__ = ["contains", "get_items"]


def get_items(view: ReadView, index: Any) -> TensorDict:
    """Return what :meth:`TrajectoryStorage.get` describes."""
    if isinstance(index, tuple) and len(index) == 2:
        ids, steps = map(_as_integers, index)
        if ids is None or steps is None or ids.shape != steps.shape:
            raise TrajectoryIndexError(
                f"Got a pair {index!r}; needed are trajectory ids and steps, integers of the same shape."
            )
        return _get_steps(view, ids, steps)
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if index is Ellipsis:
        index = slice(None)
    if isinstance(index, slice):
        if index == slice(None):
            return read_live(view).padded(view.arena)
    else:
        array = _as_integers(index)
        if array is not None and is_step_index(array):
            return _get_steps(view, array[..., 0], array[..., 1])
    positions = _positions(view, index)

    def find() -> Rows:
        live = view.ledger.live()
        if positions.size and positions.max() >= len(live):
            raise TrajectoryIndexError(
                f"Got index {positions.max()}, but the buffer was emptied meanwhile to {len(live)} trajectories."
            )
        return view.ledger.rows_of(live.at(positions.reshape(-1)))

    whole, arena = read_surely(view, find), view.arena
    return whole.padded(arena) if positions.ndim else whole.only(arena)


def contains(ledger: Ledger, item: int | Sequence[int] | torch.Tensor) -> bool | list[bool] | torch.Tensor:
    """Return whether there is a trajectory at each position, or a step for each pair of trajectory id and step."""
    count = len(ledger)
    if isinstance(item, int):
        return -count <= item < count
    index = torch.as_tensor(item)
    if is_step_index(index):
        ids, steps = np.moveaxis(as_array(index).astype(np.int64), -1, 0)
        live = ledger.live().contains(ids)
        lengths = ledger.rows_of(np.where(live, ids, 0).reshape(-1)).lengths.reshape(ids.shape)
        there = torch.from_numpy(live & (steps >= 0) & (steps < lengths))
    else:
        there = (index < count) & (index >= -count)
    return there if isinstance(item, torch.Tensor) else there.tolist()


def _on_host(index: Any) -> Any:
    return as_array(index) if isinstance(index, torch.Tensor) else index


def _as_integers(index: Any) -> np.ndarray | None:
    """Return the index as an ``int64`` array; None if it is not made of integers."""
    try:
        array = np.asarray(_on_host(index))
    except ValueError:  # lists of different lengths
        return None
    return array.astype(np.int64, copy=False) if array.dtype.kind in "iu" or not array.size else None


def _positions(view: ReadView, index: Any) -> np.ndarray:
    count = len(view.ledger)
    at = index if isinstance(index, slice) else np.asarray(_on_host(index))
    if not isinstance(at, slice) and not at.size:
        at = at.astype(np.int64)  # numpy makes floats of an empty list
    try:
        if isinstance(index, bool | tuple | None) or (not isinstance(at, slice) and at.ndim > 1):
            raise IndexError("not positions of trajectories")
        return np.arange(count)[at]
    except (IndexError, ValueError) as error:
        raise TrajectoryIndexError(f"Got index {at}, but the buffer holds {count} trajectories.") from error


def _get_steps(view: ReadView, ids: np.ndarray, steps: np.ndarray) -> TensorDict:
    """Return the steps ``[...]`` with the given trajectory ids and steps, both ``int64`` ``[...]``."""
    ledger = view.ledger
    try:
        return _read_steps(view, ids, steps)
    except TrajectoryEvictedError:
        if not (ledger.relabelled and ledger.live().contains(ids).all()):
            raise
    with ledger.frozen():  # one of them was just being relabelled
        return _read_steps(view, ids, steps)


def _read_steps(view: ReadView, ids: np.ndarray, steps: np.ndarray) -> TensorDict:
    ledger = view.ledger
    flat_ids, flat_steps = ids.reshape(-1), steps.reshape(-1)
    _refuse_missing(view, flat_ids, ledger.published(flat_ids))
    rows = ledger.rows_of(flat_ids)
    _refuse_missing(view, flat_ids, (rows.lengths > flat_steps) & (flat_steps >= 0))
    arena, at = view.arena, rows.starts + flat_steps
    if ids.ndim == 2 and ids.size and (np.diff(ids) == 0).all() and (np.diff(steps) == 1).all():
        values = arena.copy_chunks(at.reshape(ids.shape)[:, 0].copy(), ids.shape[1])
    else:
        values = [arena.copy_steps(number, at.reshape(ids.shape)) for number in range(len(arena.columns))]
    if view.table is not None:
        values += [value.view(*ids.shape, *value.shape[1:]) for value in view.table.copy(flat_ids)]
    _refuse_missing(view, flat_ids, ledger.unchanged(rows))
    return arena.build_sample(values, arena.origin(np.stack([ids, steps], axis=-1)))


def _refuse_missing(view: ReadView, ids: np.ndarray, there: np.ndarray) -> None:
    if not there.all():
        missing = np.unique(ids[~there])[:5].tolist()
        raise TrajectoryEvictedError(
            f"Steps of the trajectories {missing} are not in the buffer (any more): it holds the newest "
            f"{view.ledger.max_trajectories:,} trajectories, {view.ledger.max_total_steps:,} steps at most. Sample and "
            "read in one call (TrajectoryReplayBuffer does, and draws again), or make the buffer larger."
        )
