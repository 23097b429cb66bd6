"""Direct stepping of the Gymnasium environments inside TorchRL's wrappers, without the overhead of the wrappers."""

from __future__ import annotations

import copy
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import gymnasium
import numpy as np
import torch
from tensordict import TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, NonTensor, TensorSpec, Unbounded
from torchrl.envs import EnvBase, GymEnv, GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader

from embodichain_rl.errors import EmbodiChainRLError, EnvOutputError
from embodichain_rl.replay.schema import Key, as_array

__all__ = ["InfoReader", "NativeEnv", "NativeVectorEnv", "NotServedError", "OwnedObservation", "as_key"]

NUMBERS = frozenset({float, int, np.float64, np.float32})
"""The types of a reward that need no conversion."""

UNREADABLE = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""The errors that reading the output of an environment raises if its structure is wrong."""


class NotServedError(Exception):
    """Raised when the results would not be exactly those of TorchRL. The message is a sentence that says why."""


class OwnedObservation(gymnasium.ObservationWrapper[Any, Any, Any]):
    """A wrapper that copies each observation.

    TorchRL wraps an array without a copy and stacks the steps later. If an environment reuses one array for all
    observations, every stacked step would contain the last observation.
    """

    def observation(self, observation: Any) -> Any:
        return copy.deepcopy(observation)


class InfoReader(BaseInfoDictReader):
    """Base class of readers of one value from ``info``, with or without a TensorDict as the target.

    Args:
        key: the key of the value in a TensorDict.
        spec: the shape and dtype of the value.
    """

    def __init__(self, key: str, spec: TensorSpec) -> None:
        self.key = key
        self._spec = spec
        self._shape, self._dtype = tuple(spec.shape), torch.empty(0, dtype=spec.dtype).numpy().dtype

    @abstractmethod
    def read(self, info: dict[str, Any]) -> bool | float:
        """Return the value."""

    def read_array(self, info: dict[str, Any]) -> np.ndarray:
        """Return the value as a new array with the shape and dtype of ``spec``."""
        return np.full(self._shape, self.read(info), self._dtype)

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        return tensordict.set(self.key, torch.from_numpy(self.read_array(info_dict)))

    @property
    def info_spec(self) -> dict[str, Any]:
        return Composite({self.key: self._spec})


class Entry(NamedTuple):
    """One tensor of an observation."""

    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype in the environment."""
    stored_as: torch.dtype
    """The dtype in the trajectory, which differs after a ``DoubleToFloat``."""


