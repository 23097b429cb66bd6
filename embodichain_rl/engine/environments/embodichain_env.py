"""Environments of EmbodiChain: from its configurations, and as TorchRL environments.

EmbodiChain (https://github.com/DexForce/EmbodiChain) is a simulation framework for embodied AI. It is optional, and
imported by the process that makes an environment. Its environments are vectorised: one simulator with ``num_envs``
rows, whose observations, rewards and flags are tensors on the device of the simulator.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import gymnasium
import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from embodichain_rl.errors import ConfigError

__all__ = ["EmbodiChainEnv", "EmbodiChainEnvFactory", "embodichain_factory", "is_embodichain_config"]

PARTS = ("env", "robot", "environment", "embodiment", "scene", "task_program", "sensor", "rigid_object", "background")
"""Keys of a configuration of EmbodiChain, which no other ``gym_config`` has."""

GYM_UTILS = "embodichain.lab.gym.utils.gym_utils"

NO_AUTO_RESET = ("_demo_no_auto_reset", "_replay_no_auto_reset")
"""Attributes by which an environment is told not to reset rows within a step; the first is younger."""


def is_embodichain_config(gym_config: Any) -> bool:
    """Return whether ``gym_config`` is a configuration of an EmbodiChain environment, by its keys.

    Example:
        >>> is_embodichain_config({"id": "SimpleTask-v1", "env": {}, "robot": {"uid": "UR10"}})
        True
        >>> is_embodichain_config({"id": "Pendulum-v1", "kwargs": {"g": 9.81}})
        False
    """
    return isinstance(gym_config, Mapping) and any(
        isinstance(gym_config.get(key), Mapping | list | tuple) for key in PARTS
    )


@dataclass(frozen=True)
class EmbodiChainEnvFactory:
    """A function that makes the environment of one of EmbodiChain's configurations, as its own worker does.

    The keys ``headless`` (default True), ``renderer``, ``gpu_id`` and ``device`` override those of the simulator. A
    list of ``gpu_id`` or ``device`` has one value per worker, in turns.

    Args:
        gym_config: the parsed configuration.
        action_config: additional arguments of ``gymnasium.make``.
        max_episode_steps: maximum steps of an episode.
        source_path: the file of the configuration, from which relative paths in it are resolved.
        worker: the index of the worker.

    Raises:
        ConfigError: the configuration has no ``id``, or EmbodiChain is not installed.
    """

    gym_config: Mapping[str, Any]
    action_config: Mapping[str, Any]
    max_episode_steps: int
    source_path: str | None = None
    worker: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.gym_config.get("id"), str):
            raise ConfigError(f"gym_config needs the key 'id', the environment's name; got {sorted(self.gym_config)}.")
        if "embodichain" not in sys.modules and importlib.util.find_spec("embodichain") is None:
            raise ConfigError(
                f"gym_config of {self.gym_config['id']!r} is a configuration of EmbodiChain, DexForce's simulation "
                "framework for embodied AI (https://github.com/DexForce/EmbodiChain), which is not installed. Install "
                "it with pip install 'embodichain-rl[embodichain]', or give the configuration of a Gymnasium "
                "environment."
            )

    def __str__(self) -> str:
        return str(self.gym_config["id"])

    def for_worker(self, index: int) -> EmbodiChainEnvFactory:
        """Return the factory of worker ``index``."""
        return replace(self, worker=index)

    def __call__(self) -> EmbodiChainEnv:
        utils = importlib.import_module(GYM_UTILS)
        with contextlib.suppress(ImportError, AttributeError):  # versions in which tasks register themselves
            importlib.import_module("embodichain.lab.gym.utils.registration").discover_task_packages()
        arguments: dict[str, Any] = {"manager_modules": utils.get_manager_modules()}
        if self.source_path is not None and "source_path" in inspect.signature(utils.config_to_cfg).parameters:
            arguments["source_path"] = self.source_path
        gym_config = copy.deepcopy(dict(self.gym_config))
        env_cfg = utils.config_to_cfg(gym_config, **arguments)
        env_cfg.filter_dataset_saving = True
        env_cfg.init_rollout_buffer = False
        env_cfg.max_episode_steps = self.max_episode_steps
        self._override(env_cfg.sim_cfg)
        return EmbodiChainEnv(gymnasium.make(id=gym_config["id"], cfg=env_cfg, **self.action_config))

    def _override(self, sim_cfg: Any) -> None:
        sim_cfg.headless = bool(self.gym_config.get("headless", True))
        renderer, gpu_id, device = (self._own(key) for key in ("renderer", "gpu_id", "device"))
        if isinstance(renderer, str):  # the page of EmbodiChain also gives True, for the default
            sim_cfg.render_cfg.renderer = renderer
        if gpu_id is not None:
            sim_cfg.gpu_id = int(gpu_id)
        if device is not None:
            setattr(sim_cfg, "device" if hasattr(sim_cfg, "device") else "sim_device", device)

    def _own(self, key: str) -> Any:
        value = self.gym_config.get(key)
        return value[self.worker % len(value)] if isinstance(value, list | tuple) and value else value


class EmbodiChainEnv(EnvBase):
    """A TorchRL environment over a vectorised EmbodiChain environment; its batch size is ``[num_envs]``.

    Observations keep their nesting: ``("robot", "qpos")``, ``("sensor", "cam_high", "color")``. ``"success"``, bool
    ``[num_envs, 1]``, is what ``info`` says. Rows are reset by TorchRL, one by one, and never within a step: so the
    last observation of an episode is its own. Nothing is recorded by EmbodiChain's dataset managers.

    Args:
        env: the environment, as ``gymnasium.make`` returns it.
        device: the device of the tensors; those of the simulator are copied there. Default: the CPU.

    Attributes:
        last_info (dict[str, Any]): ``info`` of the last step.

    Example:
        >>> import gymnasium
        >>> from embodichain_rl.interop.embodichain import EmbodiChainEnv
        >>> env = EmbodiChainEnv(gymnasium.make("SimpleTask-v1", cfg=cfg))  # doctest: +SKIP
    """

    def __init__(self, env: Any, *, device: torch.device | str = "cpu") -> None:
        self._gym = env
        self._target = getattr(env, "unwrapped", env)
        num_rows = int(self._target.num_envs)
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_rows]))
        for name in NO_AUTO_RESET:
            setattr(self._target, name, True)
        self.last_info: dict[str, Any] = {}
        self._seed: int | None = None
        self._raw_action: Any = None
        observation, _ = env.reset(options={"save_data": False})
        self.observation_spec = Composite(
            {
                **_spec_of(self._converted(observation)),
                "success": Categorical(2, shape=(num_rows, 1), dtype=torch.bool),
            },
            shape=(num_rows,),
        ).to(self.device)
        self._action_width = int(env.action_space.shape[-1])
        self.action_spec = self._make_action_spec(num_rows)
        self.reward_spec = Unbounded(shape=(num_rows, 1), device=self.device)
        flags = {}
        for name in ("done", "terminated", "truncated"):
            flags[name] = Categorical(2, shape=(num_rows, 1), dtype=torch.bool)
        self.done_spec = Composite(flags, shape=(num_rows,)).to(self.device)

    def _make_action_spec(self, num_rows: int) -> TensorSpec:
        expert = getattr(self._target, "expert_action_spec", None)
        if getattr(expert, "joint_command_mode", "position") == "position_velocity":
            return Unbounded(shape=(num_rows, int(expert.width)), device=self.device)  # type: ignore[union-attr]
        space = self._gym.action_space
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            return Unbounded(shape=(num_rows, self._action_width), device=self.device)
        shape = torch.Size([num_rows, self._action_width])
        return Bounded(
            low.expand(shape).clone(), high.expand(shape).clone(), shape, device=self.device, dtype=low.dtype
        )

    @property
    def unwrapped(self) -> Any:
        """EmbodiChain's own environment."""
        return self._target

    @property
    def plans_demonstrations(self) -> bool:
        """Whether the task plans demonstrations, rather than inheriting methods that raise ``NotImplementedError``."""
        task = getattr(self._target, "cfg", None)
        if getattr(task, "task_program", None) is not None:
            return True
        for name in ("create_demo_segments", "create_demo_action_list"):
            method = getattr(self._target, name, None)
            if method is not None and not str(getattr(method, "__module__", "")).startswith(
                "embodichain.lab.gym.envs.e"
            ):
                return True
        return False

    def get_wrapper_attr(self, name: str) -> Any:
        """Return an attribute of EmbodiChain's environment, or of a wrapper around it."""
        found = getattr(self._gym, "get_wrapper_attr", None)
        return getattr(self._gym, name) if found is None else found(name)

    def use_raw_action(self, action: Any) -> None:
        """Let the next step execute ``action`` as it is, such as a TensorDict or a ``ControllerAction``."""
        self._raw_action = action

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        options = {"save_data": False, **(kwargs.pop("options", None) or {})}
        which = None if tensordict is None else tensordict.get("_reset", None)
        if which is not None and not bool(which.all()):
            rows = which.reshape(self.batch_size[0], -1).any(-1)
            options["reset_ids"] = rows.nonzero().flatten().to(self._simulator_device())
        seed, self._seed = kwargs.pop("seed", self._seed), None
        observation, _ = self._gym.reset(seed=seed, options=options)
        self.last_info = {}
        return self._with_success(self._converted(observation), None)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = self._raw_action
        if action is None:
            action = tensordict["action"][..., : self._action_width].to(self._simulator_device())
        observation, reward, terminated, truncated, info = self._gym.step(action)
        self.last_info = dict(info.items())
        result = self._with_success(self._converted(observation), self.last_info.get("success"))
        flags = {"terminated": self._flag(terminated), "truncated": self._flag(truncated)}
        result.update({**flags, "done": flags["terminated"] | flags["truncated"]})
        reward = torch.as_tensor(reward).to(self.device, torch.float32, copy=True)
        return result.set("reward", reward.reshape(*self.batch_size, 1))

    def _converted(self, observation: Any) -> TensorDict:
        return TensorDict({key: self._copied(value) for key, value in observation.items()}, self.batch_size)

    def _copied(self, value: Any) -> Any:
        if isinstance(value, Mapping) or is_tensor_collection(value):
            return self._converted(value)
        return torch.as_tensor(value).to(self.device, copy=True)

    def _with_success(self, observation: TensorDict, success: Any) -> TensorDict:
        found = torch.zeros(*self.batch_size, 1, dtype=torch.bool) if success is None else self._flag(success)
        return observation.set("success", found.to(self.device))

    def _flag(self, value: Any) -> torch.Tensor:
        return torch.as_tensor(value).to(self.device, torch.bool, copy=True).reshape(*self.batch_size, 1)

    def _simulator_device(self) -> torch.device:
        return torch.device(getattr(self._target, "device", "cpu"))

    def _set_seed(self, seed: int | None) -> None:
        self._seed = seed

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment, and raise what it raises."""
        already = self.is_closed
        super().close(raise_if_closed=raise_if_closed)
        if not already:
            self._gym.close()


def _spec_of(observation: TensorDictBase) -> dict[str, Any]:
    return {
        key: Composite(_spec_of(value), shape=observation.batch_size)
        if is_tensor_collection(value)
        else Unbounded(shape=value.shape, dtype=value.dtype)
        for key, value in observation.items()
    }


def embodichain_factory(
    gym_config: Mapping[str, Any], action_config: Mapping[str, Any] | None, max_episode_steps: int, source: Any
) -> EmbodiChainEnvFactory:
    """Return the factory of a configuration, read from the file ``source`` if that is a path."""
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    own = gym_config.get("max_episode_steps")
    steps = min(max_episode_steps, own) if isinstance(own, int) and own > 0 else max_episode_steps
    return EmbodiChainEnvFactory(gym_config, dict(action_config or {}), steps, path)
