"""The protocol between reads and writes: every batch is intact, in whatever order the streams run."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated_device import UPLOADS, SimulatedDevice
from steps import check_chunk, check_trajectory, contents, make_buffer, numbers_of, small
from tensordict import TensorDict
from waiting import PATIENCE

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import EmptyBufferError, StagingTimeoutError
from embodichain_rl.replay.device import staging
from embodichain_rl.replay.device.uploader import Uploader
from embodichain_rl.replay.ledger.invariants import check_ledger

STREAMS = ("default", "side")


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run uploads when the test calls ``advance`` instead of on a thread; writers do not wait for them."""
    monkeypatch.setattr(staging, "WAIT_FOR_ROOM", 0.0)
    monkeypatch.setattr(Uploader, "start", lambda self: None)


class Process:
    """A storage and its device. The test decides when each operation runs."""

    def __init__(self) -> None:
        self.device = SimulatedDevice(eager=False)
        storage = TrajectoryStorage(3, 24, device=self.device)  # type: ignore[arg-type]
        self.rb: TrajectoryReplayBuffer = make_buffer(storage=storage, chunk_size=2, batch_size=4)
        self.uploader: Uploader = storage._memory._uploader  # type: ignore[union-attr,assignment]
        self.batches: list[TensorDict] = []
        self.next_number = 0

    def _new(self, length: int) -> TensorDict:
        self.next_number += 1
        return small(self.next_number, length)

    def write(self, length: int) -> None:
        """Write as another process does, through the ring."""
        self.device.direct = False
        with contextlib.suppress(StagingTimeoutError):  # if too many uploads are pending
            self.rb.extend(self._new(length))

    def write_directly(self, stream: str, lengths: list[int]) -> None:
        self.device.direct = True
        with self.device.using(stream), contextlib.suppress(StagingTimeoutError):  # if pending uploads hold all space
            self.rb.extend(torch.cat([self._new(length) for length in lengths]))

    def sample(self, stream: str) -> None:
        with self.device.using(stream), contextlib.suppress(EmptyBufferError):
            self.batches.append(self.rb.sample())

    def step(self, stream: str) -> None:
        self.device.step(stream)

    def advance(self) -> None:
        self.uploader.advance()

    def churn(self, count: int) -> None:
        """Write, upload and publish immediately, as far as no other stream must run first."""
        for _ in range(count):
            self.write(6)
            self.advance()
            while self.device.step(UPLOADS):
                pass
            self.advance()

    def interrupt_with(self, count: int, later: int) -> None:
        """Churn ``count`` times before an operation is enqueued, after ``later`` more operations."""
        left = later

        def interrupt() -> None:
            nonlocal left
            if left:
                left -= 1
                self.device.interrupt = interrupt
            else:
                self.churn(count)

        self.device.interrupt = interrupt

    def finish(self) -> None:
        self.device.interrupt = None
        for _ in range(100):
            self.device.finish()
            self.advance()


