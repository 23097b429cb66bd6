"""The execution of one demonstration: which rows go on, which fail and why, and which steps belong to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tensordict import TensorDictBase

from embodichain_rl.engine.demonstrations.planner_env import DemoEnv, StepFlags

__all__ = ["Episode", "PlannedStep", "PlanningFailedError"]

FAILURES = ("failure", "truncated", "task_incomplete")
"""Why a row did not succeed although it acted to its end. ``accept`` may keep its trajectory nevertheless."""

BATCH_ABORT, ROW_INDEPENDENT = "batch_abort", "row_independent"

_END = object()


class PlanningFailedError(Exception):
    """Ends an attempt. Its cause is the exception of the planner, if there is one."""


class PlannedStep(NamedTuple):
    """The segment that a step belongs to."""

    segment_id: int
    segment_step: int
    segment_name: str
    instruction: str | None
    target_uid: str | None
    continuity_id: int
    has_target: bool

    def text(self, key: str) -> str:
        """Return a text of the segment, where ``key`` is the name of a field."""
        return getattr(self, key) or ""


@dataclass
class _Segment:
    """One segment of a plan, with the checks of its attributes."""

    number: int
    given: Any
    instruction: str | None
    failure_policy: str

    @classmethod
    def checked(cls, number: int, given: Any, fallback: str | None, policy: str) -> _Segment:
        name, instruction = getattr(given, "name", "segment"), getattr(given, "instruction", None)
        if not isinstance(name, str) or not isinstance(instruction, str | None):
            raise PlanningFailedError(
                f"segment {number} of its plan has name={name!r} and instruction={instruction!r}; both must be text"
            )
        target = getattr(given, "target_uid", None)
        if not isinstance(target, str | None):
            raise PlanningFailedError(f"segment {number} of its plan has target_uid={target!r}; it must be text")
        policy = getattr(given, "failure_policy", policy)
        if policy not in (BATCH_ABORT, ROW_INDEPENDENT):
            raise PlanningFailedError(
                f"segment {number} of its plan has failure_policy={policy!r}; it must be 'batch_abort' or "
                "'row_independent'"
            )
        return cls(number, given, fallback if instruction is None else instruction, policy)

    @property
    def name(self) -> str:
        return getattr(self.given, "name", "segment")

    @property
    def aborts_batch(self) -> bool:
        return self.failure_policy == BATCH_ABORT

    def step(self, number: int, continuity_id: int) -> PlannedStep:
        metadata = getattr(self.given, "metadata", None)
        own = getattr(self.given, "continuity_id", None)
        if own is None and isinstance(metadata, Mapping):
            own = metadata.get("continuity_id")
        return PlannedStep(
            self.number,
            number,
            self.name,
            self.instruction,
            getattr(self.given, "target_uid", None),
            continuity_id if own is None else int(own),
            hasattr(self.given, "target_uid"),
        )


class Episode:
    """One attempt of one environment, all rows of which execute the same plan.

    A row ends when it terminates, is truncated or fails; then it is masked while the others go on. When the plan is
    exhausted, the environment is asked whether the remaining rows have done the task.

    Args:
        env: the environment.
        plan: plans from the state after the reset.
        instruction: the instruction of segments that have none.

    Attributes:
        frames (list[TensorDictBase]): the steps, each ``[*batch]``.
        planned (list[PlannedStep]): the segment of each.
        lengths (list[int]): the number of steps of each row.
        reasons (list[str]): how each row ended: ``"success"``, one of :data:`FAILURES`, or why it is no trajectory.
        error (BaseException | None): the exception behind a failed plan.
    """

    def __init__(self, env: DemoEnv, plan: Callable[[], Iterable[Any] | None], instruction: str | None) -> None:
        self._env = env
        self._plan = plan
        self._instruction = instruction
        self.frames: list[TensorDictBase] = []
        self.planned: list[PlannedStep] = []
        self.lengths = [0] * env.num_rows
        self.reasons = [""] * env.num_rows
        self.error: BaseException | None = None
        self._active = torch.ones(env.num_rows, dtype=torch.bool)
        self._state: TensorDictBase | None = None

    def run(self) -> None:
        """Execute the plan.

        Raises:
            Exception: what a step of the environment raised, or an action that does not match its action spec.
        """
        env = self._env
        self._state = env.reset()
        env.hold_resets(True)
        try:
            env.publish(self._active)
            self._run_segments()
            self._judge_remaining()
        except PlanningFailedError as error:
            self.error = error.__cause__
            self._end(self._active, str(error))
        finally:
            env.hold_resets(False)

    def _run_segments(self) -> None:
        count = 0
        policy = BATCH_ABORT if self._env.judges else ROW_INDEPENDENT
        for given in self._segments():
            self._run_segment(_Segment.checked(count, given, self._instruction, policy))
            count += 1
            if not self._active.any():
                return
        if count == 0:
            raise PlanningFailedError("its planning returned no plan")

    def _segments(self) -> Iterator[Any]:
        with _planning():
            segments = self._plan()
            if segments is None:
                return
            if hasattr(segments, "actions"):  # a single segment
                segments = (segments,)
            iterator = iter(segments)
        while True:
            with _planning():
                segment = next(iterator, _END)
            if segment is _END:
                return
            yield segment

    def _run_segment(self, segment: _Segment) -> None:
        number, consumed = 0, False
        with _planning():
            actions = segment.given.actions
            iterator = iter(() if actions is None else actions)
        try:
            while True:
                with _planning():
                    try:
                        action = next(iterator)
                    except StopIteration:
                        break
                consumed = False
                self._step(segment, number, action)
                consumed, number = True, number + 1
                if not self._active.any():
                    break
        except BaseException as error:
            self._abort_after(segment, iterator, error, consumed)
            raise
        if number and not self._active.any():
            self._abort(segment, iterator, self._reason(), consumed)
            return
        if number == 0:
            raise PlanningFailedError(f"segment {segment.number} of its plan has no actions")
        self._validate(segment)

    def _step(self, segment: _Segment, number: int, action: Any) -> None:
        env = self._env
        assert self._state is not None
        planned = segment.step(number, env.continuity_id)
        frame = env.step(self._state, env.prepared(action, self._active))
        self.frames.append(frame)
        self.planned.append(planned)
        for row in self._active.nonzero().flatten().tolist():
            self.lengths[row] += 1
        self._take(segment, env.flags(frame))
        self._state = env.env.step_mdp(frame)

    def _take(self, segment: _Segment, flags: StepFlags) -> None:
        """End the rows that a step has ended."""
        env, active = self._env, self._active.clone()
        ended = active & (flags.terminated | flags.truncated | flags.failed)
        if not ended.any():
            return
        success = flags.success
        if success is None:
            success = env.is_success() if bool((active & flags.terminated).any()) else None
        if success is None:  # an environment that can't tell makes no failures
            success = torch.full_like(active, not env.reports_success)
        neutral = not env.reports_success
        failed = torch.zeros_like(active)
        for row in ended.nonzero().flatten().tolist():
            if flags.failed[row]:
                reason = "failure"
            elif flags.truncated[row] and env.judges:
                reason = "truncated"
            else:
                reason = "success" if neutral or success[row] else "failure"
            self.reasons[row] = reason
            failed[row] = reason != "success"
        self._active &= ~ended
        if failed.any() and segment.aborts_batch:
            self._end(self._active, "another row failed, and its segment aborts all of them")
        env.publish(self._active)

    def _validate(self, segment: _Segment) -> None:
        validator = getattr(segment.given, "validator", None)
        if validator is None:
            return
        with _planning():
            valid = self._env.rows(validator())
        invalid = self._active & ~valid
        if not invalid.any():
            return
        self._end(invalid, f"segment {segment.number} ({segment.name!r}) of its plan was not validated")
        if segment.aborts_batch:
            self._end(self._active, "another row was not validated, and its segment aborts all of them")
        self._env.publish(self._active)

    def _judge_remaining(self) -> None:
        if not self._active.any():
            return
        success = self._env.is_success()
        if success is None:
            success = self._env.flags(self.frames[-1]).success
        if success is None or not self._env.reports_success:
            success = torch.ones_like(self._active)
        self._end(self._active & success, "success")
        self._end(self._active, "task_incomplete")

    def _end(self, rows: torch.Tensor, reason: str) -> None:
        for row in rows.nonzero().flatten().tolist():
            self.reasons[row] = reason
        self._active = self._active & ~rows

    def _reason(self) -> str:
        """Return why the rows have ended."""
        return next((reason for reason in self.reasons if reason != "success"), "the task is done")

    def _abort_after(self, segment: _Segment, iterator: Iterator[Any], error: BaseException, consumed: bool) -> None:
        reason = "interrupted" if not isinstance(error, Exception) else "action_generation_failed"
        if isinstance(error, Exception) and not isinstance(error, PlanningFailedError):
            reason = "action_execution_failed"
        try:
            self._abort(segment, iterator, reason, consumed)
        except Exception as another:
            error.add_note(f"abort_actions() raised as well: {type(another).__name__}: {another}")

    def _abort(self, segment: _Segment, iterator: Iterator[Any], reason: str, consumed: bool) -> None:
        """Execute what the segment needs to stop safely. Those steps belong to no trajectory."""
        abort_actions = getattr(segment.given, "abort_actions", None)
        assert self._state is not None
        try:
            if abort_actions is not None:
                for action in abort_actions(reason, last_action_consumed=consumed):
                    self._env.step_unrecorded(self._state, action)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()


@contextmanager
def _planning() -> Iterator[None]:
    """Turn an exception of a planner into a failure of the plan."""
    try:
        yield
    except PlanningFailedError:
        raise
    except Exception as error:
        raise PlanningFailedError(f"its planning raised {type(error).__name__}: {error}") from error
