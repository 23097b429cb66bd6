"""Which chunks: draws trajectories and places in them, and copies what is there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from tensordict import NestedKey, TensorDict
from torchrl.data.replay_buffers.samplers import Sampler

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    TrajectoryEvictedError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.draws import ChunkQuery, PriorityDraws, RecencyDraws, StepDraws, TrajectoryDraws
from embodichain_rl.replay.sampling.group_draws import GroupDraws
from embodichain_rl.replay.sampling.offsets import offsets_from_uniform, offsets_in_segments
from embodichain_rl.replay.sampling.one_pass import OnePassDraws
from embodichain_rl.replay.sampling.requests import checked_windows, make_request, windows_from_timestamps
from embodichain_rl.replay.sampling.weights import ByGroup, ByPriority, ByRecency, Weights, checked_weights
from embodichain_rl.replay.schema import as_array
from embodichain_rl.replay.storage import TrajectoryStorage, chunk_index

__all__ = ["ChunkSampler", "SamplingOptions"]

REDRAW_ROUNDS = 100
"""How often chunks are drawn again whose trajectory was evicted while it was read."""

PRIORITY_WEIGHT = "priority_weight"
"""Where a batch has its importance weights; TorchRL's name."""

MAX_QUERIES = 128
"""Chunk sizes whose query is kept."""


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of :class:`ChunkSampler`, but for the ``sampling_mode``, for whoever hands them on."""

    pad: str
    windows: Mapping[NestedKey, tuple[int, int]] | None
    delta_timestamps: Mapping[NestedKey, Sequence[float]] | None
    fps: float | None
    weights: Weights
    replacement: bool
    max_age: float | None
    max_policy_lag: int | None


class _TakesReplacement(type(Sampler)):  # type: ignore[misc]
    """TorchRL's samplers take ``replacement`` out of the arguments, to make one of another class of its own."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        return type.__call__(cls, *args, **kwargs)


