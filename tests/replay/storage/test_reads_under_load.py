"""Every way to look into a buffer while other processes write to it as fast as they can: whole, or a typed error.

Each test ends when enough was read and enough was written meanwhile. What is written says in every value which step of
which trajectory it is, and the buffer is so small that everything in it is replaced a hundred times.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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
    make_trajectory,
)
from tensordict import TensorDictBase
from torchrl.data.replay_buffers import ReplayBuffer

from embodichain_rl import ChunkSampler, TrajectoryStorage
from embodichain_rl.errors import CheckpointError, EmptyBufferError, TrajectoryIndexError
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.memory import SharedBlock

KEPT = 3
LONGEST = 10
WRITERS = 2

READS = 25
"""Rounds of reading in a test, at least."""

WRITES = 200
"""Trajectories that are written meanwhile, at least."""

FIELDS = ["observation", "pixels", ("robot", "mode"), ("next", "observation")]


def write(given: tuple[ReplayBuffer, SharedBlock], writer: int) -> None:
    rb, over = given
    lengths = random.Random(writer)
    number = 1_000_000 * writer
    while not over.array(np.int64, (1,))[0]:
        rb.extend(make_trajectory(number, lengths.randint(1, LONGEST), fields=FIELDS))
        number += 1


def make_full(make: Callable[..., Any] = make_buffer) -> Any:
    storage = TrajectoryStorage(KEPT, KEPT * LONGEST)
    rb = make(storage=storage, sampler=ChunkSampler(1))
    for number in range(KEPT):
        rb.extend(make_trajectory(9000 + number, LONGEST, fields=FIELDS))
    return rb


@contextmanager
def written_to(rb: ReplayBuffer) -> Iterator[Iterator[int]]:
    """Has other processes write, and iterates until there was enough of both; checks the ledger then."""
    over = SharedBlock(8)
    writers = [Child("fork", (rb, over)) for _ in range(WRITERS)]
    for number, writer in enumerate(writers):
        writer.begin(write, number)
    begun = rb.storage.ledger.next_id

    def rounds() -> Iterator[int]:
        for number in itertools.count():
            if number >= READS and rb.storage.ledger.next_id >= begun + WRITES:
                return
            assert all(writer.process.is_alive() for writer in writers)
            yield number

    try:
        yield rounds()
    finally:  # also after a failure: processes that go on writing would be waited for until a timeout
        over.array(np.int64, (1,))[0] = 1
        for writer in writers:
            writer.end()
    for writer in writers:
        writer.result()
    check_ledger(rb.storage.ledger)
    assert all(length <= LONGEST for _, length in contents(rb))


def check_one(trajectory: TensorDictBase) -> None:
    number, _, length, _ = trajectory[LABEL][0].tolist()
    check_trajectory(trajectory, number, length)
    assert len(trajectory["trajectory", "id"].unique()) == 1


def check_many(data: TensorDictBase) -> None:
    """Says that each row is a whole trajectory, that none is there twice, and that they are in order."""
    if not len(data):
        return
    check_chunk(data)
    lengths = data["collector", "mask"].sum(-1)
    assert torch.equal(lengths, data[LABEL][:, 0, 2])
    ids = data["trajectory", "id"][:, 0]
    assert (ids.diff() > 0).all()


both_buffers = pytest.mark.parametrize("make", [make_buffer, make_plain_buffer])


@both_buffers
class TestByPosition:
    def test_one(self, make: Any) -> None:
        rb = make_full(make)
        with written_to(rb) as rounds:
            for number in rounds:
                index = (0, 1, -1, -2)[number % 4]
                check_one(rb.storage[index])
                check_one(rb[index])

    def test_several(self, make: Any) -> None:
        rb = make_full(make)
        indices = [slice(1, None), slice(None, None, 2), [0, 2], torch.tensor([1, 2])]
        with written_to(rb) as rounds:
            for number in rounds:
                read = rb[indices[number % len(indices)]]
                check_many(read)
                assert len(read) == 2

    def test_all(self, make: Any) -> None:
        rb = make_full(make)
        with written_to(rb) as rounds:
            for _ in rounds:
                read = rb[:]
                check_many(read)
                assert 2 <= len(read) <= KEPT

    def test_beyond_the_end(self, make: Any) -> None:
        rb = make_full(make)
        with written_to(rb) as rounds:
            for _ in rounds:
                with pytest.raises(TrajectoryIndexError, match="holds 3 trajectories"):
                    rb[KEPT]


class TestQuery:
    def test_all(self) -> None:
        rb = make_full()
        with written_to(rb) as rounds:
            for _ in rounds:
                found = rb.query()
                assert 2 <= len(found) <= KEPT
                for trajectory in found:
                    check_one(trajectory.data)

    def test_some(self) -> None:
        rb = make_full()
        with written_to(rb) as rounds:
            for _ in rounds:
                for trajectory in rb.query(lambda trajectory: len(trajectory.data) > 4):
                    check_one(trajectory.data)
                    assert len(trajectory.data) > 4


@both_buffers
class TestCheckpoint:
    def test_directory(self, make: Any, tmp_path: Path) -> None:
        rb, copy = make_full(make), make_full(make)
        with written_to(rb) as rounds:
            for number in rounds:
                rb.dumps(tmp_path / str(number % 2))
                copy.loads(tmp_path / str(number % 2))
                assert 2 <= len(contents(copy)) <= KEPT

    def test_state(self, make: Any) -> None:
        rb, copy = make_full(make), make_full(make)
        with written_to(rb) as rounds:
            for _ in rounds:
                copy.load_state_dict(rb.state_dict())
                assert 2 <= len(contents(copy)) <= KEPT

    def test_loaded_into_a_buffer_that_is_written_to(self, make: Any, tmp_path: Path) -> None:
        rb = make_full(make)
        rb.dumps(tmp_path)
        state = rb.state_dict()
        newest = -1
        with written_to(rb) as rounds:
            for number in rounds:
                if number % 2:
                    rb.loads(tmp_path)
                else:
                    rb.load_state_dict(state)
                check_many(rb[:])
                with pytest.raises(CheckpointError):
                    rb.load_state_dict({**state, "storage": {}, "_storage": {}})
                assert newest < rb.storage.ledger.next_id, "an id is given out again"
                newest = rb.storage.ledger.next_id - 1


@both_buffers
def test_counts_agree_and_never_fall_below_what_is_kept(make: Any) -> None:
    rb = make_full(make)
    before, written = rb.storage.ledger.stats(), rb.write_count
    with written_to(rb) as rounds:
        for _ in rounds:
            assert len(rb) == len(rb.storage) == KEPT
            assert KEPT <= rb.storage.num_steps <= rb.storage.max_total_steps
            stats = rb.storage.ledger.stats()
            assert stats["trajectories"] == stats["published"] - stats["evicted"] == KEPT
            assert KEPT <= stats["steps"] <= rb.storage.max_total_steps
            assert all(before[name] <= stats[name] for name in ("published", "evicted", "evicted_early"))
            assert 0 <= stats["writing"] <= WRITERS
            assert written <= rb.write_count
            before, written = stats, rb.write_count
            assert rb.stats()["size"] == KEPT
            assert f"{KEPT} of {KEPT} trajectories" in repr(rb.storage)
    assert rb.storage.ledger.stats()["reclaimed"] == 0


@both_buffers
def test_emptying_takes_what_is_there_and_nothing_that_comes_later(make: Any) -> None:
    rb = make_full(make)
    with written_to(rb) as rounds:
        for _ in rounds:
            newest = rb.storage.ledger.next_id - 1
            rb.empty()
            left = rb[:]
            check_many(left)
            assert not len(left) or int(left["trajectory", "id"].min()) > newest


def test_sampling_a_buffer_that_is_emptied_again_and_again() -> None:
    rb = make_full()
    empty = 0
    with written_to(rb) as rounds:
        for number in rounds:
            if number % 3 == 0:
                rb.empty()
            try:
                check_chunk(rb.sample())
            except EmptyBufferError:
                empty += 1
    assert empty > 0
