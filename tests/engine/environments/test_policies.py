from __future__ import annotations

import pickle
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from demo_envs import RowsReach
from tensordict.nn import TensorDictModule
from torchrl.data import Bounded, Categorical, Composite
from torchrl.envs import EnvBase, GymWrapper
from torchrl.modules import RandomPolicy

from embodichain_rl.engine.environments import CallablePolicy, EnvMaker, checked_action, make_policy
from embodichain_rl.errors import ActionMismatchError, ConfigError


def pendulum(num_envs: int = 1) -> EnvBase:
    return EnvMaker({"id": "Pendulum-v1", "num_envs": num_envs})()


def brake(observation: torch.Tensor) -> torch.Tensor:
    assert observation.shape == (3,)
    return -observation[2:].clamp(-2, 2)


class TestCheckedAction:
    @pytest.mark.parametrize("action", [[1, -1], np.array([1.0, -1.0]), torch.tensor([1.0, -1.0]), np.float16([1, -1])])
    def test_takes_numbers_of_the_right_kind(self, action: Any) -> None:
        checked = checked_action(action, Bounded(-1, 1, shape=(2,)), source="It")
        assert checked.dtype == torch.float32
        assert checked.tolist() == [1.0, -1.0]

    def test_is_a_copy_without_a_gradient(self) -> None:
        action = torch.ones(2, requires_grad=True)
        checked = checked_action(action, Bounded(-1, 1, shape=(2,)), source="It")
        assert not checked.requires_grad
        assert checked.data_ptr() != action.data_ptr()

    @pytest.mark.parametrize("action", [1, np.int64(1), torch.tensor(1, dtype=torch.int32)])
    def test_takes_the_number_of_a_discrete_action(self, action: Any) -> None:
        assert checked_action(action, Categorical(2), source="It").tolist() == 1

    @pytest.mark.parametrize(
        ("action", "spec", "message"),
        [
            (
                None,
                Bounded(-1, 1, shape=(2,)),
                r"It gave an action of type NoneType; the environment takes torch\.float32",
            ),
            ("left", Categorical(2), "type str"),
            (
                np.zeros(3),
                Bounded(-1, 1, shape=(2,)),
                r"of shape \[3\]; the environment takes torch\.float32 of shape \[2\]",
            ),
            (np.zeros((1, 2)), Bounded(-1, 1, shape=(2,)), r"of shape \[1, 2\]"),
            (0.5, Categorical(2), r"torch\.float32 of shape \[\]; the environment takes torch\.int64"),
        ],
    )
    def test_refuses_the_rest(self, action: Any, spec: Any, message: str) -> None:
        with pytest.raises(ActionMismatchError, match=message):
            checked_action(action, spec, source="It")


class TestMakePolicy:
    def test_a_torchrl_policy_is_used_as_it_is(self) -> None:
        env = pendulum()
        for policy in (
            TensorDictModule(brake, in_keys=["observation"], out_keys=["action"]),
            RandomPolicy(env.action_spec),
        ):
            assert make_policy(policy, env) is policy

    @pytest.mark.parametrize("num_envs", [1, 3])
    def test_none_acts_at_random(self, num_envs: int) -> None:
        env = pendulum(num_envs)
        actions = env.rollout(20, make_policy(None, env))["action"].flatten(end_dim=-2)
        assert len(actions.unique(dim=0)) == 20 * num_envs

    @pytest.mark.parametrize("num_envs", [1, 3])
    def test_a_function_gets_one_observation(self, num_envs: int) -> None:
        env = pendulum(num_envs)
        rollout = env.rollout(20, make_policy(brake, env))
        assert torch.equal(rollout["action"], -rollout["observation"][..., 2:].clamp(-2, 2))

    def test_a_function_may_return_a_number(self) -> None:
        env = EnvMaker({"id": "CartPole-v1", "num_envs": 2})()
        rollout = env.rollout(20, make_policy(lambda observation: int(observation[2] > 0), env))
        assert torch.equal(rollout["action"], (rollout["observation"][..., 2] > 0).long())

    def test_a_function_may_get_another_observation(self) -> None:
        env = GymWrapper(gymnasium.wrappers.TransformObservation(*halves()))
        rollout = env.rollout(5, make_policy(lambda angle: angle[:1], env, state_key="angle"))
        assert torch.equal(rollout["action"], rollout["angle"][..., :1])
        with pytest.raises(ConfigError, match=r"state_key='angel' .* Did you mean 'angle'\?"):
            make_policy(brake, env, state_key="angel")

    def test_a_plain_module_keeps_its_parameters(self) -> None:
        env = pendulum()
        policy = make_policy(torch.nn.Linear(3, 1), env)
        assert len(list(policy.parameters())) == 2
        assert not env.rollout(3, policy)["action"].requires_grad

    def test_a_policy_that_reuses_its_memory_is_recorded_right(self) -> None:
        env, memory = pendulum(), np.zeros(1, np.float32)

        def count(observation: torch.Tensor) -> np.ndarray:
            memory[0] += 0.1
            return memory

        torch.testing.assert_close(
            env.rollout(3, make_policy(count, env))["action"], torch.tensor([[0.1], [0.2], [0.3]])
        )

    def test_a_wrong_action_names_the_policy(self) -> None:
        def wrong(observation: torch.Tensor) -> torch.Tensor:
            return observation[:2]

        env = pendulum()
        with pytest.raises(
            ActionMismatchError, match=r"The policy .*wrong gave an action torch\.float32 of shape \[2\]"
        ):
            env.rollout(3, make_policy(wrong, env))

    @pytest.mark.parametrize("policy", ["demo", "expert", 3])
    def test_refuses_what_is_no_policy(self, policy: Any) -> None:
        with pytest.raises(ConfigError, match=f"got {policy!r}"):
            make_policy(policy, pendulum())

    def test_travels_by_pickle(self) -> None:
        policy = pickle.loads(pickle.dumps(CallablePolicy(brake, pendulum())))
        assert pendulum().rollout(3, policy).shape == (3,)

    def test_a_function_can_not_give_several_actions(self) -> None:
        env = RowsReach()
        env.full_action_spec = Composite(arm=env.action_spec, gripper=Bounded(0.0, 1.0, shape=(3, 1)), shape=(3,))
        with pytest.raises(ConfigError, match="gripper"):
            make_policy(brake, env)


def halves() -> tuple:
    env = gymnasium.make("Pendulum-v1")
    parts = {"angle": (2,), "speed": (1,)}
    space = gymnasium.spaces.Dict({key: gymnasium.spaces.Box(-8, 8, shape) for key, shape in parts.items()})
    return env, lambda observation: {"angle": observation[:2], "speed": observation[2:]}, space
