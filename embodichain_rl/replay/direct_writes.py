"""Data that lies on the device already: cut into trajectories there, without a way over the host.

To the host goes what says where trajectories begin and end, which segment and which policy steps are of, and what
belongs to whole trajectories. All else stays where it is. The steps of finished trajectories are copied to their places
by one call a field, whatever their number; those of others are kept, copied, until their end comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tensordict import TensorDictBase

from embodichain_rl.errors import (
    SchemaMismatchError,
    StagingTimeoutError,
    TooManyWritersError,
    UnsupportedOperationError,
)
from embodichain_rl.replay import staging
from embodichain_rl.replay.device_arena import DeviceArena, ranges
from embodichain_rl.replay.layout import segment_field
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.runs import POLICY_VERSION_KEY, Run, ends_of, runs_of, traj_ids_of
from embodichain_rl.replay.schema import Key, Leaf, Schema
from embodichain_rl.replay.segments import steps_left
from embodichain_rl.replay.texts import TextTable, resolve_texts
from embodichain_rl.replay.trajectory_table import TrajectoryTable
from embodichain_rl.replay.windows import as_array, as_tensor

if TYPE_CHECKING:
    from embodichain_rl.replay.device_memory import DeviceMemory
    from embodichain_rl.replay.writer import TrajectoryWriter

__all__ = ["Batch", "DirectTrajectory", "DirectWrites", "Span", "extend_directly"]

PENDING = -1

MAX_TOGETHER = 64
"""How many trajectories are in the middle of being written at most; a ledger has slots for 256."""

SLACK = 4
"""How many times as many steps are kept as belong to unfinished trajectories, at most."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Steps on the device that lie together: of each field ``[n, *shape]``, and their segments, on the host."""

    values: Sequence[torch.Tensor]
    segment_ids: np.ndarray | None

    def __len__(self) -> int:
        return len(self.values[0])


class Span(NamedTuple):
    """Consecutive steps of a batch that belong to one trajectory."""

    batch: Batch
    start: int
    steps: int


@dataclass(frozen=True, slots=True)
class DirectTrajectory:
    """A whole trajectory on the device."""

    spans: list[Span]
    of_trajectory: list[np.ndarray]
    policy_version: int

    @property
    def steps(self) -> int:
        """How many it has."""
        return sum(span.steps for span in self.spans)

    def segment_ids(self) -> np.ndarray | None:
        """Returns the segment of each step, ``[steps]``, where steps have one."""
        ids = [(span.batch.segment_ids, span.start, span.steps) for span in self.spans]
        pieces = [of_batch[start : start + steps] for of_batch, start, steps in ids if of_batch is not None]
        return np.concatenate(pieces) if pieces else None


