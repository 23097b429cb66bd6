"""Index arithmetic over the arena, and the gather of chunks: no state that changes, and no other process.

A chunk is ``L`` consecutive rows of a column ``[F, *feature]`` that is contiguous in memory. So the overlapping view
``[F - L + 1, L, *feature]`` has one row per possible chunk, and taking rows of that view copies every chunk in one
piece: no ``[B, L]`` index, no gather step by step.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["ChunkView", "as_array", "as_tensor", "chunk_index", "places_from_uniform"]

MEMCPY_FROM = 64 * 1024
"""Bytes of a chunk from which it is copied to recycled memory, by one memcpy of its own on this thread.

Below it numpy copies the whole batch in one call, on this thread too. ``torch.index_select`` would share large batches
out among torch's threads: beside simulators that keep all cores busy, their barrier takes many times as long as the
copy.
"""

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """Returns the tensor's memory as a numpy array of the same shape; of integers where numpy lacks the dtype."""
    try:
        return tensor.numpy()
    except (RuntimeError, TypeError):
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    try:
        return tensor.numpy()
    except TypeError:
        return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


def as_tensor(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Returns what :func:`as_array` made of a tensor of that dtype as a tensor again, without a copy."""
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


class ChunkView:
    """All chunks of one length of columns that lie one behind the other, to be indexed by their first step.

    Args:
        stacked: ``[columns * F, *feature]``, contiguous, on the CPU; its content may change, its memory must stay.
        columns: how many columns of ``F`` steps these are.
        length: steps of a chunk, at most ``F``.

    Example:
        >>> ChunkView(torch.arange(10), columns=2, length=3).copy(np.array([2, 0]))
        [tensor([[2, 3, 4],
                [0, 1, 2]]), tensor([[7, 8, 9],
                [5, 6, 7]])]
    """

    def __init__(self, stacked: torch.Tensor, columns: int, length: int) -> None:
        rows, *feature = stacked.shape
        chunks = rows - length + 1
        self.dtype = stacked.dtype
        self.chunk_bytes = length * stacked[0].nbytes
        self._shape = (length, *feature)
        self._columns = columns
        self._first = np.arange(columns)[:, None] * (rows // columns)
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
            ``[B, length, *feature]`` for each column.
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


def places_from_uniform(uniform: np.ndarray, count: np.ndarray, first: int = 0) -> np.ndarray:
    """Turns uniform numbers of ``[0, 1)`` into places, each uniform among ``first`` to ``first + count - 1``.

    Args:
        uniform: ``float64`` ``[B]``.
        count: ``int64`` ``[B]``, how many places there are, at least 1 each.
        first: the first of them.

    Returns:
        ``int64`` ``[B]``.
    """
    places = (uniform * count).astype(np.int64)
    return places + first if first else places


def chunk_index(ids: np.ndarray, starts: np.ndarray, chunk_length: int) -> np.ndarray:
    """Returns the index ``[B, L, 2]`` of a batch of chunks: trajectory id and step within it, for every step.

    The ids lie one behind the other in memory, and so do the steps.
    """
    index = np.empty((2, len(ids), chunk_length), dtype=np.int64)
    index[0] = ids[:, None]
    np.add(starts[:, None], np.arange(chunk_length), out=index[1])
    return index.transpose(1, 2, 0)
