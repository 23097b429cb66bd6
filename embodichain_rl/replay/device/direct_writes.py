"""Direct writes of whole trajectories that are already on the device: reserve, copy, publish.

The trajectories of a call are copied together to one region, with two operations per field, whatever their number.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from embodichain_rl.errors import StagingTimeoutError, TooManyWritersError
from embodichain_rl.replay.device import staging
from embodichain_rl.replay.device.arena import DeviceArena, Spans, ranges
from embodichain_rl.replay.host import TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.schema import steps_left

__all__ = ["Batch", "DirectTrajectory", "DirectWrites", "Span", "copy_spans", "merged"]

SHARE_TOGETHER = 4
"""At most a quarter of ``max_trajectories`` is written together, because so many are retired before."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Consecutive steps on the device."""

    values: Sequence[torch.Tensor]
    """Per field ``[n, *shape]``, on the device."""
    segment_ids: np.ndarray | None
    """The segment of each step, ``[n]``, on the host; None without segments."""

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
    """The trajectory values, one array ``[*shape]`` per trajectory field, on the host."""
    policy_version: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(span.steps for span in self.spans)

    def segment_ids(self) -> np.ndarray | None:
        """Return the segment of each step, ``[steps]``, or None without segments."""
        ids = [(span.batch.segment_ids, span.start, span.steps) for span in self.spans]
        pieces = [batch_ids[start : start + steps] for batch_ids, start, steps in ids if batch_ids is not None]
        return np.concatenate(pieces) if pieces else None


