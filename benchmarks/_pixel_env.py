"""A Gymnasium environment with camera images that costs almost nothing to step, for ``cluster.py``."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

__all__ = ["PIXELS", "STEPS", "PixelEnv"]

PIXELS = "_pixel_env:Pixels-v0"
"""The id of the environment; Gymnasium imports this module for it."""

STEPS = 50
SIDE = 96


class PixelEnv(gym.Env[np.ndarray, np.ndarray]):
    """Episodes of ``STEPS`` steps. An observation is one of a few random images, ``uint8`` ``[SIDE, SIDE, 3]``."""

    def __init__(self) -> None:
        self.observation_space = gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self._images = np.random.default_rng(0).integers(0, 256, (16, SIDE, SIDE, 3), dtype=np.uint8)
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._step = 0
        return self._images[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self._step += 1
        return self._images[self._step % len(self._images)], float(action[0]), False, self._step == STEPS, {}


gym.register("Pixels-v0", PixelEnv)
