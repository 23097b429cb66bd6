"""The replay buffer: storage, writer and sampler composed, with a ``sample`` that waits for nobody."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NoReturn, Unpack

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data.replay_buffers.query import Trajectory
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.batches import DrawingBuffer, priorities_in
from embodichain_rl.replay.keeping import KeepingBuffer
from embodichain_rl.replay.ledger import MetricWord
from embodichain_rl.replay.limits import storage_for
from embodichain_rl.replay.metrics import Count, GateWatch, StatsLog, buffer_metrics, checked_count, note_draws
from embodichain_rl.replay.parts import check_sampler, check_storage, check_writer, with_graph_breaks
from embodichain_rl.replay.placement import PlacedBuffer, options_to_remember, path_with_options
from embodichain_rl.replay.querying import query_trajectories
from embodichain_rl.replay.sampling import (
    ByPriority,
    ChunkSampler,
    Subset,
    Weights,
)
from embodichain_rl.replay.schema import Codec, TextTable
from embodichain_rl.replay.storage import TrajectoryStorage
from embodichain_rl.replay.torchrl_arguments import TorchRLArguments, refuse_service, torchrl_arguments
from embodichain_rl.replay.writing import TrajectoryWriter

__all__ = ["TrajectoryReplayBuffer"]

# Plain integers: a look at the class for each would take a tenth of a microsecond.
EXTENDS, EXTEND_NS, LAST_INSERT_AT = MetricWord.EXTENDS, MetricWord.EXTEND_NS, MetricWord.LAST_INSERT_AT

OF_SAMPLER = {"subset": None, "strict_length": True, "init_key": None, "weights": "uniform", "squeeze": False}
"""The arguments of a buffer that are its sampler's, and their defaults."""


