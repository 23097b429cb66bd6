"""Cut the steps of one call into runs of one trajectory each. Pure functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_tensor_collection

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Leaf, as_array

__all__ = [
    "PENDING",
    "Run",
    "checked_shape",
    "closed",
    "real_steps",
    "runs_of",
]

PENDING = -1
"""The index of a step whose trajectory is not in the buffer: not finished yet, or not accepted."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive steps ``[start, stop)`` of one row of the data that belong to one trajectory.

    Attributes:
        key: identifies the trajectory among those that are pending.
        row: the row.
        start: the first step.
        stop: the step behind the last one.
        ends: whether the trajectory is whole with it.
        begins: whether it begins a trajectory, so that what is pending under its key has no more steps.
        truncated: whether the trajectory is whole with it although no end flag says so.
        traj_id: the id of the trajectory in the data, where only that says where it ends.
    """

    key: Hashable
    row: int
    start: int
    stop: int
    ends: bool
    begins: bool = False
    truncated: bool = False
    traj_id: Any = None


def checked_shape(data: TensorDictBase) -> torch.Size:
    """Return the shape of steps, ``[T]`` or ``[B, T]``.

    Raises:
        SchemaMismatchError: when the data has another shape, or is no TensorDict.
    """
    if not is_tensor_collection(data):
        raise SchemaMismatchError(
            f"Got a {type(data).__name__}; trajectories are written as TensorDicts of steps, [T] or [B, T]."
        )
    if data.ndim not in (1, 2):
        raise SchemaMismatchError(
            f"Got data of batch size {list(data.shape)}; needed are steps [T], or one environment a row [B, T]."
        )
    return data.shape


def real_steps(mask: Leaf | None, shape: torch.Size, *, anywhere: bool = False) -> np.ndarray | None:
    """Return which steps of each row are real, ``bool`` ``[B, T]``; None: all.

    Args:
        mask: True where a step is real, of the batch size of the data.
        shape: the batch size, ``[T]`` or ``[B, T]``.
        anywhere: whether padding may come before real steps.

    Raises:
        SchemaMismatchError: when the mask is not of ``bool``, or padding comes before real steps and must not.
    """
    if mask is None:
        return None
    real = as_array(mask) if isinstance(mask, torch.Tensor) else mask
    real = real.reshape(-1, shape[-1])
    if real.dtype != np.bool_:
        raise SchemaMismatchError(
            f"Got ('collector', 'mask') of {real.dtype}; it must be bool, True where a step is real."
        )
    if not anywhere and (real[:, 1:] & ~real[:, :-1]).any():
        raise SchemaMismatchError("Got ('collector', 'mask') with padding before real steps; it must follow them.")
    return real


def runs_of(
    producer: int,
    ends: np.ndarray,
    traj_ids: np.ndarray | None,
    real: np.ndarray | None,
    begins: np.ndarray | None = None,
    *,
    sampled: bool = False,
) -> Iterator[Run]:
    """Yield the runs of each row.

    Rows are cut behind the steps that end a trajectory, before those that begin one, where the trajectory id changes,
    and around padding.

    Args:
        producer: identifies who wrote the steps; ids and rows are told apart by it.
        ends: ``bool`` ``[B, T]``: steps that end a trajectory.
        traj_ids: of each step; None where there are none.
        real: which steps are real; None: all.
        begins: ``bool`` ``[B, T]``: steps that begin a trajectory; None: those after an end only.
        sampled: whether the rows were sampled from a buffer, so that nothing that comes later continues a run.
    """
    cuts = ends
    if traj_ids is not None or begins is not None or real is not None:
        cuts = ends.copy()
    if traj_ids is not None:
        cuts[:, :-1] |= traj_ids[:, 1:] != traj_ids[:, :-1]
    if begins is not None:
        cuts[:, :-1] |= begins[:, 1:]
    if real is not None:
        cuts[:, :-1] |= real[:, 1:] != real[:, :-1]
    length = ends.shape[1]
    for row in range(len(ends)):
        stops = [stop for stop in (cuts[row].nonzero()[0] + 1).tolist() if stop < length]
        start = 0
        for stop in (*stops, length):
            if real is None or real[row, start]:
                ended = bool(ends[row, stop - 1])
                if sampled:
                    yield Run((producer, "sampled"), row, start, stop, True, True, not ended)
                else:
                    trajectory = ("row", row) if traj_ids is None else ("id", traj_ids[row, start].item())
                    begun = begins is not None and bool(begins[row, start])
                    yield Run((producer, *trajectory), row, start, stop, ended, begun)
            start = stop


def closed(runs: Sequence[Run]) -> list[Run]:
    """Return runs of which those that a later one leaves without an end are truncated.

    Example:
        >>> first, second = Run("a", 0, 0, 4, ends=False), Run("a", 0, 4, 9, ends=False, begins=True)
        >>> [(run.ends, run.truncated) for run in closed([first, second])]
        [(True, True), (False, False)]
    """
    result = list(runs)
    unfinished: dict[Hashable, int] = {}
    for number, run in enumerate(runs):
        if run.begins and (left := unfinished.pop(run.key, None)) is not None:
            result[left] = dataclasses.replace(result[left], ends=True, truncated=True)
        if run.ends:
            unfinished.pop(run.key, None)
        else:
            unfinished[run.key] = number
    return result
