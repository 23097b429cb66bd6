"""ACT that sees images: a small convolutional encoder, which says where in the image things are, in front of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from policies.act import ACTPolicy

SHARPNESS = 10.0
"""Factor of the feature maps. Without it, each softmax is nearly uniform at first, and tells nothing of the image."""


class WhereEncoder(nn.Module):
    """Encode images, uint8 `[N, H, W, 3]`, as the places of `features` things, `[N, 2 * features]` in -1 to 1.

    The last layer is a spatial softmax: the mean place in each feature map, weighted by its softmax (Levine et al.,
    2016, "End-to-End Training of Deep Visuomotor Policies").
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, features, 3, padding=1),
        ).to(memory_format=torch.channels_last)  # the layout of the images

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.layers(images.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        weights = (SHARPNESS * maps.flatten(2)).softmax(-1).view_as(maps)
        down, across = (torch.linspace(-1.0, 1.0, size, device=maps.device) for size in maps.shape[2:])
        return torch.cat([weights.sum(3) @ down, weights.sum(2) @ across], -1)


class PixelACTPolicy(ACTPolicy):
    """The state is what the camera shows, and the angles of the robot's joints."""

    state_keys = ("joints",)
    image_keys = ("pixels",)
    learning_rate = 2e-3

    def __init__(self, state_dim: int, action_dim: int, chunk_size: int, features: int = 32) -> None:
        # The expert acts in one way only. With the paper's weight of 10, the images are not looked at for a while.
        super().__init__(state_dim, action_dim, chunk_size, 2 * features, kl_weight=0.1)
        self.encoder = WhereEncoder(features)
        size = state_dim + 2 * features
        self.mixer = nn.Sequential(nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, size))

    def encode(self, seen: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return self.mixer(torch.cat([self.encoder(seen["pixels"]), super().encode(seen)], -1))
