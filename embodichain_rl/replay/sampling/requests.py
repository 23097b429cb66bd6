"""Requests: how long a chunk is, at which offsets of a trajectory it may begin, and which keys are copied.

A request does not draw: see :mod:`~embodichain_rl.replay.sampling.draws`. It defines the offsets of a trajectory that
may be drawn, and builds a batch from the drawn offsets:

* :class:`ChunkRequest`: chunks that lie within a trajectory, ``[B, L]``.
* :class:`PaddedRequest`: chunks that may reach beyond its edges, ``[B, L]``, with ``("collector", "mask")``.
* :class:`WindowRequest`: a step, and for each key the requested steps around it, ``[B]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl._checks import checked_float, checked_key
from embodichain_rl.errors import ChunkTooLongError, InvalidArgumentError, NothingToDrawError, SchemaMismatchError
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.schema import MASK, Key, Schema
from embodichain_rl.replay.storage import TrajectoryStorage, chunk_index

__all__ = [
    "PADS",
    "SAMPLING_MODES",
    "ChunkRequest",
    "PaddedRequest",
    "WindowRequest",
    "Windows",
    "checked_windows",
    "make_request",
    "windows_from_timestamps",
]

SAMPLING_MODES = ("episode", "segment", "boundary")
PADS = ("none", "before", "after", "both")

Windows = tuple[tuple[Key, tuple[int, ...]], ...]
"""For each key, the steps to be copied, relative to the drawn step."""

TOLERANCE = 1e-4
"""The largest distance between a timestamp and a step, in seconds, as in LeRobot."""


class ChunkRequest:
    """Chunks of ``length`` consecutive steps that lie within a trajectory.

    In a trajectory of ``T`` steps, ``T + extra`` offsets may be drawn; the first of them is ``first``.

    Args:
        length: the number of steps of a chunk.
        sampling_mode: ``"episode"``: any chunk; ``"segment"``: chunks within one segment; ``"boundary"``: chunks that
            contain a change of segment.
    """

    def __init__(self, length: int, sampling_mode: str = "episode") -> None:
        self.length = length
        self.sampling_mode = sampling_mode
        self.first = 0
        self.extra = 1 - length

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        """Return the shape of a batch."""
        return (batch_size, self.length)

    def check(self, storage: TrajectoryStorage) -> None:
        """Raise an error if this can never be drawn from the storage."""
        if self.sampling_mode != "episode" and storage.arena.segment_left is None:
            raise SchemaMismatchError(
                f"sampling_mode={self.sampling_mode!r} needs segments, but what is stored has no integer 'segment_id' "
                f"of each step: {storage.schema}. The engine's demonstrations write it; else write it with a transform."
            )

    def fits(self, rows: Rows) -> np.ndarray:
        """Return a mask, ``bool`` ``[n]``, of the trajectories that contain such a chunk."""
        fits = rows.lengths >= 1 - self.extra
        if self.sampling_mode == "segment":
            fits &= rows.longest_segments >= self.length
        elif self.sampling_mode == "boundary":
            fits &= rows.longest_segments < rows.lengths
        return fits

    def accepts(self, left: np.ndarray) -> np.ndarray:
        """Return a mask of the offsets at which such a chunk begins, given how many steps of their segment are left."""
        return left >= self.length if self.sampling_mode == "segment" else left < self.length

    def copy(self, storage: TrajectoryStorage, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        """Copy the chunks at the drawn offsets: return one tensor per field."""
        separate_next = not storage.next_views
        values = storage.arena.copy_chunks(rows.starts + offsets, self.length, separate_next=separate_next)
        table = storage.table
        return values if table is None else values + table.copy(rows.ids, self.length)

    def build(
        self, storage: TrajectoryStorage, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        """Build the batch from what was copied."""
        arena = storage.arena
        return arena.schema.build_sample(values, arena.origin(chunk_index(rows.ids, offsets, self.length)))

    def refusal(self, live: Rows) -> ChunkTooLongError | NothingToDrawError:
        """Return the error to raise if none of the live trajectories contains such a chunk."""
        longest = int(live.lengths.max(initial=0))
        if self.sampling_mode == "segment":
            longest = int(live.longest_segments.max(initial=0))
            return ChunkTooLongError(
                f"Got chunk_size {self.length} within one segment, but the longest segment of {len(live.ids):,} live "
                f"trajectories has {longest} steps. Ask for at most {longest} steps, or use sampling_mode='episode'."
            )
        if self.sampling_mode == "boundary" and longest >= self.length:
            return NothingToDrawError(
                f"Got chunk_size {self.length} with a change of segment, but no live trajectory of {len(live.ids):,} "
                "that is so long has one. Use sampling_mode='episode', or wait for other trajectories."
            )
        return ChunkTooLongError(
            f"Got chunk_size {self.length}, but the longest of {len(live.ids):,} live trajectories has {longest} "
            f"steps. Ask for at most {longest} steps, pad the chunks (pad='after'), or wait for longer trajectories."
        )


class PaddedRequest(ChunkRequest):
    """Chunks that may reach beyond the edges of a trajectory by up to ``length - 1`` steps, which repeat the edge step.

    Args:
        length: the number of steps of a chunk.
        pad: the edges that chunks may reach beyond, ``"before"``, ``"after"`` or ``"both"``.
    """

    def __init__(self, length: int, pad: str) -> None:
        super().__init__(length)
        if pad in ("before", "both"):
            self.first, self.extra = self.first - (length - 1), self.extra + (length - 1)
        if pad in ("after", "both"):
            self.extra += length - 1

    def check(self, storage: TrajectoryStorage) -> None:
        if self.length > storage.max_total_steps:
            raise ChunkTooLongError(
                f"Got chunk_size {self.length}, but the buffer holds {storage.max_total_steps} steps at most."
            )

    def copy(self, storage: TrajectoryStorage, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        # Copy whole chunks from within the trajectory, then rearrange those that reach beyond an edge.
        room = np.maximum(rows.lengths - self.length, 0)
        last = storage.ledger.arena_steps - storage.ledger.margin - self.length
        begin = np.minimum(rows.starts + np.clip(offsets, 0, room), last)
        # The next observation of a repeated edge step is not that of the following step: they can't share memory.
        values = storage.arena.copy_chunks(begin, self.length)
        steps = rows.starts[:, None] + self._steps(rows, offsets)
        reaching = np.flatnonzero(steps[:, -1] - steps[:, 0] != self.length - 1)
        if len(reaching):
            storage.arena.rearrange(values, reaching, steps[reaching] - begin[reaching, None])
        return values if storage.table is None else values + storage.table.copy(rows.ids, self.length)

    def build(
        self, storage: TrajectoryStorage, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        arena, steps = storage.arena, self._steps(rows, offsets)
        index = np.stack([np.broadcast_to(rows.ids[:, None], steps.shape), steps], axis=-1)
        data = arena.schema.build_sample(values, arena.origin(index))
        wanted = offsets[:, None] + np.arange(self.length)
        data.set(MASK, arena.tensor(wanted == steps))
        return data

    def _steps(self, rows: Rows, offsets: np.ndarray) -> np.ndarray:
        """Return the step of the trajectory at each position of the chunks, ``int64`` ``[B, L]``."""
        return np.clip(offsets[:, None] + np.arange(self.length), 0, rows.lengths[:, None] - 1)


class WindowRequest(ChunkRequest):
    """A step, and for each key the requested steps around it. No other key of steps is read.

    Args:
        windows: for each key, the steps relative to the drawn one.
        pad: the edges of the trajectory that windows may reach beyond, by repeating the edge step.
    """

    def __init__(self, windows: Windows, pad: str) -> None:
        earliest = min(min(steps) for _, steps in windows)
        latest = max(max(steps) for _, steps in windows)
        super().__init__(max(latest, 0) - min(earliest, 0) + 1)
        self._windows = [(key, np.array(steps)) for key, steps in windows]
        self._last_numbers: tuple[Schema | None, list[int]] = (None, [])
        self.first = 0 if pad in ("before", "both") else max(0, -earliest)
        self.extra = -self.first - (0 if pad in ("after", "both") else max(0, latest))

    def batch_shape(self, batch_size: int) -> tuple[int, ...]:
        return (batch_size,)

    def check(self, storage: TrajectoryStorage) -> None:
        self._numbers_in(storage.arena.schema)

    def _numbers_in(self, schema: Schema) -> list[int]:
        """Return the number of each window's field; refuse windows of keys that are not stored."""
        last_schema, last_numbers = self._last_numbers  # together: another thread may draw from another storage
        if schema is last_schema:
            return last_numbers
        numbers = {key: schema.number_of(key) for key, _ in self._windows}
        missing = [key for key, number in numbers.items() if number is None]
        if missing:
            raise SchemaMismatchError(f"Got windows for {missing}, but what is stored has the keys {schema.keys}.")
        found = [number for number in numbers.values() if number is not None]
        self._last_numbers = schema, found
        return found

    def copy(self, storage: TrajectoryStorage, rows: Rows, offsets: np.ndarray) -> list[torch.Tensor]:
        arena = storage.arena
        values = []
        for number, (_, steps) in zip(self._numbers_in(arena.schema), self._windows, strict=True):
            within = np.clip(offsets[:, None] + steps, 0, rows.lengths[:, None] - 1)
            values.append(arena.copy_steps(number, rows.starts[:, None] + within))
        return values if storage.table is None else values + storage.table.copy(rows.ids)

    def build(
        self, storage: TrajectoryStorage, values: Sequence[torch.Tensor], rows: Rows, offsets: np.ndarray
    ) -> TensorDict:
        arena = storage.arena
        index, ids, steps_drawn = arena.origin(np.stack([rows.ids, offsets], axis=-1))
        data = TensorDict({"index": index, "trajectory": {"id": ids, "step": steps_drawn}}, [len(offsets)])
        of_trajectory = arena.schema.trajectory_fields
        for field, value in zip(of_trajectory, values[len(self._windows) :], strict=True):
            data.set(field.key, value)
        for (key, steps), value in zip(self._windows, values, strict=False):
            wanted = offsets[:, None] + steps
            data.set(key, value)
            is_pad = (wanted < 0) | (wanted >= rows.lengths[:, None])
            data.set((*key[:-1], f"{key[-1]}_is_pad"), arena.tensor(is_pad))
        return data

    def refusal(self, live: Rows) -> ChunkTooLongError:
        longest = int(live.lengths.max(initial=0))
        return ChunkTooLongError(
            f"Got windows that span {1 - self.extra} steps, but the longest of {len(live.ids):,} live trajectories has "
            f"{longest}. Ask for less, pad them (pad='both'), or wait for longer trajectories."
        )


