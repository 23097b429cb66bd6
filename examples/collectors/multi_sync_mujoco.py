"""Alternating collection and sampling: TorchRL workers write whole episodes, then this process samples chunks of them.

    for _ in collector:            the workers step `frames_per_batch` environment steps in all, write the completed
                                   episodes to shared memory with rb.extend(episode), and wait
        for _ in range(...):       while they wait, this process samples and trains
            batch = rb.sample()

With `replay_buffer=`, a `MultiSyncCollector` yields None: the workers write the data directly to the buffer, and none
of it passes through this process. Collection and training never run at the same time. This is simple to reason about,
but slower than `multi_async_mujoco.py`, in which no process waits for another.

    python examples/collectors/multi_sync_mujoco.py
    python examples/collectors/multi_sync_mujoco.py --batches-per-turn 500
    python examples/collectors/multi_sync_mujoco.py --help

It runs for `--seconds`, or until Ctrl-C. The exit code is 0 in both cases. If a worker dies, TorchRL raises an error.
"""

from __future__ import annotations

import signal

if __name__ == "__mp_main__":  # a worker, which imports this file
    # Ctrl-C reaches every process of a terminal. The main process shuts its workers down, so it is ignored here, before
    # the imports that take seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

from dataclasses import dataclass
from functools import partial

import tyro
from live_report import LiveReport, describe
from torchrl.collectors import MultiSyncCollector
from torchrl.envs import GymEnv
from torchrl.modules import RandomPolicy

from embodichain_rl import TrajectoryReplayBuffer


@dataclass(frozen=True)
class Config:
    """Collect from MuJoCo in worker processes, and sample chunks in alternation with them."""

    env: str = "HalfCheetah-v5"
    """The id of any installed Gymnasium environment."""
    num_workers: int = 2
    """Number of processes that step environments."""
    episode_steps: int = 200
    """Maximum steps of an episode."""
    max_trajectories: int = 64
    """Number of episodes that the buffer keeps, the newest ones."""
    chunk_size: int = 32
    """Steps of a chunk."""
    batch_size: int = 32
    """Chunks per batch."""
    batches_per_turn: int = 100
    """Number of batches that are sampled before the workers continue."""
    seconds: float = 15.0
    """How long to collect and sample."""


def main(config: Config) -> None:
    make_env = partial(GymEnv, config.env, max_episode_steps=config.episode_steps)
    rb = TrajectoryReplayBuffer(
        max_trajectories=config.max_trajectories,
        max_total_steps=config.max_trajectories * config.episode_steps,
        chunk_size=config.chunk_size,
        batch_size=config.batch_size,
    )
    print(f"Starting {config.num_workers} workers ...", flush=True)
    collector = MultiSyncCollector(
        [make_env] * config.num_workers,
        RandomPolicy(make_env().action_spec),
        # For all workers together: each takes as many steps as an episode can have, so that it completes at least one.
        frames_per_batch=config.num_workers * config.episode_steps,
        total_frames=-1,
        replay_buffer=rb,
        trajs_per_batch=1,
    )
    turns = iter(collector)
    try:
        next(turns)
        print(describe(rb.sample()), flush=True)
        with LiveReport(rb, config.seconds) as report:
            for _ in turns:
                for _ in range(config.batches_per_turn):
                    batch = rb.sample()
                    # Replace this by a training step.
                    report.sampled(batch)
                if report.time_is_up:
                    break
    finally:
        collector.shutdown()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.")
