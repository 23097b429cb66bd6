"""How many steps per second does a collector take, compared with a bare loop over the same Gymnasium environment?

    python benchmarks/collecting.py
    python benchmarks/collecting.py --quick --out outputs/collecting.json

`GymnasiumCollector`, TorchRL's `Collector` and a loop of `env.step(policy(observation))` alternate in one process. The
collectors write whole trajectories to a `TrajectoryReplayBuffer`; the loop stores nothing. First, the script asserts
that both collectors write the same data for equal seeds. There are three policies: a constant action (the loop only
steps), random actions (the loop samples the environment's action space), and a network with two hidden layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
import tyro
from _harness import print_table, take_turns, write_report
from sampling import assert_equal
from tensordict.nn import TensorDictModule
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymEnv
from torchrl.modules import MLP

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.collectors import GymnasiumCollector

LOOP = "bare loop"
OURS = "GymnasiumCollector"
THEIRS = "TorchRL's Collector"

STEPS = 100
"""Steps per call. A turn has 20 calls."""

EPISODES = 16


@dataclass(frozen=True)
class Config:
    """Measure the time per step of each contestant."""

    quick: bool = False
    """One environment with one policy, and two seconds each instead of fifteen."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Case:
    """An environment with a policy."""

    env: str
    policy: str


CASES = [Case(env, policy) for env in ("Pendulum-v1", "Pusher-v5") for policy in ("fixed", "random", "network")]


def make_env(case: Case) -> EnvBase:
    env = GymEnv(case.env)
    env.set_seed(0)
    return env


def make_module(case: Case) -> torch.nn.Module:
    """A policy as a module, from an observation to an action."""
    torch.manual_seed(0)
    env = gymnasium.make(case.env)
    (features,), (actions,) = env.observation_space.shape, env.action_space.shape
    dtype = torch.from_numpy(env.observation_space.sample()).dtype
    if case.policy == "network":
        net = MLP(in_features=features, out_features=actions, num_cells=[64, 64]).to(dtype)
        return torch.nn.Sequential(net, _Float())
    return _Fixed(actions)


class _Float(torch.nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.float()


class _Fixed(torch.nn.Module):
    def __init__(self, actions: int) -> None:
        super().__init__()
        self.action = torch.full((actions,), 0.1)

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.action


def make_collector(case: Case, collector_class: type[Collector], **options: Any) -> Collector:
    policy = None if case.policy == "random" else TensorDictModule(make_module(case), ["observation"], ["action"])
    rb = TrajectoryReplayBuffer(max_trajectories=EPISODES, max_total_steps=EPISODES * 200, chunk_size=1)
    torch.manual_seed(0)
    options = {"frames_per_batch": STEPS, "total_frames": -1, "trajs_per_batch": 1, **options}
    return collector_class(partial(make_env, case), policy, replay_buffer=rb, **options)


def assert_both_write_the_same(case: Case) -> None:
    written = []
    for collector_class in (GymnasiumCollector, Collector):
        collector = make_collector(case, collector_class, total_frames=800)
        for _ in collector:
            pass
        written.append([data.exclude("index", "trajectory") for data in collector.replay_buffer.storage])
    assert len(written[0]) == len(written[1]) > 2
    for ours, theirs in zip(*written, strict=True):
        assert_equal(ours, theirs)


def loop(case: Case) -> Iterator[None]:
    """An iterator that yields after every `STEPS` steps of an environment."""
    env = gymnasium.make(case.env)
    observation, _ = env.reset(seed=0)
    act = make_act(case, env)
    for step in count(1):
        observation, _, terminated, truncated, _ = env.step(act(observation))
        if terminated or truncated:
            observation, _ = env.reset()
        if step % STEPS == 0:
            yield


def make_act(case: Case, env: gymnasium.Env) -> Callable[[np.ndarray], np.ndarray]:
    if case.policy == "random":
        return lambda observation: env.action_space.sample()
    module = make_module(case)
    if isinstance(module, _Fixed):
        action = module.action.numpy()
        return lambda observation: action

    @torch.no_grad()
    def act(observation: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(observation)).numpy()

    return act


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    assert_both_write_the_same(case)
    ours = make_collector(case, GymnasiumCollector)
    assert ours.fallback_reason is None
    contestants = {LOOP: loop(case), OURS: iter(ours), THEIRS: iter(make_collector(case, Collector))}
    times = take_turns({name: partial(next, turn) for name, turn in contestants.items()}, seconds=seconds)
    # The time of a step depends on its position in an episode, so the mean of a turn is reported.
    a_step = {name: float(np.median(taken.seconds.mean(axis=1))) / STEPS for name, taken in times.items()}
    print_table(
        f"{case.env}, {case.policy} policy, {len(times[LOOP].seconds)} turns each",
        ("", "µs a step", "steps/s", "x bare loop"),
        [
            (name, f"{1e6 * taken:.1f}", f"{1 / taken:,.0f}", f"{a_step[LOOP] / taken:.2f}")
            for name, taken in a_step.items()
        ],
    )
    return [
        {"case": asdict(case), "contestant": name, "seconds_a_step": taken, "of_bare_loop": a_step[LOOP] / taken}
        for name, taken in a_step.items()
    ]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    cases, seconds = (CASES[:1], 2.0) if config.quick else (CASES, 15.0)
    write_report(config.out, [result for case in cases for result in measure(case, seconds)])


if __name__ == "__main__":
    main(tyro.cli(Config))
