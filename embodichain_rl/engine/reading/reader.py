"""The part of an engine that every process can use: sampling, health and statistics; ``data.py`` adds the owner's part.

Nothing here imports an environment or a simulator, so a process that only samples starts fast.
"""

from __future__ import annotations

import math
import time
import weakref
from typing import Any, Self, Unpack

import torch
from tensordict import TensorDict

from embodichain_rl._checks import checked_float, checked_int, keywords_of, refuse_other_keywords
from embodichain_rl._compiling import graph_break
from embodichain_rl.engine.reading.chunks import EngineChunks
from embodichain_rl.engine.reading.provenance import EngineWithProvenance
from embodichain_rl.engine.reading.statistics import statistics_of
from embodichain_rl.engine.remote import RemoteStatus
from embodichain_rl.engine.state import EngineChannel, Generations, OnlineDataEngineState
from embodichain_rl.errors import EmptyBufferError, EngineTimeoutError, InvalidArgumentError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.metrics import StatsLog
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.sampling import ChunkQuery, ChunkSampler, RandomSource, SamplingOptions
from embodichain_rl.replay.schema import TextTable
from embodichain_rl.shared import Deadline

__all__ = ["EngineReader", "condition_of"]

GENERATION_POLL_INTERVAL = 0.01
"""Seconds between two checks of whether a generation is complete."""


