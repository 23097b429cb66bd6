"""The fields that are stored once, since the next observation of a step is the observation of the step after it.

A field ``("next", *key)`` is *shifted* where ``key`` is also a field, of the same shape and dtype. A compact storage
has no column for it: it reads the column of ``key`` one step later. So that column has one step more per trajectory,
its last next observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema.schema import Schema

__all__ = ["Shifted", "refuse_unshifted", "shifted_fields", "unshifted_error"]

Shifted = Mapping[int, int]
"""By the index of each shifted field, the index of the field that it is read from."""

OF_THE_STEP_ITSELF = ("done", "terminated", "truncated", "reward")
"""Entries about the end of the step itself. Their next value is not the value of the step after it."""


def shifted_fields(schema: Schema) -> dict[int, int]:
    """Return the shifted fields of a schema.

    Example:
        >>> step = TensorDict({"state": torch.zeros(3), "next": {"state": torch.zeros(3), "done": torch.zeros(1)}})
        >>> schema = Schema.of(step)
        >>> {schema.keys[number]: schema.keys[of] for number, of in shifted_fields(schema).items()}
        {('next', 'state'): ('state',)}
    """
    numbers = {key: number for number, key in enumerate(schema.keys)}
    shifted = {}
    for number, field in enumerate(schema.fields):
        if field.key[0] != "next" or field.key[1:2] == ("next",) or field.key[-1] in OF_THE_STEP_ITSELF:
            continue
        of = numbers.get(field.key[1:])
        if of is not None and (schema.fields[of].shape, schema.fields[of].dtype) == (field.shape, field.dtype):
            shifted[number] = of
    return shifted


def refuse_unshifted(
    schema: Schema, shifted: Shifted, piece: Sequence[np.ndarray], *, before: Sequence[np.ndarray] | None, step: int
) -> None:
    """Refuse steps whose shifted fields are not bitwise equal to the fields of the step after.

    Args:
        schema: the fields.
        shifted: which of them are shifted.
        piece: consecutive steps of a trajectory, one array ``[n, *shape]`` per field.
        before: the steps before the piece, at least the last one; None at the beginning of the trajectory.
        step: the index of the piece's first step in the trajectory.

    Raises:
        SchemaMismatchError: names the key and the step.
    """
    for number, of in shifted.items():
        later, values = piece[number], piece[of]
        if before is not None and _first_difference(before[number][-1:], values[:1]) is not None:
            differs = step - 1
        elif (row := _first_difference(later[:-1], values[1:])) is not None:
            differs = step + row
        else:
            continue
        raise unshifted_error(schema, number, of, f"step {differs} of a trajectory", f"step {differs + 1}")


def unshifted_error(schema: Schema, number: int, of: int, step: str, following: str) -> SchemaMismatchError:
    """Return the error to raise for a shifted field that is not the field of the step after.

    Args:
        schema: the fields.
        number: the shifted one.
        of: the one that it should be read from.
        step: which step.
        following: the step after.
    """
    name, root = (key if len(key) > 1 else key[0] for key in (schema.keys[number], schema.keys[of]))
    return SchemaMismatchError(
        f"Got {name!r} that at {step} is not the {root!r} of {following}, as compact=True needs, which stores it once. "
        "Build the storage with compact=False, or leave the key out or rename it with a transform (n-step returns, "
        "say, have next observations of their own). Where a collector abandoned the trajectory at that step, let it "
        "truncate it (set_truncated=True)."
    )


def _first_difference(a: np.ndarray, b: np.ndarray) -> int | None:
    """Return the first row whose bytes differ; None where none does."""
    same = _words(a) == _words(b)
    return None if same.all() else int(np.argmin(same.all(axis=1)))


def _words(values: np.ndarray) -> np.ndarray:
    """Return the bytes of each row, as words of eight where possible. Compared as bytes, a NaN equals itself."""
    rows = len(values)
    nbytes = values[:1].nbytes
    if not rows or not nbytes:
        return np.empty((rows, 0), dtype=np.uint8)
    if values.dtype == object:  # blobs, which are equal or not as a whole
        return values.reshape(rows, -1)
    words = np.ascontiguousarray(values).reshape(rows, -1).view(np.uint8)
    return words if nbytes % 8 else words.view(np.int64)