ACTIONS = st.one_of(
    st.tuples(st.just("write"), st.integers(2, 9)),
    st.tuples(st.just("write_directly"), st.sampled_from(STREAMS), st.lists(st.integers(2, 9), min_size=1, max_size=3)),
    st.tuples(st.just("sample"), st.sampled_from(STREAMS)),
    st.tuples(st.just("step"), st.sampled_from((*STREAMS, UPLOADS))),
    st.tuples(st.just("advance")),
    st.tuples(st.just("churn"), st.integers(1, 4)),
    st.tuples(st.just("interrupt_with"), st.integers(1, 4), st.integers(0, 6)),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(actions=st.lists(ACTIONS, min_size=10, max_size=40))
def test_every_batch_is_intact_in_every_order(by_hand: None, actions: list[tuple[Any, ...]]) -> None:
    process = Process()
    for name, *arguments in actions:
        getattr(process, name)(*arguments)
    process.finish()
    for batch in process.batches:
        check_chunk(batch)
    check_ledger(process.rb.storage.ledger)
    live = [number for number, _ in contents_at_rest(process)]
    assert len(live) == len(process.rb) <= 3


def contents_at_rest(process: Process) -> list[tuple[int, int]]:
    process.device.eager = True
    return contents(process.rb)


class TestOneByOne:
    """The same protocol, one hazard per test."""

    @pytest.fixture
    def process(self, by_hand: None) -> Process:
        process = Process()
        process.churn(3)
        return process

    def test_an_upload_waits_for_reads_of_the_steps_it_overwrites(self, process: Process) -> None:
        process.sample("side")
        drawn = process.rb.storage.ledger.live_range()[0]
        process.churn(8)
        assert process.device.waiting(UPLOADS)  # it waits for a gather that has not started
        assert process.device.waiting("side")
        process.finish()
        check_chunk(process.batches[0])
        assert process.rb.storage.ledger.live_range()[0] > drawn + 3

    def test_an_upload_is_published_after_its_copies(self, process: Process) -> None:
        process.write(9)
        process.advance()
        before = contents_of_ledger(process)
        for _ in range(3):
            process.advance()
            assert contents_of_ledger(process) == before
        process.finish()
        assert contents_of_ledger(process) == (before[0] + 1, before[1] + 1)

    def test_reads_on_other_streams_wait_for_direct_writes(self, process: Process) -> None:
        process.write_directly("default", [8, 8, 8])
        process.sample("side")
        while process.device.step("side"):
            pass
        assert process.device.waiting("side")
        process.finish()
        check_chunk(process.batches[0])
        assert set(numbers_of(process.batches[0])) <= {4, 5, 6}

    def test_direct_writes_wait_for_reads_on_other_streams(self, process: Process) -> None:
        process.sample("side")
        for _ in range(3):
            process.write_directly("default", [8, 8, 8])
        while process.device.step("default"):
            pass
        assert process.device.waiting("default")
        process.finish()
        check_chunk(process.batches[0])

    def test_uploads_wait_for_direct_writes_to_the_same_steps(self, process: Process) -> None:
        process.write_directly("side", [8, 8, 8])
        for _ in range(8):
            process.churn(1)
        assert process.device.waiting("side")
        assert process.device.waiting(UPLOADS)
        process.finish()
        check_chunk(contents_at_rest_of(process))

    @pytest.mark.parametrize("later", range(12))
    def test_chunks_that_are_reused_between_draw_and_check_are_drawn_again(self, process: Process, later: int) -> None:
        process.interrupt_with(6, later)
        process.sample("side")
        interrupted = process.device.interrupt is None
        process.finish()
        check_chunk(process.batches[0])
        # The rows are read before the first operation, and checked after the last one, which records the event.
        assert interrupted == (process.rb.sampler.redrawn > 0)

    def test_a_stream_does_not_wait_for_itself(self, process: Process) -> None:
        process.finish()
        process.write_directly("default", [4])
        process.sample("default")
        while process.device.step("default"):
            pass
        assert not process.device.waiting("default")


def contents_of_ledger(process: Process) -> tuple[int, int]:
    return process.rb.storage.ledger.live_range()


def contents_at_rest_of(process: Process) -> TensorDict:
    process.device.eager = True
    return process.rb[:]


def test_many_threads_sample_on_streams_of_their_own_while_another_uploads() -> None:
    device = SimulatedDevice()
    rb = make_buffer(storage=TrajectoryStorage(3, 40, device=device), batch_size=16)  # type: ignore[arg-type]
    rb.extend(small(0, 5))
    rb.storage.flush()

    stop, errors = threading.Event(), []

    def read(stream: str) -> None:
        try:
            with device.using(stream):
                while not stop.is_set():
                    check_chunk(rb.sample())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=read, args=(f"reader {n}",)) for n in range(2)]
    for thread in threads:
        thread.start()
    for number in range(1, 400):
        rb.extend(small(number, 3 + number % 9))
    rb.storage.flush()
    stop.set()
    for thread in threads:
        thread.join(PATIENCE)
    assert not errors
    check_trajectory(rb[-1], 399, 3 + 399 % 9)
