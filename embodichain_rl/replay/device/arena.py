"""The arena on a device, in the process that owns it; the counterpart of :class:`~embodichain_rl.replay.host.Arena`.

Every operation is enqueued on the current stream and returns at once. As with any torch operation on a device, the
returned tensors can be used by operations that are enqueued later on the same stream. :mod:`.stream_order` explains why
their content is intact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.stream_order import StreamOrder
from embodichain_rl.replay.host import Gathers, Layout, TrajectoryTable, column_bytes, first_rows, split_shifted
from embodichain_rl.replay.schema import Key, Schema, Shifted, segment_field

__all__ = ["DeviceArena", "DeviceTable", "Spans", "ranges"]

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
"""Words that steps are copied as, in bytes and as a dtype. The widest word that divides the size of a step is used.
Images that are copied as bytes take several times as long."""


class _DeviceView:
    """Overlapping view of all chunks of one length, in columns that follow each other; see :class:`ChunkView`."""

    def __init__(
        self, stacked: torch.Tensor, columns: int, length: int, device: Device, *, and_next: bool = False
    ) -> None:
        rows, *feature = stacked.shape
        nbytes = stacked[0].nbytes
        word, as_words = next((size, dtype) for size, dtype in WORDS if nbytes % size == 0)
        width = nbytes // word
        words = stacked.view(rows, -1).view(as_words) if width else stacked.new_empty((rows, 0), dtype=as_words)
        self._rows = words.as_strided((rows - length + 1, length * width), (width, 1))
        first = first_rows(columns, rows // columns, and_next=and_next)
        self._dtype, self._shape, self._columns = stacked.dtype, (length, *feature), len(first)
        self._first = torch.from_numpy(first).to(stacked.device)[:, None]
        self._device = device

    def copy(self, starts: torch.Tensor) -> list[torch.Tensor]:
        """Enqueue copies of the chunks that begin at ``starts``, ``[B]``: ``[B, length, *feature]`` per column."""
        rows = starts if self._columns == 1 else (self._first + starts).reshape(-1)
        copies = torch.empty((self._columns, len(starts), *self._shape), dtype=self._dtype, device=starts.device)
        if copies.nbytes:
            words = copies.view(len(rows), -1).view(self._rows.dtype)
            self._device.run(partial(torch.index_select, self._rows, 0, rows, out=words))
        return list(copies.unbind())


class Spans(NamedTuple):
    """Spans of steps to be copied from one place to another; ``int64`` ``[n]`` each."""

    begins: np.ndarray
    """First step where they are."""
    to: np.ndarray
    """First step where they are copied to."""
    lengths: np.ndarray
    """Number of steps."""


class DeviceArena:
    """One contiguous column ``[steps, *shape]`` per field, on a device.

    Args:
        schema: the fields of a step.
        steps: number of steps in the arena.
        shifted: the fields without a column of their own; see :mod:`~embodichain_rl.replay.schema.shifted`.
        device: the device of the arena.
        check: function that is called before every copy out of the arena, and raises if the arena cannot be read.

    Attributes:
        check: the given function.
        order (StreamOrder): the order of reads and writes.
        stored (dict[int, torch.Tensor]): the column of each field that has one.

    Raises:
        BufferMemoryError: if the device does not have enough free memory.
    """

    def __init__(
        self, schema: Schema, steps: int, shifted: Shifted, device: Device, check: Callable[[], None] = lambda: None
    ) -> None:
        self.schema = schema
        self.shifted = shifted
        self.order = StreamOrder(device)
        self._device = device
        self.check = check
        memory = device.empty(column_bytes(schema, steps, shifted))

        def tensor_at(dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
            nbytes = dtype.itemsize * torch.Size(shape).numel()
            return memory[offset : offset + nbytes].view(dtype).view(shape)

        layout = Layout(schema, steps, shifted, tensor_at)
        self.stored, self.columns = layout.stored, layout.columns
        self.tensordict = schema.build(self.columns, (steps - bool(shifted),))
        # On the host, because draws within segments read it before anything is copied.
        self.segment_left = None if segment_field(schema) is None else np.zeros(steps, dtype=np.int32)
        self._gathers = Gathers(layout, partial(_DeviceView, device=device))

    blobs = None
    """There are no ragged or compressed fields on a device."""

    # ------------------------------------------------------------------------------------------------- reading

    def copy_chunks(self, starts: np.ndarray, length: int, *, separate_next: bool = True) -> list[torch.Tensor]:
        """Copy chunks; see :meth:`Arena.copy_chunks`."""
        self.check()
        gathers = self._gathers.of_chunks(length, separate_next)
        begin = self.tensor(starts)
        chunks: list[torch.Tensor] = [torch.empty(0)] * len(self.columns)
        with self.order.reading():
            for gather in gathers:
                copies = gather.view.copy(begin)
                for number, copy in zip(gather.numbers, copies, strict=True):
                    chunks[number] = copy
        if not separate_next:
            split_shifted(chunks, self.shifted, length)
        return chunks

    def copy_steps(self, number: int, steps: np.ndarray) -> torch.Tensor:
        """Copy single steps of field ``number``: for step indices ``[*B]`` return ``[*B, *shape]``."""
        self.check()
        view = self._gathers.of_steps(number)
        at = self.tensor(steps.reshape(-1))
        with self.order.reading():
            (copies,) = view.copy(at)
        return copies.view(*steps.shape, *self.schema.fields[number].shape)

    def copy_all_steps(self, wanted: Sequence[tuple[int, np.ndarray]]) -> list[torch.Tensor]:
        """Copy single steps of several fields; see :meth:`Arena.copy_all_steps`."""
        return [self.copy_steps(number, steps) for number, steps in wanted]

    def copy_spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
        """Copy the spans ``[start, start + length)`` and concatenate them: ``[sum of lengths, *shape]`` per field."""
        at = ranges(starts, np.maximum(lengths, 0))
        return [self.copy_steps(number, at) for number in range(len(self.columns))]

    # ----------------------------------------------------------------------------------------- working on copies

    def resolved(self, number: int, value: torch.Tensor) -> torch.Tensor:
        """Return the values of a field as they are; see :meth:`Arena.resolved`."""
        return value

    def resolved_together(self, numbers: Sequence[int], values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the values of several fields as they are; see :meth:`Arena.resolved_together`."""
        return list(values)

    def build_sample(self, values: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> TensorDict:
        """Build a TensorDict of what was copied; see :meth:`Schema.build_sample`."""
        return self.schema.build_sample(values, origin)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a tensor on the device of the copies."""
        return self._device.tensor(torch.from_numpy(np.ascontiguousarray(array)))

    def origin(self, index: np.ndarray) -> list[torch.Tensor]:
        """Return an index ``[*B, 2]`` of trajectory ids and steps as a tensor, together with its two columns."""
        columns = self.tensor(np.moveaxis(index, -1, 0))
        return [columns.movedim(0, -1), columns[0], columns[1]]

    def replace(self, values: Sequence[torch.Tensor], at: np.ndarray, new: Sequence[torch.Tensor]) -> None:
        """Overwrite some chunks of a batch: ``values[at] = new`` for each field."""
        index = self.tensor(at)
        for value, other in zip(values, new, strict=True):
            self._device.run(partial(value.index_copy_, 0, index, other))

    def rearrange(self, values: Sequence[torch.Tensor], rows: np.ndarray, within: np.ndarray) -> None:
        """Reorder the steps of some chunks; see :meth:`Arena.rearrange`."""
        row_index, step_index = self.tensor(rows), self.tensor(within)
        for value in values:
            self._device.run(partial(_rearrange, value, row_index, step_index))

    # ------------------------------------------------------------------------------------------------- writing

    def copy_in(self, spans: Sequence[tuple[int, int, int]], source: Mapping[int, torch.Tensor]) -> None:
        """Enqueue copies of spans of steps from the columns of another arena. Adjacent spans are copied together.

        Args:
            spans: ``(source start, target start, number of steps)``.
            source: column per field number, in pinned memory or on the device. It must not change before the copies are
                done.
        """
        self.order.before_writing()
        for begin, to, steps in merge_adjacent(spans):
            for number, column in self.stored.items():
                piece = source[number][begin : begin + steps]
                self._device.run(partial(column[to : to + steps].copy_, piece, non_blocking=True))

    def scatter(self, spans: Spans, source: Sequence[torch.Tensor]) -> None:
        """Enqueue copies of spans of steps, with two operations per field, whatever their number.

        Args:
            spans: from ``source`` to the arena.
            source: per field ``[m, *shape]``, on the device.
        """
        steps, to = self.indices(spans.begins, spans.lengths), self.indices(spans.to, spans.lengths)
        self._scatter([(number, number) for number in self.stored], steps, to, source)

    def scatter_last(self, steps: np.ndarray, to: np.ndarray, source: Sequence[torch.Tensor]) -> None:
        """Enqueue copies of the last next observations of trajectories, for fields that are stored once.

        Args:
            steps: row of ``source`` of each last step, ``int64`` ``[n]``.
            to: step of the arena behind it.
            source: per field ``[m, *shape]``, on the device.
        """
        numbers = [(of, number) for number, of in self.shifted.items()]
        self._scatter(numbers, self.tensor(steps), self.tensor(to), source)

    def _scatter(
        self, numbers: Sequence[tuple[int, int]], steps: torch.Tensor, to: torch.Tensor, source: Sequence[torch.Tensor]
    ) -> None:
        self.order.before_writing()
        for column, number in numbers:
            self._device.run(partial(_scatter, self.stored[column], to, source[number], steps))
        self.order.after_writing()

    def indices(self, starts: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
        """Return the concatenation of the ranges ``[start, start + length)``, on the device; see :func:`ranges`."""
        shifts = self.tensor(np.stack([starts - np.cumsum(lengths) + lengths, lengths]))
        total = int(lengths.sum())
        steps = torch.arange(total, device=shifts.device)
        return steps + torch.repeat_interleave(shifts[0], shifts[1], output_size=total)


def _scatter(column: torch.Tensor, to: torch.Tensor, source: torch.Tensor, steps: torch.Tensor) -> None:
    column.index_copy_(0, to, source.index_select(0, steps))


def _rearrange(value: torch.Tensor, rows: torch.Tensor, within: torch.Tensor) -> None:
    value[rows] = value[rows[:, None], within]


def merge_adjacent(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Merge spans ``(source start, target start, steps)`` that are adjacent in both the source and the target.

    Example:
        >>> merge_adjacent([(0, 10, 3), (3, 13, 2), (5, 20, 1)])
        [(0, 10, 5), (5, 20, 1)]
    """
    merged: list[tuple[int, int, int]] = []
    for begin, to, steps in spans:
        if merged:
            last_begin, last_to, last_steps = merged[-1]
            if (last_begin + last_steps, last_to + last_steps) == (begin, to):
                merged[-1] = last_begin, last_to, last_steps + steps
                continue
        merged.append((begin, to, steps))
    return merged


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the concatenation of the ranges ``[start, start + length)``.

    Example:
        >>> ranges(np.array([10, 3]), np.array([2, 3]))
        array([10, 11,  3,  4,  5])
    """
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(len(first))


class DeviceTable:
    """Trajectory values that are stored on the host and returned on the device.

    They are copied on the host at once. So the reader's check of the ledger after the copy covers them, as on the CPU.

    Args:
        table: the table on the host.
        device: the device of the returned values.
    """

    def __init__(self, table: TrajectoryTable, device: Device) -> None:
        self._table = table
        self._device = device

    def copy(self, ids: np.ndarray, length: int | None = None) -> list[torch.Tensor]:
        """Copy the values of trajectories, one tensor per field; see :meth:`TrajectoryTable.copy`."""
        values = [self._device.tensor(value) for value in self._table.copy(ids)]
        if length is None:
            return values
        return [value[:, None].expand(-1, length, *value.shape[1:]).contiguous() for value in values]

    def column(self, key: Key, ids: np.ndarray) -> np.ndarray:
        """Return a copy of the values of one field, on the host; see :meth:`TrajectoryTable.column`."""
        return self._table.column(key, ids)
