"""Offsets in trajectories, from uniform random numbers, and the segments that they lie in. Pure functions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from embodichain_rl.replay.ledger import Rows
from embodichain_rl.replay.sampling.random_streams import RandomSource, part_of, random_numbers

__all__ = ["OffsetRange", "offsets_from_uniform", "offsets_in_segments", "segments_around", "spread_over_segments"]

SEGMENT_ROUNDS = 4
"""The number of times that offsets are drawn again which segments do not allow, before the allowed ones are listed."""


class OffsetRange:
    """The offsets of a trajectory at which something may begin that needs consecutive steps.

    Of ``T`` steps, ``T + extra`` offsets may be drawn, beginning with ``first``.

    Args:
        span: the number of consecutive steps that must be in the trajectory.
        lead: the steps from the offset to the first of them; negative if the offset comes after it.
        drop_first: the number of first steps of the trajectory that are no offsets.
        drop_last: the number of its last steps that are no offsets.

    Example:
        >>> whole = OffsetRange(16)  # chunks of 16 steps within the trajectory
        >>> whole.first, whole.extra
        (0, -15)
        >>> padded = OffsetRange(16 - 1 - 7, lead=1)  # chunks that reach beyond its edges by 1 and by 7 steps
        >>> padded.first, padded.extra
        (-1, -7)
    """

    __slots__ = ("extra", "first", "lead", "needed_left", "span")

    def __init__(self, span: int, lead: int = 0, drop_first: int = 0, drop_last: int = 0) -> None:
        self.span = span
        self.lead = lead
        self.first = max(-lead, drop_first) if drop_first else -lead
        last = -span - lead
        if drop_last:
            last = min(last, -1 - drop_last)
        self.extra = last - self.first + 1
        self.needed_left = max(span, drop_last + 1 - lead) if drop_last else span
        """How many steps of its segment must be left at the first needed step."""


def offsets_from_uniform(uniform: np.ndarray, count: np.ndarray, first: int = 0) -> np.ndarray:
    """Turn uniform numbers of ``[0, 1)`` into offsets, each uniform among ``first`` to ``first + count - 1``.

    Args:
        uniform: ``float64`` ``[B]``.
        count: ``int64`` ``[B]``, the number of offsets, at least 1 each.
        first: the first offset.

    Returns:
        ``int64`` ``[B]``.
    """
    offsets = (uniform * count).astype(np.int64)
    return offsets + first if first else offsets


def offsets_in_segments(
    rows: Rows,
    uniform: np.ndarray,
    left: np.ndarray,
    accepts: Callable[[np.ndarray], np.ndarray],
    offsets_of: OffsetRange,
    generator: RandomSource,
) -> np.ndarray:
    """Return an offset in each trajectory, ``int64`` ``[B]``, uniform among those that segments allow.

    Args:
        rows: the trajectories.
        uniform: ``float64`` ``[B]`` of ``[0, 1)``, for the first try.
        left: of every step of the arena, how many steps of its segment are left.
        accepts: returns which steps may be the first of those that are needed, given how many steps are left there.
        offsets_of: the offsets that may be drawn in a trajectory without segments.
        generator: for further tries.
    """
    first, lead = offsets_of.first, offsets_of.lead
    counts = rows.lengths + offsets_of.extra
    offsets = offsets_from_uniform(uniform, counts, first)
    missing = np.arange(len(offsets))
    for _ in range(SEGMENT_ROUNDS):
        missing = missing[~accepts(left[rows.starts[missing] + offsets[missing] + lead])]
        if not len(missing):
            return offsets
        uniform = random_numbers(len(missing), part_of(generator, missing))
        offsets[missing] = offsets_from_uniform(uniform, counts[missing], first)
    for row, number in zip(missing.tolist(), uniform.tolist(), strict=True):
        start = rows.starts[row] + first + lead
        accepted = np.flatnonzero(accepts(left[start : start + counts[row]]))
        # There are some, unless the trajectory was just evicted; then the check after the copy finds out.
        if len(accepted):
            offsets[row] = accepted[int(number * len(accepted))] + first
    return offsets


def segments_around(rows: Rows, steps: np.ndarray, left: np.ndarray, reach: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first step and the end of the segment that a step of each trajectory lies in, both ``int64`` ``[B]``.

    Args:
        rows: the trajectories.
        steps: ``int64`` ``[B]``.
        left: of every step of the arena, how many steps of its segment are left.
        reach: how far back the first step is looked for. If the segment begins earlier, ``step - reach`` is returned.
    """
    # Of a trajectory that was just evicted anything may be read: the check after the copy finds out.
    ends = np.clip(steps + left[rows.starts + steps], steps + 1, np.maximum(rows.lengths, steps + 1))
    earlier = steps[:, None] - np.arange(1, reach + 1)
    ends_before = (left[rows.starts[:, None] + np.maximum(earlier, 0)] == 1) & (earlier >= 0)
    begins = np.where(ends_before.any(axis=1), steps - ends_before.argmax(axis=1), steps - reach) if reach else steps
    return np.maximum(begins, 0), ends


def spread_over_segments(
    rows: Rows, uniform: np.ndarray, left: np.ndarray, before: int, after: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return an offset in each trajectory whose segments are each extended beyond their edges.

    An offset may belong to two segments: so the segment is drawn with it.

    Args:
        rows: the trajectories.
        uniform: ``float64`` ``[B]`` of ``[0, 1)``.
        left: of every step of the arena, how many steps of its segment are left.
        before: the number of offsets before the first step of a segment.
        after: the number of offsets after its last step; negative if its last steps are none.

    Returns:
        The offset, and the first step and the end of its segment, each ``int64`` ``[B]``.
    """
    offsets, begins, ends = np.zeros_like(rows.lengths), np.zeros_like(rows.lengths), np.ones_like(rows.lengths)
    for row, (start, length, number) in enumerate(zip(rows.starts, rows.lengths, uniform, strict=True)):
        stops = np.flatnonzero(left[start : start + length] == 1) + 1
        if not len(stops):  # the trajectory was just evicted
            continue
        starts = np.append(0, stops[:-1])
        chosen = int(number * (stops - starts + before + after).clip(min=0).sum())
        counts = (stops - starts + before + after).clip(min=0).cumsum()
        segment = min(int(np.searchsorted(counts, chosen, side="right")), len(stops) - 1)
        within = chosen - (counts[segment - 1] if segment else 0)
        offsets[row], begins[row], ends[row] = starts[segment] - before + within, starts[segment], stops[segment]
    return offsets, begins, ends
