"""The producers of trajectories that an engine supervises, and the one on a thread of the engine's process.

The producer in a worker process is in ``worker_process.py``.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict

from embodichain_rl.engine.processes import unpack_exception
from embodichain_rl.engine.state import Phase
from embodichain_rl.engine.workers.own_draws import OwnDraws
from embodichain_rl.engine.workers.planning import Plan
from embodichain_rl.engine.workers.worker import (
    DemonstrationCollector,
    ProducerStopped,
    SupervisedCollector,
    WorkerDemonstrations,
    reporting,
)
from embodichain_rl.errors import (
    EmbodiChainRLError,
    LedgerLockTimeoutError,
    RemoteError,
    ResourceShortageError,
    TooManyWritersError,
    WorkerHungError,
)
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.shared import Deadline, RunningClock, shortage_of, stopped_note

__all__ = ["Loss", "Producer", "ProducerThread", "shortage_reported", "would_recur"]

LOGGER = logging.getLogger("embodichain_rl.engine")

TRANSIENT = (RemoteError, ResourceShortageError, TooManyWritersError, LedgerLockTimeoutError)
"""Errors of this library that a replacement need not meet: their cause is external, such as a stopped process."""


@dataclass(frozen=True)
class Loss:
    """The loss of a producer: why it has ended or must be ended.

    Args:
        reason: the exception; packed if the producer reported it.
        who: the name of the producer, as part of a sentence.
        final: whether a replacement would fail in the same way, or is not possible.
        building: whether the producer was still starting.
        shortage: whether a resource was short, so that a replacement should wait.
    """

    reason: BaseException | bytes
    who: str
    final: bool = False
    building: bool = False
    shortage: bool = False

    @property
    def traceback_of(self) -> str | None:
        """The producer to which the traceback of the reason belongs; None if it has no traceback."""
        return self.who if isinstance(self.reason, bytes) else None

    def error(self) -> BaseException:
        """Return the reason as an exception, with the producer's traceback as a note."""
        return unpack_exception(self.reason, where=self.who) if isinstance(self.reason, bytes) else self.reason


class Producer(ABC):
    """Base class: a producer that writes trajectories until it is closed.

    Args:
        plan: the plan of the engine.
        index: the index of the producer, and of its row in the channel.
        attempt: the number of earlier producers with this index.
        wake: a function that wakes the supervisor.
    """

    def __init__(self, plan: Plan, index: int, attempt: int, wake: Callable[[], None]) -> None:
        self.plan = plan
        self.index = index
        self.attempt = attempt
        self.record = plan.channel.worker(index)
        self._wake = wake
        self._closing = False
        self.problems: list[BaseException] = []
        """What went wrong while the producer was closed."""
        self.lost = False
        """Whether the supervisor has reported its loss, which is then no problem of closing it."""
        self._clock: RunningClock | None = None

    @property
    def name(self) -> str:
        """The name of the producer in messages."""
        pid = f" (process {self.record.pid})" if self.record.pid else ""
        return f"worker {self.index}{pid}"

    @property
    def pid(self) -> int:
        """The id of its process; 0 if there is none yet."""
        return self.record.pid

    @abstractmethod
    def start(self) -> None:
        """Start the producer without waiting for it. ``record.begin()`` must be called before."""

    @abstractmethod
    def loss(self) -> Loss | None:
        """Return why the producer is lost; None if it is not."""

    @abstractmethod
    def waitables(self) -> list[Any]:
        """Return objects for :func:`multiprocessing.connection.wait` that become ready when the producer ends."""

    @abstractmethod
    def update_weights(self, version: int) -> bool:
        """Send the plan's weights to the producer, and return whether it loaded them."""

    @abstractmethod
    def close(self, patience: float) -> None:
        """Stop the producer: gracefully within ``patience`` seconds, then by force. Fill ``problems``."""

    @property
    def finished(self) -> bool:
        """Whether the producer has ended without an error."""
        return False

    def _note_closing(self, finished: bool) -> None:
        """Note what went wrong while the environments were closed.

        Args:
            finished: whether the producer finished within ``shutdown_timeout``.
        """
        packed = self.record.reported_closing
        if packed is not None:
            self.problems.append(unpack_exception(packed, where=f"{self.name}, while it closed its environments"))
        if not finished and not self.lost:
            self.problems.append(
                WorkerHungError(
                    f"{self.name} did not close its environments within shutdown_timeout="
                    f"{self.plan.cfg.shutdown_timeout:g} s and was stopped by force. What they write when they close "
                    "may be incomplete. Raise shutdown_timeout above the time that a step and close() take."
                )
            )

    def silence(self) -> float:
        """Return the seconds since the last heartbeat. It must be called several times a second.

        Only the time in which this process was running counts: one that is frozen with its workers hears nothing.
        """
        self._clock = self._clock or RunningClock()
        return self._clock.seconds_since(self.record.last_beat)

    def _hung(self) -> WorkerHungError | None:
        """Return the error for a producer that has sent no heartbeat for too long."""
        cfg, silent = self.plan.cfg, self.silence()
        if self.record.phase < Phase.BUILT:
            allowed, name, doing = cfg.initialization_timeout, "initialization_timeout", "starting"
        else:
            allowed, name, doing = cfg.worker_timeout, "worker_timeout", "a step, a reset or a plan"
        if silent <= allowed:
            return None
        stopped = stopped_note(self.pid)
        remedy = f" Raise {name}={allowed:g} if it may take that long; otherwise find out where it blocks."
        return WorkerHungError(
            f"{self.name} sent no heartbeat for {silent:.1f} s, in {doing}.{stopped if stopped else remedy}"
        )


