"""Draws without replacement: every chunk once, in random order, then the next pass."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from embodichain_rl.errors import NothingToDrawError
from embodichain_rl.replay.ledger import NO_VERSION, Ledger, Rows
from embodichain_rl.replay.sampling.draws import SCANS, Draw, DrawQuery, Limits, RememberingDraws, TrajectoryDraws
from embodichain_rl.replay.sampling.passes.chunk_pass import (
    ChunkPass,
    in_order_of_a_pass,
    refuse_other_data,
    rows_of_range,
    shuffled,
)
from embodichain_rl.replay.sampling.passes.dealing import Deal, PassEndedError, PassPosition, PassRange
from embodichain_rl.replay.sampling.passes.saved_passes import SavedPass
from embodichain_rl.replay.sampling.random_streams import RandomSource, RandomStreams
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["DealtDraws", "OnePassDraws", "PassToItsEnd", "Turn", "without_lost"]


Passes = weakref.WeakKeyDictionary[ChunkRequest, ChunkPass]
"""The pass under way for each request: other chunk sizes have other chunks."""

Turn = tuple[ChunkPass, int]
"""A place in the passes: the current pass, and how many of its own chunks had their turn."""


class OnePassDraws(RememberingDraws[Passes]):
    """Draw every chunk of the trajectories that are live when a pass begins, in random order, then begin the next pass.

    Chunks whose trajectory is evicted before their turn are skipped; new trajectories are part of the next pass. Every
    storage, and every chunk size, has passes of its own. A pass takes 8 bytes per chunk, in this process.

    Args:
        limits: which trajectories may be drawn. Their ages and policy versions count when a pass begins.
    """

    _stays = False
    """Whether a draw that has some chunks of one pass does not begin the next one."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._to_resume: dict[int, SavedPass] = {}
        self._resumed: weakref.WeakKeyDictionary[Ledger, set[int]] = weakref.WeakKeyDictionary()
        self._latest: weakref.ref[Ledger] | None = None
        self._until_end = False

    def _new_memory(self) -> Passes:
        return weakref.WeakKeyDictionary()

    def draw_until_end(
        self,
        storage: TrajectoryReader,
        count: int,
        request: ChunkRequest,
        generator: RandomSource,
        *,
        begins: bool,
    ) -> Draw:
        """Draw from one pass only: fewer chunks than asked for at its end.

        Args:
            storage: the storage to draw from.
            count: the number of chunks.
            request: which chunks.
            generator: for the order.
            begins: whether a pass that has ended before is followed by the next one.

        Raises:
            PassEndedError: when the pass has no chunks left.
        """
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            passes = self._memory_of(storage)
            current = passes.get(request)
            if begins and current is not None and current.ended:
                del passes[request]
            self._until_end = True
            try:
                return self._draw_alone(storage, count, request, generator)
            except PassEndedError:
                if not begins:
                    raise
                passes.pop(request, None)  # all that was left of it is evicted
                return self._draw_alone(storage, count, request, generator)
            finally:
                self._until_end = False

    def ended(self, storage: TrajectoryReader, request: ChunkRequest) -> bool:
        """Return whether every chunk of the pass under way has had its turn."""
        current = self._memory_of(storage).get(request)
        return current is not None and current.ended

    def saved(self, requests: Mapping[int, ChunkRequest]) -> list[SavedPass]:
        """Return the passes under way, over the storage that was last drawn from.

        Args:
            requests: the requests whose passes are saved, by the length of their chunks.
        """
        ledger = None if self._latest is None else self._latest()
        if ledger is None:
            return list(self._to_resume.values())
        passes: Passes = self._memories.get(ledger) or weakref.WeakKeyDictionary()
        begun = {length: passes[request] for length, request in requests.items() if request in passes}
        left = [saved for length, saved in self._to_resume.items() if length not in begun]
        return left + [SavedPass(length, p.seed, p.number, p.taken, *p.range) for length, p in begun.items()]

    def resume(self, passes: Sequence[SavedPass]) -> None:
        """Let the next draws go on with saved passes."""
        self._to_resume = {saved.length: saved for saved in passes}
        self._resumed.clear()
        self._memories.clear()

    def _draw_alone(
        self, storage: TrajectoryReader, count: int, request: ChunkRequest, generator: RandomSource
    ) -> Draw:
        request.check(storage)
        passes = self._memory_of(storage)
        current = passes.get(request)
        taken = 0 if current is None else current.taken
        try:
            parts = self._take(storage, count, request, generator)
        except Exception:
            if current is not None:  # the chunks taken so far keep their turn
                current.taken = taken
                passes[request] = current
            raise
        if not parts:
            raise PassEndedError
        rows = Rows(*map(np.concatenate, zip(*(part.rows for part in parts), strict=True)))
        return Draw(rows, np.concatenate([part.uniform for part in parts]))

    def _take(
        self, storage: TrajectoryReader, count: int, request: ChunkRequest, generator: RandomSource
    ) -> list[Draw]:
        """Take the next chunks of the passes: ``count`` of them, fewer only at the end of a pass that none follows."""
        passes = self._memory_of(storage)
        self._latest = weakref.ref(storage.ledger)
        parts: list[Draw] = []
        missing, fruitless = count, 0
        while missing:
            current = passes.get(request)
            if current is None or current.ended:
                if self._is_last(current) or (parts and self._stays):
                    break
                if fruitless > 1:
                    raise NothingToDrawError(
                        "Every chunk of a whole pass was evicted before its turn: the buffer turns over faster than "
                        "chunks are drawn. Make it larger, or draw with replacement."
                    )
                current = passes[request] = self._begin(storage, request, generator, current)
                self._count(storage.ledger, "passes")
                fruitless += not current.empty
            taken = current.take(storage, missing, request)
            if len(taken.uniform):
                parts.append(taken)
                self._note_turns(current)
                missing -= len(taken.uniform)
                fruitless = 0
        return parts

    def _note_turns(self, current: ChunkPass) -> None:
        """Note when the chunks that were taken last had their turn."""

    def _is_last(self, ended: ChunkPass | None) -> bool:
        """Return whether no pass follows the one that has ended."""
        return self._until_end and ended is not None

    def _begin(
        self, storage: TrajectoryReader, request: ChunkRequest, generator: RandomSource, before: ChunkPass | None
    ) -> ChunkPass:
        """Begin the pass after ``before``, or go on with the one that was saved."""
        saved = self._to_resume.get(request.length)
        resumed = self._resumed.setdefault(storage.ledger, set())
        if before is None and saved is not None and request.length not in resumed:
            resumed.add(request.length)
            return self._go_on(storage, request, saved)
        live, rows = self._rows_of_pass(storage, request, generator)
        shuffle = generator.generator(0) if isinstance(generator, RandomStreams) else generator
        seed = int(torch.randint(2**62, (), generator=shuffle))
        number = 0 if before is None else before.number + 1
        return ChunkPass(rows, request, shuffled(seed, live.total), number, 0, live, seed)

    def _go_on(self, storage: TrajectoryReader, request: ChunkRequest, saved: SavedPass) -> ChunkPass:
        """Return a pass as it was saved, over a storage that was loaded with it."""
        wanted, ledger = saved.range(storage.id_shift), storage.ledger
        rows = rows_of_range(ledger, wanted)
        rows = rows.select(self._belongs(rows, request, wanted.oldest_version))
        order = shuffled(saved.seed, wanted.total)
        resumed = ChunkPass(rows, request, order, saved.number, 0, wanted, saved.seed)
        resumed.taken = saved.taken
        if not (resumed.ended or resumed.same_data):
            refuse_other_data(ledger, wanted, resumed)
        return resumed

    def _rows_of_pass(
        self, storage: TrajectoryReader, request: ChunkRequest, generator: RandomSource
    ) -> tuple[PassRange, Rows]:
        """Return the trajectories of a pass that begins now; raise if there are none."""
        ledger = storage.ledger
        for _ in range(SCANS):  # again if all are evicted before their rows are read
            ids = self.live_ids(ledger)
            live = ledger.existing(in_order_of_a_pass(ids.all(), ledger))
            if len(live.ids):
                break
        version = NO_VERSION
        if self.limits.max_policy_lag is not None:
            version = self._oldest_version(ledger, self.limits.max_policy_lag)
        rows = live.select(self._belongs(live, request, version))
        if not len(rows.ids):
            self._choose(DrawQuery(storage, ids, request, generator), live, 1)  # raises the reason
        total = int(request.counts(rows.lengths).sum())
        return PassRange(int(live.ids[0]), ids.end, total, version), rows

    def _belongs(self, rows: Rows, request: ChunkRequest, oldest_version: int) -> np.ndarray:
        """Return a mask of the trajectories of a pass. It does not depend on what is published or evicted later."""
        belongs = request.fits(rows)
        if self.limits.max_policy_lag is not None:
            belongs &= rows.policy_versions >= oldest_version
        if self.limits.subset is not None:
            belongs &= self.limits.subset.contains(rows.ids)
        return belongs

    def stats(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """Return the counters; ``passes`` is the number of passes that were begun."""
        return {**super().stats(ledger), "passes": self._counted("passes", ledger)}


class DealtDraws(OnePassDraws):
    """Passes that several processes share: each chunk is drawn by one of them, once.

    The process that begins a pass first writes the range of its trajectories to the memory of the ledger. So all of
    them have the same pass, also while trajectories are written and evicted.

    Args:
        limits: see :class:`OnePassDraws`.
        deal: the share of this process.
        position: where to resume; None: at the beginning.
    """

    def __init__(self, limits: Limits, deal: Deal, position: PassPosition | None = None) -> None:
        super().__init__(limits)
        self._deal = deal
        self._position = position
        self._current: ChunkPass | None = None
        self._turns: list[Turn] = []

    def position(self, turn: Turn | None = None) -> PassPosition:
        """Return how far the passes have come; or had come, at an earlier turn."""
        current, deal = self._current if turn is None else turn[0], self._deal
        if current is None:
            return self._position or PassPosition(deal.seed, deal.shares)
        begun = current.number, current.begins_at, current.taken if turn is None else turn[1]
        return PassPosition(deal.seed, deal.shares, deal.block, *begun, *current.range)

    @contextmanager
    def in_one_pass(self) -> Iterator[list[Turn]]:
        """Draw from one pass at a time, in the ``with`` block: fewer chunks than asked for where it ends.

        Yields:
            A list, to which is added where the passes are after each chunk.
        """
        self._stays, self._turns = True, []
        try:
            yield self._turns
        finally:
            self._stays, self._turns = False, []

    def go_back(self, turns: Sequence[Turn]) -> None:
        """Draw the chunks of these turns, the latest ones, once more."""
        if turns:
            current, taken = turns[0]
            current.taken = taken - 1

    def _note_turns(self, current: ChunkPass) -> None:
        if self._stays:
            self._turns += [(current, turn) for turn in current.turns.tolist()]

    def _draw_alone(
        self, storage: TrajectoryReader, count: int, request: ChunkRequest, generator: RandomSource
    ) -> Draw:
        try:
            return super()._draw_alone(storage, count, request, generator)
        finally:
            self._current = self._memory_of(storage).get(request)

    def _is_last(self, ended: ChunkPass | None) -> bool:
        return ended is not None and self._deal.is_last(ended.number)

    def _begin(
        self, storage: TrajectoryReader, request: ChunkRequest, generator: RandomSource, before: ChunkPass | None
    ) -> ChunkPass:
        resumed = self._position
        if before is None and resumed is not None and resumed.number >= 0:
            begun = self._begin_in(storage, request, resumed.range, resumed.number, resumed.begins_at)
            begun.taken = resumed.taken
            if not (begun.ended or begun.same_data):
                refuse_other_data(storage.ledger, resumed.range, begun)
        else:
            number = 0 if before is None else before.number + 1
            begins_at = 0 if before is None else before.begins_at + before.range.total
            agreed = self._agreed_range(storage, request, generator, number)
            begun = self._begin_in(storage, request, agreed, number, begins_at)
        return begun

    def _agreed_range(
        self, storage: TrajectoryReader, request: ChunkRequest, generator: RandomSource, number: int
    ) -> PassRange:
        def propose() -> PassRange:
            return self._rows_of_pass(storage, request, generator)[0]

        def outdated(found: Sequence[int]) -> bool:
            return found[1] <= storage.ledger.live_range()[0]

        if self._deal.shares == 1:
            return propose()
        return PassRange(*storage.ledger.agreements.join(self._deal.key(number), self._deal.share, propose, outdated))

    def _begin_in(
        self, storage: TrajectoryReader, request: ChunkRequest, agreed: PassRange, number: int, begins_at: int
    ) -> ChunkPass:
        rows = rows_of_range(storage.ledger, agreed)
        rows = rows.select(self._belongs(rows, request, agreed.oldest_version))
        chunks = self._deal.own(number, begins_at, agreed.total)
        return ChunkPass(rows, request, chunks, number, begins_at, agreed)


class PassToItsEnd(TrajectoryDraws):
    """Draws from one pass: the one under way, else the next one. It takes the place of the draws in a ``ChunkQuery``.

    Args:
        passes: the draws without replacement.
    """

    def __init__(self, passes: OnePassDraws) -> None:
        super().__init__(passes.limits)
        self._passes = passes
        self._begun = False

    def draw(
        self,
        storage: TrajectoryReader,
        count: int,
        request: ChunkRequest,
        generator: RandomSource,
        *,
        rejected: int = 0,
    ) -> Draw:
        """Draw chunks; see :meth:`OnePassDraws.draw_until_end`."""
        begins, self._begun = not self._begun, True
        return self._passes.draw_until_end(storage, count, request, generator, begins=begins)

    def importance(self, storage: TrajectoryReader, rows: Rows) -> None:
        """Return None: all chunks are equally likely."""


def without_lost(
    lost: np.ndarray, rows: Rows, offsets: np.ndarray, values: Sequence[torch.Tensor], torn: np.ndarray | None = None
) -> tuple[Rows, np.ndarray, list[torch.Tensor], np.ndarray]:
    """Leave the chunks ``lost`` out of a batch, for which no other chunks are left to draw.

    Returns:
        The rows, offsets and values of the other chunks, and the numbers that those of ``torn`` have among them.
    """
    kept = np.setdiff1d(np.arange(len(offsets)), lost)
    if not len(kept):
        raise PassEndedError
    others = np.empty(0, dtype=np.int64) if torn is None else np.searchsorted(kept, np.setdiff1d(torn, lost))
    index = torch.from_numpy(kept)
    return rows.select(kept), offsets[kept], [value[index.to(value.device)] for value in values], others
