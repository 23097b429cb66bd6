"""A storage on a device: writes through the staging ring, samples, reads and errors."""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import pickle
import signal
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import iterating
from simulated_device import UPLOADS, SimulatedDevice
from steps import (
    LABEL,
    Child,
    check_chunk,
    check_trajectory,
    contents,
    make_buffer,
    make_plain_buffer,
    make_storage,
    make_trajectory,
    make_writer,
    numbers_of,
    small,
)
from tensordict import TensorDict
from torch.utils.data import DataLoader
from waiting import PATIENCE, wait_until

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.datasets import OnlineDataset, UniformChunkSampler
from embodichain_rl.errors import (
    BufferMemoryError,
    EmbodiChainRLError,
    EmptyBufferError,
    InvalidArgumentError,
    OwnerGoneError,
    SharingError,
    StagingTimeoutError,
    TrajectoryTooLongError,
    UploadError,
)
from embodichain_rl.replay.device import staging
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.processes import process_start


def on(device: SimulatedDevice, trajectories: Any = (), **kwargs: Any) -> TrajectoryReplayBuffer:
    """Return a buffer on a device that holds the given trajectories."""
    limits = {"max_trajectories": kwargs.pop("max_trajectories", 4), "max_total_steps": kwargs.pop("max_steps", 100)}
    options = {name: kwargs.pop(name) for name in ("compact", "staging_bytes") if name in kwargs}
    storage = TrajectoryStorage(*limits.values(), device=device, **options)  # type: ignore[arg-type]
    rb = make_buffer(trajectories, storage=storage, **kwargs)
    storage.flush(PATIENCE)
    return rb


@pytest.fixture
def device() -> SimulatedDevice:
    return SimulatedDevice()


