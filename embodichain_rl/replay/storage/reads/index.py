"""The index of a batch: trajectory id and step of every step that is returned."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["chunk_index", "is_step_index"]


def chunk_index(ids: np.ndarray, starts: np.ndarray, chunk_length: int, stride: int = 1) -> np.ndarray:
    """Return the index ``[B, L, 2]`` of a batch of chunks: trajectory id and step within it, for every step.

    The ids are contiguous in memory, and so are the steps.

    Args:
        ids: ``int64`` ``[B]``, the trajectory of each chunk.
        starts: ``int64`` ``[B]``, the first step of each chunk.
        chunk_length: the number of steps ``L``.
        stride: the distance of the steps of a chunk.
    """
    index = np.empty((2, len(ids), chunk_length), dtype=np.int64)
    index[0] = ids[:, None]
    np.add(starts[:, None], np.arange(0, chunk_length * stride, stride), out=index[1])
    return index.transpose(1, 2, 0)


def is_step_index(index: np.ndarray | torch.Tensor) -> bool:
    """Return whether integers are pairs of trajectory id and step: ``[..., 2]`` with at least two dimensions.

    Two integers, ``[2]``, are two trajectories.
    """
    return index.ndim >= 2 and index.shape[-1] == 2
