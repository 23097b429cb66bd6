"""The learner's end of the gateway: it starts the gateway, sends it commands, and replaces it if it is lost."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from embodichain_rl.cluster.connection import FIRST_PATIENCE
from embodichain_rl.cluster.gateway import GatewayJob, run_gateway
from embodichain_rl.cluster.options import ClusterOptions
from embodichain_rl.cluster.spec import ProducerSpec
from embodichain_rl.cluster.status import ClusterStatus, Word
from embodichain_rl.engine.processes import ChildProcess, starting_processes, unpack_exception
from embodichain_rl.engine.remote import RemoteProducers
from embodichain_rl.engine.state import Phase
from embodichain_rl.engine.workers import WEIGHT_UPDATE_TIMEOUT, Loss, Plan, Producer, would_recur
from embodichain_rl.errors import ClusterConnectionError, WorkerDiedError, WorkerHungError
from embodichain_rl.replay.schema import as_array
from embodichain_rl.shared import Deadline, RunningClock, dumps_for_other_machine

__all__ = ["GatewayLink"]

LOGGER = logging.getLogger("embodichain_rl.cluster")

EXIT_GRACE = 3.0
"""Seconds for the gateway to leave the cluster, after the producers were closed."""

DEATH_INFO = ("RAY_timeout_ms_task_wait_for_death_info", "300")
"""How long Ray waits for the reason of an actor's death, in milliseconds. A raylet tells it; if the raylet is dead too,
the wait is in vain, by default for a second. Ray reads this when it is imported."""

POLL_INTERVAL = 0.02
"""Seconds between two checks of whether a producer has closed its environments, or has acted with new weights."""

ATTEMPTS_PER_GATEWAY = 1 << 20
"""More than there are starts of a producer by one gateway; so each start has a seed of its own."""


class GatewayLink(RemoteProducers):
    """The connection of an engine to a Ray cluster, through a gateway process that is replaced if it is lost.

    Args:
        cluster: the configuration of the cluster.
        plan: the plan of the engine.
        status: the status of its workers.
        seconds: time in which the workers must have started.
    """

    def __init__(self, cluster: ClusterOptions, plan: Plan, status: ClusterStatus, seconds: float) -> None:
        self.cluster = cluster
        self.plan = plan
        self.status = status
        self._seconds = seconds
        self._lock = threading.RLock()
        self._child: ChildProcess | None = None
        self._pipe: Connection | None = None
        self._commands: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._spec_version = 0
        self._gateways = 0
        self._connected_once = False
        self._started: dict[int, int] = {}
        self._sent_version = 0
        self._closing = False
        self._clock = RunningClock()
        self._start_timeout = 0.0
        self.failure: BaseException | None = None
        """Why the cluster is given up; None if it is not."""

    def producer(self, index: int, attempt: int, wake: Callable[[], None]) -> RemoteProducer:
        """Return a producer on a machine of the cluster, which is not started yet."""
        return RemoteProducer(self, index, attempt, wake)

    # ------------------------------------------------------------------------------------------------ the gateway

    def _start_gateway(self) -> None:
        plan, cfg = self.plan, self.plan.cfg
        spec = ProducerSpec.of(plan, self.cluster.message_bytes)
        self._spec_version = self._sent_version = spec.policy_version
        first = not self._connected_once
        patience = min(FIRST_PATIENCE, 0.5 * self._seconds) if first else 0.8 * cfg.initialization_timeout
        self._start_timeout = 0.85 * (self._seconds if first else cfg.initialization_timeout)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._commands = queue.SimpleQueue()
        sender = threading.Thread(
            target=_send_all, args=(self._pipe, self._commands), name="embodichain-rl-gateway-sender", daemon=True
        )
        mark = secrets.token_hex(8)
        job = GatewayJob(
            cluster=self.cluster,
            spec=dumps_for_other_machine(spec),
            policy_version=spec.policy_version,
            storage=plan.storage,
            channel=plan.channel,
            limiter=plan.limiter,
            status=self.status,
            pipe=theirs,
            shutdown_timeout=cfg.shutdown_timeout,
            patience=patience,
            start_timeout=self._start_timeout,
            mark=mark,
        )
        self.status.begin()
        process = context.Process(target=run_gateway, args=(job,), name="embodichain-rl-gateway")
        with starting_processes(), _environment(*DEATH_INFO):
            process.start()
        theirs.close()
        self._child = ChildProcess(process, mark)
        self._gateways += 1
        sender.start()

    def _end_gateway(self, patience: float) -> None:
        if self._child is not None:
            self._child.end(patience, 0.0)
            self._child.close()
            self._child = None
        self._commands.put(None)
        self._pipe = None

    @property
    def waitables(self) -> list[Any]:
        """Objects that are ready when the gateway ends."""
        child = self._child
        return [] if child is None else child.waitables()

    @property
    def building(self) -> bool:
        """Whether no gateway has connected yet."""
        return not self._connected_once

    def check(self) -> None:
        """Replace a gateway that is lost, or set ``failure``. Called by the supervisor several times a second."""
        with self._lock:
            stopping = self._closing or self.plan.channel.stop_requested()
            if self._child is None or stopping or self.failure is not None:
                return
            self._connected_once = self._connected_once or self.status.connected
            error = self._loss()
            if error is None:
                return
            allowed, channel = self.plan.cfg.max_worker_restarts, self.plan.channel
            self._end_gateway(0.0)
            unreachable = not self._connected_once or isinstance(error, ClusterConnectionError)
            if (unreachable and not self.status.connected) or channel.restarts >= allowed:
                self.failure = error
                return
            LOGGER.warning(
                "The gateway to the cluster is lost and is replaced (restart %d of %d): %s: %s",
                channel.restarts + 1,
                allowed,
                type(error).__name__,
                error,
            )
            channel.count_restart()
            self._start_gateway()
            for index, attempt in self._started.items():
                channel.worker(index).begin()
                self._send_start(index, attempt)

    def _loss(self) -> BaseException | None:
        child, pipe = self._child, self._pipe
        assert child is not None
        assert pipe is not None
        if not child.alive():
            with contextlib.suppress(OSError, EOFError):
                if pipe.poll():
                    return unpack_exception(pipe.recv_bytes(), where="the gateway to the cluster")
            return WorkerDiedError(
                f"The gateway to the cluster (process {child.pid}) ended with exit code {child.exit_code()} and "
                "reported no exception: it was killed, or Ray ended it, since this machine's raylet or the head of the "
                "cluster is gone. Its output on stderr may say more."
            )
        silent = self._clock.seconds_since(self.status.last_beat)
        if self.status.connected:
            if silent > self.plan.cfg.worker_timeout:
                return WorkerHungError(
                    f"The gateway to the cluster (process {child.pid}) sent no heartbeat for {silent:.1f} s."
                )
        elif silent > self._start_timeout:
            return ClusterConnectionError(
                f"The Ray cluster at address={self.cluster.address!r} accepts connections, but has not answered for "
                f"{silent:.0f} s. Look whether it is the address of the head of a cluster (`ray status`)."
            )
        return None

    # --------------------------------------------------------------------------------------------------- commands

    def start_producer(self, index: int, attempt: int) -> None:
        """Start a producer, and the gateway if it does not run yet."""
        with self._lock:
            if self.failure is not None or self._closing:
                return
            if self._child is None:
                self._start_gateway()
            self._started[index] = attempt
            self._send_start(index, attempt)

    def _send_start(self, index: int, attempt: int) -> None:
        seed = self.plan.seed(index, attempt + (self._gateways - 1) * ATTEMPTS_PER_GATEWAY)
        self._send("start", index, seed)

    def kill_producer(self, index: int, *, hung: bool) -> None:
        """End a producer at once.

        Args:
            index: the index of the producer.
            hung: whether its machine may be frozen.
        """
        with self._lock:
            self._send("kill", index, hung)

    def send_weights(self, version: int) -> None:
        """Send the weights of the plan to the machines, unless they were sent already."""
        with self._lock:
            if self._sent_version >= version or self._child is None:
                return
            self._sent_version = version
            with self.plan.policy_lock:
                weights = {
                    key: as_array(value.detach().cpu().clone()) for key, value in self.plan.weights().items(True, True)
                }
            self._send("update", weights, version)

    def _send(self, *command: Any) -> None:
        self._commands.put(pickle.dumps(command, protocol=5))

    # --------------------------------------------------------------------------------------------------- stopping

    def closed(self, index: int) -> bool:
        """Return whether a producer has closed its environments, or can't any more."""
        child = self._child
        return bool(self.status.words[index, Word.CLOSED]) or child is None or not child.alive()

    def close(self) -> None:
        """Wait for the gateway, which leaves the cluster when all producers are closed, and end it."""
        self._closing = True
        with self._lock:
            self._end_gateway(EXIT_GRACE)


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for the processes that are started in the ``with`` block, unless it is set."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _send_all(pipe: Connection, commands: queue.SimpleQueue[bytes | None]) -> None:
    """Send commands until there is None. A gateway that connects does not read, so that sending weights may block."""
    while (command := commands.get()) is not None:
        with contextlib.suppress(OSError):  # the gateway has ended, which is noticed soon
            pipe.send_bytes(command)
    pipe.close()


