"""Looks after the producers of an engine: sees that one is lost, puts another one in its place, or gives up."""

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
from embodichain_rl.engine.producers import LOGGER, Loss, Producer, ProducerThread, WorkerProcess
from embodichain_rl.engine.worker import WEIGHT_UPDATE_TIMEOUT
from embodichain_rl.engine.worker_record import Phase

__all__ = ["Supervisor"]

LOOK_EVERY = 0.5
"""Seconds between two looks at the signs of life. The death of a process is noticed at once."""

REAP_GRACE = 2.0
"""Seconds, beyond their patience, after which producers that are being ended are not waited for any longer."""


class Supervisor:
    """Starts the producers of an engine, and looks after them on a thread.

    A producer that is lost (its process died, it raised, it gave no sign of life) is replaced while the others run. The
    engine fails with what a producer raised when the restarts are used up; when another one would fare no better
    (the error is this library's own: data that does not fit, an environment that gives no trajectory); and when,
    before the buffer is filled, every producer was lost before it came to act.

    Args:
        plan: the engine's.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._owner = os.getpid()
        self._wake_reader, self._wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._lock = threading.Lock()  # held for moments, over _producers, _closed and what is being replaced
        self._closing = threading.Event()
        self._closed = False
        self._replacing: list[threading.Thread] = []
        self._lost_building: set[int] = set()
        self._producers = [self._make(index, 0) for index in range(plan.channel.num_workers)]
        self._thread = threading.Thread(target=self._run, name="embodichain-rl-supervisor", daemon=True)

    def _make(self, index: int, attempt: int) -> Producer:
        cfg = self._plan.cfg
        if cfg.producers is None and cfg.num_workers > 0:
            return WorkerProcess(self._plan, index, attempt, self._wake)
        source: Iterable[Any] | None = None if cfg.producers is None else cfg.producers[index]
        return ProducerThread(self._plan, index, attempt, self._wake, source)

    def start(self) -> None:
        """Starts all producers, and returns at once."""
        for producer in self._producers:
            producer.record.begin()
            producer.start()
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether every producer has come to its end without an error."""
        return all(producer.finished for producer in self._producers)

    def progress(self) -> str:
        """Says how far each producer has come."""
        return "; ".join(producer.record.describe() for producer in self._producers)

    # --------------------------------------------------------------------------------------------------- looking after

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it wakes up anyhow; closed: nobody is there any more
            os.write(self._wake_writer, b"!")

    def _run(self) -> None:
        while not self._closing.is_set():
            waitables = [waitable for producer in self._producers for waitable in producer.waitables()]
            wait([self._wake_reader, *waitables], LOOK_EVERY)
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
            verdict = "The engine fails with it at once, since another worker would fare no better."
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
        self._close_all(self._plan.cfg.shutdown_timeout / 2)

    def _replace(self, lost: Producer) -> None:
        replacement = self._make(lost.index, lost.attempt + 1)

        def replace() -> None:
            lost.close(0.0)
            with self._lock:
                if self._closed:
                    return
                replacement.record.begin()  # again: one that hung may have gone on until now
                replacement.start()

        thread = threading.Thread(target=replace, name=f"embodichain-rl-replace-{lost.index}", daemon=True)
        with self._lock:
            if self._closed:
                return
            replacement.record.begin()  # what the lost one left has been read
            self._plan.channel.count_restart()
            self._producers[lost.index] = replacement
            self._replacing = [*(t for t in self._replacing if t.is_alive()), thread]
        thread.start()

    # --------------------------------------------------------------------------------------------------------- ending

    def stop(self, patience: float) -> None:
        """Ends all producers, within little more than ``patience`` seconds. Does nothing in a forked child.

        Args:
            patience: seconds that they get to close their environments, before they are killed.
        """
        if os.getpid() != self._owner:
            return
        self._closing.set()
        self._wake()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(patience + REAP_GRACE)
        self._close_all(patience)

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
        os.close(self._wake_reader)
        writer, self._wake_writer = self._wake_writer, -1
        os.close(writer)

    # -------------------------------------------------------------------------------------------------------- weights

    def update_policy(self, weights: TensorDictBase) -> list[int]:
        """Hands new weights to all producers; returns which took them over in time.

        Those that are being started get them when they are there; one that hangs, or dies, is left out.
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
