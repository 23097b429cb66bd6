"""Draws without replacement: every chunk once, in random order, then the next pass."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import NothingToDrawError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.sampling.draws import SCANS, Draw, DrawQuery, RememberingDraws
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["OnePassDraws"]


class _Pass:
    """One pass over the chunks of some trajectories.

    Args:
        rows: the trajectories.
        request: which chunks they have.
        generator: for the order.
    """

    def __init__(self, rows: Rows, request: ChunkRequest, generator: torch.Generator | None) -> None:
        counts = rows.lengths + request.extra
        self._ids = rows.ids
        self._begins = np.cumsum(counts) - counts
        self._order = torch.randperm(int(counts.sum()), generator=generator).numpy()
        self._next = 0

    @property
    def ended(self) -> bool:
        """Whether every chunk has had its turn."""
        return self._next == len(self._order)

    def take(self, storage: TrajectoryStorage, count: int, request: ChunkRequest) -> Draw:
        """Return the next chunks, at most ``count``, without those whose trajectory was evicted."""
        chunks = self._order[self._next : self._next + count]
        self._next += len(chunks)
        which = np.searchsorted(self._begins, chunks, side="right") - 1
        offsets = chunks - self._begins[which]
        rows = storage.ledger.rows_of(self._ids[which])
        there = (rows.ids >= storage.ledger.live_range()[0]) & (rows.lengths >= 0)
        if request.sampling_mode != "episode":
            left = storage.arena.segment_left
            assert left is not None, "checked before"
            begins = rows.starts + offsets + request.first + request.offsets.lead
            there &= request.accepts(left[np.where(there, begins, 0)])
        uniform = (offsets + 0.5) / np.maximum(rows.lengths + request.extra, 1)
        return Draw(rows.select(there), uniform[there])


Passes = weakref.WeakKeyDictionary[ChunkRequest, _Pass]
"""The pass under way for each request: other chunk sizes have other chunks."""


class OnePassDraws(RememberingDraws[Passes]):
    """Draw every chunk of the trajectories that are live when a pass begins, in random order, then begin the next pass.

    Chunks whose trajectory is evicted before their turn are skipped; new trajectories are part of the next pass. Every
    storage, and every chunk size, has passes of its own. A pass takes 8 bytes per chunk, in this process.

    Args:
        max_age: draw only trajectories that were published at most this many seconds before the pass; None: all.
        max_policy_lag: draw only trajectories whose policy version is at most this many versions behind the newest live
            one when the pass begins; None: all.
        share: ``(k, n)``: draw only the ``k``-th of ``n`` equal shares of the trajectories, by id.

    Attributes:
        passes (int): the number of passes that were begun.
    """

    def __init__(
        self, max_age: float | None = None, max_policy_lag: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(max_age, max_policy_lag)
        self.share = share
        self.passes = 0

    def _new_memory(self) -> Passes:
        return weakref.WeakKeyDictionary()

    def _draw_alone(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> Draw:
        request.check(storage)
        passes = self._memory_of(storage)
        parts: list[Draw] = []
        missing, fruitless = count, 0
        while missing:
            current = passes.get(request)
            if current is None or current.ended:
                if fruitless > 1:
                    raise NothingToDrawError(
                        "Every chunk of a whole pass was evicted before its turn: the buffer turns over faster than "
                        "chunks are drawn. Make it larger, or draw with replacement."
                    )
                current = passes[request] = self._begin(storage, request, generator)
                fruitless += 1
            taken = current.take(storage, missing, request)
            if len(taken.uniform):
                parts.append(taken)
                missing -= len(taken.uniform)
                fruitless = 0
        rows = Rows(*map(np.concatenate, zip(*(part.rows for part in parts), strict=True)))
        return Draw(rows, np.concatenate([part.uniform for part in parts]))

    def _begin(self, storage: TrajectoryStorage, request: ChunkRequest, generator: torch.Generator | None) -> _Pass:
        own = self._own_rows(storage.ledger)
        rows = own.select(self._fits(storage.ledger, own, request))
        if not len(rows.ids):
            live = self.live_range(storage.ledger)
            self._choose(DrawQuery(storage, *live, request, generator), own, 1)  # raises the reason
        self.passes += 1
        return _Pass(rows, request, generator)

    def _own_rows(self, ledger: Ledger) -> Rows:
        """Return the rows of the share of the live trajectories that is drawn here."""
        index, shares = self.share
        for _ in range(SCANS):  # again if all are evicted before their rows are read
            first, end = self.live_range(ledger)
            ids = np.arange(first, end)
            rows = ledger.rows_of(ids[ids % shares == index])
            if not len(rows.ids):
                raise NothingToDrawError(
                    f"There are {len(ids):,} trajectories for {shares} workers that share them, and none for worker "
                    f"{index}. Use fewer workers, or wait for more trajectories."
                )
            rows = rows.select(rows.lengths >= 0)
            if len(rows.ids):
                break
        return rows

    def stats(self) -> dict[str, Any]:
        """Return the counters; ``passes`` is the number of passes that were begun."""
        return {**super().stats(), "passes": self.passes}
