"""How the steps of one call are cut, wherever they lie: their runs, held against what is pending."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from embodichain_rl.replay.schema import Leaves, Schema
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.boundaries import Evidence, beginnings
from embodichain_rl.replay.writing.boundary_keys import Boundaries, BoundaryFields, BoundaryKeys
from embodichain_rl.replay.writing.continuing import PendingTrajectories
from embodichain_rl.replay.writing.origin import Origin
from embodichain_rl.replay.writing.pending import MIN_PENDING_BYTES
from embodichain_rl.replay.writing.runs import Run, closed, runs_of

__all__ = ["Cutter", "Incoming"]


@dataclass(slots=True)
class Incoming:
    """The steps of one call.

    Attributes:
        leaves: their entries.
        shape: their batch size, ``[T]`` or ``[B, T]``.
        real: ``bool`` ``[B, T]``, False where a step is padding; None: all are real.
        origin: what they say of their order; None where they say nothing.
    """

    leaves: Leaves
    shape: torch.Size
    real: np.ndarray | None
    origin: Origin | None

    @property
    def sampled(self) -> bool:
        """Whether they were sampled from a buffer of trajectories."""
        return self.origin is not None and self.origin.sampled


class Cutter:
    """Cuts the steps of each call into runs of one trajectory each.

    Args:
        storage: where they are to be stored.
        pending: the unfinished trajectories of the writer.
        keys: the entries that say where trajectories end.
        sequences: whether rows are consecutive steps whatever counts and observations say.
        max_pending_bytes: bytes that may be pending; None derives it from the storage.
    """

    def __init__(
        self,
        storage: TrajectoryStorage,
        pending: PendingTrajectories,
        *,
        keys: BoundaryKeys,
        sequences: bool,
        max_pending_bytes: int | None,
    ) -> None:
        self._storage = storage
        self._pending = pending
        self._keys = keys
        self._sequences = sequences
        self._max_pending_bytes = max_pending_bytes
        self._told: tuple[Schema, _Told] | None = None

    def runs(
        self,
        schema: Schema,
        rows: Sequence[np.ndarray],
        values: Sequence[Any],
        producer: int,
        incoming: Incoming,
        *,
        on_device: bool,
        check_length: Callable[[int], None] | None = None,
        marks: tuple[Boundaries, np.ndarray | None] | None = None,
    ) -> list[Run]:
        """Return the runs of some steps; nothing is changed.

        Args:
            schema: the fields.
            rows: one array ``[B, T, *shape]`` per field, on the host; of steps on a device control entries only are
                read.
            values: the same, wherever it lies.
            producer: identifies the calling thread.
            incoming: the steps.
            on_device: whether they lie on a device.
            check_length: raises for a trajectory that is too long for what it is written to.
            marks: what :meth:`marks` has returned for these steps; None: not known yet.

        Raises:
            SchemaMismatchError, StepOrderError, TrajectoryTooLongError, PendingStepsError: see
                :class:`~embodichain_rl.TrajectoryWriter`.
        """
        told = self._told_by(schema)
        usual = None if on_device else self._whole_trajectory(told, rows, producer, incoming)
        if usual is not None:
            runs = [usual]
            self._refuse_endless(schema, runs, check_length)
            return runs
        evidence = told.evidence
        boundaries, begins = self.marks(schema, rows, values, incoming) if marks is None else marks
        ends, traj_ids = boundaries.ends, boundaries.traj_ids
        next_may_cut = not self._storage.shifted_in(schema)
        runs = list(runs_of(producer, ends, traj_ids, incoming.real, begins, sampled=incoming.sampled))
        if not incoming.sampled:
            runs = boundaries.finish(runs, producer, self._pending)
        if not (incoming.sampled or self._sequences):
            runs = self._pending.restarted(
                evidence, runs, rows, with_ids=traj_ids is not None, next_may_cut=next_may_cut
            )
        if begins is not None:
            runs = closed(runs)
        self._refuse_endless(schema, runs, check_length)
        self._pending.refuse_mixed_devices(runs, on_device=on_device)
        return runs

    def marks(
        self, schema: Schema, rows: Sequence[np.ndarray], values: Sequence[Any], incoming: Incoming
    ) -> tuple[Boundaries, np.ndarray | None]:
        """Return where trajectories end, and which steps begin one; see :func:`beginnings`.

        Raises:
            SchemaMismatchError, StepOrderError: see :class:`~embodichain_rl.TrajectoryWriter`.
        """
        told = self._told_by(schema)
        boundaries = told.keys.boundaries(rows, incoming.real)
        begins = beginnings(
            told.evidence,
            rows,
            values,
            boundaries.ends,
            boundaries.traj_ids,
            incoming.real,
            incoming.origin,
            sequences=self._sequences,
            next_may_cut=not self._storage.shifted_in(schema),
        )
        return boundaries, begins

    def _whole_trajectory(
        self, told: _Told, rows: Sequence[np.ndarray], producer: int, incoming: Incoming
    ) -> Run | None:
        """Return the run of steps that are one whole trajectory by all that tells; else None.

        This is what most calls write, and none of what else there may be has to be looked for then.
        """
        keys = told.keys
        one_row = len(rows[0]) == 1 and incoming.real is None and incoming.origin is None
        if not one_row or not keys.flags or keys.ids_end:
            return None
        flagged, length = keys.flagged(rows)[0], len(rows[0][0])
        if not flagged[-1] or np.count_nonzero(flagged) > 1:
            return None
        traj_ids = keys.ids(rows)
        if traj_ids is None:
            key: Hashable = (producer, "row", 0)
        else:
            traj_id = traj_ids[0, 0]
            if np.count_nonzero(traj_ids == traj_id) != length:
                return None
            key = (producer, "id", traj_id.item())
        if key in self._pending or (length > 1 and not told.evidence.one_trajectory(rows, self._sequences)):
            return None
        return Run(key, 0, 0, length, ends=True)

    def _refuse_endless(self, schema: Schema, runs: Sequence[Run], check_length: Callable[[int], None] | None) -> None:
        most = self._storage.max_total_steps
        self._pending.refuse_endless(runs, most, schema.bytes_of_step, self._most_bytes(schema), check_length)

    def _most_bytes(self, schema: Schema) -> int:
        """Return how many bytes may be pending."""
        most = self._storage.max_total_steps * schema.bytes_of_step
        return self._max_pending_bytes or max(most, MIN_PENDING_BYTES)

    def allows(self, schema: Schema, longest: int, pending: int) -> bool:
        """Return whether a trajectory may have ``longest`` steps, and ``pending`` steps may be pending."""
        fits = pending * schema.bytes_of_step <= self._most_bytes(schema)
        return fits and longest <= self._storage.max_total_steps

    def evidence(self, schema: Schema) -> Evidence:
        """Return the fields of a schema that tell whether one step follows another."""
        return self._told_by(schema).evidence

    def keys(self, schema: Schema) -> BoundaryFields:
        """Return the fields of a schema that say where trajectories end."""
        return self._told_by(schema).keys

    def _told_by(self, schema: Schema) -> _Told:
        if self._told is None or self._told[0] is not schema:
            self._told = schema, _Told(self._keys.fields_of(schema), Evidence.of(schema))
        return self._told[1]


class _Told(NamedTuple):
    """What the steps of a schema tell of the trajectories that they belong to."""

    keys: BoundaryFields
    """Where these end."""
    evidence: Evidence
    """Whether one step follows another."""