class ChunkSampler(Sampler, metaclass=_TakesReplacement):
    """A TorchRL sampler of chunks: ``L`` consecutive steps of one trajectory, ``[batch_size, L]`` a batch.

    A trajectory is drawn uniformly among the live ones with at least ``L`` steps, or as ``weights`` say, then a start
    uniformly among its ``T - L + 1`` valid ones. The work does not depend on how much the buffer holds: trajectories
    are drawn and kept if they are long enough, and only where most are too short is the ledger scanned.

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
        weights: ``"uniform"``; ``"steps"``: trajectories in proportion to how many chunks they have, so that every
            chunk of the buffer is as likely as any other; :class:`ByRecency`, :class:`ByGroup` or :class:`ByPriority`.
        replacement: False: every chunk of the trajectories that are live when a pass begins is drawn once, in random
            order; then the next pass begins. That is what an epoch is over a stream: chunks whose trajectory is evicted
            before their turn are skipped, trajectories that come meanwhile are part of the next pass. Every process
            goes through passes of its own (the workers of a ``DataLoader`` share the trajectories out among them).
            Needs ``weights="uniform"`` and a ``chunk_size`` that does not change.
        max_age: only trajectories that were written at most so many seconds ago.
        max_policy_lag: only trajectories that were made with the newest policy version of any trajectory or one of so
            many before (see :class:`TrajectoryWriter`).

    Raises:
        InvalidArgumentError: in the constructor, for arguments that can't work, or not together.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory, or segment, has ``L`` steps.
        NothingToDrawError: by ``sample``, when no live trajectory has a change of segment, is young enough, or is of a
            group of the mixture.
        SchemaMismatchError: by ``sample``, when a key of the windows or of the groups, or ``"segment_id"``, is not
            stored.

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
        weights: Weights = "uniform",
        replacement: bool = True,
        max_age: float | None = None,
        max_policy_lag: int | None = None,
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
        self.weights = checked_weights(weights)
        self.replacement = replacement
        self.max_age = None if max_age is None else checked_float("max_age", max_age, minimum=0.0)
        self.max_policy_lag = (
            None if max_policy_lag is None else checked_int("max_policy_lag", max_policy_lag, minimum=0)
        )
        self._draws = self._make_draws()
        self._queries: dict[int | None, ChunkQuery] = {}
        self._redrawn = 0
        self.query(2 if callable(chunk_size) else chunk_size)

    def _make_draws(self, share: tuple[int, int] = (0, 1)) -> TrajectoryDraws:
        limits = self.max_age, self.max_policy_lag
        if not isinstance(self.replacement, bool):
            raise InvalidArgumentError(f"Got replacement={self.replacement!r}; it must be True or False.")
        if not self.replacement:
            if self.weights != "uniform" or callable(self.chunk_size):
                raise InvalidArgumentError(
                    f"Got replacement=False with weights={self.weights!r} and chunk_size={self.chunk_size!r}: a pass "
                    "over all chunks needs weights='uniform' and chunks of one size."
                )
            return OnePassDraws(*limits, share=share)
        if isinstance(self.weights, ByGroup):
            return GroupDraws(self.weights, *limits)
        if isinstance(self.weights, ByPriority):
            return PriorityDraws(self.weights, *limits)
        if isinstance(self.weights, ByRecency):
            return RecencyDraws(self.weights, *limits)
        return StepDraws(*limits) if self.weights == "steps" else TrajectoryDraws(*limits)

    def next_length(self) -> int | None:
        """Returns the length of the next batch's chunks, asking ``chunk_size`` if it is a callable; None with windows.

        Raises:
            InvalidArgumentError: when the callable does not return an int of at least 1.
        """
        if not callable(self.chunk_size):
            return self.chunk_size
        return checked_int(f"the return value of chunk_size={self.chunk_size!r}", self.chunk_size(), minimum=1)

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with besides the ``chunk_size``, by name, as far as it is not the default."""
        options = {
            "sampling_mode": (self.sampling_mode, "episode"),
            "pad": (self.pad, "none"),
            "windows": (None if self._windows is None else dict(self._windows), None),
            "weights": (self.weights, "uniform"),
            "replacement": (self.replacement, True),
            "max_age": (self.max_age, None),
            "max_policy_lag": (self.max_policy_lag, None),
        }
        return {name: value for name, (value, default) in options.items() if value != default}

    def refuse_to_resume(self) -> None:
        """Raises that draws can't be gone on with elsewhere, where that is so.

        Raises:
            UnsupportedOperationError: without replacement.
        """
        if not self.replacement:
            raise UnsupportedOperationError(
                "A pass without replacement is over what was live when it began, in this process, and can't be gone on "
                "with in another. Draw with replacement, or use a DataLoader that asks for no state."
            )

    def for_worker(self, worker: int, num_workers: int) -> ChunkSampler:
        """Returns the sampler for one of several workers that share out what is drawn without replacement."""
        if self.replacement:
            return self
        sampler = copy.copy(self)
        sampler._queries = {}
        sampler._draws = sampler._make_draws((worker, num_workers))
        return sampler

    @property
    def redrawn(self) -> int:
        """How many chunks this process drew again because their trajectory was evicted while it was read."""
        return self._redrawn

    def stats(self) -> dict[str, Any]:
        """Returns what this process has counted, by name: ``redrawn``, and what the draws count."""
        return {"redrawn": self._redrawn, **self._draws.stats()}

    def query(self, length: int | None) -> ChunkQuery:
        """Return what is drawn when chunks are ``length`` steps long; None with windows."""
        query = self._queries.get(length)
        if query is None:
            while len(self._queries) >= MAX_QUERIES:
                del self._queries[next(iter(self._queries))]
            request = make_request(length, sampling_mode=self.sampling_mode, pad=self.pad, windows=self._windows)
            query = self._queries[length] = ChunkQuery(request, self._draws)
        return query

    def sample_chunks(
        self,
        storage: TrajectoryStorage,
        batch_size: int,
        query: ChunkQuery,
        generator: torch.Generator | None = None,
    ) -> TensorDict:
        """Draws and copies a batch, without a lock; what is evicted meanwhile is drawn again.

        Args:
            storage: where to draw from.
            batch_size: how many chunks.
            query: what is drawn; see :meth:`query`.
            generator: for the draws; by default the buffer's.

        Returns:
            The chunks, ``[batch_size, length]``, with ``"index"`` ``[batch_size, length, 2]``: trajectory id and step;
            with windows ``[batch_size]``.
        """
        ledger, request = storage.ledger, query.request
        generator = generator or self._rng
        rows, offsets = self._draw(storage, batch_size, query, generator)
        values = request.copy(storage, rows, offsets)
        for _ in range(REDRAW_ROUNDS):
            valid = ledger.still_valid(rows.ids)
            if np.count_nonzero(valid) == batch_size:
                return self._build(storage, query, values, rows, offsets)
            torn = np.flatnonzero(~valid)
            self._redrawn += len(torn)
            new_rows, new_offsets = self._draw(storage, len(torn), query, generator)
            storage.arena.replace(values, torn, request.copy(storage, new_rows, new_offsets))
            rows = rows.replace(torn, new_rows)
            offsets[torn] = new_offsets
        raise TrajectoryEvictedError(
            f"In {REDRAW_ROUNDS} rounds some of {batch_size} chunks were always evicted while they were read: the "
            f"buffer of {storage.max_size:,} trajectories turns over faster than a batch is copied. Make it larger, or "
            "sample smaller batches."
        )

    @staticmethod
    def _build(
        storage: TrajectoryStorage,
        query: ChunkQuery,
        values: Sequence[torch.Tensor],
        rows: Rows,
        offsets: np.ndarray,
    ) -> TensorDict:
        data = query.request.build(storage, values, rows, offsets)
        importance = query.draws.importance(storage, rows)
        if importance is not None:
            weights = storage.arena.tensor(importance)
            data.set(PRIORITY_WEIGHT, weights if data.ndim == 1 else weights[:, None].repeat(1, data.shape[1]))
        return data

    def _draw(
        self, storage: TrajectoryStorage, count: int, query: ChunkQuery, generator: torch.Generator | None
    ) -> tuple[Rows, np.ndarray]:
        """Draw ``count`` rows of trajectories that fit the request, and an offset in each."""
        request = query.request
        try:
            drawn = query.draws.draw(storage, count, request, generator)
        except EmptyBufferError:
            storage.check_readable()  # it may be that nothing will ever come
            raise
        rows = drawn.rows
        if request.sampling_mode == "episode":
            return rows, offsets_from_uniform(drawn.uniform, rows.lengths + request.extra, request.first)
        left = storage.arena.segment_left
        assert left is not None, "checked before"
        return rows, offsets_in_segments(rows, drawn.uniform, left, request, generator)

    @graph_break
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
        query = self.query(self.next_length())
        rows, offsets = self._draw(storage, batch_size, query, self._rng)
        index = torch.from_numpy(chunk_index(rows.ids, offsets, query.request.length))
        return (index[..., 0], index[..., 1]), {}

    @graph_break
    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Sets the priorities of trajectories; what is gone meanwhile is left out.

        Args:
            index: trajectory ids, of any shape; one that comes several times gets its largest priority.
            priority: as many numbers, not negative; or one for all.
            storage: where the trajectories are.

        Raises:
            InvalidArgumentError: for priorities that are negative, NaN or infinite, or not as many as ids.
            UnsupportedOperationError: when the weights are not :class:`ByPriority`.
        """
        if not isinstance(self.weights, ByPriority):
            raise UnsupportedOperationError(
                f"Got priorities for {self!r}, which does not draw by them. Give the buffer a "
                "ChunkSampler(..., weights=ByPriority()), by its constructor or rb.set_sampler."
            )
        _check_storage(storage)
        try:
            ids = np.asarray(as_array(index) if isinstance(index, torch.Tensor) else index, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError):
            raise InvalidArgumentError(f"Got index={index!r}; needed are trajectory ids, integers.") from None
        given = torch.as_tensor(priority).detach().cpu().double().numpy().reshape(-1)
        if len(given) not in (1, len(ids)):
            raise InvalidArgumentError(f"Got {len(given)} priorities for {len(ids)} trajectory ids.")
        if not np.isfinite(given).all() or (given < 0.0).any():
            raise InvalidArgumentError(f"Got the priorities {given}; they must be finite, and not negative.")
        unique, of_unique = np.unique(ids, return_inverse=True)
        highest = np.zeros(len(unique))
        np.maximum.at(highest, of_unique, given)
        storage.ledger.prioritize(unique, (highest + self.weights.eps) ** self.weights.alpha)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_queries"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._queries = {}

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
        options = [f"{name}={value!r}" for name, value in self.options.items()]
        return f"ChunkSampler({', '.join([f'chunk_size={self.chunk_size!r}', *options])})"


def _check_storage(storage: object) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(
            f"Got a {type(storage).__name__}; a ChunkSampler draws from a TrajectoryStorage. For other storages use "
            "TorchRL's SliceSampler."
        )
