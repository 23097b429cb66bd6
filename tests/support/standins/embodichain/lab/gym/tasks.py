"""A task with the contract of EmbodiChain's ``BaseEnv`` and ``EmbodiedEnv``, without a simulator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict


@dataclass(frozen=True)
class DemoSegment:
    actions: Any
    name: str = "segment"
    target_uid: str | None = None
    instruction: str | None = None
    metadata: dict = field(default_factory=dict)
    validator: Any = None
    abort_actions: Any = None
    failure_policy: str = "batch_abort"


@dataclass(frozen=True)
class ControllerAction:
    value: Any
    metadata: dict = field(default_factory=dict)

    def snapshot(self) -> ControllerAction:
        return ControllerAction(self.value.clone(), self.metadata)


class RowsOfArms(gymnasium.Env):
    """Arms with two joints, which follow position commands; a row is done when its first joint is at its target."""

    metadata: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, cfg: Any, scale: float = 1.0) -> None:
        assert not cfg.init_rollout_buffer
        assert cfg.filter_dataset_saving
        self.cfg = cfg
        self.num_envs = cfg.num_envs
        self.device = torch.device(cfg.sim_cfg.device)
        self.single_action_space = gymnasium.spaces.Box(-9.0, 9.0, (2,), np.float32)
        self.action_space = gymnasium.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.observation_space = gymnasium.spaces.Dict()
        self.resets: list[dict] = []
        self.scale = scale
        self.qpos = torch.zeros(self.num_envs, 2)
        self.elapsed = torch.zeros(self.num_envs, dtype=torch.int64)
        self.active = torch.ones(self.num_envs, dtype=torch.bool)

    def get_obs(self) -> TensorDict:
        n = self.num_envs
        gpu = torch.full((n, 1), self.cfg.sim_cfg.gpu_id)
        robot = TensorDict({"qpos": self.qpos}, [n])
        return TensorDict(
            {"robot": robot, "sensor": {"cam": {"color": torch.zeros(n, 2, 2, 3).byte()}}, "gpu": gpu}, [n]
        )

    def reset(self, seed: int | None = None, options: dict | None = None) -> tuple[TensorDict, dict]:
        super().reset(seed=seed)
        options = {} if options is None else dict(options)
        self.resets.append(options)
        assert options.get("save_data") is False
        rows = options.get("reset_ids", torch.arange(self.num_envs))
        self.qpos = self.qpos.clone()
        self.qpos[rows] = 0.0
        self.elapsed[rows] = 0
        return self.get_obs(), {}

    def step(self, action: Any) -> tuple:
        if isinstance(action, ControllerAction):
            action = action.value
        if isinstance(action, TensorDict):
            action = action["qpos"]
        assert isinstance(action, torch.Tensor)
        assert action.shape == (self.num_envs, 2)
        self.qpos = torch.where(self.active[:, None], action * self.scale, self.qpos)
        self.elapsed += 1
        target = 3.0 + torch.arange(self.num_envs)
        success = self.qpos[:, 0] == target
        obs, info = self.get_obs(), TensorDict({"success": success, "fail": self.qpos[:, 0] > 8}, [self.num_envs])
        truncated = self.elapsed >= self.cfg.max_episode_steps
        if not (getattr(self, "_demo_no_auto_reset", False) or getattr(self, "_replay_no_auto_reset", False)):
            done = (success | truncated).nonzero().flatten()
            if len(done):
                obs, _ = self.reset(options={"reset_ids": done, "save_data": False})
        return obs, -torch.ones(self.num_envs), success, truncated, info

    def is_task_success(self, **kwargs: Any) -> torch.Tensor:
        return torch.ones(self.num_envs, dtype=torch.bool)

    def _normalize_demo_action(self, action: Any) -> Any:
        if isinstance(action, ControllerAction):
            return action.snapshot()
        return action[..., :2]

    def _mask_demo_action(self, action: Any, active_mask: Sequence[bool]) -> Any:
        self._set_demo_active_mask(active_mask)
        return action

    def _set_demo_active_mask(self, active_mask: Sequence[bool]) -> None:
        self.active = torch.tensor(active_mask)

    def create_demo_segments(self, *args: Any, **kwargs: Any) -> Iterator[DemoSegment]:
        n = self.num_envs
        yield DemoSegment([torch.full((n, 7), float(step)) for step in (1, 2)], "approach", "cup", "Approach the cup.")
        commands = [
            TensorDict({"qpos": torch.full((n, 2), float(step)), "qvel": torch.ones(n, 2)}, [n]) for step in (3, 4)
        ]
        yield DemoSegment([ControllerAction(command) for command in commands], "grasp")
