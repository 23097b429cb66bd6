"""Training starts before there is data."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from loading import iterating
from steps import small

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import ChunkTooLongError, DataTimeoutError, EmptyBufferError, InvalidArgumentError


def empty() -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(max_trajectories=20, max_total_steps=2000, chunk_size=4)


def writing_later(rb: TrajectoryReplayBuffer, *lengths: int) -> threading.Thread:
    def write() -> None:
        for number, length in enumerate(lengths):
            time.sleep(0.1)
            rb.extend(small(number, length))

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "options",
    [{}, {"replacement": False}, {"subset": lambda number: number == 2}],
    ids=["with replacement", "without replacement", "of a subset"],
)
@pytest.mark.parametrize("wait", [60, float("inf")])
def test_wait_for_the_first_trajectory_that_is_long_enough(options: dict[str, Any], wait: float) -> None:
    rb = empty()
    writer = writing_later(rb, 2, 3, 9)
    try:
        batch = next(iter(OnlineDataset(rb, 4, 5, wait=wait, **options)))
    finally:
        writer.join()
    assert batch.shape == (5, 4)
    assert batch["trajectory", "id"].unique().tolist() == [2]


def test_wait_in_workers() -> None:
    rb = empty()
    with iterating(OnlineDataset(rb, 4, 5, wait=60.0), 2) as batches:
        rb.extend(small(0, 9))
        assert next(batches).shape == (5, 4)


def test_the_wait_does_not_change_what_is_drawn() -> None:
    rb = empty()
    writer = writing_later(rb, 9)
    try:
        waited = next(iter(OnlineDataset(rb, 4, 5, wait=60.0, seed=1)))["index"]
    finally:
        writer.join()
    assert (waited == next(iter(OnlineDataset(rb, 4, 5, seed=1)))["index"]).all()


def test_the_time_is_up() -> None:
    rb = empty()
    iteration = iter(OnlineDataset(rb, 4, 5, wait=0.05))
    with pytest.raises(DataTimeoutError, match=r"Waited 0\.05 s") as caught:
        next(iteration)
    assert isinstance(caught.value.__cause__, EmptyBufferError)
    assert isinstance(caught.value, TimeoutError)
    rb.extend(small(0, 3))
    with pytest.raises(DataTimeoutError) as caught:
        next(iteration)
    assert isinstance(caught.value.__cause__, ChunkTooLongError)
    rb.extend(small(1, 5))
    assert next(iteration).shape == (5, 4)


def test_without_it_the_error_comes_at_once() -> None:
    with pytest.raises(EmptyBufferError):
        next(iter(OnlineDataset(empty(), 4, 5)))


@pytest.mark.parametrize("wait", [-1, "long", float("nan"), True])
def test_what_is_no_time_is_refused(wait: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="wait"):
        OnlineDataset(empty(), 4, 5, wait=wait)
