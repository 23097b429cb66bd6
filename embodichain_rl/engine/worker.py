"""What runs where trajectories are made: in a worker's process, or on a thread of the engine's own.

A worker's process is one that TorchRL's ``MultiAsyncCollector`` starts. What is added to it: it leaves its exceptions
in the engine's channel, gives signs of life, ends when it should, even if the engine's process was killed, and writes
only trajectories that are accepted, when they are due.
"""

from __future__ import annotations

import os
import queue
import random
import signal
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
from embodichain_rl.engine.channel_memory import OnlineDataEngineState
from embodichain_rl.engine.demonstrations import DemonstrationRollout
from embodichain_rl.engine.envs import EnvMaker
from embodichain_rl.engine.foreground import leave_foreground
from embodichain_rl.engine.worker_record import Phase, WorkerRecord
from embodichain_rl.errors import WorkerHungError
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.writing import Accept, AcceptFilter, TrajectoryWriter

if TYPE_CHECKING:
    from embodichain_rl.replay.rate_limiter import RateLimiter

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

OWNER_POLL = 0.25
"""Seconds between two looks of a worker at whether the engine's process still lives."""

LOOK_EVERY = 0.5
"""Seconds between two looks of TorchRL's worker process for messages. A look takes more than a millisecond, in which it
waits for some; weights come on a thread of their own, and the end of the engine is seen between two steps."""

PACE_POLL = 0.2
"""Seconds that a producer waits for its turn to write before it gives a sign of life and looks whether to stop."""


WEIGHT_UPDATE_TIMEOUT = 5.0
"""Seconds that a worker may take to take over new weights. It does that on a thread of its own, between two steps."""


class ProducerStopped(SystemExit):
    """Unwinds a producer that was told to stop: its environments are closed on the way, and its process ends with 0."""


class ProducerWriter(TrajectoryWriter):
    """The writer of one producer: asks whether a trajectory is kept, waits until it is due, writes, counts.

    A trajectory that is not kept has -1 in the index that ``extend`` returns.

    Args:
        record: where to count.
        accept: judges each whole trajectory; None keeps all.
        limiter: paces the writing; None writes at once.
        entry: what a process does first that has this writer; None on a thread.

    Raises:
        GenerationFailedError: by ``extend``, when ``accept`` refused too many trajectories in a row.
        ProducerStopped: by ``extend``, when the engine stops while it waits.
    """

    def __init__(
        self,
        record: WorkerRecord,
        *,
        accept: AcceptFilter | None = None,
        limiter: RateLimiter | None = None,
        entry: EnterWorker | None = None,
    ) -> None:
        super().__init__()
        self._filter = accept
        self.entry = entry
        self.record = record
        self.limiter = limiter

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
        while self.limiter is not None:
            self.record.beat()
            if self.record.channel.stop_requested():
                raise ProducerStopped(0)
            if self.limiter.wait_to_insert(PACE_POLL, interrupted=self.record.channel.stop_requested):
                break


@dataclass
class WorkerEnvs:
    """Makes the environments of one worker, seeded.

    Args:
        make: makes the environment that a collector acts in.
        seed: what it is seeded with; None leaves it as it comes.
    """

    make: EnvMaker
    seed: int | None

    def __call__(self) -> EnvBase:
        """Build the environment that a collector acts in."""
        return self._seeded([self.make()])[0]

    def each(self) -> list[EnvBase]:
        """Build the environments apart, as demonstrations need them."""
        return self._seeded(self.make.each())

    def _seeded(self, envs: list[EnvBase]) -> list[EnvBase]:
        if self.seed is not None:
            seed = self.seed
            for env in envs:
                seed = int(env.set_seed(seed))
        return envs


@dataclass
class WorkerDemonstrations:
    """Makes the demonstrations of one worker.

    Args:
        envs: makes the environments.
        accept: judges each trajectory, see :class:`DemonstrationRollout`.
        max_generation_attempts: failures in a row of one environment that are one too many.
    """

    envs: WorkerEnvs
    accept: Accept | None
    max_generation_attempts: int

    def __call__(self, *, record: WorkerRecord) -> tuple[list[EnvBase], DemonstrationRollout]:
        """Build the environments, and what iterates over their demonstrations."""
        envs = [TransformedEnv(env, _StepHeart(record)) for env in self.envs.each()]
        return envs, DemonstrationRollout(
            envs, accept=self.accept, max_generation_attempts=self.max_generation_attempts
        )