@with_graph_breaks
class TrajectoryReplayBuffer(DrawingBuffer, KeepingBuffer, PlacedBuffer):
    """A TorchRL replay buffer of whole trajectories that hands out chunks of them, shared by many processes.

    It is a :class:`~torchrl.data.TensorDictReplayBuffer` over a :class:`TrajectoryStorage`, a :class:`TrajectoryWriter`
    and a :class:`ChunkSampler`, and behaves as one, but for its locks: TorchRL's shared buffer holds one lock through
    all of ``extend`` and of ``sample``, and a process killed inside leaves everyone hanging. Here ``sample`` takes no
    lock at all, and ``extend`` one that is held for microseconds and released when its holder dies.

    Under ``torch.compile``, calls of the buffer are graph breaks: what is before and after them is compiled. With
    ``fullgraph=True`` they are errors; sample outside of the compiled function then, and pass the batch in.

    Hand it to TorchRL collectors (``replay_buffer=rb``), to :class:`multiprocessing.Process` or to a ``DataLoader``
    (through :class:`~embodichain_rl.datasets.OnlineDataset`), under fork, spawn or forkserver.

    Keyword Args:
        max_trajectories: at most so many trajectories are kept, the newest.
        max_total_steps: at most so many steps are kept in all.
        chunk_size: length of the chunks in steps, or a callable that returns one (see :class:`ChunkSampler`).
        batch_size: chunks a batch, for ``sample()`` without arguments and for iteration.
        device: where the trajectories are kept: ``"cpu"``, or a CUDA device; see :class:`TrajectoryStorage`.
        transform: a TorchRL transform (or callable): its inverse is applied to what is extended, itself to each batch.
        prefetch: how many batches of ``batch_size``, which it needs, are sampled ahead, on threads.
        pin_memory: whether batches are copied to pinned memory.
        generator: source of the draws; by default torch's global one.
        storage: a :class:`TrajectoryStorage`, instead of ``max_trajectories``, ``max_total_steps``, ``device``,
            ``compact`` and ``optional_keys``.
        sampler: a :class:`ChunkSampler`, or one of TorchRL's samplers that draw items, instead of ``chunk_size``.
        writer: a :class:`TrajectoryWriter`; by default one is made.
        compact: whether an observation that occurs in two consecutive steps is stored once; with ``"views"`` it is also
            returned as two views of one memory; see :class:`TrajectoryStorage`.
        end_key: the end flags, where they are not ``("next", "done")``; see :class:`TrajectoryWriter`.
        traj_key: the id of the trajectory of each step, which ends a trajectory where it changes; see
            :class:`TrajectoryWriter`.
        subset: which of the trajectories are sampled, such as ``("train", 0.9)``; see :class:`ChunkSampler`.
        strict_length: False: trajectories that are shorter than a chunk are sampled too, padded, with a mask; see
            :class:`ChunkSampler`.
        init_key: marks the first step of each chunk, as ``SliceSampler`` does; see :class:`ChunkSampler`.
        max_bytes: at most so many bytes are taken in all, beside or in place of ``max_total_steps``; see
            :class:`TrajectoryStorage`.
        reserve: whether the memory is taken when the first data arrives; see :class:`TrajectoryStorage`.
        max_pinned: the share of both limits that can be pinned, by default 0.5; see :meth:`pin`.
        optional_keys: keys that only some trajectories have, such as a wrist camera; see :class:`TrajectoryStorage`.
        ragged: keys whose values change their size from step to step, such as point clouds; see
            :class:`TrajectoryStorage`.
        compress: keys of images that are kept encoded, such as ``{"pixels": "png"}``; see :class:`TrajectoryStorage`.
        ragged_bytes: the bytes that both are expected to take a step; see :class:`TrajectoryStorage`.
        every: keys that change at every so-many-th step only, such as ``{"camera": 8}``; see
            :class:`TrajectoryStorage`.
        path: a directory in which the buffer is kept, and found again when it is made with the same limits; see
            :meth:`open`.
        sync_every: seconds between two calls of :meth:`sync`, on a thread, for a buffer with a ``path``.
        weights: how likely each trajectory is, such as ``"steps"``; see :class:`ChunkSampler`.
        squeeze: with ``chunk_size=1``, batches are ``[batch_size]``. With ``weights="steps"``, all steps are equally
            likely, as in a buffer of steps.
        count: what ``len(rb)`` counts: ``"trajectories"``, or ``"steps"`` as in TorchRL's buffers. With ``"steps"``,
            ``stats()["size"]`` and ``["capacity"]`` are in steps too. ``rb[i]`` is a trajectory in either case.
        **torchrl: the other arguments of TorchRL's buffers. ``priority_key``, ``collate_fn`` (applied to a batch before
            ``transform``) and ``transform_factory`` mean what they mean there. ``shared``, ``compilable``,
            ``delayed_init``, ``dim_extend`` and others are accepted where they ask for what is the case anyway.

    Raises:
        InvalidArgumentError: for arguments that can't work, or not together.
        EmptyBufferError: by ``sample``, when there is no trajectory yet.
        ChunkTooLongError: by ``sample``, when no live trajectory is as long as a chunk.
        TrajectoryEvictedError: by ``sample``, when the buffer turns over faster than a batch can be copied.

    Each step of a sample carries, besides the data, ``("trajectory", "id")`` and ``("trajectory", "step")``, the
    trajectory it comes from and its place in it, and both again as ``"index"``, ``[batch_size, L, 2]``. Where the data
    has a column ``"index"`` of its own, such as LeRobot's, both are under ``("trajectory", "index")`` instead.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2, batch_size=8)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> rb.extend(TensorDict({"observation": torch.randn(3, 4), "next": {"done": done}}, [3]))
        tensor([0, 0, 0])
        >>> rb.sample().shape
        torch.Size([8, 2])
    """

    takes_chunk_queries = True

    _count: Count = "trajectories"
    _ServiceClass: Any = classmethod(refuse_service)

    def __init__(
        self,
        *,
        max_trajectories: int | None = None,
        max_total_steps: int | None = None,
        chunk_size: int | Callable[[], int] | None = None,
        batch_size: int | None = None,
        device: torch.device | str = "cpu",
        transform: Any = None,
        prefetch: int | None = None,
        pin_memory: bool = False,
        generator: torch.Generator | None = None,
        storage: TrajectoryStorage | None = None,
        sampler: Sampler | None = None,
        writer: Writer | None = None,
        compact: bool | Literal["views"] = False,
        end_key: NestedKey | None = None,
        traj_key: NestedKey | None = None,
        subset: Subset = None,
        optional_keys: Iterable[NestedKey] | Mapping[NestedKey, torch.Tensor] = (),
        path: str | PathLike[str] | None = None,
        sync_every: float | None = None,
        strict_length: bool = True,
        init_key: NestedKey | None = None,
        weights: Weights = "uniform",
        squeeze: bool = False,
        count: Count = "trajectories",
        max_pinned: float | None = None,
        max_bytes: int | None = None,
        reserve: bool = False,
        ragged: Iterable[NestedKey] = (),
        compress: Mapping[NestedKey, str | Codec] | None = None,
        ragged_bytes: int | None = None,
        every: Mapping[NestedKey, int] | None = None,
        **torchrl: Unpack[TorchRLArguments],
    ) -> None:
        of_sampler: dict[str, Any] = {
            "subset": subset,
            "strict_length": strict_length,
            "init_key": init_key,
            "weights": weights,
            "squeeze": squeeze,
        }
        rest = torchrl_arguments(torchrl, transform, type(self).__init__)
        transform = rest["transform"]
        self._count = checked_count(count)
        if sampler is None:
            if chunk_size is None:
                raise InvalidArgumentError("Give chunk_size, the steps of a chunk, or a sampler.")
            sampler = ChunkSampler(chunk_size, **of_sampler)
        elif chunk_size is not None or of_sampler != OF_SAMPLER:
            raise InvalidArgumentError(
                f"Got a sampler and chunk_size, {', '.join(OF_SAMPLER)}: give them to the ChunkSampler."
            )
        check_sampler(sampler)
        if writer is None:
            writer = TrajectoryWriter(end_key=end_key, traj_key=traj_key)
        elif end_key is not None or traj_key is not None:
            raise InvalidArgumentError("Got a writer and end_key or traj_key: give them to the TrajectoryWriter.")
        check_writer(writer)
        batch_size = None if batch_size is None else checked_int("batch_size", batch_size, minimum=1)
        options = options_to_remember(sampler, batch_size=batch_size, end_key=end_key, traj_key=traj_key)
        storage = storage_for(
            storage,
            max_trajectories,
            device,
            max_total_steps=max_total_steps,
            max_bytes=max_bytes,
            reserve=reserve,
            compact=compact,
            optional_keys=optional_keys,
            max_pinned=max_pinned,
            ragged=ragged,
            compress=compress,
            ragged_bytes=ragged_bytes,
            every=every,
            path=path_with_options(path, options),
        )
        check_storage(storage)
        if transform is not None and not callable(transform):
            raise InvalidArgumentError(
                f"Got transform={transform!r}; it must be a transform of TorchRL, or a function."
            )
        if not isinstance(pin_memory, bool):
            raise InvalidArgumentError(f"Got pin_memory={pin_memory!r}; it must be True or False.")
        if pin_memory and storage.staged:
            raise InvalidArgumentError("Got pin_memory=True with a storage on a device, where batches lie already.")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise InvalidArgumentError(f"Got generator={generator!r}; it must be a torch.Generator.")
        super().__init__(
            storage=storage,
            sampler=sampler,
            writer=writer,
            batch_size=batch_size,
            prefetch=None if prefetch is None else checked_int("prefetch", prefetch, minimum=0),
            pin_memory=pin_memory,
            generator=generator,
            **rest,
        )
        # A call gets the batch size that it asks for. TorchRL warns of one that is not the buffer's, unless it has.
        self._warned_batch_size_conflict = True
        self._gate = GateWatch(storage)
        self.share()
        if path is not None or not storage.remembered_options:
            storage.remember_options(options)
        if sync_every is not None:
            storage.sync_every(sync_every)

    @property
    def texts(self) -> TextTable:
        """The table of stored text; samples hold its ids."""
        return self._storage.texts

    def share(self, shared: bool = True) -> TrajectoryReplayBuffer:
        """Return the buffer, which is shared from the start; TorchRL's own method would create a lock."""
        self.shared = True
        self._write_lock = contextlib.nullcontext()
        return self

    # ------------------------------------------------------------------------------------------------- counting

    def __len__(self) -> int:
        """Return the number of live trajectories; with ``count="steps"``, that of their steps."""
        if self._count == "steps":
            return self._storage.num_steps
        if not self._gate.sampled:
            self._gate.asked(self._storage, self._writer.published)
        return len(self._storage)

    # ------------------------------------------------------------------------------------- replacing the components

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Replace the sampler; return the one before."""
        check_sampler(sampler)
        return super().set_sampler(sampler)

    def set_writer(self, writer: TrajectoryWriter) -> Writer:
        """Replace the writer; return the one before."""
        check_writer(writer)
        return super().set_writer(writer)

    def set_storage(self, storage: TrajectoryStorage, collate_fn: Callable[[Any], Any] | None = None) -> Storage:
        """Replace the storage; return the one before."""
        check_storage(storage)
        return super().set_storage(storage, collate_fn)

    # ------------------------------------------------------------------------------------------------- writing

    @graph_break
    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Write steps; see :class:`TrajectoryWriter`, and :meth:`torchrl.data.TensorDictReplayBuffer.extend`."""
        # As in sample(): what TorchRL does around its writer, for transforms, priorities and consuming samplers, is
        # left out where there are none. Threads still write one after the other.
        began = time.monotonic_ns()
        if self._has_transforms() or not isinstance(self._sampler, ChunkSampler):
            ids = super().extend(tensordicts, update_priority=update_priority)
        else:
            with self._replay_lock, self._write_lock:
                try:
                    ids = self._writer.extend(tensordicts)
                except Exception as error:
                    self._writer.note_failure(error)
                    raise
        words, now = self._storage.ledger.metrics.own.words, time.monotonic_ns()
        words[EXTENDS] += 1
        words[EXTEND_NS] += now - began
        words[LAST_INSERT_AT] = now
        return ids

    @graph_break
    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """Set the priorities of the trajectories of a batch that was sampled, from its ``priority_key``.

        It does nothing where the sampler does not draw by priority, as in TorchRL.

        Args:
            data: a batch, or some of it, with ``"index"`` (or ``"trajectory"``, where ``"index"`` is a column of the
                data) and ``priority_key`` (``"td_error"``): numbers for each chunk, or for each of its steps, the
                largest of which counts. Of the batch of an ensemble, the part that is from this buffer.

        Raises:
            InvalidArgumentError: when one of the keys is missing; or what :meth:`ChunkSampler.update_priority` raises.
        """
        sampler = self._sampler
        if not (isinstance(sampler, ChunkSampler) and isinstance(sampler.weights, ByPriority)):
            return super().update_tensordict_priority(data)
        index, priority = priorities_in(data, self.priority_key, self._index_key)
        sampler.update_priority(index, priority, storage=self._storage)

    @graph_break
    def query(
        self, predicate: Callable[[Trajectory], bool] | None = None, *, trajectory_key: NestedKey | None = None
    ) -> list[Trajectory]:
        """Return the live trajectories that meet a condition, transformed, oldest first.

        Args:
            predicate: a condition built from ``torchrl.data.traj``, or a callable that takes a trajectory; all if None.
            trajectory_key: has no use here, since the buffer knows which trajectory a step belongs to.

        Raises:
            InvalidArgumentError: when a ``trajectory_key`` is given.
        """
        if trajectory_key is not None:
            raise InvalidArgumentError(f"Got trajectory_key={trajectory_key!r}; the buffer knows its trajectories.")
        self._gate.read()
        return query_trajectories(self._storage, self._transform.transforms, predicate)

    def _refuse_to_change(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedOperationError(
            "What is stored can't be changed: other processes may be reading it. Write a new trajectory with "
            "rb.extend(data), or change what is sampled with a transform."
        )

    def trajectory(self, trajectory_id: int) -> TensorDict:
        """Return a copy of a whole trajectory, ``[T]``, by its id, transformed.

        Args:
            trajectory_id: an id as ``extend`` returns it, or as it is in ``("trajectory", "id")`` of a sample.

        Raises:
            TrajectoryEvictedError: when there is no such trajectory in the buffer (any more).
        """
        self._gate.read()
        return self._transformed(self._storage.trajectory(trajectory_id))

    def trajectory_lengths(self, ids: int | Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Return the lengths of trajectories, by their ids; see :meth:`TrajectoryStorage.trajectory_lengths`.

        Raises:
            TrajectoryEvictedError: when one of them is not in the buffer (any more).
            InvalidArgumentError: when they are not integers.
        """
        return self._storage.trajectory_lengths(ids)

    __setitem__ = set_ = set_at_ = update_ = write_all = _refuse_to_change

    @graph_break
    def stats(self) -> dict[str, Any]:
        """Return the figures of the buffer by name; ``embodichain_rl.monitor.METRICS`` lists them all, with units.

        They are TorchRL's counters, the ledger's (live and evicted trajectories, steps, reclaimed reservations), and
        what all processes have counted together: rates, waiting times, ages, padding, mixtures, lengths and returns.
        Reading them takes no lock.

        ``nbytes_per_step``, ``bytes_expected``, ``bytes_at_most`` and ``bytes_used`` say how much memory the buffer
        takes; see :meth:`TrajectoryStorage.bytes`.

        Of this process are ``pending_steps``, ``pending_trajectories`` and ``pending_bytes`` (of unfinished
        trajectories), ``rejected`` (trajectories that the writer did not accept), ``truncated`` (trajectories that were
        broken off without an end flag; see :class:`TrajectoryWriter`), and with a :class:`ChunkSampler` ``redrawn``
        (chunks drawn again because their trajectory was evicted while it was read), ``unfit`` (draws that hit a
        trajectory without what was asked for, such as one that is too short), ``mixture`` (with groups: the part of the
        draws that each had), ``passes`` (without replacement: how many were begun), and how old the sampled chunks
        were, ``sampled_age_mean``, ``sampled_age_max``, ``sampled_policy_lag_mean`` and ``sampled_policy_lag_max`` (see
        :meth:`ChunkSampler.sampled_ages`). The rest is of all processes.
        """
        counts = self._sampler.stats(self._storage) if isinstance(self._sampler, ChunkSampler) else {}
        if isinstance(self._sampler, ChunkSampler) and self._storage.ledger.metrics.has_own:
            note_draws(self._storage.ledger.metrics.own, self._storage, self._sampler)
        with self._gate.unasked():
            of_torchrl = super().stats()
        stats = {
            **of_torchrl,
            **buffer_metrics(self._storage),
            **self._storage.ledger.stats(),
            **self._storage.bytes(),
            **self._writer.stats(),
            **counts,
        }
        if self._count == "steps":
            capacity = self._storage.max_total_steps
            stats |= {"capacity": capacity, "utilization": stats["size"] / capacity}
        return stats

    def log_to(self, logger: Any, every: float = 10.0, *, prefix: str = "buffer/") -> StatsLog:
        """Write the numbers of :meth:`stats` to a logger of TorchRL, on a thread, as long as the buffer exists.

        Args:
            logger: such as ``CSVLogger`` or ``TensorboardLogger`` of ``torchrl.record.loggers``.
            every: seconds between two entries, at least 0.01.
            prefix: what the names of the entries begin with.

        Returns:
            The log: ``log.log()`` writes an entry now, ``log.close()`` ends it.

        Raises:
            InvalidArgumentError: ``logger`` is no logger, or ``every`` is too small.
        """
        reference = weakref.ref(self)

        def read() -> dict[str, Any] | None:
            buffer = reference()
            return None if buffer is None or buffer.storage.ledger.closed else buffer.stats()

        return StatsLog(read, logger, every, prefix)

    def __repr__(self) -> str:
        text: str = super().__repr__()
        return text if self._count == "trajectories" else f"{text[:-1]}, \n    count={self._count!r})"

    # ------------------------------------------------------------------------------------------------- sharing

    def __getstate__(self) -> dict[str, Any]:
        # On the way to a child that is being started, the state of the generator as TorchRL hands it over would be gone
        # before the child could map it.
        state = {**super().__getstate__(), "_rng": None, "generator": self._rng}
        del state["_gate"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = state.pop("generator")
        super().__setstate__(state)
        self._gate = GateWatch(self._storage)
        self.set_rng(generator)