class EngineReader:
    """Base class of an engine: the methods that every process can call, not only its owner.

    Args:
        replay_buffer: the buffer that the workers fill.
        rate_limiter: paces the workers; None means no pacing.
        channel: the shared state of the engine.
        sample_timeout: maximum seconds that a sample waits while the engine is starting.
        remote_status: the status of workers on other machines; None without any.
    """

    takes_chunk_queries = True

    def __init__(
        self,
        replay_buffer: TrajectoryReplayBuffer,
        rate_limiter: RateLimiter | None,
        channel: EngineChannel,
        sample_timeout: float,
        remote_status: RemoteStatus | None = None,
    ) -> None:
        self.replay_buffer = replay_buffer
        self.rate_limiter = rate_limiter
        self._channel = channel
        self._sample_timeout = sample_timeout
        self._remote_status = remote_status
        self._start_anew()

    def _start_anew(self) -> None:
        self._sampler: tuple[dict[str, Any], ChunkSampler] | None = None
        self._chunks = EngineChunks(self.replay_buffer, self.rate_limiter, self._channel, self._sample_timeout)

    @property
    def state(self) -> OnlineDataEngineState:
        """The state of the engine, in every process."""
        return self._channel.state

    @property
    def is_init(self) -> bool:
        """Whether the buffer is filled and can be sampled."""
        return self.state is OnlineDataEngineState.READY

    @property
    def buffer_size(self) -> int:
        """Number of trajectories that the buffer keeps, in every process."""
        return self.replay_buffer.storage.max_size

    @property
    def device(self) -> torch.device:
        """The device of the buffer, in every process."""
        return self.replay_buffer.storage.device

    @property
    def shared_buffer(self) -> TensorDict:
        """A copy of all stored trajectories, ``[trajectories, T_max]``, padded with zeros, in every process.

        Each trajectory is whole. ``("collector", "mask")`` is True for real steps, and ``("trajectory", "generation")``
        is the refill that wrote it. It is read anew at each access, so changes of it have no effect.

        Raises:
            EmptyBufferError: no trajectory has been written yet. It is a ``RuntimeError``.
        """
        if len(self.replay_buffer) == 0:
            raise EmptyBufferError(
                f"The engine holds no trajectory yet (current state is {self.state}). engine.start() returns when the "
                "buffer is filled."
            )
        whole = self.replay_buffer.storage[:]
        if ("trajectory", "id") in whole.keys(True):
            ids = whole["trajectory", "id"]
            whole["trajectory", "generation"] = torch.from_numpy(Generations(self._channel).of(ids.cpu().numpy()))
        return whole

    @property
    def texts(self) -> TextTable:
        """The table of the stored texts, in every process. Samples contain ids of this table."""
        return self.replay_buffer.texts

    def check_health(self) -> None:
        """Raise the exception that the engine failed with, in every process. Do nothing if it is healthy.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner was killed.
            Exception: the exception of a worker, with the worker's traceback as a note.
        """
        self._channel.check()

    @property
    def draws_streams(self) -> bool:
        """Whether the generator of :meth:`sample_chunks` may be a ``RandomStreams``: each chunk has a stream."""
        return type(self).sample_chunks is EngineReader.sample_chunks and self.replay_buffer.draws_streams

    @graph_break
    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: RandomSource = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` steps, ``[batch_size, chunk_size]``, in every process.

        While the engine is starting, this call blocks until the buffer is filled, at most ``initialization_timeout``.

        Args:
            batch_size: number of chunks.
            chunk_size: steps of each chunk; or a result of :meth:`ChunkSampler.query`.
            generator: the random generator for the draws. None means torch's global generator.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner was killed.
            EngineTimeoutError: the engine is still starting after ``initialization_timeout``.
            ChunkTooLongError: no live trajectory is that long.
            Exception: the exception of a worker, with the worker's traceback as a note, if the engine has failed.
        """
        return self._chunks.sample_chunks(batch_size, chunk_size, generator=generator)

    @graph_break
    def sample_batch(
        self,
        batch_size: int,
        chunk_size: int | None = None,
        sampling_mode: str = "episode",
        *,
        provenance: bool = False,
        **options: Unpack[SamplingOptions],
    ) -> TensorDict:
        """Return a batch of chunks, ``[batch_size, chunk_size]``, or with windows ``[batch_size]``, in every process.

        Args:
            batch_size: number of chunks.
            chunk_size: steps of each chunk; None with windows.
            sampling_mode: ``"episode"``, ``"segment"`` or ``"boundary"``.
            provenance: whether the batch says where it is from, see :meth:`with_provenance`.
            options: the other arguments of :class:`~embodichain_rl.replay.ChunkSampler`: ``pad``, ``windows``,
                ``delta_timestamps``, ``fps``, ``weights``, ``replacement``, ``max_age``, ``max_policy_lag``,
                ``subset``.

        Raises:
            InvalidArgumentError: an argument or a combination of arguments is invalid.
            Exception: as :meth:`sample_chunks`.
        """
        arguments = {"chunk_size": chunk_size, "sampling_mode": sampling_mode, **options}
        # Kept between calls, since some samplers have a state, such as the current pass without replacement.
        last_arguments, sampler = self._sampler or (None, None)
        if sampler is None or last_arguments != arguments:
            names = keywords_of(EngineReader.sample_batch, ChunkSampler.__init__)
            refuse_other_keywords("sample_batch()", options, names)
            sampler = ChunkSampler(chunk_size, sampling_mode=sampling_mode, **options)
            self._sampler = arguments, sampler
        query = sampler.query(chunk_size)
        if not isinstance(provenance, bool):
            raise InvalidArgumentError(f"Got provenance={provenance!r}; it must be True or False.")
        return (self.with_provenance() if provenance else self).sample_chunks(batch_size, query)

    def for_worker(self) -> EngineChunks | Self:
        """Return a source of the same chunks for a ``DataLoader`` worker that is being started.

        Returns:
            One that does not load TorchRL; or the engine itself, if its buffer has transforms, or if a subclass draws
            the chunks.
        """
        if type(self).sample_chunks is not EngineReader.sample_chunks:
            return self
        return self._chunks.for_worker() or self

    def with_provenance(self) -> EngineWithProvenance:
        """Return a source of the same chunks that also say where they are from.

        Each batch has these keys, ``int64`` in its shape:

        * ``("trajectory", "run_id")``: a random number of the engine;
        * ``("trajectory", "episode")``: the number of the trajectory in the order of publication;
        * ``("trajectory", "generation")``: the refill of the buffer that it belongs to;
        * ``("trajectory", "published_at")``: its publication, Unix time in nanoseconds.
        """
        return EngineWithProvenance(self)

    # --------------------------------------------------------------------------------------------------- generations

    @property
    def generation(self) -> int:
        """The newest complete generation of trajectories, in every process; 0 before the buffer is filled.

        The first generation is the one that ``start()`` fills the buffer with. With ``refill_policy="manual"`` each
        request is a generation; otherwise every ``buffer_size`` trajectories are one.
        """
        return Generations(self._channel).completed(self._published())

    def _published(self) -> int:
        return self.replay_buffer.storage.ledger.live_range()[1]

    def wait_for_generation(self, generation: int, timeout: float = 300.0) -> None:
        """Wait until a generation is complete, in every process.

        Args:
            generation: the result of :meth:`OnlineDataEngine.request_refill`.
            timeout: maximum seconds to wait.

        Raises:
            InvalidArgumentError: the generation was not requested, or an argument is invalid.
            EngineTimeoutError: the time has passed.
            EngineStateError: the engine is not started, is stopped, or its owner was killed.
            Exception: the exception of a worker, with the worker's traceback as a note, if the engine has failed.
        """
        generation = checked_int("generation", generation, minimum=1)
        timeout = checked_float("timeout", timeout, minimum=math.ulp(0.0))
        generations = Generations(self._channel)
        if generation > generations.requested and generations.manual:
            raise InvalidArgumentError(
                f"Got generation={generation}, but only {generations.requested} were requested; call request_refill()."
            )
        deadline = Deadline(timeout)
        while True:
            self._channel.check()
            published = self._published()
            if generations.completed(published) >= generation:
                return
            if deadline.passed():
                held = " The producers are held; call engine.release()." if self._channel.held else ""
                raise EngineTimeoutError(
                    f"Generation {generation} was not complete after {timeout:g} s: {published:,} trajectories were "
                    f"written, and generation {generations.completed(published)} is the newest one.{held}"
                )
            time.sleep(GENERATION_POLL_INTERVAL)

    def stats(self) -> dict[str, Any]:
        """Return the statistics of the engine, in every process.

        * ``state``: the name of the state; ``fill``: the filled fraction of ``buffer_size``, 0 to 1.
        * ``trajectories``, ``steps``: number in the buffer; ``inserted``, ``evicted``: total number of trajectories.
        * ``inserts_per_second``, ``samples_per_second`` (chunks): averages since the buffer was filled.
        * ``samples``: chunks sampled by all processes; ``samples_per_insert``: chunks per trajectory inserted since the
          buffer was filled (None before the first one).
        * ``retries``: chunks drawn again because their trajectory was evicted while it was read.
        * ``generation``: the newest complete one; ``requested_generation``: the newest that was requested.
        * ``rejected``: trajectories not accepted; ``restarts``: workers replaced; ``policy_version``: weight updates.
        * ``age_newest``, ``age_mean``, ``age_oldest``: seconds since the trajectories in the buffer were written (None
          for an empty buffer).
        * ``policy_lag_mean``, ``policy_lag_max``: how many weight updates the policies of the trajectories in the
          buffer are behind (None for an empty buffer).
        * ``sampled_age_mean``, ``sampled_age_max``, ``sampled_policy_lag_mean``, ``sampled_policy_lag_max``: the age of
          the chunks that this process has sampled; see :meth:`ChunkSampler.sampled_ages
          <embodichain_rl.replay.sampling.ChunkSampler.sampled_ages>`.
        * ``workers``: for each worker, see :meth:`WorkerRecord.stats
          <embodichain_rl.engine.state.WorkerRecord.stats>`.
        * ``rate_limiter``: the counters of the rate limiter; None without one.
        * ``nodes``: for each machine of a ``cluster``, see :meth:`ClusterStatus.nodes
          <embodichain_rl.cluster.status.ClusterStatus.nodes>`; None without a cluster.
        """
        remote = self._remote_status
        return {
            **statistics_of(self._channel, self.replay_buffer, self.rate_limiter),
            "nodes": None if remote is None else remote.nodes(),
        }

    def log_to(self, logger: Any, every: float = 10.0, *, prefix: str = "engine/") -> StatsLog:
        """Write the numbers of :meth:`stats` to a logger of TorchRL, on a thread, until the engine is stopped.

        The step of an entry is the number of steps that were inserted, ``stats()["inserted_steps"]``.

        Args:
            logger: such as ``CSVLogger`` or ``TensorboardLogger`` of ``torchrl.record.loggers``.
            every: seconds between two entries, at least 0.01.
            prefix: what the names of the entries begin with.

        Returns:
            The log: ``log.log()`` writes an entry now, ``log.close()`` ends it.

        Raises:
            InvalidArgumentError: ``logger`` is no logger, or ``every`` is too small.
        """
        reference = weakref.ref(self)

        def read() -> dict[str, Any] | None:
            engine = reference()
            return None if engine is None or engine.state.is_final else engine.stats()

        return StatsLog(read, logger, every, prefix)

    def __getstate__(self) -> dict[str, Any]:
        kept = ("replay_buffer", "rate_limiter", "_channel", "_sample_timeout", "_remote_status")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start_anew()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.state.name}, {self.replay_buffer.storage!r})"


def condition_of(engine: EngineReader) -> tuple[object, ...]:
    """Return values that change when a worker is lost or starts, and when the state does. Reading them is cheap.

    Args:
        engine: the engine, also of another process.
    """
    channel = engine._channel
    workers = (channel.worker(index) for index in range(channel.num_workers))
    return channel.state, channel.restarts, *((each.pid, each.phase) for each in workers)
