"""How old the sampled chunks of a storage were: counted by each process, added up now and then."""

from __future__ import annotations

import collections
import os
import threading
import time
import weakref
from collections.abc import Iterable
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger import NO_VERSION, Ledger, Rows

__all__ = ["SampledAges"]

ADD_UP_AT = 4096
"""The number of noted chunks at which they are added up, rather than when somebody asks."""


class SampledAges:
    """The ages of the chunks that this process has sampled from a storage, in seconds and in policy versions.

    A batch is only noted when it is sampled, which takes about a microsecond. Many batches are added up at once.

    Attributes:
        redrawn (int): the number of chunks that were drawn again because their trajectory was evicted meanwhile.
    """

    def __init__(self) -> None:
        self._start_anew()
        _all_ages.add(self)

    def _start_anew(self) -> None:
        self._noted: collections.deque[tuple[int, int, int, bytes, bytes]] = collections.deque()
        self._lock = threading.Lock()
        self.redrawn = 0
        self._chunks = self._age_sum = self._age_max = 0
        self._versioned_chunks = self._lag_sum = self._lag_max = 0

    def note(self, ledger: Ledger, rows: Rows) -> None:
        """Note the rows of a batch that is sampled at this moment."""
        chunks = len(rows.ids)
        # As bytes: they are joined several times as fast as arrays, and keep no larger array alive.
        published_at, versions = rows.published_at.tobytes(), rows.policy_versions.tobytes()
        self._noted.append((chunks, time.monotonic_ns(), ledger.newest_policy_version, published_at, versions))
        if len(self._noted) * chunks >= ADD_UP_AT:
            self._add_up()

    def _add_up(self) -> None:
        with self._lock:
            # Others may note more meanwhile; whoever has the lock is the only one who takes some away.
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            if not noted:
                return
            sizes, moments, newest, published_at, policy_versions = zip(*noted, strict=True)
            ages = np.repeat(moments, sizes) - np.frombuffer(b"".join(published_at), dtype=np.int64)
            self._chunks += len(ages)
            self._age_sum += int(ages.sum())
            self._age_max = max(self._age_max, int(ages.max(initial=0)))
            versions = np.frombuffer(b"".join(policy_versions), dtype=np.int64)
            known = versions != NO_VERSION
            # The newest may have been evicted since it was drawn: then it is newer than the newest live one.
            lags = np.maximum(np.repeat(newest, sizes) - versions, 0)[known]
            self._versioned_chunks += len(lags)
            self._lag_sum += int(lags.sum())
            self._lag_max = max(self._lag_max, int(lags.max(initial=0)))

    @staticmethod
    def stats(of_storages: Iterable[SampledAges]) -> dict[str, Any]:
        """Return the mean and the largest age of the chunks of all of them; see :meth:`ChunkSampler.sampled_ages`."""
        every = list(of_storages)
        for each in every:
            each._add_up()
        chunks, versioned = sum(each._chunks for each in every), sum(each._versioned_chunks for each in every)
        age_sum, lag_sum = sum(each._age_sum for each in every), sum(each._lag_sum for each in every)
        return {
            "sampled_age_mean": age_sum / chunks / 1e9 if chunks else None,
            "sampled_age_max": max(each._age_max for each in every) / 1e9 if chunks else None,
            "sampled_policy_lag_mean": lag_sum / versioned if versioned else None,
            "sampled_policy_lag_max": max(each._lag_max for each in every) if versioned else None,
        }


_all_ages: weakref.WeakSet[SampledAges] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    # What the parent sampled is not the child's; and a thread of the parent may have held the lock.
    for ages in list(_all_ages):
        ages._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
