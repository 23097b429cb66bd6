"""What TorchRL's own tests ask of any replay buffer, its other samplers, and the private things of it that are used."""

from __future__ import annotations

import contextlib
import inspect
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from steps import check_chunk, contents, make_buffer, make_plain_buffer, make_trajectory, numbers_of
from tensordict import TensorDict
from torchrl.collectors import MultiAsyncCollector
from torchrl.data import (
    ConsumingSampler,
    LazyTensorStorage,
    PrioritizedSampler,
    PrioritizedSliceSampler,
    PromptGroupSampler,
    RandomSampler,
    ReplayBuffer,
    SamplerWithoutReplacement,
    SliceSampler,
    SliceSamplerWithoutReplacement,
    StalenessAwareSampler,
    StreamingSliceSampler,
    TensorDictReplayBuffer,
)
from torchrl.data.replay_buffers.checkpointers import StorageCheckpointerBase
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.samplers import prioritized as prioritized_module
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.utils import pin_memory_output
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl import ChunkSampler, TrajectoryStorage
from embodichain_rl.errors import UnsupportedOperationError

BUFFERS = [make_buffer, make_plain_buffer]

MakeBuffer = Callable[..., TensorDictReplayBuffer]


@pytest.mark.parametrize("make", BUFFERS, ids=["TrajectoryReplayBuffer", "TensorDictReplayBuffer"])
class TestComposableBuffers:
    """The behaviours that TorchRL's tests of the same name ask of storages, writers and samplers in any combination.

    There an item is one step; here it is a trajectory, of one step each.
    """

    SIZE = 10

    @staticmethod
    def steps(count: int, first: int = 0) -> TensorDict:
        return torch.cat([make_trajectory(first + n, 1) for n in range(count)])

    def make(self, make: MakeBuffer, **kwargs: Any) -> TensorDictReplayBuffer:
        return make(storage=TrajectoryStorage(self.SIZE, 100), sampler=ChunkSampler(1), batch_size=5, **kwargs)

    def test_rb_repr(self, make: MakeBuffer) -> None:
        rb = self.make(make)
        assert f"0 of {self.SIZE} trajectories" in repr(rb)
        rb.extend(self.steps(7))
        rb.sample()
        assert f"7 of {self.SIZE} trajectories" in repr(rb)
        assert "7 steps" not in repr(rb.writer)

    def test_add(self, make: MakeBuffer) -> None:
        rb = self.make(make)
        for number in range(3):
            assert int(rb.add(make_trajectory(number, 1)[0])) == number
        assert len(rb) == 3
        assert numbers_of(check_chunk(rb[:])) == [0, 1, 2]

    @pytest.mark.parametrize("size", [1, 3, 25])
    def test_cursor_position(self, make: MakeBuffer, size: int) -> None:
        rb = self.make(make)
        written = 0
        while written < 3 * self.SIZE:
            index = rb.extend(self.steps(size, written))
            assert index.tolist() == list(range(written, written + size))
            written += size
            assert rb.write_count == written
            assert len(rb) == min(written, self.SIZE)
            assert numbers_of(rb[:]) == list(range(max(0, written - self.SIZE), written))

    @pytest.mark.parametrize("sizes", [[5], [10], [25], [4, 4, 4], [1] * 12])
    def test_extend(self, make: MakeBuffer, sizes: list[int]) -> None:
        rb = self.make(make)
        written: list[int] = []
        for size in sizes:
            rb.extend(self.steps(size, len(written)))
            written += range(len(written), len(written) + size)
            assert contents(rb) == [(number, 1) for number in written[-self.SIZE :]]

    def test_sample(self, make: MakeBuffer) -> None:
        rb = self.make(make)
        rb.extend(self.steps(25))
        drawn = set()
        for _ in range(100):
            data = check_chunk(rb.sample())
            assert data.shape == (5, 1)
            drawn.update(numbers_of(data))
        assert drawn == set(range(15, 25))

    @pytest.mark.parametrize(
        "index",
        [
            slice(2, None),
            slice(None, 5),
            slice(1, 9, 3),
            [2, 3, 5],
            range(2, 6),
            np.array([4, 4, 1]),
            torch.tensor([0, 9]),
            torch.arange(10) % 2 == 0,
            (slice(3),),
            (torch.tensor([7]),),
        ],
        ids=str,
    )
    def test_index(self, make: MakeBuffer, index: Any) -> None:
        rb = self.make(make)
        rb.extend(self.steps(25))
        at = index[0] if isinstance(index, tuple) else index
        expected = np.arange(15, 25)[at if isinstance(at, slice) else np.asarray(at)].tolist()
        assert numbers_of(check_chunk(rb[index])) == expected
        assert numbers_of(check_chunk(rb.storage[index])) == expected

    def test_index_of_one(self, make: MakeBuffer) -> None:
        rb = self.make(make)
        rb.extend(self.steps(25))
        assert [int(rb[n]["label"][0, 0]) for n in (0, 9, -1)] == [15, 24, 24]

    def test_pickable(self, make: MakeBuffer) -> None:
        rb = self.make(make)
        rb.extend(self.steps(7))
        twin = pickle.loads(pickle.dumps(rb))
        assert type(twin) is type(rb)
        assert contents(twin) == contents(rb)
        assert set(twin.__dict__) == set(rb.__dict__)
        twin.extend(self.steps(1, 7))
        assert check_chunk(twin.sample()).shape == (5, 1)