class RemoteProducer(Producer):
    """A producer on a machine of the cluster. The gateway writes its record.

    Args:
        link: the connection to the cluster.
        index: the index of the producer.
        attempt: the number of earlier producers with this index.
        wake: a function that wakes the supervisor.
    """

    def __init__(self, link: GatewayLink, index: int, attempt: int, wake: Callable[[], None]) -> None:
        super().__init__(link.plan, index, attempt, wake)
        self._link = link
        self._was_hung = False

    @property
    def name(self) -> str:
        node = self._link.status.node(self.index)
        where = f" (process {self.record.pid} on {node})" if node and self.record.pid else ""
        return f"worker {self.index}{where}"

    @property
    def pid(self) -> int:
        return 0  # its process is not on this machine

    def start(self) -> None:
        self._link.start_producer(self.index, self.attempt)

    def waitables(self) -> list[Any]:
        return self._link.waitables if self.index == 0 else []

    def loss(self) -> Loss | None:
        self._link.check()
        building = self.record.phase < Phase.BUILT
        if self._link.failure is not None:
            return Loss(self._link.failure, "the cluster", final=True, building=building)
        packed = self.record.reported
        if packed is not None:
            died = isinstance(unpack_exception(packed, where=""), WorkerDiedError)
            return Loss(packed, self.name, not died and would_recur(packed), building)
        hung = self._hung() if self._link.status.connected else None
        if hung is None:
            return None
        self._was_hung = True
        return Loss(hung, self.name, building=building)

    def update_weights(self, version: int) -> bool:
        if self.record.phase < Phase.BUILT:
            self._link.send_weights(version)
            return False
        self._link.send_weights(version)
        deadline = Deadline(WEIGHT_UPDATE_TIMEOUT)
        while self.record.policy_version < version:
            if deadline.passed() or self.lost or self._closing or self.record.reported is not None:
                return False
            time.sleep(POLL_INTERVAL)
        return True

    def close(self, patience: float) -> None:
        self._closing = True
        if self.lost and not self.plan.channel.stop_requested():
            self._link.kill_producer(self.index, hung=self._was_hung)
            return
        deadline = Deadline(patience)
        waits = self.record.phase >= Phase.BUILT
        while waits and not self._link.closed(self.index) and not deadline.passed():
            time.sleep(POLL_INTERVAL)
        self._note_closing(finished=not waits or self._link.closed(self.index))
