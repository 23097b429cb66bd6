"""Whole trajectories by their id: how long they are, and their steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import InvalidArgumentError, TrajectoryEvictedError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage.reads.whole_reads import ReadView, read_surely

__all__ = ["read_trajectory", "trajectory_lengths"]


def trajectory_lengths(ledger: Ledger, ids: Any) -> torch.Tensor:
    """Do what :meth:`TrajectoryStorage.trajectory_lengths` describes."""
    array = as_array(ids) if isinstance(ids, torch.Tensor) else np.asarray(ids)
    if array.size and array.dtype.kind not in "iu":
        raise InvalidArgumentError(f"Got ids={ids!r}; the ids of trajectories are integers.")
    flat = array.astype(np.int64).reshape(-1)
    return torch.from_numpy(_live_rows(ledger, flat).lengths.astype(np.int64).reshape(array.shape))


def read_trajectory(view: ReadView, trajectory_id: int) -> TensorDict:
    """Do what :meth:`TrajectoryStorage.trajectory` describes."""
    ids = np.array([checked_int("trajectory_id", trajectory_id)], dtype=np.int64)
    return read_surely(view, lambda: _live_rows(view.ledger, ids)).only(view.arena)


def _live_rows(ledger: Ledger, ids: np.ndarray) -> Rows:
    rows = ledger.rows_of(ids)
    now = ledger.live()  # read last: the row of a trajectory that is still live is its own
    live = now.contains(ids)
    if (rows.lengths[live] < 0).any():  # one is just being relabelled
        with ledger.frozen():
            rows, now = ledger.rows_of(ids), ledger.live()
        live = now.contains(ids)
    if not live.all():
        oldest, end = now.oldest, now.end
        raise TrajectoryEvictedError(
            f"The trajectories {np.unique(ids[~live])[:5].tolist()} are not in the buffer (any more): it holds the ids "
            f"{oldest:,} to {end - 1:,}, the newest {ledger.max_trajectories:,} trajectories with "
            f"{ledger.max_total_steps:,} steps at most. Ask for those of a batch that was just sampled, or make the "
            "buffer larger."
        )
    return rows
