"""How long does `sample()` take, compared with TorchRL's `SliceSampler` and a bare copy of the same batch?

    python benchmarks/sampling.py
    python benchmarks/sampling.py --quick --out outputs/sampling.json

The contestants alternate on the same trajectories, in memory:

* `TrajectoryReplayBuffer.sample()`;
* `TensorDictReplayBuffer.sample()` with a `SliceSampler`, which returns the steps flat, `[B * L]`: with `end_key`, with
  `traj_key`, and with `cache_values=True`, which finds the trajectories only once as long as nothing is written;
* `data[index]` with a random index `[B, L]`, without a replay buffer;
* one `memcpy` of as many bytes, from a random position in the data to a fixed target.

A turn has twenty calls and starts after a small training step. "cold" is the first call, which finds the learner's data
in the processor caches. "x the first" is the time divided by ours.

Some shapes are measured once more while every core is busy. With more than one thread, helper threads copy batches of a
megabyte and more too. That must cost nothing then.

Before the measurement, the script checks that the buffers return the same keys, shapes and dtypes, and the values that
were written at the returned steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import busy_cores, print_times, take_turns, write_report
from tensordict import TensorDict, TensorDictBase
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from embodichain_rl import TrajectoryReplayBuffer

OURS = "TrajectoryReplayBuffer"

PIXELS: dict[str, dict[str, tuple[int, ...]]] = {
    "images": {"pixels": (96, 96, 3)},
    "3 cameras": dict.fromkeys(("front", "side", "wrist"), (224, 224, 3)),
}
"""The images of a step."""

MARKED_BY_SLICE_SAMPLER = (("next", "done"), ("next", "truncated"))
"""Entries that a SliceSampler sets to True in the last step of each slice."""


@dataclass(frozen=True)
class Config:
    """Measure `sample()` against TorchRL's SliceSampler and bare copies of the same bytes."""

    quick: bool = False
    """One shape of each kind and a second each, instead of all."""
    seconds: float = 6.0
    """Duration for each shape and number of threads."""
    busy: bool = True
    """Whether some shapes are measured once more while a process on each core is busy, as with simulators."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Case:
    """The content of the buffer and the shape of a batch."""

    kind: str
    trajectories: int
    steps: int
    batch_size: int
    chunk_size: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.trajectories} x {self.steps} steps, B {self.batch_size}, L {self.chunk_size}"


CASES = (
    Case("states", 64, 300, 32, 64),
    Case("states", 512, 300, 32, 64),
    Case("states", 4096, 300, 256, 64),
    Case("states", 2_000, 500, 256, 4),
    Case("states", 10_000, 500, 256, 4),
    Case("20 keys", 512, 300, 32, 64),
    Case("images", 16, 200, 16, 16),
    Case("images", 64, 200, 32, 32),
    Case("3 cameras", 16, 50, 8, 16),
)

TYPICAL = (Case("states", 64, 300, 32, 64), Case("images", 16, 200, 16, 16))
"""One shape of each kind."""

WHILE_BUSY = (*TYPICAL, Case("states", 4096, 300, 256, 64))
"""The shapes that are measured while all cores are busy."""

FEW, MANY = Case("states", 4_000, 1_250, 32, 4), Case("states", 1_000_000, 5, 32, 4)
"""The same number of steps in few and in very many trajectories, on which the time of a sample must not depend."""


def make_trajectory(case: Case, number: int) -> TensorDict:
    """Return the data of a TorchRL collector: of a locomotion task, or with images but without next images."""
    T = case.steps
    generator = torch.Generator().manual_seed(number)
    never = torch.zeros(T, 1, dtype=torch.bool)
    at_the_end = never.clone()
    at_the_end[-1] = True
    observations = torch.randn(T + 1, 17, generator=generator)
    data = TensorDict(
        {
            "action": torch.randn(T, 6, generator=generator),
            "observation": observations[:-1].clone(),
            "collector": {"traj_ids": torch.full((T,), number)},
            "done": never,
            "terminated": never,
            "truncated": never,
            "next": {
                "observation": observations[1:].clone(),
                "reward": torch.randn(T, 1, generator=generator),
                "done": at_the_end,
                "terminated": never,
                "truncated": at_the_end,
            },
        },
        [T],
    )
    for key, shape in PIXELS.get(case.kind, {}).items():
        data[key] = torch.randint(256, (T, *shape), dtype=torch.uint8, generator=generator)
    if case.kind == "20 keys":
        for number in range(20 - len(data.keys(True, True))):
            data["sensors", str(number)] = torch.randn(T, 1 + number, generator=generator)
    return data


@dataclass(frozen=True)
class Buffers:
    """The same trajectories in our buffer and in TorchRL's buffers, which share one storage."""

    ours: TrajectoryReplayBuffer
    peers: dict[str, TensorDictReplayBuffer]
    data: TensorDictBase
    """All steps, in the order in which they were written."""


def fill_buffers(case: Case) -> Buffers:
    total = case.trajectories * case.steps
    ours = TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=total,
        chunk_size=case.chunk_size,
        batch_size=case.batch_size,
    )
    storage = LazyTensorStorage(total)
    samplers: dict[str, dict[str, Any]] = {
        "SliceSampler(end_key)": {"end_key": ("next", "done")},
        "SliceSampler(traj_key)": {"traj_key": ("collector", "traj_ids")},
        "SliceSampler(end_key, cache_values)": {"end_key": ("next", "done"), "cache_values": True},
    }
    peers = {
        name: TensorDictReplayBuffer(
            storage=storage,
            sampler=SliceSampler(slice_len=case.chunk_size, **arguments),
            batch_size=case.batch_size * case.chunk_size,
        )
        for name, arguments in samplers.items()
    }
    writer = next(iter(peers.values()))
    for number in range(case.trajectories):
        trajectory = make_trajectory(case, number)
        ours.extend(trajectory.copy())  # TorchRL's extend() adds an "index" to its argument
        writer.extend(trajectory)
    return Buffers(ours, peers, storage[:].exclude("index"))


