"""The memory layout of an arena: the columns of all fields of one shape and dtype follow each other.

So one gather copies the chunks of all of them. The layout is the same on the CPU and on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

from embodichain_rl.replay.schema import Schema, Shifted, segment_field

__all__ = [
    "Gather",
    "Gathers",
    "Kind",
    "Layout",
    "MakeView",
    "arena_bytes",
    "arena_columns",
    "blobs_offset",
    "column_bytes",
    "first_rows",
    "split_shifted",
    "step_bytes",
    "used_parts",
]

View = TypeVar("View", covariant=True)

MAX_LENGTHS = 128
"""Number of chunk lengths whose views are cached."""

PAGE = 4096
"""Alignment of the columns of each kind, in bytes."""


@dataclass(frozen=True, slots=True)
class Kind:
    """All fields of one shape and dtype. Their columns follow each other, so that one gather copies all of them."""

    numbers: tuple[int, ...]
    """Numbers of the fields in the schema, one per column."""
    next_numbers: tuple[int, ...]
    """Numbers of the shifted fields that are read from these columns, one per column; empty if there are none."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    """Byte offset of the first column."""
    nbytes: int
    """Bytes of one step of one field."""


def _kinds(schema: Schema, steps: int, shifted: Shifted) -> tuple[list[Kind], int]:
    """Return the kinds of fields and the size of all their columns, in bytes."""
    next_of = {source: number for number, source in shifted.items()}
    numbers: dict[tuple[tuple[int, ...], torch.dtype, bool], list[int]] = {}
    for number, field in enumerate(schema.fields):
        if number not in shifted:
            numbers.setdefault((*field.column, number in next_of), []).append(number)
    kinds, end = [], 0
    for (shape, dtype, has_next), members in numbers.items():
        nbytes = schema.fields[members[0]].nbytes
        next_numbers = tuple(next_of[number] for number in members) if has_next else ()
        kinds.append(Kind(tuple(members), next_numbers, shape, dtype, end, nbytes))
        end += -(-nbytes * steps * len(members) // PAGE) * PAGE
    return kinds, end


class Layout:
    """The columns of an arena, as views of one block of memory on any device.

    Args:
        schema: the fields of a step.
        steps: number of steps in the arena.
        shifted: the fields without a column of their own; see :mod:`~embodichain_rl.replay.schema.shifted`.
        tensor_at: function that returns the tensor of a dtype and shape at a byte offset of the block.

    Attributes:
        kinds (list[Kind]): the kinds of fields.
        end (int): size of all columns, in bytes.
        stacked (list[torch.Tensor]): per kind its columns, one after the other, ``[columns * steps, *shape]``.
        stored (dict[int, torch.Tensor]): the column ``[steps, *shape]`` of each field that has one.
        columns (list[torch.Tensor]): the readable column of each field, shifted fields included.
    """

    def __init__(
        self,
        schema: Schema,
        steps: int,
        shifted: Shifted,
        tensor_at: Callable[[torch.dtype, tuple[int, ...], int], torch.Tensor],
    ) -> None:
        self.kinds, self.end = _kinds(schema, steps, shifted)
        self.stacked = [
            tensor_at(kind.dtype, (len(kind.numbers) * steps, *kind.shape), kind.offset) for kind in self.kinds
        ]
        self.stored: dict[int, torch.Tensor] = {}
        for kind, stacked in zip(self.kinds, self.stacked, strict=True):
            self.stored |= dict(zip(kind.numbers, stacked.split(steps), strict=True))
        readable = self.stored | {number: self.stored[source][1:] for number, source in shifted.items()}
        # A shifted column has one step less. With shifted fields, the last step of the arena only ever holds the last
        # next observation of a trajectory, so that all columns can end before it.
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
    """One copy operation: the chunks of all columns of a kind."""

    view: View
    numbers: tuple[int, ...]
    """Numbers of the fields that the chunks belong to, one per copied column."""


class MakeView(Protocol[View]):
    """Function that makes the view that chunks of one kind are copied from."""

    def __call__(self, stacked: torch.Tensor, columns: int, length: int, *, and_next: bool) -> View:
        """Return the view.

        Args:
            stacked: the columns, one after the other, ``[columns * steps, *shape]``.
            columns: number of columns.
            length: number of steps per chunk.
            and_next: whether each column is copied a second time, one step later.
        """


class Gathers(Generic[View]):
    """Cache of the views that chunks are copied from.

    The same chunk lengths are used again and again, and making the views takes as long as a gather.

    Args:
        layout: the columns.
        make_view: function that makes the view of one kind.
    """

    def __init__(self, layout: Layout, make_view: MakeView[View]) -> None:
        self._layout = layout
        self._make_view = make_view
        self._of_chunks: dict[tuple[int, bool], list[Gather[View]]] = {}
        self._of_steps: dict[int, View] = {}

    def of_chunks(self, length: int, separate_next: bool) -> list[Gather[View]]:
        """Return the gathers of chunks of ``length`` steps: one per kind.

        If ``separate_next`` is set, the gather of a kind also copies the shifted fields that are read from it.
        Otherwise its chunks have one step more; see :func:`split_shifted`.
        """
        return self._of_chunks.get((length, separate_next)) or self._make(length, separate_next)

    def of_steps(self, number: int) -> View:
        """Return the view of the single steps of field ``number``."""
        view = self._of_steps.get(number)
        if view is None:
            view = self._of_steps[number] = self._make_view(self._layout.columns[number], 1, 1, and_next=False)
        return view

    def _make(self, length: int, separate_next: bool) -> list[Gather[View]]:
        while len(self._of_chunks) >= MAX_LENGTHS:
            del self._of_chunks[next(iter(self._of_chunks))]
        gathers = []
        for kind, stacked in zip(self._layout.kinds, self._layout.stacked, strict=True):
            and_next = separate_next and bool(kind.next_numbers)
            one_more = bool(kind.next_numbers) and not separate_next
            view = self._make_view(stacked, len(kind.numbers), length + one_more, and_next=and_next)
            gathers.append(Gather(view, kind.numbers + (kind.next_numbers if and_next else ())))
        self._of_chunks[length, separate_next] = gathers
        return gathers


def split_shifted(chunks: list[torch.Tensor], shifted: Shifted, length: int) -> None:
    """Split the ``length + 1`` copied steps of each stored field into its chunks and those of the shifted field.

    Args:
        chunks: one tensor per field, changed in place. The entries of shifted fields are set to views.
        shifted: the shifted fields, and the fields that they are read from.
        length: number of steps per chunk.
    """
    for number, source in shifted.items():
        steps = chunks[source]
        chunks[source], chunks[number] = steps[:, :length], steps[:, 1:]


def arena_columns(schema: Schema, steps: int, shifted: Shifted) -> list[tuple[int, int]]:
    """Return the byte offset of each column of an arena on the CPU, and the bytes of one of its steps."""
    kinds, end = _kinds(schema, steps, shifted)
    columns = [(kind.offset + n * steps * kind.nbytes, kind.nbytes) for kind in kinds for n in range(len(kind.numbers))]
    return columns + [(end + steps * before, nbytes) for before, nbytes in _beside(schema)]


def _beside(schema: Schema) -> list[tuple[int, int]]:
    """Return what an arena on the CPU has behind its columns: bytes of a step before it, and its own.

    This is ``segment_left`` if there are segments, and the bytes of blobs.
    """
    segments = 0 if segment_field(schema) is None else 4
    parts = [(0, segments)] if segments else []
    return parts if schema.blobs is None else [*parts, (segments, schema.blobs.slot)]


def blobs_offset(schema: Schema, steps: int, end: int) -> int:
    """Return the byte offset of the blobs of an arena on the CPU.

    Args:
        schema: the fields.
        steps: number of steps in the arena.
        end: end of its columns.
    """
    return end + steps * _beside(schema)[-1][0]


def column_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Return the size of all columns, in bytes."""
    return _kinds(schema, steps, shifted)[1]


def arena_bytes(schema: Schema, steps: int, shifted: Shifted) -> int:
    """Return the size of an arena on the CPU, in bytes: its columns, ``segment_left`` and blobs, if there are any."""
    return column_bytes(schema, steps, shifted) + steps * sum(nbytes for _, nbytes in _beside(schema))


def step_bytes(schema: Schema, shifted: Shifted) -> int:
    """Return the size of a stored step on the CPU, in bytes; of blobs the bytes of a slot."""
    stored = schema.nbytes - sum(schema.fields[number].nbytes for number in shifted)
    return stored + sum(nbytes for _, nbytes in _beside(schema))


def used_parts(schema: Schema, steps: int, used: int, shifted: Shifted) -> list[tuple[int, int]]:
    """Return where the first ``used`` of ``steps`` steps lie in an arena on the CPU: offsets and sizes, in bytes."""
    return [(offset, used * nbytes) for offset, nbytes in arena_columns(schema, steps, shifted)]
