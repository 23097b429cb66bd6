"""What the trainings of pick and place share: where demonstrations come from, how they are drawn, and who learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from evaluation import ENVIRONMENT
from interrupts import ctrl_c_waits
from policies import POLICIES, STATE_KEYS
from tensordict import TensorDictBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg

STATE_DIM, ACTION_DIM, EPISODE_STEPS = 28, 4, 50  # of FetchPickAndPlace

EVALUATION_SEEDS = 1_000_000
"""Each training seed has as many seeds for its evaluations, and none of them in common with another's."""


@dataclass(frozen=True)
class LearningConfig:
    policy: Literal["mlp", "act", "diffusion"] = "mlp"
    """What is trained: a perceptron, or TorchRL's ACT or diffusion policy."""
    device: str = "cpu"
    """Where it is trained."""
    num_workers: int = 2
    """Processes in which the expert acts."""
    noise: float = 0.2
    """Standard deviation of what is added to the expert's actions, which are recorded without it."""
    buffer_size: int = 128
    """Episodes that the buffer of the stream keeps, the newest; training begins when it is full."""
    refill_threshold: float = 500.0
    """Chunks drawn for each episode that is replaced. The experts wait when they are ahead, and leave the cores to the
    learner: without it a slow one would get a third of them."""
    chunk_size: int = 8
    """Actions that the policy plans at once."""
    actions_per_chunk: int = 4
    """How many of them are taken before it plans anew."""
    batch_size: int = 128
    """Chunks of an update."""
    evaluation_episodes: int = 50
    """Episodes of one evaluation."""


def make_engine(config: LearningConfig, buffer_size: int, seed: int) -> OnlineDataEngine:
    return OnlineDataEngine(
        OnlineDataEngineCfg(
            buffer_size=buffer_size,
            max_episode_steps=EPISODE_STEPS,
            gym_config={"id": ENVIRONMENT, "kwargs": {"noise": config.noise}},
            num_workers=config.num_workers,
            policy="demo",
            refill_threshold=config.refill_threshold,
            seed=seed,
            progress_bar=False,  # the training has one
        )
    )


def make_loader(config: LearningConfig, source: Any, seed: int) -> DataLoader[TensorDictBase]:
    """Batches of observations with the actions that follow them, out of an engine or a buffer."""
    # Of each observation the actions that follow, beyond the episode's end as well; other keys are not even copied.
    windows = {**dict.fromkeys(STATE_KEYS, (0, 0)), "action": (0, config.chunk_size - 1)}
    dataset = OnlineDataset(
        source, chunk_size=None, batch_size=config.batch_size, windows=windows, pad="after", seed=seed
    )
    return DataLoader(dataset, batch_size=None)


def evaluation_seed(seed: int) -> int:
    """Of the first episode that a training evaluates; the others count on from it."""
    return (seed + 1) * EVALUATION_SEEDS


class Learner:
    """A policy, and how it is updated.

    Attributes:
        policy: what is trained.
        averaged: the moving average of its weights, which is what is evaluated: it acts more steadily.
    """

    def __init__(self, config: LearningConfig, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy = POLICIES[config.policy](STATE_DIM, ACTION_DIM, config.chunk_size).to(config.device)
        self._average = AveragedModel(self.policy, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        self.averaged = self._average.module
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.policy.learning_rate, fused=True)
        self._device = config.device

    @ctrl_c_waits()
    def update(self, batch: TensorDictBase) -> float:
        """Returns the loss."""
        loss = self.policy.loss(batch.to(self._device))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._average.update_parameters(self.policy)
        return loss.item()
