"""The actor of one producer: today's worker on a thread of the actor's process, with an outbox in the buffer's place.

Only the gateway and the actors import this module, since it imports Ray. The methods are in concurrency groups of their
own, so that none waits behind another: messages, weights and control.
"""

from __future__ import annotations

import logging
import os
import pickle
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from tensordict import TensorDict

from embodichain_rl.cluster.messages import MessageFormat
from embodichain_rl.cluster.outbox import Outbox, OutboxWriter
from embodichain_rl.cluster.spec import ProducerSpec
from embodichain_rl.engine.processes import MARK, kill_marked
from embodichain_rl.engine.state import EngineChannel, WorkerRecord
from embodichain_rl.engine.workers import (
    DemonstrationCollector,
    EnterWorker,
    ProducerStopped,
    SupervisedCollector,
    WorkerDemonstrations,
    reporting,
)
from embodichain_rl.replay.buffer import TrajectoryReplayBuffer
from embodichain_rl.replay.schema import as_array
from embodichain_rl.shared import LONGEST_SLICE, RunningClock

__all__ = ["CONCURRENCY_GROUPS", "ProducerActor", "weights_as_arrays"]

LOGGER = logging.getLogger("embodichain_rl.cluster")

CONCURRENCY_GROUPS = {"messages": 1, "weights": 1, "control": 2}
"""The threads of each group of methods. One thread gives out the messages, so that they keep their order."""

MESSAGE_INTERVAL = 1.0
"""Seconds after which a request for a message is answered, also if it is not complete, or empty."""

SWAP_POLL_INTERVAL = 0.01
"""Seconds between two checks of whether new weights were swapped in."""

ORPHAN_TIMEOUT = 120.0
"""Seconds without any call from the gateway after which the process ends itself. Usually Ray ends it much earlier."""


