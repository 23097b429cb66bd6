"""Values that are the same at every step of a trajectory. Pure functions."""

from __future__ import annotations

import numpy as np

__all__ = ["first_difference", "same_values"]


def same_values(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a mask of where two arrays are equal; NaN is equal to NaN."""
    return (a == b) | ((a != a) & (b != b))


def first_difference(values: np.ndarray, value: np.ndarray) -> int | None:
    """Return the first step whose value differs from the trajectory's; None when no step does.

    Args:
        values: the value at each step, ``[T, *shape]``.
        value: the value of the trajectory, ``[*shape]``.

    Example:
        >>> first_difference(np.array([3.0, 3.0, 2.0]), np.array(3.0))
        2
    """
    different = np.flatnonzero(~same_values(values, value).reshape(len(values), -1).all(axis=1))
    return int(different[0]) if len(different) else None
