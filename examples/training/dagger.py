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

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from cloning import Cloner
from table_study import MixedPolicy, Study, StudyConfig
from tabletop import World

from embodichain_rl import OnlineDataEngine

WORLD = World()
DAGGER = "DAgger on the stream"


@dataclass(frozen=True)
class Config(StudyConfig):
    """Train one learner on fixed demonstrations, on a stream of them, and with DAgger on the live stream."""

    anneal: int = 1000
    """Updates until the expert does not act any more."""
    send_every: int = 20
    """Updates between two updates of the workers' weights."""
    out: Path = Path("outputs/dagger")
    """Folder for the figures and the results."""


class DAggerStudy(Study):
    """Fixed demonstrations, a stream of them, and DAgger."""

    config: Config

    def run_streams(self, seed: int) -> None:
        self.train_on_stream(seed)
        cloner, policy = self.learner(seed)
        with self.engine(seed, policy) as engine:
            send = partial(self._send, engine, policy, cloner)
            self.train(DAGGER, seed, engine, lambda: engine.stats()["inserted"], cloner, send)

    def _send(self, engine: OnlineDataEngine, policy: MixedPolicy, cloner: Cloner, updates: int) -> None:
        """Let the workers act with the newest weights, and less with the expert."""
        if updates % self.config.send_every == 0:
            policy.policy.load_state_dict(cloner.policy.state_dict())
            policy.beta.fill_(max(0.0, 1.0 - updates / self.config.anneal))
            engine.update_policy_weights_(policy)


def main(config: Config) -> None:
    # The workers use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    study = DAggerStudy(config, WORLD, {"success": WORLD})
    study.run()
    study.report({"success": "A moving goal, seen by a noisy camera"})


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
