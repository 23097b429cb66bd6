"""The common parts of the trainings with chunk policies: collecting demonstrations, sampling them, and the learner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from interrupts import ctrl_c_waits
from policies import POLICIES, ChunkPolicy
from tensordict import TensorDictBase
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from embodichain_rl.datasets import OnlineDataset
from embodichain_rl.engine.data import OnlineDataEngine, OnlineDataEngineCfg

ENVIRONMENT = "expert_env:PickAndPlaceExpert-v0"
STATE_DIM, ACTION_DIM, EPISODE_STEPS = 28, 4, 50  # of FetchPickAndPlace

EVALUATION_SEEDS = 1_000_000
"""Number of evaluation seeds per training seed. Different training seeds have disjoint evaluation seeds."""


@dataclass(frozen=True)
class LearningConfig:
    policy: Literal["mlp", "act", "diffusion"] = "mlp"
    """The policy: a perceptron, or TorchRL's ACT or diffusion policy."""
    device: str = "cpu"
    """The device of the training."""
    num_workers: int = 2
    """Number of processes in which the expert acts."""
    noise: float = 0.2
    """Standard deviation of the noise on the expert's actions, which are recorded without it."""
    buffer_size: int = 128
    """Number of episodes that the buffer of the stream keeps, the newest ones. Training starts when it is full."""
    refill_threshold: float = 500.0
    """Chunks sampled for each episode that is replaced. The experts wait when they are ahead, which leaves the cores
    to the learner: without this limit a slow learner would get a third of them."""
    chunk_size: int = 8
    """Number of actions that the policy plans at once."""
    actions_per_chunk: int = 4
    """Number of these actions that are executed before the policy plans again."""
    batch_size: int = 128
    """Chunks per update."""
    evaluation_episodes: int = 50
    """Episodes per evaluation."""


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
            progress_bar=False,  # the training already shows one
        )
    )


def make_policy(config: LearningConfig, seed: int) -> ChunkPolicy:
    torch.manual_seed(seed)
    return POLICIES[config.policy](STATE_DIM, ACTION_DIM, config.chunk_size).to(config.device)


def make_loader(
    policy: ChunkPolicy, source: Any, batch_size: int, seed: int, transform: Any = None
) -> DataLoader[TensorDictBase]:
    """Iterate over batches of observations with the actions that follow them, from an engine or a buffer."""
    # The actions that follow each observation, also beyond the end of the episode. Other keys are not even copied.
    keys = policy.state_keys + policy.image_keys
    windows = {**dict.fromkeys(keys, (0, 0)), "action": (0, policy.chunk_shape[0] - 1)}
    dataset = OnlineDataset(
        source, chunk_size=None, batch_size=batch_size, windows=windows, pad="after", seed=seed, transform=transform
    )
    return DataLoader(dataset, batch_size=None)


def evaluation_seed(seed: int) -> int:
    """Return the seed of the first evaluated episode of a training. The following ones count up from it."""
    return (seed + 1) * EVALUATION_SEEDS


class Learner:
    """A policy and its training.

    Args:
        policy: the policy, which is on the device of the training.

    Attributes:
        policy: the trained policy.
        averaged: the moving average of its weights. It is the one that is evaluated, since it acts more steadily.
    """

    def __init__(self, policy: ChunkPolicy) -> None:
        self.policy = policy
        self._device = next(policy.parameters()).device
        self._average = AveragedModel(self.policy, multi_avg_fn=get_ema_multi_avg_fn(0.995))
        self.averaged = self._average.module
        self._optimizer = torch.optim.Adam(self.policy.parameters(), lr=self.policy.learning_rate, fused=True)

    def anneal(self, done: float) -> None:
        """Lower the learning rate along a cosine, to a hundredth when all of the training is `done`, which is 1."""
        factor = 0.01 + 0.99 * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        for group in self._optimizer.param_groups:
            group["lr"] = factor * self.policy.learning_rate

    @ctrl_c_waits()
    def update(self, batch: TensorDictBase) -> float:
        """Make an update and return the loss."""
        loss = self.policy.loss(batch.to(self._device))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        self._average.update_parameters(self.policy)
        return loss.item()
