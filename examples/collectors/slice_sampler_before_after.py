"""From TorchRL's `SliceSampler` to chunks of whole trajectories: the lines that change.

    -rb = TensorDictReplayBuffer(
    -    storage=LazyTensorStorage(STEPS), sampler=SliceSampler(slice_len=L, end_key=("next", "done")), batch_size=B * L
    +rb = TrajectoryReplayBuffer(
    +    max_trajectories=EPISODES, max_total_steps=STEPS, chunk_size=L, batch_size=B
     )
     collector = Collector(make_env, policy, ..., replay_buffer=rb, trajs_per_batch=1)
     for _ in collector:
    -    batch = rb.sample().reshape(B, L)
    +    batch = rb.sample()

Both draw a trajectory with at least `L` steps, then a start in it. A batch has two additional keys,
`("trajectory", "id")` and `("trajectory", "step")`. The `SliceSampler` sets `("next", "done")` and
`("next", "truncated")` in the last step of each slice, whether or not the episode ends there. A chunk contains the
values of the environment instead.

    python examples/collectors/slice_sampler_before_after.py
    python examples/collectors/slice_sampler_before_after.py --help

It collects the same environment into both buffers and prints the time of a batch from each.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import tyro
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SliceSampler, TensorDictReplayBuffer
from torchrl.envs import GymEnv
from torchrl.modules import RandomPolicy
from tqdm import tqdm

from embodichain_rl import TrajectoryReplayBuffer


@dataclass(frozen=True)
class Config:
    """Sample slices of episodes with TorchRL's SliceSampler, and the same with a TrajectoryReplayBuffer."""

    env: str = "HalfCheetah-v5"
    """The id of any installed Gymnasium environment."""
    episodes: int = 30
    """Number of episodes to collect into each of the buffers."""
    episode_steps: int = 200
    """Maximum steps of an episode."""
    chunk_size: int = 32
    """Steps of a slice, or chunk."""
    batch_size: int = 32
    """Slices, or chunks, per batch."""
    samples: int = 200
    """Number of batches to time."""


def before(config: Config) -> tuple[ReplayBuffer, Callable[[], TensorDictBase]]:
    B, L = config.batch_size, config.chunk_size
    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(config.episodes * config.episode_steps),
        sampler=SliceSampler(slice_len=L, end_key=("next", "done")),
        batch_size=B * L,
    )
    return rb, lambda: rb.sample().reshape(B, L)


def after(config: Config) -> tuple[ReplayBuffer, Callable[[], TensorDictBase]]:
    rb = TrajectoryReplayBuffer(
        max_trajectories=config.episodes,
        max_total_steps=config.episodes * config.episode_steps,
        chunk_size=config.chunk_size,
        batch_size=config.batch_size,
    )
    return rb, rb.sample


def collect(config: Config, rb: ReplayBuffer, name: str) -> None:
    make_env = partial(GymEnv, config.env, max_episode_steps=config.episode_steps)
    collector = Collector(
        make_env,
        RandomPolicy(make_env().action_spec),
        frames_per_batch=config.episode_steps,
        total_frames=config.episodes * config.episode_steps,
        replay_buffer=rb,
        trajs_per_batch=1,
    )
    try:
        for _ in tqdm(collector, total=config.episodes, desc=f"collect, {name}"):
            pass
    finally:
        collector.shutdown()


def milliseconds(sample: Callable[[], TensorDictBase], samples: int) -> float:
    times = []
    for _ in range(samples):
        begin = time.perf_counter()
        sample()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def main(config: Config) -> None:
    times = {}
    for name, make in (("before", before), ("after", after)):
        rb, sample = make(config)
        collect(config, rb, name)
        batch = sample()
        times[name] = milliseconds(sample, config.samples)
        print(f"{name:<8} {type(rb).__name__:<24} {list(batch.shape)}  {times[name]:.3f} ms a batch", flush=True)
    print(f"{times['before'] / times['after']:.1f} times faster")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.")
