"""Which trajectories, and where in them: draws rows of the ledger, for every kind of weights.

All draws go the same way. Candidates are drawn from the ids that are live, without a look at what lies behind them;
those without what is asked for (too short, say) are drawn again; and where few have it, the ledger is looked through
once. So the work is that of a batch, whatever the buffer holds.
"""

from __future__ import annotations

import math
import os
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from embodichain_rl.errors import EmptyBufferError, NothingToDrawError, TrajectoryEvictedError
from embodichain_rl.replay.ledger import GONE, Ledger, Rows
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.sampling.weights import ByPriority, ByRecency
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = [
    "ChunkQuery",
    "Draw",
    "DrawQuery",
    "PriorityDraws",
    "RecencyDraws",
    "RememberingDraws",
    "StepDraws",
    "TrajectoryDraws",
    "random_numbers",
]

REJECTION_ROUNDS = 3
"""How often candidates are drawn for what is asked for before the ledger is looked through once."""

LOOKS = 20
"""How often the ledger is looked through when all that it had is evicted meanwhile."""

UNKNOWN = -(2**62)
"""The group of a draw that has none yet."""

MAX_TRIES = 16
"""How many places are drawn for one chunk at once, of which the first with enough steps behind it is taken."""


class Draw(NamedTuple):
    """Drawn trajectories, and of each a uniform number of ``[0, 1)`` that says where in it."""

    rows: Rows
    uniform: np.ndarray

    def replace(self, at: np.ndarray, new: Draw) -> Draw:
        """Returns the draws with those ``at`` some places replaced by ``new`` ones."""
        uniform = self.uniform.copy()
        uniform[at] = new.uniform
        return Draw(self.rows.replace(at, new.rows), uniform)


class DrawQuery(NamedTuple):
    """What is asked of a draw, and the ids that are live at the moment: ``first`` to ``end - 1``."""

    storage: TrajectoryStorage
    first: int
    end: int
    request: ChunkRequest
    generator: torch.Generator | None


class ChunkQuery(NamedTuple):
    """What a sampler asks of a buffer: which chunks, and how likely each trajectory is."""

    request: ChunkRequest
    draws: TrajectoryDraws


