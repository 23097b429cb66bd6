"""What the last step of a trajectory says that was broken off: that it is truncated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from embodichain_rl.replay.schema import Key, Schema

__all__ = ["end_flags", "truncated"]

TRUNCATED: Key = ("next", "truncated")
DONE: Key = ("next", "done")


def end_flags(schema: Schema) -> list[int]:
    """Return the numbers of the fields that are True at the last step of a truncated trajectory.

    They are those of ``("next", "truncated")`` and ``("next", "done")``. Without the first there are none: done alone
    would say that the trajectory is terminated, and that there is nothing to bootstrap from.

    Example:
        >>> flag = torch.zeros(1, dtype=torch.bool)
        >>> end_flags(Schema.of(TensorDict({"next": {"done": flag, "truncated": flag}})))
        [1, 0]
        >>> end_flags(Schema.of(TensorDict({"next": {"done": flag}})))
        []
    """
    mark, done = schema.number_of(TRUNCATED), schema.number_of(DONE)
    if mark is None:
        return []
    return [mark] if done is None else [mark, done]


def truncated(schema: Schema, piece: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return a piece of a trajectory with a last step that is truncated; the piece itself is not changed.

    Args:
        schema: the fields.
        piece: one array ``[n, *shape]`` per field.
    """
    marked = list(piece)
    for number in end_flags(schema):
        marked[number] = marked[number].copy()
        marked[number][-1] = True
    return marked
