"""What an engine does when its workers, its owner or its consumers fail; with real processes, each failing for real."""

from __future__ import annotations

import collections
import gc
import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from clockwork import MisbehavedError, clockwork_engine, order, wait_until
from loading import iterating
from owning import shared_files_of

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineState
from embodichain_rl.errors import EngineStateError, EngineTimeoutError
from embodichain_rl.shared.processes import process_start

CHUNK = 3


@contextmanager
def running(commands: Path, **settings: Any) -> Iterator[OnlineDataEngine]:
    with clockwork_engine(commands, **settings) as engine:
        yield engine


def worker_pids(engine: OnlineDataEngine) -> list[int]:
    def pids() -> list[int]:
        return [worker["pid"] for worker in engine.stats()["workers"]]

    # One worker may have filled the buffer before the other was there. To kill process 0 would be to kill ourselves.
    wait_until(lambda: all(pids()), what="the start of every worker")
    return pids()


def is_gone(pid: int) -> bool:
    return process_start(pid) < 0


def sampled_until(engine: OnlineDataEngine, condition: Any, seconds: float = 60.0) -> int:
    """Samples without a pause until the condition holds; returns how many batches that were."""
    batches = 0
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        batch = engine.sample_batch(4, CHUNK)
        # The chunk is one piece of one episode, or what was sampled is torn.
        assert (batch["observation"][:, :, 1].diff() == 1).all()
        assert (batch["observation"][:, :, 0].diff() == 0).all()
        batches += 1
    return batches


def traceback_of(error: BaseException) -> str:
    return "\n".join(error.__notes__)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def engine(commands: Path) -> Iterator[OnlineDataEngine]:
    with running(commands, num_workers=2, max_worker_restarts=6, worker_timeout=2.0) as engine:
        yield engine


class TestWorkerIsLost:
    """Two workers, one after another lost in every way: training goes on without a failed sample."""

    def is_replaced_after(self, engine: OnlineDataEngine, provoke: Any) -> list[int]:
        """Samples while a worker is lost and replaced; returns the ids that are gone."""
        restarts, before = engine.stats()["restarts"], worker_pids(engine)

        def replaced() -> bool:
            stats = engine.stats()
            return stats["restarts"] == restarts + 1 and all(w["phase"] == "acting" for w in stats["workers"])

        provoke()
        assert sampled_until(engine, replaced) > 0
        lost = set(before) - set(worker_pids(engine))
        assert len(lost) == 1
        wait_until(lambda: all(is_gone(pid) for pid in lost), 5.0)
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
        self.is_replaced_after(engine, lambda: order(commands, "step", "hang"))
        assert "sent no heartbeat" in caplog.text

    def test_replacement_raises_where_it_is_built(self, engine: OnlineDataEngine, commands: Path) -> None:
        order(commands, "construct", "raise always")
        victim = worker_pids(engine)[1]
        os.kill(victim, signal.SIGKILL)
        # The sixth restart is the last: the engine fails with what the worker raised.
        with pytest.raises(MisbehavedError, match="misbehaved at construct") as raised:
            sampled_until(engine, lambda: False)
        assert "in _obey" in traceback_of(raised.value)
        assert "max_worker_restarts=6" in traceback_of(raised.value)
        assert engine.state is OnlineDataEngineState.FAILED
        for _ in range(2):
            with pytest.raises(MisbehavedError):
                engine.check_health()
        wait_until(lambda: not multiprocessing.active_children(), 10.0)


class TestConsumer:
    """Others sample in processes of their own."""

    def test_killed_inside_a_sample(self, tmp_path: Path) -> None:
        with running(tmp_path) as engine:
            context = multiprocessing.get_context("forkserver")
            for _ in range(3):
                ready = context.Event()
                consumer = context.Process(target=_sample_for_ever, args=(engine, ready))
                consumer.start()
                assert ready.wait(60.0)
                consumer.kill()
                consumer.join()
                inserted = engine.stats()["inserted"]
                assert sampled_until(engine, lambda n=inserted: engine.stats()["inserted"] > n + 3, 10.0) > 0
            assert engine.stats()["restarts"] == 0

    @pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
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
            assert receiver.poll(60.0)
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
    answers["simulators"] = [m for m in ("gymnasium_robotics", "embodichain_rl.engine.envs") if m in sys.modules]
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
        assert not multiprocessing.active_children()

    def test_takes_too_long(self, tmp_path: Path) -> None:
        order(tmp_path, "step", "hang always")
        engine = clockwork_engine(tmp_path)
        engine.cfg.initialization_timeout = 8.0
        began = time.monotonic()
        with pytest.raises(EngineTimeoutError, match=r"0 of buffer_size=4 trajectories: worker 0 \(process \d+\) is"):
            engine.start()
        assert time.monotonic() - began < 8.0 + 8.0
        assert not multiprocessing.active_children()

    @pytest.mark.parametrize("when", ["while it looks at the environment", "while a worker hangs"])
    def test_is_stopped_by_another_thread(self, tmp_path: Path, when: str) -> None:
        order(tmp_path, "step", "hang always")
        engine = clockwork_engine(tmp_path)
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
        thread.join(10.0)
        assert not thread.is_alive()
        assert engine.state is OnlineDataEngineState.STOPPED
        wait_until(lambda: not multiprocessing.active_children(), 5.0)


class TestStop:
    def test_while_a_worker_is_in_a_long_step(self, tmp_path: Path) -> None:
        with running(tmp_path, shutdown_timeout=4.0, worker_timeout=60.0) as engine:
            (pid,) = worker_pids(engine)
            order(tmp_path, "step", "10")
            wait_until(lambda: list(tmp_path.glob("step-obeyed-by-*")))
            began = time.monotonic()
            engine.stop()
            assert time.monotonic() - began < 4.0
            assert is_gone(pid)
            engine.stop()
            assert engine.state is OnlineDataEngineState.STOPPED
            with pytest.raises(EngineStateError, match="stopped and can't be restarted"):
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
        counts = []
        shared_files: set[str] = set()
        for _ in range(10):
            with running(tmp_path, policy=policy) as engine:
                engine.update_policy_weights_(policy)
                assert engine.sample_batch(4, CHUNK).shape == (4, CHUNK)
                shared_files |= shared_files_of(os.getpid())
            del engine
            gc.collect()
            files = [file for file in shared_files if os.path.exists(file)]
            counts.append((len(os.listdir("/proc/self/fd")), threading.active_count(), len(files)))
            assert not multiprocessing.active_children()
        # The first one brings what stays: the server that workers are forked from, its pipes.
        assert len(set(counts[1:])) == 1, counts
