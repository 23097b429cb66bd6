"""``OnlineDataset``: adapts a live buffer of trajectories to ``torch.utils.data.DataLoader``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any, Unpack

import torch
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import IterableDataset, get_worker_info

from embodichain_rl._checks import checked_int
from embodichain_rl._compiling import graph_break
from embodichain_rl.datasets.collate import collate_chunks, pass_through
from embodichain_rl.datasets.progress import Progress, StreamPosition, check_state, chunk_size_name, initial_state
from embodichain_rl.datasets.sources import ChunkSource, as_chunk_source, takes_chunk_queries
from embodichain_rl.datasets.starting import StartedBy, rebuild
from embodichain_rl.datasets.streams import IterationCounter, current_rank
from embodichain_rl.datasets.transport import enter_worker, outgoing_memory
from embodichain_rl.errors import ChunkShapeError, InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.sampling import ChunkSampler, SamplingOptions, drawing_with
from embodichain_rl.replay.schema import MASK

__all__ = ["OnlineDataset"]

DRAWS = 1
"""Version of the mapping from random numbers to chunks. A state saved with another version can't be resumed."""


class OnlineDataset(IterableDataset[Any]):
    """An endless dataset of chunks, sampled from a buffer while other processes write to it.

    =================================================  ==================================================
    ``OnlineDataset(source, chunk_size=L)``            items ``[L]``; ``DataLoader(batch_size=B)`` makes
                                                       ``[B, L]`` of them
    ``OnlineDataset(source, chunk_size=L,              items are whole batches ``[N, L]``;
    batch_size=N)``                                    use ``DataLoader(batch_size=None)``
    =================================================  ==================================================

    The second form samples a whole batch at once, which is many times faster. Neither form needs a ``collate_fn``.

    Args:
        source: the source of chunks. One of: a :class:`~embodichain_rl.replay.TrajectoryReplayBuffer`; a TorchRL
            ``ReplayBuffer`` with a :class:`~embodichain_rl.replay.ChunkSampler`; a TorchRL ``ReplayBuffer`` with a
            ``SliceSampler`` whose ``slice_len`` equals ``chunk_size`` or whose ``num_slices`` equals ``batch_size``; or
            any object with a method ``sample_chunks(batch_size, chunk_size, *, generator=None)`` that returns a
            TensorDict ``[batch_size, chunk_size]``.
        chunk_size: steps of a chunk; or a callable that returns the number of steps, such as a
            :class:`~embodichain_rl.datasets.ChunkSizeSampler`, called once for each item.
        batch_size: chunks of an item; None for single chunks.
        transform: a callable that receives each item, a TensorDict ``[L]`` or ``[N, L]``, and returns the item that
            the dataset yields.
        sampling_mode: ``"episode"``, ``"segment"`` or ``"boundary"``, as in
            :class:`~embodichain_rl.replay.ChunkSampler`.

    Keyword Args:
        seed: a non-negative integer; see "Random streams" below.
        options: the other arguments of :class:`~embodichain_rl.replay.ChunkSampler`: ``pad``, ``windows``,
            ``delta_timestamps``, ``fps``, ``weights``, ``replacement``, ``max_age``, ``max_policy_lag``. With windows,
            ``chunk_size`` is None, and items are ``[]`` or ``[N]``. These options and ``sampling_mode`` require a
            source over a :class:`~embodichain_rl.replay.TrajectoryStorage`. The options of the source's own sampler
            are ignored. Without replacement, the trajectories are divided among the workers of a ``DataLoader``. Each
            worker makes passes over its share, and every iteration starts with a new pass.

    Raises:
        InvalidArgumentError: by the constructor, if an argument or a combination of arguments is invalid.
        ChunkShapeError: by iteration, if the source returns chunks of another shape than requested.
        StateMismatchError: if a loaded state was saved by a dataset with other arguments, another worker or another
            rank.
        SharingError: by iteration in a worker of a ``DataLoader``, if the buffer is on a device. Such batches can only
            be gathered in the process that made the buffer (``num_workers=0``).
        EmptyBufferError, ChunkTooLongError: by iteration, if the buffer holds nothing to sample yet. ``next()`` can be
            called on the same iterator again later.

    Single chunks of varying sizes have a padding mask ``("collector", "mask")``, ``bool`` ``[L]``, all True. So every
    batch that is collated from them has the mask.

    Random streams. Every worker of a ``DataLoader``, every rank of a distributed training and every iteration has an
    independent random stream. With a ``seed``, the n-th item of an iteration is a function of
    ``(seed, rank, worker, iteration, n)`` and of the content of the buffer only. Over the same data it is the same in
    another run, and it differs between iterations. ``chunk_size`` is then copied, and the copy is seeded through its
    ``manual_seed`` if it has one. Without a ``seed`` the streams differ in every run, and ``chunk_size`` follows its
    own rules. The rank is that of ``torch.distributed``, or the environment variable ``RANK``. It is read when the
    iteration starts, or when the dataset is passed to a worker.

    Saving and resuming. Use torchdata's ``StatefulDataLoader`` instead of ``DataLoader``. ``loader.state_dict()``
    holds the position in the stream of every worker, with or without a seed. ``loader.load_state_dict(state)``, called
    before the first batch, resumes from there. It works in another process and with another start method. The number
    of workers and the arguments of the dataset must be the same. With a plain ``DataLoader`` and ``num_workers=0``, use
    :meth:`state_dict` of the dataset. A state is a few hundred bytes per worker. It contains neither the content of
    the buffer (use ``rb.dumps``) nor the state of a ``transform``. The state of a callable ``chunk_size`` is included
    through its ``state_dict`` and ``load_state_dict``, which a
    :class:`~embodichain_rl.datasets.ChunkSizeSampler` has. Passes without replacement can't be resumed.

    Worker processes may be started by fork, spawn or forkserver, and may be persistent. They gather batches into shared
    memory, so that a batch is not copied on its way to the main process (see
    :mod:`embodichain_rl.datasets.transport`). A TorchRL buffer over another storage than
    :class:`~embodichain_rl.replay.TrajectoryStorage` reaches a forked worker as a copy of its content at that time,
    unless its storage is in shared memory.

    Example:
        >>> rb = TrajectoryReplayBuffer(max_trajectories=100, max_total_steps=30_000, chunk_size=2)
        >>> done = torch.tensor([[0], [0], [1]]).bool()
        >>> _ = rb.extend(TensorDict({"observation": torch.randn(3, 4), "next": {"done": done}}, [3]))
        >>> dataset = OnlineDataset(rb, chunk_size=2, batch_size=8, seed=0)
        >>> next(iter(DataLoader(dataset, batch_size=None))).shape
        torch.Size([8, 2])
    """

    def __init__(
        self,
        source: Any,
        chunk_size: int | Callable[[], int] | None,
        batch_size: int | None = None,
        transform: Callable[[TensorDict], Any] | None = None,
        sampling_mode: str = "episode",
        *,
        seed: int | None = None,
        **options: Unpack[SamplingOptions],
    ) -> None:
        self._sampler = ChunkSampler(chunk_size, sampling_mode=sampling_mode, **options)
        if transform is not None and not callable(transform):
            raise InvalidArgumentError(f"Got transform={transform!r}; it must be a callable that takes a TensorDict.")
        self.source = source
        self.chunk_size = self._sampler.chunk_size
        self.batch_size = None if batch_size is None else checked_int("batch_size", batch_size, minimum=1)
        self.transform = transform
        self.seed = None if seed is None else checked_int("seed", seed, minimum=0)
        length = None if callable(self.chunk_size) else self.chunk_size
        self._chunks = as_chunk_source(source, length, self.batch_size or 1)
        if self._sampler.options and not takes_chunk_queries(self._chunks):
            raise InvalidArgumentError(
                f"Got {', '.join(self._sampler.options)} with {source!r}, which only supports plain chunks. Use a "
                "TrajectoryReplayBuffer or an engine."
            )
        self._arguments = {
            "draws": DRAWS,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "chunk_size": chunk_size_name(self.chunk_size),
            "options": {name: repr(value) for name, value in self._sampler.options.items()},
        }
        self._iterations = IterationCounter()
        self._begun_here = 0
        self._progress: Progress | None = None  # of the latest iteration in this process
        self._loaded: Mapping[str, Any] | None = None  # to be resumed by the next iteration
        self._rank_handed_over: int | None = None
        current_rank()  # raises for an invalid RANK here rather than in a worker

    @graph_break
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None:
            enter_worker()
        number, workers = (0, 0) if worker is None else (worker.id, worker.num_workers)
        where = StreamPosition(self._rank(), number, workers)
        progress = Progress(self._arguments, where, self.seed, self.chunk_size, self._iterations, self._loaded)
        self._loaded = None
        self._progress = progress
        self._begun_here += 1
        return _Chunks(self, self._sampler.for_worker(number, max(1, workers)), progress)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the latest iteration in this process: nested dicts of ints and strings.

        Raises:
            UnsupportedOperationError: the dataset is iterated in ``DataLoader`` workers instead of this process (use a
                ``StatefulDataLoader``); ``chunk_size`` draws random numbers and has no ``state_dict``; or the dataset
                samples without replacement.

        Example:
            >>> rb = TrajectoryReplayBuffer(max_trajectories=2, max_total_steps=20, chunk_size=2)
            >>> done = torch.tensor([[0], [0], [1]]).bool()
            >>> _ = rb.extend(TensorDict({"observation": torch.randn(3, 4), "next": {"done": done}}, [3]))
            >>> dataset = OnlineDataset(rb, chunk_size=2, batch_size=8)
            >>> batches = iter(dataset)
            >>> first, state = next(batches), dataset.state_dict()
            >>> resumed = OnlineDataset(rb, chunk_size=2, batch_size=8)
            >>> resumed.load_state_dict(state)
            >>> torch.equal(next(iter(resumed))["index"], next(batches)["index"])
            True
        """
        self._sampler.refuse_to_resume()
        if self._progress is not None:
            return self._progress.state_dict()
        if self._loaded is not None:
            return copy.deepcopy(dict(self._loaded))
        if self._iterations.total > self._begun_here:
            raise UnsupportedOperationError(
                "Iterations over this dataset run in DataLoader workers, and their progress is not known in this "
                "process. Use torchdata's StatefulDataLoader and its state_dict(), or num_workers=0."
            )
        where = StreamPosition(self._rank(), 0, 0)
        return initial_state(self._arguments, where, self.chunk_size, self._iterations.next(where.worker))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``, over the same data, with the next iteration in this process.

        Raises:
            StateMismatchError: ``state`` is not the state of a dataset with these arguments. Raised by the next
                iteration if it belongs to another worker, number of workers or rank.
        """
        check_state(state, self._arguments)
        self._loaded = copy.deepcopy(dict(state))
        self._progress = None

    def _rank(self) -> int:
        return current_rank() if self._rank_handed_over is None else self._rank_handed_over

    collate_fn = staticmethod(collate_chunks)
    passthrough_collate_fn = staticmethod(pass_through)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is None:
            return super().__reduce_ex__(protocol)
        return rebuild, (StartedBy(), type(self)), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_progress": None}
        if get_spawning_popen() is None:
            state["_begun_here"] = self._iterations.total  # a copy counts its iterations independently
        elif self._rank_handed_over is None:
            state["_rank_handed_over"] = current_rank()  # the child process has no process group
        return state

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(source={self.source!r}, chunk_size={self.chunk_size!r}, "
            f"batch_size={self.batch_size}, transform={self.transform!r}, seed={self.seed}, {self._sampler!r})"
        )


