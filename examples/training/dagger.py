"""DAgger on a live stream: the learner acts, and the expert says in every state what it would have done.

    workers: the policy acts, or the expert ── every state with the expert's action ──> buffer ──> learner
        ^──────────────────── engine.update_policy_weights_(), after every few updates ──────────────┘

A hand is pushed by forces and should stay at a goal that moves on a circle. The expert knows how the goal moves. The
policy sees the hand's speed, and the goal through a noisy camera. On the expert's demonstrations the hand's own speed
tells how the goal moves, since the expert follows it. A policy that learns this from demonstrations relies on its own
speed, which tells nothing when the policy itself has gone wrong, and it drifts away (Ross et al., 2011, "A Reduction of
Imitation Learning and Structured Prediction to No-Regret Online Learning"). More demonstrations do not help. So the
same learner is trained on fixed sets of demonstrations, on a stream of them, and with DAgger.

    python examples/training/dagger.py
    python examples/training/dagger.py --seeds 0 --fixed 128 --updates 4000
    python examples/training/dagger.py --help

In the beginning the expert acts in a part `beta` of the steps, which decreases to 0. Each step says who acted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from cloning import ClonedPolicy, Cloner
from plots import plot_comparison
from studies import Curve, by_data, final_table, write_curves
from table_pictures import plot_strip
from tabletop import TableEnv, World, observation_size, successes
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch.utils.data import DataLoader
from tqdm import tqdm

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg, OnlineDataset, TrajectoryReplayBuffer

WORLD = World()
SOURCE = ("collector", "source")
POLICY, EXPERT = 0, 1
"""The labels of the steps at `SOURCE`."""
STREAM, DAGGER = "stream of demonstrations", "DAgger on the stream"
EVALUATION_SEED = 1_000_000


@dataclass(frozen=True)
class Config:
    """Train one learner on fixed demonstrations, on a stream of them, and with DAgger on the live stream."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the workers, the sampling, the policy and the evaluation. Each trains once on every kind of data."""
    fixed: tuple[int, ...] = (32, 128, 512, 2048)
    """Numbers of demonstrations of the fixed sets."""
    updates: int = 4000
    """Updates of each training."""
    seconds: float = 600.0
    """Maximum duration of all trainings together. What has not begun by then is left out."""
    evaluate_every: int = 500
    """Updates between two evaluations."""
    evaluation_episodes: int = 500
    """Episodes per evaluation, with other goals, starts and noise than those of the training."""
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
    anneal: int = 1000
    """Updates until the expert does not act any more."""
    send_every: int = 20
    """Updates between two updates of the workers' weights."""
    start_method: str | None = None
    """How workers are started; None: "spawn"."""
    out: Path = Path("outputs/dagger")
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


def make_engine(config: Config, seed: int, policy: MixedPolicy, buffer_size: int, ready: int) -> OnlineDataEngine:
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=buffer_size,
            min_trajectories=ready,
            max_episode_steps=WORLD.steps,
            env_factory=partial(TableEnv, WORLD, config.rows),
            num_workers=config.num_workers,
            policy=policy,
            refill_threshold=config.refill_threshold,
            seed=seed,
            start_method=config.start_method,
            progress_bar=False,  # the training shows one
        )
    )


