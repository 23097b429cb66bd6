"""The arena on a device: what :class:`~embodichain_rl.replay.host.Arena` is on the CPU, in the process of its owner.

All that is asked of it is enqueued, and returns at once: tensors that are handed out are there for whatever is enqueued
on the same stream after it, as of any operation of torch on a device. See :mod:`embodichain_rl.replay.stream_order` for
why they are whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.stream_order import StreamOrder
from embodichain_rl.replay.host import Gathers, Layout, TrajectoryTable, column_bytes, first_rows
from embodichain_rl.replay.schema import Key, Schema, Shifted, segment_field

__all__ = ["DeviceArena", "DeviceTable", "ranges"]

WORDS = ((8, torch.int64), (4, torch.int32), (2, torch.int16), (1, torch.uint8))
"""What steps are copied as: the widest that divides the bytes of a step. Copied as bytes, images take several times as
long."""


class _DeviceView:
    """All chunks of one length of columns that lie one behind the other; see :class:`ChunkView`."""

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
        """Enqueues the copies of the chunks that begin at ``starts``, ``[B]``: ``[B, length, *feature]`` a column."""
        rows = starts if self._columns == 1 else (self._first + starts).reshape(-1)
        copies = torch.empty((self._columns, len(starts), *self._shape), dtype=self._dtype, device=starts.device)
        if copies.nbytes:
            words = copies.view(len(rows), -1).view(self._rows.dtype)
            self._device.run(partial(torch.index_select, self._rows, 0, rows, out=words))
        return list(copies.unbind())


class DeviceArena:
    """One contiguous tensor ``[steps, *shape]`` a field, on a device.

    Args:
        schema: the fields of a step.
        steps: steps of the arena.
        shifted: the fields that have no column of their own; see :mod:`~embodichain_rl.replay.shifted`.
        device: where it lies.
        check: raises what stands against handing anything out; called before every copy.

    Attributes:
        order (StreamOrder): of reads and writes.
        stored (dict[int, torch.Tensor]): the column of each field that has one.

    Raises:
        BufferMemoryError: when the device has not as much memory left.
    """

    def __init__(
        self, schema: Schema, steps: int, shifted: Shifted, device: Device, check: Callable[[], None] = lambda: None
    ) -> None:
        self.schema = schema
        self.shifted = shifted
        self.order = StreamOrder(device)
        self._device = device
        self._check = check
        memory = device.empty(column_bytes(schema, steps, shifted))

        def place(dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
            nbytes = dtype.itemsize * torch.Size(shape).numel()
            return memory[offset : offset + nbytes].view(dtype).view(shape)

        layout = Layout(schema, steps, shifted, place)
        self.stored, self.columns = layout.stored, layout.columns
        self.tensordict = schema.build(self.columns, (steps - bool(shifted),))
        # What draws within segments look at, before anything is copied: on the host.
        self.segment_left = None if segment_field(schema) is None else np.zeros(steps, dtype=np.int32)
        self._gathers = Gathers(layout, partial(_DeviceView, device=device))
        self._step_views: dict[int, _DeviceView] = {}

    # ------------------------------------------------------------------------------------------------- reading

    def copy_chunks(self, starts: np.ndarray, length: int, *, separate_next: bool = True) -> list[torch.Tensor]:
        """Copies chunks; see :meth:`Arena.copy_chunks`."""
        self._check()
        gathers = self._gathers.of(length, separate_next)
        begin = self.tensor(starts)
        chunks: list[torch.Tensor] = [torch.empty(0)] * len(self.columns)
        self.order.before_reading()
        for gather in gathers:
            copies = gather.view.copy(begin)
            for number, copy in zip(gather.numbers, copies, strict=True):
                chunks[number] = copy
        self.order.after_reading()
        if not separate_next:
            for number, of in self.shifted.items():
                steps = chunks[of]
                chunks[of], chunks[number] = steps[:, :length], steps[:, 1:]
        return chunks

    def copy_steps(self, number: int, steps: np.ndarray) -> torch.Tensor:
        """Copies the steps at any places ``[*B]`` of field ``number``: ``[*B, *shape]``."""
        self._check()
        view = self._step_views.get(number)
        if view is None:
            view = self._step_views[number] = _DeviceView(self.columns[number], 1, 1, self._device)
        at = self.tensor(steps.reshape(-1))
        self.order.before_reading()
        (copies,) = view.copy(at)
        self.order.after_reading()
        return copies.view(*steps.shape, *self.schema.fields[number].shape)

    def copy_spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
        """Copies the steps ``[start, start + length)`` one span behind the other: ``[sum, *shape]`` a field."""
        at = ranges(starts, np.maximum(lengths, 0))
        return [self.copy_steps(number, at) for number in range(len(self.columns))]

    # ---------------------------------------------------------------------------------------- what copies become

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Returns an array as a tensor beside the copies."""
        return self._device.tensor(torch.from_numpy(np.ascontiguousarray(array)))

    def origin(self, index: np.ndarray) -> list[torch.Tensor]:
        """Returns what a sample says of where it comes from: an index ``[*B, 2]``, and its parts."""
        apart = self.tensor(np.moveaxis(index, -1, 0))
        return [apart.movedim(0, -1), apart[0], apart[1]]

    def replace(self, values: Sequence[torch.Tensor], at: np.ndarray, new: Sequence[torch.Tensor]) -> None:
        """Puts other copies in the place of some of a batch: ``values[at] = new``, of each field."""
        index = self.tensor(at)
        for value, other in zip(values, new, strict=True):
            self._device.run(partial(value.index_copy_, 0, index, other))

    def rearrange(self, values: Sequence[torch.Tensor], rows: np.ndarray, within: np.ndarray) -> None:
        """Takes other steps of some chunks; see :meth:`Arena.rearrange`."""
        of_rows, steps = self.tensor(rows), self.tensor(within)
        for value in values:
            self._device.run(partial(_rearrange, value, of_rows, steps))

    # ------------------------------------------------------------------------------------------------- writing

    def copy_in(self, spans: Sequence[tuple[int, int, int]], source: Mapping[int, torch.Tensor]) -> None:
        """Enqueues the copies of steps from columns of the same layout, in large pieces where they lie together.

        Args:
            spans: ``(from, to, steps)``, the first step there, the first step here, and how many.
            source: the columns by field, in pinned memory or on the device. They may change when it is done.
        """
        self.order.before_writing()
        for begin, to, steps in joined(spans):
            for number, column in self.stored.items():
                piece = source[number][begin : begin + steps]
                self._device.run(partial(column[to : to + steps].copy_, piece, non_blocking=True))

    def scatter(self, to: np.ndarray, source: Sequence[torch.Tensor], steps: np.ndarray) -> None:
        """Enqueues the copies of single steps, one call a field.

        Args:
            to: ``int64`` ``[n]``, where each goes.
            source: of each field ``[m, *shape]``, on the device.
            steps: ``int64`` ``[n]``, which of these.
        """
        index, of_source = self.tensor(to), self.tensor(steps)
        self.order.before_writing()
        for number, column in self.stored.items():
            self._device.run(partial(column.index_copy_, 0, index, source[number].index_select(0, of_source)))
        self.order.after_writing()


