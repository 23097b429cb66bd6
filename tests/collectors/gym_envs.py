"""Small Gymnasium environments, each peculiar in one way, and what compares two collectors over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, GymWrapper

from embodichain_rl import TrajectoryReplayBuffer

STEPS_PER_BATCH = 12


class Walk(gymnasium.Env):
    """A random walk with drift by the action, float32 ``[3]``; ends when it is far out, or by chance."""

    observation_space: gymnasium.Space = Box(-np.inf, np.inf, (3,), np.float32)
    action_space: gymnasium.Space = Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self) -> None:
        self._state = np.zeros(3)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self._state = self.np_random.normal(size=3)
        return self.observe(), {}

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict]:
        self._state[: self._state.size - 1] += self.moved(action)
        self._state[-1] = self.np_random.normal()
        terminated, truncated = bool(self._state[-1] > 1.6), bool(self._state[-1] < -1.6)
        return self.observe(), self.reward(), terminated, truncated, {"is_success": terminated, "more": 1}

    def observe(self) -> Any:
        return self._state.astype(np.float32)

    def moved(self, action: Any) -> Any:
        assert isinstance(action, np.ndarray), type(action)
        assert action.shape == self.action_space.shape
        return 0.1 * action

    def reward(self) -> Any:
        return float(-np.abs(self._state).sum())


class Reusing(Walk):
    """Writes every observation into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._memory = np.zeros(3, np.float32)

    def observe(self) -> Any:
        self._memory[:] = self._state
        return self._memory


class Doubles(Walk):
    """Observes float64, as MuJoCo does."""

    observation_space = Box(-np.inf, np.inf, (3,), np.float64)

    def observe(self) -> Any:
        return self._state.copy()


class Sloppy(Walk):
    """Observes float64 where its space says float32; its rewards and ends are of every type there is."""

    def observe(self) -> Any:
        return self._state.copy()

    def reward(self) -> Any:
        value = self._state.sum()
        kinds = (value, np.float32(value), int(value), 0, np.array(value), np.array([value]), None)
        return kinds[int(self.np_random.integers(len(kinds)))]

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, reward, np.bool_(terminated), np.bool_(truncated), info


class Goals(Walk):
    """Observes a dict with a dict in it, an image and a number."""

    observation_space = Dict(
        {
            "observation": Box(-np.inf, np.inf, (3,), np.float32),
            "goals": Dict({"desired": Box(-9, 9, (2,), np.float64), "achieved": Box(-9, 9, (2,), np.float64)}),
            "camera": Box(0, 255, (8, 6, 3), np.uint8),
            "gripper": Discrete(3),
        }
    )

    def observe(self) -> Any:
        return {
            "observation": self._state.astype(np.float32),
            "goals": {"desired": self._state[:2].copy(), "achieved": self._state[1:].copy()},
            "camera": np.full((8, 6, 3), int(abs(self._state[0]) * 40) % 256, np.uint8),
            "gripper": int(abs(self._state[1]) * 10) % 3,
        }


class Flat(Walk):
    """Observes a dict of arrays, all of which it writes into the same memory at every step."""

    observation_space = Dict(
        {"observation": Box(-np.inf, np.inf, (3,), np.float32), "pixels": Box(0, 255, (16, 16, 3), np.uint8)}
    )

    def __init__(self) -> None:
        super().__init__()
        self._memory = {"observation": np.zeros(3, np.float32), "pixels": np.zeros((16, 16, 3), np.uint8)}

    def observe(self) -> Any:
        self._memory["observation"][:] = self._state
        self._memory["pixels"][:] = int(abs(self._state[0]) * 40) % 256
        return self._memory


class Buttons(Walk):
    """Takes one of four buttons; observes three bits."""

    observation_space = MultiBinary(3)
    action_space = Discrete(4)

    def observe(self) -> Any:
        return (self._state > 0).astype(np.int8)

    def moved(self, action: Any) -> Any:
        assert isinstance(action, int), type(action)
        return action - 1.5


class NumpysButtons(Buttons):
    """Is told which button by a number of numpy's, as in a vector of environments."""

    def moved(self, action: Any) -> Any:
        assert isinstance(action, np.int64), type(action)
        return action - 1.5


class Switches(Walk):
    """Takes two numbers at once."""

    action_space = MultiDiscrete([3, 2])

    def moved(self, action: Any) -> Any:
        assert action.shape == (2,)
        return action - 1.0


def vector(env: type[gymnasium.Env] = Walk, kind: type[VectorEnv] = SyncVectorEnv, **kwargs: Any) -> EnvBase:
    """Three environments that are stepped in one call."""
    made = GymWrapper(kind([env] * 3, autoreset_mode=AutoresetMode.DISABLED), **kwargs)
    made.set_seed(5)
    return made


class SloppyVector(SyncVectorEnv):
    """Observes float64 where its space says float32; its rewards and ends come in every type and shape there is."""

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict]:
        observation, rewards, terminated, truncated, info = super().step(actions)
        kinds = (rewards, rewards.astype(np.float32), (9 * rewards).astype(np.int64), rewards[:, None])
        kind = int(abs(observation[0, 0]) * 40) % len(kinds)
        ends = (terminated[:, None], truncated[:, None]) if kind % 2 else (terminated, truncated)
        return observation.astype(np.float64), kinds[kind], *ends, info


def wrapped(env: Callable[[], gymnasium.Env], seed: int = 0, **kwargs: Any) -> EnvBase:
    made = GymWrapper(env(), **kwargs)
    made.set_seed(seed)
    return made


def collect(
    collector_class: type[Collector], make_env: Callable[[], EnvBase], make_policy: Callable[[], Any], **kwargs: Any
) -> tuple[Collector, list[TensorDictBase]]:
    """What a collector writes in eight batches, by trajectory id; with everything seeded."""
    rb = kwargs.pop("replay_buffer") if "replay_buffer" in kwargs else buffer()
    torch.manual_seed(0)
    options = {"frames_per_batch": STEPS_PER_BATCH, "total_frames": 20 * STEPS_PER_BATCH, "trajs_per_batch": 1}
    collector = collector_class(make_env, make_policy(), replay_buffer=rb, **{**options, **kwargs})
    for _ in collector:
        pass
    return collector, trajectories(rb)


def buffer(**kwargs: Any) -> TrajectoryReplayBuffer:
    return TrajectoryReplayBuffer(max_trajectories=1000, max_total_steps=50_000, chunk_size=1, **kwargs)


def trajectories(rb: Any) -> list[TensorDictBase]:
    there = [rb[index].exclude("index", "trajectory") for index in range(len(rb))]
    return sorted(there, key=lambda data: int(data["collector", "traj_ids"][0]))


def assert_same(ours: list[TensorDictBase], theirs: list[TensorDictBase]) -> None:
    """Says that both are the same trajectories: keys, shapes, dtypes and every bit."""
    assert len(ours) == len(theirs) >= 3
    for mine, other in zip(ours, theirs, strict=True):
        assert set(mine.keys(True, True)) == set(other.keys(True, True))
        for key, value in other.items(True, True):
            assert mine[key].dtype == value.dtype, key
            assert mine[key].shape == value.shape, key
            assert mine[key].equal(value), key
