"""The progress of an iteration over a dataset, as a small state that another process can resume from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from embodichain_rl._checks import checked_int
from embodichain_rl.datasets.sampler import ChunkSizeSampler
from embodichain_rl.datasets.streams import ItemStreams, IterationCounter, item_seed, loader_seed, stream_seeds
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError, UnsupportedOperationError
from embodichain_rl.replay.sampling import PassPosition, RandomStreams

__all__ = ["Progress", "StreamPosition", "check_state", "chunk_size_name", "initial_state"]

_NUMBERS = ("iteration", "position", "stream")
_BATCH = ("items_left", "length")
_KEYS = {"arguments", "place", "chunk_size", "pass", *_NUMBERS, *_BATCH}


@dataclass(frozen=True, slots=True)
class StreamPosition:
    """The rank and the ``DataLoader`` worker that iterate. Each pair has an independent random stream."""

    rank: int
    worker: int
    num_workers: int
    """Workers of the ``DataLoader``; 0 in the main process."""


class Progress:
    """One iteration over a dataset: its random stream, and the number of items drawn so far.

    Args:
        arguments: the arguments of the dataset, as plain values by name. A state can only be loaded if they are equal.
        where: the rank and the worker that iterate.
        seed: the seed of the dataset.
        chunk_size: the chunk size of the dataset. With a seed, it is copied, and the copy is seeded if it is seedable.
        iterations: the counter of the dataset. The constructor registers the new iteration with it.
        state: the state to resume from; None for a new iteration.

    Raises:
        StateMismatchError: as :meth:`load_state_dict`. No iteration is registered in this case.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        where: StreamPosition,
        seed: int | None,
        chunk_size: int | Callable[[], int] | None,
        iterations: IterationCounter,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._arguments = arguments
        self._where = where
        self._seed = seed
        self._datasets_chunk_size = chunk_size
        self._iterations = iterations
        self.resumed_pass: PassPosition | None = None
        self._loader = loader_seed()
        if state is not None:
            self._check(state)
        self._start(iterations.begin(where.rank, where.worker, self._loader))
        if state is not None:
            self._resume(state)

    def _start(self, iteration: int) -> None:
        self.iteration, self._position = iteration, 0
        self._items_left = self._length = 0
        self._items = ItemStreams(0)
        self._stream, sizes_seed = stream_seeds(self._seed, self._where.rank, self._where.worker, iteration)
        self.chunk_size = self._datasets_chunk_size
        if self._seed is not None and isinstance(self.chunk_size, _Seedable):
            self.chunk_size = copy.deepcopy(self.chunk_size)
            self.chunk_size.manual_seed(sizes_seed)

    @property
    def position(self) -> int:
        """The number of items drawn so far."""
        return self._position

    @property
    def seed(self) -> int:
        """The seed of the next item."""
        return item_seed(self._stream, self._position)

    def streams(self, count: int) -> RandomStreams:
        """Return the random numbers of the next ``count`` items."""
        if self._items.stream != self._stream:
            self._items = ItemStreams(self._stream)
        return self._items.of(self._position, count)

    def next_length(self, items: int = 1) -> int | None:
        """Return the length of the next item's chunks; None with windows.

        Args:
            items: the number of items of a batch that begins with this item. All of them get the same length.

        Raises:
            InvalidArgumentError: ``chunk_size`` is a callable that does not return an int of at least 1.
        """
        chunk_size = self.chunk_size
        if not callable(chunk_size):
            return chunk_size
        if not self._items_left:
            name = f"the return value of chunk_size={chunk_size!r}"
            self._length, self._items_left = checked_int(name, chunk_size(), minimum=1), items
        return self._length

    @property
    def items_left(self) -> int:
        """The number of items that get the same length as the next one, if lengths are drawn for batches."""
        return self._items_left

    @property
    def begins_batch(self) -> bool:
        """Whether the next item is the first one of a batch of the ``DataLoader``."""
        return not self._items_left

    def abandon_batch(self) -> None:
        """Forget the items of a batch that is not completed."""
        self._items_left = 0

    def advance(self, items: int = 1) -> None:
        """Advance by a number of items."""
        self._position += items
        self._items_left = max(0, self._items_left - items)

    def state_dict(self, position: PassPosition | None = None) -> dict[str, Any]:
        """Return the state to resume from: nested dicts of ints, strings and None.

        Args:
            position: without replacement, how far the passes have come.

        Raises:
            UnsupportedOperationError: ``chunk_size`` draws random numbers and has no ``state_dict``.
        """
        state = initial_state(self._arguments, self._where, self.chunk_size, self.iteration)
        return {
            **state,
            "position": self._position,
            "stream": self._stream,
            "pass": None if position is None else position.as_dict(),
            "items_left": self._items_left,
            "length": self._length,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from ``state``. The next iteration of this worker has the number after the one in ``state``.

        Raises:
            StateMismatchError: ``state`` belongs to another rank, worker or number of workers, or to a dataset with
                other arguments.
        """
        self._check(state)
        self._resume(state)

    def _check(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._arguments)
        if differing := _differences(state["place"], asdict(self._where)):
            raise StateMismatchError(
                f"Got the state of another rank or worker: {differing}. Use the same number of workers as when the "
                "state was saved, and load in each rank the state that this rank saved."
            )
        sizes = state["chunk_size"]
        if (sizes is None) != (_state_of(self._datasets_chunk_size) is None):
            raise StateMismatchError(
                f"Got the state {sizes!r} for chunk_size={self._datasets_chunk_size!r}; a chunk_size with a "
                "state_dict() needs a state, and any other needs None. Make the dataset as it was when the state was "
                "saved."
            )

    def _resume(self, state: Mapping[str, Any]) -> None:
        begun = state["stream"] is not None
        chunk_size = self.chunk_size if begun else self._datasets_chunk_size
        if isinstance(chunk_size, _Stateful):
            chunk_size.load_state_dict(state["chunk_size"])
        if begun:
            self.iteration, self._position, self._stream = (state[name] for name in _NUMBERS)
            self._items_left, self._length = (state[name] for name in _BATCH)
            self.resumed_pass = None if state["pass"] is None else PassPosition.parse(state["pass"])
        else:
            self._start(state["iteration"])
        self._iterations.continue_after(self._where.rank, self._where.worker, self.iteration, self._loader)


def initial_state(
    arguments: Mapping[str, Any], where: StreamPosition, chunk_size: int | Callable[[], int] | None, iteration: int
) -> dict[str, Any]:
    """Return the state of an iteration that has not started, and whose random stream is not determined yet."""
    return {
        "arguments": dict(arguments),
        "place": asdict(where),
        "iteration": iteration,
        "position": 0,
        "stream": None,
        "chunk_size": _state_of(chunk_size),
        "pass": None,
        "items_left": 0,
        "length": 0,
    }


def check_state(state: Any, arguments: Mapping[str, Any]) -> None:
    """Check that ``state`` is the state of a dataset with these arguments.

    Raises:
        StateMismatchError: it is not. The message names the difference.
    """
    if not isinstance(state, Mapping) or set(state) != _KEYS:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatchError(
            f"Got {got}, which is not the state of an OnlineDataset; pass a result of its state_dict(), with the keys "
            f"{sorted(_KEYS)}. Load the state of a StatefulDataLoader with the loader's load_state_dict()."
        )
    if differing := _differences(state["arguments"], arguments):
        raise StateMismatchError(
            f"Got the state of a dataset with other arguments: {differing}. Make the dataset with the arguments that "
            "it had when the state was saved."
        )
    try:
        for name in (*_NUMBERS, *_BATCH):
            if name != "stream" or state[name] is not None:
                checked_int(f"{name} in the state", state[name], minimum=0, maximum=2**64 - 1)
    except InvalidArgumentError as error:
        raise StateMismatchError(str(error)) from None
    if state["pass"] is not None:
        PassPosition.parse(state["pass"])


def chunk_size_name(chunk_size: int | Callable[[], int] | None) -> int | str | None:
    """Return a name that equal chunk sizes share in any two processes, without addresses in memory."""
    if not callable(chunk_size):
        return chunk_size
    if isinstance(chunk_size, ChunkSizeSampler) and type(chunk_size).__repr__ is not object.__repr__:
        return repr(chunk_size)
    named = chunk_size if hasattr(chunk_size, "__qualname__") else type(chunk_size)
    return f"{named.__module__}.{named.__qualname__}"


def _differences(got: Any, needed: Mapping[str, Any]) -> str:
    got = got if isinstance(got, Mapping) else {}
    names = [name for name in {**needed, **got} if got.get(name, "nothing") != needed.get(name, "nothing")]
    return ", ".join(f"{name}={got.get(name)!r} where this one has {needed.get(name)!r}" for name in names)


def _state_of(chunk_size: int | Callable[[], int] | None) -> Any:
    if isinstance(chunk_size, _Stateful):
        return chunk_size.state_dict()
    if isinstance(chunk_size, _Seedable):
        raise UnsupportedOperationError(
            f"Got chunk_size={chunk_size!r}, which has manual_seed() but not state_dict() and load_state_dict(), so "
            "the state of its random numbers can't be saved. Define both methods, or derive it from ChunkSizeSampler."
        )
    return None


@runtime_checkable
class _Seedable(Protocol):
    """A chunk size that is drawn from a seedable random stream."""

    def __call__(self) -> int: ...

    def manual_seed(self, seed: int) -> Any: ...


@runtime_checkable
class _Stateful(Protocol):
    """A chunk size whose state can be saved and loaded."""

    def __call__(self) -> int: ...

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...