def _rearrange(value: torch.Tensor, rows: torch.Tensor, within: torch.Tensor) -> None:
    value[rows] = value[rows[:, None], within]


def joined(spans: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Returns ``(from, to, steps)`` with those put together that lie behind one another in both places.

    Example:
        >>> joined([(0, 10, 3), (3, 13, 2), (5, 20, 1)])
        [(0, 10, 5), (5, 20, 1)]
    """
    pieces: list[tuple[int, int, int]] = []
    for begin, to, steps in spans:
        if pieces:
            last_begin, last_to, last_steps = pieces[-1]
            if (last_begin + last_steps, last_to + last_steps) == (begin, to):
                pieces[-1] = last_begin, last_to, last_steps + steps
                continue
        pieces.append((begin, to, steps))
    return pieces


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns the numbers of all ranges, one range behind the other.

    Example:
        >>> ranges(np.array([10, 3]), np.array([2, 3]))
        array([10, 11,  3,  4,  5])
    """
    first = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    return first + np.arange(len(first))


class DeviceTable:
    """The values of whole trajectories, which lie on the host, handed out on the device.

    They are copied to the host's memory before the ledger is asked whether they are whole, as on the CPU.

    Args:
        table: where they are.
        device: where they are wanted.
    """

    def __init__(self, table: TrajectoryTable, device: Device) -> None:
        self._table = table
        self._device = device

    def copy(self, ids: np.ndarray, length: int | None = None) -> list[torch.Tensor]:
        """Copies the values of trajectories, one tensor a field; see :meth:`TrajectoryTable.copy`."""
        values = [self._device.tensor(value) for value in self._table.copy(ids)]
        if length is None:
            return values
        return [value[:, None].expand(-1, length, *value.shape[1:]).contiguous() for value in values]

    def column(self, key: Key, ids: np.ndarray) -> np.ndarray:
        """Returns copies of the values of one field, on the host; see :meth:`TrajectoryTable.column`."""
        return self._table.column(key, ids)
