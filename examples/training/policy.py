"""A small policy that answers an observation with a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn

STATE_KEYS = ("observation", "desired_goal")
"""What the policy sees: the robot and the cube, and where the cube should go."""


class RunningNormalizer(nn.Module):
    """Scales inputs `[N, size]` by the mean and standard deviation of all that it was shown.

    A stream has no statistics to begin with, so they are gathered along the way (Chan et al., the parallel algorithm).
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


class ChunkPolicy(nn.Module):
    """An MLP from the state, `[N, state_dim]`, to the next `chunk_size` actions, `[N, chunk_size, action_dim]`."""

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int, width: int = 256) -> None:
        super().__init__()
        self.normalizer = RunningNormalizer(state_dim)
        self.layers = nn.Sequential(
            nn.Linear(state_dim, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, chunk_size * action_dim),
            nn.Unflatten(-1, (chunk_size, action_dim)),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return self.layers(self.normalizer(state))

    def loss(self, batch: TensorDictBase) -> torch.Tensor:
        """How far its actions are from the expert's, in `[N]` states with the actions that followed; notes the states.

        The absolute error: where the expert does now one thing, now the other, its minimum is one of them, and not a
        half-closed gripper.
        """
        state = torch.cat([batch[key][:, 0] for key in STATE_KEYS], -1)
        self.normalizer.show(state)
        errors = nn.functional.l1_loss(self(state), batch["action"], reduction="none")
        return errors[~batch["action_is_pad"]].mean()

    @torch.no_grad()
    def act(self, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """The next actions, `[chunk_size, action_dim]`, after one observation of the environment."""
        state = torch.from_numpy(np.concatenate([observation[key] for key in STATE_KEYS]))
        return self(state[None])[0].clamp(-1.0, 1.0).numpy()
