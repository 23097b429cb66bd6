"""Tasks that are told apart only by their instruction, with an expert.

It is made by `gymnasium.make("language_env:InstructedTable-v0")`, in this process and in every worker of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

STEPS = 30
SPEED = 0.12
"""Way of one step by an action of 1."""
NOISE = 0.2
"""Standard deviation of the noise on the actions when they are executed. The demonstrations record them without it."""
TOLERANCE = 0.08
"""Distance from the target at the end of a success."""
RED, GREEN, BLUE = range(3)


@dataclass(frozen=True)
class Task:
    """A task: how often it is demonstrated, what is said during training, and what is said only in the evaluation."""

    share: float
    instructions: tuple[str, ...]
    unheard: str


TASKS = {
    "red": Task(0.7, ("Go to the red disc.", "Move the hand to the red disc."), "Move to the red disc."),
    "green": Task(0.2, ("Go to the green disc.", "Move the hand to the green disc."), "Move to the green disc."),
    "between": Task(
        0.07,
        ("Go between the red disc and the blue disc.", "Move the hand between the red disc and the blue disc."),
        "Move between the red disc and the blue disc.",
    ),
    "opposite": Task(
        0.03,
        ("Go opposite the green disc.", "Move the hand opposite the green disc."),
        "Move opposite the green disc.",
    ),
}


def target_of(task: str, discs: np.ndarray) -> np.ndarray:
    """Return where the hand should be, `[..., 2]`, for discs `[..., 3, 2]`."""
    if task == "between":
        return (discs[..., RED, :] + discs[..., BLUE, :]) / 2
    return {"red": discs[..., RED, :], "green": discs[..., GREEN, :], "opposite": -discs[..., GREEN, :]}[task]


def moved(hand: np.ndarray, action: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    noisy = action + NOISE * generator.standard_normal(hand.shape)
    return hand + SPEED * noisy.clip(-1.0, 1.0)


def observation(hand: np.ndarray, discs: np.ndarray) -> np.ndarray:
    """Return what a policy sees, float32 `[..., 8]`: the hand and the discs, and nothing of the task."""
    return np.concatenate([hand, discs.reshape(*discs.shape[:-2], 6)], -1).astype(np.float32)


@dataclass(frozen=True)
class Segment:
    actions: Iterator[np.ndarray]
    name: str
    instruction: str


class InstructedTable(gymnasium.Env[np.ndarray, np.ndarray]):
    """A hand among three discs. What it should do is in the instruction of the demonstration only."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (8,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._hand = self.np_random.uniform(-1, 1, 2)
        self._discs = self.np_random.uniform(-1, 1, (3, 2))
        return observation(self._hand, self._discs), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self._hand = moved(self._hand, action, self.np_random)
        return observation(self._hand, self._discs), 0.0, False, False, {}

    def create_demo_segments(self) -> Iterator[Segment]:
        """Plan a demonstration of a task that is drawn by its share."""
        name = str(self.np_random.choice([*TASKS], p=[task.share for task in TASKS.values()]))
        instruction = str(self.np_random.choice(TASKS[name].instructions))
        yield Segment(self._towards(target_of(name, self._discs)), name, instruction)

    def _towards(self, target: np.ndarray) -> Iterator[np.ndarray]:
        for _ in range(STEPS):
            yield ((target - self._hand) / SPEED).clip(-1.0, 1.0).astype(np.float32)


gymnasium.register("InstructedTable-v0", entry_point=InstructedTable)
