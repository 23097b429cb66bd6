"""The common parts of all policies: their inputs, the scaling of the inputs, and their interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from interrupts import ctrl_c_waits
from tensordict import TensorDictBase
from torch import nn

STATE_KEYS = ("observation", "desired_goal")
"""The inputs of a policy: the robot and the cube, and the goal of the cube."""


class RunningNormalizer(nn.Module):
    """Scale inputs `[N, size]` by the running mean and standard deviation.

    A stream has no statistics at the start, so they are updated during training (Chan et al., the parallel algorithm).
    """

    count: torch.Tensor
    mean: torch.Tensor
    squares: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))

    @torch.no_grad()
    def show(self, inputs: torch.Tensor) -> None:
        inputs = inputs.double()
        mean, count = inputs.mean(0), len(inputs)
        shift, total = mean - self.mean, self.count + count
        self.squares += ((inputs - mean) ** 2).sum(0) + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count.copy_(total)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        std = (self.squares / self.count.clamp(min=1)).sqrt() + 1e-4
        return ((inputs - self.mean) / std).float().clamp(-5.0, 5.0)


class ChunkPolicy(nn.Module, ABC):
    """A policy from the scaled state, `[N, state_dim]`, to the next actions, `[N, chunk_size, action_dim]`.

    Attributes:
        state_keys: the observations that the state consists of. They are scaled.
        image_keys: the observations that are images.
        learning_rate: a good one.
        loss_name: what :meth:`loss` returns.
    """

    state_keys: ClassVar[tuple[str, ...]] = STATE_KEYS
    image_keys: ClassVar[tuple[str, ...]] = ()
    learning_rate: ClassVar[float] = 1e-3
    loss_name: ClassVar[str]

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int) -> None:
        super().__init__()
        self.normalizer = RunningNormalizer(state_dim)
        self.chunk_shape = (chunk_size, action_dim)

    @abstractmethod
    def forward(self, state: torch.Tensor) -> torch.Tensor: ...

    def encode(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scaled state, given observations `[N, ...]`."""
        return self.normalizer(self._state(seen))

    def _state(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([seen[key] for key in self.state_keys], -1)

    @abstractmethod
    def imitation_loss(self, state: torch.Tensor, actions: torch.Tensor, is_pad: torch.Tensor) -> torch.Tensor:
        """Return the distance from the expert's `actions`, given scaled states.

        Actions after the end of an episode are padding. A padded action repeats the last one of the episode, which
        holds what was reached.
        """

    def loss(self, batch: TensorDictBase) -> torch.Tensor:
        """Return the loss of a batch `[N]` of observations and the actions after them, and update the statistics."""
        seen = {key: batch[key][:, 0] for key in self.state_keys + self.image_keys}
        self.normalizer.show(self._state(seen))
        return self.imitation_loss(self.encode(seen), batch["action"], batch["action_is_pad"])

    @ctrl_c_waits()
    @torch.no_grad()
    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the next actions, `[chunk_size, action_dim]`, after one observation of the environment."""
        seen = {key: torch.from_numpy(observation[key])[None] for key in self.state_keys + self.image_keys}
        return self(self.encode(seen))[0].clamp(-1.0, 1.0).numpy()
