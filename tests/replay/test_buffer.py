"""TrajectoryReplayBuffer: a TensorDictReplayBuffer in every respect, over whole trajectories."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
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
    numbers_of,
    small,
)
from tensordict import TensorDict, TensorDictBase
from torchrl.data import RandomSampler, ReplayBuffer, RoundRobinWriter, SamplerWithoutReplacement, traj
from torchrl.envs.transforms import (
    Compose,
    DoubleToFloat,
    ExcludeTransform,
    ObservationNorm,
    RenameTransform,
    ToTensorImage,
    Transform,
)
from waiting import PATIENCE

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    TrajectoryIndexError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.metrics import buffer_metrics

BUFFERS = [make_buffer, make_plain_buffer]


def some(count: int = 6) -> list[TensorDict]:
    """Trajectories of 3, 4, 5 ... steps."""
    return [make_trajectory(number, 3 + number) for number in range(count)]


class TestConstructor:
    def test_makes_its_parts(self) -> None:
        rb = TrajectoryReplayBuffer(max_trajectories=4, max_total_steps=100, chunk_size=3, batch_size=8)
        assert isinstance(rb.storage, TrajectoryStorage)
        assert isinstance(rb.writer, TrajectoryWriter)
        assert isinstance(rb.sampler, ChunkSampler)
        assert (rb.storage.max_size, rb.storage.max_total_steps, rb.batch_size) == (4, 100, 8)

    def test_takes_ready_made_parts(self) -> None:
        storage, writer, sampler = make_storage(some()), TrajectoryWriter(), ChunkSampler(2)
        rb = TrajectoryReplayBuffer(storage=storage, writer=writer, sampler=sampler, batch_size=5)
        assert (rb.storage, rb.writer, rb.sampler) == (storage, writer, sampler)
        rb.extend(make_trajectory(6, 3))
        assert contents(rb) == [(3, 6), (4, 7), (5, 8), (6, 3)]
        assert check_chunk(rb.sample()).shape == (5, 2)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"max_trajectories": None}, "Give max_trajectories and max_total_steps, or a storage"),
            ({"max_total_steps": None}, "Give max_trajectories and max_total_steps, or a storage"),
            ({"storage": TrajectoryStorage(2, 20)}, "Got a storage and max_trajectories, max_total_steps: "),
            ({"chunk_size": None}, "Give chunk_size, the steps of a chunk, or a sampler"),
            ({"sampler": ChunkSampler(2)}, "Got a sampler and chunk_size"),
            ({"max_trajectories": 0}, "max_trajectories must be an integer .*got 0"),
            ({"max_total_steps": True}, "max_total_steps must be an integer .*got True"),
            ({"chunk_size": 0}, "chunk_size must be an integer of at least 1, got 0"),
            ({"chunk_size": 2.5}, "chunk_size must be an integer of at least 1, got 2.5"),
            ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
            ({"batch_size": 2.0}, "batch_size must be an integer of at least 1, got 2.0"),
            ({"prefetch": -1}, "prefetch must be an integer of at least 0, got -1"),
            ({"prefetch": 1.5}, "prefetch must be an integer of at least 0, got 1.5"),
            ({"device": "nowhere"}, "device='nowhere'"),
            ({"writer": RoundRobinWriter()}, "writer=.*TrajectoryWriter"),
            ({"writer": 3}, "writer=3.*TrajectoryWriter"),
            ({"generator": 3}, "generator=3"),
        ],
    )
    def test_refuses_what_can_not_work(self, arguments: dict[str, Any], message: str) -> None:
        defaults = {"max_trajectories": 4, "max_total_steps": 100, "chunk_size": 3, "batch_size": 8}
        with pytest.raises(InvalidArgumentError, match=message):
            TrajectoryReplayBuffer(**{**defaults, **arguments})

    @pytest.mark.parametrize("storage", [3, "storage", torch.zeros(3)], ids=repr)
    def test_refuses_another_storage(self, storage: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="a TrajectoryReplayBuffer needs a TrajectoryStorage"):
            TrajectoryReplayBuffer(storage=storage, chunk_size=3)

    def test_prefetch_needs_a_batch_size(self) -> None:
        with pytest.raises(ValueError, match="the batch-size must be specified in advance"):
            make_buffer(batch_size=None, prefetch=2)


class TestSample:
    def test_of_the_batch_size_of_the_buffer_or_of_the_call(self) -> None:
        rb = make_buffer(some())
        assert check_chunk(rb.sample()).shape == (8, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # TorchRL's buffers warn of "conflicting batch_sizes"
            assert check_chunk(rb.sample(5)).shape == (5, 3)
        assert check_chunk(make_buffer(some(), batch_size=None).sample(5)).shape == (5, 3)

    def test_without_any_batch_size_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="batch_size not specified"):
            make_buffer(some(), batch_size=None).sample()

    @pytest.mark.parametrize("make", BUFFERS)
    def test_returns_its_index_on_request(self, make: Any) -> None:
        data, info = make(some()).sample(return_info=True)
        check_chunk(data)
        index = info["index"] if isinstance(info["index"], torch.Tensor) else torch.stack(info["index"], -1)
        assert torch.equal(index, data["index"])
        assert index.shape == (8, 3, 2)

    @pytest.mark.parametrize("sampler", [ChunkSampler(3), RandomSampler(), SamplerWithoutReplacement()], ids=repr)
    def test_has_the_same_keys_whatever_it_is_asked_for(self, sampler: Any) -> None:
        rb = make_buffer(some(), sampler=sampler)
        keys = set(rb.sample().keys(True, True))
        assert ("trajectory", "id") in keys
        assert set(rb.sample(return_info=True)[0].keys(True, True)) == keys
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert set(rb.sample(3).keys(True, True)) == keys

    def test_can_sample_says_whether_it_can(self) -> None:
        rb = make_buffer()
        assert not rb.can_sample()
        rb.extend(small(0, 4))
        assert rb.can_sample()

    def test_of_chunks_needs_a_chunk_sampler(self) -> None:
        rb = make_buffer(some(), sampler=RandomSampler())
        with pytest.raises(InvalidArgumentError, match="draws no chunks; use a ChunkSampler"):
            rb.sample_chunks(2, 3)

    def test_takes_a_generator_for_one_call(self) -> None:
        rb = make_buffer(some())
        drawn = [rb.sample_chunks(20, 2, generator=torch.Generator().manual_seed(seed))[LABEL] for seed in (1, 1, 2)]
        assert torch.equal(drawn[0], drawn[1])
        assert not torch.equal(drawn[0], drawn[2])

    def test_set_rng_repeats_the_draws(self) -> None:
        rb = make_buffer(some(), batch_size=20)
        drawn = []
        for _ in range(2):
            rb.set_rng(torch.Generator().manual_seed(4))
            drawn.append(rb.sample()[LABEL])
        assert torch.equal(*drawn)


class TestReading:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_by_position(self, make: Any) -> None:
        rb = make(some())
        check_trajectory(rb[0], 2, 5)
        check_trajectory(rb[-1], 5, 8)
        assert numbers_of(check_chunk(rb[:])) == [2, 3, 4, 5]
        assert numbers_of(check_chunk(rb[1:3])) == [3, 4]
        assert numbers_of(check_chunk(rb[torch.tensor([3, 0])])) == [5, 2]
        assert numbers_of(check_chunk(rb.read_all_in_order())) == [2, 3, 4, 5]
        with pytest.raises(TrajectoryIndexError):
            rb[4]

    @pytest.mark.parametrize("make", BUFFERS)
    def test_by_key(self, make: Any) -> None:
        rb = make(some())
        assert torch.equal(rb[LABEL], rb[:][LABEL])
        assert rb["next", "reward"].shape == (4, 8, 1)
        assert rb["collector", "mask"].sum(-1).tolist() == [5, 6, 7, 8]

    @pytest.mark.parametrize("make", BUFFERS)
    def test_by_iteration(self, make: Any) -> None:
        rb = make(some())
        for _, data in zip(range(3), rb, strict=False):
            assert check_chunk(data).shape == (8, 3)
        assert check_chunk(rb.next()).shape == (8, 3)

    def test_without_a_batch_size_it_does_not_iterate(self) -> None:
        with pytest.raises(RuntimeError, match="Batch_size was not specified"):
            next(iter(make_buffer(some(), batch_size=None)))

    def test_the_trajectories_that_meet_a_condition(self) -> None:
        # TorchRL's own would take a row of padded trajectories for a step.
        rb = make_buffer(some())
        found = rb.query(traj.length >= 7)
        assert [trajectory.length for trajectory in found] == [7, 8]
        check_trajectory(found[0].data, 4, 7)
        assert [trajectory.length for trajectory in rb.query()] == [5, 6, 7, 8]
        rb.append_transform(lambda data: data.set("twice", 2 * data["speed"]))
        assert len(rb.query(lambda trajectory: bool((trajectory.twice == 2 * trajectory.speed).all()))) == 4
        assert make_buffer().query() == []

    @pytest.mark.parametrize("condition", [None, traj.length > 1], ids=["all", "long"])
    def test_in_torchrls_buffer_a_query_says_that_it_can_not_work(self, condition: Any) -> None:
        with pytest.raises(UnsupportedOperationError, match="TrajectoryReplayBuffer"):
            make_plain_buffer(some()).query(condition)


class TestWriting:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_by_extend_and_by_add(self, make: Any) -> None:
        rb = make()
        rb.extend(make_trajectory(0, 4))
        assert [int(rb.add(step)) for step in make_trajectory(1, 3)] == [-1, -1, 1]
        assert contents(rb) == [(0, 4), (1, 3)]
        assert (len(rb), rb.write_count) == (2, 7)

    @pytest.mark.parametrize("data", [3, [small(0, 3)], small(0, 3).to_dict(), torch.zeros(3)], ids=lambda d: type(d))
    def test_of_what_is_no_tensordict_is_refused(self, data: Any) -> None:
        with pytest.raises(ValueError, match="TensorDict"):
            make_buffer().extend(data)

    @pytest.mark.parametrize("make", BUFFERS)
    def test_of_single_items_is_refused(self, make: Any) -> None:
        rb = make(some())
        before = contents(rb)
        for write in (lambda: rb.__setitem__(0, small(0, 3)), lambda: rb.write_all(small(0, 3))):
            with pytest.raises(UnsupportedOperationError, match=r"rb.extend\(data\)"):
                write()
        assert contents(rb) == before

    # TorchRL's own would write into rb.storage[:], which is a copy here, and change nothing.
    @pytest.mark.parametrize(
        "write",
        [
            lambda rb, value: rb.__setitem__("speed", value),
            lambda rb, value: rb.__setitem__(("robot", "mode"), value.long()),
            lambda rb, value: rb.__setitem__((slice(None), 0), small(0, 4)),
            lambda rb, value: rb.set_("speed", value),
            lambda rb, value: rb.set_at_("speed", value[0], 0),
            lambda rb, value: rb.update_({"speed": value}),
        ],
        ids=["key", "nested key", "two positions", "set_", "set_at_", "update_"],
    )
    def test_into_what_is_stored_is_refused(self, write: Any) -> None:
        rb = make_buffer(some())
        with pytest.raises(UnsupportedOperationError, match=r"rb\.extend"):
            write(rb, torch.zeros_like(rb["speed"]))
        assert len(contents(rb)) == 4

    def test_by_another_writer_is_refused(self) -> None:
        rb = ReplayBuffer(storage=TrajectoryStorage(4, 100), sampler=ChunkSampler(2), batch_size=2)
        with pytest.raises(UnsupportedOperationError, match="writer=TrajectoryWriter"):
            rb.extend(small(0, 3))

    def test_in_a_plain_replay_buffer(self) -> None:
        storage = make_storage()
        rb = ReplayBuffer(storage=storage, writer=TrajectoryWriter(), sampler=ChunkSampler(2), batch_size=2)
        rb.extend(make_trajectory(0, 4))
        assert check_chunk(rb.sample()).shape == (2, 2)


class TestEmpty:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_then_full_again(self, make: Any) -> None:
        rb = make(some())
        rb.empty()
        assert (len(rb), rb.storage.num_steps, rb.write_count) == (0, 0, 0)
        with pytest.raises(TrajectoryIndexError):
            rb[:]
        with pytest.raises(EmptyBufferError):
            rb.sample()
        rb.extend(make_trajectory(7, 5))
        assert contents(rb) == [(7, 5)]
        assert rb.write_count == 5

    def test_then_with_other_keys(self) -> None:
        rb = make_buffer([small(0, 3)])
        rb.empty()
        rb.extend(make_trajectory(1, 3))
        assert contents(rb) == [(1, 3)]


class Tenfold(Transform):
    """Adds one on the way in, and multiplies by ten on the way out."""

    def __init__(self) -> None:
        super().__init__(["value"], ["value"], ["value"], ["value"])

    def _apply_transform(self, value: torch.Tensor) -> torch.Tensor:
        return value * 10

    def _inv_apply_transform(self, value: torch.Tensor) -> torch.Tensor:
        return value + 1

    def forward(self, data: TensorDictBase) -> TensorDictBase:
        return self._call(data)


def counting(length: int) -> TensorDict:
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict({"value": torch.arange(float(length)), "next": {"done": done}}, [length])


class TestTransforms:
    @pytest.mark.parametrize("make", BUFFERS)
    @pytest.mark.parametrize("given", ["transform=", "append_transform", "insert_transform"])
    def test_apply_to_what_comes_and_their_inverse_to_what_goes_in(self, make: Any, given: str) -> None:
        rb = make(**({"transform": Tenfold()} if given == "transform=" else {}))
        if given == "append_transform":
            rb.append_transform(Tenfold())
        elif given == "insert_transform":
            rb.insert_transform(0, Tenfold())
        data = counting(3)
        rb.extend(data)
        for step in counting(3):
            rb.add(step)
        assert data["value"].tolist() == [0, 1, 2]
        assert rb.storage[:]["value"].tolist() == [[1, 2, 3], [1, 2, 3]]
        assert rb.sample()["value"].tolist() == [[10, 20, 30]] * 8
        assert rb[0]["value"].tolist() == [10, 20, 30]
        assert rb[:]["value"].tolist() == [[10, 20, 30]] * 2
        if make is make_buffer:
            assert rb.sample_chunks(1, 3)["value"].tolist() == [[10, 20, 30]]

    def test_can_be_inverted(self) -> None:
        rb = make_buffer()
        rb.append_transform(Tenfold(), invert=True)
        rb.extend(counting(3))
        assert rb.storage[0]["value"].tolist() == [0, 10, 20]
        assert rb.sample()["value"].tolist() == [[1, 11, 21]] * 8

    def test_of_torchrl(self) -> None:
        rb = make_buffer(
            transform=Compose(
                ToTensorImage(in_keys=["pixels"], shape_tolerant=True),
                ObservationNorm(loc=1.0, scale=2.0, in_keys=["observation"]),
                RenameTransform(["speed"], ["velocity"]),
                DoubleToFloat(in_keys=["clock"]),
            )
        )
        rb.extend(make_trajectory(0, 4))
        raw, data = rb.storage[0], rb.sample_chunks(1, 4)[0]
        assert data["pixels"].shape == (4, 3, 4, 5)
        assert torch.equal(data["pixels"], raw["pixels"].permute(0, 3, 1, 2) / 255)
        assert torch.equal(data["observation"], raw["observation"] * 2 + 1)
        assert torch.equal(data["velocity"], raw["speed"])
        assert data["clock"].dtype == torch.float32

    def test_that_leave_keys_out_on_the_way_in_decide_what_is_stored(self) -> None:
        rb = make_buffer(transform=ExcludeTransform("pixels", ("robot", "arm"), inverse=True))
        rb.extend(make_trajectory(0, 5))
        assert not {("pixels",), ("robot", "arm", "joints")} & set(rb.storage.schema.keys)
        assert ("robot", "mode") in rb.storage.schema.keys
        assert contents(rb) == [(0, 5)]

    def test_can_be_plain_functions(self) -> None:
        rb = make_buffer([counting(3)], transform=lambda data: data.set("more", data["value"] + 1))
        assert rb.sample()["more"].tolist() == [[1, 2, 3]] * 8
        assert "more" not in rb.storage[0]

    def test_see_a_batch_that_is_theirs(self) -> None:
        rb = make_buffer([counting(3)])
        rb.append_transform(lambda data: data.zero_())
        rb.sample()
        assert rb.storage[0]["value"].tolist() == [0, 1, 2]


class TestPrefetch:
    @pytest.mark.parametrize("make", BUFFERS)
    def test_gives_whole_chunks_in_any_number(self, make: Any) -> None:
        rb = make(some(), prefetch=3)
        for _ in range(30):
            assert check_chunk(rb.sample()).shape == (8, 3)
        assert rb.stats()["prefetch_queue_size"] == 3

    def test_asks_for_the_chunk_size_once_a_batch(self) -> None:
        sizes = iter([1, 2, 3, 4] * 100)
        rb = make_buffer(some(), chunk_size=lambda: next(sizes), prefetch=1)
        assert [rb.sample().shape[1] for _ in range(8)] == [1, 2, 3, 4] * 2

    def test_raises_what_goes_wrong_meanwhile(self) -> None:
        sizes = iter([2, 99, 2, 2])
        rb = make_buffer(some(), chunk_size=lambda: next(sizes), prefetch=1)
        rb.sample()
        with pytest.raises(ValueError, match="Got chunk_size 99"):
            rb.sample()
        assert check_chunk(rb.sample()).shape == (8, 2)

    def test_goes_on_in_copies_and_in_children(self) -> None:
        rb = make_buffer(some(), prefetch=2)
        rb.sample()
        for twin in (copy.deepcopy(rb), pickle.loads(pickle.dumps(rb))):
            assert check_chunk(twin.sample()).shape == (8, 3)
        child = Child("fork", rb)
        assert child.call(sample_shape) == (8, 3)
        child.end()
        assert check_chunk(rb.sample()).shape == (8, 3)

    def test_writers_go_on_meanwhile(self) -> None:
        rb = make_buffer(some(), prefetch=4)
        done = threading.Event()

        def write() -> None:
            number = 6
            while not done.is_set():
                rb.extend(make_trajectory(number, 3 + number % 7))
                number += 1

        writing = threading.Thread(target=write)
        writing.start()
        for _ in range(80):
            check_chunk(rb.sample())
        done.set()
        writing.join(PATIENCE)
        assert rb.stats()["published"] > 6


def sample_shape(rb: TrajectoryReplayBuffer) -> tuple[int, ...]:
    return tuple(check_chunk(rb.sample()).shape)


class TestStats:
    def test_say_what_happened(self) -> None:
        rb = make_buffer(some(7), prefetch=2)
        rb.extend(make_trajectory(7, 9)[:2])
        rb.sample()
        stats = rb.stats()
        assert 0.0 <= stats.pop("sampled_age_mean") <= stats.pop("sampled_age_max")
        expected = {
            "size": 4,
            "capacity": 4,
            "utilization": 1.0,
            "initialized": True,
            "write_count": sum(range(3, 10)),
            "prefetch_queue_size": 2,
            "trajectories": 4,
            "steps": 6 + 7 + 8 + 9,
            "published": 7,
            "evicted": 3,
            "evicted_early": 0,
            "pinned": 0,
            "discarded": 0,
            "reclaimed": 0,
            "writing": 0,
            "pending_steps": 2,
            "pending_trajectories": 1,
            "pending_bytes": 2 * rb.storage.schema.nbytes,
            "truncated": 0,
            "rejected": 0,
            "redrawn": 0,
            "unfit": 0,
            "sampled_policy_lag_mean": None,
            "sampled_policy_lag_max": None,
            **rb.storage.bytes(),
        }
        assert {name: stats[name] for name in expected} == expected
        # What the others are is held in tests/monitor; none comes that is not one of these.
        assert stats.keys() == expected.keys() | buffer_metrics(rb.storage).keys()


class TestCopies:
    @pytest.mark.parametrize("make", BUFFERS)
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda rb: pickle.loads(pickle.dumps(rb))])
    def test_have_trajectories_of_their_own(self, make: Any, copied: Any) -> None:
        rb = make(some())
        twin = copied(rb)
        rb.extend(make_trajectory(6, 3))
        twin.extend(make_trajectory(7, 4))
        assert contents(rb) == [(3, 6), (4, 7), (5, 8), (6, 3)]
        assert contents(twin) == [(3, 6), (4, 7), (5, 8), (7, 4)]
        check_chunk(twin.sample())

    def test_go_on_with_the_same_draws(self) -> None:
        rb = make_buffer(some(), generator=torch.Generator().manual_seed(3), batch_size=20)
        twin = copy.deepcopy(rb)
        assert torch.equal(rb.sample()[LABEL], twin.sample()[LABEL])


class TestLocks:
    def test_sharing_it_gives_it_no_lock(self) -> None:
        rb = make_buffer(some())
        assert rb.shared
        assert rb.share() is rb
        rb._write_lock.__enter__()  # TorchRL's would be a multiprocessing.Lock, and not given back here
        child = Child("fork", rb)
        assert child.call(sample_shape) == (8, 3)
        child.end()

    def test_a_child_forked_while_a_thread_is_inside_goes_on(self) -> None:
        rb = make_buffer(some())
        inside, leave = threading.Event(), threading.Event()

        def stay_inside() -> None:
            with rb._replay_lock, rb._futures_lock:
                inside.set()
                leave.wait(PATIENCE)

        thread = threading.Thread(target=stay_inside)
        thread.start()
        assert inside.wait(PATIENCE)
        child = Child("fork", rb)
        leave.set()
        assert child.call(extend_and_read) == 4
        child.end()
        thread.join(PATIENCE)


def extend_and_read(rb: TrajectoryReplayBuffer) -> int:
    rb.extend(make_trajectory(9, 5))
    check_chunk(rb.sample())
    return len(rb)


@pytest.mark.gpu
def test_pinned_batches_are_pinned() -> None:
    rb = make_buffer(some(), pin_memory=True)
    data = rb.sample()
    assert all(value.is_pinned() for value in data.values(True, True))
    check_chunk(data)


def test_repr_names_the_parts() -> None:
    text = repr(make_buffer(some()))
    for part in ("TrajectoryReplayBuffer(", "4 of 4 trajectories", "TrajectoryWriter()", "ChunkSampler(chunk_size=3)"):
        assert part in text


def test_two_buffers_on_one_storage_see_the_same_trajectories() -> None:
    storage = make_storage()
    writing, reading = make_buffer(storage=storage), make_buffer(storage=storage, sampler=RandomSampler())
    writing.extend(make_trajectory(0, 5))
    assert contents(reading) == [(0, 5)]
    check_chunk(reading.sample())
