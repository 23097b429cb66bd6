"""How new steps go on with the unfinished trajectories of a process, and the checks that they must pass."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Hashable, Sequence
from typing import NoReturn

import numpy as np

from embodichain_rl.errors import PendingStepsError, SchemaMismatchError, TrajectoryTooLongError, TrajectoryValueError
from embodichain_rl.replay.schema import Schema, Shifted, StepField, TextTable, first_difference, refuse_unshifted
from embodichain_rl.replay.writing.boundaries import Evidence, differs, follows_inside, refuse_order
from embodichain_rl.replay.writing.pending import PendingSteps
from embodichain_rl.replay.writing.runs import Run

__all__ = ["MAX_PENDING", "PendingTrajectories"]

MAX_PENDING = 4096
"""Trajectories that may be pending in one process, beyond those that the data at hand continues."""

LOOKED_AT = 8
"""Steps of a pending trajectory that tell whether its next observations are the observations that follow."""


class PendingTrajectories(PendingSteps):
    """The unfinished trajectories of one process, and the checks that new steps of them must pass.

    Every method that is called ``refuse_...`` looks at new runs before anything is changed, so that data that is
    refused changes nothing.

    Example:
        >>> pending = PendingTrajectories()
        >>> pending.begin("a").steps += 7
        >>> pending.steps, pending.get("b").steps
        (7, 0)
    """

    def __init__(self) -> None:
        super().__init__()
        self._followed = False

    def trajectory_values(
        self, schema: Schema, runs: Sequence[Run], values: Sequence[np.ndarray], texts: TextTable
    ) -> list[list[np.ndarray]]:
        """Return the trajectory values of each run.

        Args:
            schema: the fields.
            runs: runs of new steps.
            values: one array ``[B, T, *shape]`` per trajectory field, in the order of ``schema.trajectory_fields``.
            texts: resolves text in the message of an error.

        Returns:
            For each run, one array ``[*shape]`` per trajectory field.

        Raises:
            TrajectoryValueError: when a value changes within a trajectory, also from one piece to the next.
        """
        if not values:
            return [[]] * len(runs)
        begun = {key: (pending.trajectory_values, pending.steps) for key, pending in self._by_key.items()}
        result = []
        for run in runs:
            earlier, steps = begun.pop(run.key, ([], 0))
            if run.begins:
                earlier, steps = [], 0
            of_trajectory = earlier or [value[run.row, run.start, ...].copy() for value in values]
            for trajectory_field, value, expected in zip(schema.trajectory_fields, values, of_trajectory, strict=True):
                step = first_difference(value[run.row, run.start : run.stop], expected)
                if step is not None:
                    _refuse_change(trajectory_field, expected, value[run.row, run.start + step], steps + step, texts)
            if not run.ends:
                begun[run.key] = of_trajectory, steps + run.stop - run.start
            result.append(of_trajectory)
        return result

    def refuse_endless(
        self,
        runs: Sequence[Run],
        max_total_steps: int,
        step_bytes: int,
        max_bytes: int,
        check_length: Callable[[int], None] | None = None,
    ) -> None:
        """Refuse runs that make a trajectory too long, or too many trajectories or bytes pending.

        Args:
            runs: runs of new steps.
            max_total_steps: the longest trajectory that can be stored.
            step_bytes: bytes of one step.
            max_bytes: bytes that may be pending.
            check_length: raises for a trajectory that is too long for what it is written to besides.

        Raises:
            TrajectoryTooLongError: when a trajectory exceeds ``max_total_steps``.
            PendingStepsError: when more than 4,096 trajectories, or ``max_bytes``, would be pending.
        """
        steps = {key: pending.steps for key, pending in self._by_key.items()}
        for run in runs:
            earlier = steps.pop(run.key, 0)
            length = run.stop - run.start + (0 if run.begins else earlier)
            if length > max_total_steps:
                raise TrajectoryTooLongError(
                    f"Got a trajectory of {'' if run.ends else 'at least '}{length:,} steps, but max_total_steps="
                    f"{max_total_steps:,}. Raise max_total_steps, or end episodes earlier (StepCounter(max_steps=...))."
                )
            if check_length is not None:
                check_length(length)
            if not run.ends:
                steps[run.key] = length
        total = sum(steps.values())
        if len(steps) > MAX_PENDING + len(runs):
            limit = f"more than {MAX_PENDING:,} trajectories"
        elif total * step_bytes > max_bytes:
            limit = f"more than max_pending_bytes={max_bytes:,}"
        else:
            return
        raise PendingStepsError(
            f"{len(steps):,} trajectories with {total:,} steps wait for their end, which take "
            f"{total * step_bytes:,} bytes: {limit}. Either ('next', 'done') is never set, or the collector abandons "
            "trajectories (reset_at_each_iter=True): let it truncate them (set_truncated=True), or end episodes with "
            "StepCounter(max_steps=...). rb.writer.truncate_pending() stores what waits, rb.writer.discard_pending() "
            "drops it, and TrajectoryWriter(max_pending_bytes=...) allows more bytes."
        )

    def restarted(
        self,
        evidence: Evidence,
        runs: Sequence[Run],
        rows: Sequence[np.ndarray],
        *,
        with_ids: bool,
        next_may_cut: bool,
    ) -> list[Run]:
        """Return runs of which those that do not go on with what is pending under their key begin a trajectory.

        A run goes on with it where ``"step_count"`` does, and where the last next observation is the first observation
        of the run, if that holds from step to step within the pieces. Trajectories on a device are not looked at.

        Args:
            evidence: the fields that tell.
            runs: runs of new steps.
            rows: one array ``[B, T, *shape]`` per field.
            with_ids: whether trajectories have ids, which say that the run goes on with it where nothing else tells.
            next_may_cut: whether observations may say that it does not.

        Raises:
            StepOrderError: when nothing but observations tells, and no step so far was followed by the next one.
        """
        result = list(runs)
        if not self._by_key or (evidence.step_count is None and not evidence.followed):
            return result
        first: dict[Hashable, int] = {}
        for number, run in enumerate(runs):
            first.setdefault(run.key, number)
        going_on = [n for key, n in first.items() if not runs[n].begins and key in self._by_key]
        if evidence.step_count is not None:
            count = rows[evidence.step_count]
            going_on = [n for n in going_on if not self._counts_on(count, runs[n], result, n)]
        if next_may_cut and evidence.followed:
            on_host = [n for n in going_on if not result[n].begins and self.get(runs[n].key).pieces]
            alone = not with_ids and evidence.step_count is None
            for n in self._broken_off(evidence, [runs[n] for n in on_host], rows, alone=alone):
                result[on_host[n]] = dataclasses.replace(runs[on_host[n]], begins=True)
        return result

    def _counts_on(self, count: np.ndarray, run: Run, result: list[Run], number: int) -> bool:
        """Return whether the count of steps goes on with a run; let the run begin a trajectory where it restarts."""
        last, new = self._by_key[run.key].step_count, count[run.row, run.start]
        if last is None:
            return False
        counts = run.stop - run.start == 1 or bool((count[run.row, run.start + 1] > new).all())
        if counts and bool((new <= last).all()):
            result[number] = dataclasses.replace(run, begins=True)
        return bool((new == last + 1).all())

    def _broken_off(
        self, evidence: Evidence, runs: Sequence[Run], rows: Sequence[np.ndarray], *, alone: bool
    ) -> list[int]:
        """Return which runs do not begin with the last next observation of what is pending.

        Args:
            evidence: the fields that tell.
            runs: each of a trajectory that is pending on the host.
            rows: one array ``[B, T, *shape]`` per field.
            alone: whether nothing but observations tells.
        """
        if not runs:
            return []
        followed = evidence.followed
        at = [run.row for run in runs], [run.start for run in runs]
        earlier = [self._by_key[run.key].pieces for run in runs]
        different = np.zeros((len(followed), len(runs)), dtype=bool)
        for entry, found in zip(followed, different, strict=True):
            after, value = np.concatenate([pieces[-1][entry.next][-1:] for pieces in earlier]), rows[entry.root][at]
            where = differs(after[:, None], value[:, None])
            if where is not None:
                found |= where[:, 0]
        broken_off = []
        for number in np.flatnonzero(different.any(axis=0)).tolist():
            run = runs[number]
            before = _last_steps(earlier[number], LOOKED_AT)
            new = [[value[run.row, run.start : min(run.stop, run.start + LOOKED_AT)] for value in rows]]
            for entry in (entry for entry, found in zip(followed, different[:, number], strict=True) if found):
                inside = follows_inside(entry, before), follows_inside(entry, new)
                if True in inside or (inside == (None, None) and self._followed):
                    broken_off.append(number)
                    break
                if inside == (None, None) and alone:
                    refuse_order("no next observation is the observation of the step after it")
        self._followed |= not different.any(axis=0).all()
        return broken_off

    def refuse_unshifted(
        self, schema: Schema, shifted: Shifted, runs: Sequence[Run], pieces: Sequence[Sequence[np.ndarray]]
    ) -> None:
        """Refuse runs whose shifted fields are not those of the step after, also from one piece to the next.

        Args:
            schema: the fields.
            shifted: which of them are shifted.
            runs: runs of new steps.
            pieces: the steps of each run, one array ``[n, *shape]`` per field.

        Raises:
            SchemaMismatchError: with the key, the step and what to do.
        """
        if not shifted:
            return
        before: dict[Hashable, tuple[Sequence[np.ndarray] | None, int]] = {
            key: (pending.pieces[-1], pending.steps) for key, pending in self._by_key.items()
        }
        for run, piece in zip(runs, pieces, strict=True):
            last, steps = before.pop(run.key, (None, 0))
            if run.begins:
                last, steps = None, 0
            refuse_unshifted(schema, shifted, piece, before=last, step=steps)
            if not run.ends:
                before[run.key] = piece, steps + run.stop - run.start

    def refuse_mixed_devices(self, runs: Sequence[Run], *, on_device: bool) -> None:
        """Refuse runs of trajectories whose earlier steps lie somewhere else.

        Args:
            runs: runs of new steps.
            on_device: whether these lie on the device.

        Raises:
            SchemaMismatchError: when the earlier ones of one of them lie on the host, or the other way round.
        """
        if not self._by_key:
            return
        for run in runs:
            pending = self.get(run.key)
            if not run.begins and (pending.pieces if on_device else pending.spans):
                new, earlier = ("device", "CPU") if on_device else ("CPU", "device")
                raise SchemaMismatchError(
                    f"Got steps on the {new} of a trajectory that was begun with steps on the {earlier}. Write all "
                    "steps of a trajectory from the same place."
                )


def _last_steps(pieces: Sequence[Sequence[np.ndarray]], steps: int) -> list[list[np.ndarray]]:
    """Return the last pieces of a trajectory that together have at least so many steps, none longer than that."""
    last: list[list[np.ndarray]] = []
    for piece in reversed(pieces):
        if steps <= 0:
            break
        last.insert(0, [value[-steps:] for value in piece])
        steps -= len(piece[0])
    return last


def _refuse_change(
    trajectory_field: StepField, before: np.ndarray, after: np.ndarray, step: int, texts: TextTable
) -> NoReturn:
    was, became = (
        reprlib.repr(texts.resolve(value) if trajectory_field.is_text else value.tolist()) for value in (before, after)
    )
    raise TrajectoryValueError(
        f"Got {trajectory_field.key} that changes at step {step} of its trajectory, from {was} to {became}. What is "
        "written under 'trajectory' is stored once a trajectory; write what changes under another key."
    )
