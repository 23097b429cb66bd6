"""With a seed an engine makes the same trajectories in every run, on a thread or in workers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.envs import EnvBase, GymEnv, SerialEnv

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.engine.own_draws import OwnDraws

STEPS = 20


def pendulum() -> EnvBase:
    return GymEnv("Pendulum-v1")


def two_pendulums() -> EnvBase:
    return SerialEnv(2, pendulum)


def explore(observation: torch.Tensor) -> torch.Tensor:
    return torch.randn(1).clamp(-2, 2)


def first_actions(seed: int | None, **settings: Any) -> list[float]:
    """The actions of the first trajectory of a run, and the first observation."""
    settings = {"env_factory": pendulum, "num_workers": 0, **settings}
    cfg = OnlineDataEngineCfg(
        buffer_size=2, max_episode_steps=STEPS, seed=seed, refill_threshold=1000.0, progress_bar=False, **settings
    )
    with OnlineDataEngine(cfg) as engine:  # refilled so rarely that the first trajectory stays
        chunks = engine.sample_chunks(32, STEPS, generator=torch.Generator().manual_seed(0))
        first = chunks[chunks["trajectory", "id"][:, 0] == 0][0]
        return [*first["action"].flatten().tolist(), *first["observation"][0].tolist()]


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
    once = first_actions(7, **settings)
    torch.rand(3)
    assert first_actions(7, **settings) == once
    assert first_actions(8, **settings) != once


def test_in_a_worker() -> None:
    assert first_actions(7, num_workers=1) == first_actions(7, num_workers=1)


def test_the_draws_of_the_user_stay_as_they_are() -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    first_actions(7)
    assert torch.equal(torch.rand(4), expected)


def test_without_a_seed_every_run_is_another() -> None:
    assert first_actions(None) != first_actions(None)


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
