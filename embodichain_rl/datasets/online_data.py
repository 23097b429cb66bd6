"""``OnlineDataset``: adapts a live buffer of trajectories to ``torch.utils.data.DataLoader``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple, Unpack, cast

import numpy as np
import torch
from tensordict import NestedKey, TensorDict
from torch.utils.data import IterableDataset, get_worker_info

from embodichain_rl._checks import checked_int, keywords_of, refuse_other_keywords
from embodichain_rl._compiling import graph_break
from embodichain_rl.datasets.chunk_iterator import ChunkIterator
from embodichain_rl.datasets.collate import collate_chunks, pass_through
from embodichain_rl.datasets.held import Held
from embodichain_rl.datasets.loader_batch import loader_starts_worker
from embodichain_rl.datasets.mixture import SOURCE, Mixture, checked_source_weights
from embodichain_rl.datasets.pass_sharing import PassSharing, Sharer, check_passes
from embodichain_rl.datasets.progress import Progress, StreamPosition, check_state, chunk_size_name, initial_state
from embodichain_rl.datasets.sources import ChunkSource, for_worker, takes_chunk_queries, with_provenance
from embodichain_rl.datasets.starting import StartedBy, rebuild
from embodichain_rl.datasets.streams import IterationCounter, Rank, current_rank
from embodichain_rl.datasets.transport import enter_worker
from embodichain_rl.datasets.waiting import checked_wait
from embodichain_rl.errors import ArgumentTypeError, InvalidArgumentError, UnsupportedOperationError
from embodichain_rl.replay.sampling import ChunkDrawer, MixtureOptions, SamplingOptions, option_name

__all__ = ["OnlineDataset"]

DRAWS = 2
"""Version of the mapping from random numbers to chunks. A state saved with another version can't be resumed."""


