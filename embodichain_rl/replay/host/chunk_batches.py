"""Batches of plain chunks, drawn and copied by one call of the kernels, in one block of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.batch_memory import POOL_FROM, destination
from embodichain_rl.replay.host.layout import split_shifted
from embodichain_rl.replay.host.trajectory_table import TrajectoryTable
from embodichain_rl.replay.kernels import BlockLayout, Column, Draws, PlainChunks, SamplePlan, Spec, Targets, kernels
from embodichain_rl.replay.ledger import Ledger

__all__ = ["ChunkBatches", "Output"]

CPU = torch.device("cpu")


class Output(NamedTuple):
    """The memory of one batch."""

    base: int
    """Address that ``targets`` are relative to."""
    targets: Targets
    tensors: list[torch.Tensor]
    """The index, ``[2, count, length]``; the tensors that are copied; and the trajectory ids and steps of the index."""


class ChunkBatches:
    """Makes batches of one size, of plain chunks of one length that are drawn uniformly.

    A batch is one block of memory. But tensors of a megabyte and more have memory of their own, which is recycled; and
    inside :func:`gathering_into` all memory is from there.

    A call of :meth:`sample` or :meth:`copy` returns 0 if the batch is complete. Otherwise some chunks are to be drawn
    again; see :meth:`draws` for which.

    Args:
        arena: the steps.
        table: the values of whole trajectories.
        ledger: the table of trajectories.
        chunks: the request.
        views: whether a shifted field and the field that it is read from are views of the same ``length + 1`` steps;
            not with ``squeeze``.

    Attributes:
        count (int): the number of chunks.
        is_large (bool): whether helper threads copy too.
    """

    def __init__(
        self,
        arena: Arena,
        table: TrajectoryTable | None,
        ledger: Ledger,
        chunks: PlainChunks,
        *,
        views: bool,
    ) -> None:
        schema = arena.schema
        count, length, *_ = chunks
        self.count, self._length = count, length
        self._kernels = kernels()
        self._views = arena.shifted if views else {}
        self._fields = len(schema.fields)
        self._fill = schema.nest_of_samples.fill
        self._shape = torch.Size(chunks.shape)
        columns, specs = [], []
        self._numbers: list[int] = []  # of the field that each tensor is of
        for number, field in enumerate(schema.all_fields):
            if number in self._views:
                continue
            of_steps = number < self._fields
            steps = length + (number in self._views.values())
            specs.append(((*(self._shape if chunks.squeeze else (count, steps)), *field.shape), field.dtype))
            self._numbers.append(number)
            if of_steps:
                columns.append(Column(arena.steps_of(number), steps))
            else:
                assert table is not None, "the schema has trajectory fields"
                columns.append(Column(table.rows_of(number - self._fields), steps, per_trajectory=True))
        self._copied = [number for number, column in enumerate(columns) if column.chunk_bytes]
        copied = [columns[number] for number in self._copied]
        self._plan = SamplePlan(ledger, copied, chunks, ahead=arena.ahead)
        sizes = [_bytes(spec) for spec in specs]
        self.is_large = sum(sizes) >= POOL_FROM
        self._specs = [((2, *self._shape), torch.int64), *specs]
        of_index: Spec = tuple(self._shape), torch.int64
        own_memory = [number for number, size in enumerate(sizes, start=1) if size >= POOL_FROM]
        self._own_memory = {number: self._specs[number] for number in own_memory}
        self._in_block = [number for number in range(len(self._specs)) if number not in own_memory]
        small = [self._specs[number] for number in self._in_block]
        self._layout = BlockLayout(small, [(0, of_index), (8 * count * length, of_index)])
        self._one_block = None if own_memory else self._layout
        self._memory = arena.batch_memory
        self._targets = None if own_memory else self._targets_of(self._layout.offsets)
        self._idle: list[Draws] = []

    def _layout_in_one_block(self) -> BlockLayout:
        """Return the layout of batches that have no tensor with memory of its own."""
        if self._one_block is None:
            of_index: Spec = tuple(self._shape), torch.int64
            self._one_block = BlockLayout(self._specs, [(0, of_index), (8 * self._shape.numel(), of_index)])
        return self._one_block

    def _targets_of(self, offsets: Sequence[int]) -> Targets:
        """Return the targets, given where each tensor of an output begins."""
        return Targets([*(offsets[number + 1] for number in self._copied), *offsets[-2:]])

    # ------------------------------------------------------------------------------------------------- the memory

    def draws(self) -> Draws:
        """Return memory for the draws of a batch; give it back with :meth:`finish`."""
        try:
            return self._idle.pop()
        except IndexError:
            return Draws(self.count)

    def output(self) -> Output:
        """Return uninitialised memory for a batch."""
        memory = destination()
        if memory is not None:
            layout = self._layout_in_one_block()
            (block,) = memory.empty_together([((layout.nbytes,), torch.uint8)])
            return Output(block.data_ptr(), self._targets_of(layout.offsets), layout.tensors(block))
        elif self._layout.nbytes < POOL_FROM:
            tensors = self._layout.empty()
        else:
            tensors = self._layout.tensors(self._memory.empty((self._layout.nbytes,), torch.uint8))
        if self._targets is not None:
            return Output(tensors[0].data_ptr(), self._targets, tensors)
        *in_block, ids, steps = tensors
        at: dict[int, torch.Tensor] = dict(zip(self._in_block, in_block, strict=True))
        at |= {number: self._memory.empty(*spec) for number, spec in self._own_memory.items()}
        tensors = [*(at[number] for number in range(len(self._specs))), ids, steps]
        return Output(0, self._targets_of([tensor.data_ptr() for tensor in tensors]), tensors)

    # --------------------------------------------------------------------------------------------------- the kernels

    def sample(self, numbers: torch.Tensor, missing: int, draws: Draws, output: Output | None) -> int:
        """Draw chunks; if all are drawn, copy and check them.

        Args:
            numbers: uniform numbers of ``[0, 1)``, ``float64``, one per chunk to be drawn.
            missing: the number of chunks to be drawn; 0: all, for a new batch.
            draws: from :meth:`draws`.
            output: from :meth:`output`; None: nothing is copied yet.

        Returns:
            0 if all are drawn, and the batch is complete; the number of chunks whose trajectory does not fit; minus the
            number of chunks whose trajectory was evicted meanwhile; or ``EMPTY``.
        """
        plan, at = self._plan, numbers.data_ptr()
        if output is None:
            return self._kernels.draw(plan, at, missing, draws)
        return self._kernels.sample(plan, at, missing, draws, output.base, output.targets, self._threads())

    def copy(self, draws: Draws, output: Output) -> int:
        """Copy and check the chunks that are drawn; return 0, or minus the number of chunks to draw again."""
        return self._kernels.copy(self._plan, draws, output.base, output.targets, self._threads())

    def _threads(self) -> int:
        return torch.get_num_threads() if self.is_large else 1

    def finish(self, draws: Draws, output: Output) -> TensorDict:
        """Build a complete batch."""
        self._idle.append(draws)
        planes, *values, ids, steps = output.tensors
        # From NumPy, so that it has a storage of its own size, and is no view of another tensor.
        pair = torch.from_numpy(np.moveaxis(planes.numpy(), 0, -1))
        if self._views:
            copied = dict(zip(self._numbers, values, strict=True))
            values = [copied.get(number, planes) for number in range(len(values) + len(self._views))]
            split_shifted(values, self._views, self._length)
        return self._fill([*values, pair, ids, steps], self._shape, CPU)


def _bytes(spec: Spec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize
