"""Small environments that plan their own demonstrations, one for each of the two methods and a batched one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

STEP_SIZE = 0.1  # the way of one step with the largest action
REACHED = 0.02  # a point nearer to its goal than this has reached it


@dataclass
class DemoSegment:
    actions: Any
    name: str
    instruction: str


class Reach(gymnasium.Env):
    """A point in the plane that should go to a goal; ``info["success"]`` says whether it is there.

    Like many a simulator, it writes every observation (position and goal, float32 ``[4]``) into the same memory.

    Args:
        bad_plans: how many plans go wrong before one is right.
        way: how a plan goes wrong: "none", "empty", "raise", or "miss", which ends beside the goal.
    """

    observation_space = gymnasium.spaces.Box(-2.0, 2.0, (4,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, bad_plans: int = 0, way: str = "none") -> None:
        self._state = np.zeros(4, np.float32)
        self._bad_plans = bad_plans
        self._way = way

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._state[:2] = 0.0
        self._state[2:] = self.np_random.uniform(0.2, 1.0, 2)
        return self._state, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._state[:2] += STEP_SIZE * np.asarray(action)
        distance = float(np.linalg.norm(self._state[2:] - self._state[:2]))
        return self._state, -distance, False, False, {"success": distance < REACHED}

    def _plan_goes_wrong(self) -> bool:
        self._bad_plans -= 1
        if self._bad_plans < 0:
            return False
        if self._way == "raise":
            raise RuntimeError("no collision-free path")
        return True

    def _actions_to(self, goal: np.ndarray) -> np.ndarray:
        """As few equal actions ``[T, 2]`` as lead from here to ``goal``."""
        way = goal - self._state[:2]
        num_steps = int(np.ceil(np.abs(way).max() / STEP_SIZE))
        return np.repeat(way[None] / (num_steps * STEP_SIZE), num_steps, axis=0)


class ActionListReach(Reach):
    def create_demo_action_list(self) -> np.ndarray | list | None:
        goal = self._state[2:].copy()
        if self._plan_goes_wrong():
            if self._way == "miss":
                return self._actions_to(goal - 0.1)
            return [] if self._way == "empty" else None
        return self._actions_to(goal)


class SegmentReach(Reach):
    """Goes to the goal along the axes; the second segment is planned where the first one has led."""

    def create_demo_segments(self) -> Iterator[DemoSegment]:
        corner = np.array([self._state[2], 0.0], np.float32)
        yield DemoSegment(self._actions_to(corner), "approach", "Go below the goal.")
        if self._plan_goes_wrong():
            if self._way == "none":
                return  # below the goal, but not at it
            yield DemoSegment([], "rise", "Rise to the goal.")
        yield DemoSegment(iter(self._actions_to(self._state[2:])), "rise", "Rise to the goal.")


class Reporting(gymnasium.Wrapper):
    """A pendulum whose ``info`` says ``value`` of success, whatever happens."""

    def __init__(self, value: Any) -> None:
        super().__init__(gymnasium.make("Pendulum-v1"))
        self.value = value

    def step(self, action: Any) -> tuple:
        *results, _ = super().step(action)
        return *results, {"is_success": self.value}


class RowsReach(EnvBase):
    """Three points in one simulator; the goal of the last is further away than its demonstration goes."""

    def __init__(self) -> None:
        super().__init__(batch_size=[3])
        self.observation_spec = Composite(
            observation=Unbounded(shape=(3, 1)), success=Categorical(2, shape=(3, 1), dtype=torch.bool), shape=(3,)
        )
        self.action_spec = Bounded(-1.0, 1.0, shape=(3, 1))
        self.reward_spec = Unbounded(shape=(3, 1))
        self.goal = torch.tensor([[2.0], [4.0], [9.0]])

    def _reset(self, tensordict: TensorDictBase | None, **kwargs: Any) -> TensorDictBase:
        self.position = torch.zeros(3, 1)
        return TensorDict({"observation": self.position.clone(), "success": torch.zeros(3, 1, dtype=torch.bool)}, [3])

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self.position += tensordict["action"]
        reached = self.position >= self.goal
        return TensorDict(
            {"observation": self.position.clone(), "success": reached, "reward": -self.goal, "done": reached}, [3]
        )

    def _set_seed(self, seed: int | None) -> None:
        pass

    def create_demo_action_list(self) -> torch.Tensor:
        return torch.ones(6, 3, 1)


gymnasium.register("ActionListReach-v0", entry_point=ActionListReach, max_episode_steps=50)
gymnasium.register("SegmentReach-v0", entry_point=SegmentReach, max_episode_steps=50)
gymnasium.register("Reporting-v0", entry_point=Reporting)
