"""Rollout of the demonstrations that an environment plans itself.

The environment, or a Gymnasium wrapper around it, has one of two methods:

* ``create_demo_segments()`` returns or lazily yields the segments of one demonstration: objects with ``actions`` (an
  iterable of actions ``[*action]``, or one array ``[T, *action]``), ``name`` and ``instruction``. The next segment is
  requested after all actions of the previous one have been executed, so it may be planned from the resulting state.
* ``create_demo_action_list()`` returns the actions of a demonstration with a single segment.

Both plan from the state after a reset. Planning has failed if the plan is None or empty, a segment has no actions, or
an exception is raised. Then the environment is reset and plans again.

The contract is that of EmbodiChain's ``DemoSegment`` and ``execute_demo_episode``:

* **Success.** A row of the environment succeeds if it terminates with success, or if the environment's
  ``is_task_success()`` is true when the plan is exhausted. Truncation and ``info["fail"]`` are failures. Without this
  method, ``success`` of the last step decides, also of a truncated episode; and without ``success`` every row succeeds
  but for ``info["fail"]``.
* **Segments** may have ``target_uid``, the object that they are about; ``validator()``, which returns one flag per row
  after the last action; ``failure_policy``: ``"batch_abort"`` ends all rows if one fails, the default of environments
  with ``is_task_success()``, and ``"row_independent"`` only that one; and ``abort_actions(reason,
  last_action_consumed=...)``, which returns actions to execute if the segment ends before its actions do. A segment
  without an instruction has that of the task.
* **Actions** are arrays, tensors, TensorDicts or objects with ``value`` and ``metadata``. The environment's
  ``_normalize_demo_action(action)`` and, when some rows have ended, ``_mask_demo_action(action, active_mask)`` are
  called before the step.
* **Continuity.** Where the environment's ``_demo_continuity_id``, or the ``continuity_id`` of a segment, changes, the
  state was restored: the parts are separate trajectories.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from embodichain_rl.engine.demonstrations.episode import FAILURES, Episode, PlannedStep
from embodichain_rl.engine.demonstrations.planner_env import DemoEnv, find_method, task_instruction
from embodichain_rl.errors import ConfigError, GenerationFailedError, InvalidArgumentError
from embodichain_rl.replay.schema import as_non_tensor
from embodichain_rl.replay.writing import Accept, AcceptFilter

__all__ = [
    "DemonstrationRollout",
    "Segment",
    "find_planner",
    "offers_demonstrations",
    "segment_texts",
    "takes_env",
    "with_target",
]

SEGMENT_TEXTS = ("segment_name", "instruction")
"""The keys of the text of a step's segment."""

TARGET = "target_uid"
"""The key of the object that a step's segment is about, as text."""


@dataclass(frozen=True)
class Segment:
    """A named part of a demonstrated trajectory.

    Args:
        name: the name that the environment gives it.
        instruction: the task in words, or None if the environment gives none.
        num_steps: the number of steps of the trajectory that belong to it.
        target_uid: the object that it is about, or None.
    """

    name: str
    instruction: str | None
    num_steps: int
    target_uid: str | None = None


