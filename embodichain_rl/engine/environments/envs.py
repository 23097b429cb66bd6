"""Construction of TorchRL environments from a ``gym_config`` or a factory, identically in every process."""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from torchrl.data import Categorical
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, StepCounter, TransformedEnv
from torchrl.envs.transforms import Transform

from embodichain_rl._checks import checked_int
from embodichain_rl.collectors.native_env import InfoReader, OwnedObservation
from embodichain_rl.errors import ConfigError, InvalidArgumentError
from embodichain_rl.shared import dumps_by_value

__all__ = ["SUCCESS_INFO_KEYS", "EnvMaker", "GymConfig", "Transforms"]

SUCCESS_INFO_KEYS = ("is_success", "success")
"""The keys of Gymnasium's ``info`` under which environments report success. The first one present is read."""

Transforms: TypeAlias = Transform | Sequence[Transform] | Callable[[], Transform | Sequence[Transform]]
"""TorchRL transforms, or a function that makes them."""


@dataclass(frozen=True)
class GymConfig:
    """The Gymnasium environment to make, and the number of instances.

    Args:
        id: the registered name, as for ``gymnasium.make``. ``"module:Env-v0"`` imports ``module`` first. An environment
            that this process has registered, for instance in a notebook, is registered in the workers, too.
        num_envs: number of environments in one process, stepped sequentially as one batched environment.
        max_episode_steps: the time limit of the environment, in steps. It replaces the limit with which the environment
            was registered; None keeps that limit.
        kwargs: the other arguments of ``gymnasium.make``: ``disable_env_checker``, ``render_mode`` and every argument
            of the environment itself.

    Raises:
        ConfigError: a field is invalid. The message names it.

    Example:
        >>> GymConfig.from_dict({"id": "Pendulum-v1", "kwargs": {"g": 9.81}})
        GymConfig(id='Pendulum-v1', num_envs=1, max_episode_steps=None, kwargs={'g': 9.81})
    """

    id: str
    num_envs: int = 1
    max_episode_steps: int | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _is_name(self.id):
            raise ConfigError(f"gym_config['id'] must be the name of a registered environment, got {self.id!r}.")
        _checked_config_int("gym_config['num_envs']", self.num_envs)
        if self.max_episode_steps is not None:
            _checked_config_int("gym_config['max_episode_steps']", self.max_episode_steps)
        if not _are_arguments(self.kwargs):
            raise ConfigError(
                f"gym_config['kwargs'] must be a mapping from argument names to values, got {self.kwargs!r}."
            )
        repeated = sorted({"id", "max_episode_steps"} & self.kwargs.keys())
        if repeated:
            raise ConfigError(f"gym_config['kwargs'] contains {_quoted(repeated)}; move it to gym_config itself.")

    @classmethod
    def from_dict(cls, gym_config: Mapping[str, Any]) -> GymConfig:
        """Make a configuration from a parsed ``gym_config``.

        Args:
            gym_config: a mapping with the fields of this class as keys; ``id`` is required.

        Raises:
            ConfigError: ``id`` is missing, a key is unknown, or a value is invalid.
        """
        if not isinstance(gym_config, Mapping):
            raise ConfigError(
                f"gym_config must be a mapping, got a {type(gym_config).__name__}; read a file with load_config(path)."
            )
        known = [f.name for f in fields(cls)]
        unknown = [key for key in gym_config if key not in known]
        if unknown:
            raise ConfigError(
                f"gym_config has unknown keys: {', '.join(_with_suggestion(key, known) for key in unknown)}. It takes "
                f"{_quoted(known)}. Put arguments of the environment into gym_config['kwargs'], which gymnasium.make "
                "gets, or build the environment yourself and pass env_factory."
            )
        if "id" not in gym_config:
            raise ConfigError(
                f"gym_config needs the key 'id', the environment's name; got {_quoted(gym_config) or 'none'}."
            )
        return cls(**gym_config)


