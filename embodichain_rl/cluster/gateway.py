"""The gateway: a child process of the learner that owns the actors, fetches their messages and writes to the buffer.

It is the only process of the learner's machine that talks to Ray. If the cluster breaks down, it may end in any way,
also from Ray's own code: the learner goes on, and starts another one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from embodichain_rl.cluster.connection import WORKER_NICENESS, ClusterConnection
from embodichain_rl.cluster.inserting import MessageWriter
from embodichain_rl.cluster.messages import MessageFormat, Received, payload_bytes, trajectories
from embodichain_rl.cluster.metrics import ClusterMetrics
from embodichain_rl.cluster.options import ClusterOptions
from embodichain_rl.cluster.resources import needed_resources, places_on, shortage
from embodichain_rl.cluster.status import ClusterStatus, Word
from embodichain_rl.engine.processes import end_process_group, leave_foreground, pack_exception
from embodichain_rl.engine.state import EngineChannel, Phase
from embodichain_rl.errors import ClusterResourcesError, WorkerDiedError
from embodichain_rl.replay.rate_limiter import RateLimiter
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.shared import Deadline

__all__ = ["GatewayJob", "run_gateway"]

LOGGER = logging.getLogger("embodichain_rl.cluster")

TICK = 0.02
"""Seconds that the gateway waits for an answer before it looks for commands."""

INSERTING = 0.05
"""Seconds that it writes to the buffer before it looks for answers and commands."""

STATUS_INTERVAL = 0.5
"""Seconds between two requests for the status of a producer from which no message is requested."""

CHECK_INTERVAL = 0.5
"""Seconds between two checks of the learner's process, the cluster's head and its resources."""

RESOURCE_PATIENCE = 10.0
"""Seconds for which machines with the resources of a worker may be missing, since they may be joining the cluster."""

SUSPICION = 120.0
"""Seconds for which no worker is placed on a machine where one hung. Ray notices a frozen machine after 65 s."""


@dataclass
class GatewayJob:
    """What a gateway is given.

    Args:
        cluster: the configuration of the cluster.
        spec: a pickled :class:`~embodichain_rl.cluster.spec.ProducerSpec`.
        policy_version: the version of the weights in it.
        storage: the storage of the engine.
        channel: the channel of the engine.
        limiter: its rate limiter; None means no pacing.
        status: the status of the workers.
        pipe: commands of the learner; to it goes the exception with which the gateway ends.
        shutdown_timeout: seconds in which the environments are closed.
        patience: seconds in which the cluster must answer.
        start_timeout: seconds in which each worker must start.
        mark: what marks the programs that the gateway starts.
    """

    cluster: ClusterOptions
    spec: bytes
    policy_version: int
    storage: TrajectoryStorage
    channel: EngineChannel
    limiter: RateLimiter | None
    status: ClusterStatus
    pipe: Connection
    shutdown_timeout: float
    patience: float
    start_timeout: float
    mark: str


def run_gateway(job: GatewayJob) -> None:
    """Run a gateway until the engine stops or the cluster is lost."""
    leave_foreground(job.mark)
    threading.Thread(target=_end_with_owner, args=(job,), name="embodichain-rl-owner-watch", daemon=True).start()
    try:
        Gateway(job).run()
    except BaseException as error:
        with contextlib.suppress(OSError):
            job.pipe.send_bytes(pack_exception(error))
        LOGGER.debug("The gateway ended", exc_info=error)
        os._exit(1)
    os._exit(0)  # Ray's threads may not end


_left_alone: list[Gateway] = []


def _end_with_owner(job: GatewayJob) -> None:
    while job.channel.owner_is_alive():
        time.sleep(0.1)
    for gateway in _left_alone:
        gateway.abandon()
    end_process_group()


class _Remote:
    """One producer, as the gateway sees it."""

    def __init__(self, gateway: Gateway, index: int) -> None:
        self.index = index
        self.record = gateway.job.channel.worker(index)
        self.writer = MessageWriter(self.record, gateway.job.limiter, gateway.job.storage)
        self.actor: Any = None
        self.calls: dict[Any, str] = {}
        self.inbox: deque[Iterator[Received]] = deque()
        self.next: Received | None = None
        self.snapshot: dict[str, Any] | None = None
        self.asked_at = 0.0
        self.started_at = time.monotonic()
        self.node = ""
        self.held_there = False
        self.lost = False

    def requested(self, what: str) -> int:
        return sum(kind == what for kind in self.calls.values())

    @property
    def in_flight(self) -> int:
        return self.requested("next") + len(self.inbox)


class Gateway:
    """Owns the actors of the producers of one engine; see the module.

    Args:
        job: what it is given.
        actor_class: the class of the actors, a :class:`~embodichain_rl.cluster.producer.ProducerActor`; None is that.
    """

    def __init__(self, job: GatewayJob, actor_class: type | None = None) -> None:
        self.job = job
        self._actor_class = actor_class
        self._format = MessageFormat.of(job.storage)
        self._remotes: dict[int, _Remote] = {}
        self._weights: tuple[Any, int] | None = None
        self._suspected: dict[str, float] = {}
        self._checked_at = 0.0
        self._missing_since: float | None = None

    def run(self) -> None:
        """Connect to the cluster, and serve the engine until it stops."""
        self._connect()
        _left_alone.append(self)
        self.job.status.connected = True
        self.job.status.beat()
        while not self.job.channel.stop_requested():
            self.job.status.beat()
            self._check()
            self._obey()
            written = self._insert()
            self._request()
            self._wait(0.0 if written else TICK)
        self._stop()

    # ------------------------------------------------------------------------------------------------- the cluster

    def _connect(self) -> None:
        cluster = self.job.cluster
        self._connection = ClusterConnection(cluster, self.job.patience, self._end_if_stopped)
        self._ray: Any = self._connection.ray  # its types know no concurrency groups
        from embodichain_rl.cluster.producer import CONCURRENCY_GROUPS, ProducerActor

        options = {**cluster.actor_options, "max_restarts": 0, "max_task_retries": 0}
        remote = self._ray.remote(concurrency_groups=CONCURRENCY_GROUPS, **options)
        self._class = remote(self._actor_class or ProducerActor)
        self._spec = self._ray.put(self.job.spec)
        self._metrics = ClusterMetrics(self.job.status)

    def _end_if_stopped(self) -> None:
        self.job.status.beat()
        if self.job.channel.stop_requested():
            raise SystemExit

    def _check(self) -> None:
        lost = self._connection.lost()
        if lost is not None:
            self.abandon()
            raise lost
        now = time.monotonic()
        if now - self._checked_at < CHECK_INTERVAL:
            return
        self._checked_at = now
        self._metrics.report()
        waiting = [remote for remote in self._remotes.values() if remote.snapshot is None and not remote.lost]
        if waiting:
            self._check_resources(waiting, now)

    def _check_resources(self, waiting: list[_Remote], now: float) -> None:
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        needed = needed_resources(self.job.cluster.actor_options)
        room = sum(places_on(node["Resources"], needed) for node in nodes)
        head, workers = self._connection.head, len(self._remotes)
        if room >= workers:
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
            LOGGER.warning("%s The workers wait for more machines.", shortage(head, room, workers, needed, nodes))
        missing = self._missing_since is not None and not self.job.cluster.autoscaling
        patience = min(RESOURCE_PATIENCE, self.job.start_timeout / 2)
        for remote in waiting:
            late = now - remote.started_at > self.job.start_timeout
            if late or (missing and now - (self._missing_since or now) > patience):
                text = shortage(head, room, workers, needed, nodes)
                if late and room >= workers:
                    free = {name: amount for name, amount in self._ray.available_resources().items() if name in needed}
                    text = (
                        f"The cluster at {head} did not start worker {remote.index} within "
                        f"{self.job.start_timeout:.0f} s. Each worker needs {needed}, and {free} is free. By default, "
                        "Ray's workers have a niceness of 15: if other programs keep a machine busy, start Ray there "
                        f"with the environment variable {WORKER_NICENESS}=0."
                    )
                self._lose(remote, ClusterResourcesError(f"{text} Ask for less, or lower num_workers."))

    # ---------------------------------------------------------------------------------------------------- commands

    def _obey(self) -> None:
        while self.job.pipe.poll():
            command, *arguments = pickle.loads(self.job.pipe.recv_bytes())
            getattr(self, f"_{command}")(*arguments)

    def _start(self, index: int, seed: int) -> None:
        self._kill(index, False)
        remote = self._remotes[index] = _Remote(self, index)
        options: dict[str, Any] = {}
        now = time.monotonic()
        self._suspected = {node: since for node, since in self._suspected.items() if now - since < SUSPICION}
        if self._suspected and "label_selector" not in self.job.cluster.actor_options:
            others = [node for node in self._ray.nodes() if node["Alive"] and node["NodeID"] not in self._suspected]
            needed = needed_resources(self.job.cluster.actor_options)
            if sum(places_on(node["Resources"], needed) for node in others):
                options["label_selector"] = {"ray.io/node-id": f"!in({','.join(self._suspected)})"}
        version = 0 if self._weights is None else self._weights[1]
        remote.actor = self._class.options(**options).remote(self._spec, index, seed, sys.path, version)
        if self._weights is not None:
            self._send_weights(remote)

    def _kill(self, index: int, suspect: bool) -> None:
        remote = self._remotes.pop(index, None)
        if remote is None:
            return
        if suspect and remote.node:
            self._suspected[remote.node] = time.monotonic()
        self._end_actor(remote)

    def _end_actor(self, remote: _Remote) -> None:
        remote.calls.clear()
        remote.inbox.clear()
        with contextlib.suppress(Exception):
            self._ray.kill(remote.actor, no_restart=True)

    def _update(self, arrays: dict[Any, Any], version: int) -> None:
        self._weights = self._ray.put(arrays), version
        for remote in self._remotes.values():
            if not remote.lost:
                self._send_weights(remote)

    def _send_weights(self, remote: _Remote) -> None:
        assert self._weights is not None
        remote.calls[remote.actor.set_weights.remote(*self._weights)] = "weights"

    # --------------------------------------------------------------------------------------------------- messages

    def _request(self) -> None:
        now = time.monotonic()
        held = self.job.channel.held or self.job.channel.owner_is_stopped()
        for remote in self._remotes.values():
            if remote.lost:
                continue
            while remote.in_flight < self.job.cluster.in_flight:
                remote.calls[remote.actor.next.remote()] = "next"
            quiet = not remote.requested("next") and now - remote.asked_at >= STATUS_INTERVAL
            if (quiet or held != remote.held_there) and not remote.requested("status"):
                remote.asked_at, remote.held_there = now, held
                remote.calls[remote.actor.status.remote(held)] = "status"
            self.job.status.words[remote.index, Word.IN_FLIGHT] = remote.in_flight

    def _wait(self, seconds: float) -> None:
        calls = {call: remote for remote in self._remotes.values() for call in remote.calls}
        if not calls:
            time.sleep(seconds)
            return
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=seconds)
        if ready and len(calls) > 1:
            ready, _ = self._ray.wait(list(calls), num_returns=len(calls), timeout=0.0)
        for call in ready:
            remote = calls[call]
            if call in remote.calls:  # else it was lost meanwhile
                self._take(remote, call, remote.calls.pop(call))

    def _take(self, remote: _Remote, call: Any, kind: str) -> None:
        try:
            answer = self._ray.get(call)
        except Exception as error:  # of Ray: the actor or its machine is lost, whatever it is called
            self._lose(remote, self._death_of(remote, error))
            return
        if kind == "weights":
            remote.record.used_policy(answer)
            if remote.snapshot is not None:
                remote.snapshot["policy_version"] = answer
            return
        snapshot, message = answer if kind == "next" else (answer, None)
        if remote.snapshot is None:
            remote.node = snapshot["node_id"]
            self.job.status.set_node(remote.index, f"{snapshot['node']} ({remote.node[:8]})")
        remote.record.mirror(snapshot, remote.snapshot)
        remote.snapshot = snapshot
        if snapshot["reported"] is not None:  # the engine replaces it, and its record belongs to the next one then
            remote.lost = True
            self.job.status.set_node(remote.index, "")
            remote.calls.clear()
            return
        if message is None:
            return
        words = self.job.status.words[remote.index]
        words[Word.BYTES] += payload_bytes(message)
        words[Word.MESSAGES] += 1
        remote.inbox.append(self._received(message, time.monotonic()))

    def _received(self, message: dict[str, Any], received_at: float) -> Iterator[Received]:
        texts = self.job.storage.texts
        with texts.held():  # until its last trajectory is published
            for trajectory in trajectories(message, self._format, texts):
                yield trajectory._replace(age=trajectory.age - received_at)

    def _death_of(self, remote: _Remote, error: Exception) -> WorkerDiedError:
        pid = f" (process {remote.snapshot['pid']} on {remote.snapshot['node']})" if remote.snapshot else ""
        return WorkerDiedError(f"worker {remote.index}{pid} is lost: {type(error).__name__}: {error}")

    def _lose(self, remote: _Remote, error: Exception) -> None:
        remote.lost, remote.next = True, None
        self.job.status.set_node(remote.index, "")
        self._end_actor(remote)
        remote.record.report(error)

    def _insert(self) -> bool:
        """Write trajectories in turns, one of each producer, and return whether any was written."""
        end = time.monotonic() + INSERTING
        written, progress, waiting = False, True, False
        while progress and time.monotonic() < end:
            progress = False
            for remote in self._remotes.values():
                if remote.lost:
                    continue
                trajectory = remote.next = remote.next or self._next_of(remote)
                if trajectory is None:
                    continue
                if not remote.writer.has_turn():
                    waiting = True
                    continue
                try:
                    remote.writer.insert(trajectory)
                except Exception as error:  # the buffer refuses it, as it would refuse one of a worker here
                    self._lose(remote, error)
                    continue
                lag = time.monotonic() + trajectory.age
                self.job.status.words[remote.index, Word.LAG] = int(1e9 * lag)
                remote.next = self._next_of(remote)
                written = progress = True
        if waiting and not written and self.job.limiter is not None:
            self.job.limiter.wait_to_insert(TICK)  # counts a producer that waits
        return written

    def _next_of(self, remote: _Remote) -> Received | None:
        while remote.inbox:
            try:
                for trajectory in remote.inbox[0]:
                    return trajectory
            except Exception as error:
                self._lose(remote, error)
                return None
            remote.inbox.popleft()
        return None

    # ----------------------------------------------------------------------------------------------------- stopping

    def _stop(self) -> None:
        """Let the producers close their environments, then end their actors."""
        deadline = Deadline(self.job.shutdown_timeout)
        stopping = {}
        for remote in self._remotes.values():
            if remote.snapshot is not None and remote.snapshot["phase"] >= Phase.BUILT and not remote.lost:
                stopping[remote.actor.stop.remote()] = remote
            else:
                self.job.status.words[remote.index, Word.CLOSED] = 1
        while stopping and not deadline.passed():
            ready, _ = self._ray.wait(list(stopping), num_returns=1, timeout=deadline.slice())
            for call in ready:
                remote = stopping.pop(call)
                with contextlib.suppress(Exception):  # it died: its record says so, or nobody asks any more
                    remote.record.mirror(self._ray.get(call), remote.snapshot)
                self.job.status.words[remote.index, Word.CLOSED] = 1
        for remote in self._remotes.values():
            self._end_actor(remote)
        self._ray.shutdown()

    def abandon(self) -> None:
        """Tell all actors to end at once; this needs only the machines on which they are."""
        for remote in list(self._remotes.values()):
            if remote.actor is not None and not remote.lost:
                with contextlib.suppress(Exception):
                    remote.actor.leave.remote()
        time.sleep(0.2)