def make_request(
    length: int | None, *, sampling_mode: str = "episode", pad: str = "none", windows: Windows | None = None
) -> ChunkRequest:
    """Return the request for these options.

    Args:
        length: the number of steps of a chunk; None with windows.
        sampling_mode: one of ``SAMPLING_MODES``.
        pad: one of ``PADS``.
        windows: see :func:`checked_windows`.

    Raises:
        InvalidArgumentError: when the options can't be combined.
    """
    if sampling_mode not in SAMPLING_MODES:
        raise InvalidArgumentError(f"Got sampling_mode={sampling_mode!r}; it must be one of {SAMPLING_MODES}.")
    if pad not in PADS:
        raise InvalidArgumentError(f"Got pad={pad!r}; it must be one of {PADS}.")
    if sampling_mode != "episode" and (pad != "none" or windows is not None):
        raise InvalidArgumentError(
            f"Got sampling_mode={sampling_mode!r} with {'windows' if windows is not None else f'pad={pad!r}'}: they go "
            "with sampling_mode='episode' only."
        )
    if windows is not None:
        if length is not None:
            raise InvalidArgumentError(
                "Got a chunk_size and windows: windows say of each key how many steps there are."
            )
        return WindowRequest(windows, pad)
    if length is None:
        raise InvalidArgumentError("Give chunk_size, the steps of a chunk, or windows.")
    if sampling_mode == "boundary" and length < 2:
        raise InvalidArgumentError(f"Got chunk_size {length}; a chunk with a change of segment has at least 2 steps.")
    return ChunkRequest(length, sampling_mode) if pad == "none" else PaddedRequest(length, pad)


