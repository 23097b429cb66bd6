"""The mapped columns of the arena: copies steps in, and chunks and trajectories out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from embodichain_rl.replay.batch_memory import BatchMemory, destination
from embodichain_rl.replay.schema import Schema
from embodichain_rl.replay.shared_memory import SharedBlock
from embodichain_rl.replay.windows import MEMCPY_FROM, as_array, chunk_view, copy_chunks_one_by_one, copy_steps

__all__ = ["Arena", "column_offsets"]

PAGE = 4096
"""Bytes that every column is aligned to."""

MAX_LENGTHS = 128
"""For how many lengths of chunks the views are kept."""


def column_offsets(schema: Schema, steps: int) -> list[int]:
    """Returns the byte offset of each column in the arena's block and, behind them, the size of the block."""
    offsets = [0]
    for field in schema.fields:
        offsets.append(offsets[-1] + -(-field.nbytes * steps // PAGE) * PAGE)
    return offsets


class Arena:
    """One contiguous tensor ``[steps, *shape]`` a field, in memory that all processes share, as this process sees it.

    It knows nothing of trajectories: who may read or write where is the ledger's business.

    Args:
        schema: the fields of a step.
        block: the memory, of the size that :func:`column_offsets` says.
        steps: steps of the arena.
    """

    def __init__(self, schema: Schema, block: SharedBlock, steps: int) -> None:
        self.schema = schema
        self.columns = [
            block.tensor(field.dtype, (steps, *field.shape), offset)
            for field, offset in zip(schema.fields, column_offsets(schema, steps), strict=False)
        ]
        self.tensordict = schema.build(self.columns, (steps,))
        self._arrays = [as_array(column) for column in self.columns]
        self._memory = BatchMemory()
        self._views: dict[int, list[tuple[torch.Tensor, int, tuple[int, ...]]]] = {}

    def write(self, start: int, pieces: Sequence[Sequence[torch.Tensor]]) -> None:
        """Copies consecutive pieces, each one tensor ``[n, *shape]`` a field, to the steps from ``start`` on."""
        for piece in pieces:
            for column, values in zip(self._arrays, piece, strict=True):
                copy_steps(column, start, values)
            start += len(piece[0])

    def copy_chunks(self, starts: np.ndarray, length: int) -> list[torch.Tensor]:
        """Copies chunks of ``length`` steps that begin at the steps ``starts``: ``[B, length, *shape]`` a field.

        They lie in memory of their own, or in that of the :func:`gathering_into` around.
        """
        index = torch.from_numpy(starts)
        views = self._views.get(length) or self._make_views(length)
        memory = destination()
        places: Iterable[torch.Tensor | None] = itertools.repeat(None)
        if memory is not None:
            places = memory.empty_together([((len(starts), view.shape[1]), view.dtype) for view, _, _ in views])
        chunks = []
        for (view, chunk_bytes, shape), place in zip(views, places, strict=False):
            if chunk_bytes < MEMCPY_FROM:
                chunk = torch.index_select(view, 0, index, out=place)
            else:
                chunk = self._memory.empty((len(starts), view.shape[1]), view.dtype) if place is None else place
                copy_chunks_one_by_one(view, starts, chunk)
            chunks.append(chunk.view(shape))
        return chunks

    def _make_views(self, length: int) -> list[tuple[torch.Tensor, int, tuple[int, ...]]]:
        """Of each column: its chunks of that length, bytes of one, and the shape of a batch of them."""
        # Chunks of a length are asked for again and again, and making the views takes as long as the gather.
        while len(self._views) >= MAX_LENGTHS:
            del self._views[next(iter(self._views))]
        self._views[length] = [
            (chunk_view(column, length), length * field.nbytes, (-1, length, *field.shape))
            for column, field in zip(self.columns, self.schema.fields, strict=True)
        ]
        return self._views[length]

    def copy_spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
        """Copies the steps ``[start, start + length)`` one span behind the other: ``[sum, *shape]`` a field."""
        spans = [slice(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n > 0]
        if not spans:
            return [column[:0].clone() for column in self.columns]
        return [torch.cat([column[span] for span in spans]) for column in self.columns]

    def copy_steps_at(self, steps: np.ndarray) -> list[torch.Tensor]:
        """Copies the steps at any places ``[*B]``: ``[*B, *shape]`` a field."""
        index = torch.from_numpy(steps)
        return [column[index] for column in self.columns]