class TestWriting:
    def test_cpu_data_is_live_after_its_upload(self, device: SimulatedDevice) -> None:
        rb = on(device)
        assert rb.extend(make_trajectory(0, 5)).tolist() == [-1] * 5
        rb.storage.flush()
        assert (len(rb), rb.storage.num_steps, rb.write_count) == (1, 5, 5)
        assert contents(rb) == [(0, 5)]

    def test_no_trajectory_is_live_before_its_upload_is_done(self, device: SimulatedDevice) -> None:
        rb = on(device, [make_trajectory(0, 5)])
        device.hold(UPLOADS)
        rb.extend(make_trajectory(1, 6))
        wait_until(lambda: device.waiting(UPLOADS))
        with pytest.raises(StagingTimeoutError, match="1 trajectories are still in the staging ring"):
            rb.storage.flush(0.1)
        assert contents(rb) == [(0, 5)]
        device.release(UPLOADS)
        rb.storage.flush()
        assert contents(rb) == [(0, 5), (1, 6)]

    def test_keeps_the_order_and_evicts_the_oldest(self, device: SimulatedDevice) -> None:
        rb = on(device, [make_trajectory(number, 1 + number % 9) for number in range(200)])
        assert contents(rb) == [(number, 1 + number % 9) for number in range(196, 200)]
        assert rb.stats()["published"] == 200
        check_ledger(rb.storage.ledger)

    def test_many_trajectories_are_copied_together(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 5)], max_trajectories=100, max_steps=4000)
        columns = len(rb.storage.arena.stored)
        device.hold(UPLOADS)
        rb.extend(small(1, 5))
        wait_until(lambda: device.waiting(UPLOADS))
        rb.extend(small(2, 5))
        wait_until(lambda: rb.storage._memory._uploader._next == 3)  # so that one upload takes all others
        for number in range(3, 23):
            rb.extend(small(number, 5))
        before = device.operations
        device.release(UPLOADS)
        rb.storage.flush()
        assert device.operations - before == columns
        assert contents(rb) == [(number, 5) for number in range(23)]

    def test_every_kind_of_entry_is_read_back(self, device: SimulatedDevice) -> None:
        rb = on(device, [make_trajectory(number, 20) for number in range(3)])
        for _ in range(20):
            check_chunk(rb.sample())

    def test_text_and_trajectory_values_are_read_back(self, device: SimulatedDevice) -> None:
        rb = on(device)
        for number in range(3):
            steps = make_trajectory(number, 8)
            steps["say"] = [f"step {step} of {number}" for step in range(8)]
            steps["trajectory", "task"] = [f"task {number}"] * 8
            steps["trajectory", "mass"] = torch.full((8, 2), float(number)).bfloat16()
            rb.extend(steps)
        rb.storage.flush()
        batch = check_chunk(rb.sample())
        for chunk in batch:
            number, first = chunk[LABEL][0, :2].tolist()
            assert rb.texts.resolve(chunk["say"]) == [f"step {first + n} of {number}" for n in range(3)]
            assert rb.texts.resolve(chunk["trajectory", "task"]) == [f"task {number}"] * 3
            assert (chunk["trajectory", "mass"] == number).all()

    def test_a_trajectory_longer_than_the_ring_is_refused_while_it_grows(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)], max_steps=10_000, staging_bytes=20 * 60)
        limit = rb.storage._memory._ring.ledger.max_total_steps
        assert 10 < limit < 40
        rb.extend(small(1, limit))
        rb.extend(small(2, limit, ends=False))
        with pytest.raises(TrajectoryTooLongError, match=r"staging_bytes=1,200.*Raise staging_bytes"):
            rb.extend(small(2, 1, ends=False))
        assert rb.writer.discard_pending() == limit
        with pytest.raises(TrajectoryTooLongError, match="staging_bytes"):
            rb.storage.write([[v.numpy() for v in small(3, limit + 1).values(True, True)]])
        rb.storage.flush()
        assert contents(rb) == [(0, 3), (1, limit)]

    def test_a_step_larger_than_the_ring_is_refused(self, device: SimulatedDevice) -> None:
        with pytest.raises(InvalidArgumentError, match="staging_bytes=20, less than a single step"):
            on(device, staging_bytes=20).extend(small(0, 3))

    def test_empty_drops_trajectories_that_wait_for_their_upload(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)])
        device.hold(UPLOADS)
        rb.extend(small(1, 3))
        wait_until(lambda: device.waiting(UPLOADS))
        rb.extend(small(2, 3))
        rb.empty()
        rb.extend(small(3, 3))
        device.release(UPLOADS)
        rb.storage.flush()
        assert contents(rb) == [(3, 3)]
        assert rb.stats()["writing"] == 0


