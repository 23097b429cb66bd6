"""Draw trajectories, and a uniform number for the offset in each: uniformly, and what all kinds of weights share.

All draws work alike. Candidates are drawn from the live ids, without reading their rows first. Candidates that do not
fit the request, for instance because they are too short, are drawn again. If too few trajectories fit, the ledger is
scanned once. So the cost is that of a batch, however much the buffer holds.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from embodichain_rl.errors import (
    EmptyBufferError,
    NothingToDrawError,
    SchemaMismatchError,
    TrajectoryEvictedError,
)
from embodichain_rl.replay.ledger import GONE, NO_VERSION, Ledger, LiveIds, Rows
from embodichain_rl.replay.sampling.random_streams import RandomSource, part_of, random_numbers
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.sampling.subsets import TrajectorySubset
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = [
    "REJECTION_ROUNDS",
    "ChunkQuery",
    "Draw",
    "DrawQuery",
    "Limits",
    "RememberingDraws",
    "TrajectoryDraws",
]

REJECTION_ROUNDS = 3
"""The number of times that candidates are drawn before the ledger is scanned."""

SCANS = 20
"""The number of times that the ledger is scanned if everything found is evicted meanwhile."""

UNKNOWN = -(2**62)
"""The group of a draw that has none yet."""


class Draw(NamedTuple):
    """Drawn trajectories, and for each a uniform number of ``[0, 1)`` that determines the offset in it."""

    rows: Rows
    uniform: np.ndarray

    def replace(self, at: np.ndarray, new: Draw) -> Draw:
        """Return the draws with those at the indices ``at`` replaced by ``new`` ones."""
        uniform = self.uniform.copy()
        uniform[at] = new.uniform
        return Draw(self.rows.replace(at, new.rows), uniform)


class DrawQuery(NamedTuple):
    """The arguments of a draw, and the ids that may be drawn at the moment."""

    storage: TrajectoryReader
    live: LiveIds
    request: ChunkRequest
    generator: RandomSource


class Limits(NamedTuple):
    """Which trajectories may be drawn, whatever the weights."""

    max_age: float | None = None
    """Draw only trajectories that were published at most this many seconds ago; None: all."""
    max_policy_lag: int | None = None
    """Draw only trajectories whose policy version is at most this many behind the newest live one; None: all."""
    subset: TrajectorySubset | None = None
    """Draw only trajectories of this subset; None: all."""


class ChunkQuery(NamedTuple):
    """What a sampler asks of a buffer: which chunks it wants, and how likely each trajectory is to be drawn."""

    request: ChunkRequest
    draws: TrajectoryDraws
    in_one_call: bool = False
    """Whether the kernels copy such a batch in one call, and draw it too if ``draws.is_uniform``."""

    @classmethod
    def of(cls, request: ChunkRequest, draws: TrajectoryDraws) -> ChunkQuery:
        """Return the query, and note how it is done."""
        return cls(request, draws, request.is_plain and draws.in_one_call)


class TrajectoryDraws:
    """Draw uniformly among the trajectories that fit the request. The base class of all other draws.

    Args:
        limits: which trajectories may be drawn.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._counts: weakref.WeakKeyDictionary[Ledger, Counter[str]] = weakref.WeakKeyDictionary()

    def _count(self, ledger: Ledger, name: str, number: int = 1) -> None:
        """Add to a counter of this process for draws from one storage."""
        self._counts.setdefault(ledger, Counter())[name] += number

    def count_unfit(self, ledger: Ledger, number: int) -> None:
        """Count candidates that did not fit."""
        self._count(ledger, "unfit", number)

    def _counted(self, name: str, ledger: Ledger | None) -> int:
        """Return a counter for draws from one storage; None: from all."""
        counts = self._counts.values() if ledger is None else [self._counts.get(ledger, Counter())]
        return sum(of_storage[name] for of_storage in list(counts))

    @property
    def is_uniform(self) -> bool:
        """Whether all live trajectories that fit a request are equally likely."""
        return type(self) is TrajectoryDraws and self.limits == Limits()

    @property
    def in_one_call(self) -> bool:
        """Whether the kernels may copy the plain chunks that are drawn, in one call."""
        return self.is_uniform

    def check(self, request: ChunkRequest) -> None:
        """Refuse a request that can't be drawn for, whatever the storage holds.

        Raises:
            InvalidArgumentError: for such a request.
        """

    def draw(
        self,
        storage: TrajectoryReader,
        count: int,
        request: ChunkRequest,
        generator: RandomSource,
        *,
        rejected: int = 0,
    ) -> Draw:
        """Draw ``count`` trajectories that fit the request.

        Args:
            storage: the storage to draw from.
            count: the number of trajectories.
            request: what they must fit.
            generator: for the random numbers.
            rejected: how often candidates were drawn already that did not fit.

        Raises:
            EmptyBufferError: when there is no trajectory.
            NothingToDrawError, ChunkTooLongError: when no trajectory fits.
            SchemaMismatchError: when there is a ``max_policy_lag``, and no trajectory with a policy version.
            TrajectoryEvictedError: when trajectories are evicted faster than they are drawn.
        """
        ledger = storage.ledger
        drawn: Draw | None = None
        missing, part = np.arange(count), np.full(count, UNKNOWN)
        for round_ in range(rejected, REJECTION_ROUNDS + SCANS):
            live = self.live_ids(ledger)
            request.check(storage)
            query = DrawQuery(storage, live, request, generator)
            part = self._parts(query, part)
            draw = self._candidates
            if round_ >= REJECTION_ROUNDS:
                ledger.end_change()  # maybe nothing else is left to draw
                draw = self._scan
            new = draw(query, part)
            drawn = new if drawn is None else drawn.replace(missing, new)
            fits = self._fits(ledger, new.rows, request)
            fitting = int(np.count_nonzero(fits))
            if fitting == len(fits):
                return drawn
            self.count_unfit(ledger, len(fits) - fitting)
            missing, part, generator = missing[~fits], part[~fits], part_of(generator, ~fits)
        raise TrajectoryEvictedError(
            f"{SCANS} times in a row every trajectory was evicted before its row was read: the buffer of "
            f"{storage.max_size:,} trajectories turns over faster than that. Make it larger."
        )

    def live_ids(self, ledger: Ledger) -> LiveIds:
        """Return the ids that may be drawn.

        Raises:
            EmptyBufferError: when there is no trajectory.
            NothingToDrawError: when all are too old.
        """
        live = ledger.live()
        if not len(live):
            ledger.check_open()
            raise EmptyBufferError(
                "Cannot sample from an empty storage: no trajectory is finished yet. Wait until len(rb) > 0."
            )
        max_age = self.limits.max_age
        if max_age is None:
            return live
        now = time.monotonic_ns()
        young = ledger.live_since(now - int(max_age * 1e9), live)
        if not len(young):
            age = (now - int(ledger.published_at(live.at(np.array([len(live) - 1])))[0])) / 1e9
            raise NothingToDrawError(
                f"The newest trajectory is {age:.1f} s old, but max_age={max_age:g} s. Raise max_age, or see why "
                "no new ones come."
            )
        return young

    def _fits(self, ledger: Ledger, rows: Rows, request: ChunkRequest) -> np.ndarray:
        fits = request.fits(rows)
        _, max_policy_lag, subset = self.limits
        if max_policy_lag is not None:
            fits &= rows.policy_versions >= self._oldest_version(ledger, max_policy_lag)
        if subset is not None:
            fits &= subset.contains(rows.ids)
        return fits

    @staticmethod
    def _oldest_version(ledger: Ledger, max_policy_lag: int) -> int:
        """Return the oldest policy version that may be drawn; refuse trajectories that all have none."""
        newest = ledger.newest_policy_version
        if newest == NO_VERSION and len(ledger):
            raise SchemaMismatchError(
                f"Got max_policy_lag={max_policy_lag}, but no live trajectory has a policy version: its last step has "
                "no number under 'policy_version'. Build the collector with track_policy_version=True, or leave "
                "max_policy_lag out."
            )
        return max(newest - max_policy_lag, 0)  # never a trajectory without a version

    def _parts(self, query: DrawQuery, part: np.ndarray) -> np.ndarray:
        """Return what a repeated draw keeps: the group that it is from, as long as the group has trajectories."""
        return part

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        """Draw a candidate for each of ``part``. A candidate that is known not to fit has the length ``GONE``."""
        # One random number for both: its integer part is the trajectory, its fraction the offset.
        numbers = random_numbers(len(part), query.generator) * len(query.live)
        which = numbers.astype(np.int64)
        return Draw(query.storage.ledger.rows_of(query.live.at(which)), numbers - which)

    def _members(self, query: DrawQuery, part: int) -> Rows:
        """Return the rows of all trajectories that may be drawn for ``part``."""
        return query.storage.ledger.existing(query.live.all())

    def _scan(self, query: DrawQuery, part: np.ndarray) -> Draw:
        """Do the same as :meth:`_candidates`, from a list of all trajectories that fit the request."""
        drawn = Draw(query.storage.ledger.rows_of(np.full(len(part), query.live.oldest)), np.zeros(len(part)))
        drawn.rows.lengths[:] = GONE
        for which in np.unique(part).tolist():
            members = self._members(query, which)
            if len(members.ids):  # else all were evicted meanwhile
                of_part = np.flatnonzero(part == which)
                of_these = query._replace(generator=part_of(query.generator, of_part))
                drawn = drawn.replace(of_part, self._choose(of_these, members, len(of_part)))
        return drawn

    def _choose(self, query: DrawQuery, members: Rows, count: int) -> Draw:
        """Draw among those of ``members`` that fit the request; raise if none does."""
        ledger = query.storage.ledger
        subset = self.limits.subset
        if subset is not None:
            everything, members = members, members.select(subset.contains(members.ids))
            if not len(members.ids):
                raise self._empty_subset(len(everything.ids))
        fitting = members.select(query.request.fits(members))
        if not len(fitting.ids):
            raise query.request.refusal(members)
        fitting = fitting.select(self._fits(ledger, fitting, query.request))
        if not len(fitting.ids):
            raise NothingToDrawError(
                f"Of {len(members.ids):,} trajectories that could be drawn none was made with version "
                f"{ledger.newest_policy_version} of the policy or one of the {self.limits.max_policy_lag} before. "
                "Raise max_policy_lag, or update the workers' policy less often."
            )
        sums = np.cumsum(self._weigh(query, fitting))
        which = np.searchsorted(sums, random_numbers(count, query.generator) * sums[-1], side="right")
        return Draw(fitting.select(np.minimum(which, len(sums) - 1)), random_numbers(count, query.generator))

    def _empty_subset(self, trajectories: int) -> NothingToDrawError:
        assert self.limits.subset is not None, "checked by the caller"
        return NothingToDrawError(
            f"Of {trajectories:,} trajectories that could be drawn none belongs to subset={self.limits.subset.name}. "
            "Wait for more trajectories, or make the subset larger."
        )

    def _weigh(self, query: DrawQuery, rows: Rows) -> np.ndarray:
        """Return the relative probability of each trajectory, ``float64`` ``[n]``."""
        return np.ones(len(rows.ids))

    def importance(self, storage: TrajectoryReader, rows: Rows) -> np.ndarray | None:
        """Return the importance weights of a batch, ``float32`` ``[B]``; None if it has none."""
        return None

    def stats(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """Return the counters of this process, by name; ``unfit`` is the number of candidates that did not fit.

        Args:
            ledger: of the storage whose draws are counted; None: those of all storages.
        """
        return {"unfit": self._counted("unfit", ledger)}


Memory = TypeVar("Memory")


class RememberingDraws(TrajectoryDraws, Generic[Memory]):
    """Draws that depend on earlier draws from the same storage. One thread of a process draws at a time."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._locks: dict[int, threading.Lock] = {}
        self._memories: weakref.WeakKeyDictionary[Ledger, Memory] = weakref.WeakKeyDictionary()

    def _new_memory(self) -> Memory:
        """Return what is remembered of a storage before the first draw from it."""
        raise NotImplementedError

    def _memory_of(self, storage: TrajectoryReader) -> Memory:
        """Return what is remembered of a storage: a sampler may serve several."""
        memory = self._memories.get(storage.ledger)
        if memory is None:
            memory = self._memories[storage.ledger] = self._new_memory()
        return memory

    def draw(
        self,
        storage: TrajectoryReader,
        count: int,
        request: ChunkRequest,
        generator: RandomSource,
        *,
        rejected: int = 0,
    ) -> Draw:
        # One lock per process: a forked child can't know whether a thread of its parent held the inherited one.
        with self._locks.setdefault(os.getpid(), threading.Lock()):
            return self._draw_alone(storage, count, request, generator)

    def _draw_alone(
        self, storage: TrajectoryReader, count: int, request: ChunkRequest, generator: RandomSource
    ) -> Draw:
        return super().draw(storage, count, request, generator)
