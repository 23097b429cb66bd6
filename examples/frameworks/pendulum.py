"""What the recipes of this folder share: a live source of episodes, and a model that learns from their chunks."""

from __future__ import annotations

import torch
from torch import nn

from embodichain_rl import OnlineDataEngine, OnlineDataEngineCfg


def make_engine(seed: int | None = None) -> OnlineDataEngine:
    """Return an engine in which a pendulum is pushed at random, on a thread of this process."""
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=32,
            max_episode_steps=100,
            gym_config={"id": "Pendulum-v1", "max_episode_steps": 100},
            num_workers=0,
            refill_threshold=32.0,  # a new episode for each batch of 32 chunks
            seed=seed,
            progress_bar=False,
        )
    )


class Dynamics(nn.Module):
    """Predicts how an observation changes under an action."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 3))

    def forward(self, **batch: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss of a batch of chunks, as a dict, which is what Hugging Face's Trainer takes.

        Args:
            batch: a flat dict of a dataset with ``as_dict=True``.
        """
        change = batch["next.observation"] - batch["observation"]
        predicted = self.net(torch.cat([batch["observation"], batch["action"]], dim=-1))
        return {"loss": nn.functional.mse_loss(predicted, change)}


def report(losses: list[float]) -> None:
    """Print the mean loss of the first and of the last ten steps."""
    first, last = (sum(part) / len(part) for part in (losses[:10], losses[-10:]))
    print(f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps", flush=True)
