"""The entries of some steps, as a flat dict: what a TensorDict holds, without the buffer's own keys."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import LazyStackedTensorDict, TensorDict, TensorDictBase, is_tensor_collection

from embodichain_rl.errors import SchemaMismatchError, TrajectoryValueError
from embodichain_rl.replay.schema.arrays import as_array
from embodichain_rl.replay.schema.blobs import Blobs
from embodichain_rl.replay.schema.nest import Key, Node, is_nested, key_name, node_of
from embodichain_rl.replay.schema.origin_entries import INDEX, MASK, TRAJECTORY, IsLive, is_reserved, take_origin
from embodichain_rl.replay.schema.ragged import RaggedLeaf, items_of, ragged_leaf, stacked_leaf
from embodichain_rl.replay.schema.text_entries import text_array
from embodichain_rl.replay.schema.trajectory_values import same_values

__all__ = ["SHARED_NODES", "Leaf", "Leaves", "leaves_of"]

Leaf = torch.Tensor | np.ndarray
"""An entry of some steps: a tensor, or strings as an array of objects of the same shape. It may be a
:class:`RaggedLeaf` as well, where :meth:`Formats.take` is called."""

SHARED_NODES = ((TRAJECTORY,), (MASK[0],))
"""Nodes to which the buffer adds entries of its own, with the batch size of the data."""

UNLIKE = (RuntimeError, TypeError, AttributeError)
"""What tensordict raises for an entry of a lazy stack whose elements have different shapes there, or not all a tensor,
not all text, not all a TensorDict."""

Fill = Callable[..., None]
"""Completes entries ``(entries, shape, entries of the other elements of a stack)``; see :meth:`OptionalKeys.fill`."""


class Leaves(dict[Key, Leaf]):
    """The entries of some steps by key, and how they were nested.

    Attributes:
        data (TensorDictBase): where the entries come from; of a ragged stack, its first element.
        batch_size (torch.Size): what the shape of each entry begins with.
        origin (dict[Key, Leaf]): what a buffer added, which is not stored; see :func:`take_origin`.
    """

    def __init__(self, data: TensorDictBase, batch_size: torch.Size) -> None:
        super().__init__()
        self.data = data
        self.batch_size = batch_size
        self.origin: dict[Key, torch.Tensor] = {}

    def nodes(self) -> list[Node]:
        """Return the nested TensorDicts with a structure of their own: batch dimensions, or a tensorclass.

        Raises:
            SchemaMismatchError: when it is one to which the buffer adds entries.
        """
        nodes = [node for node in _nodes(self.data, self.data.ndim, ()) if self._is_filled(node.key)]
        for node in nodes:
            if node.key in SHARED_NODES:
                got = f"the tensorclass {node.tensorclass}" if node.tensorclass else f"batch dimensions {node.shape}"
                raise SchemaMismatchError(
                    f"Got {key_name(node.key)} with {got} of its own, but the buffer adds entries there, with the batch"
                    " size of the data. Use a plain TensorDict with the batch size of the data there, or another key."
                )
        return nodes

    def _is_filled(self, node: Key) -> bool:
        return any(key[: len(node)] == node for key in self)


def _nodes(data: TensorDictBase, batch_dims: int, prefix: Key) -> Iterable[Node]:
    for name, value in _items(data):
        if is_nested(value):
            key = (*prefix, name)
            node = node_of(key, value, batch_dims)
            if node is not None:
                yield node
            yield from _nodes(value, batch_dims, key)


def _items(data: TensorDictBase) -> Iterable[tuple[str, Any]]:
    """Yield the entries, without those of a lazy stack that can't be stacked."""
    if _lazy_stack(data) is None:
        yield from data.items()
        return
    for name in [*data.keys()]:
        try:
            yield name, data.get(name)
        except RuntimeError:  # values of unequal sizes
            continue


