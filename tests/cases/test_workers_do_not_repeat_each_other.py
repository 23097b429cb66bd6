"""Engine workers, and those that replace lost ones, have random streams of their own, whatever the start method."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from torchrl.envs import EnvBase, GymWrapper
from waiting import wait_until

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

SOURCES = ("torch", "numpy", "random", "a generator of torch's", "a generator of numpy's", "a space")
EPISODE = 4


class Dice(gymnasium.Env):
    """Writes its draw at each reset, and its actions, one line per step, to a file named after its process."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (len(SOURCES),), np.float32)

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._steps = 0
        self._drawn = 0.0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._steps = 0
        self._drawn = self.np_random.random()
        return np.array([self._drawn], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._steps += 1
        with (self._directory / str(os.getpid())).open("a") as lines:
            print(self._drawn, *action.tolist(), file=lines)
        return np.array([0.0], np.float32), 0.0, self._steps == EPISODE, False, {}


def dice(directory: Path) -> EnvBase:
    return GymWrapper(Dice(directory))


class Roll:
    """A policy that draws from every source."""

    def __init__(self) -> None:
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32, seed=0)

    def __call__(self, observation: torch.Tensor) -> list[float]:
        return [
            torch.rand(()).item(),
            np.random.rand(),
            random.random(),
            torch.rand((), generator=self.torch_generator).item(),
            self.numpy_generator.random(),
            self.space.sample().item(),
        ]


def rolled(directory: Path, **settings: Any) -> list[list[list[float]]]:
    """Return the first draws of each worker, of which one is killed; those of its replacement are last."""
    directory.mkdir()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    cfg = OnlineDataEngineCfg(
        buffer_size=2,
        max_episode_steps=EPISODE,
        env_factory=partial(dice, directory),
        policy=Roll(),
        refill_threshold=None,
        progress_bar=False,
        **settings,
    )

    def lines(pid: int) -> list[list[float]]:
        file = directory / str(pid)
        whole = file.read_text().splitlines()[:-1] if file.exists() else []
        return [[float(number) for number in line.split()] for line in whole]

    with OnlineDataEngine(cfg) as engine:
        pids = [worker["pid"] for worker in engine.stats()["workers"]]
        wait_until(lambda: all(len(lines(pid)) > EPISODE for pid in pids), "the first workers")
        os.kill(pids[0], signal.SIGKILL)

        def replacement() -> int:
            pid = engine.stats()["workers"][0]["pid"]
            return pid if pid != pids[0] and len(lines(pid)) > EPISODE else 0

        wait_until(replacement, "the replacement")
        return [lines(pid)[: EPISODE + 1] for pid in (*pids, replacement())]


def check_distinct(draws: list[list[list[float]]]) -> None:
    first = [worker[0] for worker in draws]
    for source, of_workers in zip(("the environment", *SOURCES), zip(*first, strict=True), strict=True):
        assert len(set(of_workers)) == len(draws), f"workers repeat each other in {source}: {of_workers}"


def test_forked_without_a_seed(tmp_path: Path) -> None:
    once = rolled(tmp_path / "once", num_workers=2, start_method="fork")
    again = rolled(tmp_path / "again", num_workers=1, start_method="fork")
    check_distinct([*once, *again])


def test_with_a_seed_a_replacement_goes_on_differently_and_reproducibly(tmp_path: Path) -> None:
    once = rolled(tmp_path / "once", num_workers=1, seed=7, start_method="forkserver")
    check_distinct(once)
    assert rolled(tmp_path / "again", num_workers=1, seed=7, start_method="forkserver") == once
