"""Requests: how long a chunk is, at which offsets of a trajectory it may begin, and which keys are copied.

A request does not draw trajectories: see :mod:`~embodichain_rl.replay.sampling.draws`. It defines the offsets of a
trajectory that may be drawn, and builds a batch from the drawn offsets:

* :class:`ChunkRequest`: chunks that lie within a trajectory, ``[B, L]``.
* :class:`PaddedRequest`: chunks that may reach beyond its edges, ``[B, L]``, with ``("collector", "mask")``.
* :class:`ShortRequest`: the same for trajectories that are shorter than a chunk, and for no others.
* :class:`~embodichain_rl.replay.sampling.requests.WindowRequest`: a step, and for each key the requested steps around
  it, ``[B]``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import ChunkTooLongError, NothingToDrawError, SchemaMismatchError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.random_streams import RandomSource
from embodichain_rl.replay.sampling.requests.offsets import (
    OffsetRange,
    offsets_from_uniform,
    offsets_in_segments,
    segments_around,
    spread_over_segments,
)
from embodichain_rl.replay.schema import MASK, Key
from embodichain_rl.replay.storage import TrajectoryReader, chunk_index

__all__ = ["ChunkRequest", "PaddedRequest", "ShortRequest", "segments_of"]


class ChunkRequest:
    """Chunks of ``length`` steps that lie within a trajectory.

    In a trajectory of ``T`` steps, ``T + extra`` offsets may be drawn; the first of them is ``first``.

    Args:
        length: the number of steps of a chunk.
        sampling_mode: ``"episode"``: any chunk; ``"segment"``: chunks within one segment; ``"boundary"``: chunks that
            contain a change of segment.
        stride: the distance of the steps of a chunk; 1: they are consecutive.
        offsets: the offsets that may be drawn; by default those of chunks within a trajectory.

    Attributes:
        overlapping (bool): whether an offset may belong to two segments. Then the chunks of a trajectory can't be
            numbered by their offsets.
        init_key (Key): marks the first step of each chunk; None: nothing does.
    """

    overlapping = False
    init_key: Key | None = None

    def __init__(
        self, length: int, sampling_mode: str = "episode", *, stride: int = 1, offsets: OffsetRange | None = None
    ) -> None:
        self.length = length
        self.sampling_mode = sampling_mode
        self.stride = stride
        self.offsets = offsets or OffsetRange((length - 1) * stride + 1)
        self.first, self.extra = self.offsets.first, self.offsets.extra

    @property
    def is_plain(self) -> bool:
        """Whether the chunks are consecutive steps, anywhere within a trajectory, and nothing else."""
        return (
            type(self) is ChunkRequest
            and self.sampling_mode == "episode"
            and self.stride == 1
            and self.init_key is None
        )

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of a batch."""
        return (batch_size, self.length)

    def check(self, storage: TrajectoryReader) -> None:
        """Raise an error if this can never be drawn from the storage."""
        if self.sampling_mode != "episode" and storage.arena.segment_left is None:
            raise SchemaMismatchError(
                f"sampling_mode={self.sampling_mode!r} needs segments, but what is stored has no integer 'segment_id' "
                f"of each step: {storage.schema}. The engine's demonstrations write it; else write it with a transform."
            )

    def fits(self, rows: Rows) -> np.ndarray:
        """Return a mask, ``bool`` ``[n]``, of the trajectories that contain such a chunk."""
        fits = self.counts(rows.lengths) > 0
        if self.sampling_mode == "segment":
            fits &= rows.longest_segments >= self.offsets.needed_left
        elif self.sampling_mode == "boundary":
            fits &= rows.longest_segments < rows.lengths
        return fits

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        """Return how many offsets trajectories of some lengths have, ``int64`` ``[n]``; at most 0: none."""
        return lengths + self.extra

    def accepts(self, left: np.ndarray) -> np.ndarray:
        """Return a mask of the steps at which the needed steps may begin, given how many of their segment are left."""
        if self.sampling_mode == "segment":
            return left >= self.offsets.needed_left
        return left < self.offsets.span

    def place(self, storage: TrajectoryReader, rows: Rows, uniform: np.ndarray, generator: RandomSource) -> np.ndarray:
        """Return an offset in each trajectory, ``int64`` ``[B]`` or, with whatever else belongs to it, ``[B, n]``.

        Args:
            storage: where the trajectories are.
            rows: trajectories that fit.
            uniform: ``float64`` ``[B]`` of ``[0, 1)``.
            generator: for further tries.
        """
        if self.sampling_mode == "episode":
            return offsets_from_uniform(uniform, self.counts(rows.lengths), self.first)
        left = segments_of(storage)
        return offsets_in_segments(rows, uniform, left, self.accepts, self.offsets, generator)

    def index(self, rows: Rows, offsets: np.ndarray) -> np.ndarray:
        """Return the trajectory id and the step of each step of the chunks, ``int64`` ``[B, L, 2]``."""
        return chunk_index(rows.ids, offsets, self.length, self.stride)

    def copy(self, storage: TrajectoryReader, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        """Copy the chunks at the drawn offsets: return one tensor per field."""
        if self.stride > 1:
            return self._copy_steps(storage, rows, offsets[:, None] + self.stride * np.arange(self.length))
        separate_next = not storage.next_views
        values = storage.arena.copy_chunks(rows.starts + offsets, self.length, separate_next=separate_next)
        table = storage.table
        return values if table is None else values + table.copy(rows.ids, self.length)

    def _copy_steps(self, storage: TrajectoryReader, rows: Rows, steps: np.ndarray) -> list[torch.Tensor]:
        """Copy single steps, ``int64`` ``[B, L]``."""
        arena, at = storage.arena, rows.starts[:, None] + steps
        values = arena.copy_all_steps([(number, at) for number in range(len(arena.columns))])
        return values if storage.table is None else values + storage.table.copy(rows.ids, self.length)

    def build(
        self, storage: TrajectoryReader, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        """Build the batch from what was copied."""
        arena = storage.arena
        return arena.build_sample(values, arena.origin(self.index(rows, offsets)))

    def refusal(self, live: Rows) -> ChunkTooLongError | NothingToDrawError:
        """Return the error to raise if none of the live trajectories contains such a chunk."""
        longest, got = int(live.lengths.max(initial=0)), self._description()
        if self.sampling_mode == "segment":
            longest = int(live.longest_segments.max(initial=0))
            return ChunkTooLongError(
                f"Got {got} within one segment, but the longest segment of {len(live.ids):,} live "
                f"trajectories has {longest} steps. Ask for at most {longest} steps, or use sampling_mode='episode'."
            )
        if self.sampling_mode == "boundary" and longest >= self.offsets.span:
            return NothingToDrawError(
                f"Got {got} with a change of segment, but no live trajectory of {len(live.ids):,} "
                "that is so long has one. Use sampling_mode='episode', or wait for other trajectories."
            )
        return ChunkTooLongError(
            f"Got {got}, but the longest of {len(live.ids):,} live trajectories has {longest} "
            f"steps. Ask for at most {longest} steps, use shorter trajectories too (strict_length=False), or wait for "
            "longer ones."
        )

    def _description(self) -> str:
        """Return what was asked for, for messages."""
        needed = 1 - self.extra
        return f"chunk_size {self.length}" + (f", which takes {needed} steps" if needed != self.length else "")


class PaddedRequest(ChunkRequest):
    """Chunks that may reach beyond the edges of a trajectory, or of a segment, by steps that repeat the edge step.

    Args:
        length: the number of steps of a chunk.
        before: how many of them may lie before the first step; at most ``length - 1``.
        after: how many of them may lie after the last step; at most ``length - 1``.
        sampling_mode: ``"episode"`` or ``"segment"``.
        stride: the distance of the steps of a chunk.
        drop_first: the number of first steps of a trajectory at which no chunk begins.
        drop_last: the number of its last steps at which no chunk begins.
    """

    def __init__(
        self,
        length: int,
        before: int,
        after: int,
        sampling_mode: str = "episode",
        *,
        stride: int = 1,
        drop_first: int = 0,
        drop_last: int = 0,
    ) -> None:
        within = length - 1 - before - after
        offsets = OffsetRange(within * stride + 1, before * stride, drop_first, drop_last)
        super().__init__(length, sampling_mode, stride=stride, offsets=offsets)
        self.overlapping = sampling_mode == "segment" and within < 0

    def check(self, storage: TrajectoryReader) -> None:
        super().check(storage)
        if self.length > storage.max_total_steps:
            raise ChunkTooLongError(
                f"Got chunk_size {self.length}, but the buffer holds {storage.max_total_steps} steps at most."
            )

    def place(self, storage: TrajectoryReader, rows: Rows, uniform: np.ndarray, generator: RandomSource) -> np.ndarray:
        """Return an offset, and within segments the first step and the end of the segment, ``int64`` ``[B, 3]``."""
        if self.sampling_mode == "episode":
            return super().place(storage, rows, uniform, generator)
        left = segments_of(storage)
        if self.overlapping:
            after = self.offsets.extra - self.offsets.lead
            return np.stack(spread_over_segments(rows, uniform, left, self.offsets.lead, after), axis=-1)
        offsets = super().place(storage, rows, uniform, generator)
        lead = self.offsets.lead
        return np.stack([offsets, *segments_around(rows, offsets + lead, left, lead)], axis=-1)

    def copy(self, storage: TrajectoryReader, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        steps = self._steps(rows, offsets)
        if self.stride > 1:
            return self._copy_steps(storage, rows, steps)
        # Copy whole chunks from within the trajectory, then rearrange those that reach beyond an edge.
        room = np.maximum(rows.lengths - self.length, 0)
        last = storage.ledger.arena_steps - storage.ledger.margin - self.length
        first = offsets if offsets.ndim == 1 else offsets[:, 0]
        begin = np.minimum(rows.starts + np.clip(first, 0, room), last)
        # The next observation of a repeated edge step is not that of the following step: they can't share memory.
        values = storage.arena.copy_chunks(begin, self.length)
        steps += rows.starts[:, None]
        reaching = np.flatnonzero(steps[:, -1] - steps[:, 0] != self.length - 1)
        if len(reaching):
            storage.arena.rearrange(values, reaching, steps[reaching] - begin[reaching, None])
        return values if storage.table is None else values + storage.table.copy(rows.ids, self.length)

    def index(self, rows: Rows, offsets: np.ndarray) -> np.ndarray:
        return self._index(rows, self._steps(rows, offsets))

    @staticmethod
    def _index(rows: Rows, steps: np.ndarray) -> np.ndarray:
        return np.stack([np.broadcast_to(rows.ids[:, None], steps.shape), steps], axis=-1)

    def build(
        self, storage: TrajectoryReader, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        arena, wanted = storage.arena, self._wanted(offsets)
        steps = self._within(rows, offsets, wanted)
        data = arena.build_sample(values, arena.origin(self._index(rows, steps)))
        data.set(MASK, arena.tensor(wanted == steps))
        return data

    def _wanted(self, offsets: np.ndarray) -> np.ndarray:
        """Return the steps of the chunks, also those beyond the edges, ``int64`` ``[B, L]``."""
        first = offsets[:, None] if offsets.ndim == 1 else offsets[:, :1]
        return first + self.stride * np.arange(self.length)

    def _steps(self, rows: Rows, offsets: np.ndarray) -> np.ndarray:
        """Return the step of the trajectory at each position of the chunks, ``int64`` ``[B, L]``."""
        return self._within(rows, offsets, self._wanted(offsets))

    @staticmethod
    def _within(rows: Rows, offsets: np.ndarray, wanted: np.ndarray) -> np.ndarray:
        """Return steps, each moved to the edge that it lies beyond."""
        if offsets.ndim == 1:
            return np.clip(wanted, 0, rows.lengths[:, None] - 1)
        return np.clip(wanted, offsets[:, 1:2], offsets[:, 2:] - 1)


class ShortRequest(PaddedRequest):
    """Chunks within a trajectory, or the whole of one that is shorter, padded after its last step.

    Args:
        length: the number of steps of a chunk.
        stride: the distance of the steps of a chunk.
    """

    def __init__(self, length: int, *, stride: int = 1) -> None:
        super().__init__(length, 0, 0, stride=stride)

    def counts(self, lengths: np.ndarray) -> np.ndarray:
        return np.where(lengths > 0, np.maximum(lengths + self.extra, 1), lengths)


def segments_of(storage: TrajectoryReader) -> np.ndarray:
    """Return how many steps of its segment are left at every step of the arena."""
    left = storage.arena.segment_left
    assert left is not None, "the request was checked before"
    return left
