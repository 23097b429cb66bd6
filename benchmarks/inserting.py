"""How long does `extend()` take for a whole trajectory, compared with TorchRL's round-robin writer?

    python benchmarks/inserting.py
    python benchmarks/inserting.py --quick --out outputs/inserting.json

`TrajectoryReplayBuffer.extend()` and `TensorDictReplayBuffer.extend()` over a `LazyTensorStorage` alternate with the
same trajectories. Both buffers are full, so that each write replaces data. TorchRL's storage is not shared between
processes and does not keep trajectories whole. "memcpy" only copies the tensors of each trajectory to their position in
a full arena: it is the lower bound for any buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from _harness import print_times, take_turns, write_report
from sampling import TYPICAL, Case, assert_equal, make_trajectory
from tensordict import TensorDictBase
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from embodichain_rl import TrajectoryReplayBuffer

OURS = "TrajectoryReplayBuffer"
THEIRS = "RoundRobinWriter"
MEMCPY = "memcpy"


@dataclass(frozen=True)
class Config:
    """Measure `extend()` against TorchRL's."""

    quick: bool = False
    """A second each instead of eight."""
    out: Path | None = None
    """Path of the JSON file for the results."""


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    total = case.trajectories * case.steps
    ours = TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=total,
        chunk_size=case.chunk_size,
        batch_size=case.batch_size,
    )
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(total), batch_size=case.batch_size)
    trajectories = [make_trajectory(case, number) for number in range(8)]
    for number in range(2 * case.trajectories):
        ours.extend(trajectories[number % 8])
        theirs.extend(trajectories[number % 8])
    newest = trajectories[(2 * case.trajectories - 1) % 8]
    assert_equal(ours[-1].exclude("index", "trajectory"), newest)
    assert_equal(theirs.storage[total - case.steps : total].exclude("index"), newest)

    next_of_ours, next_of_theirs = itertools.cycle(trajectories), itertools.cycle(trajectories)
    times = take_turns(
        {
            OURS: lambda: ours.extend(next(next_of_ours)),
            THEIRS: lambda: theirs.extend(next(next_of_theirs)),
            MEMCPY: make_memcpy(trajectories, case.trajectories),
        },
        seconds=seconds,
    )
    nbytes = sum(value.nbytes for value in newest.values(True, True))
    print_times(f"{case.kind}, {case.steps} steps, {nbytes / 1e6:.2f} MB", times)
    return [
        {"case": asdict(case), "contestant": name, "bytes": nbytes, **taken.as_dict()} for name, taken in times.items()
    ]


def make_memcpy(trajectories: list[TensorDictBase], places: int) -> Callable[[], None]:
    """Return a function that copies the tensors of the next trajectory to the next position at each call."""
    sources = [[value.flatten().view(torch.uint8) for value in data.values(True, True)] for data in trajectories]
    arena = [torch.zeros(places, value.numel(), dtype=torch.uint8) for value in sources[0]]
    turns = zip(itertools.cycle(sources), itertools.cycle(range(places)), strict=False)

    def copy() -> None:
        source, place = next(turns)
        for column, values in zip(arena, source, strict=True):
            column[place] = values

    return copy


def main(config: Config) -> None:
    torch.set_num_threads(1)
    seconds = 1.0 if config.quick else 8.0
    write_report(config.out, [result for case in TYPICAL for result in measure(case, seconds)])


if __name__ == "__main__":
    main(tyro.cli(Config))
