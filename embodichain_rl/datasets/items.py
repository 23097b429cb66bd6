"""Items that are drawn together, and filled one by one when they are first looked at.

A ``DataLoader`` takes single items from a dataset and collates them. Drawing, copying and collating them one by one
takes many times as long as drawing a batch. So consecutive items are drawn as one batch, an :class:`ItemBlock`. An item
is at first only a reference to its place in the block, an :class:`Item`. It becomes an ordinary TensorDict at the first
access. If there is none before the items are collated, the block is the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from tensordict import TensorDict
from torch.utils import _pytree as pytree
from torch.utils.data._utils import collate as torch_collate
from torch.utils.data._utils.fetch import _IterableDatasetFetcher

from embodichain_rl._compiling import graph_break
from embodichain_rl.datasets.flat import flat_dict
from embodichain_rl.datasets.transport import Structure, structure_of
from embodichain_rl.replay.schema import as_array, as_tensor

__all__ = ["Collated", "Item", "ItemBlock", "calls_no_user", "collate_unread", "read"]

Function = TypeVar("Function", bound=Callable[..., Any])


class Collated:
    """What a dataset's iterator knows of the batches that its items are collated into."""

    __slots__ = ("end", "size")

    def __init__(self) -> None:
        self.size = 0
        """The number of items of the latest batch; 0 before the first one."""
        self.end = 0
        """The position after the last item of it."""


class ItemBlock:
    """Consecutive items of an iteration, drawn as one batch.

    Args:
        data: the batch, ``[n, L]``, or with windows ``[n]``.
        begin: the position of its first item in the iteration.
        collated: is told when items of the block are collated.
    """

    __slots__ = ("_arrays", "_names", "_shape", "_structure", "begin", "collated", "data")

    def __init__(self, data: TensorDict, begin: int, collated: Collated) -> None:
        self.data = data
        self.begin = begin
        self.collated = collated
        self._shape: torch.Size | None = None  # until an item is filled
        self._structure: Structure | None = None
        self._arrays: list[tuple[Any, torch.dtype]] = []
        self._names: list[str] = []

    def unread_items(self) -> list[Item]:
        """Return all items, none of which is filled, the last one first."""
        return [_unread_item(self, number) for number in range(len(self.data) - 1, -1, -1)]

    def item(self, number: int) -> TensorDict:
        """Return an item. Its tensors are views of the batch, but have storages of their own."""
        structure = self._prepare()
        if structure is None:
            item: TensorDict = self.data[number]
            return item
        assert self._shape is not None, "prepared"
        return structure.nest.fill(self._tensors(number), self._shape, structure.device)

    def flat_item(self, number: int) -> dict[str, Any]:
        """Return an item as a flat dict."""
        if self._prepare() is None:
            return flat_dict(self.data[number])
        if not self._names:
            self._names = list(flat_dict(self.data))
        return dict(zip(self._names, self._tensors(number), strict=True))

    def _prepare(self) -> Structure | None:
        if self._shape is None:
            self._shape = self.data.batch_size[1:]
            self._structure = structure_of(self.data)
            if self._structure is not None:
                self._arrays = [(as_array(leaf), leaf.dtype) for leaf in self._structure.leaves]
        return self._structure

    def _tensors(self, number: int) -> list[torch.Tensor]:
        return [as_tensor(array[number, ...], dtype) for array, dtype in self._arrays]


