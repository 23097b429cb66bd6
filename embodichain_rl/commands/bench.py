"""``embodichain-rl bench``: how fast a buffer is on this machine, beside TorchRL's, on the same data."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from embodichain_rl.replay import TrajectoryReplayBuffer
from embodichain_rl.replay.kernels import kernels

__all__ = ["COMMAND"]

CALLS = 10
"""Calls of one turn."""


def bench(
    trajectories: int = 256,
    steps: int = 300,
    state_dim: int = 17,
    image_size: int = 0,
    chunk_size: int = 64,
    batch_size: int = 32,
    threads: int = 1,
    seconds: float = 5.0,
) -> None:
    """Measure sample() and extend() beside TorchRL's SliceSampler and storage.

    Both buffers hold the same trajectories and take turns in this process. The figures are medians. The scripts in the
    directory "benchmarks" of the repository measure much more.

    Args:
        trajectories: the number of trajectories in both buffers.
        steps: steps of each trajectory.
        state_dim: size of the vector that is observed at each step.
        image_size: height and width of a color image that is observed too; 0 for none.
        chunk_size: steps of a chunk, or a slice.
        batch_size: chunks of a batch.
        threads: how many threads torch may use; more than one make copies slow while other processes are busy.
        seconds: how long each of the two calls is measured.
    """
    torch.set_num_threads(threads)
    capacity = trajectories * steps
    ours = TrajectoryReplayBuffer(
        max_trajectories=trajectories, max_total_steps=capacity, chunk_size=chunk_size, batch_size=batch_size
    )
    theirs = TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=SliceSampler(slice_len=chunk_size, end_key=("next", "done"), strict_length=True),
        batch_size=batch_size * chunk_size,
    )
    for number in range(trajectories):
        data = _trajectory(steps, state_dim, image_size, number)
        ours.extend(data)
        theirs.extend(data)
    data = _trajectory(steps, state_dim, image_size, trajectories)

    version = "compiled kernels" if kernels().is_compiled else "kernels in NumPy, since they were not compiled"
    shape = f"batches [{batch_size}, {chunk_size}]"
    print(f"{trajectories:,} trajectories of {steps:,} steps, {shape}, {version}")
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    if load > cores:
        print(f"Other programs are running (load {load:.1f} on {cores} cores): all times are too long.")
    print()
    print(f"{'':<10}{'here':>12}{'TorchRL':>12}{'ratio':>9}")
    for name, calls in (
        ("sample()", {"here": ours.sample, "TorchRL": theirs.sample}),
        ("extend()", {"here": lambda: ours.extend(data), "TorchRL": lambda: theirs.extend(data)}),
    ):
        took = _take_turns(calls, seconds)
        here, other = took["here"], took["TorchRL"]
        print(f"{name:<10}{here * 1e6:>9,.0f} µs{other * 1e6:>9,.0f} µs{other / here:>8.1f}x", flush=True)


def _trajectory(steps: int, state_dim: int, image_size: int, seed: int) -> TensorDict:
    generator = torch.Generator().manual_seed(seed)
    observation = torch.randn(steps + 1, state_dim, generator=generator)
    done = (torch.arange(steps) == steps - 1).unsqueeze(1)
    data = TensorDict(
        {
            "observation": observation[:-1].clone(),
            "action": torch.randn(steps, 6, generator=generator),
            "next": {
                "observation": observation[1:].clone(),
                "reward": torch.randn(steps, 1, generator=generator),
                "done": done,
                "terminated": torch.zeros_like(done),
                "truncated": done.clone(),
            },
        },
        [steps],
    )
    if image_size:
        shape = (steps, 3, image_size, image_size)
        data["pixels"] = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return data


def _take_turns(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Return the median time of each call, in seconds. They alternate, so other load on the machine affects both."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    began = time.perf_counter()
    while True:
        for name, call in calls.items():
            for _ in range(CALLS):
                begin = time.perf_counter()
                call()
                taken[name].append(time.perf_counter() - begin)
        if time.perf_counter() - began >= seconds:
            return {name: statistics.median(times) for name, times in taken.items()}


COMMAND = bench