def trajectories() -> list[TensorDict]:
    """Seven, of which the last four stay: of 6, 7, 8 and 9 steps."""
    return [make_trajectory(number, 3 + number, traj_id=number) for number in range(7)]


@pytest.mark.parametrize("make", BUFFERS, ids=["TrajectoryReplayBuffer", "TensorDictReplayBuffer"])
class TestSamplersOfItems:
    """Samplers that draw positions give whole trajectories, padded."""

    def test_random(self, make: MakeBuffer) -> None:
        rb = make(trajectories(), sampler=RandomSampler(), batch_size=6)
        drawn = set()
        for _ in range(40):
            data = check_chunk(rb.sample())
            lengths = [3 + number for number in numbers_of(data)]
            assert data.shape == (6, max(lengths))
            assert data["collector", "mask"].sum(-1).tolist() == lengths
            drawn.update(numbers_of(data))
        assert drawn == {3, 4, 5, 6}

    def test_without_replacement(self, make: MakeBuffer) -> None:
        rb = make(trajectories(), sampler=SamplerWithoutReplacement(), batch_size=2)
        for _ in range(3):
            assert sorted(number for data in rb for number in numbers_of(check_chunk(data))) == [3, 4, 5, 6]

    def test_without_replacement_in_order_while_others_come(self, make: MakeBuffer) -> None:
        rb = make(trajectories(), sampler=SamplerWithoutReplacement(shuffle=False), batch_size=2)
        assert numbers_of(check_chunk(rb.sample())) == [3, 4]
        rb.extend(make_trajectory(7, 5, traj_id=7))
        assert numbers_of(check_chunk(rb.sample())) == [6, 7]
        rb.empty()
        rb.extend(make_trajectory(8, 5, traj_id=8))
        assert numbers_of(check_chunk(rb.sample())) == [8]

    def test_say_where_the_buffer_is_empty(self, make: MakeBuffer) -> None:
        for sampler in (RandomSampler(), SamplerWithoutReplacement()):
            with pytest.raises(RuntimeError, match="Cannot sample from an empty storage"):
                make(sampler=sampler).sample()

    def test_can_be_seeded(self, make: MakeBuffer) -> None:
        drawn = [
            numbers_of(
                make(
                    trajectories(),
                    sampler=RandomSampler(),
                    generator=torch.Generator().manual_seed(seed),
                    batch_size=20,
                ).sample()
            )
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]


STEP_SAMPLERS = {
    "SliceSampler, end_key": lambda: SliceSampler(slice_len=2, end_key=("next", "done")),
    "SliceSampler, traj_key": lambda: SliceSampler(slice_len=2, traj_key=("collector", "traj_ids")),
    "SliceSampler, cached": lambda: SliceSampler(num_slices=2, cache_values=True),
    "SliceSampler, fragmented": lambda: SliceSampler(
        num_slices=2, traj_key=("trajectory", "id"), step_key=("trajectory", "step"), fragmented=True
    ),
    "SliceSamplerWithoutReplacement": lambda: SliceSamplerWithoutReplacement(num_slices=2, end_key=("next", "done")),
    "StreamingSliceSampler": lambda: StreamingSliceSampler(slice_len=2, end_key=("next", "done")),
    "StalenessAwareSampler": lambda: StalenessAwareSampler(version_key=("robot", "mode")),
    "PromptGroupSampler": lambda: PromptGroupSampler(num_groups=2, group_key=("robot", "mode")),
    "ConsumingSampler": lambda: ConsumingSampler(),
    "PrioritizedSampler": lambda: PrioritizedSampler(max_capacity=100, alpha=0.7, beta=0.9),
    "PrioritizedSliceSampler": lambda: PrioritizedSliceSampler(
        max_capacity=100, alpha=0.7, beta=0.9, num_slices=2, end_key=("next", "done")
    ),
}
"""Samplers that take an item for a step: they read columns of the storage, or keep numbers by position."""


def step_sampler(name: str) -> Sampler:
    if name.startswith("Prioritized") and prioritized_module.SumSegmentTreeFp32 is None:
        pytest.skip("TorchRL's compiled extension, which prioritized samplers need, does not load with this torch")
    return STEP_SAMPLERS[name]()


