"""The episode under way in one environment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from embodichain_rl.replay.schema import Key, StepField
from embodichain_rl.replay.windows import as_array, as_tensor

__all__ = ["STEP_COUNT", "TRAJ_IDS", "Episode"]

FIRST_CAPACITY = 256
"""Steps that there is room for at first."""

STEP_COUNT: Key = ("step_count",)
"""Where a ``StepCounter`` counts."""

TRAJ_IDS: Key = ("collector", "traj_ids")
"""Where TorchRL's collectors write which trajectory a step belongs to."""


class Episode:
    """The steps of one episode, written into arrays that all episodes use one after the other.

    An observation is the one after a step and the one before the next: it is kept once, and handed out as both.

    Args:
        observed: what is observed before the first step and after each one.
        counts_steps: whether there is a ``"step_count"``.
        reward_dtype: of the reward, ``[1]`` a step.

    Attributes:
        steps (int): how many there are.
        traj_id (int): the episode's.
        newest (Sequence[np.ndarray]): what was observed last, ``[*shape]`` each.
    """

    def __init__(self, observed: Sequence[StepField], counts_steps: bool, reward_dtype: torch.dtype) -> None:
        self.steps = 0
        self.traj_id = 0
        self.newest: Sequence[np.ndarray] = ()
        self._counts_steps = counts_steps
        self._capacity = FIRST_CAPACITY
        self._observed = list(observed)
        self._decided: list[StepField] = []
        self._reward = StepField(("next", "reward"), (1,), reward_dtype)
        self._observations = [_array(field, self._capacity + 1) for field in self._observed]
        self._decisions: list[np.ndarray] = []
        self._rewards = _array(self._reward, self._capacity)

    def expect(self, decided: Sequence[StepField]) -> None:
        """Says what the policy will write at each step."""
        self._decided = list(decided)
        self._decisions = [_array(field, self._capacity) for field in decided]

    def begin(self, observed: Sequence[np.ndarray], traj_id: int) -> None:
        """Begins with what is observed before the first step; forgets the episode before."""
        self.steps = 0
        self.traj_id = traj_id
        self.newest = observed
        for array, value in zip(self._observations, observed, strict=True):
            array[0] = value

    def add(self, decided: Sequence[np.ndarray], observed: Sequence[np.ndarray], reward: float) -> None:
        """Adds a step: what the policy wrote for it, and what came of it."""
        step = self.steps
        if step == self._capacity:
            self._grow()
        for array, value in zip(self._decisions, decided, strict=True):
            array[step] = value
        self._rewards[step] = reward
        self.steps = step = step + 1
        self.newest = observed
        for array, value in zip(self._observations, observed, strict=True):
            array[step] = value

    def trajectory(self, terminated: bool, truncated: bool) -> dict[Key, torch.Tensor]:
        """The whole episode, which ended with its last step: of each key a tensor ``[T, *shape]``.

        Its memory is used again by the next one, and some keys share it.
        """
        steps = self.steps
        false, ending = torch.zeros(2, steps, 1, dtype=torch.bool)
        ending[-1] = True
        data: dict[Key, torch.Tensor] = {("next", "done"): ending, TRAJ_IDS: torch.full((steps,), self.traj_id)}
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            data["next", name] = ending if end else false
        for name in ("done", "terminated", "truncated"):
            data[name,] = false
        for field, array in zip(self._observed, self._observations, strict=True):
            tensor = as_tensor(array[: steps + 1], field.dtype)
            data[field.key], data["next", *field.key] = tensor[:-1], tensor[1:]
        for field, array in zip(self._decided, self._decisions, strict=True):
            data[field.key] = as_tensor(array[:steps], field.dtype)
        data[self._reward.key] = as_tensor(self._rewards[:steps], self._reward.dtype)
        if self._counts_steps:
            counts = torch.arange(steps + 1).unsqueeze(1)
            data[STEP_COUNT], data["next", *STEP_COUNT] = counts[:-1], counts[1:]
        return data

    def _grow(self) -> None:
        self._capacity *= 2
        self._observations = [_grown(array, self._capacity + 1) for array in self._observations]
        self._decisions = [_grown(array, self._capacity) for array in self._decisions]
        self._rewards = _grown(self._rewards, self._capacity)


def _array(field: StepField, steps: int) -> np.ndarray:
    return as_array(torch.empty((steps, *field.shape), dtype=field.dtype))


def _grown(array: np.ndarray, steps: int) -> np.ndarray:
    grown = np.empty((steps, *array.shape[1:]), dtype=array.dtype)
    grown[: len(array)] = array
    return grown
