"""Environments that break Gymnasium's rules: a typed error that shows what came and what is needed; nothing is lost."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import gymnasium
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from nonsense import configure
from torchrl.collectors import Collector
from torchrl.envs import GymWrapper
from waiting import PATIENCE
from wrong_envs import EPISODE, KEPT_STEPS, WRONG_AT, WRONG_RESETS, WRONG_STEPS, OutOfOrderError

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.collectors import GymnasiumCollector
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineState
from embodichain_rl.errors import ConfigError, EnvOutputError, EnvProbeError


def make_collector(cls: type[Collector], wrong: str, **kwargs: Any) -> Collector:
    return cls(
        GymWrapper(gymnasium.make("Wrong-v0", wrong=wrong, disable_env_checker=True, **kwargs)),
        None,
        frames_per_batch=10,
        total_frames=40,
        replay_buffer=TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=90, chunk_size=1, batch_size=2),
        trajs_per_batch=1,
    )


class TestNativeCollector:
    @pytest.mark.parametrize("wrong", WRONG_STEPS)
    def test_refuses_what_step_returns(self, wrong: str) -> None:
        collector = make_collector(GymnasiumCollector, wrong, at=EPISODE + WRONG_AT)
        assert collector.fallback_reason is None
        with pytest.raises(EnvOutputError, match=r"Wrong-v0 returned .* from step\(\), which can't be read") as refusal:
            list(collector)
        message = str(refusal.value)
        assert "(observation, reward, terminated, truncated, info)" in message
        assert "Dict('image': Box(0, 255, (4,), uint8), 'position': Box(-1.0, 1.0, (2,), float32))" in message
        assert "Fix the environment, or put a gymnasium.Wrapper around it" in message
        assert isinstance(refusal.value, ValueError)
        assert refusal.value.__cause__ is not None
        stored = collector.replay_buffer[:]
        assert stored["image"][..., 0].tolist() == [list(range(EPISODE))], (
            "the episode before is lost, or half a one kept"
        )

    @pytest.mark.parametrize("wrong", WRONG_RESETS)
    def test_refuses_what_reset_returns(self, wrong: str) -> None:
        collector = make_collector(GymnasiumCollector, wrong)
        with pytest.raises(EnvOutputError, match=r"from reset\(\), .* It must return \(observation, info\)"):
            list(collector)
        assert len(collector.replay_buffer) > 0

    @pytest.mark.parametrize("wrong", [0, 1, 2, 3])
    def test_refuses_what_a_vector_returns(self, wrong: int) -> None:
        class Vector(SyncVectorEnv):
            def step(self, actions: Any) -> Any:
                returned = [*super().step(actions)]
                returned[wrong] = returned[wrong][:1]  # of one environment only
                return tuple(returned)

        env = GymWrapper(Vector([partial(gymnasium.make, "Pendulum-v1")] * 2, autoreset_mode=AutoresetMode.DISABLED))
        rb = TrajectoryReplayBuffer(max_trajectories=9, max_total_steps=900, chunk_size=1)
        collector = GymnasiumCollector(
            env, None, frames_per_batch=10, total_frames=40, replay_buffer=rb, trajs_per_batch=1
        )
        assert collector.fallback_reason is None
        with pytest.raises(EnvOutputError, match=r"Vector returned .* from step\(\), which can't be read") as refusal:
            list(collector)
        assert "arrays with one element for each environment: numbers as reward, bools" in str(refusal.value)

    @pytest.mark.parametrize("where", ["step", "reset"])
    def test_lets_the_environments_own_errors_through(self, where: str) -> None:
        with pytest.raises(OutOfOrderError, match=f"out of order in {where}"):
            list(make_collector(GymnasiumCollector, f"raises in {where}"))

    @pytest.mark.parametrize("kept", KEPT_STEPS)
    def test_keeps_what_has_a_place_as_torchrl_does(self, kept: str) -> None:
        _, key, value = KEPT_STEPS[kept]
        for cls in (GymnasiumCollector, Collector):
            collector = make_collector(cls, kept)
            list(collector)
            found = collector.replay_buffer[0][key][WRONG_AT - 1]
            torch.testing.assert_close(found, torch.tensor(value), equal_nan=True, rtol=0, atol=0)


def make_engine(wrong: str, at: int, **kwargs: Any) -> OnlineDataEngine:
    config = {"id": "wrong_envs:Wrong-v0", "kwargs": {"wrong": wrong, "at": at, "disable_env_checker": True}}
    settings = {
        "gym_config": config,
        "start_method": "forkserver",
        "buffer_size": 1000,
        "initialization_timeout": PATIENCE,
    }
    return OnlineDataEngine(configure(**{**settings, **kwargs}))


class TestEngine:
    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_fails_at_once_with_what_the_environment_returned(self, num_workers: int) -> None:
        engine = make_engine("two rewards", 50 * EPISODE + WRONG_AT, num_workers=num_workers)
        with pytest.raises(EnvOutputError, match=r"float64 \[2\].* a number as reward") as failure:
            engine.start()
        assert any("another worker would fail in the same way" in note for note in failure.value.__notes__)
        assert engine.state is OnlineDataEngineState.FAILED
        assert engine.stats()["restarts"] == 0
        assert engine.stats()["inserted"] == 50
        with pytest.raises(EnvOutputError, match="Wrong-v0"):
            engine.sample_batch(2, chunk_size=2)

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                {"wrong": "an observation of another shape", "at": 2},
                "acting in the environment failed with RuntimeError",
            ),
            ({"wrong": "raises in reset", "at": 1}, "failed with OutOfOrderError: out of order in reset"),
            ({"wrong": "nothing", "at": 1}, "failed with TypeError: cannot unpack non-iterable NoneType"),
            ({"wrongly": True}, "building the environment failed with TypeError.*wrongly"),
        ],
    )
    def test_refuses_to_start_what_is_wrong_from_the_beginning(self, config: dict[str, Any], message: str) -> None:
        engine = OnlineDataEngine(
            configure(
                gym_config={"id": "wrong_envs:Wrong-v0", "kwargs": {**config, "disable_env_checker": True}},
                start_method="forkserver",
            )
        )
        with pytest.raises(EnvProbeError, match=re.compile(f"Wrong-v0.*{message}", re.DOTALL)):
            engine.start()
        assert engine.state is OnlineDataEngineState.FAILED

    def test_refuses_an_unknown_name(self) -> None:
        engine = OnlineDataEngine(configure(gym_config={"id": "Nowhere-v0"}, start_method="forkserver"))
        with pytest.raises(EnvProbeError, match="Nowhere-v0: building the environment failed with NameNotFound"):
            engine.start()

    def test_refuses_a_factory_of_what_is_no_environment(self) -> None:
        engine = OnlineDataEngine(configure(gym_config=None, env_factory=dict, start_method="forkserver"))
        with pytest.raises(EnvProbeError, match=r"must make a torchrl\.envs\.EnvBase, got a builtins\.dict") as refusal:
            engine.start()
        assert isinstance(refusal.value.__cause__, ConfigError)
