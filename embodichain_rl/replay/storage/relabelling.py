"""Changes of the values of a small key of live trajectories, one whole trajectory at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import SchemaMismatchError, TrajectoryEvictedError, UnsupportedOperationError
from embodichain_rl.replay.durable import Piece
from embodichain_rl.replay.host import Arena
from embodichain_rl.replay.ledger import JOURNAL_BYTES
from embodichain_rl.replay.schema import StepField, as_array, lengths_key, segment_field
from embodichain_rl.replay.storage.storage import TrajectoryStorage

__all__ = ["Relabel", "relabel"]

TOGETHER = 256 * 1024
"""Bytes of changes that are written to the disk at once, of a buffer in a file."""

Relabel = Callable[[TensorDict], Any]
"""Takes a whole trajectory, ``[T]``, and returns the new values of a key."""


def relabel(storage: TrajectoryStorage, key: NestedKey, fn: Relabel, ids: np.ndarray | None = None) -> int:
    """Do what :meth:`TrajectoryReplayBuffer.relabel` describes; return how many trajectories were changed."""
    if storage.schema is None:
        return 0
    if storage.staged:
        raise UnsupportedOperationError(
            "What is stored on a device can't be relabelled. Keep the buffer on the CPU, or change what is sampled "
            "with a transform."
        )
    arena = storage.arena
    assert isinstance(arena, Arena), "not on a device"
    field, target, column = _column_of(storage, arena, key)
    block = storage.ledger.memory[target]
    first = column.data_ptr() - block.ctypes.data
    with storage.texts.held() if field.is_text else nullcontext():
        return _relabel(storage, fn, storage.ledger.live().all() if ids is None else ids, field, target, first)


def _relabel(
    storage: TrajectoryStorage, fn: Relabel, ids: np.ndarray, field: StepField, target: int, first: int
) -> int:
    """Change trajectories; return how many were live.

    Args:
        storage: the storage.
        fn: returns the new values.
        ids: the ids of the trajectories.
        field: the field that is changed.
        target: which memory of the ledger the column is in.
        first: where the column begins there.
    """
    changed, together = 0, list[Piece]()
    for number in ids.tolist():
        try:
            trajectory = storage.trajectory(number)
        except TrajectoryEvictedError:
            continue
        steps = len(trajectory)
        new = _checked(storage, field, fn(trajectory), (steps, *field.shape) if target == 0 else field.shape)
        if new.nbytes > JOURNAL_BYTES:
            raise UnsupportedOperationError(
                f"Got {new.nbytes:,} bytes of {field.key} in a trajectory of {steps:,} steps; at most "
                f"{JOURNAL_BYTES:,} can be relabelled at once. Relabel small keys, such as rewards and labels; write a "
                "new trajectory with rb.extend, and rb.discard the old one, to change images."
            )
        row = storage.ledger.rows_of(np.array([number]))
        at = int(row.starts[0]) if target == 0 else number % storage.ledger.num_rows
        together.append(Piece(number, target, first + at * field.nbytes, new.tobytes()))
        if sum(len(piece.content) for piece in together) >= (TOGETHER if storage.path is not None else 0):
            changed += storage.change(together)
            together = []
    return changed + (storage.change(together) if together else 0)


def _column_of(storage: TrajectoryStorage, arena: Arena, key: NestedKey) -> tuple[StepField, int, torch.Tensor]:
    """Return the field at a key, which of the ledger's memories it is in, and its column there."""
    schema, name = arena.schema, checked_key(key)
    number = schema.number_of(name)
    of_trajectory = [field.key for field in schema.trajectory_fields]
    if number is None and name in of_trajectory:
        table = storage.table
        assert table is not None, "there are trajectory fields"
        at = of_trajectory.index(name)
        return schema.trajectory_fields[at], 1, table.columns[at]  # type: ignore[union-attr]
    if number is None:
        raise SchemaMismatchError(
            f"Got the key {name} to relabel, but what is stored has the keys {[f.key for f in schema.all_fields]}."
        )
    ragged = [lengths_key(field.key) for field in schema.fields if field.is_ragged]
    if schema.fields[number].is_blob or name in ragged:
        raise UnsupportedOperationError(
            f"Got the key {name} to relabel, whose values are ragged or kept encoded: their bytes may be of another "
            "number. Relabel other keys, such as rewards and labels."
        )
    if number in arena.shifted or number in arena.shifted.values() or number == segment_field(schema):
        raise UnsupportedOperationError(
            f"Got the key {name} to relabel, but other values are read from its column: it is an observation that a "
            "compact buffer stores once, or the segment id. Relabel other keys, such as rewards and labels."
        )
    return schema.fields[number], 0, arena.columns[number]


def _checked(storage: TrajectoryStorage, field: StepField, value: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bytes of new values, ``uint8``; refuse those of another shape or dtype."""
    if field.is_text and not isinstance(value, torch.Tensor):
        texts = np.empty(shape, dtype=object)
        texts[...] = np.array(value, dtype=object).reshape(shape) if not isinstance(value, str) else value
        value = torch.from_numpy(storage.texts.ids_of(texts, for_good=False).reshape(shape))
    if not isinstance(value, torch.Tensor):
        raise SchemaMismatchError(
            f"The function returned a {type(value).__name__} for {field.key}; needed is a tensor {shape} of "
            f"{field.dtype}."
        )
    if value.dtype != field.dtype or tuple(value.shape) != shape:
        raise SchemaMismatchError(
            f"The function returned a tensor {tuple(value.shape)} of {value.dtype} for {field.key}; needed is one "
            f"{shape} of {field.dtype}."
        )
    return np.ascontiguousarray(as_array(value.detach().cpu().contiguous())).reshape(-1).view(np.uint8)
