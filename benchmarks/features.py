"""What does each sampling option cost, compared with plain chunks of the same buffer?

    python benchmarks/features.py
    python benchmarks/features.py --quick --out outputs/features.json

Segments, segment boundaries, padding, windows per key, weights, an age limit, passes without replacement, text and the
options of the buffer itself (prefetch, transforms, info, another batch size) alternate with plain chunks. The data are
demonstrations of four segments, with states and with images. "x plain" is the time of a batch divided by that of a
batch of plain chunks: of twenty calls in a row, and of the first call after a step of training.

"with text" uses the same demonstrations with an instruction per step and a task and a mass per trajectory: once as ids
and once as strings. "first text of each chunk" resolves one instruction per chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from _harness import print_table, take_turns, write_report
from tensordict import TensorDict
from torchrl.envs.transforms import RenameTransform

from embodichain_rl import (
    ByGroup,
    ByPriority,
    ByRecency,
    ChunkSampler,
    TrajectoryReplayBuffer,
    TrajectoryStorage,
)
from embodichain_rl.transforms import ResolveText

PLAIN = "plain chunks"

SEGMENTS = 4

TASKS = 3

PREFETCH = 2


@dataclass(frozen=True)
class Config:
    """Measure every sampling option against plain chunks."""

    quick: bool = False
    """States only, for a second each instead of eight."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Case:
    """The content of the buffer and the size of a batch."""

    kind: str
    trajectories: int
    steps: int
    batch_size: int
    chunk_size: int


CASES = (Case("states", 512, 300, 32, 16), Case("images", 32, 200, 16, 16))


def make_trajectory(case: Case, number: int, *, speaks: bool = False) -> TensorDict:
    generator = torch.Generator().manual_seed(number)
    T = case.steps
    done = torch.zeros(T, 1, dtype=torch.bool)
    done[-1] = True
    data = TensorDict(
        {
            "observation": torch.randn(T, 17, generator=generator),
            "action": torch.randn(T, 6, generator=generator),
            "segment_id": torch.arange(T) * SEGMENTS // T,
            "task": torch.full((T,), number % TASKS),
            "next": {"observation": torch.randn(T, 17, generator=generator), "reward": torch.randn(T, 1), "done": done},
        },
        [T],
    )
    if case.kind == "images":
        data["pixels"] = torch.randint(256, (T, 96, 96, 3), dtype=torch.uint8, generator=generator)
    if speaks:
        data["instruction"] = [f"Do part {segment} of the task." for segment in data["segment_id"].tolist()]
        data["trajectory", "task"] = [f"Task {number % TASKS}"] * T
        data["trajectory", "mass"] = torch.full((T,), float(number))
    return data


def make_samplers(case: Case) -> dict[str, ChunkSampler]:
    L = case.chunk_size
    seen = "pixels" if case.kind == "images" else "observation"
    return {
        PLAIN: ChunkSampler(L),
        "within a segment": ChunkSampler(L, sampling_mode="segment"),
        "with a change of segment": ChunkSampler(L, sampling_mode="boundary"),
        "padded at both edges": ChunkSampler(L, pad="both"),
        f"windows: one {seen}, {L} actions": ChunkSampler(windows={seen: (0, 0), "action": (0, L - 1)}, pad="both"),
        "every chunk alike": ChunkSampler(L, weights="steps"),
        "newer ones more often": ChunkSampler(L, weights=ByRecency(half_life=case.trajectories / 4)),
        "tasks balanced": ChunkSampler(L, weights=ByGroup("task")),
        "by priority": ChunkSampler(L, weights=ByPriority()),
        "of the last hour": ChunkSampler(L, max_age=3600.0),
        "without replacement": ChunkSampler(L, replacement=False),
    }


def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    samplers = make_samplers(case)
    storage = TrajectoryStorage(case.trajectories, case.trajectories * case.steps)
    buffers = {
        name: TrajectoryReplayBuffer(storage=storage, sampler=sampler, batch_size=case.batch_size)
        for name, sampler in samplers.items()
    }
    speaking = TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=case.trajectories * case.steps,
        sampler=samplers[PLAIN],
        batch_size=case.batch_size,
    )
    resolve = ResolveText(speaking, ["instruction", ("trajectory", "task")])
    for number in range(case.trajectories):
        buffers[PLAIN].extend(make_trajectory(case, number))
        speaking.extend(make_trajectory(case, number, speaks=True))
    ways: dict[str, Callable[[], object]] = {name: rb.sample for name, rb in buffers.items()}
    prefetching = TrajectoryReplayBuffer(
        storage=storage, sampler=samplers[PLAIN], batch_size=case.batch_size, prefetch=PREFETCH
    )
    renaming = TrajectoryReplayBuffer(storage=storage, sampler=samplers[PLAIN], batch_size=case.batch_size)
    renaming.append_transform(RenameTransform(["observation"], ["state"]))
    plain_buffer = buffers[PLAIN]
    ways |= {
        f"prefetch={PREFETCH}": prefetching.sample,
        "renamed by a transform": renaming.sample,
        "return_info=True": partial(plain_buffer.sample, return_info=True),
        "another batch size": partial(plain_buffer.sample, case.batch_size + 1),
        "with text, as ids": speaking.sample,
        "with text, first text of each chunk": lambda: speaking.texts.resolve(speaking.sample()["instruction"][:, 0]),
        "with text, all of it": lambda: resolve(speaking.sample()),
    }
    times = take_turns(ways, seconds=seconds)
    plain = times[PLAIN]
    print_table(
        f"{case.kind}, {case.trajectories} x {case.steps} steps, B {case.batch_size}, L {case.chunk_size}, "
        f"{plain.seconds.size} calls each",
        ("", "median ms", "p10", "p90", "x plain", "after training, ms", "x plain"),
        [
            (
                name,
                *(f"{1e3 * taken.quantile(q):.3f}" for q in (0.5, 0.1, 0.9)),
                f"{taken.median / plain.median:.2f}",
                f"{1e3 * taken.cold:.3f}",
                f"{taken.cold / plain.cold:.2f}",
            )
            for name, taken in times.items()
        ],
    )
    return [{"case": asdict(case), "way": name, **taken.as_dict()} for name, taken in times.items()]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    cases, seconds = (CASES[:1], 1.0) if config.quick else (CASES, 8.0)
    write_report(config.out, [result for case in cases for result in measure(case, seconds)])


if __name__ == "__main__":
    main(tyro.cli(Config))
