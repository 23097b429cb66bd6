"""Direct writes of whole trajectories that are already on the device: reserve, copy, publish.

The trajectories of a call are copied together, with one operation per field, whatever their number.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from embodichain_rl.errors import StagingTimeoutError, TooManyWritersError
from embodichain_rl.replay.device import staging
from embodichain_rl.replay.device.arena import DeviceArena, ranges
from embodichain_rl.replay.host import TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.schema import steps_left

__all__ = ["Batch", "DirectTrajectory", "DirectWrites", "Span", "copy_spans"]

MAX_TOGETHER = 64
"""Largest number of trajectories that are written together. A ledger has slots for 256."""


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
        ids: list[int] = []
        with self._mutex:
            while len(ids) < len(trajectories):
                ids += self._write_together(trajectories[len(ids) : len(ids) + MAX_TOGETHER])
        return ids

    def _write_together(self, trajectories: Sequence[DirectTrajectory]) -> list[int]:
        """Write the first trajectories of a sequence together, as many as fit, and return their ids."""
        regions = [self._reserve(trajectories[0].steps)]
        try:
            for whole in trajectories[1:]:
                if sum(region.length for region in regions) + whole.steps > self._max_reserved_steps:
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

    def _copy(self, trajectories: Sequence[DirectTrajectory], regions: Sequence[Reservation]) -> None:
        spans_by_batch: dict[int, tuple[Batch, list[tuple[int, int, int]]]] = {}
        for whole, region in zip(trajectories, regions, strict=True):
            to = region.start
            for batch, start, steps in whole.spans:
                spans_by_batch.setdefault(id(batch), (batch, []))[1].append((start, to, steps))
                to += steps
        for batch, spans in spans_by_batch.values():
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
        steps = ranges(*(np.array([span[part] for span in map(spans.__getitem__, numbers)]) for part in (1, 2)))
        step_index = arena.tensor(steps)
        pieces.append([value.index_select(0, step_index) for value in batch.values])
        if batch.segment_ids is not None:
            segment_ids.append(batch.segment_ids[steps])
    together = Batch(
        [torch.cat(field_pieces) for field_pieces in zip(*pieces, strict=True)],
        np.concatenate(segment_ids) if segment_ids else None,
    )
    copies, end = list(spans), 0
    for number in order:
        copies[number] = Span(together, end, spans[number].steps)
        end += spans[number].steps
    return copies