class Item(TensorDict):
    """An item that nobody has looked at yet. It becomes a ``TensorDict`` when anything is asked of it."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return TensorDict(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Item
        read(self)
        return getattr(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        read(self)
        setattr(self, name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return read(self).__reduce_ex__(protocol)

    @classmethod
    def _new_unsafe(cls, *args: Any, **kwargs: Any) -> TensorDict:
        return TensorDict._new_unsafe(*args, **kwargs)


_place_of = object.__getattribute__
_set = object.__setattr__
_new: Callable[[type[Item]], Item] = object.__new__


def _unread_item(block: ItemBlock, number: int) -> Item:
    item = _new(Item)
    _set(item, "_place", (block, number))
    return item


@graph_break
def read(item: Item) -> TensorDict:
    """Turn an item into the TensorDict that it stands for."""
    attributes = _place_of(item, "__dict__")
    place = attributes.get("_place")
    if place is not None:
        block, number = place
        attributes.update(block.item(number).__dict__)
        del attributes["_place"]
    _set(item, "__class__", TensorDict)
    return item


# TensorDicts are nodes of torch's pytrees, by their exact class.
_node = pytree.SUPPORTED_NODES[TensorDict]
pytree.register_pytree_node(
    Item,
    lambda item: _node.flatten_fn(read(item)),
    _node.unflatten_fn,
    flatten_with_keys_fn=lambda item: _node.flatten_with_keys_fn(read(item)),  # type: ignore[misc]
)


# ------------------------------------------------------------------------------------------------------------ collating


def collate_unread(items: Sequence[Any]) -> TensorDict | None:
    """Return the batch of items that nobody has looked at; None if somebody has, or one is none of this class.

    The block itself is returned if it has these items, and if nobody can look at them later: they are in a list of
    torch's ``DataLoader`` and nowhere else, and it calls no code of the user before it drops the list. Otherwise the
    batch is a copy, so that changes of it do not show in the items.
    """
    if any(type(item) is not Item for item in items):
        return None
    places = [_place_of(item, "_place") for item in items]
    first, last = places[0][0], places[-1][0]
    last.collated.size, last.collated.end = len(items), last.begin + places[-1][1] + 1
    if first is last and all(block is first for block, _ in places):
        numbers = [number for _, number in places]
        if numbers == list(range(len(first.data))) and _are_dropped(items):
            return first.data
        return first.data[torch.tensor(numbers)]
    parts: list[tuple[ItemBlock, list[int]]] = []
    for block, number in places:
        if not parts or parts[-1][0] is not block:
            parts.append((block, []))
        parts[-1][1].append(number)
    shapes = {block.data.batch_size[1:] for block, _ in parts}
    keys = [set(block.data.keys(True, True)) for block, _ in parts]
    if len(shapes) > 1 or any(each != keys[0] for each in keys):
        return None
    return torch.cat([block.data[torch.tensor(numbers)] for block, numbers in parts])


def _are_dropped(items: Sequence[Any]) -> bool:
    """Return whether the ``DataLoader`` is the only holder of the items, and calls no code of the user with them."""
    frame, through_torch = sys._getframe(1).f_back, False
    while frame is not None and frame.f_code in _OWN_FRAMES:
        frame = frame.f_back
    while frame is not None and frame.f_code in _TORCHS_FRAMES:
        frame, through_torch = frame.f_back, True
    if frame is None or frame.f_code is not _IterableDatasetFetcher.fetch.__code__:
        return False
    if frame.f_locals.get("data") is not items:
        return False
    counts = _references(items)
    first = _FIRST_THROUGH_TORCH if through_torch else _REFERENCES
    return counts[0] <= first and all(count <= _REFERENCES for count in counts[1:])


def _references(items: Sequence[Any]) -> list[int]:
    return [sys.getrefcount(item) for item in items]


class _Probe:
    """Counts the references that torch's functions hold to what they collate."""


_REFERENCES = _references([_Probe()])[0]
_FIRST_THROUGH_TORCH: int = torch_collate.collate(
    [_Probe()], collate_fn_map={_Probe: lambda items, *, collate_fn_map: _references(items)[0]}
)

_TORCHS_FRAMES = {torch_collate.collate.__code__, torch_collate.default_collate.__code__}
_OWN_FRAMES: set[Any] = set()


def calls_no_user(function: Function) -> Function:
    """Mark a function of this library that may stand between the ``DataLoader`` and :func:`collate_unread`."""
    _OWN_FRAMES.add(function.__code__)
    return function
