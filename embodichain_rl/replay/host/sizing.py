"""The sizes of an arena on the CPU: from a limit of steps, or from a limit of bytes and the size of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from embodichain_rl.errors import BufferMemoryError

__all__ = ["Sizes", "Sizing"]

FEW = 40
"""In a buffer of so many trajectories or fewer, the memory of gaps is given back, however small it is."""

WIDE = 1 << 16
"""In a larger buffer it is given back if a trajectory of average length has so many bytes in each column, or more. A
gap that is much larger than a page gives nearly all of its memory back."""

MOST_STEPS = 2**40
"""The limit of steps where only bytes are limited, as long as the size of a step is not known."""


class Sizes(NamedTuple):
    """Numbers of steps."""

    max_total_steps: int
    """The limit of live steps."""
    room: int
    """What they take, margins included."""
    expected_steps: int
    """What is announced: the room; in a small buffer also what is written before another trajectory goes."""
    usual_steps: int
    """What is used of the arena beside the trajectories that are being written: the room, and an eighth more for gaps;
    three times the room if the memory of gaps is given back."""
    arena_steps: int
    """The size of the arena, as address space."""

    @property
    def memory_steps(self) -> int:
        """What may take memory beside the trajectories that are being written."""
        return self.expected_steps + self.room // 8

    @property
    def gaps_give_back(self) -> bool:
        """Whether the memory of gaps is given back, rather than trajectories evicted early."""
        return self.usual_steps > self.memory_steps


@dataclass(frozen=True)
class Sizing:
    """The limits of a buffer.

    Args:
        max_trajectories: the largest number of live trajectories.
        max_total_steps: the largest number of live steps; None if only ``max_bytes`` limits them.
        max_writers: number of trajectories of average length that can be written at once without early eviction.
        compact: whether a region has one step more than its trajectory.
        max_bytes: the largest number of bytes of everything together; None: no limit.
        reserve: whether all memory is taken at once.
        in_file: whether the arena is in a file, which keeps its pages.

    Trajectories that differ much in length leave gaps that are too short for the next long one. If gaps took memory,
    others would have to be evicted early for it: in a small buffer, most of them. So where possible the arena has more
    address space than memory, and the memory of gaps is given back. It is not given back where it must stay
    (``reserve``), and where a limit of bytes must hold at every moment.

    Example:
        >>> Sizing(100, 8000, 16, False).of_steps(8000)
        Sizes(max_total_steps=8000, room=8000, expected_steps=8000, usual_steps=9000, arena_steps=17000)
        >>> Sizing(100, None, 16, False, max_bytes=1_000_000).of_schema(step_bytes=100, other_bytes=100_000)
        Sizes(max_total_steps=8000, room=8000, expected_steps=8000, usual_steps=9000, arena_steps=9000)
    """

    max_trajectories: int
    max_total_steps: int | None
    max_writers: int
    compact: bool
    max_bytes: int | None = None
    reserve: bool = False
    in_file: bool = False

    def _gives_back(self, bytes_per_column: float | None) -> bool:
        """Return whether the arena has more address space than memory."""
        few = self.max_trajectories <= FEW
        if self.max_bytes is not None or bytes_per_column is None:
            return False
        if self.in_file:
            return few  # room on the disk for gaps, rather than early evictions
        return (few or bytes_per_column >= WIDE) and not self.reserve

    def of_steps(self, max_total_steps: int, slots_per_step: float = 1.0, column_bytes: float | None = 0.0) -> Sizes:
        """Return the sizes for a limit of steps.

        Args:
            max_total_steps: the limit.
            slots_per_step: how many steps of the arena a step takes on average.
            column_bytes: bytes of a step in a column, on average of the columns; 0 if unknown. None if steps may take
                more than expected: only early evictions limit their bytes.
        """
        room = max_total_steps + self.compact * min(self.max_trajectories, max_total_steps)
        if slots_per_step > 1.0:
            room = math.ceil(room * slots_per_step)
        average = -(-room // self.max_trajectories)
        # Where one trajectory may be a large part of the room, fewer would be kept than the limits allow.
        usual_gaps = max(room // 8, 2 * average)
        gives_back = self._gives_back(None if column_bytes is None else average * column_bytes)
        usual = min(room + (2 * room if gives_back else usual_gaps), 2**63 - 1)
        more = 0 if self.max_bytes is not None else max(self.max_writers * average, room)
        return Sizes(max_total_steps, room, room + usual_gaps - room // 8, usual, min(usual + more, 2**63 - 1))

    def of_schema(
        self, step_bytes: int, other_bytes: int, slots_per_step: float = 1.0, column_bytes: float | None = 0.0
    ) -> Sizes:
        """Return the sizes for both limits.

        Args:
            step_bytes: bytes of a step of the arena.
            other_bytes: bytes that are needed besides: of the ledger, and of trajectory values.
            slots_per_step: how many steps of the arena a step takes on average.
            column_bytes: see :meth:`of_steps`.

        Raises:
            BufferMemoryError: if not even one step fits into ``max_bytes``.
        """
        if self.max_bytes is None:
            assert self.max_total_steps is not None, "one of them is given"
            return self.of_steps(self.max_total_steps, slots_per_step, column_bytes)
        low, high = 0, self.max_total_steps or MOST_STEPS
        while low < high:  # the largest limit that fits
            steps = (low + high + 1) // 2
            fits = self.of_steps(steps, slots_per_step).usual_steps * step_bytes + other_bytes <= self.max_bytes
            low, high = (steps, high) if fits else (low, steps - 1)
        if not low:
            raise BufferMemoryError(
                f"Got max_bytes={self.max_bytes:,}, but the ledger of {self.max_trajectories:,} trajectories takes "
                f"{other_bytes:,} bytes, and each step {step_bytes:,}. Raise max_bytes, or lower max_trajectories."
            )
        return self.of_steps(low, slots_per_step)
