"""A producer in a worker process: a TorchRL multi-process collector with a single process."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing import get_context, get_start_method
from types import FunctionType
from typing import Any

import torch
from torchrl.collectors import MultiAsyncCollector

from embodichain_rl.engine.processes import (
    ChildProcess,
    IdleThreads,
    Job,
    pack_exception,
    starting_processes,
    unpack_exception,
)
from embodichain_rl.engine.state import Phase
from embodichain_rl.engine.workers.planning import Plan
from embodichain_rl.engine.workers.producers import LOGGER, Loss, Producer, shortage_reported, would_recur
from embodichain_rl.engine.workers.worker import DemonstrationCollector, EnterWorker, SupervisedCollector, WeightSync
from embodichain_rl.errors import ResourceShortageError, WorkerDiedError
from embodichain_rl.shared import Deadline, naming_shortage

__all__ = ["WorkerProcess"]

ERROR_GRACE = 5.0
"""Seconds after a failure in this process in which a worker process that was started must report a better reason."""

KILL_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""

EXIT_MARGIN = 5.0
"""Seconds that a worker waits beyond ``shutdown_timeout`` before it ends itself, since its owner should end it."""

GRACEFUL_EXITS = (0, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""Exit codes of a worker that has ended because it or the whole program was told to."""


class WorkerProcess(Producer):
    """A producer in a worker process. One of ``threads`` builds its collector, which takes seconds."""

    def __init__(self, plan: Plan, index: int, attempt: int, wake: Callable[[], None], threads: IdleThreads) -> None:
        super().__init__(plan, index, attempt, wake)
        self._collector: _WorkerCollector | None = None
        self._error: Exception | None = None
        self._child: ChildProcess | None = None
        self._error_is_late: Deadline | None = None
        self._threads = threads
        self._mark = secrets.token_hex(8)
        self._building: Job | None = None
        self._updating = threading.Lock()

    def start(self) -> None:
        try:
            self._building = self._threads.call(self._build)
        except RuntimeError as error:
            self._error = error
            self._wake()

    def _build(self) -> None:
        plan = self.plan
        try:
            policy, version = plan.copy_policy()
            seed = plan.seed(self.index, self.attempt)
            collector = _WorkerCollector(
                self._take_collector,
                plan.cfg.start_method,
                [plan.envs(self.index, self.attempt)],
                policy,
                policy_factory=plan.policy_factory,
                frames_per_batch=plan.frames_per_batch,
                total_frames=-1,
                replay_buffer=plan.buffer(
                    self.index, EnterWorker(seed, plan.cfg.shutdown_timeout + EXIT_MARGIN, self._mark)
                ),
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
    def child(self) -> ChildProcess | None:
        """The worker process; None before it is started."""
        started = getattr(self._collector, "procs", None)
        if started and self._child is None:
            self._child = ChildProcess(started[0], self._mark)
        return self._child

    @property
    def pid(self) -> int:
        return self.record.pid if self._child is None else self._child.pid

    def waitables(self) -> list[Any]:
        return [] if self.child is None else self.child.waitables()

    def loss(self) -> Loss | None:
        child, phase = self.child, self.record.phase
        building = phase < Phase.BUILT
        if child is not None and not child.alive():
            packed, exit_code = self.record.reported, child.exit_code()
            if packed is None:
                death = _death_of(self.name, exit_code)
                # It has run no code of the engine, so it was not the fault of the environment.
                return Loss(death, self.name, building=building, shortage=phase is Phase.ABSENT)
            return Loss(packed, self.name, would_recur(packed), building, shortage=shortage_reported(packed))
        if self._error is not None and (child is None or self._cannot_go_on()):
            return self._loss_of_start(self._error)
        hung = self._hung()
        return None if hung is None else Loss(hung, self.name, building=building)

    def _cannot_go_on(self) -> bool:
        # The process is alive. In most cases it is about to end, and reports the reason.
        self._error_is_late = self._error_is_late or Deadline(ERROR_GRACE)
        return self._error_is_late.passed()

    def _loss_of_start(self, error: Exception) -> Loss:
        who = f"the start of {self.name}"
        try:
            with naming_shortage(who[0].upper() + who[1:]):
                raise error
        except ResourceShortageError as named:
            return Loss(named, who, building=True, shortage=True)
        except Exception:
            return Loss(pack_exception(error), who, final=True, building=True)

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
        deadline = Deadline(patience)
        finished = True
        if self.record.phase >= Phase.BUILT and self.child is not None:
            self.child.wait(deadline)
            finished = not self.child.alive()
            exit_code = self.child.exit_code() if finished else None
            if not self.lost and exit_code is not None and exit_code not in GRACEFUL_EXITS:
                packed = self.record.reported
                death = _death_of(self.name, exit_code)
                self.problems.append(death if packed is None else unpack_exception(packed, where=self.name))
        self._note_closing(finished)
        # Wait for a process that is starting right now, so that it is not left running.
        building = self._building  # None for a replacement that was never started
        while self.child is None and building is not None and not building.done.wait(0.05):
            if deadline.passed():
                break
        collector = self._collector
        if self.child is not None:
            assert collector is not None
            self.child.end(0.0, KILL_GRACE, unblock=collector.disconnect)
        if building is not None:
            Deadline(KILL_GRACE).wait(building.done.wait)
        if collector is not None:
            collector.release(self.plan.num_threads)
        if self._child is not None:
            self._child.close()


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


def _death_of(name: str, exit_code: int | None) -> WorkerDiedError:
    if exit_code is not None and exit_code < 0:
        how = f"was killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
        hint = " The kernel sends it when memory runs out." if -exit_code == signal.SIGKILL else ""
    elif exit_code is None:
        how, hint = "ended with an exit code that is not known, since this process did not get it,", ""
    else:
        how, hint = f"ended with exit code {exit_code}", ""
    return WorkerDiedError(f"{name} {how} and reported no exception.{hint} Its output on stderr may say more.")
