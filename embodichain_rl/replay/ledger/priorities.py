"""How likely each trajectory is to be drawn: a sum tree in the ledger's shared memory."""

from __future__ import annotations

import numpy as np

__all__ = ["PriorityTree", "tree_words"]

BUILT, DIRTY, HIGHEST = range(3)
HEAD = 3
"""Words before the tree: whether there is one; whether a change was begun and not ended; the highest weight so far."""


def _leaves_of(num_rows: int) -> int:
    return 1 << max(0, num_rows - 1).bit_length()


def tree_words(num_rows: int) -> int:
    """Returns how many ``float64`` words a tree over so many rows takes."""
    return HEAD + 2 * _leaves_of(num_rows)


class PriorityTree:
    """A binary tree of sums over one weight for each row of the ledger (Schaul et al., 2016, "Prioritized Experience
    Replay", section 3.3 and appendix B.2.1).

    To change it takes the ledger's lock; to read it takes none: who draws while it changes may land on a row with a
    weight that is a moment old, never on one without any. Nobody pays for it before :meth:`build`.

    A process that is killed while it changes the tree leaves the sums to whoever changes it next, who sums up anew.

    Args:
        words: ``float64``, zeros at first, as many as :func:`tree_words` says; in shared memory.

    Example:
        >>> tree = PriorityTree(np.zeros(tree_words(3)))
        >>> tree.build(np.array([0, 1]))
        >>> tree.set(np.array([0, 1]), np.array([1.0, 3.0]))
        >>> tree.find(np.array([0.2, 0.3, 0.9]))
        array([0, 1, 1])
    """

    def __init__(self, words: np.ndarray) -> None:
        self._head, self._nodes = words[:HEAD], words[HEAD:]
        self._first_leaf = len(self._nodes) // 2
        self._leaves = self._nodes[self._first_leaf :]
        # The sums of node n are at 2n and 2n + 1, the root is node 1.
        self._depth = self._first_leaf.bit_length() - 1

    @property
    def built(self) -> bool:
        """Whether there are weights."""
        return bool(self._head[BUILT])

    def build(self, rows: np.ndarray) -> None:
        """Gives ``rows`` the weight 1, and all others none. Inside the ledger's lock."""
        self._head[DIRTY] = 1.0
        self._leaves[:] = 0.0
        self._leaves[rows] = 1.0
        self._head[HIGHEST] = 1.0
        self._sum_up()
        self._head[BUILT] = 1.0
        self._head[DIRTY] = 0.0

    def set(self, rows: np.ndarray, weights: np.ndarray) -> None:
        """Changes the weights of ``rows``, ``int64`` ``[n]``, none of them twice. Inside the ledger's lock."""
        torn = self._head[DIRTY]
        self._head[DIRTY] = 1.0
        self._leaves[rows] = weights
        self._head[HIGHEST] = max(self._head[HIGHEST], weights.max(initial=0.0))
        if torn:
            self._sum_up()
        else:
            nodes = rows + self._first_leaf
            for _ in range(self._depth):
                nodes = nodes >> 1
                self._nodes[nodes] = self._nodes[2 * nodes] + self._nodes[2 * nodes + 1]
        self._head[DIRTY] = 0.0

    def add(self, row: int) -> None:
        """Gives a new row the highest weight that there was, so that it is soon seen. Inside the ledger's lock."""
        self.set(np.array([row]), self._head[HIGHEST : HIGHEST + 1])

    def remove(self, rows: np.ndarray) -> None:
        """Takes the weights of rows away. Inside the ledger's lock."""
        self.set(rows, np.zeros(len(rows)))

    def _sum_up(self) -> None:
        begin = self._first_leaf
        while begin > 1:
            pairs = self._nodes[begin : 2 * begin].reshape(-1, 2)
            begin //= 2
            self._nodes[begin : 2 * begin] = pairs.sum(axis=1)

    def sums_hold(self) -> bool:
        """Says whether each sum is that of its two parts, or is known not to be."""
        inner, parts = self._nodes[1 : self._first_leaf], self._nodes[2:].reshape(-1, 2)
        return bool(self._head[DIRTY]) or np.allclose(inner, parts.sum(axis=1))

    def find(self, uniform: np.ndarray) -> np.ndarray:
        """Returns a row for each uniform number of ``[0, 1)``, ``float64`` ``[n]``, in proportion to their weights."""
        mass = uniform * self._nodes[1]
        nodes = np.ones(len(uniform), dtype=np.int64)
        for _ in range(self._depth):
            nodes = nodes << 1
            left = self._nodes[nodes]
            # Not into a subtree without weight: sums are rounded, and may be a moment older than what is under them.
            right = (mass >= left) & (self._nodes[nodes + 1] > 0.0)
            mass -= left * right
            nodes += right
        return nodes - self._first_leaf

    def weights(self, rows: np.ndarray) -> np.ndarray:
        """Returns the weights of ``rows``."""
        return self._leaves[rows]
