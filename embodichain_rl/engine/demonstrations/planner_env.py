"""An environment as demonstrations see it: its planner, its verdicts, and actions that are no tensors.

Methods are looked up on the environment and its wrappers. Those that begin with an underscore are hooks of
EmbodiChain's ``EmbodiedEnv``; every environment may have them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase, is_tensor_collection
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.gym_like import BaseInfoDictReader, GymLikeEnv

from embodichain_rl.engine.environments import SUCCESS_INFO_KEYS, checked_action
from embodichain_rl.errors import ActionMismatchError, EnvOutputError

__all__ = ["DemoEnv", "StepFlags", "find_method", "task_instruction"]

COMMANDS = ("qpos", "qvel")
"""The entries of an action in a TensorDict that are stored, in the order in which an expert action has them."""


class StepFlags(NamedTuple):
    """What one step reported of each row, bool ``[N]``."""

    terminated: torch.Tensor
    truncated: torch.Tensor
    failed: torch.Tensor
    success: torch.Tensor | None
    """None if the step reported nothing about success."""


class DemoEnv:
    """One environment that demonstrates.

    Args:
        env: the environment, with batch size ``[]`` or ``[N]`` and one action key.
        name: its name in messages.
    """

    def __init__(self, env: EnvBase, name: str) -> None:
        self.env = env
        self.name = name
        self.num_rows = env.numel()
        self._base = env.base_env if isinstance(env, TransformedEnv) else env
        self.target: Any = getattr(self._base, "unwrapped", None) or self._base
        """The innermost environment, which holds the task."""
        self._info = _LastInfo()
        self._raw = _RawActions(self._base)
        if isinstance(self._base, GymLikeEnv):
            self._base.set_info_dict_reader(self._info)
        self._is_success = find_method(env, "is_task_success")
        self._normalize = find_method(env, "_normalize_demo_action")
        self._mask = find_method(env, "_mask_demo_action")
        self._publish_mask = find_method(env, "_set_demo_active_mask")
        self._saves_data = find_method(env, "_begin_demo_episode_recording") is not None
        self._held_before: bool | None = None

    @property
    def reports_success(self) -> bool:
        """Whether the environment can tell whether the task was done."""
        return self._is_success is not None or "success" in self.env.observation_spec

    @property
    def judges(self) -> bool:
        """Whether the environment itself judges episodes, with a method ``is_task_success``, as EmbodiChain's do."""
        return self._is_success is not None

    def reset(self) -> TensorDictBase:
        """Begin an episode. Nothing of the one before is recorded by the environment."""
        # Copied, because an environment may reuse the memory of a step.
        if self._saves_data:
            return self.env.reset(options={"save_data": False}).clone()
        return self.env.reset().clone()

    def hold_resets(self, hold: bool) -> None:
        """Set whether the environment leaves rows that have ended as they are, instead of resetting them in a step."""
        if hold and (hasattr(self.target, "_demo_no_auto_reset") or self._saves_data):
            self._held_before = getattr(self.target, "_demo_no_auto_reset", False)
            self.target._demo_no_auto_reset = True
        elif self._held_before is not None:
            self.target._demo_no_auto_reset, self._held_before = self._held_before, None

    def publish(self, active: torch.Tensor) -> None:
        """Tell the environment which rows take part, bool ``[N]``."""
        if self._publish_mask is not None:
            self._publish_mask(tuple(active.tolist()))

    @property
    def continuity_id(self) -> int:
        """The number of the causally continuous part of the episode that the next step belongs to."""
        return int(getattr(self.target, "_demo_continuity_id", 0))

    def prepared(self, action: Any, active: torch.Tensor) -> Any:
        """Return an action of a plan as the environment takes it, given the rows that take part."""
        if self._normalize is not None:
            action = self._normalize(action)
        if self._mask is not None and not bool(active.all()):
            action = self._mask(action, tuple(active.tolist()))
        return action

    def step(self, state: TensorDictBase, action: Any) -> TensorDictBase:
        """Execute a prepared action, and return a copy of the step, with what is stored as its action."""
        env = self.env
        stored = checked_action(
            _stored(action, self.target), env.action_spec, source=f"The demonstration of {self.name}"
        )
        state.set(env.action_key, stored)
        with self._raw.given(action, self._normalize is not None):
            return env.step(state).clone()

    def step_unrecorded(self, state: TensorDictBase, action: Any) -> None:
        """Execute an action that belongs to no trajectory."""
        action = action if self._normalize is None else self._normalize(action)
        stored = checked_action(
            _stored(action, self.target), self.env.action_spec, source=f"abort_actions of {self.name}"
        )
        with self._raw.given(action, self._normalize is not None):
            self._base.step(state.clone(False).set(self.env.action_key, stored))

    def flags(self, step: TensorDictBase) -> StepFlags:
        """Return what a step reported."""
        following, info = step["next"], self.last_info()
        done = _rows(following["done"], self.num_rows)
        truncated = _rows(following.get("truncated", None), self.num_rows)
        terminated = _rows(following.get("terminated", done & ~truncated), self.num_rows)
        success = next((info[key] for key in SUCCESS_INFO_KEYS if key in info), following.get("success", None))
        failed = info.get("fail", following.get("fail", None))
        return StepFlags(
            terminated,
            truncated,
            _rows(failed, self.num_rows),
            None if success is None else _rows(success, self.num_rows),
        )

    def last_info(self) -> Mapping[str, Any]:
        """Return Gymnasium's ``info`` of the last step; empty for other environments."""
        return getattr(self._base, "last_info", None) or self._info.latest

    def rows(self, value: Any) -> torch.Tensor:
        """Return a flag, or one flag per row, as bool ``[N]`` on the CPU."""
        return _rows(value, self.num_rows)

    def is_success(self) -> torch.Tensor | None:
        """Ask the environment whether the task is done, bool ``[N]``; None if it can't be asked."""
        return None if self._is_success is None else _rows(self._is_success(), self.num_rows)


