"""An engine whose workers, owner or consumers fail; all of them are real processes that really fail."""

from __future__ import annotations

import collections
import gc
import itertools
import multiprocessing
import operator
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clockwork import MisbehavedError, clockwork_engine, order
from loading import iterating
from owning import shared_files_of
from waiting import PATIENCE, wait_for_children, wait_until

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineState
from embodichain_rl.errors import EngineStateError, EngineTimeoutError, WorkerHungError
from embodichain_rl.shared.processes import process_start

pytestmark = pytest.mark.slow

CHUNK = 3


@contextmanager
def running(commands: Path, **settings: Any) -> Iterator[OnlineDataEngine]:
    with clockwork_engine(commands, **settings) as engine:
        yield engine


def worker_pids(engine: OnlineDataEngine) -> list[int]:
    def pids() -> list[int]:
        return [worker["pid"] for worker in engine.stats()["workers"]]

    # One worker may fill the buffer before the other one has started. Killing pid 0 would kill this process.
    wait_until(lambda: all(pids()), what="the start of every worker")
    return pids()


def is_gone(pid: int) -> bool:
    return process_start(pid) < 0


def sample_until(engine: OnlineDataEngine, condition: Any, what: str) -> None:
    """Sample without a pause until the condition holds, at least once."""
    deadline = time.monotonic() + PATIENCE
    while True:
        batch = engine.sample_batch(4, CHUNK)
        # Each chunk has consecutive steps of one episode; otherwise it is torn.
        assert (batch["observation"][:, :, 1].diff() == 1).all()
        assert (batch["observation"][:, :, 0].diff() == 0).all()
        if condition():
            return
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE:g} s"


def pretend_silence(engine: OnlineDataEngine, index: int, seconds: float) -> None:
    """Set the last heartbeat of a hanging worker back, instead of waiting for the timeout.

    A timeout that is short enough for a test would also be missed by healthy workers on a busy machine.
    """
    engine._channel.worker(index)._report_steps(time.monotonic_ns() - int(1.1 * seconds * 1e9))


def traceback_of(error: BaseException) -> str:
    return "\n".join(error.__notes__)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def engine(commands: Path) -> Iterator[OnlineDataEngine]:
    with running(commands, num_workers=2, max_worker_restarts=6) as engine:
        yield engine


