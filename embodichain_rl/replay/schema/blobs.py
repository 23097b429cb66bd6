"""Values whose size changes from step to step: point clouds, graphs, tokens, and encoded images.

The value of a step is a *blob*: a ``bytes`` object. From the data that is written to the arena, and from the arena to
the batch, blobs are kept in :class:`Blobs`, an array of them that is indexed as a tensor is. Only the last step of a
read makes tensors of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

__all__ = ["LENGTHS", "Blobs", "lengths_key", "padded_values"]

LENGTHS = "_lengths"
"""What the name of the entry with the lengths of a ragged field ends with."""

_EMPTY = b""


def lengths_key(key: tuple[str, ...]) -> tuple[str, ...]:
    """Return the key of the lengths of a ragged field.

    Example:
        >>> lengths_key(("next", "points"))
        ('next', 'points_lengths')
    """
    return (*key[:-1], key[-1] + LENGTHS)


class Blobs:
    """An array of ``bytes`` objects, one a step, with the part of the interface of a tensor that reads use.

    Args:
        array: the blobs, of dtype ``object``.

    Example:
        >>> blobs = Blobs.of([b"one", b"two", b"three"])
        >>> blobs[1:].array.tolist(), blobs.nbytes
        ([b'two', b'three'], 11)
    """

    __slots__ = ("array",)

    device = torch.device("cpu")

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    @classmethod
    def of(cls, blobs: Sequence[bytes], shape: Sequence[int] | None = None) -> Blobs:
        """Return some blobs as an array, by default ``[n]``."""
        array = np.empty(len(blobs), dtype=object)
        array[:] = blobs
        return cls(array if shape is None else array.reshape(tuple(shape)))

    @classmethod
    def empty(cls, shape: Sequence[int]) -> Blobs:
        """Return an array of empty blobs."""
        return cls(np.full(tuple(shape), _EMPTY, dtype=object))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array: batch dimensions only."""
        return self.array.shape

    @property
    def nbytes(self) -> int:
        """The sizes of all blobs, summed up."""
        return sum(map(len, self.array.flat))

    def sizes(self) -> np.ndarray:
        """Return the size of each blob in bytes, ``int64`` of the same shape."""
        flat = np.fromiter(map(len, self.array.flat), dtype=np.int64, count=self.array.size)
        return flat.reshape(self.array.shape)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, at: Any) -> Blobs:
        return Blobs(self.array[_on_host(at)])

    def __setitem__(self, at: Any, new: Blobs) -> None:
        self.array[_on_host(at)] = new.array

    def clone(self) -> Blobs:
        """Return a copy of the array; blobs are never changed."""
        return Blobs(self.array.copy())

    def cpu(self) -> Blobs:
        """Return the blobs themselves."""
        return self

    def flatten(self, start: int = 0, end: int = -1) -> Blobs:
        """Return a view in which the dimensions from ``start`` to ``end`` are one."""
        shape = self.array.shape
        end = end % len(shape)
        return Blobs(self.array.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))

    def view(self, *shape: int) -> Blobs:
        """Return a view of another shape."""
        return Blobs(self.array.reshape(shape))

    def packed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bytes of all blobs, one behind the other, and the size of each, ``int64`` of the same shape.

        Example:
            >>> Blobs.of([b"one", b""]).packed()
            (tensor([111, 110, 101], dtype=torch.uint8), tensor([3, 0]))
        """
        joined = b"".join(self.array.flat)
        content = torch.from_numpy(np.frombuffer(joined, dtype=np.uint8).copy())
        return content, torch.from_numpy(self.sizes())

    @classmethod
    def unpacked(cls, content: torch.Tensor | np.ndarray, sizes: torch.Tensor) -> Blobs:
        """Return the blobs of which :meth:`packed` returned the bytes and the sizes."""
        view = memoryview(np.ascontiguousarray(content).data)
        ends = sizes.reshape(-1).cumsum(0).tolist()
        return cls.of([bytes(view[a:b]) for a, b in zip([0, *ends], ends, strict=False)], tuple(sizes.shape))


def _on_host(at: Any) -> Any:
    if isinstance(at, tuple):
        return tuple(map(_on_host, at))
    return at.cpu().numpy() if isinstance(at, torch.Tensor) else at


def padded_values(blobs: Blobs, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return the values of a ragged field, ``[*batch, longest, *shape]``, padded with zeros.

    Args:
        blobs: the bytes of the values, ``[*batch]``.
        shape: the shape of one element.
        dtype: the dtype of the elements.

    Example:
        >>> blobs = Blobs.of([torch.tensor([1, 2]).numpy().tobytes(), b""])
        >>> padded_values(blobs, (), torch.int64)
        tensor([[1, 2],
                [0, 0]])
    """
    element = dtype.itemsize * math.prod(shape)
    sizes = blobs.sizes().reshape(-1)
    longest = int(sizes.max(initial=0))
    padded = np.zeros((len(sizes), longest), dtype=np.uint8)
    for row, blob in zip(padded, blobs.array.flat, strict=True):
        if blob:
            row[: len(blob)] = np.frombuffer(blob, dtype=np.uint8)
    steps = longest // element if element else 0
    if not padded.size:
        return torch.zeros((*blobs.shape, steps, *shape), dtype=dtype)
    return torch.from_numpy(padded.reshape(-1)).view(dtype).view(*blobs.shape, steps, *shape)
