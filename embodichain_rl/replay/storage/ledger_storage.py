"""The interface that TorchRL expects of any storage, on top of a ledger of whole trajectories."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from tensordict import TensorDictBase
from torchrl.data.replay_buffers.storages import LazyTensorStorage

from embodichain_rl.errors import UnsupportedOperationError
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.replay.storage.item_samplers import refuse_buffers_of_steps, refuse_samplers_of_steps

__all__ = ["LedgerStorage"]


class LedgerStorage(LazyTensorStorage):
    """A TorchRL storage whose items are the live trajectories of a ledger; see :class:`TrajectoryStorage`.

    Attributes:
        ledger (Ledger): the table of trajectories.
        max_size (int): the largest number of live trajectories.
    """

    ledger: Ledger
    max_size: int

    def __init__(self) -> None:
        # TorchRL's constructors are not called: for counters that are in the ledger here, they create locks
        # (multiprocessing.Value) that a killed process keeps. All attributes that TorchRL reads are set or overridden.
        self.ndim = 1
        self.consolidated = self.shared_init = self._compilable = False
        self._attached_entities_list: list[Any] = []
        self.checkpointer = None

    def allocate(self, data: TensorDictBase) -> None:
        """Allocate memory for steps like those in ``data``."""
        raise NotImplementedError

    def _init(self, data: TensorDictBase) -> None:
        self.allocate(data)

    def _make_init_directory(self) -> None:
        """Do nothing: TorchRL would create a directory through which workers share the memory; it is shared already."""

    @property
    def _len(self) -> int:
        return len(self.ledger)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self)])

    @property
    def _total_shape(self) -> torch.Size:
        return torch.Size([self.max_size])

    @property
    def _mutation_revision(self) -> int:
        return self.ledger.next_id

    @property
    def _last_cursor_index(self) -> NoReturn:
        # Read by code that takes trajectories for the steps of a ring: TorchRL's query, and wrappers and samplers that
        # were given this storage after they were built (set_storage, set_sampler).
        raise UnsupportedOperationError(
            "Got a storage of whole trajectories where TorchRL looks for single steps in a ring. Use "
            "TrajectoryReplayBuffer.query for trajectories that meet a condition, ChunkSampler for chunks, and "
            "embodichain_rl.transforms.HindsightRelabel in the place of a HERReplayBuffer."
        )

    _last_cursor = _last_cursor_index

    def attach(self, buffer: Any) -> None:
        """Take note of a buffer that is being built over this storage.

        Raises:
            UnsupportedOperationError: when the buffer, or its sampler, takes trajectories for steps.
        """
        # The only call before the first sample in which a plain TorchRL buffer passes itself to its storage.
        refuse_buffers_of_steps(buffer)
        refuse_samplers_of_steps(getattr(buffer, "_init_sampler", None))
        super().attach(buffer)

    def _bump_mutation_revision(self) -> None:
        """Do nothing: the revision is computed from the ledger."""

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> NoReturn:
        raise UnsupportedOperationError(
            "Single items of a TrajectoryStorage can't be set: it takes whole trajectories. Write with "
            "rb.extend(data), in a buffer with writer=TrajectoryWriter(); in a buffer that is already built, call "
            "rb.set_writer(TrajectoryWriter()) first."
        )

    def flatten(self) -> NoReturn:
        raise UnsupportedOperationError("A TrajectoryStorage is flat already; storage[:] returns its trajectories.")
