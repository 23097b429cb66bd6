"""The drawer: draws trajectories and offsets, and copies the chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
)
from embodichain_rl.replay.kernels import PlainChunks
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.chunk_starts import mark_starts
from embodichain_rl.replay.sampling.draws import ChunkQuery, GroupDraws, Limits
from embodichain_rl.replay.sampling.names import refuse_stored
from embodichain_rl.replay.sampling.one_call import REDRAW_ROUNDS, evicted_while_read, sample_in_one_call
from embodichain_rl.replay.sampling.options import check_replacement, make_draws, option_name
from embodichain_rl.replay.sampling.passes import Deal, DealtDraws, PassEndedError, PassPosition, without_lost
from embodichain_rl.replay.sampling.random_streams import RandomSource, RandomStreams, part_of
from embodichain_rl.replay.sampling.requests import (
    TOLERANCE,
    RequestOptions,
    TimedWindows,
    Windows,
    checked_delta_timestamps,
    checked_windows,
)
from embodichain_rl.replay.sampling.sampled_ages import AgesByStorage
from embodichain_rl.replay.sampling.single_steps import squeezed
from embodichain_rl.replay.sampling.subsets import Subset, checked_subset
from embodichain_rl.replay.sampling.weights import Weights, checked_weights
from embodichain_rl.replay.storage import TrajectoryReader

__all__ = ["PRIORITY_WEIGHT", "ChunkDrawer", "drawer_like"]

PRIORITY_WEIGHT = "priority_weight"
"""The key of the importance weights of a batch; TorchRL's name."""

MAX_QUERIES = 128
"""The number of chunk sizes whose query is cached."""


