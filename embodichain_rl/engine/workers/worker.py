"""The code that runs inside a producer: in a worker process, or on a thread of the engine's process.

A worker process is started by TorchRL's ``MultiAsyncCollector``. This module adds to it: it reports exceptions to the
engine's channel, sends heartbeats, exits when the engine stops or its process was killed, and writes only accepted
trajectories, at the pace of the rate limiter.
"""

from __future__ import annotations

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.transforms import Transform
from torchrl.weight_update import SharedMemWeightSyncScheme

from embodichain_rl.collectors import GymnasiumCollector
from embodichain_rl.engine.demonstrations import DemonstrationRollout, with_target
from embodichain_rl.engine.environments import EnvMaker
from embodichain_rl.engine.processes import end_process_group, leave_foreground
from embodichain_rl.engine.state import Generations, Phase, WorkerRecord
from embodichain_rl.engine.workers.held_generators import seed_held_generators
from embodichain_rl.engine.workers.source_labels import with_source
from embodichain_rl.errors import WorkerHungError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.writing import Accept, AcceptFilter, TrajectoryWriter
from embodichain_rl.shared import Deadline

if TYPE_CHECKING:
    from embodichain_rl.replay.rate_limiter import RateLimiter

LOGGER = logging.getLogger("embodichain_rl.engine")

__all__ = [
    "DemonstrationCollector",
    "EnterWorker",
    "ProducerStopped",
    "ProducerWriter",
    "SupervisedCollector",
    "WeightSync",
    "WorkerDemonstrations",
    "WorkerEnvs",
    "reporting",
]

OWNER_POLL_INTERVAL = 0.2
"""Seconds between two checks of a worker of whether the engine's process is alive, and not stopped."""

MESSAGE_POLL_INTERVAL = 0.5
"""Seconds between two polls for messages by TorchRL's worker process. A poll blocks for more than a millisecond. It can
be rare, since weights arrive on a separate thread, and the end of the engine is noticed between two steps."""

TURN_POLL_INTERVAL = 0.2
"""Seconds that a producer blocks on the rate limiter before it sends a heartbeat and checks for a stop request."""


MANUAL_POLL_INTERVAL = 0.02
"""Seconds between two checks of a producer of whether another trajectory is requested."""

WEIGHT_UPDATE_TIMEOUT = 5.0
"""Maximum seconds for a worker to load new weights. It does so on a separate thread, between two steps."""


_owner_runs = threading.Event()
"""Whether the engine's process is not stopped, by Ctrl-Z for example. While it is, a worker process takes no steps."""

_owner_runs.set()


class ProducerStopped(SystemExit):
    """Raised in a producer on a stop request: its environments are closed, and its process exits with code 0."""


class ProducerWriter(TrajectoryWriter):
    """The writer of one producer: filters a trajectory, blocks on the rate limiter, writes and counts.

    A rejected trajectory has -1 in the index that ``extend`` returns.

    Args:
        record: the record in which the trajectories are counted.
        accept: the filter of whole trajectories; None accepts all.
        limiter: the rate limiter; None means no pacing.
        entry: what a process with this writer does first; None on a thread.
        source: who acts, which is written with every step at ``("collector", "source")``; None: it is not.
        equal_shares: whether it waits for producers that have written less.

    Raises:
        GenerationFailedError: by ``extend``, if ``accept`` rejected too many trajectories in a row.
        ProducerStopped: by ``extend``, if the engine stops while it blocks.
    """

    def __init__(
        self,
        record: WorkerRecord,
        *,
        accept: AcceptFilter | None = None,
        limiter: RateLimiter | None = None,
        entry: EnterWorker | None = None,
        source: str | None = None,
        equal_shares: bool = False,
    ) -> None:
        super().__init__()
        self._filter = accept
        self._equal_shares = equal_shares
        self._source = source
        self.entry = entry
        self.record = record
        self.limiter = limiter

    def extend(self, data: TensorDictBase) -> torch.Tensor:
        return super().extend(data if self._source is None else with_source(data, self._source))

    def admits(self, steps: int, trajectory: Callable[[], TensorDictBase]) -> bool:
        if not super().admits(steps, trajectory):
            self.record.rejected(steps)
            return False
        self._wait_for_turn()
        return True

    def stored_version(self, version: int) -> int:
        return self.record.policy_version

    def stored(self, steps: int) -> None:
        if self.limiter is not None:
            self.limiter.count_insert(1)
        self.record.wrote(steps)

    def _wait_for_turn(self) -> None:
        while True:
            self.record.beat()  # reports the steps before blocking
            if self.record.channel.stop_requested():
                raise ProducerStopped(0)
            if self._has_turn():
                return

    def _has_turn(self) -> bool:
        """Return whether a trajectory may be written, after waiting for at most ``TURN_POLL_INTERVAL``."""
        channel, limiter = self.record.channel, self.limiter
        if channel.held:
            self.record.rest()
            return False
        if self._equal_shares and self.record.is_ahead:
            time.sleep(MANUAL_POLL_INTERVAL)
            return False
        generations = Generations(channel)
        if generations.manual:
            if self.record.claim_turn(self._published, generations.target):
                return True
            time.sleep(MANUAL_POLL_INTERVAL)
            return False
        if limiter is None or self._published() < generations.target:
            return True
        return limiter.wait_to_insert(TURN_POLL_INTERVAL, interrupted=channel.stop_requested)

    def _published(self) -> int:
        return self._storage.ledger.live_range()[1]