class ProducerActor:
    """A producer on a machine of the cluster.

    Args:
        spec: a pickled :class:`ProducerSpec`.
        index: the index of the producer.
        seed: the seed of its environments and of its process.
        paths: where the learner finds modules. Those that exist here too are searched last.
        version: the version of the weights that it waits for before its first step. Those in ``spec`` may be older.
    """

    def __init__(self, spec: bytes, index: int, seed: int, paths: Sequence[str], version: int) -> None:
        sys.path += [path for path in paths if path not in sys.path and os.path.isdir(path)]
        self._channel = EngineChannel(1)
        self._record = self._channel.worker(0)
        self._record.begin()
        self._outbox: Outbox | None = None
        self._collector: Any = None
        self._weights = _Weights(self._record)
        self._first_version = version
        self._ended = threading.Event()
        self._has_outbox = threading.Event()
        self._called_at = time.monotonic()
        context = ray.get_runtime_context()
        self._place = {"node_id": context.get_node_id(), "node": ray.util.get_node_ip_address()}
        self._mark = os.environ[MARK] = secrets.token_hex(8)
        threading.Thread(
            target=self._run, args=(spec, index, seed), name="embodichain-rl-producer", daemon=True
        ).start()
        threading.Thread(target=self._end_as_orphan, name="embodichain-rl-orphan-watch", daemon=True).start()

    # ------------------------------------------------------------------------------------------------ the worker

    def _run(self, spec: bytes, index: int, seed: int) -> None:
        try:
            with reporting(self._record):
                self._collect(pickle.loads(spec), index, seed)
        except ProducerStopped:
            pass
        except BaseException as error:
            LOGGER.debug("Producer %d ended", index, exc_info=error)  # reported; the engine logs it
        finally:
            if self._collector is not None:
                self._collector.shutdown(raise_on_error=False)
            self._ended.set()
            self._has_outbox.set()
            if self._outbox is not None:
                self._outbox.close()

    def _collect(self, spec: ProducerSpec, index: int, seed: int) -> None:
        storage = spec.make_storage()
        self._outbox = Outbox(MessageFormat.of(storage), storage.texts, spec.message_bytes)
        self._has_outbox.set()
        writer = OutboxWriter(
            self._record,
            self._outbox,
            accept=spec.accept_filter(index),
            entry=_EnterActor(seed, 0.0, self._mark),
            source=spec.source,
            between_steps=self._weights.swap,
        )
        buffer = TrajectoryReplayBuffer(storage=storage, writer=writer, chunk_size=1)
        envs = spec.envs(index, seed)
        if isinstance(envs, WorkerDemonstrations):
            self._collector = DemonstrationCollector(envs, replay_buffer=buffer)
        else:
            policy = spec.policy if spec.policy_factory is None else spec.policy_factory()
            self._weights.policy, self._weights.version = spec.policy, spec.policy_version
            self._record.used_policy(spec.policy_version)
            self._collector = SupervisedCollector(
                envs,
                policy,
                frames_per_batch=spec.frames_per_batch,
                total_frames=-1,
                replay_buffer=buffer,
                trajs_per_batch=1,
                auto_register_policy_transforms=False,
            )
            self._collector.interruptor = _BetweenSteps(self._collector.interruptor, self._weights)
            self._wait_for_weights()
        for _ in self._collector:
            if self._channel.stop_requested():
                raise ProducerStopped(0)

    def _wait_for_weights(self) -> None:
        while self._weights.policy is not None and self._weights.version < self._first_version:
            self._record.beat()
            if self._channel.stop_requested():
                raise ProducerStopped(0)
            time.sleep(SWAP_POLL_INTERVAL)
            self._weights.swap()

    def _end_as_orphan(self) -> None:
        clock, raylet = RunningClock(), os.getppid()
        # Ray itself looks for its raylet every second only, and the engine should replace this producer soon.
        while os.getppid() == raylet and clock.seconds_since(self._called_at) < ORPHAN_TIMEOUT:
            time.sleep(LONGEST_SLICE)
        self._leave()

    def _snapshot(self) -> dict[str, Any]:
        return {**self._record.snapshot(), **self._place}

    def _leave(self) -> None:
        kill_marked(self._mark)
        os._exit(0)

    # ------------------------------------------------------------------------------------------------- its methods

    @ray.method(concurrency_group="messages")
    def next(self) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Return the status of the producer and its next message, after one second at the latest."""
        self._called_at = time.monotonic()
        end = time.monotonic() + MESSAGE_INTERVAL
        message = None
        if self._has_outbox.wait(MESSAGE_INTERVAL) and self._outbox is not None:
            message = self._outbox.take(max(0.0, end - time.monotonic()))
        if self._ended.is_set() and message is None:
            time.sleep(LONGEST_SLICE)  # the engine learns of it from this answer
        self._called_at = time.monotonic()
        return self._snapshot(), message

    @ray.method(concurrency_group="control")
    def status(self, held: bool) -> dict[str, Any]:
        """Return the status of the producer.

        Args:
            held: whether it pauses after its current step.
        """
        self._called_at = time.monotonic()
        self._channel.held = held
        return self._snapshot()

    @ray.method(concurrency_group="control")
    def stop(self) -> dict[str, Any]:
        """Close the environments, and return the last status."""
        self._channel.request_stop()
        while not self._ended.wait(LONGEST_SLICE):
            self._called_at = time.monotonic()
        kill_marked(self._mark)
        return self._snapshot()

    @ray.method(concurrency_group="control")
    def leave(self) -> None:
        """End the process at once."""
        self._leave()

    @ray.method(concurrency_group="weights")
    def set_weights(self, arrays: dict[Any, np.ndarray], version: int) -> int:
        """Let the policy act with other weights from its next step on, and return the version that it acts with.

        Args:
            arrays: by key the parameters and buffers, see :func:`weights_as_arrays`.
            version: their version.
        """
        self._weights.give(arrays, version)
        while self._weights.version < version and not self._ended.wait(SWAP_POLL_INTERVAL):
            self._called_at = time.monotonic()
        return self._weights.version


class _EnterActor(EnterWorker):
    """The initialisation of a producer in an actor, whose process is Ray's."""

    def __call__(self, record: WorkerRecord) -> None:
        self.begin_building(record)


class _Weights:
    """The newest weights that a producer was given, which are swapped in between two steps."""

    def __init__(self, record: WorkerRecord) -> None:
        self.policy: torch.nn.Module | None = None
        self.version = 0
        self._record = record
        self._new: tuple[dict[Any, np.ndarray], int] | None = None

    def give(self, arrays: dict[Any, np.ndarray], version: int) -> None:
        self._new = arrays, version

    def swap(self) -> None:
        """Swap in what was given, if anything was. Called by the thread that takes the steps."""
        if self._new is None or self.policy is None:
            return
        (arrays, version), self._new = self._new, None
        current = TensorDict.from_module(self.policy).data
        for key, array in arrays.items():
            np.copyto(as_array(current.get(key)), array)  # which torch would not read: the array can't be written
        self._record.used_policy(version)
        self.version = version


class _BetweenSteps:
    """What the collector calls after every step: it swaps in new weights, and sends heartbeats as usual."""

    def __init__(self, heart: Any, weights: _Weights) -> None:
        self._heart, self._weights = heart, weights

    def collection_stopped(self) -> bool:
        self._weights.swap()
        stopped: bool = self._heart.collection_stopped()
        return stopped


def weights_as_arrays(weights: Any) -> dict[Any, np.ndarray]:
    """Return the weights of a policy as arrays by key, for :meth:`ProducerActor.set_weights`."""
    return {key: as_array(value.detach().cpu().contiguous()) for key, value in weights.items(True, True)}
