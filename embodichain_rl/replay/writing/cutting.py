"""How the steps of one call are cut, wherever they lie: their runs, held against what is pending."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from embodichain_rl.replay.schema import Leaves, Schema
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.boundaries import Evidence, beginnings
from embodichain_rl.replay.writing.boundary_keys import BoundaryKeys
from embodichain_rl.replay.writing.origin import Origin
from embodichain_rl.replay.writing.pending import MIN_PENDING_BYTES, PendingTrajectories
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
        self._evidence: tuple[Schema, Evidence] | None = None

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

        Raises:
            SchemaMismatchError, StepOrderError, TrajectoryTooLongError, PendingStepsError: see
                :class:`~embodichain_rl.TrajectoryWriter`.
        """
        boundaries, evidence = self._keys.boundaries(schema, rows, incoming.real), self.evidence(schema)
        ends, traj_ids = boundaries.ends, boundaries.traj_ids
        next_may_cut = not self._storage.shifted_in(schema)
        begins = beginnings(
            evidence,
            rows,
            values,
            ends,
            traj_ids,
            incoming.real,
            incoming.origin,
            sequences=self._sequences,
            next_may_cut=next_may_cut,
        )
        runs = list(runs_of(producer, ends, traj_ids, incoming.real, begins, sampled=incoming.sampled))
        if not incoming.sampled:
            runs = boundaries.finish(runs, producer, self._pending)
        if not (incoming.sampled or self._sequences):
            runs = self._pending.restarted(
                evidence, runs, rows, with_ids=traj_ids is not None, next_may_cut=next_may_cut
            )
        if begins is not None:
            runs = closed(runs)
        most = self._storage.max_total_steps
        max_bytes = self._max_pending_bytes or max(most * schema.nbytes, MIN_PENDING_BYTES)
        self._pending.refuse_endless(runs, most, schema.nbytes, max_bytes, check_length)
        self._pending.refuse_mixed_devices(runs, on_device=on_device)
        return runs

    def evidence(self, schema: Schema) -> Evidence:
        """Return the fields of a schema that tell whether one step follows another."""
        if self._evidence is None or self._evidence[0] is not schema:
            self._evidence = schema, Evidence.of(schema)
        return self._evidence[1]