class TrajectoryDraws:
    """Draws uniformly among the trajectories that have what is asked for. The base of all other draws.

    Args:
        max_age: only trajectories that were written at most so many seconds ago; None: all.
        max_policy_lag: only trajectories whose policy was updated at most so often since; None: all.

    Attributes:
        unfit (int): how many candidates had not what was asked for.
    """

    def __init__(self, max_age: float | None = None, max_policy_lag: int | None = None) -> None:
        self.max_age = max_age
        self.max_policy_lag = max_policy_lag
        self.unfit = 0

    def draw(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> Draw:
        """Draws ``count`` trajectories that have what is asked for.

        Raises:
            EmptyBufferError: there is no trajectory.
            NothingToDrawError, ChunkTooLongError: there is none that has it.
            TrajectoryEvictedError: they are evicted faster than they are drawn.
        """
        ledger = storage.ledger
        drawn: Draw | None = None
        missing, part = np.arange(count), np.full(count, UNKNOWN)
        for round_ in range(REJECTION_ROUNDS + LOOKS):
            first, end = self.live_range(ledger)
            request.check(storage)
            query = DrawQuery(storage, first, end, request, generator)
            part = self._parts(query, part)
            draw = self._candidates if round_ < REJECTION_ROUNDS else self._look_through
            new = draw(query, part)
            drawn = new if drawn is None else drawn.replace(missing, new)
            fits = self._fits(ledger, new.rows, request)
            fitting = int(np.count_nonzero(fits))
            if fitting == len(fits):
                return drawn
            self.unfit += len(fits) - fitting
            missing, part = missing[~fits], part[~fits]
        raise TrajectoryEvictedError(
            f"{LOOKS} times in a row every trajectory was evicted before its row was read: the buffer of "
            f"{storage.max_size:,} trajectories turns over faster than that. Make it larger."
        )

    def live_range(self, ledger: Ledger) -> tuple[int, int]:
        """Returns the first id that may be drawn, and the one behind the last.

        Raises:
            EmptyBufferError: there is no trajectory.
            NothingToDrawError: all are too old.
        """
        oldest, end = ledger.live_range()
        if end == oldest:
            raise EmptyBufferError(
                "Cannot sample from an empty storage: no trajectory is finished yet. Wait until len(rb) > 0."
            )
        if self.max_age is None:
            return oldest, end
        now = time.monotonic_ns()
        first = ledger.first_since(now - int(self.max_age * 1e9), oldest, end)
        if first == end:
            age = (now - int(ledger.published_at(np.array([end - 1]))[0])) / 1e9
            raise NothingToDrawError(
                f"The newest trajectory is {age:.1f} s old, but max_age={self.max_age:g} s. Raise max_age, or see why "
                "no new ones come."
            )
        return first, end

    def _fits(self, ledger: Ledger, rows: Rows, request: ChunkRequest) -> np.ndarray:
        fits = request.fits(rows)
        if self.max_policy_lag is not None:
            fits &= rows.policy_versions >= ledger.newest_policy_version - self.max_policy_lag
        return fits

    def _parts(self, query: DrawQuery, part: np.ndarray) -> np.ndarray:
        """What a draw keeps when it is repeated: the group that it is from, as long as there is any of it."""
        return part

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        """Draws a candidate for each of ``part``. One that is told to be none at once has the length ``GONE``."""
        # One random number says both: its whole part which trajectory, the rest where in it.
        place = random_numbers(len(part), query.generator) * (query.end - query.first)
        which = place.astype(np.int64)
        return Draw(query.storage.ledger.rows_of(which + query.first), place - which)

    def _members(self, query: DrawQuery, part: int) -> Rows:
        """All trajectories that may be drawn for ``part``."""
        return query.storage.ledger.rows_between(query.first, query.end)

    def _look_through(self, query: DrawQuery, part: np.ndarray) -> Draw:
        """Does what :meth:`_candidates` does, from a list of all trajectories that have what is asked for."""
        drawn = Draw(query.storage.ledger.rows_of(np.full(len(part), query.first)), np.zeros(len(part)))
        drawn.rows.lengths[:] = GONE
        for which in np.unique(part).tolist():
            members = self._members(query, which)
            if len(members.ids):  # else all were evicted meanwhile
                of_part = np.flatnonzero(part == which)
                drawn = drawn.replace(of_part, self._choose(query, members, len(of_part)))
        return drawn

    def _choose(self, query: DrawQuery, members: Rows, count: int) -> Draw:
        """Draws among those of ``members`` that have what is asked for, or says that there is none."""
        ledger = query.storage.ledger
        fitting = members.select(query.request.fits(members))
        if not len(fitting.ids):
            raise query.request.refusal(members)
        fitting = fitting.select(self._fits(ledger, fitting, query.request))
        if not len(fitting.ids):
            raise NothingToDrawError(
                f"Of {len(members.ids):,} trajectories that could be drawn none was made with version "
                f"{ledger.newest_policy_version} of the policy or one of the {self.max_policy_lag} before. "
                "Raise max_policy_lag, or update the workers' policy less often."
            )
        sums = np.cumsum(self._weigh(query, fitting))
        which = np.searchsorted(sums, random_numbers(count, query.generator) * sums[-1], side="right")
        return Draw(fitting.select(np.minimum(which, len(sums) - 1)), random_numbers(count, query.generator))

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        """How likely each of some trajectories is, compared with the others; ``float64``."""
        return np.ones(len(rows.ids))

    def importance(self, storage: TrajectoryStorage, rows: Rows) -> np.ndarray | None:
        """Returns what makes up for unequal chances, ``float32`` ``[B]``; None where a batch says nothing of it."""
        return None

    def stats(self) -> dict[str, Any]:
        """Returns what this process has counted, by name."""
        return {"unfit": self.unfit}


class RememberingDraws(TrajectoryDraws):
    """Draws that depend on those before: one thread of a process at a time."""

    def __init__(self, max_age: float | None = None, max_policy_lag: int | None = None) -> None:
        super().__init__(max_age, max_policy_lag)
        self._locks: dict[int, threading.Lock] = {}

    def draw(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> Draw:
        # One lock a process: a forked child can't know whether a thread of its parent held the one that it inherits.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            return self._draw_alone(storage, count, request, generator)

    def _draw_alone(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> Draw:
        return super().draw(storage, count, request, generator)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_locks": {}}


class StepDraws(TrajectoryDraws):
    """Draws every chunk of every trajectory with the same probability: trajectories in proportion to their places.

    The ledger knows of each trajectory how many steps were published before it: where a number falls among these is
    found by halving what is live.
    """

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        ledger, count = query.storage.ledger, len(part)
        beyond = max(query.request.extra, 0)  # places that each trajectory has besides its steps
        edges = ledger.rows_of(np.array([query.first, query.end - 1]))
        before = ledger.steps_before(edges.ids)
        begin = int(before[0]) + beyond * query.first
        places = int(before[1]) + max(int(edges.lengths[1]), 0) + beyond * query.end - begin
        mean = max(1.0, places / (query.end - query.first))
        tries = min(MAX_TRIES, math.ceil(2 * mean / max(1.0, mean + min(query.request.extra, 0))))
        # Steps are counted for ever: a number among them is exact only as an integer, with its fraction beside it.
        drawn = random_numbers(tries * count, query.generator) * places
        whole = drawn.astype(np.int64)
        place = begin + whole
        low, high = np.full(len(place), query.first), np.full(len(place), query.end)
        for _ in range((query.end - query.first - 1).bit_length()):
            middle = (low + high) >> 1
            above = ledger.steps_before(middle) + beyond * middle > place
            high = np.where(above, middle, high)
            low = np.where(above, low, middle)
        rows = ledger.rows_of(low)
        steps_in = place - ledger.steps_before(low) - beyond * low + (drawn - whole)
        uniform = steps_in / np.maximum(rows.lengths + query.request.extra, 1)
        fits = query.request.fits(rows) & (uniform >= 0.0) & (uniform < 1.0)
        taken = fits.reshape(tries, count).argmax(axis=0) * count + np.arange(count)
        rows = rows.select(taken)
        return Draw(rows._replace(lengths=np.where(fits[taken], rows.lengths, GONE)), uniform[taken])

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        return (rows.lengths + query.request.extra).astype(np.float64)


class RecencyDraws(TrajectoryDraws):
    """Draws newer trajectories more often: the ``n``-th newest in proportion to ``2 ** (-n / half_life)``."""

    def __init__(self, weights: ByRecency, max_age: float | None = None, max_policy_lag: int | None = None) -> None:
        super().__init__(max_age, max_policy_lag)
        self._log_ratio = -math.log(2.0) / weights.half_life

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        # The inverse of the distribution function of a geometric distribution that ends with the oldest.
        mass = -math.expm1(self._log_ratio * (query.end - query.first))
        newest = np.log1p(-random_numbers(len(part), query.generator) * mass) / self._log_ratio
        ids = query.end - 1 - np.minimum(newest.astype(np.int64), query.end - query.first - 1)
        return Draw(query.storage.ledger.rows_of(ids), random_numbers(len(part), query.generator))

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        return np.exp(self._log_ratio * (rows.ids.max(initial=0) - rows.ids))


class PriorityDraws(TrajectoryDraws):
    """Draws in proportion to the weights in the ledger's tree of priorities."""

    def __init__(self, weights: ByPriority, max_age: float | None = None, max_policy_lag: int | None = None) -> None:
        super().__init__(max_age, max_policy_lag)
        self._beta = weights.beta

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        ledger = query.storage.ledger
        if not ledger.priorities.built:
            ledger.prioritize()
        ids = ledger.ids_at(ledger.priorities.find(random_numbers(len(part), query.generator)))
        rows = ledger.rows_of(ids)
        live = (ids >= query.first) & (ids < query.end)
        return Draw(
            rows._replace(lengths=np.where(live, rows.lengths, GONE)), random_numbers(len(part), query.generator)
        )

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        weights = query.storage.ledger.weights_of(rows.ids)
        return weights if weights.any() else np.ones(len(weights))  # emptied and filled at this moment

    def importance(self, storage: TrajectoryStorage, rows: Rows) -> np.ndarray:
        # The number of trajectories and the sum of the weights are the same for all, and are divided out.
        weights = storage.ledger.weights_of(rows.ids)
        positive = np.where(weights > 0.0, weights, weights.max(initial=0.0) or 1.0)  # gone since: counts as usual
        return ((positive / positive.min()) ** -self._beta).astype(np.float32)


def random_numbers(count: int, generator: torch.Generator | None) -> np.ndarray:
    """Returns uniform numbers of ``[0, 1)``, ``float64``."""
    return torch.rand(count, dtype=torch.float64, generator=generator).numpy()
