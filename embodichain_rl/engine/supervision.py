"""Supervision of an engine's producers: detect lost ones, replace them within the restart budget, or fail."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import wait
from typing import Any

from tensordict import TensorDictBase

from embodichain_rl.engine.channel_memory import OnlineDataEngineState
from embodichain_rl.engine.planning import Plan
from embodichain_rl.engine.producers import LOGGER, Loss, Producer, ProducerThread
from embodichain_rl.engine.worker import WEIGHT_UPDATE_TIMEOUT
from embodichain_rl.engine.worker_process import WorkerProcess
from embodichain_rl.engine.worker_record import Phase

__all__ = ["Supervisor"]

POLL_INTERVAL = 0.5
"""Seconds between two checks of the heartbeats. The end of a process is noticed immediately."""

REAP_GRACE = 2.0
"""Seconds to wait for stopping producers beyond their ``patience``."""


class Supervisor:
    """The supervisor of an engine's producers. It starts them and monitors them on a thread.

    A producer is lost if its process died, it raised an exception, or its heartbeat timed out. It is replaced while the
    others continue. In three cases the engine fails with the producer's exception instead:

    * the restart budget is exhausted;
    * a replacement would fail in the same way, since the exception is one of this library's (a schema mismatch, an
      environment that produces no accepted trajectory);
    * before the buffer is filled, every producer was lost while it was starting.

    Args:
        plan: the plan of the engine.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._owner = os.getpid()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()  # held briefly; guards _producers, _closed and _replacing
        self._closing = threading.Event()
        self._all_closed = threading.Event()
        self._closed = False
        self._replacing: list[threading.Thread] = []
        self._lost_building: set[int] = set()
        self._problems: list[BaseException] = []
        self._producers = [self._make(index, 0) for index in range(plan.channel.num_workers)]
        self._thread = threading.Thread(target=self._run, name="embodichain-rl-supervisor", daemon=True)

    def _make(self, index: int, attempt: int) -> Producer:
        cfg = self._plan.cfg
        if cfg.producers is None and cfg.num_workers > 0:
            return WorkerProcess(self._plan, index, attempt, self._wake)
        source: Iterable[Any] | None = None if cfg.producers is None else cfg.producers[index]
        return ProducerThread(self._plan, index, attempt, self._wake, source)

    def start(self) -> None:
        """Start all producers, without waiting for them."""
        for producer in self._producers:
            producer.record.begin()
            producer.start()
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether every producer has ended without an error."""
        return all(producer.finished for producer in self._producers)

    def progress(self) -> str:
        """Return a description of the progress of each producer."""
        return "; ".join(producer.record.describe() for producer in self._producers)

    # ----------------------------------------------------------------------------------------------------- monitoring

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread wakes up anyway; closed: the thread has ended
            os.write(self._wake_writer, b"!")

    def _run(self) -> None:
        while not self._closing.is_set():
            waitables = [waitable for producer in self._producers for waitable in producer.waitables()]
            wait([self._wake_reader, *waitables], POLL_INTERVAL)
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_reader, 4096)
            for producer in list(self._producers):
                if self._closing.is_set():
                    return
                loss = producer.loss()
                if loss is not None:
                    self._lost(producer, loss)
                elif producer.record.phase >= Phase.BUILT:
                    self._lost_building.discard(producer.index)

    def _lost(self, producer: Producer, loss: Loss) -> None:
        channel, allowed = self._plan.channel, self._plan.cfg.max_worker_restarts
        error = loss.error()
        if loss.building and channel.state is OnlineDataEngineState.STARTING:
            self._lost_building.add(producer.index)
        if loss.final:
            verdict = "The engine fails with it at once, since another worker would fail in the same way."
        elif len(self._lost_building) == channel.num_workers:
            verdict = "The engine fails with it at once, since no worker could be started at all."
        elif channel.restarts >= allowed:
            verdict = f"The engine fails with it: max_worker_restarts={allowed} workers were replaced already."
        else:
            LOGGER.warning(
                "%s is lost and is replaced (restart %d of %d): %s",
                loss.who,
                channel.restarts + 1,
                allowed,
                _with_notes(error),
            )
            self._replace(producer)
            return
        LOGGER.error("%s is lost. %s %s", loss.who, verdict, _with_notes(error))
        channel.fail(loss.reason, loss.traceback_of, verdict)
        self._close_all(self._plan.cfg.shutdown_timeout)

    def _replace(self, lost: Producer) -> None:
        replacement = self._make(lost.index, lost.attempt + 1)

        def replace() -> None:
            lost.close(0.0)
            with self._lock:
                if self._closed:
                    return
                replacement.record.begin()  # again, since a hung producer may have written to the record until now
                replacement.start()

        thread = threading.Thread(target=replace, name=f"embodichain-rl-replace-{lost.index}", daemon=True)
        with self._lock:
            if self._closed:
                return
            replacement.record.begin()  # the report of the lost producer has been read
            self._plan.channel.count_restart()
            self._producers[lost.index] = replacement
            self._replacing = [*(t for t in self._replacing if t.is_alive()), thread]
        thread.start()

    # ------------------------------------------------------------------------------------------------------- stopping

    def stop(self, patience: float) -> None:
        """Stop all producers, in little more than ``patience`` seconds. Do nothing in a forked child process.

        Args:
            patience: seconds for a graceful shutdown, in which producers close their environments. Then they are
                killed.
        """
        if os.getpid() != self._owner:
            return
        self._closing.set()
        self._wake()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(patience + REAP_GRACE)
        self._close_all(patience)
        self._all_closed.wait(patience + REAP_GRACE)  # another thread may be closing them

    def take_problems(self) -> list[BaseException]:
        """Return what went wrong while the producers were closed. Further calls return an empty list."""
        with self._lock:
            problems, self._problems = self._problems, []
        return problems

    def _close_all(self, patience: float) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._closing.set()
        self._plan.channel.request_stop()
        closers = [
            threading.Thread(target=producer.close, args=(patience,), name="embodichain-rl-close", daemon=True)
            for producer in self._producers
        ]
        for closer in closers:
            closer.start()
        deadline = time.monotonic() + patience + REAP_GRACE
        for thread in [*closers, *self._replacing]:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            self._problems += [problem for producer in self._producers for problem in producer.problems]
        self._all_closed.set()
        os.close(self._wake_reader)
        writer, self._wake_writer = self._wake_writer, -1
        os.close(writer)

    # -------------------------------------------------------------------------------------------------------- weights

    def update_policy(self, weights: TensorDictBase) -> list[int]:
        """Send new weights to all producers, and return the indices of those that loaded them in time.

        Producers that are starting receive the weights when they have started. A producer that hangs or dies is
        skipped.
        """
        version = self._plan.set_weights(weights)
        updated: list[int] = []

        def update(producer: Producer) -> None:
            if producer.update_weights(version):
                updated.append(producer.index)

        threads = [
            threading.Thread(target=update, args=(producer,), name="embodichain-rl-update-policy", daemon=True)
            for producer in self._producers
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + WEIGHT_UPDATE_TIMEOUT + 1.0
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return sorted(updated)


def _with_notes(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return "\n".join([f"{type(error).__name__}: {error}", *notes])
