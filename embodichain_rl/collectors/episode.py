"""The recording of one episode in one environment, in preallocated memory; see ``rollout.py``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.schema import Key, Nest, StepField, as_array

__all__ = ["STEP_COUNT", "TRAJ_IDS", "Episode"]

FIRST_CAPACITY = 256
"""Initial capacity, in steps."""

STEP_COUNT: Key = ("step_count",)
"""The key of the step count of a ``StepCounter``."""

TRAJ_IDS: Key = ("collector", "traj_ids")
"""The key under which TorchRL's collectors write the trajectory id of a step."""


class Episode:
    """The steps of one episode, in memory that is reused by the next episode.

    The observation after a step is also the observation before the next step. It is stored once and returned under both
    keys.

    Args:
        observed: the fields of an observation, without batch dimensions.
        counts_steps: whether the steps have a ``"step_count"``.
        reward_dtype: dtype of the reward, which has the shape ``[1]`` at each step.

    Attributes:
        steps (int): number of steps recorded so far.
        traj_id (int): trajectory id of the episode.
        newest (Sequence[np.ndarray]): the latest observation, ``[*shape]`` for each field.
    """

    def __init__(self, observed: Sequence[StepField], counts_steps: bool, reward_dtype: torch.dtype) -> None:
        self.steps = 0
        self.traj_id = 0
        self.newest: Sequence[np.ndarray] = ()
        self._counts_steps = counts_steps
        self._capacity = FIRST_CAPACITY
        self._observed = list(observed)
        self._reward = StepField(("next", "reward"), (1,), reward_dtype)
        self._observations = [_Column(field, self._capacity + 1) for field in observed]
        self._rewards = _Column(self._reward, self._capacity)
        self._make_constants()
        self.set_policy_fields([])

    def set_policy_fields(self, decided: Sequence[StepField]) -> None:
        """Set the fields that the policy writes at each step."""
        self._decided = list(decided)
        self._decisions = [_Column(field, self._capacity) for field in decided]
        counts = [STEP_COUNT] if self._counts_steps else []
        keys = [field.key for field in self._observed] + counts
        self._nest = Nest(
            [
                *keys,
                *(("next", *key) for key in keys),
                *(field.key for field in (*self._decided, self._reward)),
                TRAJ_IDS,
                *((*where, name) for where in ((), ("next",)) for name in ("done", "terminated", "truncated")),
            ]
        )

    def _make_constants(self) -> None:
        """Allocate the entries that are the same, or nearly the same, in every episode."""
        self._ids = torch.zeros(self._capacity, dtype=torch.int64)
        self._counts = torch.arange(self._capacity + 1).unsqueeze(1)
        self._false, self._ending = torch.zeros(2, self._capacity, 1, dtype=torch.bool)

    def begin(self, observed: Sequence[np.ndarray], traj_id: int) -> None:
        """Start a new episode with its first observation, and discard the previous episode."""
        self.steps = 0
        self.traj_id = traj_id
        self.newest = observed
        for column, value in zip(self._observations, observed, strict=True):
            column.array[0] = value

    def add(self, decided: Sequence[np.ndarray], observed: Sequence[np.ndarray], reward: float) -> None:
        """Add a step: the outputs of the policy, the observation after the step, and the reward."""
        step = self.steps
        if step == self._capacity:
            self._grow()
        for column, value in zip(self._decisions, decided, strict=True):
            column.array[step] = value
        self._rewards.array[step] = reward
        self.steps = step = step + 1
        self.newest = observed
        for column, value in zip(self._observations, observed, strict=True):
            column.array[step] = value

    def trajectory(self, terminated: bool, truncated: bool) -> TensorDict:
        """Return the whole episode, ``[T]``, whose last step ended it.

        Some keys share memory, and the next episode overwrites all of it.
        """
        steps = self.steps
        false, ending = self._false.narrow(0, 0, steps), self._ending.narrow(0, 0, steps)
        self._ending.zero_()
        self._ending[steps - 1] = True
        ids = self._ids.narrow(0, 0, steps).fill_(self.traj_id)
        twice = [column.tensor for column in self._observations]
        if self._counts_steps:
            twice.append(self._counts)
        values = [
            *(tensor.narrow(0, 0, steps) for tensor in twice),
            *(tensor.narrow(0, 1, steps) for tensor in twice),
            *(column.tensor.narrow(0, 0, steps) for column in (*self._decisions, self._rewards)),
            ids,
            *(false, false, false),
            *(ending, ending if terminated else false, ending if truncated else false),
        ]
        return self._nest.build(values, [steps])

    def _grow(self) -> None:
        self._capacity *= 2
        for column in self._observations:
            column.grow(self._capacity + 1)
        for column in (*self._decisions, self._rewards):
            column.grow(self._capacity)
        self._make_constants()


class _Column:
    """The values of one entry, ``[steps, *shape]``, as an array and a tensor over the same memory."""

    def __init__(self, field: StepField, steps: int) -> None:
        self.tensor = torch.empty((steps, *field.shape), dtype=field.dtype)
        self.array = as_array(self.tensor)

    def grow(self, steps: int) -> None:
        grown = self.tensor.new_empty((steps, *self.tensor.shape[1:]))
        grown[: len(self.tensor)] = self.tensor
        self.tensor, self.array = grown, as_array(grown)
