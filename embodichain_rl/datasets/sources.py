"""What a source of chunks is, and what some can do besides."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict

from embodichain_rl.errors import InvalidArgumentError

__all__ = ["ChunkSource", "draws_streams", "for_worker", "takes_chunk_queries", "with_provenance"]


@runtime_checkable
class ChunkSource(Protocol):
    """An object that returns chunks of trajectories, such as a ``TrajectoryReplayBuffer``.

    A source whose attribute ``takes_chunk_queries`` is True also accepts a
    :class:`~embodichain_rl.replay.sampling.ChunkQuery` instead of ``chunk_size``.
    """

    def sample_chunks(
        self, batch_size: int, chunk_size: int, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` consecutive steps, ``[batch_size, chunk_size]``.

        Args:
            batch_size: number of chunks, at least 1.
            chunk_size: steps of each chunk, at least 1.
            generator: the random generator for every draw. None means the generator of the source.
        """


def takes_chunk_queries(source: ChunkSource) -> bool:
    """Return whether the source supports padded chunks, windows and segments."""
    return bool(getattr(source, "takes_chunk_queries", False))


def draws_streams(source: ChunkSource) -> bool:
    """Return whether a source draws each chunk of a batch from a random stream of its own, if it gets streams."""
    return bool(getattr(source, "draws_streams", False))


def for_worker(source: ChunkSource) -> ChunkSource:
    """Return a source of the same chunks for a ``DataLoader`` worker that is being started.

    A source may have a method ``for_worker``. It returns one that loads no TorchRL there, or the source itself.
    """
    make = getattr(source, "for_worker", None)
    return source if make is None else make()


def with_provenance(source: Any) -> ChunkSource:
    """Return a source of the same chunks that also say which run, episode and generation they are from.

    Raises:
        InvalidArgumentError: ``source`` does not know; only an engine does.
    """
    make = getattr(source, "with_provenance", None)
    if make is None:
        raise InvalidArgumentError(
            f"Got provenance=True with {source!r}; only an engine knows where its chunks are from."
        )
    return make()
