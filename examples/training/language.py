"""Four tasks in one buffer, told apart only by their instruction, and one policy that listens to it.

    workers: 70 % "Go to the red disc.", ..., 3 % "Go opposite the green disc." ──> one buffer
    learner: all tasks equally often (ByGroup), the instruction as a bag of words ──> one policy

The observations say nothing of the task. The demonstrations are as unequal as collections are. The same learner is
trained on a balanced mixture, on the episodes as they come, and without the text. It is evaluated on each task, with
the instructions of the training and with others that it has never heard.

    python examples/training/language.py
    python examples/training/language.py --seeds 0 --updates 1000
    python examples/training/language.py --help
"""

from __future__ import annotations

import json
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from interrupts import ctrl_c_waits
from language_env import STEPS, TASKS, TOLERANCE, moved, observation, target_of
from plots import BLUE, GREEN, GREY, ORANGE, plt
from studies import interval_of_means
from tensordict import TensorDictBase
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from embodichain_rl import ByGroup, OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset

WORDS, LONGEST = 256, 12
"""Number of hashed words, of which the last one is empty, and of words of an instruction."""
KINDS = {"balanced": ByGroup("segment_name"), "as collected": "uniform", "without the text": ByGroup("segment_name")}
"""What is trained: the weights of the draws by name."""


@dataclass(frozen=True)
class Config:
    """Train one policy on several tasks that are told apart only by their instruction."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the workers, the sampling, the policy and the evaluation. Each trains once in every way."""
    updates: int = 3000
    """Updates of each training."""
    seconds: float = 600.0
    """Maximum duration of all trainings together. What is not complete by then is left out."""
    evaluation_episodes: int = 500
    """Episodes per task and evaluation."""
    batch_size: int = 256
    num_workers: int = 1
    """Number of processes in which the expert acts."""
    buffer_size: int = 256
    """Number of episodes that the buffer keeps, the newest ones."""
    refill_threshold: float = 1000.0
    """Steps drawn for each episode that is replaced. The workers wait when they are ahead."""
    start_method: str | None = None
    """How workers are started; None: "spawn"."""
    out: Path = Path("outputs/language")
    """Folder for the figures and the results."""


def words_of(instruction: str) -> list[int]:
    """Return the hashed words of an instruction, `LONGEST` numbers."""
    words = [zlib.crc32(word.encode()) % (WORDS - 1) for word in re.findall(r"\w+", instruction.lower())]
    return (words + [WORDS - 1] * LONGEST)[:LONGEST]


