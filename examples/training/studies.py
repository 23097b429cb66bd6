"""Comparisons of one learner on several kinds of data: fixed sets, the points of each training, tables, intervals."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from embodichain_rl import TrajectoryReplayBuffer


@dataclass
class Curve:
    """The points of a training: `success` after `updates`, with `episodes` available until then."""

    data: str
    seed: int
    updates: list[int] = field(default_factory=list)
    episodes: list[int] = field(default_factory=list)
    success: list[float] = field(default_factory=list)

    def add(self, updates: int, episodes: int, success: float) -> None:
        self.updates.append(updates)
        self.episodes.append(episodes)
        self.success.append(success)


def first_episodes(recorded: TrajectoryReplayBuffer, count: int) -> TrajectoryReplayBuffer:
    """Return a buffer of the first `count` episodes of a larger one."""
    episodes = [recorded[number] for number in range(count)]
    rb = TrajectoryReplayBuffer(max_trajectories=count, max_total_steps=sum(map(len, episodes)), chunk_size=1)
    for episode in episodes:
        rb.extend(episode)
    return rb


def by_data(curves: Iterable[Curve]) -> dict[str, list[Curve]]:
    """Return the curves of all seeds by their kind of data, in the order of their first appearance."""
    grouped: dict[str, list[Curve]] = {}
    for curve in curves:
        grouped.setdefault(curve.data, []).append(curve)
    return grouped


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    path.write_text(json.dumps([asdict(curve) for curve in curves], indent=1))


def wilson_interval(rates: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % confidence interval of the success probability, for `rates` of `count` successes."""
    z = 1.96
    middle = (rates + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * np.sqrt(rates * (1 - rates) / count + z**2 / (4 * count**2))
    return np.clip(middle - half, 0.0, rates), np.clip(middle + half, rates, 1.0)


def interval_of_means(rates: Sequence[float], count: int) -> tuple[float, float]:
    """Return the 95 % interval of the mean success of several trainings, each evaluated in `count` episodes.

    It is the Wilson interval of all episodes together. It says how well the trained policies are measured, not how much
    other seeds would differ.
    """
    low, high = wilson_interval(np.array(float(np.mean(rates))), count * len(rates))
    return float(low), float(high)


def final_table(curves: Sequence[Curve], count: int) -> str:
    """Return a Markdown table of the success after the last update: per seed, their mean, and its 95 % interval."""
    groups = by_data(curves)
    seeds = sorted({curve.seed for curve in curves})
    lines = ["| trained on | episodes | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | 95 % interval |"]
    lines.append("|---" * (4 + len(seeds)) + "|")
    for name, runs in groups.items():
        last = {run.seed: run.success[-1] for run in runs}
        low, high = interval_of_means([*last.values()], count)
        cells = [name, f"{sum(run.episodes[-1] for run in runs) / len(runs):,.0f}"]
        cells += [f"{last[seed]:.1%}" if seed in last else "" for seed in seeds]
        cells += [f"{math.fsum(last.values()) / len(last):.1%}", f"{low:.1%} to {high:.1%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
