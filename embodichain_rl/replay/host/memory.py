"""The memory of a storage on the CPU: an arena and a table of trajectory values, in shared memory.

Every process that writes or reads maps both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import BufferMemoryError, DiskFullError, TrajectoryTooLongError
from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.backing import Backing
from embodichain_rl.replay.host.blob_arena import LaidOut
from embodichain_rl.replay.host.chunk_batches import ChunkBatches
from embodichain_rl.replay.host.gaps import Gaps
from embodichain_rl.replay.host.layout import arena_bytes, arena_columns, step_bytes, used_parts
from embodichain_rl.replay.host.pieces import RegionInPieces
from embodichain_rl.replay.host.sizing import Sizes, Sizing
from embodichain_rl.replay.host.trajectory_table import TrajectoryTable, table_bytes, table_columns
from embodichain_rl.replay.kernels import PlainChunks, keep, kernels
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.schema import Key, Leaf, Schema, Shifted, shifted_fields
from embodichain_rl.shared import BlockSource, FileBlock, SharedBlock, own_process

__all__ = ["HostMemory"]

_Columns: TypeAlias = list[tuple[int, int]]


class HostMemory:
    """Arena, table and ledger of a storage in shared memory.

    :class:`~embodichain_rl.replay.device.DeviceMemory` has the same interface.

    Args:
        ledger: table that says where each trajectory lies.
        compact: whether next observations are stored once.
        sizing: the limits of the buffer; None for a memory that sizes its ledger itself.
        reserve: whether the memory is taken when the arena is allocated; else a page is taken when it is first written.
        blocks: where the shared memory comes from; by default nameless memory.

    Attributes:
        ledger (Ledger): the given ledger.
        arena_block (SharedBlock): the memory of the arena.
    """

    device = torch.device("cpu")
    made_for = device
    staging_bytes: int | None = None

    def __init__(
        self,
        ledger: Ledger,
        *,
        compact: bool,
        sizing: Sizing | None = None,
        reserve: bool = False,
        blocks: BlockSource | None = None,
    ) -> None:
        kernels()  # raises where those that are required are missing
        self.ledger = ledger
        self.compact = compact
        self._sizing = sizing
        self._reserve_memory = reserve
        self._blocks = blocks or BlockSource()
        self._maker = own_process() if self._blocks.fresh else None
        self.arena_block = self._blocks.block("arena")
        self.table_block = self._blocks.block("table")
        self._reset_mappings()

    def anew(self) -> HostMemory:
        """Return a memory over the same ledger that is not allocated yet, for steps of another schema."""
        return HostMemory(
            self.ledger,
            compact=self.compact,
            sizing=self._sizing,
            reserve=self._reserve_memory,
            blocks=self._blocks,
        )

    def _reset_mappings(self) -> None:
        self._arena: Arena | None = None
        self._table: TrajectoryTable | None = None
        self._backing: Backing | None = None  # only in a file
        self._gaps: Gaps | None = None  # only where it has more address space than memory
        self._batches: dict[PlainChunks, ChunkBatches] = {}
        self._limits: tuple[Schema, dict[str, int]] | None = None
        self._places: tuple[Schema, int, _Columns, _Columns] | None = None

    def shifted_in(self, schema: Schema) -> Shifted:
        """Return the fields that have no column, because they are read one step later from another field.

        The result is empty unless the memory is ``compact``.
        """
        if self._arena is not None and self._arena.schema is schema:
            return self._arena.shifted
        return shifted_fields(schema) if self.compact else {}

    def stored_bytes(self, schema: Schema) -> int:
        """Return the size of a stored step, in bytes. Shifted fields do not count."""
        return schema.nbytes - sum(schema.fields[number].nbytes for number in self.shifted_in(schema))

    @property
    def sized_by_schema(self) -> bool:
        """Whether the size in steps is known only with the schema, since bytes are limited."""
        return self._sizing is not None and self._sizing.max_bytes is not None

    def allocate(self, schema: Schema, *, beside: int = 0) -> None:
        """Set the size of the memory. Only one process may call this, once, while the ledger is frozen.

        Args:
            schema: the fields of a step.
            beside: bytes that must be left besides.

        Raises:
            BufferMemoryError: if the buffer does not fit into the available memory, or into ``max_bytes``.
            DiskFullError: if it is in files, and does not fit on the disk.
        """
        resized = self.resize(schema)
        self._check_available_memory(schema, beside)
        if resized:
            self.ledger.begin()
        ledger, shifted = self.ledger, self.shifted_in(schema)
        self.arena_block.allocate(arena_bytes(schema, ledger.arena_steps, shifted))
        in_table = table_bytes(schema, ledger.num_rows)
        self.table_block.allocate(in_table)
        self.table_block.back(0, in_table)
        if self._reserve_memory:
            self._take_memory(schema)

    def _check_available_memory(self, schema: Schema, beside: int) -> None:
        ledger, writers = self.ledger, f" and {beside:,} bytes that its writers hold" if beside else ""
        self._blocks.check_room(
            arena_bytes(schema, self._memory_steps(schema), self.shifted_in(schema))
            + table_bytes(schema, ledger.num_rows)
            + beside,
            f"A buffer of {ledger.max_total_steps:,} steps of {self.stored_bytes(schema):,} bytes, with "
            f"head-room{writers},",
            "Lower max_total_steps, or store less per step (smaller images, fewer keys).",
        )

    def _take_memory(self, schema: Schema) -> None:
        ledger, steps = self.ledger, self._memory_steps(schema)
        try:
            for offset, nbytes in used_parts(schema, ledger.arena_steps, steps, self.shifted_in(schema)):
                self.arena_block.reserve(offset, nbytes)
        except DiskFullError:
            raise
        except OSError as error:
            raise BufferMemoryError(
                f"Could not take the memory of {steps:,} steps of {self.stored_bytes(schema):,} bytes: "
                f"{error}. Lower max_total_steps, or store less per step."
            ) from None

    def resize(self, schema: Schema) -> bool:
        """Set the sizes of the ledger in this process, where they depend on the schema; return whether they do."""
        if self._sizing is None:
            return False
        sizes, vary = self._sizes(schema), schema.blobs is not None
        depends = self.sized_by_schema or vary or self.ledger.arena_steps != sizes.arena_steps
        if depends:
            self.ledger.resize(sizes.max_total_steps, sizes.arena_steps, sizes.usual_steps, rooms_vary=vary)
        return depends

    def _sizes(self, schema: Schema) -> Sizes:
        assert self._sizing is not None, "only a staging ring has none"
        ledger, shifted = self.ledger, self.shifted_in(schema)
        pages = arena_bytes(schema, 1, shifted)  # no less than what rounding up to pages adds
        other = table_bytes(schema, ledger.num_rows) + ledger.nbytes + pages
        slots = 1.0 if schema.blobs is None else schema.blobs.slots_per_step
        in_step, columns = step_bytes(schema, shifted), len(arena_columns(schema, 1, shifted))
        column_bytes = in_step / max(1, columns) if schema.blobs is None else None
        return self._sizing.of_schema(in_step, other, slots, column_bytes)

    def _memory_steps(self, schema: Schema) -> int:
        """Return the number of steps that may take memory."""
        return self.ledger.usual_steps if self._sizing is None else self._sizes(schema).memory_steps

    def sizes_in_bytes(self, schema: Schema | None) -> dict[str, int]:
        """Return ``nbytes_per_step``, and the bytes expected, at most and used; see :meth:`TrajectoryStorage.bytes`."""
        used = self.ledger.nbytes_used
        if schema is None or self._sizing is None:
            return {"nbytes_per_step": 0, "bytes_expected": 0, "bytes_at_most": 0, "bytes_used": used}
        if self._limits is None or self._limits[0] is not schema:
            self._limits = schema, self._limits_in_bytes(schema)
        in_blocks = self.arena_block.nbytes_used + self.table_block.nbytes_used
        return {**self._limits[1], "bytes_used": used + in_blocks}

    def _limits_in_bytes(self, schema: Schema) -> dict[str, int]:
        sizes, shifted = self._sizes(schema), self.shifted_in(schema)
        other = table_bytes(schema, self.ledger.num_rows) + self.ledger.nbytes
        beside = 0 if schema.blobs is None else schema.blobs.expected - schema.blobs.slot
        return {
            "nbytes_per_step": step_bytes(schema, shifted) + beside,
            "bytes_expected": arena_bytes(schema, self._announced(sizes), shifted) + other,
            "bytes_at_most": arena_bytes(schema, sizes.arena_steps, shifted) + other,
        }

    def _announced(self, sizes: Sizes) -> int:
        return sizes.memory_steps if self._reserve_memory else sizes.expected_steps

    def open(self, schema: Schema) -> None:
        """Map the allocated memory into this process, unless it is mapped already.

        Raises:
            OwnerGoneError: if it was closed.
        """
        if self._arena is None:
            self.ledger.check_open()
            self.resize(schema)
            if isinstance(self.arena_block, FileBlock) and isinstance(self.table_block, FileBlock):
                self.arena_block.check_size(arena_bytes(schema, self.ledger.arena_steps, self.shifted_in(schema)))
                self.table_block.check_size(table_bytes(schema, self.ledger.num_rows))
                columns = arena_columns(schema, self.ledger.arena_steps, self.shifted_in(schema))
                if not self.arena_block.in_memory:
                    self._backing = Backing(self.arena_block, columns, self.ledger.arena_steps)
            if self._backing is None and self._sizing is not None and self._sizes(schema).gaps_give_back:
                columns = arena_columns(schema, self.ledger.arena_steps, self.shifted_in(schema))
                announced = self._sizes(schema).expected_steps
                self._gaps = Gaps(self.arena_block, columns, arena_bytes(schema, announced, self.shifted_in(schema)))
            if schema.trajectory_fields:
                self._table = TrajectoryTable(schema, self.table_block, self.ledger.num_rows)
            self._arena = Arena(schema, self.arena_block, self.ledger.arena_steps, self.shifted_in(schema))
            # What the ledger's journal may have to write, for a process that was killed.
            self.ledger.memory = (self.arena_block.mapped().numpy(),)
            if self._table is not None:
                self.ledger.memory += (self.table_block.mapped().numpy(),)

    def size_of(self, schema: Schema, lengths: np.ndarray, rooms: np.ndarray) -> int:
        """Return about how many bytes the steps of some trajectories take, with their blobs.

        Args:
            schema: the schema of the storage.
            lengths: their numbers of steps, ``int64`` ``[n]``.
            rooms: the sizes of their regions, in steps, ``int64`` ``[n]``; empty without blobs.
        """
        slot = 0 if schema.blobs is None else schema.blobs.slot
        return int(lengths.sum()) * self.stored_bytes(schema) + int(rooms.sum()) * slot

    def ranges(
        self, schema: Schema, start: int, length: int, row: int, room: int = 0
    ) -> list[tuple[SharedBlock, int, int]]:
        """Return where the bytes of a trajectory lie: per piece its block, its byte offset and its size in bytes.

        Args:
            schema: the schema of the storage.
            start: first step of its region.
            length: its number of steps.
            row: its row in the ledger.
            room: the size of its region, in steps, over all of which its blobs may lie; has no effect without blobs.
        """
        columns, of_row = self._columns_in(schema)
        steps = [length + self.ledger.margin] * len(columns)
        if schema.blobs is not None:
            steps[-1] = room  # the slots are behind all columns
        found = [
            (self.arena_block, offset + start * nbytes, count * nbytes)
            for (offset, nbytes), count in zip(columns, steps, strict=True)
        ]
        return found + [(self.table_block, offset + row * nbytes, nbytes) for offset, nbytes in of_row]

    def _columns_in(self, schema: Schema) -> tuple[_Columns, _Columns]:
        """Return where the columns of the arena and the table begin, and the bytes of a step or a row. It is kept."""
        steps = self.ledger.arena_steps
        if self._places is None or self._places[0] is not schema or self._places[1] != steps:
            columns = arena_columns(schema, steps, self.shifted_in(schema))
            self._places = schema, steps, columns, table_columns(schema, self.ledger.num_rows)
        return self._places[2:]

    def chunk_batches(self, chunks: PlainChunks, *, views: bool) -> ChunkBatches:
        """Return what makes batches of plain chunks; see :class:`ChunkBatches`. It is kept."""
        batches = self._batches.get(chunks)
        if batches is None:
            new = ChunkBatches(self.arena, self._table, self.ledger, chunks, views=views)
            batches = keep(self._batches, chunks, new)
        return batches

    @property
    def arena(self) -> Arena:
        """The arena. The memory must be open."""
        assert self._arena is not None, "call open() first"
        return self._arena

    @property
    def table(self) -> TrajectoryTable | None:
        """The table of trajectory values; None if the schema has no trajectory fields."""
        return self._table

    @property
    def tensordict(self) -> TensorDictBase:
        """The columns as a TensorDict, in which TorchRL looks up keys."""
        return self.arena.tensordict

    def write(
        self, pieces: Sequence[Sequence[np.ndarray]], trajectory_values: Sequence[np.ndarray], policy_version: int
    ) -> int:
        """Copy one whole trajectory to the arena and publish it; see :meth:`TrajectoryStorage.write`."""
        arena = self._arena
        assert arena is not None, "call open() first"
        blobs = None if arena.blobs is None else arena.blobs.lay_out(pieces)
        length = sum([len(piece[0]) for piece in pieces])  # a list is faster than a generator
        region = self._reserve(length) if blobs is None else self.ledger.reserve(length, self._room(length, blobs))
        try:
            if self._backing is not None and region.start + region.room > self._backing.end:
                self._backing.reach(region.start + region.room)
            longest_segment = arena.write(region.start, pieces, blobs)
        except BaseException:
            self.ledger.give_back(region)
            raise
        return self._publish(region, longest_segment, trajectory_values, policy_version)

    def _publish(
        self,
        region: Reservation,
        longest_segment: int | None,
        trajectory_values: Sequence[np.ndarray],
        policy_version: int,
    ) -> int:
        table = self._table
        fill = None if table is None else partial(table.write, values=trajectory_values)
        number = self.ledger.publish(region, longest_segment, policy_version=policy_version, fill=fill)
        if self._gaps is not None and self._gaps.too_large:
            self.ledger.give_back_free(self._gaps.give_back)
            self._gaps.given_back()
        return number

    def begin_pieces(self, length: int) -> RegionInPieces | None:
        """Reserve a region for a trajectory that is written piece by piece; None if there is no room for it.

        Args:
            length: number of steps that it may get; it may get more.
        """
        if self.arena.blobs is not None:
            return None
        reservation = self.ledger.reserve_pieces(min(length, self.ledger.max_total_steps))
        if reservation is None:
            return None
        return RegionInPieces(self.ledger, self.arena, self._backing, reservation)

    def publish_pieces(
        self, region: RegionInPieces, trajectory_values: Sequence[np.ndarray], policy_version: int
    ) -> int | None:
        """Publish the trajectory that was written to a region; None if the region is of another memory."""
        if region.arena is not self._arena:
            return None
        reservation, longest_segment = region.end()
        return self._publish(reservation, longest_segment, trajectory_values, policy_version)

    def _reserve(self, length: int) -> Reservation:
        return self.ledger.reserve(length)

    def _room(self, length: int, blobs: LaidOut) -> int:
        """Return how many steps the region of a trajectory needs, so that its blobs fit.

        Raises:
            TrajectoryTooLongError: if they never do.
        """
        assert self._arena is not None, "opened"
        assert self._arena.blobs is not None, "there are blobs"
        slot = self._arena.blobs.slot
        room = max(length + self.ledger.margin, -(-blobs.nbytes // slot))
        if room > self.ledger.usual_steps:
            raise TrajectoryTooLongError(
                f"Got a trajectory of {length:,} steps with {blobs.nbytes:,} bytes of ragged or compressed values, but "
                f"the whole buffer has room for {self.ledger.usual_steps * slot:,} of them. Raise ragged_bytes, the "
                "bytes that they are expected to take a step, or max_total_steps (or max_bytes); or end episodes "
                "earlier."
            )
        return room

    def directly(self, leaves: Mapping[Key, Leaf]) -> None:
        """Return None: no data lies on a device that this memory is on. See :meth:`DeviceMemory.directly`."""

    def check_readable(self) -> None:
        """Raise if this process cannot read the memory. Here every process can, until it is closed."""
        self.ledger.check_open()

    def check_length(self, length: int) -> None:
        """Raise if a trajectory is too long for a limit below ``max_total_steps``. Here no such limit exists."""

    def flush(self, timeout: float) -> None:
        """Wait until all written trajectories are live. Here they are live at once."""

    def discard(self) -> None:
        """Drop the written trajectories that are not live yet. Here no such trajectories exist."""

    def close(self) -> None:
        """Give the memory back at once, whatever still refers to it; see :meth:`TrajectoryStorage.close`.

        Files stay: only this process unmaps them.
        """
        if isinstance(self.arena_block, FileBlock) and isinstance(self.table_block, FileBlock):
            if not self.arena_block.in_memory:
                self.ledger.leave()
                self._reset_mappings()
                self.arena_block.unmap()
                self.table_block.unmap()
            return
        if self._maker != own_process():
            return
        self.ledger.close()
        self.arena_block.give_back()
        self.table_block.give_back()

    def __getstate__(self) -> dict[str, Any]:
        mapped = ("_arena", "_table", "_batches", "_backing", "_gaps", "_limits", "_places")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset_mappings()
