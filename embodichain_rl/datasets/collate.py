"""Collate functions for chunks, and their registration with torch's ``DataLoader``.

After this module is imported, ``DataLoader`` collates TensorDicts without a ``collate_fn``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from tensordict import (
    NestedKey,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_leaf_nontensor,
    is_tensor_collection,
    pad_sequence,
)
from torch.utils.data import dataloader
from torch.utils.data._utils import collate as torch_collate

from embodichain_rl.datasets.flat import flat_dict, length_of, nested_chunk
from embodichain_rl.datasets.items import Item, calls_no_user, collate_unread, read
from embodichain_rl.datasets.transport import Structure, columns_of, outgoing_memory
from embodichain_rl.errors import InvalidArgumentError, SchemaMismatchError
from embodichain_rl.replay.schema import MASK, as_non_tensor, text_array

__all__ = ["collate_chunks", "pass_through"]


@calls_no_user
def collate_chunks(items: Sequence[Any]) -> Any:
    """Collate chunks into a batch.

    Args:
        items: chunks ``[L_i]`` with the same keys; or all of them as flat dicts (``as_dict=True``).

    Returns:
        A dense stack ``[B, L]`` if all chunks have the same length. Otherwise a padded batch ``[B, L_max]``: shorter
        chunks are padded with zeros at the end, and text with empty strings. The padding mask
        ``("collector", "mask")``, ``bool`` ``[B, L_max]``, is True at real steps. If the items already have this mask,
        it is padded with False. Of flat dicts, a flat dict of the same. The first padded batch of a process is reported
        by a warning.

    Raises:
        InvalidArgumentError: ``items`` is empty, an item is not a TensorDict, or the batch sizes differ in more than
            the length.
        SchemaMismatchError: the keys of the items differ, or items of unequal length have an entry that is neither a
            tensor nor text.

    Example:
        >>> chunks = [TensorDict({"action": torch.ones(n, 2)}, [n]) for n in (3, 5)]
        >>> batch = collate_chunks(chunks)
        >>> batch.shape, batch["collector", "mask"].sum(-1)
        (torch.Size([2, 5]), tensor([3, 5]))
    """
    if items and (batch := collate_unread(items)) is not None:
        return pass_through(batch)
    if items and all(type(item) is dict for item in items):
        return _collate_dicts(items)
    if items and (found := columns_of(items)) is not None:
        return _stack(items[0].batch_size, *found)
    _check_items(items)
    keys = set(items[0].keys(True, True, is_leaf_nontensor)) - set(items[0].keys(True, True))
    batch = _collate_tensors([item.exclude(*keys) for item in items] if keys else items)
    for key in keys:
        batch.set(key, _collate_non_tensors(key, [item.get(key) for item in items], batch.device))
    return batch


def _stack(batch_size: torch.Size, structure: Structure, columns: Sequence[Sequence[torch.Tensor]]) -> TensorDict:
    """Stack items with the same structure."""
    memory = outgoing_memory()
    stacks = [torch.stack([*column]) for column in columns] if memory is None else memory.stack(columns)
    return structure.nest.build(stacks, [len(columns[0]), *batch_size], structure.device)


def _collate_dicts(items: Sequence[dict[str, Any]]) -> Any:
    if len({tuple(map(length_of, item.values())) for item in items}) == 1:
        return torch_collate.default_collate(list(items))
    return flat_dict(collate_chunks([nested_chunk(item) for item in items]))


def _collate_tensors(items: Sequence[TensorDictBase]) -> TensorDict:
    if len({item.batch_size for item in items}) == 1:
        return torch.stack(list(items))
    _warn_of_padding(items)
    padded = pad_sequence(items)
    if MASK not in items[0].keys(True):
        lengths = torch.tensor([len(item) for item in items])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        padded.set(MASK, mask.to(next(iter(padded.values(True, True))).device))
    return padded


_warned_of_padding = False


def _warn_of_padding(items: Sequence[TensorDictBase]) -> None:
    """Warn once of padding that a ``DataLoader`` over an ``OnlineDataset`` does not need."""
    global _warned_of_padding
    if _warned_of_padding:
        return
    _warned_of_padding = True
    lengths = [len(item) for item in items]
    warnings.warn(
        f"Padded a batch of {len(items)} chunks of {min(lengths)} to {max(lengths)} steps with zeros. A DataLoader of "
        "torch over the OnlineDataset itself gets chunks of one length for each batch; or give batch_size= to the "
        'OnlineDataset. Exclude the padding from the loss with batch["collector", "mask"], such as by masked_mean.',
        stacklevel=4,
    )


def _collate_non_tensors(key: NestedKey, values: Sequence[Any], device: torch.device | None) -> Any:
    lengths = {value.batch_size[:1] for value in values}
    if len(lengths) == 1:
        return NonTensorStack(*values)
    texts = [text.tolist() for text in map(text_array, values) if text is not None]
    if len(texts) < len(values):
        raise SchemaMismatchError(
            f"Got {key!r}, which is neither a tensor nor text, in chunks of unequal length; it can't be padded. Remove "
            "it in the transform."
        )
    longest = max(lengths)[0]
    return as_non_tensor([text + [""] * (longest - len(text)) for text in texts], device)


def pass_through(batch: Any) -> Any:
    """Return the batch unchanged, for datasets that yield whole batches.

    Example:
        >>> batch = TensorDict({"action": torch.ones(4, 16, 2)}, [4, 16])
        >>> pass_through(batch).shape
        torch.Size([4, 16])
    """
    return read(batch) if type(batch) is Item else batch


def _check_items(items: Sequence[Any]) -> None:
    if not items:
        raise InvalidArgumentError("Got no items; a batch needs at least one.")
    for item in items:
        if not isinstance(item, TensorDictBase):
            raise InvalidArgumentError(
                f"Got an item of type {type(item).__name__}; items must be TensorDicts. If a transform returns another "
                "type, pass a collate_fn for it to the DataLoader."
            )
    keys = set(items[0].keys(True, True, is_leaf_nontensor))
    for item in items:
        if differing := keys ^ set(item.keys(True, True, is_leaf_nontensor)):
            raise SchemaMismatchError(
                f"Got items of which only some have {sorted(differing, key=str)}; all items of a batch must have the "
                "same keys."
            )
    shapes = {item.batch_size for item in items}
    if len(shapes) > 1 and any(len(shape) != 1 for shape in shapes):
        raise InvalidArgumentError(
            f"Got items of batch sizes {sorted(map(list, shapes))}, which can't be stacked; only chunks [L] of unequal "
            "length are padded. If the dataset yields whole batches, use DataLoader(dataset, batch_size=None)."
        )


# -------------------------------------------------------------------------------- registration with torch's DataLoader


@calls_no_user
def _collate_registered(
    items: Sequence[TensorDictBase], *, collate_fn_map: dict[Any, Callable[..., Any]] | None = None
) -> TensorDict:
    return collate_chunks(items)


# torch's extension point for DataLoader(dataset, batch_size=B).
torch_collate.default_collate_fn_map[TensorDictBase] = _collate_registered

# torch has no extension point for DataLoader(dataset, batch_size=None). Its default_convert treats a TensorDict as a
# mapping and iterates over it to get the keys, but iterating over a TensorDict yields its rows. So it is wrapped.
_torch_default_convert = torch_collate.default_convert


@wraps(_torch_default_convert)
def _default_convert(data: Any) -> Any:
    return pass_through(data) if is_tensor_collection(data) else _torch_default_convert(data)


for _module in (torch_collate, dataloader, torch.utils.data):
    setattr(_module, "default_convert", _default_convert)  # noqa: B010 - type checkers know it as a function

# Spawned workers receive the function pickled by name, and that name now refers to the wrapper. Code that holds a
# reference to torch's original function must still be able to pickle it.
_torch_default_convert.__module__, _torch_default_convert.__qualname__ = __name__, "_torch_default_convert"
_torch_default_convert.__doc__ = None
