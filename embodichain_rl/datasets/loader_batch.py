"""What torch's ``DataLoader`` does at this moment: how many items it collates, and whether it starts a worker."""

from __future__ import annotations

import sys

from torch.utils.data._utils.fetch import _IterableDatasetFetcher
from torch.utils.data.dataloader import _BaseDataLoaderIter

__all__ = ["loader_batch_size", "loader_starts_worker"]

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


def loader_starts_worker() -> bool:
    """Return whether what is being pickled goes to a worker of a ``DataLoader``, which it starts.

    Torch does not say so, but its iterator over a ``DataLoader`` is among the callers: it starts the workers.
    """
    frame = sys._getframe(1)
    for _ in range(2 * MAX_FRAMES):
        following = frame.f_back
        if following is None:
            return False
        frame = following
        if frame.f_code.co_name == "__init__" and isinstance(frame.f_locals.get("self"), _BaseDataLoaderIter):
            return True
    return False
