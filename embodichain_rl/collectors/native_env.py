"""Gymnasium environments inside TorchRL's wrappers, stepped past the wrappers."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, NonTensor, TensorSpec, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper, SerialEnv, TransformedEnv
from torchrl.envs.gym_like import BaseInfoDictReader
from torchrl.envs.transforms import Compose, DoubleToFloat, StepCounter, Transform

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema import Key
from embodichain_rl.replay.windows import as_array

__all__ = ["InfoReader", "NativeEnv", "NativeEnvs", "NotServedError", "OwnedObservation"]

STEP_COUNT: Key = ("step_count",)
"""Where a ``StepCounter`` counts."""

NUMBERS = frozenset({float, int, np.float64, np.float32})
"""The types of a reward that an array takes as TorchRL's wrapper does."""


class NotServedError(Exception):
    """Raised when something can't be rolled out exactly as TorchRL does; the message says what, as a sentence."""


class OwnedObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """Hands out copies of the observations.

    TorchRL wraps an array without a copy and stacks the steps later. An environment that writes each observation into
    the same array would have given as many copies of the last one by then.
    """

    def observation(self, observation: Any) -> Any:
        return copy.deepcopy(observation)


class InfoReader(BaseInfoDictReader):
    """Reads one value from ``info``, with or without a TensorDict to write it to.

    Args:
        key: where the value goes.
        spec: its shape and dtype.
    """

    def __init__(self, key: str, spec: TensorSpec) -> None:
        self.key = key
        self._spec = spec

    @abstractmethod
    def read(self, info: dict[str, Any]) -> Any:
        """Returns the value, as what an array of the spec's shape takes."""

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(self.key, torch.full(self._spec.shape, self.read(info_dict), dtype=self._spec.dtype))

    @property
    def info_spec(self) -> dict[str, Any]:
        return Composite({self.key: self._spec})


@dataclass(frozen=True)
class _Entry:
    """One array of an observation."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype


class NativeEnv:
    """One Gymnasium environment, stepped past TorchRL's wrapper around it, with the same results.

    What it observes is a list, in the order of ``keys``: the arrays of the observation, then the values that are read
    from ``info``. An array may be the environment's own memory: copy it before the next step.

    Args:
        wrapper: a ``GymWrapper``.

    Raises:
        NotServedError: the wrapper does more than to convert.
    """

    def __init__(self, wrapper: EnvBase) -> None:
        _check_wrapper(wrapper)
        self._wrapper = wrapper
        env = wrapper._env.env if type(wrapper._env) is OwnedObservation else wrapper._env
        self._step, self._reset = env.step, env.reset
        self._read_info = [reader.read for reader in wrapper.info_dict_reader]
        info_keys = [(reader.key,) for reader in wrapper.info_dict_reader]
        specs = {_as_key(key): spec for key, spec in wrapper.observation_spec.items(True, True)}
        self._entries = [_entry(key, spec) for key, spec in specs.items() if key not in info_keys]
        self.keys = [entry.key for entry in self._entries] + info_keys
        self._native = self._native_entries(env.observation_space)
        self._action_spec = wrapper.action_spec
        self._takes_arrays = type(self._action_spec) in (Bounded, Unbounded)
        self._takes_numbers = type(self._action_spec) is Categorical and not self._action_spec.shape

    def _native_entries(self, space: gymnasium.Space[Any]) -> list[tuple[str | None, np.dtype[Any], tuple[int, ...]]]:
        """What the environment's own arrays look like, by name; empty where TorchRL's conversion is more than a copy."""
        spaces: dict[Any, Any] = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {None: space}
        if len(spaces) != len(self._entries) or not all(isinstance(s, gymnasium.spaces.Box) for s in spaces.values()):
            return []
        native = []
        for entry in self._entries:
            name = entry.key[0] if isinstance(space, gymnasium.spaces.Dict) else None
            box = spaces.get(name)
            if box is None or box.shape != entry.shape or torch.from_numpy(np.empty(0, box.dtype)).dtype != entry.dtype:
                return []
            native.append((name, box.dtype, box.shape))
        return native

    def reset(self) -> list[Any]:
        """Begins an episode; returns what is observed."""
        return self._observed(*self._reset())

    def step(self, action: Any) -> tuple[list[Any], Any, bool, bool]:
        """Takes a step with an action of the environment's own; returns what is observed, reward and both ends."""
        observation, reward, terminated, truncated, info = self._step(action)
        if type(reward) not in NUMBERS:
            reward = as_array(self._wrapper.read_reward(0 if reward is None else 0 + reward)).reshape(-1)
        if type(terminated) is not bool or type(truncated) is not bool:
            read = self._wrapper.read_done(terminated=terminated, truncated=truncated, done=terminated | truncated)
            terminated, truncated = bool(read[0]), bool(read[1])
        return self._observed(observation, info), reward, terminated, truncated

    def to_native(self, action: Any) -> Any:
        """Turns an action of TorchRL's, as an array, into one of the environment's own."""
        if self._takes_arrays:
            return action
        if self._takes_numbers:
            return int(action)
        return self._wrapper.read_action(torch.as_tensor(action))

    def _observed(self, observation: Any, info: dict[str, Any]) -> list[Any]:
        values = self._arrays(observation)
        for read in self._read_info:
            values.append(read(info))
        return values

    def _arrays(self, observation: Any) -> list[Any]:
        arrays = []
        for name, dtype, shape in self._native:
            array = observation if name is None else observation.get(name)
            if type(array) is not np.ndarray or array.dtype != dtype or array.shape != shape:
                return self._converted(observation)
            arrays.append(array)
        if arrays and (name is None or len(observation) == len(arrays)):
            return arrays
        return self._converted(observation)

    def _converted(self, observation: Any) -> list[Any]:
        converted = self._wrapper.read_obs(observation)
        arrays = []
        for entry in self._entries:
            value = converted
            for part in entry.key:
                value = value[part]
            if value.dtype != entry.dtype or value.shape != entry.shape:
                raise SchemaMismatchError(
                    f"{self._wrapper} observed {entry.key} as {value.dtype} of shape {list(value.shape)}, and says in "
                    f"its observation_space that it is {entry.dtype} of shape {list(entry.shape)}."
                )
            arrays.append(as_array(value))
        return arrays


