"""Index arithmetic over the arena, and the gather of chunks: no state that changes, and no other process.

A chunk is ``L`` consecutive rows of a column ``[F, *feature]`` that is contiguous in memory. So the overlapping view
``[F - L + 1, L, *feature]`` has one row per possible chunk, and taking rows of that view copies every chunk in one
piece: no ``[B, L]`` index, no gather step by step.
"""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.replay.host.layout import first_rows
from embodichain_rl.replay.schema import as_array, as_tensor

__all__ = ["ChunkView"]

MEMCPY_FROM = 64 * 1024
"""Bytes of a chunk from which it is copied to recycled memory, by one memcpy of its own on this thread.

Below it numpy copies the whole batch in one call, on this thread too. ``torch.index_select`` would share large batches
out among torch's threads: beside simulators that keep all cores busy, their barrier takes many times as long as the
copy.
"""


class ChunkView:
    """All chunks of one length of columns that lie one behind the other, to be indexed by their first step.

    Args:
        stacked: ``[columns * F, *feature]``, contiguous, on the CPU; its content may change, its memory must stay.
        columns: how many columns of ``F`` steps these are.
        length: steps of a chunk, at most ``F``.
        and_next: whether each column is copied a second time, one step later, behind all others.

    Example:
        >>> ChunkView(torch.arange(10), columns=2, length=3).copy(np.array([2, 0]))
        [tensor([[2, 3, 4],
                [0, 1, 2]]), tensor([[7, 8, 9],
                [5, 6, 7]])]
    """

    def __init__(self, stacked: torch.Tensor, columns: int, length: int, *, and_next: bool = False) -> None:
        rows, *feature = stacked.shape
        chunks = rows - length + 1
        self.dtype = stacked.dtype
        self.chunk_bytes = length * stacked[0].nbytes
        self._shape = (length, *feature)
        first = first_rows(columns, rows // columns, and_next=and_next)
        self._columns = len(first)
        self._first = first[:, None]
        self._rows = stacked.as_strided((chunks, *self._shape), (stacked.stride(0), *stacked.stride()))
        array = as_array(stacked)
        self._numpy_dtype = array.dtype
        # One item of raw bytes for each chunk; they overlap. Indexing such an array is one memcpy an item and next to
        # nothing else; torch.index_select takes several times as long for small chunks.
        item = np.dtype((np.void, self.chunk_bytes))
        self._items = np.ndarray((chunks,), item, array, strides=(stacked[0].nbytes,))

    @property
    def takes_recycled_memory(self) -> bool:
        """Whether :meth:`copy_to` memory that was used before is faster than :meth:`copy`."""
        return self.chunk_bytes >= MEMCPY_FROM

    def shape_of(self, count: int) -> tuple[int, ...]:
        """Returns the shape of ``count`` chunks of every column, ``[columns * count, length, *feature]``."""
        return (self._columns * count, *self._shape)

    def copy(self, starts: np.ndarray) -> list[torch.Tensor]:
        """Returns copies of the chunks that begin at the steps ``starts``.

        Args:
            starts: ``int64`` ``[B]``.

        Returns:
            ``[B, length, *feature]`` for each column; with ``and_next`` those one step later follow.
        """
        copies = self._items[self._rows_of(starts)].view(self._numpy_dtype)
        of_each = copies.reshape(self._columns, len(starts), *self._shape)
        return [as_tensor(of_each[column], self.dtype) for column in range(self._columns)]

    def copy_to(self, place: torch.Tensor, starts: np.ndarray) -> list[torch.Tensor]:
        """Does the same in the memory of ``place``, a contiguous tensor of the shape :meth:`shape_of`."""
        rows = self._rows_of(starts)
        if self.chunk_bytes < MEMCPY_FROM:
            torch.index_select(self._rows, 0, torch.from_numpy(rows), out=place)
        else:
            # Flat, since numpy copies rows of one dimension by one memcpy each.
            source, target = as_array(self._rows.flatten(1)), as_array(place.flatten(1))
            for row, start in enumerate(rows.tolist()):
                target[row] = source[start]
        return list(place.view(self._columns, len(starts), *self._shape).unbind())

    def _rows_of(self, starts: np.ndarray) -> np.ndarray:
        return starts if self._columns == 1 else (self._first + starts).reshape(-1)
