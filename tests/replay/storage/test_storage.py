"""TrajectoryStorage: what it keeps, what it evicts, and what it gives back."""

from __future__ import annotations

import copy
import pickle
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steps import Child, check_chunk, check_trajectory, contents, make_storage, make_trajectory, make_writer, small
from tensordict import TensorDict

from embodichain_rl import TrajectoryStorage
from embodichain_rl.errors import (
    BufferMemoryError,
    InvalidArgumentError,
    SchemaMismatchError,
    TrajectoryEvictedError,
    TrajectoryIndexError,
    UnsupportedOperationError,
)

LENGTHS = [5, 2, 9, 1]
"""Of the trajectories 0 to 3, in a storage that several tests only read."""


@pytest.fixture(scope="module")
def four() -> TrajectoryStorage:
    return make_storage([make_trajectory(number, length) for number, length in enumerate(LENGTHS)])


def steps_of(value: torch.Tensor) -> TensorDict:
    """One trajectory whose steps have ``value``."""
    done = torch.zeros(len(value), 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict({"value": value, "next": {"done": done}}, [len(value)])


class TestConstructor:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_trajectories": 0}, "max_trajectories must be an integer .*got 0"),
            ({"max_trajectories": True}, "max_trajectories must be an integer .*got True"),
            ({"max_trajectories": 2.0}, "max_trajectories must be an integer .*got 2.0"),
            ({"max_trajectories": None}, "max_trajectories must be an integer .*got None"),
            ({"max_total_steps": 0}, "max_total_steps must be an integer .*got 0"),
            ({"max_total_steps": -5}, "max_total_steps must be an integer .*got -5"),
            ({"max_total_steps": "9"}, "max_total_steps must be an integer .*got '9'"),
            ({"max_writers": 0}, "max_writers must be an integer .*got 0"),
            ({"device": "nowhere"}, "device='nowhere', which is no torch device"),
            ({"device": None}, "device=None"),
            ({"device": "meta"}, "device='meta'.*use 'cpu'"),
        ],
    )
    def test_refuses_what_can_not_work(self, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            TrajectoryStorage(**{"max_trajectories": 2, "max_total_steps": 9, **arguments})

    def test_takes_numpy_integers_and_a_torch_device(self) -> None:
        storage = TrajectoryStorage(np.int32(2), np.int64(9), device=torch.device("cpu"), max_writers=np.int8(1))
        assert (storage.max_size, storage.max_total_steps, storage.max_writers) == (2, 9, 1)

    def test_takes_no_memory_to_speak_of(self) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        storage = TrajectoryStorage(100, 10**9)
        assert not storage.initialized
        assert storage.schema is None
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # KiB


class TestAllocation:
    def test_comes_with_the_first_data(self) -> None:
        storage = TrajectoryStorage(4, 100)
        assert (len(storage), storage.num_steps, storage.initialized) == (0, 0, False)
        make_writer(storage).extend(small(0, 3))
        assert (len(storage), storage.num_steps, storage.initialized) == (1, 3, True)

    def test_by_hand_stores_nothing(self) -> None:
        storage = TrajectoryStorage(4, 100)
        storage.allocate(make_trajectory(0, 3)[0])
        assert (len(storage), storage.num_steps, storage.initialized) == (0, 0, True)
        make_writer(storage).extend(make_trajectory(1, 4))
        assert contents(storage) == [(1, 4)]

    def test_again_with_the_same_keys_changes_nothing(self) -> None:
        storage = make_storage([small(0, 3)])
        storage.allocate(small(1, 7).reshape(7, 1))
        assert contents(storage) == [(0, 3)]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (make_trajectory(0, 3), "with .*'pixels'"),
            (small(0, 3).exclude("observation"), "without 'observation'"),
            (small(0, 3).set("observation", torch.zeros(3, 4)), r"'observation' with \(4,\) elements"),
            (small(0, 3).set("observation", torch.zeros(3, 3).double()), "torch.float64 a step"),
        ],
    )
    def test_again_with_other_keys_is_refused(self, data: TensorDict, message: str) -> None:
        storage = make_storage([small(0, 3)])
        with pytest.raises(SchemaMismatchError, match=message):
            storage.allocate(data)
        assert contents(storage) == [(0, 3)]

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (TensorDict({}, [3]), "without any tensor"),
            (small(0, 3).set_non_tensor("task", 3), "'task' of type NonTensorData"),
        ],
    )
    def test_for_what_is_no_step_is_refused(self, data: TensorDict, message: str) -> None:
        storage = TrajectoryStorage(4, 100)
        with pytest.raises(SchemaMismatchError, match=message):
            storage.allocate(data)
        assert not storage.initialized

    @pytest.mark.parametrize("max_total_steps", [10**12, 10**15])
    def test_of_more_than_the_machine_has_is_refused(self, max_total_steps: int) -> None:
        storage = TrajectoryStorage(100, max_total_steps)
        with pytest.raises(BufferMemoryError, match=r"needs [\d,]+ bytes .* has [\d,]+ bytes .* free. Lower max_total"):
            make_writer(storage).extend(small(0, 3))
        assert not storage.initialized
        assert len(storage) == 0

    @pytest.mark.parametrize("max_trajectories", [10**10, 10**12, 2**62])
    def test_of_a_ledger_that_the_machine_can_not_hold_is_refused(self, max_trajectories: int) -> None:
        child = Child("fork", max_trajectories)  # which has a limit, for a ledger that is allocated nevertheless
        with pytest.raises((BufferMemoryError, InvalidArgumentError), match="max_trajectories"):
            child.call(make_storage_within_4_gib)
        child.end()

    @pytest.mark.parametrize("max_total_steps", [2**62, 2**64])
    def test_of_more_steps_than_can_be_counted_is_refused(self, max_total_steps: int) -> None:
        with pytest.raises((BufferMemoryError, InvalidArgumentError), match="max_total_steps"):
            TrajectoryStorage(2, max_total_steps).allocate(small(0, 3))

    # The head-room, which nothing touches unless many writers need it at once, is not counted as if it were needed.
    def test_counts_only_memory_that_will_be_used(self) -> None:
        free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
        step = TensorDict({"image": torch.zeros(2**20, dtype=torch.uint8), "next": {"done": torch.zeros(1).bool()}})
        TrajectoryStorage(2, free // 2**20 // 4).allocate(step)  # a quarter of what is free; the pages stay untouched


def make_storage_within_4_gib(max_trajectories: int) -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
    TrajectoryStorage(max_trajectories, 100)


class TestWhatIsKept:
    def test_steps_are_counted_without_padding(self) -> None:
        storage = make_storage([small(number, number + 1) for number in range(10)], 10, 55)
        assert contents(storage) == [(number, number + 1) for number in range(10)]
        assert storage.num_steps == 55

    def test_no_more_than_max_trajectories(self) -> None:
        storage = make_storage([small(number, 3) for number in range(7)], 4, 1000)
        assert contents(storage) == [(number, 3) for number in range(3, 7)]
        assert len(storage) == storage.max_size == 4

    def test_no_more_than_max_total_steps(self) -> None:
        storage = make_storage([small(number, 4) for number in range(7)], 100, 13)
        assert contents(storage) == [(4, 4), (5, 4), (6, 4)]

    def test_a_trajectory_of_max_total_steps_evicts_all_others(self) -> None:
        storage = make_storage([small(0, 3), small(1, 3), small(2, 13)], 100, 13)
        assert contents(storage) == [(2, 13)]

    @settings(max_examples=30)
    @given(
        max_trajectories=st.integers(1, 8),
        max_total_steps=st.integers(1, 60),
        max_writers=st.sampled_from([1, 2, 16]),
        data=st.data(),
    )
    def test_are_the_newest_as_in_a_plain_list(
        self, max_trajectories: int, max_total_steps: int, max_writers: int, data: st.DataObject
    ) -> None:
        storage = TrajectoryStorage(max_trajectories, max_total_steps, max_writers=max_writers)
        writer = make_writer(storage)
        model: list[tuple[int, int]] = []
        lengths = data.draw(st.lists(st.integers(1, max_total_steps), min_size=5, max_size=30))
        for number, length in enumerate(lengths):
            writer.extend(small(number, length))
            model.append((number, length))
            while len(model) > max_trajectories or sum(n for _, n in model) > max_total_steps:
                del model[0]
            live = contents(storage)
            # Where lengths are far from the average, the head-room may not do, which is counted: then there are fewer.
            evicted_early = storage.ledger.stats()["evicted_early"]
            assert live == model or (evicted_early and live == model[-len(live) :])
            model = live

    @settings(max_examples=15)
    @given(data=st.data())
    def test_are_never_fewer_than_the_limits_allow(self, data: st.DataObject) -> None:
        # The head-room is of 16 trajectories of average length: enough for whatever is within four times the average.
        storage = TrajectoryStorage(6, 60)
        writer = make_writer(storage)
        model: list[int] = []
        for length in data.draw(st.lists(st.integers(1, 40), min_size=20, max_size=60)):
            writer.extend(small(0, length))
            model.append(length)
            while len(model) > 6 or sum(model) > 60:
                del model[0]
            assert [length for _, length in contents(storage)] == model
        assert storage.ledger.stats()["evicted_early"] == 0

    def test_are_never_fewer_whatever_the_lengths(self) -> None:
        storage = TrajectoryStorage(10, 1000)
        writer = make_writer(storage)
        model: list[int] = []
        for length in np.random.default_rng(1).integers(1, 1001, 400).tolist():
            writer.extend(small(0, length))
            model.append(length)
            while len(model) > 10 or sum(model) > 1000:
                del model[0]
            assert [rows["label"][0, 2].item() for rows in storage] == model
        assert storage.ledger.stats()["evicted_early"] == 0


class TestItems:
    @pytest.mark.parametrize(
        "position", [0, 3, -1, -4, np.int64(1), np.array(2), torch.tensor(1), torch.tensor(-2), (1,)]
    )
    def test_at_one_position_is_one_trajectory(self, four: TrajectoryStorage, position: Any) -> None:
        number = range(4)[int(position[0] if isinstance(position, tuple) else position)]
        data = four[position]
        assert data.shape == (LENGTHS[number],)
        check_trajectory(data, number, LENGTHS[number])

    @pytest.mark.parametrize(
        "positions",
        [
            slice(None),
            slice(1, 3),
            slice(None, None, -2),
            slice(3, 100),
            slice(2, 2),
            [2, 0],
            [-1, 1, 1],
            range(2),
            np.array([3, 1], dtype=np.int32),
            np.array([True, False, True, False]),
            torch.tensor([0, -1]),
            torch.tensor([False, True, False, True]),
            (torch.tensor([2, 3]),),
            torch.tensor([], dtype=torch.int64),
            pytest.param([]),
        ],
        ids=str,
    )
    def test_at_several_positions_are_padded(self, four: TrajectoryStorage, positions: Any) -> None:
        at = positions[0] if isinstance(positions, tuple) else positions
        numbers = np.arange(4)[at if isinstance(at, slice) else np.asarray(at, dtype=None if len(at) else int)].tolist()
        lengths = [LENGTHS[number] for number in numbers]
        data = check_chunk(four[positions])
        assert data.shape == (len(numbers), max(lengths, default=0))
        assert data["collector", "mask"].sum(-1).tolist() == lengths
        assert [row["label"][0, 0].item() for row in data] == numbers

    @pytest.mark.parametrize(
        ("index", "message"),
        [
            (4, "Got index 4, but the buffer holds 4 trajectories"),
            (-5, "Got index -5, but the buffer holds 4 trajectories"),
            ([0, 9], r"Got index \[0 9\], but the buffer holds 4"),
            (torch.tensor([True, False]), r"Got index \[ True False\]"),
            (1.5, "Got index 1.5"),
            (None, "Got index None"),
            pytest.param((1, 2, 3), "Got index"),
            pytest.param(True, "Got index True"),
            pytest.param(torch.tensor([[0, 1, 2]]), "Got index"),
        ],
        ids=str,
    )
    def test_where_there_is_none_is_refused(self, four: TrajectoryStorage, index: Any, message: str) -> None:
        with pytest.raises(TrajectoryIndexError, match=message):
            four[index]

    @pytest.mark.parametrize("index", [0, slice(None), [0]], ids=str)
    def test_of_a_storage_without_memory_is_refused(self, index: Any) -> None:
        with pytest.raises(TrajectoryIndexError):
            TrajectoryStorage(4, 100)[index]

    def test_of_an_empty_storage(self) -> None:
        storage = TrajectoryStorage(4, 100)
        storage.allocate(small(0, 3))
        assert storage[:].shape == (0, 0)
        with pytest.raises(TrajectoryIndexError, match="Got index 0, but the buffer holds 0 trajectories"):
            storage[0]

    def test_one_after_the_other(self, four: TrajectoryStorage) -> None:
        assert [data.shape[0] for data in four] == LENGTHS

    @pytest.mark.parametrize(
        ("item", "there"),
        [
            (0, True),
            (3, True),
            (4, False),
            (-4, True),
            (-5, False),
            pytest.param([0, 4], [True, False]),
        ],
    )
    def test_are_contained_or_not(self, four: TrajectoryStorage, item: Any, there: Any) -> None:
        assert four.contains(item) == there
        assert four.contains(torch.tensor(item)).tolist() == there

    def test_are_copies(self) -> None:
        storage = make_storage([make_trajectory(0, 5), make_trajectory(1, 3)])
        for data in (storage[0], storage[:], storage[[0, 1]], storage[0:1]):
            data.zero_()
        for value in storage.state_dict()["values"]:
            value.zero_()
        assert contents(storage) == [(0, 5), (1, 3)]

    def test_of_live_trajectories_stay_whole_while_others_come(self) -> None:
        storage = make_storage([make_trajectory(0, 5)], 1, 9)
        data = storage[:]
        make_writer(storage).extend(make_trajectory(1, 9))
        check_trajectory(data[0], 0, 5)


@pytest.fixture(scope="module")
def last_two() -> TrajectoryStorage:
    """Trajectories of 9 steps with the ids 1198 and 1199; every row of the ledger was in use before."""
    return make_storage([small(number, 9) for number in range(1200)], 2, 20)


class TestSteps:
    """What a plain TorchRL buffer asks for: steps by trajectory id and place."""

    @pytest.mark.parametrize(
        ("ids", "steps"),
        [
            ([[1198, 1198]], [[3, 4]]),
            ([[1199] * 9], [list(range(9))]),
            ([1199, 1198], [8, 0]),
            (1198, 5),
        ],
        ids=["chunk", "whole", "scattered", "one"],
    )
    def test_are_found_by_id(self, last_two: TrajectoryStorage, ids: Any, steps: Any) -> None:
        data = last_two.get((torch.tensor(ids), torch.tensor(steps)))
        assert data.shape == torch.tensor(ids).shape
        assert data["label"][..., 0].tolist() == ids
        assert data["label"][..., 1].tolist() == steps
        assert data["trajectory", "id"].tolist() == ids

    @pytest.mark.parametrize(
        ("ids", "steps"),
        [
            ([[3, 3]], [[0, 1]]),
            ([[1200, 1200]], [[0, 1]]),
            ([[1198, 1198]], [[8, 9]]),
            pytest.param([[1198, 1198]], [[-2, -1]]),
            pytest.param([[-1, -1]], [[0, 1]]),
        ],
        ids=["gone", "to come", "behind the end", "before the start", "no id"],
    )
    def test_that_are_not_there_are_refused(self, last_two: TrajectoryStorage, ids: Any, steps: Any) -> None:
        with pytest.raises(TrajectoryEvictedError, match=f"Steps of the trajectories .{ids[0][0]}. are not in the buf"):
            last_two.get((torch.tensor(ids), torch.tensor(steps)))


class TestValues:
    @pytest.mark.parametrize(
        "dtype",
        [
            torch.float16,
            torch.bfloat16,
            torch.float32,
            torch.float64,
            torch.complex64,
            torch.complex128,
            torch.uint8,
            torch.int8,
            torch.int16,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.uint16,
            torch.uint32,
            torch.uint64,
        ],
        ids=str,
    )
    def test_of_any_dtype_come_back_bit_by_bit(self, dtype: torch.dtype) -> None:
        written = torch.arange(6 * 8 * dtype.itemsize, dtype=torch.uint8).view(6, -1).view(dtype)
        if dtype == torch.bool:
            written = torch.arange(6 * 8).view(6, 8) % 3 == 0
        storage = make_storage([steps_of(written), steps_of(written[:2])])
        for data in (storage[0], storage[:][0], storage.get((torch.zeros(6, dtype=torch.int64), torch.arange(6)))):
            assert data["value"].dtype == dtype
            assert torch.equal(data["value"].view(torch.uint8), written.view(torch.uint8))
        assert not storage[:]["value"][1, 2:].view(torch.uint8).any()

    @pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 4), (0,)], ids=str)
    def test_of_any_shape_come_back(self, shape: tuple[int, ...]) -> None:
        written = torch.rand(6, *shape, dtype=torch.float64)
        storage = make_storage([steps_of(written)])
        assert torch.equal(storage[0]["value"], written)
        assert torch.equal(storage[:]["value"], written[None])

    @pytest.mark.parametrize(
        "make", [lambda v: v.t().contiguous().t(), lambda v: v.flip(0).flip(0), lambda v: v.requires_grad_() * 1]
    )
    def test_of_any_layout_come_back(self, make: Any) -> None:
        written = make(torch.rand(6, 5))
        storage = make_storage([steps_of(written)])
        assert torch.equal(storage[0]["value"], written.detach())
        assert not storage[0]["value"].requires_grad


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda storage: pickle.loads(pickle.dumps(storage))])
    def test_have_memory_of_their_own(self, copied: Any) -> None:
        storage = make_storage([make_trajectory(number, 3 + number) for number in range(6)])
        twin = copied(storage)
        assert contents(twin) == contents(storage) == [(2, 5), (3, 6), (4, 7), (5, 8)]
        make_writer(storage).extend(make_trajectory(6, 4))
        make_writer(twin).extend(make_trajectory(7, 3))
        assert contents(storage) == [(3, 6), (4, 7), (5, 8), (6, 4)]
        assert contents(twin) == [(3, 6), (4, 7), (5, 8), (7, 3)]

    def test_of_a_storage_without_memory(self) -> None:
        twin = copy.deepcopy(TrajectoryStorage(3, 30, max_writers=2))
        assert not twin.initialized
        assert (twin.max_size, twin.max_total_steps, twin.max_writers) == (3, 30, 2)


class TestUnsupported:
    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (lambda storage: storage.set(0, small(0, 3)), r"Write with rb.extend\(data\)"),
            (lambda storage: storage.__setitem__(0, small(0, 3)), r"Write with rb.extend\(data\)"),
            (lambda storage: storage.flatten(), "flat already"),
        ],
    )
    def test_says_what_to_call(self, call: Any, message: str) -> None:
        storage = make_storage([small(0, 3)])
        with pytest.raises(UnsupportedOperationError, match=message):
            call(storage)
        assert contents(storage) == [(0, 3)]


def test_repr_says_how_full_it_is_and_of_what(four: TrajectoryStorage) -> None:
    assert repr(TrajectoryStorage(4, 1000)) == "TrajectoryStorage(0 of 4 trajectories, 0 of 1,000 steps, not allocated)"
    assert "4 of 4 trajectories, 17 of 100 steps" in repr(four)
    assert "('robot', 'arm', 'joints'): [7] float64" in repr(four)
