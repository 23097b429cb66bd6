"""The memory of a storage on a device: the arena in the process of its owner, and the staging ring for all others."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.replay.device.arena import DeviceArena, DeviceTable, Spans
from embodichain_rl.replay.device.chunk_batches import DeviceBatches
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.direct_writes import Batch, DirectTrajectory, DirectWrites, Span, copy_spans, merged
from embodichain_rl.replay.device.staging import StagingRing
from embodichain_rl.replay.device.uploader import Uploader, not_the_owner
from embodichain_rl.replay.kernels import PlainChunks, keep
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.schema import Key, Leaf, Schema, SharedSchema, Shifted

__all__ = ["DeviceMemory"]

UPLOADED = -1
"""Returned instead of an id for a trajectory in the ring. It gets its id when its upload is published."""


class DeviceMemory:
    """Arena, staging ring and ledger of a storage on a device.

    The process that makes this object is its owner. It holds the arena, and only it can read. Other processes write to
    the ring and never use the device. :class:`~embodichain_rl.replay.host.HostMemory` has the same interface.

    Args:
        device: the device of the arena.
        ledger: table that says where each trajectory lies in the arena. Only the owner writes it; every process reads
            it.
        schema: the schema of the storage.
        compact: whether next observations are stored once.
        staging_bytes: size of the ring in bytes; None for the default.
        made_for: the ``device`` argument for a copy of the storage.
    """

    def __init__(
        self,
        device: Device,
        ledger: Ledger,
        schema: SharedSchema,
        *,
        compact: bool,
        staging_bytes: int | None,
        made_for: torch.device | Device,
    ) -> None:
        self.device = device.device
        self.made_for = made_for
        self.ledger = ledger
        self._ring = StagingRing(staging_bytes, compact=compact)
        self.staging_bytes = self._ring.nbytes
        self._set_owner(Uploader(device, self._ring, ledger, schema))

    def _set_owner(self, uploader: Uploader | None) -> None:
        self._uploader = uploader
        self._direct: DirectWrites | None = None
        self._batches: dict[PlainChunks, DeviceBatches] = {}
        _memories.add(self)
        if uploader is not None:
            weakref.finalize(self, uploader.stop)
            uploader.start()

    # ---------------------------------------------------------------------------------------------------- allocation

    def shifted_in(self, schema: Schema) -> Shifted:
        """Return the fields without a column of their own; see :meth:`HostMemory.shifted_in`."""
        return self._ring.shifted_in(schema)

    sized_by_schema = False

    def sizes_in_bytes(self, schema: Schema | None) -> dict[str, int]:
        """Return the size of a step; that of the whole is the device's. See :meth:`HostMemory.sizes_in_bytes`."""
        return {"nbytes_per_step": 0 if schema is None else self._ring.stored_bytes(schema)}

    def allocate(self, schema: Schema, *, beside: int = 0) -> None:
        """Set the size of the ring and, in the owner, allocate the arena; see :meth:`HostMemory.allocate`."""
        self._ring.allocate(schema)
        self.open(schema)

    def open(self, schema: Schema) -> None:
        """Map the ring and, in the owner, allocate the arena, unless this was done before."""
        if self._uploader is not None:
            self._uploader.open(schema)
        self._ring.open(schema)

    # ------------------------------------------------------------------------------------------------------- reading

    def _owned_uploader(self) -> Uploader:
        if self._uploader is None:
            raise not_the_owner(self.device)
        return self._uploader

    def check_readable(self) -> None:
        """Raise if this process cannot read the memory.

        Raises:
            SharingError: if this process is not the owner.
            UploadError: if an upload has failed.
            OwnerGoneError: if the storage is closed.
        """
        self._owned_uploader().check()

    @property
    def arena(self) -> DeviceArena:
        """The arena. The memory must be open.

        Raises:
            SharingError: if this process is not the owner.
        """
        arena = self._owned_uploader().arena
        assert arena is not None, "call open() first"
        return arena

    @property
    def table(self) -> DeviceTable | None:
        """The table of trajectory values; None if the schema has no trajectory fields."""
        uploader = self._owned_uploader()
        return None if uploader.table is None else DeviceTable(uploader.table, uploader.device)

    @property
    def tensordict(self) -> TensorDictBase:
        """The columns as a TensorDict, in which TorchRL looks up keys.

        In processes other than the owner these are the columns of the ring.
        """
        return self._ring.tensordict if self._uploader is None else self.arena.tensordict

    # ------------------------------------------------------------------------------------------------------- writing

    def write(
        self, pieces: Sequence[Sequence[np.ndarray]], trajectory_values: Sequence[np.ndarray], policy_version: int
    ) -> int:
        """Write a trajectory to the ring and return -1, because it gets its id only when its upload is published."""
        self._check()
        self._ring.write(pieces, trajectory_values, policy_version)
        return UPLOADED

    def chunk_batches(self, chunks: PlainChunks, *, views: bool) -> DeviceBatches | None:
        """Return what makes batches of plain chunks, see :class:`DeviceBatches`; None if the device does not gather."""
        uploader = self._owned_uploader()
        batches = self._batches.get(chunks)
        if batches is None and uploader.device.gathers:
            new = DeviceBatches(self.arena, uploader.table, self.ledger, uploader.device, chunks, views=views)
            batches = keep(self._batches, chunks, new)
        return batches

    def directly(self, leaves: Mapping[Key, Leaf]) -> DeviceMemory | None:
        """Return this memory if some of the data is on the device and can be written directly, else None."""
        if self._uploader is None:
            return None
        holds = self._uploader.device.holds
        return self if any(isinstance(leaf, torch.Tensor) and holds(leaf) for leaf in leaves.values()) else None

    def to_device(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor on the device; a tensor that is already there is returned as it is."""
        return value.to(self.device)

    def begin_pieces(self, length: int) -> None:
        """Return None: pieces wait in the memory of their writer. See :meth:`HostMemory.begin_pieces`."""

    def write_directly(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Copy whole trajectories on the device to the arena, publish them, and return their ids.

        They are published when the copies are enqueued on the current stream; see
        :class:`~embodichain_rl.replay.device.stream_order.StreamOrder`.
        """
        return self._direct_writes().write(trajectories)

    def write_rows(
        self, lengths: np.ndarray, policy_versions: np.ndarray, copy: Callable[[int, np.ndarray], None]
    ) -> np.ndarray:
        """Do the same with trajectories that are given by arrays; see :meth:`DirectWrites.write_rows`."""
        return self._direct_writes().write_rows(lengths, policy_versions, copy)

    def _direct_writes(self) -> DirectWrites:
        uploader = self._owned_uploader()
        uploader.check()
        if self._direct is None:
            self._direct = DirectWrites(self.arena, uploader.table, self.ledger, uploader.max_reserved_steps)
        return self._direct

    def merged(self, parts: Sequence[tuple[Batch, Spans]], total: int) -> Batch:
        """Copy spans of steps on the device to one new batch; see :func:`merged`."""
        return merged(self.arena, parts, total)

    def copy_spans(self, spans: list[Span]) -> list[Span]:
        """Copy spans of steps on the device to one new batch; see :func:`copy_spans`."""
        return copy_spans(self.arena, spans)

    def check_length(self, length: int) -> None:
        """Raise if a trajectory does not fit into the ring."""
        self._ring.check_length(length)

    def flush(self, timeout: float) -> None:
        """Wait until all written trajectories are live."""
        self._check()
        self._ring.flush(timeout)
        self._check()

    def discard(self) -> None:
        """Drop the written trajectories that are not live yet."""
        self._ring.discard()

    def _check(self) -> None:
        if self._uploader is not None:
            self._uploader.check()

    def close(self) -> None:
        """Stop the uploads. Does nothing in processes other than the owner."""
        if self._uploader is not None:
            self._uploader.stop()

    # ------------------------------------------------------------------------------------------- in other processes

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self.__dict__.items()
            if name not in ("made_for", "_uploader", "_direct", "_batches")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_owner(None)


_memories: weakref.WeakSet[DeviceMemory] = weakref.WeakSet()


def _disown_in_forked_child() -> None:
    for memory in list(_memories):
        memory._uploader = None


os.register_at_fork(after_in_child=_disown_in_forked_child)
