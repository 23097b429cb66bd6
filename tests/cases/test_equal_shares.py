"""Simulators of different speed: by choice, each contributes the same number of episodes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ConfigError


class Uneven(gymnasium.Env):
    """In one worker it is slow, and its episodes are long; in the others it is fast, and they are short.

    Args:
        folder: where the instances meet.
    """

    observation_space = action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, folder: str) -> None:
        number = next(number for number in itertools.count() if _is_new(Path(folder) / str(number)))
        # Number 0 is the one that the engine looks at before it starts its workers.
        self.pause, self.length = (0.01, 20) if number == 1 else (0.0, 2)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return np.array([self.pause], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        time.sleep(self.pause)  # a simulator that takes its time
        self.steps += 1
        return np.array([self.pause], np.float32), 0.0, self.steps == self.length, False, {}


def _is_new(path: Path) -> bool:
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


gymnasium.register("Uneven-v0", entry_point=Uneven)


def test_slow_simulators_contribute_as_many_episodes_as_fast_ones(tmp_path: Path) -> None:
    cfg = OnlineDataEngineCfg(
        buffer_size=15,
        gym_config={"id": "Uneven-v0", "kwargs": {"folder": str(tmp_path)}},
        max_episode_steps=20,
        num_workers=3,
        start_method="fork",
        equal_shares=True,
        progress_bar=False,
    )
    with OnlineDataEngine(cfg) as engine:
        episodes = [engine.replay_buffer[number]["observation"] for number in range(15)]
    slow = sum(bool(episode[0] > 0) for episode in episodes)
    # A worker counts an episode just after it has written it, so one may be two ahead of another for a moment.
    assert 4 <= slow <= 6


@pytest.mark.parametrize("others", [{"producers": [[]]}, {"equal_shares": 2}], ids=["producers", "number"])
def test_what_can_not_have_equal_shares(others: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="equal_shares"):
        OnlineDataEngineCfg(**{"equal_shares": True, **others})
