"""How old the sampled chunks of a storage were: counted by each process, added up now and then."""

from __future__ import annotations

import collections
import os
import threading
import time
import weakref
from typing import Any

import numpy as np

from embodichain_rl.replay.ledger import NO_VERSION, Ledger, Rows

__all__ = ["AgesByStorage", "SampledAges"]

ADD_UP_AT = 4096
"""The number of noted chunks at which they are added up, rather than when somebody asks."""

ADD_UP_SUMS_AT = 1024
"""The number of noted sums at which they are added up."""


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
        self._sums: collections.deque[bytes] = collections.deque()
        self._lock = threading.Lock()
        self.redrawn = 0
        self.chunks = self.age_sum = self.age_max = 0
        self.versioned_chunks = self.lag_sum = self.lag_max = 0

    def note(self, ledger: Ledger, rows: Rows) -> None:
        """Note the rows of a batch that is sampled at this moment."""
        chunks = len(rows.ids)
        # As bytes: they are joined several times as fast as arrays, and keep no larger array alive.
        published_at, versions = rows.published_at.tobytes(), rows.policy_versions.tobytes()
        self._noted.append((chunks, time.monotonic_ns(), ledger.newest_policy_version, published_at, versions))
        if len(self._noted) * chunks >= ADD_UP_AT:
            self.add_up()

    def note_sums(self, sums: bytes) -> None:
        """Note what the kernels have added up of a batch: the number of its chunks, and five more ``int64``.

        See :class:`~embodichain_rl.replay.kernels.Draws`.
        """
        self._sums.append(sums)
        if len(self._sums) >= ADD_UP_SUMS_AT:
            self.add_up()

    def add_up(self) -> None:
        """Add up what was noted."""
        with self._lock:
            sums = [self._sums.popleft() for _ in range(len(self._sums))]
            if sums:
                words = np.frombuffer(b"".join(sums), dtype=np.int64).reshape(-1, 6)
                chunks, age_sum, _, versioned_chunks, lag_sum, _ = words.sum(axis=0).tolist()
                age_max, lag_max = int(words[:, 2].max()), int(words[:, 5].max())
                self.chunks += chunks
                self.age_sum += age_sum
                self.age_max = max(self.age_max, age_max)
                self.versioned_chunks += versioned_chunks
                self.lag_sum += lag_sum
                self.lag_max = max(self.lag_max, lag_max)
            # Others may note more meanwhile; whoever has the lock is the only one who takes some away.
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            if not noted:
                return
            sizes, moments, newest, published_at, policy_versions = zip(*noted, strict=True)
            ages = np.repeat(moments, sizes) - np.frombuffer(b"".join(published_at), dtype=np.int64)
            self.chunks += len(ages)
            self.age_sum += int(ages.sum())
            self.age_max = max(self.age_max, int(ages.max(initial=0)))
            versions = np.frombuffer(b"".join(policy_versions), dtype=np.int64)
            known = versions != NO_VERSION
            # The newest may have been evicted since it was drawn: then it is newer than the newest live one.
            lags = np.maximum(np.repeat(newest, sizes) - versions, 0)[known]
            self.versioned_chunks += len(lags)
            self.lag_sum += int(lags.sum())
            self.lag_max = max(self.lag_max, int(lags.max(initial=0)))


class AgesByStorage:
    """The ages of the chunks that this process has sampled, apart for each storage."""

    def __init__(self) -> None:
        self._ages: weakref.WeakKeyDictionary[Ledger, SampledAges] = weakref.WeakKeyDictionary()

    def of(self, ledger: Ledger) -> SampledAges:
        """Return the ages of one storage."""
        ages = self._ages.get(ledger)
        return self._ages.setdefault(ledger, SampledAges()) if ages is None else ages

    def _selected(self, ledger: Ledger | None) -> list[SampledAges]:
        """Return the ages of one storage, or with None those of all."""
        return [ages for of_storage, ages in list(self._ages.items()) if ledger is None or of_storage is ledger]

    def redrawn(self, ledger: Ledger | None) -> int:
        """Return the number of chunks that were drawn again, of one storage or of all."""
        return sum(ages.redrawn for ages in self._selected(ledger))

    def stats(self, ledger: Ledger | None) -> dict[str, Any]:
        """Return the mean and the largest age, of one storage or of all; see :meth:`ChunkSampler.sampled_ages`."""
        every = self._selected(ledger)
        for each in every:
            each.add_up()
        chunks, versioned = sum(each.chunks for each in every), sum(each.versioned_chunks for each in every)
        age_sum, lag_sum = sum(each.age_sum for each in every), sum(each.lag_sum for each in every)
        return {
            "sampled_age_mean": age_sum / chunks / 1e9 if chunks else None,
            "sampled_age_max": max(each.age_max for each in every) / 1e9 if chunks else None,
            "sampled_policy_lag_mean": lag_sum / versioned if versioned else None,
            "sampled_policy_lag_max": max(each.lag_max for each in every) if versioned else None,
        }


_all_ages: weakref.WeakSet[SampledAges] = weakref.WeakSet()


def _start_anew_in_forked_child() -> None:
    # What the parent sampled is not the child's; and a thread of the parent may have held the lock.
    for ages in list(_all_ages):
        ages._start_anew()


os.register_at_fork(after_in_child=_start_anew_in_forked_child)
