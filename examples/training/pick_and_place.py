"""A robot learns to pick and place from a simulator that shows it how, live.

    expert in MuJoCo ──┐
                       ├── OnlineDataEngine ── OnlineDataset ── DataLoader ── policy ──> evaluation on unseen goals
    expert in MuJoCo ──┘   (shared memory)                                               (a process beside)

Workers act out the demonstrations of a scripted expert in `FetchPickAndPlace-v4`. A small policy that answers each
observation with a chunk of actions is trained on them while they come in, and is done when it carries the cube to its
goal often enough. Nothing is written to the disk but the pictures at the end.

    python examples/training/pick_and_place.py
    python examples/training/pick_and_place.py --seconds 60 --num-workers 1
    python examples/training/pick_and_place.py --help
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from evaluation import ENVIRONMENT, Evaluator
from filming import RenderingFailedError, film
from plots import plot_episode, plot_history
from policy import STATE_KEYS, ChunkPolicy
from progress import Progress
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg

STATE_DIM, ACTION_DIM, EPISODE_STEPS = 28, 4, 50  # of FetchPickAndPlace

EVALUATION_SEEDS = 1_000_000
"""Each training seed has as many seeds for its evaluations, and none of them in common with another's."""


@dataclass(frozen=True)
class Config:
    """Train a policy for pick and place from demonstrations that are streamed from a live simulator."""

    seconds: float = 300.0
    """When to stop at the latest, from the start on."""
    target_success: float = 0.95
    """Stop when two evaluations in a row have at least this part of successes."""
    seed: int = 0
    """Of the simulators, the draws, the policy and the evaluation."""
    out: Path = Path("outputs/pick_and_place")
    """Folder for the pictures."""
    device: str = "cpu"
    """Where the policy is trained."""
    num_workers: int = 2
    """Processes in which the expert acts."""
    noise: float = 0.2
    """Standard deviation of what is added to the expert's actions, which are recorded without it."""
    buffer_size: int = 128
    """Episodes that the buffer keeps, the newest; training begins when it is full."""
    chunk_size: int = 8
    """Actions that the policy plans at once."""
    actions_per_chunk: int = 4
    """How many of them are taken before it plans anew."""
    batch_size: int = 128
    """Chunks of an update."""
    learning_rate: float = 1e-3
    evaluation_episodes: int = 50
    """Episodes of one evaluation."""
    evaluation_pause: float = 5.0
    """Seconds of training between two evaluations, which take processor time from it."""


def make_engine(config: Config) -> OnlineDataEngine:
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=config.buffer_size,
            max_episode_steps=EPISODE_STEPS,
            gym_config={"id": ENVIRONMENT, "kwargs": {"noise": config.noise}},
            num_workers=config.num_workers,
            policy="demo",
            seed=config.seed,
            progress_bar=False,  # there is one already
        )
    )


def evaluation_seed(config: Config) -> int:
    """Of the first episode that is evaluated; the others count on from it."""
    return (config.seed + 1) * EVALUATION_SEEDS


def train(
    config: Config,
    policy: ChunkPolicy,
    averaged: AveragedModel,
    engine: OnlineDataEngine,
    evaluator: Evaluator,
    progress: Progress,
) -> None:
    """Until the target is reached, or the time is up; `averaged` is what is evaluated."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=config.learning_rate, fused=True)
    # Of each observation the actions that follow, beyond the episode's end as well; other keys are not even copied.
    windows = {**dict.fromkeys(STATE_KEYS, (0, 0)), "action": (0, config.chunk_size - 1)}
    dataset = OnlineDataset(
        engine, chunk_size=None, batch_size=config.batch_size, windows=windows, pad="after", seed=config.seed
    )
    progress.begin_training()
    next_evaluation = progress.seconds + config.evaluation_pause
    for batch in DataLoader(dataset, batch_size=None):
        loss = policy.loss(batch.to(config.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        averaged.update_parameters(policy)
        progress.trained(batch["action"].shape[:2].numel(), loss.item())

        success = evaluator.success()
        if success is not None:
            progress.evaluated(success)
            next_evaluation = progress.seconds + config.evaluation_pause
        if progress.time_is_up or progress.history.reached(config.target_success):
            return
        if not evaluator.busy and progress.seconds >= next_evaluation:
            evaluator.begin(averaged.module)


def summarize(config: Config, progress: Progress) -> str:
    history, now = progress.history, progress.history.looks[-1]
    lines = [f"After {progress.seconds:.0f} s: {now.episodes:,} episodes written, {now.updates:,} updates."]
    if history.ready is not None:
        trained = (now.steps_trained / (now.time - history.ready)) if now.time > history.ready else 0.0
        lines.append(f"  trained on {trained:,.0f} steps/s since {history.ready:.0f} s, when the buffer was filled")
    if history.evaluations:
        last = history.evaluations[-1]
        lines.append(f"  success {last.success:.0%} of {config.evaluation_episodes} episodes with unseen goals")
    if history.reached(config.target_success):
        both = " and ".join(f"{each.success:.0%} at {each.time:.0f} s" for each in history.evaluations[-2:])
        lines.append(f"  target of {config.target_success:.0%} reached twice in a row: {both}")
    else:
        lines.append(f"  target of {config.target_success:.0%} not reached twice in a row")
    return "\n".join(lines)


def draw(config: Config, policy: ChunkPolicy, progress: Progress) -> None:
    """The pictures: how the training went, and an episode of the policy on a goal that no evaluation had."""
    config.out.mkdir(parents=True, exist_ok=True)
    history = progress.history
    title = f"Pick and place from a live stream: seed {config.seed}, {config.num_workers} workers"
    training = config.out / "training.png"
    plot_history(history, config.target_success, config.evaluation_episodes, title, training)
    print(f"  {training}")
    if not history.evaluations:
        return
    episode = config.out / "episode.png"
    try:
        frames, at_goal = film(policy.cpu(), config.actions_per_chunk, evaluation_seed(config) - 1)
    except RenderingFailedError as error:
        print(f"  no picture of an episode: rendering failed ({error})")
        return
    title = f"What was learned in {history.looks[-1].time:.0f} s, with an unseen goal (red)"
    plot_episode(frames, at_goal, title, episode)
    print(f"  {episode}")


def main(config: Config) -> None:
    # The cores are the simulators'; a network this small gains nothing from more of them.
    torch.set_num_threads(1)
    torch.manual_seed(config.seed)
    policy = ChunkPolicy(STATE_DIM, ACTION_DIM, config.chunk_size).to(config.device)
    averaged = AveragedModel(policy, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    engine = make_engine(config)
    evaluator = Evaluator(policy, config.evaluation_episodes, config.actions_per_chunk, evaluation_seed(config))
    with Progress(engine, config.seconds) as progress:
        try:
            with evaluator, engine:
                train(config, policy, averaged, engine, evaluator, progress)
        except KeyboardInterrupt:
            print("\nStopped by Ctrl-C.")
    print(summarize(config, progress))
    draw(config, averaged.module, progress)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # while the pictures were drawn
        print("\nStopped by Ctrl-C.")