@dataclass
class WorkerEnvs:
    """Maker of the seeded environments of one worker.

    Args:
        make: the maker of unseeded environments.
        seed: the seed of the first environment. The others get seeds that derive from it.
        must_seed: whether an environment that can't be seeded is an error. Otherwise it keeps its own random numbers.
    """

    make: EnvMaker
    seed: int
    must_seed: bool

    def __call__(self) -> EnvBase:
        """Build the environment for a collector."""
        return self._seeded([self.make()])[0]

    def each(self) -> list[EnvBase]:
        """Build a list of separate environments, as demonstrations require."""
        return self._seeded(self.make.each())

    def _seeded(self, envs: list[EnvBase]) -> list[EnvBase]:
        seed = self.seed
        for env in envs:
            try:
                seed = int(env.set_seed(seed))
            except (NotImplementedError, TypeError, AttributeError) as error:  # it has no seed
                if self.must_seed:
                    raise
                LOGGER.debug("%s can't be seeded and keeps its own random numbers: %s", self.make.name, error)
        return envs


@dataclass
class WorkerDemonstrations:
    """Maker of the demonstrations of one worker.

    Args:
        envs: the maker of the environments.
        accept: the filter of trajectories, see :class:`DemonstrationRollout`.
        max_generation_attempts: number of failures in a row of one environment that raises an error.
    """

    envs: WorkerEnvs
    accept: Accept | None
    max_generation_attempts: int

    def __call__(self, *, record: WorkerRecord) -> tuple[list[EnvBase], DemonstrationRollout]:
        """Build the environments and the iterator over their demonstrations."""
        envs = [TransformedEnv(env, _StepHeart(record)) for env in self.envs.each()]
        return envs, DemonstrationRollout(
            envs, accept=self.accept, max_generation_attempts=self.max_generation_attempts
        )


@dataclass
class EnterWorker:
    """The initialisation of a worker process.

    Args:
        seed: the seed of torch, numpy and ``random`` in the process, and of the generators that its policy holds.
        patience: seconds that the process may take to exit after the engine has stopped.
        mark: what marks the programs that the process starts.
    """

    seed: int
    patience: float
    mark: str

    def __call__(self, record: WorkerRecord) -> None:
        """Create a process group for this process, start the watchdog of the owner, and enter the first phase."""
        leave_foreground(self.mark)
        threading.Thread(
            target=self._exit_with_owner, args=(record,), name="embodichain-rl-owner-watch", daemon=True
        ).start()
        self.begin_building(record)

    def begin_building(self, record: WorkerRecord) -> None:
        """Seed the global generators of this process, and enter the first phase."""
        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)
        record.enter(Phase.BUILDING)

    def _exit_with_owner(self, record: WorkerRecord) -> None:
        # The owner is not always the parent process: under forkserver, the parent is the server. PR_SET_PDEATHSIG does
        # not work either, since it is sent when the *thread* that started this process ends.
        channel = record.channel
        deadline: Deadline | None = None
        while channel.owner_is_alive():
            if deadline is None and channel.state.is_final:
                deadline = Deadline(self.patience)
            if deadline is not None and deadline.passed():
                break
            if channel.owner_is_stopped():
                _owner_runs.clear()
            else:
                _owner_runs.set()
            time.sleep(OWNER_POLL_INTERVAL)
        end_process_group()


@contextmanager
def reporting(record: WorkerRecord) -> Iterator[None]:
    """Report an exception of the block, with its traceback, to the channel, and re-raise it."""
    try:
        yield
    except ProducerStopped:
        raise
    except BaseException as error:
        record.report(error)
        raise


def _enter(replay_buffer: TrajectoryReplayBuffer) -> tuple[WorkerRecord, Callable[[Any], None]]:
    """Run the initialisation of the process, if there is one.

    Returns:
        The record of the producer, and a function that seeds the generators that an object holds. On a thread it does
        nothing, since these generators are the user's.
    """
    writer = replay_buffer.writer
    assert isinstance(writer, ProducerWriter)
    if writer.entry is None:
        return writer.record, lambda owner: None
    writer.entry(writer.record)
    seeds = np.random.SeedSequence(writer.entry.seed)
    return writer.record, lambda owner: seed_held_generators(owner, seeds)


