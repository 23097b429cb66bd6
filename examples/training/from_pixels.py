"""A robot learns to touch the red ball from camera images that are streamed live from a simulator.

    expert in MuJoCo ── images, joints, actions ──> buffer of images, each stored once ──> CNN + ACT ──> evaluation

The red ball lies at a random place among three other things, and only the image says where. Workers render the camera
on the processor, while an expert demonstrates. TorchRL's ACT with a small convolutional encoder is trained on the
images while they arrive. Nothing is written to the disk but the figures and results at the end.

    python examples/training/from_pixels.py
    python examples/training/from_pixels.py --seeds 0 --seconds 300
    python examples/training/from_pixels.py --help

It needs a renderer of MuJoCo that needs no screen: EGL or OSMesa. Both can render on the processor.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from evaluation import Evaluator, success_rate
from filming import film
from learning import Learner, evaluation_seed, make_loader
from plots import plot_episode, plot_frames, plot_history, plot_memory
from policies.pixels import PixelACTPolicy
from progress import Progress
from renderers import RenderingFailedError, run_with_renderer
from studies import interval_of_means
from tqdm import tqdm

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg

ENVIRONMENT = "reach_env:ReachRedBall-v0"
JOINTS, ACTIONS, EPISODE_STEPS = 3, 3, 20
RENDER_ONCE = [sys.executable, str(Path(__file__).with_name("reach_env.py"))]


@dataclass(frozen=True)
class Config:
    """Train a policy that sees camera images, which are streamed from a live simulator."""

    seeds: tuple[int, ...] = (0,)
    """Seeds of the simulators, the sampling, the policy and the evaluation. Each is a training."""
    seconds: float = 720.0
    """Duration of each training from its start. The final evaluation comes after it."""
    updates: int = 100_000
    """Updates of each training at most. The learning rate decays over what ends first, the updates or the time."""
    num_workers: int = 1
    """Number of processes in which the expert acts and the camera is rendered."""
    noise: float = 0.3
    """Standard deviation of the noise on the expert's actions, which are recorded without it."""
    buffer_size: int = 256
    """Number of episodes that the buffer keeps, the newest ones."""
    min_trajectories: int = 32
    """Episodes at which training begins."""
    refill_threshold: float = 60.0
    """Images drawn for each episode that is replaced. The expert waits when it is ahead, which leaves the cores to the
    learner."""
    chunk_size: int = 4
    """Number of actions that the policy plans at once."""
    actions_per_chunk: int = 4
    """Number of these actions that are executed before the policy looks again."""
    batch_size: int = 64
    """Images per update, each with a chunk of actions."""
    evaluation_episodes: int = 50
    """Episodes per evaluation during the training, which has a process of its own."""
    evaluation_pause: float = 90.0
    """Seconds of training between two evaluations, which use processor time too."""
    final_episodes: int = 200
    """Episodes of the evaluation at the end, with things at other places than in all evaluations before."""
    start_method: str | None = None
    """How workers are started; None: "spawn"."""
    out: Path = Path("outputs/from_pixels")
    """Folder for the figures and the results."""


@dataclass(frozen=True)
class Result:
    """What came out of a training."""

    seed: int
    success: float
    seconds: float
    updates: int
    episodes: int
    frames_collected: int
    frames_trained: int
    collected_per_second: float
    trained_per_second: float
    bytes_streamed: int
    bytes_announced: int
    bytes_used: int
    bytes_next_stored: int


def find_renderer() -> str:
    """Return a renderer that works, and let processes that render use it."""
    try:
        renderer = run_with_renderer(RENDER_ONCE)
    except RenderingFailedError as error:
        raise SystemExit(
            f"No renderer of MuJoCo works here ({error}). This example needs EGL or OSMesa, for which no graphics card "
            "or screen is needed. On Debian or Ubuntu, install one of them with `apt install libegl1` or "
            "`apt install libosmesa6`."
        ) from None
    os.environ["MUJOCO_GL"] = renderer
    return renderer


def make_engine(config: Config, renderer: str, seed: int) -> OnlineDataEngine:
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=config.buffer_size,
            min_trajectories=min(config.min_trajectories, config.buffer_size),
            max_episode_steps=EPISODE_STEPS,
            gym_config={"id": ENVIRONMENT, "kwargs": {"renderer": renderer, "noise": config.noise}},
            num_workers=config.num_workers,
            policy="demo",
            compact=True,  # an image is the next one of a step, and that of the following step: it is stored once
            refill_threshold=config.refill_threshold,
            seed=seed,
            start_method=config.start_method,
            progress_bar=False,  # the training shows one
        )
    )


def train(
    config: Config, seed: int, learner: Learner, engine: OnlineDataEngine, evaluator: Evaluator, progress: Progress
) -> None:
    """Train until the time is up, or all updates are made."""
    progress.begin_training()
    next_evaluation = progress.seconds + config.evaluation_pause
    for update, batch in enumerate(make_loader(learner.policy, engine, config.batch_size, seed), start=1):
        learner.anneal(max(update / config.updates, progress.seconds / config.seconds))
        progress.trained(len(batch), learner.update(batch))

        success = evaluator.success()
        if success is not None:
            progress.evaluated(success)
            next_evaluation = progress.seconds + config.evaluation_pause
        if progress.time_is_up or update == config.updates:
            return
        if not evaluator.busy and progress.seconds >= next_evaluation:
            evaluator.begin(learner.averaged)


