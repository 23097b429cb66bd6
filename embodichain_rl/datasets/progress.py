"""How far an iteration over a dataset has come, as a few numbers that another process can go on from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from embodichain_rl._checks import checked_int
from embodichain_rl.datasets.sampler import ChunkSizeSampler
from embodichain_rl.datasets.streams import IterationCounter, item_seed, stream_seeds
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError, UnsupportedOperationError

__all__ = ["Place", "Progress", "check_state", "chunk_size_name", "initial_state"]

_NUMBERS = ("iteration", "position", "stream")
_KEYS = {"arguments", "place", "chunk_size", *_NUMBERS}


@dataclass(frozen=True, slots=True)
class Place:
    """Who iterates."""

    rank: int
    worker: int
    num_workers: int
    """Workers of the ``DataLoader``; 0 in the main process."""


class Progress:
    """One iteration over a dataset: which random numbers it draws, and how many items it has handed out.

    Args:
        arguments: what the dataset was made with, as plain values by name; a state fits where they are the same.
        place: who iterates.
        seed: of the dataset.
        chunk_size: of the dataset; given a seed, a copy of it is seeded, if it can be.
        iterations: of the dataset; the iteration begins with this call.
        state: where to go on; None for a new iteration.

    Raises:
        StateMismatchError: as :meth:`load_state_dict`; then no iteration has begun.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        place: Place,
        seed: int | None,
        chunk_size: int | Callable[[], int] | None,
        iterations: IterationCounter,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self._arguments = arguments
        self._place = place
        self._seed = seed
        self._datasets_chunk_size = chunk_size
        self._iterations = iterations
        if state is not None:
            self._check(state)
        self._start(iterations.begin(place.worker))
        if state is not None:
            self._go_on(state)

    def _start(self, iteration: int) -> None:
        self._iteration, self._position = iteration, 0
        self._stream, sizes_seed = stream_seeds(self._seed, self._place.rank, self._place.worker, iteration)
        self.chunk_size = self._datasets_chunk_size
        if self._seed is not None and isinstance(self.chunk_size, _Seedable):
            self.chunk_size = copy.deepcopy(self.chunk_size)
            self.chunk_size.manual_seed(sizes_seed)

    @property
    def seed(self) -> int:
        """What the next item is drawn with."""
        return item_seed(self._stream, self._position)

    def advance(self) -> None:
        """Says that the item was drawn."""
        self._position += 1

    def state_dict(self) -> dict[str, Any]:
        """Returns all that it takes to go on: nested dicts of ints, strings and None.

        Raises:
            UnsupportedOperationError: when ``chunk_size`` draws random numbers and can't say where it stands.
        """
        state = initial_state(self._arguments, self._place, self.chunk_size, self._iteration)
        return {**state, "position": self._position, "stream": self._stream}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where ``state`` was taken; the next iteration in this place is the one after that.

        Raises:
            StateMismatchError: when it was taken in another place, or of a dataset with other arguments.
        """
        self._check(state)
        self._go_on(state)

    def _check(self, state: Mapping[str, Any]) -> None:
        check_state(state, self._arguments)
        if differing := _differences(state["place"], asdict(self._place)):
            raise StateMismatchError(
                f"Got the state of an iteration elsewhere: {differing}. Load it with as many workers as it was saved "
                "with, and each rank its own."
            )
        sizes = state["chunk_size"]
        if (sizes is None) != (_state_of(self._datasets_chunk_size) is None):
            raise StateMismatchError(
                f"Got the state {sizes!r} for chunk_size={self._datasets_chunk_size!r}; both have one, or neither."
            )

    def _go_on(self, state: Mapping[str, Any]) -> None:
        begun = state["stream"] is not None
        chunk_size = self.chunk_size if begun else self._datasets_chunk_size
        if isinstance(chunk_size, _Stateful):
            chunk_size.load_state_dict(state["chunk_size"])
        if begun:
            self._iteration, self._position, self._stream = (state[name] for name in _NUMBERS)
        else:
            self._start(state["iteration"])
        self._iterations.go_on_after(self._place.worker, self._iteration)


def initial_state(
    arguments: Mapping[str, Any], place: Place, chunk_size: int | Callable[[], int] | None, iteration: int
) -> dict[str, Any]:
    """Returns the state of an iteration that has not begun, whose random numbers are not settled yet."""
    return {
        "arguments": dict(arguments),
        "place": asdict(place),
        "iteration": iteration,
        "position": 0,
        "stream": None,
        "chunk_size": _state_of(chunk_size),
    }


def check_state(state: Any, arguments: Mapping[str, Any]) -> None:
    """Refuses what is not the state of a dataset with these arguments.

    Raises:
        StateMismatchError: naming what differs.
    """
    if not isinstance(state, Mapping) or set(state) != _KEYS:
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise StateMismatchError(
            f"Got {got}, which is not the state of an OnlineDataset; needed is what its state_dict() returned, with "
            f"{sorted(_KEYS)}. The state of a StatefulDataLoader is loaded by the loader."
        )
    if differing := _differences(state["arguments"], arguments):
        raise StateMismatchError(
            f"Got the state of a dataset with other arguments: {differing}. Make the dataset as it was when the state "
            "was saved."
        )
    try:
        for name in _NUMBERS:
            if name != "stream" or state[name] is not None:
                checked_int(f"{name} in the state", state[name], minimum=0, maximum=2**64 - 1)
    except InvalidArgumentError as error:
        raise StateMismatchError(str(error)) from None


def chunk_size_name(chunk_size: int | Callable[[], int] | None) -> int | str | None:
    """Returns what two equal chunk sizes have in common in any two processes; an address in memory is not."""
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
            "that nobody can tell where its random numbers stand. Give it both, or derive it from ChunkSizeSampler."
        )
    return None


@runtime_checkable
class _Seedable(Protocol):
    """A chunk size that is drawn with random numbers of its own."""

    def __call__(self) -> int: ...

    def manual_seed(self, seed: int) -> Any: ...


@runtime_checkable
class _Stateful(Protocol):
    """A chunk size that can say where it stands."""

    def __call__(self) -> int: ...

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...
