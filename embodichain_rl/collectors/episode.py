"""The episode under way in one environment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.schema import Key, StepField
from embodichain_rl.replay.windows import as_array, as_tensor

__all__ = ["Episode"]

FIRST_CAPACITY = 256
"""Steps that there is room for at first."""


class Episode:
    """The steps of one episode at a time, each written once into arrays that are used for all episodes.

    An observation is the one after a step and the one before the next: it is kept once, and handed out as both.

    Args:
        observed: what is observed before the first step and after each one.
        counts_steps: whether ``"step_count"`` is among the keys.
        reward_dtype: of the reward, ``[1]`` a step.

    Attributes:
        steps (int): how many there are.
        traj_id (int): the episode's.
    """

    def __init__(self, observed: Sequence[StepField], counts_steps: bool, reward_dtype: torch.dtype) -> None:
        self.steps = 0
        self.traj_id = 0
        self._observed = list(observed)
        self._counts_steps = counts_steps
        self._reward_field = StepField(("next", "reward"), (1,), reward_dtype)
        self._decided: list[StepField] = []
        self._capacity = FIRST_CAPACITY
        self.observations = [_array(field, self._capacity + 1) for field in self._observed]
        self._rewards = _array(self._reward_field, self._capacity)
        self._decisions: list[np.ndarray] = []

    def expect(self, decided: Sequence[StepField]) -> None:
        """Says what the policy writes at each step."""
        self._decided = list(decided)
        self._decisions = [_array(field, self._capacity) for field in decided]

    def begin(self, observed: Iterable[Any], traj_id: int) -> None:
        """Begins with what is observed before the first step; forgets the episode before."""
        self.steps = 0
        self.traj_id = traj_id
        for array, value in zip(self.observations, observed, strict=True):
            array[0] = value

    def decide(self, decided: Iterable[Any]) -> None:
        """Takes what the policy wrote for the next step."""
        if self.steps == self._capacity:
            self._grow()
        step = self.steps
        for array, value in zip(self._decisions, decided, strict=True):
            array[step] = value

    def take(self, observed: Iterable[Any], reward: Any) -> None:
        """Takes what came of the step."""
        self._rewards[self.steps] = reward
        self.steps = step = self.steps + 1
        for array, value in zip(self.observations, observed, strict=True):
            array[step] = value

    def trajectory(self, terminated: bool, truncated: bool) -> TensorDict:
        """The whole episode, ``[T]``, which ended with the last step; a view, until the next one begins."""
        steps = self.steps
        false = torch.zeros(steps, 1, dtype=torch.bool)
        data: dict[Key, torch.Tensor] = {("done",): false, ("terminated",): false, ("truncated",): false}
        for field, array in zip(self._observed, self.observations, strict=True):
            tensor = as_tensor(array[: steps + 1], field.dtype)
            data[field.key], data["next", *field.key] = tensor[:-1], tensor[1:]
        for field, array in zip(self._decided, self._decisions, strict=True):
            data[field.key] = as_tensor(array[:steps], field.dtype)
        data["next", "reward"] = as_tensor(self._rewards[:steps], self._reward_field.dtype)
        for name, end in (("done", True), ("terminated", terminated), ("truncated", truncated)):
            data["next", name] = _ending_with(end, steps)
        if self._counts_steps:
            counts = torch.arange(steps + 1).unsqueeze(1)
            data["step_count",], data["next", "step_count"] = counts[:-1], counts[1:]
        data["collector", "traj_ids"] = torch.full((steps,), self.traj_id)
        return TensorDict(_nested(data), [steps])

    def _grow(self) -> None:
        self._capacity *= 2
        self.observations = [_grown(array, self._capacity + 1) for array in self.observations]
        self._decisions = [_grown(array, self._capacity) for array in self._decisions]
        self._rewards = _grown(self._rewards, self._capacity)


def _array(field: StepField, steps: int) -> np.ndarray:
    return as_array(torch.empty((steps, *field.shape), dtype=field.dtype))


def _grown(array: np.ndarray, steps: int) -> np.ndarray:
    grown = np.empty((steps, *array.shape[1:]), dtype=array.dtype)
    grown[: len(array)] = array
    return grown


def _ending_with(end: bool, steps: int) -> torch.Tensor:
    flags = torch.zeros(steps, 1, dtype=torch.bool)
    flags[-1] = end
    return flags


def _nested(data: dict[Key, torch.Tensor]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in data.items():
        node = nested
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value
    return nested