@pytest.mark.parametrize("name", STEP_SAMPLERS)
class TestSamplersOfSteps:
    MESSAGE = "ChunkSampler"

    @pytest.mark.parametrize("make", BUFFERS, ids=["TrajectoryReplayBuffer", "TensorDictReplayBuffer"])
    def test_are_refused_by_the_constructor(self, make: MakeBuffer, name: str) -> None:
        sampler = step_sampler(name)
        with pytest.raises(UnsupportedOperationError, match=self.MESSAGE):
            make(sampler=sampler)

    def test_are_refused_later(self, name: str) -> None:
        sampler = step_sampler(name)
        rb = make_buffer(trajectories())
        with pytest.raises(UnsupportedOperationError, match=self.MESSAGE):
            rb.set_sampler(sampler)
        assert check_chunk(rb.sample()).shape == (8, 3)


class TestWhatIsUsedOfTorchRL:
    """Each of these is private or undocumented; a version of TorchRL without it needs changes here."""

    def test_new_unsafe_builds_a_tensordict_without_checks(self) -> None:
        data = TensorDict._new_unsafe({"a": torch.zeros(2, 3), "b": TensorDict({}, [2])}, batch_size=torch.Size([2]))
        assert type(data) is TensorDict
        assert data.batch_size == (2,)
        assert not data.is_locked

    @pytest.mark.parametrize(
        ("owner", "name"),
        [
            (ReplayBuffer, "share"),
            (ReplayBuffer, "_sample"),
            (ReplayBuffer, "_dump_prefetch_state"),
            (ReplayBuffer, "_load_prefetch_state"),
            (Storage, "attach"),
            (Storage, "_attached_entities"),
            (Storage, "_mutation_revision"),
            (Storage, "_bump_mutation_revision"),
            (Storage, "_is_full"),
            (Storage, "checkpointer"),
            (LazyTensorStorage, "_init"),
            (LazyTensorStorage, "_len"),
            (LazyTensorStorage, "_total_shape"),
            (LazyTensorStorage, "_make_init_directory"),
            (LazyTensorStorage, "_empty"),
            (Writer, "_empty"),
            (Writer, "register_storage"),
            (Writer, "_replicate_index"),
            (Sampler, "_empty"),
            (Sampler, "can_sample"),
            (StorageCheckpointerBase, "register_save_hook"),
        ],
        ids=lambda part: part if isinstance(part, str) else part.__name__,
    )
    def test_what_is_overridden_is_there(self, owner: type, name: str) -> None:
        assert hasattr(owner, name)

    def test_arguments_of_what_is_overridden(self) -> None:
        assert list(inspect.signature(ReplayBuffer._dump_prefetch_state).parameters)[1:] == ["path", "prefetch_state"]
        assert list(inspect.signature(ReplayBuffer._load_prefetch_state).parameters)[1:] == ["path"]
        assert list(inspect.signature(Writer._empty).parameters) == ["self", "empty_write_count"]
        assert list(inspect.signature(TensorDictReplayBuffer.sample).parameters)[1:] == [
            "batch_size",
            "return_info",
            "include_info",
        ]
        assert callable(pin_memory_output(lambda self: None))

    def test_the_locks_that_a_buffer_makes(self) -> None:
        rb = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=2, prefetch=1)
        assert isinstance(rb._replay_lock, type(threading.RLock()))
        assert isinstance(rb._futures_lock, type(threading.RLock()))
        assert isinstance(rb._write_lock, contextlib.nullcontext)
        assert {
            "_prefetch",
            "_prefetch_cap",
            "_prefetch_queue",
            "_prefetch_executor",
            "_transform",
            "_batch_size",
        } <= set(rb.__dict__)
        shared = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=2, shared=True)
        assert hasattr(shared._write_lock, "acquire")

    def test_what_a_buffer_asks_of_a_new_storage(self) -> None:
        storage = RecordedStorage(4, 100)
        TensorDictReplayBuffer(storage=storage, batch_size=2)
        assert {"attach", "ndim", "checkpointer"} <= storage.asked | storage.set_by_others

    def test_what_a_collector_of_processes_asks_of_a_storage(self) -> None:
        storage = RecordedStorage(40, 1000)
        rb = make_buffer(storage=storage)
        storage.asked.clear()
        with pytest.raises(NeverMadeError):  # in the main process, before any other is started
            MultiAsyncCollector(
                [never_make], torch.nn.Identity(), frames_per_batch=10, total_frames=9, replay_buffer=rb
            )
        assert "initialized" in storage.asked


class NeverMadeError(Exception):
    pass


def never_make() -> None:
    raise NeverMadeError


class RecordedStorage(TrajectoryStorage):
    """Notes which of its attributes others ask for and set."""

    def __init__(self, *args: Any) -> None:
        self.__dict__.update(asked=set(), set_by_others=set())
        super().__init__(*args)
        self.asked.clear()
        self.set_by_others.clear()

    def __getattribute__(self, name: str) -> Any:
        if name not in ("asked", "set_by_others", "__dict__"):
            self.asked.add(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.set_by_others.add(name)
        super().__setattr__(name, value)