LONGEST_WINDOW = 1_000_000
"""The number of steps of the longest window that is accepted; a longer one can only be a mistake."""


def checked_windows(windows: Any) -> Windows:
    """Return the steps of each window.

    Args:
        windows: a mapping from keys to the first and the last step, relative to the drawn step.

    Raises:
        InvalidArgumentError: when they are something else.

    Example:
        >>> checked_windows({"observation": (-1, 0), ("next", "reward"): (0, 2)})
        ((('observation',), (-1, 0)), (('next', 'reward'), (0, 1, 2)))
    """
    if not isinstance(windows, Mapping) or not windows:
        raise InvalidArgumentError(f"Got windows={windows!r}; it must be a mapping from keys to (first, last) steps.")
    checked = []
    for name, window in windows.items():
        key = checked_key(name)
        try:
            first, last = (_integer(step) for step in window)
        except (TypeError, ValueError):
            raise InvalidArgumentError(f"Got the window {window!r} for {name!r}; needed is (first, last).") from None
        if last - first >= LONGEST_WINDOW:
            raise InvalidArgumentError(
                f"Got the window {window!r} for {name!r}; it can have {LONGEST_WINDOW:,} steps at most."
            )
        if first > last:
            raise InvalidArgumentError(f"Got the window {window!r} for {name!r}, whose last step is before its first.")
        checked.append((key, tuple(range(first, last + 1))))
    return tuple(checked)


