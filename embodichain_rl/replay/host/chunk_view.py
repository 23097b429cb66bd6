"""The gather of chunks from a column, as copies of rows of an overlapping view.

A chunk is ``L`` consecutive rows of a column ``[F, *feature]`` that is contiguous in memory. The overlapping view
``[F - L + 1, L, *feature]`` has one row per possible chunk. So a gather of rows of this view copies each chunk as one
piece. It needs no index of shape ``[B, L]``, and does not copy step by step.
"""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.replay.host.layout import first_rows
from embodichain_rl.replay.schema import as_array, as_tensor
from embodichain_rl.shared import Part

__all__ = ["ChunkView"]

MEMCPY_FROM = 64 * 1024
"""Size of a chunk in bytes from which each chunk is copied by its own memcpy, to recycled memory.

Below this size NumPy copies the whole batch in one call. Both ways copy on the calling thread.
``torch.index_select`` would distribute large batches over torch's threads. If simulators keep all cores busy, waiting
for these threads takes many times as long as the copy.
"""


class ChunkView:
    """Overlapping view of all chunks of one length, in columns that follow each other in memory.

    A chunk is indexed by its first step.

    Args:
        stacked: the columns, ``[columns * F, *feature]``, contiguous and on the CPU. The content may change later.
        columns: number of columns, of ``F`` steps each.
        length: number of steps per chunk, at most ``F``.
        and_next: whether each column is copied a second time, one step later, after all others.

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
        # One item of raw bytes per chunk; the items overlap. Indexing such an array costs little more than one memcpy
        # per item. torch.index_select takes several times as long for small chunks.
        # By name: where the dtype is given as a pair, NumPy swallows a Ctrl-C that arrives meanwhile.
        item = np.dtype(f"V{self.chunk_bytes}")
        self._items = np.ndarray((chunks,), item, array, strides=(stacked[0].nbytes,))
        self._address = array.ctypes.data

    @property
    def uses_recycled_memory(self) -> bool:
        """Whether :meth:`copy_to` recycled memory is faster than :meth:`copy`."""
        return self.chunk_bytes >= MEMCPY_FROM

    def shape_of(self, count: int) -> tuple[int, ...]:
        """Return the shape of ``count`` chunks of every column, ``[columns * count, length, *feature]``."""
        return (self._columns * count, *self._shape)

    def part(self, starts: np.ndarray) -> Part:
        """Return which part of the memory :meth:`copy` reads for the same ``starts``."""
        return self._address + self._row_numbers(starts) * self._items.strides[0], self.chunk_bytes

    def copy(self, starts: np.ndarray) -> list[torch.Tensor]:
        """Copy the chunks that begin at the steps ``starts``.

        Args:
            starts: first step of each chunk, ``int64`` ``[B]``.

        Returns:
            ``[B, length, *feature]`` for each column; with ``and_next`` those one step later follow.
        """
        copies = self._items[self._row_numbers(starts)].view(self._numpy_dtype)
        by_column = copies.reshape(self._columns, len(starts), *self._shape)
        return [as_tensor(by_column[column], self.dtype) for column in range(self._columns)]

    def copy_to(self, output: torch.Tensor, starts: np.ndarray) -> list[torch.Tensor]:
        """Copy as in :meth:`copy`, to the memory of ``output``.

        Args:
            output: contiguous tensor of the shape :meth:`shape_of`.
            starts: first step of each chunk, ``int64`` ``[B]``.

        Returns:
            Views of ``output``, ``[B, length, *feature]`` for each column.
        """
        rows = self._row_numbers(starts)
        if self.chunk_bytes < MEMCPY_FROM:
            torch.index_select(self._rows, 0, torch.from_numpy(rows), out=output)
        else:
            # Flattened, because NumPy copies a one-dimensional row by one memcpy.
            source, target = as_array(self._rows.flatten(1)), as_array(output.flatten(1))
            for row, start in enumerate(rows.tolist()):
                target[row] = source[start]
        # Each with a storage of its own, so that it can be saved without the others.
        by_column = as_array(output).reshape(self._columns, len(starts), *self._shape)
        return [as_tensor(column, self.dtype) for column in by_column]

    def _row_numbers(self, starts: np.ndarray) -> np.ndarray:
        return starts if self._columns == 1 else (self._first + starts).reshape(-1)
