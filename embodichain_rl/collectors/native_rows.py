"""The rows that a TorchRL environment is made of: Gymnasium environments, one by one or a vector of them."""

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
"""What came of a step: what is observed, the reward, whether it terminated and whether it was truncated."""


class NativeRows(ABC):
    """The environments that are stepped together, with what TorchRL has around them.

    Args:
        env: the environment as TorchRL has it.
        base: what is in it when the transforms are taken off.
        transforms: those; ``StepCounter`` and ``DoubleToFloat``.
        natives: what is in the base.
        batch_size: ``[N]``, or ``[]`` of one environment.

    Attributes:
        batch_size (torch.Size): what was given.
        max_steps (int | None): where a ``StepCounter`` truncates.
        keys (list[Key]): of what each row observes.
        reward_dtype (torch.dtype): of the reward.
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
        """The number of rows."""
        return self.batch_size.numel()

    @abstractmethod
    def step(self, actions: np.ndarray) -> Iterable[Outcome]:
        """Takes a step in all rows; returns what came of it in each, in memory of its own.

        Args:
            actions: as the policy gives them, ``[*batch_size, *shape]``.
        """

    @abstractmethod
    def reset(self, rows: Sequence[int]) -> list[Sequence[np.ndarray]]:
        """Begins episodes in ``rows``; returns what is observed in each of these."""


class _OneByOne(NativeRows):
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


class _AtOnce(NativeRows):
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
    """Returns the Gymnasium environments of a TorchRL environment.

    Args:
        env: a ``GymWrapper`` or ``GymEnv`` around one environment or a vector of them, or a ``SerialEnv`` of such
            around one, with or without ``StepCounter`` and ``DoubleToFloat`` around it.

    Raises:
        NotServedError: it is something else.
    """
    base, transforms = _taken_apart(env)
    kind = _AtOnce if base.batch_size and type(base) is not SerialEnv else _OneByOne
    return kind(env, base, transforms)


def _dtypes(env: EnvBase) -> Mapping[Key, torch.dtype]:
    """Of all that is observed, as it is handed out."""
    return {as_key(key): spec.dtype for key, spec in env.observation_spec.items(True, True)}


def _taken_apart(env: EnvBase) -> tuple[EnvBase, Sequence[Transform]]:
    transforms: list[Transform] = []
    base = env
    if type(env) is TransformedEnv:
        base = env.base_env
        transforms = list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
    for transform in transforms:
        if type(transform) not in (StepCounter, DoubleToFloat):
            raise NotServedError(f"The environment is transformed, by a {type(transform).__name__}.")
    return base, transforms


def _limit(counter: StepCounter) -> int | None:
    if (counter.truncated_key, counter.step_count_key, counter.update_done) != ("truncated", "step_count", True):
        raise NotServedError("A StepCounter has keys of its own.")
    return counter.max_steps
