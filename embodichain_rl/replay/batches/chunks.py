"""The chunks of a buffer for a process that does nothing else with it, and needs no TorchRL for that."""

from __future__ import annotations

import time

import torch
from tensordict import TensorDict

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.replay.metrics import note_sampled
from embodichain_rl.replay.sampling import ChunkDrawer, ChunkQuery, RandomSource
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["BufferChunks"]


class BufferChunks:
    """The chunks of a buffer without transforms, as ``TrajectoryReplayBuffer.sample_chunks`` returns them.

    Args:
        storage: the storage of the buffer.
        sampler: what draws from it.
    """

    takes_chunk_queries = True
    draws_streams = True

    def __init__(self, storage: TrajectoryReader, sampler: ChunkDrawer) -> None:
        self.storage = storage
        self.sampler = sampler

    @graph_break
    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` steps, ``[batch_size, chunk_size]``.

        Args:
            batch_size: the number of chunks.
            chunk_size: steps of each; or what :meth:`ChunkDrawer.query` returns.
            generator: for the draws; by default torch's global one.
        """
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        if not isinstance(chunk_size, ChunkQuery):
            chunk_size = self.sampler.query(checked_int("chunk_size", chunk_size, minimum=1))
        began = time.monotonic_ns()
        generator = generator or torch.default_generator
        data = self.sampler.sample_chunks(self.storage, batch_size, chunk_size, generator)
        note_sampled(self.storage, self.sampler, data, batch_size, began)
        return data

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.storage):,} trajectories, {self.sampler!r})"
