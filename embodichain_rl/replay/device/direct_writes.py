"""Whole trajectories that lie on the device already: reserve, copy, publish.

The steps of all trajectories of a call are copied to their regions by one operation per field, whatever their number.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from embodichain_rl.errors import (
    StagingTimeoutError,
    TooManyWritersError,
)
from embodichain_rl.replay.device import staging
from embodichain_rl.replay.device.arena import DeviceArena, ranges
from embodichain_rl.replay.host import TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Reservation
from embodichain_rl.replay.schema import (
    steps_left,
)

__all__ = ["Batch", "DirectTrajectory", "DirectWrites", "Span", "copy_spans"]

MAX_TOGETHER = 64
"""How many trajectories are in the middle of being written at most; a ledger has slots for 256."""


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
    :class:`~embodichain_rl.replay.device.stream_order.StreamOrder`. One thread at a time.

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


def copy_spans(arena: DeviceArena, spans: list[Span]) -> list[Span]:
    """Copy spans to one batch of their own.

    Args:
        arena: on the device of the spans.
        spans: of any batches.

    Returns:
        As many spans, in the same order, of the new batch.
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
        there = arena.tensor(steps)
        pieces.append([value.index_select(0, there) for value in batch.values])
        if batch.segment_ids is not None:
            segment_ids.append(batch.segment_ids[steps])
    together = Batch(
        [torch.cat(of_field) for of_field in zip(*pieces, strict=True)],
        np.concatenate(segment_ids) if segment_ids else None,
    )
    copies, end = list(spans), 0
    for number in order:
        copies[number] = Span(together, end, spans[number].steps)
        end += spans[number].steps
    return copies
