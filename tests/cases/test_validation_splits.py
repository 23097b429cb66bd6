"""Trajectories that are held out: no training draw touches them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import iterating
from steps import LABEL, small
from tensordict import TensorDict

from embodichain_rl import ByGroup, ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.errors import InvalidArgumentError, NothingToDrawError

TRAIN, VALIDATION = ("train", 0.8), ("validation", 0.2)

EVERY_KIND: list[dict[str, Any]] = [
    {},
    {"weights": "steps"},
    {"weights": ByRecency(half_life=20)},
    {"weights": ByGroup("task")},
    {"weights": ByPriority()},
    {"replacement": False},
    {"pad": "after"},
    {"max_age": 3600.0},
]


def buffer(count: int = 60, **kwargs: Any) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(
        **{"max_trajectories": 60, "max_total_steps": 10_000, "chunk_size": 4, "batch_size": 400, **kwargs}
    )
    for number in range(count):
        rb.extend(trajectory(number))
    return rb


def trajectory(number: int) -> TensorDict:
    length = 4 + number % 5
    return small(number, length).set("task", torch.full((length,), number % 3))


@pytest.fixture(scope="module")
def rb() -> TrajectoryReplayBuffer:
    return buffer()


def drawn_from(rb: TrajectoryReplayBuffer, subset: Any, **options: Any) -> set[int]:
    batch = next(iter(OnlineDataset(rb, 4, 1500, subset=subset, seed=1, **options)))
    return set(batch[LABEL][:, 0, 0].tolist())


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_train_and_validate_on_different_trajectories(rb: TrajectoryReplayBuffer, options: dict[str, Any]) -> None:
    train, validation = drawn_from(rb, TRAIN, **options), drawn_from(rb, VALIDATION, **options)
    assert not train & validation
    assert train | validation == set(range(60))
    assert 4 <= len(validation) <= 20


def test_every_trajectory_of_the_split_is_equally_likely(rb: TrajectoryReplayBuffer) -> None:
    batch = next(iter(OnlineDataset(rb, 4, 20_000, subset=VALIDATION, seed=1)))
    counts = Counter(batch[LABEL][:, 0, 0].tolist())
    expected = 20_000 / len(counts)
    assert all(0.85 * expected < count < 1.15 * expected for count in counts.values())


def test_split_by_a_function_of_the_id(rb: TrajectoryReplayBuffer) -> None:
    assert drawn_from(rb, lambda number: number % 10 == 3) == {3, 13, 23, 33, 43, 53}
    assert drawn_from(rb, lambda number: number in {5, 7}, replacement=False) == {5, 7}


@pytest.mark.parametrize("workers", [0, 2])
def test_split_in_workers(rb: TrajectoryReplayBuffer, workers: int) -> None:
    train = drawn_from(rb, TRAIN)
    with iterating(OnlineDataset(rb, 4, 200, subset=TRAIN), workers) as batches:
        drawn = torch.cat([next(batches)[LABEL][:, 0, 0].clone() for _ in range(4)])
    assert set(drawn.tolist()) <= train


def test_split_a_buffer_that_is_sampled_directly() -> None:
    train, validation = (buffer(subset=subset) for subset in (TRAIN, VALIDATION))
    by_sampler = buffer(chunk_size=None, sampler=ChunkSampler(4, subset=VALIDATION))
    drawn = [set(rb.sample(2000)[LABEL][:, 0, 0].tolist()) for rb in (train, validation, by_sampler)]
    assert not drawn[0] & drawn[1]
    assert drawn[1] == drawn[2]


def test_trajectories_stay_where_they_are_as_more_come() -> None:
    rb = buffer(20)
    before = drawn_from(rb, VALIDATION)
    for number in range(20, 60):
        rb.extend(trajectory(number))
    assert {number for number in drawn_from(rb, VALIDATION) if number < 20} == before


def test_trajectories_stay_where_they_are_after_a_checkpoint(rb: TrajectoryReplayBuffer, tmp_path: Path) -> None:
    evicting = buffer(90)  # 30 are evicted
    evicting.dumps(tmp_path)
    loaded = buffer(0)
    loaded.loads(tmp_path)
    assert drawn_from(loaded, VALIDATION) == drawn_from(evicting, VALIDATION)
    assert loaded.extend(trajectory(90)).unique().tolist() == [90]


def test_groups_without_a_trajectory_in_the_split_are_left_out() -> None:
    rb = buffer(6)
    assert drawn_from(rb, lambda number: number in {0, 1}, weights=ByGroup("task")) == {0, 1}


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_an_empty_split_is_said_as_such(options: dict[str, Any]) -> None:
    rb = buffer(3)
    with pytest.raises(NothingToDrawError, match="none belongs to subset="):
        drawn_from(rb, lambda number: number > 10, **options)


@pytest.mark.parametrize(
    "subset", ["train", ("train",), ("training", 0.9), ("train", 1.5), ("train", 0.0), ("train", "most"), 0.9, {}]
)
def test_what_is_no_split_is_refused(subset: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="subset"):
        ChunkSampler(4, subset=subset)


def test_a_function_that_does_not_answer_is_refused(rb: TrajectoryReplayBuffer) -> None:
    with pytest.raises(InvalidArgumentError, match="must return True or False"):
        drawn_from(rb, lambda number: None)


def test_a_state_of_another_split_is_refused(rb: TrajectoryReplayBuffer) -> None:
    datasets = [OnlineDataset(rb, 4, 8, subset=subset, seed=0) for subset in (TRAIN, VALIDATION)]
    next(iter(datasets[0]))
    with pytest.raises(ValueError, match="subset"):
        datasets[1].load_state_dict(datasets[0].state_dict())
