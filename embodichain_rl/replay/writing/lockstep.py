"""The unfinished trajectories of environments on a device that step together, in arrays.

A block ``[B, T]`` of 100,000 environments has as many runs of steps, and an object for each would take longer than the
simulation. So what is known of the environments has one element per environment here, and the work grows with the
number of trajectories that end; see :mod:`.blocks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from embodichain_rl.replay.device import Batch, DeviceMemory, Span, Spans

__all__ = ["SLACK", "Ends", "Lockstep"]

SLACK = 4
"""Most steps that are kept for pending trajectories, as a multiple of those that belong to them."""


@dataclass(slots=True, eq=False)
class _Block:
    """Steps of all environments that are pending, those of each one behind the other.

    Attributes:
        batch: the steps.
        first: where those of each row begin in it, ``int64`` ``[B]``.
        steps: how many they are, ``int64`` ``[B]``.
    """

    batch: Batch
    first: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Ends:
    """The trajectories that end in a block, in the order of their rows; ``int64`` ``[n]`` each.

    Attributes:
        rows: the row of each.
        starts: its first step in the block.
        stops: the step behind its last one.
        carried: how many steps it has from earlier blocks.
    """

    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    carried: np.ndarray

    @classmethod
    def of(cls, ends: np.ndarray, pending: np.ndarray) -> Ends:
        """Return them.

        Args:
            ends: ``bool`` ``[B, T]``: the last steps of trajectories.
            pending: number of steps that each row has from earlier blocks, ``int64`` ``[B]``.

        Example:
            >>> found = Ends.of(np.array([[False, True, True], [False, False, False]]), np.array([5, 7]))
            >>> found.rows.tolist(), found.starts.tolist(), found.stops.tolist(), found.carried.tolist()
            ([0, 0], [0, 2], [2, 3], [5, 0])
        """
        rows, last = np.nonzero(ends)
        is_first = np.ones(len(rows), dtype=bool)
        is_first[1:] = rows[1:] != rows[:-1]
        starts = np.zeros(len(rows), dtype=np.int64)
        starts[1:] = np.where(is_first[1:], 0, last[:-1] + 1)
        return cls(rows, starts, last + 1, np.where(is_first, pending[rows], 0))

    @property
    def lengths(self) -> np.ndarray:
        """Number of steps of each trajectory."""
        return self.carried + self.stops - self.starts


class Lockstep:
    """The unfinished trajectories of environments that step together, on a device.

    Args:
        rows: the number of environments.

    Attributes:
        ids: the id in the data of the trajectory that each row has begun, ``[B]``; None where there are none.
        counts: ``"step_count"`` of the last step of each row, ``[B, *shape]``; None where there is none.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.blocks: list[_Block] = []
        self.ids: np.ndarray | None = None
        self.counts: np.ndarray | None = None

    @property
    def steps(self) -> np.ndarray:
        """Number of pending steps of each row, ``int64`` ``[B]``."""
        return sum((block.steps for block in self.blocks), np.zeros(self.rows, dtype=np.int64))

    @property
    def held_steps(self) -> int:
        """Number of steps that are kept; some belong to trajectories that are written by now."""
        return sum(len(block.batch) for block in self.blocks)

    def spans(self, row: int) -> list[Span]:
        """Return the pending steps of a row."""
        return [Span(b.batch, int(b.first[row]), int(b.steps[row])) for b in self.blocks if b.steps[row]]

    def last_steps(self, rows: np.ndarray) -> tuple[Batch, np.ndarray]:
        """Return where the last pending step of each of some rows is, of which each has some."""
        newest = self.blocks[-1]  # all that is pending goes on in each block
        return newest.batch, newest.first[rows] + newest.steps[rows] - 1

    def write(self, memory: DeviceMemory, ends: Ends, batch: Batch, length: int, versions: np.ndarray) -> np.ndarray:
        """Write the trajectories that end in a block; return their ids, ``int64`` ``[n]``.

        Args:
            memory: where to.
            ends: which ones.
            batch: the steps of the block, ``[B * T]``.
            length: the steps of a row, ``T``.
            versions: the policy version of each, ``int64`` ``[n]``.
        """

        def copy(first: int, starts: np.ndarray) -> None:
            some = slice(first, first + len(starts))
            rows, to = ends.rows[some], starts.copy()
            carries = ends.carried[some] > 0
            for block in self.blocks:
                steps = np.where(carries, block.steps[rows], 0)
                there = steps > 0
                if there.any():
                    memory.arena.scatter(Spans(block.first[rows[there]], to[there], steps[there]), block.batch.values)
                to += steps
            own = ends.stops[some] - ends.starts[some]
            memory.arena.scatter(Spans(rows * length + ends.starts[some], to, own), batch.values)
            if memory.arena.shifted:
                memory.arena.scatter_last(rows * length + ends.stops[some] - 1, to + own, batch.values)

        return memory.write_rows(ends.lengths, versions, copy)

    def keep(self, memory: DeviceMemory, ends: Ends, batch: Batch, length: int) -> None:
        """Forget what has ended in a block, and copy the steps that are pending now.

        Args:
            memory: copies them.
            ends: the trajectories that have ended.
            batch: the steps of the block, ``[B * T]``.
            length: the steps of a row, ``T``.
        """
        begins = np.zeros(self.rows, dtype=np.int64)
        begins[ends.rows] = ends.stops  # of several ends of a row the last one
        for block in self.blocks:
            block.steps[ends.rows] = 0
        self.blocks = [block for block in self.blocks if block.steps.any()]
        steps = length - begins
        self._append(memory, [(batch, np.arange(self.rows) * length + begins, steps)], steps)
        if self.held_steps > SLACK * int(self.steps.sum()):
            # Few long trajectories keep the steps of many that are written by now.
            blocks, self.blocks = self.blocks, []
            together = [(block.batch, block.first, block.steps) for block in blocks]
            self._append(memory, together, np.sum([block.steps for block in blocks], axis=0))

    def _append(
        self, memory: DeviceMemory, parts: Sequence[tuple[Batch, np.ndarray, np.ndarray]], steps: np.ndarray
    ) -> None:
        """Copy the spans ``(batch, first, steps)`` of all rows to a new block; several of a row follow each other."""
        if not steps.any():
            return
        first = np.cumsum(steps) - steps
        to, spans = first.copy(), []
        for batch, begins, lengths in parts:
            spans.append((batch, Spans(begins, to.copy(), lengths)))
            to += lengths
        self.blocks.append(_Block(memory.merged(spans, int(steps.sum())), first, steps.copy()))
