"""How much memory does a buffer use, compared with TorchRL's storage of the same steps?

    python benchmarks/memory.py
    python benchmarks/memory.py --quick --out outputs/memory.json

The same episodes with images are written to a `LazyTensorStorage`, to a `TrajectoryReplayBuffer`, and to a `compact`
one, which stores an image only once if it is the next observation of one step and the observation of the following
step. With `compact="views"`, a sample also has it only once, in two views. For TorchRL's storage, which is full, the
memory is the size of all tensors. For ours, it is the number of pages that the kernel has allocated, including the
ledger and the head-room. It is measured after `max_total_steps` steps were written, and after ten times as many.

The times of `sample()` and `extend()` are measured too: the buffers alternate.

For eight distributions of lengths, it measures what is used at most of what was announced, the share of trajectories
that are evicted early, and how many steps are held at least of those that the limits allow.

Then an hour of three cameras, also with images that are kept as PNG and JPEG; see `_camera_hours.py`.
"""

from __future__ import annotations

import math
import os
import random
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _camera_hours import measure_cameras
from _harness import print_table, take_turns, write_report
from tensordict import TensorDict
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from embodichain_rl import TrajectoryReplayBuffer, TrajectoryStorage

TURNOVERS = 10


@dataclass(frozen=True)
class Config:
    """Compare the memory of the layouts."""

    quick: bool = False
    """A quarter of the trajectories, and a second per comparison instead of eight."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Case:
    """The episodes: images of 64 x 64, a state and an action per step."""

    name: str
    trajectories: int
    shortest: int
    longest: int
    batch_size: int = 32
    chunk_size: int = 16

    @property
    def max_total_steps(self) -> int:
        return self.trajectories * (self.shortest + self.longest) // 2

    def __str__(self) -> str:
        return f"{self.name}: {self.trajectories} trajectories of {self.shortest} to {self.longest} steps"


CASES = (Case("of one length", 64, 200, 200), Case("of many lengths", 64, 20, 380), Case("short", 256, 50, 50))


def make_trajectory(number: int, steps: int) -> TensorDict:
    """Return the keys that TorchRL's collectors write."""
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(256, (steps + 1, 64, 64, 3), dtype=torch.uint8, generator=generator)
    observation = torch.randn(steps + 1, 17, generator=generator)
    never = torch.zeros(steps, 1, dtype=torch.bool)
    at_the_end = never.clone()
    at_the_end[-1] = True
    root = {"pixels": pixels[:-1].clone(), "observation": observation[:-1].clone()}
    following = {"pixels": pixels[1:].clone(), "observation": observation[1:].clone()}
    ends = {"done": at_the_end, "terminated": at_the_end.clone(), "truncated": never.clone()}
    begins = {name: never.clone() for name in ends}
    reward = torch.randn(steps, 1, generator=generator)
    action = torch.randn(steps, 6, generator=generator)
    return TensorDict({**root, **begins, "action": action, "next": {**following, **ends, "reward": reward}}, [steps])


def bytes_of(storage: TrajectoryStorage) -> int:
    """Return the number of bytes of the pages that a storage has written."""
    blocks = (storage._memory.arena_block, storage._schema.block, storage.ledger._block)
    return sum(512 * os.fstat(block._fd).st_blocks for block in blocks)


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    total = case.max_total_steps
    theirs = TensorDictReplayBuffer(storage=LazyTensorStorage(total), batch_size=case.batch_size)
    settings = {"max_trajectories": case.trajectories, "max_total_steps": total, "batch_size": case.batch_size}
    ours = {
        f"compact={compact}": TrajectoryReplayBuffer(chunk_size=case.chunk_size, compact=compact, **settings)
        for compact in (False, True, "views")
    }
    lengths = random.Random(0)
    written = number = 0
    taken: dict[str, list[int]] = {name: [] for name in ours}
    for limit in (total, TURNOVERS * total):
        while written < limit:
            trajectory = make_trajectory(number, lengths.randint(case.shortest, case.longest))
            for rb in ours.values():
                rb.extend(trajectory)
            if written < total:
                theirs.extend(trajectory.copy())  # TorchRL's extend() adds an "index" to its argument
            written += len(trajectory)
            number += 1
        for name, rb in ours.items():
            taken[name].append(bytes_of(rb.storage))
    generators = [torch.Generator().manual_seed(0) for _ in ours]
    same = [rb.sample_chunks(32, case.chunk_size, generator=g) for rb, g in zip(ours.values(), generators, strict=True)]
    assert all((same[0] == other).all() for other in same[1:]), "the layouts hand out different chunks"

    whole = theirs.storage._storage
    reference = sum(value.nbytes for value in whole.exclude("index").values(True, True))
    times = take_turns(
        {f"sample, {name}": rb.sample for name, rb in ours.items()}
        | {f"extend, {name}": lambda rb=rb: rb.extend(trajectory) for name, rb in ours.items()},
        seconds=seconds,
    )
    print_table(
        f"{case}; TorchRL's LazyTensorStorage of {total:,} steps: {reference / 1e6:.1f} MB",
        ("", "full, MB", "x TorchRL", f"{TURNOVERS} times, MB", "x TorchRL", "sample ms", "extend ms"),
        [
            (
                name,
                *(text for nbytes in of for text in (f"{nbytes / 1e6:.1f}", f"{nbytes / reference:.3f}")),
                *(f"{1e3 * times[f'{what}, {name}'].median:.3f}" for what in ("sample", "extend")),
            )
            for name, of in taken.items()
        ],
    )
    return [
        {
            "case": asdict(case),
            "layout": name,
            "bytes_when_full": of[0],
            "bytes_later": of[1],
            "torchrl_bytes": reference,
            **{what: times[f"{what}, {name}"].as_dict() for what in ("sample", "extend")},
        }
        for name, of in taken.items()
    ]


