"""Where the columns of an arena lie: fields of one shape and dtype one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from embodichain_rl.replay.schema import Schema, Shifted, segment_field

__all__ = ["Gather", "Gathers", "Kind", "Layout", "MakeView", "arena_bytes", "column_bytes", "first_rows"]

View = TypeVar("View", covariant=True)

MAX_LENGTHS = 128
"""For how many lengths of chunks the views are kept."""

PAGE = 4096
"""Bytes that the columns of each kind are aligned to."""


@dataclass(frozen=True, slots=True)
class Kind:
    """The fields of one shape and dtype, whose columns lie one behind the other: one gather serves them all."""

    numbers: tuple[int, ...]
    nexts: tuple[int, ...]
    """The shifted fields that are read from the same columns, one of each; none in kinds without."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Byte offset of the first column."""
    nbytes: int
    """Bytes of one step of one field."""


def _kinds(schema: Schema, steps: int, shifted: Shifted) -> tuple[list[Kind], int]:
    """The kinds of fields, and the bytes that all their columns take."""
    next_of = {of: number for number, of in shifted.items()}
    numbers: dict[tuple[tuple[int, ...], torch.dtype, bool], list[int]] = {}
    for number, field in enumerate(schema.fields):
        if number not in shifted:
            numbers.setdefault((field.shape, field.dtype, number in next_of), []).append(number)
    kinds, end = [], 0
    for (shape, dtype, has_next), members in numbers.items():
        nbytes = schema.fields[members[0]].nbytes
        nexts = tuple(next_of[number] for number in members) if has_next else ()
        kinds.append(Kind(tuple(members), nexts, shape, dtype, end, nbytes))
        end += -(-nbytes * steps * len(members) // PAGE) * PAGE
    return kinds, end


class Layout:
    """The columns of an arena as views of one run of bytes, wherever that lies.

    Args:
        schema: the fields of a step.
        steps: steps of the arena.
        shifted: the fields that have no column of their own; see :mod:`~embodichain_rl.replay.shifted`.
        place: makes the tensor of a dtype and shape that begins at an offset in bytes.

    Attributes:
        kinds (list[Kind]): the fields of one shape and dtype.
        end (int): the byte behind the last one.
        stacked (list[torch.Tensor]): of each kind its columns, one behind the other, ``[columns * steps, *shape]``.
        stored (dict[int, torch.Tensor]): the column ``[steps, *shape]`` of each field that has one.
        columns (list[torch.Tensor]): of each field what can be read of it, also of those that are shifted.
    """

    def __init__(
        self,
        schema: Schema,
        steps: int,
        shifted: Shifted,
        place: Callable[[torch.dtype, tuple[int, ...], int], torch.Tensor],
    ) -> None:
        self.kinds, self.end = _kinds(schema, steps, shifted)
        self.stacked = [place(kind.dtype, (len(kind.numbers) * steps, *kind.shape), kind.offset) for kind in self.kinds]
        self.stored: dict[int, torch.Tensor] = {}
        for kind, stacked in zip(self.kinds, self.stacked, strict=True):
            self.stored |= dict(zip(kind.numbers, stacked.split(steps), strict=True))
        readable = self.stored | {number: self.stored[of][1:] for number, of in shifted.items()}
        # The arena's last step can only be the one behind a trajectory: the columns end before it, as shifted ones do.
        self.columns = [readable[number][: steps - bool(shifted)] for number in range(len(schema.fields))]


def first_rows(columns: int, steps: int, *, and_next: bool) -> np.ndarray:
    """Return the row at which each column of ``steps`` steps begins, ``int64`` ``[columns]``.

    Args:
        columns: how many columns lie one behind the other.
        steps: steps of each.
        and_next: whether each column comes a second time, one step later, behind all others: ``[2 * columns]``.

    Example:
        >>> first_rows(2, 10, and_next=True)
        array([ 0, 10,  1, 11])
    """
    first = np.arange(columns) * steps
    return np.concatenate([first, first + 1]) if and_next else first


@dataclass(frozen=True, slots=True)
class Gather(Generic[View]):
    """One gather: chunks of all columns of a kind."""

    view: View
    numbers: tuple[int, ...]
    """The fields that they become."""


class MakeView(Protocol[View]):
    """What makes a view of the chunks of one kind."""

    def __call__(self, stacked: torch.Tensor, columns: int, length: int, *, and_next: bool) -> View:
        """Return the view.

        Args:
            stacked: the columns, one behind the other, ``[columns * steps, *shape]``.
            columns: how many they are.
            length: steps of a chunk.
            and_next: whether each column is copied a second time, one step later.
        """


class Gathers(Generic[View]):
    """The gathers that copy chunks of all columns, for each length of chunks.

    They are kept: chunks of a length are copied again and again, and making the views takes as long as the gather.

    Args:
        layout: where the columns lie.
        make_view: makes what copies the chunks of one kind.
    """

    def __init__(self, layout: Layout, make_view: MakeView[View]) -> None:
        self._layout = layout
        self._make_view = make_view
        self._made: dict[tuple[int, bool], list[Gather[View]]] = {}

    def of(self, length: int, separate_next: bool) -> list[Gather[View]]:
        """Return one gather for each kind; with ``separate_next`` it copies the shifted fields read from it as well."""
        return self._made.get((length, separate_next)) or self._make(length, separate_next)

    def _make(self, length: int, separate_next: bool) -> list[Gather[View]]:
        while len(self._made) >= MAX_LENGTHS:
            del self._made[next(iter(self._made))]
        gathers = []
        for kind, stacked in zip(self._layout.kinds, self._layout.stacked, strict=True):
            and_next = separate_next and bool(kind.nexts)
            one_more = bool(kind.nexts) and not separate_next
            view = self._make_view(stacked, len(kind.numbers), length + one_more, and_next=and_next)
            gathers.append(Gather(view, kind.numbers + (kind.nexts if and_next else ())))
        self._made[length, separate_next] = gathers
        return gathers


def column_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Returns the bytes of all columns."""
    return _kinds(schema, steps, shifted)[1]


def arena_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Returns the bytes of an arena on the CPU: its columns, and what segments are found by."""
    of_segments = 0 if segment_field(schema) is None else 4 * steps
    return column_bytes(schema, steps, shifted) + of_segments
