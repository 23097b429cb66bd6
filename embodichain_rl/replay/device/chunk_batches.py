"""Batches of plain chunks on a device: drawn and checked by the kernels on the host, copied by one gather."""

from __future__ import annotations

import math

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.device.arena import DeviceArena
from embodichain_rl.replay.device.cuda import Device
from embodichain_rl.replay.device.gathering import IDS, OFFSETS, STEPS, VALUES, GatherPlan, Output
from embodichain_rl.replay.host import TrajectoryTable, split_shifted
from embodichain_rl.replay.kernels import Draws, PlainChunks, SamplePlan, kernels
from embodichain_rl.replay.ledger import Ledger
from embodichain_rl.shared import ALIGNMENT

__all__ = ["DeviceBatches"]

OWN_MEMORY_FROM = 1 << 20
"""Bytes from which on a tensor has memory of its own, so that a small one that is kept does not keep it too."""

Place = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]
"""A tensor: its dtype, shape and strides, and where it begins in the block, in elements; -1 with memory of its own."""


class DeviceBatches:
    """Makes batches of one size, of plain chunks of one length; the counterpart of :class:`ChunkBatches` on a device.

    The host draws, enqueues one copy of what was drawn and one gather, and checks that the trajectories still exist.
    Nothing waits for the device; :class:`~embodichain_rl.replay.device.stream_order.StreamOrder` says why a batch is
    whole. If some chunks are to be drawn again, all are copied again.

    Args:
        arena: the steps.
        table: the values of whole trajectories, on the host.
        ledger: the table of trajectories.
        device: where the arena is.
        chunks: the request.
        views: whether a shifted field and the field that it is read from are views of the same ``length + 1`` steps;
            not with ``squeeze``.

    Attributes:
        count (int): the number of chunks.
    """

    is_large = False  # the memory of a device is taken from a cache, so it may be asked for before anything is drawn

    def __init__(
        self,
        arena: DeviceArena,
        table: TrajectoryTable | None,
        ledger: Ledger,
        device: Device,
        chunks: PlainChunks,
        *,
        views: bool,
    ) -> None:
        schema = arena.schema
        count, length, *_ = chunks
        self.count, self._length = count, length
        self._arena, self._table, self._device = arena, table, device
        self._kernels = kernels()
        self._views = arena.shifted if views else {}
        self._fill = schema.nest_of_samples.fill
        self._shape = torch.Size(chunks.shape)
        self._draw_plan = SamplePlan(ledger, (), chunks)
        self._idle: list[Draws] = []
        index_bytes = 8 * count * length
        outputs = [Output(IDS, 8, length), Output(OFFSETS, 8, length)]
        self._numbers: list[int] = []  # of the field that each tensor is of
        self._places: list[Place] = []
        offsets, end, packet_bytes = [0, index_bytes], _aligned(2 * index_bytes), GatherPlan.drawn_bytes(count)
        for number, field in enumerate(schema.all_fields):
            if number in self._views:
                continue
            steps = length + (number in self._views.values())
            shape = (*(self._shape if chunks.squeeze else (count, steps)), *field.shape)
            if number < len(schema.fields):
                outputs.append(Output(STEPS, field.nbytes, steps, arena.columns[number]))
            else:
                outputs.append(Output(VALUES, field.nbytes, steps, packet_offset=packet_bytes))
                packet_bytes += GatherPlan.padded(field.nbytes * count)
            nbytes = math.prod(shape) * field.dtype.itemsize
            in_block = nbytes < OWN_MEMORY_FROM
            self._numbers.append(number)
            self._places.append((field.dtype, shape, _strides(shape), end // field.dtype.itemsize if in_block else -1))
            offsets.append(end if in_block else 0)
            end += _aligned(nbytes) if in_block else 0
        self._own_memory = [number for number, (*_, at) in enumerate(self._places) if at < 0]
        self._offsets = np.array(offsets, dtype=np.int64)
        self._nbytes = end
        self._dtypes = {torch.int64, *(dtype for dtype, *_, at in self._places if at >= 0)}
        self._plan = GatherPlan(count, length, outputs, packet_bytes)

    # ------------------------------------------------------------------------------------------------- the memory

    def draws(self) -> Draws:
        """Return memory for the draws of a batch; give it back with :meth:`finish`."""
        try:
            return self._idle.pop()
        except IndexError:
            return Draws(self.count)

    def output(self) -> list[torch.Tensor]:
        """Return uninitialised memory: a block, and each tensor that has memory of its own."""
        device = self._device.device
        own = [self._places[number] for number in self._own_memory]
        block = torch.empty(self._nbytes, dtype=torch.uint8, device=device)
        return [block, *(torch.empty(shape, dtype=dtype, device=device) for dtype, shape, *_ in own)]

    # ------------------------------------------------------------------------------------------------ draw and copy

    def sample(self, numbers: torch.Tensor, missing: int, draws: Draws, output: list[torch.Tensor] | None) -> int:
        """Draw chunks; if all are drawn, copy and check them. See :meth:`ChunkBatches.sample`."""
        left = self._kernels.draw(self._draw_plan, numbers.data_ptr(), missing, draws)
        return left if left or output is None else self.copy(draws, output)

    def copy(self, draws: Draws, output: list[torch.Tensor]) -> int:
        """Copy and check the chunks that are drawn; return 0, or minus the number of chunks to draw again."""
        self._arena.check()
        addresses = self._offsets + output[0].data_ptr()
        for number, tensor in zip(self._own_memory, output[1:], strict=True):
            addresses[2 + number] = tensor.data_ptr()
        with self._arena.order.reading() as stream:
            self._device.gather(self._plan, self._packet(draws), addresses, output, stream)
        return self._kernels.check(self._draw_plan, draws)

    def _packet(self, draws: Draws) -> list[np.ndarray]:
        values = [] if self._table is None else self._table.copy(draws.arrays[0])
        return [GatherPlan.drawn(draws), *(GatherPlan.as_words(value) for value in values)]

    def finish(self, draws: Draws, output: list[torch.Tensor]) -> TensorDict:
        """Build a complete batch."""
        self._idle.append(draws)
        block, *rest = output
        own = iter(rest)
        typed = {dtype: block.view(dtype) for dtype in self._dtypes}
        values = [
            typed[dtype].as_strided(shape, strides, at) if at >= 0 else next(own)
            for dtype, shape, strides, at in self._places
        ]
        whole, size = typed[torch.int64], self._shape.numel()
        strides = _strides(self._shape)
        pair = whole.as_strided((*self._shape, 2), (*strides, size), 0)
        ids, steps = (whole.as_strided(self._shape, strides, at) for at in (0, size))
        if self._views:
            copied = dict(zip(self._numbers, values, strict=True))
            values = [copied.get(number, whole) for number in range(len(values) + len(self._views))]
            split_shifted(values, self._views, self._length)
        return self._fill([*values, pair, ids, steps], self._shape, self._device.device)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
