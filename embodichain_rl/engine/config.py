"""``OnlineDataEngineCfg``: the configuration of an engine, a dataclass that is checked when it is made."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_all_start_methods
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import NestedKey

from embodichain_rl._checks import checked_compact, checked_float, checked_int
from embodichain_rl.engine.config_files import load_config
from embodichain_rl.errors import ConfigError, InvalidArgumentError
from embodichain_rl.replay.device import checked_device

if TYPE_CHECKING:
    from embodichain_rl.engine.envs import EnvMaker, Transforms
    from embodichain_rl.engine.policies import Policy

__all__ = ["OnlineDataEngineCfg"]


@dataclass
class OnlineDataEngineCfg:
    """Configuration of an :class:`~embodichain_rl.engine.data.OnlineDataEngine`.

    Give exactly one of ``gym_config``, ``env_factory`` and ``producers`` as the source of trajectories.

    Args:
        buffer_size: number of trajectories that the buffer keeps, the newest ones. ``start()`` fills it completely.
            Default 16.
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
        gym_config: the Gymnasium environment, as a mapping or as the path of a JSON or YAML file. The keys are ``id``
            and optionally ``num_envs`` (environments per worker), ``max_episode_steps`` (the time limit of the
            environment) and ``kwargs`` (for ``gymnasium.make``). Default None.
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
            demonstrations of the environment; or None, the default, for random actions.
        policy_factory: a function that makes the policy in each worker, instead of ``policy``. Its weights can't be
            updated. Default None.
        accept: a function from a whole trajectory ``[T]`` to a bool that selects the trajectories to keep. None, the
            default, keeps all. Exception: if ``policy`` is ``"demo"`` and the environment reports success, None keeps
            the trajectories that end in success.
        max_generation_attempts: number of failures in a row after which the engine fails. A failure is a rejected
            trajectory or a failed plan of a demonstration. They are counted for each environment if ``policy`` is
            ``"demo"``, else for each worker. Default 10.
        refill_threshold: average number of chunks to sample for each trajectory that is replaced. The rate limiter
            blocks producers that are ahead. None, the default, means no rate limiter.
        initialization_timeout: seconds from ``start()`` until the buffer is filled. Also the timeout of each start of a
            worker. Default 600.
        max_worker_restarts: the restart budget: total number of workers that are replaced before the engine fails.
            Default 3.
        worker_timeout: maximum seconds for a step or a reset of the environments, or for a plan of a demonstration. A
            worker without a heartbeat for longer counts as hung. Default 60.
        shutdown_timeout: maximum seconds of ``stop()``. Workers have half of it for a graceful shutdown, in which they
            close their environments. Then they are killed. Default 10.
        seed: a non-negative integer that seeds the workers. Each worker, and each restart of it, has an independent
            random stream, whatever the start method: its environments, the global generators of torch, NumPy and
            ``random``, and the generators that its policy and ``env_factory`` hold. None, the default, means random
            seeds. An environment that can't be seeded then keeps its own random numbers.
        start_method: how worker processes are started: ``"spawn"``, ``"forkserver"`` or ``"fork"``. None, the default,
            means the start method that was chosen by ``multiprocessing.set_start_method``, else ``"spawn"``.
        progress_bar: whether ``start()`` shows a progress bar on stderr. Default True.

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
    refill_threshold: float | None = None
    initialization_timeout: float = 600.0
    max_worker_restarts: int = 3
    worker_timeout: float = 60.0
    shutdown_timeout: float = 10.0
    seed: int | None = None
    start_method: str | None = None
    progress_bar: bool = True
    _env_maker: EnvMaker | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
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
        self._check_source()

    def _check_numbers(self) -> None:
        self.compact = checked_compact(self.compact)
        self.buffer_size = checked_int("buffer_size", self.buffer_size, minimum=1)
        self.max_episode_steps = checked_int("max_episode_steps", self.max_episode_steps, minimum=1)
        self.num_workers = checked_int("num_workers", self.num_workers, minimum=0)
        self.max_generation_attempts = checked_int("max_generation_attempts", self.max_generation_attempts, minimum=1)
        self.max_worker_restarts = checked_int("max_worker_restarts", self.max_worker_restarts, minimum=0)
        if self.state_dim is not None:
            self.state_dim = checked_int("state_dim", self.state_dim, minimum=1)
        if self.seed is not None:
            self.seed = checked_int("seed", self.seed, minimum=0)
        for name in ("initialization_timeout", "worker_timeout", "shutdown_timeout"):
            setattr(self, name, _positive(name, getattr(self, name)))
        if self.refill_threshold is not None:
            self.refill_threshold = _positive("refill_threshold", self.refill_threshold)

    def _check_device(self) -> None:
        try:
            self.buffer_device = checked_device("buffer_device", self.buffer_device)
        except InvalidArgumentError as error:
            raise ConfigError(str(error)) from None

    def _check_actor(self) -> None:
        if self.policy is not None and self.policy_factory is not None:
            raise ConfigError("policy and policy_factory exclude each other; give one of them.")
        if isinstance(self.policy, str) and self.policy != "demo":
            raise ConfigError(f"policy must be a policy, a function, 'demo' or None, got {self.policy!r}.")
        if self.policy is not None and not isinstance(self.policy, str) and not callable(self.policy):
            raise ConfigError(f"policy must be a policy, a function, 'demo' or None, got a {type(self.policy)}.")
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
        if self.producers is not None:
            self._check_producers(self.producers)
        else:
            self._env_maker = self._make_env_maker()

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
        from embodichain_rl.engine.envs import EnvMaker

        gym_config = self.gym_config
        if isinstance(gym_config, (str, os.PathLike)):
            gym_config = load_config(gym_config)
        if self.action_config is not None:
            gym_config = _with_action_config(gym_config, self.action_config)
        return EnvMaker(
            gym_config=gym_config,
            env_factory=self.env_factory,
            max_episode_steps=self.max_episode_steps,
            transforms=self.transforms,
        )

    @property
    def env_maker(self) -> EnvMaker | None:
        """The maker of a worker's environments; None if ``producers`` are given."""
        return self._env_maker

    @property
    def demonstrates(self) -> bool:
        """Whether the trajectories are demonstrations of the environments."""
        return isinstance(self.policy, str)

    @property
    def max_total_steps(self) -> int:
        """Number of steps that the buffer has room for."""
        return self.buffer_size * self.max_episode_steps


def _positive(name: str, value: Any) -> float:
    return checked_float(name, value, minimum=math.ulp(0.0))


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
