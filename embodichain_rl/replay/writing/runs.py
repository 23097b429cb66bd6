"""How the steps that come in are cut into runs of one trajectory each. Pure functions."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase, is_tensor_collection

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key, Leaf, Schema, as_array

__all__ = ["PENDING", "Run", "checked_shape", "ends_of", "real_lengths", "runs_of", "traj_ids_of"]

END_KEYS = (("next", "done"), ("next", "terminated"), ("next", "truncated"))
"""The entries that end a trajectory, where they are True."""

TRAJ_IDS = ("collector", "traj_ids")
"""Where TorchRL's collectors write which trajectory a step belongs to."""

PENDING = -1
"""What stands in the index of a step whose trajectory is not in the buffer: not finished yet, or not accepted."""


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive steps ``[start, stop)`` of one row of the data that belong to one trajectory."""

    key: Hashable
    row: int
    start: int
    stop: int
    ends: bool


def checked_shape(data: TensorDictBase) -> torch.Size:
    """Returns the shape of steps, ``[T]`` or ``[B, T]``, or refuses what has another one.

    Raises:
        SchemaMismatchError: when it has, or is no TensorDict.
    """
    if not is_tensor_collection(data):
        raise SchemaMismatchError(
            f"Got a {type(data).__name__}; trajectories are written as TensorDicts of steps, [T] or [B, T]."
        )
    if data.ndim not in (1, 2) or 0 in data.shape:
        raise SchemaMismatchError(
            f"Got data of batch size {list(data.shape)}; needed are steps [T], or one environment a row [B, T], and at "
            "least one step."
        )
    return data.shape


def real_lengths(mask: Leaf | None, shape: torch.Size) -> np.ndarray | None:
    """Returns how many steps of each row are real; None: all.

    Raises:
        SchemaMismatchError: when padding comes first.
    """
    if mask is None:
        return None
    rows = as_array(mask) if isinstance(mask, torch.Tensor) else mask
    rows = rows.reshape(1, -1) if len(shape) == 1 else rows.reshape(*shape)
    if rows.dtype != np.bool_:
        raise SchemaMismatchError(
            f"Got ('collector', 'mask') of {rows.dtype}; it must be bool, True where a step is real."
        )
    lengths = rows.sum(-1)
    if (rows != (np.arange(rows.shape[1]) < lengths[:, None])).any():
        raise SchemaMismatchError("Got ('collector', 'mask') with padding before real steps; it must follow them.")
    return lengths


def ends_of(schema: Schema, rows: Sequence[Any]) -> np.ndarray:
    """Says of each step, ``[B, T]``, whether it is the last one of its trajectory.

    Args:
        schema: the fields.
        rows: of each field, in order, ``[B, T, *shape]``; an array.

    Raises:
        SchemaMismatchError: when nothing says so.
    """
    found = [of_key for key in END_KEYS if (of_key := _control(schema, rows, key)) is not None]
    if not found:
        raise SchemaMismatchError(
            "Got data without ('next', 'done'), ('next', 'terminated') or ('next', 'truncated'): nothing says where a "
            "trajectory ends. TorchRL's environments and collectors write it; set it on data of your own."
        )
    flags = [(of_key if of_key.ndim == 2 else of_key.any(-1)).astype(bool, copy=False) for of_key in found]
    return functools.reduce(np.logical_or, flags)


def traj_ids_of(schema: Schema, rows: Sequence[Any]) -> np.ndarray | None:
    """Returns the collector's number of the trajectory of each step, ``[B, T]``; None where there is none."""
    return _control(schema, rows, TRAJ_IDS)


def _control(schema: Schema, rows: Sequence[Any], key: Key) -> np.ndarray | None:
    """The values of ``key``, ``[B, T]``, or ``[B, T, n]`` where a step has several; None where they are not there."""
    number = schema.number_of(key)
    if number is None:
        return None
    if schema.fields[number].is_text:
        raise SchemaMismatchError(f"Got text as {key}, which says where trajectories end: it must be a tensor.")
    values = rows[number]
    if values.ndim == 2:
        return values
    return values[:, :, 0] if values.shape[2:] == (1,) else values.reshape(*values.shape[:2], -1)


def runs_of(producer: int, ends: np.ndarray, traj_ids: np.ndarray | None, lengths: np.ndarray | None) -> Iterator[Run]:
    """Yields the runs of each row: cut behind the steps that end a trajectory and where the trajectory id changes."""
    cuts = ends
    if traj_ids is not None:
        cuts = ends.copy()
        cuts[:, :-1] |= traj_ids[:, 1:] != traj_ids[:, :-1]
    for row in range(len(ends)):
        length = ends.shape[1] if lengths is None else int(lengths[row])
        stops = [stop for stop in (cuts[row].nonzero()[0] + 1).tolist() if stop < length]
        start = 0
        for stop in (*stops, length):
            if stop > start:
                trajectory = ("row", row) if traj_ids is None else ("id", int(traj_ids[row, start]))
                yield Run((producer, *trajectory), row, start, stop, bool(ends[row, stop - 1]))
            start = stop
