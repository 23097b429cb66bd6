"""What the comparisons on the table share: an engine of tables, and one learner on fixed sets and on streams."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cloning import ClonedPolicy, Cloner
from plots import plot_comparison
from studies import Curve, by_data, final_table, first_episodes, write_curves
from table_pictures import plot_strip
from tabletop import TableEnv, World, observation_size, successes
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch.utils.data import DataLoader
from tqdm import tqdm

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset, TrajectoryReplayBuffer

SOURCE = ("collector", "source")
POLICY, EXPERT = 0, 1
"""The labels of the steps at `SOURCE`."""
STREAM = "stream of demonstrations"
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class StudyConfig:
    """The options of all comparisons on the table."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the workers, the sampling, the policy and the evaluation. Each trains once on every kind of data."""
    fixed: tuple[int, ...] = (32, 128, 512, 2048)
    """Numbers of demonstrations of the fixed sets."""
    updates: int = 4000
    """Updates of each training."""
    seconds: float = 600.0
    """Maximum duration of all trainings together. What is not complete by then is left out."""
    evaluate_every: int = 500
    """Updates between two evaluations."""
    evaluation_episodes: int = 500
    """Episodes per evaluation, with other goals, starts, parameters and noise than those of the training."""
    batch_size: int = 256
    """Steps per update."""
    num_workers: int = 1
    """Processes that step tables."""
    rows: int = 32
    """Tables per process, which are simulated as one batch."""
    buffer_size: int = 2048
    """Episodes that the buffer of a stream keeps, the newest ones."""
    min_trajectories: int = 128
    """Episodes at which training on a stream begins."""
    refill_threshold: float = 200.0
    """Steps drawn for each episode that is replaced. The workers wait when they are ahead."""
    start_method: str | None = None
    """How workers are started; None: "spawn"."""
    out: Path = Path("outputs")
    """Folder for the figures and the results."""


class MixedPolicy(TensorDictModuleBase):
    """The policy of the workers: in a part `beta` of the steps the expert acts. Both the weights and `beta` are sent.

    Writes the action, and who acted to `SOURCE`.
    """

    beta: torch.Tensor

    def __init__(self, policy: ClonedPolicy) -> None:
        super().__init__()
        self.in_keys = ["observation", "expert_action"]
        self.out_keys = ["action", SOURCE]
        self.policy = policy
        self.register_buffer("beta", torch.ones(()))

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        expert = torch.rand(tensordict.batch_size) < self.beta
        action = torch.where(expert[..., None], tensordict["expert_action"], self.policy(tensordict["observation"]))
        return tensordict.update({"action": action, "collector": {"source": torch.where(expert, EXPERT, POLICY)}})


class TimeIsUp(Exception):
    """Raised when the time of all trainings is over."""


