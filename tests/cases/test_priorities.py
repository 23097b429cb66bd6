"""Priorities: what a user saves and loads, and what an outlier does to the trajectories that come after it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_device import SimulatedDevice
from steps import Child, assert_chances, assert_uniform, numbers_of, small

from embodichain_rl import ByPriority, ByRecency, ChunkSampler, TrajectoryReplayBuffer, TrajectoryStorage
from embodichain_rl.errors import CheckpointError, InvalidArgumentError

PRIORITIES = {0: 1.0, 1: 2.0, 2: 3.0, 3: 8.0}


def make(*, capacity: int = 4, weights: Any = None, **kwargs: Any) -> TrajectoryReplayBuffer:
    sampler = ChunkSampler(3, weights=weights or ByPriority(alpha=1.0))
    generator = torch.Generator().manual_seed(5)
    return TrajectoryReplayBuffer(
        max_trajectories=capacity, max_total_steps=500, sampler=sampler, batch_size=500, generator=generator, **kwargs
    )


def filled(count: int = 4, **kwargs: Any) -> TrajectoryReplayBuffer:
    rb = make(**kwargs)
    for number in range(count):
        rb.extend(small(number, 5))
    return rb


def with_priorities() -> TrajectoryReplayBuffer:
    rb = filled()
    rb.update_priority(torch.arange(4), torch.tensor([*PRIORITIES.values()]))
    return rb


def drawn(rb: Any, batches: int = 4) -> list[int]:
    return [number for _ in range(batches) for number in numbers_of(rb.sample())]


def through_directory(rb: TrajectoryReplayBuffer, path: Path) -> TrajectoryReplayBuffer:
    rb.dumps(path)
    target = make()
    target.loads(path)
    return target


def through_state(rb: TrajectoryReplayBuffer, path: Path) -> TrajectoryReplayBuffer:
    target = make()
    target.load_state_dict(rb.state_dict())
    return target


def through_torch_save(rb: TrajectoryReplayBuffer, path: Path) -> TrajectoryReplayBuffer:
    file = io.BytesIO()
    torch.save(rb.state_dict(), file)
    file.seek(0)
    target = make()
    target.load_state_dict(torch.load(file, weights_only=True))
    return target


def through_pickle(rb: TrajectoryReplayBuffer, path: Path) -> TrajectoryReplayBuffer:
    return pickle.loads(pickle.dumps(rb))


def through_deepcopy(rb: TrajectoryReplayBuffer, path: Path) -> TrajectoryReplayBuffer:
    return copy.deepcopy(rb)


Way = Callable[[TrajectoryReplayBuffer, Path], TrajectoryReplayBuffer]
WAYS = [through_directory, through_state, through_torch_save, through_pickle, through_deepcopy]


@pytest.mark.parametrize("way", WAYS)
class TestSaved:
    def test_priorities_are_the_same_when_loaded(self, way: Way, tmp_path: Path) -> None:
        assert_chances(drawn(way(with_priorities(), tmp_path)), PRIORITIES)

    def test_priorities_of_some_that_were_evicted(self, way: Way, tmp_path: Path) -> None:
        rb = with_priorities()
        rb.extend(small(4, 5))
        assert_chances(drawn(way(rb, tmp_path)), {1: 2.0, 2: 3.0, 3: 8.0, 4: 8.0})

    def test_a_loaded_buffer_goes_on(self, way: Way, tmp_path: Path) -> None:
        rb = way(with_priorities(), tmp_path)
        rb.extend(small(4, 5))
        assert_chances(drawn(rb), {1: 2.0, 2: 3.0, 3: 8.0, 4: 8.0})
        ids = rb[:]["trajectory", "id"][:, 0]
        rb.update_priority(ids, torch.tensor([5.0, 1.0, 1.0, 1.0]))
        assert_chances(drawn(rb), {1: 5.0, 2: 1.0, 3: 1.0, 4: 1.0})

    def test_priorities_that_were_never_set(self, way: Way, tmp_path: Path) -> None:
        assert_uniform(drawn(way(filled(), tmp_path), 2), range(4))


class TestLoadedElsewhere:
    def test_into_a_smaller_buffer(self) -> None:
        target = make(capacity=2)
        target.load_state_dict(with_priorities().state_dict())
        assert_chances(drawn(target), {2: 3.0, 3: 8.0})

    def test_replace_the_priorities_that_were_there(self) -> None:
        target = filled()
        target.update_priority([0], [1e6])
        target.load_state_dict(with_priorities().state_dict())
        assert_chances(drawn(target), PRIORITIES)
        target.load_state_dict(filled().state_dict())
        assert_uniform(drawn(target), range(4))

    def test_a_sampler_that_does_not_draw_by_them_leaves_them_for_one_that_does(self, tmp_path: Path) -> None:
        with_priorities().dumps(tmp_path)
        target = make(weights="uniform")
        target.loads(tmp_path)
        assert_uniform(drawn(target), range(4))
        target.set_sampler(ChunkSampler(3, weights=ByPriority(alpha=1.0)))
        assert_chances(drawn(target), PRIORITIES)

    def test_in_another_process(self, tmp_path: Path) -> None:
        with_priorities().dumps(tmp_path)
        child = Child("forkserver", str(tmp_path))
        try:
            assert_chances(child.call(_load_and_draw), PRIORITIES)
        finally:
            child.end()

    @pytest.mark.parametrize(
        "weights", [[1.0], [1.0, 1.0, 1.0, -1.0], [1.0, 1.0, 1.0, float("inf")], ["1", "1", "1", "1"], 3.0, [0.0] * 4]
    )
    def test_damaged_ones_are_refused(self, weights: Any) -> None:
        state, target = with_priorities().state_dict(), filled()
        state["_storage"]["priority_weights"] = weights
        with pytest.raises(CheckpointError, match="priority_weights"):
            target.load_state_dict(state)
        assert len(target) == 4

    def test_a_state_of_an_earlier_version_gives_all_the_same(self) -> None:
        state = with_priorities().state_dict()
        for name in ("priority_weights", "policy_versions"):
            del state["_storage"][name]
        target = make()
        target.load_state_dict(state)
        assert_uniform(drawn(target), range(4))

    def test_onto_a_device(self, tmp_path: Path) -> None:
        with_priorities().dumps(tmp_path)
        storage = TrajectoryStorage(4, 500, device=SimulatedDevice())  # type: ignore[arg-type]
        rb = TrajectoryReplayBuffer(
            storage=storage, sampler=ChunkSampler(3, weights=ByPriority(alpha=1.0)), batch_size=500
        )
        rb.extend(small(9, 5))
        rb.loads(tmp_path)
        torch.manual_seed(0)
        assert_chances(drawn(rb), PRIORITIES)
        target = make()
        target.load_state_dict(rb.state_dict())
        assert_chances(drawn(target), PRIORITIES)


def _load_and_draw(path: str) -> list[int]:
    rb = make()
    rb.loads(path)
    return drawn(rb)


class TestAnOutlier:
    def test_that_was_lowered_is_forgotten(self) -> None:
        rb = filled()
        rb.update_priority([3], [1e12])
        rb.update_priority([3], [1.0])
        rb.extend(small(4, 5))
        assert_uniform(drawn(rb), range(1, 5))

    def test_that_was_evicted_is_forgotten(self) -> None:
        rb = filled()
        rb.update_priority([0], [1e12])
        for number in range(4, 7):
            rb.extend(small(number, 5))
        rb.update_priority(torch.arange(4, 7), 1.0)
        for number in range(7, 9):
            rb.extend(small(number, 5))
        assert_uniform(drawn(rb), range(5, 9))

    def test_that_is_evicted_by_a_new_trajectory_gives_it_nothing(self) -> None:
        rb = filled()
        rb.update_priority([0], [1e12])
        rb.extend(small(4, 5))
        assert_uniform(drawn(rb), range(1, 5))

    def test_that_is_live_goes_to_new_trajectories(self) -> None:
        rb = filled()
        rb.update_priority([3], [50.0])
        rb.extend(small(4, 5))
        assert_chances(drawn(rb, 10), {1: 1.0, 2: 1.0, 3: 50.0, 4: 50.0})

    @pytest.mark.parametrize("priority", [1e200, 1.7e308])
    def test_whose_weight_overflows_is_refused(self, priority: float) -> None:
        rb = filled(weights=ByPriority(alpha=2.0))
        with pytest.raises(InvalidArgumentError, match="Scale the priorities down"):
            rb.update_priority([0], torch.tensor([priority], dtype=torch.float64))
        assert_uniform(drawn(rb), range(4))

    def test_of_a_weight_that_underflows_can_still_be_drawn(self) -> None:
        rb = filled(weights=ByPriority(alpha=50.0))
        rb.update_priority(torch.arange(4), 0.0)
        assert_uniform(drawn(rb), range(4))


def test_priorities_do_not_matter_to_other_weights() -> None:
    rb = with_priorities()
    rb.set_sampler(ChunkSampler(3, weights=ByRecency(1e9)))
    assert_uniform(drawn(rb), range(4))
