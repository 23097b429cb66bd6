"""What watching costs a run, how soon a killed worker is seen, and the memory of those who watch over time.

Sampling and inserting are timed watched and unwatched in turn, in one process, with a watcher in another one that is
stopped while the run is unwatched. Killed workers and memory are looked at with the real commands: the terminal view
on a pseudo terminal, and the page in a headless Chromium.

    python benchmarks/watched.py                # some minutes
    python benchmarks/watched.py --kills 20     # how soon a killed worker is seen
    python benchmarks/watched.py --hours 2      # the memory of those who watch
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from _watchers import CHROMIUM, Terminal, WebBrowser, killable_engine, own_memory, paced, wait_until
from tensordict import TensorDict

from embodichain_rl import OnlineDataEngine, TrajectoryReplayBuffer


def trajectory(length: int = 100) -> TensorDict:
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = True
    end = {"observation": torch.randn(length, 8), "reward": torch.randn(length, 1), "done": done}
    return TensorDict({"observation": torch.randn(length, 8), "action": torch.randn(length, 2), "next": end}, [length])


def watch(handle: str, every: float, pipe: Any) -> None:
    from embodichain_rl.monitor import Source

    source = Source.attach(handle)
    source.read()
    pipe.send("ready")
    while True:
        source.read()
        time.sleep(every)


def rate(function: Any, seconds: float) -> float:
    """Return how often a function can be called in a second of processor time, which other programs do not share."""
    begin, calls = time.perf_counter(), 0
    used = time.process_time()
    while time.perf_counter() - begin < seconds:
        function()
        calls += 1
    return calls / (time.process_time() - used)


def compare(rounds: int = 40, every: float = 1.0) -> dict[str, float]:
    """Return the speed of a watched run as a share of that of an unwatched one, of sampling and of inserting."""
    torch.set_num_threads(1)
    rb = TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=100_000, chunk_size=16, batch_size=32)
    data = trajectory()
    for _ in range(1000):
        rb.extend(data)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    watcher = context.Process(target=watch, args=(rb.handle, every, theirs), daemon=True)
    watcher.start()
    theirs.close()  # so that the end of the watcher is seen
    assert ours.recv() == "ready"
    assert watcher.pid is not None
    ratios: dict[str, list[float]] = {"sample": [], "extend": []}
    for turn in range(rounds):
        for name, function in (("sample", rb.sample), ("extend", lambda: rb.extend(data))):
            rates = {}
            # Each turn has time for one look, and the order changes, since a busy machine changes its speed.
            for watched in (True, False) if turn % 2 else (False, True):
                os.kill(watcher.pid, signal.SIGCONT if watched else signal.SIGSTOP)
                rates[watched] = rate(function, every)
            ratios[name].append(rates[True] / rates[False])
    watcher.kill()
    watcher.join()
    return {name: statistics.median(values) for name, values in ratios.items()}


@contextlib.contextmanager
def watchers_of(engine: OnlineDataEngine, every: float) -> Iterator[list[Any]]:
    """Yield those who watch an engine, when they show it: the terminal view, and the page if there is a Chromium."""
    with contextlib.ExitStack() as stack:
        watchers: list[Any] = []
        for kind in (Terminal, WebBrowser)[: 1 if CHROMIUM is None else 2]:
            watchers.append(kind(engine.handle, every))
            stack.callback(watchers[-1].close)
        for watcher in watchers:
            wait_until(lambda: "trajectories" in watcher.text(), watcher.name)  # noqa: B023
        yield watchers


def seen_after(kills: int, every: float = 1.0) -> dict[str, list[float]]:
    """Return, of each worker that is killed, the seconds until the terminal view and the page show that it is lost."""
    moments = random.Random(0)
    found: dict[str, list[float]] = {}
    with killable_engine() as engine, paced(engine), watchers_of(engine, every) as watchers:
        for kill in range(kills):
            lost = ("starts again", f"replaced: {kill + 1}")
            for watcher in watchers:
                wait_until(lambda: "2 of 2 collect" in watcher.text() and lost[0] not in watcher.text())  # noqa: B023
            time.sleep(moments.uniform(0.0, every))  # at any time between two looks
            victim, waiting = engine.stats()["workers"][kill % 2]["pid"], list(watchers)
            begin = time.perf_counter()
            os.kill(victim, signal.SIGKILL)
            while waiting:
                for watcher in list(waiting):
                    if any(words in watcher.text() for words in lost):
                        found.setdefault(watcher.name, []).append(time.perf_counter() - begin)
                        waiting.remove(watcher)
                time.sleep(0.01)
    return found


def memory(hours: float, every: float = 1.0, row_every: float = 60.0) -> dict[str, list[float]]:
    """Return the memory of those who watch an engine, in MiB, at the beginning and then every ``row_every`` seconds.

    The learner is paced, since memory is looked at here, and not speed. A worker is killed every five minutes, the page
    is opened anew every twenty, and the newest trajectory is looked at twice a minute.
    """
    rows: dict[str, list[float]] = {}
    with killable_engine() as engine, paced(engine), watchers_of(engine, every) as watchers:
        begin = time.monotonic()
        kills, reloads, turn = 0, 0, 0
        while (passed := time.monotonic() - begin) < 3600.0 * hours:
            if passed >= turn * row_every:
                turn += 1
                print(_row(rows, watchers, passed), flush=True)
            if passed > (kills + 1) * 300.0:
                kills += 1
                os.kill(engine.stats()["workers"][kills % 2]["pid"], signal.SIGKILL)
            if passed > (reloads + 1) * 1200.0 and len(watchers) > 1:
                reloads += 1
                watchers[1].reload()
            for watcher in watchers:
                wait_until(lambda: "trajectories" in watcher.text(), watcher.name)  # noqa: B023
                if int(passed) % 30 == 0:
                    watcher.touch()
            time.sleep(1.0)
        print(_row(rows, watchers, passed), flush=True)
        shown = [f"replaced: {kills}" in watcher.text() or not kills for watcher in watchers]
        print(f"{kills} workers were killed, and all of them are shown at the end: {all(shown)}", flush=True)
    return rows


def _row(rows: dict[str, list[float]], watchers: list[Any], passed: float) -> str:
    for watcher in watchers:
        rows.setdefault(watcher.name, []).append(own_memory(watcher.pid) / 2**20)
        if isinstance(watcher, WebBrowser):
            rows.setdefault("browser", []).append(own_memory(watcher.browser_pid) / 2**20)
            rows.setdefault("its scripts", []).append(watcher.used_by_scripts() / 2**20)
    return f"{passed / 60:6.1f} min  " + "  ".join(f"{name} {values[-1]:.1f} MiB" for name, values in rows.items())


def growth(values: list[float]) -> float:
    """Return by how much the median of the last quarter is above that of the second one, in MiB."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[-quarter:]) - statistics.median(values[quarter : 2 * quarter] or values)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two looks of the watcher")
    parser.add_argument("--hours", type=float, default=0.0, help="look at the memory of those who watch for so long")
    parser.add_argument("--kills", type=int, default=0, help="kill so many workers, and look when it is seen")
    given = parser.parse_args()
    if given.kills:
        for name, times in seen_after(given.kills, given.every).items():
            print(f"{name}: seen after {statistics.median(times):.2f} s (median), {max(times):.2f} s at most")
    elif given.hours:
        for name, values in memory(given.hours, given.every).items():
            print(f"{name}: {values[-1]:.1f} MiB at the end, {growth(values):+.1f} MiB since the second quarter")
    else:
        for name, value in compare(given.rounds, given.every).items():
            print(f"{name}: {value:.3f} of the speed unwatched")
