"""Sampling by priority: a sum tree over the rows of the ledger, in its shared memory."""

from __future__ import annotations

import numpy as np

__all__ = ["PriorityTree", "tree_words"]

BUILT, DIRTY, HIGHEST = range(3)
HEADER_WORDS = 3
"""Words before the tree: whether it is built, whether a change is unfinished, and the highest weight so far."""


def _leaves_of(num_rows: int) -> int:
    return 1 << max(0, num_rows - 1).bit_length()


def tree_words(num_rows: int) -> int:
    """Return the number of ``float64`` words of a tree over ``num_rows`` rows."""
    return HEADER_WORDS + 2 * _leaves_of(num_rows)


class PriorityTree:
    """Binary sum tree with one weight per row of the ledger.

    See Schaul et al., 2016, "Prioritized Experience Replay", section 3.3 and appendix B.2.1.

    Changes need the ledger's lock, reads need none. A draw during a change may use a weight that is slightly out of
    date, but it never returns a row of weight 0. The tree has no cost before :meth:`build` is called.

    A process that is killed during a change leaves the ``DIRTY`` mark. The next change then recomputes all sums.

    Args:
        words: ``float64`` ``[tree_words(num_rows)]`` in shared memory, initially zero.

    Example:
        >>> tree = PriorityTree(np.zeros(tree_words(3)))
        >>> tree.build(np.array([0, 1]))
        >>> tree.set(np.array([0, 1]), np.array([1.0, 3.0]))
        >>> tree.find(np.array([0.2, 0.3, 0.9]))
        array([0, 1, 1])
    """

    def __init__(self, words: np.ndarray) -> None:
        self._header, self._nodes = words[:HEADER_WORDS], words[HEADER_WORDS:]
        self._first_leaf = len(self._nodes) // 2
        self._leaves = self._nodes[self._first_leaf :]
        # Node 1 is the root. The children of node n are 2n and 2n + 1, and its value is their sum.
        self._depth = self._first_leaf.bit_length() - 1

    @property
    def built(self) -> bool:
        """Whether :meth:`build` was called."""
        return bool(self._header[BUILT])

    def build(self, rows: np.ndarray) -> None:
        """Set the weights of ``rows`` to 1 and all others to 0. Inside the ledger's lock."""
        self._header[DIRTY] = 1.0
        self._leaves[:] = 0.0
        self._leaves[rows] = 1.0
        self._header[HIGHEST] = 1.0
        self._recompute_sums()
        self._header[BUILT] = 1.0
        self._header[DIRTY] = 0.0

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """Set the weights of ``rows``, ``int64`` ``[n]`` without duplicates. Inside the ledger's lock."""
        interrupted = self._header[DIRTY]
        self._header[DIRTY] = 1.0
        self._leaves[rows] = weights
        self._header[HIGHEST] = max(self._header[HIGHEST], weights.max(initial=0.0))
        if interrupted:
            self._recompute_sums()
        else:
            nodes = rows + self._first_leaf
            for _ in range(self._depth):
                nodes = nodes >> 1
                self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]
        self._header[DIRTY] = 0.0

    def add(self, row: int) -> None:
        """Give a new row the highest weight so far, so that it is drawn soon. Inside the ledger's lock."""
        self.set(np.array([row]), self._header[HIGHEST : HIGHEST + 1])

    def remove(self, rows: np.ndarray) -> None:
        """Set the weights of ``rows`` to 0. Inside the ledger's lock."""
        self.set(rows, np.zeros(len(rows)))

    def _recompute_sums(self) -> None:
        begin = self._first_leaf
        while begin > 1:
            pairs = self._nodes[begin : 2 * begin].reshape(-1, 2)
            begin //= 2
            self._nodes[begin : 2 * begin] = pairs.sum(axis=1)

    def sums_are_consistent(self) -> bool:
        """Return whether every inner node is the sum of its children. True while the tree is marked ``DIRTY``."""
        inner, children = self._nodes[1 : self._first_leaf], self._nodes[2:].reshape(-1, 2)
        return bool(self._header[DIRTY]) or np.allclose(inner, children.sum(axis=1))

    def find(self, uniform: np.ndarray) -> np.ndarray:
        """Return one row per uniform random number in ``[0, 1)``, drawn in proportion to the weights.

        Args:
            uniform: ``float64`` ``[n]``.

        Returns:
            ``int64`` ``[n]``.
        """
        mass = uniform * self._nodes[1]
        nodes = np.ones(len(uniform), dtype=np.int64)
        for _ in range(self._depth):
            nodes = nodes << 1
            left = self._nodes[nodes]
            # Never go into a subtree of weight 0: sums are rounded, and may be older than the nodes below them.
            right = (mass >= left) & (self._nodes[nodes + 1] > 0.0)
            mass -= left * right
            nodes += right
        return nodes - self._first_leaf

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Return the weights of ``rows``."""
        return self._leaves[rows]
