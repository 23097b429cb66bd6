"""With a seed an engine makes the same trajectories in every run, on a thread or in workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.envs import EnvBase, GymEnv, SerialEnv

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.engine.workers import OwnDraws

STEPS = 20


def pendulum() -> EnvBase:
    return GymEnv("Pendulum-v1")


def two_pendulums() -> EnvBase:
    return SerialEnv(2, pendulum)


def explore(observation: torch.Tensor) -> torch.Tensor:
    return torch.randn(1).clamp(-2, 2)


def trajectories(seed: int | None, **settings: Any) -> dict[int, list[float]]:
    """Run an engine once; return the actions and the first observation of each sampled trajectory, by trajectory id."""
    # The fork server has all imports loaded already, so the probe of each engine takes no time.
    settings = {"env_factory": pendulum, "num_workers": 0, "start_method": "forkserver", **settings}
    cfg = OnlineDataEngineCfg(
        buffer_size=32, max_episode_steps=STEPS, seed=seed, refill_threshold=1000.0, progress_bar=False, **settings
    )
    with OnlineDataEngine(cfg) as engine:
        chunks = engine.sample_chunks(256, STEPS, generator=torch.Generator().manual_seed(0))
    return {
        int(chunk["trajectory", "id"][0]): [*chunk["action"].flatten().tolist(), *chunk["observation"][0].tolist()]
        for chunk in chunks
    }


def are_same(once: dict[int, list[float]], again: dict[int, list[float]]) -> bool:
    common = once.keys() & again.keys()
    assert common, "the runs have no trajectory of the same number"
    same = [once[number] == again[number] for number in common]
    assert all(same) or not any(same)
    return all(same)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"env_factory": two_pendulums},
        {"policy": explore},
        {"gym_config": {"id": "Acrobot-v1"}, "env_factory": None},
    ],
    ids=["random", "two environments", "a policy that draws", "whole numbers"],
)
def test_on_a_thread(settings: dict[str, Any]) -> None:
    once = trajectories(7, **settings)
    torch.rand(3)
    assert are_same(once, trajectories(7, **settings))


def test_another_seed_is_another_run() -> None:
    assert not are_same(trajectories(7), trajectories(8))


def test_in_a_worker() -> None:
    assert are_same(trajectories(7, num_workers=1), trajectories(7, num_workers=1))


def test_the_draws_of_the_user_stay_as_they_are() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    trajectories(7)
    assert torch.equal(torch.rand(4), expected)


def test_without_a_seed_every_run_is_another() -> None:
    assert not are_same(trajectories(None), trajectories(None))


class TestOwnDraws:
    @pytest.mark.parametrize(
        "draw",
        [
            lambda: torch.rand(3),
            lambda: torch.randint(1000, (3,)),
            lambda: torch.randperm(50),
            lambda: torch.empty(3).uniform_(),
            lambda: torch.zeros(3).normal_(),
            lambda: torch.randn_like(torch.zeros(3)),
            lambda: torch.distributions.Normal(0.0, 1.0).sample((3,)),
            lambda: torch.distributions.Categorical(torch.ones(1000)).sample((3,)),
            lambda: torch.distributions.Beta(1.0, 1.0).sample((3,)),
            lambda: torch.nn.Linear(3, 2).weight.detach(),
        ],
    )
    def test_repeat_and_leave_the_global_generator_alone(self, draw: Any) -> None:
        before = torch.get_rng_state()
        with OwnDraws(3):
            first, second = draw(), draw()
        with OwnDraws(3):
            assert torch.equal(draw(), first)
        assert not torch.equal(first, second)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_generator_that_is_given_is_taken(self) -> None:
        expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
        with OwnDraws(3):
            assert torch.equal(torch.rand(3, generator=torch.Generator().manual_seed(5)), expected)
