"""Draws without replacement: every chunk once, in random order, then anew."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import NothingToDrawError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.sampling.draws import LOOKS, Draw, DrawQuery, RememberingDraws
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["OnePassDraws"]


class OnePassDraws(RememberingDraws):
    """Draws every chunk of the trajectories that are live when a pass begins, in random order, then begins the next.

    Chunks whose trajectory is evicted before their turn are skipped; trajectories that come meanwhile are part of the
    next pass. A pass keeps 8 bytes for each of its chunks, in this process.

    Args:
        max_age: only trajectories that were written at most so many seconds before the pass; None: all.
        max_policy_lag: only trajectories whose policy was updated at most so often before the pass; None: all.
        share: which of how many equal shares of the trajectories, by their ids, are drawn here.

    Attributes:
        passes (int): how many passes were begun.
    """

    def __init__(
        self, max_age: float | None = None, max_policy_lag: int | None = None, share: tuple[int, int] = (0, 1)
    ) -> None:
        super().__init__(max_age, max_policy_lag)
        self.share = share
        self.passes = 0
        self._ids = np.empty(0, dtype=np.int64)
        self._begins = np.zeros(1, dtype=np.int64)
        self._order = np.empty(0, dtype=np.int64)
        self._next = 0

    def _draw_alone(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> Draw:
        request.check(storage)
        parts: list[Draw] = []
        missing, fruitless = count, 0
        while missing:
            if self._next == len(self._order):
                if fruitless > 1:
                    raise NothingToDrawError(
                        "Every chunk of a whole pass was evicted before its turn: the buffer turns over faster than "
                        "chunks are drawn. Make it larger, or draw with replacement."
                    )
                self._begin(storage, request, generator)
                fruitless += 1
            taken = self._take(storage, missing, request)
            if len(taken.uniform):
                parts.append(taken)
                missing -= len(taken.uniform)
                fruitless = 0
        rows = Rows(*map(np.concatenate, zip(*(part.rows for part in parts), strict=True)))
        return Draw(rows, np.concatenate([part.uniform for part in parts]))

    def _begin(self, storage: TrajectoryStorage, request: ChunkRequest, generator: torch.Generator | None) -> None:
        own = self._own_rows(storage.ledger)
        rows = own.select(self._fits(storage.ledger, own, request))
        if not len(rows.ids):
            live = self.live_range(storage.ledger)
            self._choose(DrawQuery(storage, *live, request, generator), own, 1)  # says why
        self._ids = rows.ids
        self._begins = np.cumsum(rows.lengths + request.extra) - (rows.lengths + request.extra)
        total = int((rows.lengths + request.extra).sum())
        self._order = torch.randperm(total, generator=generator).numpy()
        self._next = 0
        self.passes += 1

    def _own_rows(self, ledger: Ledger) -> Rows:
        index, shares = self.share
        for _ in range(LOOKS):  # again where all are evicted before their rows are read
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

    def _take(self, storage: TrajectoryStorage, count: int, request: ChunkRequest) -> Draw:
        """The next chunks of the pass, ``count`` at most, that are still there."""
        chunks = self._order[self._next : self._next + count]
        self._next += len(chunks)
        which = np.searchsorted(self._begins, chunks, side="right") - 1
        place = chunks - self._begins[which]
        rows = storage.ledger.rows_of(self._ids[which])
        there = (rows.ids >= storage.ledger.live_range()[0]) & (rows.lengths >= 0)
        if request.sampling_mode != "episode":
            left = storage.arena.segment_left
            assert left is not None, "checked before"
            there &= request.accepts(left[np.where(there, rows.starts + place, 0)])
        uniform = (place + 0.5) / np.maximum(rows.lengths + request.extra, 1)
        return Draw(rows.select(there), uniform[there])

    def stats(self) -> dict[str, Any]:
        """Returns the counters; ``passes``: how many were begun."""
        return {**super().stats(), "passes": self.passes}
