"""The arena on the CPU: memory-mapped columns, copies of steps into them, and copies of chunks out of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from embodichain_rl.replay.host.batch_memory import BatchMemory, Destination, destination
from embodichain_rl.replay.host.blob_arena import BlobArena, LaidOut
from embodichain_rl.replay.host.chunk_view import ChunkView
from embodichain_rl.replay.host.layout import Gathers, Layout, blobs_offset, split_shifted
from embodichain_rl.replay.schema import (
    Blobs,
    Schema,
    Shifted,
    as_array,
    decoded,
    identity_of,
    resolved,
    segment_field,
    steps_left,
)
from embodichain_rl.shared import Part, ReadAhead, SharedBlock

__all__ = ["Arena"]

_NO_TENSOR = torch.empty(0)


class Arena:
    """One contiguous column ``[steps, *shape]`` per field, in shared memory that this process has mapped.

    The arena knows nothing of trajectories. The ledger decides which steps may be read or written.

    Args:
        schema: the fields of a step.
        block: shared memory of :func:`~embodichain_rl.replay.host.layout.arena_bytes` bytes.
        steps: number of steps in the arena.
        shifted: the fields without a column of their own; see :mod:`~embodichain_rl.replay.schema.shifted`. If there
            are any, a trajectory of ``T`` steps takes ``T + 1``.
    """

    def __init__(self, schema: Schema, block: SharedBlock, steps: int, shifted: Shifted) -> None:
        self.schema = schema
        self.shifted = shifted
        self.ahead = ReadAhead(block)
        layout = Layout(schema, steps, shifted, block.tensor)
        self.stored, self.columns = layout.stored, layout.columns
        block_steps, steps = steps, steps - bool(shifted)
        self.tensordict = schema.build(self.columns, (steps,))
        self._arrays = [as_array(column) for column in self.columns]
        self._written = [None if number in shifted else array for number, array in enumerate(self._arrays)]
        self.segment_left: np.ndarray | None = None
        """Number of steps left in the segment of each step, ``int32`` ``[steps]``; None without segments.

        Samplers use it to find chunks within segments.
        """
        segments = segment_field(schema)
        if segments is not None:
            self._segment_ids = self._arrays[segments].reshape(steps)
            self.segment_left = block.array(np.int32, (steps,), layout.end)
        self.blobs: BlobArena | None = None
        """The bytes of the fields whose values are blobs; None without such fields."""
        if schema.blobs is not None:
            slot = schema.blobs.slot
            memory = block.array(np.uint8, (block_steps * slot,), blobs_offset(schema, block_steps, layout.end))
            self.blobs = BlobArena(memory, slot, schema.blob_numbers, self.ahead)
        self.batch_memory = BatchMemory()
        self._gathers = Gathers(layout, ChunkView)

    def write(self, start: int, pieces: Sequence[Sequence[np.ndarray]], blobs: LaidOut | None = None) -> int | None:
        """Copy the consecutive pieces of a trajectory to the steps from ``start`` on.

        Args:
            start: first step of the region.
            pieces: for each piece, one array ``[n, *shape]`` per field (:func:`as_array` of a tensor).
            blobs: what :meth:`BlobArena.lay_out` returned for them; None without such fields.

        Returns:
            The length of the longest segment, in steps; None without segments.
        """
        if blobs is not None:
            pieces = self._written_blobs(start, pieces, blobs)
        end = start
        for piece in pieces:
            for column, values in zip(self._written, piece, strict=True):
                if column is not None:
                    column[end : end + len(values)] = values
            end += len(piece[0])
        for number in self.shifted:
            self._arrays[number][end - 1] = pieces[-1][number][-1]
        return self.mark_segments(start, end)

    def views(self, start: int, steps: int) -> list[np.ndarray]:
        """Return the steps from ``start`` on, one view ``[steps, *shape]`` per field."""
        return [array[start : start + steps] for array in self._arrays]

    def mark_segments(self, start: int, end: int) -> int | None:
        """Note for each of the steps ``[start, end)`` of a trajectory how many steps of its segment are left.

        Returns:
            The length of the longest segment, in steps; None without segments.
        """
        if self.segment_left is None:
            return None
        left = steps_left(self._segment_ids[start:end])
        self.segment_left[start:end] = left
        return int(left.max())

    def _written_blobs(
        self, start: int, pieces: Sequence[Sequence[np.ndarray]], laid_out: LaidOut
    ) -> list[list[np.ndarray]]:
        """Write the blobs of a trajectory; return its pieces with what the columns hold in their place."""
        assert self.blobs is not None, "laid out by it"
        begin = self.blobs.write(start, laid_out)
        written = []
        for piece in pieces:
            of_columns = list(piece)
            for number in self.blobs.numbers:
                of_columns[number] = self.blobs.column_of(piece[number], laid_out, begin)
            written.append(of_columns)
        return written

    def copy_chunks(self, starts: np.ndarray, length: int, *, separate_next: bool = True) -> list[torch.Tensor]:
        """Copy chunks of ``length`` steps that begin at the steps ``starts``.

        The copies lie in the memory of the enclosing :func:`gathering_into`, if any, and in their own memory otherwise.

        Args:
            starts: first step of each chunk, ``int64`` ``[B]``.
            length: number of steps per chunk.
            separate_next: whether to copy shifted fields separately, so that every field is contiguous. Otherwise a
                shifted field and the field that it is read from are views of the same ``length + 1`` copied steps.

        Returns:
            ``[B, length, *shape]`` per field.
        """
        gathers = self._gathers.of_chunks(length, separate_next)
        memory = destination()
        outputs: Iterable[torch.Tensor | None] = itertools.repeat(None)
        if memory is not None:
            outputs = memory.empty_together([(g.view.shape_of(len(starts)), g.view.dtype) for g in gathers])
        chunks: list[torch.Tensor] = [_NO_TENSOR] * len(self.columns)
        with self.ahead.reading(gather.view.part(starts) for gather in gathers):
            for gather, output in zip(gathers, outputs, strict=False):
                view = gather.view
                if output is None and view.uses_recycled_memory:
                    output = self.batch_memory.empty(view.shape_of(len(starts)), view.dtype)
                copies = view.copy(starts) if output is None else view.copy_to(output, starts)
                for number, copy in zip(gather.numbers, copies, strict=True):
                    chunks[number] = copy
        if not separate_next:
            split_shifted(chunks, self.shifted, length)
        return chunks if self.blobs is None else self._with_blobs(self.blobs, chunks)

    @staticmethod
    def _with_blobs(blobs: BlobArena, values: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return values of all fields, with blobs in the place of what their columns hold."""
        found: dict[int, bytes] = {}
        read: list[Any] = list(values)
        for number in blobs.numbers:
            read[number] = blobs.read(values[number], found)
        return read

    def steps_of(self, number: int) -> np.ndarray:
        """Return the bytes of the steps of field ``number``, ``uint8`` ``[steps, bytes of a step]``.

        Those of a shifted field begin one step later than those of the field that it is read from.
        """
        column = self.stored[self.shifted[number]][1:] if number in self.shifted else self.stored[number]
        return as_array(column).reshape(len(column), math.prod(column.shape[1:])).view(np.uint8)

    def copy_spans(self, starts: np.ndarray, lengths: np.ndarray) -> list[torch.Tensor]:
        """Copy the spans ``[start, start + length)`` and concatenate them: ``[sum of lengths, *shape]`` per field."""
        spans = [slice(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n > 0]
        if spans:
            values = [torch.cat([column[span] for span in spans]) for column in self.columns]
        else:
            values = [column[:0].clone() for column in self.columns]
        return values if self.blobs is None else self._with_blobs(self.blobs, values)

    def copy_steps(self, number: int, steps: np.ndarray, found: dict[int, bytes] | None = None) -> torch.Tensor:
        """Copy single steps of field ``number``: for step indices ``[*B]`` return ``[*B, *shape]``; or blobs ``[*B]``.

        Args:
            number: the number of the field.
            steps: step indices, ``int64`` ``[*B]``.
            found: see :meth:`BlobArena.read`.
        """
        with self.ahead.reading([self._part_of_steps(number, steps)]):
            copies = self._copied_steps(number, steps)
        if not self.schema.fields[number].is_blob or self.blobs is None:
            return copies
        blobs: Any = self.blobs.read(copies, {} if found is None else found)
        return blobs

    def _part_of_steps(self, number: int, steps: np.ndarray) -> Part:
        return self._gathers.of_steps(number).part(steps.reshape(-1))

    def _copied_steps(self, number: int, steps: np.ndarray) -> torch.Tensor:
        """Copy what the column of field ``number`` holds of each step."""
        view = self._gathers.of_steps(number)
        flat = np.ascontiguousarray(steps.reshape(-1))
        if view.uses_recycled_memory:
            (copies,) = view.copy_to(self.batch_memory.empty(view.shape_of(len(flat)), view.dtype), flat)
        else:
            (copies,) = view.copy(flat)
        return copies.view(*steps.shape, *self.schema.fields[number].column[0])

    def copy_all_steps(self, wanted: Sequence[tuple[int, np.ndarray]]) -> list[torch.Tensor]:
        """Copy single steps of several fields, as :meth:`copy_steps` does.

        The copies lie in the memory of the enclosing :func:`gathering_into`, if any.

        Args:
            wanted: numbers of fields, and the steps of each.
        """
        memory = destination()
        with self.ahead.reading(self._part_of_steps(number, steps) for number, steps in wanted):
            if memory is None or self.blobs is not None:
                copied = [self._copied_steps(number, steps) for number, steps in wanted]
            else:
                copied = self._copied_to(memory, wanted)
        if self.blobs is None:
            return copied
        found: dict[int, bytes] = {}
        read: list[Any] = copied
        for at, (number, _) in enumerate(wanted):
            if self.schema.fields[number].is_blob:
                read[at] = self.blobs.read(copied[at], found)
        return read

    def _copied_to(self, memory: Destination, wanted: Sequence[tuple[int, np.ndarray]]) -> list[torch.Tensor]:
        views = [self._gathers.of_steps(number) for number, _ in wanted]
        specs = [(view.shape_of(steps.size), view.dtype) for view, (_, steps) in zip(views, wanted, strict=True)]
        copied = []
        for view, (number, steps), output in zip(views, wanted, memory.empty_together(specs), strict=True):
            (copies,) = view.copy_to(output, np.ascontiguousarray(steps.reshape(-1)))
            copied.append(copies.view(*steps.shape, *self.schema.fields[number].shape))
        return copied

    # The methods below work on copies, on the same device as the arena. DeviceArena has the same methods.

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """Return an array as a tensor on the device of the copies. Here it shares the memory of the array."""
        return torch.from_numpy(array)

    def origin(self, index: np.ndarray) -> list[torch.Tensor]:
        """Return an index ``[*B, 2]`` of trajectory ids and steps as a tensor, together with its two columns."""
        return [torch.from_numpy(index), torch.from_numpy(index[..., 0]), torch.from_numpy(index[..., 1])]

    def replace(self, values: Sequence[torch.Tensor], at: np.ndarray, new: Sequence[torch.Tensor]) -> None:
        """Overwrite some chunks of a batch: ``values[at] = new`` for each field."""
        for value, other in zip(values, new, strict=True):
            value[torch.from_numpy(at)] = other

    def rearrange(self, values: Sequence[torch.Tensor], rows: np.ndarray, within: np.ndarray) -> None:
        """Reorder the steps of some chunks: ``values[rows] = values[rows[:, None], within]`` for each field.

        Args:
            values: chunks ``[B, L, *shape]`` per field.
            rows: indices of the chunks, ``int64`` ``[n]``.
            within: new order of the steps in each of them, ``int64`` ``[n, L]``.
        """
        for value in list[Any](values):
            array = value.array if isinstance(value, Blobs) else as_array(value)
            array[rows] = array[rows[:, None], within]

    def resolved(self, number: int, value: Any) -> torch.Tensor:
        """Return the values of field ``number`` as a tensor ``[*batch, *shape]``; others than blobs as they are.

        Frames are decoded. Ragged values are padded with zeros to the longest, ``[*batch, longest, *element]``.

        Raises:
            CodecError: if a frame can't be decoded.
        """
        if not isinstance(value, Blobs):
            return value
        return resolved(self.schema.fields[number], value, self.batch_memory.empty)

    def resolved_together(self, numbers: Sequence[int], values: Sequence[Any]) -> list[torch.Tensor]:
        """Return the values of several fields as :meth:`resolved` does.

        The frames of all fields are decoded at once, and a frame that occurs in several fields is decoded once.

        Args:
            numbers: the numbers of the fields.
            values: the values of each.
        """
        read = list(values)
        alike: dict[Any, list[int]] = {}
        for at, (number, value) in enumerate(zip(numbers, values, strict=True)):
            if not isinstance(value, Blobs):
                continue
            field = self.schema.fields[number]
            if field.codec is None:
                read[at] = self.resolved(number, value)
            else:
                alike.setdefault((identity_of(field.codec), field.shape, field.dtype), []).append(at)
        for (_, shape, dtype), places in alike.items():
            codec = self.schema.fields[numbers[places[0]]].codec
            frames = decoded(codec, [read[at] for at in places], shape, dtype, self.batch_memory.empty)
            for at, of_field in zip(places, frames, strict=True):
                read[at] = of_field
        return read

    def build_sample(self, values: Sequence[torch.Tensor], origin: Sequence[torch.Tensor]) -> TensorDict:
        """Build a TensorDict of what was copied, and of the origin of each step; see :meth:`Schema.build_sample`."""
        if self.blobs is not None:
            values = self.resolved_together(range(len(values)), values)
        return self.schema.build_sample(values, origin)
