"""The mapped columns of the arena: copies steps in, and chunks and trajectories out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from embodichain_rl.replay.host.batch_memory import BatchMemory, destination
from embodichain_rl.replay.host.chunk_view import ChunkView
from embodichain_rl.replay.host.layout import Gathers, Layout
from embodichain_rl.replay.schema import Schema, Shifted, as_array, segment_field, steps_left
from embodichain_rl.shared import SharedBlock

__all__ = ["Arena"]

_NO_TENSOR = torch.empty(0)


class Arena:
    """One contiguous tensor ``[steps, *shape]`` a field, in memory that all processes share, as this process sees it.

    It knows nothing of trajectories: who may read or write where is the ledger's business.

    Args:
        schema: the fields of a step.
        block: the memory, of the size that :func:`~embodichain_rl.replay.host.layout.arena_bytes` says.
        steps: steps of the arena.
        shifted: the fields that have no column of their own; see :mod:`~embodichain_rl.replay.shifted`. With some, a
            trajectory of ``T`` steps takes ``T + 1``.
    """

    def __init__(self, schema: Schema, block: SharedBlock, steps: int, shifted: Shifted) -> None:
        self.schema = schema
        self.shifted = shifted
        layout = Layout(schema, steps, shifted, block.tensor)
        self.stored, self.columns = layout.stored, layout.columns
        steps -= bool(shifted)
        self.tensordict = schema.build(self.columns, (steps,))
        self._arrays = [as_array(column) for column in self.columns]
        self._written = [None if number in shifted else array for number, array in enumerate(self._arrays)]
        self.segment_left: np.ndarray | None = None
        """Of each step, how many steps of its segment are left: what segments are found by; None without segments."""
        segments = segment_field(schema)
        if segments is not None:
            self._segment_ids = self._arrays[segments].reshape(steps)
            self.segment_left = block.array(np.int32, (steps,), layout.end)
        self._memory = BatchMemory()
        self._gathers = Gathers(layout, ChunkView)
        self._step_views: dict[int, ChunkView] = {}

    def write(self, start: int, pieces: Sequence[Sequence[np.ndarray]]) -> int | None:
        """Copies the consecutive pieces of a trajectory to the steps from ``start`` on.

        Args:
            start: the first step.
            pieces: of each, one array ``[n, *shape]`` a field (:func:`as_array` of a tensor).

        Returns:
            The steps of the longest segment; None where steps don't say which segment they belong to.
        """
        end = start
        for piece in pieces:
            for column, values in zip(self._written, piece, strict=True):
                if column is not None:
                    column[end : end + len(values)] = values
            end += len(piece[0])
        for number in self.shifted:
            self._arrays[number][end - 1] = pieces[-1][number][-1]
        if self.segment_left is None:
            return None
        left = steps_left(self._segment_ids[start:end])
        self.segment_left[start:end] = left
        return int(left.max())

    def copy_chunks(self, starts: np.ndarray, length: int, *, separate_next: bool = True) -> list[torch.Tensor]:
        """Copy chunks of ``length`` steps that begin at the steps ``starts``: ``[B, length, *shape]`` a field.

        They lie in memory of their own, or in that of the :func:`gathering_into` around.

        Args:
            starts: ``int64`` ``[B]``.
            length: steps of a chunk.
            separate_next: whether shifted fields get memory of their own, so that every field is contiguous. Otherwise
                they and the fields that they are read from are views of the same ``length + 1`` steps.
        """
        gathers = self._gathers.of(length, separate_next)
        memory = destination()
        places: Iterable[torch.Tensor | None] = itertools.repeat(None)
        if memory is not None:
            places = memory.empty_together([(g.view.shape_of(len(starts)), g.view.dtype) for g in gathers])
        chunks: list[torch.Tensor] = [_NO_TENSOR] * len(self.columns)
        for gather, place in zip(gathers, places, strict=False):
            view = gather.view
            if place is None and view.takes_recycled_memory:
                place = self._memory.empty(view.shape_of(len(starts)), view.dtype)
            copies = view.copy(starts) if place is None else view.copy_to(place, starts)
            for number, copy in zip(gather.numbers, copies, strict=True):
                chunks[number] = copy
        if not separate_next:
            for number, of in self.shifted.items():
                steps = chunks[of]
                chunks[of], chunks[number] = steps[:, :length], steps[:, 1:]
        return chunks

    def copy_spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
        """Copies the steps ``[start, start + length)`` one span behind the other: ``[sum, *shape]`` a field."""
        spans = [slice(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n > 0]
        if not spans:
            return [column[:0].clone() for column in self.columns]
        return [torch.cat([column[span] for span in spans]) for column in self.columns]

    def copy_steps(self, number: int, steps: np.ndarray) -> torch.Tensor:
        """Copies the steps at any places ``[*B]`` of field ``number``: ``[*B, *shape]``."""
        view = self._step_views.get(number)
        if view is None:
            view = self._step_views[number] = ChunkView(self.columns[number], 1, 1)
        flat = np.ascontiguousarray(steps.reshape(-1))
        if view.takes_recycled_memory:
            (copies,) = view.copy_to(self._memory.empty(view.shape_of(len(flat)), view.dtype), flat)
        else:
            (copies,) = view.copy(flat)
        return copies.view(*steps.shape, *self.schema.fields[number].shape)

    # What is done with copies depends on where they lie; a device's arena does the same there.

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Returns an array as a tensor beside the copies, without a copy where it can be."""
        return torch.from_numpy(array)

    def origin(self, index: np.ndarray) -> list[torch.Tensor]:
        """Returns what a sample says of where it comes from: an index ``[*B, 2]``, and its parts."""
        return [torch.from_numpy(index), torch.from_numpy(index[..., 0]), torch.from_numpy(index[..., 1])]

    def replace(self, values: Sequence[torch.Tensor], at: np.ndarray, new: Sequence[torch.Tensor]) -> None:
        """Puts other copies in the place of some of a batch: ``values[at] = new``, of each field."""
        for value, other in zip(values, new, strict=True):
            value[torch.from_numpy(at)] = other

    def rearrange(self, values: Sequence[torch.Tensor], rows: np.ndarray, within: np.ndarray) -> None:
        """Takes other steps of some chunks: ``values[rows] = values[rows[:, None], within]``, of each field.

        Args:
            values: chunks ``[B, L, *shape]``.
            rows: ``int64`` ``[n]``, which chunks.
            within: ``int64`` ``[n, L]``, which of their steps.
        """
        for value in values:
            array = as_array(value)
            array[rows] = array[rows[:, None], within]
