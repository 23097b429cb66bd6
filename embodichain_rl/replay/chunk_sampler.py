"""Which chunks: draws trajectories and starts from the ledger."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict
from torchrl.data.replay_buffers.samplers import Sampler

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    TrajectoryEvictedError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.chunk_request import ChunkRequest, checked_windows, make_request, windows_from_timestamps
from embodichain_rl.replay.ledger import Ledger, Rows
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.windows import chunk_index, places_from_uniform

__all__ = ["ChunkSampler"]

REJECTION_ROUNDS = 3
"""How often draws that hit a trajectory shorter than the chunk are repeated before the ledger is scanned once."""

REDRAW_ROUNDS = 100
"""How often chunks are drawn again whose trajectory was evicted while it was read."""

SEGMENT_ROUNDS = 4
"""How often places that are not where segments allow are drawn again before those of a trajectory are listed."""

MAX_REQUESTS = 128
"""For how many chunk sizes the request is kept."""


class ChunkSampler(Sampler):
    """A TorchRL sampler of chunks: ``L`` consecutive steps of one trajectory, ``[batch_size, L]`` a batch.

    A trajectory is drawn uniformly among the live ones with at least ``L`` steps, then a start uniformly among its
    ``T - L + 1`` valid ones. The work does not depend on how much the buffer holds: trajectories are drawn and kept if
    they are long enough, and only where most are too short is the ledger scanned.

    Random numbers come from the buffer's ``generator``, or from torch's global one as in TorchRL's samplers.

    Args:
        chunk_size: the length ``L`` in steps; or a picklable callable without arguments that returns it, asked once a
            batch, as a :class:`~embodichain_rl.datasets.sampler.ChunkSizeSampler` is. None with windows.

    Keyword Args:
        sampling_mode: ``"episode"``: any chunk; ``"segment"``: chunks within one segment; ``"boundary"``: chunks with a
            change of segment in them. Segments are runs of steps with the same integer ``"segment_id"``. A trajectory
            is drawn uniformly among those that have such a chunk, then the chunk uniformly among its own.
        pad: ``"before"``, ``"after"`` or ``"both"``: chunks may reach beyond that edge of the trajectory, by up to
            ``L - 1`` steps, which repeat the edge step. So the first and last steps are seen as often as those in the
            middle, and trajectories shorter than ``L`` are used. ``("collector", "mask")``, ``bool``
            ``[batch_size, L]``, is then always there: True = real. ``"none"``, the default: chunks lie within.
        windows: of each key that is wanted, the first and the last step relative to a drawn one, such as
            ``{"observation": (-1, 0), "action": (0, 15)}``. Nothing else is read. The batch is ``[batch_size]``; a key
            is ``[batch_size, last - first + 1, *feature]``, with ``"<key>_is_pad"`` (True = padding) beside it.
        delta_timestamps: the same in LeRobot's way: of each key a list of times in seconds; needs ``fps``.
        fps: steps a second, for ``delta_timestamps``.

    Raises:
        InvalidArgumentError: in the constructor, for arguments that can't work, or not together.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory, or segment, has ``L`` steps.
        NothingToDrawError: by ``sample``, when no live trajectory has a change of segment.
        SchemaMismatchError: by ``sample``, when a key of the windows, or ``"segment_id"``, is not stored.

    Example:
        >>> rb = TensorDictReplayBuffer(
        ...     storage=TrajectoryStorage(max_trajectories=100, max_total_steps=30_000),
        ...     writer=TrajectoryWriter(), sampler=ChunkSampler(16), batch_size=32,
        ... )
    """

    def __init__(
        self,
        chunk_size: int | Callable[[], int] | None = None,
        *,
        sampling_mode: str = "episode",
        pad: str = "none",
        windows: Mapping[NestedKey, tuple[int, int]] | None = None,
        delta_timestamps: Mapping[NestedKey, Sequence[float]] | None = None,
        fps: float | None = None,
    ) -> None:
        if chunk_size is not None and not callable(chunk_size):
            chunk_size = checked_int("chunk_size", chunk_size, minimum=1)
        if windows is not None and delta_timestamps is not None:
            raise InvalidArgumentError("Got windows and delta_timestamps, which say the same; give one of them.")
        if (delta_timestamps is None) != (fps is None):
            raise InvalidArgumentError("delta_timestamps and fps, steps a second, go together.")
        self.chunk_size = chunk_size
        self.sampling_mode = sampling_mode
        self.pad = pad
        self._windows = None if windows is None else checked_windows(windows)
        if delta_timestamps is not None and fps is not None:
            self._windows = windows_from_timestamps(delta_timestamps, fps)
        self._requests: dict[int | None, ChunkRequest] = {}
        self._redrawn = self._unfit = 0
        if callable(chunk_size):
            make_request(2, sampling_mode=sampling_mode, pad=pad, windows=self._windows)
        else:
            self.request(chunk_size)

    def next_length(self) -> int | None:
        """Returns the length of the next batch's chunks, asking ``chunk_size`` if it is a callable; None with windows.

        Raises:
            InvalidArgumentError: when the callable does not return an int of at least 1.
        """
        if not callable(self.chunk_size):
            return self.chunk_size
        return checked_int(f"the return value of chunk_size={self.chunk_size!r}", self.chunk_size(), minimum=1)

    @property
    def redrawn(self) -> int:
        """How many chunks this process drew again because their trajectory was evicted while it was read."""
        return self._redrawn

    @property
    def unfit(self) -> int:
        """How many of this process's draws hit a trajectory without what was asked for, one that is too short say."""
        return self._unfit

    def request(self, length: int | None) -> ChunkRequest:
        """Returns what is drawn when chunks are ``length`` steps long; None with windows."""
        request = self._requests.get(length)
        if request is None:
            while len(self._requests) >= MAX_REQUESTS:
                del self._requests[next(iter(self._requests))]
            request = make_request(length, sampling_mode=self.sampling_mode, pad=self.pad, windows=self._windows)
            self._requests[length] = request
        return request

    def sample_chunks(
        self,
        storage: TrajectoryStorage,
        batch_size: int,
        request: ChunkRequest,
        generator: torch.Generator | None = None,
    ) -> TensorDict:
        """Draws and copies a batch, without a lock; what is evicted meanwhile is drawn again.

        Args:
            storage: where to draw from.
            batch_size: how many chunks.
            request: what is drawn; see :meth:`request`.
            generator: for the draws; by default the buffer's.

        Returns:
            The chunks, ``[batch_size, length]``, with ``"index"`` ``[batch_size, length, 2]``: trajectory id and step;
            with windows ``[batch_size]``.
        """
        ledger = storage.ledger
        generator = generator or self._rng
        rows, places = self._draw(storage, batch_size, request, generator)
        values = request.copy(storage, rows, places)
        for _ in range(REDRAW_ROUNDS):
            valid = ledger.still_valid(rows.ids)
            if np.count_nonzero(valid) == batch_size:
                return request.build(storage, values, rows, places)
            torn = np.flatnonzero(~valid)
            self._redrawn += len(torn)
            new_rows, new_places = self._draw(storage, len(torn), request, generator)
            for value, new in zip(values, request.copy(storage, new_rows, new_places), strict=True):
                value[torch.from_numpy(torn)] = new
            rows = Rows(*(_replaced(old, torn, new) for old, new in zip(rows, new_rows, strict=True)))
            places = _replaced(places, torn, new_places)
        raise TrajectoryEvictedError(
            f"In {REDRAW_ROUNDS} rounds some of {batch_size} chunks were always evicted while they were read: the "
            f"buffer of {storage.max_size:,} trajectories turns over faster than a batch is copied. Make it larger, or "
            "sample smaller batches."
        )

    def _draw(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> tuple[Rows, np.ndarray]:
        """``count`` rows of trajectories that have what is asked for, and a place in each."""
        rows, uniforms = self._draw_rows(storage, count, request, generator)
        if request.sampling_mode == "episode":
            return rows, places_from_uniform(uniforms, rows.lengths + request.extra, request.first)
        left = storage.arena.segment_left
        assert left is not None, "checked before"
        return rows, _places_in_segments(rows, uniforms, left, request, generator)

    def _draw_rows(
        self, storage: TrajectoryStorage, count: int, request: ChunkRequest, generator: torch.Generator | None
    ) -> tuple[Rows, np.ndarray]:
        """``count`` rows of trajectories that have what is asked for, and a uniform number for each."""
        ledger = storage.ledger
        parts: list[Rows] = []
        uniforms: list[np.ndarray] = []
        missing = count
        for _ in range(REJECTION_ROUNDS):
            oldest, end = ledger.live_range()
            if end == oldest:
                raise EmptyBufferError(
                    "Cannot sample from an empty storage: no trajectory is finished yet. Wait until len(rb) > 0."
                )
            request.check(storage)
            # One random number says both: its whole part which trajectory, the rest where in it.
            place = torch.rand(missing, dtype=torch.float64, generator=generator).numpy() * (end - oldest)
            which = place.astype(np.int64)
            uniform = place - which
            rows = ledger.rows_of(which + oldest)
            fits = request.fits(rows)
            fitting = int(np.count_nonzero(fits))
            if fitting == count:
                return rows, uniform
            parts.append(rows.select(fits))
            uniforms.append(uniform[fits])
            self._unfit += missing - fitting
            missing -= fitting
            if not missing:
                break
        else:
            parts.append(self._scan(ledger, missing, request, generator))
            uniforms.append(torch.rand(missing, dtype=torch.float64, generator=generator).numpy())
        rows = Rows(*map(np.concatenate, zip(*parts, strict=True)))
        return rows, np.concatenate(uniforms)

    def _scan(self, ledger: Ledger, count: int, request: ChunkRequest, generator: torch.Generator | None) -> Rows:
        live = ledger.live_rows()
        fitting = np.flatnonzero(request.fits(live))
        if not len(fitting):
            raise request.refusal(live)
        uniform = torch.rand(count, dtype=torch.float64, generator=generator).numpy()
        return live.select(fitting[(uniform * len(fitting)).astype(np.int64)])

    def sample(
        self, storage: TrajectoryStorage, batch_size: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Draws a batch for a plain TorchRL buffer: trajectory ids and steps, each ``[batch_size, L]``.

        The buffer reads them with ``storage.get`` afterwards. A plain buffer keeps its own lock meanwhile, or, where
        that is not shared, may find that a trajectory is gone (``TrajectoryEvictedError``).
        """
        _check_storage(storage)
        if self.pad != "none" or self._windows is not None:
            raise UnsupportedOperationError(
                "A plain TorchRL buffer reads whole steps by their index, without padding or windows. Use a "
                "TrajectoryReplayBuffer."
            )
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        request = self.request(self.next_length())
        rows, places = self._draw(storage, batch_size, request, self._rng)
        index = torch.from_numpy(chunk_index(rows.ids, places, request.length))
        return (index[..., 0], index[..., 1]), {}

    def _empty(self) -> None:
        """Does nothing: what can be drawn is in the ledger."""

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: draws are a function of the generator and of what the buffer holds."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def dumps(self, path: str | Path) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def loads(self, path: str | Path) -> None:
        """Does nothing: see :meth:`state_dict`."""

    def __repr__(self) -> str:
        options = [f"sampling_mode={self.sampling_mode!r}"] if self.sampling_mode != "episode" else []
        options += [f"pad={self.pad!r}"] if self.pad != "none" else []
        options += [f"windows={dict(self._windows)}"] if self._windows is not None else []
        return f"ChunkSampler({', '.join([f'chunk_size={self.chunk_size!r}', *options])})"


def _places_in_segments(
    rows: Rows, uniform: np.ndarray, left: np.ndarray, request: ChunkRequest, generator: torch.Generator | None
) -> np.ndarray:
    """A place in each trajectory, uniform among those where a chunk begins that the request accepts."""
    counts = rows.lengths + request.extra
    places = places_from_uniform(uniform, counts, request.first)
    missing = np.arange(len(places))
    for _ in range(SEGMENT_ROUNDS):
        missing = missing[~request.accepts(left[rows.starts[missing] + places[missing]])]
        if not len(missing):
            return places
        uniform = torch.rand(len(missing), dtype=torch.float64, generator=generator).numpy()
        places[missing] = places_from_uniform(uniform, counts[missing], request.first)
    for row, number in zip(missing.tolist(), uniform.tolist(), strict=True):
        start = rows.starts[row] + request.first
        accepted = np.flatnonzero(request.accepts(left[start : start + counts[row]]))
        # There are some, unless the trajectory was just evicted; then its row tells so after the copy.
        if len(accepted):
            places[row] = accepted[int(number * len(accepted))] + request.first
    return places


def _replaced(old: np.ndarray, at: np.ndarray, new: np.ndarray) -> np.ndarray:
    replaced = old.copy()
    replaced[at] = new
    return replaced


def _check_storage(storage: object) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(
            f"Got a {type(storage).__name__}; a ChunkSampler draws from a TrajectoryStorage. For other storages use "
            "TorchRL's SliceSampler."
        )
