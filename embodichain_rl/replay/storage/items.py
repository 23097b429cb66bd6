"""What ``storage[index]`` returns: whole trajectories by their position, or single steps by trajectory and step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import TrajectoryEvictedError, TrajectoryIndexError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage.whole_reads import ReadView, read_live, read_surely

__all__ = ["contains", "get_items"]


def get_items(view: ReadView, index: Any) -> TensorDict:
    """Does what :meth:`TrajectoryStorage.get` says."""
    if isinstance(index, tuple) and len(index) == 2:
        ids, steps = (np.asarray(_on_host(part), dtype=np.int64) for part in index)
        return _get_steps(view, ids, steps)
    if isinstance(index, tuple) and len(index) == 1:
        (index,) = index
    if isinstance(index, slice) and index == slice(None):
        return read_live(view).padded(view.arena)
    positions = _positions(view, index)

    def find() -> Rows:
        oldest, end = view.ledger.live_range()
        if positions.size and positions.max() >= end - oldest:
            raise TrajectoryIndexError(
                f"Got index {positions.max()}, but the buffer was emptied meanwhile to {end - oldest} trajectories."
            )
        return view.ledger.rows_of(positions.reshape(-1) + oldest)

    whole, arena = read_surely(view, find), view.arena
    return whole.padded(arena) if positions.ndim else whole.only(arena)


def contains(count: int, item: int | Sequence[int] | torch.Tensor) -> bool | list[bool] | torch.Tensor:
    """Return whether each position of ``item`` is one of ``count`` trajectories."""
    if isinstance(item, int):
        return -count <= item < count
    there = (torch.as_tensor(item) < count) & (torch.as_tensor(item) >= -count)
    return there if isinstance(item, torch.Tensor) else there.tolist()


def _on_host(index: Any) -> Any:
    return as_array(index) if isinstance(index, torch.Tensor) else index


def _positions(view: ReadView, index: Any) -> np.ndarray:
    count = len(view.ledger)
    at = index if isinstance(index, slice) else np.asarray(_on_host(index))
    if not isinstance(at, slice) and not at.size:
        at = at.astype(np.int64)  # of an empty list numpy makes floats
    try:
        if isinstance(index, bool | tuple | None) or (not isinstance(at, slice) and at.ndim > 1):
            raise IndexError("not positions of trajectories")
        return np.arange(count)[at]
    except (IndexError, ValueError) as error:
        raise TrajectoryIndexError(f"Got index {at}, but the buffer holds {count} trajectories.") from error


def _get_steps(view: ReadView, ids: np.ndarray, steps: np.ndarray) -> TensorDict:
    ledger = view.ledger
    flat_ids, flat_steps = ids.reshape(-1), steps.reshape(-1)
    _refuse_evicted(view, flat_ids, ledger.published(flat_ids))
    rows = ledger.rows_of(flat_ids)
    _refuse_evicted(view, flat_ids, (rows.lengths > flat_steps) & (flat_steps >= 0))
    arena, at = view.arena, rows.starts + flat_steps
    if ids.ndim == 2 and (np.diff(ids) == 0).all() and (np.diff(steps) == 1).all():
        values = arena.copy_chunks(at.reshape(ids.shape)[:, 0].copy(), ids.shape[1])
    else:
        values = [arena.copy_steps(number, at.reshape(ids.shape)) for number in range(len(arena.columns))]
    if view.table is not None:
        values += [value.view(*ids.shape, *value.shape[1:]) for value in view.table.copy(flat_ids)]
    _refuse_evicted(view, flat_ids, ledger.still_valid(flat_ids))
    return arena.schema.build_sample(values, arena.origin(np.stack([ids, steps], axis=-1)))


def _refuse_evicted(view: ReadView, ids: np.ndarray, there: np.ndarray) -> None:
    if not there.all():
        gone = np.unique(ids[~there])[:5].tolist()
        raise TrajectoryEvictedError(
            f"Steps of the trajectories {gone} are not in the buffer (any more): it holds the newest "
            f"{view.ledger.max_trajectories:,} trajectories, {view.ledger.max_total_steps:,} steps at most. Sample and "
            "read in one call (TrajectoryReplayBuffer does, and draws again), or make the buffer larger."
        )
