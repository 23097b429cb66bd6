"""Ragged and encoded values: a kill at any instruction, and a buffer that turns over at any instruction."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from instructions import change_within_samples, run_in_child_until
from ragged_steps import check_ragged, ragged_trajectory
from tensordict import TensorDict

from embodichain_rl import ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.replay.ledger.invariants import check_ledger
from embodichain_rl.shared.lock import LOCK_TIMEOUT

pytestmark = pytest.mark.slow

EVERY = 211
"""Every so-many-th instruction is one to be killed at; a prime, so that loops are met at all of theirs."""


class PlainCodec:
    """A codec in Python: it needs no other package, and notices bytes of another frame."""

    def encode(self, frame: Any) -> bytes:
        return bytes([frame.reshape(-1)[0] % 251]) * 3 + frame.tobytes()

    def decode(self, data: bytes, out: Any) -> None:
        assert len(data) == 3 + out.nbytes
        out.reshape(-1)[:] = list(data[3:])
        assert data[:3] == bytes([out.reshape(-1)[0] % 251]) * 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the thread pool of OpenMP does not survive a fork
    yield
    torch.set_num_threads(threads)


def make_buffer(**options: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        max_total_steps=40,
        batch_size=4,
        compress={"frame": PlainCodec()},
        ragged=["points"],
        ragged_bytes=300,
        **{"max_trajectories": 3, "sampler": ChunkSampler(3), **options},
    )


@pytest.mark.parametrize("compact", [False, True])
def test_killed_at_any_instruction_of_extend(compact: bool) -> None:
    rb = make_buffer(compact=compact)
    for number in range(5):
        rb.extend(ragged_trajectory(number, 4 + number))
    pieces = ragged_trajectory(77, 6).split([3, 3])
    killed = 0
    while run_in_child_until(killed * EVERY, lambda: [rb.extend(piece) for piece in pieces]):
        check_ledger(rb.storage.ledger)
        before = time.monotonic()
        rb.extend(ragged_trajectory(100 + killed, 4 + killed % 5))
        check_ragged(rb.sample())
        assert time.monotonic() - before < LOCK_TIMEOUT / 2, "it waited for the lock of the dead"
        assert len(rb) == 3
        killed += 1
    assert killed > 20, f"only {killed} instructions were reached"
    assert rb.stats()["writing"] <= 1  # at most the last reservation; the others were reclaimed


@pytest.mark.parametrize("sampler", [ChunkSampler(3), ChunkSampler(3, pad="both")], ids=["chunks", "padded"])
def test_the_buffer_turns_over_between_any_two_instructions_of_sample(sampler: ChunkSampler) -> None:
    rb = make_buffer(max_trajectories=2, sampler=sampler)
    numbers = itertools.count()

    def turn_over() -> None:
        for number in itertools.islice(numbers, 12):  # so many that the space of all live trajectories is reused
            rb.extend(ragged_trajectory(number, 4 + number % 5))

    def check(batch: TensorDict) -> None:
        assert batch.shape == (4, 3)
        check_ragged(batch)

    turn_over()
    assert change_within_samples(rb, turn_over, EVERY, check) > 10 * EVERY
    check_ledger(rb.storage.ledger)


def scored(number: int, length: int) -> TensorDict:
    """Return a trajectory whose steps can be relabelled under ``"score"``."""
    return ragged_trajectory(number, length).set("score", torch.zeros(length, dtype=torch.int64))


def edit(rb: TrajectoryReplayBuffer, score: int) -> None:
    """Relabel the newest trajectory, discard the one before it, pin the oldest one."""
    oldest, *_, before, newest = rb.storage.ledger.live().all().tolist()
    rb.unpin(rb.pinned)
    rb.relabel("score", lambda steps: torch.full_like(steps["score"], score), ids=[newest])
    rb.discard([before])
    rb.pin(oldest)


def check_scored(data: TensorDict) -> None:
    check_ragged(data)
    assert (data["score"] == data["score"][:, :1]).all(), "half of a trajectory is relabelled"


def test_killed_at_any_instruction_while_trajectories_are_pinned_discarded_and_relabelled() -> None:
    rb = make_buffer(max_trajectories=4)
    for number in range(6):
        rb.extend(scored(number, 4 + number % 3))
    killed = 0
    while run_in_child_until(killed * EVERY, partial(edit, rb, 1 + killed)):
        check_ledger(rb.storage.ledger)
        before = time.monotonic()
        for number in range(2):  # as many as were discarded, and one more
            rb.extend(scored(100 + 2 * killed + number, 4 + killed % 3))
        assert time.monotonic() - before < LOCK_TIMEOUT / 2, "it waited for the lock of the dead"
        check_scored(rb.sample())
        assert len(rb) == 4
        assert len(rb.pinned) <= 1
        killed += 1
    assert killed > 20, f"only {killed} instructions were reached"


def test_trajectories_are_pinned_discarded_and_relabelled_between_any_two_instructions_of_sample() -> None:
    rb = make_buffer(max_trajectories=4)
    numbers = itertools.count()

    def change() -> None:
        for number in itertools.islice(numbers, 6):
            rb.extend(scored(number, 4 + number % 3))
            if number > 3:
                edit(rb, number)

    change()
    assert change_within_samples(rb, change, EVERY, check_scored) > 10 * EVERY
    check_ledger(rb.storage.ledger)
