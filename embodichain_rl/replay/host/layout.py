"""Where the columns of an arena lie: fields of one shape and dtype one behind the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from embodichain_rl.replay.schema import Schema, Shifted, segment_field

__all__ = ["Gather", "Gathers", "Kind", "Layout", "arena_bytes", "column_bytes"]

View = TypeVar("View")

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


@dataclass(frozen=True, slots=True)
class Gather(Generic[View]):
    """What is copied in one go: chunks of all columns of a kind."""

    view: View
    numbers: tuple[int, ...]
    """The fields that they become."""
    ahead: int
    """How many steps later they begin."""


class Gathers(Generic[View]):
    """What it takes to copy chunks of all columns, for each length of chunks.

    It is kept: chunks of a length are asked for again and again, and making the views takes as long as the gather.

    Args:
        layout: where the columns lie.
        make_view: makes what copies the chunks of one kind, from its ``stacked``, the number of its columns, and the
            steps of a chunk.
    """

    def __init__(self, layout: Layout, make_view: Callable[[torch.Tensor, int, int], View]) -> None:
        self._layout = layout
        self._make_view = make_view
        self._made: dict[tuple[int, bool], list[Gather[View]]] = {}

    def of(self, length: int, separate_next: bool) -> list[Gather[View]]:
        """Returns one gather for each kind; with ``apart`` another one for the shifted fields that are read from it."""
        return self._made.get((length, separate_next)) or self._make(length, separate_next)

    def _make(self, length: int, separate_next: bool) -> list[Gather[View]]:
        while len(self._made) >= MAX_LENGTHS:
            del self._made[next(iter(self._made))]
        gathers = []
        for kind, stacked in zip(self._layout.kinds, self._layout.stacked, strict=True):
            view = self._make_view(
                stacked, len(kind.numbers), length if separate_next or not kind.nexts else length + 1
            )
            gathers.append(Gather(view, kind.numbers, 0))
            if separate_next and kind.nexts:
                gathers.append(Gather(view, kind.nexts, 1))
        self._made[length, separate_next] = gathers
        return gathers


def column_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Returns the bytes of all columns."""
    return _kinds(schema, steps, shifted)[1]


def arena_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Returns the bytes of an arena on the CPU: its columns, and what segments are found by."""
    of_segments = 0 if segment_field(schema) is None else 4 * steps
    return column_bytes(schema, steps, shifted) + of_segments
