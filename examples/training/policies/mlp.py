"""The smallest policy that solves the task: a perceptron with three hidden layers."""

from __future__ import annotations

import torch
from torch import nn

from policies.base import ChunkPolicy


class MLPPolicy(ChunkPolicy):
    loss_name = "mean absolute error"

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int, width: int = 256) -> None:
        super().__init__(state_dim, action_dim, chunk_size)
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
        return self.layers(state)

    def imitation_loss(self, state: torch.Tensor, actions: torch.Tensor, is_pad: torch.Tensor) -> torch.Tensor:
        # The absolute error, since the expert's actions have several modes. Its minimum is one of the modes, not their
        # mean, such as a half-closed gripper.
        errors = nn.functional.l1_loss(self.layers(state), actions, reduction="none")
        return errors[~is_pad].mean()
