"""One pass over the chunks of some trajectories: their numbers, their order, and where it stands."""

from __future__ import annotations

import numpy as np

from embodichain_rl.errors import StateMismatchError
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.sampling.draws import Draw
from embodichain_rl.replay.sampling.passes.dealing import PassRange
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["ChunkPass", "in_order_of_a_pass", "refuse_other_data", "rows_of_range", "shuffled"]


class ChunkPass:
    """One pass over the chunks of some trajectories, or one share of it.

    The chunks are numbered from the newest trajectory to the oldest one. Trajectories are evicted from the oldest on.
    So a process that begins a pass late, when some rows are gone, gives the same numbers to the chunks that are left.

    Args:
        rows: the trajectories, oldest first.
        request: which chunks they have.
        chunks: the numbers of the chunks to be drawn, in order.
        number: the number of the pass.
        begins_at: the number of chunks of all earlier passes.
        range: what the processes that share the pass agreed on.
        seed: the source of the order; 0 where that is known otherwise.
    """

    def __init__(
        self,
        rows: Rows,
        request: ChunkRequest,
        chunks: np.ndarray,
        number: int,
        begins_at: int,
        range: PassRange,
        seed: int = 0,
    ) -> None:
        counts = request.counts(rows.lengths)[::-1]
        self._ids = rows.ids[::-1]
        self._begins = np.cumsum(counts) - counts
        self._left = int(counts.sum())
        self._chunks = chunks
        self.taken = 0
        self.turns = np.empty(0, dtype=np.int64)
        """What ``taken`` was after each of the chunks that :meth:`take` returned last."""
        self.number, self.begins_at, self.range, self.seed = number, begins_at, range, seed

    @property
    def ended(self) -> bool:
        """Whether every chunk has had its turn."""
        return self.taken >= len(self._chunks)

    @property
    def chunks_left(self) -> int:
        """The number of chunks of the pass, of all processes, whose trajectory exists."""
        return self._left

    @property
    def same_data(self) -> bool:
        """Whether the trajectories are those of the range, but for some of the oldest that may be evicted."""
        complete = len(self._ids) > 0 and int(self._ids[-1]) == self.range.first
        return self._left == self.range.total or (0 < self._left < self.range.total and not complete)

    @property
    def empty(self) -> bool:
        """Whether no chunk of the pass is for this process."""
        return not len(self._chunks)

    def take(self, storage: TrajectoryReader, count: int, request: ChunkRequest) -> Draw:
        """Return the next chunks, at most ``count``, without those whose trajectory was evicted."""
        chunks = self._chunks[self.taken : self.taken + count]
        turns = np.arange(self.taken + 1, self.taken + len(chunks) + 1)
        self.taken += len(chunks)
        turns, chunks = turns[chunks < self._left], chunks[chunks < self._left]
        which = np.searchsorted(self._begins, chunks, side="right") - 1
        offsets = chunks - self._begins[which]
        rows = storage.ledger.rows_of(self._ids[which])
        there = storage.ledger.live().contains(rows.ids) & (rows.lengths >= 0)
        if request.sampling_mode != "episode":
            left = storage.arena.segment_left
            assert left is not None, "checked before"
            begins = rows.starts + offsets + request.first + request.offsets.lead
            there &= request.accepts(left[np.where(there, begins, 0)])
        uniform = (offsets + 0.5) / np.maximum(request.counts(rows.lengths), 1)
        self.turns = turns[there]
        return Draw(rows.select(there), uniform[there])


def in_order_of_a_pass(ids: np.ndarray, ledger: Ledger) -> np.ndarray:
    """Return ascending ids with the pinned ones at the end, because they are not evicted."""
    pinned = ids[np.isin(ids, ledger.pinned_ids())] if not ledger.plain else ids[:0]
    return np.concatenate([np.setdiff1d(ids, pinned), pinned]) if len(pinned) else ids


def rows_of_range(ledger: Ledger, agreed: PassRange) -> Rows:
    """Return the rows of the trajectories of a pass that exist, in the order of the pass."""
    ids, kept = np.arange(max(agreed.first, agreed.end - ledger.num_rows), agreed.end), ledger.live().kept
    if len(kept):
        ids = np.union1d(ids, kept[kept < agreed.end])
    return ledger.existing(in_order_of_a_pass(ids, ledger))


def refuse_other_data(ledger: Ledger, wanted: PassRange, begun: ChunkPass) -> None:
    """Refuse to go on with a pass over trajectories that are not those of this buffer.

    Raises:
        StateMismatchError: always.
    """
    raise StateMismatchError(
        f"Got the state of a pass over {wanted.total:,} chunks of the trajectories {wanted.first} to "
        f"{wanted.end - 1}, but this buffer has the trajectories {ledger.live_range()[0]} to "
        f"{ledger.live_range()[1] - 1}, and {begun.chunks_left:,} chunks of that pass. Resume over the buffer that "
        "the state was saved with, or over a new buffer that its checkpoint was loaded into, or begin a new pass."
    )


def shuffled(seed: int, total: int) -> np.ndarray:
    """Return the order of the chunks of a pass, ``int64`` ``[total]``."""
    return np.random.default_rng(seed).permutation(total)