class DirectWrites:
    """Copies whole trajectories on the device to the arena, and publishes them.

    The copies are enqueued on the current stream of the writing thread. The trajectories are published as soon as the
    copies are enqueued; see :class:`~embodichain_rl.replay.device.stream_order.StreamOrder` for why this is safe. One
    thread writes at a time.

    Args:
        arena: the arena to copy to.
        table: the table of trajectory values; None if the schema has no trajectory fields.
        ledger: the ledger of the arena.
        max_reserved_steps: largest number of steps that are reserved together. A single trajectory may have more.
    """

    def __init__(
        self, arena: DeviceArena, table: TrajectoryTable | None, ledger: Ledger, max_reserved_steps: int
    ) -> None:
        self._arena, self._table, self._ledger = arena, table, ledger
        self._max_reserved_steps = max_reserved_steps
        self._mutex = threading.Lock()

    def write(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Write trajectories and return their ids."""
        if not trajectories:
            return []
        segments = [whole.segment_ids() for whole in trajectories]
        left = [None if ids is None else steps_left(ids) for ids in segments]
        lengths = np.array([whole.steps for whole in trajectories])

        def copy(first: int, starts: np.ndarray) -> None:
            self._copy(trajectories[first : first + len(starts)], starts)
            if self._arena.segment_left is not None:
                for start, of_steps in zip(starts.tolist(), left[first:], strict=False):
                    assert of_steps is not None, "the schema has segments"
                    self._arena.segment_left[start : start + len(of_steps)] = of_steps

        def fill(row: int, number: int) -> None:
            assert self._table is not None
            self._table.write(row, values=trajectories[number].of_trajectory)

        return self.write_rows(
            lengths,
            np.array([whole.policy_version for whole in trajectories]),
            copy,
            longest_segments=np.array([n if m is None else m.max() for n, m in zip(lengths, left, strict=True)]),
            fill=None if self._table is None else fill,
        ).tolist()

    def write_rows(
        self,
        lengths: np.ndarray,
        policy_versions: np.ndarray,
        copy: Callable[[int, np.ndarray], None],
        *,
        longest_segments: np.ndarray | None = None,
        fill: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """Write trajectories, and return their ids, ``int64`` ``[n]``.

        Args:
            lengths: number of steps of each, ``int64`` ``[n]``.
            policy_versions: of each, ``int64`` ``[n]``.
            copy: enqueues the copies of some of them, given the number of the first one, and the step of the arena that
                each goes to. Behind each there is room for the last next observation, if those are stored once.
            longest_segments: of each; None if there are no segments.
            fill: see :meth:`Ledger.publish_together`.
        """
        margin, done = self._ledger.margin, 0
        ids = np.empty(len(lengths), dtype=np.int64)
        with self._mutex:
            while done < len(lengths):
                most = max(1, self._ledger.max_trajectories // SHARE_TOGETHER)
                rooms = np.cumsum(lengths[done : done + most] + margin)
                count = max(1, int(np.searchsorted(rooms, self._max_reserved_steps, side="right")))
                some = slice(done, done + count)
                region = self._reserve(int(rooms[count - 1]) - margin)
                starts = region.start + rooms[:count] - lengths[some] - margin
                try:
                    copy(done, starts)
                except BaseException:
                    self._ledger.give_back(region)
                    raise
                ids[some] = self._ledger.publish_together(
                    region,
                    starts,
                    lengths[some],
                    (lengths if longest_segments is None else longest_segments)[some],
                    policy_versions=policy_versions[some],
                    fill=None if fill is None else _from(fill, done),
                )
                done += count
        return ids

    def _reserve(self, steps: int) -> Reservation:
        """Reserve a region. While pending uploads hold all space, block until one of them is published."""
        error: TooManyWritersError | None = None
        for _ in staging.polls(staging.WAIT_FOR_ROOM):
            try:
                return self._ledger.reserve(steps)
            except TooManyWritersError as no_space:
                error = no_space
        raise StagingTimeoutError(
            f"No space for a trajectory of {steps:,} steps on the device within {staging.WAIT_FOR_ROOM:g} s, because "
            "uploads are not done. Check whether other work keeps the device busy; otherwise raise max_total_steps."
        ) from error

    def _copy(self, trajectories: Sequence[DirectTrajectory], starts: np.ndarray) -> None:
        spans_by_batch: dict[int, tuple[Batch, list[tuple[int, int, int]]]] = {}
        for whole, start in zip(trajectories, starts.tolist(), strict=True):
            to = start
            for batch, begin, steps in whole.spans:
                spans_by_batch.setdefault(id(batch), (batch, []))[1].append((begin, to, steps))
                to += steps
        for batch, spans in spans_by_batch.values():
            self._arena.scatter(Spans(*np.array(spans).T), batch.values)
        if self._arena.shifted:
            ends_by_batch: dict[int, tuple[Batch, list[tuple[int, int]]]] = {}
            for whole, start in zip(trajectories, starts.tolist(), strict=True):
                batch, begin, steps = whole.spans[-1]
                ends = ends_by_batch.setdefault(id(batch), (batch, []))[1]
                ends.append((begin + steps - 1, start + whole.steps))
            for batch, ends in ends_by_batch.values():
                steps_at, to_at = np.array(ends).T
                self._arena.scatter_last(steps_at, to_at, batch.values)


def _from(fill: Callable[[int, int], None], first: int) -> Callable[[int, int], None]:
    return lambda row, number: fill(row, first + number)


def merged(arena: DeviceArena, parts: Sequence[tuple[Batch, Spans]], total: int) -> Batch:
    """Copy spans of several batches without segments to one new batch of ``total`` steps, which they fill."""
    steps = [arena.indices(spans.begins, spans.lengths) for _, spans in parts]
    if len(parts) == 1:  # in order
        return Batch([value.index_select(0, steps[0]) for value in parts[0][0].values], None)
    to = [arena.indices(spans.to, spans.lengths) for _, spans in parts]
    values = [value.new_empty((total, *value.shape[1:])) for value in parts[0][0].values]
    for (batch, _), begins, ends in zip(parts, steps, to, strict=True):
        for value, source in zip(values, batch.values, strict=True):
            value.index_copy_(0, ends, source.index_select(0, begins))
    return Batch(values, None)


def copy_spans(arena: DeviceArena, spans: list[Span]) -> list[Span]:
    """Copy spans of any batches to one new batch.

    Args:
        arena: an arena on the device of the spans.
        spans: the spans to copy.

    Returns:
        Spans of the new batch, in the same order.
    """
    if not spans:
        return []
    by_batch: dict[int, list[int]] = {}
    for number, span in enumerate(spans):
        by_batch.setdefault(id(span.batch), []).append(number)
    order = [number for numbers in by_batch.values() for number in numbers]
    pieces: list[list[torch.Tensor]] = []
    segment_ids: list[np.ndarray] = []
    for numbers in by_batch.values():
        batch = spans[numbers[0]].batch
        starts, lengths = (np.array([span[part] for span in map(spans.__getitem__, numbers)]) for part in (1, 2))
        step_index = arena.indices(starts, lengths)
        pieces.append([value.index_select(0, step_index) for value in batch.values])
        if batch.segment_ids is not None:
            segment_ids.append(batch.segment_ids[ranges(starts, lengths)])
    together = Batch(
        [torch.cat(field_pieces) for field_pieces in zip(*pieces, strict=True)],
        np.concatenate(segment_ids) if segment_ids else None,
    )
    copies, end = list(spans), 0
    for number in order:
        copies[number] = Span(together, end, spans[number].steps)
        end += spans[number].steps
    return copies