class TestARingThatIsFull:
    @pytest.fixture
    def held(self, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch) -> TrajectoryReplayBuffer:
        """Return a large buffer with a ring of 25 steps and uploads that are held back."""
        rb = on(device, [small(0, 3)], max_trajectories=500, max_steps=10_000, staging_bytes=25 * 60)
        device.hold(UPLOADS)
        monkeypatch.setattr(staging, "WAIT_FOR_ROOM", 0.2)
        return rb

    def fill(self, rb: TrajectoryReplayBuffer) -> int:
        """Write until the ring is full; return the number of trajectories that fitted."""
        for number in itertools.count(1):
            try:
                rb.extend(small(number, 3))
            except StagingTimeoutError:
                break
        with pytest.raises(StagingTimeoutError, match="raise staging_bytes"):
            rb.extend(small(number, 3))
        return number - 1

    def test_blocks_writers_and_loses_nothing(self, held: TrajectoryReplayBuffer, device: SimulatedDevice) -> None:
        written = self.fill(held)
        assert 5 < written < 12
        assert contents(held) == [(0, 3)]
        device.release(UPLOADS)
        held.storage.flush()
        held.extend(small(written + 1, 3))
        held.storage.flush()
        assert contents(held) == [(number, 3) for number in range(written + 2)]
        check_ledger(held.storage.ledger)
        check_ledger(held.storage._memory._ring.ledger)

    def test_also_limits_the_number_of_trajectories(
        self, device: SimulatedDevice, held: TrajectoryReplayBuffer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        held.storage._memory._ring.ledger.max_trajectories = 4
        written = self.fill(held)
        assert written == 4
        device.release(UPLOADS)
        held.storage.flush()
        assert contents(held) == [(number, 3) for number in range(5)]

    def test_unblocks_a_writer_when_space_is_free(
        self, held: TrajectoryReplayBuffer, device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        written = self.fill(held)
        monkeypatch.setattr(staging, "WAIT_FOR_ROOM", PATIENCE)
        child = Child("fork", held)
        child.begin(extend, written + 1, 50)
        device.release(UPLOADS)
        assert child.result() == [-1] * 50
        child.end()
        held.storage.flush()
        assert contents(held)[written:] == [(written, 3)] + [(written + 1 + k, 3 + k % 4) for k in range(50)]


def extend(rb: TrajectoryReplayBuffer, first: int, count: int) -> list[int]:
    return [int(rb.extend(small(first + k, 3 + k % 4))[0]) for k in range(count)]


def sizes(rb: TrajectoryReplayBuffer) -> tuple[int, int, int]:
    return len(rb), rb.storage.num_steps, rb.stats()["published"]


def sample(rb: TrajectoryReplayBuffer) -> None:
    rb.sample()


def read(rb: TrajectoryReplayBuffer) -> None:
    rb[0]


def flush(rb: TrajectoryReplayBuffer) -> None:
    rb.storage.flush()


class TestOtherProcesses:
    @pytest.mark.parametrize(("start_method", "allocated"), [("fork", False), ("fork", True), ("forkserver", False)])
    def test_can_write_and_count_but_not_read(
        self, device: SimulatedDevice, start_method: str, allocated: bool
    ) -> None:
        rb = on(device, [small(0, 3)] if allocated else [], max_trajectories=100, max_steps=1000)
        if allocated:
            rb.sample()  # so that a forked child inherits the opened arena
        child = Child(start_method, rb)
        assert child.call(extend, 1, 20) == [-1] * 20
        child.call(flush)
        there = 20 + allocated
        assert child.call(sizes) == (there, rb.storage.num_steps, there)
        assert contents(rb)[allocated:] == [(1 + k, 3 + k % 4) for k in range(20)]
        for function in (sample, read):
            with pytest.raises(SharingError, match=r"only the process that made it .* use num_workers=0"):
                child.call(function)
        check_chunk(rb.sample())
        child.end()

    def test_that_are_killed_at_any_moment_block_no_other(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)], max_trajectories=20, max_steps=200, staging_bytes=60 * 60)
        for number in range(12):
            child = multiprocessing.get_context("fork").Process(target=extend_for_ever, args=(rb,), daemon=True)
            published = rb.stats()["published"]
            child.start()
            wait_until(lambda published=published: rb.stats()["published"] > published + 5)
            time.sleep(0.001 * number)  # a different moment each time
            os.kill(child.pid, signal.SIGKILL)
            child.join(PATIENCE)
            rb.extend(small(7, 20))
            rb.storage.flush()
            check_chunk(rb.sample())
            check_ledger(rb.storage._memory._ring.ledger)
        assert rb.stats()["writing"] == 0

    def test_get_an_error_when_the_owner_has_ended(self) -> None:
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        owner = multiprocessing.get_context("fork").Process(target=own, args=(theirs,))
        owner.start()
        writer = ours.recv()
        assert ours.recv() == "written"
        os.kill(owner.pid, signal.SIGKILL)
        wait_until(lambda: process_start(owner.pid) == -1)
        ours.send("again")
        assert "OwnerGoneError" in ours.recv()
        wait_until(lambda: process_start(writer) == -1)
        owner.join(PATIENCE)

    def test_get_an_error_when_the_buffer_is_closed(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)])
        child = Child("fork", rb)
        rb.storage.close()
        with pytest.raises(OwnerGoneError, match=f"Process {os.getpid()} has closed the buffer"):
            child.call(extend, 1, 1)
        for attempt in (lambda: rb.extend(small(1, 3)), rb.sample, rb.storage.flush):
            with pytest.raises(OwnerGoneError, match="closed"):
                attempt()
        child.end()

    def test_get_an_error_when_an_upload_has_failed(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)])
        child = Child("fork", rb)
        device.error = RuntimeError("CUDA error: an illegal memory access was encountered")
        child.call(extend, 1, 1)
        wait_until(lambda: not rb.storage._memory._uploader._thread.is_alive())
        for attempt in (lambda: rb.extend(small(1, 3)), rb.sample, rb.storage.flush):
            with pytest.raises(UploadError, match="illegal memory access") as caught:
                attempt()
            assert caught.value.__cause__ is device.error
        with pytest.raises(UploadError, match=f"failed in process {os.getpid()}"):
            child.call(extend, 1, 1)
        child.end()


