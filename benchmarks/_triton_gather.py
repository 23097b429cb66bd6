"""One Triton kernel that gathers the chunks of all columns, for comparison with the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

__all__ = ["TritonGather"]

BLOCK = 2048
"""Number of words that a program copies at once."""

SPREAD = 8
"""Number of programs that share a chunk of a column."""


@triton.jit
def _copy_chunks(columns, places, widths, starts, length, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    chunk, column = tl.program_id(0), tl.program_id(1)
    width = tl.load(widths + column)
    words = width * length
    source = tl.load(columns + column)
    target = tl.load(places + column)
    if WIDE:
        source = source.to(tl.pointer_type(tl.int32))
        target = target.to(tl.pointer_type(tl.int32))
    else:
        source = source.to(tl.pointer_type(tl.uint8))
        target = target.to(tl.pointer_type(tl.uint8))
    source += tl.load(starts + chunk) * width
    target += chunk.to(tl.int64) * words
    for begin in range(tl.program_id(2) * BLOCK, words, tl.num_programs(2) * BLOCK):
        at = begin + tl.arange(0, BLOCK)
        there = at < words
        tl.store(target + at, tl.load(source + at, mask=there), mask=there)


class TritonGather:
    """Gather chunks of several columns.

    Columns whose steps are whole 32-bit words are copied in one launch, the others in a second one.

    Args:
        columns: ``[steps, *shape]`` each, contiguous, on one device.
        length: steps of a chunk.
    """

    def __init__(self, columns: Sequence[torch.Tensor], length: int) -> None:
        self._columns = list(columns)
        self._length = length
        self._groups: list[tuple[int, list[int], torch.Tensor, torch.Tensor]] = []
        for word in (4, 1):
            members = [n for n, column in enumerate(columns) if (column[0].nbytes % 4 == 0) == (word == 4)]
            if members:
                addresses = self._numbers([columns[n].data_ptr() for n in members])
                widths = self._numbers([columns[n][0].nbytes // word for n in members])
                self._groups.append((word, members, addresses, widths))

    def _numbers(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._columns[0].device)

    def __call__(self, starts: torch.Tensor) -> list[torch.Tensor]:
        """Return the chunks that start at ``starts``, ``int64`` ``[B]``: ``[B, length, *shape]`` per column."""
        chunks = [column.new_empty((len(starts), self._length, *column.shape[1:])) for column in self._columns]
        for word, members, addresses, widths in self._groups:
            places = self._numbers([chunks[n].data_ptr() for n in members])
            grid = (len(starts), len(members), SPREAD)
            _copy_chunks[grid](addresses, places, widths, starts, self._length, WIDE=word == 4, BLOCK=BLOCK)
        return chunks