class NativeEnvs:
    """The Gymnasium environments of a TorchRL environment.

    Args:
        env: a ``GymWrapper`` or ``GymEnv``, or a ``SerialEnv`` of them, with or without ``StepCounter`` and
            ``DoubleToFloat`` around it.

    Attributes:
        rows (list[NativeEnv]): one for each.
        batched (bool): whether they are rows of a batch, ``[N]``; else it is one, ``[]``.
        max_steps (int | None): where a ``StepCounter`` truncates.
        keys (list[Key]): of what each of them observes, in its order.
        reward_dtype (torch.dtype): of the reward.

    Raises:
        NotServedError: it is something else.
    """

    def __init__(self, env: EnvBase) -> None:
        base, transforms = _taken_apart(env)
        self.batched = type(base) is SerialEnv
        self.rows = [NativeEnv(each) for each in (base._envs if self.batched else [base])]
        self.keys = self.rows[0].keys
        self.reward_dtype: torch.dtype = env.reward_spec.dtype
        limits = [_limit(transform) for transform in transforms if type(transform) is StepCounter]
        self.max_steps: int | None = limits[0] if limits else None
        if len(limits) > 1 or (limits and STEP_COUNT in self.keys):
            raise NotServedError("More than one transform counts the steps.")
        if any(row._entries != self.rows[0]._entries or row.keys != self.keys for row in self.rows):
            raise NotServedError("The environments of the SerialEnv observe different things.")
        keys = {_as_key(key) for key in env.observation_spec.keys(True, True)}
        if keys != {*self.keys, *([STEP_COUNT] if limits else [])}:
            raise NotServedError("A transform changes the keys of the observation.")
        if env.action_spec.dtype != base.action_spec.dtype:
            raise NotServedError("A transform changes the dtype of the action.")


def _taken_apart(env: EnvBase) -> tuple[EnvBase, Sequence[Transform]]:
    transforms: list[Transform] = []
    base = env
    if type(env) is TransformedEnv:
        base = env.base_env
        transforms = list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
    for transform in transforms:
        if type(transform) not in (StepCounter, DoubleToFloat):
            raise NotServedError(f"A {type(transform).__name__} transforms the environment.")
    return base, transforms


def _limit(counter: StepCounter) -> int | None:
    if (counter.truncated_key, counter.step_count_key, counter.update_done) != ("truncated", "step_count", True):
        raise NotServedError("A StepCounter has keys of its own.")
    return counter.max_steps


def _check_wrapper(wrapper: EnvBase) -> None:
    if type(wrapper) not in (GymWrapper, GymEnv):
        raise NotServedError(f"The environment is a {type(wrapper).__name__}.")
    if not isinstance(wrapper._env, gymnasium.Env) or wrapper._is_batched:
        raise NotServedError(f"The GymWrapper holds a {type(wrapper._env).__name__}, not one gymnasium.Env.")
    if wrapper.wrapper_frame_skip != 1:
        raise NotServedError("The environment repeats actions (frame_skip).")
    if not all(isinstance(reader, InfoReader) for reader in wrapper.info_dict_reader):
        raise NotServedError("An info_dict_reader reads the environment's info.")
    if wrapper.device is not None and wrapper.device.type != "cpu":
        raise NotServedError(f"The environment is on {wrapper.device}.")
    if wrapper.action_keys != ["action"] or wrapper.reward_keys != ["reward"]:
        raise NotServedError("The environment has other actions or rewards than one 'action' and one 'reward'.")
    if wrapper.reward_spec.shape != (1,) or set(wrapper.done_keys) != {"done", "terminated", "truncated"}:
        raise NotServedError("The environment has other rewards or ends than one a step.")
    keys = set(wrapper.observation_spec.keys())
    if "state" in keys and "observation" not in keys:
        raise NotServedError("TorchRL renames the observation's entry 'state'.")


def _entry(key: Key, spec: TensorSpec) -> _Entry:
    if isinstance(spec, NonTensor) or -1 in spec.shape:
        raise NotServedError(f"The observation's entry {key} is no tensor of fixed shape.")
    return _Entry(key, tuple(spec.shape), spec.dtype)


def _as_key(key: Any) -> Key:
    return key if isinstance(key, tuple) else (key,)
