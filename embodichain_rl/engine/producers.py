"""One producer of trajectories: a TorchRL collector with one process, or an iterable on a thread of this process."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from types import FunctionType
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.collectors import MultiAsyncCollector

from embodichain_rl.engine.foreground import without_ctrl_c
from embodichain_rl.engine.own_draws import OwnDraws
from embodichain_rl.engine.planning import Plan
from embodichain_rl.engine.remote_errors import pack_exception, unpack_exception
from embodichain_rl.engine.worker import (
    DemonstrationCollector,
    EnterWorker,
    ProducerStopped,
    SupervisedCollector,
    WeightSync,
    WorkerDemonstrations,
    reporting,
)
from embodichain_rl.engine.worker_record import Phase
from embodichain_rl.errors import (
    EmbodiChainRLError,
    LedgerLockTimeoutError,
    RemoteError,
    TooManyWritersError,
    WorkerDiedError,
    WorkerHungError,
)
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer

__all__ = ["Loss", "Producer", "ProducerThread", "WorkerProcess"]

LOGGER = logging.getLogger("embodichain_rl.engine")

PASSING = (RemoteError, TooManyWritersError, LedgerLockTimeoutError)
"""Errors that another worker need not meet: of something else, or while others were stopped or killed."""

KILL_GRACE = 0.5
"""Seconds between asking a process to end and killing it."""


@dataclass(frozen=True)
class Loss:
    """A producer that does not go on.

    Args:
        reason: why; packed where the producer said it itself.
        who: which producer, as part of a sentence.
        final: whether another one in its place would fare no better.
        building: whether it never came to act.
    """

    reason: BaseException | bytes
    who: str
    final: bool = False
    building: bool = False

    @property
    def traceback_of(self) -> str | None:
        """What the traceback of the reason is of; None where it has none."""
        return self.who if isinstance(self.reason, bytes) else None

    def error(self) -> BaseException:
        """Returns the reason as an exception, the producer's traceback a note of it."""
        return unpack_exception(self.reason, where=self.who) if isinstance(self.reason, bytes) else self.reason


class Producer(ABC):
    """Something that writes trajectories by itself until it is told to stop.

    Args:
        plan: the engine's.
        index: its row in the channel.
        attempt: how many there were before it in its place.
        wake: called when there is something to look at.
    """

    def __init__(self, plan: Plan, index: int, attempt: int, wake: Callable[[], None]) -> None:
        self.plan = plan
        self.index = index
        self.attempt = attempt
        self.record = plan.channel.worker(index)
        self._wake = wake
        self._closing = False

    @property
    def name(self) -> str:
        """What to call it in a message."""
        pid = f" (process {self.record.pid})" if self.record.pid else ""
        return f"worker {self.index}{pid}"

    @abstractmethod
    def start(self) -> None:
        """Starts it, and returns at once; ``record.begin()`` comes before."""

    @abstractmethod
    def loss(self) -> Loss | None:
        """Says whether it is lost, and why."""

    @abstractmethod
    def waitables(self) -> list[Any]:
        """Returns what becomes ready, for :func:`multiprocessing.connection.wait`, when it ends."""

    @abstractmethod
    def update_weights(self, version: int) -> bool:
        """Hands it the plan's weights; says whether it took them over."""

    @abstractmethod
    def close(self, patience: float) -> None:
        """Ends it: by itself within ``patience`` seconds, or by force."""

    @property
    def finished(self) -> bool:
        """Whether it has come to its end without an error."""
        return False

    def _hung(self) -> WorkerHungError | None:
        cfg, silent = self.plan.cfg, self.record.seconds_since_beat()
        if self.record.phase < Phase.BUILT:
            allowed, name, doing = cfg.initialization_timeout, "initialization_timeout", "starting"
        else:
            allowed, name, doing = cfg.worker_timeout, "worker_timeout", "a step, a reset or a plan"
        if silent <= allowed:
            return None
        return WorkerHungError(
            f"{self.name} gave no sign of life for {silent:.1f} s, in {doing}. Raise {name}={allowed:g} if it may "
            "take that long; else see where it waits."
        )


