"""Warnings that a user can't act on are not raised."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from steps import make_buffer, small
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import GRUModule

from embodichain_rl.collectors import GymnasiumCollector


def recurrent() -> TensorDictSequential:
    gru = GRUModule(input_size=3, hidden_size=4, in_keys=["observation", "h"], out_keys=["features", ("next", "h")])
    return TensorDictSequential(gru, TensorDictModule(torch.nn.Linear(4, 1), ["features"], ["action"]))


def collect(collector_class: type[Collector], **kwargs: Any) -> None:
    env = GymEnv("Pendulum-v1")
    settings = {"frames_per_batch": 10, "total_frames": 10, "replay_buffer": make_buffer(), "trajs_per_batch": 1}
    collector = collector_class(env, recurrent(), **settings, **kwargs)
    collector.shutdown()


@pytest.mark.parametrize("given", [{}, {"auto_register_policy_transforms": None}], ids=["nothing said", "None"])
def test_a_collector_starts_without_a_warning_of_what_another_torchrl_will_do(given: dict[str, None]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        collect(GymnasiumCollector, **given)


def test_torchrl_still_warns_of_it() -> None:
    with pytest.warns(FutureWarning, match="missing transforms required by the policy"):
        collect(Collector)


def test_a_batch_size_of_a_call_is_no_conflict() -> None:
    rb = make_buffer([small(0, 5)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert rb.sample(4).shape == (4, 3)
        assert rb.sample(2, return_info=True)[0].shape == (2, 3)
