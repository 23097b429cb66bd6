"""How many steps per second pass through the engine and its buffer, compared with a collector that discards them?

    python benchmarks/streaming.py
    python benchmarks/streaming.py --quick --out outputs/streaming.json

The contestants are an `OnlineDataEngine` with one worker, and a separate process that iterates a `GymnasiumCollector`
over the same environment and discards the data. A third process writes the data to a buffer, which shows how much of
the difference is due to writing. Each has turns of a second; the processes of the others are stopped (SIGSTOP).
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from _harness import print_table, write_report
from collecting import Case, make_env, make_module
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule

from embodichain_rl import TrajectoryReplayBuffer
from embodichain_rl.collectors import GymnasiumCollector
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg

ENGINE = "engine and buffer"
ALONE = "collector alone"
WRITING = "collector that writes to a buffer"

TURN = 1.0
"""Counted seconds of a turn."""

SETTLE = 0.3
"""Seconds at the start of a turn that are not counted."""

TRAJECTORIES = 100
"""Number of trajectories in each buffer."""

CASES = [Case(env, policy) for env in ("Pendulum-v1", "Pusher-v5") for policy in ("random", "network")]


@dataclass(frozen=True)
class Config:
    """Count the steps of each contestant."""

    turns: int = 12
    """Turns of each contestant."""
    quick: bool = False
    """One environment with one policy, and one turn instead of twelve."""
    out: Path | None = None
    """Path of the JSON file for the results."""


@dataclass(frozen=True)
class Contestant:
    """A process that collects."""

    pid: int
    steps: Callable[[], int]
    """Return the total number of steps."""

    def rate(self) -> float:
        """Run it for a turn and return its steps per second."""
        os.kill(self.pid, signal.SIGCONT)
        time.sleep(SETTLE)
        begin, before = time.perf_counter(), self.steps()
        time.sleep(TURN)
        rate = (self.steps() - before) / (time.perf_counter() - begin)
        os.kill(self.pid, signal.SIGSTOP)
        return rate


def make_policy(case: Case) -> TensorDictModule | None:
    return None if case.policy == "random" else TensorDictModule(make_module(case), ["observation"], ["action"])


class Dropping(TrajectoryReplayBuffer):
    """Count steps and discard them."""

    def __init__(self, steps: Any) -> None:
        super().__init__(max_trajectories=1, max_total_steps=1, chunk_size=1)
        self.steps = steps

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        self.steps.value += tensordicts.numel()
        return torch.full(tensordicts.shape, -1)


class Counting(TrajectoryReplayBuffer):
    """Count steps and store them."""

    def __init__(self, steps: Any) -> None:
        super().__init__(max_trajectories=TRAJECTORIES, max_total_steps=200 * TRAJECTORIES, chunk_size=1)
        self.steps = steps

    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        self.steps.value += tensordicts.numel()
        return super().extend(tensordicts)


def collect(case: Case, steps: Any, buffer: Callable[[Any], TrajectoryReplayBuffer]) -> None:
    torch.set_num_threads(1)
    collector = GymnasiumCollector(
        partial(make_env, case),
        make_policy(case),
        replay_buffer=buffer(steps),
        frames_per_batch=100,
        total_frames=-1,
        trajs_per_batch=1,
    )
    assert collector.fallback_reason is None, collector.fallback_reason
    for _ in collector:
        pass


@contextmanager
def collecting(case: Case, buffer: Callable[[Any], TrajectoryReplayBuffer]) -> Iterator[Contestant]:
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0, lock=False)
    process = context.Process(target=collect, args=(case, steps, buffer), daemon=True)
    process.start()
    try:
        while not steps.value:
            assert process.is_alive(), "the collector has failed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGSTOP)
        yield Contestant(process.pid, lambda: steps.value)
    finally:
        process.kill()
        process.join()


@contextmanager
def engine(case: Case) -> Iterator[Contestant]:
    cfg = OnlineDataEngineCfg(
        env_factory=partial(make_env, case),
        policy=make_policy(case),
        buffer_size=TRAJECTORIES,
        max_episode_steps=200,
        refill_threshold=None,  # without a pause
        progress_bar=False,
    )
    with OnlineDataEngine(cfg) as running:
        (worker,) = running.stats()["workers"]
        assert worker["collector"] == "GymnasiumCollector", worker
        os.kill(worker["pid"], signal.SIGSTOP)
        yield Contestant(worker["pid"], lambda: running.replay_buffer.write_count)
        os.kill(worker["pid"], signal.SIGCONT)


def measure(case: Case, turns: int) -> list[dict[str, Any]]:
    rates: dict[str, list[float]] = {ENGINE: [], WRITING: [], ALONE: []}
    with collecting(case, Dropping) as dropping, collecting(case, Counting) as writing, engine(case) as running:
        contestants = {ALONE: dropping, ENGINE: running, WRITING: writing}
        for _, (name, contestant) in itertools.product(range(turns), contestants.items()):
            rates[name].append(contestant.rate())
    medians = {name: float(np.median(of_turns)) for name, of_turns in rates.items()}
    print_table(
        f"{case.env}, {case.policy} policy, {turns} turns each",
        ("", "steps/s", "lowest", "highest", "x alone"),
        [
            (
                name,
                f"{medians[name]:,.0f}",
                f"{min(of):,.0f}",
                f"{max(of):,.0f}",
                f"{medians[name] / medians[ALONE]:.2f}",
            )
            for name, of in rates.items()
        ],
    )
    return [
        {"case": asdict(case), "contestant": name, "steps_s": of_turns, "of_alone": medians[name] / medians[ALONE]}
        for name, of_turns in rates.items()
    ]


def main(config: Config) -> None:
    cases, turns = (CASES[:1], 1) if config.quick else (CASES, config.turns)
    write_report(config.out, [result for case in cases for result in measure(case, turns)])


if __name__ == "__main__":
    main(tyro.cli(Config))
