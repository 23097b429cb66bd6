"""The chunks of an engine, in every process; loads neither TorchRL nor an environment."""

from __future__ import annotations

import time
from typing import Any

from tensordict import TensorDict

from embodichain_rl.engine.state import EngineChannel, OnlineDataEngineState
from embodichain_rl.errors import EngineTimeoutError
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.sampling import ChunkQuery, RandomSource
from embodichain_rl.shared import Deadline

__all__ = ["POLL_INTERVAL", "EngineChunks"]

POLL_INTERVAL = 0.05
"""Seconds between two checks of whether the buffer is filled."""


class EngineChunks:
    """The chunks of an engine, as :meth:`EngineReader.sample_chunks` returns them.

    Args:
        replay_buffer: the buffer that the workers fill; or its chunks, in a process that only samples.
        rate_limiter: counts what is sampled; None without pacing.
        channel: the shared state of the engine.
        sample_timeout: maximum seconds that a sample waits while the engine is starting.
    """

    takes_chunk_queries = True

    def __init__(
        self, replay_buffer: Any, rate_limiter: RateLimiter | None, channel: EngineChannel, sample_timeout: float
    ) -> None:
        self.replay_buffer = replay_buffer
        self._rate_limiter = rate_limiter
        self._channel = channel
        self._sample_timeout = sample_timeout

    @property
    def draws_streams(self) -> bool:
        """Whether the generator of :meth:`sample_chunks` may be a ``RandomStreams``: each chunk has a stream."""
        return bool(self.replay_buffer.draws_streams)

    def for_worker(self) -> EngineChunks | None:
        """Return the same for a ``DataLoader`` worker that is being started; None if the buffer needs TorchRL there."""
        chunks = self.replay_buffer.for_worker()
        if chunks is self.replay_buffer:
            return None
        return EngineChunks(chunks, self._rate_limiter, self._channel, self._sample_timeout)

    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` steps; see :meth:`EngineReader.sample_chunks`."""
        channel, buffer = self._channel, self.replay_buffer
        channel.check()
        if channel.state is OnlineDataEngineState.STARTING:
            self._wait_until_ready()
        redrawn = buffer.sampler.redrawn
        data: TensorDict = buffer.sample_chunks(batch_size, chunk_size, generator=generator)
        channel.count_sample(batch_size, buffer.sampler.redrawn - redrawn)
        if self._rate_limiter is not None:
            self._rate_limiter.count_sample(batch_size)
        return data

    def _wait_until_ready(self) -> None:
        channel, storage = self._channel, self.replay_buffer.storage
        deadline = Deadline(self._sample_timeout)
        while channel.state is OnlineDataEngineState.STARTING:
            channel.check()
            if deadline.passed():
                workers = (channel.worker(index) for index in range(channel.num_workers))
                raise EngineTimeoutError(
                    f"The engine is still starting after {self._sample_timeout:g} s, with {len(storage):,} "
                    f"of {storage.max_size:,} trajectories: {'; '.join(worker.describe() for worker in workers)}."
                )
            time.sleep(POLL_INTERVAL)
        channel.check()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._channel.state.name}, {self.replay_buffer!r})"
