"""The memory of a storage on a device: the arena there, in its owner's process, and the staging ring for all others."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.replay.device.arena import DeviceArena, DeviceTable
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.direct_writes import DirectTrajectory, DirectWrites, Span, copy_spans
from embodichain_rl.replay.device.staging import StagingRing
from embodichain_rl.replay.device.uploader import Uploader, not_the_owner
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.schema import Key, Leaf, Schema, SharedSchema, Shifted

__all__ = ["DeviceMemory"]

UPLOADED = -1
"""What is returned for a trajectory that goes through the ring: it gets its id when it is there."""


class DeviceMemory:
    """The steps of a storage on a device, and how a trajectory gets there.

    The process that makes it is its owner: there the arena lies, and there alone it can be read. Whoever it is handed
    to writes to the ring, and calls nothing of the device.

    Args:
        device: where the arena lies.
        ledger: says where each trajectory lies in it. Written by the owner only; all processes read it.
        schema: that of the storage.
        compact: whether next observations are stored once.
        staging_bytes: the size of the ring; None for the usual.
        made_for: what a copy of the storage is to be made for.
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
        self._own(Uploader(device, self._ring, ledger, schema))

    def _own(self, uploader: Uploader | None) -> None:
        self._uploader = uploader
        self._direct: DirectWrites | None = None
        _memories.add(self)
        if uploader is not None:
            weakref.finalize(self, uploader.stop)
            uploader.start()

    # ---------------------------------------------------------------------------------------------------- allocation

    def shifted_in(self, schema: Schema) -> Shifted:
        """Returns the fields of a schema that are read one step later from another one; none if not ``compact``."""
        return self._ring.shifted_in(schema)

    def allocate(self, schema: Schema) -> None:
        """Gives the ring its size, and in the owner the device its arena; see :meth:`HostMemory.allocate`."""
        self._ring.allocate(schema)
        self.open(schema)

    def open(self, schema: Schema) -> None:
        """Maps the ring, and in the owner allocates the arena, unless that is done."""
        if self._uploader is not None:
            self._uploader.open(schema)
        self._ring.open(schema)

    # ------------------------------------------------------------------------------------------------------- reading

    def _owned(self) -> Uploader:
        if self._uploader is None:
            raise not_the_owner(self.device)
        return self._uploader

    def check_readable(self) -> None:
        """Refuses to be read where it can't be.

        Raises:
            SharingError: in another process than the owner's.
            UploadError: when uploading has failed.
            OwnerGoneError: when it is closed.
        """
        self._owned().check()

    @property
    def arena(self) -> DeviceArena:
        """The steps, when the memory is open.

        Raises:
            SharingError: in another process than the owner's.
        """
        arena = self._owned().arena
        assert arena is not None, "open() comes first"
        return arena

    @property
    def table(self) -> DeviceTable | None:
        """The values of whole trajectories; None where no key is of whole trajectories."""
        uploader = self._owned()
        return None if uploader.table is None else DeviceTable(uploader.table, uploader.device)

    @property
    def tensordict(self) -> TensorDictBase:
        """The columns, where TorchRL looks for keys; in other processes than the owner's those of the ring."""
        return self._ring.tensordict if self._uploader is None else self.arena.tensordict

    # ------------------------------------------------------------------------------------------------------- writing

    def write(
        self, pieces: Sequence[Sequence[np.ndarray]], of_trajectory: Sequence[np.ndarray], policy_version: int
    ) -> int:
        """Writes a trajectory to the ring; returns -1, since it gets its id when it is uploaded."""
        self._check()
        self._ring.write(pieces, of_trajectory, policy_version)
        return UPLOADED

    def directly(self, leaves: Mapping[Key, Leaf]) -> DeviceMemory | None:
        """Returns itself where some of the data lies on the device and can stay there, else None."""
        if self._uploader is None:
            return None
        holds = self._uploader.device.holds
        return self if any(isinstance(leaf, torch.Tensor) and holds(leaf) for leaf in leaves.values()) else None

    def to_device(self, value: torch.Tensor) -> torch.Tensor:
        """Returns a tensor on the device: itself, where it is there."""
        return value.to(self.device)

    def write_directly(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Copies whole trajectories that lie on the device to the arena and publishes them; returns their ids.

        They are published when the copies are enqueued on this thread's stream; see
        :class:`~embodichain_rl.replay.device.stream_order.StreamOrder`.
        """
        uploader = self._owned()
        uploader.check()
        if self._direct is None:
            self._direct = DirectWrites(self.arena, uploader.table, self.ledger, uploader.most_steps)
        return self._direct.write(trajectories)

    def copy_spans(self, spans: list[Span]) -> list[Span]:
        """Copy spans of steps on the device to one batch of their own; see :func:`copy_spans`."""
        return copy_spans(self.arena, spans)

    def check_length(self, length: int) -> None:
        """Refuses a trajectory that does not fit into the ring."""
        self._ring.check_length(length)

    def flush(self, timeout: float) -> None:
        """Waits until all that was written is live."""
        self._check()
        self._ring.flush(timeout)
        self._check()

    def discard(self) -> None:
        """Drops what was written and is not live yet."""
        self._ring.discard()

    def _check(self) -> None:
        if self._uploader is not None:
            self._uploader.check()

    def close(self) -> None:
        """Ends the uploads; does nothing in other processes than the owner's."""
        if self._uploader is not None:
            self._uploader.stop()

    # ------------------------------------------------------------------------------------------- in other processes

    def __getstate__(self) -> dict[str, Any]:
        return {
            name: value for name, value in self.__dict__.items() if name not in ("made_for", "_uploader", "_direct")
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._own(None)


_memories: weakref.WeakSet[DeviceMemory] = weakref.WeakSet()


def _disown_in_forked_child() -> None:
    for memory in list(_memories):
        memory._uploader = None


os.register_at_fork(after_in_child=_disown_in_forked_child)
