"""Windows: a step, and for each key the requested steps around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.errors import ChunkTooLongError, InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.random_streams import RandomSource
from embodichain_rl.replay.sampling.requests.chunk_requests import ChunkRequest, segments_of
from embodichain_rl.replay.sampling.requests.offsets import OffsetRange, segments_around
from embodichain_rl.replay.sampling.requests.timing import check_rate, check_timestamps, rates_of
from embodichain_rl.replay.sampling.requests.windows import TimedWindows, Windows
from embodichain_rl.replay.schema import (
    TRAJECTORY,
    Key,
    Nest,
    Schema,
    StepField,
    key_name,
    lengths_key,
    shifted_fields,
)
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["WindowRequest"]


class _Window(NamedTuple):
    """One window in a schema."""

    key: Key
    pad_key: Key
    """Where the padding mask is."""
    number: int
    """The number of the field."""
    root: int | None
    """The number of the field whose next value this is; None if it is not a next observation."""


class WindowRequest(ChunkRequest):
    """A step, and for each key the requested steps around it. No other key of steps is read.

    Args:
        windows: for each key, the steps relative to the drawn one; or times.
        before: how many steps before the first step a window may reach; None: any number.
        after: how many steps after the last step a window may reach; None: any number.
        sampling_mode: ``"episode"``; or ``"segment"``, where the edges are those of the segment.
        drop_first: the number of first steps of a trajectory that are not drawn.
        drop_last: the number of its last steps that are not drawn.
    """

    def __init__(
        self,
        windows: Windows | TimedWindows,
        before: int | None,
        after: int | None,
        sampling_mode: str = "episode",
        *,
        drop_first: int = 0,
        drop_last: int = 0,
    ) -> None:
        self._timed = windows if isinstance(windows, TimedWindows) else None
        self._windows = _steps_of(windows)
        self._by_rate: dict[float, list[np.ndarray]] = {}
        earliest = min((min(steps) for _, steps in self._windows), default=0)
        latest = max((max(steps) for _, steps in self._windows), default=0)
        self._reach = max(0, -earliest)
        self._refuse_edges(before, after, max(0, -earliest), max(0, latest))
        needed_before = 0 if before is None else max(0, -earliest - before)
        needed_after = 0 if after is None else max(0, latest - after)
        offsets = OffsetRange(needed_before + 1 + needed_after, -needed_before, drop_first, drop_last)
        super().__init__(max(latest, 0) - min(earliest, 0) + 1, sampling_mode, offsets=offsets)
        self._steps = [np.array(steps) for _, steps in self._windows]
        self._keys = [key for key, _ in (self._windows if self._timed is None else self._timed.times)]
        self._last: tuple[Schema | None, list[_Window]] = (None, [])

    def _refuse_edges(self, before: int | None, after: int | None, most_before: int, most_after: int) -> None:
        if self._fps_key is not None:
            times = [time for _, of_key in self._timed.times for time in of_key] if self._timed is not None else []
            if (before is not None and min(times) < 0.0) or (after is not None and max(times) > 0.0):
                raise InvalidArgumentError(
                    f"Got fps={self._fps_key!r} without padding: how many steps a window takes depends on the "
                    "trajectory. Give pad='both'; '<key>_is_pad' says what is padding."
                )
        elif (before or 0) > most_before or (after or 0) > most_after:
            raise InvalidArgumentError(
                f"Got pad_before={before or 0} and pad_after={after or 0} for windows that begin {most_before} steps "
                f"before the drawn step and end {most_after} after it. Give at most these."
            )

    @property
    def _fps_key(self) -> Key | None:
        """The key of the number of steps per second, if it is one of each trajectory."""
        return self._timed.fps if self._timed is not None and isinstance(self._timed.fps, tuple) else None

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size,)

    def check(self, storage: TrajectoryReader) -> None:
        super().check(storage)
        self._windows_in(storage.arena.schema)

    def _windows_in(self, schema: Schema) -> list[_Window]:
        """Return the windows in a schema; refuse those of keys that are not stored."""
        last_schema, last_windows = self._last  # together: another thread may draw from another storage
        if schema is last_schema:
            return last_windows
        missing = [key for key in self._keys if schema.number_of(key) is None]
        if missing:
            raise SchemaMismatchError(f"Got windows for {missing}, but what is stored has the keys {schema.keys}.")
        shifted = shifted_fields(schema)
        windows = []
        for key in self._keys:
            number = schema.number_of(key)
            assert number is not None, "none is missing"
            windows.append(_Window(key, _pad_key(schema, key), number, shifted.get(number)))
        self._last = schema, windows
        return windows

    def place(self, storage: TrajectoryReader, rows: Rows, uniform: np.ndarray, generator: RandomSource) -> np.ndarray:
        """Return the drawn steps, ``int64`` ``[B]``; or ``[B, 4]``, with what else belongs to them.

        This is the first step and the end of the segment, and the number of steps per second, as the bits of a float.
        """
        offsets = super().place(storage, rows, uniform, generator)
        if self._timed is not None and self._fps_key is None:
            check_rate(storage, rows, self._timed)
        if self.sampling_mode == "episode" and self._fps_key is None:
            return offsets
        begins, ends = np.zeros_like(offsets), rows.lengths
        if self.sampling_mode == "segment":
            begins, ends = segments_around(rows, offsets, segments_of(storage), self._reach)
        rates = np.zeros(len(offsets)) if self._timed is None else rates_of(storage, rows, self._timed)
        placed = np.stack([offsets, begins, ends, rates.view(np.int64)], axis=-1)
        if self._fps_key is not None:
            whole = storage.ledger.still_valid(rows.ids)
            for rate in np.unique(rates[whole]).tolist():
                self._steps_at(rate)  # raises if a time lies between two steps
        return placed

    def _steps_at(self, rate: float) -> list[np.ndarray]:
        """Return the steps of each window at a number of steps per second."""
        found = self._by_rate.get(rate)
        if found is None:
            assert self._timed is not None, "windows of steps have no rate"
            found = self._by_rate[rate] = [np.array(steps) for _, steps in self._timed.steps_at(rate)]
        return found

    def _wanted(self, placed: np.ndarray) -> list[np.ndarray]:
        """Return the steps of each window, also those beyond the edges, ``int64`` ``[B, n]``."""
        if placed.ndim == 1:
            return [placed[:, None] + steps for steps in self._steps]
        offsets = placed[:, :1]
        if self._fps_key is None:
            return [offsets + steps for steps in self._steps]
        assert self._timed is not None, "there is a key of the rate"
        rates = np.ascontiguousarray(placed[:, 3]).view(np.float64)
        wanted = [np.repeat(offsets, len(times), axis=1) for _, times in self._timed.times]
        for rate in np.unique(rates).tolist():
            at = rates == rate
            try:
                steps_of = self._steps_at(rate)
            except InvalidArgumentError:  # of a trajectory that was evicted meanwhile
                continue
            for window, steps in zip(wanted, steps_of, strict=True):
                window[at] += steps
        return wanted

    def copy(self, storage: TrajectoryReader, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        arena, starts = storage.arena, rows.starts[:, None]
        first, last = _edges(rows, offsets)
        windows, steps = self._windows_in(arena.schema), self._wanted(offsets)
        values = arena.copy_all_steps(
            [
                (window.number, starts + np.clip(wanted, first, last))
                for window, wanted in zip(windows, steps, strict=True)
            ]
        )
        for window, wanted, value in zip(windows, steps, values, strict=True):
            if window.root is not None:
                # What comes before the first next observation is the first observation.
                before = np.flatnonzero(wanted < first)
                if len(before):
                    at = np.broadcast_to(starts + first, wanted.shape).reshape(-1)[before]
                    arena.replace([value.flatten(0, 1)], before, [arena.copy_steps(window.root, at)])
        if self._timed is not None:
            check_timestamps(storage, rows, steps, (first, last), offsets, self._timed)
        return values if storage.table is None else values + storage.table.copy(rows.ids)

    def build(
        self, storage: TrajectoryReader, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        arena = storage.arena
        schema = arena.schema
        drawn = offsets if offsets.ndim == 1 else offsets[:, 0]
        index, ids, steps_drawn = arena.origin(np.stack([rows.ids, drawn], axis=-1))
        first, last = _edges(rows, offsets)
        windows = self._windows_in(schema)
        of_windows = values[: len(windows)]
        entries: list[tuple[Key, torch.Tensor]] = [((TRAJECTORY, "id"), ids), ((TRAJECTORY, "step"), steps_drawn)]
        entries.append((schema.index_key, index))
        entries += zip([field.key for field in schema.trajectory_fields], values[len(windows) :], strict=True)
        for window, wanted, value in zip(windows, self._wanted(offsets), of_windows, strict=True):
            # A next observation is the observation of the following step, which may be the first.
            earliest = first if window.root is None else first - 1
            entries.append((window.pad_key, arena.tensor((wanted < earliest) | (wanted > last))))
            field = schema.fields[window.number]
            if arena.blobs is not None and field.is_ragged:
                entries.append((lengths_key(window.key), arena.tensor(_lengths(field, value))))
        # Frames are decoded last: what a batch of them takes leaves nothing else in the caches of a processor.
        resolved = arena.resolved_together([window.number for window in windows], of_windows)
        entries += zip([window.key for window in windows], resolved, strict=True)
        keys, tensors = zip(*entries, strict=True)
        return Nest(keys).build(tensors, [len(drawn)])

    def refusal(self, live: Rows) -> ChunkTooLongError:
        longest = int(live.lengths.max(initial=0))
        what = f"{len(live.ids):,} live trajectories"
        if self.sampling_mode == "segment" and longest >= 1 - self.extra:
            longest, what = int(live.longest_segments.max(initial=0)), f"the segments of {what}"
        return ChunkTooLongError(
            f"Got windows that span {1 - self.extra} steps, but the longest of {what} has "
            f"{longest}. Ask for less, pad them (pad='both'), or wait for longer trajectories."
        )


def _lengths(field: StepField, blobs: Any) -> np.ndarray:
    """Return the number of elements of ragged values, ``int64`` ``[B, n]``."""
    return blobs.sizes() // (field.dtype.itemsize * math.prod(field.shape[1:]))


def _edges(rows: Rows, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last step that a window may take values from, both ``int64`` ``[B, 1]``."""
    if offsets.ndim == 1:
        return np.zeros((len(offsets), 1), dtype=np.int64), rows.lengths[:, None] - 1
    return offsets[:, 1:2], offsets[:, 2:3] - 1


def _steps_of(windows: Windows | TimedWindows) -> Windows:
    """Return the steps of windows; none if they depend on the trajectory."""
    if not isinstance(windows, TimedWindows):
        return windows
    return () if isinstance(windows.fps, tuple) else windows.steps_at(windows.fps)


def _pad_key(schema: Schema, key: Key) -> Key:
    """Return where the padding mask of a window is: ``"<key>_is_pad"``, under ``"trajectory"`` if that is stored.

    Raises:
        SchemaMismatchError: when both are stored.
    """
    pad_key = (*key[:-1], f"{key[-1]}_is_pad")
    if pad_key not in schema:
        return pad_key
    aside = (TRAJECTORY, *pad_key)
    if aside in schema:
        raise SchemaMismatchError(
            f"Got a window for {key_name(key)}, but its padding mask can't be named {key_name(pad_key)} nor "
            f"{key_name(aside)}: both are stored. Rename one of them."
        )
    return aside
