"""Ragged entries of data: read from jagged tensors, lists, lazy stacks, and padded tensors with lengths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack

from embodichain_rl.errors import SchemaMismatchError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.blobs import Blobs, lengths_key
from embodichain_rl.replay.schema.nest import Key, key_name

__all__ = ["RaggedLeaf", "items_of", "ragged_leaf", "stacked_leaf"]

HOW = (
    "The value of a step is a tensor [n, *shape] of which only n changes: give a jagged tensor (torch.nested, "
    "layout=torch.jagged), a NonTensorStack of tensors, a lazy stack of steps, or a padded tensor [*batch, longest, "
    "*shape] with the lengths, [*batch], under '<key>_lengths'."
)


class RaggedLeaf:
    """A ragged entry of some steps.

    Args:
        blobs: the bytes of each step's value, ``[*batch]``.
        element: the shape of one element of a value.
        dtype: the dtype of the elements.

    Attributes:
        shape (tuple): ``[*batch, -1, *element]``.
    """

    __slots__ = ("blobs", "dtype", "element", "shape")

    device = torch.device("cpu")

    def __init__(self, blobs: Blobs, element: Sequence[int], dtype: torch.dtype) -> None:
        self.blobs, self.element, self.dtype = blobs, tuple(element), dtype
        self.shape = (*blobs.shape, -1, *self.element)

    def lengths(self) -> np.ndarray:
        """Return the number of elements of each value, ``int64`` ``[*batch]``."""
        return self.blobs.sizes() // (self.dtype.itemsize * math.prod(self.element))

    def numel(self) -> int:
        """Return the number of values."""
        return self.blobs.array.size

    @classmethod
    def of_values(cls, key: Key, values: Sequence[Any], batch_size: Sequence[int]) -> RaggedLeaf:
        """Return a leaf of one tensor ``[n, *element]`` for each step of ``batch_size``.

        Raises:
            SchemaMismatchError: if they differ in more than ``n``.
        """
        tensors = [value if isinstance(value, torch.Tensor) else torch.as_tensor(value) for value in values]
        kinds = {(tuple(value.shape[1:]), value.dtype) for value in tensors if value.ndim}
        if any(not value.ndim for value in tensors) or len(kinds) != 1:
            described = sorted({f"{list(value.shape)} of {value.dtype}" for value in tensors})
            _refuse(key, f"values of {'; '.join(described[:4])}")
        ((element, dtype),) = kinds
        if 0 in element:
            _refuse(key, f"values of {list(element)} elements")
        blobs = [as_array(value.detach().cpu().contiguous()).tobytes() for value in tensors]
        return cls(Blobs.of(blobs, batch_size), element, dtype)


def items_of(value: Any) -> Any:
    """Return the tensors that a non-tensor entry holds, in nested lists; None where it holds something else."""
    data = getattr(value, "data", None)
    if isinstance(data, (list, tuple)):  # of a NonTensorData: one for each step
        items: Any = list(data)
    elif isinstance(value, (NonTensorData, NonTensorStack)):
        items = value.tolist()
    else:
        return None
    first = items
    while isinstance(first, list) and first:
        first = first[0]
    return items if isinstance(first, (torch.Tensor, np.ndarray)) else None


def ragged_leaf(
    key: Key, value: Any, batch_size: Sequence[int], lengths: Any = None, dtype: torch.dtype | None = None
) -> RaggedLeaf:
    """Return an entry of steps as a ragged leaf.

    Args:
        key: its key, for messages.
        value: a leaf already; a nested tensor; nested lists of tensors; or a tensor ``[*batch, n, *element]``.
        batch_size: the batch size of the steps.
        lengths: how many elements of each value are real, ``[*batch]``; None: all. What is behind them is padding.
        dtype: that of what is stored, for values without any element; None: unknown.

    Raises:
        SchemaMismatchError: if it is none of these.
    """
    if isinstance(value, RaggedLeaf):
        return value if lengths is None else _without_padding(key, value, lengths)
    batch = tuple(batch_size)
    if isinstance(value, torch.Tensor) and value.is_nested:
        return RaggedLeaf.of_values(key, list(_unbound(key, value, batch)), batch)
    if isinstance(value, list):
        return RaggedLeaf.of_values(key, list(_flat(key, value, batch)), batch)
    if not isinstance(value, torch.Tensor) or value.ndim <= len(batch):
        shape = f"a tensor of {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        _refuse(key, f"{shape} in data of batch size {list(batch)}")
    flat = value.reshape(math.prod(batch), *value.shape[len(batch) :])
    if lengths is None:
        return RaggedLeaf.of_values(key, list(flat), batch)
    counts = _counts(key, lengths, [flat.shape[1]] * len(flat))
    return RaggedLeaf.of_values(key, [one[:n] for one, n in zip(flat, counts, strict=True)], batch)


def _without_padding(key: Key, leaf: RaggedLeaf, lengths: Any) -> RaggedLeaf:
    """Return a leaf whose values are as long as their lengths say, such as that of tensors padded one by one."""
    counts = _counts(key, lengths, leaf.lengths().reshape(-1).tolist())
    each = leaf.dtype.itemsize * math.prod(leaf.element)
    blobs = [blob[: each * count] for blob, count in zip(leaf.blobs.array.flat, counts, strict=True)]
    return RaggedLeaf(Blobs.of(blobs, leaf.blobs.shape), leaf.element, leaf.dtype)


def _counts(key: Key, lengths: Any, most: Sequence[int]) -> list[int]:
    """Return lengths as a list; refuse those that are none of values with so many elements."""
    lengths = torch.as_tensor(lengths)
    if lengths.dtype.is_floating_point or lengths.numel() != len(most):
        _refuse(lengths_key(key), f"lengths of {list(lengths.shape)} and {lengths.dtype}, not one integer a step,")
    counts: list[int] = lengths.reshape(-1).tolist()
    for count, elements in zip(counts, most, strict=True):
        if not 0 <= count <= elements:
            _refuse(lengths_key(key), f"a length of {count} for {elements} padded elements")
    return counts


def stacked_leaf(key: Key, leaves: Sequence[RaggedLeaf], dim: int) -> RaggedLeaf:
    """Return ragged leaves stacked along a batch dimension.

    Raises:
        SchemaMismatchError: if their elements differ.
    """
    kinds = {(leaf.element, leaf.dtype) for leaf in leaves}
    if len(kinds) > 1:
        _refuse(key, f"elements of {'; '.join(sorted(f'{list(shape)} of {dtype}' for shape, dtype in kinds))}")
    blobs = Blobs(np.stack([leaf.blobs.array for leaf in leaves], axis=dim))
    return RaggedLeaf(blobs, leaves[0].element, leaves[0].dtype)


def _unbound(key: Key, value: Any, batch: tuple[int, ...]) -> Iterator[torch.Tensor]:
    """Yield the values of a nested tensor."""
    if len(batch) != 1 or value.size(0) != batch[0]:
        _refuse(key, f"a nested tensor of {value.size(0)} values in data of batch size {list(batch)}")
    if value.layout is not torch.jagged:
        yield from value.detach().unbind()
        return
    if getattr(value, "_ragged_idx", 1) != 1:
        _refuse(key, "a jagged tensor that is ragged in another dimension than the first one of a value")
    values, offsets = value.values().detach(), value.offsets().tolist()
    lengths = value.lengths()
    counts = np.diff(offsets).tolist() if lengths is None else lengths.tolist()
    for start, count in zip(offsets, counts, strict=False):
        yield values[start : start + count]


def _flat(key: Key, values: Any, batch: tuple[int, ...]) -> Iterator[Any]:
    if not batch:
        yield values
        return
    if not isinstance(values, list) or len(values) != batch[0]:
        _refuse(key, f"lists that are not of the batch size {list(batch)}")
    for value in values:
        yield from _flat(key, value, batch[1:])


def _refuse(key: Key, got: str) -> NoReturn:
    raise SchemaMismatchError(f"Got {key_name(key)} with {got}, which can't be stored as ragged. {HOW}")
