"""What is the throughput when processes write and sample the same buffer at the same time?

    python benchmarks/together.py
    python benchmarks/together.py --quick --out outputs/together.json

Writer processes extend a buffer with whole trajectories and reader processes sample it, each as fast as possible. Our
buffer alternates with TorchRL's, a `TensorDictReplayBuffer` with `shared=True` over shared memory, of the same
trajectories: the processes of one are paused while those of the other run. The readers run alone and with the writers,
which shows the slowdown by the writers. The same is measured for a process that only copies as many bytes as a batch
has, which shows the slowdown of any reader of memory. A `DataLoader` samples our buffer with 0, 1 and 2 workers, while
no process writes.

The slowest call of a reader matters as much as the median: a training step may have to wait that long.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import print_table, write_report
from sampling import Case, make_trajectory
from tensordict import TensorDict
from torch.utils.data import DataLoader, IterableDataset
from torchrl.data import LazyTensorStorage, SliceSampler, TensorDictReplayBuffer

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.shared.memory import SharedBlock

OURS = "TrajectoryReplayBuffer"
TORCHRL = "TensorDictReplayBuffer(shared=True)"
MEMCPY = "memcpy"

MAX_CALLS = 1 << 22
"""Maximum number of calls of a process that are recorded."""

START_LIMIT = 60.0
"""Timeout for processes to start or to pause, in seconds."""


@dataclass(frozen=True)
class Config:
    """Measure buffers that several processes use at the same time."""

    writers: int = 1
    """Number of writer processes."""
    readers: int = 1
    """Number of reader processes. On a machine with two cores, more of both only wait for each other."""
    turns: int = 4
    """Turns of each contestant."""
    seconds: float = 2.0
    """Duration of a turn."""
    quick: bool = False
    """One short turn each, with states only."""
    out: Path | None = None
    """Path of the JSON file for the results."""


CASES = (Case("states", 64, 300, 32, 64), Case("images", 64, 200, 16, 16))


def make_ours(case: Case) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(
        max_trajectories=case.trajectories,
        max_total_steps=case.trajectories * case.steps,
        chunk_size=case.chunk_size,
        batch_size=case.batch_size,
    )


def make_torchrls(case: Case) -> TensorDictReplayBuffer:
    storage = LazyTensorStorage(case.trajectories * case.steps)
    rb = TensorDictReplayBuffer(
        storage=storage,
        sampler=SliceSampler(slice_len=case.chunk_size, end_key=("next", "done")),
        batch_size=case.batch_size * case.chunk_size,
        shared=True,
    )
    rb.extend(make_trajectory(case, 0))
    storage._storage.share_memory_()  # forked processes would write to private copies
    return rb


class Calls:
    """The times of the calls of one process, in seconds, in shared memory."""

    def __init__(self) -> None:
        self._block = SharedBlock(8 * (1 + MAX_CALLS))
        self._count = self._block.array(np.int64, (1,))
        self._seconds = self._block.array(np.float64, (MAX_CALLS,), 8)

    def add(self, seconds: float) -> None:
        self._seconds[self._count[0]] = seconds
        self._count[0] += 1

    def __len__(self) -> int:
        return int(self._count[0])

    def since(self, first: int) -> np.ndarray:
        return self._seconds[first : len(self)].copy()


def work(act: Callable[[], Any], calls: Calls, go: Any) -> None:
    """Call ``act`` whenever the process is not paused, until the process is killed."""
    torch.set_num_threads(1)
    while True:
        go.wait()
        begin = time.perf_counter()
        act()
        calls.add(time.perf_counter() - begin)


class Writing:
    """Extend a buffer with the next of a few trajectories."""

    def __init__(self, rb: Any, case: Case) -> None:
        self._rb = rb
        self._trajectories = [make_trajectory(case, number) for number in range(8)]
        self._next = 0

    def __call__(self) -> None:
        self._next += 1
        self._rb.extend(self._trajectories[self._next % 8].copy())


class Copying:
    """Copy as many bytes as a batch has, in one piece, from a random position in as much memory as the buffer takes."""

    def __init__(self, case: Case) -> None:
        step = sum(value.nbytes for value in make_trajectory(case, 0)[:1].values(True, True))
        self._source = torch.randint(256, (case.trajectories * case.steps * step,), dtype=torch.uint8).numpy()
        self._target = np.empty(case.batch_size * case.chunk_size * step, dtype=np.uint8)
        self._rng = np.random.default_rng(0)

    def __call__(self) -> None:
        start = self._rng.integers(len(self._source) - len(self._target))
        self._target[:] = self._source[start : start + len(self._target)]


class Crew:
    """The processes of one contestant, paused until they are resumed."""

    def __init__(self, rb: Any, case: Case, config: Config) -> None:
        context = multiprocessing.get_context("fork")
        self.go = {role: context.Event() for role in ("write", "sample", "copy")}
        acts = [("write", Writing(rb, case))] * config.writers + [("sample", rb.sample)] * config.readers
        acts += [("copy", Copying(case))] * config.readers
        self.calls = [(role, Calls()) for role, _ in acts]
        self._processes = [
            context.Process(target=work, args=(act, calls, self.go[role]), daemon=True)
            for (role, act), (_, calls) in zip(acts, self.calls, strict=True)
        ]
        for process in self._processes:
            process.start()

    def run(self, seconds: float, roles: tuple[str, ...] = ("write", "sample")) -> dict[str, list[np.ndarray]]:
        """Run the processes of some roles for a while, and return the times of the calls of each process."""
        before = [len(calls) for _, calls in self.calls]
        for role in roles:
            self.go[role].set()
        time.sleep(seconds)
        for role in roles:
            self.go[role].clear()
        self._rest()
        taken: dict[str, list[np.ndarray]] = {role: [] for role in roles}
        for (role, calls), first in zip(self.calls, before, strict=True):
            if role in roles:
                taken[role].append(calls.since(first))
        return taken

    def _rest(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        counts: list[int] = []
        while counts != (counts := [len(calls) for _, calls in self.calls]):
            if time.monotonic() > deadline:
                raise SystemExit("The processes do not come to rest.")
            time.sleep(0.1)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join(START_LIMIT)


@contextmanager
def crews(case: Case, config: Config) -> Iterator[dict[str, Crew]]:
    buffers = {OURS: make_ours(case), TORCHRL: make_torchrls(case)}
    for rb in buffers.values():
        for number in range(case.trajectories):
            rb.extend(make_trajectory(case, number))
    running = {name: Crew(rb, case, config) for name, rb in buffers.items()}
    try:
        yield running
    finally:
        for crew in running.values():
            crew.end()


def row(name: str, calls: np.ndarray, seconds: float, per_call: int = 1) -> tuple[str, ...]:
    p50, p99 = np.quantile(calls, [0.5, 0.99])
    return (
        name,
        f"{len(calls) * per_call / seconds:,.0f}",
        *(f"{1e3 * value:.3f}" for value in (p50, p99, calls.max())),
    )


def measure_processes(case: Case, config: Config) -> list[dict[str, Any]]:
    """Measure writers and readers at the same time, and readers alone."""
    turns, seconds = (1, 1.0) if config.quick else (config.turns, config.seconds)
    taken: dict[tuple[str, str], list[np.ndarray]] = {}
    with crews(case, config) as running:
        for crew in running.values():
            crew.run(0.5)  # everything is allocated and warm
        for _ in range(turns):
            for name, crew in running.items():
                for role, calls in crew.run(seconds).items():
                    taken.setdefault((name, role), []).extend(calls)
                taken.setdefault((name, "sample alone"), []).extend(crew.run(seconds, ("sample",))["sample"])
            for together, roles in (("copy", ("write", "copy")), ("copy alone", ("copy",))):
                taken.setdefault((MEMCPY, together), []).extend(running[OURS].run(seconds, roles)["copy"])
    total = turns * seconds
    results = []
    rows = []
    for (name, role), calls in sorted(taken.items(), key=lambda item: item[0][1]):
        everything = np.concatenate(calls)
        rows.append(row(f"{role}: {name}", everything, total))
        results.append(
            {
                "case": asdict(case),
                "contestant": name,
                "role": role,
                "calls_per_second": len(everything) / total,
                **{f"p{q}_s": float(np.quantile(everything, q / 100)) for q in (50, 99, 100)},
            }
        )
    print_table(
        f"{case}; {config.writers} writer(s), {config.readers} reader(s)",
        ("", "calls/s", "median ms", "p99 ms", "max ms"),
        rows,
    )
    return results


class Ones(IterableDataset[int]):
    """Yields the number 1, to show what a DataLoader takes by itself."""

    def __iter__(self) -> Iterator[int]:
        return itertools.repeat(1)


def scaled(item: TensorDict) -> TensorDict:
    """Replace one key of an item, as a transform of a user does."""
    return item.set("action", item["action"] * 0.5)


def measure_loaders(case: Case, config: Config) -> list[dict[str, Any]]:
    """Measure a DataLoader in item and in batch mode, with 0, 1 and 2 workers, against the direct call.

    "numbers" is a DataLoader that yields nothing but a number each time: no DataLoader is faster.
    """
    rb = make_ours(case)
    for number in range(case.trajectories):
        rb.extend(make_trajectory(case, number))
    B, L = case.batch_size, case.chunk_size
    batches, items, changed = OnlineDataset(rb, L, B), OnlineDataset(rb, L), OnlineDataset(rb, L, transform=scaled)
    sources: dict[str, Iterator[Any]] = {"rb.sample()": iter(rb.sample, None)}
    for workers in (0, 1, 2):
        options = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        sources[f"numbers, num_workers={workers}"] = iter(DataLoader(Ones(), batch_size=None, **options))
        sources[f"batches, num_workers={workers}"] = iter(DataLoader(batches, batch_size=None, **options))
        sources[f"items, num_workers={workers}"] = iter(DataLoader(items, batch_size=B, **options))
        sources[f"items with a transform, num_workers={workers}"] = iter(DataLoader(changed, batch_size=B, **options))
    times: dict[str, list[float]] = {name: [] for name in sources}
    for source in sources.values():
        next(source)  # the workers have started
    for _ in range(2 if config.quick else 20):
        for name, source in sources.items():
            for _ in range(20):
                begin = time.perf_counter()
                next(source)
                times[name].append(time.perf_counter() - begin)
    rows = [row(name, np.array(taken), sum(taken)) for name, taken in times.items()]
    print_table(f"{case}; a DataLoader", ("", "batches/s", "median ms", "p99 ms", "max ms"), rows)
    return [
        {"case": asdict(case), "source": name, "median_s": float(np.median(taken))} for name, taken in times.items()
    ]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    results = []
    for case in CASES[:1] if config.quick else CASES:
        results += measure_processes(case, config)
        results += measure_loaders(case, config)
    write_report(config.out, results)


if __name__ == "__main__":
    main(tyro.cli(Config))
