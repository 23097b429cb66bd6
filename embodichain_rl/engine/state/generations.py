"""Generations: which refill of the buffer a trajectory belongs to, and which refills are requested.

Trajectories are numbered in the order of their publication, so a generation is a range of ids. The first generation is
the one that ``start()`` fills the buffer with. With ``refill_policy="manual"`` each request adds a generation of its
own size; otherwise every ``buffer_size`` trajectories are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from embodichain_rl.engine.state.channel_memory import MAX_GENERATIONS, ChannelMemory, HeadWord

__all__ = ["Generations"]


class Generations:
    """The generations of one engine, in the memory of its channel. Only its owner requests some.

    Args:
        channel: the channel.

    Example:
        >>> generations = Generations(ChannelMemory(1, buffer_size=4, manual=True))
        >>> generations.request(2, published=4), generations.target
        (2, 6)
        >>> generations.of(np.array([0, 3, 4, 5])).tolist()
        [1, 1, 2, 2]
    """

    def __init__(self, channel: ChannelMemory) -> None:
        self._head = channel.head
        self._ends = channel.generation_ends

    @property
    def manual(self) -> bool:
        """Whether only requested trajectories may be written."""
        return self._head.item(HeadWord.MANUAL) != 0

    @property
    def requested(self) -> int:
        """The newest generation that was requested."""
        return self._head.item(HeadWord.REQUESTED_GENERATION)

    @property
    def target(self) -> int:
        """Number of trajectories that there will be when all requests are fulfilled."""
        return self._end(self.requested)

    def _end(self, generation: int) -> int:
        if self.manual:
            return self._ends.item(generation % MAX_GENERATIONS)
        return generation * self._head.item(HeadWord.BUFFER_SIZE)

    def request(self, count: int, published: int) -> int:
        """Request trajectories, and return the generation that will contain them.

        A request is added to the one before, as long as that one is not fulfilled.

        Args:
            count: the number of trajectories.
            published: the number of trajectories so far.
        """
        requested = self.requested
        if not self.manual:
            size = self._head.item(HeadWord.BUFFER_SIZE)
            requested = max(requested, -(-(published + count) // size))
        elif published >= self._end(requested):
            # The end is stored before the number announces it.
            self._ends[(requested + 1) % MAX_GENERATIONS] = published + count
            requested += 1
        else:
            first = self._end(requested - 1) if requested > 1 else 0
            self._ends[requested % MAX_GENERATIONS] = max(self._end(requested), first + count)
        self._head[HeadWord.REQUESTED_GENERATION] = requested
        return requested

    def begin(self, published: int, missing: int) -> None:
        """Request what is missing at the start, where others have filled the buffer before.

        Args:
            published: the number of trajectories so far.
            missing: how many more are needed.
        """
        if self.manual and missing and self.target < published + missing:
            requested = self.requested + (published >= self.target)
            self._ends[requested % MAX_GENERATIONS] = published + missing
            self._head[HeadWord.REQUESTED_GENERATION] = requested

    def state(self) -> dict[str, Any]:
        """Return the requested generations, for a checkpoint."""
        first, ends = self._known_ends()
        return {"requested": self.requested, "first": first, "ends": ends.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the requested generations to those of a checkpoint."""
        numbers = np.arange(state["first"], state["requested"] + 1)
        self._ends[numbers % MAX_GENERATIONS] = state["ends"]
        self._head[HeadWord.REQUESTED_GENERATION] = state["requested"]

    def completed(self, published: int) -> int:
        """Return the newest generation that is complete, given the number of trajectories; 0 for none."""
        if not self.manual:
            return published // self._head.item(HeadWord.BUFFER_SIZE)
        first, ends = self._known_ends()
        return first - 1 + int(np.searchsorted(ends, published, side="right"))

    def of(self, ids: np.ndarray) -> np.ndarray:
        """Return the generations of trajectories, ``int64``, by their ids, of any shape."""
        if not self.manual:
            return ids // self._head.item(HeadWord.BUFFER_SIZE) + 1
        first, ends = self._known_ends()
        return first + np.searchsorted(ends, ids, side="right")

    def _known_ends(self) -> tuple[int, np.ndarray]:
        """Return the number of the oldest generation that is known, and the ends of all since then."""
        requested = self.requested
        first = max(1, requested - MAX_GENERATIONS + 2)
        return first, self._ends[np.arange(first, requested + 1) % MAX_GENERATIONS]
