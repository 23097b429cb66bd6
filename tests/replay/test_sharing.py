"""Several processes on one buffer, under every start method."""

from __future__ import annotations

import copy
import gc
import itertools
import multiprocessing
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from steps import (
    START_METHODS,
    Child,
    check_chunk,
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
from torchrl.data import RandomSampler, ReplayBuffer
from waiting import PATIENCE

from embodichain_rl import TrajectoryStorage, TrajectoryWriter
from embodichain_rl.errors import SchemaMismatchError, SharingError

pytestmark = pytest.mark.slow

Given = dict[str, Any]

RACES = 24
"""Fresh buffers that two processes write first, at the same moment."""


def large(**kwargs: Any) -> ReplayBuffer:
    return make_buffer(max_trajectories=1000, max_total_steps=20_000, **kwargs)


class Family:
    """A parent and two children that share some buffers, one for each test."""

    def __init__(self, start_method: str) -> None:
        self.start_method = start_method
        self.given: Given = {
            "filled": make_buffer([make_trajectory(number, 3 + number) for number in range(6)]),
            "both ways": make_buffer([make_trajectory(0, 5)]),
            "fresh": make_buffer(),
            "race": large(),
            "other keys": large(),
            "ids": large(),
            "unfinished": make_buffer([small(0, 4)]),
            "emptied": make_buffer([small(0, 4)]),
            "evicting": make_buffer([small(0, 4)], max_trajectories=2),
            "plain": make_plain_buffer([make_trajectory(0, 4)], shared=True),
            "plain, fresh": make_plain_buffer(shared=True),
            "plain, busy": make_plain_buffer(shared=True),
            "items": make_buffer([make_trajectory(0, 4)], sampler=RandomSampler()),
            "storage": make_storage([make_trajectory(0, 4)]),
            "many fresh": [make_buffer() for _ in range(RACES)],
            "together": multiprocessing.get_context(start_method).Barrier(2),
        }
        self.given["unfinished"].extend(small(1, 6)[:3])
        self.children = [Child(start_method, self.given) for _ in range(2)]

    def end(self) -> None:
        for child in self.children:
            child.end()


@pytest.fixture(scope="module", params=START_METHODS)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    family = Family(request.param)
    yield family
    family.end()


# What the children are told to do.


def contents_of(given: Given, name: str) -> list[tuple[int, int]]:
    return contents(given[name])


def extend(given: Given, name: str, data: Any) -> list[int]:
    return given[name].extend(data).reshape(-1).tolist()


def extend_many(given: Given, name: str, first: int, count: int) -> list[int]:
    """Writes trajectories in two pieces each; returns their ids."""
    ids = []
    for number in range(first, first + count):
        steps = small(number, 2 + number % 7)
        given[name].extend(steps[:1])
        ids.append(int(given[name].extend(steps[1:])[-1]))
    return ids


def sample_many(given: Given, name: str, count: int) -> list[int]:
    """Checks that many batches; returns the numbers of the trajectories that were drawn."""
    numbers: set[int] = set()
    for _ in range(count):
        numbers.update(numbers_of(check_chunk(given[name].sample())))
    return sorted(numbers)


def counts_of(given: Given, name: str) -> tuple[int, int, int]:
    return len(given[name]), given[name].write_count, given[name].writer.pending_steps


def empty(given: Given, name: str) -> None:
    given[name].empty()


def drawn_by(given: Given, name: str) -> torch.Tensor:
    return given[name].sample_chunks(50, 2)["label"]


def extend_copy(given: Given, name: str) -> list[tuple[int, int]]:
    twin = copy.deepcopy(given[name])
    twin.extend(make_trajectory(9, 3))
    return contents(twin)


def extend_in_grandchild(given: Given, name: str, data: Any) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            given[name].extend(data)
            check_chunk(given[name].sample())
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def extend_all_at_once(given: Given, keys: Sequence[str]) -> list[str]:
    """Writes one trajectory to each fresh buffer, together with another process; returns what was raised."""
    done = torch.tensor([False, False, True])
    values = {"one": torch.full((3,), 1.0), "two": torch.full((3,), 2.0), "next": {"done": done}}
    errors = []
    for rb in given["many fresh"]:
        data = TensorDict({key: values[key] for key in keys}, [3])
        given["together"].wait(PATIENCE)
        try:
            rb.extend(data)
        except Exception as error:
            errors.append(repr(error))
    return errors


class TestChildren:
    def test_read_what_was_there_when_they_started(self, family: Family) -> None:
        for child in family.children:
            assert child.call(contents_of, "filled") == [(2, 5), (3, 6), (4, 7), (5, 8)]
            assert child.call(sample_many, "filled", 10) == [2, 3, 4, 5]

    def test_see_what_anyone_writes(self, family: Family) -> None:
        rb, (one, other) = family.given["both ways"], family.children
        one.call(extend, "both ways", make_trajectory(1, 6))
        assert contents(rb) == other.call(contents_of, "both ways") == [(0, 5), (1, 6)]
        rb.extend(make_trajectory(2, 7))
        assert one.call(contents_of, "both ways") == other.call(contents_of, "both ways") == [(0, 5), (1, 6), (2, 7)]
        assert one.call(counts_of, "both ways") == (3, 18, 0)

    def test_that_write_first_allocate_for_all(self, family: Family) -> None:
        rb, (one, other) = family.given["fresh"], family.children
        assert not rb.storage.initialized
        one.call(extend, "fresh", make_trajectory(7, 5))
        assert rb.storage.initialized
        assert contents(rb) == other.call(contents_of, "fresh") == [(7, 5)]
        with pytest.raises(SchemaMismatchError):
            other.call(extend, "fresh", small(8, 4))
        rb.extend(make_trajectory(9, 3))
        assert other.call(sample_many, "fresh", 10) == [7, 9]

    def test_that_write_first_at_the_same_time_allocate_once(self, family: Family) -> None:
        for n, child in enumerate(family.children):
            child.begin(extend_many, "race", 100 * n, 40)
        family.given["race"].extend(small(200, 5))
        ids = [child.result() for child in family.children]
        assert sorted(contents(family.given["race"])) == sorted(
            [(100 * n + k, 2 + (100 * n + k) % 7) for n in range(2) for k in range(40)] + [(200, 5)]
        )
        assert len(set(ids[0] + ids[1])) == 80

    def test_that_write_other_keys_first_are_told(self, family: Family) -> None:
        one, other = family.children
        one.begin(extend, "other keys", small(0, 3))
        other.begin(extend, "other keys", make_trajectory(1, 3))
        outcomes: list[Any] = []
        for child in (one, other):
            try:
                outcomes.append(child.result())
            except SchemaMismatchError:
                outcomes.append("refused")
        assert outcomes.count("refused") == 1
        assert contents(family.given["other keys"]) == [(outcomes.index("refused") ^ 1, 3)]

    def test_that_write_keys_in_another_order_first_are_not_mixed_up(self, family: Family) -> None:
        one, other = family.children
        one.begin(extend_all_at_once, ["one", "two", "next"])
        other.begin(extend_all_at_once, ["two", "next", "one"])
        assert one.result() + other.result() == []
        for rb in family.given["many fresh"]:
            assert len(rb) == 2
            assert rb[:]["one"].eq(1).all(), "the values of one key came under another"
            assert rb[:]["two"].eq(2).all()

    def test_give_every_trajectory_an_id_of_its_own(self, family: Family) -> None:
        for n, child in enumerate(family.children):
            child.begin(extend_many, "ids", 1000 * n, 100)
        ids = extend_many(family.given, "ids", 2000, 100)
        ids += itertools.chain(*(child.result() for child in family.children))
        rb = family.given["ids"]
        assert len(set(ids)) == 300
        numbers = {1000 * n + k for n in range(3) for k in range(100)}
        assert {number for number, _ in contents(rb)} == numbers
        assert rb.write_count == rb.storage.num_steps == sum(2 + number % 7 for number in numbers)
        assert set(rb[:]["trajectory", "id"][:, 0].tolist()) == set(ids)

    def test_start_with_nothing_under_way(self, family: Family) -> None:
        rb, (one, other) = family.given["unfinished"], family.children
        assert one.call(counts_of, "unfinished") == (1, 4, 0)
        one.call(extend, "unfinished", small(2, 5)[:2])
        other.call(extend, "unfinished", small(3, 5))
        rb.extend(small(1, 6)[3:])
        one.call(extend, "unfinished", small(2, 5)[2:])
        assert contents(rb) == [(0, 4), (3, 5), (1, 6), (2, 5)]

    def test_empty_it_for_all(self, family: Family) -> None:
        rb, (one, other) = family.given["emptied"], family.children
        one.call(empty, "emptied")
        assert (len(rb), other.call(contents_of, "emptied"), rb.write_count) == (0, [], 0)
        other.call(extend, "emptied", small(5, 4))
        assert contents(rb) == [(5, 4)]

    def test_evict_for_all(self, family: Family) -> None:
        for n, child in enumerate(family.children):
            child.call(extend_many, "evicting", 10 * n, 5)
        assert contents(family.given["evicting"]) == [(13, 8), (14, 2)]

    def test_sample_while_others_write(self, family: Family) -> None:
        writer, reader = family.children
        writer.begin(extend_many, "evicting", 100, 200)
        reader.begin(sample_many, "evicting", 200)
        for _ in range(50):
            data = family.given["evicting"].sample_chunks(8, 2)
            check_chunk(data)
        assert len(writer.result()) == 200
        reader.result()

    def test_can_copy_it_for_themselves(self, family: Family) -> None:
        before = contents(family.given["filled"])
        assert family.children[0].call(extend_copy, "filled") == [*before[1:], (9, 3)]
        assert contents(family.given["filled"]) == before

    def test_hand_it_on_to_their_own(self, family: Family) -> None:
        assert family.children[0].call(extend_in_grandchild, "both ways", make_trajectory(8, 9)) == 0
        assert contents(family.given["both ways"])[-1] == (8, 9)

    def test_sample_with_other_samplers(self, family: Family) -> None:
        for child in family.children:
            assert child.call(sample_many, "items", 5) == [0]

    def test_share_a_storage_alone(self, family: Family) -> None:
        make_writer(family.given["storage"]).extend(make_trajectory(1, 6))
        assert family.children[0].call(contents_of, "storage") == [(0, 4), (1, 6)]

    def test_draw_with_seeds_of_their_own(self, family: Family) -> None:
        if family.start_method == "fork":
            pytest.skip("a forked child inherits the state of torch's generator; a worker of a DataLoader is seeded")
        one, other = (child.call(drawn_by, "filled") for child in family.children)
        assert not torch.equal(one, other)


class TestTorchRLsSharedBuffer:
    def test_is_read_and_written_by_all(self, family: Family) -> None:
        rb, (one, other) = family.given["plain"], family.children
        one.call(extend, "plain", make_trajectory(1, 5))
        rb.extend(make_trajectory(2, 6))
        assert contents(rb) == other.call(contents_of, "plain") == [(0, 4), (1, 5), (2, 6)]
        assert other.call(sample_many, "plain", 10) == [0, 1, 2]

    def test_is_allocated_by_whoever_writes_first(self, family: Family) -> None:
        family.children[0].call(extend, "plain, fresh", make_trajectory(1, 5))
        assert contents(family.given["plain, fresh"]) == [(1, 5)]
        assert family.children[1].call(sample_many, "plain, fresh", 3) == [1]

    def test_is_whole_while_all_write(self, family: Family) -> None:
        one, other = family.children
        one.begin(extend_whole, "plain, busy", 100, 100)
        other.begin(sample_when_filled, "plain, busy", 100)
        extend_whole(family.given, "plain, busy", 300, 100)
        one.result()
        other.result()
        assert len(contents(family.given["plain, busy"])) == 4


def extend_whole(given: Given, name: str, first: int, count: int) -> None:
    for number in range(first, first + count):
        given[name].extend(make_trajectory(number, 3 + number % 7))


def sample_when_filled(given: Given, name: str, count: int) -> None:
    filled = threading.Event()
    while not len(given[name]):
        filled.wait(0.001)
    sample_many(given, name, count)


class TestWhatCanNotBeShared:
    def test_memory_through_a_pipe(self) -> None:
        storage = make_storage([small(0, 3)])
        with pytest.raises(SharingError, match="only while that process is started"):
            pickle.dumps(storage._memory.arena_block)

    def test_a_storage_through_a_pipe_is_a_copy(self) -> None:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        storage = make_storage([small(0, 3)])
        sender.send(storage)
        assert receiver.poll(PATIENCE)
        twin = receiver.recv()
        make_writer(twin).extend(small(1, 4))
        assert contents(storage) == [(0, 3)]
        assert contents(twin) == [(0, 3), (1, 4)]


@pytest.mark.parametrize("start_method", ["fork", "forkserver"])
def test_a_buffer_that_has_prefetched_goes_on_in_a_child(start_method: str) -> None:
    rb = make_buffer([make_trajectory(0, 4)], prefetch=2)
    rb.sample()
    child = Child(start_method, {"rb": rb})
    assert child.call(sample_many, "rb", 5) == [0]
    child.end()


def test_nothing_is_left_behind() -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def shared_files() -> set[str]:
        # Of this process: what it maps, and torch's, which have its id in their names. Others make some meanwhile.
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/dev/shm/" in line}
        return mapped | {name for name in os.listdir("/dev/shm") if f"_{os.getpid()}_" in name}

    def use_one() -> None:
        rb = make_buffer([make_trajectory(0, 5)])
        child = Child("fork", {"rb": rb})
        child.call(extend, "rb", make_trajectory(1, 5))
        child.end()

    use_one()
    before, files = descriptors(), shared_files()
    for _ in range(5):
        use_one()
    assert descriptors() <= before
    assert shared_files() <= files


def test_a_writer_that_was_pickled_writes_to_the_same_storage() -> None:
    child = Child("fork", {"storage": (storage := TrajectoryStorage(4, 100)), "writer": make_writer(storage)})
    child.call(extend, "writer", small(3, 5))
    child.end()
    assert contents(storage) == [(3, 5)]
    assert isinstance(make_writer(storage), TrajectoryWriter)