class InstructedPolicy(nn.Module):
    """A perceptron from observations `[N, 8]` and words `[N, LONGEST]` to actions `[N, 2]`."""

    def __init__(self, listens: bool, width: int = 256, embedding: int = 32) -> None:
        super().__init__()
        self.listens = listens
        self.embedding = nn.EmbeddingBag(WORDS, embedding, mode="sum", padding_idx=WORDS - 1)
        self.layers = nn.Sequential(
            nn.Linear(8 + embedding, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, seen: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        heard = self.embedding(words if self.listens else torch.full_like(words, WORDS - 1))
        return self.layers(torch.cat([seen, heard], -1))


@dataclass
class Result:
    """The success of one training on each task, with the instructions of the training and with unheard ones."""

    kind: str
    seed: int
    shares: dict[str, float]
    success: dict[str, float] = field(default_factory=dict)
    unheard: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def episodes(
    policy: InstructedPolicy, task: str, instructions: Sequence[str], count: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Run episodes of a task as one batch. Return the hands `[STEPS + 1, count, 2]` and the discs `[count, 3, 2]`."""
    generator = np.random.default_rng(seed)
    hand, discs = generator.uniform(-1, 1, (count, 2)), generator.uniform(-1, 1, (count, 3, 2))
    words = torch.tensor([words_of(instructions[row % len(instructions)]) for row in range(count)])
    hands = [hand]
    for _ in range(STEPS):
        action = policy(torch.from_numpy(observation(hand, discs)), words).clamp(-1.0, 1.0).numpy()
        hand = moved(hand, action, generator)
        hands.append(hand)
    return np.stack(hands), discs


def success(policy: InstructedPolicy, task: str, instructions: Sequence[str], count: int, seed: int) -> float:
    hands, discs = episodes(policy, task, instructions, count, seed)
    return float((np.linalg.norm(hands[-1] - target_of(task, discs), axis=-1) < TOLERANCE).mean())


class Learner:
    """A policy and its training on the batches of an engine."""

    def __init__(self, config: Config, engine: OnlineDataEngine, seed: int, listens: bool) -> None:
        torch.manual_seed(seed)
        self.policy = InstructedPolicy(listens)
        self._texts = engine.replay_buffer.texts
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-3, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, config.updates)

    @ctrl_c_waits()
    def update(self, batch: TensorDictBase) -> float:
        """Make an update with steps `[N]` and return the mean absolute error."""
        ids, which = batch["instruction"].unique(return_inverse=True)
        words = torch.tensor([words_of(text) for text in self._texts.resolve(ids)])[which]
        loss = nn.functional.l1_loss(self.policy(batch["observation"], words), batch["action"])
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        return loss.item()


def train(config: Config, kind: str, seed: int, until: float) -> tuple[InstructedPolicy, Result] | None:
    """Train in one way, and evaluate. Return None if the time was over."""
    cfg = OnlineDataEngineCfg(
        buffer_size=config.buffer_size,
        max_episode_steps=STEPS,
        gym_config={"id": "language_env:InstructedTable-v0"},
        num_workers=config.num_workers,
        policy="demo",
        refill_threshold=config.refill_threshold,
        seed=seed,
        start_method=config.start_method,
        progress_bar=False,  # the training shows one
    )
    with OnlineDataEngine(cfg) as engine:
        options: dict[str, Any] = {"weights": KINDS[kind], "seed": seed}
        batches: Iterator[TensorDictBase] = iter(
            DataLoader(OnlineDataset(engine, 1, config.batch_size, **options), batch_size=None)
        )
        learner = Learner(config, engine, seed, listens=kind != "without the text")
        drawn = dict.fromkeys(TASKS, 0)
        bar = tqdm(range(1, config.updates + 1), desc=f"{kind}, seed {seed}", unit=" updates")
        for update in bar:
            if time.monotonic() > until:
                return None
            batch = next(batches)[:, 0]
            loss = learner.update(batch)
            if update % 50 == 0 or update == config.updates:
                for name in engine.replay_buffer.texts.resolve(batch["segment_name"]):
                    drawn[name] += 1
                bar.set_postfix_str(f"{engine.stats()['inserted']:,} episodes, loss {loss:.3f}")
    total = sum(drawn.values())
    result = Result(kind, seed, {name: count / total for name, count in drawn.items()})
    first = 1_000_000 * (seed + 1)  # the same episodes for all ways
    for number, (name, task) in enumerate(TASKS.items()):
        count = config.evaluation_episodes
        result.success[name] = success(learner.policy, name, task.instructions, count, first + number)
        result.unheard[name] = success(learner.policy, name, [task.unheard], count, first + number)
    print(f"  success: {', '.join(f'{name} {rate:.1%}' for name, rate in result.success.items())}")
    return learner.policy, result


def by_kind(results: Sequence[Result]) -> dict[str, list[Result]]:
    return {kind: [each for each in results if each.kind == kind] for kind in KINDS} if results else {}


def table(config: Config, results: Sequence[Result]) -> str:
    """Return a Markdown table of the mean success of all seeds on each task, with the range of the seeds."""
    lines = ["| trained | " + " | ".join(f"{name}" for name in TASKS) + " | lowest | its 95 % interval |"]
    lines.append("|---" * (3 + len(TASKS)) + "|")
    for kind, runs in by_kind(results).items():
        for heard, rows in ((True, [r.success for r in runs]), (False, [r.unheard for r in runs])):
            if not rows or (kind == "without the text" and not heard):
                continue
            cells, means = [kind + ("" if heard else ", unheard words")], {}
            for name in TASKS:
                rates = [row[name] for row in rows]
                means[name] = float(np.mean(rates))
                spread = f" ({min(rates):.1%} to {max(rates):.1%})" if len(rates) > 1 else ""
                cells.append(f"{means[name]:.1%}{spread}")
            low, high = interval_of_means([min(means.values())] * len(rows), config.evaluation_episodes)
            lines.append("| " + " | ".join([*cells, f"{min(means.values()):.1%}", f"{low:.1%} to {high:.1%}"]) + " |")
    return "\n".join(lines)


def plot_tasks(results: Sequence[Result], path: Path) -> None:
    """Plot the success on each task as bars, one for each way of training, and a point for each seed."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (kind, runs) in enumerate(by_kind(results).items()):
        if not runs:
            continue
        places = np.arange(len(TASKS)) + 0.26 * (number - 1)
        rates = np.array([[run.success[name] for name in TASKS] for run in runs])
        axis.bar(places, rates.mean(0), 0.24, color=(BLUE, ORANGE, GREY)[number], label=kind)
        axis.plot(np.tile(places, len(runs)), rates.ravel(), "k.", ms=3)
    shares = [f"{name}\n{task.share:.0%} of the episodes" for name, task in TASKS.items()]
    axis.set_xticks(range(len(TASKS)), shares)
    axis.set(ylabel="success (a point: a seed)", ylim=(0, 1.25), yticks=[0, 0.5, 1])
    axis.legend(loc="upper center", ncols=3, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_strip(policy: InstructedPolicy, path: Path) -> None:
    """Draw the same start with each unheard instruction, at six moments."""
    shown = np.linspace(0, STEPS, 6).round().astype(int)
    figure, axes = plt.subplots(len(TASKS), 6, figsize=(11, 7.8), layout="constrained")
    for row, (name, task) in zip(axes, TASKS.items(), strict=True):
        hands, discs = episodes(policy, name, [task.unheard], 1, 3)
        target = target_of(name, discs)[0]
        for axis, step in zip(row, shown.tolist(), strict=True):
            there = np.linalg.norm(hands[step, 0] - target) < TOLERANCE
            for place, color in zip(discs[0], ("#c0392b", GREEN, BLUE), strict=True):
                axis.add_patch(plt.Circle(place, 0.12, color=color, lw=0))
            axis.plot(*target, "x", color="black", ms=6)
            axis.plot(*hands[: step + 1, 0].T, color=GREY, lw=1)
            axis.plot(*hands[step, 0], "o", color="black", ms=4)
            axis.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), xticks=[], yticks=[], aspect="equal")
            axis.set_title(f"step {step}" + (", there" if there else ""), fontsize=8)
        row[0].set_ylabel(task.unheard.replace(" disc and", " disc\nand"), fontsize=7)
    figure.suptitle("One start, and instructions that were never heard during the training (cross: what is meant)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(config: Config) -> None:
    # The workers use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    until = time.monotonic() + config.seconds
    results: list[Result] = []
    policies: dict[str, InstructedPolicy] = {}
    try:
        for seed in config.seeds:
            for kind in KINDS:
                done = train(config, kind, seed, until)
                if done is None:
                    print(f"\nThe {config.seconds:.0f} s are over during {kind}, seed {seed}, which is left out.")
                    raise TimeoutError
                policies[kind] = done[0]
                results.append(done[1])
    except TimeoutError:
        pass
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.")
    if not results:
        print("No training was completed.")
        return
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "results.json").write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(table(config, results))
    plot_tasks(results, config.out / "tasks.png")
    plot_strip(policies["balanced"], config.out / "episode.png")
    print(f"  {config.out / 'tasks.png'}\n  {config.out / 'episode.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
