"""Segments: the named parts of a trajectory, given by the integer ``"segment_id"`` of each step. Pure functions."""

from __future__ import annotations

import numpy as np
import torch

from embodichain_rl.replay.schema.schema import Schema

__all__ = ["SEGMENT_KEY", "segment_field", "steps_left"]

SEGMENT_KEY = ("segment_id",)
"""The key of the segment that a step belongs to. A segment is a run of steps with the same id."""


def steps_left(segment_ids: np.ndarray) -> np.ndarray:
    """Return how many steps of its segment are left at each step, that step included.

    Args:
        segment_ids: integers ``[T]``, at least one.

    Returns:
        ``int32`` ``[T]``.

    Example:
        >>> steps_left(np.array([0, 0, 0, 1, 2, 2]))
        array([3, 2, 1, 1, 2, 1], dtype=int32)
    """
    steps = len(segment_ids)
    ends = np.append(np.flatnonzero(segment_ids[1:] != segment_ids[:-1]) + 1, steps)
    lengths = np.diff(ends, prepend=0)
    return (np.repeat(ends, lengths) - np.arange(steps)).astype(np.int32)


def segment_field(schema: Schema) -> int | None:
    """Return the index of the field that holds the segment id; None where there is none."""
    for number, field in enumerate(schema.fields):
        if (
            field.key == SEGMENT_KEY
            and torch.Size(field.shape).numel() == 1
            and not (field.dtype.is_floating_point or field.dtype.is_complex)
        ):
            return number
    return None
