"""Which texts the live trajectories of a storage use."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from embodichain_rl.replay.host import HostMemory
from embodichain_rl.replay.schema import as_array

__all__ = ["texts_in_use"]


def texts_in_use(storage: Any) -> Callable[[], np.ndarray | None]:
    """Return a function that returns the ids of text in all live trajectories, ``int64`` ``[n]``.

    It returns None where they can't be known: on a device, and when the storage is gone. It keeps no storage alive.

    Args:
        storage: a :class:`~embodichain_rl.TrajectoryStorage`.
    """
    reference = weakref.ref(storage)

    def ids() -> np.ndarray | None:
        found = reference()
        return None if found is None else _ids(found)

    return ids


def _ids(storage: Any) -> np.ndarray | None:
    memory, schema = storage._opened, storage.schema
    if schema is None or not isinstance(memory, HostMemory):
        return None
    ledger, arena, table = memory.ledger, memory.arena, memory.table
    rows = ledger.live_rows()
    ends = rows.starts + rows.lengths + ledger.margin
    spans = [slice(*span) for span in zip(rows.starts.tolist(), ends.tolist(), strict=True)]
    parts = [np.empty(0, dtype=np.int64)]
    for number, field in enumerate(schema.fields):
        if field.is_text and spans:
            column = as_array(arena.columns[number])
            parts.append(np.unique(np.concatenate([column[span].reshape(-1) for span in spans])))
    for number, field in enumerate(schema.trajectory_fields):
        if field.is_text and table is not None:
            parts.append(np.unique(as_array(table.copy(rows.ids)[number])))
    return np.concatenate(parts).astype(np.int64)