def extend_for_ever(rb: TrajectoryReplayBuffer) -> None:
    number = 0
    while True:
        number += 1
        rb.extend(small(number, 3 + number % 11))


def own(pipe: Any) -> None:
    rb = on(SimulatedDevice(), [small(0, 3)])
    if os.fork() == 0:
        pipe.send(os.getpid())
        rb.extend(small(1, 3))
        pipe.send("written")
        assert pipe.recv() == "again"
        try:
            rb.extend(small(2, 3))
        except Exception as error:
            pipe.send(repr(error))
        os._exit(0)
    signal.pause()


class TestDataLoader:
    def test_with_workers_is_refused_immediately(self, device: SimulatedDevice) -> None:
        dataset = OnlineDataset(on(device), chunk_size=2, batch_size=4)  # the buffer is still empty
        with iterating(dataset, 1) as batches, pytest.raises(SharingError, match="num_workers=0"):
            next(batches)

    def test_without_workers_returns_batches(self, device: SimulatedDevice) -> None:
        rb = on(device, [make_trajectory(n, 9) for n in range(3)])
        for dataset, options in (
            (OnlineDataset(rb, chunk_size=3, batch_size=4), {"batch_size": None}),
            (OnlineDataset(rb, chunk_size=3), {"batch_size": 4}),
            (OnlineDataset(rb, chunk_size=UniformChunkSampler(2, 4), batch_size=4), {"batch_size": None}),
        ):
            assert check_chunk(next(iter(DataLoader(dataset, **options)))).shape[0] == 4
        of_many_sizes = DataLoader(OnlineDataset(rb, chunk_size=UniformChunkSampler(2, 4)), batch_size=4)
        assert next(iter(of_many_sizes))["collector", "mask"].any()


