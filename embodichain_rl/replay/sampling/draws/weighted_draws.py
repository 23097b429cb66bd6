"""Draw trajectories by their number of steps, by their age, and by their priority."""

from __future__ import annotations

import math
import weakref

import numpy as np

from embodichain_rl.replay.ledger import GONE, Ledger, Rows
from embodichain_rl.replay.sampling.draws.trajectory_draws import Draw, DrawQuery, Limits, TrajectoryDraws
from embodichain_rl.replay.sampling.random_streams import random_numbers
from embodichain_rl.replay.sampling.weights import ByPriority, ByRecency
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["PriorityDraws", "RecencyDraws", "StepDraws"]

MAX_TRIES = 16
"""The number of steps that are drawn for one chunk at once; the first with enough steps behind it is taken."""


class StepDraws(TrajectoryDraws):
    """Draw every chunk of every trajectory with the same probability: trajectories in proportion to their offsets.

    The row of each trajectory has the number of steps that were published before it. The trajectory in which a random
    step lies is found by bisecting these numbers. They are read once, and remembered: 8 bytes per live trajectory.
    """

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._known: weakref.WeakKeyDictionary[Ledger, tuple[int, np.ndarray]] = weakref.WeakKeyDictionary()

    @property
    def in_one_call(self) -> bool:
        """Whether the kernels may copy the plain chunks that are drawn, in one call."""
        return True

    def _published_before(self, ledger: Ledger, first: int, end: int) -> np.ndarray:
        """Return how many steps were published before each of the trajectories ``first`` to ``end - 1``.

        A row is read once, while its trajectory is live, or just was: then no later draw looks at its number.
        """
        begins, known = self._known.get(ledger, (first, np.empty(0, dtype=np.int64)))
        if first < begins or first > begins + len(known):
            begins, known = first, known[:0]
        if begins + len(known) < end:
            new = ledger.steps_before(np.arange(begins + len(known), end))
            known = np.concatenate([known[first - begins :], new])
            begins = first
            self._known[ledger] = begins, known  # one store: threads that draw at the same time may do it twice
        return known[first - begins : end - begins]

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        if not query.live.consecutive:  # the steps before each of them do not tell where a step lies
            return self._scan(query, part)
        ledger, count, request = query.storage.ledger, len(part), query.request
        first, end = query.live.oldest, query.live.end
        published = self._published_before(ledger, first, end)
        beyond = max(request.extra, 0)  # offsets that each trajectory has besides its steps
        if beyond:
            published = published + beyond * np.arange(first, end)
        last = max(int(ledger.rows_of(np.array([end - 1])).lengths[0]), 0)
        total = int(published[-1]) + last + beyond - int(published[0])
        tries = 1
        if request.extra < 0:
            mean = max(1.0, total / len(published))
            tries = min(MAX_TRIES, math.ceil(2 * mean / max(1.0, mean + request.extra)))
        # The count of published steps grows for ever: only integers are exact, so the fraction is kept apart.
        drawn = random_numbers(tries * count, query.generator) * total
        whole = drawn.astype(np.int64)
        wanted = whole + published[0]
        place = np.searchsorted(published, wanted, side="right") - 1
        rows = ledger.rows_of(place + first)
        uniform = (wanted - published[place] + (drawn - whole)) / np.maximum(request.counts(rows.lengths), 1)
        fits = request.fits(rows) & (uniform >= 0.0) & (uniform < 1.0)
        if tries > 1:
            taken = fits.reshape(tries, count).argmax(axis=0) * count + np.arange(count)
            rows, uniform, fits = rows.select(taken), uniform[taken], fits[taken]
        if np.count_nonzero(fits) < count:
            rows = rows._replace(lengths=np.where(fits, rows.lengths, GONE))
        return Draw(rows, uniform)

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        return query.request.counts(rows.lengths).astype(np.float64)


class RecencyDraws(TrajectoryDraws):
    """Draw newer trajectories more often: the ``n``-th newest in proportion to ``2 ** (-n / half_life)``."""

    def __init__(self, weights: ByRecency, limits: Limits) -> None:
        super().__init__(limits)
        self._log_ratio = -math.log(2.0) / weights.half_life

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        # The inverse of the distribution function of a geometric distribution that is truncated at the oldest.
        last = len(query.live) - 1
        mass = -math.expm1(self._log_ratio * (last + 1))
        newest = np.log1p(-random_numbers(len(part), query.generator) * mass) / self._log_ratio
        ids = query.live.at(last - np.minimum(newest.astype(np.int64), last))
        return Draw(query.storage.ledger.rows_of(ids), random_numbers(len(part), query.generator))

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        ages = -rows.ids if query.live.consecutive else -np.searchsorted(query.live.all(), rows.ids)
        return np.exp(self._log_ratio * (ages - ages.min(initial=0)))


class PriorityDraws(TrajectoryDraws):
    """Draw in proportion to the weights in the ledger's priority tree."""

    def __init__(self, weights: ByPriority, limits: Limits) -> None:
        super().__init__(limits)
        self._beta = weights.beta

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        ledger = query.storage.ledger
        if not ledger.priorities.built:
            ledger.prioritize()
        ids = ledger.ids_at(ledger.priorities.find(random_numbers(len(part), query.generator)))
        rows = ledger.rows_of(ids)
        live = query.live.contains(ids)
        return Draw(
            rows._replace(lengths=np.where(live, rows.lengths, GONE)), random_numbers(len(part), query.generator)
        )

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        weights = query.storage.ledger.weights_of(rows.ids)
        return weights if weights.any() else np.ones(len(weights))  # the buffer was just emptied and filled

    def importance(self, storage: TrajectoryReader, rows: Rows) -> np.ndarray:
        # The number of trajectories and the sum of the weights are the same for all, and cancel out.
        weights = storage.ledger.weights_of(rows.ids)
        positive = np.where(weights > 0.0, weights, weights.max(initial=0.0) or 1.0)  # evicted since: not corrected
        return ((positive / positive.min()) ** -self._beta).astype(np.float32)
