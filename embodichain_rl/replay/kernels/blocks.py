"""One block of memory for all tensors of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from embodichain_rl.replay.schema import numpy_dtype
from embodichain_rl.shared import ALIGNMENT

__all__ = ["BlockLayout", "Spec"]

Spec = tuple[tuple[int, ...], torch.dtype]
"""The shape and the dtype of a tensor."""


class BlockLayout:
    """The places of several tensors in one block of bytes, each aligned to a cache line.

    To make a tensor over part of a block takes torch several calls. Here it takes one field access of a structured
    NumPy array, and ``torch.from_numpy``: about 1 us. Each tensor has a storage of its own, of its own size and dtype.
    So it can be saved and pickled without the others. All of them keep the block alive.

    Args:
        specs: the shape and the dtype of each tensor.
        overlapping: further tensors, each with the byte at which it begins, inside of others.

    Attributes:
        specs (tuple): the given specs; those of overlapping tensors are the last ones.
        offsets (tuple[int, ...]): the byte at which each tensor begins.
        nbytes (int): the size of a block.

    Example:
        >>> layout = BlockLayout([((2, 3), torch.float32), ((2,), torch.bool)])
        >>> layout.offsets, layout.nbytes
        ((0, 64), 128)
        >>> numbers, flags = layout.tensors(torch.zeros(128, dtype=torch.uint8))
        >>> numbers.shape, flags.dtype
        (torch.Size([2, 3]), torch.bool)
    """

    __slots__ = ("_converted", "_dtype", "_names", "_overlapping", "nbytes", "offsets", "specs")

    def __init__(self, specs: Sequence[Spec], overlapping: Sequence[tuple[int, Spec]] = ()) -> None:
        self._overlapping = tuple((offset, (tuple(shape), dtype)) for offset, (shape, dtype) in overlapping)
        inside = [spec for _, spec in self._overlapping]
        self.specs: tuple[Spec, ...] = (*((tuple(shape), dtype) for shape, dtype in specs), *inside)
        offsets, end = [], 0
        for shape, dtype in specs:
            offsets.append(end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.offsets, self.nbytes = (*offsets, *(offset for offset, _ in self._overlapping)), end
        formats = [(numpy_dtype(dtype), shape) for shape, dtype in self.specs]
        self._names = tuple(map(str, range(len(formats))))
        self._dtype = np.dtype(
            {"names": self._names, "formats": formats, "offsets": list(self.offsets), "itemsize": end}
        )
        converted = [torch.from_numpy(np.empty(0, numpy_dtype(dtype))).dtype != dtype for _, dtype in self.specs]
        self._converted = tuple((number, self.specs[number][1]) for number in np.flatnonzero(converted).tolist())

    def tensors(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors, over the first ``nbytes`` bytes of a block, ``uint8`` on the CPU."""
        return self._over(np.ndarray((), self._dtype, block.numpy()))

    def empty(self) -> list[torch.Tensor]:
        """Return uninitialised tensors in a new block."""
        return self._over(np.empty((), self._dtype))

    def _over(self, fields: np.ndarray) -> list[torch.Tensor]:
        from_numpy = torch.from_numpy
        tensors = [from_numpy(fields[name]) for name in self._names]
        for number, dtype in self._converted:
            tensors[number] = tensors[number].view(dtype)
        return tensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and (self.specs, self.offsets) == (other.specs, other.offsets)

    def __hash__(self) -> int:
        return hash((self.specs, self.offsets))

    def __reduce__(self) -> tuple[type[BlockLayout], tuple[tuple[Spec, ...], tuple[tuple[int, Spec], ...]]]:
        return BlockLayout, (self.specs[: len(self.specs) - len(self._overlapping)], self._overlapping)
