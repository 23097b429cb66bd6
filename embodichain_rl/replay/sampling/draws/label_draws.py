"""Draws by a label of steps: the label first, then one of the steps that have it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from embodichain_rl._checks import checked_key
from embodichain_rl.errors import ChunkTooLongError, InvalidArgumentError, NothingToDrawError
from embodichain_rl.replay.ledger import GONE, Ledger, Rows
from embodichain_rl.replay.sampling.draws.mixtures import draw_groups, group_field, mixture_drawn
from embodichain_rl.replay.sampling.draws.trajectory_draws import UNKNOWN, Draw, DrawQuery, Limits, RememberingDraws
from embodichain_rl.replay.sampling.random_streams import part_of, random_numbers
from embodichain_rl.replay.sampling.requests import ChunkRequest
from embodichain_rl.replay.sampling.weights import ByStep
from embodichain_rl.replay.schema import StepField, as_array
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["LabelDraws"]


class _Runs:
    """Consecutive steps with one label, of many trajectories.

    Attributes:
        ids: the trajectory of each run, ``int64`` ``[n]``, ascending.
        firsts: its first step, ``int64`` ``[n]``.
        ends: the number of steps of all runs up to its end, ``int64`` ``[n]``.
    """

    def __init__(self, ids: np.ndarray, firsts: np.ndarray, lengths: np.ndarray) -> None:
        self.ids, self.firsts, self.ends = ids, firsts, np.cumsum(lengths)

    def __len__(self) -> int:
        """Return the number of steps."""
        return int(self.ends[-1]) if len(self.ends) else 0

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def joined(self, other: _Runs) -> _Runs:
        """Return these runs and others, of newer trajectories."""
        return _Runs(*(np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def select(self, mask: np.ndarray) -> _Runs:
        """Return some of the runs."""
        return self if mask.all() else _Runs(*(column[mask] for column in self._columns()))

    def _columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.ids, self.firsts, self.lengths

    def at(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the trajectory and the step of some of the steps, by their numbers."""
        run = np.searchsorted(self.ends, numbers, side="right")
        return self.ids[run], self.firsts[run] + numbers - (self.ends[run] - self.lengths[run])


class _Labels:
    """The labels of the steps of one storage, as far as this process has read them."""

    def __init__(self) -> None:
        self.runs: dict[int, _Runs] = {}
        self.seen = 0
        """The id after the last trajectory whose labels were read."""
        self.edits = (0, 0, 0)
        """What :attr:`Ledger.edits` was then."""
        self.live: tuple[int, int] = (0, 0)
        """The oldest live id, and the number of live ones, when evicted trajectories were last forgotten."""
        self.drawn: Counter[int | str] = Counter()
        """The number of draws of each label."""


