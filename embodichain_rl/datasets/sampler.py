"""Samplers of chunk sizes.

A chunk-size sampler is a callable without arguments. It returns the number of steps of the next batch of chunks. To
train on chunks of varying lengths, pass one to a dataset: ``chunk_size=UniformChunkSampler(16, 64)``.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from embodichain_rl._checks import checked_float, checked_int
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError

__all__ = ["ChunkSizeSampler", "GMMChunkSampler", "UniformChunkSampler"]

_LONGEST = int(np.iinfo(np.int64).max)

# Identifies this process. A process id is not unique: ids are reused, and two containers may use the same ones.
_this_process = os.urandom(16)
# The worker info that a fork of a DataLoader worker inherits, although the fork is not a DataLoader worker.
_inherited_worker: object = None


def _after_fork() -> None:
    global _this_process, _inherited_worker
    _this_process = os.urandom(16)
    _inherited_worker = get_worker_info()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ChunkSizeSampler(ABC):
    """Base class of samplers of chunk sizes. Each call returns the number of steps of the next chunks.

    To write a subclass, implement ``__call__`` and draw random numbers from :attr:`generator`. This stream never
    repeats in another process. An instance must be picklable to be used with worker processes.

    Random streams. In the process that made the sampler, the numbers are a function of ``seed``. In worker ``k`` of a
    ``DataLoader`` they are a function of ``(seed, k)``: reproducible, and different in every worker. A copy in any
    other process is seeded with fresh entropy from the operating system, whatever the start method. Call
    :meth:`manual_seed` in that process for a reproducible stream. If ``seed`` is None, every process uses fresh
    entropy. A copy made within one process (``copy.deepcopy``, ``pickle``) continues from the state of the original.

    Args:
        seed: a non-negative integer, or None for a stream that differs in every run.

    Raises:
        InvalidArgumentError: ``seed`` is neither None nor a non-negative integer.

    Example:
        >>> class PowerOfTwo(ChunkSizeSampler):
        ...     def __call__(self) -> int:
        ...         return 2 ** int(self.generator.integers(3, 7))
        >>> PowerOfTwo(seed=0)() in {8, 16, 32, 64}
        True
    """

    # Defined on the class, so that an __init__ of a subclass need not call this one.
    _seed: int | None = None
    _home: bytes | None = None
    _generator: np.random.Generator

    def __init__(self, *, seed: int | None = None) -> None:
        self._seed = None if seed is None else checked_int("seed", seed, minimum=0)
        self._settle(keep_seed=True)

    @abstractmethod
    def __call__(self) -> int:
        """Return the number of steps of the next chunk: an int, at least 1."""

    @property
    def generator(self) -> np.random.Generator:
        """The random generator of this sampler in this process. Read it at every call; do not store it."""
        if self._home != _this_process:
            self._settle(keep_seed=False)
        return self._generator

    def manual_seed(self, seed: int) -> None:
        """Restart the stream in this process, as a function of ``seed`` only.

        Copies that are sent to other processes later follow the rules of the class with this seed.

        Args:
            seed: a non-negative integer.

        Raises:
            InvalidArgumentError: ``seed`` is not a non-negative integer.

        Example:
            >>> sizes = UniformChunkSampler(16, 64)
            >>> sizes.manual_seed(7)
            >>> first = sizes()
            >>> sizes.manual_seed(7)
            >>> first == sizes()
            True
        """
        self._seed = checked_int("seed", seed, minimum=0)
        self._home = _this_process
        self._generator = np.random.default_rng(self._seed)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the stream in this process: nested dicts of ints and strings.

        A subclass with further state extends this method and :meth:`load_state_dict`.

        Example:
            >>> sizes = UniformChunkSampler(16, 64)
            >>> state = sizes.state_dict()
            >>> first = sizes()
            >>> sizes.load_state_dict(state)
            >>> first == sizes()
            True
        """
        return {"generator": self.generator.bit_generator.state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume, in this process, from the result of :meth:`state_dict`.

        Raises:
            StateMismatchError: ``state`` is not the state of a chunk-size sampler.
        """
        try:
            self.generator.bit_generator.state = state["generator"]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StateMismatchError(
                f"Got {state!r}, which is not the state of a {type(self).__name__}; pass a result of its state_dict()."
            ) from error

    def _settle(self, *, keep_seed: bool) -> None:
        worker = get_worker_info()
        if self._seed is not None and worker is not None and worker is not _inherited_worker:
            sequence = np.random.SeedSequence(self._seed, spawn_key=(worker.id,))
        else:
            sequence = np.random.SeedSequence(self._seed if keep_seed else None)
        self._home = _this_process
        self._generator = np.random.default_rng(sequence)


class UniformChunkSampler(ChunkSizeSampler):
    """Draw sizes uniformly from ``low`` to ``high``, both inclusive.

    Args:
        low: the shortest chunk, in steps; at least 1.
        high: the longest chunk, in steps; at least ``low``.
        seed: see :class:`ChunkSizeSampler`.

    Raises:
        InvalidArgumentError: an argument is not an integer or is out of range, or ``low`` is greater than ``high``.

    Example:
        >>> sizes = UniformChunkSampler(16, 64, seed=0)
        >>> 16 <= sizes() <= 64
        True
    """

    def __init__(self, low: int, high: int, *, seed: int | None = None) -> None:
        self._low = checked_int("low", low, minimum=1)
        self._high = checked_int("high", high, minimum=1)
        _check_order(self._low, self._high)
        checked_int("high", high, maximum=_LONGEST)
        super().__init__(seed=seed)

    def __call__(self) -> int:
        return int(self.generator.integers(self._low, self._high, endpoint=True))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(low={self._low}, high={self._high}, seed={self._seed})"


class GMMChunkSampler(ChunkSizeSampler):
    """Draw sizes from a mixture of Gaussians, for instance one component for each typical length of a skill.

    A component is drawn by its weight, then a number from its Gaussian. The number is rounded to the nearest integer
    and clamped to ``low`` and ``high``; numbers outside this range are not redrawn.

    Args:
        means: the mean of each component, in steps.
        stds: the standard deviation of each component, in steps; 0 makes a component a fixed size.
        weights: the relative frequency of each component; they need not sum to 1. None means equal weights.
        low: the shortest chunk, in steps. None means 1.
        high: the longest chunk, in steps. None means no bound.
        seed: see :class:`ChunkSizeSampler`.

    Raises:
        InvalidArgumentError: a list is empty, does not have one number for each mean or has a number that is not
            finite; a standard deviation or a weight is negative; all weights are 0; ``low`` or ``high`` is not a
            positive integer, or ``low`` is greater than ``high``.

    Example:
        >>> sizes = GMMChunkSampler(means=[16, 64], stds=[2, 8], weights=[3, 1], low=8, high=96, seed=0)
        >>> 8 <= sizes() <= 96
        True
    """

    def __init__(
        self,
        means: Sequence[float],
        stds: Sequence[float],
        weights: Sequence[float] | None = None,
        low: int | None = None,
        high: int | None = None,
        *,
        seed: int | None = None,
    ) -> None:
        self._means = _checked_numbers("means", means)
        self._stds = _checked_numbers("stds", stds, count=len(self._means), minimum=0)
        self._weights = None
        if weights is not None:
            self._weights = _checked_numbers("weights", weights, count=len(self._means), minimum=0)
            if not any(self._weights):
                raise InvalidArgumentError(f"weights must have at least one above 0, got {self._weights}.")
        self._low = None if low is None else checked_int("low", low, minimum=1)
        self._high = None if high is None else checked_int("high", high, minimum=1)
        self._shortest = 1 if self._low is None else self._low
        self._longest = _LONGEST if self._high is None else self._high
        _check_order(self._shortest, self._longest)
        self._cumulative = _cumulative(self._weights or [1.0] * len(self._means))
        super().__init__(seed=seed)

    def __call__(self) -> int:
        generator = self.generator
        component = bisect_right(self._cumulative, generator.random())
        size = generator.normal(self._means[component], self._stds[component])
        # Compared before rounding: a Gaussian with a very large deviation can draw an infinity, which has no int value.
        if size <= self._shortest:
            return self._shortest
        if size >= self._longest:
            return self._longest
        return round(size)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(means={self._means}, stds={self._stds}, weights={self._weights}, "
            f"low={self._low}, high={self._high}, seed={self._seed})"
        )


def _check_order(low: int, high: int) -> None:
    if low > high:
        raise InvalidArgumentError(f"low must not be above high, got low={low} and high={high}.")


def _checked_numbers(name: str, values: Any, *, count: int | None = None, minimum: float | None = None) -> list[float]:
    if isinstance(values, (str, bytes, bytearray)) or not isinstance(values, (Sequence, np.ndarray)):
        raise InvalidArgumentError(f"{name} must be a sequence of numbers, got {values!r}.")
    if isinstance(values, np.ndarray) and values.ndim != 1:
        raise InvalidArgumentError(f"{name} must be one-dimensional, got an array of shape {values.shape}.")
    if len(values) == 0:
        raise InvalidArgumentError(f"{name} must have at least one number, got none.")
    if count is not None and len(values) != count:
        raise InvalidArgumentError(f"{name} must have one number for each of the {count} means, got {len(values)}.")
    return [checked_float(f"{name}[{i}]", value, minimum=minimum) for i, value in enumerate(values)]


def _cumulative(weights: list[float]) -> list[float]:
    # Scaled by the maximum first, so that very large weights don't sum to infinity and very small ones don't sum to 0.
    sums = np.cumsum(np.asarray(weights) / max(weights))
    return [float(share) for share in sums / sums[-1]]