def run(config: Config, renderer: str, seed: int) -> tuple[PixelACTPolicy, Result]:
    """Train with one seed, evaluate, and plot the history."""
    torch.manual_seed(seed)
    learner = Learner(PixelACTPolicy(JOINTS, ACTIONS, config.chunk_size))
    make_env = partial(gymnasium.make, ENVIRONMENT, renderer=renderer)
    first = evaluation_seed(seed)
    engine = make_engine(config, renderer, seed)
    # The final evaluation comes first, since the number of the others is unknown.
    evaluator = Evaluator(
        make_env, learner.averaged, config.evaluation_episodes, config.actions_per_chunk, first + config.final_episodes
    )
    print(f"Seed {seed}, rendered with {renderer}:")
    with Progress(engine, config.seconds, unit="frames") as progress, evaluator, engine:
        train(config, seed, learner, engine, evaluator, progress)
    history, now = progress.history, progress.history.looks[-1]
    env = make_env()
    episodes = tqdm(range(first, first + config.final_episodes), desc="final evaluation", unit=" episodes")
    success = success_rate(env, learner.averaged, config.actions_per_chunk, episodes)
    env.close()

    sizes, schema = engine.replay_buffer.storage.bytes(), engine.replay_buffer.storage.schema
    training = now.time - history.ready
    result = Result(
        seed=seed,
        success=success,
        seconds=progress.seconds,
        updates=now.updates,
        episodes=now.episodes,
        frames_collected=now.steps_written,
        frames_trained=now.steps_trained,
        collected_per_second=now.steps_written / now.time,
        trained_per_second=now.steps_trained / training,
        bytes_streamed=now.bytes_written,
        bytes_announced=sizes["bytes_expected"],
        bytes_used=max(look.bytes_used for look in history.looks),
        bytes_next_stored=sizes["bytes_expected"] * schema.nbytes // sizes["nbytes_per_step"],
    )
    config.out.mkdir(parents=True, exist_ok=True)
    title = f"Touch the red ball, from pixels: seed {seed}, {success:.1%} of {config.final_episodes} final episodes"
    path = config.out / f"training_seed_{seed}.png"
    memory = partial(plot_memory, announced=result.bytes_announced, next_stored=result.bytes_next_stored)
    loss_name = learner.policy.loss_name
    plot_history(history, None, config.evaluation_episodes, loss_name, title, path, (plot_frames, memory))
    print(f"  {path}")
    return learner.averaged, result


def table(config: Config, results: Sequence[Result]) -> str:
    """Return Markdown tables of what came out."""
    lines = ["| seed | success | 95 % interval | seconds | updates | episodes | GB streamed |", "|---" * 7 + "|"]
    for result in results:
        low, high = interval_of_means([result.success], config.final_episodes)
        cells = [f"{result.seed}", f"{result.success:.1%}", f"{low:.1%} to {high:.1%}", f"{result.seconds:.0f}"]
        cells += [f"{result.updates:,}", f"{result.episodes:,}", f"{result.bytes_streamed / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    low, high = interval_of_means([result.success for result in results], config.final_episodes)
    lines += [f"All: {np.mean([result.success for result in results]):.1%} ({low:.1%} to {high:.1%})", ""]
    names = ("seed", "frames/s collected", "frames/s trained on", "MB announced", "MB used", "MB without compact=True")
    lines += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for result in results:
        cells = [f"{result.seed}", f"{result.collected_per_second:,.0f}", f"{result.trained_per_second:,.0f}"]
        sizes = (result.bytes_announced, result.bytes_used, result.bytes_next_stored)
        lines.append("| " + " | ".join([*cells, *(f"{size / 1e6:.1f}" for size in sizes)]) + " |")
    return "\n".join(lines)


def report(config: Config, renderer: str, policy: PixelACTPolicy, results: Sequence[Result]) -> None:
    """Print the tables, write the results, and film an episode outside all evaluations."""
    (config.out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(config, results))
    seed = results[-1].seed
    make_env = partial(gymnasium.make, ENVIRONMENT, renderer=renderer, render_mode="rgb_array")
    frames, at_goal = film(make_env, policy, config.actions_per_chunk, evaluation_seed(seed) - 1)
    episode = config.out / "episode.png"
    plot_episode(frames, at_goal, f"An unseen episode (seed {seed}); below, what the policy sees", episode, 1, 8)
    print(f"  {episode}")


def main(config: Config) -> None:
    # The simulator and the evaluation use the other cores.
    torch.set_num_threads(1)
    renderer = find_renderer()
    policy, results = None, []
    try:
        for seed in config.seeds:
            policy, result = run(config, renderer, seed)
            results.append(result)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.")
    if policy is None:
        print("No training was completed.")
        return
    report(config, renderer, policy, results)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
