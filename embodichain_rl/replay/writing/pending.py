"""The trajectories of one process whose end has not come: what is kept of them, and what is refused of their steps."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from embodichain_rl.errors import PendingStepsError, SchemaMismatchError, TrajectoryTooLongError, TrajectoryValueError
from embodichain_rl.replay.device import Span
from embodichain_rl.replay.schema import Schema, Shifted, StepField, TextTable, first_difference, refuse_unshifted
from embodichain_rl.replay.writing.runs import Run

__all__ = ["Pending", "PendingTrajectories"]

MAX_PENDING = 4096
"""Trajectories that may be pending in one process, beyond those that the data at hand continues."""


@dataclass(slots=True)
class Pending:
    """The pieces so far, copied, of a trajectory whose end has not come: on the host, or as spans on a device."""

    pieces: list[list[np.ndarray]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    trajectory_values: list[np.ndarray] = field(default_factory=list)
    steps: int = 0


_NOTHING = Pending()


class PendingTrajectories:
    """The unfinished trajectories of one process, by the key of the runs that they consist of.

    Every method that is called ``refuse_...`` looks at new runs before anything is changed, so that data that is
    refused changes nothing.

    Example:
        >>> pending = PendingTrajectories()
        >>> pending.begin("a").steps += 7
        >>> pending.steps, pending.get("b").steps
        (7, 0)
    """

    def __init__(self) -> None:
        self._by_key: dict[Hashable, Pending] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Pending]:
        return iter(list(self._by_key.values()))

    @property
    def steps(self) -> int:
        """Steps of all pending trajectories."""
        return sum(pending.steps for pending in self)

    def get(self, key: Hashable) -> Pending:
        """Return what is pending under ``key``; an empty one, not to be changed, where nothing is."""
        return self._by_key.get(key, _NOTHING)

    def begin(self, key: Hashable) -> Pending:
        """Return what is pending under ``key``; a new one where nothing is."""
        return self._by_key.setdefault(key, Pending())

    def end(self, key: Hashable) -> None:
        """Forget what is pending under ``key``."""
        self._by_key.pop(key, None)

    def clear(self) -> None:
        """Forget everything."""
        self._by_key.clear()

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
        self, runs: Sequence[Run], max_total_steps: int, check_length: Callable[[int], None] | None = None
    ) -> None:
        """Refuse runs that make a trajectory too long, or too many trajectories pending.

        Args:
            runs: runs of new steps.
            max_total_steps: the longest trajectory that can be stored.
            check_length: raises for a trajectory that is too long for what it is written to besides.

        Raises:
            TrajectoryTooLongError: when a trajectory exceeds ``max_total_steps``.
            PendingStepsError: when more than 4,096 trajectories would be pending.
        """
        steps = {key: pending.steps for key, pending in self._by_key.items()}
        for run in runs:
            length = steps.pop(run.key, 0) + run.stop - run.start
            if length > max_total_steps:
                raise TrajectoryTooLongError(
                    f"Got a trajectory of {'' if run.ends else 'at least '}{length:,} steps, but max_total_steps="
                    f"{max_total_steps:,}. Raise max_total_steps, or end episodes earlier (StepCounter(max_steps=...))."
                )
            if check_length is not None:
                check_length(length)
            if not run.ends:
                steps[run.key] = length
        if len(steps) > MAX_PENDING + len(runs):
            raise PendingStepsError(
                f"{len(steps):,} trajectories with {sum(steps.values()):,} steps wait for their end. Either "
                "('next', 'done') is never set, or the collector abandons trajectories (reset_at_each_iter=True): let "
                "it truncate them (set_truncated=True), or call writer.discard_pending()."
            )

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
            if pending.pieces if on_device else pending.spans:
                new, earlier = ("device", "CPU") if on_device else ("CPU", "device")
                raise SchemaMismatchError(
                    f"Got steps on the {new} of a trajectory that was begun with steps on the {earlier}. Write all "
                    "steps of a trajectory from the same place."
                )


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
