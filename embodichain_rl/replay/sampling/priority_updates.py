"""What ``update_priority`` is given: which trajectories, and the priority of each. Pure functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.sampling.weights import ByPriority
from embodichain_rl.replay.schema import INDEX, as_array
from embodichain_rl.replay.storage import TrajectoryReader, is_step_index

__all__ = ["refuse_column", "weights_by_trajectory"]

LARGEST_WEIGHT = 1e280
"""The largest weight of a trajectory: so that the sum over all trajectories is finite."""


def weights_by_trajectory(index: Any, priority: Any, weights: ByPriority) -> tuple[np.ndarray, np.ndarray]:
    """Return the trajectories that an index names, and the weight that each gets.

    Args:
        index: trajectory ids ``[*B]``; or, with at least two dimensions of which the last is 2, pairs of trajectory id
            and step ``[*B, 2]``, such as the ``"index"`` of a batch.
        priority: one number for all; one per step, ``[*B]`` or ``[*B, ...]``, of which the largest counts, or as many
            in one dimension; or one per chunk, ``[B]`` or ``[B, 1]`` where the index is ``[B, L, 2]``.
        weights: how priorities become weights.

    Returns:
        Trajectory ids, ``int64`` ``[n]`` without repetition, and their weights, ``float64`` ``[n]``. A trajectory that
        is named several times gets its largest priority.

    Raises:
        InvalidArgumentError: for an index that is not made of integers, for priorities of another shape, and for those
            that are negative or not finite, or whose weight overflows.

    Example:
        >>> index = torch.tensor([[[7, 0], [7, 1]], [[3, 5], [3, 6]], [[7, 2], [7, 3]]])
        >>> weights_by_trajectory(index, [1.0, 2.0, 4.0], ByPriority(alpha=1.0, eps=1e-12))
        (array([3, 7]), array([2., 4.]))
    """
    ids = _ids_of(index)
    given = _aligned(_numbers_of(priority), ids)
    if not np.isfinite(given).all() or (given < 0.0).any():
        raise InvalidArgumentError(f"Got the priorities {given}; they must be finite, and not negative.")
    unique, number_of = np.unique(ids, return_inverse=True)
    largest = np.zeros(len(unique))
    np.maximum.at(largest, number_of.reshape(-1), given.reshape(-1))
    with np.errstate(over="ignore", under="ignore"):
        of_each = (largest + weights.eps) ** weights.alpha
    if of_each.max(initial=0.0) > LARGEST_WEIGHT:
        raise InvalidArgumentError(
            f"Got the priority {largest.max():g}, whose weight with alpha={weights.alpha:g} is above "
            f"{LARGEST_WEIGHT:g}. Scale the priorities down."
        )
    return unique, np.maximum(of_each, np.finfo(np.float64).tiny)  # rounded to 0, it would never be drawn


def refuse_column(index: Any, storage: TrajectoryReader) -> None:
    """Refuse the column ``"index"`` of a batch whose data has one, in the place of trajectory ids.

    Args:
        index: see :func:`weights_by_trajectory`.
        storage: the storage of the trajectories.

    Raises:
        InvalidArgumentError: when they are not trajectory ids: never given out, or several in one chunk.
    """
    schema = storage.schema
    if schema is None or schema.index_key == INDEX:
        return
    ids = _ids_of(index)
    if (ids >= storage.ledger.next_id).any() or (ids.ndim > 1 and (ids != ids[:, :1]).any()):
        raise InvalidArgumentError(
            "Got an index that is not made of trajectory ids. The data has a column 'index' of its own: pass "
            f"batch[{schema.index_key!r}], or batch['trajectory', 'id'], in its place."
        )


def _ids_of(index: Any) -> np.ndarray:
    try:
        integers = np.asarray(as_array(index) if isinstance(index, torch.Tensor) else index)
    except (TypeError, ValueError):
        integers = np.asarray(None)
    if integers.dtype.kind not in "iu" and integers.size:
        raise InvalidArgumentError(
            f"Got index={index!r}; needed are trajectory ids, integers [*B], or pairs of id and step, [*B, 2]."
        )
    ids = integers[..., 0] if is_step_index(integers) else integers
    return ids.astype(np.int64)


def _numbers_of(priority: Any) -> np.ndarray:
    try:
        return np.asarray(torch.as_tensor(priority).detach().cpu().double().numpy())
    except (TypeError, ValueError, RuntimeError):
        raise InvalidArgumentError(f"Got priorities {priority!r}; needed are numbers.") from None


def _aligned(given: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the priorities in the shape of the ids."""
    if given.shape == ids.shape:
        return given
    if given.size == 1:
        return np.broadcast_to(given.reshape(()), ids.shape)
    if ids.size and ids.ndim and given.shape[: ids.ndim] == ids.shape:
        return given.reshape(*ids.shape, -1).max(axis=-1)  # several of each step
    chunks = given.shape
    while chunks and chunks[-1] == 1:
        chunks = chunks[:-1]
    if chunks and chunks == ids.shape[: len(chunks)]:
        per_step = ids.shape[len(chunks) :]
        return np.broadcast_to(given.reshape(*chunks, *(1 for _ in per_step)), ids.shape)
    if given.size == ids.size:
        return given.reshape(ids.shape)
    raise InvalidArgumentError(
        f"Got priorities of shape {list(given.shape)} for trajectories of shape {list(ids.shape)}; needed is one for "
        "all, one per chunk, or one per step. An index [*B, 2] is read as pairs of trajectory id and step."
    )
