"""How likely each trajectory is to be drawn: a sum tree and a max tree in the ledger's shared memory."""

from __future__ import annotations

import numpy as np

__all__ = ["PriorityTree", "tree_words"]

BUILT, DIRTY = range(2)
HEAD = 2
"""Words before the trees: whether they are built; whether a change was begun and not ended."""

FEW = 4
"""Up to so many rows are changed one by one: for a few of them plain numbers are faster than arrays."""


def _leaves_of(num_rows: int) -> int:
    return 1 << max(0, num_rows - 1).bit_length()


def tree_words(num_rows: int) -> int:
    """Return the number of ``float64`` words that the trees over ``num_rows`` rows take."""
    return HEAD + 3 * _leaves_of(num_rows)


class PriorityTree:
    """Binary trees over one weight per row of the ledger: of sums, from which rows are drawn, and of maxima.

    The sum tree is that of Schaul et al., 2016, "Prioritized Experience Replay", section 3.3 and appendix B.2.1. Both
    trees have the same leaves.

    Changes need the ledger's lock. Reads take no lock: a draw during a change may land on a row whose weight is a
    moment old, but never on a row without weight. Before :meth:`build` the trees cost nothing.

    A process that is killed during a change leaves a mark. Whoever needs the trees next inside the lock rebuilds the
    inner nodes from the leaves.

    Args:
        words: ``float64`` ``[tree_words(num_rows)]``, zeros at first; in shared memory.

    Example:
        >>> tree = PriorityTree(np.zeros(tree_words(3)))
        >>> tree.build(np.array([0, 1]))
        >>> tree.set(np.array([0, 1]), np.array([1.0, 3.0]))
        >>> tree.find(np.array([0.2, 0.3, 0.9]))
        array([0, 1, 1])
        >>> tree.largest(0, 1), tree.largest(0, 2)
        (1.0, 3.0)
    """

    def __init__(self, words: np.ndarray) -> None:
        self._first_leaf = (len(words) - HEAD) // 3
        self._head, trees = words[:HEAD], words[HEAD:]
        # The children of node n are 2n and 2n + 1, the root is node 1. Both trees have the leaves of the sums.
        self._nodes, self._maxima = trees[: 2 * self._first_leaf], trees[2 * self._first_leaf :]
        self._leaves = self._nodes[self._first_leaf :]
        self._depth = self._first_leaf.bit_length() - 1
        # Single words are read and written several times as fast through a memoryview as through an array.
        self._sum_words, self._max_words = memoryview(self._nodes), memoryview(self._maxima)  # type: ignore[arg-type]

    @property
    def built(self) -> bool:
        """Whether :meth:`build` was called."""
        return bool(self._head[BUILT])

    def build(self, rows: np.ndarray) -> None:
        """Set the weights of ``rows``, ``int64`` ``[n]``, to 1 and all others to 0. Needs the ledger's lock."""
        self._head[DIRTY] = 1.0
        self._leaves[:] = 0.0
        self._leaves[rows] = 1.0
        self._rebuild()
        self._head[BUILT] = 1.0
        self._head[DIRTY] = 0.0

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """Set the weights of ``rows``, ``int64`` ``[n]`` without repetition. Needs the ledger's lock."""
        torn = self._head[DIRTY]
        self._head[DIRTY] = 1.0
        self._leaves[rows] = weights
        if torn:
            self._rebuild()
        elif len(rows) <= FEW:
            for row in rows.tolist():
                self._update_above(row)
        else:
            self._update_above_all(rows)
        self._head[DIRTY] = 0.0

    def add(self, row: int, first: int, end: int, others: np.ndarray) -> None:
        """Give a new row the largest weight of the rows ``first`` to ``end - 1`` and ``others``: it is soon drawn.

        Without any such row its weight is 1. Needs the ledger's lock.
        """
        if self._head[DIRTY]:
            self._rebuild()
            self._head[DIRTY] = 0.0
        largest = max(self.largest(first, end), self._leaves[others].max(initial=0.0))
        self.set(np.array([row]), np.array([largest or 1.0]))

    def remove(self, rows: np.ndarray) -> None:
        """Set the weights of ``rows``, ``int64`` ``[n]``, to 0. Needs the ledger's lock."""
        self.set(rows, np.zeros(len(rows)))

    def largest(self, first: int, end: int) -> float:
        """Return the largest weight of the rows ``first`` to ``end - 1``; 0 if there are none. Needs the ledger's lock.

        The rows form a ring: where ``end`` is less than ``first``, those from ``first`` to the last row and from 0 to
        ``end - 1`` are meant.
        """
        if end < first:
            return max(self.largest(first, self._first_leaf), self.largest(0, end))
        low, high, largest = first + self._first_leaf, end + self._first_leaf, 0.0
        words = self._sum_words
        while low < high:  # one level of the tree after the other: the nodes at the edges whose parent covers too much
            if low & 1:
                largest = max(largest, words[low])
                low += 1
            if high & 1:
                high -= 1
                largest = max(largest, words[high])
            low, high, words = low >> 1, high >> 1, self._max_words
        return largest

    def _update_above(self, row: int) -> None:
        """Recompute the nodes above one leaf."""
        sums, maxima, below = self._sum_words, self._max_words, self._sum_words
        node = row + self._first_leaf
        for _ in range(self._depth):
            left, node = node & -2, node >> 1
            sums[node] = sums[left] + sums[left + 1]
            maxima[node] = max(below[left], below[left + 1])
            below = maxima

    def _update_above_all(self, rows: np.ndarray) -> None:
        """Recompute the nodes above some leaves, level by level."""
        nodes, below = rows + self._first_leaf, self._nodes
        for _ in range(self._depth):
            left, nodes = nodes & -2, nodes >> 1
            self._nodes[nodes] = self._nodes[left] + self._nodes[left + 1]
            self._maxima[nodes] = np.maximum(below[left], below[left + 1])
            below = self._maxima

    def _rebuild(self) -> None:
        """Recompute all nodes above the leaves."""
        begin, below = self._first_leaf, self._nodes
        while begin > 1:
            sums, maxima = self._nodes[begin : 2 * begin].reshape(-1, 2), below[begin : 2 * begin].reshape(-1, 2)
            begin //= 2
            self._nodes[begin : 2 * begin] = sums.sum(axis=1)
            self._maxima[begin : 2 * begin] = maxima.max(axis=1)
            below = self._maxima

    def is_consistent(self) -> bool:
        """Return whether each node is the sum, or the maximum, of its children, or is marked as out of date."""
        if self._head[DIRTY]:
            return True
        inner, maxima = self._first_leaf, np.concatenate([self._maxima, self._leaves])
        sums, largest = self._nodes[2:].reshape(-1, 2).sum(axis=1), maxima[2:].reshape(-1, 2).max(axis=1)
        return np.allclose(self._nodes[1:inner], sums) and bool((maxima[1:inner] == largest).all())

    def find(self, uniform: np.ndarray) -> np.ndarray:
        """Return a row for each uniform number of ``[0, 1)``, ``float64`` ``[n]``, in proportion to the weights."""
        mass = uniform * self._nodes[1]
        nodes = np.ones(len(uniform), dtype=np.int64)
        for _ in range(self._depth):
            nodes = nodes << 1
            left = self._nodes[nodes]
            # Not into a subtree without weight: sums are rounded, and may be a moment older than what is below them.
            right = (mass >= left) & (self._nodes[nodes + 1] > 0.0)
            mass -= left * right
            nodes += right
        return nodes - self._first_leaf

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Return the weights of ``rows``."""
        return self._leaves[rows]
