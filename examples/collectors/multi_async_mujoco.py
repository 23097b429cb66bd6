"""Collection in the background: TorchRL workers write whole episodes while this process samples chunks of them.

    worker 0: MuJoCo ── rb.extend(episode) ──┐
                                             ├── shared memory ── rb.sample() ── this process
    worker 1: MuJoCo ── rb.extend(episode) ──┘

No process waits for another. After `start()`, a `MultiAsyncCollector` steps its environments in the background.
`trajs_per_batch=1` makes each worker write an episode as soon as it is complete, and `rb.sample()` takes no lock.

    python examples/collectors/multi_async_mujoco.py
    python examples/collectors/multi_async_mujoco.py --env Hopper-v5 --chunk-size 4 --num-workers 4
    python examples/collectors/multi_async_mujoco.py --help

It runs for `--seconds`, or until Ctrl-C. The exit code is 0 in both cases. It is 1 if a worker dies, or if there is
nothing to sample within `--timeout`.
"""

from __future__ import annotations

import signal

if __name__ == "__mp_main__":  # a worker, which imports this file
    # Ctrl-C reaches every process of a terminal. The main process shuts its workers down, so it is ignored here, before
    # the imports that take seconds.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import time
from dataclasses import dataclass
from functools import partial

import tyro
from live_report import LiveReport, describe, exit_if_a_worker_died
from tensordict import TensorDict
from torchrl.collectors import MultiAsyncCollector
from torchrl.envs import GymEnv
from torchrl.modules import RandomPolicy

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.errors import ChunkTooLongError, EmptyBufferError


@dataclass(frozen=True)
class Config:
    """Collect from MuJoCo in worker processes, and sample chunks at the same time."""

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
    seconds: float = 15.0
    """How long to sample."""
    timeout: float = 60.0
    """Timeout for the first batch, in seconds."""


def first_batch(rb: TrajectoryReplayBuffer, collector: MultiAsyncCollector, timeout: float) -> TensorDict:
    deadline = time.monotonic() + timeout
    while True:
        exit_if_a_worker_died(collector.procs)
        try:
            return rb.sample()
        except (EmptyBufferError, ChunkTooLongError) as error:
            if time.monotonic() > deadline:
                raise SystemExit(f"Nothing to sample after {timeout:.0f} s. {error}") from error
            time.sleep(0.01)


def main(config: Config) -> None:
    make_env = partial(GymEnv, config.env, max_episode_steps=config.episode_steps)
    rb = TrajectoryReplayBuffer(
        max_trajectories=config.max_trajectories,
        max_total_steps=config.max_trajectories * config.episode_steps,
        chunk_size=config.chunk_size,
        batch_size=config.batch_size,
    )
    print(f"Starting {config.num_workers} workers ...", flush=True)
    collector = MultiAsyncCollector(
        [make_env] * config.num_workers,
        RandomPolicy(make_env().action_spec),
        frames_per_batch=config.episode_steps,
        total_frames=-1,
        replay_buffer=rb,
        trajs_per_batch=1,
    )
    try:
        collector.start()
        print(describe(first_batch(rb, collector, config.timeout)), flush=True)
        with LiveReport(rb, config.seconds) as report:
            while not report.time_is_up:
                batch = rb.sample()
                # Replace this by a training step.
                report.sampled(batch)
                # TorchRL does not report the death of a worker that was started with start().
                exit_if_a_worker_died(collector.procs)
    finally:
        collector.shutdown()


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.")