class DemonstrationRollout:
    """An endless iterator over demonstrated trajectories, in round-robin order of the environments.

    Each item is one whole trajectory, a TensorDict ``[T]``. It has the keys that a TorchRL collector writes, and for
    every step ``"segment_id"`` (int64 ``[T]``, index of the segment in the trajectory) and ``"segment_step"`` (int64
    ``[T]``, index of the step in its segment). If the environment has ``create_demo_segments``, each step also has the
    texts ``"segment_name"`` and ``"instruction"`` of its segment (``""`` for None), unless they are keys of the
    observation already. ``("collector", "traj_ids")`` counts the items from 0. A trajectory ends at the end of the
    episode or after the last action of the demonstration. In the latter case its last step is ``truncated`` and
    ``done``.

    The environments take turns, and each makes one attempt per turn. An environment with a batch size ``[N]`` plans
    actions ``[N, *action]`` for all its rows at once. Each row is a separate trajectory, accepted and counted
    independently.

    Args:
        envs: the environments, see :meth:`EnvMaker.each() <embodichain_rl.engine.environments.EnvMaker.each>`. The
            caller owns them: it seeds and closes them.
        accept: a function from a trajectory ``[T]`` to a bool. Accepted trajectories are yielded, the others are
            counted as rejected. If it takes a second argument, it gets the innermost environment, in the state after
            the last step. None accepts those that have done the task; all, if the environment can't tell.
        max_generation_attempts: number of failures in a row of one environment that raises an error. A failure is a
            failed plan or a rejected trajectory.

    Attributes:
        segments (tuple[Segment, ...]): the segments of the latest trajectory.

    Raises:
        ConfigError: an environment has no demonstrations, or is a batch of several environments.
        InvalidArgumentError: an argument is invalid.
        GenerationFailedError: by iteration, if one environment has failed too many times in a row. The trajectories of
            the other environments are not lost. Iteration can be continued: the count of failures starts from 0.
        ActionMismatchError: by iteration, if an action of a demonstration does not match the environment's action
            spec.

    Example:
        >>> import gymnasium
        >>> from torchrl.envs import GymWrapper
        >>> class Swing(gymnasium.Wrapper):
        ...     def create_demo_action_list(self):
        ...         return [[2.0], [-2.0], [2.0]]
        >>> rollout = DemonstrationRollout([GymWrapper(Swing(gymnasium.make("Pendulum-v1")))])
        >>> next(rollout)["action"].flatten()
        tensor([ 2., -2.,  2.])
        >>> rollout.segments
        (Segment(name='demonstration', instruction=None, num_steps=3, target_uid=None),)
    """

    def __init__(
        self, envs: Sequence[EnvBase], *, accept: Accept | None = None, max_generation_attempts: int = 10
    ) -> None:
        if isinstance(envs, EnvBase) or not envs:
            raise InvalidArgumentError("envs must be a list of one or more TorchRL environments.")
        self.segments: tuple[Segment, ...] = ()
        self._demonstrators = [
            _Demonstrator(index, env, accept, max_generation_attempts) for index, env in enumerate(envs)
        ]
        self._turn = 0
        self._ready: deque[_Demonstrated | GenerationFailedError] = deque()
        self._num_yielded = 0

    @property
    def num_accepted(self) -> int:
        """Number of accepted trajectories."""
        return sum(filter_.num_accepted for filter_ in self._filters())

    @property
    def num_rejected(self) -> int:
        """Number of rejected trajectories."""
        return sum(filter_.num_rejected for filter_ in self._filters())

    @property
    def num_failed(self) -> int:
        """Number of attempts whose planning failed, summed over all rows of all environments."""
        return sum(filter_.num_failed for filter_ in self._filters())

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self

    def __next__(self) -> TensorDictBase:
        while not self._ready:
            demonstrator = self._demonstrators[self._turn]
            self._turn = (self._turn + 1) % len(self._demonstrators)
            self._ready.extend(demonstrator.attempt())
        item = self._ready.popleft()
        if isinstance(item, GenerationFailedError):
            raise item
        steps = item.steps
        steps["collector", "traj_ids"] = torch.full((len(steps),), self._num_yielded, device=steps.device)
        self.segments = item.segments
        self._num_yielded += 1
        return steps

    def _filters(self) -> Iterator[AcceptFilter]:
        for demonstrator in self._demonstrators:
            yield from demonstrator.filters


