"""Subsets of the trajectories, such as a training and a validation split, for ``ChunkSampler(subset=...)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from embodichain_rl._checks import checked_float
from embodichain_rl.errors import InvalidArgumentError

__all__ = ["Subset", "TrajectorySubset", "checked_subset"]

Subset: TypeAlias = "tuple[str, float] | Callable[[int], bool] | None"
"""``("train", fraction)``, ``("validation", fraction)``, a predicate of a trajectory's id, or None: all."""

PARTS = ("train", "validation")


class TrajectorySubset(ABC):
    """A fixed set of trajectory ids."""

    @abstractmethod
    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return a mask of the ids that belong to the subset, ``bool`` ``[n]``."""

    @property
    @abstractmethod
    def name(self) -> str:
        """A name that the same subset has in every process."""


class _Split(TrajectorySubset):
    """The trajectories whose hashed id lies in one part of the unit interval."""

    def __init__(self, part: str, fraction: float) -> None:
        self._part, self._fraction = part, fraction
        size = round(fraction * 2**32)
        # The training part is at the lower end and the validation part at the upper one: they never overlap as long as
        # their fractions sum to at most 1.
        self._low, self._high = (0, size) if part == "train" else (2**32 - size, 2**32)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        hashed = _hashed(ids)
        return (hashed >= self._low) & (hashed < self._high)

    @property
    def name(self) -> str:
        return repr((self._part, self._fraction))


class _Predicate(TrajectorySubset):
    """The trajectories for which a function returns True. Each id is passed to it once per process, as an ``int``."""

    def __init__(self, predicate: Callable[[int], bool]) -> None:
        self._predicate = predicate
        self._known: dict[int, bool] = {}

    def contains(self, ids: np.ndarray) -> np.ndarray:
        return np.fromiter(map(self._contains, ids.tolist()), bool, len(ids))

    def _contains(self, trajectory_id: int) -> bool:
        known = self._known.get(trajectory_id)
        if known is None:
            answer = self._predicate(trajectory_id)
            if not isinstance(answer, bool | np.bool_):
                raise InvalidArgumentError(
                    f"Got {answer!r} from subset={self._predicate!r} for trajectory {trajectory_id}; it must return "
                    "True or False for the id of a trajectory."
                )
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[trajectory_id] = bool(answer)
        return known

    @property
    def name(self) -> str:
        named: Any = self._predicate if hasattr(self._predicate, "__qualname__") else type(self._predicate)
        return f"{named.__module__}.{named.__qualname__}"

    def __getstate__(self) -> dict[str, Any]:
        return {"_predicate": self._predicate, "_known": {}}


MAX_KNOWN = 1_000_000
"""The number of answers of a predicate that are kept."""


def _hashed(ids: np.ndarray) -> np.ndarray:
    """Return a hash of each id, ``int64`` ``[n]`` in ``[0, 2**32)``: the finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        words = ids.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        words ^= words >> np.uint64(31)
    return (words >> np.uint64(32)).astype(np.int64)


def checked_subset(subset: Any) -> TrajectorySubset | None:
    """Return the subset that an argument describes; None for all trajectories.

    Raises:
        InvalidArgumentError: for anything but a :data:`Subset`.

    Example:
        >>> train, validation = checked_subset(("train", 0.9)), checked_subset(("validation", 0.1))
        >>> ids = np.arange(1000)
        >>> bool((train.contains(ids) ^ validation.contains(ids)).all()), int(validation.contains(ids).sum())
        (True, 94)
    """
    if subset is None or isinstance(subset, TrajectorySubset):
        return subset
    if callable(subset):
        return _Predicate(subset)
    if isinstance(subset, tuple | list) and len(subset) == 2 and subset[0] in PARTS:
        fraction = checked_float("the fraction of the subset", subset[1], minimum=0.0, maximum=1.0)
        if fraction > 0.0:
            return _Split(subset[0], fraction)
    raise InvalidArgumentError(
        f"Got subset={subset!r}; it must be ('train', fraction) or ('validation', fraction) with a fraction above 0 "
        "and at most 1, or a function that takes the id of a trajectory and returns True or False."
    )
