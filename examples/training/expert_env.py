"""FetchPickAndPlace with an expert: an environment that plans demonstrations of its task, segment by segment.

It is made by `gymnasium.make("expert_env:PickAndPlaceExpert-v0")`, in this process and in every worker of an engine.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np

# The import prints a notice about other environments in every process, which would interrupt the progress bar.
with contextlib.redirect_stderr(io.StringIO()):
    import gymnasium_robotics

gymnasium.register_envs(gymnasium_robotics)

EPISODE_STEPS = 50

GAIN = 10.0  # from actions to metres; an action of 1 moves the gripper by up to 5 cm
OPEN, CLOSED = 1.0, -1.0
ABOVE = np.array([0.0, 0.0, 0.08])  # height at which the open fingers clear the object
NEAR = 0.02
GRIP_STEPS = 4  # number of steps that the fingers need to close around the object
HOLD_STEPS = 8  # how long the object is held at its goal, so that the learner sees what to do after reaching it


@dataclass(frozen=True)
class Segment:
    actions: Iterator[np.ndarray]
    name: str
    instruction: str


class PickAndPlaceExpert(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Carry a cube to a goal on the table or in the air.

    Args:
        noise: standard deviation of the noise on each action except that of the fingers. The robot executes the noisy
            action, but the demonstration records the action without noise. So it contains the expert's corrections.
        **kwargs: arguments of ``gymnasium.make``.
    """

    def __init__(self, noise: float = 0.0, **kwargs: Any) -> None:
        env = gymnasium.make("FetchPickAndPlace-v4", max_episode_steps=EPISODE_STEPS, **kwargs)
        super().__init__(env)
        self._noise = noise
        self._gripper = self._cube = self._goal = np.zeros(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._look_at(observation)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        action = np.array(action, np.float32)
        if self._noise:
            action[:3] += self._noise * self.np_random.standard_normal(3)
        observation, *results = self.env.step(action.clip(-1.0, 1.0))
        self._look_at(observation)
        return observation, *results

    def create_demo_segments(self) -> Iterator[Segment]:
        """Plan each action when it is requested, from the state that the previous actions have reached."""
        yield Segment(self._approach(), "approach", "Move the open gripper above the cube.")
        yield Segment(self._descend(), "descend", "Lower the open gripper around the cube.")
        yield Segment(self._grip(), "grip", "Close the gripper.")
        yield Segment(self._carry(), "carry", "Carry the cube to the goal and hold it there.")

    def _approach(self) -> Iterator[np.ndarray]:
        while np.linalg.norm((self._cube - self._gripper)[:2]) > NEAR:
            yield self._towards(self._cube + ABOVE, OPEN)

    def _descend(self) -> Iterator[np.ndarray]:
        while np.linalg.norm(self._cube - self._gripper) > NEAR:
            yield self._towards(self._cube, OPEN)

    def _grip(self) -> Iterator[np.ndarray]:
        for _ in range(GRIP_STEPS):
            yield self._towards(self._cube, CLOSED)

    def _carry(self) -> Iterator[np.ndarray]:
        held = 0
        while held < HOLD_STEPS:
            way = self._goal - self._cube
            held += bool(np.linalg.norm(way) < NEAR)
            yield self._towards(self._gripper + way, CLOSED)

    def _towards(self, place: np.ndarray, fingers: float) -> np.ndarray:
        motion = (GAIN * (place - self._gripper)).clip(-1.0, 1.0)
        return np.array([*motion, fingers], np.float32)

    def _look_at(self, observation: dict[str, np.ndarray]) -> None:
        self._gripper, self._cube = observation["observation"][:3], observation["observation"][3:6]
        self._goal = observation["desired_goal"]


gymnasium.register("PickAndPlaceExpert-v0", entry_point=PickAndPlaceExpert)
