"""FetchReach with an expert: an environment that plans demonstrations of its task.

It is made by `gymnasium.make("reach_expert:ReachExpert-v0")`, in this process and in every worker of an engine.
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
GAIN = 10.0  # from metres to actions; an action of 1 moves the gripper by up to 5 cm
NEAR = 0.01


@dataclass(frozen=True)
class Segment:
    actions: Iterator[np.ndarray]
    name: str
    instruction: str


class ReachExpert(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Move the gripper to a goal in the air, and hold it there until the episode ends."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(gymnasium.make("FetchReach-v4", max_episode_steps=EPISODE_STEPS, **kwargs))
        self._way = np.zeros(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        self._look_at(observation)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, *results = self.env.step(action)
        self._look_at(observation)
        return observation, *results

    def create_demo_segments(self) -> Iterator[Segment]:
        """Plan each action when it is requested, from the state that the previous actions have reached."""
        yield Segment(self._reach(), "reach", "Move the gripper to the red dot.")
        yield Segment(self._hold(), "hold", "Hold the gripper at the red dot.")

    def _reach(self) -> Iterator[np.ndarray]:
        yield self._towards_goal()
        while np.linalg.norm(self._way) > NEAR:
            yield self._towards_goal()

    def _hold(self) -> Iterator[np.ndarray]:
        while True:
            yield self._towards_goal()

    def _towards_goal(self) -> np.ndarray:
        return np.append(GAIN * self._way, 0.0).clip(-1.0, 1.0).astype(np.float32)

    def _look_at(self, observation: dict[str, np.ndarray]) -> None:
        self._way = observation["desired_goal"] - observation["achieved_goal"]


gymnasium.register("ReachExpert-v0", entry_point=ReachExpert)
