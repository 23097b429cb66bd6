"""The learner of the table examples: a policy that imitates what the expert would do in each state of a batch."""

from __future__ import annotations

import torch
from interrupts import ctrl_c_waits
from policies.base import RunningNormalizer
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class ClonedPolicy(nn.Module):
    """A perceptron from observations `[N, size]` to actions `[N, 2]`."""

    def __init__(self, size: int, width: int = 256) -> None:
        super().__init__()
        self.normalizer = RunningNormalizer(size)
        self.layers = nn.Sequential(
            nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2)
        )

    def forward(self, observation: torch.Tensor) -> torch.Tensor:
        return self.layers(self.normalizer(observation)).clamp(-1.0, 1.0)


class Cloner:
    """A policy and its training.

    Attributes:
        policy: the trained policy.
        averaged: the moving average of its weights, which is evaluated.
    """

    def __init__(self, size: int, updates: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy = ClonedPolicy(size)
        self._average = AveragedModel(self.policy, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
        self.averaged: ClonedPolicy = self._average.module
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=1e-3, fused=True)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, updates, 5e-5)

    @ctrl_c_waits()
    def update(self, observation: torch.Tensor, wanted: torch.Tensor) -> float:
        """Make an update towards the expert's actions `[N, 2]`, and return the mean absolute error."""
        self.policy.normalizer.show(observation)
        loss = nn.functional.l1_loss(self.policy.layers(self.policy.normalizer(observation)), wanted)
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._schedule.step()
        self._average.update_parameters(self.policy)
        return loss.item()