class _Heart:
    """Sends heartbeats from the stop check that TorchRL's collector makes after every step, at no extra cost."""

    def __init__(self, record: WorkerRecord, num_envs: int) -> None:
        self.record = record
        self._num_envs = num_envs

    def collection_stopped(self) -> bool:
        if self.record.stepped(self._num_envs):
            if self.record.channel.stop_requested():
                raise ProducerStopped(0)
            while self.record.channel.held and not self.record.channel.stop_requested():
                self.record.rest()
            if not _owner_runs.is_set():
                _owner_runs.wait()
                self.record.beat()
        return False


class SupervisedCollector(GymnasiumCollector):
    """A one-process collector that sends heartbeats and reports its exceptions.

    It accepts the arguments of :class:`torchrl.collectors.Collector`. The writer of ``replay_buffer`` must be a
    :class:`ProducerWriter`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._record, seed_generators_of = _enter(kwargs["replay_buffer"])
        with reporting(self._record):
            seed_generators_of(args[0])
            super().__init__(*args, **kwargs)
            seed_generators_of(self.policy)
            self.interruptor = _Heart(self._record, self.env.numel())
            reason = self.fallback_reason
            self._record.note_collector("GymnasiumCollector" if reason is None else f"Collector: {reason}")
            self._record.enter(Phase.BUILT)

    def __iter__(self) -> Iterator[Any]:
        with reporting(self._record):
            polled_at = time.monotonic()
            for collected in super().__iter__():  # the data is already in the buffer
                if time.monotonic() - polled_at >= MESSAGE_POLL_INTERVAL:
                    yield collected
                    polled_at = time.monotonic()

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        try:
            super().shutdown(timeout, close_env)
        except Exception as error:  # TorchRL's worker process discards it
            self._record.report_closing(error)
            if raise_on_error:
                raise


class WeightSync(SharedMemWeightSyncScheme):
    """TorchRL's weight updates through shared memory, with a timeout for a worker that does not acknowledge them."""

    def _wait_for_ack(self, worker_ids: Any = None, timeout: float | None = None) -> None:
        for acks in self._ack_queues.values():  # a single queue: every collector of an engine has one worker
            try:
                _get(acks, Deadline(WEIGHT_UPDATE_TIMEOUT))
            except queue.Empty:
                raise WorkerHungError(
                    f"The worker did not load the weights within {WEIGHT_UPDATE_TIMEOUT:g} s."
                ) from None


def _get(acks: Any, deadline: Deadline) -> Any:
    while True:
        try:
            return acks.get(timeout=deadline.slice())
        except queue.Empty:
            if deadline.passed():
                raise


class _StepHeart(Transform):
    """A transform that sends a heartbeat with every step and reset of its environment."""

    def __init__(self, record: WorkerRecord) -> None:
        super().__init__()
        self._heart = _Heart(record, 1)

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._heart.collection_stopped()
        return next_tensordict

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        self._heart.record.beat()
        return tensordict_reset


class DemonstrationCollector:
    """A collector of demonstrations, with the interface that TorchRL's worker process expects.

    Args:
        create_rollout: the maker of the demonstrations.
        replay_buffer: the buffer for the trajectories. Its writer is a :class:`ProducerWriter`.
        kwargs: the other arguments of a collector. They are ignored.
    """

    # Attributes that TorchRL's worker process sets and reads.
    _ignore_rb = False
    _use_buffers = False

    def __init__(
        self, create_rollout: WorkerDemonstrations, *, replay_buffer: TrajectoryReplayBuffer, **kwargs: Any
    ) -> None:
        self._record, seed_generators_of = _enter(replay_buffer)
        self._replay_buffer = replay_buffer
        self._envs: list[EnvBase] = []
        with reporting(self._record):
            seed_generators_of(create_rollout)
            self._envs, self._rollout = create_rollout(record=self._record)
            self._record.note_collector(type(self).__name__)
            self._record.enter(Phase.BUILT)

    def __iter__(self) -> Iterator[None]:
        with reporting(self._record):
            while True:
                try:
                    steps = next(self._rollout)
                finally:
                    self._record.count_attempts(self._rollout.num_rejected, self._rollout.num_failed)
                self._replay_buffer.extend(with_target(steps))
                yield

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Close all environments, and report the first exception."""
        closing: list[Exception] = []
        for env in self._envs:
            try:
                env.close(raise_if_closed=False)
            except Exception as error:
                closing.append(error)
        if closing:
            for other in closing[1:]:
                closing[0].add_note(f"Another environment raised as well: {type(other).__name__}: {other}")
            self._record.report_closing(closing[0])