class ChunkDrawer:
    """Draws chunks of a storage and copies them, in any process, without TorchRL.

    :class:`ChunkSampler` is one, and a sampler of TorchRL besides; its arguments are described there. The workers of a
    ``DataLoader`` have plain ones.
    """

    def __init__(
        self,
        chunk_size: int | Callable[[], int] | None = None,
        *,
        sampling_mode: str = "episode",
        pad: str = "none",
        pad_before: int | None = None,
        pad_after: int | None = None,
        windows: Mapping[NestedKey, tuple[int, int] | Sequence[int]] | None = None,
        delta_timestamps: Mapping[NestedKey, Sequence[float]] | None = None,
        fps: float | NestedKey | None = None,
        tolerance_s: float | None = None,
        stride: int = 1,
        drop_n_first_frames: int = 0,
        drop_n_last_frames: int = 0,
        strict_length: bool = True,
        init_key: NestedKey | None = None,
        squeeze: bool = False,
        weights: Weights = "uniform",
        replacement: bool = True,
        max_age: float | None = None,
        max_policy_lag: int | None = None,
        subset: Subset = None,
    ) -> None:
        if chunk_size is not None and not callable(chunk_size):
            chunk_size = checked_int("chunk_size", chunk_size, minimum=1)
        if windows is not None and delta_timestamps is not None:
            raise InvalidArgumentError("Got windows and delta_timestamps, which say the same; give one of them.")
        if (delta_timestamps is None) != (fps is None):
            raise InvalidArgumentError(
                "delta_timestamps and fps, steps a second, go together. If trajectories have different ones, store it "
                "with each and give its key: fps=('trajectory', 'fps')."
            )
        if tolerance_s is not None and delta_timestamps is None:
            raise InvalidArgumentError(
                f"Got tolerance_s={tolerance_s!r} without delta_timestamps, which it belongs to."
            )
        self.chunk_size = chunk_size
        self.sampling_mode = sampling_mode
        self.pad = pad
        asked: Windows | TimedWindows | None = None if windows is None else checked_windows(windows)
        if delta_timestamps is not None:
            asked = checked_delta_timestamps(delta_timestamps, fps, tolerance_s)
        self._options = RequestOptions.checked(
            sampling_mode=sampling_mode,
            pad=pad,
            pad_before=pad_before,
            pad_after=pad_after,
            windows=asked,
            stride=stride,
            drop_n_first_frames=drop_n_first_frames,
            drop_n_last_frames=drop_n_last_frames,
            strict_length=strict_length,
            init_key=init_key,
            squeeze=squeeze,
        )
        self.weights = checked_weights(weights)
        self.replacement = replacement
        self.max_age = None if max_age is None else checked_float("max_age", max_age, minimum=0.0)
        self.max_policy_lag = (
            None if max_policy_lag is None else checked_int("max_policy_lag", max_policy_lag, minimum=0)
        )
        self.subset = checked_subset(subset)
        check_replacement(replacement, self.weights, chunk_size)
        self._start_anew()
        request = self.query(2 if callable(chunk_size) else chunk_size).request
        self._draws.check(request)
        if request.overlapping and not replacement:
            raise InvalidArgumentError(
                "Got replacement=False with chunks that are padded at both edges of a segment by all steps but one: an "
                "offset may belong to two segments. Let pad_before + pad_after be below chunk_size."
            )

    _rng: torch.Generator | None = None
    _dealt: tuple[Deal, PassPosition | None] | None = None

    def _start_anew(self) -> None:
        """Forget what was drawn and counted."""
        limits = Limits(self.max_age, self.max_policy_lag, self.subset)
        self._draws = make_draws(self.weights, self.replacement, limits, self._dealt)
        self._queries: dict[int | None, ChunkQuery] = {}
        self._ages = AgesByStorage()

    def next_length(self) -> int | None:
        """Return the length of the next batch's chunks, from ``chunk_size`` if it is a callable; None with windows.

        Raises:
            InvalidArgumentError: when the callable does not return an int of at least 1.
        """
        if not callable(self.chunk_size):
            return self.chunk_size
        return checked_int(f"the return value of chunk_size={self.chunk_size!r}", self.chunk_size(), minimum=1)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the constructor, by name, that differ from the default."""
        asked = self._options.windows
        timed = asked if isinstance(asked, TimedWindows) else None
        windows = None if asked is None or isinstance(asked, TimedWindows) else asked
        options: dict[str, tuple[Any, Any]] = {
            "sampling_mode": (self.sampling_mode, "episode"),
            "pad": (self.pad, "none"),
            "pad_before": (self._options.pad_before, None),
            "pad_after": (self._options.pad_after, None),
            "windows": (None if windows is None else {key: list(steps) for key, steps in windows}, None),
            "delta_timestamps": (None if timed is None else {key: list(times) for key, times in timed.times}, None),
            "fps": (None if timed is None else timed.fps, None),
            "tolerance_s": (TOLERANCE if timed is None else timed.tolerance_s, TOLERANCE),
            "stride": (self._options.stride, 1),
            "drop_n_first_frames": (self._options.drop_n_first_frames, 0),
            "drop_n_last_frames": (self._options.drop_n_last_frames, 0),
            "strict_length": (self._options.strict_length, True),
            "init_key": (self._options.init_key, None),
            "squeeze": (self._options.squeeze, False),
            "weights": (self.weights, "uniform"),
            "replacement": (self.replacement, True),
            "max_age": (self.max_age, None),
            "max_policy_lag": (self.max_policy_lag, None),
            "subset": (self.subset, None),
        }
        return {name: value for name, (value, default) in options.items() if value != default}

    def dealing(self, deal: Deal, position: PassPosition | None = None) -> Self:
        """Return a sampler that draws, without replacement, one share of the passes of several processes.

        Its :meth:`sample_chunks` returns fewer chunks than asked for, or raises ``PassEndedError``, at the end of the
        last pass.

        Args:
            deal: the share of this process.
            position: where to resume; None: at the beginning.
        """
        sampler = copy.copy(self)
        sampler._dealt = deal, position
        sampler._start_anew()
        return sampler

    @property
    def dealt_draws(self) -> DealtDraws:
        """The draws of a sampler from :meth:`dealing`: where its passes are."""
        assert isinstance(self._draws, DealtDraws), "a sampler from dealing()"
        return self._draws

    @property
    def redrawn(self) -> int:
        """The number of chunks that this process drew again because their trajectory was evicted while it was read."""
        return self._ages.redrawn(None)

    def stats(self, storage: TrajectoryReader | None = None) -> dict[str, Any]:
        """Return the counters of this process, by name: ``redrawn``, those of the draws, and :meth:`sampled_ages`.

        Args:
            storage: the storage whose samples are counted; None: those of all storages.
        """
        ledger = None if storage is None else storage.ledger
        redrawn = self._ages.redrawn(ledger)
        return {"redrawn": redrawn, **self._draws.stats(ledger), **self._ages.stats(ledger)}

    def groups_drawn(self, storage: TrajectoryReader) -> tuple[list[int], list[int], list[float | None], bool] | None:
        """Return what this process drew of each group, see :meth:`GroupDraws.drawn`; None for draws without groups."""
        if not isinstance(self._draws, GroupDraws) or not storage.initialized:  # as after it was emptied
            return None
        return self._draws.drawn(storage)

    def sampled_ages(self, storage: TrajectoryReader | None = None) -> dict[str, Any]:
        """Return how old the chunks were that this process has sampled, each at the moment when it was sampled.

        Args:
            storage: the storage whose samples are counted; None: those of all storages.

        Returns:
            ``sampled_age_mean`` and ``sampled_age_max``: in seconds since the publication of the trajectory;
            ``sampled_policy_lag_mean`` and ``sampled_policy_lag_max``: in policy versions behind the newest live one,
            over the trajectories whose version is known. They are None as long as there is none.
        """
        return self._ages.stats(None if storage is None else storage.ledger)

    def query(self, length: int | None) -> ChunkQuery:
        """Return the query for chunks of ``length`` steps; None with windows."""
        query = self._queries.get(length)
        if query is None:
            while len(self._queries) >= MAX_QUERIES:
                del self._queries[next(iter(self._queries))]
            request = self._options.request(length, fixed=not callable(self.chunk_size))
            query = self._queries[length] = ChunkQuery.of(request, self._draws)
        return query

    @property
    def draws_streams(self) -> bool:
        """Whether :meth:`sample_chunks` takes :class:`RandomStreams`: not that of a subclass."""
        return type(self).sample_chunks is ChunkDrawer.sample_chunks

    def sample_chunks(
        self,
        storage: TrajectoryReader,
        batch_size: int,
        query: ChunkQuery,
        generator: RandomSource = None,
    ) -> TensorDict:
        """Draw and copy a batch without a lock; chunks that are evicted meanwhile are drawn again.

        Args:
            storage: the storage to draw from.
            batch_size: the number of chunks.
            query: what is drawn; see :meth:`query`.
            generator: for the draws; by default the buffer's. With :class:`RandomStreams`, each chunk is drawn as if
                it was the only one, from its own stream.

        Returns:
            The chunks, ``[batch_size, length]``, with ``"index"`` ``[batch_size, length, 2]``: trajectory id and step;
            with windows ``[batch_size]``.
        """
        ledger, request = storage.ledger, query.request
        generator = generator or self._rng
        if query.in_one_call:
            chunks = PlainChunks(batch_size, request.length, request.first, request.extra, self._options.squeeze)
            batches = storage.chunk_batches(chunks)
            if batches is not None and ledger.plain:
                data = sample_in_one_call(batches, storage, query, generator, self._ages.of(ledger))
                if ledger.plain:  # else something was relabelled meanwhile
                    return data
        rows, offsets = self._draw(storage, batch_size, query, generator)
        values = request.copy(storage, rows, offsets)
        for _ in range(REDRAW_ROUNDS):
            valid = ledger.unchanged(rows)
            if np.count_nonzero(valid) == len(valid):
                self._ages.of(ledger).note(ledger, rows)
                of_batch = not isinstance(generator, RandomStreams)
                return self._build(storage, query, values, rows, offsets, of_batch)
            torn = np.flatnonzero(~valid)
            self._ages.of(ledger).redrawn += len(torn)
            try:
                new_rows, new_offsets = self._draw(storage, len(torn), query, part_of(generator, torn))
            except PassEndedError:
                rows, offsets, values, torn = without_lost(torn, rows, offsets, values)
                continue
            if len(new_offsets) < len(torn):  # the last chunks of the last pass
                rows, offsets, values, torn = without_lost(torn[len(new_offsets) :], rows, offsets, values, torn)
            storage.arena.replace(values, torn, request.copy(storage, new_rows, new_offsets))
            rows = rows.replace(torn, new_rows)
            offsets[torn] = new_offsets
        raise evicted_while_read(storage, batch_size)

    def _build(
        self,
        storage: TrajectoryReader,
        query: ChunkQuery,
        values: Sequence[torch.Tensor],
        rows: Rows,
        offsets: np.ndarray,
        of_batch: bool,
    ) -> TensorDict:
        data = query.request.build(storage, values, rows, offsets)
        if query.request.init_key is not None:
            mark_starts(data, query.request.init_key)
        importance = query.draws.importance(storage, rows)
        if importance is not None:
            if not of_batch:  # relative to the smallest of the batch, which is the chunk itself
                importance[:] = 1.0
            refuse_stored(storage, PRIORITY_WEIGHT)
            data.set(PRIORITY_WEIGHT, self._importance_weights(storage, importance, data.shape))
        return squeezed(data) if self._options.squeeze else data

    @staticmethod
    def _importance_weights(storage: TrajectoryReader, importance: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
        """Return the importance weights of chunks as those of a batch of some shape."""
        weights = storage.arena.tensor(importance)
        return weights if len(shape) == 1 else weights[:, None].repeat(1, shape[1])

    def _draw(
        self, storage: TrajectoryReader, count: int, query: ChunkQuery, generator: RandomSource
    ) -> tuple[Rows, np.ndarray]:
        """Draw the rows of ``count`` trajectories that fit the request, and what ``request.place`` returns for them."""
        request = query.request
        try:
            drawn = query.draws.draw(storage, count, request, generator)
        except EmptyBufferError:
            storage.check_readable()  # maybe nothing will ever arrive
            raise
        return drawn.rows, request.place(storage, drawn.rows, drawn.uniform, generator)

    # What a sampler remembers and counts is its own process's: a copy begins anew.

    def __getstate__(self) -> dict[str, Any]:
        own = ("_queries", "_draws", "_ages", "_dealt", "_share")
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"subset": None, **state})
        if "_options" not in state:  # of an earlier version
            self._options = RequestOptions(self.sampling_mode, self.pad, windows=state["_windows"])
        self._start_anew()

    def __repr__(self) -> str:
        options = [f"{name}={option_name(value)}" for name, value in self.options.items()]
        return f"ChunkSampler({', '.join([f'chunk_size={self.chunk_size!r}', *options])})"


def drawer_like(sampler: ChunkDrawer) -> ChunkDrawer:
    """Return a plain drawer of the same chunks, which has drawn none yet."""
    drawer = ChunkDrawer.__new__(ChunkDrawer)
    drawer.__setstate__(sampler.__getstate__())
    return drawer
