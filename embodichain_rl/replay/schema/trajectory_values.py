"""What is the same at every step of a trajectory. Pure functions."""

from __future__ import annotations

import numpy as np

__all__ = ["first_difference", "same_values"]


def same_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Says where two arrays are equal, NaN being equal to NaN."""
    return (a == b) | ((a != a) & (b != b))


def first_difference(values: np.ndarray, value: np.ndarray) -> int | None:
    """Returns the first step at which a trajectory's value is another one; None when there is no such step.

    Args:
        values: of each step, ``[T, *shape]``.
        value: the trajectory's, ``[*shape]``.

    Example:
        >>> first_difference(np.array([3.0, 3.0, 2.0]), np.array(3.0))
        2
    """
    different = np.flatnonzero(~same_values(values, value).reshape(len(values), -1).all(axis=1))
    return int(different[0]) if len(different) else None