def mixes(average: int, longest: int, numbers: random.Random) -> dict[str, Callable[[int], float]]:
    """Return eight distributions of lengths by name: functions of the number of the trajectory."""
    return {
        "all the same": lambda _: average,
        "uniform": lambda _: numbers.uniform(0.2 * average, 1.8 * average),
        "5 % long": lambda _: 10 * average if numbers.random() < 0.05 else average / 2,
        "log-uniform": lambda _: math.exp(numbers.uniform(*map(math.log, (average / 10, min(longest, 30 * average))))),
        "exponential": lambda _: 1 + numbers.expovariate(1 / average),
        "two lengths": lambda _: 2 * average if numbers.random() < 0.5 else average / 8,
        "2 % as long as possible": lambda _: longest if numbers.random() < 0.02 else 0.8 * average,
        "growing": lambda number: average / 2 + number,
    }


def measure_lengths(trajectories: int, turnovers: int) -> list[dict[str, Any]]:
    """Write trajectories of each mix of lengths; return what was announced, and what was used at most."""
    average, nbytes = 100, 2048
    longest = average * trajectories
    results: list[dict[str, Any]] = []
    pixels = np.ones((longest, nbytes), dtype=np.uint8)
    for name, length_of in mixes(average, longest, random.Random(0)).items():
        storage = TrajectoryStorage(trajectories, longest)
        storage.allocate(TensorDict({"pixels": torch.zeros(1, nbytes, dtype=torch.uint8)}, [1]))
        written = number = used = 0
        kept: deque[int] = deque()  # the lengths of what the limits allow
        held = 1.0
        while written < turnovers * longest:
            length = max(1, min(longest, int(length_of(number))))
            storage.write([[pixels[:length]]])
            written, number = written + length, number + 1
            used = max(used, storage.bytes()["bytes_used"])
            kept.append(length)
            while len(kept) > trajectories or sum(kept) > longest:
                kept.popleft()
            held = min(held, storage.num_steps / sum(kept))
        announced = storage.bytes()["bytes_expected"]
        early = storage.ledger.stats()["evicted_early"] / number
        shares = {"early": early, "held": held}
        results.append({"trajectories": trajectories, "lengths": name, "announced": announced, "used": used, **shares})
    print_table(
        f"{trajectories:,} trajectories, written {turnovers} times over",
        ("lengths", "announced, MB", "used at most, MB", "used of announced", "evicted early", "held at least"),
        [
            (
                result["lengths"],
                f"{result['announced'] / 1e6:.1f}",
                f"{result['used'] / 1e6:.1f}",
                f"{result['used'] / result['announced']:.3f}",
                f"{result['early']:.1%}",
                f"{result['held']:.1%}",
            )
            for result in results
        ],
    )
    return results


def main(config: Config) -> None:
    torch.set_num_threads(1)
    turnovers = 5 if config.quick else 60
    lengths = [result for trajectories in (10, 60, 200) for result in measure_lengths(trajectories, turnovers)]
    cases = [Case(c.name, c.trajectories // 4, c.shortest, c.longest) for c in CASES] if config.quick else CASES
    seconds = 1.0 if config.quick else 8.0
    results = [result for case in cases for result in measure(case, seconds)]
    write_report(config.out, [*results, *lengths, *measure_cameras(config.quick, seconds)])


if __name__ == "__main__":
    main(tyro.cli(Config))
