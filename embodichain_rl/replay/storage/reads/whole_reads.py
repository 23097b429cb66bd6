"""Reads of whole trajectories, each either as it was written or not at all."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.device import DeviceArena, DeviceTable
from embodichain_rl.replay.host import Arena, TrajectoryTable
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.schema import MASK, Blobs, as_array
from embodichain_rl.replay.storage.reads.index import chunk_index

__all__ = [
    "OPTIMISTIC_READS",
    "ReadView",
    "WholeTrajectories",
    "read_each",
    "read_existing",
    "read_live",
    "read_surely",
]

OPTIMISTIC_READS = 3
"""The number of times that trajectories are read without the lock, before writers have to wait for a read."""

MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0

MAPPED_BYTES = 1 << 20
"""Bytes of a padded field from which on its padding is left untouched."""

GROUP_BYTES = 64 << 20
"""Bytes of the trajectories that :func:`read_each` copies at once."""


class ReadView(NamedTuple):
    """The parts of a storage that are needed to read trajectories."""

    ledger: Ledger
    """The table of trajectories."""
    arena: Arena | DeviceArena
    """Their steps."""
    table: TrajectoryTable | DeviceTable | None
    """Their trajectory values; None if no field belongs to whole trajectories."""


class WholeTrajectories(NamedTuple):
    """Copies of trajectories."""

    values: list[Any]
    """For each field of a step, the steps of one trajectory after those of the other, ``[steps, *shape]``; or blobs."""
    of_trajectories: list[torch.Tensor]
    """For each field of a trajectory, ``[trajectories, *shape]``."""
    rows: Rows
    """Their rows in the ledger."""

    def select(self, which: np.ndarray) -> WholeTrajectories:
        """Return the trajectories at which a mask is True."""
        steps, trajectories = torch.from_numpy(np.repeat(which, self.rows.lengths)), torch.from_numpy(which)
        return WholeTrajectories(
            [value[steps] for value in self.values],
            [value[trajectories] for value in self.of_trajectories],
            self.rows.select(which),
        )

    def each(self) -> Iterator[WholeTrajectories]:
        """Yield the trajectories one by one, each in memory of its own."""
        end = 0
        for number, length in enumerate(self.rows.lengths.tolist()):
            begin, end = end, end + length
            which = np.array([number])
            yield WholeTrajectories(
                [value[begin:end].clone() for value in self.values],
                [value[number : number + 1].clone() for value in self.of_trajectories],
                self.rows.select(which),
            )

    def only(self, arena: Arena | DeviceArena) -> TensorDict:
        """Return the trajectory, ``[T]``, if there is exactly one."""
        index = self._index()[0]
        of_steps = (value.expand(len(index), *value.shape[1:]).contiguous() for value in self.of_trajectories)
        return arena.build_sample([*self.values, *of_steps], arena.origin(index))

    def padded(self, arena: Arena | DeviceArena) -> TensorDict:
        """Return the trajectories as ``[B, T_max]``, padded with zeros, with a mask. Call this once, at the end.

        On the CPU the padding takes no memory until it is written to. The copies of each field are given up as soon as
        they are padded. So the memory depends on the steps, not on the longest trajectory.
        """
        index = self._index()
        real = np.arange(index.shape[1]) < self.rows.lengths[:, None]
        mask = arena.tensor(real)
        padded: list[Any] = []
        for number, value in enumerate(self.values):
            if isinstance(value, Blobs):
                padded.append(Blobs.empty(real.shape))
                padded[-1].array[real] = value.array
                continue
            shape = *real.shape, *value.shape[1:]
            if value.device.type == "cpu":  # numpy is faster
                padded.append(_untouched_zeros(shape, value.dtype))
                as_array(padded[-1])[real] = as_array(value)
            else:
                padded.append(value.new_zeros(shape))
                padded[-1][mask] = value
            self.values[number] = value[:0].clone()
        for value in self.of_trajectories:
            padded.append(value[:, None].expand(*real.shape, *value.shape[1:]).contiguous())
        data = arena.build_sample(padded, arena.origin(index))
        data.set(MASK, mask)
        return data

    def _index(self) -> np.ndarray:
        """Return the index ``[B, T_max, 2]``: trajectory id and step."""
        longest = int(self.rows.lengths.max(initial=0))
        return chunk_index(self.rows.ids, np.zeros(len(self.rows.ids), dtype=np.int64), longest)


def _untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros on the CPU, of which a page takes memory only once it is written to; torch writes them all."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < MAPPED_BYTES or not hasattr(mmap, "MADV_NOHUGEPAGE"):
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # a huge page of 2 MiB would be taken at the end of each trajectory
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def read_surely(view: ReadView, find: Callable[[], Rows]) -> WholeTrajectories:
    """Read the trajectories whose rows ``find`` returns; again if one is evicted meanwhile, finally under the lock."""
    for _ in range(OPTIMISTIC_READS):
        whole = _read(view, find())
        if (whole.rows.lengths >= 0).all() and view.ledger.unchanged(whole.rows).all():
            return whole
    with view.ledger.frozen():
        return _read(view, find())


def read_live(view: ReadView) -> WholeTrajectories:
    """Read all trajectories that are live from the beginning of the read to its end.

    If these are less than half of the live ones, because a small buffer is written fast, they are read again, finally
    under the lock: so a read never loses most of what is live.
    """
    for _ in range(OPTIMISTIC_READS):
        live = view.ledger.live()
        whole = _read(view, view.ledger.existing(live.all()))
        kept = view.ledger.unchanged(whole.rows)
        if 2 * np.count_nonzero(kept) >= len(live):
            return whole if kept.all() else whole.select(kept)
    with view.ledger.frozen():
        return _read(view, view.ledger.live_rows())


def read_each(view: ReadView) -> Iterator[TensorDict]:
    """Yield the live trajectories, each ``[T]``, without a copy of all of them in memory.

    Those that are evicted before they are read are left out. Of a buffer whose trajectories fit into one group, never
    more than half are, however fast it is written; see :func:`read_live`.
    """
    live = view.ledger.live_rows()
    bytes_before = np.cumsum(live.lengths) * view.arena.schema.bytes_of_step
    if not len(live.ids) or bytes_before[-1] <= GROUP_BYTES:
        groups: Iterator[WholeTrajectories] = iter([read_live(view)])
    else:
        begins = np.flatnonzero(np.diff(bytes_before // GROUP_BYTES)) + 1
        groups = (read_existing(view, ids) for ids in np.split(live.ids, begins))
    for whole in groups:
        for one in whole.each():
            yield one.only(view.arena)


def read_existing(view: ReadView, ids: np.ndarray) -> WholeTrajectories:
    """Read those of the trajectories ``ids``, ``int64`` ``[n]``, that stay until they are copied.

    If one is relabelled meanwhile, all are read again, finally under the lock.
    """
    for _ in range(OPTIMISTIC_READS):
        whole = _read(view, view.ledger.existing(ids))
        kept = view.ledger.unchanged(whole.rows)
        missed = np.setdiff1d(ids, whole.rows.ids[kept])
        if not view.ledger.live().contains(missed).any():
            return whole if kept.all() else whole.select(kept)
    with view.ledger.frozen():
        return _read(view, view.ledger.existing(ids))


def _read(view: ReadView, rows: Rows) -> WholeTrajectories:
    values = view.arena.copy_spans(rows.starts, rows.lengths)
    return WholeTrajectories(values, [] if view.table is None else view.table.copy(rows.ids), rows)
