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

    Attributes:
        specs (tuple): the given specs.
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

    __slots__ = ("_converted", "_dtype", "_names", "nbytes", "offsets", "specs")

    def __init__(self, specs: Sequence[Spec]) -> None:
        self.specs = tuple((tuple(shape), dtype) for shape, dtype in specs)
        offsets, end = [], 0
        for shape, dtype in self.specs:
            offsets.append(end)
            end += -(-torch.Size(shape).numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        self.offsets, self.nbytes = tuple(offsets), end
        formats = [(numpy_dtype(dtype), shape) for shape, dtype in self.specs]
        self._names = tuple(map(str, range(len(formats))))
        self._dtype = np.dtype({"names": self._names, "formats": formats, "offsets": list(offsets), "itemsize": end})
        converted = [torch.from_numpy(np.empty(0, numpy_dtype(dtype))).dtype != dtype for _, dtype in self.specs]
        self._converted = tuple((number, self.specs[number][1]) for number in np.flatnonzero(converted).tolist())

    def tensors(self, block: torch.Tensor) -> list[torch.Tensor]:
        """Return the tensors, over the first ``nbytes`` bytes of a block, ``uint8`` on the CPU."""
        fields, from_numpy = np.ndarray((), self._dtype, block.numpy()), torch.from_numpy
        tensors = [from_numpy(fields[name]) for name in self._names]
        for number, dtype in self._converted:
            tensors[number] = tensors[number].view(dtype)
        return tensors

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockLayout) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(self.specs)

    def __reduce__(self) -> tuple[type[BlockLayout], tuple[tuple[Spec, ...]]]:
        return BlockLayout, (self.specs,)