class ProducerThread(Producer):
    """A producer on a thread of this process: a collector, or an iterable of TensorDicts given by the user."""

    def __init__(
        self, plan: Plan, index: int, attempt: int, wake: Callable[[], None], source: Iterable[Any] | None
    ) -> None:
        super().__init__(plan, index, attempt, wake)
        self._source = source
        self._collector: Any = None
        self._finished = False
        self._policy: torch.nn.Module | None = None
        self._thread = threading.Thread(target=self._run, name=f"embodichain-rl-producer-{index}", daemon=True)

    @property
    def name(self) -> str:
        return f"producer {self.index}"

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            with reporting(self.record):
                self.record.enter(Phase.BUILDING)
                buffer = self.plan.buffer(self.index)
                if self._source is None:
                    with OwnDraws(self.plan.seed(self.index, self.attempt)):
                        self._collect(buffer)
                else:
                    self._copy(self._source, buffer)
                self._finished = True
        except ProducerStopped:
            pass
        except Exception as error:
            LOGGER.debug("%s ended", self.name, exc_info=error)  # reported; the supervisor logs it
        finally:
            if self._collector is not None:
                self._collector.shutdown(raise_on_error=False)
            self._wake()

    def _collect(self, buffer: TrajectoryReplayBuffer) -> None:
        plan = self.plan
        self._policy, version = plan.copy_policy()
        envs = plan.envs(self.index, self.attempt)
        if isinstance(envs, WorkerDemonstrations):
            self._collector = DemonstrationCollector(envs, replay_buffer=buffer)
        else:
            self._collector = SupervisedCollector(
                envs,
                self._policy if plan.policy_factory is None else plan.policy_factory(),
                frames_per_batch=plan.frames_per_batch,
                total_frames=-1,
                replay_buffer=buffer,
                trajs_per_batch=1,
                auto_register_policy_transforms=False,
            )
        self.record.used_policy(version)
        for _ in self._collector:
            self._check_stop()

    def _copy(self, source: Iterable[Any], buffer: TrajectoryReplayBuffer) -> None:
        self.record.enter(Phase.BUILT)
        for data in source:
            self.record.stepped(data.numel())
            self._check_stop()
            buffer.extend(data)

    def _check_stop(self) -> None:
        if self._closing or self.plan.channel.stop_requested():
            raise ProducerStopped(0)

    @property
    def finished(self) -> bool:
        return self._finished

    def waitables(self) -> list[Any]:
        return []

    def loss(self) -> Loss | None:
        if self._finished:
            return None
        if self._thread.is_alive():
            # A thread can't be killed, so it can't be replaced either.
            hung = self._hung()
            return None if hung is None else Loss(hung, self.name, final=True)
        packed = self.record.reported
        assert packed is not None, "a thread that ends without a stop request has reported why"
        # A source that the user made can't be re-created.
        final = self._source is not None or would_recur(packed)
        return Loss(packed, self.name, final, self.record.phase < Phase.BUILT)

    def update_weights(self, version: int) -> bool:
        if self._policy is None:
            return False
        with self.plan.policy_lock:
            TensorDict.from_module(self._policy).data.update_(self.plan.weights())
        self.record.used_policy(version)
        return True

    def close(self, patience: float) -> None:
        self._closing = True
        if self._thread.ident is None:
            return
        Deadline(patience).join(self._thread)
        alive = self._thread.is_alive()
        if alive:
            LOGGER.warning(
                "%s is still busy after %.1f s; its thread ends after its current call.", self.name, patience
            )
        self._note_closing(finished=not alive or self._source is not None)  # the caller closes its own sources


def would_recur(packed: bytes) -> bool:
    """Return whether a packed exception is one of this library that a replacement would raise too."""
    error = unpack_exception(packed, where="")
    return isinstance(error, EmbodiChainRLError) and not isinstance(error, TRANSIENT)


def shortage_reported(packed: bytes) -> bool:
    """Return whether a packed exception reports that a resource was short."""
    return shortage_of(unpack_exception(packed, where="")) is not None
