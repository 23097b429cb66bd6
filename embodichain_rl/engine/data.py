"""The engine: it owns the workers and the buffer that they fill."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

import torch
from tensordict import TensorDict, TensorDictBase
from tqdm import tqdm

from embodichain_rl._compiling import graph_break
from embodichain_rl.engine.channel_memory import OnlineDataEngineState
from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.engine.interruptible import run_interruptibly
from embodichain_rl.engine.lifecycle import EngineChannel
from embodichain_rl.engine.statistics import statistics_of
from embodichain_rl.errors import (
    BufferMemoryError,
    ConfigError,
    EngineStateError,
    EngineTimeoutError,
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.sampling import ChunkQuery, ChunkSampler, SamplingOptions
from embodichain_rl.replay.schema import TextTable
from embodichain_rl.replay.storage import TrajectoryStorage

if TYPE_CHECKING:
    from embodichain_rl.engine.planning import Plan
    from embodichain_rl.engine.probe import EnvProbe
    from embodichain_rl.engine.supervision import Supervisor

__all__ = ["OnlineDataEngine", "OnlineDataEngineCfg", "OnlineDataEngineState"]

LOGGER = logging.getLogger("embodichain_rl.engine")

MIN_WRITERS = 16
"""For how many writers the arena has room, at least: others may write beside the workers, and one that is stopped in
the middle cuts the room in two. It is address space."""

LOOK_EVERY = 0.05
"""Seconds between two looks, of who waits for the buffer to fill."""


class OnlineDataEngine:
    """Workers that act in environments, and the buffer that they fill with whole trajectories.

    Made, started and stopped in one process, its owner. Handed to other processes while these are started (as an
    argument of :class:`multiprocessing.Process`, or within an :class:`~embodichain_rl.datasets.OnlineDataset` to the
    workers of a ``DataLoader``), it can be sampled there, and imports no simulator.

    An engine that is never stopped is stopped when it is garbage or when the interpreter exits. When its owner is
    killed, its workers end by themselves within a second.

    Args:
        cfg: what to collect, how, and how much of it is kept.

    Attributes:
        replay_buffer (TrajectoryReplayBuffer): the buffer; its own ``sample()`` draws single steps, and neither paces
            the workers nor says why they failed.
        rate_limiter (RateLimiter | None): the pacing; None where ``refill_threshold`` is None.

    Example:
        >>> cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "gymnasium_robotics:FetchReach-v4"})
        >>> if __name__ == "__main__":
        ...     with OnlineDataEngine(cfg) as engine:  # starts it, and stops it
        ...         print(engine.sample_batch(32, chunk_size=16).shape)  # doctest: +SKIP
        torch.Size([32, 16])
    """

    takes_chunk_queries = True

    def __init__(self, cfg: OnlineDataEngineCfg) -> None:
        if not isinstance(cfg, OnlineDataEngineCfg):
            raise InvalidArgumentError(f"Got cfg of type {type(cfg).__name__}; it must be an OnlineDataEngineCfg.")
        num_producers = max(1, cfg.num_workers) if cfg.producers is None else len(cfg.producers)
        storage = TrajectoryStorage(
            cfg.buffer_size,
            cfg.max_total_steps,
            device=cfg.buffer_device,
            max_writers=max(MIN_WRITERS, num_producers),
            compact=cfg.compact,
        )
        self.replay_buffer = TrajectoryReplayBuffer(storage=storage, sampler=ChunkSampler(1))
        self.rate_limiter: RateLimiter | None = None
        if cfg.refill_threshold is not None:
            self.rate_limiter = RateLimiter(cfg.refill_threshold, min_size_to_sample=cfg.buffer_size)
            self.rate_limiter.pause()
        self._channel = EngineChannel(num_producers)
        self._sample_timeout = cfg.initialization_timeout
        self._cfg: OnlineDataEngineCfg | None = cfg
        self._supervisor: Supervisor | None = None
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        self._sampler: tuple[dict[str, Any], ChunkSampler] | None = None

    @property
    def cfg(self) -> OnlineDataEngineCfg:
        """The configuration; only its owner has it.

        Raises:
            EngineStateError: in another process.
        """
        if self._cfg is None:
            raise EngineStateError("Only the process that made the engine has its configuration.")
        return self._cfg

    @property
    def state(self) -> OnlineDataEngineState:
        """Where the engine stands, in every process."""
        return self._channel.state

    @property
    def is_init(self) -> bool:
        """Whether the buffer is filled and can be sampled."""
        return self.state is OnlineDataEngineState.READY

    @property
    def texts(self) -> TextTable:
        """The text of what is stored, in every process; samples hold its ids."""
        return self.replay_buffer.texts

    # ------------------------------------------------------------------------------------------------------- starting

    def start(self) -> None:
        """Starts the workers, and returns when the buffer holds ``buffer_size`` trajectories.

        The environment is looked at in a process of its own first, so that what does not fit is refused before there
        is any worker. When this raises, what it had started is gone.

        Raises:
            EngineStateError: the engine was started before, or is stopped meanwhile by another thread; or this is not
                its owner.
            EnvProbeError: the environment can't be built or stepped.
            ConfigError: ``state_dim`` or ``state_key`` is not the environment's.
            BufferMemoryError: the buffer would not fit into memory.
            EngineTimeoutError: the buffer is not filled within ``initialization_timeout``; the message says how far
                each worker came.
            Exception: what a worker raised, with the worker's traceback as a note.
        """
        self._check_owner("start")
        with self._lock:
            if self.state is not OnlineDataEngineState.CREATED:
                raise EngineStateError(
                    f"The engine is {self.state.name}, and an engine is started once. Make a new OnlineDataEngine."
                )
            self._channel.enter(OnlineDataEngineState.STARTING)
        # Registered after multiprocessing's own, and so called before it, which waits for the workers.
        atexit.register(_stop_at_exit, weakref.ref(self))
        try:
            self._start(time.monotonic() + self.cfg.initialization_timeout)
        except BaseException as error:
            if isinstance(error, Exception) and not self._channel.stop_requested():
                self._channel.fail(error, "start()", "The engine failed with it while it was started.")
            self.stop()
            raise

    def _start(self, deadline: float) -> None:
        # Imported here, not where a process only samples: this brings environments, collectors and Gymnasium.
        from embodichain_rl.engine.planning import Plan
        from embodichain_rl.engine.supervision import Supervisor

        cfg = self.cfg
        plan = Plan(cfg, self._channel, self.replay_buffer.storage, self.rate_limiter)
        if cfg.env_maker is not None:
            self._prepare(plan, deadline)
        supervisor = Supervisor(plan)
        with self._lock:
            self._refuse_if_stopped()
            self._plan, self._supervisor = plan, supervisor
            weakref.finalize(self, supervisor.stop, cfg.shutdown_timeout / 2).atexit = False
            supervisor.start()
        self._fill(supervisor, deadline)
        self._channel.note_ready(self.replay_buffer.storage.ledger.stats()["published"])
        if self.rate_limiter is not None:
            self.rate_limiter.resume()
        with self._lock:
            self._refuse_if_stopped()
            self._channel.enter(OnlineDataEngineState.READY)
        self._channel.check()

    def _prepare(self, plan: Plan, deadline: float) -> None:
        from embodichain_rl.engine.planning import complete, look_at
        from embodichain_rl.engine.probe import PROBE_NAME

        probe = run_interruptibly(
            lambda: look_at(self.cfg, deadline - time.monotonic()), self._refuse_if_stopped, PROBE_NAME
        )
        self._check_state_dim(probe)
        self._allocate(probe.example)
        complete(plan, probe)

    def _allocate(self, example: TensorDictBase) -> None:
        try:
            self.replay_buffer.storage.allocate(example)
        except BufferMemoryError as error:
            cfg = self.cfg
            raise BufferMemoryError(
                f"{error} In an engine max_total_steps is buffer_size * max_episode_steps, here {cfg.buffer_size:,} * "
                f"{cfg.max_episode_steps:,}: lower one of these."
            ) from None

    def _check_state_dim(self, probe: EnvProbe) -> None:
        cfg = self.cfg
        if cfg.state_dim is None:
            return
        found = {key: list(value.shape) for key, value in probe.observation_spec.items(True, True)}
        if cfg.state_key not in found:
            raise ConfigError(f"state_key={cfg.state_key!r} is no observation of the environment, which has {found}.")
        shape = probe.example.get(cfg.state_key).shape
        if not shape or shape[-1] != cfg.state_dim:
            raise ConfigError(
                f"state_dim={cfg.state_dim}, but {cfg.state_key!r} of the environment has the shape {list(shape)}. Set "
                "state_dim to its last dimension, or to None to check nothing."
            )

    def _fill(self, supervisor: Supervisor, deadline: float) -> None:
        cfg, storage = self.cfg, self.replay_buffer.storage
        with tqdm(
            total=cfg.buffer_size, desc="Filling the buffer", unit=" trajectories", disable=not cfg.progress_bar
        ) as bar:
            while (filled := len(storage)) < cfg.buffer_size:
                bar.update(filled - bar.n)
                self._refuse_if_stopped()
                self._channel.check()
                if supervisor.finished and len(storage) < cfg.buffer_size:
                    raise EngineStateError(
                        f"All producers ended with {len(storage):,} of buffer_size={cfg.buffer_size:,} trajectories in "
                        "the buffer. Lower buffer_size, or let them give more."
                    )
                if time.monotonic() > deadline:
                    raise EngineTimeoutError(
                        f"After initialization_timeout={cfg.initialization_timeout:g} s the buffer holds {filled:,} of "
                        f"buffer_size={cfg.buffer_size:,} trajectories: {supervisor.progress()}. Raise "
                        "initialization_timeout or num_workers, or lower buffer_size."
                    )
                time.sleep(LOOK_EVERY)
            bar.update(cfg.buffer_size - bar.n)

    def _refuse_if_stopped(self) -> None:
        if self._channel.stop_requested() and self.state is not OnlineDataEngineState.FAILED:
            raise EngineStateError("The engine was stopped while it was started.")

    # ------------------------------------------------------------------------------------------------------- stopping

    def stop(self) -> None:
        """Ends the workers, within ``shutdown_timeout`` whatever they do, and for good. Does nothing the second time.

        Raises:
            EngineStateError: this is not the engine's owner.
        """
        self._check_owner("stop")
        with self._lock:
            self._channel.request_stop()
            self._channel.enter(OnlineDataEngineState.STOPPED)
            supervisor = self._supervisor
        if supervisor is not None:
            supervisor.stop(self.cfg.shutdown_timeout / 2)

    def __enter__(self) -> OnlineDataEngine:
        if self.state is OnlineDataEngineState.CREATED:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception:
            if error is None:
                raise
            LOGGER.exception("The engine could not be stopped, after another error")

    def _check_owner(self, what: str) -> None:
        if not self._channel.is_owner():
            raise EngineStateError(f"Only the process that made the engine can {what} it; here it can be sampled.")

    # -------------------------------------------------------------------------------------------------------- reading

    def check_health(self) -> None:
        """Raises what the engine failed with, in every process; does nothing while all is well.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner was killed.
            Exception: what a worker raised, with the worker's traceback as a note.
        """
        self._channel.check()

    @graph_break
    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Returns ``batch_size`` chunks of ``chunk_size`` steps, ``[batch_size, chunk_size]``; in every process.

        While the engine starts, it waits until the buffer is filled, ``initialization_timeout`` at most.

        Args:
            batch_size: how many chunks.
            chunk_size: steps of each; or what :meth:`ChunkSampler.query` returns.
            generator: for the draws; by default torch's global one.

        Raises:
            EngineStateError: the engine is not started, is stopped, or its owner was killed.
            EngineTimeoutError: it takes too long to start.
            ChunkTooLongError: no live trajectory is that long.
            Exception: what a worker raised, with the worker's traceback as a note, where the engine has failed.
        """
        channel, buffer = self._channel, self.replay_buffer
        channel.check()
        if channel.state is OnlineDataEngineState.STARTING:
            self._wait_until_ready()
        redrawn = buffer.sampler.redrawn
        data = buffer.sample_chunks(batch_size, chunk_size, generator=generator)
        channel.count_sample(batch_size, buffer.sampler.redrawn - redrawn)
        if self.rate_limiter is not None:
            self.rate_limiter.count_sample(batch_size)
        return data

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._sample_timeout
        while self.state is OnlineDataEngineState.STARTING:
            self._channel.check()
            if time.monotonic() > deadline:
                workers = (self._channel.worker(index) for index in range(self._channel.num_workers))
                raise EngineTimeoutError(
                    f"The engine is still starting after {self._sample_timeout:g} s, with {len(self.replay_buffer):,} "
                    f"of {self.replay_buffer.storage.max_size:,} trajectories: "
                    f"{'; '.join(worker.describe() for worker in workers)}."
                )
            time.sleep(LOOK_EVERY)
        self._channel.check()

    @graph_break
    def sample_batch(
        self,
        batch_size: int,
        chunk_size: int | None = None,
        sampling_mode: str = "episode",
        **options: Unpack[SamplingOptions],
    ) -> TensorDict:
        """Returns a batch of chunks, ``[batch_size, chunk_size]``, with windows ``[batch_size]``; in every process.

        Args:
            batch_size: how many chunks.
            chunk_size: steps of each; None with windows.
            sampling_mode: ``"episode"``, ``"segment"`` or ``"boundary"``.
            options: all else that :class:`~embodichain_rl.replay.ChunkSampler` takes: ``pad``, ``windows``,
                ``delta_timestamps``, ``fps``, ``weights``, ``replacement``, ``max_age``, ``max_policy_lag``.

        Raises:
            InvalidArgumentError: for arguments that can't work, or not together.
            Exception: what :meth:`sample_chunks` raises.
        """
        asked = {"chunk_size": chunk_size, "sampling_mode": sampling_mode, **options}
        # Kept from call to call: some samplers remember what they have seen, or drawn.
        last_asked, sampler = self._sampler or (None, None)
        if sampler is None or last_asked != asked:
            sampler = ChunkSampler(chunk_size, sampling_mode=sampling_mode, **options)
            self._sampler = asked, sampler
        return self.sample_chunks(batch_size, sampler.query(chunk_size))

    def update_policy_weights_(self, policy: torch.nn.Module | TensorDictBase) -> list[int]:
        """Hands the weights of the policy that is trained to the workers.

        A worker that is being started gets them when it is there. One that hangs or dies is not waited for longer than
        some seconds; whoever replaces it gets the newest weights.

        Args:
            policy: a module made as the configuration's ``policy``, or its weights (``TensorDict.from_module``).

        Returns:
            The numbers of the workers that act with the new weights now.

        Raises:
            EngineStateError: the engine is not started, or this is not its owner.
            UnsupportedOperationError: the configuration's ``policy`` has no weights.
            InvalidArgumentError: the weights are not those of such a policy.
        """
        self._check_owner("update the policy of")
        self._channel.check()
        if self._plan is None or self._supervisor is None:
            raise EngineStateError(
                "The engine is starting: it has no workers yet. Call this when start() has returned."
            )
        if self._plan.policy is None:
            raise UnsupportedOperationError(
                "The engine's policy has no weights that could be updated. Pass the policy, a torch.nn.Module with "
                "parameters, as OnlineDataEngineCfg(policy=...)."
            )
        from embodichain_rl.engine.planning import weights_of

        return self._supervisor.update_policy(weights_of(policy, self._plan.policy))

    def stats(self) -> dict[str, Any]:
        """Returns what goes on, in every process.

        * ``state``; ``fill``: the part of ``buffer_size`` that is there, 0 to 1.
        * ``trajectories``, ``steps``: those in the buffer; ``inserted``, ``evicted``: trajectories ever.
        * ``inserts_per_second``, ``samples_per_second`` (chunks): on average since the buffer was filled.
        * ``samples``: chunks drawn, by all processes; ``samples_per_insert``: of them, for each trajectory inserted
          since the buffer was filled (None before there is one).
        * ``retries``: chunks drawn again because their trajectory was evicted while it was read.
        * ``rejected``: trajectories not accepted; ``restarts``: workers replaced; ``policy_version``: weight updates.
        * ``age_newest``, ``age_mean``, ``age_oldest``: seconds since the trajectories in the buffer were written (None
          where there is none).
        * ``policy_lag_mean``, ``policy_lag_max``: how many weight updates ago their policy was made (None likewise).
        * ``workers``: of each, see :meth:`WorkerRecord.stats <embodichain_rl.engine.worker_record.WorkerRecord.stats>`.
        * ``rate_limiter``: its counters; None where there is none.
        """
        return statistics_of(self._channel, self.replay_buffer, self.rate_limiter)

    # --------------------------------------------------------------------------------------------- in other processes

    def __getstate__(self) -> dict[str, Any]:
        kept = ("replay_buffer", "rate_limiter", "_channel", "_sample_timeout")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._cfg = self._supervisor = self._plan = self._sampler = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"OnlineDataEngine({self.state.name}, {self.replay_buffer.storage!r})"


def _stop_at_exit(reference: weakref.ref[OnlineDataEngine]) -> None:
    engine = reference()
    if engine is not None and engine._channel.is_owner():
        engine.stop()
