"""The benefit of a live stream: the same learner on fixed sets of demonstrations and on a stream of them.

    512 episodes ──┬── the first 32  ──┐
                   ├── the first 128 ──┼── the same learner, the same number of updates ──> the same unseen goals
                   └── all 512 ────────┤
    a live stream, 128 kept ───────────┘

All demonstrations come from the expert of `pick_and_place.py`. All evaluations with one seed have the same goals, for
every kind of training data.

    python examples/training/compare_offline.py
    python examples/training/compare_offline.py --seeds 0 1 --fixed 8 64 --policy diffusion
    python examples/training/compare_offline.py --help

Without `--fixed` and with many updates, it shows whether success lasts while the buffer is replaced many times:

    python examples/training/compare_offline.py --fixed --updates 60000 --out outputs/long_stream
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium
import torch
import tyro
from evaluation import success_rate
from learning import ENVIRONMENT, Learner, LearningConfig, evaluation_seed, make_engine, make_loader, make_policy
from plots import plot_comparison
from studies import Curve, by_data, first_episodes, write_curves
from tqdm import tqdm

from embodichain_rl import TrajectoryReplayBuffer

STREAM = "stream"


@dataclass(frozen=True)
class Config(LearningConfig):
    """Train the same policy on fixed sets of demonstrations and on a live stream of them."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the simulators, the sampling, the policy and the evaluation. Each trains once on every kind of data."""
    fixed: tuple[int, ...] = (32, 128, 512)
    """Numbers of episodes of the fixed sets."""
    updates: int = 6000
    """Number of updates of each training."""
    evaluate_every: int = 1000
    """Updates between two evaluations."""
    out: Path = Path("outputs/compare_offline")
    """Folder for the figure and the results."""


def train(config: Config, source: Any, episodes: Callable[[], int], curve: Curve) -> None:
    """Train on a buffer or an engine. Each evaluation extends the curve."""
    learner = Learner(make_policy(config, curve.seed))
    env = gymnasium.make(ENVIRONMENT)
    first = evaluation_seed(curve.seed)
    batches = iter(make_loader(learner.policy, source, config.batch_size, curve.seed))
    for update in tqdm(range(1, config.updates + 1), desc=f"{curve.data}, seed {curve.seed}", unit=" updates"):
        learner.update(next(batches))
        if update % config.evaluate_every == 0:
            goals = range(first, first := first + config.evaluation_episodes)
            success = success_rate(env, learner.averaged, config.actions_per_chunk, goals)
            curve.add(update, episodes(), success)
    env.close()


def record(config: Config, seed: int) -> TrajectoryReplayBuffer:
    """Collect as many episodes as the largest of the fixed sets has."""
    with make_engine(config, max(config.fixed), seed) as engine:
        pass
    return engine.replay_buffer


def compare(config: Config, curves: list[Curve]) -> None:
    """Run every training with every seed. The curves are added when they start."""
    for seed in config.seeds:
        recorded = record(config, seed) if config.fixed else None
        for count in config.fixed:
            curves.append(Curve(f"{count} episodes", seed))
            train(config, first_episodes(recorded, count), lambda count=count: count, curves[-1])
        curves.append(Curve(STREAM, seed))
        with make_engine(config, config.buffer_size, seed) as engine:
            train(config, engine, lambda engine=engine: engine.stats()["inserted"], curves[-1])


def table(config: Config, curves: list[Curve]) -> str:
    """Return a Markdown table of the means over the seeds, and of the lowest and highest values."""
    points = range(config.evaluate_every, config.updates + 1, config.evaluate_every)
    lines = ["| trained on | episodes | " + " | ".join(f"{updates:,}" for updates in points) + " |"]
    lines.append("|---" * (2 + len(points)) + "|")
    for name, runs in by_data(curves).items():
        cells = [name, f"{sum(run.episodes[-1] for run in runs) / len(runs):,.0f}"]
        for at_once in zip(*(run.success for run in runs), strict=True):
            low, high = min(at_once), max(at_once)
            cells.append(f"{sum(at_once) / len(runs):.0%}" + (f" ({low:.0%} to {high:.0%})" if low < high else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config: Config) -> None:
    # The simulators use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    curves: list[Curve] = []
    try:
        compare(config, curves)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.")
        curves = [curve for curve in curves if len(curve.updates) == config.updates // config.evaluate_every]
    if not curves:
        return
    config.out.mkdir(parents=True, exist_ok=True)
    write_curves(curves, config.out / "curves.json")
    print(table(config, curves))
    seeds = dict.fromkeys(str(curve.seed) for curve in curves)
    title = f"Pick and place, {config.policy}: seed {', '.join(seeds)}"
    plot_comparison(by_data(curves), config.evaluation_episodes, title, config.out / "comparison.png")
    print(config.out / "comparison.png")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
