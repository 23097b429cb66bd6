from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import pytest
import torch
from demo_envs import STEP_SIZE, RowsReach
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import DoubleToFloat, EnvBase, GymWrapper, RewardSum, StepCounter, TransformedEnv
from torchrl.envs.utils import check_env_specs

from embodichain_rl.engine.environments import EnvMaker, GymConfig
from embodichain_rl.errors import ConfigError

REACH = "demo_envs:ActionListReach-v0"


# TorchRL takes a function for a policy of TensorDicts where its argument is called "td".
def towards_goal(td: TensorDictBase) -> TensorDictBase:
    way = td["observation"][..., 2:] - td["observation"][..., :2]
    return td.set("action", (way / STEP_SIZE).clamp(-1, 1))


def stand_still(td: TensorDictBase) -> TensorDictBase:
    return td.set("action", torch.zeros(*td.batch_size, 1))


class TestGymConfig:
    def test_takes_every_field(self) -> None:
        config = {"id": "Pendulum-v1", "num_envs": 3, "max_episode_steps": 7, "kwargs": {"g": 9.81}}
        assert GymConfig.from_dict(config) == GymConfig("Pendulum-v1", 3, 7, {"g": 9.81})

    def test_unknown_keys_are_named_with_a_way_out(self) -> None:
        with pytest.raises(ConfigError) as caught:
            GymConfig.from_dict({"id": "Pendulum-v1", "max_episode_step": 5, "robot": {"dof": 7}})
        message = str(caught.value)
        assert "'max_episode_step' (did you mean 'max_episode_steps'?), 'robot'." in message
        assert "gym_config['kwargs']" in message
        assert "env_factory" in message

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({}, "needs the key 'id'"),
            ({"id": ""}, r"gym_config\['id'\]"),
            ({"id": 3}, r"gym_config\['id'\].* got 3"),
            ({"id": "a", "num_envs": 0}, r"gym_config\['num_envs'\].* got 0"),
            ({"id": "a", "num_envs": 2.0}, r"gym_config\['num_envs'\]"),
            ({"id": "a", "max_episode_steps": -1}, r"gym_config\['max_episode_steps'\]"),
            ({"id": "a", "kwargs": [1]}, r"gym_config\['kwargs'\]"),
            ({"id": "a", "kwargs": {"max_episode_steps": 5}}, "'max_episode_steps'; move it to gym_config"),
            ("config.json", r"load_config\(path\)"),
        ],
    )
    def test_refuses_what_can_not_work(self, config: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            GymConfig.from_dict(config)


class TestEnvMaker:
    def test_needs_one_source(self) -> None:
        with pytest.raises(ConfigError, match="got neither"):
            EnvMaker()
        with pytest.raises(ConfigError, match="got both"):
            EnvMaker({"id": REACH}, RowsReach)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"gym_config": {"id": REACH, "render": 1}}, "'render'"),
            ({"env_factory": "RowsReach"}, "env_factory"),
            ({"env_factory": RowsReach, "max_episode_steps": 0}, "max_episode_steps"),
            ({"env_factory": RowsReach, "transforms": [StepCounter]}, "transforms"),
        ],
    )
    def test_refuses_what_can_not_work(self, arguments: dict, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            EnvMaker(**arguments)

    def test_refuses_a_factory_that_makes_no_torchrl_environment(self) -> None:
        with pytest.raises(ConfigError, match=r"TimeLimit; use torchrl\.envs\.GymWrapper"):
            EnvMaker(env_factory=lambda: gymnasium.make("Pendulum-v1"))()

    def test_refuses_transforms_that_are_none(self) -> None:
        with pytest.raises(ConfigError, match="transforms must be"):
            EnvMaker({"id": REACH}, transforms=lambda: [1])()

    def test_travels_by_pickle(self) -> None:
        maker = EnvMaker({"id": REACH, "num_envs": 2}, max_episode_steps=4, transforms=[RewardSum()])
        rollout = pickle.loads(pickle.dumps(maker))().rollout(10)
        assert rollout.shape == (2, 4)
        assert "episode_reward" in rollout["next"]

    def test_specs_hold(self) -> None:
        for num_envs in (1, 2):
            check_env_specs(EnvMaker({"id": REACH, "num_envs": num_envs}, max_episode_steps=4)())

    def test_observations_are_copies_of_reused_memory(self) -> None:
        rollout = EnvMaker({"id": REACH})().rollout(5)
        assert torch.equal(rollout["observation"][1:], rollout["next", "observation"][:-1])
        assert len(rollout["next", "observation"].unique(dim=0)) == 5

    def test_discrete_actions_are_numbers(self) -> None:
        rollout = EnvMaker({"id": "CartPole-v1"})().rollout(5)
        assert rollout["action"].dtype == torch.int64
        assert rollout["action"].ndim == 1

    def test_kwargs_and_time_limit_reach_the_environment(self) -> None:
        env = EnvMaker({"id": "Pendulum-v1", "max_episode_steps": 6, "kwargs": {"g": 1.5}})()
        assert env.unwrapped.g == 1.5
        rollout = env.rollout(20)
        assert len(rollout) == 6
        assert "step_count" not in rollout
        assert rollout["next", "truncated"][-1].item()

    def test_max_episode_steps_truncates_any_environment(self) -> None:
        rollout = EnvMaker(env_factory=RowsReach, max_episode_steps=3)().rollout(9, stand_still)
        assert rollout.shape == (3, 3)
        assert rollout["next", "truncated"][:, -1].all()
        assert rollout["step_count"][0].flatten().tolist() == [0, 1, 2]

    def test_transforms_are_appended_to_every_environment(self) -> None:
        shared = DoubleToFloat(in_keys=["observation"], in_keys_inv=[])
        for transforms in (shared, [shared], lambda: shared, lambda: [shared]):
            maker = EnvMaker({"id": "Pendulum-v1"}, transforms=transforms)
            both = [maker(), maker()]
            assert [[type(transform) for transform in env.transform] for env in both] == [[DoubleToFloat]] * 2

    def test_single_and_each(self) -> None:
        maker = EnvMaker({"id": REACH, "num_envs": 3}, max_episode_steps=2)
        assert maker().batch_size == (3,)
        assert maker.single().batch_size == ()
        assert [env.rollout(5).shape for env in maker.each()] == [(2,)] * 3

    def test_seeds(self) -> None:
        def goals(seed: int) -> torch.Tensor:
            env = EnvMaker({"id": REACH, "num_envs": 2})()
            env.set_seed(seed)
            return env.reset()["observation"][:, 2:]

        assert torch.equal(goals(3), goals(3))
        assert not torch.equal(goals(3), goals(4))
        assert not torch.equal(goals(3)[0], goals(3)[1])


class TestSuccess:
    def test_is_a_key_where_the_environment_reports_it(self) -> None:
        env = EnvMaker({"id": REACH})()
        assert env.observation_spec["success"].shape == (1,)
        assert env.reset()["success"].tolist() == [False]
        reached = env.rollout(20, towards_goal)["next", "success"]
        assert reached.dtype == torch.bool
        assert reached.shape == (20, 1)
        assert not reached[0].item()
        assert reached[-1].item()

    def test_is_no_key_where_it_does_not(self) -> None:
        assert "success" not in EnvMaker({"id": "CartPole-v1"})().observation_spec

    def test_may_be_told(self) -> None:
        assert "success" not in EnvMaker({"id": REACH}, reports_success=False)().observation_spec
        env = EnvMaker({"id": "CartPole-v1"}, reports_success=True)()
        assert not env.rollout(3)["next", "success"].any()

    @pytest.mark.parametrize("value", [True, 1.0, torch.tensor([True])])
    def test_is_read_whatever_its_type(self, value: Any) -> None:
        assert (
            EnvMaker({"id": "demo_envs:Reporting-v0", "kwargs": {"value": value}})().rollout(2)["next", "success"].all()
        )

    def test_is_one_value(self) -> None:
        env = EnvMaker({"id": "demo_envs:Reporting-v0", "kwargs": {"value": [True, False]}})()
        with pytest.raises(ConfigError, match=r"info\['is_success'\] must be one value"):
            env.rollout(2)


def trajectories(maker: EnvMaker, frames: int) -> list[TensorDictBase]:
    """What a TorchRL collector with ``trajs_per_batch`` writes to a TorchRL buffer, cut at ``done``."""
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(10 * frames))
    collector = Collector(
        maker, None, frames_per_batch=30, total_frames=frames, replay_buffer=buffer, trajs_per_batch=1
    )
    for _ in collector:
        pass
    collector.shutdown()
    steps = buffer[:]
    ends = (steps["next", "done"].flatten().nonzero().flatten() + 1).tolist()
    assert ends[-1] == len(steps)
    return [steps[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@pytest.mark.parametrize("num_envs", [1, 3])
def test_a_collector_writes_whole_trajectories(num_envs: int) -> None:
    found = trajectories(EnvMaker({"id": "CartPole-v1", "num_envs": num_envs}, max_episode_steps=25), 900)
    assert len(found) > 20
    assert len({len(trajectory) for trajectory in found}) > 5
    assert len({trajectory["collector", "traj_ids"][0].item() for trajectory in found}) == len(found)
    for trajectory in found:
        assert len(trajectory["collector", "traj_ids"].unique()) == 1
        assert trajectory["step_count"].flatten().tolist() == list(range(len(trajectory)))
        assert torch.equal(trajectory["observation"][1:], trajectory["next", "observation"][:-1])
        assert torch.equal(trajectory["next", "truncated"].flatten().nonzero().flatten(), torch.tensor([24])) or (
            trajectory["next", "terminated"][-1].item()
        )


def test_reused_memory_reaches_a_buffer_intact() -> None:
    for trajectory in trajectories(EnvMaker({"id": REACH}, max_episode_steps=10), 60):
        assert not trajectory["observation"][0, :2].any()
        moved = trajectory["next", "observation"][:, :2] - trajectory["observation"][:, :2]
        torch.testing.assert_close(moved, STEP_SIZE * trajectory["action"])


def test_mujoco() -> None:
    pytest.importorskip("mujoco", reason="MuJoCo is an optional dependency")
    env = EnvMaker({"id": "Reacher-v5", "num_envs": 2}, transforms=DoubleToFloat())()
    rollout = env.rollout(60, break_when_any_done=False)
    assert rollout["observation"].dtype == torch.float32
    assert rollout["observation"].shape == (2, 60, 10)
    assert rollout["next", "truncated"].squeeze(-1).nonzero().tolist() == [[0, 49], [1, 49]]


class TestGoalConditioned:
    @pytest.fixture(autouse=True)
    def _needs_gymnasium_robotics(self) -> None:
        pytest.importorskip("gymnasium_robotics", reason="Gymnasium-Robotics is an optional dependency")

    @pytest.mark.parametrize("num_envs", [1, 2])
    def test_keys_are_flat(self, num_envs: int) -> None:
        env = EnvMaker({"id": "gymnasium_robotics:FetchReach-v4", "num_envs": num_envs})()
        rollout = env.rollout(3)
        batch = [num_envs] if num_envs > 1 else []
        shapes = {key: list(rollout["next", key].shape) for key in ("observation", "achieved_goal", "desired_goal")}
        assert shapes == {
            "observation": [*batch, 3, 10],
            "achieved_goal": [*batch, 3, 3],
            "desired_goal": [*batch, 3, 3],
        }
        assert rollout["next", "success"].shape == (*batch, 3, 1)

    def test_success_is_what_the_task_computes(self) -> None:
        def reach(td: TensorDictBase) -> TensorDictBase:
            way = 10 * (td["desired_goal"] - td["achieved_goal"])
            return td.set("action", torch.cat([way, torch.zeros(1)]).clamp(-1, 1).float())

        env = EnvMaker({"id": "gymnasium_robotics:FetchReach-v4"})()
        env.set_seed(0)
        rollout = env.rollout(50, reach)
        distance = (rollout["next", "achieved_goal"] - rollout["next", "desired_goal"]).norm(dim=-1, keepdim=True)
        assert torch.equal(rollout["next", "success"], distance < 0.05)
        assert rollout["next", "success"][-1].item()


def test_transforms_come_after_those_of_a_factory() -> None:
    def factory() -> EnvBase:
        return TransformedEnv(RowsReach(), RewardSum())

    env = EnvMaker(env_factory=factory, max_episode_steps=4, transforms=DoubleToFloat())()
    assert [type(transform) for transform in env.transform] == [RewardSum, StepCounter, DoubleToFloat]
    assert isinstance(env.base_env, RowsReach)


def test_env_factory_makes_any_torchrl_environment() -> None:
    def factory() -> EnvBase:
        return GymWrapper(gymnasium.make("Pendulum-v1"))

    maker = EnvMaker(env_factory=factory)
    assert maker.name.endswith("factory")
    assert maker().rollout(2)["observation"].shape == (2, 3)
    assert len(maker.each()) == 1
