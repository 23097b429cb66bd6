"""The dataset that adapts a live buffer of trajectories to ``torch.utils.data.DataLoader``."""

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
from embodichain_rl.datasets.progress import Place, Progress, check_state, chunk_size_name, initial_state
from embodichain_rl.datasets.sources import ChunkSource, as_chunk_source, takes_chunk_queries
from embodichain_rl.datasets.streams import IterationCounter, current_rank
from embodichain_rl.datasets.transport import finish_sending_at_exit, outgoing_memory
from embodichain_rl.errors import ChunkShapeError, InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.host import gathering_into
from embodichain_rl.replay.sampling import ChunkSampler, SamplingOptions, drawing_with
from embodichain_rl.replay.schema import MASK

__all__ = ["OnlineDataset"]

DRAWS = 1
"""Which way random numbers become chunks; a state of another way does not go on with the same ones."""


class OnlineDataset(IterableDataset[Any]):
    """An endless dataset of chunks, drawn from a buffer while others write to it.

    =================================================  ==================================================
    ``OnlineDataset(source, chunk_size=L)``            items ``[L]``; ``DataLoader(batch_size=B)`` makes
                                                       ``[B, L]`` of them
    ``OnlineDataset(source, chunk_size=L,              items are whole batches ``[N, L]``;
    batch_size=N)``                                    ``DataLoader(batch_size=None)`` passes them on
    =================================================  ==================================================

    The second form draws a batch at once, which is many times faster. Neither needs a ``collate_fn``.

    Args:
        source: what to draw from: a :class:`~embodichain_rl.replay.TrajectoryReplayBuffer`; any TorchRL
            ``ReplayBuffer`` with a :class:`~embodichain_rl.replay.ChunkSampler` or a ``SliceSampler``, whose
            ``slice_len`` must then be ``chunk_size``, or its ``num_slices`` ``batch_size``; or any object with a method
            ``sample_chunks(batch_size, chunk_size, *, generator=None)`` that returns a TensorDict
            ``[batch_size, chunk_size]``.
        chunk_size: steps of a chunk; or a callable that returns them, such as a
            :class:`~embodichain_rl.datasets.ChunkSizeSampler`, asked once for each item.
        batch_size: chunks of an item; None for single chunks.
        transform: called with each item, a TensorDict ``[L]`` or ``[N, L]``; what it returns is the item.
        sampling_mode: ``"episode"``, ``"segment"`` or ``"boundary"``, as in
            :class:`~embodichain_rl.replay.ChunkSampler`.

    Keyword Args:
        seed: a non-negative integer; see below.
        options: all else that :class:`~embodichain_rl.replay.ChunkSampler` takes: ``pad``, ``windows``,
            ``delta_timestamps``, ``fps``, ``weights``, ``replacement``, ``max_age``, ``max_policy_lag``. With windows,
            ``chunk_size`` is None, and items are ``[]`` or ``[N]``. These and ``sampling_mode`` need a source over a
            :class:`~embodichain_rl.replay.TrajectoryStorage`; those of the source's own sampler are not asked for.
            Without replacement, the workers of a ``DataLoader`` share the trajectories out among them, each goes
            through passes over its own, and every iteration begins with a new pass.

    Raises:
        InvalidArgumentError: by the constructor, for arguments that can't work, or not together.
        ChunkShapeError: by iteration, when the source hands out other chunks than it was asked for.
        StateMismatchError: when a state is loaded that was not saved by such a dataset, worker and rank.
        SharingError: by iteration in a worker of a ``DataLoader``, when the buffer lies on a device: batches are
            gathered there, in the process that made it (``num_workers=0``).
        EmptyBufferError, ChunkTooLongError: by iteration, from a buffer that has nothing to draw yet. The iterator can
            be asked again later.

    Single chunks of sizes that change have ``("collector", "mask")``, ``bool`` ``[L]``, all True, so that the batches
    that they are padded to always have it.

    Streams. Every worker of a ``DataLoader``, every rank of a distributed training and every iteration draws random
    numbers of its own. Given a ``seed``, the n-th item of an iteration is a function of
    ``(seed, rank, worker, iteration, n)`` and of what the buffer holds, and of nothing that came before: over the same
    data it is the same in another run, and the next iteration is another one. ``chunk_size`` is then copied, and the
    copy seeded through its ``manual_seed`` if it has one. Without a ``seed`` all is different every time, and
    ``chunk_size`` follows its own rules. The rank is that of ``torch.distributed``, or ``RANK`` of the environment, at
    the time of the iteration, or when the dataset is handed to a worker.

    Stopping and going on. With torchdata's ``StatefulDataLoader`` in the place of ``DataLoader``,
    ``loader.state_dict()`` holds where the stream of every worker stands, with a seed or without, and
    ``loader.load_state_dict(state)`` before the first batch goes on from there, also in another process, and with
    workers that are started in another way; there must be as many, and a dataset with the same arguments. A plain
    ``DataLoader`` with ``num_workers=0`` goes on by the :meth:`state_dict` of the dataset. A state is a few hundred
    bytes a worker. It holds neither what the buffer holds (``rb.dumps``) nor what a ``transform`` remembers; a callable
    ``chunk_size`` is part of it through its own ``state_dict`` and ``load_state_dict``, as those of
    :class:`~embodichain_rl.datasets.ChunkSizeSampler` are. Passes without replacement can't be gone on with.

    Worker processes may be started by fork, spawn or forkserver, and be persistent. What they gather lies in shared
    memory from the start and is not copied on its way (see :mod:`embodichain_rl.datasets.transport`). A TorchRL buffer
    over other storages than :class:`~embodichain_rl.replay.TrajectoryStorage` reaches a forked worker as a copy of what
    it holds then, unless its storage is in shared memory.

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
                f"Got {', '.join(self._sampler.options)} with {source!r}, which hands out nothing but chunks. Use "
                "a TrajectoryReplayBuffer, or an engine."
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
        self._progress: Progress | None = None  # of the iteration that was begun last in this process
        self._loaded: Mapping[str, Any] | None = None  # by the next iteration
        self._rank_handed_over: int | None = None
        current_rank()  # refuses a RANK that is none here, not in a worker

    @graph_break
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None:
            finish_sending_at_exit()
        number, workers = (0, 0) if worker is None else (worker.id, worker.num_workers)
        place = Place(self._rank(), number, workers)
        progress = Progress(self._arguments, place, self.seed, self.chunk_size, self._iterations, self._loaded)
        self._loaded = None
        self._progress = progress
        self._begun_here += 1
        return _Chunks(self, self._sampler.for_worker(number, max(1, workers)), progress)

    def state_dict(self) -> dict[str, Any]:
        """Returns where the iteration stands that was begun last in this process: some ints and strings.

        Raises:
            UnsupportedOperationError: when nobody iterates in this process, but ``DataLoader`` workers do, which only
                a ``StatefulDataLoader`` can ask; when ``chunk_size`` draws random numbers and has no ``state_dict``;
                without replacement.

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
                "Iterations over this dataset run in DataLoader workers, and this process does not know how far they "
                "are. Use torchdata's StatefulDataLoader and its state_dict(), or num_workers=0."
            )
        place = Place(self._rank(), 0, 0)
        return initial_state(self._arguments, place, self.chunk_size, self._iterations.next(place.worker))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Has the next iteration in this process go on where ``state`` was taken, over the same data.

        Raises:
            StateMismatchError: when it is not the state of a dataset with these arguments; by the iteration, when it is
                that of another worker, number of workers or rank.
        """
        check_state(state, self._arguments)
        self._loaded = copy.deepcopy(dict(state))
        self._progress = None

    def _rank(self) -> int:
        return current_rank() if self._rank_handed_over is None else self._rank_handed_over

    collate_fn = staticmethod(collate_chunks)
    passthrough_collate_fn = staticmethod(pass_through)

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_progress": None}
        if get_spawning_popen() is None:
            state["_begun_here"] = self._iterations.total  # a copy counts on by itself
        elif self._rank_handed_over is None:
            state["_rank_handed_over"] = current_rank()  # the child has no process group
        return state

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(source={self.source!r}, chunk_size={self.chunk_size!r}, "
            f"batch_size={self.batch_size}, transform={self.transform!r}, seed={self.seed}, {self._sampler!r})"
        )


class _Chunks(Iterator[Any]):
    """One iteration over a dataset.

    Not a generator: those end with the first error, and the batch that the buffer could not give yet may be there
    when it is asked for again.
    """

    def __init__(self, dataset: OnlineDataset, sampler: ChunkSampler, progress: Progress) -> None:
        self._source: ChunkSource = dataset._chunks
        self._batch_size = dataset.batch_size
        self._transform = dataset.transform
        self._sampler = sampler
        self._takes_queries = takes_chunk_queries(self._source)
        self._progress = progress
        self._generator = torch.Generator()
        # Single chunks are copied once more, when they are put together to a batch; that goes to shared memory.
        self._memory = None if dataset.batch_size is None else outgoing_memory()

    @graph_break
    def __next__(self) -> Any:
        count = self._batch_size or 1
        length = self._next_length()
        query = self._sampler.query(length)
        asked_for: Any = query if self._takes_queries else length
        # Seeded for every item, so that it is drawn with the same numbers whatever the ones before took, which is more
        # where a trajectory is evicted while it is read.
        self._generator.manual_seed(self._progress.seed)
        with gathering_into(self._memory):
            data = self._source.sample_chunks(count, asked_for, generator=self._generator)
        if not isinstance(data, TensorDictBase) or tuple(data.shape) != query.request.batch_shape(count):
            got = f"a batch of shape {list(data.shape)}" if isinstance(data, TensorDictBase) else type(data).__name__
            raise ChunkShapeError(
                f"Asked for {count} chunk(s) of {length} steps, and got {got}. The source must return a TensorDict "
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
        """Returns where this iteration stands; see :meth:`OnlineDataset.state_dict`."""
        self._sampler.refuse_to_resume()
        return self._progress.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken.

        Raises:
            StateMismatchError: when it is not one of this dataset, worker, number of workers and rank.
        """
        self._progress.load_state_dict(state)

    def _next_length(self) -> int | None:
        chunk_size = self._progress.chunk_size
        if not callable(chunk_size):
            return chunk_size
        return checked_int(f"the return value of chunk_size={chunk_size!r}", chunk_size(), minimum=1)