class _Chunks(Iterator[Any]):
    """One iteration over a dataset.

    Not a generator: a generator ends with its first error, but a batch that the buffer could not provide yet may be
    available at the next call.
    """

    def __init__(self, dataset: OnlineDataset, sampler: ChunkSampler, progress: Progress) -> None:
        self._source: ChunkSource = dataset._chunks
        self._batch_size = dataset.batch_size
        self._transform = dataset.transform
        self._sampler = sampler
        self._takes_queries = takes_chunk_queries(self._source)
        self._progress = progress
        self._generator = torch.Generator()
        # Single chunks are copied again when they are collated, and only the collated batch goes to shared memory.
        self._memory = None if dataset.batch_size is None else outgoing_memory()

    @graph_break
    def __next__(self) -> Any:
        count = self._batch_size or 1
        length = self._next_length()
        query = self._sampler.query(length)
        chunk_query: Any = query if self._takes_queries else length
        # Seeded for every item, so that an item does not depend on how many numbers the earlier items consumed. An item
        # consumes more if a trajectory is evicted while it is read.
        self._generator.manual_seed(self._progress.seed)
        with gathering_into(self._memory):
            data = self._source.sample_chunks(count, chunk_query, generator=self._generator)
        if not isinstance(data, TensorDictBase) or tuple(data.shape) != query.request.batch_shape(count):
            got = f"a batch of shape {list(data.shape)}" if isinstance(data, TensorDictBase) else type(data).__name__
            raise ChunkShapeError(
                f"Requested {count} chunk(s) of {length} steps, but got {got}. The source must return a TensorDict "
                "[batch_size, chunk_size]."
            )
        self._progress.advance()
        if self._batch_size is None:
            data = data[0]
            if callable(self._progress.chunk_size) and self._sampler.pad == "none":
                device = next(iter(data.values(True, True))).device
                data.set(MASK, torch.ones(query.request.length, dtype=torch.bool, device=device))
        if self._transform is None:
            return data
        with drawing_with(self._generator):
            return self._transform(data)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this iteration; see :meth:`OnlineDataset.state_dict`."""
        self._sampler.refuse_to_resume()
        return self._progress.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``.

        Raises:
            StateMismatchError: ``state`` belongs to another dataset, worker, number of workers or rank.
        """
        self._progress.load_state_dict(state)

    def _next_length(self) -> int | None:
        chunk_size = self._progress.chunk_size
        if not callable(chunk_size):
            return chunk_size
        return checked_int(f"the return value of chunk_size={chunk_size!r}", chunk_size(), minimum=1)