class TestMemory:
    def test_that_the_device_lacks_raises_in_the_first_writer(self) -> None:
        rb = on(SimulatedDevice(capacity=1000))
        with pytest.raises(BufferMemoryError, match=r"needs [\d,]+ bytes"):
            rb.extend(make_trajectory(0, 3))
        assert not rb.storage.initialized
        rb.storage._memory._uploader.device.capacity = 100_000
        rb.extend(small(0, 3))  # now the device has enough memory
        rb.storage.flush()
        assert contents(rb) == [(0, 3)]

    def test_that_the_device_lacks_raises_in_the_owner_if_another_process_writes_first(self) -> None:
        rb = on(SimulatedDevice(capacity=1000))
        child = Child("fork", rb)
        with contextlib.suppress(UploadError):  # the owner may fail before the child has published
            child.call(extend, 0, 1)
        wait_until(lambda: not rb.storage._memory._uploader._thread.is_alive())
        for attempt in (lambda: rb.extend(small(0, 3)), rb.sample, rb.storage.flush):
            with pytest.raises(EmbodiChainRLError, match=r"needs [\d,]+ bytes"):
                attempt()
        child.end()

    def test_is_pinned_as_long_as_the_storage_exists(self, device: SimulatedDevice) -> None:
        rb = on(device, [small(0, 3)])
        assert device.pinned > 0
        thread, gone = rb.storage._memory._uploader._thread, weakref.ref(rb.storage)
        del rb
        gc.collect()
        assert gone() is None
        assert device.pinned == 0
        assert not thread.is_alive()

    def test_that_can_not_be_pinned_is_used_unpinned(self, device: SimulatedDevice) -> None:
        device.can_pin = False
        rb = on(device)
        with pytest.warns(UserWarning, match="can't be pinned.*cudaHostRegister"):
            rb.extend(small(0, 3))
        rb.storage.flush()
        assert contents(rb) == [(0, 3)]

    def test_of_the_ring_is_freed(self, device: SimulatedDevice) -> None:
        on(device, [small(0, 3)])
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            on(device, [small(0, 3)])
            gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= before


SAMPLERS: dict[str, Callable[[], Any]] = {
    "chunks": lambda: ChunkSampler(3),
    "steps": lambda: ChunkSampler(3, weights="steps"),
    "recency": lambda: ChunkSampler(3, weights=ByRecency(2)),
    "groups of steps": lambda: ChunkSampler(3, weights=ByGroup("task")),
    "groups of trajectories": lambda: ChunkSampler(3, weights=ByGroup(("trajectory", "kind"))),
    "priorities": lambda: ChunkSampler(3, weights=ByPriority()),
    "one pass": lambda: ChunkSampler(3, replacement=False),
    "segments": lambda: ChunkSampler(2, sampling_mode="segment"),
    "boundaries": lambda: ChunkSampler(2, sampling_mode="boundary"),
    "padded": lambda: ChunkSampler(30, pad="both"),
    "windows": lambda: ChunkSampler(windows={"observation": (-2, 1), LABEL: (0, 3), "flags": (0, 0)}, pad="both"),
    "young": lambda: ChunkSampler(3, max_age=1000.0, max_policy_lag=3),
}


@pytest.fixture(scope="module")
def data() -> list[TensorDict]:
    trajectories = []
    for number in range(6):
        steps = make_trajectory(number, 9 + number)
        steps["segment_id"] = torch.arange(9 + number) // 4
        steps["task"] = torch.full((9 + number,), number % 2)
        steps["trajectory", "kind"] = torch.full((9 + number, 1), number % 3)
        steps["policy_version"] = torch.full((9 + number,), number)
        trajectories.append(steps)
    return trajectories


