"""``OnlineDataEngine``: owns the workers and the buffer that they fill. This file starts, stops and updates them."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from tensordict import TensorDictBase

from embodichain_rl._checks import checked_int
from embodichain_rl.engine.config import OnlineDataEngineCfg
from embodichain_rl.engine.processes import run_interruptibly
from embodichain_rl.engine.progress import StartProgress
from embodichain_rl.engine.reading import POLL_INTERVAL, EngineManifest
from embodichain_rl.engine.saving import SavingEngine
from embodichain_rl.engine.state import EngineChannel, Generations, OnlineDataEngineState
from embodichain_rl.errors import (
    BufferMemoryError,
    ConfigError,
    EngineStateError,
    EngineTimeoutError,
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.placement import options_to_remember, path_with_options
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.sampling import ChunkSampler
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import Deadline, naming_shortage

if TYPE_CHECKING:
    from embodichain_rl.engine.workers import EnvProbe, Plan, Supervisor

__all__ = ["OnlineDataEngine", "OnlineDataEngineCfg", "OnlineDataEngineState"]

LOGGER = logging.getLogger("embodichain_rl.engine")

MIN_WRITERS = 16
"""Minimum number of writers for which the arena has head-room. Other processes may write besides the workers, and a
writer that stops in the middle splits the free space in two. The head-room is address space only."""


class OnlineDataEngine(SavingEngine):
    """An engine: workers that act in environments, and the buffer that they fill with whole trajectories.

    Its state goes from ``CREATED`` over ``STARTING`` to ``READY``, and ends as ``STOPPED`` or ``FAILED``.

    One process, its owner, makes, starts and stops it. It can be passed to a process that is being started: as an
    argument of :class:`multiprocessing.Process`, or in an :class:`~embodichain_rl.datasets.OnlineDataset` to the
    workers of a ``DataLoader``. Such a process can sample it, and imports no simulator.

    An engine that is never stopped explicitly is stopped when it is garbage-collected or when the interpreter exits. If
    its owner is killed, its workers exit within a second.

    Args:
        cfg: the configuration.

    Attributes:
        replay_buffer (TrajectoryReplayBuffer): the buffer. Its own ``sample()`` draws single steps, does not pace the
            workers and does not raise their exceptions.
        rate_limiter (RateLimiter | None): the rate limiter; None if ``refill_threshold`` is None.

    Example:
        >>> cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "gymnasium_robotics:FetchReach-v4"})
        >>> if __name__ == "__main__":
        ...     with OnlineDataEngine(cfg) as engine:  # starts and stops it
        ...         print(engine.sample_batch(32, chunk_size=16).shape)  # doctest: +SKIP
        torch.Size([32, 16])
    """

    def __init__(self, cfg: OnlineDataEngineCfg) -> None:
        if not isinstance(cfg, OnlineDataEngineCfg):
            raise InvalidArgumentError(f"Got cfg of type {type(cfg).__name__}; it must be an OnlineDataEngineCfg.")
        cfg.validate()
        num_producers = max(1, cfg.num_workers) if cfg.producers is None else len(cfg.producers)
        sampler = ChunkSampler(1)
        storage = TrajectoryStorage(
            cfg.buffer_size,
            cfg.max_total_steps,
            device=cfg.buffer_device,
            max_writers=max(MIN_WRITERS, num_producers),
            compact=cfg.compact,
            compress=cfg.compress,
            ragged=cfg.ragged,
            ragged_bytes=cfg.ragged_bytes,
            every=cfg.every,
            path=path_with_options(cfg.buffer_path, options_to_remember(sampler)),
        )
        buffer = TrajectoryReplayBuffer(storage=storage, sampler=sampler)
        limiter: RateLimiter | None = None
        manual = cfg.refill_policy == "manual"
        if cfg.refill_threshold is not None and not manual:
            limiter = RateLimiter(cfg.refill_threshold, min_size_to_sample=cfg.filled_at)
            limiter.pause()
            limiter.count_insert(len(storage))  # found in a file
        super().__init__(
            buffer,
            limiter,
            EngineChannel(num_producers, buffer_size=cfg.buffer_size, manual=manual),
            cfg.initialization_timeout,
            None if cfg.cluster is None else cfg.cluster.status(num_producers),
        )
        self._cfg: OnlineDataEngineCfg | None = cfg
        self._supervisor: Supervisor | None = None
        self._plan: Plan | None = None
        self._lock = threading.Lock()
        title = str(cfg.gym_config.get("id", "")) if isinstance(cfg.gym_config, Mapping) else str(cfg.gym_config or "")
        self._manifest: EngineManifest | None = EngineManifest(self._channel, buffer, limiter, title)
        cfg.enter_use()

    @property
    def cfg(self) -> OnlineDataEngineCfg:
        """The configuration. Only the owner of the engine has it.

        Raises:
            EngineStateError: in another process.
        """
        if self._cfg is None:
            raise EngineStateError("Only the process that made the engine has its configuration.")
        return self._cfg

    @property
    def handle(self) -> str:
        """Short name of the engine for a process that watches it; see :class:`embodichain_rl.monitor.Source`.

        Raises:
            EngineStateError: in another process than that of the engine.
        """
        self._check_owner("name")
        assert self._manifest is not None, "the owner has it"
        return self._manifest.handle

    # ------------------------------------------------------------------------------------------------------- starting

    def start(self) -> None:
        """Start the workers, and return when the buffer holds ``min_trajectories`` trajectories; filling goes on.

        The environment is probed in a separate process first, so that an invalid configuration raises an error before
        any worker is started. If this method raises, everything that it started has been stopped.

        Raises:
            EngineStateError: the engine was started before, another thread stops it during the start, or this process
                is not its owner.
            EnvProbeError: the environment can't be built or stepped.
            ConfigError: ``state_dim`` or ``state_key`` does not match the environment.
            BufferMemoryError: the buffer would not fit into memory.
            ResourceShortageError: a process, a thread, a lock or shared memory can't be created.
            EngineTimeoutError: the buffer has not as many within ``initialization_timeout``. The message describes the
                progress of each worker.
            Exception: the exception of a worker, with the worker's traceback as a note.
        """
        self._check_owner("start")
        self.cfg.enter_use(started=True)
        with self._lock:
            if self.state is not OnlineDataEngineState.CREATED:
                raise EngineStateError(
                    f"OnlineDataEngine.start() requires state CREATED; current state is {self.state}. An engine can be "
                    "started only once. Make a new OnlineDataEngine."
                )
            self._channel.enter(OnlineDataEngineState.STARTING)
        # Registered after multiprocessing's own exit handler, which joins the workers, and so called before it.
        atexit.register(_stop_at_exit, weakref.ref(self))
        try:
            self._start(Deadline(self.cfg.initialization_timeout))
        except BaseException as error:
            if isinstance(error, Exception) and not self._channel.stop_requested():
                self._channel.fail(error, "start()", "The engine failed with it while it was starting.")
            self._channel.note_failure_raised()
            _add_notes(error, self._stop())
            raise

    def _start(self, deadline: Deadline) -> None:
        # Imported here, since it imports collectors and Gymnasium, which a process that only samples does not need.
        from embodichain_rl.engine.workers import Plan, Supervisor

        cfg = self.cfg
        storage = self.replay_buffer.storage
        storage.handed_over.watched = False  # the supervisor looks after the workers
        plan = Plan(cfg, self._channel, storage, self.rate_limiter)
        self._go_on(plan)
        with StartProgress(self._channel, cfg.filled_at, shown=cfg.progress_bar) as progress:
            if cfg.env_maker is not None:
                self._prepare(plan, deadline, progress)
            self._restore_policy(plan)
            missing = max(0, cfg.filled_at - len(storage))
            Generations(self._channel).begin(self._published(), missing)
            if cfg.cluster is not None:
                assert self._remote_status is not None, "made with the engine"
                plan.remote = cfg.cluster.producers(plan, self._remote_status, deadline.left())
            with naming_shortage("The start of the engine"):
                supervisor = Supervisor(plan)
            with self._lock:
                self._check_not_stopped()
                self._plan, self._supervisor = plan, supervisor
                weakref.finalize(self, _stop_unnoticed, supervisor, cfg.shutdown_timeout).atexit = False
                supervisor.start()
            self._fill(supervisor, deadline, progress)
        self._channel.note_ready(self.replay_buffer.storage.ledger.stats()["published"])
        if self.rate_limiter is not None:
            self.rate_limiter.resume()
        with self._lock:
            self._check_not_stopped()
            self._channel.enter(OnlineDataEngineState.READY)
        self._channel.check()

    def _prepare(self, plan: Plan, deadline: Deadline, progress: StartProgress) -> None:
        from embodichain_rl.engine.workers import PROBE_NAME, complete_plan, probe_for

        def check() -> None:
            deadline.left()  # the clock must be read regularly
            progress.show(0, "trying the environment")
            self._check_not_stopped()

        seconds = deadline.left()
        found = run_interruptibly(lambda: probe_for(self.cfg, seconds), check, PROBE_NAME)
        self._check_state_dim(found)
        complete_plan(plan, found)
        self._allocate(found, plan.source)

    def _allocate(self, found: EnvProbe, source: str | None) -> None:
        from embodichain_rl.engine.demonstrations import with_target
        from embodichain_rl.engine.workers import with_source

        cfg, storage = self.cfg, self.replay_buffer.storage
        # Each environment has an episode under way, of which its worker holds the steps.
        environments = max(1, cfg.num_workers) * max(1, found.batch_size.numel())
        # Whether segments have a target is only known when they are planned.
        example = with_target(found.example.unsqueeze(0)).squeeze(0) if found.demonstrates else found.example
        if source is not None:
            example = with_source(example, source)
        values = [value.nbytes for value in example.values(True, True) if isinstance(value, torch.Tensor)]
        held = environments * cfg.max_episode_steps * sum(values) // max(1, example.numel())
        try:
            storage.allocate(example, beside=held)
        except BufferMemoryError as error:
            raise BufferMemoryError(
                f"{error} For an engine, max_total_steps is buffer_size * max_episode_steps, here "
                f"{cfg.buffer_size:,} * {cfg.max_episode_steps:,}: lower one of these."
            ) from None
        LOGGER.info("%r; the workers hold up to %s bytes besides.", storage, f"{held:,}")

    def _check_state_dim(self, probe: EnvProbe) -> None:
        cfg = self.cfg
        if cfg.state_dim is None:
            return
        found = {key: list(value.shape) for key, value in probe.observation_spec.items(True, True)}
        if cfg.state_key not in found:
            raise ConfigError(
                f"state_key={cfg.state_key!r} is not an observation of the environment, which has {found}."
            )
        shape = probe.example.get(cfg.state_key).shape
        if not shape or shape[-1] != cfg.state_dim:
            raise ConfigError(
                f"state_dim={cfg.state_dim}, but {cfg.state_key!r} of the environment has the shape {list(shape)}. Set "
                "state_dim to its last dimension, or to None to skip the check."
            )

    def _fill(self, supervisor: Supervisor, deadline: Deadline, progress: StartProgress) -> None:
        cfg, storage = self.cfg, self.replay_buffer.storage
        wanted, name = cfg.filled_at, "buffer_size" if cfg.min_trajectories is None else "min_trajectories"
        while (filled := len(storage)) < wanted:
            progress.show(filled)
            self._check_not_stopped()
            self._channel.check()
            if supervisor.finished and len(storage) < wanted:
                raise EngineStateError(
                    f"All producers ended with {len(storage):,} of {name}={wanted:,} trajectories in the buffer. "
                    f"Lower {name}, or have them produce more."
                )
            if deadline.passed():
                raise EngineTimeoutError(
                    f"After initialization_timeout={cfg.initialization_timeout:g} s the buffer holds {filled:,} of "
                    f"{name}={wanted:,} trajectories: {supervisor.progress()}. Raise initialization_timeout or "
                    "num_workers, or lower min_trajectories, by default buffer_size."
                )
            time.sleep(POLL_INTERVAL)
        progress.show(wanted)

    def _check_not_stopped(self) -> None:
        if self._channel.stop_requested() and self.state is not OnlineDataEngineState.FAILED:
            raise EngineStateError("The engine was stopped while it was starting.")

    # ------------------------------------------------------------------------------------------------------- stopping

    def stop(self) -> None:
        """Stop the workers permanently. Do nothing if the engine is stopped already.

        Workers have ``shutdown_timeout`` seconds to finish a step and to close their environments; then they are
        killed. If something went wrong that was not raised before, this method raises it after everything has ended,
        and the engine is ``FAILED``. Further problems are notes of the exception.

        Raises:
            EngineStateError: this process is not the owner of the engine.
            WorkerHungError: a worker did not close its environments in time, and was killed.
            WorkerDiedError: a worker died while it closed its environments.
            Exception: the exception that an environment raised when it was closed, or the exception that the engine
                failed with, if no process has raised it before. A note holds the worker's traceback.
        """
        starting = self.state is OnlineDataEngineState.STARTING
        problems = self._stop(take=not starting)  # start() is interrupted, and tells its caller
        if problems:
            error = problems[0]
            _add_notes(error, problems[1:])
            self._channel.fail_to_stop(error)
            raise error

    def _stop(self, *, take: bool = True) -> list[BaseException]:
        """Stop the workers, and return what went wrong and was not raised before.

        Args:
            take: whether the caller raises what is returned. Otherwise nothing is returned.
        """
        self._check_owner("stop")
        with self._lock:
            self._channel.request_stop()
            self._channel.enter(OnlineDataEngineState.STOPPED)
            supervisor = self._supervisor
        if supervisor is not None:
            supervisor.stop(self.cfg.shutdown_timeout)
        if not take:
            return []
        problems = [] if supervisor is None else supervisor.take_problems()
        failure = self._channel.failure()
        if failure is not None and not self._channel.failure_was_raised:
            self._channel.note_failure_raised()
            problems.insert(0, failure)
        return problems

    def __enter__(self) -> OnlineDataEngine:
        if self.state is OnlineDataEngineState.CREATED:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.stop()
        except Exception as another:
            if error is None:
                raise
            if str(another) not in str(error):  # a DataLoader may have brought the same one from another process
                _add_notes(error, [another])

    # --------------------------------------------------------------------------------------------------- generations

    def request_refill(self, n: int | None = None) -> int:
        """Request new trajectories, without waiting for them.

        With ``refill_policy="manual"`` producers write exactly what is requested. Otherwise they write it at once,
        whatever ``refill_threshold`` says. A request while another one is not fulfilled is part of that one.

        Args:
            n: the number of trajectories; None means ``buffer_size``.

        Returns:
            The generation that will contain them; see :meth:`wait_for_generation`.

        Raises:
            EngineStateError: the engine is not ``READY``, or this process is not its owner.
            InvalidArgumentError: ``n`` is not an integer of at least 1.
            Exception: the exception of a worker, with the worker's traceback as a note, if the engine has failed.

        Example:
            >>> cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "Pendulum-v1"}, refill_policy="manual")
            >>> if __name__ == "__main__":
            ...     with OnlineDataEngine(cfg) as engine:
            ...         engine.wait_for_generation(engine.request_refill(2))
            ...         print(engine.sample_batch(4, 8, provenance=True)["trajectory", "generation"].unique())
            ...         # doctest: +SKIP
            tensor([2])
        """
        n = self.buffer_size if n is None else checked_int("n", n, minimum=1)
        self._check_ready("refill")
        return Generations(self._channel).request(n, self._published())

    def hold(self) -> None:
        """Let the producers pause after their current step, such as while something else needs the device.

        They stay alive, and what they have collected of an episode is kept. ``stats()["workers"][i]["held"]`` says
        whether a worker has paused. The engine can be sampled meanwhile.

        Raises:
            EngineStateError: the engine is not ``READY``, or this process is not its owner.
        """
        self._check_ready("hold")
        self._channel.held = True

    def release(self) -> None:
        """End :meth:`hold`. Do nothing if the producers are not held.

        Raises:
            EngineStateError: the engine is not ``READY``, or this process is not its owner.
        """
        self._check_ready("release")
        self._channel.held = False

    def _check_ready(self, what: str) -> None:
        self._check_owner(what)
        self._channel.check()
        if self.state is not OnlineDataEngineState.READY:
            raise EngineStateError(
                f"OnlineDataEngine.{what}() requires state READY; current state is {self.state}. Call this after "
                "start() has returned."
            )

    def _check_owner(self, what: str) -> None:
        if not self._channel.is_owner():
            raise EngineStateError(f"Only the process that made the engine can {what} it. This process can sample it.")

    def update_policy_weights_(self, policy: torch.nn.Module | TensorDictBase) -> list[int]:
        """Send the weights of the trained policy to the workers.

        A worker that is starting receives them when it has started. A worker that hangs or dies delays this call by a
        few seconds at most; its replacement starts with the newest weights.

        Args:
            policy: a module with the structure of the configuration's ``policy``, or its weights
                (``TensorDict.from_module``).

        Returns:
            The indices of the workers that now use the new weights.

        Raises:
            EngineStateError: the engine is not started, or this process is not its owner.
            UnsupportedOperationError: the configuration's ``policy`` has no weights.
            InvalidArgumentError: the weights do not match the configuration's ``policy``.
        """
        self._check_owner("update the policy of")
        self._channel.check()
        if self._plan is None or self._supervisor is None:
            raise EngineStateError(
                "The engine is starting and has no workers yet. Call this after start() has returned."
            )
        if self._plan.policy is None:
            raise UnsupportedOperationError(
                "The engine's policy has no weights that could be updated. Pass the policy, a torch.nn.Module with "
                "parameters, as OnlineDataEngineCfg(policy=...)."
            )
        from embodichain_rl.engine.workers import weights_of

        return self._supervisor.update_policy(weights_of(policy, self._plan.policy))

    # --------------------------------------------------------------------------------------------- in other processes

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._cfg = self._supervisor = self._plan = self._manifest = None
        self._lock = threading.Lock()


def _add_notes(error: BaseException, problems: Iterable[BaseException]) -> None:
    for problem in problems:
        notes = "".join(f"\n{note}" for note in getattr(problem, "__notes__", ()))
        error.add_note(f"While the engine was stopped: {type(problem).__name__}: {problem}{notes}")


def _log(problems: Iterable[BaseException]) -> None:
    for problem in problems:
        LOGGER.error("While the engine was stopped: %s: %s", type(problem).__name__, problem)


def _stop_unnoticed(supervisor: Supervisor, patience: float) -> None:
    supervisor.stop(patience)
    _log(supervisor.take_problems())


def _stop_at_exit(reference: weakref.ref[OnlineDataEngine]) -> None:
    engine = reference()
    if engine is not None and engine._channel.is_owner():
        _log(engine._stop())
