"""The index of a batch: trajectory id and step of everything that is handed out."""

from __future__ import annotations

import numpy as np

__all__ = ["chunk_index"]


def chunk_index(ids: np.ndarray, starts: np.ndarray, chunk_length: int) -> np.ndarray:
    """Returns the index ``[B, L, 2]`` of a batch of chunks: trajectory id and step within it, for every step.

    The ids lie one behind the other in memory, and so do the steps.
    """
    index = np.empty((2, len(ids), chunk_length), dtype=np.int64)
    index[0] = ids[:, None]
    np.add(starts[:, None], np.arange(chunk_length), out=index[1])
    return index.transpose(1, 2, 0)
