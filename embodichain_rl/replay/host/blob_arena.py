"""The bytes of blobs, beside the columns of an arena: ``slot`` bytes for each step of the arena.

The blobs of a trajectory lie in the slots of its region, one behind the other. So they are reserved, published and
evicted with its steps, and a reader that finds the id of the trajectory in its row before and after its copy has copied
blobs of this trajectory only. A blob that occurs several times in a trajectory, such as the observation that is the
next observation of the step before, is stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from embodichain_rl.replay.schema import Blobs, as_array
from embodichain_rl.shared import ReadAhead

__all__ = ["BlobArena", "LaidOut"]


class LaidOut(NamedTuple):
    """The blobs of a trajectory that is to be written."""

    parts: list[bytes]
    """What is stored, in this order."""
    nbytes: int
    places: dict[bytes, int]
    """The offset of each blob from the first one."""


class BlobArena:
    """The bytes of the blobs of an arena.

    Args:
        memory: all slots, ``uint8`` ``[steps * slot]``, in shared memory.
        slot: bytes beside each step of the arena.
        numbers: the fields whose values are blobs.
        ahead: announces what is read of the memory.
    """

    def __init__(self, memory: np.ndarray, slot: int, numbers: Sequence[int], ahead: ReadAhead) -> None:
        self._memory, self.slot, self.numbers = memory, slot, tuple(numbers)
        self._address, self._ahead = memory.ctypes.data, ahead
        self._view = memory.data

    def lay_out(self, pieces: Sequence[Sequence[np.ndarray]]) -> LaidOut:
        """Return where the blobs of a trajectory are to lie.

        Args:
            pieces: consecutive, one array per field; of these fields arrays of blobs ``[n]``.
        """
        parts: list[bytes] = []
        places: dict[bytes, int] = {}
        end = 0
        for piece in pieces:
            for number in self.numbers:
                for blob in piece[number].flat:
                    if blob not in places:
                        places[blob] = end
                        parts.append(blob)
                        end += len(blob)
        return LaidOut(parts, end, places)

    def write(self, start: int, laid_out: LaidOut) -> int:
        """Write blobs to the region that begins with step ``start``; return the offset of the first."""
        begin = start * self.slot
        self._view[begin : begin + laid_out.nbytes] = b"".join(laid_out.parts)
        return begin

    def column_of(self, blobs: np.ndarray, laid_out: LaidOut, begin: int) -> np.ndarray:
        """Return where each blob lies, ``int64`` ``[n, 2]``: what a column holds.

        Args:
            blobs: ``[n]``.
            laid_out: the blobs of the trajectory.
            begin: the offset of the first.
        """
        places = laid_out.places
        return np.array([(begin + places[blob], len(blob)) for blob in blobs.flat], dtype=np.int64).reshape(-1, 2)

    def read(self, column: torch.Tensor, found: dict[int, bytes]) -> Blobs:
        """Copy blobs.

        What a column says may be overwritten meanwhile; so nothing is read beyond the memory, and the caller checks the
        ids of the trajectories afterwards.

        Args:
            column: where they lie, ``[*batch, 2]``.
            found: the blobs that were copied by the same call, by their offset. A blob that occurs several times in a
                batch is one object.
        """
        places = as_array(column)
        # np.clip takes several times as long.
        offsets = np.minimum(np.maximum(places[..., 0].reshape(-1), 0), len(self._memory))
        sizes = np.minimum(np.maximum(places[..., 1].reshape(-1), 0), len(self._memory) - offsets)
        blobs: list[bytes] = []
        with self._ahead.reading([(self._address + offsets, sizes)]):
            for offset, size in zip(offsets.tolist(), sizes.tolist(), strict=True):
                blob = found.get(offset)
                if blob is None or len(blob) != size:
                    blob = bytes(self._view[offset : offset + size])
                    found[offset] = blob
                blobs.append(blob)
        return Blobs.of(blobs, places.shape[:-1])
