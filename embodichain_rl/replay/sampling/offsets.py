"""The offset at which a chunk begins in its trajectory, from uniform random numbers. Pure functions."""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.requests import ChunkRequest

__all__ = ["offsets_from_uniform", "offsets_in_segments"]

SEGMENT_ROUNDS = 4
"""The number of times that offsets are drawn again which segments do not allow, before the allowed ones are listed."""


def offsets_from_uniform(uniform: np.ndarray, count: np.ndarray, first: int = 0) -> np.ndarray:
    """Turn uniform numbers of ``[0, 1)`` into offsets, each uniform among ``first`` to ``first + count - 1``.

    Args:
        uniform: ``float64`` ``[B]``.
        count: ``int64`` ``[B]``, the number of offsets, at least 1 each.
        first: the first offset.

    Returns:
        ``int64`` ``[B]``.
    """
    offsets = (uniform * count).astype(np.int64)
    return offsets + first if first else offsets


def offsets_in_segments(
    rows: Rows, uniform: np.ndarray, left: np.ndarray, request: ChunkRequest, generator: torch.Generator | None
) -> np.ndarray:
    """Return an offset in each trajectory, ``int64`` ``[B]``, uniform among those that the request accepts.

    Args:
        rows: the trajectories.
        uniform: ``float64`` ``[B]`` of ``[0, 1)``, for the first try.
        left: of every step of the arena, how many steps of its segment are left.
        request: which offsets are accepted.
        generator: for further tries.
    """
    counts = rows.lengths + request.extra
    offsets = offsets_from_uniform(uniform, counts, request.first)
    missing = np.arange(len(offsets))
    for _ in range(SEGMENT_ROUNDS):
        missing = missing[~request.accepts(left[rows.starts[missing] + offsets[missing]])]
        if not len(missing):
            return offsets
        uniform = torch.rand(len(missing), dtype=torch.float64, generator=generator).numpy()
        offsets[missing] = offsets_from_uniform(uniform, counts[missing], request.first)
    for row, number in zip(missing.tolist(), uniform.tolist(), strict=True):
        start = rows.starts[row] + request.first
        accepted = np.flatnonzero(request.accepts(left[start : start + counts[row]]))
        # There are some, unless the trajectory was just evicted; then the check after the copy finds out.
        if len(accepted):
            offsets[row] = accepted[int(number * len(accepted))] + request.first
    return offsets