class WorkerProcess(Producer):
    """A TorchRL collector with one process, built on a thread of its own: it takes seconds."""

    def __init__(self, plan: Plan, index: int, attempt: int, wake: Callable[[], None]) -> None:
        super().__init__(plan, index, attempt, wake)
        self._collector: _WorkerCollector | None = None
        self._error: Exception | None = None
        self._builder = threading.Thread(target=self._build, name=f"embodichain-rl-start-worker-{index}", daemon=True)
        self._updating = threading.Lock()

    def start(self) -> None:
        self._builder.start()

    def _build(self) -> None:
        plan = self.plan
        policy, version = plan.copy_policy()
        seed = plan.seed(self.index, self.attempt)
        try:
            collector = _WorkerCollector(
                self._take_collector,
                plan.cfg.start_method,
                [plan.envs(self.index, self.attempt)],
                policy,
                policy_factory=plan.policy_factory,
                frames_per_batch=plan.frames_per_batch,
                total_frames=-1,
                replay_buffer=plan.buffer(self.index, EnterWorker(seed, plan.cfg.shutdown_timeout)),
                trajs_per_batch=1,
                collector_class=DemonstrationCollector if plan.cfg.demonstrates else SupervisedCollector,
                num_threads=plan.num_threads,
                weight_sync_schemes=None if policy is None else {"policy": WeightSync()},
                auto_register_policy_transforms=False,
            )
            self.record.used_policy(version)
            collector.start()
            if plan.channel.policy_version != version:  # updated while it was built
                self.update_weights(plan.channel.policy_version)
        except Exception as error:
            self._error = error
        self._wake()

    def _take_collector(self, collector: _WorkerCollector) -> None:
        self._collector = collector

    @property
    def process(self) -> BaseProcess | None:
        """The worker's process, once it is started."""
        started = getattr(self._collector, "procs", None)
        return started[0] if started else None

    def waitables(self) -> list[Any]:
        return [] if self.process is None else [self.process.sentinel]

    def loss(self) -> Loss | None:
        process = self.process
        building = self.record.phase < Phase.BUILT
        if process is not None and not process.is_alive():
            packed = self.record.reported
            if packed is None:
                return Loss(_death_of(self.name, process.exitcode), self.name, building=building)
            return Loss(packed, self.name, _is_own(packed), building)
        if self._error is not None and process is None:
            return Loss(pack_exception(self._error), f"the start of {self.name}", final=True, building=True)
        hung = self._hung()
        return None if hung is None else Loss(hung, self.name, building=building)

    def update_weights(self, version: int) -> bool:
        collector = self._collector
        if collector is None or self.record.phase < Phase.BUILT or not self._updating.acquire(blocking=False):
            return False
        try:
            with self.plan.policy_lock:
                weights = self.plan.weights().clone()
            collector.update_policy_weights_(weights)
            self.record.used_policy(version)
        except Exception as error:  # it dies at this moment, which its sentinel tells better
            LOGGER.warning("%s was not given the new weights: %s", self.name, error)
            return False
        finally:
            self._updating.release()
        return True

    def close(self, patience: float) -> None:
        self._closing = True
        deadline = time.monotonic() + patience
        if self.record.phase >= Phase.BUILT and self.process is not None:
            self.process.join(patience)
        # A process that is started right now is waited for: it must not be left to itself.
        while self.process is None and self._builder.is_alive() and time.monotonic() < deadline:
            self._builder.join(0.05)
        self._kill()
        if self._builder.ident is not None:  # else it was to replace another one, and was not started any more
            self._builder.join(KILL_GRACE)
        if self._collector is not None:
            self._collector.release(self.plan.num_threads)

    def _kill(self) -> None:
        process = self.process
        if process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            alive = process.is_alive()
            if alive or number == signal.SIGKILL:
                _signal_group(process, number)
            if alive:
                process.join(KILL_GRACE)
        assert self._collector is not None
        self._collector.disconnect()


