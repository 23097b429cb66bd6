"""The episode under way in one environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict

from embodichain_rl.replay.schema import Key

__all__ = ["STEP_COUNT", "TRAJ_IDS", "Episode"]

STEP_COUNT: Key = ("step_count",)
"""Where a ``StepCounter`` counts."""

TRAJ_IDS: Key = ("collector", "traj_ids")
"""Where TorchRL's collectors write which trajectory a step belongs to."""


class Episode:
    """The steps of one episode, as lists until it ends.

    An observation is the one after a step and the one before the next: it is kept once, and handed out as both.

    Args:
        observed: the keys of what is observed before the first step and after each one.
        decided: the keys of what the policy writes at each step.
        counts_steps: whether there is a ``"step_count"``.
        reward_dtype: of the reward, ``[1]`` a step.

    Attributes:
        traj_id (int): the episode's.
        observations (list[list[torch.Tensor]]): of each key of ``observed``, one tensor more than there are steps.
        decisions (list[list[torch.Tensor]]): of each key of ``decided``, one tensor a step.
        rewards (list[float]): one a step.
    """

    def __init__(
        self, observed: Sequence[Key], decided: Sequence[Key], counts_steps: bool, reward_dtype: torch.dtype
    ) -> None:
        self.traj_id = 0
        self.observations: list[list[torch.Tensor]] = [[] for _ in observed]
        self.decisions: list[list[torch.Tensor]] = [[] for _ in decided]
        self.rewards: list[float] = []
        self._observed = [_Stack(key) for key in observed]
        self._decided = [_Stack(key) for key in decided]
        self._counts_steps = counts_steps
        self._reward_dtype = reward_dtype

    def begin(self, observed: Sequence[torch.Tensor], traj_id: int) -> None:
        """Begins with what is observed before the first step; forgets the episode before."""
        self.traj_id = traj_id
        self.rewards.clear()
        for values in self.decisions:
            values.clear()
        for values, first in zip(self.observations, observed, strict=True):
            values[:] = [first]

    def trajectory(self, terminated: bool, truncated: bool) -> TensorDict:
        """The whole episode, ``[T]``, which ended with its last step. Its memory is used again by the next one."""
        steps = len(self.rewards)
        root: dict[str, Any] = {}
        following: dict[str, Any] = {"reward": torch.tensor(self.rewards, dtype=self._reward_dtype).unsqueeze(1)}
        for stack, values in zip(self._observed, self.observations, strict=True):
            stacked = stack.of(values)
            _set(root, stack.key, stacked[:-1])
            _set(following, stack.key, stacked[1:])
        for stack, values in zip(self._decided, self.decisions, strict=True):
            _set(root, stack.key, stack.of(values))
        if self._counts_steps:
            counts = torch.arange(steps + 1).unsqueeze(1)
            _set(root, STEP_COUNT, counts[:-1])
            _set(following, STEP_COUNT, counts[1:])
        _set(root, TRAJ_IDS, torch.full((steps,), self.traj_id))
        for name, end in (("done", True), ("terminated", terminated), ("truncated", truncated)):
            root[name] = torch.zeros(steps, 1, dtype=torch.bool)
            following[name] = torch.zeros(steps, 1, dtype=torch.bool)
            following[name][-1] = end
        return TensorDict({**root, "next": following}, [steps])


class _Stack:
    """Stacks the tensors of one key, in memory that is used again: large trajectories would take fresh pages each."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self._memory = torch.empty(0)

    def of(self, values: list[torch.Tensor]) -> torch.Tensor:
        first = values[0]
        memory = self._memory
        if len(memory) < len(values) or memory.shape[1:] != first.shape or memory.dtype != first.dtype:
            memory = self._memory = torch.empty((len(values), *first.shape), dtype=first.dtype)
        return torch.stack(values, out=memory[: len(values)])


def _set(data: dict[str, Any], key: Key, value: torch.Tensor) -> None:
    for part in key[:-1]:
        data = data.setdefault(part, {})
    data[key[-1]] = value