class _Box(NamedTuple):
    """One array of an observation that only needs to be copied and cast."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    stored_as: np.dtype[Any]


class Native(ABC):
    """Base class: one Gymnasium environment or a vector of them, stepped without TorchRL's wrapper around it.

    The results are the same as with the wrapper. An observation is a list of newly allocated arrays, in the order of
    ``keys``.

    Args:
        wrapper: a ``GymWrapper``.
        dtypes: the dtypes of the observations in a trajectory, by key.

    Attributes:
        keys (list[Key]): keys of an observation: the entries of the environment's observation, then the values read
            from ``info``.
        entries (list[Entry]): the entries of the environment's observation.

    Raises:
        NotServedError: the wrapper does more than convert types.
    """

    outcome: str
    """The required types of the reward and of the end flags, for error messages."""

    def __init__(self, wrapper: GymWrapper, dtypes: Mapping[Key, torch.dtype]) -> None:
        if type(wrapper) not in (GymWrapper, GymEnv):
            raise NotServedError(f"The environment is a {type(wrapper).__name__}.")
        self._check_held(wrapper)
        _check_wrapper(wrapper)
        self._wrapper = wrapper
        self._env = env = wrapper._env.env if type(wrapper._env) is OwnedObservation else wrapper._env
        self._step, self._reset = env.step, env.reset
        self._readers: list[InfoReader] = wrapper.info_dict_reader
        info_keys: list[Key] = [(reader.key,) for reader in self._readers]
        specs = [(as_key(key), spec) for key, spec in wrapper.observation_spec.items(True, True)]
        self.entries = [_entry(key, spec, dtypes) for key, spec in specs if key not in info_keys]
        self.keys = [entry.key for entry in self.entries] + info_keys
        self._boxes = _boxes(env.observation_space, self.entries)
        self._is_dict = isinstance(env.observation_space, gymnasium.spaces.Dict)
        self._to_native = _action_reader(wrapper)

    @abstractmethod
    def _check_held(self, wrapper: GymWrapper) -> None:
        """Raise ``NotServedError`` if the wrapper holds another kind of environment."""

    def _read_reset(self, returned: Any) -> list[np.ndarray]:
        try:
            observation, info = returned
            return self._observed(observation, info)
        except EmbodiChainRLError:
            raise
        except UNREADABLE as error:
            self._refuse("reset()", "(observation, info)", returned, error)

    def _take_step(self, action: Any) -> tuple[list[np.ndarray], Any, Any, Any]:
        if self._to_native is not None:
            action = self._to_native(action)
        returned = self._step(action)
        try:
            observation, reward, terminated, truncated, info = returned
            reward, terminated, truncated = self._read_outcome(reward, terminated, truncated)
            return self._observed(observation, info), reward, terminated, truncated
        except EmbodiChainRLError:
            raise
        except UNREADABLE as error:
            needed = f"(observation, reward, terminated, truncated, info), {self.outcome}"
            self._refuse("step()", needed, returned, error)

    @abstractmethod
    def _read_outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[Any, Any, Any]:
        """Return the reward, ``terminated`` and ``truncated`` in Python's types."""

    def _refuse(self, where: str, needed: str, returned: Any, error: Exception) -> NoReturn:
        name = self._env.spec.id if self._env.spec is not None else type(self._env.unwrapped).__name__
        raise EnvOutputError(
            f"{name} returned {_described(returned)} from {where}, which can't be read ({type(error).__name__}: "
            f"{error}). It must return {needed}, with an observation of its observation_space, "
            f"{self._env.observation_space}. Fix the environment, or put a gymnasium.Wrapper around it that returns "
            "this."
        ) from error

    def _observed(self, observation: Any, info: dict[str, Any]) -> list[np.ndarray]:
        values = []
        for name, dtype, shape, stored_as in self._boxes:
            array = observation[name] if self._is_dict else observation
            if type(array) is not np.ndarray or array.dtype != dtype or array.shape != shape:
                values = self._converted(observation)
                break
            values.append(array.astype(stored_as))
        if not values or (self._is_dict and len(observation) != len(values)):
            values = self._converted(observation)
        for reader in self._readers:
            values.append(reader.read_array(info))
        return values

    def _converted(self, observation: Any) -> list[np.ndarray]:
        """Convert an observation with TorchRL's own conversion, which is slower."""
        if any(np.iscomplexobj(value) for value in _leaves(observation)):
            raise TypeError("a complex number can't be stored in an array of real numbers")
        converted = self._wrapper.read_obs(observation)
        values = []
        for entry in self.entries:
            value = converted
            for part in entry.key:
                value = value[part]
            if value.dtype != entry.dtype or value.shape != entry.shape:
                raise TypeError(f"{entry.key} is {value.dtype} of shape {list(value.shape)}")
            values.append(as_array(value.to(entry.stored_as, copy=True)))
        return values


class NativeEnv(Native):
    """One Gymnasium environment; see :class:`Native`."""

    outcome = "a number as reward and two bools as terminated and truncated"

    def _check_held(self, wrapper: GymWrapper) -> None:
        if not isinstance(wrapper._env, gymnasium.Env) or wrapper.batch_size:
            raise NotServedError(f"The GymWrapper holds a {type(wrapper._env).__name__}, not one gymnasium.Env.")

    def reset(self) -> list[np.ndarray]:
        """Start an episode and return its first observation.

        Raises:
            EnvOutputError: the environment returned an invalid result.
        """
        return self._read_reset(self._reset())

    def step(self, action: Any) -> tuple[list[np.ndarray], float, bool, bool]:
        """Take a step with the action that the policy wrote.

        Returns:
            The observation, the reward, ``terminated`` and ``truncated``.

        Raises:
            EnvOutputError: the environment returned an invalid result.
        """
        return self._take_step(action)

    def _read_outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[float, bool, bool]:
        if type(reward) not in NUMBERS:
            reward = self._wrapper.read_reward(0 if reward is None else 0 + reward).item()
        if type(terminated) is not bool or type(truncated) is not bool:
            ends = self._wrapper.read_done(terminated=terminated, truncated=truncated, done=terminated | truncated)
            terminated, truncated = bool(ends[0]), bool(ends[1])
        return reward, terminated, truncated


