"""``OnlineDataEngineCfg``: the configuration of an engine, a dataclass that is checked when it is made and used."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_compact, checked_float, checked_int
from embodichain_rl.engine.config_files import load_config
from embodichain_rl.engine.remote import Cluster
from embodichain_rl.errors import ConfigError, InvalidArgumentError
from embodichain_rl.replay.device import Device, checked_device
from embodichain_rl.replay.schema import Formats

if TYPE_CHECKING:
    from embodichain_rl.engine.environments import EnvMaker, Policy, Transforms

__all__ = ["OnlineDataEngineCfg"]

BUFFER_FIELDS = frozenset(
    (
        "buffer_size",
        "min_trajectories",
        "max_episode_steps",
        "buffer_device",
        "buffer_path",
        "compact",
        "compress",
        "ragged",
        "ragged_bytes",
        "every",
        "num_workers",
        "producers",
        "cluster",
        "refill_threshold",
        "refill_policy",
    )
)
"""The fields that determine the buffer of an engine and its pacing. They can't be changed once the engine is made."""


@dataclass
class OnlineDataEngineCfg:
    """Configuration of an :class:`~embodichain_rl.engine.data.OnlineDataEngine`.

    Give exactly one of ``gym_config``, ``env_factory`` and ``producers`` as the source of trajectories.

    A field that is assigned later is checked by :meth:`validate`, which an engine calls when it is made and when it is
    started. A field that an engine uses already can't be changed any more; :meth:`replace` makes a changed copy.

    Args:
        buffer_size: number of trajectories that the buffer keeps, the newest ones. ``start()`` fills it completely,
            unless ``min_trajectories`` are less. Default 16.
        min_trajectories: number of trajectories at which ``start()`` returns and sampling begins, while the buffer is
            filled further. None, the default, means ``buffer_size``.
        max_episode_steps: maximum steps of an episode; a longer one is truncated. The buffer has room for
            ``buffer_size * max_episode_steps`` steps. Default 300.
        state_dim: expected size of the last dimension of the observation ``state_key``.
            :meth:`OnlineDataEngine.start` raises an error if the environment differs. None, the default, means no
            check.
        state_key: key of the observation that ``state_dim`` refers to, and that a plain function as ``policy``
            receives. Default ``"observation"``.
        buffer_device: device of the buffer: ``"cpu"``, the default, or a CUDA device such as ``"cuda"``. With a CUDA
            device, only the process of the engine can sample (a ``DataLoader`` with ``num_workers=0``). See
            :class:`~embodichain_rl.replay.storage.storage.TrajectoryStorage`.
        compact: whether an observation that belongs to two consecutive steps is stored once, which halves the memory of
            images. See :class:`~embodichain_rl.replay.storage.storage.TrajectoryStorage`. Default False.
        compress: observations that are kept encoded, each with its codec, such as ``{"pixels": "jpeg"}``; the workers
            encode them. See :class:`~embodichain_rl.replay.storage.storage.TrajectoryStorage`. Default None.
        ragged: keys whose values change their size from step to step. Default none.
        ragged_bytes: bytes that compressed and ragged values are expected to take a step. Default None: measured when
            the environment is examined, at least as many as plain images take.
        every: keys that change at every so-many-th step only, such as ``{"camera": 8}``: each value is stored once. See
            :class:`~embodichain_rl.replay.storage.storage.TrajectoryStorage`. Default None.
        gym_config: the Gymnasium environment, as a mapping or as the path of a JSON or YAML file. The keys are ``id``
            and optionally ``num_envs`` (environments per worker), ``max_episode_steps`` (the time limit of the
            environment) and ``kwargs`` (for ``gymnasium.make``). A configuration of EmbodiChain is recognised by its
            keys, such as ``env`` and ``robot``, and passed to EmbodiChain, with ``headless``, ``renderer``, ``gpu_id``
            and ``device``; a list of the last two has one value per worker, in turns. Default None.
        action_config: additional arguments of ``gymnasium.make`` that configure the actions. Requires ``gym_config``.
            Default None.
        env_factory: a function that makes any TorchRL environment. ``cloudpickle`` must be able to pickle it. Default
            None.
        transforms: TorchRL transforms to append to the environment, or a function that makes them. Default None.
        producers: iterables of TensorDicts instead of an environment, such as TorchRL collectors without a replay
            buffer. Each is iterated on a thread. The caller owns them and shuts them down after the engine. Default
            None.
        num_workers: number of worker processes. With 0, a thread of this process collects. Default 1. Ignored if
            ``producers`` are given.
        policy: the policy: a TorchRL module; a function from one observation to one action; ``"demo"`` for the
            demonstrations of the environment; or ``"random"`` for random actions. None, the default, means
            demonstrations if the environment offers them, else random actions; a line in the log says which.
        policy_factory: a function that makes the policy in each worker, instead of ``policy``. Its weights can't be
            updated. Default None.
        accept: a function from a whole trajectory ``[T]`` to a bool that selects the trajectories to keep. None, the
            default, keeps all. Exception: of demonstrations, None keeps those that succeed, if the environment can
            tell.
        max_generation_attempts: number of failures in a row after which the engine fails. A failure is a rejected
            trajectory or a failed plan of a demonstration. They are counted for each environment if it demonstrates,
            else for each worker. Default 10.
        refill_threshold: average number of chunks to sample for each trajectory that is replaced. The rate limiter
            blocks producers that are ahead, so simulators rest while nobody samples. None means no rate limiter:
            simulators never rest. Default 50.
        refill_policy: ``"sample_threshold"``, the default: ``refill_threshold`` decides when trajectories are replaced;
            or ``"manual"``: after the buffer is filled, producers write only what
            :meth:`~embodichain_rl.engine.data.OnlineDataEngine.request_refill` requests.
        initialization_timeout: seconds from ``start()`` until the buffer is filled. Also the timeout of each start of a
            worker. Default 600.
        max_worker_restarts: the restart budget: total number of workers that are replaced before the engine fails.
            Default 3.
        worker_timeout: maximum seconds for a step or a reset of the environments, or for a plan of a demonstration. A
            worker without a heartbeat for longer counts as hung. Default 60.
        shutdown_timeout: seconds that workers have for a graceful shutdown, in which they close their environments.
            Then they are killed, and ``stop()`` raises an error. Default 10.
        seed: a non-negative integer that seeds the workers. Each worker, and each restart of it, has an independent
            random stream, whatever the start method: its environments, the global generators of torch, NumPy and
            ``random``, and the generators that its policy and ``env_factory`` hold. None, the default, means random
            seeds. An environment that can't be seeded then keeps its own random numbers.
        start_method: how worker processes are started: ``"spawn"``, ``"forkserver"`` or ``"fork"``. None, the default,
            means the start method that was chosen by ``multiprocessing.set_start_method``, else ``"spawn"``.
        progress_bar: whether ``start()`` shows a progress bar on stderr. Default True.
        buffer_path: directory in which the buffer is kept, and found again by the next engine with the same settings:
            ``start()`` fills only what is missing, with other episodes than those before, also with a fixed ``seed``.
            Only on the CPU. Default None.
        label_source: whether each step says who acted: the text ``"expert"`` for demonstrations, ``"random"`` for
            random actions, ``"policy"`` for a policy, under ``("collector", "source")``. A policy or an environment
            that writes this key itself, as text, is kept. Draw by it with :class:`~embodichain_rl.ByStep`, and weight
            the loss with :func:`~embodichain_rl.step_weights`. Not with ``producers``. Default False.
        equal_shares: whether each worker writes as many trajectories as the others: one that is ahead waits. Otherwise
            workers that are fast, or whose episodes are short, write more. Default False.
        cluster: the cluster whose machines the workers run on, such as a :class:`~embodichain_rl.cluster.RayCluster`.
            Their trajectories are sent to the buffer of this machine. None, the default, means processes of this
            machine.

    Raises:
        ConfigError: a field or a combination of fields is invalid. The message names the fields.

    Example:
        >>> cfg = OnlineDataEngineCfg(buffer_size=2, state_dim=3, gym_config={"id": "Pendulum-v1"})
        >>> cfg.max_total_steps
        600
    """

    buffer_size: int = 16
    max_episode_steps: int = 300
    state_dim: int | None = None
    state_key: NestedKey = "observation"
    buffer_device: torch.device | str = "cpu"
    compact: bool | Literal["views"] = False
    compress: Mapping[NestedKey, Any] | None = None
    ragged: Sequence[NestedKey] = ()
    ragged_bytes: int | None = None
    every: Mapping[NestedKey, int] | None = None
    gym_config: Mapping[str, Any] | str | os.PathLike[str] | None = None
    action_config: Mapping[str, Any] | None = None
    env_factory: Callable[[], Any] | None = None
    transforms: Transforms | None = None
    producers: Sequence[Iterable[Any]] | None = None
    num_workers: int = 1
    policy: Policy | str = None
    policy_factory: Callable[[], Policy] | None = None
    accept: Callable[[Any], bool] | None = None
    max_generation_attempts: int = 10
    refill_threshold: float | None = 50.0
    refill_policy: Literal["sample_threshold", "manual"] = "sample_threshold"
    initialization_timeout: float = 600.0
    max_worker_restarts: int = 3
    worker_timeout: float = 60.0
    shutdown_timeout: float = 10.0
    seed: int | None = None
    start_method: str | None = None
    progress_bar: bool = True
    min_trajectories: int | None = None
    buffer_path: str | os.PathLike[str] | None = None
    label_source: bool = False
    equal_shares: bool = False
    cluster: Cluster | None = None
    _env_maker: EnvMaker | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_fixed", ()):
            raise ConfigError(
                f"An engine uses this configuration, so its {name} can't be changed any more. Make another engine with "
                f"cfg.replace({name}=...)."
            )
        super().__setattr__(name, value)

    def validate(self) -> None:
        """Check all fields, such as after one was assigned, and normalise their types.

        Raises:
            ConfigError: a field or a combination of fields is invalid, or a mapping was changed in place while an
                engine uses it.

        Example:
            >>> cfg = OnlineDataEngineCfg(gym_config={"id": "Pendulum-v1"})
            >>> cfg.buffer_size = 0
            >>> cfg.validate()
            Traceback (most recent call last):
            embodichain_rl.errors.ConfigError: buffer_size must be an integer of at least 1, got 0.
        """
        started_with = self.__dict__.get("_started_with")
        if started_with is None:
            self._check()
        elif not _unchanged(started_with, self._mappings()):
            raise ConfigError(
                "gym_config or action_config was changed in place while an engine uses the configuration. Make another "
                "engine with cfg.replace(gym_config=...)."
            )

    def _mappings(self) -> tuple[Any, ...]:
        return tuple(_copied(getattr(self, name)) for name in ("gym_config", "action_config"))

    def enter_use(self, *, started: bool = False) -> None:
        """Check the configuration, and let fields not be changed from now on. Called by the engine that it belongs to.

        Args:
            started: whether the engine starts now, which fixes all fields; otherwise it is made, which fixes those that
                determine its buffer.
        """
        self.validate()
        if started:
            self.__dict__["_started_with"] = self._mappings()
        fixed = {f.name for f in dataclasses.fields(self)} if started else BUFFER_FIELDS
        self.__dict__["_fixed"] = self.__dict__.get("_fixed", frozenset()) | fixed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_fixed", "_started_with")}

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed.

        Args:
            changes: the fields to change, by name.

        Raises:
            ConfigError: the result is invalid, or there is no such field.

        Example:
            >>> cfg = OnlineDataEngineCfg(buffer_size=2, gym_config={"id": "Pendulum-v1"})
            >>> cfg.replace(buffer_size=4).buffer_size, cfg.buffer_size
            (4, 2)
        """
        unknown = sorted(changes.keys() - {f.name for f in dataclasses.fields(self) if f.init})
        if unknown:
            raise ConfigError(f"A configuration has no {', '.join(unknown)}; got {sorted(changes)}.")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict. ``OnlineDataEngineCfg(**cfg.to_dict())`` equals ``cfg``.

        Mappings are copied, the device is its name; modules and functions are the objects themselves.

        Example:
            >>> OnlineDataEngineCfg(gym_config={"id": "Pendulum-v1"}).to_dict()["gym_config"]
            {'id': 'Pendulum-v1'}
        """
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        for name in ("gym_config", "action_config"):
            values[name] = _copied(values[name])
        path = None if self.buffer_path is None else os.fspath(self.buffer_path)
        return {**values, "buffer_device": str(self.buffer_device), "buffer_path": path}

    def _check(self) -> None:
        try:
            self._check_numbers()
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        self._check_device()
        self._check_actor()
        if self.start_method is not None and self.start_method not in get_all_start_methods():
            raise ConfigError(f"start_method must be one of {get_all_start_methods()}, got {self.start_method!r}.")
        if not _is_key(self.state_key):
            raise ConfigError(f"state_key must be a name, or a tuple of names, got {self.state_key!r}.")
        if not isinstance(self.progress_bar, bool):
            raise ConfigError(f"progress_bar must be True or False, got {self.progress_bar!r}.")
        if not isinstance(self.label_source, bool):
            raise ConfigError(f"label_source must be True or False, got {self.label_source!r}.")
        if not isinstance(self.equal_shares, bool):
            raise ConfigError(f"equal_shares must be True or False, got {self.equal_shares!r}.")
        if self.equal_shares and (self.cluster is not None or self.producers is not None):
            raise ConfigError(
                f"equal_shares=True needs workers on this machine; got "
                f"{'a cluster' if self.producers is None else 'producers, which may end'}. Draw with "
                "weights=ByGroup(...) by a key that says which of them a trajectory is from."
            )
        if self.label_source and self.producers is not None:
            raise ConfigError(
                "label_source=True needs an environment: producers say themselves who acted. Write the text "
                "('collector', 'source') with every step."
            )
        path: Any = self.buffer_path
        if path is not None and (not isinstance(path, (str, os.PathLike)) or not str(path)):
            raise ConfigError(f"buffer_path must be the path of a directory, got {path!r}.")
        if self.refill_policy not in ("sample_threshold", "manual"):
            raise ConfigError(f"refill_policy must be 'sample_threshold' or 'manual', got {self.refill_policy!r}.")
        self._check_source()
        self._check_cluster()

    def _check_cluster(self) -> None:
        cluster: Any = self.cluster
        if cluster is None:
            return
        if not isinstance(cluster, Cluster):
            raise ConfigError(f"cluster must be a cluster, such as a RayCluster, got a {type(cluster).__name__}.")
        for name in ("producers", "start_method"):
            if getattr(self, name) is not None:
                raise ConfigError(f"{name} applies to producers of this machine; remove it, or give no cluster.")
        if self.num_workers == 0:
            raise ConfigError("num_workers must be at least 1 with a cluster, got 0, which means a thread here.")

    def _check_numbers(self) -> None:
        values = self.__dict__  # directly, since fields of an engine can't be assigned
        values["compact"] = checked_compact(self.compact)
        try:
            Formats(self.ragged, self.compress, self.ragged_bytes, self.every)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None
        values["buffer_size"] = checked_int("buffer_size", self.buffer_size, minimum=1)
        if self.min_trajectories is not None:
            values["min_trajectories"] = checked_int(
                "min_trajectories", self.min_trajectories, minimum=1, maximum=self.buffer_size
            )
        values["max_episode_steps"] = checked_int("max_episode_steps", self.max_episode_steps, minimum=1)
        values["num_workers"] = checked_int("num_workers", self.num_workers, minimum=0)
        values["max_generation_attempts"] = checked_int(
            "max_generation_attempts", self.max_generation_attempts, minimum=1
        )
        values["max_worker_restarts"] = checked_int("max_worker_restarts", self.max_worker_restarts, minimum=0)
        if self.state_dim is not None:
            values["state_dim"] = checked_int("state_dim", self.state_dim, minimum=1)
        if self.seed is not None:
            values["seed"] = checked_int("seed", self.seed, minimum=0)
        for name in ("initialization_timeout", "worker_timeout", "shutdown_timeout"):
            values[name] = _positive(name, getattr(self, name))
        if self.refill_threshold is not None:
            values["refill_threshold"] = _positive("refill_threshold", self.refill_threshold)

    def _check_device(self) -> None:
        if isinstance(self.buffer_device, Device):  # not a device of torch, but something that behaves like one
            return
        try:
            self.__dict__["buffer_device"] = checked_device("buffer_device", self.buffer_device)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None

    def _check_actor(self) -> None:
        if self.policy is not None and self.policy_factory is not None:
            raise ConfigError("policy and policy_factory exclude each other; give one of them.")
        valid = "policy must be a policy, a function, 'demo', 'random' or None"
        if isinstance(self.policy, str) and self.policy not in ("demo", "random"):
            raise ConfigError(f"{valid}; got {self.policy!r}.")
        if self.policy is not None and not isinstance(self.policy, str) and not callable(self.policy):
            raise ConfigError(f"{valid}; got a {type(self.policy)}.")
        for name in ("policy_factory", "accept", "env_factory"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise ConfigError(f"{name} must be a function, got a {type(value).__name__}.")

    def _check_source(self) -> None:
        given = [name for name in ("gym_config", "env_factory", "producers") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(
                "Give exactly one of gym_config, env_factory and producers as the source of trajectories; got "
                f"{' and '.join(given) or 'none of them'}."
            )
        if self.action_config is not None and self.gym_config is None:
            raise ConfigError(
                "action_config holds arguments of gymnasium.make and requires gym_config; got it without."
            )
        self.__dict__["_env_maker"] = None
        if self.producers is not None:
            self._check_producers(self.producers)
        else:
            self.__dict__["_env_maker"] = self._make_env_maker()

    def _check_producers(self, producers: Any) -> None:
        for name in ("policy", "policy_factory", "transforms", "state_dim", "start_method"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} applies to environments that the engine makes; remove it, or give no producers."
                )
        if not isinstance(producers, Sequence) or not producers:
            raise ConfigError(f"producers must be a list of one or more iterables, got {producers!r}.")
        for producer in producers:
            if not isinstance(producer, Iterable):
                raise ConfigError(f"producers must be iterables of TensorDicts, got a {type(producer).__name__}.")
            if getattr(producer, "replay_buffer", None) is not None:
                raise ConfigError(
                    f"A {type(producer).__name__} in producers has its own replay buffer, and so yields no data. "
                    "Make it without replay_buffer."
                )

    def _make_env_maker(self) -> EnvMaker:
        # Imported here because it imports Gymnasium, which a process that only samples does not need.
        from embodichain_rl.engine.environments import EnvMaker, embodichain_factory, is_embodichain_config

        gym_config, env_factory = self.gym_config, self.env_factory
        if isinstance(gym_config, (str, os.PathLike)):
            gym_config = load_config(gym_config)
        if gym_config is not None and is_embodichain_config(gym_config):
            env_factory = embodichain_factory(
                gym_config, self.action_config, self.max_episode_steps, source=self.gym_config
            )
            return EnvMaker(
                env_factory=env_factory, max_episode_steps=self.max_episode_steps, transforms=self.transforms
            )
        if self.action_config is not None:
            gym_config = _with_action_config(gym_config, self.action_config)
        return EnvMaker(
            gym_config=gym_config,
            env_factory=env_factory,
            max_episode_steps=self.max_episode_steps,
            transforms=self.transforms,
        )

    @property
    def env_maker(self) -> EnvMaker | None:
        """The maker of a worker's environments; None if ``producers`` are given."""
        self.validate()
        return self._env_maker

    @property
    def filled_at(self) -> int:
        """Number of trajectories at which ``start()`` returns."""
        return self.buffer_size if self.min_trajectories is None else self.min_trajectories

    @property
    def max_total_steps(self) -> int:
        """Number of steps that the buffer has room for."""
        return self.buffer_size * self.max_episode_steps


def _positive(name: str, value: Any) -> float:
    return checked_float(name, value, minimum=math.ulp(0.0))


def _copied(value: Any) -> Any:
    """Copy nested mappings and lists. What they contain is not copied."""
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _unchanged(before: Any, now: Any) -> bool:
    """Compare nested mappings and lists by the identity of what they contain, which may not support ``==``."""
    if isinstance(before, dict) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_unchanged(before[key], now[key]) for key in before)
    if isinstance(before, list | tuple) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(_unchanged, before, now))
    return before is now


def _is_key(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return bool(parts) and all(isinstance(part, str) and part for part in parts)


def _with_action_config(gym_config: Any, action_config: Any) -> Any:
    if not isinstance(action_config, Mapping) or not all(isinstance(key, str) for key in action_config):
        raise ConfigError(f"action_config must be a mapping from argument names to values, got {action_config!r}.")
    if not isinstance(gym_config, Mapping) or not isinstance(gym_config.get("kwargs", {}), Mapping):
        return gym_config  # GymConfig raises the error
    kwargs = gym_config.get("kwargs", {})
    repeated = sorted(kwargs.keys() & action_config.keys())
    if repeated:
        raise ConfigError(f"{repeated} are in both action_config and gym_config['kwargs']; give each once.")
    return {**gym_config, "kwargs": {**kwargs, **action_config}}