def find_planner(env: EnvBase) -> Callable[[], Iterable[Any] | None]:
    """Return the method of an environment that plans the segments of a demonstration.

    The search covers the TorchRL environment and the wrappers of a Gymnasium environment, from the outermost inwards.
    ``create_demo_segments`` takes precedence over ``create_demo_action_list``, whose actions become one segment.

    Args:
        env: the environment. Its batch size is ``[]``, or ``[N]`` for one simulator with N rows.

    Returns:
        A function that plans from the current state of the environment and returns segments, or None if planning
        failed.

    Raises:
        ConfigError: the environment has neither method, or is a batch of several environments.
    """
    if isinstance(env.base_env if isinstance(env, TransformedEnv) else env, BatchedEnvBase):
        raise ConfigError(
            f"{env} is a batch of several environments, each of which plans its own demonstrations; pass them as a "
            "list of separate environments, as EnvMaker.each() makes them."
        )
    create_segments = find_method(env, "create_demo_segments")
    if create_segments is not None:
        return create_segments
    create_action_list = find_method(env, "create_demo_action_list")
    if create_action_list is not None:
        return partial(_one_segment, create_action_list)
    raise ConfigError(
        f"{env} has no demonstrations: it needs a method create_demo_segments() or create_demo_action_list(). Give the "
        "environment one, or choose another policy."
    )


def offers_demonstrations(env: EnvBase) -> bool:
    """Return whether an environment plans demonstrations, so that :func:`find_planner` finds a method."""
    base = env.base_env if isinstance(env, TransformedEnv) else env
    try:
        find_planner(env)
    except ConfigError:
        return False
    return bool(getattr(base, "plans_demonstrations", True))


def segment_texts(env: EnvBase) -> tuple[str, ...]:
    """Return the keys of the segment texts that are added to the steps of an environment's demonstrations."""
    if find_method(env, "create_demo_segments") is None and task_instruction(env) is None:
        return ()
    return tuple(key for key in SEGMENT_TEXTS if key not in env.observation_spec)


def with_target(steps: TensorDictBase) -> TensorDictBase:
    """Add an empty ``"target_uid"`` to demonstrated steps with texts whose segments have none.

    An engine stores the key for every environment with segments, since it can't know before it plans.
    """
    if "segment_name" in steps and TARGET not in steps:
        steps[TARGET] = as_non_tensor([""] * len(steps))
    return steps


@dataclass(frozen=True)
class _ActionList:
    actions: Any
    name: str = "demonstration"
    instruction: str | None = None


def _one_segment(create_action_list: Callable[[], Any]) -> list[_ActionList] | None:
    actions = create_action_list()
    return None if actions is None else [_ActionList(actions)]


class _Demonstrated(NamedTuple):
    steps: TensorDictBase
    segments: tuple[Segment, ...]
    success: bool