def leaves_of(
    data: TensorDictBase,
    *,
    stored: Container[Key] | None = None,
    is_live: IsLive | None = None,
    fill: Fill | None = None,
) -> Leaves:
    """Return the entries of ``data`` that are stored: all except the origin that the buffer itself adds to samples.

    Trajectory values repeated under ``("next", "trajectory")`` are left out as well: environments write everything
    they observe there too.

    A ragged lazy stack of trajectories, ``[B, -1]``, becomes entries ``[B, T_max, *shape]``, padded with zeros and
    empty text, with ``("collector", "mask")``, True where a step is real.

    Args:
        data: steps.
        stored: the keys of the storage that the data is written to; None as long as it has none.
        is_live: checks ids and steps of a sample against that storage.
        fill: completes the entries of some steps by the optional keys that they lack; see :class:`OptionalKeys`.

    Raises:
        SchemaMismatchError: when it is no TensorDict; when an entry is neither a dense tensor nor text; when the
            elements of a lazy stack have different keys or shapes; when an entry has a name at which the buffer writes
            something of its own.
        TrajectoryValueError: when an entry under ``("next", "trajectory")`` differs from the one under "trajectory".
    """
    if not is_tensor_collection(data):
        raise SchemaMismatchError(f"Got a {type(data).__name__}; a TensorDict of steps is needed.")
    leaves = _read(data, fill)
    entries: dict[Key, Any] = leaves
    for key, value in entries.items():
        if isinstance(value, RaggedLeaf) and value.blobs.shape != tuple(leaves.batch_size):
            _refuse_unequal(key, ["values of unequal sizes within one step"])
    of_trajectory = [key for key in leaves if TRAJECTORY in key[:2]]
    for key in of_trajectory:
        if is_reserved(key) and len(key) != 2:
            raise SchemaMismatchError(
                f"Got {key_name(key)}, but that is where the buffer says what a step comes from. Rename it."
            )
    if of_trajectory or INDEX in leaves or (INDEX[0], "buffer_ids") in leaves:
        leaves.origin = take_origin(leaves, leaves.batch_size, stored, is_live)
    for key in of_trajectory:
        if key[:2] == ("next", TRAJECTORY):
            _check_echo(key, leaves.pop(key), leaves.get(key[1:]))
    return leaves


def _read(data: TensorDictBase, fill: Fill | None = None) -> Leaves:
    if -1 in data.batch_size:
        return _padded(data, fill)
    stack = None if fill is None else _lazy_stack(data)
    if fill is not None and stack is not None and len({frozenset(part.keys(True, True)) for part in _parts(stack)}) > 1:
        return _stacked(stack, fill)
    leaves = Leaves(data, data.batch_size)
    _collect(data, (), leaves)
    if fill is not None:
        fill(leaves, leaves.batch_size)
    return leaves


def _stacked(stack: LazyStackedTensorDict, fill: Fill) -> Leaves:
    """Stack elements of which only some have the optional keys."""
    elements = _filled(_parts(stack), fill)
    leaves = Leaves(_parts(stack)[0], stack.batch_size)
    entries: dict[Key, Any] = leaves
    for key, value in elements[0].items():
        values = _alike(key, elements)
        dim = stack.stack_dim
        if isinstance(values[0], RaggedLeaf):
            entries[key] = stacked_leaf(key, values, dim)
            continue
        leaves[key] = np.stack(values, dim) if isinstance(value, np.ndarray) else torch.stack(values, dim)
    return leaves


def _filled(parts: Sequence[Any], fill: Fill | None) -> list[Leaves]:
    """Return the entries of the elements of a stack, which all have the same keys."""
    elements = [_read(part) for part in parts]
    if fill is not None:
        as_read = [dict(element) for element in elements]
        for element in elements:
            fill(element, element.batch_size, as_read)
    for element in elements[1:]:
        _check_same_keys(elements[0].keys(), element.keys(), ())
    return elements


def _alike(key: Key, elements: Sequence[Leaves]) -> list[Any]:
    """Return the entries of the elements of a stack, which are of one kind, or all ragged."""
    values: list[Any] = [element[key] for element in elements]
    first = len(elements[0].batch_size)
    tensors = all(isinstance(value, (torch.Tensor, RaggedLeaf)) for value in values)
    sizes = {value.shape[first:] for value in values} if tensors else set()
    if any(isinstance(value, RaggedLeaf) for value in values) or (len(sizes) > 1 and _differ_in_first(sizes)):
        return [ragged_leaf(key, value, element.batch_size) for value, element in zip(values, elements, strict=True)]
    _check_kinds(key, values, first)
    return values