@dataclass
class EnterWorker:
    """What a worker's process does first.

    Args:
        seed: for the random numbers of torch, numpy and ``random`` in it; None leaves them to chance.
        patience: seconds that the process may take to end once the engine has stopped.
    """

    seed: int | None
    patience: float

    def __call__(self, record: WorkerRecord) -> None:
        """Make this process a group of its own, watch over the owner, and say that the worker is there."""
        leave_foreground()
        threading.Thread(
            target=self._end_with_owner, args=(record,), name="embodichain-rl-owner-watch", daemon=True
        ).start()
        if self.seed is not None:
            random.seed(self.seed)
            np.random.seed(self.seed % 2**32)
            torch.manual_seed(self.seed)
        record.enter(Phase.BUILDING)

    def _end_with_owner(self, record: WorkerRecord) -> None:
        # Not the parent: under forkserver that is another process. Not PR_SET_PDEATHSIG, which is sent when the
        # *thread* ends that started this process.
        channel = record.channel
        stopped_at: float | None = None
        while channel.owner_is_alive():
            if stopped_at is None and channel.state >= OnlineDataEngineState.FAILED:
                stopped_at = time.monotonic()
            if stopped_at is not None and time.monotonic() - stopped_at > self.patience:
                break
            time.sleep(OWNER_POLL)
        os.killpg(0, signal.SIGKILL)


@contextmanager
def reporting(record: WorkerRecord) -> Iterator[None]:
    """Leaves an exception of the block in the channel, with its traceback, and raises it on."""
    try:
        yield
    except ProducerStopped:
        raise
    except BaseException as error:
        record.report(error)
        raise


def _enter(replay_buffer: TrajectoryReplayBuffer) -> WorkerRecord:
    """Does what comes before anything is built, and returns the record of whoever writes to the buffer."""
    writer = replay_buffer.writer
    assert isinstance(writer, ProducerWriter)
    if writer.entry is not None:
        writer.entry(writer.record)
    return writer.record


class _Heart:
    """Asked by TorchRL's collector after every step whether to break off: that makes it a sign of life for nothing."""

    def __init__(self, record: WorkerRecord, num_envs: int) -> None:
        self.record = record
        self._num_envs = num_envs

    def collection_stopped(self) -> bool:
        if self.record.stepped(self._num_envs) and self.record.channel.stop_requested():
            raise ProducerStopped(0)
        return False


class SupervisedCollector(GymnasiumCollector):
    """A one-process collector with signs of life and a report of what it raises.

        It takes the arguments of :class:`torchrl.collectors.Collector`, and is that one where a
    :class:`~embodichain_rl.collectors.GymnasiumCollector` is. The writer of ``replay_buffer`` must be a
    :class:`ProducerWriter`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._record = _enter(kwargs["replay_buffer"])
        with reporting(self._record):
            super().__init__(*args, **kwargs)
            self.interruptor = _Heart(self._record, self.env.numel())
            reason = self.fallback_reason
            self._record.note_collector("GymnasiumCollector" if reason is None else f"Collector: {reason}")
            self._record.enter(Phase.BUILT)

    def __iter__(self) -> Iterator[Any]:
        with reporting(self._record):
            looked = time.monotonic()
            for collected in super().__iter__():  # in the buffer by now
                if time.monotonic() - looked >= LOOK_EVERY:
                    yield collected
                    looked = time.monotonic()


class WeightSync(SharedMemWeightSyncScheme):
    """TorchRL's weight updates through shared memory, but a worker that does not answer is not waited for for ever."""

    def _wait_for_ack(self, worker_ids: Any = None, timeout: float | None = None) -> None:
        for acks in self._ack_queues.values():  # one: every collector of an engine has one worker
            try:
                acks.get(timeout=WEIGHT_UPDATE_TIMEOUT)
            except queue.Empty:
                raise WorkerHungError(
                    f"The worker did not take over the weights within {WEIGHT_UPDATE_TIMEOUT:g} s."
                ) from None


class _StepHeart(Transform):
    """Gives a sign of life with every step and reset of the environment that it is appended to."""

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
    """Rolls out demonstrations where TorchRL's worker process expects a collector.

    Args:
        create_rollout: a :class:`WorkerDemonstrations`.
        replay_buffer: where the trajectories go; its writer is a :class:`ProducerWriter`.
        kwargs: what else a collector gets, and this one has no use for.
    """

    # What TorchRL's worker process sets, and reads.
    _ignore_rb = False
    _use_buffers = False

    def __init__(
        self, create_rollout: WorkerDemonstrations, *, replay_buffer: TrajectoryReplayBuffer, **kwargs: Any
    ) -> None:
        self._record = _enter(replay_buffer)
        self._replay_buffer = replay_buffer
        self._envs: list[EnvBase] = []
        with reporting(self._record):
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
                self._replay_buffer.extend(steps)
                yield

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        """Closes the environments."""
        for env in self._envs:
            env.close(raise_if_closed=False)
