"""Data that lies on a device already: cut into trajectories there, without a copy to the host.

Only the entries that decide where trajectories begin and end go to the host: end flags, trajectory ids, segments,
policy versions, and trajectory values. Everything else stays on the device. Finished trajectories are written by the
device's memory; the steps of others are copied and kept until their end comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import UnsupportedOperationError
from embodichain_rl.replay.device import Batch, DeviceMemory, DirectTrajectory, Span
from embodichain_rl.replay.schema import (
    Key,
    Leaf,
    Leaves,
    Schema,
    TextTable,
    as_array,
    as_tensor,
    resolve_texts,
    segment_field,
)
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.acceptance import Admission
from embodichain_rl.replay.writing.pending import PendingTrajectories
from embodichain_rl.replay.writing.runs import PENDING, POLICY_VERSION_KEY, Run, ends_of, runs_of, traj_ids_of

__all__ = ["extend_from_device"]

SLACK = 4
"""Steps that are kept for pending trajectories at most, as a multiple of those that belong to them."""


class _Columns(Sequence[np.ndarray]):
    """The entries of some data, ``[B, T, *shape]`` a field, each brought to the host when it is asked for."""

    def __init__(self, schema: Schema, leaves: Mapping[Key, Leaf], shape: torch.Size, texts: TextTable) -> None:
        values = schema.in_order(leaves, len(shape))
        tensors = [torch.from_numpy(texts.ids_of(v)) if isinstance(v, np.ndarray) else v for v in values]
        self.tensors = [value[None] for value in tensors] if len(shape) == 1 else tensors
        self._arrays: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        if number not in self._arrays:
            self._arrays[number] = as_array(self.tensors[number])
        return self._arrays[number]


def extend_from_device(
    storage: TrajectoryStorage,
    memory: DeviceMemory,
    pending: PendingTrajectories,
    admission: Admission,
    producer: int,
    leaves: Leaves,
    shape: torch.Size,
    lengths: np.ndarray | None,
) -> torch.Tensor:
    """Do what :meth:`TrajectoryWriter.extend` does, with data on the device.

    Args:
        storage: where to write.
        memory: that of the storage.
        pending: the unfinished trajectories of the writer.
        admission: decides about each whole trajectory.
        producer: identifies the calling thread.
        leaves: the entries of the data.
        shape: the batch size of the data, ``[T]`` or ``[B, T]``.
        lengths: how many steps of each row are real; None: all.

    Returns:
        The trajectory id of each step, ``int64`` of ``shape``; -1 where the trajectory is not finished or not accepted.

    Raises:
        UnsupportedOperationError: when the storage is compact.
    """
    if storage.compact:
        raise UnsupportedOperationError(
            "Got data on the device for a storage with compact=True, whose next observations are compared on the host "
            "before they are left out. Write data.cpu(), or build the storage with compact=False."
        )
    schema = storage.schema
    if schema is None:
        schema = Schema.of_leaves(leaves)
        ends_of(schema, _Columns(schema, leaves, shape, storage.texts))  # refuses before memory is taken
        schema = storage.allocate_schema(schema)
    columns = _Columns(schema, leaves, shape, storage.texts)
    runs = list(runs_of(producer, ends_of(schema, columns), traj_ids_of(schema, columns), lengths))
    pending.refuse_endless(runs, storage.max_total_steps)
    pending.refuse_mixed_devices(runs, on_device=True)
    trajectory_values = pending.trajectory_values(
        schema, runs, [columns[number] for number in range(len(schema.fields), len(columns))], storage.texts
    )
    batch = _batch_of(memory, schema, columns)
    spans = [Span(batch, run.row * shape[-1] + run.start, run.stop - run.start) for run in runs]
    version = schema.number_of(POLICY_VERSION_KEY)
    finished: list[tuple[Run, DirectTrajectory]] = []
    for run, span, values in zip(runs, spans, trajectory_values, strict=True):
        if run.ends:
            policy_version = 0 if version is None else int(columns[version][run.row, run.stop - 1].reshape(-1)[0])
            all_spans = [*pending.get(run.key).spans, span]
            whole = DirectTrajectory(all_spans, values, admission.stored_version(policy_version))
            if admission.admits(whole.steps, partial(_trajectory, schema, storage.texts, whole)):
                finished.append((run, whole))
    index = np.full(shape if len(shape) == 2 else (1, *shape), PENDING, dtype=np.int64)
    ids = memory.write_directly([whole for _, whole in finished])
    for (run, whole), number in zip(finished, ids, strict=True):
        index[run.row, run.start : run.stop] = number
        admission.stored(whole.steps)
    _keep_pending(pending, memory, runs, spans, trajectory_values)
    return torch.from_numpy(index.reshape(shape))


def _batch_of(memory: DeviceMemory, schema: Schema, columns: _Columns) -> Batch:
    of_steps = zip(schema.fields, columns.tensors, strict=False)
    values = [memory.to_device(value).reshape(-1, *field.shape) for field, value in of_steps]
    segments = segment_field(schema)
    return Batch(values, None if segments is None else columns[segments].reshape(-1))


def _trajectory(schema: Schema, texts: TextTable, whole: DirectTrajectory) -> TensorDictBase:
    """The trajectory as whoever judges it sees it, ``[T]``, on the device."""
    values = [
        torch.cat([span.batch.values[number][span.start : span.start + span.steps] for span in whole.spans])
        for number in range(len(schema.fields))
    ]
    for field, value in zip(schema.trajectory_fields, whole.of_trajectory, strict=True):
        of_steps = as_tensor(value, field.dtype).to(values[0].device)
        values.append(of_steps.expand(whole.steps, *field.shape))
    return resolve_texts(schema.build(values, [whole.steps]), schema.text_keys, texts)


def _keep_pending(
    pending: PendingTrajectories,
    memory: DeviceMemory,
    runs: list[Run],
    spans: list[Span],
    trajectory_values: list[list[np.ndarray]],
) -> None:
    """Copy the steps of trajectories whose end has not come: their producer may reuse its memory."""
    for run in runs:
        if run.ends:
            pending.end(run.key)
    begun = [
        (run, span, values) for run, span, values in zip(runs, spans, trajectory_values, strict=True) if not run.ends
    ]
    kept = memory.copy_spans([span for _, span, _ in begun])
    for (run, _, values), span in zip(begun, kept, strict=True):
        begun_trajectory = pending.begin(run.key)
        begun_trajectory.spans.append(span)
        begun_trajectory.trajectory_values = values
        begun_trajectory.steps += span.steps
    waiting = [trajectory for trajectory in pending if trajectory.spans]
    batches = {id(span.batch): len(span.batch) for trajectory in waiting for span in trajectory.spans}
    if sum(batches.values()) > SLACK * sum(trajectory.steps for trajectory in waiting):
        # A few long trajectories have kept the steps of many that are written by now.
        together = iter(memory.copy_spans([span for trajectory in waiting for span in trajectory.spans]))
        for trajectory in waiting:
            trajectory.spans = [next(together) for _ in trajectory.spans]