def _differ_in_first(shapes: Iterable[Sequence[int]]) -> bool:
    """Return whether shapes differ in their first dimension only."""
    return len({tuple(shape[1:]) for shape in shapes}) == 1 and all(len(shape) for shape in shapes)


def _check_kinds(key: Key, values: Sequence[Any], first: int) -> None:
    if len({(value.shape[first:], value.dtype, isinstance(value, np.ndarray)) for value in values}) > 1:
        _refuse_unequal(key, [_kind(value[0]) for value in values])


def _lazy_stack(data: Any) -> LazyStackedTensorDict | None:
    if type(data) is TensorDict:  # which searches long for attributes that it does not have
        return None
    if not isinstance(data, LazyStackedTensorDict):
        data = getattr(data, "_tensordict", None)  # of a tensorclass, the TensorDict inside
    return data if isinstance(data, LazyStackedTensorDict) else None


def _padded(data: Any, fill: Fill | None) -> Leaves:
    stack = _lazy_stack(data)
    if stack is None or stack.stack_dim != 0 or any(element.ndim != 1 or not len(element) for element in _parts(stack)):
        raise SchemaMismatchError(
            f"Got a ragged stack of batch size {list(data.batch_size)}. Stack whole trajectories [T] along the first "
            "dimension (lazy_stack(trajectories)), at least one step each, or write each with a call of its own."
        )
    lengths = torch.tensor([len(element) for element in _parts(stack)])
    longest = int(lengths.max())
    elements = _filled(_parts(stack), fill)
    padded = Leaves(_parts(stack)[0], torch.Size([len(lengths), longest]))
    for key in elements[0]:
        padded[key] = _pad(_alike(key, elements), longest)
    padded.setdefault(MASK, torch.arange(longest) < lengths[:, None])
    return padded


def _parts(stack: LazyStackedTensorDict) -> list[Any]:
    return stack.tensordicts


def _pad(values: Sequence[Any], longest: int) -> Any:
    if isinstance(values[0], RaggedLeaf):
        rows = []
        for value in values:
            blobs = Blobs.empty((longest,))
            blobs[: len(value.blobs)] = value.blobs
            rows.append(RaggedLeaf(blobs, value.element, value.dtype))
        return stacked_leaf((), rows, 0)
    shape = (len(values), longest, *values[0].shape[1:])
    padded = np.full(shape, "", dtype=object) if isinstance(values[0], np.ndarray) else values[0].new_zeros(shape)
    for row, value in enumerate(values):
        padded[row, : len(value)] = value
    return padded


def _check_same_keys(expected: Iterable[Any], got: Iterable[Any], prefix: Key) -> None:
    for name in {*expected} ^ {*got}:
        key = (*prefix, *(name if isinstance(name, tuple) else (name,)))
        raise SchemaMismatchError(
            f"Got a lazy stack of which only some elements have {key_name(key)}. Give all elements the same keys, "
            f"leave it out (exclude), or build the buffer with optional_keys=[{key_name(key)}]."
        )


def _refuse_unequal(key: Key, kinds: Iterable[str]) -> None:
    raise SchemaMismatchError(
        f"Got a lazy stack whose elements have different {key_name(key)}: {'; '.join(sorted({*kinds}))}. All steps need"
        " the same shape and dtype: pad it, or leave it out (exclude)."
    )


def _kind(value: Any) -> str:
    if isinstance(value, str) or text_array(value) is not None:
        return "text"
    if is_nested(value):
        return "a TensorDict"
    return f"{list(value.shape)} of {getattr(value, 'dtype', type(value).__name__)}"


def _entry_kind(element: Any, name: str) -> str:
    try:
        return _kind(element.get(name))
    except UNLIKE:  # the element is itself such a stack
        return "entries of unequal shapes"


