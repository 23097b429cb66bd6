"""Values that belong to whole trajectories, such as the task: one row per trajectory.

The rows have the same numbers as those of the ledger.
"""

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
    # The keys are renamed, because a Schema treats keys under "trajectory" as trajectory fields, not as step fields.
    return Schema([replace(field, key=("row", *field.key[1:])) for field in schema.trajectory_fields])


def table_bytes(schema: Schema, num_rows: int) -> int:
    """Return the size of a table in bytes; 0 if the schema has no trajectory fields."""
    return arena_bytes(_row_schema(schema), num_rows, {}) if schema.trajectory_fields else 0


class TrajectoryTable:
    """The trajectory fields of a schema, in shared memory.

    Trajectory ``id`` has row ``id % num_rows``, as in the ledger. A row is written while the ledger's row carries no
    id; see the ``fill`` argument of :meth:`Ledger.publish`. So a reader that finds the id in the ledger both before and
    after its copy has copied the values of this trajectory.

    Args:
        schema: a schema with at least one of ``trajectory_fields``.
        block: shared memory of :func:`table_bytes` bytes.
        num_rows: number of rows in the ledger.
    """

    def __init__(self, schema: Schema, block: SharedBlock, num_rows: int) -> None:
        self._fields = schema.trajectory_fields
        self._num_rows = num_rows
        self._arena = Arena(_row_schema(schema), block, num_rows, {})
        self._numbers = {field.key: number for number, field in enumerate(self._fields)}

    @property
    def columns(self) -> list[torch.Tensor]:
        """The column ``[num_rows, *shape]`` of each field."""
        return self._arena.columns

    @classmethod
    def private(cls, schema: Schema, num_rows: int) -> TrajectoryTable:
        """Return a new table in memory of its own, which is not shared with other processes."""
        return cls(schema, SharedBlock(table_bytes(schema, num_rows)), num_rows)

    def write(self, row: int, values: Sequence[np.ndarray]) -> None:
        """Copy the values of a trajectory, one array ``[*shape]`` per field, to row ``row``."""
        self._arena.write(row, [[value[None] for value in values]])

    def copy(self, ids: np.ndarray, length: int | None = None) -> list[torch.Tensor]:
        """Copy the values of trajectories.

        Args:
            ids: ``int64`` ``[n]``.
            length: number of repetitions of each value, for the steps of a chunk; None for no repetition.

        Returns:
            Per field ``[n, length, *shape]``, or ``[n, *shape]`` without ``length``.
        """
        rows = ids % self._num_rows
        if length is not None:
            rows = np.repeat(rows, length)
        shape = (len(ids),) if length is None else (len(ids), length)
        with gathering_into(None):  # too small for a memory block of their own
            values = self._arena.copy_chunks(rows, 1)
        return [value.view(*shape, *field.shape) for value, field in zip(values, self._fields, strict=True)]

    def rows_of(self, number: int) -> np.ndarray:
        """Return the bytes of the values of field ``number``, ``uint8`` ``[rows, bytes of a value]``."""
        return self._arena.steps_of(number)

    def column(self, key: Key, ids: np.ndarray) -> np.ndarray:
        """Return a copy of the values of one field, ``[n, *shape]``.

        Raises:
            SchemaMismatchError: if ``key`` is not a trajectory field.
        """
        number = self._numbers.get(key)
        if number is None:
            raise SchemaMismatchError(
                f"Got {key}, but the stored trajectory values are {[*self._numbers]}. Use one of these keys."
            )
        return as_array(self._arena.copy_steps(number, ids % self._num_rows))
