"""Rollout of the demonstrations that an environment plans itself.

The environment, or a Gymnasium wrapper around it, has one of two methods:

* ``create_demo_segments()`` returns or lazily yields the segments of one demonstration: objects with ``actions`` (an
  iterable of actions ``[*action]``, or one array ``[T, *action]``), ``name`` and ``instruction``. The next segment is
  requested after all actions of the previous one have been executed, so it may be planned from the resulting state.
* ``create_demo_action_list()`` returns the actions of a demonstration with a single segment.

Both plan from the state after a reset. Planning has failed if the plan is None or empty, a segment has no actions, or
an exception is raised. Then the environment is reset and plans again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase
from torchrl.envs import EnvBase, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from embodichain_rl.engine.policies import checked_action
from embodichain_rl.errors import ConfigError, GenerationFailedError, InvalidArgumentError
from embodichain_rl.replay.schema import as_non_tensor
from embodichain_rl.replay.writing import Accept, AcceptFilter, accept_all, accept_success

__all__ = ["DemonstrationRollout", "Segment", "find_planner", "segment_texts"]

SEGMENT_TEXTS = ("segment_name", "instruction")
"""The keys of the text of a step's segment."""


@dataclass(frozen=True)
class Segment:
    """A named part of a demonstrated trajectory.

    Args:
        name: the name that the environment gives it.
        instruction: the task in words, or None if the environment gives none.
        num_steps: the number of steps of the trajectory that belong to it.
    """

    name: str
    instruction: str | None
    num_steps: int


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
        envs: the environments, see :meth:`EnvMaker.each() <embodichain_rl.engine.envs.EnvMaker.each>`. The caller owns
            them: it seeds and closes them.
        accept: a function from a trajectory ``[T]`` to a bool. Accepted trajectories are yielded, the others are
            counted as rejected. None means :func:`accept_success` if the environment has a ``"success"`` key, else
            :func:`accept_all`.
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
        (Segment(name='demonstration', instruction=None, num_steps=3),)
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
    create_segments = _method(env, "create_demo_segments")
    if create_segments is not None:
        return create_segments
    create_action_list = _method(env, "create_demo_action_list")
    if create_action_list is not None:
        return partial(_one_segment, create_action_list)
    raise ConfigError(
        f"{env} has no demonstrations: it needs a method create_demo_segments() or create_demo_action_list(). Give the "
        "environment one, or choose another policy."
    )


def segment_texts(env: EnvBase) -> tuple[str, ...]:
    """Return the keys of the segment texts that are added to the steps of an environment's demonstrations."""
    if _method(env, "create_demo_segments") is None:
        return ()
    return tuple(key for key in SEGMENT_TEXTS if key not in env.observation_spec)


def _method(env: EnvBase, name: str) -> Callable[[], Any] | None:
    get_wrapper_attr = getattr(env, "get_wrapper_attr", None)  # Gymnasium's search in the wrappers
    try:
        return get_wrapper_attr(name) if get_wrapper_attr is not None else getattr(env, name)
    except AttributeError:
        return None


@dataclass(frozen=True)
class _ActionList:
    actions: Any
    name: str = "demonstration"
    instruction: str | None = None


def _one_segment(create_action_list: Callable[[], Any]) -> list[_ActionList] | None:
    actions = create_action_list()
    return None if actions is None else [_ActionList(actions)]


class _PlanningFailedError(Exception):
    """Ends an attempt. Its cause is the exception of the planner, if there is one."""


class _PlannedAction(NamedTuple):
    value: Any
    segment_id: int
    segment_step: int
    segment_name: str
    instruction: str | None

    def text(self, key: str) -> str:
        """Return the text of the action's segment, where ``key`` is one of ``SEGMENT_TEXTS``."""
        return getattr(self, key) or ""


def _planned_actions(plan: Callable[[], Iterable[Any] | None]) -> Iterator[_PlannedAction]:
    try:
        segments = plan()
        segment_id = -1
        for segment_id, segment in enumerate(() if segments is None else segments):
            name, instruction = getattr(segment, "name", "segment"), getattr(segment, "instruction", None)
            if not isinstance(name, str) or not isinstance(instruction, str | None):
                raise _PlanningFailedError(
                    f"segment {segment_id} of its plan has name={name!r} and instruction={instruction!r}; both must "
                    "be text"
                )
            segment_step = -1
            for segment_step, action in enumerate(() if segment.actions is None else segment.actions):
                yield _PlannedAction(action, segment_id, segment_step, name, instruction)
            if segment_step < 0:
                raise _PlanningFailedError(f"segment {segment_id} of its plan has no actions")
        if segment_id < 0:
            raise _PlanningFailedError("its planning returned no plan")
    except _PlanningFailedError:
        raise
    except Exception as error:
        raise _PlanningFailedError(f"its planning raised {type(error).__name__}: {error}") from error


