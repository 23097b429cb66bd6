"""The memory of a storage on the CPU: arena and table, mapped by every process that writes or reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.layout import arena_bytes
from embodichain_rl.replay.host.trajectory_table import TrajectoryTable, table_bytes
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.schema import Key, Leaf, Schema, Shifted, shifted_fields
from embodichain_rl.shared import SharedBlock, check_memory

__all__ = ["HostMemory"]


class HostMemory:
    """The steps of a storage in shared memory, and how a trajectory gets there.

    Args:
        ledger: says where each trajectory lies.
        compact: whether next observations are stored once.
        expected_steps: how many steps will be touched in the usual run of things: they are held against the memory that
            is left when the arena is allocated. The rest of it is address space.

    Attributes:
        ledger (Ledger): what was given.
        arena_block (SharedBlock): the bytes of the arena.
    """

    device = torch.device("cpu")
    made_for = device
    staging_bytes: int | None = None

    def __init__(self, ledger: Ledger, *, compact: bool, expected_steps: int) -> None:
        self.ledger = ledger
        self.compact = compact
        self._expected_steps = expected_steps
        self.arena_block = SharedBlock()
        self._table_block = SharedBlock()
        self._start_closed()

    def _start_closed(self) -> None:
        self._arena: Arena | None = None
        self._table: TrajectoryTable | None = None

    def shifted_in(self, schema: Schema) -> Shifted:
        """Returns the fields of a schema that are read one step later from another one; none if not ``compact``."""
        if self._arena is not None and self._arena.schema is schema:
            return self._arena.shifted
        return shifted_fields(schema) if self.compact else {}

    def stored_bytes(self, schema: Schema) -> int:
        """Returns the bytes of a step that are stored: those of shifted fields are not."""
        return schema.nbytes - sum(schema.fields[number].nbytes for number in self.shifted_in(schema))

    def allocate(self, schema: Schema) -> None:
        """Gives the memory its size: by one process, once, with the ledger of the storage frozen.

        Raises:
            BufferMemoryError: when it would not fit.
        """
        self._check_room(schema)
        self.arena_block.allocate(arena_bytes(schema, self.ledger.arena_steps, self.shifted_in(schema)))
        self._table_block.allocate(table_bytes(schema, self.ledger.num_rows))

    def _check_room(self, schema: Schema) -> None:
        in_table = table_bytes(schema, self.ledger.num_rows)
        check_memory(
            arena_bytes(schema, self._expected_steps, self.shifted_in(schema)) + in_table,
            f"A buffer of {self.ledger.max_total_steps:,} steps of {self.stored_bytes(schema):,} bytes, with "
            "head-room,",
            "Lower max_total_steps, or store less a step (smaller images, fewer keys).",
        )

    def open(self, schema: Schema) -> None:
        """Maps what is allocated; does nothing where it is mapped."""
        if self._arena is None:
            if schema.trajectory_fields:
                self._table = TrajectoryTable(schema, self._table_block, self.ledger.num_rows)
            self._arena = Arena(schema, self.arena_block, self.ledger.arena_steps, self.shifted_in(schema))

    @property
    def arena(self) -> Arena:
        """The steps, when the memory is open."""
        assert self._arena is not None, "open() comes first"
        return self._arena

    @property
    def table(self) -> TrajectoryTable | None:
        """The values of whole trajectories; None where no key is of whole trajectories."""
        return self._table

    @property
    def tensordict(self) -> TensorDictBase:
        """The columns, where TorchRL looks for keys."""
        return self.arena.tensordict

    def write(
        self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], policy_version: int
    ) -> int:
        """Copies one whole trajectory and publishes it; see :meth:`TrajectoryStorage.write`."""
        arena = self._arena
        assert arena is not None, "open() comes first"
        region = self._reserve(sum([len(piece[0]) for piece in pieces]))  # a list is faster
        try:
            longest_segment = arena.write(region.start, pieces)
        except BaseException:
            self.ledger.give_back(region)
            raise
        table = self._table
        fill = None if table is None else partial(table.write, values=of_trajectory)
        return self.ledger.publish(region, longest_segment, policy_version=policy_version, fill=fill)

    def _reserve(self, length: int) -> Reservation:
        return self.ledger.reserve(length)

    def directly(self, leaves: Mapping[Key, Leaf]) -> None:
        """Returns None: there is no device that data could lie on."""

    def check_readable(self) -> None:
        """Refuses to be read by this process; here all processes read."""

    def check_length(self, length: int) -> None:
        """Refuses a trajectory that will never fit, where ``max_total_steps`` does not say so; here it does."""

    def flush(self, timeout: float) -> None:
        """Waits until all that was written is live; here it is."""

    def discard(self) -> None:
        """Drops what was written and is not live yet; here there is none."""

    def close(self) -> None:
        """Ends what goes on in the background; here there is nothing."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_arena", "_table")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_closed()
