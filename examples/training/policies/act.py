"""ACT, Action Chunking with Transformers (Zhao et al., 2023), with TorchRL's model and loss."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.modules.models import ACTModel
from torchrl.objectives import ACTLoss

from policies.base import ChunkPolicy


class ACTPolicy(ChunkPolicy):
    """Far smaller than the model of the paper: two layers of width 64.

    Args:
        features: the size of what the state consists of beside the observations that are scaled.
        kl_weight: the weight of the KL divergence in the loss.
    """

    learning_rate = 5e-4
    loss_name = "L1 error + KL"

    def __init__(
        self, state_dim: int, action_dim: int, chunk_size: int, features: int = 0, kl_weight: float = 10.0
    ) -> None:
        super().__init__(state_dim, action_dim, chunk_size)
        model = ACTModel(
            state_dim + features,
            action_dim,
            chunk_size,
            hidden_dim=64,
            nheads=4,
            num_encoder_layers=1,
            num_decoder_layers=1,
            latent_dim=8,
            dropout=0.0,
        )
        actor = TensorDictModule(
            model, in_keys=["observation", "action_chunk"], out_keys=["action_pred", "mu", "log_var"]
        )
        # The loss holds the weights. Storing the model as well would duplicate them when this module is copied.
        self.objective = ACTLoss(actor, kl_weight=kl_weight)
        self.objective.set_keys(action_chunk="action")

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        observed = TensorDict({"observation": state}, [len(state)])
        with self.objective.actor_network_params.to_module(self.objective.actor_network):
            return self.objective.actor_network(observed)["action_pred"]

    def imitation_loss(self, state: torch.Tensor, actions: torch.Tensor, is_pad: torch.Tensor) -> torch.Tensor:
        batch = TensorDict({"observation": state, "action": actions}, [len(state)])
        return self.objective(batch)["loss_act"]