class OnlineDataset(IterableDataset[Any]):
    """An endless dataset of chunks, sampled from a buffer while other processes write to it.

    =================================================  ==================================================
    ``OnlineDataset(source, chunk_size=L)``            items ``[L]``; ``DataLoader(batch_size=B)`` makes
                                                       ``[B, L]`` of them
    ``OnlineDataset(source, chunk_size=L,              items are whole batches ``[N, L]``;
    batch_size=N)``                                    use ``DataLoader(batch_size=None)``
    =================================================  ==================================================

    Neither form needs a ``collate_fn``. Items of the first form are also drawn together, as many as the ``DataLoader``
    collates, and are only filled if something looks at them before: a ``transform``, or a ``collate_fn`` of the user.
    The second form is faster where there is a transform, since it is called once for each batch.

    Args:
        source: the source of chunks. One of: a :class:`~embodichain_rl.replay.TrajectoryReplayBuffer`; a TorchRL
            ``ReplayBuffer`` with a :class:`~embodichain_rl.replay.ChunkSampler`; a TorchRL ``ReplayBuffer`` with a
            ``SliceSampler`` whose ``slice_len`` equals ``chunk_size`` or whose ``num_slices`` equals ``batch_size``; or
            an :class:`~embodichain_rl.engine.OnlineDataEngine`; or any object with a method
            ``sample_chunks(batch_size, chunk_size, *, generator=None)`` that returns a TensorDict
            ``[batch_size, chunk_size]``. Or a list of these; see "Mixtures" below.
        chunk_size: steps of a chunk; or a callable that returns the number of steps, such as a
            :class:`~embodichain_rl.datasets.ChunkSizeSampler`. It is called once for each item; for single chunks
            that a ``DataLoader`` collates, once for each of its batches, so that they need no padding.
        batch_size: chunks of an item; None for single chunks.
        transform: a callable that receives each item, a TensorDict ``[L]`` or ``[N, L]``, and returns the item that
            the dataset yields.
        sampling_mode: ``"episode"``, ``"segment"`` or ``"boundary"``, as in
            :class:`~embodichain_rl.replay.ChunkSampler`.

    Keyword Args:
        engine: the source, under the name that fits an engine. Give either this or ``source``.
        seed: a non-negative integer; see "Random streams" below.
        provenance: whether chunks of an engine say where they are from, under ``"trajectory"``: ``"run_id"``,
            ``"episode"``, ``"generation"`` and ``"published_at"``; see ``engine.with_provenance``.
        as_dict: whether items are plain dicts with flat keys, such as ``"next.reward"``, for training loops that know
            no TensorDict (Accelerate, the Trainers of Hugging Face and Lightning, LeRobot's policies); see
            :func:`~embodichain_rl.datasets.flat_dict`. ``transform`` is applied before.
            ``collate_fn=OnlineDataset.collate_fn`` pads dicts of unequal length as it pads TensorDicts.
        wait: the number of seconds that a draw waits for data if the buffer holds nothing, or nothing long enough, to
            sample yet; ``float("inf")`` for ever. None: it raises an error at once.
        passes: end each iteration after this number of passes without replacement; None: never.
        drop_last: with ``passes``, leave out the chunks at the end that do not make a whole batch for every worker and
            rank. So all ranks get the same number of batches, as distributed training needs.
        common_keys: whether a mixture leaves out keys that only some of its sources have. Otherwise it refuses them.
        source_key: the key of the number of the source in the chunks of a mixture.
        rank, world_size: the rank of this process and the number of ranks, instead of those that are found; see "Random
            streams". ``rank=0, world_size=1`` gives each rank all chunks.
        options: the other arguments of :class:`~embodichain_rl.replay.ChunkSampler`: ``pad``, ``windows``,
            ``delta_timestamps``, ``fps``, ``weights``, ``replacement``, ``max_age``, ``max_policy_lag``, ``subset``.
            With windows, ``chunk_size`` is None, and items are ``[]`` or ``[N]``. These options and ``sampling_mode``
            require a source over a :class:`~embodichain_rl.replay.TrajectoryStorage`. The options of the source's own
            sampler are ignored.

    Raises:
        InvalidArgumentError: by the constructor, if an argument or a combination of arguments is invalid.
        ChunkShapeError: by iteration, if the source returns chunks of another shape than requested.
        StateMismatchError: if a loaded state was saved by a dataset with other arguments, another worker or another
            rank.
        SharingError: by iteration in a worker of a ``DataLoader``, if the buffer is on a device. Such batches can only
            be gathered in the process that made the buffer (``num_workers=0``).
        EmptyBufferError, ChunkTooLongError: by iteration, if the buffer holds nothing to sample yet. ``next()`` can be
            called on the same iterator again later.
        DataTimeoutError: by iteration, instead of these errors, if there is still nothing after ``wait`` seconds.

    Single chunks of varying sizes have a padding mask ``("collector", "mask")``, ``bool`` ``[L]``, all True. So every
    batch that is collated from them has the mask.

    Random streams. Every worker of a ``DataLoader``, every rank of a distributed training and every iteration has an
    independent random stream. With a ``seed``, the n-th item of an iteration is a function of
    ``(seed, rank, worker, iteration, n)`` and of the content of the buffer only. Over the same data it is the same in
    another run, and it differs between iterations. ``chunk_size`` is then copied, and the copy is seeded through its
    ``manual_seed`` if it has one. Without a ``seed`` the streams differ in every run, and ``chunk_size`` follows its
    own rules. The rank is that of ``torch.distributed``, else given by the environment variables ``RANK`` and
    ``WORLD_SIZE``. It is read when the iteration starts; a worker has the rank of the process that started it. So one
    dataset may be made first and passed to all ranks, such as by ``torch.multiprocessing.spawn``.

    Without replacement (``replacement=False``), a pass is one permutation of all chunks of the trajectories that are
    live when the first process begins it. It is dealt out to the ranks and the workers of the ``DataLoader``, in blocks
    of one batch. So every chunk comes once per pass, whatever the number of workers and ranks, and batches come in the
    same order with any number of workers. Over a buffer that changes meanwhile, chunks that are evicted before their
    turn are left out, and new trajectories are part of the next pass. Every iteration starts with a new pass, and goes
    on with the next one for ever, or ends after ``passes``; its last batch may be smaller. Ranks that each make
    their own dataset need the same content of the buffer (they share it, or have equal copies), and either the same
    ``seed`` or a process group of ``torch.distributed`` that is initialised before.

    Mixtures. With a list of sources, each chunk is from a source that is drawn anew, by ``weights``, a list with one
    number for each source; otherwise all sources are equally likely, and ``weights`` is about the trajectories within
    each. The chunks have the number of their source at ``("trajectory", "source")``, ``int64`` ``[L]`` or ``[N, L]``.
    Ids of text are those of the first source. Sources whose keys, shapes or dtypes differ are refused, unless
    ``common_keys=True`` leaves out the keys that only some of them have.

    Saving and resuming. Use torchdata's ``StatefulDataLoader`` instead of ``DataLoader``. ``loader.state_dict()``
    holds the position in the stream of every worker, with or without a seed. ``loader.load_state_dict(state)``, called
    before the first batch, resumes from there. It works in another process and with another start method. The number
    of workers and the arguments of the dataset must be the same. With a plain ``DataLoader`` and ``num_workers=0``, use
    :meth:`state_dict` of the dataset. A state is a few hundred bytes per worker. It contains neither the content of
    the buffer (use ``rb.dumps``) nor the state of a ``transform``. The state of a callable ``chunk_size`` is included
    through its ``state_dict`` and ``load_state_dict``, which a
    :class:`~embodichain_rl.datasets.ChunkSizeSampler` has. A pass without replacement is resumed over the same buffer,
    or in a new process over a new buffer into which its checkpoint was loaded. Evicted chunks are left out.

    Worker processes may be started by fork, spawn or forkserver, and may be persistent. They gather batches into shared
    memory, so that a batch is not copied on its way to the main process (see
    :mod:`embodichain_rl.datasets.transport`). They load TorchRL only if the source has transforms, or is a TorchRL
    buffer, or if something asks for :attr:`source` there. A TorchRL buffer over another storage than
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
        source: Any = None,
        chunk_size: int | Callable[[], int] | None = None,
        batch_size: int | None = None,
        transform: Callable[[TensorDict], Any] | None = None,
        sampling_mode: str = "episode",
        *,
        engine: Any = None,
        seed: int | None = None,
        provenance: bool = False,
        as_dict: bool = False,
        wait: float | None = None,
        passes: int | None = None,
        drop_last: bool = False,
        common_keys: bool = False,
        source_key: NestedKey = SOURCE,
        rank: int | None = None,
        world_size: int | None = None,
        **options: Unpack[MixtureOptions],
    ) -> None:
        if (source is None) == (engine is None):
            raise InvalidArgumentError(f"Got source={source!r} and engine={engine!r}; needed is one of them.")
        names = keywords_of(OnlineDataset.__init__, ChunkDrawer.__init__)
        refuse_other_keywords(type(self).__name__, options, names)
        source = engine if source is None else source
        self.batch_size = None if batch_size is None else checked_int("batch_size", batch_size, minimum=1)
        source_weights = None
        if isinstance(source, list | tuple):
            source, source_weights = list(source), _source_weights(source, options)
        own_options = cast("SamplingOptions", options)  # without weights of sources
        if not (chunk_size is None or callable(chunk_size) or isinstance(chunk_size, int | float | np.number)):
            raise ArgumentTypeError(
                f"Got chunk_size={chunk_size!r}; it must be a number of steps, or a callable that "
                "returns one, such as a ChunkSizeSampler."
            )
        self._sampler = ChunkDrawer(chunk_size, sampling_mode=sampling_mode, **own_options)
        if transform is not None and not callable(transform):
            raise InvalidArgumentError(f"Got transform={transform!r}; it must be a callable that takes a TensorDict.")
        if not isinstance(as_dict, bool):
            raise InvalidArgumentError(f"Got as_dict={as_dict!r}; it must be True or False.")
        self.chunk_size = self._sampler.chunk_size
        self.transform = transform
        self.as_dict = as_dict
        self.seed = None if seed is None else checked_int("seed", seed, minimum=0)
        self.wait = checked_wait(wait)
        self.drop_last = drop_last
        mixture = source_weights is not None
        self.passes = check_passes(passes, drop_last, replacement=self._sampler.replacement, mixture=mixture)
        self._given_rank = _given_rank(rank, world_size)
        if not isinstance(provenance, bool):
            raise InvalidArgumentError(f"Got provenance={provenance!r}; it must be True or False.")
        from embodichain_rl.datasets.torchrl_sources import as_chunk_source  # loads TorchRL, which workers do not need

        length = None if callable(self.chunk_size) else self.chunk_size
        sources = [
            as_chunk_source(with_provenance(each) if provenance else each, length, self.batch_size or 1)
            for each in (source if mixture else [source])
        ]
        self._chunks = (
            sources[0] if source_weights is None else Mixture(sources, source_weights, source_key, common_keys)
        )
        self._given = Held(_Given(source, self._chunks))
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
            "passes": self.passes,
            "drop_last": self.drop_last,
            "source_weights": source_weights,
            "options": {name: option_name(value) for name, value in self._sampler.options.items()},
        }
        self._iterations = IterationCounter()
        self._begun_here = 0
        self._latest: ChunkIterator | None = None  # the latest iteration in this process
        self._loaded: Mapping[str, Any] | None = None  # to be resumed by the next iteration
        self._rank_handed_over: Rank | None = None
        own_rank = self._rank()  # raises for an invalid RANK here rather than in a worker
        self._sharing = None if self._sampler.replacement else PassSharing(self._arguments, own_rank)

    @graph_break
    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None:
            enter_worker()
        number, workers = (0, 0) if worker is None else (worker.id, worker.num_workers)
        rank = self._rank()
        if self._sharing is not None:
            self._sharing.check(rank)
        where = StreamPosition(rank.rank, number, workers)
        progress = Progress(self._arguments, where, self.seed, self.chunk_size, self._iterations, self._loaded)
        self._loaded = None
        self._begun_here += 1
        self._latest = ChunkIterator(
            self._chunks,
            self._sampler,
            progress,
            batch_size=self.batch_size,
            transform=self.transform,
            as_dict=self.as_dict,
            wait=self.wait,
            sharing=self._sharing,
            sharer=Sharer(rank, number, max(1, workers)),
        )
        return self._latest

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the latest iteration in this process: nested dicts of ints and strings.

        Raises:
            UnsupportedOperationError: the dataset is iterated in ``DataLoader`` workers instead of this process (use a
                ``StatefulDataLoader``); or ``chunk_size`` draws random numbers and has no ``state_dict``.

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
        if self._latest is not None:
            return self._latest.state_dict()
        if self._loaded is not None:
            return copy.deepcopy(dict(self._loaded))
        rank = self._rank().rank
        if self._iterations.begun(rank) > self._begun_here:
            raise UnsupportedOperationError(
                "Iterations over this dataset run in DataLoader workers, and their progress is not known in this "
                "process. Use torchdata's StatefulDataLoader and its state_dict(), or num_workers=0."
            )
        where = StreamPosition(rank, 0, 0)
        return initial_state(self._arguments, where, self.chunk_size, self._iterations.next(rank, where.worker))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``, over the same data, with the next iteration in this process.

        Raises:
            StateMismatchError: ``state`` is not the state of a dataset with these arguments. Raised by the next
                iteration if it belongs to another worker, number of workers or rank.
        """
        check_state(state, self._arguments)
        self._loaded = copy.deepcopy(dict(state))
        self._latest = None

    @property
    def source(self) -> Any:
        """The source of chunks, or the list of them, as it was given."""
        return self._given.value.source

    def _rank(self) -> Rank:
        return self._given_rank or current_rank(self._rank_handed_over)

    collate_fn = staticmethod(collate_chunks)
    passthrough_collate_fn = staticmethod(pass_through)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if get_spawning_popen() is None:
            return super().__reduce_ex__(protocol)
        return rebuild, (StartedBy(), type(self)), self.__getstate__()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_latest": None}
        if get_spawning_popen() is None:  # a copy counts its iterations independently
            state["_begun_here"] = self._iterations.begun(self._rank().rank)
        else:
            state["_rank_handed_over"] = self._rank()  # for a worker, which has no process group
        chunks = self._given.value.chunks
        state["_chunks"] = for_worker(chunks) if loader_starts_worker() else chunks
        if state["_chunks"] is not chunks:
            state["_given"] = self._given.unread()
        return state

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(source={self.source!r}, chunk_size={self.chunk_size!r}, "
            f"batch_size={self.batch_size}, transform={self.transform!r}, seed={self.seed}, "
            f"as_dict={self.as_dict}, {self._sampler!r})"
        )


class _Given(NamedTuple):
    """What a dataset was given, in a process that is no worker."""

    source: Any
    chunks: ChunkSource


def _given_rank(rank: int | None, world_size: int | None) -> Rank | None:
    if rank is None and world_size is None:
        return None
    if rank is None or world_size is None:
        raise InvalidArgumentError(f"Got rank={rank} and world_size={world_size}; give both or none of them.")
    world_size = checked_int("world_size", world_size, minimum=1)
    return Rank(checked_int("rank", rank, minimum=0, maximum=world_size - 1), world_size)


def _source_weights(sources: Sequence[Any], options: Any) -> list[float]:
    """Return the weight of each source, and take it out of the options of the sampler."""
    if not sources:
        raise InvalidArgumentError("Got no sources; a mixture needs at least one.")
    weights = options.get("weights")
    if isinstance(weights, list | tuple | np.ndarray | torch.Tensor):
        del options["weights"]
        return checked_source_weights(weights, len(sources))
    return [1.0] * len(sources)
