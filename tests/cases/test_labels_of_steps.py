"""Steps that say who acted: drawn in given proportions, and weighted in the loss."""

from __future__ import annotations

from collections import Counter
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from embodichain_rl import (
    ByStep,
    ChunkSampler,
    OnlineDataEngine,
    OnlineDataEngineCfg,
    OnlineDataset,
    TrajectoryReplayBuffer,
)
from embodichain_rl.datasets import masked_mean, step_weights
from embodichain_rl.errors import (
    ChunkTooLongError,
    ConfigError,
    InvalidArgumentError,
    NothingToDrawError,
    SchemaMismatchError,
)

SOURCE = ("collector", "source")
POLICY, HUMAN = 0, 1


class Shown(gymnasium.Env):
    """Shows how it is done."""

    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return np.zeros(1, np.float32), 0.0, False, False, {}

    def create_demo_action_list(self) -> list[np.ndarray]:
        return [np.zeros(1, np.float32)] * 5


gymnasium.register("Shown-v0", entry_point=Shown)


def steps(sources: list[int], first: int = 0) -> TensorDict:
    """Return a trajectory whose observations are its steps, counted from ``first``."""
    count = len(sources)
    done = torch.zeros(count, 1, dtype=torch.bool)
    done[-1] = True
    return TensorDict(
        {
            "observation": torch.arange(first, first + count).unsqueeze(-1),
            "collector": {"source": torch.tensor(sources)},
            "next": {"done": done},
        },
        [count],
    )


def buffer(*trajectories: TensorDict, **options: object) -> TrajectoryReplayBuffer:
    rb = TrajectoryReplayBuffer(max_trajectories=20, max_total_steps=4000, **options)
    for trajectory in trajectories:
        rb.extend(trajectory)
    return rb


def starts(batch: TensorDict) -> Counter[int]:
    return Counter(batch["observation"][:, 0, 0].tolist())


def test_a_person_who_takes_over_now_and_then_is_half_of_the_batch() -> None:
    rb = buffer(
        steps([POLICY] * 40 + [HUMAN] * 2 + [POLICY] * 58),
        steps([POLICY] * 100, first=100),
        sampler=ChunkSampler(4, weights=ByStep(SOURCE, {POLICY: 1, HUMAN: 1})),
    )
    drawn = starts(rb.sample(20_000))
    human = drawn[40] + drawn[41]
    assert 9_400 < human < 10_600  # eight standard deviations
    assert set(drawn) - {40, 41} == set(range(40)) | set(range(42, 97)) | set(range(100, 197))
    assert abs(drawn[40] - drawn[41]) < 800
    assert rb.stats()["mixture"][HUMAN] == pytest.approx(human / 20_000)


def test_one_source_alone() -> None:
    rb = buffer(steps([0, 1, 1, 2, 2, 2]), sampler=ChunkSampler(1, weights=ByStep(SOURCE, {2: 3.0, 1: 0.0})))
    assert set(starts(rb.sample(400))) == {3, 4, 5}


def test_a_step_so_rare_that_a_chunk_hardly_ever_fits() -> None:
    """Only one of a thousand steps with the label is far enough from the end."""
    rb = buffer(
        steps([POLICY] * 10 + [HUMAN] + [POLICY] * 9),
        *[steps([POLICY] * 19 + [HUMAN]) for _ in range(15)],
        sampler=ChunkSampler(8, weights=ByStep(SOURCE, {HUMAN: 1})),
    )
    assert set(starts(rb.sample(50))) == {10}


def test_text_and_chunks_by_a_dataset() -> None:
    trajectory = steps([0] * 6)
    names = ["policy", "policy", "human", "human", "policy", "expert"]
    trajectory[SOURCE] = NonTensorStack(*names)
    rb = buffer(trajectory, chunk_size=2)
    weights = ByStep(SOURCE, {"human": 1, "policy": 1})
    batches = iter(OnlineDataset(rb, 2, 64, weights=weights, seed=3))
    assert set(starts(next(batches))) == {0, 1, 2, 3, 4}  # by the seed
    items = iter(OnlineDataset(rb, 2, weights=weights, seed=3))
    again = iter(OnlineDataset(rb, 2, weights=weights, seed=3))
    assert all(next(items)["observation"].equal(next(again)["observation"]) for _ in range(20))


def test_windows_are_drawn_by_their_current_step() -> None:
    rb = buffer(
        steps([0, 0, 0, 1, 0, 0]),
        sampler=ChunkSampler(windows={"observation": (-1, 2)}, pad="both", weights=ByStep(SOURCE, {1: 1})),
    )
    assert rb.sample(8)["observation"].squeeze(-1).tolist() == [[2, 3, 4, 5]] * 8


