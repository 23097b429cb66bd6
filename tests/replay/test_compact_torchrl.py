"""Observations stored once, with what TorchRL collects and trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import assert_same, buffer, layouts
from tensordict.nn import NormalParamExtractor, TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import (
    CatFrames,
    Compose,
    InitTracker,
    RewardSum,
    UnsqueezeTransform,
    VecNormV2,
)
from torchrl.modules import LSTMModule, ProbabilisticActor, TanhNormal, ValueOperator
from torchrl.objectives import SACLoss, SoftUpdate

from embodichain_rl import TrajectoryReplayBuffer


def test_torchrl_trains_on_it_to_the_bit() -> None:
    """SAC on chunks of both layouts: losses and gradients."""
    wide, compact = layouts(max_total_steps=600)
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(100))
    env.set_seed(0)
    torch.manual_seed(0)
    for _ in range(4):
        rollout = env.rollout(100)
        wide.extend(rollout.copy())
        compact.extend(rollout.copy())
    assert ("next", "step_count") in [compact.storage.schema.keys[n] for n in compact.storage.arena.shifted]

    def train(rb: TrajectoryReplayBuffer) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net = torch.nn.Sequential(
            torch.nn.Linear(3, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2), NormalParamExtractor()
        )
        actor = ProbabilisticActor(
            TensorDictModule(net, ["observation"], ["loc", "scale"]),
            in_keys=["loc", "scale"],
            distribution_class=TanhNormal,
            return_log_prob=True,
        )
        mix = TensorDictModule(lambda *parts: torch.cat(parts, -1), ["observation", "action"], ["mixed"])
        value = ValueOperator(torch.nn.Linear(4, 1), in_keys=["mixed"], out_keys=["state_action_value"])
        loss = SACLoss(actor, TensorDictSequential(mix, value), action_spec=env.action_spec)
        loss.make_value_estimator(gamma=0.99)
        targets = SoftUpdate(loss, tau=0.1)
        optimizer = torch.optim.Adam(loss.parameters(), 1e-2)
        results = []
        for _ in range(5):
            losses = loss(rb.sample())
            total = losses["loss_actor"] + losses["loss_qvalue"] + losses["loss_alpha"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            targets.step()
            results.append(total.detach())
        return [*results, *(parameter.detach() for parameter in loss.parameters())]

    for got, expected in zip(train(compact), train(wide), strict=True):
        assert torch.equal(got, expected)


TRANSFORMS: dict[str, Callable[[], list[Any]]] = {
    "counters": lambda: [RewardSum(), InitTracker()],
    "a running mean": lambda: [VecNormV2(in_keys=["observation"])],
    "stacked frames": lambda: [
        UnsqueezeTransform(-2, in_keys=["observation"]),
        CatFrames(N=3, dim=-2, in_keys=["observation"]),
    ],
    "a recurrent policy": lambda: [InitTracker()],
}


@pytest.mark.parametrize("which", TRANSFORMS)
def test_what_torchrl_collects_fits(which: str) -> None:
    """Also where transforms or a policy carry something from step to step, in pieces of two environments."""
    env: Any = TransformedEnv(
        SerialEnv(2, lambda: GymEnv("Pendulum-v1")), Compose(StepCounter(30), *TRANSFORMS[which]())
    )
    policy = None
    if which == "a recurrent policy":
        lstm = LSTMModule(input_size=3, hidden_size=4, in_key="observation", out_key="features")
        env.append_transform(lstm.make_tensordict_primer())
        policy = TensorDictSequential(lstm, TensorDictModule(torch.nn.Linear(4, 1), ["features"], ["action"]))
    wide, compact = layouts(max_total_steps=1000)
    collector = Collector(env, policy, frames_per_batch=50, total_frames=200)
    for data in collector:
        wide.extend(data.copy())
        compact.extend(data.copy())
    collector.shutdown()
    assert len(compact) == len(wide) == 5
    stored_once = {
        key for key in data["next"].keys(True, True) if key not in ("reward", "done", "terminated", "truncated")
    }
    assert {compact.storage.schema.keys[n][-1] for n in compact.storage.arena.shifted} == stored_once
    assert_same(compact[:], wide[:])


def test_a_collector_that_drops_next_observations_leaves_nothing_to_store_once() -> None:
    rb = buffer(max_total_steps=400)
    env = TransformedEnv(GymEnv("Pendulum-v1"), StepCounter(50))
    collector = Collector(env, None, frames_per_batch=100, total_frames=200, compact_obs=True, replay_buffer=rb)
    for _ in collector:
        pass
    collector.shutdown()
    assert len(rb) == 4
    assert not rb.storage.arena.shifted
    assert ("next", "observation") not in rb.sample().keys(True)
