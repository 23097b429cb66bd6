"""Data that lies on a device already: cut into trajectories there, without a copy to the host.

Only the entries that decide where trajectories begin and end go to the host: end flags, trajectory ids, counts of
steps, segments, policy versions, and trajectory values. Everything else stays on the device; next observations are
compared there, within one call only. Finished trajectories are written by the device's memory; the steps of others are
copied and kept until their end comes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.replay.device import Batch, DeviceMemory, DirectTrajectory, Span
from embodichain_rl.replay.ledger import NO_VERSION
from embodichain_rl.replay.schema import Key, Leaf, Schema, TextTable, as_array, as_tensor, resolve_texts, segment_field
from embodichain_rl.replay.storage import TrajectoryStorage, version_field, version_of
from embodichain_rl.replay.writing.acceptance import Admission
from embodichain_rl.replay.writing.blocks import index_of, regular, versions_of
from embodichain_rl.replay.writing.boundary_keys import Boundaries
from embodichain_rl.replay.writing.continuing import PendingTrajectories
from embodichain_rl.replay.writing.cutting import Cutter, Incoming
from embodichain_rl.replay.writing.device_order import refuse_unshifted_on_device
from embodichain_rl.replay.writing.lockstep import SLACK, Ends, Lockstep
from embodichain_rl.replay.writing.runs import PENDING, Run
from embodichain_rl.replay.writing.truncation import end_flags

__all__ = ["extend_from_device", "truncate_on_device"]


class _Columns(Sequence[np.ndarray]):
    """The entries of some data, ``[B, T, *shape]`` a field, each copied to the host when it is first read."""

    def __init__(self, schema: Schema, leaves: Mapping[Key, Leaf], shape: torch.Size, texts: TextTable) -> None:
        values = schema.in_order(leaves, len(shape))
        tensors = [torch.from_numpy(texts.ids_of(v)) if isinstance(v, np.ndarray) else v for v in values]
        self.tensors = [value[None] for value in tensors] if len(shape) == 1 else tensors
        self._arrays: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def rows(self) -> int:
        """The number of rows, ``B``."""
        return len(self.tensors[0])

    def __getitem__(self, number: int) -> np.ndarray:  # type: ignore[override]
        if number not in self._arrays:
            self._arrays[number] = as_array(self.tensors[number])
        return self._arrays[number]


def extend_from_device(
    storage: TrajectoryStorage,
    memory: DeviceMemory,
    pending: PendingTrajectories,
    cutter: Cutter,
    admission: Admission,
    producer: int,
    incoming: Incoming,
) -> torch.Tensor:
    """Do what :meth:`TrajectoryWriter.extend` does, with data on the device.

    Args:
        storage: where to write.
        memory: that of the storage.
        pending: the unfinished trajectories of the writer.
        cutter: that of the writer.
        admission: decides about each whole trajectory.
        producer: identifies the calling thread.
        incoming: the data.

    Returns:
        The trajectory id of each step, ``int64`` of the data's batch size; -1 where the trajectory is not finished or
        not accepted.

    Raises:
        SchemaMismatchError: when next observations are stored once, and one is not the observation that follows.
    """
    schema, leaves, shape = storage.schema, incoming.leaves, incoming.shape
    known = schema is not None
    if schema is None:
        schema = Schema.of_leaves(leaves)
    columns = _Columns(schema, leaves, shape, storage.texts)
    marks = cutter.marks(schema, columns, columns.tensors, incoming)
    state = pending.lockstep(producer, columns.rows)
    ends = None if state is None else _regular(storage, schema, cutter, admission, incoming, columns, marks, state)
    runs = None
    if ends is None:
        runs = cutter.runs(schema, columns, columns.tensors, producer, incoming, on_device=True, marks=marks)
    if not known:  # nothing is refused any more, so memory may be taken
        schema = storage.allocate_schema(schema)
        columns = _Columns(schema, leaves, shape, storage.texts)
    if runs is None:
        assert state is not None, "a regular block goes on with it"
        assert ends is not None, "else there are runs"
        pending.keep_lockstep(producer, state)
        return _extend_block(memory, schema, cutter, admission, columns, marks[0], ends, state).reshape(shape)
    refuse_unshifted_on_device(
        schema, storage.shifted_in(schema), columns.tensors, _inside(runs, shape), _last_before(pending, runs)
    )
    trajectory_values = pending.trajectory_values(
        schema, runs, [columns[number] for number in range(len(schema.fields), len(columns))], storage.texts
    )
    batch = _batch_of(memory, schema, columns)
    spans = [Span(batch, run.row * shape[-1] + run.start, run.stop - run.start) for run in runs]
    _mark_truncated(schema, batch, [span for run, span in zip(runs, spans, strict=True) if run.truncated])
    version = version_field(schema)
    finished: list[tuple[Run | None, DirectTrajectory]] = []
    unfinished: dict[Hashable, tuple[Run, list[Span], list[np.ndarray]] | None] = {}
    for run, span, values in zip(runs, spans, trajectory_values, strict=True):
        if run.key in unfinished:
            begun = unfinished[run.key]
            earlier = [] if begun is None else begun[1]
        else:
            earlier = pending.get(run.key).spans
        if run.begins and earlier:
            finished += _cut_off(storage, pending, admission, run.key)
            earlier = []
        unfinished[run.key] = None if run.ends else (run, [*earlier, span], values)
        if run.ends:
            pending.truncated += run.truncated
            policy_version = NO_VERSION if version is None else version_of(columns[version][run.row, run.stop - 1])
            whole = DirectTrajectory([*earlier, span], values, admission.stored_version(policy_version))
            if admission.admits(whole.steps, partial(_trajectory, schema, storage.texts, whole)):
                finished.append((run, whole))
    index = np.full(shape if len(shape) == 2 else (1, *shape), PENDING, dtype=np.int64)
    ids = memory.write_directly([whole for _, whole in finished])
    for (of_run, whole), number in zip(finished, ids, strict=True):
        if of_run is not None:
            index[of_run.row, of_run.start : of_run.stop] = number
        admission.stored(whole.steps)
    count = cutter.evidence(schema).step_count
    for run in _keep_pending(pending, memory, batch, unfinished):
        pending.begin(run.key).step_count = None if count is None else columns[count][run.row, run.stop - 1].copy()
    return torch.from_numpy(index.reshape(shape))


def _regular(
    storage: TrajectoryStorage,
    schema: Schema,
    cutter: Cutter,
    admission: Admission,
    incoming: Incoming,
    columns: _Columns,
    marks: tuple[Boundaries, np.ndarray | None],
    state: Lockstep,
) -> Ends | None:
    """Return the trajectories that end in a regular block, which can be written from arrays; else None."""
    if incoming.real is not None or incoming.origin is not None or not admission.admits_all:
        return None
    boundaries, begins = marks
    keys, evidence = cutter.keys(schema), cutter.evidence(schema)
    if not regular(storage, schema, keys, evidence, columns, boundaries.ends, begins, state):
        return None
    ends = Ends.of(boundaries.ends, state.steps)
    pending = state.steps + boundaries.ends.shape[1]
    pending[ends.rows] = boundaries.ends.shape[1] - ends.stops
    longest = max(int(ends.lengths.max(initial=0)), int(pending.max()))
    if not cutter.allows(schema, longest, int(pending.sum())):
        return None  # the general way says what is wrong
    rows = np.flatnonzero(state.steps)
    refuse_unshifted_on_device(
        schema,
        storage.shifted_in(schema),
        columns.tensors,
        ~boundaries.ends[:, :-1],
        [(*state.last_steps(rows), rows, np.zeros(len(rows), dtype=np.int64))] if len(rows) else [],
    )
    return ends


def _extend_block(
    memory: DeviceMemory,
    schema: Schema,
    cutter: Cutter,
    admission: Admission,
    columns: _Columns,
    boundaries: Boundaries,
    ends: Ends,
    state: Lockstep,
) -> torch.Tensor:
    """Write a regular block; see :func:`extend_from_device`."""
    batch, length = _batch_of(memory, schema, columns), boundaries.ends.shape[1]
    versions = versions_of(schema, columns, ends, admission.stored_version)
    ids = state.write(memory, ends, batch, length, versions)
    for steps in ends.lengths.tolist():
        admission.stored(steps)
    state.keep(memory, ends, batch, length)
    count = cutter.evidence(schema).step_count
    # Copies, which do not keep the whole block.
    state.counts = None if count is None else columns[count][:, -1].copy()
    state.ids = None if boundaries.traj_ids is None else boundaries.traj_ids[:, -1].copy()
    return index_of(boundaries.ends, ends, ids)


def _inside(runs: Sequence[Run], shape: torch.Size) -> np.ndarray:
    """Return whether each step and the one behind it are of one run, ``bool`` ``[B, T - 1]``."""
    rows, length = (1, *shape)[-2:]
    inside = np.zeros((rows, length - 1), dtype=bool)
    for run in runs:
        inside[run.row, run.start : run.stop - 1] = True
    return inside


def _last_before(
    pending: PendingTrajectories, runs: Sequence[Run]
) -> list[tuple[Batch, np.ndarray, np.ndarray, np.ndarray]]:
    """Return the last pending steps of what runs go on with; see :func:`refuse_unshifted_on_device`."""
    before: dict[int, tuple[Batch, list[tuple[int, int, int]]]] = {}
    seen: set[Hashable] = set()
    for run in runs:
        spans = [] if run.key in seen or run.begins else pending.get(run.key).spans
        seen.add(run.key)
        if spans:
            batch, start, steps = spans[-1]
            before.setdefault(id(batch), (batch, []))[1].append((start + steps - 1, run.row, run.start))
    return [(batch, *np.array(places).T) for batch, places in before.values()]


def truncate_on_device(
    storage: TrajectoryStorage, pending: PendingTrajectories, admission: Admission, keys: Sequence[Hashable]
) -> None:
    """Store what is pending on the device under some keys as truncated trajectories."""
    schema, spans = storage.schema, pending.get(keys[0]).spans
    assert schema is not None, "steps are checked against a schema before they are pending"
    memory = storage.directly(dict(zip(schema.keys, spans[0].batch.values, strict=True)))
    assert memory is not None, "they lie on the device of the storage"
    finished = [whole for key in keys for whole in _cut_off(storage, pending, admission, key)]
    memory.write_directly([whole for _, whole in finished])
    for _, whole in finished:
        admission.stored(whole.steps)
    for key in keys:
        pending.end(key)


def _cut_off(
    storage: TrajectoryStorage, pending: PendingTrajectories, admission: Admission, key: Hashable
) -> list[tuple[None, DirectTrajectory]]:
    """Return what is pending under ``key`` as a truncated trajectory, if it is accepted."""
    schema, begun = storage.schema, pending.get(key)
    assert schema is not None, "steps are checked against a schema before they are pending"
    last = begun.spans[-1]
    _mark_truncated(schema, last.batch, [last])
    version = version_field(schema)
    end = last.start + last.steps - 1
    policy_version = NO_VERSION if version is None else version_of(as_array(last.batch.values[version][end]))
    whole = DirectTrajectory(begun.spans, begun.trajectory_values, admission.stored_version(policy_version))
    pending.truncated += 1
    accepted = admission.admits(whole.steps, partial(_trajectory, schema, storage.texts, whole))
    return [(None, whole)] if accepted else []


def _mark_truncated(schema: Schema, batch: Batch, spans: Sequence[Span]) -> None:
    """Let the last step of each span be truncated; the memory that the data came in is not changed."""
    if not spans:
        return
    values = batch.values
    assert isinstance(values, list), "a batch is made here, or by copy_spans"
    for number in end_flags(schema):
        values[number] = values[number].clone()
        for span in spans:
            values[number][span.start + span.steps - 1] = True


def _batch_of(memory: DeviceMemory, schema: Schema, columns: _Columns) -> Batch:
    of_steps = zip(schema.fields, columns.tensors, strict=False)
    values = [memory.to_device(value).reshape(-1, *field.shape) for field, value in of_steps]
    segments = segment_field(schema)
    return Batch(values, None if segments is None else columns[segments].reshape(-1))


def _trajectory(schema: Schema, texts: TextTable, whole: DirectTrajectory) -> TensorDictBase:
    """Return the trajectory that is judged, ``[T]``, on the device."""
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
    batch: Batch,
    unfinished: Mapping[Hashable, tuple[Run, list[Span], list[np.ndarray]] | None],
) -> list[Run]:
    """Copy the steps of unfinished trajectories, since their producer may reuse its memory.

    Args:
        pending: where they are kept.
        memory: copies them.
        batch: the new steps.
        unfinished: by key, the last run, the spans and the trajectory values; None where a trajectory is finished.

    Returns:
        The last run of each.
    """
    for key in unfinished:
        pending.end(key)
    begun = [entry for entry in unfinished.values() if entry is not None]
    copies = iter(memory.copy_spans([span for _, spans, _ in begun for span in spans if span.batch is batch]))
    for run, spans, values in begun:
        trajectory = pending.begin(run.key)
        trajectory.spans = [next(copies) if span.batch is batch else span for span in spans]
        trajectory.trajectory_values = values
        trajectory.traj_id = run.traj_id
        trajectory.steps = sum(span.steps for span in spans)
    waiting = [trajectory for trajectory in pending if trajectory.spans]
    batches = {id(span.batch): len(span.batch) for trajectory in waiting for span in trajectory.spans}
    if sum(batches.values()) > SLACK * sum(trajectory.steps for trajectory in waiting):
        # A few long trajectories keep the steps of many others that are written by now.
        together = iter(memory.copy_spans([span for trajectory in waiting for span in trajectory.spans]))
        for trajectory in waiting:
            trajectory.spans = [next(together) for _ in trajectory.spans]
    return [run for run, _, _ in begun]