class TestWorkerIsLost:
    """Two workers; one of them is lost in each way. No sample fails."""

    def is_replaced_after(self, engine: OnlineDataEngine, provoke: Any) -> list[int]:
        """Sample while a worker is lost and replaced; return the ids of the processes that ended."""
        restarts, before = engine.stats()["restarts"], worker_pids(engine)

        def replaced() -> bool:
            stats = engine.stats()
            return stats["restarts"] == restarts + 1 and all(w["phase"] == "acting" for w in stats["workers"])

        provoke()
        sample_until(engine, replaced, "the worker's replacement")
        lost = set(before) - set(worker_pids(engine))
        assert len(lost) == 1
        wait_until(lambda: all(is_gone(pid) for pid in lost), "the end of the worker's process")
        assert engine.state is OnlineDataEngineState.READY
        return list(lost)

    def test_killed(self, engine: OnlineDataEngine) -> None:
        victim = worker_pids(engine)[0]
        assert self.is_replaced_after(engine, lambda: os.kill(victim, signal.SIGKILL)) == [victim]

    def test_raises_in_step(self, engine: OnlineDataEngine, commands: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.is_replaced_after(engine, lambda: order(commands, "step", "raise"))
        assert "MisbehavedError: misbehaved at step" in caplog.text
        assert "in _obey" in caplog.text  # the worker's traceback

    def test_raises_in_reset(self, engine: OnlineDataEngine, commands: Path) -> None:
        self.is_replaced_after(engine, lambda: order(commands, "reset", "raise"))

    def test_exits(self, engine: OnlineDataEngine, commands: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.is_replaced_after(engine, lambda: order(commands, "step", "exit"))
        assert "ended with exit code 7" in caplog.text

    def test_hangs(self, engine: OnlineDataEngine, commands: Path, caplog: pytest.LogCaptureFixture) -> None:
        files = [commands / f"step-obeyed-by-{pid}" for pid in worker_pids(engine)]

        def hang() -> None:
            order(commands, "step", "hang")
            wait_until(lambda: any(file.exists() for file in files), "a worker that hangs")
            (index,) = (number for number, file in enumerate(files) if file.exists())
            silent = lambda: engine.stats()["workers"][index]["seconds_since_heartbeat"] > 1.0  # noqa: E731
            wait_until(silent, "that its heartbeat is late")
            pretend_silence(engine, index, engine.cfg.worker_timeout)

        self.is_replaced_after(engine, hang)
        assert "sent no heartbeat" in caplog.text

    def test_replacement_raises_where_it_is_built(self, engine: OnlineDataEngine, commands: Path) -> None:
        order(commands, "construct", "raise always")
        victim = worker_pids(engine)[1]
        os.kill(victim, signal.SIGKILL)
        # The sixth restart is the last: the engine fails with what the worker raised.
        with pytest.raises(MisbehavedError, match="misbehaved at construct") as raised:
            sample_until(engine, lambda: False, "the failure")
        assert "in _obey" in traceback_of(raised.value)
        assert "max_worker_restarts=6" in traceback_of(raised.value)
        assert engine.state is OnlineDataEngineState.FAILED
        for _ in range(2):
            with pytest.raises(MisbehavedError):
                engine.check_health()
        wait_for_children()


class TestConsumer:
    """Consumers that sample in other processes."""

    def test_killed_inside_a_sample(self, tmp_path: Path) -> None:
        with running(tmp_path) as engine:
            context = multiprocessing.get_context("forkserver")
            for _ in range(3):
                ready = context.Event()
                consumer = context.Process(target=_sample_for_ever, args=(engine, ready))
                consumer.start()
                assert ready.wait(PATIENCE)
                consumer.kill()
                consumer.join()
                inserted = engine.stats()["inserted"]
                sample_until(engine, lambda n=inserted: engine.stats()["inserted"] > n + 3, "new trajectories")
            assert engine.stats()["restarts"] == 0

    @pytest.mark.parametrize("start_method", ["fork", "forkserver"])
    def test_gets_the_workers_own_exception(self, tmp_path: Path, start_method: str) -> None:
        with running(tmp_path, max_worker_restarts=0) as engine:
            dataset = OnlineDataset(engine, chunk_size=CHUNK, batch_size=4)
            with iterating(dataset, 1, start_method) as batches:
                assert next(batches).shape == (4, CHUNK)
                order(tmp_path, "step", "raise always")
                with pytest.raises(MisbehavedError, match="misbehaved at step"):
                    collections.deque(itertools.islice(batches, 1_000_000), maxlen=0)

    def test_can_only_sample(self, tmp_path: Path) -> None:
        with running(tmp_path) as engine:
            context = multiprocessing.get_context("spawn")
            receiver, sender = context.Pipe(duplex=False)
            consumer = context.Process(target=_try_everything, args=(engine, sender))
            consumer.start()
            assert receiver.poll(PATIENCE)
            answers = receiver.recv()
            consumer.join()
        assert answers == {
            "state": OnlineDataEngineState.READY,
            "start": "EngineStateError",
            "stop": "EngineStateError",
            "sample": [4, CHUNK],
            "simulators": [],
        }


def _sample_for_ever(engine: OnlineDataEngine, ready: Any) -> None:
    while True:
        engine.sample_batch(64, CHUNK)
        ready.set()


def _try_everything(engine: OnlineDataEngine, sender: Any) -> None:
    import sys

    answers: dict[str, Any] = {"state": engine.state}
    for name in ("start", "stop"):
        try:
            getattr(engine, name)()
        except EngineStateError as error:
            answers[name] = type(error).__name__
    answers["sample"] = list(engine.sample_batch(4, CHUNK).shape)
    answers["simulators"] = [
        m for m in ("gymnasium_robotics", "embodichain_rl.engine.environments") if m in sys.modules
    ]
    sender.send(answers)


class TestStart:
    def test_every_worker_raises_where_it_is_built(self, tmp_path: Path) -> None:
        order(tmp_path, "construct", "raise always")
        engine = clockwork_engine(tmp_path, num_workers=2, max_worker_restarts=100)
        with pytest.raises(MisbehavedError, match="misbehaved at construct") as raised:
            engine.start()
        assert "no worker could be started" in traceback_of(raised.value)
        assert engine.state is OnlineDataEngineState.FAILED
        assert engine.stats()["restarts"] < 4
        with pytest.raises(MisbehavedError):
            engine.sample_batch(4, CHUNK)
        engine.stop()
        assert engine.state is OnlineDataEngineState.FAILED
        wait_for_children()

    def test_takes_too_long(self, tmp_path: Path) -> None:
        order(tmp_path, "step", "hang always")
        for seconds in (2.0, 8.0, 32.0, 128.0):  # the shortest in which the worker gets that far on this machine
            engine = clockwork_engine(tmp_path, initialization_timeout=seconds, shutdown_timeout=4.0)
            began = time.monotonic()
            with pytest.raises(TimeoutError) as raised:
                engine.start()
            assert time.monotonic() - began < seconds + PATIENCE  # the worker hangs for an hour
            wait_for_children()
            if re.search(r"worker 0 \(process \d+\) is", str(raised.value)):
                break
        assert isinstance(raised.value, EngineTimeoutError)
        assert re.search(r"0 of buffer_size=4 trajectories: worker 0 \(process \d+\) is", str(raised.value))

    @pytest.mark.parametrize("when", ["while it looks at the environment", "while a worker hangs"])
    def test_is_stopped_by_another_thread(self, tmp_path: Path, when: str) -> None:
        order(tmp_path, "step", "hang always")
        engine = clockwork_engine(tmp_path, shutdown_timeout=4.0)
        if when == "while a worker hangs":
            ready = lambda: engine.stats()["workers"][0]["phase"] == "built"  # noqa: E731
        else:
            ready = lambda: bool(multiprocessing.active_children())  # noqa: E731

        def stop() -> None:
            wait_until(ready)
            engine.stop()

        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(EngineStateError, match="stopped while it was starting"):
            engine.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert engine.state is OnlineDataEngineState.STOPPED
        wait_for_children()


class TestStop:
    def test_while_a_worker_is_in_a_long_step(self, tmp_path: Path) -> None:
        with running(tmp_path, shutdown_timeout=4.0) as engine:
            (pid,) = worker_pids(engine)
            order(tmp_path, "step", "3600")
            wait_until(lambda: list(tmp_path.glob("step-obeyed-by-*")), "the long step")
            began = time.monotonic()
            with pytest.raises(WorkerHungError, match=r"worker 0 .* within shutdown_timeout=4 s"):
                engine.stop()
            assert time.monotonic() - began < PATIENCE  # rather than an hour
            wait_until(lambda: is_gone(pid), "the end of the worker's process")
            engine.stop()
            assert engine.state is OnlineDataEngineState.FAILED
            with pytest.raises(WorkerHungError, match="shutdown_timeout"):
                engine.sample_batch(4, CHUNK)
            with pytest.raises(EngineStateError, match="started only once"):
                engine.start()

    def test_closes_the_environments(self, tmp_path: Path) -> None:
        with running(tmp_path) as engine:
            (pid,) = worker_pids(engine)
        assert (tmp_path / f"closed-{pid}").exists()

    def test_exception_of_the_body_comes_first(self, tmp_path: Path) -> None:
        def body() -> None:
            nonlocal engine, pid
            with running(tmp_path) as engine:
                (pid,) = worker_pids(engine)
                raise ZeroDivisionError

        engine = pid = None
        with pytest.raises(ZeroDivisionError):
            body()
        assert engine.state is OnlineDataEngineState.STOPPED
        assert is_gone(pid)

    def test_ten_engines_one_after_the_other_leave_nothing(self, tmp_path: Path) -> None:
        policy = torch.nn.Linear(2, 1)
        shared_files: set[str] = set()

        def left() -> tuple[int, ...]:
            files = [file for file in shared_files if os.path.exists(file)]
            processes = multiprocessing.active_children()
            return len(os.listdir("/proc/self/fd")), threading.active_count(), len(files), len(processes)

        before: list[tuple[int, ...]] = []
        for _ in range(10):
            with running(tmp_path, policy=policy) as engine:
                engine.update_policy_weights_(policy)
                assert engine.sample_batch(4, CHUNK).shape == (4, CHUNK)
                shared_files |= shared_files_of(os.getpid())
            del engine
            gc.collect()
            assert not multiprocessing.active_children()
            if not before:  # the first engine starts what remains: the fork server and its pipes
                before.append(left())
            # A thread that was told to end takes a moment.
            wait_until(lambda: all(map(operator.le, left(), before[0])), lambda: f"{before[0]} again, not {left()},")