class Study(ABC):
    """The trainings of a comparison, and what came out so far.

    Args:
        config: the options.
        world: the world of the training.
        tests: the worlds in which each policy is evaluated, by name.
    """

    def __init__(self, config: StudyConfig, world: World, tests: Mapping[str, World]) -> None:
        self.config, self.world, self.tests = config, world, tests
        self.curves: dict[str, list[Curve]] = {name: [] for name in tests}
        self.policies: dict[str, ClonedPolicy] = {}  # of the last complete training on each kind of data
        self._until = time.monotonic() + config.seconds

    @abstractmethod
    def run_streams(self, seed: int) -> None:
        """Run the trainings on live streams."""

    def run(self) -> None:
        """Run every training with every seed, as long as there is time."""
        try:
            for seed in self.config.seeds:
                if self.config.fixed:
                    recorded = self._record(seed)
                for count in self.config.fixed:
                    name = f"{count:,} demonstrations"
                    self.train(name, seed, first_episodes(recorded, count), lambda count=count: count)
                self.run_streams(seed)
        except TimeIsUp:
            print("\nThe time is up. What was not complete is left out.")
        except KeyboardInterrupt:
            print("\nStopped by Ctrl-C.")

    def learner(self, seed: int) -> tuple[Cloner, MixedPolicy]:
        """Return a new learner, and the policy of workers: the expert, until other weights are sent."""
        size = observation_size(self.world)
        return Cloner(size, self.config.updates, seed), MixedPolicy(ClonedPolicy(size))

    def engine(self, seed: int, policy: MixedPolicy, buffer_size: int = 0, ready: int = 0) -> OnlineDataEngine:
        """Return an engine of tables, by default with the buffer of a stream."""
        config = self.config
        return OnlineDataEngine(
            OnlineDataEngineCfg(
                buffer_size=buffer_size or config.buffer_size,
                min_trajectories=ready or config.min_trajectories,
                max_episode_steps=self.world.steps,
                env_factory=partial(TableEnv, self.world, config.rows),
                num_workers=config.num_workers,
                policy=policy,
                refill_threshold=config.refill_threshold,
                seed=seed,
                start_method=config.start_method,
                shutdown_timeout=120.0,  # on a busy machine, the workers may need long for their last steps
                progress_bar=False,  # the training shows one
            )
        )

    def _record(self, seed: int) -> TrajectoryReplayBuffer:
        """Collect demonstrations for the largest of the fixed sets: a part beta of 1 is the expert alone."""
        count = max(self.config.fixed)
        with self.engine(seed, self.learner(seed)[1], count, count) as engine:
            pass
        return engine.replay_buffer

    def train_on_stream(self, seed: int) -> None:
        """Train on a live stream of the expert's demonstrations."""
        cloner, policy = self.learner(seed)
        with self.engine(seed, policy) as engine:
            self.train(STREAM, seed, engine, lambda: engine.stats()["inserted"], cloner)

    def train(
        self,
        name: str,
        seed: int,
        source: Any,
        episodes: Callable[[], int],
        cloner: Cloner | None = None,
        after_update: Callable[[int], None] | None = None,
    ) -> None:
        """Train on a buffer or an engine. Each evaluation extends the curves.

        Args:
            name: of the kind of data.
            seed: of the sampling, the policy and the evaluation.
            source: a buffer or an engine.
            episodes: returns the number of different episodes that there were to draw from until now.
            cloner: the learner; None: a new one.
            after_update: is called after each update with their number.
        """
        config = self.config
        cloner = cloner or self.learner(seed)[0]
        dataset = OnlineDataset(source, chunk_size=1, batch_size=config.batch_size, seed=seed)
        batches = iter(DataLoader(dataset, batch_size=None))
        curves = {test: Curve(name, seed) for test in self.tests}
        for test, curve in curves.items():
            self.curves[test].append(curve)
        bar = tqdm(range(1, config.updates + 1), desc=f"{name}, seed {seed}", unit=" updates")
        for update in bar:
            if time.monotonic() > self._until:
                raise TimeIsUp
            batch = next(batches)[:, 0]
            loss = cloner.update(batch["observation"], batch["expert_action"])
            if after_update is not None:
                after_update(update)
            if update % config.evaluate_every == 0:
                # The same episodes for all kinds of data, others for each point and each seed.
                first = EVALUATION_SEED * (seed + 1) + update
                for test, world in self.tests.items():
                    success = successes(world, cloner.averaged, config.evaluation_episodes, first).float().mean().item()
                    curves[test].add(update, episodes(), success)
                acted = (batch[SOURCE] == EXPERT).float().mean().item()
                results = ", ".join(f"{test} {curves[test].success[-1]:.1%}" for test in self.tests)
                bar.set_postfix_str(f"loss {loss:.3f}, expert acted {acted:.0%}, {results}")
        self.policies[name] = cloner.averaged

    def completed(self, test: str) -> list[Curve]:
        """Return the curves of all complete trainings; if there is none, that of the first one as far as it came."""
        points = self.config.updates // self.config.evaluate_every
        complete = [curve for curve in self.curves[test] if len(curve.updates) == points]
        return complete or [curve for curve in self.curves[test] if curve.updates]

    def report(self, titles: Mapping[str, str]) -> None:
        """Print the tables and write the figures: the curves of each test, and one episode of it.

        Args:
            titles: the title of the figure of each test.
        """
        out, count = self.config.out, self.config.evaluation_episodes
        if not any(self.completed(test) for test in self.tests):
            print("Nothing was evaluated yet.")
            return
        out.mkdir(parents=True, exist_ok=True)
        for test, world in self.tests.items():
            curves, prefix = self.completed(test), f"{test}_" if len(self.tests) > 1 else ""
            expert = successes(world, None, count, EVALUATION_SEED).float().mean().item()
            print(f"{titles[test]}. Success of the expert: {expert:.1%}. Of the policies:")
            print(final_table(curves, count))
            write_curves(curves, out / f"{prefix}curves.json")
            seeds = ", ".join(dict.fromkeys(str(curve.seed) for curve in curves))
            comparison, strip = out / f"{prefix}comparison.png", out / f"{prefix}episode.png"
            plot_comparison(by_data(curves), count, f"{titles[test]}: seed {seeds}", comparison)
            shown = {"the expert": None, **{name: self.policies[name] for name in [*self.policies][-3:]}}
            plot_strip(world, shown, EVALUATION_SEED - 1, strip)
            print(f"  {comparison}\n  {strip}")
