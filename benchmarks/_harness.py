"""The common parts of the benchmarks: alternating measurements, tables, and a report with versions and machine.

On a busy machine, two measurements in sequence can't be compared. So the contestants alternate: each makes some calls
per turn, on the same data in the same process. The result is the ratio of their medians. Every turn starts after a
training step, so that the processor caches contain the data of a learner.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Times", "busy_cores", "in_a_fork", "print_table", "print_times", "take_turns", "write_report"]

CALLS = 20
"""Calls per turn. The first call finds the data of a training step in the processor caches, the others find the data of
the previous call."""

MIN_ROUNDS = 5

PACKAGES = ("embodichain-rl", "torch", "tensordict", "torchrl", "numpy")

_started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
_load_at_start = os.getloadavg()


@dataclass(frozen=True)
class Times:
    """The times of all calls of one contestant, in seconds, ``[rounds, CALLS]``."""

    seconds: np.ndarray

    def quantile(self, q: float) -> float:
        return float(np.quantile(self.seconds, q))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def cold(self) -> float:
        """The median of the first calls of all turns, which follow a training step."""
        return float(np.median(self.seconds[:, 0]))

    def as_dict(self) -> dict[str, float]:
        return {
            "median_s": self.median,
            "p10_s": self.quantile(0.1),
            "p90_s": self.quantile(0.9),
            "cold_median_s": self.cold,
            "calls": self.seconds.size,
        }


def take_turns(contestants: Mapping[str, Callable[[], object]], *, seconds: float) -> dict[str, Times]:
    """Give every contestant a turn per round, in a random order, until ``seconds`` have passed.

    The result of a call is freed before the next call, outside the measured time.
    """
    names = list(contestants)
    turns: dict[str, list[list[float]]] = {name: [] for name in names}
    order = random.Random(0)
    learner = _Learner()
    for name in names:
        _turn(contestants[name], learner)
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(turns[names[0]]) < MIN_ROUNDS:
        order.shuffle(names)
        for name in names:
            turns[name].append(_turn(contestants[name], learner))
    return {name: Times(np.array(taken)) for name, taken in turns.items()}


class _Learner:
    """A small network trained on random numbers, which competes with the buffer for the processor caches."""

    def __init__(self) -> None:
        self._net = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 64))
        self._optimizer = torch.optim.Adam(self._net.parameters())
        self._batch = torch.randn(1024, 64)

    def step(self) -> None:
        self._optimizer.zero_grad()
        (self._net(self._batch) - self._batch).square().mean().backward()
        self._optimizer.step()


def _turn(call: Callable[[], object], learner: _Learner) -> list[float]:
    learner.step()
    taken = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        result = call()
        taken.append(time.perf_counter() - begin)
        del result
    return taken


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Keep every core busy with a process, as simulators do, within the block."""
    code = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def in_a_fork(work: Callable[[], Any]) -> Any:
    """Return what ``work`` returns in a forked process, which has imported everything and maps no file from before."""

    def act(sender: Any) -> None:
        torch.set_num_threads(1)
        sender.send(work())

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=act, args=(sender,))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"The process ended with exit code {process.exitcode}.") from None
    finally:
        process.join()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with the first column left-aligned and the others right-aligned."""
    table = [columns, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(columns))]
    print(f"\n{title}")
    for row in table:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  " + "  ".join(cells), flush=True)


def print_times(title: str, times: Mapping[str, Times]) -> None:
    """Print the times of all contestants relative to the first one."""
    first = next(iter(times.values()))
    print_table(
        f"{title}, {first.seconds.size} calls each",
        ("", "median ms", "p10", "p90", "x the first", "cold ms", "x the first"),
        [
            (
                name,
                *(f"{1e3 * taken.quantile(q):.3f}" for q in (0.5, 0.1, 0.9)),
                f"{taken.median / first.median:.2f}",
                f"{1e3 * taken.cold:.3f}",
                f"{taken.cold / first.cold:.2f}",
            )
            for name, taken in times.items()
        ],
    )


def write_report(path: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """Write the results as JSON, with the command, the versions and the machine. Do nothing without a path."""
    if path is None:
        return
    report = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": _started,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "machine": _machine(),
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nWritten to {path}")


def _machine() -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "load_at_start": _load_at_start,
        "load_at_end": os.getloadavg(),
    }


def _cpu_model() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
