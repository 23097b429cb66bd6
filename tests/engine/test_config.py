"""What the engine's configuration refuses, and that it names the field."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import GymEnv, RewardSum

from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg
from embodichain_rl.errors import ConfigError, ConfigFileNotFoundError, InvalidArgumentError

PENDULUM = {"id": "Pendulum-v1"}


def make_env() -> GymEnv:
    return GymEnv("Pendulum-v1")


def act(observation: torch.Tensor) -> torch.Tensor:
    return observation[:1]


def cfg(**settings: Any) -> OnlineDataEngineCfg:
    sources = {"gym_config", "env_factory", "producers"}
    return OnlineDataEngineCfg(**({} if sources & settings.keys() else {"gym_config": PENDULUM}), **settings)


INTEGERS = {
    "buffer_size": 1,
    "max_episode_steps": 1,
    "state_dim": 1,
    "num_workers": 0,
    "max_generation_attempts": 1,
    "max_worker_restarts": 0,
    "seed": 0,
}
"""Each with the least that it may be."""

SECONDS = ["initialization_timeout", "worker_timeout", "shutdown_timeout"]


class TestNumbers:
    @pytest.mark.parametrize("name", INTEGERS)
    def test_integers(self, name: str) -> None:
        least = INTEGERS[name]
        for value in (least, np.int64(least + 1)):
            kept = getattr(cfg(**{name: value}), name)
            assert (type(kept), kept) == (int, value)
        for value in (least - 1, True, 2.0, "2", np.float32(2), [2]):
            with pytest.raises(ConfigError, match=rf"^{name} must be an integer of at least {least}, got "):
                cfg(**{name: value})

    @pytest.mark.parametrize("name", [*SECONDS, "refill_threshold"])
    def test_positive_numbers(self, name: str) -> None:
        for value in (1e-3, 3, np.float32(2.5), np.int64(2)):
            kept = getattr(cfg(**{name: value}), name)
            assert (type(kept), kept) == (float, float(value))
        for value in (0, -1.0, float("nan"), float("inf"), True, "5", 10**400):
            with pytest.raises(ConfigError, match=f"^{name} must be a finite number"):
                cfg(**{name: value})

    @pytest.mark.parametrize("name", [*sorted(set(INTEGERS) - {"state_dim", "seed"}), *SECONDS])
    def test_none_is_no_number(self, name: str) -> None:
        with pytest.raises(ConfigError, match=f"^{name} must be"):
            cfg(**{name: None})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"buffer_device": "cqu"}, "buffer_device='cqu'"),
    ({"buffer_device": "meta"}, "buffer_device='meta', but trajectories are kept on a CUDA device or on the CPU"),
    ({"buffer_device": 3.5}, "buffer_device"),
    ({"start_method": "thread"}, "start_method must be one of ['fork', 'spawn', 'forkserver'], got 'thread'"),
    ({"start_method": ["spawn"]}, "start_method must be one of"),
    ({"policy": "expert"}, "policy must be a policy, a function, 'demo', 'random' or None; got 'expert'"),
    ({"refill_policy": "never"}, "refill_policy must be 'sample_threshold' or 'manual', got 'never'"),
    ({"policy": 3}, "policy must be a policy"),
    ({"policy": act, "policy_factory": lambda: act}, "policy and policy_factory exclude each other"),
    ({"policy_factory": "act"}, "policy_factory must be a function, got a str"),
    ({"accept": True}, "accept must be a function, got a bool"),
    ({"env_factory": "Pendulum-v1"}, "env_factory must be a function, got a str"),
    ({"transforms": [3]}, "transforms must be TorchRL transforms"),
    ({"state_key": 3}, "state_key must be a name, or a tuple of names, got 3"),
    ({"state_key": ""}, "state_key must be a name, or a tuple of names, got ''"),
    ({"state_key": ("agent", 1)}, "state_key must be a name, or a tuple of names, got ('agent', 1)"),
    ({"compact": 1}, "Got compact=1; it must be True, False or 'views'"),
    ({"progress_bar": "no"}, "progress_bar must be True or False, got 'no'"),
    # The source of trajectories
    ({"gym_config": None}, "got none of them"),
    ({"gym_config": PENDULUM, "env_factory": make_env}, "got gym_config and env_factory"),
    ({"env_factory": make_env, "producers": [[]]}, "got env_factory and producers"),
    ({"gym_config": {}}, "gym_config needs the key 'id'"),
    ({"gym_config": {"id": "Pendulum-v1", "num_env": 2}}, "'num_env' (did you mean 'num_envs'?)"),
    ({"gym_config": {"id": "Pendulum-v1", "render_mode": None}}, "gym_config['kwargs']"),
    ({"gym_config": {"id": "Pendulum-v1", "num_envs": True}}, "gym_config['num_envs']"),
    ({"gym_config": 7}, "gym_config must be a mapping"),
    ({"gym_config": [PENDULUM]}, "gym_config must be a mapping"),
    # Further arguments of gymnasium.make
    ({"env_factory": make_env, "action_config": {"g": 1.0}}, "action_config holds arguments of gymnasium.make"),
    ({"action_config": "joint"}, "action_config must be a mapping"),
    ({"action_config": {1: "joint"}}, "action_config must be a mapping"),
    (
        {"gym_config": {**PENDULUM, "kwargs": {"g": 9.81}}, "action_config": {"g": 1.0}},
        "['g'] are in both action_config and gym_config['kwargs']",
    ),
    ({"action_config": {"max_episode_steps": 3}}, "'max_episode_steps'"),
    # Producers
    ({"producers": []}, "producers must be a list of one or more iterables, got []"),
    ({"producers": iter([])}, "producers must be a list of one or more iterables"),
    ({"producers": [3]}, "producers must be iterables of TensorDicts, got a int"),
    ({"producers": [[]], "policy": act}, "policy applies to environments that the engine makes"),
    ({"producers": [[]], "policy_factory": lambda: act}, "policy_factory applies to environments"),
    ({"producers": [[]], "transforms": RewardSum()}, "transforms applies to environments"),
    ({"producers": [[]], "state_dim": 3}, "state_dim applies to environments"),
    ({"producers": [[]], "start_method": "spawn"}, "start_method applies to environments"),
    ({"producers": [[]], "action_config": {"g": 1.0}}, "action_config"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cfg(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device")
def test_a_device_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigError, match="buffer_device='cuda', but this torch"):
        cfg(buffer_device="cuda")


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(TypeError, match="num_worker"):
        cfg(num_worker=2)


def test_a_producer_must_hand_out_its_trajectories() -> None:
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10))
    collector = Collector(make_env, None, frames_per_batch=10, total_frames=-1, replay_buffer=buffer)
    try:
        with pytest.raises(ConfigError, match="A Collector in producers has its own replay buffer"):
            cfg(producers=[collector])
    finally:
        collector.shutdown()


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "demo"},
        {"policy": "random"},
        {"policy": act},
        {"policy": torch.nn.Linear(3, 1)},
        {"policy_factory": lambda: act},
        {"env_factory": make_env},
        {"transforms": RewardSum()},
        {"transforms": lambda: [RewardSum()]},
        {"state_key": ("agent", "observation")},
        {"buffer_device": torch.device("cpu")},
        {"start_method": "forkserver"},
        {"producers": [[], ()]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_takes(settings: dict[str, Any]) -> None:
    cfg(**settings)


def test_defaults_are_those_that_are_documented() -> None:
    documented: Callable[[str], list[str]] = lambda name: re.findall(  # noqa: E731
        rf"^        {name}: .*?Default ([^\s,.]+)", str(OnlineDataEngineCfg.__doc__), re.MULTILINE | re.DOTALL
    )
    made = cfg()
    for name in ("buffer_size", "max_episode_steps", "num_workers", "initialization_timeout", "worker_timeout"):
        assert float(documented(name)[0]) == getattr(made, name)
    assert made.max_total_steps == 16 * 300


def test_gym_config_may_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "gym.yaml"
    file.write_text("id: Pendulum-v1\nkwargs: {g: 1.5}\n")
    for path in (file, str(file)):
        env = cfg(gym_config=path).env_maker.single()
        assert env.unwrapped.g == 1.5
        env.close()
    with pytest.raises(ConfigFileNotFoundError):
        cfg(gym_config=tmp_path / "none.yaml")


def test_action_config_reaches_the_environment() -> None:
    gym_config = {"id": "Pendulum-v1", "kwargs": {"render_mode": "rgb_array"}}
    env = cfg(gym_config=gym_config, action_config={"g": 1.5}).env_maker.single()
    assert (env.unwrapped.g, env.unwrapped.render_mode) == (1.5, "rgb_array")
    env.close()
    assert gym_config["kwargs"] == {"render_mode": "rgb_array"}


def test_an_engine_takes_a_configuration_only() -> None:
    with pytest.raises(InvalidArgumentError, match="cfg of type dict"):
        OnlineDataEngine(PENDULUM)
