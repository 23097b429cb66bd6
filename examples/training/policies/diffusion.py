"""A diffusion policy (Chi et al., 2023), with TorchRL's actor and loss. It denoises actions step by step."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import DiffusionActor
from torchrl.objectives import DiffusionBCLoss

from policies.base import ChunkPolicy

DENOISING_STEPS = 20
LAST_BETA = 0.4
"""The end of the linear schedule. The noise level must be high enough to remove the action, since denoising starts from
pure noise."""


class DiffusionPolicy(ChunkPolicy):
    """A policy that denoises whole chunks."""

    loss_name = "MSE of the noise"

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int, width: int = 256) -> None:
        super().__init__(state_dim, action_dim, chunk_size)
        size = chunk_size * action_dim
        noise = nn.Sequential(
            nn.Linear(size + state_dim + 1, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, size),
        )
        actor = DiffusionActor(size, score_network=noise, num_steps=DENOISING_STEPS, beta_end=LAST_BETA)
        # The loss holds the weights. Storing the actor as well would duplicate them when this module is copied.
        self.objective = DiffusionBCLoss(actor)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        observed = TensorDict({"observation": state}, [len(state)])
        with self.objective.actor_network_params.to_module(self.objective.actor_network):
            return self.objective.actor_network(observed)["action"].unflatten(-1, self.chunk_shape)

    def imitation_loss(self, state: torch.Tensor, actions: torch.Tensor, is_pad: torch.Tensor) -> torch.Tensor:
        batch = TensorDict({"observation": state, "action": actions.flatten(1)}, [len(state)])
        return self.objective(batch)["loss_diffusion_bc"]
