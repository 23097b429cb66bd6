"""Draws by group: the group first, then a trajectory of it."""

from __future__ import annotations

import bisect
from collections import Counter
from typing import Any

import numpy as np

from embodichain_rl._checks import checked_key
from embodichain_rl.replay.ledger import GONE, Ledger, LiveIds, Rows
from embodichain_rl.replay.sampling.draws.mixtures import draw_groups, group_field, mixture_drawn
from embodichain_rl.replay.sampling.draws.trajectory_draws import UNKNOWN, Draw, DrawQuery, Limits, RememberingDraws
from embodichain_rl.replay.sampling.random_streams import RandomSource, part_of, random_numbers
from embodichain_rl.replay.sampling.weights import ByGroup
from embodichain_rl.replay.schema import StepField, as_array
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["GroupDraws"]


class _Members:
    """The ids of a group's trajectories, oldest first; those that are no longer live are removed."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.begin = 0

    def __len__(self) -> int:
        return len(self.ids) - self.begin

    def forget_before(self, live: LiveIds) -> None:
        """Forget what was evicted: all before the oldest live id, but for what is kept."""
        passed = bisect.bisect_left(self.ids, live.oldest, self.begin)
        if len(live.kept) and passed > self.begin:
            first = np.array(self.ids[self.begin : passed], dtype=np.int64)
            self.ids[:passed], self.begin = first[live.contains(first)].tolist(), 0
            return
        self.begin = passed
        if self.begin > len(self.ids) // 2:
            del self.ids[: self.begin]
            self.begin = 0


NO_MEMBERS = _Members()


class _Groups:
    """The groups of the trajectories of one storage, as far as this process has read them."""

    def __init__(self) -> None:
        self.members: dict[int, _Members] = {}
        self.seen = 0
        """The id after the last trajectory whose group was read."""
        self.edits = (0, 0, 0)
        """What :attr:`Ledger.edits` was then."""
        self.forgotten = (0, 0)
        """The oldest live id, and the number of kept ones, when evicted trajectories were last forgotten."""
        self.drawn: Counter[int | str] = Counter()
        """The number of draws of each group."""

    def of(self, group: int) -> _Members:
        """Return the trajectories of a group."""
        return self.members.get(group, NO_MEMBERS)


class GroupDraws(RememberingDraws[_Groups]):
    """Draw the group first, then uniformly among its trajectories that fit the request.

    Each process reads the group of every trajectory once, at its first draw after the publication.
    """

    def __init__(self, weights: ByGroup, limits: Limits) -> None:
        super().__init__(limits)
        self._key = checked_key(weights.key)
        self._mixture = weights.mixture

    def _new_memory(self) -> _Groups:
        return _Groups()

    def _parts(self, query: DrawQuery, part: np.ndarray) -> np.ndarray:
        groups, live, ledger = self._memory_of(query.storage), query.live, query.storage.ledger
        edits = groups.edits if ledger.plain else ledger.edits
        if edits != groups.edits:  # members may be in another group, or gone
            groups.members, groups.seen, groups.edits = {}, 0, edits
        if groups.seen < live.end:
            ids = np.arange(max(live.oldest, groups.seen), live.end) if live.consecutive else live.all()
            self._read_groups(query.storage, groups, ids[ids >= groups.seen])
            groups.seen = live.end
        if groups.forgotten != (live.oldest, len(live.kept)):
            for members in groups.members.values():
                members.forget_before(live)
            groups.forgotten = live.oldest, len(live.kept)
        sizes = {group: len(members) for group, members in groups.members.items() if len(members)}
        to_draw = ~np.isin(part, [*sizes])
        if to_draw.any():
            generator = part_of(query.generator, to_draw)
            part[to_draw] = self._draw_groups(query.storage, sizes, int(np.count_nonzero(to_draw)), generator)
        return part

    def _draw_groups(
        self, storage: TrajectoryReader, sizes: dict[int, int], count: int, generator: RandomSource
    ) -> np.ndarray:
        memory = self._memory_of(storage)
        field = self._field(storage)
        drawn = draw_groups(storage, field, self._mixture, sizes, count, generator, memory.drawn, unit="trajectory")
        if drawn is None and self.limits.subset is not None:
            raise self._empty_subset(len(storage))
        return np.full(count, UNKNOWN) if drawn is None else drawn

    def _read_groups(self, storage: TrajectoryReader, groups: _Groups, ids: np.ndarray) -> None:
        """Add the trajectories ``ids`` to their groups."""
        if self.limits.subset is not None:
            ids = ids[self.limits.subset.contains(ids)]
        for number, group in zip(*self._groups_of(storage, ids), strict=True):
            groups.members.setdefault(group, _Members()).ids.append(number)

    def _groups_of(self, storage: TrajectoryReader, ids: np.ndarray) -> tuple[list[int], list[int]]:
        """Return those of ``ids`` that are still there, and the group of each."""
        ledger = storage.ledger
        rows = ledger.rows_of(ids)
        rows = rows.select(rows.lengths >= 0)
        groups = self._values_of(storage, rows).reshape(-1)
        whole = ledger.unchanged(rows)
        return rows.ids[whole].tolist(), groups[whole].astype(np.int64).tolist()

    def _values_of(self, storage: TrajectoryReader, rows: Rows) -> np.ndarray:
        """Return the value of each trajectory at the key: its own, or that of its first step."""
        key = self._field(storage).key
        number = storage.arena.schema.number_of(key)
        if number is None:
            return storage.trajectory_values(key, rows.ids)
        return as_array(storage.arena.copy_steps(number, rows.starts))

    def _field(self, storage: TrajectoryReader) -> StepField:
        return group_field(storage, self._key, self._mixture, of_steps=False)

    def _candidates(self, query: DrawQuery, part: np.ndarray) -> Draw:
        ids = np.full(len(part), query.live.oldest)
        uniform = random_numbers(len(part), query.generator)
        groups = self._memory_of(query.storage)
        for number, (group, fraction) in enumerate(zip(part.tolist(), uniform.tolist(), strict=True)):
            members = groups.of(group)
            if len(members):
                ids[number] = members.ids[members.begin + int(fraction * len(members))]
        rows = query.storage.ledger.rows_of(ids)
        if UNKNOWN in part:  # all trajectories were evicted before their group was read
            rows = rows._replace(lengths=np.where(part == UNKNOWN, GONE, rows.lengths))
        return Draw(rows, random_numbers(len(part), query.generator))

    def _members(self, query: DrawQuery, part: int) -> Rows:
        members = self._memory_of(query.storage).of(part)
        rows = query.storage.ledger.rows_of(np.array(members.ids[members.begin :], dtype=np.int64))
        return rows.select(rows.lengths >= 0)

    def drawn(self, storage: TrajectoryReader) -> tuple[list[int], list[int], list[float | None], bool]:
        """Return what was drawn from a storage, by group, the groups of the mixture first.

        Returns:
            The groups (ids of texts, or integers), how often each was drawn, the share of each that was asked for (None
            where no mixture was given), and whether the groups are texts.
        """
        is_text = self._field(storage).is_text
        counts = self._memory_of(storage).drawn
        mixture = self._mixture or dict.fromkeys(counts, None)
        total = sum(share for share in mixture.values() if share is not None)
        names = [*mixture, *(name for name in counts if name not in mixture)]
        ids = np.array(names)
        if is_text:  # of those that nobody asked for without those whose text has left with the last trajectory
            asked = np.array([*(self._mixture or ())], dtype=object)
            if len(asked):
                storage.texts.ids_of(asked, for_good=False)
            found = {name: storage.texts.id_of(str(name)) for name in names}
            names = [name for name in names if found[name] is not None]
            ids = np.array([found[name] for name in names])
        shares: list[float | None] = []
        for name in names:
            share = mixture.get(name)
            shares.append(None if share is None else share / total)
        return ids.astype(np.int64).tolist(), [counts[name] for name in names], shares, is_text

    def stats(self, ledger: Ledger | None = None) -> dict[str, Any]:
        """Return the counters; ``mixture`` is the share of the draws that each group had, 0 to 1."""
        memories = list(self._memories.items())
        drawn = [groups.drawn for of_storage, groups in memories if ledger is None or of_storage is ledger]
        return super().stats(ledger) | mixture_drawn(drawn)