@dataclass(frozen=True)
class EnvMaker:
    """Maker of a worker's TorchRL environment. It is picklable if its arguments are.

    A Gymnasium environment has the keys that TorchRL gives it: ``"observation"``, or for a ``Dict`` space one key for
    every entry (``"observation"``, ``"achieved_goal"``, ``"desired_goal"`` for a goal-conditioned robot task). A
    discrete action is the number that Gymnasium takes, int64 ``[]``, not a one-hot vector. Observations are copied, so
    an environment may reuse its memory. With ``num_envs > 1`` the environments are stepped sequentially in this
    process, and each is reset separately when its episode ends. If the environment reports success, it is written to
    ``("next", "success")``, bool ``[*batch, 1]``. It is False at a reset and at a step without a report.

    Args:
        gym_config: the Gymnasium environment, as a :class:`GymConfig` or a dict of its fields.
        env_factory: a function that makes any TorchRL environment. Give either this or ``gym_config``.
        max_episode_steps: maximum steps of an episode. A ``StepCounter`` truncates at this limit and adds the key
            ``"step_count"``. The time limit of the environment still applies. None adds nothing.
        transforms: TorchRL transforms to append, or a function that makes them. Each environment gets clones.
        reports_success: whether the Gymnasium environment reports success in its ``info``. None determines it with a
            reset and a random step whenever an environment is built. A probe determines it once for all workers.

    Raises:
        ConfigError: an argument is invalid. When called: ``env_factory`` or ``transforms`` returned an object of a
            wrong type.

    Example:
        >>> env = EnvMaker({"id": "Pendulum-v1", "num_envs": 2}, max_episode_steps=50)()
        >>> env.rollout(3)["observation"].shape
        torch.Size([2, 3, 3])
        >>> env.close()
    """

    gym_config: GymConfig | Mapping[str, Any] | None = None
    env_factory: Callable[[], EnvBase] | None = None
    max_episode_steps: int | None = None
    transforms: Transforms | None = None
    reports_success: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        spec = _registered(self.gym_config.id) if isinstance(self.gym_config, GymConfig) else None
        return {**self.__dict__, "_spec": spec}

    def __setstate__(self, state: dict[str, Any]) -> None:
        _register(state.pop("_spec"))
        self.__dict__.update(state)

    def __post_init__(self) -> None:
        if (self.gym_config is None) == (self.env_factory is None):
            given = "neither" if self.gym_config is None else "both"
            raise ConfigError(f"Give either gym_config or env_factory; got {given}.")
        if self.gym_config is not None and not isinstance(self.gym_config, GymConfig):
            object.__setattr__(self, "gym_config", GymConfig.from_dict(self.gym_config))
        if self.env_factory is not None and not callable(self.env_factory):
            raise ConfigError(
                f"env_factory must be a function that makes an environment, got a {type(self.env_factory).__name__}."
            )
        if self.max_episode_steps is not None:
            _checked_config_int("max_episode_steps", self.max_episode_steps)
        if self.transforms is not None and not callable(self.transforms):
            _checked_transforms(self.transforms)

    def for_worker(self, index: int) -> EnvMaker:
        """Return the maker of worker ``index``, whose ``env_factory`` may depend on it."""
        for_worker = getattr(self.env_factory, "for_worker", None)
        return self if for_worker is None else replace(self, env_factory=for_worker(index))

    @property
    def name(self) -> str:
        """The name of the environment in messages."""
        if isinstance(self.gym_config, GymConfig):
            return self.gym_config.id
        return str(getattr(self.env_factory, "__qualname__", self.env_factory))

    @property
    def is_batch(self) -> bool:
        """Whether it makes several environments, stepped as one batch."""
        return isinstance(self.gym_config, GymConfig) and self.gym_config.num_envs > 1

    def __call__(self) -> EnvBase:
        """Build the environment. Its batch size is ``[]``, or ``[num_envs]`` if a ``gym_config`` has several."""
        if isinstance(self.gym_config, GymConfig) and self.is_batch:
            return self._finished(SerialEnv(self.gym_config.num_envs, self._bare))
        return self.single()

    def single(self) -> EnvBase:
        """Build one environment with batch size ``[]``, regardless of ``num_envs``; or call ``env_factory``."""
        return self._finished(self._bare())

    def each(self) -> list[EnvBase]:
        """Build a list of separate environments: ``num_envs`` of them, or the one that ``env_factory`` makes."""
        count = self.gym_config.num_envs if isinstance(self.gym_config, GymConfig) else 1
        return [self.single() for _ in range(count)]

    def _bare(self) -> EnvBase:
        if isinstance(self.gym_config, GymConfig):
            return _gym_env(self.gym_config, self.reports_success)
        assert self.env_factory is not None
        env = self.env_factory()
        if not isinstance(env, EnvBase):
            raise ConfigError(
                f"env_factory must make a torchrl.envs.EnvBase, got a {type(env).__module__}.{type(env).__qualname__}; "
                "use torchrl.envs.GymWrapper to convert a Gymnasium environment."
            )
        return env

    def _finished(self, env: EnvBase) -> EnvBase:
        appended: list[Transform] = []
        if self.max_episode_steps is not None:
            appended.append(StepCounter(max_steps=self.max_episode_steps))
        if self.transforms is not None:
            made = self.transforms if isinstance(self.transforms, (Transform, Sequence)) else self.transforms()
            appended.extend(transform.clone() for transform in _checked_transforms(made))
        if appended and not isinstance(env, TransformedEnv):
            env = TransformedEnv(env)
        for transform in appended:
            env.append_transform(transform)
        return env


