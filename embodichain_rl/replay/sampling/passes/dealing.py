"""How the chunks of a pass without replacement are ordered, and dealt out to the processes that share it.

All processes that share passes compute the same order, each for itself, from a seed and from the number of chunks. The
chunks of consecutive passes are thought of as one sequence. It is dealt out in blocks of one batch, one after the other
to each process. Pure functions and values; :mod:`~embodichain_rl.replay.sampling.passes.one_pass` draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from embodichain_rl._checks import checked_int
from embodichain_rl.errors import InvalidArgumentError, StateMismatchError

__all__ = ["Deal", "PassEndedError", "PassPosition", "PassRange"]

ORDERS, KEYS = 0x6F7264, 0x6B6579
"""Keep the random numbers of orders and keys apart from each other, and from those of streams of items."""


class PassEndedError(Exception):
    """Raised by draws when the last pass of this process has ended. It never reaches the user of a dataset."""


class PassRange(NamedTuple):
    """The trajectories of a pass: what all processes that share it must agree on."""

    first: int
    """The id of the first trajectory of the pass."""
    end: int
    """The id after the last one."""
    total: int
    """The number of chunks of all of them when the pass began. Some of the oldest may be evicted since."""
    oldest_version: int
    """The oldest policy version that belongs to the pass."""


@dataclass(frozen=True, slots=True)
class Deal:
    """One share of the passes of one iteration over a dataset.

    Args:
        seed: the source of the orders; the same in all processes that share the passes.
        identity: identifies the passes of all processes that share them, apart from others over the same buffer.
        iteration: the number of the iteration.
        share: the share of this process, from 0.
        shares: the number of processes.
        block: the number of consecutive chunks that a process gets at a time.
        passes: the number of passes after which the iteration ends; None: never.
        drop_last: whether the chunks after the last block that every process gets are left out, where there is a last
            pass.
    """

    seed: int
    identity: int
    iteration: int
    share: int = 0
    shares: int = 1
    block: int = 1
    passes: int | None = None
    drop_last: bool = False

    def order(self, number: int, total: int) -> np.ndarray:
        """Return the order of the ``total`` chunks of a pass, ``int64`` ``[total]``."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(ORDERS, 0, self.iteration, number))
        return np.random.default_rng(sequence).permutation(total)

    def key(self, number: int) -> int:
        """Return what the pass is called in the memory that all processes share: a positive ``int64``."""
        sequence = np.random.SeedSequence(self.identity, spawn_key=(KEYS, 0, self.iteration, number))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1 | 1

    def own(self, number: int, begins_at: int, total: int) -> np.ndarray:
        """Return the chunks of a pass that belong to this share, in order, ``int64`` ``[n]``.

        Args:
            number: the number of the pass.
            begins_at: the number of chunks of all earlier passes.
            total: the number of chunks of this pass.
        """
        end = begins_at + total
        if self.drop_last and number + 1 == self.passes:
            end -= end % (self.block * self.shares)
        first_block, end_block = begins_at // self.block, -(-end // self.block)
        blocks = np.arange(first_block + (self.share - first_block) % self.shares, end_block, self.shares)
        positions = (blocks[:, None] * self.block + np.arange(self.block)).reshape(-1)
        return self.order(number, total)[positions[(positions >= begins_at) & (positions < end)] - begins_at]

    def is_last(self, number: int) -> bool:
        """Return whether no pass follows the one with this number."""
        return self.passes is not None and number + 1 >= self.passes


@dataclass(slots=True)
class PassPosition:
    """How far one share of the passes has come, as it is saved."""

    seed: int
    shares: int
    """The number of processes that share the passes."""
    block: int = 0
    """The number of consecutive chunks that a process gets at a time; 0 before the first pass."""
    number: int = -1
    """The number of the current pass; -1 before the first one."""
    begins_at: int = 0
    """The number of chunks of all earlier passes."""
    taken: int = 0
    """The number of own chunks of the current pass that had their turn."""
    first: int = 0
    end: int = 0
    total: int = 0
    oldest_version: int = -1

    @property
    def range(self) -> PassRange:
        """The trajectories of the current pass."""
        return PassRange(self.first, self.end, self.total, self.oldest_version)

    def as_dict(self) -> dict[str, int]:
        """Return the position as plain values."""
        return asdict(self)

    @classmethod
    def parse(cls, state: Any) -> PassPosition:
        """Return the position that was saved.

        Raises:
            StateMismatchError: ``state`` is something else.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(state, Mapping) or set(state) != set(names):
            raise StateMismatchError(
                f"Got the state of a pass {state!r}; needed is the state of a dataset without replacement, a mapping "
                f"with the keys {names}."
            )
        try:
            return cls(**{name: checked_int(f"{name} in the state", state[name], minimum=-1) for name in names})
        except InvalidArgumentError as error:
            raise StateMismatchError(str(error)) from None
