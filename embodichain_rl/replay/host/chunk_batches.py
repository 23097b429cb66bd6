"""Batches of plain chunks, drawn and copied by one call of the kernels, in one block of memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.host.arena import Arena
from embodichain_rl.replay.host.batch_memory import POOL_FROM, Destination, destination
from embodichain_rl.replay.host.layout import split_shifted
from embodichain_rl.replay.host.trajectory_table import TrajectoryTable
from embodichain_rl.replay.kernels import BlockLayout, Column, Draws, SamplePlan, Spec, Targets, kernels
from embodichain_rl.replay.ledger import Ledger

__all__ = ["ChunkBatches", "Output"]

CPU = torch.device("cpu")


class Output(NamedTuple):
    """The memory of one batch."""

    base: int
    """Address that ``targets`` are relative to."""
    targets: Targets
    block: torch.Tensor | None
    """The block of all tensors that have no memory of their own; None inside :func:`gathering_into`."""
    tensors: list[torch.Tensor] | None
    """The tensors, where they are not all in the block. The index is one tensor ``[2, count, length]`` if there is no
    block."""


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
        count: the number of chunks.
        length: the number of steps of a chunk.
        first: the first offset that may be drawn in a trajectory.
        extra: the number of offsets that a trajectory has besides its steps; negative.
        views: whether a shifted field and the field that it is read from are views of the same ``length + 1`` steps.

    Attributes:
        count (int): the number of chunks.
        is_large (bool): whether helper threads copy too.
    """

    def __init__(
        self,
        arena: Arena,
        table: TrajectoryTable | None,
        ledger: Ledger,
        *,
        count: int,
        length: int,
        first: int,
        extra: int,
        views: bool,
    ) -> None:
        schema = arena.schema
        self.count, self._length = count, length
        self._kernels = kernels()
        self._views = arena.shifted if views else {}
        self._fields = len(schema.fields)
        self._fill = schema.nest_of_samples.fill
        self._shape = torch.Size((count, length))
        columns, specs = [], []
        self._numbers: list[int] = []  # of the field that each tensor is of
        for number, field in enumerate(schema.all_fields):
            if number in self._views:
                continue
            of_steps = number < self._fields
            steps = length + (number in self._views.values())
            specs.append(((count, steps, *field.shape), field.dtype))
            self._numbers.append(number)
            if of_steps:
                columns.append(Column(arena.steps_of(number), steps))
            else:
                assert table is not None, "the schema has trajectory fields"
                columns.append(Column(table.rows_of(number - self._fields), steps, per_trajectory=True))
        of_index = [((count, length), torch.int64)] * 2
        self._copied = [number for number, column in enumerate(columns) if column.chunk_bytes]
        self._plan = SamplePlan(
            ledger,
            [columns[number] for number in self._copied],
            count=count,
            length=length,
            first=first,
            extra=extra,
        )
        sizes = [_bytes(spec) for spec in specs]
        self._specs = [*specs, *of_index]
        self._large = {number for number, size in enumerate(sizes) if size >= POOL_FROM}
        self.is_large = sum(sizes) >= POOL_FROM
        small = [spec for number, spec in enumerate(self._specs) if number not in self._large]
        self._small = [number for number in range(len(self._specs)) if number not in self._large]
        self._layout = BlockLayout(small)
        self._one_block = not self._large and self._layout.nbytes < POOL_FROM
        self._memory = arena.batch_memory
        if not self._large:
            self._targets = self._targets_of(self._layout.offsets)
        ids, steps_ = self._layout.offsets[-2:]
        self._pair_at, self._pair_strides = ids, (8 * length, 8, steps_ - ids)
        self._idle: list[Draws] = []

    def _targets_of(self, offsets: tuple[int, ...] | list[int]) -> Targets:
        return Targets([*(offsets[number] for number in self._copied), *offsets[-2:]])

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
        if self._one_block and memory is None:
            block = torch.empty(self._layout.nbytes, dtype=torch.uint8)
            return Output(block.data_ptr(), self._targets, block, None)
        return self._separate_output(memory)

    def _separate_output(self, memory: Destination | None) -> Output:
        if memory is not None:
            tensors = memory.empty_together([*self._specs[:-2], ((2, *self._shape), torch.int64)])
            addresses = [tensor.data_ptr() for tensor in tensors]
            addresses.append(addresses[-1] + 8 * self._shape.numel())
            return Output(0, self._targets_of(addresses), None, tensors)
        block = self._memory.empty((self._layout.nbytes,), torch.uint8)
        if not self._large:
            return Output(block.data_ptr(), self._targets, block, None)
        tensors = [block] * len(self._specs)
        for number, tensor in zip(self._small, self._layout.tensors(block), strict=True):
            tensors[number] = tensor
        for number in self._large:
            tensors[number] = self._memory.empty(*self._specs[number])
        return Output(0, self._targets_of([tensor.data_ptr() for tensor in tensors]), block, tensors)

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
        _, _, block, tensors = output
        if block is None:
            assert tensors is not None, "one of them is given"
            *tensors, planes = tensors
            tensors += planes.unbind()
            pair = planes.permute(1, 2, 0)
        else:
            if tensors is None:
                tensors = self._layout.tensors(block)
            pair = torch.from_numpy(
                np.ndarray((*self._shape, 2), np.int64, block.numpy(), self._pair_at, self._pair_strides)
            )
        if not self._views:
            return self._fill([*tensors[:-2], pair, *tensors[-2:]], self._shape, CPU)
        values = [tensors[0]] * (len(self._numbers) + len(self._views))
        for number, tensor in zip(self._numbers, tensors[:-2], strict=True):
            values[number] = tensor
        split_shifted(values, self._views, self._length)
        return self._fill([*values, pair, *tensors[-2:]], self._shape, CPU)


def _bytes(spec: Spec) -> int:
    shape, dtype = spec
    return math.prod(shape) * dtype.itemsize