class _SuccessReader(InfoReader):
    """Reader of success from ``info`` into ``"success"``, bool ``[1]``."""

    def __init__(self) -> None:
        super().__init__("success", Categorical(2, shape=(1,), dtype=torch.bool))

    def read(self, info: dict[str, Any]) -> bool:
        key = _success_key(info)
        if key is None:
            return False
        value = np.asarray(_on_cpu(info[key]))
        if value.size != 1:
            raise ConfigError(
                f"info[{key!r}] must be one value, got shape {value.shape}. Use env_factory for an environment "
                "with a batch size."
            )
        return bool(value.item())


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _success_key(info: Mapping[str, Any]) -> str | None:
    return next((key for key in SUCCESS_INFO_KEYS if key in info), None)


def _registered(env_id: str) -> bytes | None:
    """Return the spec of an environment that is registered in this process, pickled by value.

    A notebook registers its environments itself. Another process has not run its cells.

    Raises:
        ConfigError: the spec can't be pickled, and another process can't get it by an import.
    """
    spec = gymnasium.registry.get(env_id)
    if spec is None:
        return None
    try:
        return dumps_by_value(spec)
    except Exception as error:
        if isinstance(spec.entry_point, str):  # the module that registered it may be imported there
            return None
        raise ConfigError(
            f"{env_id!r} is registered in this process only, and can't be passed to a worker: {error}. Pass a function "
            "that makes the environment, as env_factory, or register it in a module and name that in the id: "
            f"'module:{env_id}'."
        ) from error


def _register(spec: bytes | None) -> None:
    """Register an environment in this process, if there is none of this name."""
    if spec is not None:
        try:
            loaded = pickle.loads(spec)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"An environment that is registered in the engine's process can't be loaded in this one: {error}. Pass "
                "a function that makes the environment, as env_factory."
            ) from error
        gymnasium.registry.setdefault(loaded.id, loaded)


def _gym_env(config: GymConfig, reports_success: bool | None) -> GymWrapper:
    env = OwnedObservation(gymnasium.make(config.id, max_episode_steps=config.max_episode_steps, **config.kwargs))
    try:
        if reports_success is None:
            env.reset()
            *_, info = env.step(env.action_space.sample())
            reports_success = _success_key(info) is not None
        wrapped = GymWrapper(env, categorical_action_encoding=True)
        if reports_success and "success" not in wrapped.observation_spec:
            wrapped.set_info_dict_reader(_SuccessReader())
    except BaseException:
        env.close()
        raise
    return wrapped


def _checked_transforms(transforms: Any) -> list[Transform]:
    found = [transforms] if isinstance(transforms, Transform) else transforms
    if not isinstance(found, Sequence) or not all(isinstance(transform, Transform) for transform in found):
        raise ConfigError(f"transforms must be TorchRL transforms, or a function that makes them; got {transforms!r}.")
    return list(found)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_arguments(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _checked_config_int(name: str, value: Any) -> None:
    try:
        checked_int(name, value, minimum=1)
    except InvalidArgumentError as error:
        raise ConfigError(str(error)) from None


def _quoted(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names)


def _with_suggestion(key: Any, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f"{key!r} (did you mean {close[0]!r}?)" if close else repr(key)