class LabelDraws(RememberingDraws[_Labels]):
    """Draw the label first, then uniformly among the chunks whose first step has it.

    Each process reads the labels of every trajectory once, at its first draw after the publication.
    """

    def __init__(self, weights: ByStep, limits: Limits) -> None:
        super().__init__(limits)
        self._key = checked_key(weights.key)
        self._mixture = weights.mixture

    def _new_memory(self) -> _Labels:
        return _Labels()

    def _field(self, storage: TrajectoryReader) -> StepField:
        return group_field(storage, self._key, self._mixture, of_steps=True)

    def check(self, request: ChunkRequest) -> None:
        """Refuse chunks whose first step may be none of the trajectory, or is not drawn freely.

        Raises:
            InvalidArgumentError: for these.
        """
        if request.sampling_mode != "episode" or request.first < 0:
            raise InvalidArgumentError(
                f"Got weights=ByStep({self._key}) with sampling_mode={request.sampling_mode!r} and chunks that begin "
                f"{max(-request.first, 0)} steps before a trajectory at most: it draws the first step of a chunk by "
                "its label. Use sampling_mode='episode', no padding before the first step, or windows."
            )

    def _parts(self, query: DrawQuery, part: np.ndarray) -> np.ndarray:
        labels = self._up_to_date(query)
        sizes = {label: len(runs) for label, runs in labels.runs.items() if len(runs)}
        to_draw = ~np.isin(part, [*sizes])
        if to_draw.any():
            count, generator = int(np.count_nonzero(to_draw)), part_of(query.generator, to_draw)
            field = self._field(query.storage)
            drawn = draw_groups(query.storage, field, self._mixture, sizes, count, generator, labels.drawn, unit="step")
            if drawn is None and self.limits.subset is not None:
                raise self._empty_subset(len(query.storage))
            part[to_draw] = UNKNOWN if drawn is None else drawn
        return part

    def _up_to_date(self, query: DrawQuery) -> _Labels:
        """Read the labels of new trajectories, and forget those of evicted ones."""
        labels, live, ledger = self._memory_of(query.storage), query.live, query.storage.ledger
        edits = labels.edits if ledger.plain else ledger.edits
        if edits != labels.edits:  # a label may have changed
            labels.runs, labels.seen, labels.edits = {}, 0, edits
        if labels.seen < live.end:
            ids = np.arange(max(live.oldest, labels.seen), live.end) if live.consecutive else live.all()
            for label, runs in self._read(query.storage, ids[ids >= labels.seen]).items():
                labels.runs[label] = labels.runs[label].joined(runs) if label in labels.runs else runs
            labels.seen = live.end
        if labels.live != (live.oldest, len(live)):
            labels.runs = {label: runs.select(live.contains(runs.ids)) for label, runs in labels.runs.items()}
            labels.live = live.oldest, len(live)
        return labels

    def _read(self, storage: TrajectoryReader, ids: np.ndarray) -> dict[int, _Runs]:
        """Return the runs of each label in the trajectories ``ids``."""
        rows = storage.ledger.existing(ids)
        if self.limits.subset is not None:
            rows = rows.select(self.limits.subset.contains(rows.ids))
        if not len(rows.ids):
            return {}
        ends = np.cumsum(rows.lengths)
        begins = ends - rows.lengths
        of = np.repeat(np.arange(len(ends)), rows.lengths)
        steps = np.arange(len(of)) - begins[of]
        number = storage.arena.schema.number_of(self._field(storage).key)
        assert number is not None, "a field of steps"
        values = as_array(storage.arena.copy_steps(number, rows.starts[of] + steps)).reshape(-1).astype(np.int64)
        change = np.ones(len(values), dtype=bool)
        change[1:] = (values[1:] != values[:-1]) | (of[1:] != of[:-1])
        firsts = np.flatnonzero(change)
        lengths = np.diff(firsts, append=len(values))
        whole = storage.ledger.unchanged(rows)[of[firsts]]
        firsts, lengths = firsts[whole], lengths[whole]
        of_runs = values[firsts]
        return {
            label: _Runs(rows.ids[of[firsts[mask]]], steps[firsts[mask]], lengths[mask])
            for label, mask in ((label, of_runs == label) for label in np.unique(of_runs).tolist())
        }

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        labels, request, ledger = self._memory_of(query.storage), query.request, query.storage.ledger
        ids, steps = np.full(len(part), query.live.oldest), np.full(len(part), -1)
        uniform = random_numbers(len(part), query.generator)
        for label in np.unique(part).tolist():
            runs, of_label = labels.runs.get(label), part == label
            if runs is not None and len(runs):
                ids[of_label], steps[of_label] = runs.at((uniform[of_label] * len(runs)).astype(np.int64))
        return _placed(request, ledger.rows_of(ids), steps)

    def _scan(self, query: DrawQuery, part: np.ndarray) -> Draw:
        """Do the same from a list of all steps that a chunk may begin with."""
        labels, request, ledger = self._memory_of(query.storage), query.request, query.storage.ledger
        drawn = _placed(request, ledger.rows_of(np.full(len(part), query.live.oldest)), np.full(len(part), -1))
        for label in np.unique(part).tolist():
            runs = labels.runs.get(label)
            if runs is None or not len(runs):
                continue
            of_label = np.flatnonzero(part == label)
            rows = ledger.rows_of(runs.ids)
            fits = self._fits(ledger, rows, request) & (rows.lengths >= 0)
            # Of each run, the steps at which a chunk fits.
            first = np.maximum(runs.firsts, request.first)
            end = np.minimum(runs.firsts + runs.lengths, request.first + request.counts(rows.lengths))
            free = np.where(fits, np.maximum(end - first, 0), 0)
            if not free.any():
                self._refuse(query, label, rows)
            possible = _Runs(runs.ids[free > 0], first[free > 0], free[free > 0])
            numbers = random_numbers(len(of_label), part_of(query.generator, of_label)) * len(possible)
            ids, steps = possible.at(numbers.astype(np.int64))
            drawn = drawn.replace(of_label, _placed(request, ledger.rows_of(ids), steps))
        return drawn

    def _refuse(self, query: DrawQuery, label: int, rows: Rows) -> None:
        """Raise an error if no chunk can begin with a label, unless its trajectories were evicted meanwhile."""
        rows = rows.select(rows.lengths >= 0)
        if not len(rows.ids):
            return
        field = self._field(query.storage)
        name = query.storage.texts.resolve(label) if field.is_text else label
        fitting = query.request.fits(rows)
        if not fitting.any():
            raise query.request.refusal(rows)
        if self._fits(query.storage.ledger, rows, query.request).any():
            raise ChunkTooLongError(
                f"Got weights by {self._key}, but no chunk of {query.request.length} steps begins with {name!r}: the "
                "trajectories end too soon after such steps. Ask for shorter chunks, or use pad='after'."
            )
        raise NothingToDrawError(
            f"Got weights by {self._key}, but all trajectories with {name!r} are excluded by max_policy_lag. Raise "
            "it, or wait for new trajectories."
        )

    def stats(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """Return the counters; ``mixture`` is the share of the draws that each label had, 0 to 1."""
        memories = list(self._memories.items())
        drawn = [labels.drawn for of_storage, labels in memories if ledger is None or of_storage is ledger]
        return super().stats(ledger) | mixture_drawn(drawn)


def _placed(request: ChunkRequest, rows: Rows, steps: np.ndarray) -> Draw:
    """Return draws whose offsets are given steps; those that are no offsets do not fit."""
    counts = request.counts(rows.lengths)
    offsets = steps - request.first
    fits = (steps >= 0) & (offsets >= 0) & (offsets < counts)
    rows = rows._replace(lengths=np.where(fits, rows.lengths, GONE))
    # The middle of the numbers that stand for the offset; see ``offsets_from_uniform``.
    return Draw(rows, np.where(fits, (offsets + 0.5) / np.maximum(counts, 1), 0.0))
