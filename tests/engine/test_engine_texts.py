"""Text from a live simulator: what the workers' environments say of each episode is what the learner reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from demo_envs import DemoSegment, Reach
from tensordict import TensorDict
from torch.utils.data import DataLoader
from torchrl.envs import RenameTransform
from waiting import PATIENCE

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.transforms import ResolveText

EPISODE = 6
"""Steps."""


class Courier(Reach):
    """Observes the number of the episode, that of the step, and a mission; each segment has an instruction."""

    observation_space = gymnasium.spaces.Dict(
        state=gymnasium.spaces.Box(-1.0, 1e6, (2,), np.float32), mission=gymnasium.spaces.Text(20)
    )

    def __init__(self) -> None:
        super().__init__()
        self._episode = -1

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        super().reset(**kwargs)
        self._episode += 1
        self._step = 0
        return self._observed(), {}

    def step(self, action: np.ndarray) -> tuple[Any, float, bool, bool, dict]:
        self._step += 1
        return self._observed(), 0.0, self._step == EPISODE, False, {"success": self._episode % 3 != 1}

    def _observed(self) -> dict[str, Any]:
        return {"state": np.array([self._episode, self._step], np.float32), "mission": f"mission {self._episode}"}

    def create_demo_segments(self) -> Iterator[DemoSegment]:
        half = [np.zeros(2)] * (EPISODE // 2)
        yield DemoSegment(half, "fetch", f"Fetch parcel {self._episode}.")
        yield DemoSegment(half, "bring", f"Bring parcel {self._episode}.")


gymnasium.register("Courier-v0", entry_point=Courier)


def mission_of_trajectory() -> RenameTransform:
    """What is observed as "mission" is the same throughout an episode: it is stored once a trajectory."""
    return RenameTransform(["mission"], [("trajectory", "mission")], create_copy=False)


def make_engine(**kwargs: Any) -> OnlineDataEngine:
    settings: dict[str, Any] = {
        "gym_config": {"id": f"{__name__}:Courier-v0"},
        "buffer_size": 3,
        "max_episode_steps": EPISODE,
        "num_workers": 1,
        "transforms": mission_of_trajectory,
        "progress_bar": False,
        "start_method": "forkserver",
    }
    return OnlineDataEngine(OnlineDataEngineCfg(**{**settings, **kwargs}))


def check_texts(batch: TensorDict) -> set[int]:
    """Holds the resolved text of every step of ``[B, L]`` against what the environment said; returns the episodes."""
    numbers, steps = batch["observation"].long().unbind(-1)
    assert (numbers == numbers[:, :1]).all()
    assert (steps == steps[:, :1] + torch.arange(batch.shape[1])).all()
    assert batch["trajectory", "mission"] == [[f"mission {n}" for n in row] for row in numbers.tolist()]
    if "instruction" in batch:
        said = [
            [f"{'Fetch' if step < EPISODE // 2 else 'Bring'} parcel {n}." for n, step in zip(*row, strict=True)]
            for row in zip(numbers.tolist(), steps.tolist(), strict=True)
        ]
        assert batch["instruction"] == said
        assert batch["segment_name"] == [[re.sub(" .*", "", text).lower() for text in row] for row in said]
    return set(numbers.flatten().tolist())


@pytest.fixture(scope="module")
def demonstrating() -> Iterator[OnlineDataEngine]:
    with make_engine(policy="demo") as engine:
        yield engine


@pytest.mark.parametrize(("method", "batch_size"), [("fork", 8), ("forkserver", None)])
def test_workers_of_a_loader_read_it_while_episodes_come_and_go(
    demonstrating: OnlineDataEngine, method: str, batch_size: int | None
) -> None:
    keys = ["instruction", "segment_name", ("trajectory", "mission")]
    dataset = OnlineDataset(demonstrating, 4, None if batch_size else 8, transform=ResolveText(demonstrating, keys))
    loader = DataLoader(
        dataset, batch_size, num_workers=1, multiprocessing_context=method, timeout=PATIENCE, persistent_workers=True
    )
    episodes: set[int] = set()
    batches = iter(loader)
    while len(episodes) < 10:  # of which the buffer holds three at a time
        episodes |= check_texts(next(batches))
    assert not any(episode % 3 == 1 for episode in episodes), "what is not a success was kept"
    del batches, loader


def test_a_policy_acts_in_an_environment_that_observes_text_and_accept_reads_it() -> None:
    accept = lambda steps: steps["trajectory", "mission"][0].endswith("0")  # noqa: E731
    with make_engine(policy="random", accept=accept) as engine:
        batch = ResolveText(engine, ("trajectory", "mission"))(engine.sample_batch(16, 3))
        assert all(episode % 10 == 0 for episode in check_texts(batch))
        assert "segment_name" not in batch
