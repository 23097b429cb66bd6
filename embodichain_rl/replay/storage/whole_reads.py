"""Reads of whole trajectories, each either as it was written or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.device import DeviceArena, DeviceTable
from embodichain_rl.replay.host import Arena, TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import MASK, as_array
from embodichain_rl.replay.storage.index import chunk_index

__all__ = ["ReadView", "WholeTrajectories", "read_live", "read_surely"]

OPTIMISTIC_READS = 3
"""How often given trajectories are read without the lock before writers are made to wait for one such read."""


class ReadView(NamedTuple):
    """What it takes to read trajectories of a view."""

    ledger: Ledger
    """Which trajectories are live, and where they lie."""
    arena: Arena | DeviceArena
    """Their steps."""
    table: TrajectoryTable | DeviceTable | None
    """Their trajectory values; None where no field is of whole trajectories."""


class WholeTrajectories(NamedTuple):
    """Copies of trajectories."""

    values: list[torch.Tensor]
    """Of each field of a step, the steps of one trajectory behind those of the other, ``[steps, *shape]``."""
    of_trajectories: list[torch.Tensor]
    """Of each field of a trajectory, ``[trajectories, *shape]``."""
    rows: Rows

    def select(self, which: np.ndarray) -> WholeTrajectories:
        """Returns the trajectories of a mask."""
        steps, trajectories = torch.from_numpy(np.repeat(which, self.rows.lengths)), torch.from_numpy(which)
        return WholeTrajectories(
            [value[steps] for value in self.values],
            [value[trajectories] for value in self.of_trajectories],
            self.rows.select(which),
        )

    def only(self, arena: Arena | DeviceArena) -> TensorDict:
        """Returns the trajectory, ``[T]``, where there is one."""
        index = self._index()[0]
        of_steps = (value.expand(len(index), *value.shape[1:]).contiguous() for value in self.of_trajectories)
        return arena.schema.build_sample([*self.values, *of_steps], arena.origin(index))

    def padded(self, arena: Arena | DeviceArena) -> TensorDict:
        """Returns the trajectories as ``[B, T_max]``, with a mask."""
        index = self._index()
        real = np.arange(index.shape[1]) < self.rows.lengths[:, None]
        mask = arena.tensor(real)
        padded = []
        for value in self.values:
            padded.append(value.new_zeros((*real.shape, *value.shape[1:])))
            if value.device.type == "cpu":  # by numpy, which is faster
                as_array(padded[-1])[real] = as_array(value)
            else:
                padded[-1][mask] = value
        for value in self.of_trajectories:
            padded.append(value[:, None].expand(*real.shape, *value.shape[1:]).contiguous())
        data = arena.schema.build_sample(padded, arena.origin(index))
        data.set(MASK, mask)
        return data

    def _index(self) -> np.ndarray:
        """Index ``[B, T_max, 2]``: trajectory and step."""
        longest = int(self.rows.lengths.max(initial=0))
        return chunk_index(self.rows.ids, np.zeros(len(self.rows.ids), dtype=np.int64), longest)


def read_surely(view: ReadView, find: Callable[[], Rows]) -> WholeTrajectories:
    """Reads the trajectories whose rows ``find`` returns: again if one is evicted meanwhile, at last under the lock."""
    for _ in range(OPTIMISTIC_READS):
        whole = _read(view, find())
        if (whole.rows.lengths >= 0).all() and view.ledger.still_valid(whole.rows.ids).all():
            return whole
    with view.ledger.frozen():
        return _read(view, find())


def read_live(view: ReadView) -> WholeTrajectories:
    """Reads all trajectories that are live from the beginning of the read to its end.

    Where these are less than half, which is where little is kept and written fast, it reads again, at last under the
    lock: what is live is never lost in the reading.
    """
    for _ in range(OPTIMISTIC_READS):
        first, end = view.ledger.live_range()
        whole = _read(view, view.ledger.rows_between(first, end))
        kept = view.ledger.still_valid(whole.rows.ids)
        if 2 * np.count_nonzero(kept) >= end - first:
            return whole if kept.all() else whole.select(kept)
    with view.ledger.frozen():
        return _read(view, view.ledger.live_rows())


def _read(view: ReadView, rows: Rows) -> WholeTrajectories:
    values = view.arena.copy_spans(rows.starts, rows.lengths)
    return WholeTrajectories(values, [] if view.table is None else view.table.copy(rows.ids), rows)
