"""How many items torch's ``DataLoader`` collates into the batch that it is fetching."""

from __future__ import annotations

import sys

from torch.utils.data._utils.fetch import _IterableDatasetFetcher

__all__ = ["loader_batch_size"]

MAX_FRAMES = 16
"""The number of callers that are looked at."""


def loader_batch_size() -> int | None:
    """Return the batch size of the ``DataLoader`` that is fetching an item; None outside of one, or if it is unknown.

    A ``DataLoader`` tells an iterable dataset neither its batch size nor when a batch begins. But its fetcher is among
    the callers of the dataset's iterator, and has one index for each item of the batch.
    """
    frame = sys._getframe(1)
    for _ in range(MAX_FRAMES):
        following = frame.f_back
        if following is None:
            return None
        frame = following
        if frame.f_code is _IterableDatasetFetcher.fetch.__code__:
            indices = frame.f_locals.get("possibly_batched_index")
            return len(indices) if isinstance(indices, list) else None
    return None
