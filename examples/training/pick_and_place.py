"""A robot learns to pick and place from live demonstrations in a simulator.

    expert in MuJoCo ──┐
                       ├── OnlineDataEngine ── OnlineDataset ── DataLoader ── policy ──> evaluation on unseen goals
    expert in MuJoCo ──┘   (shared memory)                                               (a process beside)

Workers execute the demonstrations of a scripted expert in `FetchPickAndPlace-v4`. A small policy, which maps each
observation to a chunk of actions, is trained on them while they arrive. The training ends when the policy carries the
cube to its goal often enough. Only the figures at the end are written to the disk.

    python examples/training/pick_and_place.py
    python examples/training/pick_and_place.py --seconds 60 --num-workers 1
    python examples/training/pick_and_place.py --policy act
    python examples/training/pick_and_place.py --policy diffusion --device cuda
    python examples/training/pick_and_place.py --help
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from evaluation import Evaluator
from filming import film
from learning import ENVIRONMENT, Learner, LearningConfig, evaluation_seed, make_engine, make_loader, make_policy
from plots import plot_episode, plot_history
from policies import ChunkPolicy
from progress import Progress
from renderers import RenderingFailedError

from embodichain_rl.engine.data import OnlineDataEngine

CAMERA = {"distance": 1.5, "azimuth": 145.0, "elevation": -25.0, "lookat": np.array([1.3, 0.75, 0.6])}


@dataclass(frozen=True)
class Config(LearningConfig):
    """Train a policy for pick and place from demonstrations that are streamed from a live simulator."""

    seconds: float = 300.0
    """Maximum duration from the start."""
    target_success: float = 0.95
    """Stop when two evaluations in a row have at least this fraction of successes."""
    seed: int = 0
    """Seed of the simulators, the sampling, the policy and the evaluation."""
    out: Path = Path("outputs/pick_and_place")
    """Folder for the figures."""
    evaluation_pause: float = 5.0
    """Seconds of training between two evaluations, which use processor time too."""


def train(config: Config, learner: Learner, engine: OnlineDataEngine, evaluator: Evaluator, progress: Progress) -> None:
    """Train until the target is reached or the time is up."""
    progress.begin_training()
    next_evaluation = progress.seconds + config.evaluation_pause
    for batch in make_loader(learner.policy, engine, config.batch_size, config.seed):
        loss = learner.update(batch)
        progress.trained(batch["action"].shape[:2].numel(), loss)

        success = evaluator.success()
        if success is not None:
            progress.evaluated(success)
            next_evaluation = progress.seconds + config.evaluation_pause
        if progress.time_is_up or progress.history.reached(config.target_success):
            return
        if not evaluator.busy and progress.seconds >= next_evaluation:
            evaluator.begin(learner.averaged)


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
    """Make the figures: the history of the training, and an episode with a goal outside all evaluations."""
    config.out.mkdir(parents=True, exist_ok=True)
    history = progress.history
    title = f"Pick and place from a live stream: {config.policy}, seed {config.seed}, {config.num_workers} workers"
    training = config.out / "training.png"
    plot_history(history, config.target_success, config.evaluation_episodes, policy.loss_name, title, training)
    print(f"  {training}")
    if not history.evaluations:
        return
    episode = config.out / "episode.png"
    try:
        make_env = partial(gymnasium.make, ENVIRONMENT, render_mode="rgb_array", default_camera_config=CAMERA)
        frames, at_goal = film(make_env, policy.cpu(), config.actions_per_chunk, evaluation_seed(config.seed) - 1)
    except RenderingFailedError as error:
        print(f"  no picture of an episode: rendering failed ({error})")
        return
    title = f"What was learned in {history.looks[-1].time:.0f} s, with an unseen goal (red)"
    plot_episode(frames, at_goal, title, episode)
    print(f"  {episode}")


def main(config: Config) -> None:
    # The simulators use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    learner = Learner(make_policy(config, config.seed))
    engine = make_engine(config, config.buffer_size, config.seed)
    first_seed = evaluation_seed(config.seed)
    make_env = partial(gymnasium.make, ENVIRONMENT)
    evaluator = Evaluator(make_env, learner.averaged, config.evaluation_episodes, config.actions_per_chunk, first_seed)
    with Progress(engine, config.seconds) as progress:
        try:
            with evaluator, engine:
                train(config, learner, engine, evaluator, progress)
        except KeyboardInterrupt:
            print("\nStopped by Ctrl-C.")
    print(summarize(config, progress))
    draw(config, learner.averaged, progress)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