class Study:
    """The trainings, and what came out so far."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.curves: list[Curve] = []
        self.policies: dict[str, ClonedPolicy] = {}
        self._until = time.monotonic() + config.seconds

    def run(self) -> None:
        """Run every training with every seed, as long as there is time."""
        for seed in self.config.seeds:
            if self.config.fixed:
                recorded = self._record(seed)
            for count in self.config.fixed:
                name = f"{count:,} demonstrations"
                self._train(name, seed, self._first(recorded, count), lambda count=count: count)
            for name in (STREAM, DAGGER):
                cloner, policy = self._learner(seed)
                config = self.config
                with make_engine(config, seed, policy, config.buffer_size, config.min_trajectories) as engine:
                    send = partial(self._send, engine, policy, cloner) if name == DAGGER else None
                    self._train(name, seed, engine, lambda engine=engine: engine.stats()["inserted"], cloner, send)

    def _learner(self, seed: int) -> tuple[Cloner, MixedPolicy]:
        cloner = Cloner(observation_size(WORLD), self.config.updates, seed)
        return cloner, MixedPolicy(ClonedPolicy(observation_size(WORLD)))

    def _send(self, engine: OnlineDataEngine, policy: MixedPolicy, cloner: Cloner, updates: int) -> None:
        """Let the workers act with the newest weights, and less with the expert."""
        if updates % self.config.send_every == 0:
            policy.policy.load_state_dict(cloner.policy.state_dict())
            policy.beta.fill_(max(0.0, 1.0 - updates / self.config.anneal))
            engine.update_policy_weights_(policy)

    def _record(self, seed: int) -> TrajectoryReplayBuffer:
        """Collect demonstrations for the largest of the fixed sets: a part beta of 1 is the expert alone."""
        count = max(self.config.fixed)
        with make_engine(self.config, seed, self._learner(seed)[1], count, count) as engine:
            pass
        return engine.replay_buffer

    def _first(self, recorded: TrajectoryReplayBuffer, count: int) -> TrajectoryReplayBuffer:
        rb = TrajectoryReplayBuffer(max_trajectories=count, max_total_steps=count * WORLD.steps, chunk_size=1)
        for number in range(count):
            rb.extend(recorded[number])
        return rb

    def _train(
        self,
        name: str,
        seed: int,
        source: Any,
        episodes: Callable[[], int],
        cloner: Cloner | None = None,
        after_update: Callable[[int], None] | None = None,
    ) -> None:
        config = self.config
        cloner = cloner or self._learner(seed)[0]
        curve = Curve(name, seed)
        dataset = OnlineDataset(source, chunk_size=1, batch_size=config.batch_size, seed=seed)
        batches = iter(DataLoader(dataset, batch_size=None))
        self.curves.append(curve)
        self.policies[name] = cloner.averaged
        bar = tqdm(range(1, config.updates + 1), desc=f"{name}, seed {seed}", unit=" updates")
        for update in bar:
            if time.monotonic() > self._until:
                print(f"\nThe {config.seconds:.0f} s are over during {name}, seed {seed}, which is left out.")
                raise TimeIsUp
            batch = next(batches)[:, 0]
            loss = cloner.update(batch["observation"], batch["expert_action"])
            if after_update is not None:
                after_update(update)
            if update % config.evaluate_every == 0:
                # The same episodes for all kinds of data, others for each point and each seed.
                test = EVALUATION_SEED * (seed + 1) + update
                success = successes(WORLD, cloner.averaged, config.evaluation_episodes, test).float().mean().item()
                curve.add(update, episodes(), success)
                acted = (batch[SOURCE] == EXPERT).float().mean().item()
                bar.set_postfix_str(f"loss {loss:.3f}, expert acted {acted:.0%}, success {success:.1%}")

    def completed(self) -> list[Curve]:
        """Return the curves of all complete trainings; if there is none, that of the first one as far as it came."""
        complete = [
            curve for curve in self.curves if len(curve.updates) == self.config.updates // self.config.evaluate_every
        ]
        return complete or [curve for curve in self.curves if curve.updates]


class TimeIsUp(Exception):
    """Raised when the time of all trainings is over."""


def draw(study: Study, curves: list[Curve]) -> None:
    """Write the results and make the figures: success of all trainings, and one episode with each kind of data."""
    config = study.config
    config.out.mkdir(parents=True, exist_ok=True)
    write_curves(curves, config.out / "curves.json")
    seeds = ", ".join(dict.fromkeys(str(curve.seed) for curve in curves))
    comparison, strip = config.out / "comparison.png", config.out / "episode.png"
    title = f"A moving goal, seen by a noisy camera: seed {seeds}"
    plot_comparison(by_data(curves), config.evaluation_episodes, title, comparison)
    shown = {"the expert": None, **{name: study.policies[name] for name in [*study.policies][-3:]}}
    plot_strip(WORLD, shown, EVALUATION_SEED - 1, strip)
    print(f"  {comparison}\n  {strip}")


def main(config: Config) -> None:
    # The workers use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    study = Study(config)
    try:
        study.run()
    except TimeIsUp:
        pass
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C.")
    curves = study.completed()
    if not curves:
        print("Nothing was evaluated yet.")
        return
    expert = successes(WORLD, None, config.evaluation_episodes, EVALUATION_SEED).float().mean().item()
    print(f"Success of the expert: {expert:.1%}. Of the policies, after {curves[0].updates[-1]:,} updates:")
    print(final_table(curves, config.evaluation_episodes))
    draw(study, curves)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
