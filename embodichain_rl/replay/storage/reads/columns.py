"""Reads of one key of all live steps, such as ``storage["observation"]``."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import MissingKeyError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.schema import ORIGIN_KEYS, Key, Schema, key_name
from embodichain_rl.replay.storage.reads.whole_reads import OPTIMISTIC_READS, ReadView

__all__ = ["as_column_key", "read_column"]


def as_column_key(index: Any) -> Key | None:
    """Return an index of a storage as a key; None if it is none."""
    if isinstance(index, str):
        return (index,)
    if isinstance(index, tuple) and index and all(isinstance(part, str) for part in index):
        return index
    return None


def read_column(view: ReadView, key: Key) -> torch.Tensor | TensorDict:
    """Return the values of a key at all live steps, ``[steps, *shape]``: one trajectory after the other, oldest first.

    Args:
        view: what is read.
        key: a key of a step, of a trajectory, or of the origin of a step; or of several, which are nested under it.

    Raises:
        MissingKeyError: when there is no such key.
    """
    schema = view.arena.schema
    names: list[Key] = [*(field.key for field in schema.all_fields), schema.index_key, *ORIGIN_KEYS]
    wanted = [name for name in names if name[: len(key)] == key]
    if not wanted:
        raise MissingKeyError(f"Got the key {key_name(key)}; what is stored has the keys {schema}.")
    values = [
        value if (number := schema.number_of(name)) is None else view.arena.resolved(number, value)
        for name, value in zip(wanted, _read(view, schema, wanted), strict=True)
    ]
    if wanted == [key]:
        return values[0]
    result = TensorDict({}, [len(values[0])])
    for name, value in zip(wanted, values, strict=True):
        result.set(name[len(key) :], value)
    return result


def _read(view: ReadView, schema: Schema, keys: list[Key]) -> list[torch.Tensor]:
    ledger = view.ledger
    for _ in range(OPTIMISTIC_READS):
        live = ledger.live()
        rows = ledger.existing(live.all())
        values = _values(view, schema, keys, rows)
        kept = ledger.unchanged(rows)
        if kept.all():
            return values
        if 2 * np.count_nonzero(kept) >= len(live):
            there = torch.from_numpy(np.repeat(kept, rows.lengths)).to(values[0].device)
            return [value[there] for value in values]
    with ledger.frozen():
        return _values(view, schema, keys, ledger.live_rows())


def _values(view: ReadView, schema: Schema, keys: list[Key], rows: Rows) -> list[torch.Tensor]:
    lengths = rows.lengths
    steps = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids = np.repeat(rows.ids, lengths)
    of_trajectory: dict[Key, torch.Tensor] = {}
    if view.table is not None:
        names = [field.key for field in schema.trajectory_fields]
        of_trajectory = dict(zip(names, view.table.copy(ids), strict=True))
    values = []
    for key in keys:
        number = schema.number_of(key)
        if number is not None and number < len(schema.fields):
            values.append(view.arena.copy_steps(number, np.repeat(rows.starts, lengths) + steps))
        elif key in of_trajectory:
            values.append(of_trajectory[key])
        else:
            pair, *apart = view.arena.origin(np.stack([ids, steps], axis=-1))
            values.append(pair if key == schema.index_key else apart[ORIGIN_KEYS.index(key)])
    return values
