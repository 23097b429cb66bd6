"""Domain randomisation on a live stream: old episodes make room, and no new one has the parameters of another one.

    workers: tables of random mass, friction and camera angle ── each with its expert ──> buffer ──> learner
    tests:   parameters that were never drawn, inside the range of the training, and outside of it

A hand is pushed by forces to a goal that a turned, noisy camera sees. The expert knows the mass, the friction and the
angle of each table. The policy is shown the latest measurements, and has to infer them. The motors are noisy during the
training, so that the demonstrations contain corrections (Laskey et al., 2017, "DART"). The same learner makes the same
number of updates on fixed sets of demonstrations and on a stream of them.

    python examples/training/randomised.py
    python examples/training/randomised.py --seeds 0 --fixed 128 --updates 1000
    python examples/training/randomised.py --help
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from table_study import Study, StudyConfig
from tabletop import World

WORLD = World(
    history=8,
    mass=(0.5, 2.5),
    friction=(0.0, 2.0),
    turn=(-1.5, 1.5),
    orbit=(0.0, 0.0),  # the goal rests
    motor_noise=0.8,
    camera_noise=0.02,
)
INSIDE = replace(WORLD, motor_noise=0.1)
OUTSIDE = replace(INSIDE, mass=(2.5, 3.0), friction=(2.0, 2.5), turn=(1.5, 1.75))
"""All three parameters of an episode are outside of the range of the training."""
TESTS = {"inside": INSIDE, "outside": OUTSIDE}


@dataclass(frozen=True)
class Config(StudyConfig):
    """Train one learner on fixed demonstrations of randomised tables, and on a stream of them."""

    refill_threshold: float = 40.0
    """Steps drawn for each episode that is replaced. The workers wait when they are ahead."""
    out: Path = Path("outputs/randomised")
    """Folder for the figures and the results."""


class RandomisedStudy(Study):
    """Fixed demonstrations, and a stream of them."""

    def run_streams(self, seed: int) -> None:
        self.train_on_stream(seed)


def main(config: Config) -> None:
    # The workers use the cores; a network this small is not faster with more of them.
    torch.set_num_threads(1)
    study = RandomisedStudy(config, WORLD, TESTS)
    study.run()
    study.report({name: f"Unseen parameters {name} the range of the training" for name in TESTS})


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except KeyboardInterrupt:  # during the plotting
        print("\nStopped by Ctrl-C.")
