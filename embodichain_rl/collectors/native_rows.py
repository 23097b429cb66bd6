"""The rows of a batched TorchRL environment: single Gymnasium environments or a vector of them; see ``rollout.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torchrl.envs import EnvBase, SerialEnv, TransformedEnv
from torchrl.envs.transforms import Compose, DoubleToFloat, StepCounter, Transform

from embodichain_rl.collectors.episode import STEP_COUNT
from embodichain_rl.collectors.native_env import Native, NativeEnv, NativeVectorEnv, NotServedError, as_key
from embodichain_rl.replay.schema import Key

__all__ = ["NativeRows", "rows_of"]

Outcome = tuple[Sequence[np.ndarray], float, bool, bool]
"""The outcome of a step: observation, reward, ``terminated``, ``truncated``."""


class NativeRows(ABC):
    """Base class: the environments that are stepped together, including the effect of TorchRL's transforms.

    Args:
        env: the TorchRL environment.
        base: the same environment without its transforms.
        transforms: the transforms, each a ``StepCounter`` or a ``DoubleToFloat``.
        natives: the Gymnasium environments in ``base``.
        batch_size: ``[N]``, or ``[]`` for a single environment.

    Attributes:
        batch_size (torch.Size): the batch size.
        max_steps (int | None): the number of steps after which a ``StepCounter`` truncates.
        keys (list[Key]): keys of the observation of each row.
        reward_dtype (torch.dtype): dtype of the reward.
    """

    def __init__(
        self,
        env: EnvBase,
        base: EnvBase,
        transforms: Sequence[Transform],
        natives: Sequence[Native],
        batch_size: torch.Size,
    ) -> None:
        self.batch_size = batch_size
        self.keys = natives[0].keys
        self.reward_dtype: torch.dtype = env.reward_spec.dtype
        limits = [_limit(transform) for transform in transforms if type(transform) is StepCounter]
        self.max_steps: int | None = limits[0] if limits else None
        if len(limits) > 1 or (limits and STEP_COUNT in self.keys):
            raise NotServedError("The steps are counted twice.")
        if any(native.entries != natives[0].entries or native.keys != self.keys for native in natives):
            raise NotServedError("The environments of the SerialEnv observe different things.")
        if {*_dtypes(env)} != {*self.keys, *([STEP_COUNT] if limits else [])}:
            raise NotServedError("A transform changes the keys of the observation.")
        if env.action_spec.dtype != base.action_spec.dtype or env.reward_spec.dtype != base.reward_spec.dtype:
            raise NotServedError("A transform changes the dtype of the action or the reward.")

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.batch_size.numel()

    @abstractmethod
    def step(self, actions: np.ndarray) -> Iterable[Outcome]:
        """Take a step in all rows and return the outcome of each, in newly allocated arrays.

        Args:
            actions: the actions of the policy, ``[*batch_size, *shape]``.
        """

    @abstractmethod
    def reset(self, rows: Sequence[int]) -> list[Sequence[np.ndarray]]:
        """Start episodes in ``rows`` and return the first observation of each."""


class _SingleEnvs(NativeRows):
    """One environment, or a ``SerialEnv`` of several."""

    def __init__(self, env: EnvBase, base: EnvBase, transforms: Sequence[Transform]) -> None:
        batched = type(base) is SerialEnv
        dtypes = _dtypes(env)
        self._envs = [NativeEnv(each, dtypes) for each in (base._envs if batched else [base])]
        super().__init__(env, base, transforms, self._envs, torch.Size([len(self._envs)] if batched else []))
        self._steps = [native.step for native in self._envs]

    def step(self, actions: np.ndarray) -> Iterable[Outcome]:
        if not self.batch_size:
            return (self._steps[0](actions),)
        return (step(action) for step, action in zip(self._steps, actions, strict=True))

    def reset(self, rows: Sequence[int]) -> list[Sequence[np.ndarray]]:
        return [self._envs[row].reset() for row in rows]


class _VectorEnv(NativeRows):
    """A vector of environments."""

    def __init__(self, env: EnvBase, base: EnvBase, transforms: Sequence[Transform]) -> None:
        self._env = NativeVectorEnv(base, _dtypes(env))
        super().__init__(env, base, transforms, [self._env], base.batch_size)

    def step(self, actions: np.ndarray) -> Iterable[Outcome]:
        observed, rewards, terminated, truncated = self._env.step(actions)
        return zip(zip(*observed, strict=True), rewards, terminated, truncated, strict=True)

    def reset(self, rows: Sequence[int]) -> list[Sequence[np.ndarray]]:
        observed = self._env.reset(rows)
        return [[array[row] for array in observed] for row in rows]


def rows_of(env: EnvBase) -> NativeRows:
    """Return the Gymnasium environments of a TorchRL environment.

    Args:
        env: a ``GymWrapper`` or ``GymEnv`` around one environment or a vector of them, or a ``SerialEnv`` of wrappers
            around one environment each. The whole may be transformed by ``StepCounter`` and ``DoubleToFloat``.

    Raises:
        NotServedError: ``env`` is none of these.
    """
    base, transforms = _split_transforms(env)
    kind = _VectorEnv if base.batch_size and type(base) is not SerialEnv else _SingleEnvs
    return kind(env, base, transforms)


def _dtypes(env: EnvBase) -> Mapping[Key, torch.dtype]:
    """Return the dtypes of the observations by key, after the transforms."""
    return {as_key(key): spec.dtype for key, spec in env.observation_spec.items(True, True)}


def _split_transforms(env: EnvBase) -> tuple[EnvBase, Sequence[Transform]]:
    transforms: list[Transform] = []
    base = env
    if type(env) is TransformedEnv:
        base = env.base_env
        transforms = list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
    for transform in transforms:
        if type(transform) not in (StepCounter, DoubleToFloat):
            raise NotServedError(f"The environment is transformed by a {type(transform).__name__}.")
    return base, transforms


def _limit(counter: StepCounter) -> int | None:
    if (counter.truncated_key, counter.step_count_key, counter.update_done) != ("truncated", "step_count", True):
        raise NotServedError("A StepCounter has custom keys.")
    return counter.max_steps