def windows_from_timestamps(delta_timestamps: Any, fps: float) -> Windows:
    """Return the steps at given times relative to the drawn step, in LeRobot's format.

    Args:
        delta_timestamps: a mapping from keys to lists of times in seconds.
        fps: the number of steps per second.

    Raises:
        InvalidArgumentError: when a time is not that of a step, within 0.1 ms.

    Example:
        >>> windows_from_timestamps({"observation": [-0.2, 0.0], "action": [0.0, 0.1]}, fps=10)
        ((('observation',), (-2, 0)), (('action',), (0, 1)))
    """
    fps = checked_float("fps", fps, minimum=1e-9)
    if not isinstance(delta_timestamps, Mapping) or not delta_timestamps:
        raise InvalidArgumentError(f"Got delta_timestamps={delta_timestamps!r}; it must map keys to lists of seconds.")
    checked = []
    for name, seconds in delta_timestamps.items():
        try:
            times = np.asarray(seconds, dtype=np.float64)
        except (TypeError, ValueError):
            times = np.empty(0)
        if times.ndim != 1 or not len(times) or not np.isfinite(times).all():
            raise InvalidArgumentError(f"Got the times {seconds!r} for {name!r}; needed is a list of seconds.")
        steps = np.round(times * fps).astype(np.int64)
        off = np.abs(steps / fps - times) > TOLERANCE
        if off.any():
            raise InvalidArgumentError(
                f"Got the times {times[off].tolist()} for {name!r}, which lie between the steps at fps={fps:g}. Give "
                "multiples of 1 / fps."
            )
        checked.append((checked_key(name), tuple(steps.tolist())))
    return tuple(checked)


def _integer(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError
    return int(value)