class TestReading:
    """With the same random numbers, a storage on a device returns the same values as one on the CPU."""

    @pytest.mark.parametrize("compact", [False, True, "views"])
    @pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
    def test_samples(self, data: list[TensorDict], sampler: Callable[[], Any], compact: bool | str) -> None:
        steps = [shifted(td) for td in data] if compact else data
        options = {"compact": compact, "max_trajectories": 6}
        there = on(SimulatedDevice(), steps, **options, sampler=sampler(), generator=seeded())
        here = make_buffer(
            steps, max_trajectories=6, max_total_steps=100, compact=compact, sampler=sampler(), generator=seeded()
        )
        for _ in range(6):
            got, expected = there.sample(), here.sample()
            assert_same(got, expected)
        if isinstance(there.sampler.weights, ByPriority):
            for rb in (there, here):
                batch = rb.sample()
                rb.update_tensordict_priority(batch.set("td_error", batch["trajectory", "id"].float() + 1))
            assert_same(there.sample(), here.sample())

    @pytest.mark.parametrize("compact", [False, True, "views"])
    def test_chunks_of_a_device_without_a_gather(self, data: list[TensorDict], compact: bool | str) -> None:
        steps = [shifted(td) for td in data] if compact else data
        options = {"compact": compact, "max_trajectories": 6}
        devices = SimulatedDevice(), SimulatedDevice(gathers=False)
        buffers = [on(device, steps, **options, sampler=ChunkSampler(3), generator=seeded()) for device in devices]
        for _ in range(6):
            assert_same(buffers[0].sample(), buffers[1].sample())
        before = [device.operations for device in devices]
        for rb in buffers:
            rb.sample()
        together, alone = (device.operations - count for device, count in zip(devices, before, strict=True))
        assert together == 1 < alone

    def test_large_tensors_do_not_keep_small_ones_and_the_other_way_round(self) -> None:
        steps = [make_trajectory(number, 20) for number in range(4)]
        for number, trajectory in enumerate(steps):
            trajectory["image"] = torch.full((20, 64, 64, 3), number, dtype=torch.uint8)
        there = on(SimulatedDevice(), steps, sampler=ChunkSampler(5), generator=seeded(), batch_size=32)
        here = make_buffer(steps, sampler=ChunkSampler(5), generator=seeded(), batch_size=32)
        batch = there.sample()
        assert_same(batch, here.sample())
        assert batch["image"].untyped_storage().nbytes() == batch["image"].nbytes > 1 << 20
        assert batch["observation"].untyped_storage().nbytes() < batch["image"].nbytes

    def test_items_queries_and_states(self, data: list[TensorDict], tmp_path: Path) -> None:
        there = on(SimulatedDevice(), data, max_trajectories=6)
        here = make_buffer(data, max_trajectories=6)
        for index in (0, -1, slice(None), [1, 3], torch.tensor([2])):
            assert_same(there[index], here[index])
        assert [len(t.data) for t in there.query(lambda t: len(t.data) > 11)] == [12, 13, 14]
        there.dumps(tmp_path)
        for target in (make_buffer(max_trajectories=6), on(SimulatedDevice(), [small_of(data)], max_trajectories=6)):
            target.loads(tmp_path)
            assert_same(target[:].exclude("index", "trajectory"), here[:].exclude("index", "trajectory"))
        twin = pickle.loads(pickle.dumps(there.storage))
        assert_same(twin[:].exclude("index", "trajectory"), here[:].exclude("index", "trajectory"))
        assert twin._memory.made_for is not None

    def test_in_a_plain_buffer_of_torchrl(self, data: list[TensorDict]) -> None:
        storage = TrajectoryStorage(6, 100, device=SimulatedDevice())  # type: ignore[arg-type]
        rb = make_plain_buffer(data, storage=storage)
        storage.flush()
        check_chunk(rb.sample())

    def test_in_pinned_memory_is_refused(self, device: SimulatedDevice) -> None:
        with pytest.raises(InvalidArgumentError, match="pin_memory=True"):
            on(device, pin_memory=True)

    def test_from_an_empty_storage_raises(self, device: SimulatedDevice) -> None:
        rb = on(device)
        with pytest.raises(EmptyBufferError):
            rb.sample()
        storage = make_storage([small(0, 3)], 4, 100, device=device)
        make_writer(storage).extend(small(1, 3))
        storage.flush()
        check_trajectory(storage[1], 1, 3)
        assert numbers_of(storage[:]) == [0, 1]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def small_of(data: list[TensorDict]) -> TensorDict:
    return data[0][-1:]


def shifted(steps: TensorDict) -> TensorDict:
    """Return a copy in which every next observation is the observation of the next step."""
    steps = steps.clone()
    steps["next", "observation"][:-1] = steps["observation"][1:]
    return steps


def assert_same(got: Any, expected: Any) -> None:
    assert got.batch_size == expected.batch_size
    assert {*got.keys(True, True)} == {*expected.keys(True, True)}
    for key, value in expected.items(True, True):
        assert got[key].dtype == value.dtype, key
        assert torch.equal(got[key], value), key