def _check_echo(key: Key, value: Leaf, of_trajectory: Leaf | None) -> None:
    if of_trajectory is None:
        raise SchemaMismatchError(
            f"Got {key_name(key)} without {key_name(key[1:])}; what belongs to a trajectory goes under 'trajectory'."
        )
    ours, theirs = (as_array(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in (of_trajectory, value))
    if ours.shape != theirs.shape or not same_values(ours, theirs).all():
        raise TrajectoryValueError(
            f"Got {key_name(key)} that is another than {key_name(key[1:])}: an entry under 'trajectory' has the same "
            "value at every step of a trajectory. Store values that change under another name."
        )


def _collect(data: TensorDictBase, prefix: Key, leaves: dict[Key, Any]) -> None:
    stack = _lazy_stack(data)
    for name, value in data.items() if stack is None else _stacked_items(stack, data, prefix):
        if isinstance(value, torch.Tensor):
            if value.is_nested:
                leaves[(*prefix, name)] = ragged_leaf((*prefix, name), value, data.batch_size)
                continue
            if value.layout is not torch.strided or value.is_meta:
                raise SchemaMismatchError(
                    f"Got {key_name((*prefix, name))}, a tensor of layout {value.layout} on {value.device}; the arena "
                    "holds dense tensors. Convert it before writing (to_dense())."
                )
            leaves[(*prefix, name)] = value
        elif is_nested(value):
            _collect(value, (*prefix, name), leaves)
        elif isinstance(value, RaggedLeaf):  # of a lazy stack
            leaves[(*prefix, name)] = value
        elif (texts := text_array(value)) is not None:
            leaves[(*prefix, name)] = texts
        elif (items := items_of(value)) is not None:
            leaves[(*prefix, name)] = ragged_leaf((*prefix, name), items, data.batch_size)
        else:
            raise SchemaMismatchError(
                f"Got {key_name((*prefix, name))} of type {type(value).__name__}; the arena holds tensors and text. "
                "Encode it as numbers, or leave it out with a transform (ExcludeTransform)."
            )


def _stacked_items(stack: LazyStackedTensorDict, data: Any, prefix: Key) -> Iterable[tuple[str, Any]]:
    """Stack the entries of a lazy stack, which leaves out silently what only some elements have."""
    names = {*_parts(stack)[0].keys()}
    for element in _parts(stack)[1:]:
        if {*element.keys()} != names:
            _check_same_keys(names, element.keys(), prefix)
    for name in _parts(stack)[0].keys():  # noqa: SIM118 - iterating over a TensorDict yields its rows
        try:
            value = data.get(name)
        except UNLIKE:
            value = _ragged_entry(stack, name, (*prefix, name))
        if isinstance(value, torch.Tensor) and value.is_nested:
            value = _ragged_entry(stack, name, (*prefix, name))
        elif isinstance(value, torch.Tensor) and len(dtypes := _dtypes(stack, name)) > 1:  # torch.stack converts them
            _refuse_unequal((*prefix, name), map(str, dtypes))
        yield name, value


def _dtypes(stack: LazyStackedTensorDict, name: str) -> set[torch.dtype]:
    """Return the dtypes of an entry in the elements of a stack."""
    found: set[torch.dtype] = set()
    for element in _parts(stack):
        if type(element) is TensorDict:  # whose dict is faster than get
            found.add(element._tensordict[name].dtype)
        else:
            inner = _lazy_stack(element)
            found |= {element.get(name).dtype} if inner is None else _dtypes(inner, name)
    return found


def _ragged_entry(stack: LazyStackedTensorDict, name: str, key: Key) -> RaggedLeaf:
    """Return an entry of a lazy stack whose elements have values of unequal sizes."""
    leaves = []
    for element in _parts(stack):
        inner = _lazy_stack(element)
        try:
            value = element.get(name)
        except UNLIKE:
            value = None if inner is None else _ragged_entry(inner, name, key)
        items = None if isinstance(value, (torch.Tensor, RaggedLeaf)) else items_of(value)
        if items is None and not isinstance(value, (torch.Tensor, RaggedLeaf)):
            _refuse_unequal(key, [_entry_kind(part, name) for part in _parts(stack)])
        leaves.append((value if items is None else items, element.batch_size))
    shapes = {tuple(value.shape[len(batch) :]) for value, batch in leaves if isinstance(value, torch.Tensor)}
    if not all(shapes) or len({shape[1:] for shape in shapes}) > 1:
        _refuse_unequal(key, [_entry_kind(part, name) for part in _parts(stack)])
    made = [ragged_leaf(key, value, batch) for value, batch in leaves]
    return stacked_leaf(key, made, stack.stack_dim)
