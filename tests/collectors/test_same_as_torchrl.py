"""With equal seeds the native collector writes what TorchRL's writes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import pytest
import torch
from gym_envs import (
    Buttons,
    Doubles,
    Flat,
    Goals,
    NumpysButtons,
    Reusing,
    Sloppy,
    SloppyVector,
    Switches,
    Walk,
    assert_same,
    buffer,
    collect,
    vector,
    wrapped,
)
from gymnasium.vector import AsyncVectorEnv
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torchrl.collectors import Collector
from torchrl.envs import DoubleToFloat, EnvBase, SerialEnv, StepCounter, Transform, TransformedEnv
from torchrl.modules import MLP, TanhNormal

from embodichain_rl.collectors import GymnasiumCollector
from embodichain_rl.collectors.native_env import OwnedObservation
from embodichain_rl.engine.environments import EnvMaker

gymnasium.register("embodichain_rl_tests/Walk-v0", Walk)


def at_random() -> None:
    return None


def linear(in_keys: tuple[Any, ...] = ("observation",), features: int = 3, actions: int = 2) -> TensorDictModule:
    torch.manual_seed(1)
    net = MLP(in_features=features, out_features=actions, num_cells=[8])
    return TensorDictModule(lambda *x: net(torch.cat([y.float() for y in x], -1)), list(in_keys), ["action"])


def double() -> TensorDictModule:
    torch.manual_seed(1)
    return TensorDictModule(torch.nn.Linear(3, 2, dtype=torch.float64), ["observation"], ["action"])


def echo() -> TensorDictModule:
    """Hands its input on as the action, in the same memory."""
    return TensorDictModule(lambda observation: observation[..., :2], ["observation"], ["action"])


def gaussian() -> ProbabilisticTensorDictSequential:
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], ["loc", ("hidden", "scale")]),
        ProbabilisticTensorDictModule(
            in_keys={"loc": "loc", "scale": ("hidden", "scale")},
            out_keys=["action"],
            distribution_class=TanhNormal,
            return_log_prob=True,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )


def serial(env: type[gymnasium.Env] = Walk) -> EnvBase:
    made = SerialEnv(3, partial(wrapped, env))
    made.set_seed(5)
    return made


def transformed(make: Callable[[], EnvBase], *transforms: Any) -> EnvBase:
    made = make()
    for transform in transforms:
        made = TransformedEnv(made) if not isinstance(made, TransformedEnv) else made
        made.append_transform(transform())
    return made


def as_the_engine_makes_it(num_envs: int) -> EnvBase:
    made = EnvMaker({"id": "embodichain_rl_tests/Walk-v0", "num_envs": num_envs}, max_episode_steps=9)()
    made.set_seed(3)
    return made


limited = partial(partial, transformed)
counted = partial(StepCounter, max_steps=7)

CASES: dict[str, tuple[Callable[[], EnvBase], Callable[[], Any]]] = {
    "terminated and truncated": (partial(wrapped, Walk), at_random),
    "by a step counter": (limited(partial(wrapped, Walk), counted), linear),
    "a step counter without a limit": (limited(partial(wrapped, Walk), StepCounter), linear),
    "by Gymnasium's time limit": (
        partial(wrapped, lambda: gymnasium.make("embodichain_rl_tests/Walk-v0", max_episode_steps=5)),
        linear,
    ),
    "a policy that reads the count": (
        limited(partial(wrapped, Walk), counted),
        partial(linear, ("observation", "step_count"), 4),
    ),
    "a policy that hands its input on": (partial(wrapped, lambda: OwnedObservation(Reusing())), echo),
    "a distribution": (partial(wrapped, Walk), gaussian),
    "float64": (partial(wrapped, Doubles), double),
    "float64 made float32": (limited(partial(wrapped, Doubles), DoubleToFloat, counted), linear),
    "other types than it says": (partial(wrapped, Sloppy), linear),
    "a nested dict": (
        partial(wrapped, Goals),
        partial(linear, ("observation", ("goals", "desired"), "gripper"), 8),
    ),
    "a dict in the same memory": (partial(wrapped, lambda: OwnedObservation(Flat())), linear),
    "one-hot actions": (partial(wrapped, Buttons), at_random),
    "discrete actions": (partial(wrapped, Buttons, categorical_action_encoding=True), at_random),
    "several discrete actions": (partial(wrapped, Switches, categorical_action_encoding=True), at_random),
    "a row of environments": (serial, linear),
    "a row at random": (limited(serial, counted), at_random),
    "a row with a distribution": (limited(serial, counted), gaussian),
    "a row of dicts": (partial(serial, Goals), partial(linear, (("goals", "achieved"), "observation"), 5)),
    "a row of buttons": (partial(serial, Buttons), at_random),
    "a vector of environments": (vector, linear),
    "a vector in processes": (
        limited(partial(vector, kind=partial(AsyncVectorEnv, context="forkserver")), counted),
        linear,
    ),
    "a vector at random": (limited(vector, counted), at_random),
    "a vector with a distribution": (vector, gaussian),
    "a vector and its counts": (limited(vector, counted), partial(linear, ("observation", "step_count"), 4)),
    "a vector of dicts": (partial(vector, Goals), partial(linear, (("goals", "achieved"), "observation"), 5)),
    "a vector of dicts in the same memory": (partial(vector, Flat), linear),
    "a vector of float64 made float32": (limited(partial(vector, Doubles), DoubleToFloat, counted), linear),
    "a vector of buttons": (partial(vector, NumpysButtons), at_random),
    "a vector of discrete actions": (partial(vector, NumpysButtons, categorical_action_encoding=True), at_random),
    "a vector of other types than it says": (partial(vector, kind=SloppyVector), linear),
    "with success": (partial(as_the_engine_makes_it, 1), linear),
    "a row with success": (partial(as_the_engine_makes_it, 3), partial(linear, ("observation", "success"), 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_trajectories(case: str) -> None:
    make_env, make_policy = CASES[case]
    collector, ours = collect(GymnasiumCollector, make_env, make_policy)
    assert collector.fallback_reason is None
    _, theirs = collect(Collector, make_env, make_policy)
    assert_same(ours, theirs)


def test_both_ends_are_among_them() -> None:
    _, ours = collect(GymnasiumCollector, partial(wrapped, Walk), at_random)
    ends = {tuple(bool(data["next", key][-1]) for key in ("terminated", "truncated")) for data in ours}
    assert ends == {(True, False), (False, True)}


def test_episodes_longer_than_any_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embodichain_rl.collectors.episode.FIRST_CAPACITY", 2)
    _, ours = collect(GymnasiumCollector, serial, gaussian)
    assert max(len(data) for data in ours) > 4
    _, theirs = collect(Collector, serial, gaussian)
    assert_same(ours, theirs)


def test_through_a_transform_of_the_buffer() -> None:
    both = []
    for collector_class in (GymnasiumCollector, Collector):
        rb = buffer(transform=_Doubling())
        both.append(collect(collector_class, partial(wrapped, Walk), linear, replay_buffer=rb)[1])
    assert both[0][0]["observation"][1:].equal(2 * both[0][0]["next", "observation"][:-1])
    assert_same(*both)


class _Doubling(Transform):
    """Doubles what is stored as the observation, in place."""

    invertible = True

    def __init__(self) -> None:
        super().__init__(in_keys_inv=["observation"], out_keys_inv=["observation"])

    def _inv_apply_transform(self, observation: torch.Tensor) -> torch.Tensor:
        return observation.mul_(2)


def test_success_is_what_the_environment_says() -> None:
    make_env = CASES["with success"][0]
    _, ours = collect(GymnasiumCollector, make_env, linear)
    said = torch.cat([data["next", "success"] for data in ours])
    assert said.any()
    assert said.equal(torch.cat([data["next", "terminated"] for data in ours]))
