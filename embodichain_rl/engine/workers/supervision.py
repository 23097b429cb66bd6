"""Supervision of an engine's producers: detect lost ones, replace them within the restart budget, or fail."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterable
from functools import partial
from multiprocessing.connection import wait
from typing import Any

from tensordict import TensorDictBase

from embodichain_rl.engine.processes import IdleThreads, Job
from embodichain_rl.engine.state import OnlineDataEngineState, Phase
from embodichain_rl.engine.workers.planning import Plan
from embodichain_rl.engine.workers.producers import LOGGER, Loss, Producer, ProducerThread
from embodichain_rl.engine.workers.worker import WEIGHT_UPDATE_TIMEOUT
from embodichain_rl.engine.workers.worker_process import WorkerProcess
from embodichain_rl.errors import ResourceShortageError
from embodichain_rl.shared import LONGEST_SLICE, Deadline, naming_shortage, shortage_of, stopped_note

__all__ = ["Supervisor"]

REAP_GRACE = 2.0
"""Seconds to wait for stopping producers beyond their ``patience``."""

FIRST_WAIT, LONGEST_WAIT = 6.0, 60.0
"""Seconds until a producer is replaced after a resource was short. They double with each time in succession. The first
one is long, since few restarts may be allowed."""

SILENCE = 2.0
"""Seconds without a heartbeat after which it is checked whether the producer's process is stopped."""


