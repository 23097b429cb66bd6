"""The sampler: draws trajectories and offsets, and copies the chunks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDict

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import (
    EmptyBufferError,
    InvalidArgumentError,
    UnsupportedOperationError,
)
from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.chunk_starts import mark_starts
from embodichain_rl.replay.sampling.dealing import Deal, PassEndedError, PassPosition
from embodichain_rl.replay.sampling.draws import ChunkQuery, Limits
from embodichain_rl.replay.sampling.group_draws import GroupDraws
from embodichain_rl.replay.sampling.names import refuse_index_column, refuse_stored
from embodichain_rl.replay.sampling.one_call import REDRAW_ROUNDS, evicted_while_read, sample_in_one_call
from embodichain_rl.replay.sampling.one_pass import DealtDraws, without_lost
from embodichain_rl.replay.sampling.options import check_replacement, make_draws, option_name
from embodichain_rl.replay.sampling.priority_updates import refuse_column, weights_by_trajectory
from embodichain_rl.replay.sampling.random_streams import RandomSource, RandomStreams, part_of
from embodichain_rl.replay.sampling.request_options import RequestOptions
from embodichain_rl.replay.sampling.resumable import ResumableSampler
from embodichain_rl.replay.sampling.sampled_ages import AgesByStorage
from embodichain_rl.replay.sampling.single_steps import squeezed
from embodichain_rl.replay.sampling.subsets import Subset, checked_subset
from embodichain_rl.replay.sampling.weights import ByPriority, Weights, checked_weights
from embodichain_rl.replay.sampling.windows import (
    TOLERANCE,
    TimedWindows,
    Windows,
    checked_delta_timestamps,
    checked_windows,
)
from embodichain_rl.replay.storage import TrajectoryStorage

__all__ = ["ChunkSampler"]

PRIORITY_WEIGHT = "priority_weight"
"""The key of the importance weights of a batch; TorchRL's name."""

MAX_QUERIES = 128
"""The number of chunk sizes whose query is cached."""


