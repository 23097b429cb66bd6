"""Index arithmetic over the arena, and the gather of chunks: pure functions, no state and no other process.

A chunk is ``L`` consecutive rows of a column ``[F, *feature]`` that is contiguous in memory. So the overlapping view
``[F - L + 1, L * features]`` has one row per possible chunk, and taking rows of that view copies every chunk in one
piece: no ``[B, L]`` index, no gather step by step.
"""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["as_array", "chunk_index", "chunk_view", "copy_chunks_one_by_one", "copy_steps", "starts_from_uniform"]

MEMCPY_FROM = 64 * 1024
"""Bytes of one chunk of one key from which it is copied on its own, by one memcpy on this thread.

Below it, ``torch.index_select`` does the whole batch in one call of a few microseconds. Above it the copy is bound by
memory, and what counts is that it does not wait for torch's thread pool: beside busy simulators the barrier of that
pool takes up to a hundred times longer than the copy.
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


def chunk_view(column: torch.Tensor, length: int) -> torch.Tensor:
    """Returns the view ``[F - length + 1, length * features]`` of a contiguous column ``[F, *feature]``.

    Row ``s`` is the chunk of steps ``[s, s + length)``, flattened; neighbouring rows overlap, so it is only read.

    Example:
        >>> chunk_view(torch.arange(5.0), 3)
        tensor([[0., 1., 2.],
                [1., 2., 3.],
                [2., 3., 4.]])
    """
    steps = column.shape[0]
    features = column[0].numel()
    return column.as_strided((steps - length + 1, length * features), (features, 1))


def copy_chunks_one_by_one(view: torch.Tensor, starts: np.ndarray, out: torch.Tensor) -> None:
    """Copies the rows ``starts`` of a :func:`chunk_view` on the CPU to ``out`` ``[B, length * features]``."""
    source, target = as_array(view), as_array(out)
    for row, start in enumerate(starts.tolist()):
        target[row] = source[start]


def copy_steps(column: np.ndarray, start: int, values: torch.Tensor) -> None:
    """Copies ``values`` ``[n, *feature]`` to the rows ``[start, start + n)`` of a column (:func:`as_array` of one)."""
    column[start : start + len(values)] = as_array(values)


def starts_from_uniform(uniform: np.ndarray, lengths: np.ndarray, chunk_length: int) -> np.ndarray:
    """Turns uniform numbers of ``[0, 1)`` into starts, each uniform among the valid starts of its trajectory.

    Args:
        uniform: ``float64`` ``[B]``.
        lengths: ``int64`` ``[B]``, steps of the trajectories, at least ``chunk_length`` each.
        chunk_length: steps of a chunk.

    Returns:
        ``int64`` ``[B]``, in ``[0, length - chunk_length]``.
    """
    return (uniform * (lengths - chunk_length + 1)).astype(np.int64)


def chunk_index(ids: np.ndarray, starts: np.ndarray, chunk_length: int) -> np.ndarray:
    """Returns the index ``[B, L, 2]`` of a batch of chunks: trajectory id and step within it, for every step."""
    index = np.empty((len(ids), chunk_length, 2), dtype=np.int64)
    index[..., 0] = ids[:, None]
    np.add(starts[:, None], np.arange(chunk_length), out=index[..., 1])
    return index
