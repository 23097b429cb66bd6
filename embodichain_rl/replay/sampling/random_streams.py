"""The random numbers of a draw: from one generator, or for each chunk from a stream of its own.

A dataset of single chunks seeds a generator for every chunk, so that a chunk does not depend on those drawn before. A
block of such chunks is drawn in one call: :class:`RandomStreams` has the first numbers of all their generators, without
the generators. They are the same to the bit. The few chunks that need more get them from a generator. Whoever draws
takes numbers by :func:`random_numbers`, for any of the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from embodichain_rl.replay.kernels import FIRST_NUMBERS, kernels

__all__ = ["RandomSource", "RandomStreams", "first_numbers", "part_of", "random_numbers", "uniform_tensor"]

_NONE = np.empty((0, FIRST_NUMBERS))


def first_numbers(seeds: np.ndarray) -> np.ndarray:
    """Return the first ``FIRST_NUMBERS`` numbers of the generator of each seed, ``float64`` ``[n, FIRST_NUMBERS]``.

    Args:
        seeds: below 2**32, ``int64`` ``[n]``.
    """
    return kernels().first_numbers(seeds)


class RandomStreams:
    """Independent streams of random numbers, one for each chunk of a batch.

    Stream ``i`` has the numbers of ``torch.Generator().manual_seed(seeds[i])``.

    Args:
        seeds: the seed of each stream, below 2**32, ``int64`` ``[n]``.
        numbers: returns the first numbers of each stream, from :func:`first_numbers`, when they are needed; None: they
            are computed.

    Example:
        >>> streams = RandomStreams(np.array([7, 8]))
        >>> generator = torch.Generator().manual_seed(8)
        >>> bool(streams.take(2)[1] == torch.rand(1, dtype=torch.float64, generator=generator))
        True
    """

    def __init__(self, seeds: np.ndarray, numbers: Callable[[], np.ndarray] | None = None) -> None:
        self._seeds = seeds
        self._find_numbers = numbers
        self._numbers = _NONE
        self._used = np.zeros(len(seeds), dtype=np.int64)
        self._rows: np.ndarray | None = None  # those of a part; None: all
        self._is_new = True

    def __len__(self) -> int:
        return len(self._seeds if self._rows is None else self._rows)

    def take(self, count: int) -> np.ndarray:
        """Return the next numbers of all streams, ``float64`` ``[count]``.

        Args:
            count: a multiple of the number of streams. Of ``k * n`` numbers, the first ``n`` are the next number of
                each stream, the following ``n`` the one after, and so on.
        """
        each = count // len(self)
        if self._is_new and each <= FIRST_NUMBERS:
            self._compute()
            self._used[:] = each
            return self._numbers[:, :each].T.flatten()  # a copy
        self._compute()
        rows = np.arange(len(self._seeds)) if self._rows is None else self._rows
        begin = self._used[rows]
        self._used[rows] = begin + each
        if int(begin.max()) + each <= FIRST_NUMBERS:
            taken = self._numbers[rows[None, :], begin[None, :] + np.arange(each)[:, None]]
        else:
            of_each = [self._of(row, first, each) for row, first in zip(rows.tolist(), begin.tolist(), strict=True)]
            taken = np.stack(of_each, axis=1)
        return taken.reshape(-1)

    def _compute(self) -> None:
        self._is_new = False
        if self._numbers is _NONE:
            find = self._find_numbers
            self._numbers = first_numbers(self._seeds) if find is None else find()

    def _of(self, row: int, first: int, count: int) -> np.ndarray:
        if first + count <= FIRST_NUMBERS:
            return self._numbers[row, first : first + count]
        generator = torch.Generator().manual_seed(int(self._seeds[row]))
        return torch.rand(first + count, dtype=torch.float64, generator=generator).numpy()[first:]

    def part(self, rows: np.ndarray) -> RandomStreams:
        """Return some of the streams, which go on together with these.

        Args:
            rows: their numbers, or a mask.
        """
        self._compute()
        part = object.__new__(RandomStreams)
        part._seeds, part._numbers, part._used = self._seeds, self._numbers, self._used
        part._is_new = False
        part._rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        if self._rows is not None:
            part._rows = self._rows[part._rows]
        return part

    def generator(self, number: int, generator: torch.Generator | None = None) -> torch.Generator:
        """Return a generator that goes on where a stream is.

        Args:
            number: the number of the stream.
            generator: the generator to set; None: a new one.
        """
        row = number if self._rows is None else int(self._rows[number])
        generator = (generator or torch.Generator()).manual_seed(int(self._seeds[row]))
        used = int(self._used[row])
        if used:
            torch.rand(used, dtype=torch.float64, generator=generator)
        return generator


RandomSource = torch.Generator | RandomStreams | None
"""What chunks are drawn with; None is torch's global generator."""


def random_numbers(count: int, generator: RandomSource) -> np.ndarray:
    """Return uniform numbers of ``[0, 1)``, ``float64`` ``[count]``."""
    return uniform_tensor(count, generator).numpy()


def uniform_tensor(count: int, generator: RandomSource) -> torch.Tensor:
    """Return the same as :func:`random_numbers`, as a tensor."""
    if isinstance(generator, RandomStreams):
        return torch.from_numpy(generator.take(count))
    return torch.rand(count, dtype=torch.float64, generator=generator)


def part_of(generator: RandomSource, rows: np.ndarray) -> RandomSource:
    """Return what some of the chunks of a batch are drawn with: their streams, or the one generator.

    Args:
        generator: what all of them are drawn with.
        rows: their numbers, or a mask.
    """
    return generator.part(rows) if isinstance(generator, RandomStreams) else generator