class DirectWrites:
    """Copies whole trajectories from anywhere on the device to the arena, and publishes them.

    They are copied on the stream of the thread that writes, and published when that is enqueued; see
    :class:`~embodichain_rl.replay.stream_order.StreamOrder`. One thread at a time.

    Args:
        arena: where to.
        table: where the values of whole trajectories go; None where there are none.
        ledger: that of the arena.
        most_steps: how many steps may be reserved at once.
    """

    def __init__(self, arena: DeviceArena, table: TrajectoryTable | None, ledger: Ledger, most_steps: int) -> None:
        self._arena, self._table, self._ledger = arena, table, ledger
        self._most_steps = most_steps
        self._mutex = threading.Lock()

    def write(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Writes trajectories; returns their ids."""
        ids: list[int] = []
        with self._mutex:
            while len(ids) < len(trajectories):
                ids += self._write_together(trajectories[len(ids) : len(ids) + MAX_TOGETHER])
        return ids

    def _write_together(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Writes the first of some trajectories, as many as there may be in the middle of being written."""
        regions = [self._reserve(trajectories[0].steps)]
        try:
            for whole in trajectories[1:]:
                if sum(region.length for region in regions) + whole.steps > self._most_steps:
                    break
                try:
                    regions.append(self._ledger.reserve(whole.steps))
                except TooManyWritersError:
                    break
            together = trajectories[: len(regions)]
            self._copy(together, regions)
        except BaseException:
            for region in regions:
                self._ledger.give_back(region)
            raise
        return [self._publish(*pair) for pair in zip(together, regions, strict=True)]

    def _reserve(self, steps: int) -> Reservation:
        """A region; waits while uploads that are under way have all the room, since they go on meanwhile."""
        deadline, pause = time.monotonic() + staging.WAIT_FOR_ROOM, staging.FIRST_PAUSE
        while True:
            try:
                return self._ledger.reserve(steps)
            except TooManyWritersError as error:
                if time.monotonic() > deadline:
                    raise StagingTimeoutError(
                        f"No room for a trajectory of {steps:,} steps on the device within {staging.WAIT_FOR_ROOM:g} "
                        "s, because of uploads that are not done. See whether the device is kept busy by others; else "
                        "raise max_total_steps."
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, staging.LONGEST_PAUSE)

    def _copy(self, trajectories: Sequence[DirectTrajectory], regions: Sequence[Reservation]) -> None:
        places: dict[int, tuple[Batch, list[tuple[int, int, int]]]] = {}
        for whole, region in zip(trajectories, regions, strict=True):
            to = region.start
            for batch, start, steps in whole.spans:
                places.setdefault(id(batch), (batch, []))[1].append((start, to, steps))
                to += steps
        for batch, spans in places.values():
            begin, to_steps, lengths = np.array(spans).T
            self._arena.scatter(ranges(to_steps, lengths), batch.values, ranges(begin, lengths))

    def _publish(self, whole: DirectTrajectory, region: Reservation) -> int:
        longest_segment, ids = None, whole.segment_ids()
        if ids is not None and self._arena.segment_left is not None:
            left = steps_left(ids)
            self._arena.segment_left[region.start : region.start + region.length] = left
            longest_segment = int(left.max())
        fill = None if self._table is None else partial(self._table.write, values=whole.of_trajectory)
        return self._ledger.publish(region, longest_segment, policy_version=whole.policy_version, fill=fill)


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


def extend_directly(
    writer: TrajectoryWriter,
    memory: DeviceMemory,
    leaves: Mapping[Key, Leaf],
    shape: torch.Size,
    lengths: np.ndarray | None,
) -> torch.Tensor:
    """Does what :meth:`TrajectoryWriter.extend` does, with data on the device.

    Args:
        writer: whose unfinished trajectories go on.
        memory: that of its storage.
        leaves: the entries of the data.
        shape: its batch size, ``[T]`` or ``[B, T]``.
        lengths: how many steps of each row are real; None: all.
    """
    storage = writer._storage
    if storage.compact:
        raise UnsupportedOperationError(
            "Got data on the device for a storage with compact=True, whose next observations are compared on the host "
            "before they are left out. Write data.cpu(), or build the storage with compact=False."
        )
    schema = storage.schema
    if schema is None:
        schema = Schema.of_leaves(leaves, len(shape))
        ends_of(schema, _Columns(schema, leaves, shape, storage.texts))  # refuses before memory is taken
        schema = storage.allocate_schema(schema)
    columns = _Columns(schema, leaves, shape, storage.texts)
    runs = list(runs_of(writer._producer(), ends_of(schema, columns), traj_ids_of(schema, columns), lengths))
    writer._refuse_endless(runs, staged=False)
    _refuse_mixed(writer, runs)
    of_trajectories = writer._of_trajectories(
        schema, runs, [columns[number] for number in range(len(schema.fields), len(columns))]
    )
    batch = _batch_of(memory, schema, columns)
    spans = [Span(batch, run.row * shape[-1] + run.start, run.stop - run.start) for run in runs]
    version = schema.number_of(POLICY_VERSION_KEY)
    finished: list[tuple[Run, DirectTrajectory]] = []
    for run, span, of_trajectory in zip(runs, spans, of_trajectories, strict=True):
        if run.ends:
            earlier = writer._unfinished.get(run.key)
            policy_version = 0 if version is None else int(columns[version][run.row, run.stop - 1].reshape(-1)[0])
            all_spans = [*([] if earlier is None else earlier.spans), span]
            whole = DirectTrajectory(all_spans, of_trajectory, writer._version(policy_version))
            if writer._admits(whole.steps, partial(_trajectory, schema, storage.texts, whole)):
                finished.append((run, whole))
    index = np.full(shape if len(shape) == 2 else (1, *shape), PENDING, dtype=np.int64)
    ids = memory.write_directly([whole for _, whole in finished])
    for (run, whole), number in zip(finished, ids, strict=True):
        index[run.row, run.start : run.stop] = number
        writer._wrote(whole.steps)
    _keep_unfinished(writer, memory, runs, spans, of_trajectories)
    return torch.from_numpy(index.reshape(shape))


def _refuse_mixed(writer: TrajectoryWriter, runs: list[Run]) -> None:
    for run in runs:
        unfinished = writer._unfinished.get(run.key)
        if unfinished is not None and unfinished.pieces:
            raise SchemaMismatchError(
                "Got steps on the device of a trajectory that was begun with steps on the CPU. Write all steps of a "
                "trajectory from the same place."
            )


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
    data = schema.build(values, [whole.steps])
    for field, value in zip(schema.trajectory_fields, whole.of_trajectory, strict=True):
        of_steps = as_tensor(value, field.dtype).to(values[0].device)
        data.set(field.key, of_steps.expand(whole.steps, *field.shape))
    return resolve_texts(data, schema.text_keys, texts)


def _keep_unfinished(
    writer: TrajectoryWriter,
    memory: DeviceMemory,
    runs: list[Run],
    spans: list[Span],
    of_trajectories: list[list[np.ndarray]],
) -> None:
    """Copies what belongs to trajectories whose end has not come; whoever wrote it may use its memory again."""
    for run in runs:
        if run.ends:
            writer._unfinished.pop(run.key, None)
    begun = [
        (run, span, of_trajectory)
        for run, span, of_trajectory in zip(runs, spans, of_trajectories, strict=True)
        if not run.ends
    ]
    kept = _copies(memory, [span for _, span, _ in begun])
    for (run, _, of_trajectory), span in zip(begun, kept, strict=True):
        unfinished = writer._begin(run.key)
        unfinished.spans.append(span)
        unfinished.of_trajectory = of_trajectory
        unfinished.steps += span.steps
    waiting = [unfinished for unfinished in writer._unfinished.values() if unfinished.spans]
    batches = {id(span.batch): len(span.batch) for unfinished in waiting for span in unfinished.spans}
    if sum(batches.values()) > SLACK * sum(unfinished.steps for unfinished in waiting):
        # A few long trajectories have kept the steps of many that are written by now.
        together = iter(_copies(memory, [span for unfinished in waiting for span in unfinished.spans]))
        for unfinished in waiting:
            unfinished.spans = [next(together) for _ in unfinished.spans]


def _copies(memory: DeviceMemory, spans: list[Span]) -> list[Span]:
    """Copies spans to one batch of their own."""
    if not spans:
        return []
    by_batch: dict[int, list[int]] = {}
    for place, span in enumerate(spans):
        by_batch.setdefault(id(span.batch), []).append(place)
    order = [place for places in by_batch.values() for place in places]
    pieces: list[list[torch.Tensor]] = []
    segment_ids: list[np.ndarray] = []
    for places in by_batch.values():
        batch = spans[places[0]].batch
        steps = ranges(*(np.array([span[part] for span in map(spans.__getitem__, places)]) for part in (1, 2)))
        there = memory.arena.tensor(steps)
        pieces.append([value.index_select(0, there) for value in batch.values])
        if batch.segment_ids is not None:
            segment_ids.append(batch.segment_ids[steps])
    together = Batch(
        [torch.cat(of_field) for of_field in zip(*pieces, strict=True)],
        np.concatenate(segment_ids) if segment_ids else None,
    )
    copies, end = list(spans), 0
    for place in order:
        copies[place] = Span(together, end, spans[place].steps)
        end += spans[place].steps
    return copies
