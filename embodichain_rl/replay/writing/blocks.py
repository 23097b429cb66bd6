"""Blocks ``[B, T]`` of many environments on a device: cut and written without a loop over the environments.

The trajectories, their order and their ids are those of the general way (:mod:`.device_data`), which takes over when
the steps of a call are not as regular as :func:`regular` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Schema, segment_field
from embodichain_rl.replay.storage import TrajectoryStorage, version_field
from embodichain_rl.replay.writing.boundaries import Evidence
from embodichain_rl.replay.writing.boundary_keys import BoundaryFields
from embodichain_rl.replay.writing.lockstep import Ends, Lockstep

__all__ = ["index_of", "regular", "versions_of"]

FEWEST_ROWS = 16
"""Rows from which on arrays are worth their while."""


def regular(
    storage: TrajectoryStorage,
    schema: Schema,
    keys: BoundaryFields,
    evidence: Evidence,
    columns: Sequence[np.ndarray],
    ends: np.ndarray,
    begins: np.ndarray | None,
    state: Lockstep,
) -> bool:
    """Return whether a block can be written from arrays, with the result that the general way has.

    It can if each row goes on with its trajectory, or begins one: at the first step, or behind an end. The ids of
    trajectories, counts and ``"is_init"``, if there are any, say so too.

    Args:
        storage: where it is to be written.
        schema: the fields.
        keys: which of them say where trajectories end.
        evidence: which of them tell whether one step follows another.
        columns: one array ``[B, T, *shape]`` per field, on the host; only control entries are read.
        ends: ``bool`` ``[B, T]``: the last steps of trajectories.
        begins: ``bool`` ``[B, T]``: steps that begin one; None: those behind an end.
        state: what is pending.
    """
    ledger = storage.ledger
    if len(ends) < FEWEST_ROWS or len(ends) != state.rows or schema.trajectory_fields or schema.has_text:
        return False
    if not keys.flags or keys.ids_end or segment_field(schema) is not None:
        return False
    if not ledger.plain or ledger.holds.any or ledger.priorities.built:
        return False
    pending = state.steps
    goes_on = pending > 0
    if begins is not None and ((begins[:, 0] & goes_on).any() or (begins[:, 1:] & ~ends[:, :-1]).any()):
        return False
    if evidence.step_count is not None and goes_on.any():
        count = columns[evidence.step_count]
        if state.counts is None or (count[goes_on, 0] != state.counts[goes_on] + 1).any():
            return False
    ids = keys.ids(columns)
    if ids is None:
        return True
    if ((ids[:, 1:] != ids[:, :-1]) & ~ends[:, :-1]).any():
        return False
    if goes_on.any() and (state.ids is None or (ids[goes_on, 0] != state.ids[goes_on]).any()):
        return False
    return _of_one_row_each(ids, ends)


def _of_one_row_each(ids: np.ndarray, ends: np.ndarray) -> bool:
    """Return whether no id occurs in two rows."""
    rows, steps = np.nonzero(ends[:, :-1])
    all_rows = np.concatenate([np.arange(len(ids)), rows])
    all_ids = np.concatenate([ids[:, 0], ids[rows, steps + 1]])
    order = all_ids.argsort(kind="stable")
    all_ids, all_rows = all_ids[order], all_rows[order]
    return not ((all_ids[1:] == all_ids[:-1]) & (all_rows[1:] != all_rows[:-1])).any()


def versions_of(schema: Schema, columns: Sequence[np.ndarray], ends: Ends, stored: Callable[[int], int]) -> np.ndarray:
    """Return the policy version of each trajectory that ends in a block, ``int64`` ``[n]``.

    Args:
        schema: the fields.
        columns: one array ``[B, T, *shape]`` per field, on the host.
        ends: the trajectories.
        stored: what a version is stored as.
    """
    number = version_field(schema)
    if number is None:
        return np.full(len(ends.rows), stored(NO_VERSION), dtype=np.int64)
    values = columns[number].reshape(*columns[number].shape[:2], -1)[ends.rows, ends.stops - 1, 0]
    known = (values >= 0) & (values < 2**62)
    distinct, which = np.unique(np.where(known, values, NO_VERSION).astype(np.int64), return_inverse=True)
    return np.array([stored(version) for version in distinct.tolist()], dtype=np.int64)[which]


def index_of(ends: np.ndarray, found: Ends, ids: np.ndarray) -> torch.Tensor:
    """Return the trajectory id of each step of a block, ``int64`` ``[B, T]``; -1 where it has not ended.

    Args:
        ends: ``bool`` ``[B, T]``: the last steps of trajectories.
        found: the trajectories.
        ids: their ids, ``int64`` ``[n]``.

    Example:
        >>> ends = np.array([[False, True, False]])
        >>> index_of(ends, Ends.of(ends, np.array([0])), np.array([7])).tolist()
        [[7, 7, -1]]
    """
    following = np.cumsum(ends.reshape(-1)).reshape(ends.shape) - ends  # number of the trajectory that ends next
    index = np.append(ids, -1)[following]
    last = np.zeros(len(ends), dtype=np.int64)
    last[found.rows] = found.stops
    index[np.arange(ends.shape[1]) >= last[:, None]] = -1
    return torch.from_numpy(index)
