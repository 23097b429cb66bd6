"""The replay buffer: storage, writer and sampler composed, with a ``sample`` that waits for nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, NoReturn, TypeVar

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import expand_as_right
from torchrl.data.replay_buffers.query import Trajectory
from torchrl.data.replay_buffers.samplers import Sampler
from torchrl.data.replay_buffers.storages import Storage
from torchrl.data.replay_buffers.utils import pin_memory_output
from torchrl.data.replay_buffers.writers import Writer

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.errors import EmptyBufferError, InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.placement import PlacedBuffer
from embodichain_rl.replay.sampling import ByPriority, ChunkQuery, ChunkSampler, Subset, drawing_with
from embodichain_rl.replay.schema import INDEX, ORIGIN_KEYS, Key, TextTable
from embodichain_rl.replay.storage import TrajectoryStorage, refuse_samplers_of_steps
from embodichain_rl.replay.writing import TrajectoryWriter

__all__ = ["TrajectoryReplayBuffer"]

Buffer = TypeVar("Buffer", bound=type)


def _with_graph_breaks(cls: Buffer) -> Buffer:
    """Decorate the methods that TorchRL's class defines as our own are; see :func:`graph_break`."""
    inherited = ("add", "empty", "can_sample", "next", "update_priority", "state_dict", "read_all_in_order")
    for name in (*inherited, "__getitem__", "__iter__", "__len__", "write_count"):
        method = getattr(cls, name)
        if isinstance(method, property):
            setattr(cls, name, property(graph_break(method.fget)))  # type: ignore[type-var]
        else:
            setattr(cls, name, graph_break(method))
    return cls