def find_method(env: EnvBase, name: str) -> Callable[..., Any] | None:
    """Return a method of an environment or of one of its wrappers; None if there is none."""
    get_wrapper_attr = getattr(env, "get_wrapper_attr", None)  # Gymnasium's search in the wrappers
    try:
        found = get_wrapper_attr(name) if get_wrapper_attr is not None else getattr(env, name)
    except AttributeError:
        return None
    return found if callable(found) else None


def task_instruction(env: EnvBase) -> str | None:
    """Return the instruction of the whole task, which segments without one have; None if the environment has none.

    It is the first of ``cfg.task_program.instruction``, ``cfg.task_instruction``, the ``params["instruction"]`` of an
    entry of ``cfg.dataset``, and ``metadata["dataset"]["instruction"]``. The last two may be ``{"lang": text}``.
    """
    base = env.base_env if isinstance(env, TransformedEnv) else env
    target = getattr(base, "unwrapped", None) or base
    cfg = getattr(target, "cfg", None)
    dataset = _value(cfg, "dataset")
    entries = dataset.values() if isinstance(dataset, Mapping) else vars(dataset).values() if dataset else ()
    candidates = [
        _value(_value(cfg, "task_program"), "instruction"),
        _value(cfg, "task_instruction"),
        *(_value(_value(entry, "params"), "instruction") for entry in entries),
        _value(_value(getattr(target, "metadata", None), "dataset"), "instruction"),
    ]
    for candidate in candidates:
        text = candidate.get("lang") if isinstance(candidate, Mapping) else candidate
        if isinstance(text, str) and text.strip():
            return text.strip()
    return None


def _value(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)


def _rows(value: Any, num_rows: int) -> torch.Tensor:
    """Return one flag per row, bool ``[N]`` on the CPU; None is False for all."""
    if value is None:
        return torch.zeros(num_rows, dtype=torch.bool)
    flags = torch.as_tensor(value).to(device="cpu", dtype=torch.bool)
    if num_rows == 1:
        return flags.any().reshape(1)
    if flags.numel() != 1 and (not flags.ndim or flags.shape[0] != num_rows):
        raise EnvOutputError(f"Got flags of shape {list(flags.shape)} for {num_rows} rows; needed is one flag per row.")
    return flags.reshape(-1).expand(num_rows) if flags.numel() == 1 else flags.reshape(num_rows, -1).any(-1)


def _stored(action: Any, target: Any) -> Any:
    """Return what is stored of an action: a tensor, or of an action in a TensorDict the commands that the task names.

    An object with the attributes ``value`` and ``metadata``, such as EmbodiChain's ``ControllerAction``, stands for its
    value.
    """
    if not isinstance(action, torch.Tensor) and hasattr(action, "value") and hasattr(action, "metadata"):
        action = action.value
    if not is_tensor_collection(action):
        return action
    spec = getattr(target, "expert_action_spec", None)
    commands = COMMANDS if getattr(spec, "joint_command_mode", "position") == "position_velocity" else COMMANDS[:1]
    keys = list(action.keys())
    if len(keys) == 1:
        return action[keys[0]]
    if any(command not in keys for command in commands):
        raise ActionMismatchError(
            f"Got an action with the entries {keys}; of several entries, {list(commands)} are stored and needed."
        )
    return torch.cat([action[command] for command in commands], -1)


class _LastInfo(BaseInfoDictReader):
    """A reader that remembers Gymnasium's ``info`` of the last step, and writes nothing."""

    def __init__(self) -> None:
        self.latest: Mapping[str, Any] = {}

    def __call__(self, info_dict: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        self.latest = info_dict
        return tensordict

    @property
    def info_spec(self) -> dict[str, Any]:
        return {}


class _RawActions:
    """Passes actions to a Gymnasium environment as they are, which TorchRL would convert to arrays.

    Args:
        base: the environment. It is a ``GymWrapper``, or has a method ``use_raw_action``; others take tensors only.
    """

    def __init__(self, base: EnvBase) -> None:
        self._pending: Any = None
        self._supported = True
        use: Any = getattr(base, "use_raw_action", None)
        if use is not None:
            self._use = use
        elif isinstance(base, GymLikeEnv):
            self._read = base.read_action
            # An attribute of the instance, since TorchRL offers no other way to the environment's own action.
            base.read_action = self._read_action
            self._use = self._set
        else:
            self._supported = False

    def _set(self, action: Any) -> None:
        self._pending = action

    def _read_action(self, action: torch.Tensor) -> Any:
        return self._read(action) if self._pending is None else self._pending

    def given(self, action: Any, normalized: bool) -> _Given:
        """Return a context in which the environment receives ``action`` itself, unless it is an ordinary one.

        Args:
            action: the action.
            normalized: whether the environment has normalised it, and so takes tensors.
        """
        is_raw = is_tensor_collection(action) or hasattr(action, "metadata")
        if is_raw and not self._supported:
            raise ActionMismatchError(
                f"Got an action of type {type(action).__name__}, but the environment takes tensors only."
            )
        if not self._supported or not (is_raw or (normalized and isinstance(action, torch.Tensor))):
            return _Given(None, None)
        return _Given(self._use, action)


class _Given:
    def __init__(self, use: Callable[[Any], None] | None, action: Any) -> None:
        self._use, self._action = use, action

    def __enter__(self) -> None:
        if self._use is not None:
            self._use(self._action)

    def __exit__(self, *exception: object) -> None:
        if self._use is not None:
            self._use(None)