class ChunkSampler(ResumableSampler):
    """A TorchRL sampler of chunks: ``L`` consecutive steps of one trajectory, in batches ``[batch_size, L]``.

    First a trajectory is drawn, uniformly among the live ones with at least ``L`` steps or by ``weights``. Then
    the start of the chunk is drawn uniformly among its ``T - L + 1`` valid offsets. The cost does not depend on how
    much the buffer holds: drawn trajectories that are too short are drawn again, and the ledger is scanned only if most
    of them are.

    Random numbers come from the buffer's ``generator``, or from torch's global one as in TorchRL's samplers.

    One sampler may serve several storages: passes, groups and counters are kept apart for each.

    Args:
        chunk_size: the length ``L`` in steps; or a picklable callable without arguments that returns it, called once
            per batch, such as a :class:`~embodichain_rl.datasets.sampler.ChunkSizeSampler`. None with windows.

    Keyword Args:
        sampling_mode: ``"episode"``: any chunk; ``"segment"``: chunks within one segment; ``"boundary"``: chunks that
            contain a change of segment. Segments are runs of steps with the same integer ``"segment_id"``. A trajectory
            is drawn uniformly among those that contain such a chunk, then the chunk uniformly within the trajectory.
        pad: ``"before"``, ``"after"`` or ``"both"``: chunks may reach beyond that edge of the trajectory, by up to
            ``L - 1`` steps, which repeat the edge step. So the first and last steps are drawn as often as those in the
            middle, and trajectories shorter than ``L`` are used. Batches then have ``("collector", "mask")``, ``bool``
            ``[batch_size, L]``; True = real. ``"none"``, the default: chunks lie within the trajectory. With
            ``sampling_mode="segment"``, the edges are those of the segment.
        pad_before: the same, by up to this many steps before the first step, at most ``L - 1``; with windows, at most
            as many as the earliest of them reaches back. Diffusion policy's ``pad_before``.
        pad_after: the same, after the last step. Diffusion policy's ``pad_after``: 7 for 8 actions of a horizon of 16.
        windows: for each wanted key, the first and the last step relative to a drawn step, as a tuple, such as
            ``{"observation": (-1, 0), "action": (0, 15)}``; or a list of steps, such as ``[-12, -8, -4, 0]``. No other
            key is read. The batch is ``[batch_size]``; a key is ``[batch_size, number of steps, *feature]``, with
            ``"<key>_is_pad"`` (True = padding) beside it, or under ``"trajectory"`` if that name is stored. Padding
            repeats the edge step. Before the first step, the padding of a next observation ``("next", key)`` is the
            first observation, so that the stack of next observations is the stack of observations of the step after.
        delta_timestamps: the same in LeRobot's format: for each key a list of times in seconds; needs ``fps``. If steps
            have a float ``"timestamp"``, in seconds, each batch is checked against it.
        fps: the number of steps per second, for ``delta_timestamps``. Or the key of a trajectory value that says it for
            each trajectory, ``("trajectory", "fps")``; then windows must be padded. A number that differs from a stored
            ``("trajectory", "fps")`` is an error.
        tolerance_s: the largest distance between one of the ``delta_timestamps`` and its step, in seconds; by default
            0.1 ms, as in LeRobot.
        stride: the distance between the steps of a chunk: ``L`` steps, each ``stride`` steps after the one before. A
            chunk takes ``(L - 1) * stride + 1`` steps of its trajectory. ``("next", key)`` is still of the step that
            follows in the trajectory, and rewards are not summed up.
        drop_n_first_frames: the first steps of each trajectory that are never drawn: as the first step of a chunk, or
            as the drawn step of windows.
        drop_n_last_frames: the same for the last steps of each trajectory, or segment; as in LeRobot's sampler.
        strict_length: False: trajectories that are shorter than ``L`` are drawn too, whole, padded after their last
            step. So ``min(L, T)`` steps of a chunk are real, as with ``SliceSampler(strict_length=False)``. Batches
            have ``("collector", "mask")``, as with ``pad``, and are ``[batch_size, L]`` in any case.
        init_key: a key, such as ``"is_init"``, that is True at the first step of each chunk, besides the steps at which
            what is stored there is True. ``SliceSampler`` marks its slices in this way. Recurrent modules of TorchRL
            reset their state there, so that a batch that is flattened is not taken for one sequence. None: no mark.
        squeeze: with ``chunk_size=1``: batches are ``[batch_size]``, single steps as TorchRL's ``RandomSampler`` draws
            them if ``weights="steps"``.
        weights: ``"uniform"``; ``"steps"``: trajectories in proportion to the number of their chunks, so that all
            chunks of the buffer are equally likely; :class:`ByRecency`, :class:`ByGroup`, :class:`ByStep` or
            :class:`ByPriority`.
        replacement: False: every chunk of the trajectories that are live when a pass begins is drawn once, in random
            order; then the next pass begins. This is an epoch over a stream: chunks whose trajectory is evicted before
            their turn are skipped, and new trajectories are part of the next pass. Every process that samples the
            buffer has passes of its own; the workers and ranks of an :class:`~embodichain_rl.datasets.OnlineDataset`
            share theirs. Needs ``weights="uniform"`` and a fixed ``chunk_size``.
        max_age: draw only trajectories that were written at most this many seconds ago.
        max_policy_lag: draw only trajectories that were made with the newest policy version of any live trajectory, or
            with one of this many versions before it. Needs data with a numeric ``"policy_version"``, which TorchRL's
            collectors write with ``track_policy_version=True`` (see :class:`TrajectoryWriter`); the engine records the
            version itself. Trajectories without a version are not drawn.
        subset: draw only some of the trajectories, such as a training split that leaves the others for validation:
            ``("train", 0.9)`` or ``("validation", 0.1)``, of which each trajectory belongs to one, by a hash of its id;
            or a function that takes the id of a trajectory, an ``int``, and returns whether it may be drawn. It must
            always return the same for the same id.

    Raises:
        InvalidArgumentError: in the constructor, for arguments that can't work, or not together; by ``sample``, when
            ``delta_timestamps`` are not the times of steps at the ``fps`` of a trajectory.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory, or segment, has ``L`` steps.
        NothingToDrawError: by ``sample``, when no live trajectory has a change of segment, is young enough, is of a
            group of the mixture, or belongs to the subset.
        SchemaMismatchError: by ``sample``, when a key of the windows or of the groups, or ``"segment_id"``, is not
            stored; or, with ``max_policy_lag``, when no trajectory has a policy version.

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

    def dealing(self, deal: Deal, position: PassPosition | None = None) -> ChunkSampler:
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

    def stats(self, storage: TrajectoryStorage | None = None) -> dict[str, Any]:
        """Return the counters of this process, by name: ``redrawn``, those of the draws, and :meth:`sampled_ages`.

        Args:
            storage: the storage whose samples are counted; None: those of all storages.
        """
        ledger = None if storage is None else storage.ledger
        redrawn = self._ages.redrawn(ledger)
        return {"redrawn": redrawn, **self._draws.stats(ledger), **self._ages.stats(ledger)}

    def groups_drawn(self, storage: TrajectoryStorage) -> tuple[list[int], list[int], list[float | None], bool] | None:
        """Return what this process drew of each group, see :meth:`GroupDraws.drawn`; None for draws without groups."""
        return self._draws.drawn(storage) if isinstance(self._draws, GroupDraws) else None

    def sampled_ages(self, storage: TrajectoryStorage | None = None) -> dict[str, Any]:
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
        return type(self).sample_chunks is ChunkSampler.sample_chunks

    def sample_chunks(
        self,
        storage: TrajectoryStorage,
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
            batches = storage.chunk_batches(
                batch_size, request.length, request.first, request.extra, squeeze=self._options.squeeze
            )
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
        storage: TrajectoryStorage,
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
    def _importance_weights(storage: TrajectoryStorage, importance: np.ndarray, shape: Sequence[int]) -> torch.Tensor:
        """Return the importance weights of chunks as those of a batch of some shape."""
        weights = storage.arena.tensor(importance)
        return weights if len(shape) == 1 else weights[:, None].repeat(1, shape[1])

    def _draw(
        self, storage: TrajectoryStorage, count: int, query: ChunkQuery, generator: RandomSource
    ) -> tuple[Rows, np.ndarray]:
        """Draw the rows of ``count`` trajectories that fit the request, and what ``request.place`` returns for them."""
        request = query.request
        try:
            drawn = query.draws.draw(storage, count, request, generator)
        except EmptyBufferError:
            storage.check_readable()  # maybe nothing will ever arrive
            raise
        return drawn.rows, request.place(storage, drawn.rows, drawn.uniform, generator)

    @graph_break
    def sample(
        self, storage: TrajectoryStorage, batch_size: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
        """Draw a batch for a plain TorchRL buffer: trajectory ids and steps, each ``[batch_size, L]``.

        The buffer, or an ensemble of buffers, reads them with ``storage.get`` afterwards. A plain buffer holds its own
        lock meanwhile. If that lock is not shared with the writers, a trajectory may be evicted before it is read
        (``TrajectoryEvictedError``).

        Returns:
            The index, and a dict with the importance weights, ``"priority_weight"`` ``float32`` ``[batch_size, L]``.
            They are 1 unless draws are by priority: an ensemble stacks what several samplers return. Without
            replacement, the last batch of a pass has the chunks that are left, and :attr:`ran_out` is True after it.
        """
        _check_storage(storage)
        if not self._options.reads_whole_steps:
            raise UnsupportedOperationError(
                f"A plain TorchRL buffer reads whole steps by their index, and {self!r} asks for padding, windows or "
                "marks. Use a TrajectoryReplayBuffer."
            )
        refuse_index_column(storage)
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        query = self.query(self.next_length())
        if self._passes is None:
            rows, offsets = self._draw(storage, batch_size, query, self._rng)
        else:
            rows, offsets = self._draw_to_end(storage, batch_size, query, self._draw)
        self._ages.of(storage.ledger).note(storage.ledger, rows)
        index = torch.from_numpy(query.request.index(rows, offsets))
        importance = query.draws.importance(storage, rows)
        if importance is None:
            importance = np.ones(len(offsets), dtype=np.float32)
        weights = self._importance_weights(storage, importance, index.shape[:2])
        if self._options.squeeze:
            index, weights = index[:, 0], weights[:, 0]
        return (index[..., 0], index[..., 1]), {PRIORITY_WEIGHT: weights}

    @graph_break
    def update_priority(self, index: Any, priority: Any, *, storage: Any = None) -> None:
        """Set the priorities of trajectories; evicted trajectories are ignored.

        It does nothing where the weights are not :class:`ByPriority`: programs call it whatever the sampler is.

        Args:
            index: trajectory ids, of any shape; or integers ``[..., 2]`` with at least two dimensions, such as the
                ``"index"`` of a batch: pairs of trajectory id and step. A trajectory that occurs several times gets its
                largest priority.
            priority: numbers that are not negative: one for all; one per chunk, ``[B]`` or ``[B, 1]``; or one per step,
                ``[B, L]`` or ``[B, L, 1]``.
            storage: the storage of the trajectories.

        Raises:
            InvalidArgumentError: for priorities that are negative, NaN or infinite, or whose shape does not fit; and
                for an index that is not made of integers.
        """
        if not isinstance(self.weights, ByPriority):
            return
        _check_storage(storage)
        refuse_column(index, storage)
        storage.ledger.prioritize(*weights_by_trajectory(index, priority, self.weights))

    # What a sampler remembers and counts is its own process's: a copy begins anew.

    def __getstate__(self) -> dict[str, Any]:
        own = ("_queries", "_draws", "_ages", "_dealt", "_share")
        return {name: value for name, value in super().__getstate__().items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({"subset": None, **state})
        if "_options" not in state:  # of an earlier version
            self._options = RequestOptions(self.sampling_mode, self.pad, windows=state["_windows"])
        self._start_anew()

    def __repr__(self) -> str:
        options = [f"{name}={option_name(value)}" for name, value in self.options.items()]
        return f"ChunkSampler({', '.join([f'chunk_size={self.chunk_size!r}', *options])})"


def _check_storage(storage: object) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(
            f"Got a {type(storage).__name__}; a ChunkSampler draws from a TrajectoryStorage. For other storages use "
            "TorchRL's SliceSampler."
        )
