"""Makes a source of chunks of what a user gives a dataset; adapters for TorchRL's replay buffers.

Only the process that makes a dataset needs this. It loads TorchRL.
"""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer, SliceSampler, SliceSamplerWithoutReplacement

from embodichain_rl.datasets.sources import ChunkSource
from embodichain_rl.errors import InvalidArgumentError
from embodichain_rl.replay.sampling import ChunkQuery, ChunkSampler, RandomSource, RandomStreams, drawing_with
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["as_chunk_source"]


def as_chunk_source(source: Any, chunk_size: int | None, batch_size: int) -> ChunkSource:
    """Return a :class:`ChunkSource` over ``source``, or raise an error that says why there is none.

    Args:
        source: a chunk source, or a TorchRL replay buffer whose samples are chunks.
        chunk_size: the length of all chunks that will be requested; None if the length varies.
        batch_size: the number of chunks that will be requested at a time.

    Raises:
        InvalidArgumentError: ``source`` can't return such chunks. The message says what to change.
    """
    if isinstance(source, ReplayBuffer):
        if isinstance(source.sampler, ChunkSampler):
            return source if isinstance(source, ChunkSource) else _ChunkSamplerSource(source)
        if isinstance(source.storage, TrajectoryStorage):
            raise InvalidArgumentError(
                f"Got a buffer over a TrajectoryStorage with a {type(source.sampler).__name__}, which draws no chunks; "
                "build it with sampler=ChunkSampler(chunk_size)."
            )
        if isinstance(source.sampler, SliceSampler):
            _check_slices(source, source.sampler, chunk_size, batch_size)
            return _SliceSource(source)
        raise InvalidArgumentError(
            f"Got a {type(source).__name__} with a {type(source.sampler).__name__}, whose samples are single steps, "
            "not chunks. Use a TrajectoryReplayBuffer, or build it with sampler=SliceSampler(slice_len=chunk_size)."
        )
    if isinstance(source, ChunkSource) and not isinstance(source, type):
        return source
    raise InvalidArgumentError(
        f"Got source={source!r}, which returns no chunks. It must be a TrajectoryReplayBuffer, a TorchRL ReplayBuffer "
        "with a ChunkSampler or a SliceSampler, or an object with a method "
        "sample_chunks(batch_size, chunk_size, *, generator=None)."
    )


class _ChunkSamplerSource:
    """A plain TorchRL ``ReplayBuffer`` with a ``ChunkSampler``.

    The buffer's ``sample`` is not used: it would hold TorchRL's lock, and supports only one chunk size.
    """

    takes_chunk_queries = True

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    @property
    def draws_streams(self) -> bool:
        """Whether a generator may be a ``RandomStreams``."""
        return self.buffer.sampler.draws_streams and not len(self.buffer.transform)

    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        sampler = self.buffer.sampler
        query = chunk_size if isinstance(chunk_size, ChunkQuery) else sampler.query(chunk_size)
        data = sampler.sample_chunks(self.buffer.storage, batch_size, query, generator)
        if isinstance(generator, RandomStreams) or not len(self.buffer.transform):
            return data
        with drawing_with(generator):
            return self.buffer.transform(data)


class _SliceSource:
    """A TorchRL buffer whose samples are concatenated slices."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    def sample_chunks(
        self, batch_size: int, chunk_size: int, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        buffer = self.buffer
        own = buffer._rng
        if generator is not None:
            buffer.set_rng(generator)
        try:
            steps = buffer.sample(batch_size * chunk_size)
        finally:
            buffer.set_rng(own)
        # A sample with another number of steps is returned unchanged: the caller raises an error about the request.
        return steps.reshape(batch_size, chunk_size) if steps.numel() == batch_size * chunk_size else steps


def _check_slices(buffer: ReplayBuffer, sampler: SliceSampler, chunk_size: int | None, batch_size: int) -> None:
    if buffer._prefetch:
        raise InvalidArgumentError(
            "Got a ReplayBuffer with prefetch. Its threads draw in advance with other random numbers, and they do not "
            "exist in a forked worker. Build it without prefetch, and let the DataLoader prefetch (num_workers=...)."
        )
    if any(sampler.span) or not (sampler.strict_length or sampler.pad_output):
        raise InvalidArgumentError(
            f"Got {sampler!r}, whose slices may be shorter than requested. Build it with strict_length=True and "
            "without span."
        )
    if isinstance(sampler, SliceSamplerWithoutReplacement) and not sampler.drop_last:
        raise InvalidArgumentError(
            f"Got a {type(sampler).__name__} whose last batch may be smaller than requested. Build it with "
            "drop_last=True, or use a SliceSampler."
        )
    if sampler.slice_len is not None and sampler.slice_len != chunk_size:
        got = "chunk sizes that vary" if chunk_size is None else f"chunk_size={chunk_size}"
        raise InvalidArgumentError(
            f"Got {got}, but the buffer's SliceSampler has slice_len={sampler.slice_len}. Give chunk_size="
            f"{sampler.slice_len}; for sizes that vary use a TrajectoryReplayBuffer."
        )
    if sampler.num_slices is not None and sampler.num_slices != batch_size:
        raise InvalidArgumentError(
            f"Got a SliceSampler with num_slices={sampler.num_slices}, but {batch_size} chunk(s) are drawn at a time "
            f"(batch_size of the dataset). Build it with slice_len=chunk_size instead of num_slices."
        )
