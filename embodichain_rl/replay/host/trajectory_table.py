"""What belongs to whole trajectories, such as the task: one row each, beside the ledger's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.batch_memory import gathering_into
from embodichain_rl.replay.host.layout import arena_bytes
from embodichain_rl.replay.schema import Key, Schema, as_array
from embodichain_rl.shared import SharedBlock

__all__ = ["TrajectoryTable", "table_bytes"]


def _row_schema(schema: Schema) -> Schema:
    # Named otherwise than the fields of steps, since to an arena its own fields are those of steps.
    return Schema([replace(field, key=("row", *field.key[1:])) for field in schema.trajectory_fields])


def table_bytes(schema: Schema, num_rows: int) -> int:
    """Returns the bytes of a table; 0 where the schema has nothing for it."""
    return arena_bytes(_row_schema(schema), num_rows, {}) if schema.trajectory_fields else 0


class TrajectoryTable:
    """The fields of whole trajectories, in memory that all processes share.

    Trajectory ``id`` has the row ``id % num_rows``, as in the ledger, which lets it be written while no id stands in
    its own row: whoever finds the id there before a copy and after it has copied the values of that trajectory.

    Args:
        schema: with at least one of ``trajectory_fields``.
        block: the memory, of the size that :func:`table_bytes` says.
        num_rows: the rows of the ledger.
    """

    def __init__(self, schema: Schema, block: SharedBlock, num_rows: int) -> None:
        self._fields = schema.trajectory_fields
        self._num_rows = num_rows
        self._arena = Arena(_row_schema(schema), block, num_rows, {})
        self._numbers = {field.key: number for number, field in enumerate(self._fields)}

    @classmethod
    def private(cls, schema: Schema, num_rows: int) -> TrajectoryTable:
        """Makes a table in memory that no other process is handed."""
        return cls(schema, SharedBlock(table_bytes(schema, num_rows)), num_rows)

    def write(self, row: int, values: Sequence[np.ndarray]) -> None:
        """Copies the values of a trajectory, one array ``[*shape]`` a field, to row ``row``."""
        self._arena.write(row, [[value[None] for value in values]])

    def copy(self, ids: np.ndarray, length: int | None = None) -> list[torch.Tensor]:
        """Copies the values of trajectories, one tensor a field.

        Args:
            ids: ``int64`` ``[n]``.
            length: how often each is repeated, as the steps of a chunk.

        Returns:
            ``[n, length, *shape]``, or ``[n, *shape]`` where there is no length.
        """
        rows = ids % self._num_rows
        if length is not None:
            rows = np.repeat(rows, length)
        shape = (len(ids),) if length is None else (len(ids), length)
        with gathering_into(None):  # they are too small for a block of their own
            values = self._arena.copy_chunks(rows, 1)
        return [value.view(*shape, *field.shape) for value, field in zip(values, self._fields, strict=True)]

    def column(self, key: Key, ids: np.ndarray) -> np.ndarray:
        """Returns copies of the values of one field, ``[n, *shape]``.

        Raises:
            SchemaMismatchError: when there is no such field.
        """
        number = self._numbers.get(key)
        if number is None:
            raise SchemaMismatchError(f"Got {key}, but what is stored of a trajectory is {[*self._numbers]}.")
        return as_array(self._arena.copy_steps(number, ids % self._num_rows))
