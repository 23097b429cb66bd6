"""Gymnasium's Pendulum-v1 as a batch of any size, in torch operations on any device."""

from __future__ import annotations

import math

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

__all__ = ["BatchedPendulum"]

MAX_SPEED, MAX_TORQUE, DT, GRAVITY = 8.0, 2.0, 0.05, 10.0  # rad/s, Nm, s, m/s²; the rod has 1 m and 1 kg


class BatchedPendulum(EnvBase):
    """``count`` pendulums, each truncated after ``max_steps`` steps.

    Observations are ``[count, 3]``, actions ``[count, 1]``. The ends of the first episodes are spread over the length
    of an episode, so that later some episodes end at every step.
    """

    def __init__(self, count: int, *, device: torch.device | str = "cpu", max_steps: int = 200, seed: int = 0) -> None:
        super().__init__(device=device, batch_size=[count])
        limit = torch.tensor([1.0, 1.0, MAX_SPEED], device=self.device).expand(count, 3)
        torque = torch.full((count, 1), MAX_TORQUE, device=self.device)
        flag = Binary(n=1, shape=(count, 1), dtype=torch.bool, device=self.device)
        self.observation_spec = Composite(
            observation=Bounded(-limit, limit, device=self.device), shape=[count], device=self.device
        )
        self.action_spec = Bounded(-torque, torque, device=self.device)
        self.reward_spec = Unbounded(shape=(count, 1), device=self.device)
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=[count], device=self.device
        )
        self._max_steps = max_steps
        self.set_seed(seed)
        self.angle = torch.zeros(count, 1, device=self.device)
        self.speed = torch.zeros_like(self.angle)
        self._steps = torch.arange(count, device=self.device)[:, None] % max_steps
        self._has_begun = False

    def _set_seed(self, seed: int | None) -> None:
        self._generator = torch.Generator(self.device).manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: object) -> TensorDict:
        which = None if tensordict is None else tensordict.get("_reset", None)
        if which is None:
            which = torch.ones_like(self._steps, dtype=torch.bool)
        drawn = torch.rand(2, *self.angle.shape, generator=self._generator, device=self.device) * 2 - 1
        self.angle = torch.where(which, drawn[0] * math.pi, self.angle)
        self.speed = torch.where(which, drawn[1], self.speed)
        if self._has_begun:
            self._steps = torch.where(which, torch.zeros_like(self._steps), self._steps)
        self._has_begun = True
        never = torch.zeros_like(which)
        ends = {"done": never, "terminated": never.clone(), "truncated": never.clone()}
        return TensorDict({"observation": self._observe(), **ends}, self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        torque = tensordict["action"].clamp(-MAX_TORQUE, MAX_TORQUE)
        angle = (self.angle + math.pi) % (2 * math.pi) - math.pi
        cost = angle**2 + 0.1 * self.speed**2 + 0.001 * torque**2
        acceleration = 1.5 * GRAVITY * self.angle.sin() + 3.0 * torque
        self.speed = (self.speed + acceleration * DT).clamp(-MAX_SPEED, MAX_SPEED)
        self.angle = self.angle + self.speed * DT
        self._steps = self._steps + 1
        over = self._steps >= self._max_steps
        ends = {"done": over, "terminated": torch.zeros_like(over), "truncated": over.clone()}
        return TensorDict(
            {"observation": self._observe(), "reward": -cost, **ends}, self.batch_size, device=self.device
        )

    def _observe(self) -> torch.Tensor:
        return torch.cat([self.angle.cos(), self.angle.sin(), self.speed], dim=-1)
