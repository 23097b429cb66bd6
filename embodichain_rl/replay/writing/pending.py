"""The unfinished trajectories of one process: what is held of them, on the host, in the arena or on a device."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from embodichain_rl.replay.device import Span
from embodichain_rl.replay.host import RegionInPieces
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.writing.lockstep import Lockstep

__all__ = ["MIN_PENDING_BYTES", "Pending", "PendingSteps"]

MIN_PENDING_BYTES = 16 << 20
"""Bytes that pending steps may always have, so that small buffers work with many environments."""

LONG_BYTES = 1 << 20
"""Bytes of pending steps from which on they are written to a region of the arena, where they stay."""


@dataclass(slots=True)
class Pending:
    """An unfinished trajectory: copies of its pieces so far, on the host, or as spans on a device.

    Attributes:
        pieces: consecutive, one array ``[n, *shape]`` per field.
        spans: the same on a device.
        trajectory_values: one array ``[*shape]`` per trajectory field.
        steps: how many there are.
        step_count: ``"step_count"`` of the last one; None where there is none.
        traj_id: its id in the data, where only that says where it ends.
        texts_since: the generation of the table of texts when it began.
        region: where its first pieces lie in the arena already; None if it is short, or there was no room.
        asked_at: number of steps at which a region was asked for in vain.
    """

    pieces: list[list[np.ndarray]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    trajectory_values: list[np.ndarray] = field(default_factory=list)
    steps: int = 0
    step_count: np.ndarray | None = None
    traj_id: Any = None
    texts_since: int = 0
    region: RegionInPieces | None = None
    asked_at: int = 0

    @property
    def all_in_region(self) -> bool:
        """Whether all pieces lie in the region."""
        return self.region is not None and self.region.steps == self.steps

    def give_back(self) -> None:
        """Give the region back, if there is one."""
        if self.region is not None:
            self.region.give_back()
            self.region = None


_NOTHING = Pending()


class PendingSteps:
    """The unfinished trajectories of one process, by the key of the runs that they consist of.

    Attributes:
        truncated (int): trajectories that were ended although no end flag said so.
        texts_since (int): the generation of the table of texts when the call began whose steps are looked at.
        longest (int): steps of the last trajectory that was written to a region of the arena.
    """

    def __init__(self) -> None:
        self._alone: dict[Hashable, Pending] = {}
        self._together: dict[int, Lockstep] = {}
        self.truncated = 0
        self.longest = 0
        self.texts_since = 0

    @property
    def _by_key(self) -> dict[Hashable, Pending]:
        """All of them, each by itself; also those that were in arrays until now."""
        if self._together:
            self._separate()
        return self._alone

    def _separate(self) -> None:
        together, self._together = self._together, {}
        for producer, state in together.items():
            for row in np.flatnonzero(state.steps).tolist():
                kind = ("row", row) if state.ids is None else ("id", state.ids[row].item())
                spans = state.spans(row)
                self._alone[producer, *kind] = Pending(
                    spans=spans,
                    steps=sum(span.steps for span in spans),
                    step_count=None if state.counts is None else state.counts[row].copy(),
                    texts_since=self.texts_since,
                )

    def lockstep(self, producer: int, rows: int) -> Lockstep | None:
        """Return the trajectories of a thread whose environments step together; None if there are others as well.

        Args:
            producer: identifies the thread.
            rows: the number of environments, if there is no such trajectory yet.
        """
        if self._alone or any(other != producer for other in self._together):
            return None
        state = self._together.get(producer)
        if state is None or (state.rows != rows and not state.blocks):
            return Lockstep(rows)
        return state

    def keep_lockstep(self, producer: int, state: Lockstep) -> None:
        """Keep what :meth:`lockstep` has returned."""
        self._together[producer] = state

    def __len__(self) -> int:
        together = sum(int(np.count_nonzero(state.steps)) for state in self._together.values())
        return len(self._alone) + together

    def __iter__(self) -> Iterator[Pending]:
        return iter(list(self._by_key.values()))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._by_key

    @property
    def steps(self) -> int:
        """Steps of all pending trajectories."""
        together = sum(int(state.steps.sum()) for state in self._together.values())
        return sum(pending.steps for pending in self._alone.values()) + together

    @property
    def most_steps(self) -> int:
        """Steps of the longest pending trajectory."""
        together = [int(state.steps.max(initial=0)) for state in self._together.values()]
        return max([pending.steps for pending in self._alone.values()] + together, default=0)

    @property
    def oldest_texts(self) -> int | None:
        """The first generation of the table of texts that any of them may refer to; None if there is none."""
        return min([pending.texts_since for pending in self._alone.values()], default=None)  # steps in arrays: no text

    @property
    def held_steps(self) -> int:
        """Steps that are held for them; on a device there may be some more than theirs."""
        alone = self._alone.values()
        batches = {id(span.batch): len(span.batch) for pending in alone for span in pending.spans}
        together = sum(state.held_steps for state in self._together.values())
        return sum(batches.values()) + sum(pending.steps for pending in alone if not pending.spans) + together

    @property
    def keys(self) -> list[Hashable]:
        """The keys of all pending trajectories."""
        return list(self._by_key)

    def get(self, key: Hashable) -> Pending:
        """Return what is pending under ``key``; an empty one, not to be changed, where nothing is."""
        return self._by_key.get(key, _NOTHING)

    def begin(self, key: Hashable) -> Pending:
        """Return what is pending under ``key``; a new one where nothing is."""
        return self._by_key.setdefault(key, Pending(texts_since=self.texts_since))

    def end(self, key: Hashable) -> None:
        """Forget what is pending under ``key``."""
        ended = self._by_key.pop(key, None)
        if ended is not None:
            ended.give_back()

    def clear(self) -> None:
        """Forget everything."""
        self._together.clear()
        for key in self.keys:
            self.end(key)

    def add_piece(
        self, pending: Pending, piece: Sequence[np.ndarray], step_bytes: int, storage: TrajectoryStorage | None
    ) -> None:
        """Copy the next steps of a trajectory: to a region of the arena if it is long, else to memory of this process.

        Args:
            pending: what is pending of it.
            piece: one array ``[n, *shape]`` per field.
            step_bytes: bytes of a stored step.
            storage: where it will be written to; None if its pieces stay in this process.
        """
        steps = pending.steps + len(piece[0])
        if storage is not None and steps * step_bytes >= LONG_BYTES and self._in_region(pending, piece, steps, storage):
            return
        pending.pieces.append([value.copy() for value in piece])
        pending.steps = steps

    def _in_region(self, pending: Pending, piece: Sequence[np.ndarray], steps: int, storage: TrajectoryStorage) -> bool:
        if pending.region is None:
            if steps < 2 * pending.asked_at:
                return False
            region = storage.begin_pieces(max(2 * steps, self.longest)) or storage.begin_pieces(steps + steps // 4)
            if region is None:
                pending.asked_at = steps
                return False
            pending.region = region
            for earlier in pending.pieces:
                region.append(earlier)
        elif not pending.all_in_region:
            return False  # there was no room for an earlier one
        if not pending.region.append(piece):
            return False
        pending.pieces = [pending.region.piece()]
        pending.steps = steps
        return True