def check_same(case: Case, buffers: Buffers) -> None:
    """Assert that the buffers return complete chunks of the data that was written."""
    data = buffers.data
    shape = (case.batch_size, case.chunk_size)
    assert_equal(data[: case.steps], make_trajectory(case, 0))
    for _ in range(3):
        chunks = buffers.ours.sample()
        steps = chunks["trajectory", "id"] * case.steps + chunks["trajectory", "step"]
        assert_consecutive(case, steps, shape)
        assert_equal(chunks.exclude("index", "trajectory"), data[steps])
        for peer in buffers.peers.values():
            slices = peer.sample().reshape(shape)
            steps = slices["index"].squeeze(-1)
            assert_consecutive(case, steps, shape)
            expected = data[steps]
            for key in MARKED_BY_SLICE_SAMPLER:
                expected[key][:, -1] = True
            assert_equal(slices.exclude("index"), expected)


def assert_consecutive(case: Case, steps: torch.Tensor, shape: tuple[int, int]) -> None:
    assert steps.shape == shape, f"got {list(steps.shape)}, not {shape}"
    assert (steps.diff(dim=1) == 1).all(), "a chunk with steps left out"
    assert (steps[:, 0] // case.steps == steps[:, -1] // case.steps).all(), "a chunk of two trajectories"


def assert_equal(got: TensorDictBase, expected: TensorDictBase) -> None:
    got, expected = got.flatten_keys("."), expected.flatten_keys(".")
    assert set(got.keys()) == set(expected.keys()), f"keys differ: {set(got.keys()) ^ set(expected.keys())}"
    for key, value in expected.items():
        assert got[key].dtype == value.dtype, f"{key} has another dtype"
        assert torch.equal(got[key], value), f"{key} has other values"


def make_contestants(case: Case, buffers: Buffers) -> tuple[dict[str, Callable[[], Any]], int]:
    """Return the contestants by name, and the bytes of the data in a batch."""
    data = buffers.data
    total = len(data)
    offsets = torch.arange(case.chunk_size)

    def index_at_random() -> TensorDictBase:
        trajectories = torch.randint(case.trajectories, (case.batch_size,))
        starts = torch.randint(case.steps - case.chunk_size + 1, (case.batch_size,))
        return data[(trajectories * case.steps + starts).unsqueeze(1) + offsets]

    columns = list(data.values(include_nested=True, leaves_only=True))
    nbytes = sum(column.nbytes for column in columns) // total * case.batch_size * case.chunk_size
    source = max(columns, key=lambda column: column.nbytes).flatten().view(torch.uint8).numpy()
    target = np.zeros(nbytes, dtype=np.uint8)
    draw = np.random.default_rng(0)

    def copy_at_random() -> None:
        start = draw.integers(len(source) - nbytes + 1)
        np.copyto(target, source[start : start + nbytes])

    return {
        OURS: buffers.ours.sample,
        **{name: peer.sample for name, peer in buffers.peers.items()},
        "data[index]": index_at_random,
        "one memcpy": copy_at_random,
    }, nbytes


ALL_CORES = torch.get_num_threads()


def measure(case: Case, seconds: float, *, busy: bool = False) -> list[dict[str, Any]]:
    buffers = fill_buffers(case)
    check_same(case, buffers)
    contestants, nbytes = make_contestants(case, buffers)
    results = []
    for threads in sorted({1, ALL_CORES}):
        torch.set_num_threads(threads)
        times = take_turns(contestants, seconds=seconds)
        state = f"{threads} thread(s){', all cores busy' * busy}"
        print_times(f"{case}: {nbytes / 1e6:.2f} MB a batch, {state}", times)
        results += [
            {
                "case": asdict(case),
                "threads": threads,
                "busy": busy,
                "batch_bytes": nbytes,
                "contestant": name,
                **taken.as_dict(),
            }
            for name, taken in times.items()
        ]
    return results


def measure_sizes(few: Case, many: Case, seconds: float) -> list[dict[str, Any]]:
    """Measure the same batches from a buffer of few trajectories and of very many."""
    contestants = {}
    for case in (few, many):
        rb = TrajectoryReplayBuffer(
            max_trajectories=case.trajectories,
            max_total_steps=case.trajectories * case.steps,
            chunk_size=case.chunk_size,
            batch_size=case.batch_size,
        )
        some = torch.cat([make_trajectory(case, number) for number in range(max(1, 5_000 // case.steps))])
        while len(rb) < case.trajectories:
            rb.extend(some)
        contestants[f"{case.trajectories:,} trajectories"] = rb.sample
    torch.set_num_threads(1)
    times = take_turns(contestants, seconds=seconds)
    steps = few.trajectories * few.steps
    print_times(f"{steps:,} steps of states, B {few.batch_size}, L {few.chunk_size}, 1 thread", times)
    return [{"case": asdict(few), "contestant": name, **taken.as_dict()} for name, taken in times.items()]


def main(config: Config) -> None:
    seconds = 1.0 if config.quick else config.seconds
    results = [result for case in (TYPICAL if config.quick else CASES) for result in measure(case, seconds)]
    if config.busy and not config.quick:
        with busy_cores():
            results += [result for case in WHILE_BUSY for result in measure(case, seconds, busy=True)]
    if not config.quick:
        results += measure_sizes(FEW, MANY, seconds)
    write_report(config.out, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