class Supervisor:
    """The supervisor of an engine's producers. It starts them and monitors them on a thread.

    A producer is lost if its process died, it raised an exception, or its heartbeat timed out. It is replaced while the
    others continue. If a resource was short, such as ``/dev/shm`` or processes, the replacement waits for some seconds.
    In these cases the engine fails with the producer's exception instead:

    * the restart budget is exhausted;
    * a resource was short where the last producer that is left was to be replaced;
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
        self._replacing: list[Job] = []
        # Two for the replacement of each worker: one closes the lost one and starts the other, which one more builds.
        self._threads = IdleThreads(spare=2 * plan.channel.num_workers)
        self._lost_building: set[int] = set()
        self._problems: list[BaseException] = []
        self._short: dict[int, int] = {}  # the number of shortages of each producer since it was built
        self._waiting: dict[int, tuple[Producer, float]] = {}  # lost producers, and when to replace them
        self._seen_stopped: set[int] = set()
        self._producers = [self._make(index, 0) for index in range(plan.channel.num_workers)]
        self._thread = threading.Thread(target=self._run, name="embodichain-rl-supervisor", daemon=True)

    def _make(self, index: int, attempt: int) -> Producer:
        cfg = self._plan.cfg
        if self._plan.remote is not None:
            return self._plan.remote.producer(index, attempt, self._wake)
        if cfg.producers is None and cfg.num_workers > 0:
            return WorkerProcess(self._plan, index, attempt, self._wake, self._threads)
        source: Iterable[Any] | None = None if cfg.producers is None else cfg.producers[index]
        return ProducerThread(self._plan, index, attempt, self._wake, source)

    def start(self) -> None:
        """Start all producers, without waiting for them."""
        with naming_shortage("The start of the workers"):
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
        return "; ".join(
            producer.record.describe() + ("" if producer.record.pid else stopped_note(producer.pid))
            for producer in self._producers
        )

    # ----------------------------------------------------------------------------------------------------- monitoring

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread wakes up anyway; closed: the thread has ended
            os.write(self._wake_writer, b"!")

    def _run(self) -> None:
        while not self._closing.is_set():
            try:
                waitables = [waitable for producer in self._running() for waitable in producer.waitables()]
                wait([self._wake_reader, *waitables], LONGEST_SLICE)
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_reader, 4096)
                self._check()
            except Exception as error:
                if shortage_of(error) is None:
                    LOGGER.exception("The supervision of the workers failed")
                    self._fail(error, None, "The engine fails with it, since nobody would notice the loss of a worker.")
                # Otherwise this thread has no memory, or can open no file, at this moment. It checks again.
                self._closing.wait(LONGEST_SLICE)

    def _running(self) -> list[Producer]:
        """Return the producers that are not lost."""
        return [producer for producer in self._producers if producer.index not in self._waiting]

    def _check(self) -> None:
        for producer in self._running():
            if self._closing.is_set():
                return
            loss = producer.loss()
            if loss is not None:
                self._lost(producer, loss)
            elif producer.record.phase >= Phase.BUILT:
                self._lost_building.discard(producer.index)
                self._short.pop(producer.index, None)
            if loss is None and producer.silence() > SILENCE:
                self._note_stopped(producer)
        for producer, due in list(self._waiting.values()):
            if not self._closing.is_set() and time.monotonic() >= due:
                self._replace(producer)

    def _note_stopped(self, producer: Producer) -> None:
        note = stopped_note(producer.pid)
        if note and producer.pid not in self._seen_stopped:
            self._seen_stopped.add(producer.pid)
            LOGGER.warning("%s does not go on.%s", producer.name, note)
        elif not note:
            self._seen_stopped.discard(producer.pid)

    def _lost(self, producer: Producer, loss: Loss) -> None:
        channel, allowed = self._plan.channel, self._plan.cfg.max_worker_restarts
        error = loss.error()
        producer.record.note_loss(error)
        producer.lost = True
        if loss.building and channel.state is OnlineDataEngineState.STARTING:
            self._lost_building.add(producer.index)
        if loss.shortage:
            self._short[producer.index] = self._short.get(producer.index, 0) + 1
        if loss.final:
            verdict = "The engine fails with it at once, since another worker would fail in the same way."
        elif len(self._lost_building) == channel.num_workers:
            verdict = "The engine fails with it at once, since no worker could be started at all."
        elif channel.restarts >= allowed:
            verdict = f"The engine fails with it: max_worker_restarts={allowed} workers were replaced already."
        elif isinstance(error, ResourceShortageError) and len(self._short) == channel.num_workers:
            verdict = "The engine fails with it, since no other worker is left."
        else:
            seconds = self._seconds_to_wait(producer.index) if loss.shortage else 0.0
            LOGGER.warning(
                "%s is lost and is replaced%s (restart %d of %d): %s",
                loss.who,
                f" in {seconds:g} s" if seconds else "",
                channel.restarts + 1,
                allowed,
                _with_notes(error),
            )
            self._waiting[producer.index] = producer, time.monotonic() + seconds
            return
        LOGGER.error("%s is lost. %s %s", loss.who, verdict, _with_notes(error))
        self._fail(loss.reason, loss.traceback_of, verdict)

    def _seconds_to_wait(self, index: int) -> float:
        return min(FIRST_WAIT * 2 ** (self._short[index] - 1), LONGEST_WAIT)

    def _fail(self, reason: BaseException | bytes, where: str | None, verdict: str) -> None:
        self._plan.channel.fail(reason, where, verdict)
        self._close_all(self._plan.cfg.shutdown_timeout)

    def _replace(self, lost: Producer) -> None:
        replacement = self._make(lost.index, lost.attempt + 1)

        def replace() -> None:
            try:
                lost.close(0.0)
            except Exception as error:  # the process has ended; what it used in this one may not be released
                LOGGER.warning("%s could not be closed completely: %s", lost.name, error)
            try:
                with self._lock:
                    if self._closed:
                        return
                    replacement.record.begin(again=True)  # a hung producer may have written to it until now
                    replacement.start()
            except Exception as error:
                self._fail(error, None, f"The engine fails with it, since {replacement.name} could not be started.")

        with self._lock:
            if self._closed:
                return
            job = self._threads.call(replace)
            replacement.record.begin()  # the report of the lost producer has been read
            self._plan.channel.count_restart()
            self._producers[lost.index] = replacement
            self._waiting.pop(lost.index, None)
            self._replacing = [*(other for other in self._replacing if not other.done.is_set()), job]

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
            Deadline(patience + REAP_GRACE).join(self._thread)
        self._close_all(patience)
        Deadline(patience + REAP_GRACE).wait(self._all_closed.wait)  # another thread may be closing them

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
        closing = [self._threads.call_anyway(partial(producer.close, patience)) for producer in self._producers]
        deadline = Deadline(patience + REAP_GRACE)
        for job in [*closing, *self._replacing]:
            deadline.wait(job.done.wait)
        if self._plan.remote is not None:
            self._plan.remote.close()
        self._threads.close()
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

        updates = [self._threads.call_anyway(partial(update, producer)) for producer in self._producers]
        deadline = Deadline(WEIGHT_UPDATE_TIMEOUT + 1.0)
        for job in updates:
            deadline.wait(job.done.wait)
        return sorted(updated)


def _with_notes(error: BaseException) -> str:
    notes = getattr(error, "__notes__", [])
    return "\n".join([f"{type(error).__name__}: {error}", *notes])