class _Demonstrated(NamedTuple):
    steps: TensorDictBase
    segments: tuple[Segment, ...]


class _Demonstrator:
    """One environment with its planner and the filters that count its attempts."""

    def __init__(self, index: int, env: EnvBase, accept: Accept | None, max_generation_attempts: int) -> None:
        self._env = env
        self._plan = find_planner(env)
        self._texts = segment_texts(env)
        # The id of a registered environment, since the repr of a TorchRL environment can be very long.
        self._name = f"Environment {index} ({getattr(getattr(env, 'spec', None), 'id', type(env).__name__)})"
        if env.ndim > 1 or len(env.action_keys) != 1:
            raise ConfigError(
                f"Demonstrations need a batch size [] or [N] and one action key; {self._name} has batch size "
                f"{list(env.batch_size)} and {env.action_keys}."
            )
        if accept is None:
            accept = accept_success if "success" in env.observation_spec else accept_all
        self.filters = [
            AcceptFilter(
                accept,
                max_generation_attempts=max_generation_attempts,
                environment=self._name + (f", row {row}," if env.ndim else ""),
            )
            for row in range(env.numel())
        ]

    def attempt(self) -> list[_Demonstrated | GenerationFailedError]:
        """Make one attempt. Return the accepted trajectories, then an error for each row that failed too often."""
        accepted: list[_Demonstrated | GenerationFailedError] = []
        exhausted: list[_Demonstrated | GenerationFailedError] = []
        for filter_, outcome in zip(self.filters, self._roll_out(), strict=True):
            try:
                if isinstance(outcome, _PlanningFailedError):
                    filter_.failed(str(outcome), outcome.__cause__)
                elif filter_.admit(outcome.steps):
                    accepted.append(outcome)
            except GenerationFailedError as error:
                exhausted.append(error)
        return accepted + exhausted

    @torch.no_grad()
    def _roll_out(self) -> list[_Demonstrated | _PlanningFailedError]:
        """Execute one plan. A row whose episode ended before a failure of planning still yields its trajectory."""
        env, action_spec, source = self._env, self._env.action_spec, f"The demonstration of {self._name}"
        frames: list[TensorDictBase] = []
        planned: list[_PlannedAction] = []
        failure: _PlanningFailedError | None = None
        # Copied, because an environment may reuse the memory of a step.
        state = env.reset().clone()
        running = torch.ones(env.batch_size, dtype=torch.bool, device=state.device)
        try:
            for action in _planned_actions(self._plan):
                state.set(env.action_key, checked_action(action.value, action_spec, source=source))
                frames.append(env.step(state).clone())
                planned.append(action)
                running &= ~_done(frames[-1])
                if not running.any():
                    break
                state = env.step_mdp(frames[-1])
        except _PlanningFailedError as error:
            failure = error
        if not frames:
            assert failure is not None
            return [failure] * env.numel()
        rows = torch.stack(frames, dim=env.ndim).reshape(-1, len(frames))
        return [
            _whole_trajectory(row, planned, self._texts) if failure is None or ended else failure
            for row, ended in zip(rows, (~running).flatten().tolist(), strict=True)
        ]


def _done(steps: TensorDictBase) -> torch.Tensor:
    return steps["next", "done"].flatten(steps.ndim).any(-1)


def _whole_trajectory(steps: TensorDictBase, planned: list[_PlannedAction], texts: Sequence[str]) -> _Demonstrated:
    """Cut ``steps`` ``[T']`` at the end of the episode, or mark the last step as its end, and add the segments."""
    ends = _done(steps).nonzero().flatten().tolist()
    num_steps = ends[0] + 1 if ends else len(steps)
    steps, planned = steps[:num_steps], planned[:num_steps]
    if not ends:
        for key in ("truncated", "done"):
            if key in steps["next"]:
                steps["next", key][-1] = True
    steps["segment_id"] = torch.tensor([action.segment_id for action in planned], device=steps.device)
    steps["segment_step"] = torch.tensor([action.segment_step for action in planned], device=steps.device)
    for key in texts:
        steps[key] = as_non_tensor([action.text(key) for action in planned])
    last_actions = {action.segment_id: action for action in planned}.values()
    segments = tuple(Segment(last.segment_name, last.instruction, last.segment_step + 1) for last in last_actions)
    return _Demonstrated(steps, segments)