class NativeVectorEnv(Native):
    """A vector of ``N`` Gymnasium environments that are stepped in one call; see :class:`Native`.

    Arrays hold the values of all environments, ``[N, *shape]``. An environment whose episode has ended is reset by an
    explicit call, which is TorchRL's choice too (``autoreset_mode=AutoresetMode.DISABLED``).
    """

    outcome = "arrays with one element for each environment: numbers as reward, bools as terminated and truncated"

    def _check_held(self, wrapper: GymWrapper) -> None:
        env, mode = wrapper._env, getattr(wrapper._env, "autoreset_mode", None)
        if not isinstance(env, gymnasium.vector.VectorEnv) or wrapper.batch_size != (env.num_envs,):
            raise NotServedError(f"The GymWrapper holds a {type(env).__name__}, not a gymnasium.vector.VectorEnv.")
        if mode != gymnasium.vector.AutoresetMode.DISABLED:
            raise NotServedError(f"The {type(env).__name__} resets environments itself: its autoreset_mode is {mode}.")
        self.num_envs: int = env.num_envs

    def reset(self, rows: Sequence[int]) -> list[np.ndarray]:
        """Start episodes in the environments ``rows`` and return the observation of all environments.

        Raises:
            EnvOutputError: the environments returned an invalid result.
        """
        mask = np.zeros(self.num_envs, dtype=bool)
        mask[rows] = True
        return self._read_reset(self._reset(options={"reset_mask": mask}))

    def step(self, actions: np.ndarray) -> tuple[list[np.ndarray], list[float], list[bool], list[bool]]:
        """Take a step in all environments.

        Returns:
            The observation of all environments, then for each environment the reward, ``terminated`` and ``truncated``.

        Raises:
            EnvOutputError: the environments returned an invalid result.
        """
        return self._take_step(actions)

    def _read_outcome(self, reward: Any, terminated: Any, truncated: Any) -> tuple[list[float], list[bool], list[bool]]:
        shape = (self.num_envs,)
        if type(reward) is not np.ndarray or reward.dtype not in NUMBERS or reward.shape != shape:
            reward = as_array(self._wrapper.read_reward(0 + reward)).reshape(shape)
        ends = [terminated, truncated]
        if any(type(end) is not np.ndarray or end.dtype != bool or end.shape != shape for end in ends):
            read = self._wrapper.read_done(terminated=terminated, truncated=truncated, done=terminated | truncated)
            ends = [np.asarray(end).reshape(shape) for end in read[:2]]
        return reward.tolist(), ends[0].tolist(), ends[1].tolist()


def _leaves(observation: Any) -> list[Any]:
    """Return the entries of a nested observation."""
    if not isinstance(observation, Mapping):
        return [observation]
    return [leaf for value in observation.values() for leaf in _leaves(value)]


def _described(value: Any) -> str:
    """Return a short description: dtype and shape of arrays, the items of containers, else the ``repr``."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_described(each)}" for key, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_described, value)) + ")"
    return reprlib.repr(value)


def as_key(key: Any) -> Key:
    """Return a key of TorchRL as a tuple."""
    return key if isinstance(key, tuple) else (key,)


def _check_wrapper(wrapper: EnvBase) -> None:
    if wrapper.wrapper_frame_skip != 1:
        raise NotServedError("The environment repeats actions (frame_skip).")
    if any(wrapper.batch_size or not isinstance(reader, InfoReader) for reader in wrapper.info_dict_reader):
        raise NotServedError("An info_dict_reader reads the environment's info.")
    if wrapper.device is not None and wrapper.device.type != "cpu":
        raise NotServedError(f"The environment is on {wrapper.device}.")
    if (
        wrapper.action_keys != ["action"]
        or wrapper.reward_keys != ["reward"]
        or wrapper.reward_spec.shape != (*wrapper.batch_size, 1)
    ):
        raise NotServedError("The environment has other actions or rewards than one 'action' and one 'reward'.")
    if set(wrapper.done_keys) != {"done", "terminated", "truncated"}:
        raise NotServedError(f"The environment's episodes end by {wrapper.done_keys}.")
    keys = set(wrapper.observation_spec.keys())
    if "state" in keys and "observation" not in keys:
        raise NotServedError("TorchRL renames the observation's entry 'state'.")


def _entry(key: Key, spec: TensorSpec, dtypes: Mapping[Key, torch.dtype]) -> Entry:
    if isinstance(spec, NonTensor) or -1 in spec.shape:
        raise NotServedError(f"The observation's entry {key} is not a tensor of fixed shape.")
    return Entry(key, tuple(spec.shape), spec.dtype, dtypes.get(key, spec.dtype))


def _boxes(space: gymnasium.Space[Any], entries: Sequence[Entry]) -> list[_Box]:
    """Return the arrays of an observation, in the order of the entries.

    The list is empty if an array needs more than a copy and a cast.
    """
    spaces: dict[str, Any] = dict(space.spaces) if isinstance(space, gymnasium.spaces.Dict) else {"": space}
    boxes = []
    for entry in entries:
        name = entry.key[0] if isinstance(space, gymnasium.spaces.Dict) else ""
        box = spaces.get(name)
        if not isinstance(box, gymnasium.spaces.Box) or box.shape != entry.shape:
            return []
        if torch.from_numpy(np.empty(0, box.dtype)).dtype != entry.dtype:
            return []
        boxes.append(_Box(name, box.dtype, box.shape, torch.empty(0, dtype=entry.stored_as).numpy().dtype))
    return boxes


def _action_reader(wrapper: GymWrapper) -> Callable[[Any], Any] | None:
    """Return a function that converts an action array to the environment's type, or None if no conversion is needed."""
    spec = wrapper.action_spec
    if isinstance(spec, Bounded | Unbounded) and type(spec).to_numpy is TensorSpec.to_numpy:
        return None
    if type(spec) is Categorical and not spec.shape:
        return int
    return lambda action: wrapper.read_action(torch.as_tensor(action))