@_with_graph_breaks
class TrajectoryReplayBuffer(PlacedBuffer):
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
        optional_keys: keys that only some trajectories have, such as a wrist camera; see :class:`TrajectoryStorage`.
        path: a directory in which the buffer is kept, and found again when it is made with the same limits; see
            :meth:`open`.
        sync_every: seconds between two calls of :meth:`sync`, on a thread, for a buffer with a ``path``.

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
    ) -> None:
        if storage is None:
            if max_trajectories is None or max_total_steps is None:
                raise InvalidArgumentError("Give max_trajectories and max_total_steps, or a storage.")
            limits = (max_trajectories, max_total_steps)
            storage = TrajectoryStorage(*limits, device=device, compact=compact, optional_keys=optional_keys, path=path)
        elif max_trajectories is not None or max_total_steps is not None or compact or optional_keys or path:
            raise InvalidArgumentError(
                "Got a storage and max_trajectories, max_total_steps, compact or optional_keys, or path: the storage "
                "has its own."
            )
        _check_storage(storage)
        if sampler is None:
            if chunk_size is None:
                raise InvalidArgumentError("Give chunk_size, the steps of a chunk, or a sampler.")
            sampler = ChunkSampler(chunk_size, subset=subset)
        elif chunk_size is not None or subset is not None:
            raise InvalidArgumentError("Got a sampler and chunk_size or subset: give them to the ChunkSampler.")
        _check_sampler(sampler)
        if writer is None:
            writer = TrajectoryWriter(end_key=end_key, traj_key=traj_key)
        elif end_key is not None or traj_key is not None:
            raise InvalidArgumentError("Got a writer and end_key or traj_key: give them to the TrajectoryWriter.")
        _check_writer(writer)
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
            batch_size=None if batch_size is None else checked_int("batch_size", batch_size, minimum=1),
            prefetch=None if prefetch is None else checked_int("prefetch", prefetch, minimum=0),
            pin_memory=pin_memory,
            transform=transform,
            generator=generator,
        )
        # A call gets the batch size that it asks for. TorchRL warns of one that is not the buffer's, unless it has.
        self._warned_batch_size_conflict = True
        self.share()
        if path is not None or not storage.remembered_options:
            self._remember(end_key=end_key, traj_key=traj_key)
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

    # ------------------------------------------------------------------------------------------------ sampling

    @graph_break
    def sample_chunks(
        self, batch_size: int, chunk_size: int | ChunkQuery, *, generator: torch.Generator | None = None
    ) -> TensorDict:
        """Return ``batch_size`` chunks of ``chunk_size`` steps, ``[batch_size, chunk_size]``, transformed.

        Other than ``sample``, it takes the length from the caller and is not prefetched.

        Args:
            batch_size: how many chunks.
            chunk_size: steps of each; all else is as the buffer's sampler has it. Or what
                :meth:`ChunkSampler.query` of another sampler returns.
            generator: for the draws; by default the buffer's, or torch's global one.

        Raises:
            InvalidArgumentError: when the buffer's sampler is not a :class:`ChunkSampler`.
        """
        if not isinstance(self._sampler, ChunkSampler):
            raise InvalidArgumentError(f"The buffer's sampler, {self._sampler!r}, draws no chunks; use a ChunkSampler.")
        batch_size = checked_int("batch_size", batch_size, minimum=1)
        if not isinstance(chunk_size, ChunkQuery):
            chunk_size = self._sampler.query(checked_int("chunk_size", chunk_size, minimum=1))
        data = self._sampled(batch_size, chunk_size, generator)
        if not len(self._transform):
            return data
        with drawing_with(generator):
            return self._transform(data)

    @graph_break
    def sample(
        self, batch_size: int | None = None, return_info: bool = False, include_info: bool | None = None
    ) -> TensorDict:
        """Return a batch of chunks ``[batch_size, L]``; see :meth:`torchrl.data.TensorDictReplayBuffer.sample`.

        With ``prefetch``, batches of the buffer's own ``batch_size`` are drawn ahead, on threads. Another
        ``batch_size`` is drawn now. What was drawn ahead is discarded, and drawn anew, when the buffer is emptied, by
        whichever process, or loaded, and when its storage, sampler, ``chunk_size``, transforms or generator are
        replaced.
        """
        # What TorchRL does between its sample and _sample takes as long as the gather. It is left out where it does
        # nothing: a batch of the usual size, without prefetching, pinning or info.
        usual = batch_size is None or batch_size == self._batch_size
        extras = self._prefetch or self._pin_memory or return_info or include_info
        if usual and not extras and self._batch_size is not None and isinstance(self._sampler, ChunkSampler):
            return self._sample_without_lock(self._batch_size)
        if not self._prefetch:
            return super().sample(batch_size, return_info, include_info)
        if not usual:
            return self._sample_now(batch_size, return_info)
        self.discard_outdated()
        return super().sample(batch_size, return_info, include_info)

    def _sample_now(self, batch_size: int | None, return_info: bool) -> Any:
        """Return a batch of any size without a look at what was prefetched, as TorchRL returns it."""
        if self._service_shutdown:
            raise RuntimeError("A shut down replay buffer cannot be sampled.")
        data, info = self._sample(checked_int("batch_size", batch_size, minimum=1))
        for key, value in info.items():
            value = torch.as_tensor(value)
            data.set(key, expand_as_right(value, data) if value.ndim < data.ndim else value)
        return (data, info) if return_info else data

    @pin_memory_output  # type: ignore[untyped-decorator]
    def _sample(self, batch_size: int) -> tuple[TensorDict, dict[str, Any]]:
        # TorchRL's takes a lock around the sampler's draw and the storage's read. A ChunkSampler needs none: it draws,
        # copies, and draws again what was evicted meanwhile.
        if not isinstance(self._sampler, ChunkSampler):
            return super()._sample(batch_size)
        data = self._sample_without_lock(checked_int("batch_size", batch_size, minimum=1))
        # Under the key of the pair in the batch, to which TorchRL writes it once more.
        key: Any = self._index_key
        return data, {key[0] if len(key) == 1 else key: data[key]}

    @property
    def _index_key(self) -> Key:
        """Where samples have the pair of trajectory id and step."""
        schema = self._storage.schema
        return INDEX if schema is None else schema.index_key

    def _sample_without_lock(self, batch_size: int) -> TensorDict:
        sampler = self._sampler
        return self._transformed(self._sampled(batch_size, sampler.query(sampler.next_length())))

    def _sampled(self, batch_size: int, query: ChunkQuery, generator: torch.Generator | None = None) -> TensorDict:
        try:
            # The generator of this buffer: a sampler that serves several has that of the last one.
            generator = generator or self._rng or torch.default_generator
            return self._sampler.sample_chunks(self._storage, batch_size, query, generator)
        except EmptyBufferError as error:
            pending = self._writer.pending_steps
            if not pending:
                raise
            raise EmptyBufferError(
                f"{error} This process has {pending:,} steps of {self._writer.pending_trajectories:,} unfinished "
                "trajectories, whose ('next', 'done') has not come. If collection breaks them off, let the collector "
                "truncate them (set_truncated=True), or call rb.writer.truncate_pending()."
            ) from None

    def _transformed(self, data: TensorDict) -> TensorDict:
        return self._transform(data) if len(self._transform) else data

    # ------------------------------------------------------------------------------------- replacing the components

    def set_sampler(self, sampler: Sampler) -> Sampler:
        """Replace the sampler; return the one before."""
        _check_sampler(sampler)
        return super().set_sampler(sampler)

    def set_writer(self, writer: TrajectoryWriter) -> Writer:
        """Replace the writer; return the one before."""
        _check_writer(writer)
        return super().set_writer(writer)

    def set_storage(self, storage: TrajectoryStorage, collate_fn: Callable[[Any], Any] | None = None) -> Storage:
        """Replace the storage; return the one before."""
        _check_storage(storage)
        return super().set_storage(storage, collate_fn)

    # ------------------------------------------------------------------------------------------------- writing

    @graph_break
    def extend(self, tensordicts: TensorDictBase, *, update_priority: bool | None = None) -> torch.Tensor:
        """Write steps; see :class:`TrajectoryWriter`, and :meth:`torchrl.data.TensorDictReplayBuffer.extend`."""
        # As in sample(): what TorchRL does around its writer, for transforms, priorities and consuming samplers, is
        # left out where there are none. Threads still write one after the other.
        if len(self._transform) or not isinstance(self._sampler, ChunkSampler):
            return super().extend(tensordicts, update_priority=update_priority)
        with self._replay_lock, self._write_lock:
            return self._writer.extend(tensordicts)

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
        index, priority = data.get("index", None), data.get(self.priority_key, None)
        of_ensemble = isinstance(index, TensorDictBase) and "buffer_ids" in index.keys()  # noqa: SIM118
        if self._index_key != INDEX and not of_ensemble:  # "index" is a column of the user
            origin = [data.get(key, None) for key in ORIGIN_KEYS]
            index = None if any(part is None for part in origin) else torch.stack(origin, dim=-1)
        if index is None or priority is None:
            raise InvalidArgumentError(
                f"Got a batch with the keys {sorted(map(str, data.keys()))}; to set priorities it takes 'index', as it "
                f"was sampled (or 'trajectory', where 'index' is a column of yours), and {self.priority_key!r}."
            )
        if of_ensemble:
            if len(index["buffer_ids"].unique()) > 1:
                raise InvalidArgumentError(
                    "Got a batch of several buffers; give each buffer its own part, such as batch[0] where "
                    'batch["index", "buffer_ids"][0] is 0.'
                )
            index = index["index"]
        if index.ndim == 1:  # a single step
            index, priority = index[None], priority.reshape(-1).amax()
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
        if not len(self._storage):
            return []
        padded = self._storage[:]
        rows = (row[: int(mask.sum())] for row, mask in zip(padded, padded["collector", "mask"], strict=True))
        whole = (row.exclude(("collector", "mask")) for row in rows)
        found = (Trajectory(data=self._transformed(row), batch_size=row.batch_size) for row in whole)
        return [trajectory for trajectory in found if predicate is None or predicate(trajectory)]

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
        """Return TorchRL's counters and the ledger's: live and evicted trajectories, steps, reclaimed reservations.

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
        return {**super().stats(), **self._storage.ledger.stats(), **self._writer.stats(), **counts}

    # ------------------------------------------------------------------------------------------------- sharing

    def __getstate__(self) -> dict[str, Any]:
        # On the way to a child that is being started, the state of the generator as TorchRL hands it over would be gone
        # before the child could map it.
        return {**super().__getstate__(), "_rng": None, "generator": self._rng}

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = state.pop("generator")
        super().__setstate__(state)
        self.set_rng(generator)


def _check_storage(storage: Any) -> None:
    if not isinstance(storage, TrajectoryStorage):
        raise InvalidArgumentError(f"Got storage={storage!r}; a TrajectoryReplayBuffer needs a TrajectoryStorage.")


def _check_sampler(sampler: Any) -> None:
    if not isinstance(sampler, Sampler):
        raise InvalidArgumentError(f"Got sampler={sampler!r}; it must be a ChunkSampler, or a sampler of TorchRL.")
    refuse_samplers_of_steps(sampler)


def _check_writer(writer: Any) -> None:
    if not isinstance(writer, TrajectoryWriter):
        got = type(writer).__name__ if isinstance(writer, Writer) else repr(writer)
        raise InvalidArgumentError(f"Got writer={got}; a TrajectoryReplayBuffer needs a TrajectoryWriter.")
