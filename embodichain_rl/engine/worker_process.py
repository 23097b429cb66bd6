"""A producer in a worker process: a TorchRL multi-process collector with a single process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context, get_start_method
from multiprocessing.process import BaseProcess
from types import FunctionType
from typing import Any

import torch
from torchrl.collectors import MultiAsyncCollector

from embodichain_rl.engine.foreground import starting_processes
from embodichain_rl.engine.planning import Plan
from embodichain_rl.engine.producers import LOGGER, Loss, Producer, would_recur
from embodichain_rl.engine.remote_errors import pack_exception, unpack_exception
from embodichain_rl.engine.worker import DemonstrationCollector, EnterWorker, SupervisedCollector, WeightSync
from embodichain_rl.engine.worker_record import Phase
from embodichain_rl.errors import WorkerDiedError

__all__ = ["WorkerProcess"]

KILL_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""

EXIT_MARGIN = 5.0
"""Seconds that a worker waits beyond ``shutdown_timeout`` before it ends itself, since its owner should end it."""

GRACEFUL_EXITS = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Exit codes of a worker that has ended because it or the whole program was told to."""


class WorkerProcess(Producer):
    """A producer in a worker process. A separate thread builds its collector, which takes seconds."""

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
                replay_buffer=plan.buffer(self.index, EnterWorker(seed, plan.cfg.shutdown_timeout + EXIT_MARGIN)),
                trajs_per_batch=1,
                collector_class=DemonstrationCollector if plan.demonstrates else SupervisedCollector,
                num_threads=plan.num_threads,
                weight_sync_schemes=None if policy is None else {"policy": WeightSync()},
                auto_register_policy_transforms=False,
            )
            self.record.used_policy(version)
            collector.start()
            if plan.channel.policy_version != version:  # updated while the collector was built
                self.update_weights(plan.channel.policy_version)
        except Exception as error:
            self._error = error
        self._wake()

    def _take_collector(self, collector: _WorkerCollector) -> None:
        self._collector = collector

    @property
    def process(self) -> BaseProcess | None:
        """The worker process; None before it is started."""
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
            return Loss(packed, self.name, would_recur(packed), building)
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
        except Exception as error:  # the process is dying, which its sentinel reports better
            LOGGER.warning("%s did not receive the new weights: %s", self.name, error)
            return False
        finally:
            self._updating.release()
        return True

    def close(self, patience: float) -> None:
        self._closing = True
        deadline = time.monotonic() + patience
        lost, finished = self.loss() is not None, True
        if self.record.phase >= Phase.BUILT and self.process is not None:
            self.process.join(patience)
            finished = not self.process.is_alive()
            if finished and not lost and self.process.exitcode not in GRACEFUL_EXITS:
                packed = self.record.reported
                if packed is None:
                    self.problems.append(_death_of(self.name, self.process.exitcode))
                else:
                    self.problems.append(unpack_exception(packed, where=self.name))
        self._note_closing(finished)
        # Wait for a process that is starting right now, so that it is not left running.
        while self.process is None and self._builder.is_alive() and time.monotonic() < deadline:
            self._builder.join(0.05)
        self._kill()
        if self._builder.ident is not None:  # otherwise it is a replacement that was never started
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
    """TorchRL's multi-process collector with one process. It can be stopped while its constructor runs."""

    def __init__(
        self, take: Callable[[_WorkerCollector], None], start_method: str | None, *args: Any, **kwargs: Any
    ) -> None:
        take(self)
        self._start_method = start_method
        super().__init__(*args, **kwargs)

    def _run_processes(self) -> None:
        with starting_processes():
            self._run_with_start_method()

    def _run_with_start_method(self) -> None:
        # TorchRL reads the global start method, and sets it if none is chosen, which this library must not
        # do. So call the same function with two other globals.
        context = get_context(self._start_method or get_start_method(allow_none=True) or "spawn")
        run = MultiAsyncCollector._run_processes
        others = {"_get_mp_ctx": lambda: context, "_set_mp_start_method_if_unset": lambda method: method}
        names = {**run.__globals__, **others}
        return FunctionType(run.__code__, names, run.__name__, run.__defaults__, run.__closure__)(self)

    def disconnect(self) -> None:
        """Wake the threads of this process that wait for a message of the worker process.

        A process closes its end of the pipe when it ends, but under fork a sibling may still hold that end open.
        """
        for pipe in getattr(self, "pipes", ()):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(pipe.fileno())) as connection:
                connection.shutdown(socket.SHUT_RDWR)

    def release(self, num_threads: int) -> None:
        """Release the resources of the collector in this process, after the worker process has ended."""
        self.shutdown(timeout=KILL_GRACE, raise_on_error=False)
        for scheme in (self._weight_sync_schemes or {}).values():
            scheme.shutdown()
        torch.set_num_threads(num_threads)  # the shutdown changes it
        for process in getattr(self, "procs", ()):
            with contextlib.suppress(ValueError):  # it is still running despite SIGKILL
                process.close()


def _signal_group(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to a process and to all processes that it started. Their group outlives its leader."""
    pid = process.pid
    assert pid is not None
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)
        return
    with contextlib.suppress(ProcessLookupError):  # it is not the leader of a group yet
        if process.is_alive():
            os.kill(pid, number)


def _death_of(name: str, exit_code: int | None) -> WorkerDiedError:
    if exit_code is not None and exit_code < 0:
        how = f"was killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        hint = " The kernel sends it when memory runs out." if -exit_code == signal.SIGKILL else ""
    else:
        how, hint = f"ended with exit code {exit_code}", ""
    return WorkerDiedError(f"{name} {how} and reported no exception.{hint} Its output on stderr may say more.")