class _WorkerCollector(MultiAsyncCollector):
    """TorchRL's collector with one process, which can be ended while it is being made."""

    def __init__(
        self, take: Callable[[_WorkerCollector], None], start_method: str | None, *args: Any, **kwargs: Any
    ) -> None:
        take(self)
        self._start_method = start_method
        super().__init__(*args, **kwargs)

    def _run_processes(self) -> None:
        with without_ctrl_c():
            self._run_with_start_method()

    def _run_with_start_method(self) -> None:
        if self._start_method is None:
            return super()._run_processes()
        # TorchRL asks multiprocessing's global setting, which is not ours to change. The same function, with another
        # answer to that one question:
        context = get_context(self._start_method)
        run = MultiAsyncCollector._run_processes
        names = {**run.__globals__, "_get_mp_ctx": lambda: context}
        return FunctionType(run.__code__, names, run.__name__, run.__defaults__, run.__closure__)(self)

    def disconnect(self) -> None:
        """Wakes whoever waits for the process in this one.

        The end of a process closes its end of the pipe, but under fork a sibling may hold that open too.
        """
        for pipe in getattr(self, "pipes", ()):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def release(self, num_threads: int) -> None:
        """Gives back what the collector holds in this process; its own process has ended."""
        self.shutdown(timeout=KILL_GRACE, raise_on_error=False)
        for scheme in (self._weight_sync_schemes or {}).values():
            scheme.shutdown()
        torch.set_num_threads(num_threads)  # which the shutdown raises
        for process in getattr(self, "procs", ()):
            with contextlib.suppress(ValueError):  # it can't be ended, not even by SIGKILL
                process.close()


class ProducerThread(Producer):
    """An iterable of TensorDicts, or of what writes by itself, on a thread of this process."""

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
                    seed = self.plan.seed(self.index, self.attempt)
                    with contextlib.nullcontext() if seed is None else OwnDraws(seed):
                        self._collect(buffer)
                else:
                    self._copy(self._source, buffer)
                self._finished = True
        except ProducerStopped:
            pass
        except Exception as error:
            LOGGER.debug("%s ended", self.name, exc_info=error)  # reported, and logged by whoever looks after it
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
            # A thread can't be ended from outside, so there can't be another one in its place.
            hung = self._hung()
            return None if hung is None else Loss(hung, self.name, final=True)
        packed = self.record.reported
        assert packed is not None, "a thread that ended without being told to has reported why"
        # What the caller made can't be made again.
        final = self._source is not None or _is_own(packed)
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
        self._thread.join(patience)
        if self._thread.is_alive():
            LOGGER.warning("%s is still busy after %.1f s; its thread ends when it comes back.", self.name, patience)


def _signal_group(process: BaseProcess, number: signal.Signals) -> None:
    """Sends a signal to a process and to what it started; a group outlives the process that it is named after."""
    pid = process.pid
    assert pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
        return
    with contextlib.suppress(ProcessLookupError):  # it has not come far enough to lead a group
        if process.is_alive():
            os.kill(pid, number)


def _is_own(packed: bytes) -> bool:
    """Whether an exception is one that this library raises on purpose: the same would happen to another worker."""
    error = unpack_exception(packed, where="")
    return isinstance(error, EmbodiChainRLError) and not isinstance(error, PASSING)


def _death_of(name: str, exit_code: int | None) -> WorkerDiedError:
    if exit_code is not None and exit_code < 0:
        how = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        hint = " The kernel does that when memory runs out." if -exit_code == signal.SIGKILL else ""
    else:
        how, hint = f"ended with exit code {exit_code}", ""
    return WorkerDiedError(f"{name} {how} and left no exception.{hint} What it wrote to stderr may say more.")