def test_new_and_evicted_trajectories() -> None:
    rb = TrajectoryReplayBuffer(
        max_trajectories=2, max_total_steps=20, sampler=ChunkSampler(1, weights=ByStep(SOURCE, {1: 1}))
    )
    for first in (0, 10, 20):
        rb.extend(steps([0, 1, 1], first))
        allowed = {first + 1, first + 2} | ({first - 9, first - 8} if first else set())
        assert set(starts(rb.sample(400))) == allowed


def test_labels_that_are_written_anew() -> None:
    rb = buffer(steps([0, 1, 1]), sampler=ChunkSampler(1, weights=ByStep(SOURCE, {1: 1})))
    assert set(starts(rb.sample(400))) == {1, 2}
    rb.relabel(SOURCE, lambda trajectory: 1 - trajectory[SOURCE])
    assert set(starts(rb.sample(400))) == {0}


def test_what_is_not_there() -> None:
    rb = buffer(steps([0] * 5), sampler=ChunkSampler(2, weights=ByStep(SOURCE, {0: 1, 7: 1})))
    with pytest.raises(NothingToDrawError, match=r"there is no step of \[7\]"):
        rb.sample(4)
    last = buffer(steps([0] * 5 + [1]), sampler=ChunkSampler(3, weights=ByStep(SOURCE, {1: 1})))
    with pytest.raises(ChunkTooLongError, match="no chunk of 3 steps begins with 1"):
        last.sample(4)
    with pytest.raises(SchemaMismatchError, match="each step has the keys"):
        buffer(steps([0] * 5), sampler=ChunkSampler(2, weights=ByStep("operator"))).sample(4)
    with pytest.raises(SchemaMismatchError, match="are integers"):
        buffer(steps([0] * 5), sampler=ChunkSampler(2, weights=ByStep(SOURCE, {"human": 1}))).sample(4)


@pytest.mark.parametrize("options", [{"sampling_mode": "segment"}, {"pad": "before"}, {"replacement": False}])
def test_what_can_not_be_drawn_by_labels(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgumentError):
        ChunkSampler(4, weights=ByStep(SOURCE, {1: 1}), **options)


def test_the_loss_counts_each_source_by_its_weight() -> None:
    rb = buffer(steps([0, 0, 1, 2]), chunk_size=4)
    batch = rb.sample(3)
    weights = step_weights(batch[SOURCE], {0: 1.0, 1: 3.0}, other=0.0)
    assert weights.tolist() == [[1.0, 1.0, 3.0, 0.0]] * 3
    values = torch.tensor([[1.0, 2.0, 3.0, float("nan")]] * 3)
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert masked_mean(values, mask, weights).item() == pytest.approx((1 + 2 + 9) / 5)
    assert masked_mean(values, mask, torch.zeros(3, 4)).item() == 0.0
    with pytest.raises(InvalidArgumentError, match=r"there are steps with \[2\]"):
        step_weights(batch[SOURCE], {0: 1.0, 1: 3.0})
    with pytest.raises(InvalidArgumentError, match="one number for each step"):
        masked_mean(values, mask, weights[:, :2])


def test_the_loss_by_sources_that_are_text() -> None:
    trajectory = steps([0] * 3)
    trajectory[SOURCE] = NonTensorStack("policy", "human", "policy")
    rb = buffer(trajectory, chunk_size=3)
    labels = rb.sample(2)[SOURCE]
    assert step_weights(labels, {"human": 1.0, "policy": 0.0}, texts=rb).tolist() == [[0.0, 1.0, 0.0]] * 2
    with pytest.raises(InvalidArgumentError, match="texts=rb"):
        step_weights(labels, {"human": 1.0}, other=0.0)


@pytest.mark.parametrize(
    ("environment", "options", "source"),
    [
        ("Pendulum-v1", {"policy": "random"}, "random"),
        ("Pendulum-v1", {"policy": lambda observation: [0.5]}, "policy"),
        ("Shown-v0", {"policy": "demo"}, "expert"),
    ],
    ids=["random", "policy", "expert"],
)
def test_an_engine_that_says_who_acted(environment: str, options: dict[str, Any], source: str) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=2,
        gym_config={"id": environment},
        max_episode_steps=5,
        num_workers=0,
        start_method="fork",
        label_source=True,
        progress_bar=False,
        **options,
    )
    with OnlineDataEngine(cfg) as engine:
        labels = engine.sample_batch(4, 3)[SOURCE]
        assert engine.replay_buffer.texts.resolve(labels) == [[source] * 3] * 4


def test_an_engine_can_not_know_who_acts_in_producers() -> None:
    with pytest.raises(ConfigError, match="producers say themselves"):
        OnlineDataEngineCfg(producers=[[]], label_source=True)