class _Demonstrator:
    """One environment with its planner and the filters that count its attempts."""

    def __init__(self, index: int, env: EnvBase, accept: Accept | None, max_generation_attempts: int) -> None:
        self._plan = find_planner(env)
        # The id of a registered environment, since the repr of a TorchRL environment can be very long.
        name = f"Environment {index} ({getattr(getattr(env, 'spec', None), 'id', type(env).__name__)})"
        if env.ndim > 1 or len(env.action_keys) != 1:
            raise ConfigError(
                f"Demonstrations need a batch size [] or [N] and one action key; {name} has batch size "
                f"{list(env.batch_size)} and {env.action_keys}."
            )
        self._env = DemoEnv(env, name)
        self._texts = segment_texts(env)
        self._instruction = task_instruction(env)
        if accept is not None and not callable(accept):
            raise InvalidArgumentError(f"accept must be a function of a trajectory, got {accept!r}.")
        self._accept = accept
        self._asks_env = accept is not None and takes_env(accept)
        self.filters = [
            AcceptFilter(
                self._judge,
                max_generation_attempts=max_generation_attempts,
                environment=name + (f", row {row}," if env.ndim else ""),
            )
            for row in range(env.numel())
        ]

    def _judge(self, demonstrated: Any) -> bool:
        if self._accept is None:
            return demonstrated.success
        if self._asks_env:
            return bool(self._accept(demonstrated.steps, self._env.target))  # type: ignore[call-arg]
        return bool(self._accept(demonstrated.steps))

    def attempt(self) -> list[_Demonstrated | GenerationFailedError]:
        """Make one attempt. Return the accepted trajectories, then an error for each row that failed too often."""
        accepted: list[_Demonstrated | GenerationFailedError] = []
        exhausted: list[_Demonstrated | GenerationFailedError] = []
        episode = self._roll_out()
        rows = _rows_of(episode, self._env)
        for filter_, reason, steps, length in zip(self.filters, episode.reasons, rows, episode.lengths, strict=True):
            try:
                if reason != "success" and reason not in FAILURES:
                    filter_.failed(reason, episode.error)
                    continue
                assert steps is not None
                whole = self._whole(steps[:length], episode.planned[:length], reason == "success")
                if filter_.admit(whole):
                    accepted.extend(_continuous_parts(whole, episode.planned[:length]))
            except GenerationFailedError as error:
                exhausted.append(error)
        return accepted + exhausted

    @torch.no_grad()
    def _roll_out(self) -> Episode:
        episode = Episode(self._env, self._plan, self._instruction)
        episode.run()
        return episode

    def _whole(self, steps: TensorDictBase, planned: list[PlannedStep], success: bool) -> _Demonstrated:
        """Complete the steps ``[T]`` of one row: the end of the episode, the verdict and the segments."""
        _end_episode(steps)
        if self._env.reports_success and ("next", "success") in steps.keys(True):
            steps["next", "success"][-1] = success
        for key in ("segment_id", "segment_step"):
            steps[key] = torch.tensor([getattr(step, key) for step in planned], device=steps.device)
        texts = self._texts
        if texts and TARGET not in steps and any(step.has_target for step in planned):
            texts = (*texts, TARGET)
        for key in texts:
            steps[key] = as_non_tensor([step.text(key) for step in planned])
        return _Demonstrated(steps, _segments(planned), success)


def takes_env(accept: Callable[..., Any]) -> bool:
    """Return whether a function ``accept`` takes the environment as a second argument."""
    try:
        parameters = inspect.signature(accept).parameters.values()
    except (TypeError, ValueError):  # a function without a signature, such as a builtin one
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) >= 2


def _rows_of(episode: Episode, env: DemoEnv) -> list[TensorDictBase | None]:
    """Return the steps of each row, ``[T']``; None for all if there are none."""
    if not episode.frames:
        return [None] * env.num_rows
    return list(torch.stack(episode.frames, dim=env.env.ndim).reshape(-1, len(episode.frames)))


def _end_episode(steps: TensorDictBase) -> None:
    """Mark the last step as truncated, unless the environment has ended the episode there."""
    following = steps["next"]
    if following["done"][-1].any():
        return
    for key in ("truncated", "done"):
        if key in following:
            following[key][-1] = True


def _segments(planned: Sequence[PlannedStep]) -> tuple[Segment, ...]:
    last = {step.segment_id: step for step in planned}.values()
    count = Counter(step.segment_id for step in planned)
    return tuple(Segment(s.segment_name, s.instruction, count[s.segment_id], s.target_uid) for s in last)


def _continuous_parts(whole: _Demonstrated, planned: list[PlannedStep]) -> Iterator[_Demonstrated]:
    """Cut a trajectory where the state was restored, so that no chunk reaches across."""
    ids = [step.continuity_id for step in planned]
    edges = [0, *(index for index in range(1, len(ids)) if ids[index] != ids[index - 1]), len(ids)]
    if len(edges) == 2:
        yield whole
        return
    for start, end in itertools.pairwise(edges):
        steps = whole.steps[start:end].clone()
        _end_episode(steps)
        yield _Demonstrated(steps, _segments(planned[start:end]), whole.success)
