"""How often each chunk should be drawn, computed from the definition of the draws, and a test of what was drawn.

Nothing here calls the code under test: the probabilities are listed chunk by chunk from the lengths, segments and
weights of the trajectories, with NumPy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

__all__ = ["Chunks", "Tally", "Trajectories", "chunks_of"]

POSITIONS = 6
"""Position bins: the first offset of a trajectory, its last one, and four in between."""

LENGTHS = 3
"""Length bins for each group."""

LEAST_EXPECTED = 10.0
"""Cells with fewer expected draws are merged: Pearson's statistic follows its distribution only for larger ones."""


@dataclass(frozen=True)
class Trajectories:
    """What is in the buffer: arrays ``[n]``, ordered by id."""

    ids: np.ndarray
    lengths: np.ndarray
    groups: np.ndarray
    versions: np.ndarray
    priorities: np.ndarray
    segment: int
    """Steps of a segment, of which the last one of a trajectory may be shorter."""

    @property
    def newest(self) -> int:
        return int(self.ids[-1])


Offsets = Callable[[int, int], np.ndarray]
"""The valid offsets of a trajectory, from its length and the length of its segments."""

Weight = Callable[[Trajectories, np.ndarray], np.ndarray]
"""The weight ``[n]`` of each trajectory, from the number of its valid offsets ``[n]``."""


@dataclass(frozen=True)
class Chunks:
    """All chunks that may be drawn, one after the other, ``[m]`` in all."""

    ids: np.ndarray
    """The trajectory of each chunk."""
    offsets: np.ndarray
    probabilities: np.ndarray
    cells: np.ndarray
    """Group, length and position of each chunk, as one number."""

    def find(self, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return the numbers of the given chunks.

        Raises:
            AssertionError: for a chunk that must not be drawn.
        """
        keys = self.ids * (1 << 20) + self.offsets + (1 << 10)
        wanted = ids * (1 << 20) + offsets + (1 << 10)
        found = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        wrong = keys[found] != wanted
        assert not wrong.any(), f"drawn, but not valid: trajectory {ids[wrong][0]}, offset {offsets[wrong][0]}"
        return found


def chunks_of(trajectories: Trajectories, offsets: Offsets, weight: Weight) -> Chunks:
    """List the chunks of these trajectories with their probabilities."""
    valid = [offsets(int(length), trajectories.segment) for length in trajectories.lengths]
    counts = np.array([len(each) for each in valid])
    weights = np.where(counts > 0, weight(trajectories, counts), 0.0)
    weights = weights / weights.sum()
    number = np.repeat(np.arange(len(counts)), counts)
    place = np.concatenate([np.arange(count) for count in counts])
    last = counts[number] - 1
    position = np.where(place == 0, 0, np.where(place == last, POSITIONS - 1, 1 + (place * 4) // np.maximum(last, 1)))
    lengths = _thirds(trajectories.lengths)[number]
    cells = (trajectories.groups[number] * LENGTHS + lengths) * POSITIONS + position
    return Chunks(trajectories.ids[number], np.concatenate(valid), weights[number] / counts[number], cells)


def _thirds(lengths: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.array([15, 30]), lengths)


class Tally:
    """Draws and expected draws a cell, over any number of states of the buffer.

    The chunks of a batch are drawn independently of each other, with replacement. So the counts of a state are
    multinomial, and Pearson's statistic of their sum over all states has at most the chi-square distribution: the sum
    of multinomial counts with different probabilities varies less than one with their mean.
    """

    def __init__(self) -> None:
        self._drawn: np.ndarray = np.zeros(1)
        self._expected: np.ndarray = np.zeros(1)

    def add(self, chunks: Chunks, ids: np.ndarray, offsets: np.ndarray) -> None:
        """Count the draws of these chunks."""
        found = chunks.find(ids, offsets)
        size = max(len(self._drawn), int(chunks.cells.max()) + 1)
        self._drawn, self._expected = self._padded(self._drawn, size), self._padded(self._expected, size)
        self._drawn += np.bincount(chunks.cells[found], minlength=size)
        self._expected += len(found) * np.bincount(chunks.cells, chunks.probabilities, minlength=size)

    @property
    def draws(self) -> int:
        return int(self._drawn.sum())

    @property
    def farthest(self) -> float:
        """Return the largest relative deviation of a cell."""
        drawn, expected = self._merged()
        return float(np.abs(drawn / expected - 1).max())

    def p_value(self) -> float:
        """Return the probability of a deviation at least as large, if the draws are what was asked for."""
        drawn, expected = self._merged()
        statistic = float(((drawn - expected) ** 2 / expected).sum())
        freedom = len(drawn) - 1
        return float(
            torch.special.gammaincc(torch.tensor(freedom / 2.0).double(), torch.tensor(statistic / 2).double())
        )

    def _merged(self) -> tuple[np.ndarray, np.ndarray]:
        large = self._expected >= LEAST_EXPECTED
        rest = np.array([self._drawn[~large].sum()]), np.array([self._expected[~large].sum()])
        assert rest[1][0] > 0 or rest[0][0] == 0, "chunks were drawn that have probability 0"
        drawn, expected = self._drawn[large], self._expected[large]
        if rest[1][0] < LEAST_EXPECTED:  # too few for a cell of their own
            drawn[-1:] += rest[0]
            expected[-1:] += rest[1]
            return drawn, expected
        return np.concatenate([drawn, rest[0]]), np.concatenate([expected, rest[1]])

    @staticmethod
    def _padded(values: np.ndarray, size: int) -> np.ndarray:
        return np.concatenate([values, np.zeros(size - len(values))])
