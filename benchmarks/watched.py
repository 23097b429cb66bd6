"""A run that is watched beside one that is not: sampling, inserting, and the memory of the one who watches.

Both run in turn, in one process, with the watcher in another one that is stopped while the run is unwatched.

    python benchmarks/watched.py                # a minute
    python benchmarks/watched.py --hours 2      # the memory of a watcher over time
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict

from embodichain_rl import TrajectoryReplayBuffer

CALLS = 200


def trajectory(length: int = 100) -> TensorDict:
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    end = {"observation": torch.randn(length, 8), "reward": torch.randn(length, 1), "done": done}
    return TensorDict({"observation": torch.randn(length, 8), "action": torch.randn(length, 2), "next": end}, [length])


def watch(pid: int, every: float, pipe: Any) -> None:
    from embodichain_rl.monitor import Source

    source = Source.attach(pid)
    source.read()
    pipe.send("ready")
    while True:
        source.read()
        if pipe.poll():
            pipe.recv()
            pipe.send(resident())
        time.sleep(every)


def resident(pid: int | str = "self") -> int:
    """Return the memory of a process of its own, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def seconds(function: Any) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        function()
    return time.perf_counter() - begin


def compare(rounds: int = 40, every: float = 1.0, hours: float = 0.0) -> dict[str, float]:
    """Return the speed of a watched run as a share of that of an unwatched one, and how the watcher's memory grew."""
    torch.set_num_threads(1)
    rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=100_000, chunk_size=16, batch_size=32)
    data = trajectory()
    for _ in range(1000):
        rb.extend(data)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    watcher = context.Process(target=watch, args=(os.getpid(), every, theirs), daemon=True)
    watcher.start()
    assert ours.recv() == "ready"
    assert watcher.pid is not None
    ratios: dict[str, list[float]] = {"sample": [], "extend": []}
    for _ in range(rounds):
        for name, function in (("sample", rb.sample), ("extend", lambda: rb.extend(data))):
            function()
            os.kill(watcher.pid, signal.SIGSTOP)
            alone = seconds(function)
            os.kill(watcher.pid, signal.SIGCONT)
            ratios[name].append(alone / seconds(function))
    grown = _memory(rb, data, ours, hours)
    watcher.kill()
    watcher.join()
    return {**{name: statistics.median(values) for name, values in ratios.items()}, "grown_bytes": grown}


def _memory(rb: TrajectoryReplayBuffer, data: TensorDict, pipe: Any, hours: float) -> float:
    """Return how many bytes the watcher has grown by, after a first minute (or a third of the time)."""

    def ask() -> int:
        pipe.send("memory")
        return int(pipe.recv())

    begin, total = time.monotonic(), max(3600.0 * hours, 6.0)
    first = None
    while (passed := time.monotonic() - begin) < total:
        rb.sample()
        rb.extend(data)
        time.sleep(0.01)
        if first is None and passed > min(60.0, total / 3):
            first = ask()
    return ask() - (first or 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks of the watcher")
    parser.add_argument("--hours", type=float, default=0.0, help="how long the memory of the watcher is looked at")
    given = parser.parse_args()
    for name, value in compare(given.rounds, given.every, given.hours).items():
        print(f"{name}: {value:,.0f}" if name == "grown_bytes" else f"{name}: {value:.3f} of the speed unwatched")
