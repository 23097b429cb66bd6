"""What does a worker of a ``DataLoader`` cost: the time to start it, and its memory?

    python benchmarks/loader_workers.py
    python benchmarks/loader_workers.py --start-method forkserver

A worker that reads the chunks of a buffer loads torch and tensordict. One that applies transforms of TorchRL loads
TorchRL besides. Both alternate with a process that only imports torch and tensordict: a worker can't take less.

Time is that of the processor in the worker, since the machine may be busy. Memory is what the worker shares with no
other process (USS), and that plus its part of what it shares (PSS), after some batches.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tensordict  # noqa: F401  # also for the process that does nothing else
import torch
from torch.utils.data import DataLoader, IterableDataset

IMPORTS, CHUNKS, TORCHRL = (
    "import torch, tensordict",
    "reads a buffer",
    "reads a buffer, with a transform of TorchRL",
)

BATCHES = 20


@dataclass(frozen=True)
class Config:
    """Measure a worker of a DataLoader."""

    rounds: int = 5
    """The number of workers of each kind."""
    start_method: Literal["spawn", "forkserver"] = "spawn"
    """How workers are started."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Cost:
    """What a process has taken so far."""

    seconds: float
    uss: float
    pss: float
    modules: int
    torchrl: bool

    @classmethod
    def of_this_process(cls) -> Cost:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        sizes = {name: int(size) / 1024 for name, size, _ in map(str.split, lines)}
        uss = sizes["Private_Clean:"] + sizes["Private_Dirty:"]
        return cls(time.process_time(), uss, sizes["Pss:"], len(sys.modules), "torchrl" in sys.modules)


class Costs(IterableDataset[Cost]):
    """Reads batches of a dataset, and then says what it has cost; without a dataset, what imports cost."""

    def __init__(self, dataset: Any = None) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        if self.dataset is not None:
            batches = iter(self.dataset)
            for _ in range(BATCHES):
                next(batches)
        yield Cost.of_this_process()


def unchanged(cost: Cost) -> Cost:
    """Collate nothing."""
    return cost


def measure(costs: Costs, cfg: Config) -> Cost:
    """Return what a worker costs."""
    context = multiprocessing.get_context(cfg.start_method)
    loader = DataLoader(costs, batch_size=None, num_workers=1, multiprocessing_context=context, collate_fn=unchanged)
    (cost,) = loader
    return cost


def main(cfg: Config) -> None:
    # Workers import this file: what they do not need is imported here.
    import numpy as np
    from _harness import print_table, write_report
    from sampling import CASES, make_trajectory
    from torchrl.envs.transforms import RenameTransform

    from embodichain_rl import OnlineDataset, TrajectoryReplayBuffer

    case = CASES[0]
    costs = {IMPORTS: Costs()}
    for name, transform in ((CHUNKS, None), (TORCHRL, RenameTransform(["action"], ["acted"]))):
        rb = TrajectoryReplayBuffer(
            max_trajectories=case.trajectories,
            max_total_steps=case.trajectories * case.steps,
            chunk_size=case.chunk_size,
            transform=transform,
        )
        for number in range(case.trajectories):
            rb.extend(make_trajectory(case, number))
        costs[name] = Costs(OnlineDataset(rb, case.chunk_size, case.batch_size))
    rounds = [{name: measure(each, cfg) for name, each in costs.items()} for _ in range(cfg.rounds)]
    results, rows = [], []
    for name in costs:
        found = {
            field: float(np.median([getattr(each[name], field) for each in rounds])) for field in Cost.__annotations__
        }
        results.append({"what": name, "start_method": cfg.start_method, **found})
        rows.append([name, *(f"{found[field]:{form}}" for field, form in FORMATS.items())])
    print_table(
        f"A worker after {BATCHES} batches, {cfg.start_method}, medians of {cfg.rounds}",
        ("", "s of the processor", "USS MiB", "PSS MiB", "modules"),
        rows,
    )
    write_report(cfg.out, [{**asdict(cfg), "out": str(cfg.out)}, *results])


FORMATS = {"seconds": ".2f", "uss": ".0f", "pss": ".0f", "modules": ".0f"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    import tyro

    main(tyro.cli(Config))
